"""The documentation says what is there: links, commands, keys and defaults, taken from the pages and tried."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml
from llamafactory.hparams import FinetuningArguments, ModelArguments
from pydantic_core import PydanticUndefined
from typer.main import get_command

from llamafactory_ext.cli import app
from llamafactory_ext.losses.lookup import get_loss, loss_names
from llamafactory_ext.recipe.arguments import PreferenceArguments
from llamafactory_ext.recipe.keys import STOCK_KEYS, keys_not_taken, keys_of
from llamafactory_ext.recipe.reading import parse_recipe
from llamafactory_ext.sweep.evaluators import Asking, Benchmarks, Evaluators, HeldOut, Judged, Problems
from llamafactory_ext.sweep.spec import Sweep

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")]
PAGES += sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = [name for name in loss_names() if not get_loss(name).is_users]
ON_PAGES = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in any of these languages."""
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def test_the_readme_can_be_read_at_once():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


# --- links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@ON_PAGES
def test_links_lead_somewhere(page):
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
        if page.is_relative_to(DOCS) and not target.is_relative_to(DOCS):
            dead.append(f"{link}, which is not part of the site")
    assert not dead


def test_every_page_is_in_the_sites_menu():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    menu = re.findall(r"[\w/]+\.md", str(site["nav"]))
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS))


@pytest.mark.parametrize("name", OURS)
def test_every_loss_has_a_page(name):
    assert f"`{name}`" in (DOCS / "losses" / f"{name}.md").read_text(encoding="utf-8").splitlines()[0]
    assert f"](docs/losses/{name}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"](losses/{name}.md)" in (DOCS / "losses.md").read_text(encoding="utf-8")


def test_every_metric_is_explained():
    folders = (ROOT / "llamafactory_ext" / name for name in ("losses", "training"))
    code = "".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.glob("*.py"))
    metrics = set(re.findall(r'"((?:normalized_rewards|monitor|dpo|minor_dpo|dpop|sr|router)/\w+)"', code))
    assert "dpo/coefficient" in metrics
    text = (DOCS / "losses.md").read_text(encoding="utf-8")
    assert not [metric for metric in metrics if f"`{metric}`" not in text]


# --- commands --------------------------------------------------------------------------------------------------------


def command_lines(page: Path) -> list[str]:
    """What a page says to type: lines of its blocks, and code within its sentences."""
    text = "\n".join(blocks(page, "", "bash", "console")).replace("\\\n", " ")
    inline = re.findall(r"`([^`]+)`", prose(page))
    return [re.sub(r"(^| )#.*", "", line) for line in [*text.splitlines(), *inline]]


def commands(page: Path, *beginning: str) -> list[list[str]]:
    """The words behind a beginning such as `make`, wherever the page has it, up to what a shell ends a command with."""
    found = []
    for line in command_lines(page):
        try:
            words = shlex.split(line)
        except ValueError:  # a half of something, such as one quote of a text
            continue
        for at in range(len(words) - len(beginning) + 1):
            if tuple(words[at : at + len(beginning)]) == beginning and (at == 0 or words[at - 1] in ("&&", "$", "do")):
                rest = words[at + len(beginning) :]
                ends = [i for i, word in enumerate(rest) if word in ("&&", "|", ";", ">")]
                found.append(rest[: ends[0]] if ends else rest)
    return found


def unknown(words: list[str]) -> str | None:
    """The first word that `llamafactory-ext` does not know as a command or an option."""
    command = get_command(app)
    words = list(words)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return words[0]
        command = command.commands[words.pop(0)]
    options = {"--help", *(option for param in command.params for option in param.opts)}
    return next((word for word in words if word.startswith("-") and word.split("=")[0] not in options), None)


@ON_PAGES
def test_commands_exist(page):
    found = commands(page, "llamafactory-ext")
    found += [["eval", *words] for words in commands(page, "python", "-m", "llamafactory_ext.evaluation")]
    wrong = {" ".join(words): word for words in found if (word := unknown(words)) is not None}
    assert not wrong


def test_an_unknown_command_or_option_is_found():
    assert unknown(["eval", "gsm9k"]) == "gsm9k"
    assert unknown(["data", "check", "recipe.yaml", "--tests=x"]) == "--tests=x"
    assert unknown(["data", "check", "recipe.yaml", "--test-set=x"]) is None


@ON_PAGES
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    legs = re.findall(r"^LEGS := (.*)$", makefile, re.MULTILINE)[0].split()
    declared = {*re.findall(r"^([\w-]+):", makefile, re.MULTILINE), *(f"test-{leg}" for leg in legs)}
    named = {word for words in commands(page, "make") for word in words[:1]}
    assert named <= declared


@ON_PAGES
def test_files_exist(page):
    folders = "llamafactory_ext|evaluation|examples|benchmarks|data|tests|docs"
    name = rf"(?<![\w/.])(?:{folders})/[\w./-]+\.(?:py|yaml|json|txt|md)\b"
    named = re.findall(name, page.read_text(encoding="utf-8"))
    assert not [name for name in named if not (ROOT / name).is_file()]


# --- recipes and sweeps ----------------------------------------------------------------------------------------------


def yaml_blocks() -> list[tuple[str, dict]]:
    return [(f"{page.stem}-{i}", yaml.safe_load(text)) for page in PAGES for i, text in enumerate(blocks(page, "yaml"))]


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in yaml_blocks()])
def test_recipes_are_understood(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (own,) = blocks(DOCS / "losses.md", "python")
    Path("my_loss.py").write_text(own, encoding="utf-8")  # which the recipe beside it names
    if set(block) == {"evaluators"}:
        Evaluators.model_validate(block["evaluators"])
        return
    if "axes" in block:
        sweep = Sweep(**block)
        block = {key: values[0] for key, values in sweep.axes.items() if isinstance(values, list)}
    parse_recipe({"model_name_or_path": "any", "stage": "dpo", **block})


def test_there_are_recipes_and_sweeps():
    found = [block for _, block in yaml_blocks()]
    assert any("axes" in block for block in found)
    assert any("pref_loss_file" in block for block in found)


# --- tables of keys --------------------------------------------------------------------------------------------------


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """The tables under headings of this form, by the key in their first column."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    tables, inside = {}, False
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = bool(cells) and (inside or line == heading)
        if inside and cells[0].startswith("`"):
            tables[cells[0].strip("`")] = cells[1:]
    return tables


# A refinement of weight 0 takes no prompt, and `ld_alpha_reference: false` changes nothing.
TAKEN_WITH = {"sr_prompt": {"sr_lambda": 1.0}, "ld_alpha_reference": {"ld_alpha_reference": True}}
RECIPE_KEYS = rows("recipe.md", "| Key | Default | Losses | Meaning |")
OWN = [key for key, kind in PreferenceArguments.__annotations__.items() if not kind.startswith("ClassVar")]
STOCK = ("pref_beta", "pref_ftx", "pref_bco_weight", "ld_alpha", "ref_model", "moe_aux_loss_coef", *STOCK_KEYS)


def losses_of(cell: str) -> set[str]:
    groups = {
        "all": set(OURS),
        "with a reference": {name for name in OURS if get_loss(name).needs_reference},
        "your own": set(),
    }
    named = set(re.findall(r"`(\w+)`", cell))
    return groups[cell] if cell in groups else set(OURS) - named if cell.startswith("all but ") else named


def default_of(cell: str, loss: str) -> object:
    """What a cell says is the default with a loss: one value, or values like `ipo`: true; `sr_ipo`: false."""
    if ":" not in cell:
        return yaml.safe_load(cell.strip("`"))
    parts = (part.rpartition(":") for part in cell.split(";"))
    return next(yaml.safe_load(value) for names, _, value in parts if f"`{loss}`" in names)


def test_every_key_is_in_the_table():
    assert set(RECIPE_KEYS) == {*OWN, *STOCK}


@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_the_table_says_which_losses_take_a_key(key):
    settings = {key: None} | TAKEN_WITH.get(key, {})
    taken = {name for name in OURS if key not in keys_not_taken({**settings, "pref_loss": name})}
    if key == "pref_loss":
        taken = set(OURS)
    elif key == "pref_loss_file":
        taken = set()
    assert losses_of(RECIPE_KEYS[key][1]) == taken


@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_the_table_says_the_default(key):
    default, taken_by, _ = RECIPE_KEYS[key]
    of_losses = {name: keys_of(get_loss(name))[key] for name in losses_of(taken_by) if key in keys_of(get_loss(name))}
    if of_losses:
        assert {name: default_of(default, name) for name in of_losses} == of_losses
    else:
        stock = (*dataclasses.fields(ModelArguments), *dataclasses.fields(FinetuningArguments))
        fields = {field.name: field.default for field in stock}
        assert default_of(default, "") == fields[key]


EVALUATORS = {each.kind: each for each in (Problems, Benchmarks, Judged)} | {"pairs": HeldOut}


def test_every_key_of_a_sweep_is_in_a_table():
    tables = rows("sweeps.md", "| Key | Default | Meaning |")
    assert set(tables) == {*Sweep.model_fields, *Asking.model_fields}
    for model in (Sweep, Asking):
        for name, field in model.model_fields.items():
            if name != "evaluators":
                assert yaml.safe_load(tables[name][0].strip("`")) == _default(field)


def test_every_key_of_an_evaluator_is_in_a_table():
    text = (DOCS / "sweeps.md").read_text(encoding="utf-8")
    table = text.partition("| Evaluator | Key | Default | Meaning |\n")[2].partition("\n\n")[0]
    told = {}
    for line in table.splitlines()[1:]:
        kind, key, default, _ = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
        told[kind, key] = yaml.safe_load(default)
    own = {
        (kind, name): _default(field)
        for kind, model in EVALUATORS.items()
        for name, field in model.model_fields.items()
        if name not in Asking.model_fields
    }
    assert told == own
    assert [kind for kind in ("gsm8k", "lm_eval", "judge") if EVALUATORS[kind].model_fields["base"].default] == [
        "gsm8k",
        "lm_eval",
    ]


def _default(field):
    if field.default_factory is not None:
        return field.default_factory()
    return "required" if field.default is PydanticUndefined else field.default
