"""The recipes with FSDP2 on two gloo ranks, at toy size: trained as in one process, evaluated, saved, resumed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from llamafactory.train.tuner import run_exp
from safetensors.torch import load_file
from tiny import make_model
from transformers import AutoModelForCausalLM
from two_ranks import ENDS_AT_ONCE, PATH, assert_same_training, logs, models, train_on_two_ranks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((ROOT / "examples").rglob("*.yaml"))}
RECIPES = [name for name, path in FILES.items() if "fsdp" in yaml.safe_load(path.read_text(encoding="utf-8"))]
CONFIGS = {"GPTNeoXLayer": "GPTNeoXConfig", "MistralDecoderLayer": "MistralConfig"}
UNITS = 3  # of FSDP: two layers, and what is around them

PYTHIA = "pythia-2.8b_full_"
OTHER = {"ref_model": "other"}  # than the policy
IN_MEMORY = OTHER | {"precompute_ref_log_probs": False}
EVALUATION = {"eval_dataset": "hh_rlhf_sample", "eval_strategy": "steps", "eval_steps": 2}
# Runs that one process can do, too: the recipe, and what is changed in it.
RUNS = {
    **{name: (name, {}) for name in RECIPES},
    **{f"{loss}-in-memory": (PYTHIA + loss, IN_MEMORY) for loss in ("sigmoid", "ipo", "sr_dpo", "sr_ipo")},
    "minor_dpo-in-memory": (f"{PYTHIA}sigmoid", IN_MEMORY | {"pref_loss": "minor_dpo"}),
    "named-reference": (f"{PYTHIA}sr_ipo", OTHER),
    "evaluated": (f"{PYTHIA}sr_dpo", EVALUATION),
}
RESUMED = (f"{PYTHIA}sft", f"{PYTHIA}sr_dpo")
SAVED = {"save_strategy": "steps", "save_steps": 2}
SMALL = {
    "bf16": False,
    "max_steps": 4,
    "learning_rate": 1.0e-3,
    "warmup_steps": 1,
    "max_grad_norm": 1.0,  # below the gradients' norms
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "preprocessing_num_workers": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "overwrite_cache": True,
}


@pytest.fixture(scope="module")
def recipe_of(tmp_path_factory):
    """A recipe for a tiny model and the sample of its data; what it says of FSDP, optimizer and loss stays."""
    folder = tmp_path_factory.mktemp("models")

    def model(config, seed, dtype):
        path = folder / f"{config}-{seed}-{dtype}"
        shape = {"max_position_embeddings": 1024, "tie_word_embeddings": False}  # with room for the Sr paper's prompt
        return str(path if path.is_dir() else make_model(path, seed, dtype, config, **shape))

    def of(name, output, dtype="float32", **changes):
        settings = yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
        config = CONFIGS[settings["fsdp_config"]["transformer_layer_cls_to_wrap"]]
        settings |= {"model_name_or_path": model(config, 1, dtype), "output_dir": str(output), **SMALL}
        settings |= {"dataset_dir": str(ROOT / "data"), "dataset": f"{settings['dataset']}_sample"}
        if settings["stage"] == "dpo":
            settings["ref_log_probs_cache_dir"] = str(output / "references")  # empty
        if "ref_model" in changes:
            changes = changes | {"ref_model": model(config, 0, dtype)}
        return settings | changes

    return of


@pytest.fixture(scope="module")
def trained(recipe_of, tmp_path_factory):
    """All runs in one launch, with what the recipes' launch lines set in the environment."""
    folder = tmp_path_factory.mktemp("fsdp")
    recipes = [recipe_of(name, folder / run, **changes) for run, (name, changes) in RUNS.items()]
    for name in RESUMED:
        whole = folder / f"{name}-whole"
        recipes.append(recipe_of(name, whole, **SAVED))
        checkpoint = {"resume_from_checkpoint": str(whole / "checkpoint-2")}
        recipes.append(recipe_of(name, folder / f"{name}-resumed", **checkpoint))
    recipes.append(recipe_of(f"{PYTHIA}ipo", folder / "model-only", **SAVED, save_only_model=True))
    # Fails unless prefixes are shared exactly, up to the rounding of bfloat16.
    half = {"bf16": True, "precompute_ref_log_probs": False, "share_prefix": True}
    recipes.append(recipe_of(f"{PYTHIA}sr_dpo", folder / "half", "bfloat16", **half))
    train_on_two_ranks(recipes, folder, FSDP_STATE_DICT_TYPE="FULL_STATE_DICT")
    return folder


def evaluations(output):
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [
        {name: value for name, value in log.items() if name == "eval_loss" or "/" in name}
        for log in history
        if "eval_loss" in log
    ]


@pytest.mark.parametrize("run", RUNS)
def test_a_recipe_trains_as_in_one_process(run, trained, recipe_of, tmp_path):
    name, changes = RUNS[run]
    run_exp(recipe_of(name, tmp_path, **changes) | {"gradient_accumulation_steps": 4, "fsdp": None})
    assert_same_training(logs(tmp_path), logs(trained / run))
    one, two = (load_file(folder / "model.safetensors") for folder in (tmp_path, trained / run))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)

    one, two = evaluations(tmp_path), evaluations(trained / run)
    assert len(one) == len(two) == (2 if "eval_dataset" in changes else 0)
    for expected, actual in zip(one, two, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("run", [run for run in RUNS if not run.endswith("_sft")])
def test_models_are_sharded_layer_by_layer(run, trained):
    for held in models(trained / run):
        assert ("reference" in held) is run.endswith("-in-memory")  # else let go before the first step
        for model in held.values():
            assert model["class"].startswith("FSDP")
            assert model["fsdp_modules"] == UNITS
            assert model["whole"] == 0
            assert model["part"] * 2 == model["partitioned"] > 0


@pytest.mark.parametrize("run", RUNS)
def test_the_trained_model_can_be_loaded(run, trained):
    model = AutoModelForCausalLM.from_pretrained(trained / run)
    assert torch.equal(model.get_input_embeddings().weight, embedding(load_file(trained / run / "model.safetensors")))


def embedding(weights):
    (name,) = [name for name in weights if "embed_in" in name or "embed_tokens" in name]
    return weights[name]


@pytest.mark.parametrize("name", RESUMED)
def test_resume(name, trained):
    resumed, whole = (logs(trained / f"{name}-{run}") for run in ("resumed", "whole"))
    assert [log["loss"] for log in resumed] == pytest.approx([log["loss"] for log in whole], rel=1e-5)
    resumed, whole = (load_file(trained / f"{name}-{run}" / "model.safetensors") for run in ("resumed", "whole"))
    torch.testing.assert_close(resumed, whole, rtol=0, atol=1e-6)


def test_checkpoints_without_the_state_of_the_run(trained):
    checkpoint = trained / "model-only" / "checkpoint-4"
    assert not list(checkpoint.glob("optimizer*"))
    saved, final = (load_file(folder / "model.safetensors") for folder in (checkpoint, checkpoint.parent))
    torch.testing.assert_close(saved, final, rtol=0, atol=0)


def test_half_precision(trained):
    """The model is saved in bfloat16. Its copies for training and as the reference are float32, and start equal."""
    for held in models(trained / "half"):
        assert held["policy"]["dtypes"] == held["reference"]["dtypes"] == ["torch.float32"]
    first, *_, last = logs(trained / "half")
    for curve in ("chosen", "rejected", "margins"):
        assert first[f"normalized_rewards/{curve}"] == 0.0
        assert last[f"normalized_rewards/{curve}"] != 0.0


def test_launch_line(recipe_of, trained, tmp_path):
    """The first one of a recipe, on two CPUs."""
    name = f"{PYTHIA}sft"
    line = next(line for line in FILES[name].read_text(encoding="utf-8").splitlines() if "llamafactory-cli" in line)
    *settings, command, train, path = shlex.split(line.removeprefix("#"))
    (tmp_path / "sitecustomize.py").write_text(f"{ENDS_AT_ONCE}import fsdp_on_cpu\nfsdp_on_cpu.turn_on()\n")
    found = [str(tmp_path), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PATH": PATH, "PYTHONPATH": os.pathsep.join(found)}
    environment |= dict(word.split("=") for word in settings) | {"NPROC_PER_NODE": "2"}
    plain = yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
    changes = recipe_of(name, tmp_path / "out", **SAVED, use_cpu=True)
    words = [f"{key}={value}" for key, value in changes.items() if plain.get(key) != value]

    run = subprocess.run([command, train, path, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    assert (tmp_path / "out" / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
    assert_same_training(logs(trained / name), logs(tmp_path / "out"))
    one, two = (load_file(folder / "model.safetensors") for folder in (trained / name, tmp_path / "out"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-6)
