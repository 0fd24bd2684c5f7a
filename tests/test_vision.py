"""Vision-language models: pairs about pictures train as in LLaMA-Factory, and the refinement term sees each its own."""

from __future__ import annotations

import functools
import json
import re
import shutil
from typing import Any

import pytest
import torch
import transformers
from llamafactory.extras import logging
from llamafactory.train import tuner
from PIL import Image
from plain import plain_loss
from tiny_vision import TEMPLATES, make_data, make_model, recipe
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

from llamafactory_ext import PairLogps
from llamafactory_ext.data.check import check_pairs
from llamafactory_ext.errors import UserError
from llamafactory_ext.scoring.file import read_scores
from llamafactory_ext.scoring.foresight import foresee
from llamafactory_ext.scoring.scorer import score_pairs
from llamafactory_ext.training.reference import cache
from llamafactory_ext.training.refinement import is_joinable
from llamafactory_ext.training.sharing import PrefixSharing

# transformers 4 logs a training loss with four digits.
AS_LOGGED = 1e-5 if transformers.__version__ >= "5" else 1e-4
SR_PROMPT = "Rate 9 of 9: "
# As the templates of LLaMA-Factory write a system message and one turn.
PROMPTS = {
    "llava": ("Add.USER: {} ASSISTANT:", "<image>", "<|im_end|>"),
    "qwen": (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|im_end|>\n",
    ),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request):
    if request.param != "llava" and not is_torchvision_available():
        pytest.skip("the processors of Qwen's vision models need torchvision")
    return request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("vision") / "data")


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    """Policy and reference."""
    folder = tmp_path_factory.mktemp(family)
    return [make_model(folder / name, family, seed) for seed, name in enumerate(("policy", "reference"))]


@pytest.fixture(scope="module")
def train(family, models, data, tmp_path_factory):
    """Train with the given changes of the recipe; what was logged in each step, and in evaluation."""

    def run(**changes: Any) -> list[dict[str, float]]:
        output = tmp_path_factory.mktemp("run")
        settings = recipe(models[0], family, data, output, **{"ref_model": str(models[1]), **changes})
        tuner.run_exp({**settings, "default_system": "Add."})
        history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return [log for log in history if "loss" in log or "eval_loss" in log]

    return run


# --- as in LLaMA-Factory ----------------------------------------------------------------------------------------------

LORA = {"finetuning_type": "lora", "lora_rank": 4, "ref_model": None, "learning_rate": 2.0}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_dpo_trains_as_in_stock(changes, train, monkeypatch):
    settings = {"pref_loss": "sigmoid", "gradient_accumulation_steps": 2, "eval_dataset": "pictures_eval", **changes}
    settings |= {"eval_strategy": "steps", "eval_steps": 3}
    ours = train(**settings, precompute_ref_log_probs=False)  # beforehand, it would be rounded beside other pairs
    monkeypatch.setattr(tuner, "run_dpo", tuner.run_dpo.__wrapped__)  # LLaMA-Factory's workflow with its own trainer
    theirs = train(**settings)
    assert not [name for log in theirs for name in log if "normalized_rewards" in name]
    for our, their in zip(ours, theirs, strict=True):
        for name in [name for name in their if "loss" in name or "rewards/" in name or "logps/" in name]:
            near = {"abs": 4e-6} if name.endswith("loss") else {"rel": 1e-5, "abs": 1e-4}
            assert our[name] == pytest.approx(their[name], **near), name
    losses = [log["loss"] for log in theirs if "loss" in log]
    assert max(losses) - min(losses) > 1e-2


FROZEN = {"freeze_vision_tower": True, "freeze_multi_modal_projector": True}


@pytest.fixture
def said(monkeypatch):
    """What LLaMA-Factory's log is told."""
    lines = []
    for level in ("info_rank0", "warning_rank0_once"):
        monkeypatch.setattr(logging.get_logger(), level, lambda message: lines.append(str(message)))
    return lines


def losses(logs):
    return [log["loss"] for log in logs if "loss" in log]


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "lora"])
def test_pairs_of_text_share_their_prefix(changes, train, said):
    """A blank picture, of which they see nothing, is left out."""
    settings = {"dataset": "texts", **FROZEN, **changes}
    apart = train(**settings, share_prefix=False)
    shared = train(**settings, share_prefix=True)  # or it fails
    assert losses(shared) == pytest.approx(losses(apart), abs=AS_LOGGED)
    assert max(losses(apart)) - min(losses(apart)) > 1e-2
    assert [line for line in said if line.startswith("Prefix sharing is on")]


def test_pairs_with_pictures_have_a_row_per_response(train, said):
    settings = {"dataset": "pictures", **FROZEN, "max_steps": 4, "disable_shuffling": True}
    assert losses(train(**settings)) == pytest.approx(losses(train(**settings, share_prefix=False)), abs=AS_LOGGED)
    assert "Prefix sharing is off for batches that hold more than text." in said


@pytest.mark.parametrize(
    "sets", [{"dataset": "pictures"}, {"dataset": "texts", "eval_dataset": "pictures_eval", "do_eval": True}]
)
def test_what_cannot_share_is_known_before_the_first_step(sets, train, monkeypatch):
    monkeypatch.setattr(PrefixSharing, "lay_out", None)
    with pytest.raises(ValueError, match=r"some pairs hold more than text\. Remove `share_prefix: true`"):
        train(**sets, **FROZEN, share_prefix=True)


def test_while_the_tower_is_trained_a_blank_picture_stays(train, said):
    train(dataset="texts")
    assert (
        "Prefix sharing is off: more than the language model is trained, and every batch of text holds a blank"
        in str(said)
    )
    with pytest.raises(ValueError, match="more than the language model is trained"):
        train(dataset="texts", share_prefix=True)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_the_reference_of_pictures_is_computed_once(train, data, said, tmp_path):
    """And again where a picture, or how pictures are read, has changed."""
    own = tmp_path / "data"
    shutil.copytree(data, own)
    rows = (own / "pictures.jsonl").read_text(encoding="utf-8")
    (own / "pictures.jsonl").write_text(rows.replace(str(data), str(own)), encoding="utf-8")
    settings = {"dataset_dir": str(own), "max_steps": 4, "disable_shuffling": True}
    settings |= {"ref_log_probs_cache_dir": str(tmp_path / "cache")}

    def cached():
        return re.search("Reference log-probabilities: ([0-9]+) of ([0-9]+)", "\n".join(said[::-1])).groups()

    every_step = train(**settings, precompute_ref_log_probs=False)
    beforehand = train(**settings, precompute_ref_log_probs=True)
    assert cached() == ("0", "8")
    assert losses(beforehand) == pytest.approx(losses(every_step), abs=AS_LOGGED)
    assert losses(train(**settings)) == losses(beforehand)
    assert cached() == ("8", "8")
    assert len(list((tmp_path / "cache").iterdir())) == 1

    assert losses(train(**{**settings, "max_steps": 1})) == losses(beforehand)[:1]
    Image.new("RGB", (56, 56), "yellow").save(own / "red.png")
    train(**settings)
    assert cached() == ("7", "8")
    train(**settings, image_max_pixels=64 * 64)
    assert cached() == ("0", "8")


def test_pictures_of_a_short_run_are_not_read_beforehand(train, said, monkeypatch):
    monkeypatch.setattr(cache, "digest_of_media", None)
    train(max_steps=1)
    assert any("the run ends before it has trained on every pair" in line for line in said)


def test_a_picture_that_cannot_be_identified_leaves_the_reference_to_every_step(train, said, monkeypatch):
    def fail(pair):
        raise TypeError("int is neither a file nor bytes")

    monkeypatch.setattr(cache, "digest_of_media", fail)
    train(max_steps=4)
    (line,) = [line for line in said if "computed in every step" in line]
    assert "a picture, video or sound cannot be read (" in line
    with pytest.raises(ValueError, match="`precompute_ref_log_probs: true` is not possible here: a picture, video"):
        train(max_steps=4, precompute_ref_log_probs=True)


def test_a_picture_that_changes_during_training_ends_it_with_a_sentence(train, monkeypatch):
    digests = iter(bytes([number]) for number in range(250))
    monkeypatch.setattr(cache, "digest_of_media", lambda pair: next(digests))
    with pytest.raises(ValueError, match="has changed since the reference's log-probabilities were computed"):
        train(max_steps=4, precompute_ref_log_probs=True)


# --- the refinement term ----------------------------------------------------------------------------------------------


def logp(model: Any, processor: Any, prompt: str, response: str, images: list[Any]) -> tuple[float, int]:
    """The summed log-probability of one response, alone, and its length: all of it by transformers' own code."""
    inputs = processor(text=prompt + response, images=images or None, return_tensors="pt")
    length = len(processor.tokenizer(response)["input_ids"])
    with torch.no_grad():
        logps = model(**inputs).logits[0].double().log_softmax(dim=-1)
    return logps[-length - 1 : -1].gather(1, inputs["input_ids"][0, -length:, None]).sum().item(), length


@pytest.fixture(scope="module")
def plain_pairs(family, models, data):
    """The pairs of a data set, each answer scored alone; the refinement's beta is 0.1."""
    processor = AutoProcessor.from_pretrained(models[0])
    scorers = dict(zip(("policy", "reference"), map(AutoModelForImageTextToText.from_pretrained, models), strict=True))
    template, placeholder, end = PROMPTS["llava" if family == "llava" else "qwen"]

    def score(rows: list[dict[str, Any]], sr_prompt: str) -> PairLogps:
        columns: dict[str, list[float]] = {}
        for row in rows:
            prompt = template.format(sr_prompt + row["instruction"].replace("<image>", placeholder))
            images = [Image.open(file) for file in row.get("images", [])]
            for side in ("chosen", "rejected"):
                for name, scorer in scorers.items():
                    total, length = logp(scorer, processor, prompt, row[side] + end, images)
                    columns.setdefault(f"{name}_{side}", []).append(total)
                columns.setdefault(f"{side}_length", []).append(length)
        return PairLogps(**{name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()})

    @functools.cache
    def pairs_of(name: str) -> PairLogps:
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        return PairLogps(**{**vars(score(rows, "")), "refinement": 0.1 * score(rows, SR_PROMPT).margin})

    return pairs_of


DATASETS: dict[str, dict[str, Any]] = {
    "pictures": {"dataset": "pictures", "eval_dataset": "pictures_eval"},
    "texts": {"dataset": "texts", "eval_dataset": "texts", "precompute_ref_log_probs": True},
}


@pytest.fixture(scope="module")
def refined(train):
    """The steps of a run that stands still and goes once through eight pairs, in micro-batches of two."""

    @functools.cache
    def steps_of(loss: str, dataset: str, micro_batches: int) -> list[dict[str, float]]:
        settings = {"pref_loss": loss, "sr_lambda": 0.3, "sr_prompt": SR_PROMPT, **DATASETS[dataset]}
        settings |= {"learning_rate": 0.0, "disable_shuffling": True}
        settings |= {"gradient_accumulation_steps": micro_batches, "max_steps": 4 // micro_batches}
        return train(**settings, eval_strategy="steps", eval_steps=4 // micro_batches)

    return steps_of


@pytest.mark.parametrize(("loss", "dataset"), [("sr_dpo", "pictures"), ("minor_dpo", "pictures"), ("sr_dpo", "texts")])
def test_refined_loss_is_that_of_each_answer_scored_alone(loss, dataset, refined, plain_pairs):
    """Four micro-batches a step, whose augmented pairs come before the step: as those of text, which are joined."""
    step, evaluation = refined(loss, dataset, micro_batches=4)
    names = [DATASETS[dataset][key] for key in ("dataset", "eval_dataset")]
    for prefix, log, pairs in zip(("", "eval_"), (step, evaluation), map(plain_pairs, names), strict=True):
        expected = plain_loss(loss, pairs, beta=0.1, sr_lambda=0.3).mean().item()
        assert log[f"{prefix}loss"] == pytest.approx(expected, abs=AS_LOGGED)
        assert log[f"{prefix}sr/refinement"] == pytest.approx(pairs.refinement.mean().item(), abs=1e-5)
        assert log[f"{prefix}logps/chosen"] == pytest.approx(pairs.policy_chosen.mean().item(), rel=1e-5)


@pytest.mark.parametrize("dataset", ["pictures", "texts"])
def test_accumulation_leaves_the_refinement_as_it_is(dataset, refined):
    together, *_ = refined("sr_dpo", dataset, micro_batches=4)
    *alone, _ = refined("sr_dpo", dataset, micro_batches=1)
    assert len({log["sr/refinement"] for log in alone}) == len(alone) == 4
    for name in ("loss", "sr/refinement", "sr/augmented_margins"):
        near = AS_LOGGED if name == "loss" else 1e-5
        assert together[name] == pytest.approx(sum(log[name] for log in alone) / 4, abs=near), name


@pytest.mark.parametrize("dataset", ["pictures", "texts"])
def test_pairs_are_checked_and_scored_as_trained(dataset, family, models, data, tmp_path, plain_pairs):
    """Also pairs of text alone, for which a vision model's template asks for its processor."""
    settings = recipe(models[0], family, data, tmp_path / "out", dataset=dataset, default_system="Add.")
    report = check_pairs(settings)
    assert (report.pairs, report.stop, report.found_problems) == (8, "", False)
    assert report.notes["copies of another pair"] == 0

    pairs = plain_pairs(dataset)
    scored = settings | {"ref_model": str(models[1]), "pref_loss": "sr_dpo", "sr_prompt": SR_PROMPT}
    list(score_pairs({**scored, "infer_dtype": "float32"}, tmp_path / "scores.jsonl", batch_size=3))
    rows = read_scores(tmp_path / "scores.jsonl")
    for name, values in {
        "chosen_logp": pairs.policy_chosen,
        "margin": pairs.margin,
        "refinement": pairs.refinement,
    }.items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize("dataset", ["pictures", "texts"])
def test_pairs_are_read_before_a_training_as_trained(dataset, family, models, data, tmp_path, plain_pairs):
    """By `data check --model`: with their pictures; text alone with shared prefixes where the family allows them."""
    settings = recipe(models[0], family, data, tmp_path / "out", dataset=dataset, default_system="Add.")
    list(foresee({**settings, "infer_dtype": "float32"}, tmp_path / "scores.jsonl", batch_tokens=1000))
    rows, pairs = read_scores(tmp_path / "scores.jsonl", "normalized_ches"), plain_pairs(dataset)
    for side, values in (("chosen", pairs.policy_chosen), ("rejected", pairs.policy_rejected)):
        assert [row[f"{side}_logp"] for row in rows] == pytest.approx(values.tolist(), rel=1e-4, abs=1e-4), side


def test_a_picture_that_is_not_there_is_a_row_at_which_the_training_stops(family, models, data, tmp_path):
    rows = (data / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "pictures.jsonl").write_text(f"{rows[1]}\n{rows[0].replace('.png', '.gone')}\n", encoding="utf-8")
    (tmp_path / "dataset_info.json").write_bytes((data / "dataset_info.json").read_bytes())
    settings = recipe(models[0], family, tmp_path, tmp_path / "out")
    report = check_pairs(settings)
    assert report.problems["rows at which the training stops"] == 1
    assert "row 2: " in report.stop
    with pytest.raises(UserError, match="row 2 cannot be tokenized: "):
        list(score_pairs(settings | {"ref_model": str(models[1])}, tmp_path / "scores.jsonl"))


def test_pictures_show_in_the_answers(family, models, data):
    """Otherwise no test here would notice another row's picture."""
    processor, model = AutoProcessor.from_pretrained(models[0]), AutoModelForImageTextToText.from_pretrained(models[0])
    template, placeholder, end = PROMPTS["llava" if family == "llava" else "qwen"]
    prompt = template.format(f"{placeholder}Which color?")
    logps = [
        logp(model, processor, prompt, f"It is red.{end}", [Image.open(data / f"{color}.png")])[0]
        for color in ("red", "black")
    ]
    assert abs(logps[0] - logps[1]) > 0.05


def test_only_text_is_joined():
    text = dict.fromkeys(("input_ids", "attention_mask", "labels"))
    assert is_joinable(text, per_pair=[])
    assert is_joinable({**text, "reference_logps": None}, per_pair=["reference_logps"])
    for name in ("position_ids", "rope_deltas", "pixel_values", "image_grid_thw", "token_type_ids", "data"):
        assert not is_joinable({**text, name: None}, per_pair=["reference_logps"])
