"""Plans: worked out by hand, and held against the bytes that real trainings hold."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import count_bytes
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llamafactory.extras.env import VERSION
from llamafactory.extras.misc import find_available_port
from llamafactory.train.tuner import run_exp
from rich.console import Console
from tiny import make_model, recipe

from llamafactory_ext.errors import UserError
from llamafactory_ext.planning.display import render
from llamafactory_ext.planning.memory import GIB
from llamafactory_ext.planning.model_shape import read_model
from llamafactory_ext.planning.plan import alternatives, make_plan
from llamafactory_ext.planning.schedule import steps_per_epoch
from llamafactory_ext.planning.training import INT8, NF4, NF4_DOUBLE, OPTIMIZERS
from llamafactory_ext.training.logps import CHUNK

EXAMPLES = Path(__file__).parents[2] / "examples" / "deepspeed"
COLUMNS = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}

# --- a model of 7.7 billion parameters, from its configuration alone -------------------------------------------------

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 4096, 11008, 32, 151936
MATRICES = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
BIASES_AND_NORMS = LAYERS * (3 * HIDDEN + 2 * HIDDEN) + HIDDEN  # Qwen2 has biases on query, key and value
PARAMETERS = 2 * VOCABULARY * HIDDEN + MATRICES + BIASES_AND_NORMS


def write_config(folder, **changes):
    config = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp("qwen") / "model")

    def recipe_of(**changes):
        recipe = {
            "model_name_or_path": path,
            "stage": "dpo",
            "finetuning_type": "full",
            "pref_loss": "minor_dpo",
            "bf16": True,
            "cutoff_len": 512,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
        }
        if "zero" in changes:
            changes["deepspeed"] = str(EXAMPLES / f"zero{changes.pop('zero')}.json")
        return {key: value for key, value in {**recipe, **changes}.items() if value is not None}

    return recipe_of


def test_parameters_are_counted_exactly(qwen, tmp_path):
    assert PARAMETERS == 7_721_324_544
    plan = make_plan(qwen(), 1, 80)
    assert plan.parameters == plan.trained == PARAMETERS
    tied = read_model(write_config(tmp_path / "tied", tie_word_embeddings=True))
    assert tied.parameters == PARAMETERS - VOCABULARY * HIDDEN


def test_lora_is_counted_matrix_by_matrix(qwen):
    attention, mlp = 4 * 8 * 2 * HIDDEN, 3 * 8 * (HIDDEN + INTERMEDIATE)
    assert make_plan(qwen(finetuning_type="lora"), 1, 80).trained == LAYERS * (attention + mlp)
    some = qwen(finetuning_type="lora", lora_target="q_proj,down_proj", lora_rank=16)
    assert make_plan(some, 1, 80).trained == LAYERS * 16 * (2 * HIDDEN + HIDDEN + INTERMEDIATE)


# Large enough that rounding, masks and step counters are of no account; the vocabulary weighs as in a real model.
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
IN_EVERY_STEP = {"precompute_ref_log_probs": False}

# Bytes per parameter of weights, gradients, optimizer states (with DeepSpeed's float32 copy) and reference, 8 GPUs.
ZERO = {2: (2, 2 / 8, 12 / 8, 2), 3: (2 / 8, 2 / 8, 12 / 8, 2 / 8)}
STATES = ("weights", "gradients", "optimizer states", "reference model")


@pytest.mark.parametrize("stage", ZERO)
def test_model_states_under_zero(stage, qwen):
    plan = make_plan(qwen(zero=stage, **IN_EVERY_STEP), 8, 80)
    assert [plan.memory[name] / PARAMETERS for name in STATES] == pytest.approx(ZERO[stage])
    assert make_plan(qwen(zero=stage, **IN_EVERY_STEP, pref_loss="simpo"), 8, 80).memory["reference model"] == 0


def test_model_states_without_zero(qwen):
    """LLaMA-Factory trains float32 weights; the reference follows, but for the matrices that autocast rounds anyway."""
    memory = make_plan(qwen(**IN_EVERY_STEP), 1, 80).memory
    assert [memory[name] / PARAMETERS for name in STATES[:3]] == pytest.approx([4, 4, 8])
    linear = MATRICES + VOCABULARY * HIDDEN
    assert memory["reference model"] == 2 * linear + 4 * (PARAMETERS - linear)
    pure = make_plan(qwen(bf16=None, pure_bf16=True, **IN_EVERY_STEP), 1, 80).memory
    assert [pure[name] / PARAMETERS for name in STATES] == pytest.approx([2, 2, 4, 2])


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp(version, qwen):
    keys = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": version}, "optim": "rmsprop"}
    plan, one = (make_plan(qwen(**keys, gradient_accumulation_steps=n), 8, 80).memory for n in (4, 1))
    assert make_plan(qwen(**keys), 8, 80).engine == f"FSDP{version}"
    assert [plan[name] / PARAMETERS for name in STATES] == pytest.approx([4 / 8, 4 / 8, 4 / 8, 0])
    # Whole gradients in bfloat16, from one micro-batch of a step to the next.
    buffers = "buffers and gathered weights"
    assert plan[buffers] - one[buffers] == 2 * PARAMETERS
    # FSDP2 rounds what the model returns: all logits, not chunks.
    assert plan["logits and log-softmax"] == 12 * (CHUNK if version == 1 else 8 * 512 * VOCABULARY)


def test_fsdp_loads_whole_models(qwen, tmp_path):
    (tmp_path / "fsdp.json").write_text('{"version": 2}')
    keys = {"fsdp": "full_shard auto_wrap", "fsdp_config": str(tmp_path / "fsdp.json")}
    for changes, copies in (({}, 1), (IN_EVERY_STEP, 2)):
        plan = make_plan(qwen(**keys, **changes, per_device_train_batch_size=1), 64, 80, answer_tokens=10)
        assert plan.total == pytest.approx(GIB + 1.05 * copies * 4 * PARAMETERS)  # float32, then the allowance


def test_offload_moves_the_model_states_to_the_host(qwen):
    plan = make_plan(qwen(zero="3_offload"), 8, 80)
    assert [plan.memory[name] for name in STATES] == [0, 0, 0, 0]
    # Weights, gradients (16 bits, then 32), float32 copy, two moments; all eight parts on the one host.
    assert plan.host_memory == pytest.approx((2 + 2 + 4 + 12) * PARAMETERS)
    for changes in (IN_EVERY_STEP, {"ref_model": qwen()["model_name_or_path"]}):
        loaded = make_plan(qwen(zero="3_offload", **changes), 8, 80)
        assert loaded.memory["reference model"] == 0
        assert loaded.host_memory == pytest.approx(plan.host_memory + 2 * PARAMETERS)
    assert make_plan(qwen(zero="3_offload"), 16, 80).host_memory == pytest.approx(plan.host_memory / 2)


@pytest.mark.parametrize(
    ("changes", "held"),
    [
        ({}, False),
        ({"ref_model": "named"}, False),
        ({"finetuning_type": "lora"}, False),
        ({"finetuning_type": "lora", "ref_model": "named"}, False),
        (IN_EVERY_STEP, True),
        ({"streaming": True, "max_steps": 10}, True),
        ({"resize_vocab": True}, False),
        ({"finetuning_type": "lora"} | IN_EVERY_STEP, False),
        ({"finetuning_type": "lora", "ref_model": "named"} | IN_EVERY_STEP, True),
    ],
)
def test_when_a_reference_is_held(changes, held, qwen):
    if "ref_model" in changes:
        changes = changes | {"ref_model": qwen()["model_name_or_path"]}
    assert (make_plan(qwen(zero=2, **changes), 8, 80).memory["reference model"] > 0) is held


@pytest.mark.parametrize(
    ("changes", "states"),
    [
        ({"zero": 2, "ref_model": "named"}, 2 + 2 + 4 / 8),  # weights, reference, float32 copy
        ({"zero": 2, "resume_from_checkpoint": "checkpoint-8"}, 2 + 2 + 4 / 8),
        ({"finetuning_type": "lora", "ref_model": "named"}, 2 + 2),
    ],
)
def test_a_loaded_reference_is_let_go_before_the_first_step(changes, states, qwen):
    if "ref_model" in changes:
        changes = changes | {"ref_model": qwen()["model_name_or_path"]}
    # transformers' default with current releases of torch; with old ones, its step takes more than the reference does.
    keys = {"per_device_train_batch_size": 1, "optim": "adamw_torch_fused"}
    plan = make_plan(qwen(**{**changes, **keys}), 8, 80)
    excess = plan.memory["excess: reference before the first step"]
    beside = sum(plan.memory[name] for name in (*STATES, "activations", "logits and log-softmax")) + excess
    assert 0 < beside - states * PARAMETERS < 2 * GIB


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", ZERO)
def test_what_deepspeed_estimates_beyond_the_model_states(stage, qwen):
    plan = make_plan(qwen(zero=stage), 8, 80)
    gpu, _ = plan.deepspeed_estimate
    largest_layer = VOCABULARY * HIDDEN
    # ZeRO-2: the gradients once more in float32; ZeRO-3: that less 2 bytes, and the largest layer gathered in float32.
    beyond = {2: 4 * PARAMETERS / 8, 3: 2 * PARAMETERS / 8 + 4 * largest_layer}[stage]
    assert gpu - sum(plan.memory[name] for name in STATES[:3]) == pytest.approx(beyond)


def test_logits_of_a_chunk(qwen, tmp_path):
    one_token = 12 * VOCABULARY  # three float32 tensors
    memory = make_plan(qwen(per_device_train_batch_size=1), 1, 80, answer_tokens=100).memory
    assert memory["logits and log-softmax"] == 2 * 100 * one_token
    for size in (1, 8):
        memory = make_plan(qwen(per_device_train_batch_size=size), 1, 80).memory
        assert memory["logits and log-softmax"] == 12 * CHUNK
    other = write_config(tmp_path / "other", model_type="olmo2")  # of another family
    memory = make_plan(qwen(model_name_or_path=other), 1, 80).memory
    assert memory["logits and log-softmax"] == 12 * CHUNK


def test_quantized_weights_by_hand(qwen):
    weights = {
        name: make_plan(qwen(finetuning_type="lora", lora_rank=8, **keys), 1, 80).memory["weights"]
        for name, keys in {
            "double": {"quantization_bit": 4},
            "single": {"quantization_bit": 4, "double_quantization": False},
            "int8": {"quantization_bit": 8},
        }.items()
    }
    adapter = 4 * LAYERS * 8 * (8 * HIDDEN + 3 * (HIDDEN + INTERMEDIATE))
    rest = 2 * (PARAMETERS - MATRICES) + adapter
    # A byte per two weights; per 64 weights a float32, or a byte and per 256 of those a float32.
    assert weights["double"] == pytest.approx(rest + MATRICES * (0.5 + 1 / 64 + 1 / 4096))
    assert weights["single"] == pytest.approx(rest + MATRICES * (0.5 + 1 / 16))
    assert weights["int8"] == pytest.approx(rest + MATRICES)


def test_bytes_that_bitsandbytes_takes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(512, 512)
    for per_weight, double in ((NF4_DOUBLE, True), (NF4, False)):
        packed, state = functional.quantize_4bit(weights, quant_type="nf4", compress_statistics=double)
        scales = [state.absmax, *([state.state2.absmax] if double else [])]
        assert packed.nbytes + sum(s.nbytes for s in scales) == pytest.approx(per_weight * weights.numel(), rel=1e-3)
    assert torch.int8.itemsize == INT8


@pytest.mark.parametrize("name", ["adamw_torch", "rmsprop", "adagrad", "sgd", "adafactor", "adamw_8bit", "lion_32bit"])
def test_bytes_of_optimizer_states(name, tmp_path):
    from transformers import Trainer, TrainingArguments

    if name in ("adamw_8bit", "lion_32bit"):
        pytest.importorskip("bitsandbytes")
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    layer = torch.nn.Linear(512, 1024, bias=False)
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer = kind(layer.parameters(), **keywords)
    optimizer.step()
    # torch counts the steps in a tensor; bitsandbytes keeps tables of 256 values, of no account in a real model.
    real = sum(
        v.nbytes for s in optimizer.state.values() for k, v in s.items() if torch.is_tensor(v) and "qmap" not in k
    )
    assert OPTIMIZERS[name].bytes({"weight": (1024, 512)}, 0, 4) == pytest.approx(real, abs=64)


def test_an_unknown_optimizer_is_counted_as_adam_and_said_to_be(qwen):
    plan, adam = make_plan(qwen(optim="ademamix"), 1, 80), make_plan(qwen(optim="adamw_torch_fused"), 1, 80)
    assert plan.memory == adam.memory
    assert any("'ademamix'" in note for note in plan.notes)
    assert not any("optimizer" in note for note in adam.notes)


def test_plans_of_seven_billion_parameters(qwen):
    assert make_plan(qwen(zero=3), 8, 80).fits
    assert not make_plan(qwen(zero=2), 8, 24).fits
    card = qwen(gradient_accumulation_steps=8)
    assert not make_plan(card, 1, 24).fits

    found = alternatives(card, 1, 24)
    tunings = [(changes.get("finetuning_type"), changes.get("quantization_bit")) for changes, _ in found]
    assert ("lora", None) in tunings
    assert ("lora", 4) in tunings
    for changes, plan in found:
        assert plan.fits
        assert plan.schedule.global_batch == 32
        assert plan == make_plan({**card, **changes}, 1, 24)


def test_alternatives_change_as_little_as_possible(qwen):
    changes, _ = alternatives(qwen(zero=3, per_device_train_batch_size=32, gradient_accumulation_steps=1), 8, 80)[0]
    assert changes == {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}
    eager = qwen(zero=3, cutoff_len=4096, disable_gradient_checkpointing=True, per_device_train_batch_size=1)
    assert alternatives(eager, 8, 80)[0][0] == {"disable_gradient_checkpointing": False}
    zero_2 = qwen(zero=2, per_device_train_batch_size=1)
    assert alternatives(zero_2, 8, 40)[0][0] == {"deepspeed": str(EXAMPLES / "zero3.json")}


def test_a_reference_in_every_step_is_an_alternative_only_where_a_model_is_held(qwen):
    held = qwen(zero=2, **IN_EVERY_STEP, per_device_train_batch_size=1)
    needed = make_plan(held, 8, 80).total
    assert alternatives(held, 8, 0.95 * needed / GIB)[0][0] == {"precompute_ref_log_probs": None}
    lora = {**held, "finetuning_type": "lora"}
    needed = make_plan(lora, 8, 80).total
    assert not any("precompute_ref_log_probs" in changes for changes, _ in alternatives(lora, 8, 0.95 * needed / GIB))


def test_a_run_that_ends_early_asks_the_reference_in_every_step_unless_told_otherwise(qwen, long_pairs):
    recipe = qwen(dataset="pairs.jsonl", dataset_dir=str(long_pairs), gradient_accumulation_steps=1, pref_loss="dpop")
    whole, part = (make_plan({**recipe, "max_steps": steps}, 1, 80) for steps in (4, 3))
    assert whole.memory["reference model"] == 0
    assert part.memory["reference model"] == make_plan({**recipe, **IN_EVERY_STEP}, 1, 80).memory["reference model"] > 0
    assert make_plan({**recipe, "max_steps": 3, **BEFOREHAND}, 1, 80).memory == whole.memory


def test_nothing_fits(qwen):
    card = qwen(per_device_train_batch_size=1)
    assert alternatives(card, 1, 2) == []
    assert "use more or larger GPUs" in printed(make_plan(card, 1, 2), [])


# --- what must hold whatever the recipe ------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    few=st.integers(1, 64),
    more=st.integers(0, 64),
    tuning=st.sampled_from(["full", "lora"]),
    precision=st.sampled_from(["bf16", "fp16", "pure_bf16"]),
)
def test_more_gpus_never_need_more_memory_each_under_zero_3(few, more, tuning, precision, qwen):
    recipe = qwen(bf16=None, zero=3, finetuning_type=tuning) | {precision: True}
    assert make_plan(recipe, few + more, 80).total <= make_plan(recipe, few, 80).total


@settings(max_examples=25, deadline=None)
@given(
    micro=st.integers(1, 16),
    length=st.integers(1, 4096),
    checkpointing=st.booleans(),
    zero=st.sampled_from(["2", "3", "3_offload", None]),
    tuning=st.sampled_from(["full", "lora"]),
)
def test_longer_sequences_and_larger_batches_never_need_less(micro, length, checkpointing, zero, tuning, qwen):
    def planned(**changes):
        keys = {"per_device_train_batch_size": micro, "cutoff_len": length, **changes}
        keys |= {"disable_gradient_checkpointing": not checkpointing, "finetuning_type": tuning}
        return make_plan(qwen(**keys, **({"zero": zero} if zero else {})), 8, 80)

    plan = planned()
    for larger in (planned(per_device_train_batch_size=micro + 1), planned(cutoff_len=length + 8)):
        assert plan.total <= larger.total  # the same while another moment needs most
        assert plan.memory["logits and log-softmax"] <= larger.memory["logits and log-softmax"]  # of a chunk, at most


# --- steps and pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "micro_batch", "accumulation", "gpus", "steps"),
    [
        (393_999, 4, 4, 8, 3079),  # 393,999 / 128 = 3,078.1
        (393_999, 16, 1, 8, 3079),
        (12, 1, 5, 1, 3),  # 5 + 5 + 2 micro-batches
        (10, 4, 1, 2, 2),  # micro-batches of 4, 4 | 2 and one to fill up
        (1, 8, 4, 8, 1),
    ],
)
def test_steps_per_epoch(pairs, micro_batch, accumulation, gpus, steps):
    assert steps_per_epoch(pairs, micro_batch, accumulation, gpus) == steps


@pytest.fixture(scope="module")
def long_pairs(tmp_path_factory):
    """16 pairs whose answers are cut at `cutoff_len`, and have nothing in common."""
    folder = tmp_path_factory.mktemp("long_pairs")
    rows = [
        {"instruction": "Say it.", "input": "", "chosen": letter + "a" * 400, "rejected": letter.upper() + "b" * 400}
        for letter in "abcdefghijklmnop"
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "pairs.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    with (folder / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(rows[0]), *(["two\nlines", *list(row.values())[1:]] for row in rows)])
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), folder / "pairs.parquet")
    info = {name: {"file_name": name, "ranking": True, "columns": COLUMNS} for name in map(str, folder.glob("pairs.*"))}
    info = {Path(name).name: {**entry, "file_name": Path(name).name} for name, entry in info.items()}
    info |= {"pairs": info["pairs.jsonl"], "hub": {"hf_hub_url": "someone/pairs", "ranking": True}}
    info |= {"sampled": {**info["hub"], "num_samples": 100}, "gone": {"file_name": "gone.jsonl"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({"dataset": "pairs.jsonl"}, 16),
        ({"dataset": "pairs.json"}, 16),
        ({"dataset": "pairs.csv"}, 16),
        ({"dataset": "pairs.parquet"}, 16),
        ({"dataset": "pairs,sampled"}, 116),
        ({"dataset": "pairs,sampled", "max_samples": 20}, 36),
        ({"dataset": "pairs", "val_size": 0.1}, 14),
        ({"dataset": "pairs", "val_size": 5}, 11),
        ({"dataset": "pairs,hub"}, None),
        ({"dataset": "gone"}, None),
        ({"dataset": "pairs,sampled", "mix_strategy": "interleave_over"}, None),
    ],
)
def test_pairs_are_counted_where_files_are_local(changes, pairs, qwen, long_pairs):
    plan = make_plan(qwen(dataset_dir=str(long_pairs), **changes), 8, 80)
    assert plan.schedule.pairs == pairs
    assert any("number of pairs is unknown" in note for note in plan.notes) is (pairs is None)
    assert (plan.schedule.steps is None) is (pairs is None)


DAMAGED = {
    "a.jsonl": b"\xff",
    "a.json": b"[1,",
    "b.json": b"[" * 100_000,
    "a.csv": b"\xff",
    "a.parquet": b"PAR1",
    "a.jsonl.gz": b"a",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_pairs_of_a_damaged_file_are_not_known(name, qwen, tmp_path):
    (tmp_path / name).write_bytes(DAMAGED[name])
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": name}}), encoding="utf-8")
    plan = make_plan(qwen(dataset_dir=str(tmp_path), dataset="a"), 1, 80)
    assert plan.schedule.pairs is None
    assert f"The number of pairs is unknown: '{name}' is not a local file that can be counted" in plan.notes[0]


def test_tokens_of_a_step(qwen):
    recipe = qwen(cutoff_len=510, max_steps=100)
    schedule = make_plan(recipe, 8, 80).schedule
    assert schedule.tokens_per_step == 2 * 128 * 512  # LLaMA-Factory pads to a multiple of 8
    assert schedule.tokens == 100 * schedule.tokens_per_step
    typical = make_plan(recipe, 8, 80, tokens=200)
    assert typical.schedule.tokens_per_step == 2 * 128 * 200
    assert typical.memory == make_plan(recipe, 8, 80).memory
    assert make_plan(recipe, 8, 80, tokens=9000).schedule == schedule


def test_augmented_pairs_are_planned(qwen, model, tmp_path):
    """Longer sequences than cutoff_len, and twice as many: of the text in front, in tokens of the model."""
    refined = qwen(cutoff_len=510, max_steps=100, pref_loss="sr_dpo", sr_prompt="x" * 30)
    plan = make_plan(refined, 8, 80)
    assert "The tokenizer cannot be loaded: sr_prompt is counted as 10 tokens." in plan.notes
    assert plan.schedule.tokens_per_step == 2 * 128 * (512 + 520)
    assert make_plan(refined, 8, 80, tokens=200).schedule.tokens_per_step == 2 * 128 * (200 + 216)
    settings = recipe(model, "", tmp_path, dataset=None, pref_loss="sr_dpo", sr_prompt="x" * 30)
    assert make_plan(settings, 1, 80).schedule.tokens_per_step == 4 * (128 + 160)
    assert make_plan(settings | {"sr_lambda": 0.0, "sr_prompt": None}, 1, 80).schedule.tokens_per_step == 4 * 128


@pytest.mark.parametrize("warmup", [{"warmup_ratio": 0.3}, {"warmup_steps": 0.3}, {"warmup_steps": 2}, {}])
def test_warmup_steps_are_those_of_the_trainer(warmup, qwen, long_pairs, tmp_path):
    if 0 < warmup.get("warmup_steps", 0) < 1 and transformers.__version__ < "5":
        pytest.skip("a share of the steps is written as warmup_ratio in transformers 4")
    from transformers import TrainingArguments

    keys = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1.5}
    plan = make_plan(qwen(dataset="pairs", dataset_dir=str(long_pairs), **keys, **warmup), 1, 80)
    assert (plan.schedule.steps_per_epoch, plan.schedule.steps) == (3, 5)
    assert plan.schedule.warmup_steps == TrainingArguments(str(tmp_path), use_cpu=True, **warmup).get_warmup_steps(5)


def test_steps_are_those_of_a_run(model, data, tmp_path):
    """Twelve pairs in micro-batches of five: three, so two steps per epoch, the second after one micro-batch."""
    keys = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "num_train_epochs": 1.5}
    settings = recipe(model, data, tmp_path, max_steps=None, **keys)
    run_exp(settings)
    state = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))
    schedule = make_plan(settings, 1, 1).schedule
    assert (schedule.pairs, schedule.steps_per_epoch) == (12, 2)
    assert schedule.steps == state["max_steps"] == state["global_step"] == 3


# --- input that cannot be planned ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name_or_path": None}, "model_name_or_path"),
        ({"model_name_or_path": "someone/nowhere"}, "download its config.json"),
        ({"stage": "sft"}, "write `stage: dpo`"),
        ({"num_train_epochs": -1, "max_steps": -1}, "num_train_epochs is -1: write a number above 0"),
        ({"num_train_epochs": 0.0, "max_steps": -1}, r"num_train_epochs is 0\.0: write a number above 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': write a number"),
        ({"finetuning_type": "freeze"}, "write full, or lora"),
        ({"quantization_bit": 4}, "write `finetuning_type: lora`"),
        ({"finetuning_type": "lora", "quantization_bit": 3}, "write 4 or 8"),
        ({"finetuning_type": "lora", "lora_target": "query"}, "q_proj"),
        ({"deepspeed": "nowhere.json"}, "write the path of a JSON file"),
        ({"fsdp": "no_shard"}, "write `fsdp: full_shard auto_wrap`"),
        ({"fsdp": "full_shard auto_wrap", "zero": 3}, "exclude each other"),
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 3}}, "write `version: 2`"),
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": "nowhere.json"}, "or the path of a JSON file"),
        ({"fsdp": "full_shard auto_wrap", "fsdp_config": [2]}, "write the options, such as `version: 2`"),
        ({"per_device_train_batch_size": 1.5}, "whole number"),
        ({"gradient_accumulation_steps": 0}, "whole number"),
        ({"deepspeed": 3}, "write the path of a JSON file"),
        ({"max_steps": "1e3"}, "max_steps is '1e3': write a whole number, or remove it"),
        ({"max_steps": None, "num_train_epochs": "3"}, "num_train_epochs is '3': write a number"),
        ({"warmup_ratio": float("nan")}, "warmup_ratio is nan: write a number"),
        ({"cutoff_len": 2.5}, r"cutoff_len is 2\.5: write a whole number"),
        ({"cutoff_len": []}, r"cutoff_len is \[\]: write a whole number"),
        ({"val_size": "1e-1"}, "val_size is '1e-1': write a number"),
        ({"max_samples": -1}, "max_samples is -1: write a whole number of at least 1"),
        ({"finetuning_type": "lora", "lora_rank": "8"}, "lora_rank is '8': write a whole number"),
        ({"finetuning_type": "lora", "lora_target": 3}, "lora_target is 3: write `all`, or names of layers"),
        ({"finetuning_type": "qlora"}, "Invalid fine-tuning method"),
        ({"model_name_or_path": ["a"]}, r"model_name_or_path is \['a'\]: write a path or a name"),
        ({"pref_loss": "nonsense"}, "pref_loss 'nonsense' is unknown"),
        ({"dataset": "nothing"}, "Write a `dataset` that it lists"),
    ],
)
def test_wrong_recipes_are_refused_in_a_sentence(changes, message, qwen, long_pairs):
    with pytest.raises(ValueError, match=message) as raised:
        make_plan(qwen(**{"dataset_dir": str(long_pairs), **changes}), 8, 80)
    assert "\n" not in str(raised.value)


def own_config(folder, family, **changes):
    transformers.AutoConfig.for_model(family, **changes).save_pretrained(folder)
    return str(folder)


WITHOUT_ATTENTION = ["mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"]
OTHERS = {
    "blt": "its configuration has no hidden_size",
    "reformer": "only causal language models can be planned, and .* is not one .If you want to use",
    "nemotron": "only causal language models can be planned, and .* is not one .unsupported operand",
    "t5": "only causal language models can be planned, and .* is not one .Unrecognized configuration class",
    "clip": "only causal language models can be planned, and .* is not one",
} | dict.fromkeys(WITHOUT_ATTENTION, "has no num_attention_heads.: choose another, or train two steps of it")


@pytest.mark.parametrize("family", OTHERS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_models_that_cannot_be_planned(family, tuning, qwen, tmp_path):
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    with pytest.raises(UserError, match=OTHERS[family]):
        make_plan(qwen(model_name_or_path=own_config(tmp_path, family), finetuning_type=tuning), 1, 80)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"model_type": "nope"}', '{"model_type": 3}', '{"a": 1}', "\0"]
)
def test_configurations_that_are_none(content, qwen, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"the configuration of .* cannot be read"):
        make_plan(qwen(model_name_or_path=str(tmp_path)), 1, 80)


ODD = st.none() | st.integers(-2, 3) | st.just("x") | st.just([]) | st.just({}) | st.floats() | st.booleans()


@given(changes=st.dictionaries(st.sampled_from([*SHAPE, "dtype", "rope_parameters", "head_dim"]), ODD, min_size=1))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_configuration_ends_in_a_plan_or_a_sentence(changes, qwen, tmp_path):
    read_model.cache_clear()
    with contextlib.suppress(UserError):
        make_plan(qwen(model_name_or_path=write_config(tmp_path, **SHAPE | changes)), 1, 80)


def test_layers_that_are_not_linear_are_adapted_by_name(qwen, tmp_path):
    """GPT-2's, which PEFT adapts and LLaMA-Factory's `all` passes over: the training itself fails with it."""
    gpt2 = qwen(model_name_or_path=own_config(tmp_path, "gpt2"), finetuning_type="lora")
    with pytest.raises(
        UserError, match="`lora_target: all` selects linear layers, and a 'gpt2' model has none: name layers"
    ):
        make_plan(gpt2, 1, 80)
    with pytest.raises(UserError, match=r"'query' names no layer of the model: write one of c_attn, c_fc, c_proj\."):
        make_plan(gpt2 | {"lora_target": "query"}, 1, 80)
    assert make_plan(gpt2 | {"lora_target": "c_attn,c_fc"}, 1, 80).trained == 12 * 8 * (768 + 3 * 768 + 768 + 4 * 768)
    full = gpt2 | {"finetuning_type": "full"}
    assert not make_plan(full, 1, 2).fits
    assert {changes.get("finetuning_type") for changes, _ in alternatives(full, 1, 2)} <= {None}


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_matrices_that_layers_share_count_once(family, qwen, tmp_path):
    path = own_config(tmp_path, family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
    assert make_plan(qwen(model_name_or_path=path), 1, 80).trained == model.num_parameters()


@pytest.mark.parametrize(
    ("gpus", "memory", "keywords", "message"),
    [
        (0, 80, {}, "gpus is 0"),
        (8, 0, {}, "gpu_memory is 0"),
        (8, 80, {"gpus_per_node": -1}, "gpus_per_node is -1"),
        (8, 80, {"tokens": 0}, "tokens is 0"),
    ],
)
def test_wrong_machines_are_refused_in_a_sentence(gpus, memory, keywords, message, qwen):
    with pytest.raises(ValueError, match=message):
        make_plan(qwen(), gpus, memory, **keywords)


def printed(plan, found=None):
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    render(plan, console, found)
    return console.export_text()


def test_what_is_printed(qwen):
    text = printed(make_plan(qwen(zero=3, max_steps=3079), 8, 80))
    for words in ("DeepSpeed ZeRO-3", "7,721,324,544", "3,079", "128", "weights", "fits in 80 GiB"):
        assert words in text
    card = qwen(gradient_accumulation_steps=8)
    found = [alternatives(card, 1, 24)[-1]]
    text = printed(make_plan(card, 1, 24), found)
    assert "does not fit in 24 GiB" in text
    assert f"{found[0][1].total / GIB:.1f} GiB" in text
    assert "finetuning_type: lora\nquantization_bit: 4" in text


# --- against real trainings ------------------------------------------------------------------------------------------

WITHIN = {"rel": 0.05}
BF16 = {"bf16": True, "use_cpu": True}
KEEP_ALL = {"disable_gradient_checkpointing": True}
LORA = BF16 | {"finetuning_type": "lora"}
BEFOREHAND = {"precompute_ref_log_probs": True}  # also in a run as short as these
SR = {"pref_loss": "sr_dpo", "sr_prompt": "Rate 9 of 9: "}
RUNS = {
    "float32": KEEP_ALL,
    "float32, chunks": KEEP_ALL,
    "bfloat16, checkpointing": BF16,
    "bfloat16, checkpointing, chunks": BF16,
    "bfloat16, checkpointing, untied, chunks": BF16,
    "bfloat16, named reference": BF16,
    "reference in every step": BF16 | IN_EVERY_STEP,
    "reference in every step, chunks": BF16 | IN_EVERY_STEP,
    "no reference, eager attention": BF16
    | KEEP_ALL
    | {"pref_loss": "orpo", "flash_attn": "disabled", "precompute_ref_log_probs": None},
    "refined, chunks": BF16 | SR,
    "refined, float32, many micro-batches": SR | {"gradient_accumulation_steps": 4},
    "refined, lora": LORA | SR,
    "lora": LORA | KEEP_ALL,
    "lora, checkpointing, chunks": LORA,
    "lora, checkpointing": LORA,
    "lora, named reference": LORA,
    "lora, named reference, eager attention, chunks": LORA | {"flash_attn": "disabled"},
    "lora, named reference in every step": LORA | IN_EVERY_STEP,
    "qlora": LORA | {"quantization_bit": 4, "cutoff_len": 64},
}


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("larger") / "model", **SHAPE)


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("untied") / "model", **SHAPE, tie_word_embeddings=False)


FAST = ("float32, chunks", "bfloat16, checkpointing", "refined, lora", "lora, named reference in every step")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]
)
def test_the_parts_are_what_a_training_holds(name, larger_model, untied_model, long_pairs, tmp_path, monkeypatch):
    if "qlora" in name:
        pytest.importorskip("bitsandbytes")
    if "chunks" in name:
        monkeypatch.setattr("llamafactory_ext.training.logps.CHUNK", 64 * SHAPE["vocab_size"])
    model = untied_model if "untied" in name else larger_model
    keys = {
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        **BEFOREHAND,
        **RUNS[name],
    }
    settings = recipe(model, long_pairs, tmp_path, **keys)
    if "named reference" in name:
        settings["ref_model"] = str(model)
    settings["share_prefix"] = False  # which is planned: the most that it may take
    monkeypatch.setattr("llamafactory_ext.training.trainer.PreferenceTrainer", count_bytes.CountingTrainer)
    run_exp(settings)
    real = count_bytes.counts(tmp_path)
    plan = make_plan(settings, 1, 1, answer_tokens=real["answer tokens"])

    for part in STATES:
        assert plan.memory[part] == pytest.approx(real[part], **WITHIN), part
    if transformers.__version__ < "5" or torch.__version__.startswith("2.6."):
        return  # whose layers, or attention on a CPU, keep and compute other tensors than those that the formulas count
    assert plan.memory["activations"] == pytest.approx(real["kept"], **WITHIN)
    # Beside weights, states and gradients of the micro-batches before: the most that a micro-batch takes, or, before
    # there are any, the reference.
    before = real["loaded reference"] + real["reference pass"] - real["gradients"] - real["optimizer states"]
    parts = ("activations", "logits and log-softmax")
    peak = sum(size for part, size in plan.memory.items() if part in parts or part.startswith("excess"))
    augmented = real["augmented pass"] - real["gradients"] if "refined" in name else 0
    assert peak == pytest.approx(max(real["peak"], before, augmented), **WITHIN)


# 16 pairs are six micro-batches, three on each of two ranks.
TWO_STEPS = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "max_steps": None,
}
ZERO_RUNS = {
    "zero2, float32": {"deepspeed": str(EXAMPLES / "zero2.json")},
    "zero2, bfloat16, named reference": {"deepspeed": str(EXAMPLES / "zero2.json"), "bf16": True},
    "zero3, bfloat16": {"deepspeed": str(EXAMPLES / "zero3.json"), "bf16": True},
    "zero3, reference in every step": {"deepspeed": str(EXAMPLES / "zero3.json"), "bf16": True, **IN_EVERY_STEP},
    "zero3, lora": {"deepspeed": str(EXAMPLES / "zero3.json"), "bf16": True, "finetuning_type": "lora"},
}


@pytest.fixture(scope="module")
def two_ranks(larger_model, long_pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    recipes = {
        name: recipe(larger_model, long_pairs, folder / name, **TWO_STEPS, **changes)
        for name, changes in ZERO_RUNS.items()
    }
    for name in recipes:
        if "named reference" in name:
            recipes[name]["ref_model"] = str(larger_model)
    (folder / "recipes.json").write_text(json.dumps(list(recipes.values())), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    torchrun.append(f"--master_port={find_available_port()}")
    command = [*torchrun, count_bytes.__file__, str(folder / "recipes.json")]
    # DeepSpeed compiles an operator with ninja, which lies beside this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return recipes


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.skipif(VERSION < "0.9.5", reason="LLaMA-Factory 0.9.4 refuses DeepSpeed 0.19.8")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="DeepSpeed compiles an operator")
@pytest.mark.parametrize("name", ZERO_RUNS)
def test_the_parts_are_what_each_of_two_ranks_holds(name, two_ranks):
    output = Path(two_ranks[name]["output_dir"])
    real, plan = count_bytes.counts(output), make_plan(two_ranks[name], 2, 1)
    for part in STATES:
        assert plan.memory[part] == pytest.approx(real[part], **WITHIN), part
    if "in every step" not in name:  # only the float32 copy is there when the reference is asked
        assert real["early optimizer states"] == pytest.approx(4 * plan.trained / 2, **WITHIN)
    if "named reference" in name:
        held = make_plan(two_ranks[name] | IN_EVERY_STEP, 2, 1).memory["reference model"]
        assert held == pytest.approx(real["loaded reference"], **WITHIN)
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    assert plan.schedule.steps == state["max_steps"] == state["global_step"] == 2
