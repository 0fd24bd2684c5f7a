"""Stage `paths`: every way of training, with tiny models, against LLaMA-Factory's own stage or another way."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_runs import DEVICE, SHORT, TINY, Trainings, difference, losses, make_model, make_pairs
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from llamafactory_ext.training import logps

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "per_device_train_batch_size": 2}
LORA = {"finetuning_type": "lora", "lora_rank": 4}
# A difference that these precisions may have between two orders of the same sums.
EXACT, HALF = 1e-4, 2e-2
APART = "largest absolute difference"
OURS = ("share_prefix", "precompute_ref_log_probs")  # keys that stock does not have


def measure(record: Any, folder: Path, rehearse: bool) -> None:
    model = make_model(folder / "tiny", TINY, dtype=torch.float32)
    data = make_pairs(folder / "data", SHORT, 8)  # as many as four steps take, so that the reference comes beforehand
    train = Trainings(model, data, folder, SGD)
    half = Trainings(make_model(folder / "half", TINY), data, folder, SGD)
    beside_stock(record, train, half)
    ways_of_ours(record, train)
    with record.going_on("waits for the GPU"):
        waits(record, folder, data)
    whole_runs(record, train)


def beside_stock(record: Any, train: Trainings, half: Trainings) -> None:
    """Models that are saved in float32, and where the case says so in bf16 as most are."""
    bf16, every_step = {"bf16": True}, {"precompute_ref_log_probs": False}
    cases: dict[str, tuple[dict[str, Any], float]] = {
        "full, float32": ({}, EXACT),
        "LoRA, float32": (LORA, EXACT),
        "full, float32, accumulated": ({"gradient_accumulation_steps": 2, "max_steps": 2}, EXACT),
        "full, float32, a row per answer": ({"share_prefix": False}, EXACT),
        "full, float32, reference in every step": (every_step, EXACT),
        "LoRA, float32, reference in every step": (LORA | every_step, EXACT),
        "LoRA, float32, simpo": (LORA | {"pref_loss": "simpo"}, EXACT),
        "full, bf16": (bf16, HALF),
        "LoRA, bf16": (LORA | bf16, HALF),
        "LoRA, bf16, reference in every step": (LORA | bf16 | every_step, HALF),
        "LoRA, bf16 weights": (LORA | bf16, HALF),
    }
    if DEVICE == "cuda":
        cases["full, bf16 weights and gradients"] = (bf16 | {"pure_bf16": True}, HALF)
        cases["LoRA, fp16"] = (LORA | {"fp16": True}, HALF)
        if importlib.util.find_spec("flash_attn"):
            cases["full, bf16, FlashAttention 2"] = (bf16 | {"flash_attn": "fa2"}, HALF)
            cases["LoRA, bf16, FlashAttention 2"] = (LORA | bf16 | {"flash_attn": "fa2"}, HALF)
    if importlib.util.find_spec("bitsandbytes"):
        cases["QLoRA, bf16 weights"] = (LORA | bf16 | {"quantization_bit": 4}, HALF)
    for name, (changes, bound) in cases.items():
        run = half if "bf16 weights" in name else train
        with record.going_on(name):
            ours = run(**changes)
            theirs = run(stock=True, **{key: value for key, value in changes.items() if key not in OURS})
            record(f"{name}: losses, {APART} from stock's", difference(ours, theirs), at_most=bound)
            if "normalized_rewards/chosen" in ours[0]:
                start = sum(abs(ours[0][f"normalized_rewards/{side}"]) for side in ("chosen", "rejected"))
                # Known beforehand, it was computed beside other pairs, whose sums are rounded in another order.
                at_most = 0.0 if "precompute_ref_log_probs" in changes else 10 * bound
                record(f"{name}: log-ratios at step 0", start, "nats", at_most=at_most)


def ways_of_ours(record: Any, train: Trainings) -> None:
    cache = {"ref_log_probs_cache_dir": str(train.folder / "cold")}
    small_chunks = mock.patch.object(logps, "CHUNK", 8 * TINY["vocab_size"])
    plain = train()
    with record.going_on("checkpointing"):
        without = train(disable_gradient_checkpointing=True)
        record(f"checkpointing on and off: losses, {APART}", difference(plain, without), at_most=EXACT)
    with record.going_on("cache"):
        record(f"cache built and warm: losses, {APART}", difference(train(**cache), train(**cache)), at_most=0.0)
    with record.going_on("chunks"), small_chunks:
        record(f"head in chunks and whole: losses, {APART}", difference(train(), plain), at_most=EXACT)
    with record.going_on("twice"):
        record(f"the same run twice: losses, {APART}", difference(train(), plain), at_most=0.0)
    for loss in ("minor_dpo", "dpop", "sr_dpo"):
        with record.going_on(loss):
            every_step = train(pref_loss=loss, precompute_ref_log_probs=False)
            record(
                f"{loss}, reference beforehand and in every step: losses, {APART}",
                difference(train(pref_loss=loss), every_step),
                at_most=EXACT,
            )


def whole_runs(record: Any, train: Trainings) -> None:
    with record.going_on("evaluation"):
        evaluated = train(eval_dataset="pairs_eval", eval_strategy="steps", eval_steps=2)
        record("evaluations in a run of four steps", sum("eval_loss" in log for log in evaluated), at_least=2)
    with record.going_on("resume"):
        saved = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
        whole = train(output="whole", **saved)
        checkpoint = train.folder / "whole" / "checkpoint-2"
        resumed = train(output="resumed", resume_from_checkpoint=str(checkpoint), **saved)
        record(f"resumed and whole run: losses, {APART}", difference(whole, resumed), at_most=EXACT)
    with record.going_on("degeneration"):
        steps = {"max_steps": 60, "learning_rate": 0.3, "optim": "adamw_torch", "pref_stop_on_degeneration": True}
        record("steps until a run that degenerates is ended, of 60", len(losses(train(**steps))), at_most=59)


def waits(record: Any, folder: Path, data: Path) -> None:
    """What a layer waits for, a model with more layers waits for more often."""
    counts = {}
    for layers in (2, 6):
        deep = make_model(folder / f"layers{layers}", TINY | {"num_hidden_layers": layers}, dtype=torch.float32)
        train = Trainings(deep, data, folder, SGD | {"logging_steps": 10})
        train()  # builds the cache
        counter = Waits()
        train(callbacks=(counter,))
        counts[layers] = counter.count
    if DEVICE == "cuda":
        record("waits for the GPU in two steps", counts[2])
    record("waits for the GPU that four more layers add", counts[6] - counts[2], at_most=0)


class Waits(TrainerCallback):
    """How often the CPU waits for the GPU in the second and third step."""

    count = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
            self.profile = profile(activities=devices)
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.profile.stop()
            names = [event.name for event in self.profile.events()]
            self.count = sum(name.startswith("cuda") and name.endswith("Synchronize") for name in names)
