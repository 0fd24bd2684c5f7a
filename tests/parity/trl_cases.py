"""What is asked of TRL and of this package alike: tables of log-probabilities, and losses with settings.

Read in both environments, so it imports the standard library only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

# The vocabulary: what fills rows up, a prompt's token, a response's.
PADDING, PROMPT, RESPONSE = range(3)


@dataclass(frozen=True)
class Response:
    """The log-probabilities of a response's scored tokens, in nats.

    Args:
        policy, reference: of each token.
        share: of the probability that each token leaves, how much the first of the vocabulary's others has.
    """

    policy: list[float]
    reference: list[float]
    share: list[float]

    @property
    def log_sum_sq(self) -> list[float]:
        """log(sum p^2) of the policy's distribution of each token."""
        rests = [(-math.expm1(logp), share) for logp, share in zip(self.policy, self.share, strict=True)]
        others = [(rest * share) ** 2 + (rest * (1 - share)) ** 2 for rest, share in rests]
        return [math.log(math.exp(2 * logp) + other) for logp, other in zip(self.policy, others, strict=True)]


@dataclass(frozen=True)
class Pair:
    """A pair of responses to a prompt of so many tokens; none where `max_length` has cut it off."""

    prompt: int
    chosen: Response
    rejected: Response

    @property
    def responses(self) -> tuple[Response, Response]:
        return self.chosen, self.rejected

    def tokens(self) -> tuple[list[int], list[int], list[int]]:
        """The prompt's, the chosen and the rejected response's. Without prompt, nothing predicts the first token."""
        unscored = 0 if self.prompt else 1
        chosen, rejected = ([RESPONSE] * (len(response.policy) + unscored) for response in self.responses)
        return [PROMPT] * self.prompt, chosen, rejected


@dataclass(frozen=True)
class Case:
    """A loss, or a weighted sum of losses, with settings under TRL's names; what is not named has TRL's default.

    Args:
        kind: "loss", or what it is about: "mixture", "f_divergence", "use_weighting", "ld_alpha", "combination".
        table: of TABLES.
        dtype: float64, which shows most, where TRL's code takes it.
    """

    kind: str
    losses: list[str]
    settings: dict[str, Any] = field(default_factory=dict)
    table: str = "usual"
    dtype: str = "float64"

    @property
    def name(self) -> str:
        """What tells it from others, as it is shown."""
        shown = [" + ".join(self.losses), *(f"{key} {value}" for key, value in self.settings.items())]
        shown += [self.table] if self.table != "usual" else []
        return ", ".join(shown + ([self.dtype] if self.dtype != "float64" else []))


def _response(draw: random.Random, length: int, apart: float) -> Response:
    reference = [draw.uniform(-3, -0.5) for _ in range(length)]
    policy = [min(logp + draw.uniform(-apart, apart), -0.01) for logp in reference]
    return Response(policy, reference, [draw.uniform(0.05, 0.95) for _ in range(length)])


def _pair(draw: random.Random, prompt: int, lengths: tuple[int, int], apart: float) -> Pair:
    return Pair(prompt, *(_response(draw, length, apart) for length in lengths))


def _usual() -> list[Pair]:
    draw = random.Random(0)
    shapes = [(2, (3, 5)), (1, (6, 2)), (4, (4, 4)), (3, (1, 3)), (2, (5, 1))]
    return [_pair(draw, *shape, apart=1.0) for shape in shapes]


def _cut_off() -> list[Pair]:
    draw = random.Random(1)
    return [_pair(draw, prompt, lengths, apart=1.0) for prompt, lengths in [(0, (3, 5)), (2, (4, 2)), (0, (2, 6))]]


def _far() -> list[Pair]:
    """Margins of -1e4 and 1e4 nats."""
    near, away = Response([-1.0], [-1.0], [0.5]), Response([-10001.0], [-1.0], [0.5])
    return [Pair(1, away, near), Pair(1, near, away)]


TABLES = {"usual": _usual(), "prompts cut off": _cut_off(), "margins of 1e4 nats": _far()}


def batches(table: str) -> list[list[int]]:
    """The pairs of a table, each alone, and all together, which matters to losses that look at their whole batch."""
    alone = [[index] for index in range(len(TABLES[table]))]
    return [*alone, [index for (index,) in alone]]


# TRL's losses, and the settings to try each with.
BETAS = [{"beta": 0.1}, {"beta": 0.5}, {"beta": 2.0}]
SMOOTHED = [{"beta": 0.1, "label_smoothing": 0.1}, {"beta": 0.5, "label_smoothing": 0.4}]
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "sigmoid": [*BETAS, SMOOTHED[0]],
    "hinge": BETAS,
    "ipo": BETAS,
    "exo_pair": [{**each, "label_smoothing": 1e-3} for each in BETAS] + SMOOTHED,
    "nca_pair": BETAS,
    "robust": [*BETAS, *SMOOTHED],
    "bco_pair": BETAS,
    "sppo_hard": BETAS,
    "aot": [*BETAS, *SMOOTHED],
    "aot_unpaired": [*BETAS, *SMOOTHED],
    "apo_zero": BETAS,
    "apo_down": BETAS,
    "discopop": [*BETAS, {"beta": 0.05, "discopop_tau": 0.1}, {"beta": 0.5, "discopop_tau": 1.0}],
    "sft": [{}],
    "sigmoid_norm": [*BETAS, {"beta": 5.0}],
}
# Those that TRL's __init__ lets have it.
F_DIVERGENCE = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"]


def _settings_of(loss: str) -> dict[str, Any]:
    """A loss's usual settings, for cases that are about something else."""
    return {"beta": 0.5, "label_smoothing": 0.1} if loss == "exo_pair" else {} if loss == "sft" else {"beta": 0.5}


def _losses() -> Iterator[Case]:
    for loss, all_settings in SETTINGS.items():
        yield from (Case("loss", [loss], settings) for settings in all_settings)
    yield from (Case("loss", [loss], _settings_of(loss), dtype="float32") for loss in SETTINGS)
    yield from (Case("loss", [loss], {"beta": 0.5}, "prompts cut off") for loss in ("sigmoid", "ipo", "sigmoid_norm"))
    yield Case("loss", ["sft"], {}, "prompts cut off")
    yield Case("loss", ["discopop"], {"beta": 1.0}, "margins of 1e4 nats")


def _mixtures() -> Iterator[Case]:
    """The first is MPO's (arXiv 2411.10442)."""
    yield Case("mixture", ["sigmoid", "bco_pair", "sft"], {"beta": 0.1, "loss_weights": [0.8, 0.2, 1.0]})
    yield Case("mixture", ["sigmoid", "sft"], {"beta": 0.5, "loss_weights": [1.0, 0.25]})
    yield Case("mixture", ["ipo", "apo_zero"], {"beta": 0.5})  # each of weight 1
    smoothed = {"beta": 0.5, "label_smoothing": 0.1}
    yield Case("mixture", ["aot", "exo_pair"], {**smoothed, "loss_weights": [0.3, 0.7]})
    yield Case("mixture", ["robust", "sigmoid_norm", "hinge"], {**smoothed, "loss_weights": [2.0, 0.5, 0.1]})


def _f_divergences() -> Iterator[Case]:
    for loss in F_DIVERGENCE:
        for kind in ("forward_kl", "js_divergence"):
            yield Case("f_divergence", [loss], {**_settings_of(loss), "f_divergence_type": kind})
        for coefficient in (0.5, 2.0, 1.0):
            alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": coefficient}
            # Its bounds are in a table of dtypes without float64, which the limit at 1 does not ask.
            dtype = "float64" if coefficient == 1.0 else "float32"
            yield Case("f_divergence", [loss], {**_settings_of(loss), **alpha}, dtype=dtype)
    for kind in ("forward_kl", "js_divergence"):
        yield Case("f_divergence", ["sigmoid"], {"beta": 0.5, "f_divergence_type": kind}, "margins of 1e4 nats")
    alpha = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5}
    yield Case("f_divergence", ["sigmoid"], {"beta": 0.5, **alpha}, "margins of 1e4 nats", "float32")


def _weighted() -> Iterator[Case]:
    """All but the sorted ones, which TRL refuses."""
    for loss in SETTINGS:
        if loss not in ("aot", "aot_unpaired"):
            yield Case("use_weighting", [loss], {**_settings_of(loss), "use_weighting": True})
    yield Case("use_weighting", ["sigmoid"], {"beta": 0.5, "use_weighting": True}, "prompts cut off")
    yield Case("use_weighting", ["sigmoid"], {"beta": 0.5, "use_weighting": True}, dtype="float32")


def _length_desensitized() -> Iterator[Case]:
    """LD-DPO: TRL weights the reference's tokens, too."""
    for loss in SETTINGS:
        yield Case("ld_alpha", [loss], {**_settings_of(loss), "ld_alpha": 0.5})
    yield from (Case("ld_alpha", ["sigmoid"], {"beta": 0.5, "ld_alpha": alpha}) for alpha in (0.0, 1.0))
    yield Case("ld_alpha", ["sigmoid"], {"beta": 0.5, "ld_alpha": 0.5}, "prompts cut off")


def _combinations() -> Iterator[Case]:
    mixed = {"beta": 0.5, "loss_weights": [1.0, 0.5]}
    yield Case("combination", ["sigmoid", "bco_pair"], {**mixed, "use_weighting": True})
    yield Case("combination", ["sigmoid", "sft"], {**mixed, "ld_alpha": 0.5})
    yield Case("combination", ["ipo", "bco_pair"], {**mixed, "ld_alpha": 0.5})
    yield Case("combination", ["sigmoid", "sft"], {**mixed, "f_divergence_type": "js_divergence"})
    weighted = {"beta": 0.5, "f_divergence_type": "js_divergence", "use_weighting": True, "ld_alpha": 0.5}
    yield Case("combination", ["robust"], weighted)


CASES = [
    *_losses(),
    *_mixtures(),
    *_f_divergences(),
    *_weighted(),
    *_length_desensitized(),
    *_combinations(),
]
