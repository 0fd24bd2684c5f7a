"""`llamafactory-ext report`: the page, and its figures and tables as files beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from .. import __version__
from ..plots import save
from ..sweep.results import Result, SweepResults, read_results
from ..whole_files import write_whole
from .benchmarks import check_benchmarks
from .findings import best_cells, findings
from .judged import win_rates
from .look import look_of
from .papers import claims_tables, study_of
from .sections import Drawn, draw
from .table import check_problems, compare_with_dpo, groups
from .tables import anchor_of, tables
from .tabular import Table

PIXELS_PER_INCH = 96
TEMPLATE = Path(__file__).with_name("page.html.j2")
FIGURE_FILES = {"PNG": "png", "SVG": "svg", "PDF": "pdf"}


@dataclass(frozen=True)
class Section:
    """A figure of the page.

    Args:
        name: of its files.
        title, caption: above and below it.
        image: the figure, as the address of an image that holds it.
        width: its natural one, in pixels of the page.
    """

    name: str
    title: str
    caption: str
    image: str
    width: int


def write_report(folder: Path, output: Path) -> Path:
    """Write the page of a sweep, and beside it each figure as PNG, SVG and PDF and each table as CSV and LaTeX.

    Args:
        folder: the sweep's.
        output: a folder.

    Returns:
        The page, `index.html`.

    Raises:
        UserError: if the folder is not that of a sweep, or its cells were scored on different problems or benchmarks.
    """
    results = read_results(folder)
    check_problems([*results.bases, *results.cells])
    check_benchmarks([*results.bases, *results.cells])
    found = groups([cell for cell in results.cells if cell.recipe])
    look = look_of(group.variant for group in found)
    comparisons, rates = compare_with_dpo(found), win_rates(found)
    sections = [_written(output, drawn) for drawn in draw(results, found, look)]
    shown = list(tables(results, found, comparisons, look, rates))
    named = [(section.name, section.title) for section in sections]
    named += [(table.name, table.title) for table in shown if table.rows]
    claims = claims_tables(study_of(results), found, named)
    for table in (*claims, *shown):
        write_whole(output / f"{table.name}.csv", table.as_csv())
        write_whole(output / f"{table.name}.tex", table.as_latex())
    write_whole(
        output / "index.html", _render(results, findings(found, comparisons, look, rates), sections, claims, shown)
    )
    return output / "index.html"


def _written(output: Path, drawn: Drawn) -> Section:
    drawn.figure.draw_without_rendering()
    drawn.figure.set_layout_engine("none")  # it is laid out now: not again for each file
    for suffix in FIGURE_FILES.values():
        save(drawn.figure, output / f"{drawn.name}.{suffix}")
    content = base64.b64encode((output / f"{drawn.name}.svg").read_bytes()).decode()
    width = round(PIXELS_PER_INCH * float(drawn.figure.get_figwidth()))
    return Section(drawn.name, drawn.title, drawn.caption, f"data:image/svg+xml;base64,{content}", width)


def _render(
    results: SweepResults,
    told: str,
    sections: Sequence[Section],
    claims: Sequence[Table],
    shown: Sequence[Table],
) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        about=results.about,
        date=today(),
        version=__version__,
        findings=told,
        best=best_cells(results),
        anchor_of=anchor_of,
        axes=yaml.safe_dump(results.about["sweep"]["axes"], sort_keys=False),
        recipe=_shared_recipe(results.cells),
        bases=results.bases,
        cells=results.cells,
        states=_states(results.cells),
        sections=sections,
        claims=claims,
        tables=shown,
        figure_files=FIGURE_FILES,
    )


def today() -> str:
    """The date in UTC, as ISO 8601 writes it."""
    return datetime.now(UTC).date().isoformat()


def _states(cells: Sequence[Result]) -> dict[str, int]:
    """How many cells are in which state: that of the first command that is not done."""
    states: dict[str, int] = {}
    for cell in cells:
        unfinished = [record.state for record in cell.records.values() if record.state != "done"]
        state = unfinished[0] if unfinished else "done" if cell.is_trained else "missing"
        states[state] = states.get(state, 0) + 1
    return states


def _shared_recipe(cells: Sequence[Result]) -> str:
    """What all recipes have in common, as YAML."""
    recipes = [cell.recipe for cell in cells if cell.recipe]
    if not recipes:
        return ""
    shared = {key: value for key, value in recipes[0].items() if all(recipe.get(key) == value for recipe in recipes)}
    return str(yaml.safe_dump(shared, sort_keys=False, allow_unicode=True))
