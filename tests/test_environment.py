"""`env` and `losses`: the conflicts that are known are found, and every loss is listed as it is trained."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import llamafactory
import pytest
import torch
from llamafactory.hparams import FinetuningArguments

from llamafactory_ext import distributions, environment
from llamafactory_ext.environment import findings
from llamafactory_ext.losses import STOCK_LOSSES
from llamafactory_ext.losses.lookup import get_loss
from llamafactory_ext.recipe.keys import PREF_BETA, keys_of

LLAMAFACTORY = llamafactory.__version__
OLD = LLAMAFACTORY < "0.9.5"
SCRIPT = Path(sys.executable).with_name("llamafactory-ext")


def run(*words, **changes):
    return subprocess.run([str(SCRIPT), *words], env=os.environ | changes, capture_output=True, text=True)


def conflicts():
    return {finding.name: finding.fix for finding in findings() if finding.fix}


@pytest.fixture
def versions(monkeypatch):
    """Other versions than the installed ones; None uninstalls."""
    version, distribution = distributions.version, distributions.distribution

    def pretend(**changes):
        gone = {name for name, number in changes.items() if number is None}
        monkeypatch.setattr(environment, "version", lambda name: changes.get(name, version(name)))
        monkeypatch.setattr(environment, "distribution", lambda name: None if name in gone else distribution(name))

    return pretend


@pytest.fixture
def metadata(monkeypatch, tmp_path):
    """Made-up metadata that is found before the installed one."""

    def write(name, number, content, provides=""):
        info = tmp_path / f"{name}-{number}.dist-info"
        info.mkdir()
        (info / "METADATA").write_bytes(content)
        (info / "top_level.txt").write_text(provides, encoding="utf-8")

    monkeypatch.syspath_prepend(tmp_path)
    # A cache of its own: afterwards, what has been found in half a second is still there for the others.
    monkeypatch.setattr(distributions, "_providers", functools.cache(distributions._providers.__wrapped__))
    return write


@pytest.fixture
def installed(metadata):
    """Made-up distributions of LLaMA-Factory: name, version and requirements."""

    def pretend(name, number, *requirements):
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        metadata(name, number, ("\n".join(lines) + "\n").encode(), provides="llamafactory\n")

    return pretend


@pytest.mark.skipif(OLD, reason="LLaMA-Factory 0.9.4 refuses DeepSpeed 0.19.8, which is reported")
def test_this_environment_has_no_conflict():
    """But for the builds of other packages that the fork requires, which its leg leaves out."""
    assert [finding for finding in findings() if finding.fix and "-kt==" not in finding.value] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="only gloo is concerned")
def test_an_old_deepspeed_without_a_gpu(versions):
    versions(deepspeed="0.18.4")
    fixes = [finding.fix for finding in findings() if finding.name == "DeepSpeed"]
    assert "its ZeRO-3 corrupts weights on gloo: pip install deepspeed==0.19.8" in fixes


def test_a_llamafactory_that_refuses_the_safe_deepspeed(versions):
    versions(llamafactory="0.9.4")
    assert "set DISABLE_VERSION_CHECK=1, or install llamafactory 0.9.5" in conflicts()["DeepSpeed"]


def test_no_deepspeed_is_no_conflict(versions, installed):
    installed("llamafactory", LLAMAFACTORY)
    versions(deepspeed=None)
    assert conflicts() == {}
    assert any("[deepspeed]" in finding.value for finding in findings())


def test_versions_that_llamafactory_refuses(versions, installed):
    installed("llamafactory", LLAMAFACTORY, "trl<=0.24.0,>=0.18.0", "peft>=0.18.0", "torch>=2.4.0")
    versions(trl="0.30.0", peft=None)
    fixes = [finding.fix for finding in findings() if finding.name == "llamafactory needs"]
    assert fixes == [
        '0.30.0 is installed: pip install "trl<=0.24.0,>=0.18.0"',
        'it is not installed: pip install "peft>=0.18.0"',
    ]


@pytest.fixture
def module(monkeypatch, tmp_path):
    """A module that is found before the installed one."""

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        for loaded in [each for each in sys.modules if each.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        written.append(name)

    written = []
    yield write
    for name in written:  # or a later test would find it, where nothing by that name was loaded before
        sys.modules.pop(name, None)


@pytest.fixture
def torch_family(versions, module, monkeypatch):
    """torch and companions of other versions, of which `broken` ones do not import, and the torch that they need."""

    def pretend(torch, torchvision=None, torchaudio=None, broken=(), needs=None):
        versions(torch=torch, torchvision=torchvision, torchaudio=torchaudio)
        for name in ("torchvision", "torchaudio"):
            module(name, "raise RuntimeError('compiled with different CUDA versions')" if name in broken else "")
        metadata = {name: [f"torch{torch_wanted}"] for name, torch_wanted in (needs or {}).items()}
        monkeypatch.setattr(environment, "requires", lambda package: metadata.get(package, []))
        return {name: fix for name, fix in conflicts().items() if name.startswith("torch")}

    return pretend


def test_a_torch_whose_cuda_has_no_torchaudio_is_the_one_to_go(torch_family):
    fixes = torch_family("2.15.0", "0.29.2", "2.11.0", broken=["torchaudio"], needs={"torchvision": ">=2.14.0"})
    assert fixes == {"torchaudio": 'pip install "torch<2.15,>=2.11" torchvision "torchaudio==2.11.0"'}


def test_an_old_torch_gets_the_torchaudio_that_was_built_for_it(torch_family):
    fixes = torch_family("2.6.0", "0.21.0", "2.11.0", broken=["torchaudio"], needs={"torchvision": "==2.6.0"})
    assert fixes == {"torchaudio": 'pip install "torch==2.6.0" torchvision "torchaudio<2.11.0"'}


def test_a_torchvision_of_another_torch_is_known_by_its_metadata(torch_family):
    fixes = torch_family("2.14.1", "0.28.0", "2.11.0", needs={"torchvision": "==2.13.0"})
    assert fixes == {"torchvision": 'pip install "torch==2.14.1" torchvision torchaudio'}
    (found,) = [finding for finding in findings() if finding.name == "torchvision" and finding.fix]
    assert found.value == "0.28.0 needs torch==2.13.0, but 2.14.1 is installed"


def test_both_companions_are_mended_by_one_line(torch_family):
    needs = {"torchvision": "==2.6.0", "torchaudio": "==2.6.0"}
    fixes = torch_family("2.13.0", "0.21.0", "2.6.0", broken=["torchvision", "torchaudio"], needs=needs)
    line = 'pip install "torch==2.13.0" torchvision "torchaudio==2.11.0"'
    assert fixes == {"torchvision": line, "torchaudio": line}


@pytest.mark.parametrize("torch", ["2.13.0+cpu", "2.13.0"])
def test_a_companion_that_pip_would_keep_as_it_is_goes(torch_family, torch):
    """Of another index's build, or broken in spite of its versions: an install line would change nothing."""
    fixes = torch_family(torch, "0.28.0", broken=["torchvision"], needs={"torchvision": "==2.13.0"})
    line = "install torchvision from the package index that torch came from; for text-only data: pip uninstall -y "
    assert fixes == {"torchvision": f"{line}torchvision"}


def test_companions_that_fit_are_no_conflict(torch_family):
    assert torch_family("2.14.1", "0.29.2", "2.11.0", needs={"torchvision": ">=2.14.0"}) == {}


SEES = """
import sys
from llamafactory_ext.environment import findings
for finding in findings():
    print(finding.name, finding.value, finding.fix, sep=" | ")
"""


def seen_with(folder, *flags):
    """The findings of a Python process that looks into a folder first."""
    command = [sys.executable, *flags, "-c", SEES]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_packages_without_metadata_are_asked_themselves(tmp_path):
    """LLaMA-Factory and the plugin on PYTHONPATH, its dependencies beside them, none of the two installed."""
    for name in ("llamafactory", "llamafactory_ext"):
        (tmp_path / name).symlink_to(Path(importlib.import_module(name).__file__).parent)
    site_packages = Path(torch.__file__).parent.parent
    for entry in site_packages.iterdir():
        if not entry.name.startswith(("llamafactory", "__editable__", "torchvision", "torchaudio")):
            (tmp_path / entry.name).symlink_to(entry)
    shown = seen_with(tmp_path, "-S")
    assert f"llamafactory | {LLAMAFACTORY} | \n" in shown
    assert "not installed: pip install" not in shown
    assert "plugin | off: its start-up hook (llamafactory_ext.pth) did not run" in shown


@pytest.mark.parametrize(
    ("package", "content", "shown"),
    [
        ("trl", b"Version: 0.x-dirty\n", "has damaged metadata: the version '0.x-dirty' cannot be read"),
        ("deepspeed", b"Version: not-a-version\n", "has damaged metadata: the version 'not-a-version' cannot be read"),
        ("torch", b"", "has damaged metadata: the version None cannot be read"),
        ("torchvision", b"Version: 1\nRequires-Dist: torch (===x\n", "requirement 'torch (===x' cannot be read"),
        ("anything", b"\xff", "is damaged"),
    ],
)
def test_damaged_metadata_is_a_finding(package, content, shown, metadata):
    """And whatever else there is to find is found."""
    head = b"Metadata-Version: 2.1\nName: " + package.encode() + b"\n"
    metadata(package, "9", head + content if content else b"")
    found = list(findings())
    (damaged,) = [finding for finding in found if "damaged" in finding.value]
    assert shown in damaged.value
    assert damaged.name == (package if package != "anything" else "metadata")
    assert {"python", "plugin", "vLLM"} <= {finding.name for finding in found}


@pytest.mark.parametrize("ending", ["RuntimeError('no kernel')", "SystemExit(3)"])
def test_an_optional_package_that_does_not_import_is_a_finding(versions, module, ending):
    versions(bitsandbytes="0.50.2")
    module("bitsandbytes", f"raise {ending}")
    (broken,) = [finding for finding in findings() if finding.name == "bitsandbytes" and finding.fix]
    assert broken.value.startswith("cannot be imported (" + ending.split("(")[0])
    assert broken.fix.endswith(": pip uninstall -y bitsandbytes")


@pytest.mark.parametrize(("transformers", "fix"), [("5.6.0", 'pip install "transformers<5.6.0"'), ("5.5.4", None)])
def test_a_release_of_transformers_that_breaks_flash_attention_is_a_finding(versions, module, transformers, fix):
    versions(**{"flash-attn": "2.8.3", "transformers": transformers})
    module("flash_attn", "")
    assert conflicts().get("flash-attn") == fix


@pytest.mark.slow
def test_without_docstrings_transformers_does_not_start(tmp_path):
    assert "| unset PYTHONOPTIMIZE (or run without -OO)" in seen_with(tmp_path, "-OO")


@pytest.mark.slow
def test_a_torch_that_does_not_import_is_a_finding(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: not found')", encoding="utf-8")
    shown = seen_with(tmp_path)
    assert "cannot be imported (OSError: libcudart.so.13: not found) | pip install --force-reinstall" in shown


@pytest.mark.parametrize("wanted", ["transformers>=99", "transformers>=4.55.0,!=99"])
def test_versions_that_only_llamafactory_itself_refuses(monkeypatch, wanted):
    """A source tree has no metadata; the development version checks at a launch; its line lacks a shell's quotes."""
    from llamafactory.extras import misc

    monkeypatch.setattr(misc, "check_dependencies", lambda: misc.check_version(wanted))
    fixes = [finding.fix for finding in findings() if finding.name == "LLaMA-Factory"]
    assert fixes == ([f'pip install "{wanted}"'] if wanted == "transformers>=99" else [])


@pytest.mark.slow
def test_a_llamafactory_that_refuses_at_its_import(tmp_path):
    refusal = "transformers>=4.55.0,!=5.6.0 is required. To fix: run `pip install transformers>=4.55.0,!=5.6.0` or so."
    package = tmp_path / "llamafactory"
    (package / "extras").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "extras" / "env.py").write_text('VERSION = "0.9.6.dev0"', encoding="utf-8")
    (package / "hparams.py").write_text(f"raise ImportError({refusal!r})", encoding="utf-8")
    (package / "train").mkdir()
    (package / "train" / "tuner.py").write_text("import llamafactory.hparams", encoding="utf-8")
    shown = seen_with(tmp_path)
    assert "llamafactory | 0.9.6.dev0 | \n" in shown
    assert '| pip install "transformers>=4.55.0,!=5.6.0"\n' in shown
    assert "plugin | not active: LLaMA-Factory cannot be imported" in shown


def test_the_distribution_is_the_one_whose_code_is_imported(installed):
    """The development version goes by another name, and may lie over an installed release."""
    installed("a_fork", LLAMAFACTORY, "transformers!=4.55")  # the first by name of all that may be meant
    installed("llamafactory", "0.1", "transformers==4.30")
    assert distributions.distribution("llamafactory").name == "a_fork"
    assert distributions.requires("llamafactory") == ["transformers!=4.55"]


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda tool: None)
    assert "install g++ and ninja" in conflicts()["DeepSpeed"]


@pytest.mark.slow
def test_command_line_with_and_without_the_plugin():
    on = run("env")
    assert on.returncode == (1 if OLD else 0), on.stdout + on.stderr
    assert "active: LLaMA-Factory knows its keys" in on.stdout
    off = run("env", LLAMAFACTORY_EXT="0", COLUMNS="40")
    assert off.returncode == 1
    assert "LLAMAFACTORY_EXT=0 is set" in off.stdout
    assert "hinge, ipo, kto_pair train the sigmoid loss instead" in off.stdout
    assert "pass pref_loss to TRL 0.20 or later: unset LLAMAFACTORY_EXT\n" in off.stdout, "a line to copy was broken"


def test_keys_are_those_of_the_recipe():
    assert keys_of(get_loss("dpop")) == {"pref_beta": 0.1, "dpop_lambda": 50.0, "sr_lambda": 0.0}
    assert keys_of(get_loss("ipo")) == {"pref_beta": 0.1, "ipo_length_normalize": True}
    assert FinetuningArguments.__dataclass_fields__["pref_beta"].default == PREF_BETA
    for name in (*STOCK_LOSSES, "minor_dpo", "dpop", "sr_dpo", "sr_ipo"):
        for key in keys_of(get_loss(name)):
            assert key in FinetuningArguments.__dataclass_fields__, (name, key)
