"""A table of the report: as the page shows it, as LaTeX, and as CSV with every digit."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **dict(zip("<>|", (r"\textless{}", r"\textgreater{}", r"\textbar{}"), strict=True)),  # others in LaTeX's own font
    **{sign: f"{{{sign}}}" for sign in "[*"},  # which the end of the row before would take for its own
    "β": r"$\beta$",
    "–": "--",
    "−": "$-$",
    "…": r"\dots{}",
    "“": "``",
    "”": "''",
    "\n": " ",
}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes a cell that begins so
STRONG, TEXT = "strong", "text"
TEXT_WIDTH = "4cm"  # of a column of sentences, in LaTeX


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table.

    Args:
        text: what is shown; on the page in the lines that it has.
        look: the class of the page's style sheet; `STRONG` is bold in LaTeX, too, and `TEXT` are sentences.
        links: below the text on the page: what each says, and the id that it leads to.
    """

    text: str
    look: str = ""
    links: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        entries: one per head.
        anchor: what a link to the row names.
        error: what went wrong, below the row; the page only.
    """

    entries: tuple[Entry, ...]
    anchor: str = ""
    error: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Args:
        name: of its files.
        title, caption: above it.
        heads: of its columns.
        rows: as shown.
        data: what the CSV file holds, a mapping per row.
    """

    name: str
    title: str
    caption: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    data: tuple[dict[str, Any], ...]

    @property
    def texts(self) -> set[int]:
        """The columns that hold sentences."""
        return {place for row in self.rows for place, entry in enumerate(row.entries) if entry.look == TEXT}

    def as_csv(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in self.data for key in row)))
        writer.writeheader()
        writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in self.data)
        return text.getvalue()

    def as_latex(self) -> str:
        """A tabular for a paper; needs the package booktabs."""
        sides = ["l"] + ["r"] * (len(self.heads) - 1)
        columns = "".join(f"p{{{TEXT_WIDTH}}}" if n in self.texts else side for n, side in enumerate(sides))
        body = [" & ".join(_in_latex(entry) for entry in row.entries) for row in self.rows]
        lines = [
            "% \\usepackage{booktabs}",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            " & ".join(map(_escaped, self.heads)) + r" \\",
            "\\midrule",
            *(f"{row} \\\\" for row in body),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        return "\n".join(lines) + "\n"


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet would compute, with an apostrophe in front; numbers, as they are."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)  # a recipe may hold "-1e-5" as text
    except ValueError:
        return f"'{value}"
    return value


def _in_latex(entry: Entry) -> str:
    text = _escaped(entry.text)
    return f"\\textbf{{{text}}}" if entry.look == STRONG else text


def _escaped(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)
