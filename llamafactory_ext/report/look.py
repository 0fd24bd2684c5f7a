"""How the report shows its methods: one label and one color each, the same in every figure and table."""

from __future__ import annotations

import colorsys
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .variants import SIZE, Variant, as_written, short_key

# Paul Tol's "muted" and "medium-contrast" schemes, which color-blind readers can tell apart, and which leave the colors
# of `plots.CURVES` to chosen, rejected and margin. Fixed, so that a loss has its color in every report.
COLORS = {
    "sigmoid": "#332288",
    "minor_dpo": "#cc6677",
    "dpop": "#117733",
    "sr_dpo": "#aa4499",
    "ipo": "#999933",
    "sr_ipo": "#44aa99",
    "hinge": "#882255",
    "kto_pair": "#88ccee",
    "orpo": "#ddaa33",
    "simpo": "#661100",
}
OTHERS = ("#4477aa", "#222222", "#ee8866", "#777777", "#bbcc33", "#004d40")  # losses of the user's own
LONGEST = 24  # characters of a value
NO_BREAK = "\u00a0"


@dataclass(frozen=True)
class Look:
    """Labels and colors of all variants of a sweep, with and without their number of pairs.

    Args:
        labels: in one line: `Sr-DPO, sr_lambda = 0.3`.
        colors: `#rrggbb`. A variant keeps its color whatever its number of pairs.
    """

    labels: Mapping[Variant, str]
    colors: Mapping[Variant, str]

    def wrapped(self, variant: Variant, width: int) -> str:
        """The label in lines of at most so many characters; `tau = 0.5` stays in one line where it fits."""
        tied = self.labels[variant].replace(" = ", f"{NO_BREAK}={NO_BREAK}")
        return textwrap.fill(tied, width).replace(NO_BREAK, " ")


def look_of(variants: Iterable[Variant]) -> Look:
    """The look of a whole sweep: made once, so that a figure of some of its variants shows them as all others do."""
    given = dict.fromkeys(variants)
    plain = dict.fromkeys(variant.without(SIZE) for variant in given)
    colors = _colors(plain)
    everything = dict.fromkeys([*given, *plain])
    return Look(_labels(everything), {variant: colors[variant.without(SIZE)] for variant in everything})


# --- labels ----------------------------------------------------------------------------------------------------------


def _labels(variants: Iterable[Variant]) -> dict[Variant, str]:
    """The file of a loss is named only where two files have a loss of that name. Equal labels are numbered."""
    variants = list(variants)
    files = {(variant.loss, dict(variant.values).get("pref_loss_file")) for variant in variants}
    in_several = {loss for loss, count in Counter(loss for loss, _ in files).items() if count > 1}
    labels: dict[Variant, str] = {}
    for variant in variants:
        named = variant if variant.loss in in_several else variant.without("pref_loss_file")
        label, number = _label(named), 1
        while label in labels.values():
            number += 1
            label = f"{_label(named)} ({number})"
        labels[variant] = label
    return labels


def _label(variant: Variant) -> str:
    values = (f"{short_key(key)} = {_shortened(as_written(value))}" for key, value in variant.values)
    return ", ".join([variant.name, *values])


def _shortened(value: str) -> str:
    """The ends of a long value: a prompt begins with what tells it apart, a path ends with it."""
    value = " ".join(value.split())
    half = LONGEST // 2
    return value if len(value) <= LONGEST else f"{value[:half]}…{value[1 - half :]}"


# --- colors ----------------------------------------------------------------------------------------------------------


def _colors(variants: Iterable[Variant]) -> dict[Variant, str]:
    """A hue per loss, from dark to light over its variants."""
    by_loss: dict[str, list[Variant]] = {}
    for variant in variants:
        by_loss.setdefault(variant.loss, []).append(variant)
    hues = dict(COLORS)
    for number, loss in enumerate(loss for loss in by_loss if loss not in COLORS):
        hues[loss] = OTHERS[number] if number < len(OTHERS) else _generated(number)
    return {
        variant: _shade(hues[loss], 0.0 if len(members) == 1 else 0.75 * place / (len(members) - 1) - 0.45)
        for loss, members in by_loss.items()
        for place, variant in enumerate(members)
    }


def _generated(number: int) -> str:
    """One more color: hues that are a golden angle apart do not repeat."""
    return _hex(colorsys.hsv_to_rgb(0.618 * number % 1, 0.7, 0.6))


def _shade(color: str, lightness: float) -> str:
    """A color mixed with so much white, or, below 0, black."""
    channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return _hex(c + (1 - c) * lightness if lightness > 0 else c * (1 + lightness) for c in channels)


def _hex(channels: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)
