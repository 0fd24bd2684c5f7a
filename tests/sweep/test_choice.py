"""Values of an axis that an earlier sweep chooses."""

from __future__ import annotations

import json

import pytest
import yaml
from recorded_sweeps import score, score_pairs, tasks_of, train

from llamafactory_ext.errors import UserError
from llamafactory_ext.sweep.choice import choose
from llamafactory_ext.sweep.files import write_recipes, write_sweep
from llamafactory_ext.sweep.spec import Sweep, read_sweep
from llamafactory_ext.sweep.tasks import Agenda

RECIPE = {"stage": "dpo", "model_name_or_path": "model", "finetuning_type": "full", "dataset": "pairs"}
LAMBDAS = {"pref_loss": ["sr_dpo", "sr_ipo"], "sr_lambda": [0.1, 0.3]}
MARGINS = {
    "sr_dpo-sr_lambda0.1": 1.0,
    "sr_dpo-sr_lambda0.3": 2.0,
    "sr_ipo-sr_lambda0.1": 4.0,
    "sr_ipo-sr_lambda0.3": 3.0,
}


@pytest.fixture
def write(tmp_path):
    def sweep(name, axes, **keys):
        file = tmp_path / f"{name}.yaml"
        evaluators = [{"gsm8k": {"data": "openai/gsm8k", "engine": "hf"}}, {"pairs": {"dataset": "test"}}]
        settings = {"recipe": RECIPE, "axes": axes, "output": str(tmp_path / name), "evaluators": evaluators}
        file.write_text(yaml.safe_dump(settings | keys, sort_keys=False))
        return file

    return sweep


@pytest.fixture
def earlier(write):
    """A finished sweep over lambda, in which each loss has another best margin."""
    file = write("earlier", LAMBDAS)
    finish(read_sweep(file), MARGINS)
    return file


def finish(sweep, margins, right=5):
    agenda = Agenda(sweep, sweep.cells())
    write_recipes(agenda, agenda.cells)
    write_sweep(agenda, sweep.output / "sweep.yaml")
    tasks = tasks_of(sweep)
    for cell in agenda.cells:
        train(sweep, cell, tasks=tasks)
        score(sweep, cell.name, right, tasks=tasks)
        if margins.get(cell.name) is not None:
            score_pairs(sweep, cell, [margins[cell.name]], tasks)


def best_of(file, by="margin"):
    return {"best_of": str(file), "by": by}


def names(sweep):
    return [cell.name for cell in sweep.cells()]


def test_each_loss_gets_its_own_best_value(write, earlier):
    axes = [{"pref_loss": "sigmoid", "seed": [1, 2]}, {**LAMBDAS, "sr_lambda": best_of(earlier), "seed": [1, 2]}]
    sweep, choices = choose(read_sweep(write("later", axes)))
    assert names(sweep) == [
        "sigmoid-seed1",
        "sigmoid-seed2",
        "sr_dpo-sr_lambda0.3-seed1",
        "sr_dpo-sr_lambda0.3-seed2",
        "sr_ipo-sr_lambda0.1-seed1",
        "sr_ipo-sr_lambda0.1-seed2",
    ]
    assert [(choice.place, choice.value, choice.measured) for choice in choices] == [
        ({"pref_loss": "sr_dpo"}, 0.3, {"0.1": 1.0, "0.3": 2.0}),
        ({"pref_loss": "sr_ipo"}, 0.1, {"0.1": 4.0, "0.3": 3.0}),
    ]
    assert choices[0].told.startswith("sr_lambda for pref_loss sr_dpo is 0.3, the best by margin of ")


def test_the_mean_over_seeds_decides_and_the_first_of_equal_ones(write):
    file = write("seeds", {"pref_loss": "sr_dpo", "sr_lambda": [0.1, 0.3], "seed": [1, 2]})
    margins = {"sr_dpo-sr_lambda0.1-seed1": 3.0, "sr_dpo-sr_lambda0.1-seed2": 3.0}
    margins |= {"sr_dpo-sr_lambda0.3-seed1": 5.0, "sr_dpo-sr_lambda0.3-seed2": 1.0}
    finish(read_sweep(file), margins)
    _, (choice,) = choose(read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(file)})))
    assert (choice.value, choice.measured) == (0.1, {"0.1": 3.0, "0.3": 3.0})


def test_other_measures(write, earlier):
    axes = {"pref_loss": "sr_dpo"}
    for by in ("accuracy", "gsm8k"):
        _, (choice,) = choose(read_sweep(write("later", axes | {"sr_lambda": best_of(earlier, by)})))
        assert choice.measured == {"0.1": 1.0, "0.3": 1.0} if by == "accuracy" else {"0.1": 0.5, "0.3": 0.5}


def test_a_dry_run_comes_before_the_earlier_sweep(write):
    file = write("earlier", LAMBDAS)
    later = read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(file)}))
    sweep, (choice,) = choose(later, preliminary=True)
    assert names(sweep) == ["sr_dpo-sr_lambda0.1"]
    assert choice.is_preliminary
    assert "will be chosen by" in choice.told
    with pytest.raises(
        UserError, match=r"has no `margin` of sr_dpo-sr_lambda0\.1, or one that is not a number: run `llamafactory-ext"
    ):
        choose(later)


def test_a_candidate_without_a_number_is_not_passed_over(write):
    file = write("earlier", LAMBDAS)
    finish(read_sweep(file), MARGINS | {"sr_dpo-sr_lambda0.3": None})
    later = read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(file)}))
    with pytest.raises(UserError, match=r"has no `margin` of sr_dpo-sr_lambda0\.3, or one"):
        choose(later)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"by": "loss"}, "the axis `sr_lambda`: `by`: input should be 'margin', .* write {best_of: SWEEP.yaml, by: "),
        ({"order": "lowest"}, "`order`: extra inputs are not permitted"),
        ({"best_of": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_a_wrong_choice_is_refused(axis, message, write, earlier):
    later = read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(earlier) | axis}))
    with pytest.raises((UserError, FileNotFoundError), match=message):
        choose(later)


def test_a_sweep_without_the_key_and_one_that_chooses_itself_are_refused(write, earlier):
    later = write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(earlier), "pref_beta": 0.1})
    with pytest.raises(UserError, match="has no cell with `pref_ftx`"):
        choose(read_sweep(write("other", {"pref_ftx": best_of(earlier)})))
    with pytest.raises(UserError, match="chooses values itself, so `sr_lambda` cannot be chosen from it"):
        choose(read_sweep(write("third", {"sr_lambda": best_of(later)})))


def test_a_choice_that_changes_after_a_cell_was_trained_is_refused(write, earlier):
    def start():
        sweep, choices = choose(read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(earlier)})))
        agenda = Agenda(sweep, sweep.cells())
        write_recipes(agenda, agenda.cells)
        write_sweep(agenda, earlier, [vars(choice) for choice in choices])
        return sweep

    sweep = start()
    (cell,) = sweep.cells()
    train(sweep, cell)
    assert json.loads((sweep.output / "sweep.json").read_text())["chosen"][0]["value"] == 0.3
    start()  # the same again
    before = read_sweep(earlier)
    score_pairs(before, before.cells()[0], [9.0])
    with pytest.raises(UserError, match=r"now chooses sr_lambda 0\.1, where it chose 0\.3 before: write another"):
        start()


def test_axes_without_a_choice_stay_as_they_are():
    sweep = Sweep(recipe=RECIPE, axes={"pref_loss_args": {"tau": 1.0}, "seed": [1]}, output="out")
    assert names(choose(sweep)[0]) == names(sweep)


@pytest.mark.parametrize("changes", [{"recipe": RECIPE | {"learning_rate": 0.5}}, {"pairs": {"max_samples": 1}}])
def test_results_of_another_state_of_the_earlier_sweep_do_not_count(changes, write, earlier):
    settings = yaml.safe_load(earlier.read_text())
    settings["evaluators"][1]["pairs"] |= changes.pop("pairs", {})
    earlier.write_text(yaml.safe_dump(settings | changes, sort_keys=False))
    later = read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(earlier)}))
    with pytest.raises(UserError, match=r"earlier\.yaml has no `margin` of sr_dpo-sr_lambda0\.1"):
        choose(later)


def test_a_margin_that_is_no_number_is_not_chosen(write):
    file = write("earlier", LAMBDAS)
    finish(read_sweep(file), MARGINS | {"sr_dpo-sr_lambda0.1": float("nan")})
    later = read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(file)}))
    with pytest.raises(UserError, match=r"no `margin` of sr_dpo-sr_lambda0\.1, or one that is not a number"):
        choose(later)


def test_a_measure_that_the_earlier_sweep_never_takes(write, earlier):
    later = read_sweep(write("later", {"pref_loss": "sr_dpo", "sr_lambda": best_of(earlier, "lm_eval")}))
    with pytest.raises(UserError, match="does not measure `lm_eval`: add the evaluator to it, or write another `by`"):
        choose(later)
