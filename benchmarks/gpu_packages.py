"""Packages for a machine with a GPU and no network: fetched here, installed there, into a folder of their own.

    python benchmarks/gpu_packages.py        # make gpu-wheels

Meant for Linux on x86-64 with Python 3.12, torch 2.11 for CUDA 13.0, torchvision, pyarrow, pandas, scipy, statsmodels,
matplotlib, rich, typer and wrapt. What is listed here is not there, or not in a version that LLaMA-Factory takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent.resolve()
WHEELS, SITES = CHECKOUT / ".wheels", CHECKOUT / ".wheels-site"
LIMIT = 45 * 2**20  # bytes; what travels besides is the checkout
PACKAGES = (
    "llamafactory==0.9.5",
    "transformers==5.6.0",
    "tokenizers==0.22.2",
    "accelerate==1.11.0",
    "peft==0.18.1",
    "trl==0.24.0",
    "datasets==4.0.0",
    "multiprocess==0.70.16",
    "dill==0.3.8",
    "fsspec==2025.3.0",
    "omegaconf==2.4.0",
    "pydantic==2.14.4",
    "pydantic-core==2.50.5",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
    "bitsandbytes==0.50.2",
)
PYTHON = "3.12"
GLIBC = (28, 27, 24, 17)  # that of 2.28 and all before; pip wants each by name
BITSANDBYTES = "libbitsandbytes_cuda130.so"  # of a dozen libraries, the one for that CUDA


def fetch(folder: Path = WHEELS) -> int:
    """Download the wheels into an empty folder and return their size in bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp", "--dest", str(folder)]
    subprocess.run([*command, *(f"--platform={name}" for name in platforms), *PACKAGES], check=True)
    slim(next(folder.glob("bitsandbytes-*.whl")))
    return sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))


def slim(wheel: Path) -> None:
    """Leave bitsandbytes' libraries for other CUDA versions and other makers' chips out of its wheel."""
    unfinished = wheel.with_suffix(".unfinished")
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as slimmed:
        for name in whole.namelist():
            is_other = name.endswith(".so") and not name.endswith(BITSANDBYTES)
            if not is_other:
                slimmed.writestr(name, whole.read(name))
    unfinished.replace(wheel)


def install(wheels: Path = WHEELS, sites: Path = SITES) -> Path:
    """Install the wheels into a folder for PYTHONPATH, unless just these have been installed, and return the folder.

    Raises:
        subprocess.CalledProcessError: if pip cannot; it has said why.
    """
    names = [sys.version, *(f"{wheel.name} {wheel.stat().st_size}" for wheel in sorted(wheels.glob("*.whl")))]
    site = sites / hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    if site.is_dir():
        return site
    sites.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=sites) as unfinished:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "--target", f"{unfinished}/site"]
        subprocess.run([*command, *map(str, sorted(wheels.glob("*.whl")))], check=True)
        # On all cores, and once: where PYTHONDONTWRITEBYTECODE is set, each stage would take 20 seconds for it.
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", f"{unfinished}/site"], check=False)
        with contextlib.suppress(OSError):  # another run was faster
            Path(unfinished, "site").replace(site)
    return site


if __name__ == "__main__":
    size = fetch()
    print(f"{WHEELS}: {len(list(WHEELS.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")
    if size > LIMIT:
        sys.exit(f"gpu_packages.py: that is more than {LIMIT / 2**20:.0f} MiB: leave a package out.")
