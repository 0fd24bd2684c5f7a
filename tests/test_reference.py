"""The reference computed once, in real trainings: the same numbers, found again, and never trusted blindly."""

from __future__ import annotations

import json
import logging
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llamafactory.hparams import get_train_args
from llamafactory.train import tuner
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_data, make_model, recipe
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerCallback

from llamafactory_ext.training.layout import depends_on_batch
from llamafactory_ext.training.reference import logps as reference_logps
from llamafactory_ext.training.reference.model import PendingReference, describe, folder_name

SR_PROMPT = "Rate 9 of 9: "
EVALUATION = {"eval_dataset": "pairs_eval", "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pairs for training; the evaluation set has them too, and three more."""
    return make_data(tmp_path_factory.mktemp("data") / "data", train=6, evaluation=9)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("policy") / "model", seed=1, dtype="float32")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("other") / "model", seed=0, dtype="float32")


@pytest.fixture
def train(policy, data, tmp_path):
    """Train and return what was logged; all runs of a test share a folder of references. SGD: Adam shows rounding."""
    count = iter(range(100))

    def run(**changes):
        settings = {"pref_loss": "minor_dpo", "optim": "sgd", "learning_rate": 0.02, "max_steps": 4}  # of two pairs
        settings |= {"ref_log_probs_cache_dir": str(tmp_path / "references")}
        model = changes.pop("model_name_or_path", str(policy))
        output = Path(changes.pop("output_dir", tmp_path / f"run{next(count)}"))
        tuner.run_exp(recipe(Path(model), data, output, **settings | changes))
        return json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]

    return run


@pytest.fixture
def scored(monkeypatch):
    """How many pairs a reference was asked about beforehand, and which runs loaded a reference model."""
    counts = {"pairs": 0, "loads": 0}
    score, load = reference_logps.ReferenceLogps._score, PendingReference.load

    def counted_score(self, places, *args):
        counts["pairs"] += len(places)
        return score(self, places, *args)

    def counted_load(self):
        model = load(self)
        counts["loads"] += model is not None
        return model

    monkeypatch.setattr(reference_logps.ReferenceLogps, "_score", counted_score)
    monkeypatch.setattr(PendingReference, "load", counted_load)
    return counts


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("llamafactory")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def assert_same(logs, others):
    for ours, theirs in zip(logs[:-1], others[:-1], strict=True):
        assert set(ours) == set(theirs)
        for key in theirs:
            if "runtime" not in key and "per_second" not in key:
                near = {"rel": 1e-5, "abs": 1e-7} if key.endswith("loss") else {"rel": 1e-4, "abs": 2e-4}
                assert ours[key] == pytest.approx(theirs[key], **near), key


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["full", "named", "lora"])
@pytest.mark.parametrize("name", ["sigmoid", "minor_dpo", "ipo", "kto_pair", "sr_dpo"])
def test_computed_once_or_in_every_step(name, tuning, train, other, scored):
    changes = {"pref_loss": name, **EVALUATION}
    if name == "sr_dpo":
        changes["sr_prompt"] = SR_PROMPT
    if tuning != "full":
        changes["ref_model"] = str(other)
    if tuning == "lora":
        changes["finetuning_type"] = "lora"
    known = train(precompute_ref_log_probs=True, **changes)
    assert scored["pairs"] == 9 * (2 if name == "sr_dpo" else 1)
    assert scored["loads"] == (tuning != "full")  # otherwise the policy is the reference, before its first step
    assert_same(known, train(precompute_ref_log_probs=False, **changes))


@pytest.mark.parametrize("noise", ["neftune_noise_alpha", "attention_dropout"])
def test_noise_is_the_policys_alone(noise, train, tmp_path):
    """LoRA without `ref_model`, where the reference passes through the very model that makes the noise."""
    if noise == "attention_dropout":
        model = make_model(tmp_path / "dropout", seed=1, dtype="float32", attention_dropout=0.5)
        changes = {"model_name_or_path": str(model)}
    else:
        changes = {"neftune_noise_alpha": 5.0}
    changes |= {"finetuning_type": "lora", "pref_loss": "sigmoid"}
    known = train(precompute_ref_log_probs=True, **changes)
    assert abs(known[0]["normalized_rewards/chosen"]) > 0.01  # the policy has noise, before its first step
    assert_same(known, train(precompute_ref_log_probs=False, **changes))


def test_the_adapter_is_left_out(train, policy, tmp_path):
    """With LoRA and no `ref_model`, the reference is the model under the adapter."""
    adapter = str(make_adapter(tmp_path / "adapter", policy))
    changes = {"finetuning_type": "lora", "adapter_name_or_path": adapter}
    known = train(**changes)
    assert abs(known[0]["normalized_rewards/chosen"]) > 0.01
    assert_same(known, train(precompute_ref_log_probs=False, **changes))


def test_a_resumed_policy_is_not_its_own_reference(train, scored, tmp_path):
    """The references are gone when the run is resumed: the model is loaded, because the policy has moved."""
    whole = train(max_steps=4, save_strategy="steps", save_steps=2)
    shutil.rmtree(tmp_path / "references")
    scored["loads"] = 0
    resumed = train(max_steps=4, resume_from_checkpoint=str(tmp_path / "run0" / "checkpoint-2"))
    assert scored["loads"] == 1
    assert_same(resumed, whole)


# --- found again -----------------------------------------------------------------------------------------------------


def test_later_runs_compute_nothing(train, other, scored):
    train(ref_model=str(other))
    assert scored == {"pairs": 6, "loads": 1}
    train(ref_model=str(other), pref_loss="dpop", pref_beta=0.5, learning_rate=0.01, seed=7, max_steps=2)
    train(ref_model=str(other), per_device_train_batch_size=1, gradient_accumulation_steps=3, cutoff_len=200)
    assert scored == {"pairs": 6, "loads": 1}
    train(ref_model=str(other), **EVALUATION)
    assert scored == {"pairs": 6 + 3, "loads": 2}


def test_another_reference_is_another_folder(train, other, scored, tmp_path):
    changed = shutil.copytree(other, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    first, second = train(ref_model=str(other)), train(ref_model=str(changed))
    assert scored["pairs"] == 12
    assert first[0]["rewards/chosen"] != second[0]["rewards/chosen"]
    assert len(list((tmp_path / "references").iterdir())) == 2
    train(ref_model=str(shutil.copytree(other, tmp_path / "copy")))  # another place, the same content
    assert scored["pairs"] == 12


@pytest.fixture
def identity(policy, data, tmp_path):
    """The name of the folder that a recipe's reference has."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)

    def name(dtype=torch.float32, **changes):
        model_args, _, training_args, finetuning_args, _ = get_train_args(recipe(policy, data, tmp_path, **changes))
        about = describe(
            PendingReference(lambda *args: None, model_args, finetuning_args), model.to(dtype), training_args
        )
        return folder_name(about)

    return name


@pytest.mark.parametrize(
    "changes",
    [
        {"flash_attn": "disabled"},
        {"rope_scaling": "linear"},
        {"upcast_layernorm": True},
        {"share_prefix": False},
        {"finetuning_type": "lora"},
        {"bf16": True, "use_cpu": True},
        {"dtype": torch.bfloat16},
    ],
)
def test_what_makes_it_another_reference(changes, identity):
    assert identity(**changes) != identity()


def test_what_does_not(identity, policy, data, tmp_path):
    changes = {"pref_loss": "dpop", "pref_beta": 0.3, "learning_rate": 1.0, "cutoff_len": 99, "dataset": "pairs_eval"}
    changes |= {"disable_gradient_checkpointing": True, "output_dir": str(tmp_path / "elsewhere")}
    assert identity(**changes) == identity()
    assert identity(finetuning_type="lora", lora_rank=3) == identity(finetuning_type="lora", lora_rank=5)


# --- what can be wrong with a folder ---------------------------------------------------------------------------------


def test_a_damaged_file_is_computed_again(train, scored, tmp_path, log):
    known = train()
    (file,) = (tmp_path / "references").rglob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 64  # a sign or an exponent of a log-probability
    file.write_bytes(bytes(content))
    assert_same(train(), known)
    assert scored["pairs"] == 12
    assert "is damaged" in log.text


def test_a_folder_that_cannot_be_written(train, tmp_path, log):
    """A file where the folder should be: like a read-only disk, it refuses even root."""
    (tmp_path / "references").write_text("")
    known = train()
    assert "kept for this run only" in log.text
    assert "ref_log_probs_cache_dir" in log.text
    assert_same(known, train(precompute_ref_log_probs=False))


def test_a_full_disk(train, tmp_path, monkeypatch, log):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    known = train()
    assert "kept for this run only: [Errno 28] No space left on device" in log.text
    assert not list((tmp_path / "references").rglob("*.safetensors"))
    monkeypatch.undo()
    assert_same(known, train(precompute_ref_log_probs=False))


def test_a_complete_folder_is_only_read(train, monkeypatch):
    """So it may lie on a read-only mount."""
    known = train()
    for name in ("append", "merge", "lock"):
        monkeypatch.delattr(f"llamafactory_ext.training.reference.cache.{name}")
    assert_same(train(), known)


def test_weights_that_are_broken(train, policy, tmp_path):
    broken = shutil.copytree(policy, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="not finite: check its weights"):
        train(ref_model=str(broken))


# --- where it is not exact -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"streaming": True, "dataloader_num_workers": 1, "max_steps": 2}, "the data set is streamed"),
        ({"resize_vocab": True, "finetuning_type": "lora"}, "the model gets random weights"),
        ({"train_from_scratch": True, "finetuning_type": "lora"}, "the model gets random weights"),
        ({"ignore_pad_token_for_loss": False}, "scores padding tokens, whose number differs from batch to batch"),
    ],
)
def test_falls_back_and_says_why(changes, reason, train, scored, log):
    with pytest.raises(ValueError, match=f"`precompute_ref_log_probs: true` is not possible here: .*{reason}"):
        train(precompute_ref_log_probs=True, **changes)
    train(**changes)
    assert scored["pairs"] == 0
    assert "computed in every step: " in log.text
    assert reason in log.text


# --- weights that only this run has ----------------------------------------------------------------------------------

RANDOM = {"train_from_scratch": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9}


def test_a_run_with_random_weights_goes_on_with_the_reference_that_it_began_with(train, scored, tmp_path):
    whole = train(**RANDOM)
    assert (scored["pairs"], scored["loads"]) == (6, 0)
    assert not (tmp_path / "references").exists(), "no other run could use them"
    assert whole[0]["normalized_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    resumed = train(**RANDOM, resume_from_checkpoint=str(tmp_path / "run0" / "checkpoint-2"))
    assert (scored["pairs"], scored["loads"]) == (6, 0)
    assert_same(whole, resumed)

    shutil.rmtree(tmp_path / "run0" / "reference_logps")
    with pytest.raises(ValueError, match="`train_from_scratch`: 6 reference log-probabilities are missing"):
        train(**RANDOM, resume_from_checkpoint=str(tmp_path / "run0" / "checkpoint-2"))


def test_a_run_with_random_weights_takes_nothing_from_an_earlier_one(train, scored, tmp_path):
    output = {"output_dir": str(tmp_path / "output"), "overwrite_output_dir": True}
    for seed in (1, 2):
        logs = train(train_from_scratch=True, seed=seed, **output)
        assert scored["pairs"] == 6 * seed
        assert logs[0]["normalized_rewards/chosen"] == pytest.approx(0.0, abs=1e-5)


def test_a_short_run_computes_only_what_it_trains_on(train, scored, log):
    short = train(max_steps=2)
    assert scored["pairs"] == 0
    assert "computed in every step: the run ends before it has trained on every pair" in log.text
    assert_same(short, train(max_steps=2, precompute_ref_log_probs=True))
    assert scored["pairs"] == 6
    train(max_steps=2)
    assert log.text.count("no reference model is needed") == 1


@pytest.mark.parametrize(("kind", "exact"), [("dynamic", False), ("linear", True)])
def test_frequencies_that_depend_on_the_batch(kind, exact):
    config = LlamaConfig(rope_scaling={"rope_type": kind, "factor": 2.0})
    assert (depends_on_batch(config, SimpleNamespace(label_pad_token_id=-100)) is None) == exact


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_reference_model_is_let_go_of(tuning, train, other, monkeypatch):
    loaded = []
    load = PendingReference.load

    def watched(self):
        model = load(self)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(PendingReference, "load", watched)
    alive = []

    class AtTheFirstStep(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            alive.append(loaded[0]() is not None)

    monkeypatch.setattr("llamafactory_ext.training.trainer.RewardPlot", AtTheFirstStep)
    changes = {"bf16": True, "use_cpu": True, "plot_loss": True, "finetuning_type": tuning}
    train(ref_model=str(other), **changes)
    assert alive == [False] * 4


def test_a_loss_without_reference_has_none_to_compute(train):
    with pytest.raises(ValueError, match="'orpo' has no reference: remove `precompute_ref_log_probs: true`"):
        train(pref_loss="orpo", precompute_ref_log_probs=True)
