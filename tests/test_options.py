"""Random combinations of LLaMA-Factory's options: the plugin trains, step by step, what the stock DPO stage trains.

`make test` draws some, always the same; `OPTION_DRAWS=300 pytest tests/test_options.py` draws that many.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from llamafactory.train import tuner

pytestmark = pytest.mark.slow

DRAWS = int(os.environ.get("OPTION_DRAWS", "20"))
STEPS = 3
Logs = list[dict[str, float]]
STEP = ("loss", "grad_norm")
# Means over pairs here, means over batches in stock: the same where every batch is of one pair.
METRICS = ("rewards/chosen", "rewards/margins", "logps/chosen", "logps/rejected")

# Losses that stock trains as it names them, each with the options that it takes; `REFERENCE` goes with `sigmoid` alone.
LOSSES: dict[str, dict[str, list[Any]]] = {
    "sigmoid": {"dpo_label_smoothing": [0.1], "pref_bco_weight": [0.5], "ld_alpha": [0.0, 0.5, 1.5]},
    "orpo": {"ld_alpha": [0.5]},
    "simpo": {"simpo_gamma": [1.0], "ld_alpha": [0.5]},
}
REFERENCE: dict[str, list[Any]] = {
    "ref_model": ["other"],
    "precompute_ref_log_probs": [True, False],
    "ref_log_probs_cache_dir": ["references"],
}
TUNING: dict[str, dict[str, list[Any]]] = {
    "full": {},
    "freeze": {
        "freeze_trainable_layers": [1, -1],
        "freeze_trainable_modules": ["mlp", "self_attn,mlp"],
        "freeze_extra_modules": ["norm", "embed_tokens"],
    },
    "lora": {
        "lora_rank": [2],
        "lora_alpha": [1, 64],
        "lora_dropout": [0.5],  # which the DPO stage switches off
        "lora_target": ["q_proj", "gate_proj,down_proj", "all"],
        "additional_target": ["embed_tokens", "norm", "lm_head"],
        "use_rslora": [True],
        "use_dora": [True],
        "pissa_init": [True],
        "loraplus_lr_ratio": [4.0],
        "adapter_name_or_path": ["adapter"],
        "create_new_adapter": [True],
    },
    "oft": {"oft_block_size": [8], "oft_target": ["q_proj", "all"]},
}
ANYTHING: dict[str, list[Any]] = {
    # the model
    "model_name_or_path": ["llama", "dropout", "dynamic", "qwen2", "gemma", "window", "untied", "gpt2"],
    "flash_attn": ["auto", "sdpa", "disabled"],
    "upcast_layernorm": [True],
    "upcast_lmhead_output": [True],
    "disable_gradient_checkpointing": [True],
    "use_reentrant_gc": [False],
    "neftune_noise_alpha": [5.0],
    # the data
    "dataset": ["pairs", "turns", "odd", "pairs,turns", "turns,odd,pairs"],
    "mix_strategy": ["interleave_under", "interleave_over"],
    "template": ["smollm2", "default", "alpaca", "empty", "qwen"],
    "default_system": ["Be."],
    "cutoff_len": [17, 40, 64],
    "ignore_pad_token_for_loss": [False],
    "preprocessing_batch_size": [2],
    "preprocessing_num_workers": [2],
    # the batches
    "per_device_train_batch_size": [1, 2, 3],
    "gradient_accumulation_steps": [1, 2, 3],
    "disable_shuffling": [True],
    "dataloader_drop_last": [True],
    "dataloader_num_workers": [1],
    "max_steps": [2, -1],
    # the steps
    "pref_beta": [0.01, 1.0],
    "pref_ftx": [0.5],
    "max_grad_norm": [0.1, 0.0],
    "weight_decay": [0.1],
    "warmup_steps": [1],
    "lr_scheduler_type": ["cosine", "linear"],
    "seed": [3],
    "data_seed": [7],
    "average_tokens_across_devices": [False],
    "include_num_input_tokens_seen": ["all"],
    "label_smoothing_factor": [0.1],
    "logging_first_step": [True],
    "logging_nan_inf_filter": [False],
    "torch_empty_cache_steps": [1],
    "plot_loss": [True],
    # what goes together
    "rows": [{"max_samples": 5}, {"streaming": True, "dataloader_num_workers": 1, "max_steps": 2}],
    "tokenized_path": ["tokenized"],
    "evaluation": [
        {"val_size": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1},
        {"val_size": 0.3, "eval_strategy": "epoch"},
        {"eval_dataset": "turns", "eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
        {"eval_dataset": "odd", "do_eval": True, "per_device_eval_batch_size": 3},
    ],
}


def draw_options(number: int) -> dict[str, Any]:
    """A loss, a kind of tuning, and some of the options that go with them."""
    draw = random.Random(number)
    loss, tuning = draw.choice(sorted(LOSSES)), draw.choice(sorted(TUNING))
    table = LOSSES[loss] | TUNING[tuning] | ANYTHING | (REFERENCE if loss == "sigmoid" else {})
    options = {"pref_loss": loss, "finetuning_type": tuning}
    for key in draw.sample(sorted(table), draw.randint(2, 10)):
        value = draw.choice(table[key])
        options |= value if isinstance(value, dict) else {key: value}
    if "pref_bco_weight" in options:  # evaluation moves its baseline in stock, and not here
        options = {key: value for key, value in options.items() if "eval" not in key and key != "val_size"}
    return options


# --- what the names in the table stand for ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Models, an adapter and data sets by the names that the table gives them, in float32 so that rounding is small."""
    folder = tmp_path_factory.mktemp("options")
    shape = {"dtype": "float32", "max_position_embeddings": 512}
    models = {
        "llama": {},
        "other": {"seed": 0},
        "dropout": {"attention_dropout": 0.3},
        "dynamic": {"max_position_embeddings": 48, "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        "untied": {"tie_word_embeddings": False, "attention_bias": True},
        "qwen2": {"config": "Qwen2Config"},
        "window": {"config": "MistralConfig", "sliding_window": 24},
        "gemma": {"config": "GemmaConfig", "head_dim": 8},
        "gpt2": {"config": "GPT2Config", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    }
    made = {name: tiny.make_model(folder / name, **({"seed": 1} | shape | changes)) for name, changes in models.items()}
    adapter = tiny.make_adapter(folder / "adapter", made["llama"])
    return {**made, "adapter": adapter, "data": make_data(folder / "data")}


def make_data(folder: Path) -> Path:
    """`pairs`; `turns`, conversations of unlike length; `odd`, where both answers are one, or one begins the other."""
    tiny.make_data(folder, train=9)
    info = json.loads((folder / "dataset_info.json").read_text())
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choice(["ox", "hen", "is", "seven", "é", "a"]) for _ in range(draw.randint(1, most)))

    turns = []
    for _ in range(8):
        said = [{"from": role, "value": words(9)} for _ in range(draw.randint(1, 3)) for role in ("human", "gpt")][:-1]
        answers = {side: {"from": "gpt", "value": words(20)} for side in ("chosen", "rejected")}
        turns.append({"conversations": said, **answers})
    answers = [("same", "same"), ("one two", "one"), ("x", "x y z"), ("a b c d", "a b c e"), ("7", "8")]
    odd = [{"instruction": words(12), "input": "", "chosen": chosen, "rejected": other} for chosen, other in answers]
    for name, rows in (("turns", turns), ("odd", odd)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info["odd"] = info["pairs"] | {"file_name": "odd.jsonl"}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info["turns"] = {"file_name": "turns.jsonl", "ranking": True, "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


# --- both ways -------------------------------------------------------------------------------------------------------


def train(places: dict[str, Path], folder: Path, options: dict[str, Any]) -> Logs | str:
    """What every step and evaluation logged, or what LLaMA-Factory or the plugin refused the recipe with."""
    named = {key: str(places[options[key]]) for key in ("ref_model", "adapter_name_or_path") if key in options}
    here = {key: str(folder / options[key]) for key in ("tokenized_path", "ref_log_probs_cache_dir") if key in options}
    fixed = {"optim": "sgd", "learning_rate": 0.05, "max_steps": STEPS}
    changes = fixed | {"cutoff_len": 128, "overwrite_cache": False} | options | named | here
    model = places[changes.pop("model_name_or_path", "llama")]
    try:
        tuner.run_exp(tiny.recipe(model, places["data"], folder / "out", **changes))
    except (ValueError, ImportError, NotImplementedError, RuntimeError, TypeError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    logs = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    compared = {*STEP, "eval_loss"}
    for kind, prefix in (("train", ""), ("eval", "eval_")):
        if options.get(f"per_device_{kind}_batch_size") == 1:
            compared |= {prefix + name for name in METRICS}
    return [{key: log[key] for key in log if key in compared} for log in logs]


def train_stock(*args: Any) -> Logs | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "run_dpo", tuner.run_dpo.__wrapped__)
        return train(*args)


def by_itself(options: dict[str, Any]) -> dict[str, Any]:
    """The options without the plugin's own, which stock has no use for."""
    return {key: value for key, value in options.items() if key not in ("precompute_ref_log_probs",)}


def has_noise_of_its_own(options: dict[str, Any]) -> bool:
    """Stock draws noise for the policy without its adapter too, where that is the reference; the plugin does not."""
    noisy = "neftune_noise_alpha" in options or options.get("model_name_or_path") == "dropout"
    is_own = options["finetuning_type"] == "lora" and "ref_model" not in options
    return noisy and is_own and options["pref_loss"] == "sigmoid"


# What differed once: padding that is scored, and frequencies that depend on the longest row of a batch, whose length
# LLaMA-Factory pads to a multiple of eight.
ONCE = (
    {"pref_loss": "sigmoid", "finetuning_type": "full", "ignore_pad_token_for_loss": False, "dataset": "turns"},
    {"pref_loss": "orpo", "finetuning_type": "freeze", "ignore_pad_token_for_loss": False, "pref_ftx": 0.5},
    {
        "pref_loss": "sigmoid",
        "finetuning_type": "lora",
        "model_name_or_path": "dynamic",
        "adapter_name_or_path": "adapter",
    },
    {"pref_loss": "simpo", "finetuning_type": "full", "model_name_or_path": "dynamic", "dataset": "turns"},
)


@pytest.mark.parametrize("options", [*ONCE, *map(draw_options, range(DRAWS))], ids=itertools.count())
def test_the_plugin_trains_what_stock_trains(options, places, tmp_path):
    ours = train(places, tmp_path / "ours", options)
    stock = train_stock(places, tmp_path / "stock", by_itself(options))
    assert difference(options, ours, stock) == ""


def difference(options: dict[str, Any], ours: Logs | str, stock: Logs | str) -> str:
    """Where the two trainings differ, or an empty text."""
    if isinstance(stock, str):
        return "" if isinstance(ours, str) else f"{options}: stock refuses it: {stock}"
    if isinstance(ours, str):
        by_design = "`precompute_ref_log_probs: true` is not possible here" in ours
        return "" if by_design else f"{options}: only the plugin refuses it: {ours}"
    if has_noise_of_its_own(options):
        return ""
    for number, (step, expected) in enumerate(itertools.zip_longest(ours, stock, fillvalue={})):
        for key in step.keys() | expected.keys():
            near = {"rel": 1e-4, "abs": 1e-5} if key.endswith("loss") else {"rel": 1e-3, "abs": 2e-4}
            if step.get(key) != pytest.approx(expected.get(key), nan_ok=True, **near):
                return f"{options}: log {number}, {key}: {step.get(key)} in place of {expected.get(key)}"
    return ""
