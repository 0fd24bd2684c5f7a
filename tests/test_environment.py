"""`env` and `losses`: the conflicts that are known are found, and every loss is listed as it is trained."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from llamafactory.hparams import FinetuningArguments

from llamafactory_ext import environment
from llamafactory_ext.arguments import PREF_BETA, STOCK_LOSSES, keys_of
from llamafactory_ext.environment import findings
from llamafactory_ext.registry import get_loss

OLD = version("llamafactory") < "0.9.5"
SCRIPT = Path(sys.executable).with_name("llamafactory-ext")


def run(*words, **changes):
    return subprocess.run([str(SCRIPT), *words], env=os.environ | changes, capture_output=True, text=True)


def conflicts():
    return {finding.name: finding.fix for finding in findings() if finding.fix}


@pytest.fixture
def versions(monkeypatch):
    """Other versions than the installed ones; None uninstalls."""
    installed = environment.version

    def pretend(**changes):
        monkeypatch.setattr(environment, "version", lambda name: changes.get(name, installed(name)))

    return pretend


@pytest.mark.skipif(OLD, reason="LLaMA-Factory 0.9.4 refuses DeepSpeed 0.19.8, which is reported")
def test_this_environment_has_no_conflict():
    assert conflicts() == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="only gloo is concerned")
def test_an_old_deepspeed_without_a_gpu(versions):
    versions(deepspeed="0.18.4")
    fixes = [finding.fix for finding in findings() if finding.name == "DeepSpeed"]
    assert "its ZeRO-3 corrupts weights on gloo: pip install deepspeed==0.19.8" in fixes


def test_a_llamafactory_that_refuses_the_safe_deepspeed(versions):
    versions(llamafactory="0.9.4")
    assert "set DISABLE_VERSION_CHECK=1, or install llamafactory 0.9.5" in conflicts()["DeepSpeed"]


def test_no_deepspeed_is_no_conflict(versions):
    versions(deepspeed=None)
    assert conflicts() == {}
    assert any("[deepspeed]" in finding.value for finding in findings())


def test_versions_that_llamafactory_refuses(versions):
    versions(trl="0.30.0", peft=None)
    fixes = [finding.fix for finding in findings() if finding.name == "llamafactory needs"]
    assert len(fixes) == 2
    assert any(fix.startswith("0.30.0 is installed: pip install") for fix in fixes)
    assert any(fix.startswith("it is not installed: pip install") for fix in fixes)


def test_a_torchvision_that_does_not_import(versions, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(environment, "_requires", lambda package: [])
    versions(torchvision="0.1")
    assert "uninstall torchvision" in conflicts()["torchvision"]


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda tool: None)
    assert "install g++ and ninja" in conflicts()["DeepSpeed"]


@pytest.mark.slow
def test_command_line_with_and_without_the_plugin():
    on = run("env")
    assert on.returncode == (1 if OLD else 0), on.stdout + on.stderr
    assert "active: LLaMA-Factory knows its keys" in on.stdout
    off = run("env", LLAMAFACTORY_EXT="0")
    assert off.returncode == 1
    assert "LLAMAFACTORY_EXT=0 is set" in off.stdout
    assert "hinge, ipo, kto_pair train sigmoid" in off.stdout


def test_keys_are_those_of_the_recipe():
    assert keys_of(get_loss("dpop")) == {"pref_beta": 0.1, "dpop_lambda": 50.0, "sr_lambda": 0.0}
    assert keys_of(get_loss("ipo")) == {"pref_beta": 0.1, "ipo_length_normalize": True}
    assert FinetuningArguments.__dataclass_fields__["pref_beta"].default == PREF_BETA
    for name in (*STOCK_LOSSES, "minor_dpo", "dpop", "sr_dpo", "sr_ipo"):
        for key in keys_of(get_loss(name)):
            assert key in FinetuningArguments.__dataclass_fields__, (name, key)


@pytest.mark.slow
def test_losses_are_listed_with_equation_and_keys(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("mine")\n'
        "def mine(pairs, *, beta: float, tau: float, kappa: float = 2.0):\n"
        '    """tau kappa [D_w]."""\n',
        encoding="utf-8",
    )
    shown = run("losses", "--pref-loss-file", str(file), COLUMNS="200").stdout
    for text in (
        *STOCK_LOSSES,
        "minor_dpo",
        "sr_dpo",
        "sr_ipo",
        "-log sigma(beta D_w - beta relu(D_l))",
        "dpop_lambda: 50.0",
        "arXiv 2408.09834",
    ):
        assert text in shown
    for text in ("tau kappa [D_w].", "pref_loss_args.tau: (required)", "pref_loss_args.kappa: 2.0"):
        assert text in shown

    wrong = run("losses", "--pref-loss-file", "absent.py")
    assert wrong.returncode == 2
    assert "is not a file" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
