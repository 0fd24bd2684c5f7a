"""The start-up hook and the stand-in for a missing torchaudio, in real Python processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

ARMED = "import sys; print([f.name for f in sys.meta_path if type(f).__name__ == '_OnFirstImport'])"
BOTH = "['llamafactory', 'llamafactory.data.mm_plugin']"
STAND_IN_ONLY = "['llamafactory.data.mm_plugin']"


def python(code: str, **environment: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True, env=os.environ | environment).strip()


def test_hook_arms_every_process_without_heavy_imports():
    code = ARMED + "; print({'torch', 'wrapt', 'llamafactory', 'transformers'} & set(sys.modules))"
    assert python(code).splitlines() == [BOTH, "set()"]


def test_switched_off_by_the_environment_in_a_process_and_its_children():
    assert python(ARMED, LLAMAFACTORY_EXT="0") == STAND_IN_ONLY
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ARMED!r}], check=True)"
    assert python(child, LLAMAFACTORY_EXT="0") == STAND_IN_ONLY
    assert python(child) == BOTH


def test_a_finder_acts_once_and_finds_nothing_itself():
    from llamafactory_ext._startup import _OnFirstImport

    calls = []
    finder = _OnFirstImport("no_such_module", lambda name, path: calls.append(name))
    sys.meta_path.insert(0, finder)
    assert finder.find_spec("another") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module")
    assert calls == ["no_such_module"]
    assert finder not in sys.meta_path


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed here")
def test_stand_in_for_torchaudio():
    from llamafactory.data import mm_plugin
    from transformers.utils import is_torchaudio_available

    assert mm_plugin.torchaudio.__spec__.name == "torchaudio"
    with pytest.raises(ImportError, match=r"torchaudio\.load was used, but torchaudio is not installed"):
        mm_plugin.torchaudio.load("speech.wav")
    assert "torchaudio" not in sys.modules
    assert not is_torchaudio_available()


@pytest.mark.slow
def test_a_failed_import_of_llamafactory_leads_to_env(tmp_path):
    (tmp_path / "peft.py").write_text("raise RuntimeError('operator does not exist')", encoding="utf-8")
    command = [sys.executable, "-m", "llamafactory.cli", "version"]
    told = "Run `llamafactory-ext env` to see which packages are incompatible and how to fix it."
    for switch in ("1", "0"):
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "LLAMAFACTORY_EXT": switch}
        failed = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert failed.returncode == 1
        assert "RuntimeError: operator does not exist" in failed.stderr
        assert (failed.stderr.splitlines()[-1] == told) == (switch == "1")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed here")
def test_llamafactory_without_the_plugin_still_imports():
    code = (
        "import llamafactory.data.mm_plugin, sys; from llamafactory.hparams import FinetuningArguments as F; "
        "print('dpop_lambda' in F.__dataclass_fields__, 'llamafactory_ext.seam' in sys.modules)"
    )
    assert python(code, LLAMAFACTORY_EXT="0").splitlines()[-1] == "False False"
