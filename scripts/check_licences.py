"""Licences of everything that is installed, against what this project may depend on. Exit code 1 if one is not known.

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
    "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "ISC License (ISCL)", "LLVM-exception", "MIT",
    "MIT License", "MIT-CMU", "Mozilla Public License 2.0 (MPL 2.0)", "MPL-2.0", "PSF-2.0",
    "Python Software Foundation License", "The MIT License (MIT)", "The Unlicense (Unlicense)", "Unlicense", "Zlib",
}  # fmt: skip
"""As packages write them: permissive ones, and the Mozilla licence, which binds changes to its own files only."""
EXCEPTIONS = {
    "chardet": "LGPL, unchanged, of the extra `eval` (lm-eval)",
    "nvidia-": "NVIDIA's own, with the CUDA builds of torch: may be used, not changed",
    "cuda-": "as nvidia-",
}
"""By the beginning of the name: why it is fine all the same."""


def licences(package: Distribution) -> list[str]:
    """Licences a package declares: by SPDX expression, else by classifier, else by the first line of the old field."""
    found = package.metadata
    classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    classified = [name for name in classified if name != "OSI Approved"]
    old = (found.get("License") or "unknown").strip().splitlines()[:1]
    given = [found["License-Expression"]] if found.get("License-Expression") else classified or old
    return [part for text in given for part in re.split(r"\s+(?:AND|OR|WITH)\s+", text)]


def refused(packages: Iterable[Distribution]) -> list[str]:
    """A line for each package with a licence that is not allowed."""
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
        sys.exit("\n".join(["licences that are not in ALLOWED (scripts/check_licences.py):", *lines]))
    print(f"{len(packages)} packages, all of licences that are allowed")


if __name__ == "__main__":
    main()
