"""Packages for a machine that has no package index: downloaded elsewhere into .whl, installed from there."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / ".whl"
PINNED = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "bitsandbytes"),
    *("typer", "annotated-doc", "shellingham", "rich", "pygments", "markdown-it-py", "mdurl", "lion-pytorch"),
)
"""What a machine with torch, transformers, accelerate and triton lacks, or has in too old a version: at the versions of
requirements.lock."""
LIGER = "liger-kernel==0.8.5"
"""Not a dependency: the comparison with ``peft-tuned`` is fair only with it."""
PYTHON = "3.12"
PLATFORMS = ("2_28", "2_27", "2_24", "2_17")
"""Versions of glibc that a wheel may name. pip matches each of them exactly."""
CUDA = "130"
"""Version of CUDA whose library stays in the wheel of bitsandbytes. Those for other versions have 40 MB."""


def download(folder: Path = WHEELS) -> str:
    """Download the wheels into an ignored folder. Returns the list of what must be copied to the other machine.

    Raises:
        RuntimeError: pip could not download one.
    """
    folder.mkdir(exist_ok=True)
    lock = (ROOT / "requirements.lock").read_text()
    pins = [match[0] for name in PINNED if (match := re.search(rf"^{name}==[\w.]+", lock, re.MULTILINE))]
    for requirement in [*pins, LIGER]:
        name, _, version = requirement.partition("==")
        if not list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")):
            _pip_download(requirement, folder)
    for wheel in folder.glob("bitsandbytes-*.whl"):
        slim(wheel)
    files = sorted(folder.glob("*.whl"))
    lines = [f"{file.stat().st_size / 2**20:7.1f} MiB  {file.name}" for file in files]
    wheels = sum(file.stat().st_size for file in files)
    lines.append(f"{_tree() / 2**20:7.1f} MiB  the checkout itself")
    lines.append(f"{(wheels + _tree()) / 2**20:7.1f} MiB  to take along; then, there: python scripts/gpu_check")
    return "\n".join(lines)


def install(folder: Path, site: Path) -> str | None:
    """Install every wheel of a folder into ``site``, without an index. Returns what went wrong, if anything did."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return f"{folder} holds no wheels"
    options = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"pip: {done.returncode}")


def slim(wheel: Path) -> None:
    """Take libraries for other versions of CUDA out of the wheel of bitsandbytes, and write its RECORD anew."""
    with zipfile.ZipFile(wheel) as whole:
        others = [n for n in whole.namelist() if re.search(rf"libbitsandbytes_(?!cuda{CUDA}|cpu)", n)]
        if not others:
            return
        smaller, rows = wheel.with_suffix(".new"), []
        record = next(name for name in whole.namelist() if name.endswith(".dist-info/RECORD"))
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as kept:
            for item in whole.infolist():
                if item.filename in (*others, record):
                    continue
                data = whole.read(item)
                kept.writestr(item, data, zipfile.ZIP_DEFLATED, 9)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                rows.append(f"{item.filename},sha256={digest},{len(data)}")
            kept.writestr(record, "\n".join([*rows, f"{record},,", ""]))
    smaller.replace(wheel)


def _pip_download(requirement: str, folder: Path) -> None:
    platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in PLATFORMS]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64"]
    target = [f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, *target, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{requirement} could not be downloaded: {done.stderr.strip()[-300:]}")


def _tree() -> int:
    """Bytes of the files of the checkout: those of git, and new ones that are not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\0")
    return sum(path.stat().st_size for name in names if name and (path := ROOT / name).is_file())
