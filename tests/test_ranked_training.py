"""Trainings on answers of several turns and on more than two answers, against plain numbers in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llamafactory.train import tuner
from plain import plain_logps, plain_loss
from test_trainer import SR_PROMPT, history, steps
from tiny import SUMS, make_model, recipe
from tiny_answers import answers_to, make_answers, turns_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ext import PairLogps, get_loss

HEAD = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>\n"


@pytest.fixture(scope="module")
def sets(tmp_path_factory, data):
    return make_answers(tmp_path_factory.mktemp("ranked"), data)


@pytest.fixture
def train(model, sets, tmp_path):
    count = itertools.count()

    def run(**changes: Any) -> Path:
        output = tmp_path / f"run{next(count)}"
        tuner.run_exp(recipe(model, sets, output, **{"cutoff_len": 200, **changes}))
        return output

    return run


@pytest.fixture(scope="module")
def scored(model, other_model):
    """Of each answer to the first two questions: log-probability under policy and reference, and tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    scorers = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (model, other_model)]
    rows = []
    for a, b in SUMS[:2]:
        prompt = HEAD.format(f"What is {a} + {b}?")
        of_row = [
            [plain_logps(scorer, tokenizer, prompt, text + END) for scorer in scorers] for text in answers_to(a, b)
        ]
        rows.append([(policy[0], reference[0], policy[1]) for policy, reference in of_row])
    return rows


def pairs_of(rows, order) -> tuple[PairLogps, list[int]]:
    """The pairs of better and worse answers, row by row, and each pair's row."""
    found, of_row = [], []
    for number, row in enumerate(rows):
        for better, worse in order:
            (w, w_ref, n_w), (l, l_ref, n_l) = row[better], row[worse]  # noqa: E741
            found.append((w, l, w_ref, l_ref, n_w, n_l))
            of_row.append(number)
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True)]
    return PairLogps(*columns[:4], *(column.long() for column in columns[4:])), of_row


ORDER = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
GAPS = torch.tensor([2.0, 2.0, 2.5, 0.5, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, "score_gap"])
@pytest.mark.parametrize("name", ["sigmoid", "minor_dpo", "ipo", "simpo"])
def test_a_pair_loss_is_the_mean_over_a_rows_pairs(name, weights, train, scored, other_model):
    hyper = {
        "sigmoid": {"beta": 0.1, "label_smoothing": 0.0, "sr_lambda": 0.0},
        "minor_dpo": {"beta": 0.1, "sr_lambda": 0.0},
        "ipo": {"beta": 0.1, "length_normalize": True},
        "simpo": {"beta": 0.1, "simpo_gamma": 0.5},
    }[name]
    reference = {"ref_model": str(other_model)} if get_loss(name).needs_reference else {}
    output = train(
        dataset="four", pref_loss=name, pref_ranked_weights=weights, max_steps=1, disable_shuffling=True, **reference
    )
    pairs, _ = pairs_of(scored, ORDER)
    pairs = replace(pairs, refinement=torch.zeros_like(pairs.policy_chosen))
    shares = torch.ones(5).double() if weights is None else GAPS
    expected = plain_loss(name, pairs, **hyper).reshape(2, 5) @ (shares / shares.sum())
    log = history(output)[0]
    assert log["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)
    if name == "sigmoid":
        assert log["logps/chosen"] == pytest.approx(pairs.policy_chosen.mean().item(), rel=1e-4)
        assert log["normalized_rewards/margins"] == pytest.approx(pairs.margin.mean().item(), rel=1e-3)


def test_plackett_luce_is_the_rankings_likelihood(train, scored, other_model):
    output = train(dataset="four", pref_loss="pl_dpo", max_steps=1, disable_shuffling=True, ref_model=str(other_model))
    expected = 0.0
    for row in scored:
        d = [0.1 * (policy - reference) for policy, reference, _ in row]
        d = torch.tensor(d, dtype=torch.float64)
        contests = [[0, 1, 2, 3], [1, 3], [2, 3]]
        expected += sum((torch.logsumexp(d[each], 0) - d[each[0]]).item() for each in contests) / 2
    assert history(output)[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "pl_dpo", "dpop", "odpo"])
def test_a_row_of_two_answers_is_a_pair_bit_for_bit(name, train):
    columns = [{"pref_margin_column": column} if name == "odpo" else {} for column in ("gap", "scores")]
    logs = [
        history(train(dataset=dataset, pref_loss=name, **named))
        for dataset, named in zip(("pairs", "two"), columns, strict=True)
    ]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if "runtime" not in k and "second" not in k} == {
            k: v for k, v in other.items() if "runtime" not in k and "second" not in k
        }


def test_rejected_answers_that_no_score_orders_are_not_compared(train, scored, other_model):
    output = train(dataset="rejected", max_steps=1, disable_shuffling=True, ref_model=str(other_model))
    pairs, _ = pairs_of(scored, [(0, 1), (0, 2), (0, 3)])
    expected = -torch.nn.functional.logsigmoid(0.1 * pairs.margin).mean().item()
    assert history(output)[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_turns_of_the_assistant_alone_are_trained(train, model, other_model):
    output = train(dataset="turns", max_steps=1, disable_shuffling=True, ref_model=str(other_model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    totals = []
    for a, b in SUMS[:2]:
        for side in turns_of(a, b):
            before, total = HEAD.format(f"What is {a} + {b}?"), 0.0
            for turn in side:
                if turn["from"] == "gpt":
                    total += plain_logps(policy, tokenizer, before, turn["value"] + END)[0]
                    before += turn["value"] + END
                else:
                    before += f"<|im_start|>user\n{turn['value']}<|im_end|>\n<|im_start|>assistant\n"
            totals.append(total)
    log = history(output)[0]
    assert log["logps/chosen"] == pytest.approx((totals[0] + totals[2]) / 2, rel=1e-4)
    assert log["logps/rejected"] == pytest.approx((totals[1] + totals[3]) / 2, rel=1e-4)


OTHERS = {
    "Sr-DPO": {"pref_loss": "sr_dpo", "sr_prompt": SR_PROMPT, "gradient_accumulation_steps": 2},
    "ODPO": {"pref_loss": "odpo", "pref_margin_column": "scores", "dataset": "four"},
    "weights": {"pref_weight_column": "weight", "dataset": "four"},
    "WPO": {"pref_wpo": True},
    "CRINGE": {"pref_loss": "cringe", "cringe_top_k": 1},
    "several losses": {"pref_loss": ["minor_dpo", "sft", "pl_dpo"]},
    "BCO": {"pref_bco_weight": 0.5, "pref_ftx": 0.1},
    "LoRA": {"finetuning_type": "lora"},
    "turns": {"dataset": "turns"},
    "both and pairs": {"dataset": "pairs,four,turns", "per_device_train_batch_size": 3},
}


@pytest.mark.parametrize("name", OTHERS)
def test_layout_and_cache_change_no_number(name, train, other_model, tmp_path):
    """Shared prefixes against a row per answer; the reference known before against one that runs in every step."""
    changes = {"dataset": "four,turns", "learning_rate": 5e-3, **OTHERS[name]}
    if name == "LoRA":  # which leaves a model as it was saved: in half precision, another layout would show
        changes["model_name_or_path"] = str(make_model(tmp_path / "float", seed=1, dtype="float32"))
    elif name != "CRINGE":  # it has no reference
        changes["ref_model"] = str(other_model)
    runs = [train(**changes, share_prefix=share) for share in (True, False)]
    if name != "CRINGE":
        runs += [train(**changes, precompute_ref_log_probs=known) for known in (True, False)]
        assert list(runs[2].glob("references/*/*.safetensors"))
    for other in runs[1:]:
        assert steps(other) == pytest.approx(steps(runs[0]), rel=2e-4, abs=1e-5)
    assert len(set(steps(runs[0]))) > 1


def test_evaluation_of_rows_with_several_answers(train, other_model):
    logs = history(
        train(dataset="pairs", eval_dataset="four", eval_strategy="steps", eval_steps=2, ref_model=str(other_model))
    )
    evaluations = [log for log in logs if "eval_loss" in log]
    assert len(evaluations) >= 2
    assert all("eval_rewards/margins" in log for log in evaluations)


def test_ld_alpha_is_for_pairs(train):
    with pytest.raises(ValueError, match="some rows have more than two responses: remove `ld_alpha`"):
        train(dataset="four", ld_alpha=0.5)


def test_ld_alpha_is_for_pairs_in_a_stream_too(train):
    with pytest.raises(ValueError, match="some rows have more than two responses: remove `ld_alpha`"):
        train(dataset="four", ld_alpha=0.5, streaming=True, dataloader_num_workers=1)


def test_rows_of_two_answers_before_all_others(train, sets, monkeypatch):
    """The first rows decide of which type a column is, and so does each worker's part of them."""
    several = train(dataset="two,four", preprocessing_num_workers=2, max_steps=12)
    assert len(set(steps(several))) > 1


def test_a_gap_of_the_data_counts_for_all_rejected_answers(train):
    logs = [steps(train(dataset="rejected", pref_loss="odpo", pref_margin_column=name)) for name in ("gap", "half")]
    assert logs[0][0] != pytest.approx(logs[1][0], rel=1e-3)
    with pytest.raises(ValueError, match="write `pref_margin_column: scores`"):
        train(dataset="four", pref_loss="odpo", pref_margin_column="weight")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_training_widens_margins(streaming, train):
    changes = {"streaming": True, "dataloader_num_workers": 1} if streaming else {}
    logs = [
        log
        for log in history(train(dataset="four", **changes, pref_loss="pl_dpo", max_steps=12, learning_rate=5e-3))
        if "loss" in log
    ]
    assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 1e-3
    assert logs[0]["normalized_rewards/margins"] == 0
