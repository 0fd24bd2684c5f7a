"""`benchmarks/gpu_packages.py`: the wheels of `benchmarks/gpu.py`, fetched and installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gpu_packages
import pytest


def make_wheel(folder, metadata=True):
    """The wheel of a package `tiny`."""
    folder.mkdir()
    about = {"METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n", "RECORD": ""}
    about["WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as file:
        file.writestr("tiny.py", "")
        for name, content in about.items() if metadata else ():
            file.writestr(f"tiny-1.dist-info/{name}", content)
    return folder


@pytest.fixture
def tiny_packages(monkeypatch):
    monkeypatch.setattr(gpu_packages, "PACKAGES", ("tiny==1",))
    monkeypatch.setattr(gpu_packages, "PYTHON", ".".join(map(str, sys.version_info[:2])))
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")


def test_wheels_are_installed_once(tmp_path, tiny_packages, capsys):
    wheels, sites = make_wheel(tmp_path / "wheels"), tmp_path / "sites"
    site = gpu_packages.install(wheels, sites)
    assert (site / "tiny.py").is_file()
    assert list((site / "__pycache__").iterdir())
    assert list(sites.iterdir()) == [site]
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"The wheels in {wheels} are installed into {site}, once."
    assert second.startswith("That took ")
    assert gpu_packages.install(wheels, sites) == site
    assert capsys.readouterr().out == ""


def test_what_pip_cannot_install_is_said_in_its_words(tmp_path, tiny_packages):
    wheels = make_wheel(tmp_path / "wheels", metadata=False)
    with pytest.raises(ValueError, match=r"^pip could not install the wheels: ERROR: tiny.* \.dist-info"):
        gpu_packages.install(wheels, tmp_path / "sites")
    assert list((tmp_path / "sites").iterdir()) == []


def refusal(wheels):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the caller compares its words
        gpu_packages.install(wheels, wheels.parent / "sites")
    return str(raised.value)


def test_what_keeps_wheels_from_being_installed_is_said_beforehand(tmp_path, tiny_packages, monkeypatch):
    again = "make them again with `make gpu-wheels` where there is a network, and copy them here."
    assert refusal(tmp_path / "none").startswith("LLaMA-Factory is not installed: install it, or bring")
    wheels = make_wheel(tmp_path / "wheels")
    with monkeypatch.context() as other:
        other.setattr(gpu_packages, "PACKAGES", ("tiny==1", "a-b==2", "c==3"))
        assert refusal(wheels) == f"the wheels of a-b==2, c==3 are missing from {wheels}: {again}"
    with monkeypatch.context() as other:
        other.setattr(gpu_packages, "PYTHON", "3.9")
        assert "are for Python 3.9, and this is Python 3.1" in refusal(wheels)
    with monkeypatch.context() as other:
        other.setattr(gpu_packages, "ROOM", 2**60)
        assert refusal(wheels).endswith(f"MiB in {tmp_path / 'sites'}, where less is free: make room.")
    (wheels / "tiny-1-py3-none-any.whl").write_bytes(b"PK half")
    assert refusal(wheels) == f"the wheels tiny-1-py3-none-any.whl in {wheels} are cut off or broken: {again}"
    assert list((tmp_path / "sites").iterdir()) == []


def test_without_pip_it_says_how_to_get_it(tmp_path):
    make_wheel(tmp_path / "wheels")
    code = "import sys, pathlib, gpu_packages as packages; packages.PACKAGES = ('tiny==1',)"
    code += "; packages.PYTHON = '%d.%d' % sys.version_info[:2]; packages.check(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-S", "-c", code, str(tmp_path / "wheels")]
    found = os.environ | {"PYTHONPATH": str(Path(gpu_packages.__file__).parent)}
    done = subprocess.run(command, env=found, capture_output=True, text=True)
    last = f"ValueError: pip is missing, which installs the wheels: run `{sys.executable} -m ensurepip`."
    assert done.stderr.splitlines()[-1] == last


def test_the_wheel_of_bitsandbytes_keeps_one_library(tmp_path):
    wheel = tmp_path / "bitsandbytes-1-py3-none-any.whl"
    kept = [
        "bitsandbytes/__init__.py",
        f"bitsandbytes/{gpu_packages.BITSANDBYTES}",
        "bitsandbytes-1.dist-info/METADATA",
    ]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in [*kept, "bitsandbytes/libbitsandbytes_cuda118.so", "bitsandbytes/libbitsandbytes_rocm72.so"]:
            file.writestr(name, name)
    gpu_packages.slim(wheel)
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == kept
        assert all(file.read(name) == name.encode() for name in kept)
    assert list(tmp_path.iterdir()) == [wheel]
