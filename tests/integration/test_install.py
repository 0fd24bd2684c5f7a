"""Wheel and editable installs in throw-away environments: the hook comes, works, breaks nothing, and leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ARMED = (
    "import sys; print(any(type(f).__name__ == '_OnFirstImport' and f.name == 'llamafactory' for f in sys.meta_path))"
)


class Environment:
    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site_packages = next(folder.glob("lib/python*/site-packages"))

    def run(self, *words: str, **environment: str) -> str:
        command = [str(self.python), *words]
        return subprocess.check_output(
            command, text=True, stderr=subprocess.STDOUT, env=os.environ | environment
        ).strip()

    def uv(self, *words: str) -> None:
        subprocess.run([sys.executable, "-m", "uv", "--quiet", "pip", *words, "--python", str(self.python)], check=True)

    def files(self) -> set[Path]:
        return {path for path in self.site_packages.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that a build leaves nothing in the checkout and tests can break it."""
    folder = tmp_path_factory.mktemp("source") / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv*", "outputs", "build", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored))


@pytest.fixture(params=["wheel", "editable"])
def installed(request, source, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.before = environment.files()
    target = [str(source)] if request.param == "wheel" else ["-e", str(source)]
    environment.uv("install", "--no-deps", *target)
    return environment


def test_hook_comes_with_the_install_and_leaves_with_it(installed):
    assert installed.run("-c", ARMED) == "True"
    assert installed.run("-c", ARMED, LLAMAFACTORY_EXT="0") == "False"
    assert (installed.site_packages / "llamafactory_ext.pth").is_file()
    # Without llamafactory, an import of it fails as it always did.
    assert "ImportError" in installed.run("-c", "try:\n import llamafactory\nexcept ImportError: print('ImportError')")

    installed.uv("uninstall", "llamafactory-ext")
    assert installed.run("-c", ARMED) == "False"
    assert installed.files() == installed.before


def test_broken_plugin_does_not_break_python(source, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.uv("install", "--no-deps", str(source))
    (environment.site_packages / "llamafactory_ext" / "_startup.py").write_text("1 / 0", encoding="utf-8")
    assert environment.run("-c", "print('alive')").splitlines()[-1] == "alive"
    shutil.rmtree(environment.site_packages / "llamafactory_ext")
    assert environment.run("-c", "print('alive')").splitlines()[-1] == "alive"


def test_wheel_holds_the_package_and_the_hook_only(source, tmp_path):
    command = [sys.executable, "-m", "uv", "--quiet", "build", "--wheel", "--out-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        record = wheel.read(next(name for name in names if name.endswith("RECORD"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"llamafactory_ext", "llamafactory_ext.pth"}
    assert "llamafactory_ext.pth," in record
