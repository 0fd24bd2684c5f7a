"""Wheel and editable installs in throw-away environments: the hook comes, works, breaks nothing, and leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
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
            command, text=True, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": ""} | environment
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


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Built from the source distribution, as PyPI's users build it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "uv", "--quiet", "build", "--out-dir", str(folder), str(source)], check=True)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package_and_the_hook_only(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        record = content.read(next(name for name in names if name.endswith("RECORD"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"llamafactory_ext", "llamafactory_ext.pth"}
    assert "llamafactory_ext.pth," in record
    assert "llamafactory_ext/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_alone_has_all_that_a_user_needs(wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.uv("install", "--no-deps", str(wheel))
    # The dependencies are this environment's: a path's own .pth files are not read, so the checkout stays out of sight.
    (environment.site_packages / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    place = environment.run("-c", "import llamafactory_ext; print(llamafactory_ext.__file__)").splitlines()[-1]
    assert Path(place).is_relative_to(environment.site_packages)

    command = str(environment.python.with_name("llamafactory-ext"))
    folder = tmp_path / "folder"
    folder.mkdir()

    def run(*words: str) -> str:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.check_output([command, *words], cwd=folder, text=True, env=clean | {"COLUMNS": "200"})

    assert "files written to examples, data, evaluation" in run("examples")
    assert (folder / "examples" / "deepspeed" / "zero3.json").is_file()
    assert "minor_dpo" in run("losses")
    usage = subprocess.check_output([str(environment.python), "evaluation/gsm8k.py", "--help"], cwd=folder, text=True)
    assert "Score a model on GSM8K" in usage
    run("data", "corrupt", "data/gsm8k_sample.jsonl", "--output", "data/mine.jsonl")
    assert (folder / "data" / "mine.jsonl").is_file()
