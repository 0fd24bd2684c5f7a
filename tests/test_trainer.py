"""Real training of a tiny model, in this process, through LLaMA-Factory's own `run_exp`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llamafactory.hparams import get_train_args
from llamafactory.train import tuner
from plain import plain_contrast, plain_logits, plain_logps, plain_loss
from tiny import make_model, recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ext import PairLogps, get_loss

LOSSES = {
    "sigmoid": {"beta": 0.1, "label_smoothing": 0.0, "sr_lambda": 0.0},
    "hinge": {"beta": 0.1},
    "ipo": {"beta": 0.1, "length_normalize": True},
    "kto_pair": {"beta": 0.1},
    "minor_dpo": {"beta": 0.1, "sr_lambda": 0.0},
    "dpop": {"beta": 0.1, "dpop_lambda": 50.0, "sr_lambda": 0.0},
    "sr_dpo": {"beta": 0.1, "sr_lambda": 0.3},
    "sr_ipo": {"beta": 0.1, "sr_lambda": 0.3, "length_normalize": False},
    "robust": {"beta": 0.1, "label_smoothing": 0.0, "sr_lambda": 0.0},
    "discopop": {"beta": 0.1, "discopop_tau": 0.05, "sr_lambda": 0.0},
    "sigmoid_norm": {"beta": 0.1, "sr_lambda": 0.0},
    "odpo": {"beta": 0.1, "odpo_alpha": 1.0, "sr_lambda": 0.0},
    "squared_po": {"beta": 0.1},
    "minor_sft": {"beta": 0.1},
    "exo_pair": {"beta": 0.1, "label_smoothing": 1e-3},
    "pl_dpo": {"beta": 0.1},
    "aot": {"beta": 0.1, "label_smoothing": 0.0},
    "aot_unpaired": {"beta": 0.1, "label_smoothing": 0.0},
    "nca_pair": {"beta": 0.1},
    "bco_pair": {"beta": 0.1},
    "sppo_hard": {"beta": 0.1},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "orpo": {"beta": 0.1},
    "sft": {},
    "simpo": {"beta": 0.1, "simpo_gamma": 0.5},
    "rrhf": {"rrhf_weight": 1.0},
    # Of one token, which is then no matter of chance.
    "cringe": {"cringe_alpha": 1.0, "cringe_bias": 0.0, "cringe_tau": 1.0, "cringe_top_k": 1},
}
# What a loss needs beside its name.
NEEDED = {"odpo": {"pref_margin_column": "gap"}, "cringe": {"cringe_top_k": 1}}
WITH_REFERENCE = [name for name in LOSSES if get_loss(name).needs_reference]
NORMALIZED = [f"normalized_rewards/{curve}" for curve in ("chosen", "rejected", "margins")]


# The Sr paper's prompt is too long for the tiny model, whose tokens are bytes.
SR_PROMPT = "Rate 9 of 9: "


def history(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def steps(output: Path, key: str = "loss") -> list[float]:
    return [log[key] for log in history(output) if key in log]


@pytest.fixture
def train(model, data, tmp_path):
    """Train with the given changes of the recipe and return the output folder."""
    count = iter(range(1000))

    def run(**changes: Any) -> Path:
        if changes.get("pref_loss") in ("sr_dpo", "sr_ipo"):
            changes = {"sr_prompt": SR_PROMPT, **changes}
        changes = NEEDED.get(changes.get("pref_loss", ""), {}) | changes
        output = tmp_path / f"run{next(count)}"
        tuner.run_exp(recipe(model, data, output, **changes))
        return output

    return run


@pytest.fixture(scope="module")
def first_pairs(model, other_model, data) -> PairLogps:
    """The log-probabilities of the first two pairs, one sequence at a time; `other_model` is the reference."""
    pairs, augmented = (plain_pairs(model, other_model, data, sr_prompt) for sr_prompt in ("", SR_PROMPT))
    return dataclasses.replace(pairs, refinement=0.1 * augmented.margin)


def plain_pairs(model: Path, other_model: Path, data: Path, sr_prompt: str) -> PairLogps:
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy, reference = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32) for m in (model, other_model))
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text().splitlines()[:2]]
    columns: dict[str, list[float]] = {}
    for row in rows:
        prompt = (
            f"<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{sr_prompt}{row['instruction']}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        for side in ("chosen", "rejected"):
            for name, scorer in (("policy", policy), ("reference", reference)):
                total, length = plain_logps(scorer, tokenizer, prompt, row[side] + "<|im_end|>\n")
                columns.setdefault(f"{name}_{side}", []).append(total)
            columns.setdefault(f"{side}_length", []).append(length)
        columns.setdefault("score_gap", []).append(row["gap"])
        rejected = plain_logits(policy, tokenizer, prompt, row["rejected"] + "<|im_end|>\n")
        columns.setdefault("contrast", []).append(plain_contrast(*rejected))
    return PairLogps(**{name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()})


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    """LoRA leaves a model as it was saved: in half precision, another layout would show in the rounding."""
    return str(make_model(tmp_path_factory.mktemp("float") / "model", seed=1, dtype="float32"))


@pytest.fixture(scope="module")
def float_reference(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("float") / "reference", seed=0, dtype="float32"))


# --- what the YAML names is what is trained -------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_trained_loss_is_the_formula(name, train, other_model, first_pairs):
    reference = {"ref_model": str(other_model)} if name in WITH_REFERENCE else {}
    output = train(pref_loss=name, max_steps=1, disable_shuffling=True, **reference)
    log = history(output)[0]
    assert log["loss"] == pytest.approx(plain_loss(name, first_pairs, **LOSSES[name]).mean().item(), rel=1e-4)

    scored = first_pairs.per_token() if name == "ipo" or name not in WITH_REFERENCE else first_pairs
    assert log["logps/chosen"] == pytest.approx(scored.policy_chosen.mean().item(), rel=1e-4)
    if name in WITH_REFERENCE:
        assert log["rewards/rejected"] == pytest.approx(0.1 * scored.rejected_logratio.mean().item(), rel=1e-3)
        assert log["normalized_rewards/chosen"] == pytest.approx(first_pairs.chosen_logratio.mean().item(), rel=1e-3)
        assert log["normalized_rewards/margins"] == pytest.approx(first_pairs.margin.mean().item(), rel=1e-3)
    assert ("sr/refinement" in log) == (name in ("sr_dpo", "sr_ipo"))
    if name in ("sr_dpo", "sr_ipo"):
        assert log["sr/refinement"] == pytest.approx(first_pairs.refinement.mean().item(), rel=1e-3)
        assert log["sr/augmented_margins"] == pytest.approx(10 * first_pairs.refinement.mean().item(), rel=1e-3)
        assert log["sr/augmented_accuracies"] == (first_pairs.refinement > 0).double().mean().item()


def test_stock_dispatch_bug_is_not_back(train, other_model):
    """LLaMA-Factory 0.9.4 and 0.9.5 train `sigmoid` whatever loss with a reference the YAML names."""
    losses = {
        name: steps(train(pref_loss=name, max_steps=1, disable_shuffling=True, ref_model=str(other_model)))[0]
        for name in WITH_REFERENCE
        # Without label smoothing, in one order, and of two answers, they are `sigmoid`.
        if name not in ("robust", "aot", "aot_unpaired", "pl_dpo")
    }
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses), losses


@pytest.mark.parametrize("tuning", ["full", "freeze", "lora", "qlora"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name, tuning, train):
    if tuning == "qlora":
        pytest.importorskip("bitsandbytes")
    changes = {
        "full": {"finetuning_type": "full"},
        # A checkpoint in bf16 with some layers upcast computes under autocast only.
        "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "bf16": True, "use_cpu": True},
        "lora": {"finetuning_type": "lora"},
        "qlora": {"finetuning_type": "lora", "quantization_bit": 4},
    }[tuning]
    if name == "discopop":
        changes["discopop_tau"] = 0.5  # with its default, first steps lower margins: the loss has a valley below 0
    output = train(pref_loss=name, max_steps=12, learning_rate=5e-3, **changes)
    logs = [log for log in history(output) if "loss" in log]
    rises = "rewards/chosen" if name == "minor_sft" else "rewards/margins"  # it sees the chosen response only
    assert logs[-1][rises] > logs[0][rises] + 1e-3
    if name in WITH_REFERENCE:
        assert [logs[0][key] for key in NORMALIZED] == [0.0, 0.0, 0.0]
    weights = "adapter_model.safetensors" if "lora" in tuning else "model.safetensors"
    assert (output / weights).is_file()


@pytest.mark.parametrize("name", ["sigmoid", "orpo", "simpo"])
def test_numbers_are_those_of_llamafactory(name, float_model, data, train, tmp_path):
    """LLaMA-Factory's trainer against ours. LoRA, so that both have the same reference at the same precision."""
    # SGD, because Adam's first steps are signs, which show the rounding of another layout.
    changes = {"pref_loss": name, "finetuning_type": "lora", "pref_ftx": 0.1, "optim": "sgd", "learning_rate": 0.05}
    ours = history(train(model_name_or_path=float_model, **changes))
    *args, _ = get_train_args(recipe(float_model, data, tmp_path / "stock", **changes))
    tuner.run_dpo.__wrapped__(*args, callbacks=[])
    stock = history(tmp_path / "stock")

    for our_log, stock_log in zip(ours[:-1], stock[:-1], strict=True):
        assert set(stock_log) <= set(our_log)
        for key, value in stock_log.items():
            if not key.startswith("logits/"):  # LLaMA-Factory's are means over prompts and padding too
                assert our_log[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_shared_prefix_changes_no_number(name, tuning, train, float_model, float_reference):
    """Float32; policy away from the reference; SGD, because Adam's first steps are signs and would show rounding."""
    changes = {"model_name_or_path": float_model, "pref_loss": name, "finetuning_type": tuning}
    changes |= {"optim": "sgd", "learning_rate": 0.02}
    if name in WITH_REFERENCE:
        changes["ref_model"] = float_reference
    shared, padded = (history(train(share_prefix=share, **changes)) for share in (True, False))
    for our_log, their_log in zip(shared[:-1], padded[:-1], strict=True):
        for key, value in their_log.items():
            near = {"rel": 1e-5} if key == "loss" else {"rel": 1e-4, "abs": 2e-4}
            assert our_log[key] == pytest.approx(value, **near), key


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_two_hundred_steps_end_at_the_same_losses(tuning, train, float_model, float_reference):
    """The fast path against the stock layout with a reference in every step, under Adam, which lets rounding grow.

    The bound is 25 times what was measured, which is what the same pairs in smaller micro-batches change as well.
    """
    changes = {"model_name_or_path": float_model, "ref_model": float_reference, "finetuning_type": tuning}
    changes |= {"pref_loss": "minor_dpo", "max_steps": 200, "learning_rate": 1e-3}
    changes |= {"disable_gradient_checkpointing": True}
    fast = torch.tensor(steps(train(**changes)))
    slow = torch.tensor(steps(train(share_prefix=False, precompute_ref_log_probs=False, **changes)))
    assert len(slow) == 200
    assert slow[-20:].mean() < 0.9 * slow[:20].mean()
    assert (fast - slow).abs().max() < 1e-5


def test_a_prefix_that_cannot_be_shared_is_said_or_refused(train, caplog, tmp_path):
    dropping = make_model(tmp_path / "dropping", attention_dropout=0.1)
    with pytest.raises(ValueError, match="`share_prefix: true` is not possible here: with dropout"):
        train(model_name_or_path=str(dropping), share_prefix=True)
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    train(model_name_or_path=str(dropping), max_steps=1)
    train(neftune_noise_alpha=5, max_steps=1)
    logger.removeHandler(caplog.handler)
    assert "Prefix sharing is off: with dropout, both responses would share one dropout mask" in caplog.text
    assert "Prefix sharing is off: with `neftune_noise_alpha`" in caplog.text


def test_a_foreign_trainer_is_refused(train, monkeypatch):
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    monkeypatch.setattr("llamafactory_ext.training.trainer.PreferenceTrainer", CustomDPOTrainer)
    with pytest.raises(AttributeError, match="not llamafactory_ext's"):
        train(pref_loss="minor_dpo")


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finetuning_type", ["full", "freeze", "lora"])
def test_logratios_start_at_zero_under_autocast(finetuning_type, train):
    """The checkpoint is in bf16 and LLaMA-Factory upcasts what is trained: the reference must follow."""
    changes = {"freeze_trainable_layers": 1, "bf16": True, "use_cpu": True}
    output = train(pref_loss="minor_dpo", finetuning_type=finetuning_type, **changes)
    first, *_, last = [log for log in history(output) if "loss" in log]
    assert [first[key] for key in NORMALIZED] == [0.0, 0.0, 0.0]
    assert first["minor_dpo/rejected_active"] == 0.0
    assert last["normalized_rewards/chosen"] != 0.0


def test_fsdp_gets_a_reference_of_one_dtype(monkeypatch):
    from llamafactory_ext.training.reference.model import half_dtype, kept_dtype

    half = SimpleNamespace(bf16=True, fp16=False, fsdp=[])
    assert kept_dtype(half) == half_dtype(half) == torch.bfloat16
    assert kept_dtype(SimpleNamespace(bf16=False, fp16=True, fsdp=[])) == torch.float16
    assert kept_dtype(SimpleNamespace(bf16=False, fp16=False, fsdp=[])) is None
    assert kept_dtype(SimpleNamespace(bf16=True, fp16=False, fsdp=["full_shard"])) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # by `accelerate launch`, in place of the recipe's key
    assert kept_dtype(half) is None
    assert half_dtype(half) == torch.bfloat16


def test_match_precision_keeps_what_autocast_rounds_anyway():
    from llamafactory_ext.training.reference.model import match_precision

    def toy():
        return torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3)).bfloat16()

    def dtypes(module):
        return [parameter.dtype for parameter in module.parameters()]

    f32, bf16 = torch.float32, torch.bfloat16
    reference = toy()
    match_precision(reference, toy().float(), kept=bf16)
    assert dtypes(reference) == [f32, f32, f32, bf16, bf16]
    match_precision(reference, toy().float(), kept=None)
    assert dtypes(reference) == [f32] * 5

    quantized = toy()
    quantized.quantization_method = "bitsandbytes"
    match_precision(quantized, toy().float(), kept=None)
    assert dtypes(quantized) == [bf16] * 5


def test_evaluation_alone_reports_no_rewards(train):
    """Without training and ref_model, LLaMA-Factory takes the model for its own reference."""
    output = train(
        pref_loss="minor_dpo", do_train=False, do_eval=True, eval_dataset="pairs_eval", finetuning_type="lora"
    )
    metrics = json.loads((output / "eval_results.json").read_text())
    assert "eval_logps/chosen" in metrics
    assert not [name for name in metrics if "reward" in name or "minor_dpo" in name or "coefficient" in name]


# --- LLaMA-Factory's other knobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_ftx_bco_and_evaluation_sets_work_with_every_loss(name, train, other_model):
    reference = {"ref_model": str(other_model), "pref_bco_weight": 0.5} if name in WITH_REFERENCE else {}
    output = train(
        pref_loss=name,
        pref_ftx=0.2,
        max_steps=2,
        eval_dataset="pairs_eval",
        eval_strategy="steps",
        eval_steps=1,
        **reference,
    )
    assert len(steps(output)) == len(steps(output, "eval_loss")) == 2
    assert all(torch.isfinite(torch.tensor(steps(output))))


def test_each_evaluation_set_has_its_own_metrics(train):
    sets = {"eval_dataset": "pairs,pairs_eval", "eval_on_each_dataset": True, "eval_strategy": "steps", "eval_steps": 2}
    best = {"metric_for_best_model": "eval_pairs_rewards/accuracies", "load_best_model_at_end": True}
    output = train(**sets, **best, save_strategy="steps", save_steps=2, do_eval=True)
    logs = history(output)
    names = ("loss", "rewards/chosen", "rewards/accuracies", "normalized_rewards/margins", "logits/chosen")
    for name in names:
        values = {key: steps(output, f"eval_{key}_{name}") for key in ("pairs", "pairs_eval")}
        assert all(len(found) >= 2 for found in values.values()), name
        assert not [log for log in logs if f"eval_{name}" in log]
    assert steps(output, "eval_pairs_logps/chosen") != steps(output, "eval_pairs_eval_logps/chosen")
    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["eval_pairs_loss"] for line in lines if "eval_pairs_loss" in line] == steps(output, "eval_pairs_loss")
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_metric"] == max(steps(output, "eval_pairs_rewards/accuracies"))
    written = json.loads((output / "eval_results.json").read_text())
    assert {"eval_pairs_rewards/margins", "eval_pairs_eval_rewards/margins"} <= written.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_answer_trains(name, train, data, tmp_path):
    """Template `empty` ends no response, so that nothing of it is left."""
    folder = shutil.copytree(data, tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[0]["rejected"], rows[1]["chosen"] = "", ""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {"template": "empty", "default_system": None, "dataset_dir": str(folder), "disable_shuffling": True}
    logs = history(train(pref_loss=name, pref_ftx=0.1, max_steps=2, **changes))
    numbers = [value for log in logs for value in log.values() if isinstance(value, float)]
    assert numbers
    assert all(map(math.isfinite, numbers))


def test_a_loss_that_is_not_a_number_is_logged_as_one(train, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("not_a_number")\n'
        "def not_a_number(pairs, *, beta: float):\n"
        '    """Nothing."""\n'
        "    return pairs.margin * float('nan')\n"
    )
    output = train(pref_loss="not_a_number", pref_loss_file=str(tmp_path / "mine.py"), max_steps=1)
    assert math.isnan(steps(output)[0])


def test_ftx_and_bco_are_added_as_in_llamafactory(train, other_model, first_pairs):
    changes = {"max_steps": 1, "disable_shuffling": True, "ref_model": str(other_model), "pref_loss": "ipo"}
    plain = steps(train(**changes))[0]
    with_ftx = steps(train(pref_ftx=0.5, **changes))[0]
    sft = (-first_pairs.policy_chosen / first_pairs.chosen_length).mean().item()
    assert with_ftx - plain == pytest.approx(0.5 * sft, rel=1e-3)

    # ipo is on means, and so is what BCO sees beside it; the baseline is the first batch's own mean reward.
    means = first_pairs.per_token()
    chosen, rejected = 0.1 * means.chosen_logratio, 0.1 * means.rejected_logratio
    baseline = torch.cat([chosen, rejected]).mean()
    bco = -torch.log(torch.sigmoid(chosen - baseline)) - torch.log(torch.sigmoid(-(rejected - baseline)))
    with_bco = steps(train(pref_bco_weight=0.25, **changes))[0]
    assert with_bco == pytest.approx((plain + 0.25 * bco.mean().item()) / 1.25, rel=1e-3)


def test_ld_alpha_weights_the_policy_only(train, other_model):
    changes = {"max_steps": 1, "disable_shuffling": True, "ref_model": str(other_model)}
    plain, weighted = (history(train(**changes, **ld))[0] for ld in ({}, {"ld_alpha": 0.0}))
    assert weighted["logps/chosen"] == pytest.approx(plain["logps/chosen"])  # the shorter responses
    assert weighted["logps/rejected"] > plain["logps/rejected"] + 10  # the longer ones, without their tails
    reference = plain["logps/rejected"] - plain["normalized_rewards/rejected"]
    assert weighted["logps/rejected"] - weighted["normalized_rewards/rejected"] == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
def test_resume_repeats_the_uninterrupted_run(name, finetuning_type, train):
    changes = {"pref_loss": name, "finetuning_type": finetuning_type, "max_steps": 6, "pref_bco_weight": 0.5}
    whole = train(save_strategy="steps", save_steps=3, **changes)
    resumed = train(resume_from_checkpoint=str(whole / "checkpoint-3"), **changes)
    assert steps(resumed) == pytest.approx(steps(whole), rel=1e-6)
    assert steps(resumed, "rewards/chosen") == pytest.approx(steps(whole, "rewards/chosen"), rel=1e-4, abs=1e-6)


def test_resuming_with_bco_needs_its_baseline(train):
    whole = train(max_steps=2, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="saved without `pref_bco_weight`"):
        train(max_steps=2, pref_bco_weight=0.5, resume_from_checkpoint=str(whole / "checkpoint-1"))


# --- metrics and plots ------------------------------------------------------------------------------------------------


def test_metrics_are_means_over_pairs_whatever_the_batch(train, other_model):
    """Five pairs in batches of 2, 2, 1 and in one batch: a mean of batch means would differ."""
    changes = {
        "do_train": False,
        "do_eval": True,
        "eval_dataset": "pairs_eval",
        "ref_model": str(other_model),
        "pref_loss": "dpop",
    }
    results = [
        json.loads((train(per_device_eval_batch_size=size, **changes) / "eval_results.json").read_text())
        for size in (2, 5)
    ]
    keys = [key for key in results[0] if "/" in key and "logits" not in key]  # mean logits depend on the padding
    assert len(keys) > 10
    for key in keys:
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key


def test_metrics_are_logged_everywhere(train, capsys):
    output = train(pref_loss="dpop", plot_loss=True, eval_dataset="pairs_eval", eval_strategy="steps", eval_steps=2)
    own = [*NORMALIZED, "dpo/coefficient", "dpop/penalty", "dpop/penalty_active"]
    stock = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]
    stock += [f"{kind}/{side}" for kind in ("logps", "logits") for side in ("chosen", "rejected")]

    lines = [json.loads(line) for line in (output / "trainer_log.jsonl").read_text().splitlines()]
    printed = capsys.readouterr().out
    for key in own + stock:
        assert len(steps(output, key)) == 4, key
        assert len(steps(output, f"eval_{key}")) == 2, key
        assert [line[key] for line in lines if key in line] == steps(output, key)
        assert key in printed
    assert (output / "normalized_rewards.png").read_bytes().startswith(b"\x89PNG")


def test_a_loss_of_the_user_trains_and_logs_its_metrics(train):
    folder = Path(__file__).parents[1] / "examples" / "custom_loss"
    output = train(pref_loss="robust_dpo", pref_loss_file=str(folder / "robust_dpo.py"), pref_loss_args={"noise": 0.2})
    assert len(steps(output, "robust_dpo/confidence")) == 4


def test_the_start_says_what_is_trained(train, caplog):
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    train(pref_loss="dpop", max_steps=1)
    logger.removeHandler(caplog.handler)
    assert "is active and trains dpop(beta=0.1, dpop_lambda=50.0, sr_lambda=0.0)." in caplog.text


def test_continuing_an_adapter_warns_about_the_reference(train, caplog):
    adapter = train(finetuning_type="lora", max_steps=1)
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    for create in (False, True):
        caplog.clear()
        train(finetuning_type="lora", max_steps=1, adapter_name_or_path=str(adapter), create_new_adapter=create)
        assert ("The reference is the base model" in caplog.text) is not create
    logger.removeHandler(caplog.handler)
