"""What a sweep compares, as data: a loss and the values of its own that the sweep varies."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import Any

from ..recipe.keys import split
from ..sweep.results import Result
from ..sweep.spec import written

NAMES = {
    "sigmoid": "DPO",
    "minor_dpo": "MinorDPO",
    "dpop": "DPOP",
    "sr_dpo": "Sr-DPO",
    "sr_ipo": "Sr-IPO",
    "ipo": "IPO",
    "orpo": "ORPO",
    "simpo": "SimPO",
}
UNREFINED = {"sr_dpo": "sigmoid", "sr_ipo": "ipo"}  # loss -> what it is without the refinement term
SHORT = {"max_samples": "pairs"}  # a key -> what the report calls it
SIZE = "max_samples"
LOSS_ARGS = "pref_loss_args"
SEEDS = ("seed", "data_seed")


@dataclass(frozen=True)
class Variant:
    """A loss and the settings of its own that the sweep varies.

    Args:
        loss: as `pref_loss` names it, several with commas between; of another stage than dpo, the stage.
        values: key and value of each other axis but the learning rate, `pref_beta` and seeds. A mapping is flattened:
            `("pref_loss_args.tau", 0.5)`. Sorted by key, the number of pairs last.
    """

    loss: str
    values: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return " + ".join(NAMES.get(name, name) for name in split(self.loss))

    @property
    def size(self) -> int | None:
        """The number of training pairs, where that is an axis."""
        return dict(self.values).get(SIZE)

    def without(self, *keys: str) -> Variant:
        return Variant(self.loss, tuple((key, value) for key, value in self.values if key not in keys))


def variant_of(cell: Result) -> Variant:
    values: dict[str, Any] = {}
    for key, value in cell.place.items():
        if key not in ("pref_loss", "learning_rate", "pref_beta", *SEEDS):
            values |= _flat(key, _loss_args(value) if key == LOSS_ARGS else value)
    return Variant(cell.loss, tuple(sorted(values.items(), key=lambda item: (item[0] == SIZE, item[0]))))


def _loss_args(value: Any) -> Any:
    """`pref_loss_args` as a mapping: LLaMA-Factory takes JSON, too. null means none."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return json.loads(value)
    return {} if value is None else value


def _flat(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: _hashable(value)}
    return {name: leaf for part, inner in value.items() for name, leaf in _flat(f"{key}.{part}", inner).items()}


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _hashable(inner)) for key, inner in value.items())
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def short_key(key: str) -> str:
    """`tau` for `pref_loss_args.tau`, `pairs` for `max_samples`."""
    return SHORT.get(key, key.removeprefix(f"{LOSS_ARGS}."))


def as_written(value: Any) -> str:
    """A value as YAML has it, numbers in short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return ",".join(map(as_written, value)) if isinstance(value, tuple) else written(value)
