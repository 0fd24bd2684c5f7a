"""Trainings with several losses, weights and scores of the data, WPO, divergences, and `ld_alpha` on the reference."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from llamafactory.extras import logging
from llamafactory.train import tuner
from plain import plain_logits, plain_weight
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamafactory_ext.training import logps, terms

SR_PROMPT = "Rate 9 of 9: "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("model"), seed=1, dtype="float32")


@pytest.fixture
def train(model, data, tmp_path):
    """Train with changes of the recipe; returns what each step logged."""
    count = iter(range(1000))

    def run(model=model, data=data, **changes):
        output = tmp_path / f"run{next(count)}"
        about = {"optim": "sgd", "learning_rate": 0.1, "disable_shuffling": True, "max_steps": 3}
        tuner.run_exp(tiny.recipe(model, data, output, **about | changes))
        history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return [log for log in history if "loss" in log or "eval_loss" in log]

    return run


def column(logs, key):
    return [log[key] for log in logs if key in log]


def same(ours, theirs, keys=("loss", "grad_norm"), **tolerance):
    for key in keys:
        assert column(ours, key) == pytest.approx(column(theirs, key), **({"rel": 1e-5} | tolerance)), key


TUNINGS = [{"finetuning_type": "full"}, {"finetuning_type": "lora", "lora_rank": 4}]


# --- several losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_mixture_logs_its_parts_and_trains_their_sum(train, tuning):
    logs = train(pref_loss="minor_dpo,orpo,sft", pref_loss_weights=[1.0, 0.5, 0.25], **tuning)
    parts = [column(logs, f"loss/{name}") for name in ("minor_dpo", "orpo", "sft")]
    sums = [minor + 0.5 * orpo + 0.25 * sft for minor, orpo, sft in zip(*parts, strict=True)]
    assert column(logs, "loss") == pytest.approx(sums, rel=1e-5)
    assert parts[0][0] == pytest.approx(math.log(2))
    assert parts[0][-1] < parts[0][0]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_with_one_pair_at_a_time_a_mixture_with_sft_is_pref_ftx(train, tuning):
    one = {"per_device_train_batch_size": 1, **tuning}
    same(train(pref_loss="sigmoid,sft", pref_loss_weights="1,0.5", **one), train(pref_ftx=0.5, **one))


def test_one_loss_twice_by_weight_is_the_same_as_once(train):
    """1.0 L + 1.0 L' of two names of one loss: Sr-DPO without its term is DPO."""
    twice = train(pref_loss="sigmoid,sr_dpo", sr_lambda=0)
    once = train(pref_loss="sigmoid")
    assert column(twice, "loss")[0] == pytest.approx(2 * column(once, "loss")[0])
    assert column(twice, "grad_norm")[0] == pytest.approx(2 * column(once, "grad_norm")[0], rel=1e-4)


def test_a_mixture_with_a_refinement(train):
    """Its term is of the loss that has it; the other is as it is alone."""
    mixed = train(pref_loss="sr_dpo,ipo", sr_prompt=SR_PROMPT, learning_rate=1e-9)
    refined, ipo = (
        train(pref_loss="sr_dpo", sr_prompt=SR_PROMPT, learning_rate=1e-9),
        train(pref_loss="ipo", learning_rate=1e-9),
    )
    assert column(mixed, "loss/sr_dpo") == pytest.approx(column(refined, "loss"), rel=1e-5)
    assert column(mixed, "loss/ipo") == pytest.approx(column(ipo, "loss"), rel=1e-5)
    same(mixed, refined, keys=["sr/refinement", "sr/augmented_margins"])


# --- weights and scores of the data ----------------------------------------------------------------------------------


def rows_of(data, name="pairs"):
    return [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_of_the_data_are_their_pairs(train, data, streaming):
    stream = {"streaming": True, "dataloader_num_workers": 1} if streaming else {"disable_shuffling": False}
    rows = {row["instruction"]: row["weight"] for row in rows_of(data)}
    logs = train(pref_weight_column="weight", per_device_train_batch_size=1, learning_rate=1e-9, **stream)
    weights = column(logs, "weights/data")
    assert set(weights) <= set(rows.values())
    assert len(set(weights)) > 1
    assert column(logs, "loss") == pytest.approx([weight * math.log(2) for weight in weights], rel=1e-4)


def test_a_weight_of_0_takes_a_pair_out(train, model, tmp_path):
    """Half of the pairs are nonsense of weight 0: gradients are half of those of the other pairs alone."""
    clean = tiny.make_data(tmp_path / "clean")
    mixed = tiny.make_data(tmp_path / "mixed")
    rows = rows_of(clean)
    nonsense = [{**row, "chosen": row["rejected"][::-1], "rejected": "x", "weight": 0} for row in rows]
    lines = [
        json.dumps(each) + "\n"
        for pair in zip([{**row, "weight": 2} for row in rows], nonsense, strict=True)
        for each in pair
    ]
    (mixed / "pairs.jsonl").write_text("".join(lines))
    with_nonsense = train(data=mixed, pref_weight_column="weight", per_device_train_batch_size=2)
    same(with_nonsense, train(data=clean, per_device_train_batch_size=1))


def test_scores_of_the_data_are_odpos_offset(train, data, tmp_path):
    gaps = [row["gap"] for row in rows_of(data)[:2]]
    expected = sum(math.log1p(gap**0.5) for gap in gaps) / 2  # -log sigma(0 - 0.5 log gap)
    logs = train(pref_loss="odpo", odpo_alpha=0.5, pref_margin_column="gap")
    assert column(logs, "loss")[0] == pytest.approx(expected, rel=1e-5)

    two = tiny.make_data(tmp_path / "two")
    rows = [{**row, "good": row["gap"] + 3, "bad": 3} for row in rows_of(two)]
    (two / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 1}
    same(train(data=two, pref_loss="odpo", odpo_alpha=0.5, pref_margin_column=["good", "bad"]), logs)
    evaluated = train(data=two, pref_loss="odpo", pref_margin_column="good,bad", pref_weight_column="weight", **both)
    assert len(column(evaluated, "eval_loss")) == 3
    assert all(math.isfinite(loss) for loss in column(evaluated, "eval_loss"))


def test_scores_stay_with_a_refined_and_weighted_pair(train):
    changes = {"pref_loss": "odpo", "pref_margin_column": "gap", "sr_lambda": 0.1, "sr_prompt": SR_PROMPT}
    logs = train(pref_weight_column="weight", **changes)
    same(logs, train(pref_weight_column="weight", share_prefix=False, precompute_ref_log_probs=False, **changes))


def test_data_without_the_column_is_refused_before_the_model_loads(train, monkeypatch):
    monkeypatch.setattr("llamafactory.train.dpo.workflow.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(
        ValueError, match=r"`pref_weight_column` names 'wight', but the data has the columns .*'weight'"
    ):
        train(pref_weight_column="wight")


def test_tokenized_data_without_the_column_is_refused(train, tmp_path):
    tokenized = {"tokenized_path": str(tmp_path / "tokenized")}
    train(**tokenized)
    with pytest.raises(ValueError, match="tokenized with neither of the two, not with `pref_weight_column: weight`"):
        train(pref_weight_column="weight", **tokenized)


def test_tokenized_data_with_columns_that_the_recipe_does_not_name(train, tmp_path):
    """Another recipe's weights are not this one's."""
    tokenized = {"tokenized_path": str(tmp_path / "tokenized")}
    weighted = train(pref_weight_column="weight", **tokenized)
    same(weighted, train(pref_weight_column="weight"))
    same(train(**tokenized), train())
    with pytest.raises(ValueError, match="`pref_weight_column: weight`, not with `pref_weight_column: gap`"):
        train(pref_weight_column="gap", **tokenized)


def test_evaluations_draw_the_same_contrast_every_time(train):
    changes = {"pref_loss": "cringe", "cringe_bias": 40.0, "cringe_tau": 20.0, "learning_rate": 1e-9}
    logs = train(eval_strategy="steps", eval_steps=1, eval_dataset="pairs_eval", **changes)
    first, *others = column(logs, "eval_loss")
    assert others == pytest.approx([first] * 2, rel=1e-5)
    assert 0 < logs[0]["cringe/gate"] < 1


def test_a_contrast_of_numbers_that_are_none_is_none():
    logits = torch.full((3, 5), torch.nan)
    assert terms.Contrast(2)(logits, logits, torch.zeros(3, dtype=torch.int64)).isnan().all()


# --- WPO -------------------------------------------------------------------------------------------------------------


PROMPT = "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def responses(model, data, name):
    tokenizer = AutoTokenizer.from_pretrained(model)
    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for row in rows_of(data)[:2]:
        yield plain_logits(scorer, tokenizer, PROMPT.format(row["instruction"]), row[name] + "<|im_end|>\n")


@pytest.mark.parametrize("changes", [{}, {"share_prefix": False}, {"precompute_ref_log_probs": False}])
def test_wpo_weights_are_the_papers(train, model, data, changes):
    sides = [[plain_weight(*each) for each in responses(model, data, name)] for name in ("chosen", "rejected")]
    weights = [chosen * rejected for chosen, rejected in zip(*sides, strict=True)]
    first = train(pref_wpo=True, max_steps=1, **changes)[0]
    assert first["weights/wpo"] == pytest.approx(sum(weights) / 2, rel=1e-4)
    assert first["loss"] == pytest.approx(sum(weights) / 2 * math.log(2), rel=1e-4)


def test_terms_of_tokens_are_the_same_in_chunks(train, monkeypatch):
    changes = {"pref_loss": "sigmoid,cringe", "cringe_top_k": 1, "pref_wpo": True}
    whole = train(**changes)
    monkeypatch.setattr(logps, "CHUNK", 5 * 258)
    same(train(**changes), whole, keys=("loss", "grad_norm", "weights/wpo", "loss/cringe"))


def test_the_contrast_draws_from_the_most_likely_other_tokens():
    torch.manual_seed(0)
    logits = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(4000, 1).requires_grad_()
    target = torch.zeros(4000, dtype=torch.int64)
    values = terms.Contrast(2)(logits, logits.log_softmax(-1), target)
    near, far = math.log1p(math.exp(1.0)), math.log1p(math.exp(2.0))
    is_near = torch.isclose(values, torch.tensor(near))
    assert torch.isclose(values, torch.tensor(far)).logical_or(is_near).all()
    assert is_near.float().mean().item() == pytest.approx(math.e / (1 + math.e), abs=0.03)  # softmax of 2 and 1
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert (gradient[:, 3] == 0).all()
    assert torch.allclose(gradient.sum(-1), torch.zeros(4000), atol=1e-6)


# --- divergences and ld_alpha ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_train(train, divergence):
    logs = train(f_divergence=divergence, learning_rate=0.01, max_steps=6)
    plain = train(learning_rate=0.01, max_steps=6)
    # At the reference, all scores are 0 with slope 1 (JS: 1/2).
    assert logs[0]["loss"] == pytest.approx(math.log(2))
    slope = 0.5 if divergence == "js" else 1
    assert logs[0]["grad_norm"] == pytest.approx(slope * plain[0]["grad_norm"], rel=1e-4)
    assert logs[-1]["rewards/margins"] > 0
    assert logs[-1]["loss"] != pytest.approx(plain[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_ld_alpha_on_the_reference_starts_at_0(train, tuning):
    changes = {"pref_loss": "minor_dpo", "ld_alpha": 0.3, "ld_alpha_reference": True, **tuning}
    cached = train(**changes)
    assert [cached[0][f"normalized_rewards/{name}"] for name in ("chosen", "rejected")] == [0.0, 0.0]
    same(cached, train(precompute_ref_log_probs=False, **changes))
    same(cached, train(share_prefix=False, **changes))
    assert cached[-1]["loss"] != pytest.approx(train(pref_loss="minor_dpo", **tuning)[-1]["loss"], rel=1e-4)


def test_a_cache_of_another_ld_alpha_is_not_read(train, tmp_path, other_model):
    """One folder of caches; the reference is another model, so that its sums matter."""
    changes = {"ref_model": str(other_model), "ref_log_probs_cache_dir": str(tmp_path / "cache")}
    plain = train(**changes)
    weighted = {"ld_alpha": 0.3, "ld_alpha_reference": True, **changes}
    own = train(**weighted)
    assert own[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-4)
    same(own, train(**weighted | {"precompute_ref_log_probs": False}))
    same(plain, train(**changes))


def test_ld_alpha_weights_the_augmented_pairs_too(train):
    changes = {"pref_loss": "sr_dpo", "sr_prompt": SR_PROMPT, "ld_alpha": 0.3, "ld_alpha_reference": True}
    logs = train(**changes)
    same(logs, train(share_prefix=False, precompute_ref_log_probs=False, **changes))
    assert logs[0]["sr/refinement"] == 0.0  # of two models that are the same


# --- the router's loss -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    about = {"num_local_experts": 4, "num_experts_per_tok": 2, "dtype": "float32"}
    return tiny.make_model(tmp_path_factory.mktemp("experts"), seed=1, config="MixtralConfig", **about)


@pytest.fixture
def said(monkeypatch):
    lines = []
    for level in ("info_rank0", "warning_rank0", "warning_rank0_once"):
        monkeypatch.setattr(logging.get_logger(), level, lambda message: lines.append(str(message)))
    return lines


@pytest.mark.parametrize("changes", [{"use_reentrant_gc": False}, {"disable_gradient_checkpointing": True}])
def test_the_routers_loss_is_added(train, experts, said, changes):
    plain, logs = train(model=experts, **changes), train(model=experts, moe_aux_loss_coef=0.5, **changes)
    assert "router/loss" not in plain[0]
    assert logs[0]["router/loss"] >= 1.9  # of two experts a token, 2 where all get as many
    assert logs[0]["loss"] == pytest.approx(plain[0]["loss"] + 0.5 * logs[0]["router/loss"], rel=1e-5)
    assert logs[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-4)
    assert logs[-1]["router/loss"] < logs[0]["router/loss"]
    assert any("the router's loss (`moe_aux_loss_coef`) counts the tokens of both" in line for line in said)


def test_without_a_gradient_the_routers_loss_is_left_out(train, experts, said):
    """With LLaMA-Factory's way of checkpointing, routers run without a gradient, and their loss is a constant."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": "pairs_eval"}
    logs = train(model=experts, moe_aux_loss_coef=0.5, **evaluation)
    same(logs, train(model=experts, **evaluation), keys=("loss", "grad_norm", "eval_loss"))
    assert any("`moe_aux_loss_coef` has no effect: " in line and "`use_reentrant_gc: false`" in line for line in said)


@pytest.mark.parametrize("config", ["LlamaConfig", "GraniteMoeConfig"])
def test_a_model_without_a_router_says_so(train, said, tmp_path, config):
    """Or with one whose loss is the number 0."""
    model, changes = tiny.make_model(tmp_path / "model", seed=1, config=config), {"use_reentrant_gc": False}
    same(train(model=model, moe_aux_loss_coef=0.5, **changes), train(model=model, **changes))
    assert any("`moe_aux_loss_coef` has no effect: " in line and "returns no loss of a router" in line for line in said)
