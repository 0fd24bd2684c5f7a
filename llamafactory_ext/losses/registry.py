"""Registered preference losses, and the decorator that registers one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pairs import PairLogps

if TYPE_CHECKING:
    from torch import Tensor

LossFunction = Callable[..., "Tensor"]
MetricsFunction = Callable[..., "dict[str, Tensor]"]


@dataclass(frozen=True)
class Loss:
    """A registered preference loss: call it with `PairLogps` and its hyper-parameters as keywords.

    Returns one loss per pair, shape `(batch,)`. The fields after the function are those of
    `register_loss`.

    Raises:
        TypeError: for an unknown hyper-parameter.
        ValueError: if the function returns another shape.
    """

    name: str
    function: LossFunction
    needs_reference: bool
    metrics: MetricsFunction | None
    needs_batch: bool = False
    needs_scores: bool = False
    needs_contrast: bool = False
    needs_ranking: bool = False
    on_means: bool = False
    takes_divergence: bool = False

    def __call__(self, pairs: PairLogps, **hyperparameters: Any) -> Tensor:
        return self._per_pair("", self.function(pairs, **hyperparameters), pairs)

    def measure(self, pairs: PairLogps, **hyperparameters: Any) -> dict[str, Tensor]:
        """The metrics of a batch by name, shape `(batch,)` each; empty if the loss has none.

        Raises:
            ValueError: if a metric has another shape.
        """
        if self.metrics is None:
            return {}
        found = self.metrics(pairs, **hyperparameters)
        return {name: self._per_pair(f" for the metric {name!r}", values, pairs) for name, values in found.items()}

    def _per_pair(self, which: str, values: Any, pairs: PairLogps) -> Tensor:
        """The returned values; an error if a mean or an accidental broadcast changed their shape."""
        wanted = tuple(pairs.policy_chosen.shape)
        given = tuple(values.shape) if hasattr(values, "shape") else type(values).__name__
        if given != wanted:
            raise ValueError(
                f"the loss {self.name!r} returned {given}{which}, but one value per pair is needed, shape {wanted}: "
                "do not average or sum over the pairs, and add no dimension."
            )
        tensor: Tensor = values
        return tensor

    def compares_means(self, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether it compares means per token, not sums over the response, with these hyper-parameters."""
        return self.on_means or bool(hyperparameters.get("length_normalize", False))

    @property
    def is_users(self) -> bool:
        """Whether a user has registered it, and not this package."""
        return not str(getattr(self.function, "__module__", "")).startswith(f"{__package__}.")

    @property
    def family(self) -> str:
        """The module of this package that it is in, such as `logistic`; `yours` for a user's."""
        return "yours" if self.is_users else self.function.__module__.rpartition(".")[2]

    @property
    def needs(self) -> list[str]:
        """What a training must give it, in a word or two each."""
        needed = {"batch > 1": self.needs_batch, "scores": self.needs_scores, "ranking": self.needs_ranking}
        reference = "reference" if self.needs_reference else "no reference"
        return [reference, *(words for words, is_needed in needed.items() if is_needed)]

    @property
    def file(self) -> str:
        """The file of its function; the module's name where there is none."""
        return _file(self.function)

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The hyper-parameters by name: all parameters of the function except the first."""
        return dict(list(inspect.signature(self.function).parameters.items())[1:])

    @property
    def docstring(self) -> str:
        """The function's docstring, without its indentation."""
        return (inspect.getdoc(self.function) or "(no docstring)").encode(errors="replace").decode()  # lone surrogates

    @property
    def description(self) -> str:
        """The function's docstring, one line per paragraph: the equation first, then remarks and the source."""
        return "\n".join(" ".join(paragraph.split()) for paragraph in self.docstring.split("\n\n"))

    def defaults(self) -> dict[str, Any]:
        """The defaults of the hyper-parameters that have one."""
        return {name: p.default for name, p in self.parameters.items() if p.default is not p.empty}


LOSSES: dict[str, Loss] = {}  # by name
# The fields of a loss that say what it needs and allows.
FLAGS = (
    "needs_reference",
    "needs_batch",
    "needs_scores",
    "needs_contrast",
    "needs_ranking",
    "on_means",
    "takes_divergence",
)


def register_loss(
    name: str,
    *,
    needs_reference: bool = True,
    metrics: MetricsFunction | None = None,
    needs_batch: bool = False,
    needs_scores: bool = False,
    needs_contrast: bool = False,
    needs_ranking: bool = False,
    on_means: bool = False,
    takes_divergence: bool = False,
) -> Callable[[LossFunction], LossFunction]:
    """Decorate `f(pairs: PairLogps, *, beta: float, ...) -> Tensor` of shape `(batch,)`; `pref_loss: name` trains it.

    Args:
        name: the value of `pref_loss`; unique among the package's losses and those of the loss file.
        needs_reference: False for a loss that never reads the reference log-probabilities. No reference model is
            loaded then, and rewards are beta times the policy's means per token, as in LLaMA-Factory.
        metrics: called like the loss; returns tensors of shape `(batch,)` to log, by name. The names may depend on
            the hyper-parameters but not on the batch: every rank must log the same ones.
        needs_batch: True for a loss that compares a pair with statistics of its micro-batch, and so needs several pairs
            there (`per_device_train_batch_size`). It says so in lists of losses, and changes nothing.
        needs_scores: whether the loss reads `pairs.score_gap`; the recipe must then name a `pref_margin_column`.
        needs_contrast: whether it reads `pairs.contrast`, which costs a search of each token's logits. The function
            must then take `cringe_top_k`.
        needs_ranking: whether it compares all answers of a data row at once (`pairs.winner`, `pairs.group`), so that
            single pairs of a row cannot be weighted. It says so in lists of losses.
        on_means: whether it compares means per token; the refinement term then does, too.
        takes_divergence: whether it compares the responses by their log-ratios alone, so that the scores of another
            `f_divergence` may take their place.

    Raises:
        ValueError: if the name is invalid, or another file has registered it.
        TypeError: if the name is not a string, or the function does not take the pairs first and then each
            hyper-parameter by keyword, or a contrast without `cringe_top_k`.
    """

    _check_name(name)
    about = {
        "needs_batch": needs_batch,
        "needs_scores": needs_scores,
        "needs_contrast": needs_contrast,
        "needs_ranking": needs_ranking,
        "on_means": on_means,
        "takes_divergence": takes_divergence,
    }

    def register(function: LossFunction) -> LossFunction:
        _check_signature(name, function, needs_contrast)
        previous = LOSSES.get(name)
        if previous is not None and _file(previous.function) != _file(function):
            raise ValueError(
                f"the name {name!r} is taken by the loss in {_file(previous.function)}: "
                "register yours under another name."
            )
        LOSSES[name] = Loss(name, function, needs_reference, metrics, **about)
        return function

    return register


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f'register_loss needs a name, not {name!r}: write @register_loss("my_loss").')
    if not name or name != name.strip() or not name.isprintable() or "," in name:
        raise ValueError(f"a loss cannot be named {name!r}: write letters, digits and underscores, like 'my_loss'.")


def _check_signature(name: str, function: LossFunction, needs_contrast: bool) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if not parameters or any(p.kind not in by_keyword for p in parameters[1:]):
        raise TypeError(
            f"the loss {name!r} must take the pairs first, then each hyper-parameter as a keyword argument, "
            "like `def loss(pairs, *, beta: float)`."
        )
    if needs_contrast and "cringe_top_k" not in [p.name for p in parameters]:
        raise TypeError(
            f"the loss {name!r} needs a contrast (needs_contrast=True): give it the keyword argument `cringe_top_k`, "
            "which says of how many tokens the other one is drawn."
        )


def _file(function: LossFunction) -> str:
    try:
        return str(Path(inspect.getfile(inspect.unwrap(function))).resolve())
    except TypeError:  # functools.partial and other callable objects
        return str(getattr(function, "__module__", type(function).__name__))
