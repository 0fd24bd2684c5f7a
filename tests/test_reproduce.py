"""The study in small: its problems, the rule for its rates, and its verdicts."""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from llamafactory_ext.report.claims import findings
from llamafactory_ext.report.claims.study import Study
from llamafactory_ext.report.variants import SIZE, Variant
from llamafactory_ext.sweep.spec import Sweep

STUDY = Path(__file__).parents[1] / "examples" / "reproduce"
sys.path.insert(0, str(STUDY))

import start  # noqa: E402
import steps  # noqa: E402
from rates import choose_rates  # noqa: E402
from stories import MOST, stories  # noqa: E402

OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}


def test_every_step_of_a_story_is_right():
    problems = list(itertools.islice(stories(3), 500))
    assert len({problem.question for problem in problems}) == 500
    for problem in problems:
        number = int(re.search(r"has (\d+) ", problem.question)[1])
        steps = problem.steps.splitlines()
        assert 2 <= len(steps) <= 4
        for step in steps:
            before, sign, n, after = re.match(r"(\d+) (.) (\d+) = (\d+) ", step).groups()
            assert int(before) == number
            number = OPERATIONS[sign](Fraction(before), Fraction(n))
            assert number == int(after)
            assert 1 <= number <= MOST
            assert f" {n} " in problem.question
        assert str(number) == problem.answer


def test_the_same_seed_gives_the_same_stories():
    first, again, other = (list(itertools.islice(stories(seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_no_problem_is_in_two_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(
        start, "SIZES", {"sft": 300, "pairs": 40, "pilot": 40, "held_out": 20, "calibration": 25, "test": 30}
    )
    start.make_data(tmp_path)
    questions = {}
    for name in start.SIZES:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        field_ = "question" if name in ("calibration", "test") else "instruction"
        questions[name] = {row[field_].split("Query: ")[-1] for row in rows}
    for a, b in itertools.combinations(questions.values(), 2):
        assert not a & b
    assert len(questions["test"]) == 30


def test_ratings_mean_something_in_the_sft_data():
    rng = random.Random(0)
    rows = [start.sft_row(problem, rng) for problem in itertools.islice(stories(0), 2000)]

    def share_right(prefix):
        chosen = [row for row in rows if row["instruction"].startswith(prefix) is True]
        right = [all(_is_right(step) for step in row["output"].splitlines()[:-1]) for row in chosen]
        return sum(right) / len(right)

    assert share_right("Usefulness 100 of 100") == 1
    assert share_right("Usefulness 1 of 100") < 0.05
    unrated = [row for row in rows if not row["instruction"].startswith("Usefulness")]
    assert 0.78 < len(unrated) / len(rows) < 0.82


def _is_right(step):
    a, sign, b, result = re.match(r"(\d+) (.) (\d+) = (\d+) ", step).groups()
    return OPERATIONS[sign](Fraction(a), Fraction(b)) == int(result)


def test_model_and_tokenizer_are_real(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(
        start, "SIZES", {"sft": 300, "pairs": 4, "pilot": 4, "held_out": 4, "calibration": 4, "test": 4}
    )
    start.make_model(tmp_path / "model", start.make_data(tmp_path / "data"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == "qwen2"
    assert 2e6 < sum(p.numel() for p in model.parameters()) < 4e6
    text = "12 + 30 = 42 pens."
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token.isdigit()] == list("123042")


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [({25: 0.1, 50: 0.3, 75: 0.62, 100: 0.9}, 75), ({50: 0.7, 75: 0.8, 100: 0.9}, 50), ({75: 0.1, 100: 0.5}, 100)],
)
def test_the_study_starts_from_the_first_checkpoint_with_room(accuracies, chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "solved", lambda checkpoint, folder: accuracies[int(checkpoint.name.split("-")[1])])
    for step in accuracies:
        checkpoint = tmp_path / "sft" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model").write_text(str(step))
        (checkpoint / "optimizer.pt").touch()
    steps.choose_start(tmp_path, 0.6)
    assert (tmp_path / "start" / "model").read_text() == str(chosen)
    assert not (tmp_path / "start" / "optimizer.pt").exists()


def test_the_pilots_rates_go_into_the_grid(tmp_path):
    file = steps.fill_in(STUDY / "grid.yaml", {"LOW": 1e-5, "HIGH": 1e-4}, tmp_path)
    filled = Sweep(**yaml.safe_load(file.read_text()))
    assert {rate for grid in filled.axes for rate in _listed(grid["learning_rate"])} == {1e-5, 1e-4}
    assert len(filled.axes[0]["learning_rate"]) == 2


def test_dpo_in_the_grid_is_not_refined():
    """`sigmoid` takes `sr_lambda`, too: on its axes, DPO would be Sr-DPO under another name."""
    cells = Sweep(**yaml.safe_load((STUDY / "grid.yaml").read_text())).cells()
    plain = [cell for cell in cells if cell.place["pref_loss"] in ("sigmoid", "dpop", "minor_dpo", "ipo")]
    assert len(plain) == 2 * (3 * 2 * 5 + 1 + 3)
    assert not [cell.name for cell in plain if cell.settings.get("sr_lambda")]


def _listed(value):
    return value if isinstance(value, list) else [value]


# --- the rule and the verdicts ---------------------------------------------------------------------------------------


def test_the_upper_rate_is_the_first_that_breaks_dpo():
    assert choose_rates({1e-5: 0.7, 1e-4: 0.35, 1e-3: 0.0}, untrained=0.7) == (pytest.approx(1e-5), 1e-4)


def test_the_largest_rate_where_none_breaks_it():
    assert choose_rates({1e-5: 0.7, 1e-4: 0.6}, untrained=0.7) == (pytest.approx(1e-5), 1e-4)


@dataclass
class HeldOut:
    margin: float


@dataclass
class Cell:
    correct: dict
    recipe: dict
    train_seconds: float = 10.0
    summary: dict = field(default_factory=lambda: {"strict": {"accuracy": 0.0}})


@dataclass
class Group:
    """What the claims read of a group of cells."""

    variant: Variant
    learning_rate: float
    beta: float
    accuracy: float
    chosen: float = 0.0
    rejected: float = -1.0
    margin: float = 5.0
    seconds: float = 10.0
    degenerate: float = 0.0

    def final(self, metric):
        curves = {"chosen": self.chosen, "rejected": self.rejected, "margins": self.chosen - self.rejected}
        return curves[metric.split("/")[1]]

    @property
    def held_out(self):
        return HeldOut(self.margin)

    @property
    def cells(self):
        return self.scored

    @property
    def scored(self):
        correct = {index: index < 100 * self.accuracy for index in range(100)}
        return [Cell(correct, {"seed": 1}, self.seconds)]


def study(**changes):
    """A grid in which every claim holds, but for what is changed: how names begin -> function of a group."""
    dpo, ipo = Variant("sigmoid"), Variant("ipo")
    groups = []
    for rate, beta in itertools.product((1e-5, 1e-4), (0.02, 0.1, 0.2)):
        broken = rate == 1e-4
        groups += [
            Group(dpo, rate, beta, 0.2 if broken else 0.6, chosen=-1, rejected=-10 + 10 * beta),
            Group(Variant("dpop"), rate, beta, 0.55, chosen=0.5, rejected=-8 + 10 * beta),
            Group(Variant("minor_dpo"), rate, beta, 0.8, chosen=1, rejected=-6 + 10 * beta),
        ]
    for weight in (0.1, 0.3, 0.5, 1.0):
        value = ("sr_lambda", weight)
        groups.append(Group(Variant("sr_dpo", (value,)), 1e-5, 0.1, 0.6, margin=5 - weight, seconds=14))
        groups.append(Group(Variant("sr_ipo", (value,)), 1e-5, 0.1, 0.6, margin=5 - weight))
    groups.append(Group(ipo, 1e-5, 0.1, 0.6))
    for size in (256, 512, 1024):
        groups.append(Group(Variant("sr_dpo", (("sr_lambda", 0.3), (SIZE, size))), 1e-5, 0.1, 0.6, margin=4))
        groups.append(Group(Variant("sigmoid", ((SIZE, size),)), 1e-5, 0.1, 0.6))
    for group in groups:
        for name, change in changes.items():
            if group.variant.name.replace("-", "_").startswith(name):
                change(group)
    return Study(groups, untrained=0.6)


def verdicts(study):
    return {finding.claim: finding.verdict for finding in findings(study)}


def test_every_claim_can_hold():
    assert set(verdicts(study()).values()) == {"holds"}


def set_to(**values):
    def change(group):
        for name, value in values.items():
            setattr(group, name, value)

    return change


@pytest.mark.parametrize(
    ("changes", "claim", "verdict"),
    [
        ({"DPO": set_to(chosen=1)}, "DPO drives the rewards", "does not hold"),
        ({"MinorDPO": set_to(chosen=-1)}, "MinorDPO keeps", "does not hold"),
        ({"D": set_to(rejected=-3), "MinorDPO": set_to(rejected=-3)}, "A higher beta", "does not hold"),
        ({"MinorDPO": set_to(accuracy=0.1)}, "At the high rate", "does not hold"),
        ({"MinorDPO": set_to(accuracy=0.1)}, "MinorDPO's best", "does not hold"),
        ({"MinorDPO": set_to(accuracy=0.6)}, "MinorDPO's best", "cannot tell"),
        ({"Sr_DPO": set_to(margin=6)}, "Sr-DPO has lower margins", "does not hold"),
        ({"Sr_DPO": set_to(accuracy=0.4)}, "Sr-DPO has lower margins", "cannot tell"),
        ({"Sr_IPO": set_to(margin=6)}, "Sr-IPO has lower margins", "does not hold"),
        ({"Sr": set_to(margin=6)}, "The larger lambda", "does not hold"),
        ({"Sr_DPO": set_to(margin=6)}, "Sr-DPO's margins are lower", "does not hold"),
        ({"Sr_DPO": set_to(seconds=20)}, "The refinement costs little", "does not hold"),
    ],
)
def test_every_claim_can_fail(changes, claim, verdict):
    (found,) = [found for name, found in verdicts(study(**changes)).items() if name.startswith(claim)]
    assert found == verdict


def test_a_missing_setting_is_no_verdict_on_all():
    whole = study()
    part = Study([g for g in whole.groups if (g.variant.name, g.beta) != ("MinorDPO", 0.1)], 0.6)
    found = verdicts(part)
    for claim, verdict in found.items():
        if claim.startswith(("MinorDPO keeps", "A higher beta")):
            assert verdict == "cannot tell"
        if claim.startswith("DPO drives"):
            assert verdict == "holds"


def test_what_is_missing_is_no_verdict():
    first, *others = verdicts(Study([Group(Variant("sigmoid"), 1e-5, 0.1, 0.5, chosen=-1)], 0.6)).values()
    assert first == "holds"
    assert set(others) == {"cannot tell"}
