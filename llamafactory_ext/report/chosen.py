"""The table of values that earlier sweeps have chosen for this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..sweep.spec import written
from .tabular import STRONG, Entry, Row, Table
from .words import number


def chosen_table(chosen: Sequence[Mapping[str, Any]]) -> Table:
    """A row per candidate.

    Args:
        chosen: `chosen` of sweep.json.
    """
    rows, data = [], []
    for choice in chosen:
        place = ", ".join(f"{key} = {written(value)}" for key, value in choice["place"].items())
        best = written(choice["value"])
        candidates = choice["measured"] or {best: None}
        for candidate, measured in candidates.items():
            shown = (choice["key"], place, candidate, choice["by"], number(measured), choice["of"])
            rows.append(Row(tuple(Entry(text, STRONG if candidate == best else "") for text in shown)))
            data.append(
                {
                    "key": choice["key"],
                    "for": place,
                    "value": candidate,
                    "by": choice["by"],
                    "measured": measured,
                    "chosen": candidate == best,
                    "of": choice["of"],
                }
            )
    return Table(
        "chosen",
        "Chosen values",
        "Values of this sweep's axes that an earlier sweep has chosen: the best of the candidates by what was measured "
        "there, as means over cells. The chosen ones are bold.",
        ("key", "for", "value", "by", "measured", "sweep"),
        tuple(rows),
        tuple(data),
    )
