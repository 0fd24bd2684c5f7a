"""The seam: every patch fits the installed LLaMA-Factory, and fails loudly where it does not."""

from __future__ import annotations

import copy
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Literal

import pytest
from llamafactory.extras.env import VERSION
from packaging.version import Version

from llamafactory_ext import __version__, patching, seam
from llamafactory_ext.losses import STOCK_LOSSES
from llamafactory_ext.training import v1
from llamafactory_ext.webui import patches as board

PATCHES = (*seam.PATCHES, *board.PATCHES, *v1.PATCHES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.module)
def test_needs_are_met_by_the_installed_version(patch):
    module = importlib.import_module(patch.module)
    for name, parameters in patch.needs.items():
        patching.check(module, name, parameters)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.module)
def test_missing_symbol_is_an_import_error_with_both_versions_and_the_switch(patch):
    with pytest.raises(ImportError) as error:
        patching.apply(patch, ModuleType(patch.module))
    message = str(error.value)
    assert "is missing" in message
    assert VERSION in message
    assert __version__ in message
    assert "LLAMAFACTORY_EXT=0" in message


def test_changed_signature_is_an_import_error():
    module = ModuleType("llamafactory.train.dpo.workflow")
    module.run_dpo = lambda model_args, data_args, callbacks: None
    patch = next(patch for patch in seam.PATCHES if patch.module == module.__name__)
    with pytest.raises(ImportError, match="run_dpo does not take training_args, finetuning_args"):
        patching.apply(patch, module)


def test_stages_other_than_dpo_run_llamafactorys_own_code():
    from llamafactory.train import tuner

    for stage in ("pt", "sft", "rm", "ppo", "kto"):
        assert getattr(tuner, f"run_{stage}").__module__ == f"llamafactory.train.{stage}.workflow"
        assert not hasattr(getattr(tuner, f"run_{stage}"), "__wrapped__")
    assert hasattr(tuner.run_dpo, "__wrapped__")


def test_the_stock_trainer_is_put_back_after_a_run():
    module = SimpleNamespace(CustomDPOTrainer="stock")

    def failing_run():
        with patching.replaced(module, "CustomDPOTrainer", "ours"):
            assert module.CustomDPOTrainer == "ours"
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing_run()
    assert module.CustomDPOTrainer == "stock"


def test_a_trainer_that_is_not_ours_is_refused():
    from llamafactory_ext.training.trainer import TrainerCheck

    with pytest.raises(RuntimeError, match="not llamafactory_ext's"):
        TrainerCheck().on_init_end(None, None, None)


def test_a_reference_that_is_not_loaded_can_be_looked_at_and_not_be_used():
    from llamafactory_ext.training.reference.model import PendingReference

    pending = PendingReference(print, None, None)
    assert not hasattr(pending, "eval")
    assert getattr(pending, "config", None) is None
    assert copy.deepcopy(pending) == pending
    with pytest.raises(AttributeError, match="not llamafactory_ext's"):
        pending.eval()


# --- the v1 engine ----------------------------------------------------------------------------------------------------

LOSSES_OF_V1 = ("sigmoid", "orpo", "simpo") if Version(VERSION) >= Version("0.9.6.dev0") else ()


@pytest.fixture
def launch_v1(tmp_path, monkeypatch):
    """Launch the v1 engine with a recipe and words of the command line, up to where LLaMA-Factory's own code begins."""
    monkeypatch.chdir(tmp_path)

    def launch(recipe, *words):
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "dpo", "recipe.yaml", *words])
        started = []
        v1._launch_v1(lambda: started.append(True), None, (), {})
        return started == [True]

    return launch


@pytest.mark.parametrize("loss", [*STOCK_LOSSES, "minor_dpo", "dpop", "sr_dpo", "sr_ipo", "mine"])
def test_v1_runs_the_losses_that_it_has_and_refuses_all_others(loss, launch_v1):
    if loss in LOSSES_OF_V1:
        assert launch_v1(f"pref_loss: {loss}")
    else:
        has = "only the preference losses sigmoid, orpo, simpo" if LOSSES_OF_V1 else "no preference losses"
        with pytest.raises(ValueError, match=f"{loss}' cannot be trained with USE_V1: .* has {has}. Unset USE_V1"):
            launch_v1(f"pref_loss: {loss}")


def test_v1_goes_by_the_losses_in_its_engines_type(launch_v1, monkeypatch):
    """As LLaMA-Factory 0.9.6.dev0 declares them, whatever version is installed."""
    from llamafactory.v1.config.training_args import TrainingArguments

    monkeypatch.setitem(TrainingArguments.__annotations__, "pref_loss", Literal["sigmoid", "orpo", "simpo"])
    assert launch_v1("pref_loss: orpo")
    with pytest.raises(ValueError, match="has only the preference losses sigmoid, orpo, simpo"):
        launch_v1("pref_loss: hinge")


def test_v1_the_command_line_decides(launch_v1):
    with pytest.raises(ValueError, match="'minor_dpo' cannot be trained with USE_V1"):
        launch_v1("pref_loss: sigmoid", "pref_loss=minor_dpo")


def test_v1_runs_everything_else(launch_v1):
    assert launch_v1("model: some/model")
