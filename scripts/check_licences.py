"""Check the licences of all installed packages against those allowed for this project. Exits with 1 if one is not.

python scripts/check_licences.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions

ALLOWED = {
    "0BSD", "Academic Free License (AFL)", "Apache 2.0 License", "Apache Software License",
    "Apache Software License 2.0", "Apache-2.0", "BSD", "BSD License", "3-Clause BSD License", "BSD-2-Clause",
    "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "FreeBSD", "ISC", "ISC License (ISCL)", "LLVM-exception",
    "MIT", "MIT License", "MIT-CMU", "Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0", "PSF-2.0",
    "Python Software Foundation License", "The MIT License (MIT)", "The Unlicense (Unlicense)", "Unlicense", "Zlib",
}  # fmt: skip
"""Allowed licences as packages write them: permissive licences, and the Mozilla licence, which applies only to changes
of its own files."""
EXCEPTIONS = {
    "chardet": "LGPL, used unchanged, a dependency of the extra `eval` (lm-eval)",
    "pycocoevalcap": "declares none; it brings METEOR (LGPL) and Stanford's tokenizer (GPL), run unchanged as "
    "processes of their own; a dependency of the extra `nlg`",
    "nvidia-": "NVIDIA's own licence, with the CUDA builds of torch: use is allowed, changes are not",
    "cuda-": "as nvidia-",
}
"""Reasons why other packages are allowed, by the beginning of the package's name."""


def licences(package: Distribution) -> list[str]:
    """Return the licences that a package declares: in its SPDX expression, else in its classifiers, else in the first
    line of the old field."""
    found = package.metadata
    classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    classified = [name for name in classified if name != "OSI Approved"]
    old = (found.get("License") or "unknown").strip().splitlines()[:1]
    given = [found["License-Expression"]] if found.get("License-Expression") else classified or old
    return [part for text in given for part in re.split(r"\s+(?:AND|OR|WITH)\s+", text)]


def refused(packages: Iterable[Distribution]) -> list[str]:
    """Return a line for each package with a licence that is not allowed."""
    lines = []
    for package in packages:
        name = package.metadata["Name"]
        unknown = [licence for licence in licences(package) if licence not in ALLOWED]
        if unknown and not name.lower().startswith(tuple(EXCEPTIONS)):
            lines.append(f"{name} {package.version}: {', '.join(unknown)}")
    return sorted(lines)


def main() -> None:
    packages = list(distributions())
    if lines := refused(packages):
        sys.exit("\n".join(["these licences are not in ALLOWED (scripts/check_licences.py):", *lines]))
    print(f"{len(packages)} packages, all with allowed licences")


if __name__ == "__main__":
    main()
