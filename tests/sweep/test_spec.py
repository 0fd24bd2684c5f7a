"""A sweep's file becomes cells: what is dropped, what is merged, what is refused."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from llamafactory_ext.errors import UserError
from llamafactory_ext.losses.lookup import loss_names
from llamafactory_ext.recipe.keys import keys_not_taken
from llamafactory_ext.recipe.reading import parse_recipe
from llamafactory_ext.sweep.spec import Sweep, notes, read_sweep

BASE = {"stage": "dpo", "model_name_or_path": "model", "dataset": "pairs", "finetuning_type": "full"}
OUR_LOSSES = tuple(loss_names())


def cells(axes, **changes):
    return Sweep(recipe=BASE | changes, axes=axes, output="out").cells()


def test_every_combination_is_a_cell():
    found = cells({"pref_loss": ["sigmoid", "minor_dpo"], "learning_rate": [1e-6, 1e-5], "pref_beta": [0.02, 0.2]})
    assert [cell.name for cell in found] == [
        f"{loss}-lr{rate}-beta{beta}"
        for loss in ("sigmoid", "minor_dpo")
        for rate in ("1e-06", "1e-05")
        for beta in ("0.02", "0.2")
    ]
    assert found[0].settings["pref_beta"] == 0.02
    assert found[0].recipe["output_dir"] == "out/cells/sigmoid-lr1e-06-beta0.02/model"
    assert all(cell.settings["ref_log_probs_cache_dir"] == "out/references" for cell in found)


def test_what_a_loss_does_not_take_is_dropped_and_equal_cells_are_one():
    found = cells({"pref_loss": ["sigmoid", "dpop"], "dpop_lambda": [5, 50]})
    assert [cell.name for cell in found] == ["sigmoid", "dpop-dpop_lambda5", "dpop-dpop_lambda50"]
    assert "dpop_lambda" not in found[0].settings


def test_several_grids_are_joined_and_single_values_need_no_list():
    found = cells([{"pref_loss": "sigmoid", "seed": [1, 2]}, {"pref_loss": ["sigmoid", "ipo"], "seed": 2}])
    assert [cell.name for cell in found] == ["sigmoid-seed1", "sigmoid-seed2", "ipo-seed2"]


def test_values_that_are_written_alike_have_cells_of_their_own():
    found = cells({"model_name_or_path": ["a/b", "a_b"], "learning_rate": [1.0000001e-5, 1e-5]})
    assert len({cell.folder for cell in found}) == len(found) == 4


@settings(deadline=None)
@given(
    st.sampled_from(OUR_LOSSES),
    st.dictionaries(
        st.sampled_from(("dpop_lambda", "sr_lambda", "simpo_gamma", "dpo_label_smoothing", "ld_alpha")),
        st.sampled_from((0.0, 0.25)),
    ),
    st.sampled_from(({}, {"sr_prompt": "Well: "}, {"ipo_length_normalize": True}, {"precompute_ref_log_probs": True})),
)
def test_what_is_left_of_a_recipe_is_never_refused(loss, numbers, others):
    """LLaMA-Factory's own parser takes each cell, whatever the base recipe holds for other losses."""
    (cell,) = cells({"pref_loss": [loss]}, pref_margin_column="gap", **numbers, **others)
    parse_recipe(cell.recipe)


def test_a_loss_file_stays_with_its_own_losses(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("of_the_sweep")\n'
        "def of_the_sweep(pairs, *, tau: float = 1.0):\n    return tau * pairs.margin\n"
    )
    settings = BASE | {"pref_loss_file": str(file), "pref_loss_args": {"tau": 2.0}, "pref_beta": 0.3}
    assert keys_not_taken(settings | {"pref_loss": "of_the_sweep"}) == ["pref_beta"]
    assert keys_not_taken(settings | {"pref_loss": "sigmoid"}) == ["pref_loss_file", "pref_loss_args"]


def test_keys_of_a_mixture_are_those_of_any_of_its_losses():
    settings = {"pref_loss": "minor_dpo,sft", "pref_loss_weights": "1,0.1", "ld_alpha": 0.5, "ld_alpha_reference": True}
    assert keys_not_taken(settings) == []
    assert keys_not_taken(settings | {"ld_alpha_reference": False}) == ["ld_alpha", "ld_alpha_reference"]
    assert keys_not_taken(settings | {"pref_loss": "sft"}) == ["pref_loss_weights", "ld_alpha_reference"]
    assert keys_not_taken({"pref_loss": ["hinge", "sft"], "f_divergence": "js", "dpop_lambda": 5}) == ["dpop_lambda"]
    assert keys_not_taken({"pref_loss": "hinge,minor_dpo", "f_divergence": "js"}) == ["f_divergence"]
    assert keys_not_taken({"pref_loss": "sft,orpo", "f_divergence": "js", "ref_model": "x"}) == [
        "f_divergence",
        "ref_model",
    ]


def test_a_key_that_some_cells_leave_out_is_named():
    """Otherwise a sweep compares DPO under one divergence with MinorDPO under another, and says nothing."""
    sweep = Sweep(recipe=BASE | {"f_divergence": "js"}, axes={"pref_loss": ["sigmoid", "minor_dpo"]}, output="out")
    assert notes(sweep, sweep.cells()) == ["`f_divergence` is left out where the loss does not take it, in minor_dpo."]
    alike = Sweep(recipe=BASE | {"f_divergence": "js"}, axes={"pref_loss": ["sigmoid", "hinge"]}, output="out")
    assert notes(alike, alike.cells()) == []


def test_dpo_that_is_refined_beside_sr_dpo_is_named():
    """`sigmoid` takes `sr_lambda`, too: DPO and Sr-DPO would be the same training under two names."""
    sweep = Sweep(recipe=BASE | {"sr_lambda": 0.3}, axes={"pref_loss": ["sigmoid", "sr_dpo"]}, output="out")
    assert notes(sweep, sweep.cells()) == [
        "`sr_lambda` makes Sr-DPO of `sigmoid` in sigmoid: for DPO, sweep it without the key."
    ]
    plain = Sweep(recipe=BASE, axes={"pref_loss": ["sigmoid", "sr_dpo"]}, output="out")
    assert notes(plain, plain.cells()) == []


def test_a_recipe_of_another_stage_is_left_as_it_is():
    (cell,) = cells({"learning_rate": 1e-4}, stage="sft")
    assert "ref_log_probs_cache_dir" not in cell.settings


def options(**values):
    return gsm8k(data="x", engine="hf", options=values)


def gsm8k(**keys):
    return evaluators({"gsm8k": keys})


def judge(**keys):
    return evaluators({"judge": {"data": __file__, "judge": "gpt", "baseline": "base", "engine": "hf", **keys}})


def evaluators(*entries):
    return {"evaluators": list(entries)}


def read_and_check(file):
    sweep = read_sweep(file)
    sweep.cells()
    for evaluator in sweep.evaluators.asking:
        evaluator.check_files()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"axes": {"pref_beta": []}}, "`pref_beta` has no values"),
        ({"axes": {"output_dir": ["a"]}}, "cannot be an axis"),
        ({"axes": []}, "has no cells"),
        ({"axes": {"pref_loss": ["minor_dp"]}}, "Did you mean 'minor_dpo'"),
        ({"gpus_per_cell": -1}, "`gpus_per_cell`: input should be greater than or equal to 0"),
        ({"axis": {}}, "`axis`: extra inputs are not permitted"),
        (gsm8k(data="missing.jsonl", engine="hf"), "there is no missing.jsonl"),
        (options(score_only=True), "The sweep sets `score_only` itself: remove it"),
        (options(chat_template_kwargs="enable_thinking"), "`chat_template_kwargs` under `gsm8k` is not a mapping"),
        (options(limit=[1, 2]), "`limit` under `gsm8k` is [1, 2]: write a number"),
        (options(limit={"first": 1}), "`limit` under `gsm8k` is {'first': 1}: write a number"),
        (options(limit=None), "`limit` under `gsm8k` is None: write a number"),
        (gsm8k(data="openai/gsm8k"), "vLLM needs an environment of its own"),
        (gsm8k(data="x", engine="hf", script="nowhere.py"), "there is no nowhere.py"),
        (evaluators({"gsm8k": {"data": "x"}}, {"gsm8k": {"data": "y"}}), "`gsm8k` is there twice"),
        (evaluators("gsm8k"), "write each evaluator as its kind and its keys"),
        (evaluators({"gsm8k": {}, "pairs": {}}), "write each evaluator as its kind and its keys"),
        (evaluators({"glue": {}}), "`evaluators.glue`: extra inputs are not permitted"),
        (evaluators({"lm_eval": {"tasks": [], "engine": "hf"}}), "`tasks` under `lm_eval` is empty"),
        (evaluators({"lm_eval": {"tasks": "x", "engine": "openai"}}), "input should be 'vllm' or 'hf'"),
        (evaluators({"lm_eval": {"tasks": "x", "engine": "hf", "include_path": "no"}}), "there is no folder no"),
        (evaluators({"lm_eval": {"tasks": "x", "python": "nowhere/python"}}), "there is no nowhere/python"),
        (judge(data="no.jsonl"), "there is no no.jsonl: write the file of questions"),
        (
            judge(judge_options={"output": "x"}),
            "The sweep sets `output` itself: remove it from the options under `judge`",
        ),
        (
            {"evaluation": {"data": "x"}},
            "`evaluation` is an evaluator now: write its keys as `evaluators: [{gsm8k: ",
        ),
        (
            {"held_out": {"dataset": "x"}},
            "`held_out` is an evaluator now: write its keys as `evaluators: [{pairs: ",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(changes, words, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"recipe": BASE, "axes": {"seed": [1]}, "output": "out"} | changes))
    with pytest.raises(UserError, match=r".") as error:
        read_and_check(file)
    assert words in str(error.value)
