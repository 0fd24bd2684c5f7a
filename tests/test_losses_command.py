"""`llamafactory-ext losses`: a table that fits, and one loss whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from llamafactory_ext import cli
from llamafactory_ext.losses.lookup import all_losses, forgotten_afterwards, get_loss, loss_names
from llamafactory_ext.recipe.keys import keys_not_taken, keys_of

SCRIPT = Path(sys.executable).with_name("llamafactory-ext")
OURS = [name for name in loss_names() if not get_loss(name).is_users]
TITLES = ("pref_loss", "loss per pair", "needs", "keys and defaults")
MINE = '''
from llamafactory_ext import register_loss

@register_loss("mine", needs_reference=False, needs_batch=True)
def mine(pairs, *, tau: float, beta: float, kinds=(1, 2), mode: str = "no", made=object, lines="a\\nb"):
    """tau kappa [D_w],
    a line on.

    Args:
        tau: a temperature.
    Source: nowhere.
    """
'''


@pytest.fixture
def losses(monkeypatch):
    """What the command prints on a console of this width."""

    def run(*words, width=100):
        monkeypatch.setattr(cli, "console", Console(width=width))
        with forgotten_afterwards():
            done = CliRunner().invoke(cli.app, ["losses", *map(str, words)], prog_name="llamafactory-ext")
        assert done.exit_code == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def loss_file(tmp_path):
    path = tmp_path / "my losses.py"
    path.write_text(MINE, encoding="utf-8")
    return path


def squeezed(text):
    return "".join(text.split())


def rows(shown):
    """The table: under each heading of a family, the cells of each loss without white space."""
    lines = shown.splitlines()
    starts = [lines[0].index(title) for title in TITLES]
    families = {}
    for line in lines[2 : lines.index("")]:
        cells = [line[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if line.strip() and not line.startswith(" "):
            families[line.strip()] = members = {}
        elif cells[0].strip():
            members[cells[0].strip()] = row = cells[1:]
        elif line.strip():
            row[:] = [f"{before}\n{more}" for before, more in zip(row, cells[1:], strict=True)]
    return {family: {name: [*map(squeezed, row)] for name, row in of.items()} for family, of in families.items()}


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_fits_and_holds_everything(losses, width):
    shown = losses(width=width)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    assert max(map(len, lines)) > width - 40, "there was room"
    assert "…" not in shown
    assert len(lines) <= {80: 5.5, 100: 4, 140: 3}[width] * len(OURS)

    table = rows(shown)
    assert {name: family for family, members in table.items() for name in members} == {
        name: get_loss(name).function.__module__.rpartition(".")[2] for name in OURS
    }
    for name, (equation, needs, keys) in ((name, row) for members in table.values() for name, row in members.items()):
        loss = get_loss(name)
        assert equation == squeezed(loss.docstring.partition("\n\n")[0])
        assert (
            needs
            == ("reference" if loss.needs_reference else "noreference")
            + "batch>1" * loss.needs_batch
            + "scores" * loss.needs_scores
            + "ranking" * loss.needs_ranking
        )
        assert keys == squeezed("".join(f"{key}:{yaml.safe_dump(value)[:-4]}" for key, value in keys_of(loss).items()))
    assert "batch > 1: several pairs in a micro-batch" in shown
    assert "ranking: data rows with more than two answers" in shown
    assert lines[-1] == "One loss whole, with lines for a recipe: llamafactory-ext losses NAME"


def test_a_key_is_a_line_where_there_is_room(losses):
    lines = [line.split() for line in losses(width=100).splitlines()]
    for loss in all_losses():
        for key, value in keys_of(loss).items():
            assert any(line[-2:] == [f"{key}:", str(value).lower()] for line in lines), key


def test_own_losses_come_last(losses, loss_file):
    shown = losses("--pref-loss-file", loss_file)
    families = rows(shown)
    assert list(families)[-1] == "yours"
    assert set(families["yours"]) == {"mine"}
    equation, needs, keys = families["yours"]["mine"]
    assert equation == "taukappa[D_w],alineon."
    assert needs == "noreferencebatch>1"
    wanted = ["pref_loss_args.tau: (required)", "pref_beta: 0.1", "pref_loss_args.kinds: [1, 2]"]
    wanted += ["pref_loss_args.mode: 'no'", "pref_loss_args.made: <class 'object'>", r'pref_loss_args.lines: "a\nb"']
    assert keys == squeezed("".join(wanted))
    assert shown.splitlines()[-1].endswith(f"llamafactory-ext losses NAME --pref-loss-file '{loss_file}'")


@pytest.mark.parametrize("name", OURS)
def test_one_loss_whole(losses, name):
    loss, shown = get_loss(name), losses(name, width=80)
    first, text = shown.split("\n\n", 1)
    assert first.startswith(f"{name} (family: {loss.family}; needs: ")
    assert squeezed(text).startswith(squeezed(loss.docstring))
    assert "Source: " in text
    assert max(map(len, text.partition("\nCode: ")[0].splitlines())) <= 80
    assert ("\nbatch > 1: " in text) is loss.needs_batch
    assert shown.splitlines()[-1] == f"Code: {Path(loss.file)}"
    assert Path(loss.file).name == f"{loss.family}.py"

    recipe = yaml.safe_load(lines_to_copy(shown))
    assert recipe == {"pref_loss": name, **keys_of(loss)}
    assert not keys_not_taken(recipe)
    wide = losses(name, width=300)
    assert max(map(len, wide.partition("\nCode: ")[0].splitlines())) <= 100


def lines_to_copy(shown):
    return shown.partition("to copy into a recipe:\n\n")[2].partition("\n\nCode: ")[0]


def test_own_loss_whole(losses, loss_file):
    shown = losses("mine", "--pref-loss-file", loss_file, width=60)
    assert "tau kappa [D_w], a line on.\n\nArgs:\n    tau: a temperature.\nSource: nowhere.\n" in shown
    copied = lines_to_copy(shown)  # unbroken, on a console as narrow as this
    assert yaml.safe_load(copied) == {
        "pref_loss": "mine",
        "pref_loss_file": str(loss_file),
        "pref_beta": 0.1,
        "pref_loss_args": {"tau": None, "kinds": [1, 2], "mode": "no", "lines": "a\nb"},
    }
    assert "  tau:  # required\n" in copied
    assert "  # made: <class 'object'>\n" in copied
    assert "pref_beta: 0.1  # beta\n" in copied
    assert f"Code: {loss_file}\n" in shown


def test_one_of_ours_beside_a_loss_file(losses, loss_file):
    assert "pref_loss_file" not in losses("dpop", "--pref-loss-file", loss_file)


def test_the_documentation_shows_a_part_of_it(losses):
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    part = page.partition("```text\n")[2].partition("```")[0]
    assert "kto_pair" in part
    assert set(part.splitlines()) <= {line.rstrip() for line in losses(width=100).splitlines()}


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--pref-loss-file", "absent.py"], "is not a file"), (["dpo_p"], "Did you mean 'dpop' or 'odpo'?")],
)
def test_what_cannot_be_shown_is_a_sentence(words, message):
    wrong = CliRunner().invoke(cli.app, ["losses", *words], prog_name="llamafactory-ext")
    assert wrong.exit_code == 2
    assert message in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_output_for_a_pipe_is_80_columns_wide_unless_columns_says_otherwise():
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    for columns, width in (({}, 80), ({"COLUMNS": "100"}, 100)):
        piped = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": True}
        shown = subprocess.run([SCRIPT, "losses"], env=env | columns, **piped).stdout
        assert max(map(len, shown.splitlines())) == width
        assert "\x1b" not in shown
