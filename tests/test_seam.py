"""The seam: every patch fits the installed LLaMA-Factory, and fails loudly where it does not."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llamafactory_ext import seam


@pytest.mark.parametrize("patch", seam.PATCHES, ids=lambda patch: patch.module)
def test_needs_are_met_by_the_installed_version(patch):
    module = importlib.import_module(patch.module)
    for name, parameters in patch.needs.items():
        seam._check(module, name, parameters)


@pytest.mark.parametrize("patch", seam.PATCHES, ids=lambda patch: patch.module)
def test_missing_symbol_is_an_import_error_with_both_versions_and_the_switch(patch):
    with pytest.raises(ImportError) as error:
        seam._apply(patch, ModuleType(patch.module))
    message = str(error.value)
    assert "is missing" in message
    assert importlib.metadata.version("llamafactory") in message
    assert importlib.metadata.version("llamafactory-ext") in message
    assert "LLAMAFACTORY_EXT=0" in message


def test_changed_signature_is_an_import_error():
    module = ModuleType("llamafactory.train.dpo.workflow")
    module.run_dpo = lambda model_args, data_args, callbacks: None
    patch = next(patch for patch in seam.PATCHES if patch.module == module.__name__)
    with pytest.raises(ImportError, match="run_dpo does not take training_args, finetuning_args"):
        seam._apply(patch, module)


def test_stages_other_than_dpo_run_llamafactorys_own_code():
    from llamafactory.train import tuner

    for stage in ("pt", "sft", "rm", "ppo", "kto"):
        assert getattr(tuner, f"run_{stage}").__module__ == f"llamafactory.train.{stage}.workflow"
        assert not hasattr(getattr(tuner, f"run_{stage}"), "__wrapped__")
    assert hasattr(tuner.run_dpo, "__wrapped__")


def test_the_stock_trainer_is_put_back_after_a_run():
    module = SimpleNamespace(CustomDPOTrainer="stock")

    def failing_run():
        with seam._replaced(module, "CustomDPOTrainer", "ours"):
            assert module.CustomDPOTrainer == "ours"
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing_run()
    assert module.CustomDPOTrainer == "stock"


def test_a_trainer_that_is_not_ours_is_refused():
    from llamafactory_ext.trainer import TrainerCheck

    with pytest.raises(RuntimeError, match="not llamafactory_ext's"):
        TrainerCheck().on_init_end(None, None, None)


@pytest.mark.parametrize("words", [["recipe.yaml"], ["recipe.yaml", "pref_loss=minor_dpo"]])
def test_v1_refuses_our_losses(words, tmp_path, monkeypatch):
    loss = "dpop" if len(words) == 1 else "sigmoid"
    (tmp_path / "recipe.yaml").write_text(f"stage: dpo\npref_loss: {loss}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", *words])
    with pytest.raises(ValueError, match="cannot be trained with USE_V1"):
        seam._launch_v1(pytest.fail, None, (), {})


def test_v1_runs_everything_else(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text("stage: sft\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", "train", "recipe.yaml"])
    called = []
    seam._launch_v1(lambda: called.append(True), None, (), {})
    assert called == [True]
