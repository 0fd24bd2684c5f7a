"""The study on pairs of known quality: its pairs, the rule for its learning rate, its statistics, and its verdicts."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml

from llamafactory_ext.report.claims import graded
from llamafactory_ext.report.claims.graded import (
    REFINED,
    SETTINGS,
    Graded,
    bootstrap,
    gain,
    graded_findings,
    mean,
    partial_spearman,
    spearman,
)
from llamafactory_ext.sweep.spec import Sweep

STUDY = Path(__file__).parents[1] / "examples" / "reproduce"
sys.path.insert(0, str(STUDY))

import graded_pairs  # noqa: E402
from graded import choose_rate, gaps  # noqa: E402
from steps import fill_in  # noqa: E402

OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__}


def wrong_lines(answer):
    """How many of an answer's calculations are wrong; its last line is checked against them."""
    *steps, last = answer.splitlines()
    parts = [re.fullmatch(r"(Now|Then) (\d+) (.) (\d+) = (\d+) \w+\.", step).groups() for step in steps]
    assert len({wording for wording, *_ in parts}) == 1
    assert last == f"So the answer is: {parts[-1][4]}"
    return sum(OPERATIONS[sign](Fraction(a), Fraction(b)) != int(result) for _, a, sign, b, result in parts)


def some_pairs(count=400):
    rng = random.Random(0)
    problems = itertools.islice(graded_pairs.problems(0), count)
    return [graded_pairs.pair(problem, i % 4, rng) for i, problem in enumerate(problems)]


def test_gaps_are_what_the_scores_say():
    ratings = {0: 100, 1: 70, 2: 40, 3: 10}
    pairs = some_pairs()
    for pair in pairs:
        chosen, rejected = wrong_lines(pair["chosen"]), wrong_lines(pair["rejected"])
        assert (pair["score_chosen"], pair["score_rejected"]) == (ratings[chosen], ratings[rejected])
        assert pair["chosen"] != pair["rejected"]
    found = gaps([{key: float(pair[key]) for key in ("score_chosen", "score_rejected")} for pair in pairs])
    assert [int(gap) for gap in found] == [i % 4 for i in range(len(pairs))]


def test_a_gap_does_not_say_how_bad_the_rejected_answer_is():
    counts = Counter((pair["score_chosen"], pair["score_rejected"]) for pair in some_pairs())
    assert len(counts) == 10  # every pair of qualities with the better one first
    assert min(counts.values()) > 10


def test_the_answers_of_a_pair_differ_by_its_gap_and_the_wording():
    for i, pair in enumerate(some_pairs(100)):
        lines = zip(pair["chosen"].splitlines(), pair["rejected"].splitlines(), strict=True)
        assert sum(a.split(maxsplit=1)[1] != b.split(maxsplit=1)[1] for a, b in lines) == i % 4
        assert pair["chosen"].split()[0] != pair["rejected"].split()[0]


def test_raters_like_one_wording_whatever_the_gap():
    pairs = some_pairs(2000)
    for gap in range(4):
        favoured = [pair["chosen"].startswith("Now") for pair in pairs[gap::4]]
        assert 0.69 < sum(favoured) / len(favoured) < 0.81


def test_ratings_are_true_of_the_answers_in_the_sft_data():
    rng = random.Random(0)
    rows = [graded_pairs.sft_row(problem, rng) for problem in itertools.islice(graded_pairs.problems(0), 1000)]
    seen = Counter()
    for row in rows:
        if match := re.match(r"Usefulness (\d+) of 100\. Query: ", row["instruction"]):
            wrong = wrong_lines(row["output"])
            assert int(match[1]) == 100 - 30 * wrong
            seen[wrong, row["output"].split()[0]] += 1
    assert len(seen) == 8  # four ratings in two wordings
    assert 350 < seen.total() < 450


def test_no_problem_is_in_two_sets(tmp_path, monkeypatch):
    sizes = {"sft": 300, "pairs": 40, "pilot": 40, "held_out": 20, "calibration": 25, "test": 30}
    monkeypatch.setattr(graded_pairs, "SIZES", sizes)
    graded_pairs.make_data(tmp_path)
    questions = {}
    for name, size in sizes.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        column = "question" if name in ("calibration", "test") else "instruction"
        questions[name] = {row[column].split("Query: ")[-1] for row in rows}
        assert len(questions[name]) == size
    for a, b in itertools.combinations(questions.values(), 2):
        assert not a & b


def test_the_same_seed_gives_the_same_data(tmp_path, monkeypatch):
    monkeypatch.setattr(graded_pairs, "SIZES", dict.fromkeys(graded_pairs.SIZES, 8))
    first, again, other = (
        graded_pairs.make_data(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    texts = [[path.read_text() for path in sorted(folder.glob("*.jsonl"))] for folder in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_every_setting_is_in_the_grid(tmp_path):
    file = fill_in(STUDY / "graded_grid.yaml", {"RATE": 1e-4}, tmp_path)
    places = [cell.place for cell in Sweep(**yaml.safe_load(file.read_text())).cells()]
    settings = Counter((place["pref_loss"], place.get("sr_lambda")) for place in places)
    assert settings == {(v.loss, dict(v.values).get("sr_lambda")): 1 for v in SETTINGS}
    assert {place["learning_rate"] for place in places} == {1e-4}


@pytest.mark.parametrize(
    ("accuracies", "rate"),
    [({1e-5: 0.9, 1e-4: 0.75, 1e-3: 0.2}, 1e-4), ({1e-5: 0.5, 1e-4: 0.3}, 1e-5), ({1e-5: 1.0, 1e-4: 1.0}, 1e-4)],
)
def test_the_largest_rate_that_leaves_the_model_intact(accuracies, rate):
    assert choose_rate(accuracies, untrained=1.0) == rate


# --- statistics ------------------------------------------------------------------------------------------------------


def test_rank_correlations_by_hand():
    a, b, c = np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40]), np.array([2.0, 1, 4, 3])
    # 1 - 6 sum d^2 / (n (n^2 - 1)): sums of squared rank differences 2, 4 and 10
    assert spearman(a, b) == pytest.approx(0.8)
    assert spearman(a, c) == pytest.approx(0.6)
    assert spearman(b, c) == pytest.approx(0.0)
    # (0.8 - 0.6 * 0) / sqrt((1 - 0.36)(1 - 0)) = 1: what c leaves of a is b's
    assert partial_spearman(a, b, c) == pytest.approx(1.0)
    assert gain(b, c, a) == pytest.approx(0.2)


def test_ties_have_mean_ranks():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, 50).astype(float), rng.normal(size=50)
    assert spearman(a, b) == pytest.approx(scipy_stats.spearmanr(a, b).statistic)


def test_nothing_is_left_where_the_third_says_all():
    a, b = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert partial_spearman(a, b, a) == 0
    assert spearman(a, np.ones(4)) == 0


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(3).normal(size=400)
    estimate, low, high = bootstrap(mean, values)
    half = 1.96 * values.std() / 20
    assert estimate == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((estimate - half, estimate + half), abs=0.02)


# --- verdicts --------------------------------------------------------------------------------------------------------

GAP = np.arange(400) % 4 * 1.0


@pytest.fixture
def few_draws(monkeypatch):
    monkeypatch.setattr(graded, "RESAMPLES", 100)


def noise(seed, size=1.0):
    return np.random.default_rng(seed).normal(scale=size, size=len(GAP))


def study(delta=None, margin=None, refined=None):
    """Every claim holds, but for what is changed; margins of both losses, or of the refined ones only."""
    plain = 2 * GAP + noise(1, 2.0) if margin is None else margin
    better = 2 * GAP - 1 + (plain - 2 * GAP) / 2 if refined is None else refined
    delta = GAP + noise(2, 0.5) if delta is None else delta
    return {v: Graded(GAP, better if v in REFINED else plain, delta) for v in SETTINGS}


def verdicts(study, start=None):
    start = GAP + noise(3, 0.5) if start is None else start
    return [finding.verdict for finding in graded_findings(study, start, GAP)]


@pytest.mark.usefixtures("few_draws")
def test_every_claim_can_hold():
    assert set(verdicts(study())) == {"holds"}


PLAIN_MARGIN = 2 * GAP + noise(1, 2.0)


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(
    ("place", "fails", "open_"),
    [
        (0, {"start": noise(4)}, {"start": GAP + noise(4, 1.9)}),
        (1, {"delta": noise(4)}, {"delta": GAP + noise(4, 1.9)}),
        (2, {"delta": PLAIN_MARGIN - 0.3 * GAP}, {"delta": PLAIN_MARGIN + noise(5, 3) + 0.3 * GAP}),
        (3, {"refined": PLAIN_MARGIN}, {"refined": PLAIN_MARGIN + noise(4, 3)}),
        (4, {"refined": PLAIN_MARGIN + 1}, {"refined": PLAIN_MARGIN + noise(4, 3)}),
        (5, {"refined": PLAIN_MARGIN}, {"refined": 2 * GAP + noise(6, 2.0)}),
    ],
)
def test_every_claim_can_fail_and_be_undecided(place, fails, open_):
    for changes, verdict in ((fails, "does not hold"), (open_, "cannot tell")):
        start = changes.pop("start", None)
        assert verdicts(study(**changes), start)[place] == verdict


def test_what_is_missing_is_no_verdict():
    first, *others = verdicts({})
    assert first == "holds"
    assert set(others) == {"cannot tell"}
