"""Packages for a machine with a GPU and no network: fetched here, installed there, into a folder of their own.

    python benchmarks/gpu_packages.py        # make gpu-wheels

Meant for Linux on x86-64 with Python 3.12, torch 2.11 for CUDA 13.0, torchvision, pyarrow, pandas, scipy, statsmodels,
matplotlib, rich, typer and wrapt. What is listed here is not there, or not in a version that LLaMA-Factory takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from gpu_processes import last_line, module, own_folder, remove_leftovers, run

CHECKOUT = Path(__file__).parent.parent.resolve()
WHEELS, SITES = CHECKOUT / ".wheels", CHECKOUT / ".wheels-site"
LIMIT = 45 * 2**20  # bytes; what travels besides is the checkout
ROOM = 400 * 2**20  # bytes that they take installed, with what Python makes of them
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


def check(wheels: Path = WHEELS) -> None:
    """Say beforehand what would keep the wheels from being installed.

    Raises:
        ValueError: with a sentence that says what to do.
    """
    again = "make them again with `make gpu-wheels` where there is a network, and copy them here"
    found = [wheel.name for wheel in wheels.glob("*.whl")]
    missing = [each for each in PACKAGES if not any(name.startswith(_start(each)) for name in found)]
    broken = [wheel.name for wheel in wheels.glob("*.whl") if not zipfile.is_zipfile(wheel)]
    running = ".".join(map(str, sys.version_info[:2]))
    if not found:
        raise ValueError(
            f"LLaMA-Factory is not installed: install it, or bring {wheels}, which `make gpu-wheels` makes where there "
            "is a network."
        )
    if running != PYTHON:
        raise ValueError(
            f"the wheels in {wheels} are for Python {PYTHON}, and this is Python {running}: run gpu.py with Python "
            f"{PYTHON}, or install LLaMA-Factory."
        )
    if missing:
        raise ValueError(f"the wheels of {', '.join(missing)} are missing from {wheels}: {again}.")
    if broken:
        raise ValueError(f"the wheels {', '.join(broken)} in {wheels} are cut off or broken: {again}.")
    if importlib.util.find_spec("pip") is None:
        raise ValueError(f"pip is missing, which installs the wheels: run `{sys.executable} -m ensurepip`.")


def _start(package: str) -> str:
    """What a wheel's name begins with."""
    return package.replace("-", "_").replace("==", "-") + "-"


def install(wheels: Path = WHEELS, sites: Path = SITES) -> Path:
    """Install the wheels into a folder for PYTHONPATH, unless just these have been installed, and return the folder.

    Raises:
        ValueError: with a sentence that says what to do, if they cannot be installed.
        gpu_processes.SignalError: if a signal arrives.
    """
    check(wheels)
    remove_leftovers(sites)
    names = [sys.version, *(f"{wheel.name} {wheel.stat().st_size}" for wheel in sorted(wheels.glob("*.whl")))]
    site = sites / hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
    if site.is_dir():
        return site
    sites.mkdir(exist_ok=True)
    with own_folder(sites) as unfinished:
        if shutil.disk_usage(sites).free < ROOM:
            raise ValueError(f"the wheels take {ROOM / 2**20:.0f} MiB in {sites}, where less is free: make room.")
        started = time.monotonic()
        print(f"The wheels in {wheels} are installed into {site}, once.")
        _install(sorted(wheels.glob("*.whl")), unfinished)
        with contextlib.suppress(OSError):  # another run was faster
            Path(unfinished, "site").replace(site)
        print(f"That took {time.monotonic() - started:.0f} s.")
    return site


def _install(wheels: list[Path], folder: Path) -> None:
    """Install into `site` in a folder, which holds all that pip writes meanwhile, too."""
    environment = os.environ | {"TMPDIR": str(folder)}
    pip = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    pip += ["--disable-pip-version-check", "--target", str(folder / "site"), *map(str, wheels)]
    with (folder / "log").open("w+", encoding="utf-8", errors="replace") as log:
        if run(module("pip", *pip), log, environment) != 0:
            log.seek(0)
            raise ValueError(f"pip could not install the wheels: {last_line(log.read())}")
        # On all cores, and once: where PYTHONDONTWRITEBYTECODE is set, each stage would take 20 seconds for it.
        run(module("compileall", "-q", "-j", "0", str(folder / "site")), log, environment)


if __name__ == "__main__":
    try:
        size = fetch()
    except subprocess.CalledProcessError as error:
        sys.exit(f"gpu_packages.py: pip ended with status {error.returncode}: what it says is above.")
    print(f"{WHEELS}: {len(list(WHEELS.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")
    if size > LIMIT:
        sys.exit(f"gpu_packages.py: that is more than {LIMIT / 2**20:.0f} MiB: leave a package out.")
