"""The losses by name: what a loss receives, how one is registered, and how a user's file is loaded."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..paths import named_path

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probabilities of a batch of preference pairs, in nats; every field is a tensor of shape `(batch,)`.

    Args:
        policy_chosen: sum of log pi(y_w | x) over the tokens of the chosen response, with gradient.
        policy_rejected: the same for the rejected response.
        reference_chosen: sum of log pi_ref(y_w | x), without gradient; None for a loss without reference.
        reference_rejected: the same for the rejected response.
        chosen_length: number of tokens summed over in the chosen response.
        rejected_length: number of tokens summed over in the rejected response.
        refinement: Delta = beta (D_w' - D_l'), the refinement term of arXiv 2405.21040 (Eq. 12), without gradient: the
            primed logratios are those of the same responses under the augmented prompt. None where none is asked for.

    The sums are raw, not averaged. Where LLaMA-Factory's `ld_alpha` is set, the policy's (only the policy's) sums
    weight the tokens beyond the length of the shorter response by it.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_length: Tensor
    rejected_length: Tensor
    refinement: Tensor | None = None

    @property
    def chosen_logratio(self) -> Tensor:
        """D_w = log pi(y_w | x) - log pi_ref(y_w | x), shape `(batch,)`.

        Raises:
            ValueError: if the pairs carry no reference log-probabilities.
        """
        return self.policy_chosen - _present(self.reference_chosen)

    @property
    def rejected_logratio(self) -> Tensor:
        """D_l = log pi(y_l | x) - log pi_ref(y_l | x), shape `(batch,)`; raises like `chosen_logratio`."""
        return self.policy_rejected - _present(self.reference_rejected)

    @property
    def margin(self) -> Tensor:
        """D_w - D_l, shape `(batch,)`; raises like `chosen_logratio`."""
        return self.chosen_logratio - self.rejected_logratio

    def split(self, sizes: Sequence[int]) -> list[PairLogps]:
        """The pairs in batches of these sizes."""
        columns = [getattr(self, field.name) for field in fields(self)]
        parts = [[None] * len(sizes) if column is None else column.split(list(sizes)) for column in columns]
        return [PairLogps(*part) for part in zip(*parts, strict=True)]

    def per_token(self) -> PairLogps:
        """The same pairs with means over the response tokens in place of sums (so every length is 1).

        The mean of an empty response is 0, as its sum is.
        """

        def mean(total: Tensor | None, length: Tensor) -> Any:
            return None if total is None else total / length.clamp(min=1)

        return PairLogps(
            mean(self.policy_chosen, self.chosen_length),
            mean(self.policy_rejected, self.rejected_length),
            mean(self.reference_chosen, self.chosen_length),
            mean(self.reference_rejected, self.rejected_length),
            self.chosen_length.new_ones(self.chosen_length.shape),
            self.rejected_length.new_ones(self.rejected_length.shape),
            self.refinement,
        )


def _present(reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError(
            "these pairs carry no reference log-probabilities: register the loss with needs_reference=True."
        )
    return reference


LossFunction = Callable[..., "Tensor"]
MetricsFunction = Callable[..., "dict[str, Tensor]"]


@dataclass(frozen=True)
class Loss:
    """A registered preference loss: call it with `PairLogps` and its hyper-parameters as keywords.

    Returns a tensor of shape `(batch,)`, one loss per pair; an unknown hyper-parameter is a TypeError, and a function
    that returns any other shape is a ValueError.
    """

    name: str
    function: LossFunction
    needs_reference: bool
    metrics: MetricsFunction | None

    def __call__(self, pairs: PairLogps, **hyperparameters: Any) -> Tensor:
        return self._per_pair("", self.function(pairs, **hyperparameters), pairs)

    def measure(self, pairs: PairLogps, **hyperparameters: Any) -> dict[str, Tensor]:
        """The metrics of a batch by name, shape `(batch,)` each; none if the loss was registered without.

        Raises:
            ValueError: as for the loss.
        """
        if self.metrics is None:
            return {}
        found = self.metrics(pairs, **hyperparameters)
        return {name: self._per_pair(f" for the metric {name!r}", values, pairs) for name, values in found.items()}

    def _per_pair(self, which: str, values: Any, pairs: PairLogps) -> Any:
        """What was returned, unless a mean or an accidental broadcast made it other than a value per pair."""
        wanted = tuple(pairs.policy_chosen.shape)
        given = tuple(values.shape) if hasattr(values, "shape") else type(values).__name__
        if given != wanted:
            raise ValueError(
                f"the loss {self.name!r} returned {given}{which} where one value per pair is needed, shape {wanted}: "
                "write it without a mean or a sum, and without a further dimension."
            )
        return values

    @functools.cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The hyper-parameters by name: every parameter of the function but the first."""
        return dict(list(inspect.signature(self.function).parameters.items())[1:])

    @property
    def description(self) -> str:
        """What the function's docstring says, a line per paragraph: the equation first, then remarks and the source."""
        text = (inspect.getdoc(self.function) or "(no docstring)").encode(errors="replace").decode()  # half characters
        paragraphs = text.split("\n\n")
        return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    def defaults(self) -> dict[str, Any]:
        """The hyper-parameters that have a default, with it."""
        return {name: p.default for name, p in self.parameters.items() if p.default is not p.empty}


_losses: dict[str, Loss] = {}
_lock = threading.Lock()


def register_loss(
    name: str, *, needs_reference: bool = True, metrics: MetricsFunction | None = None
) -> Callable[[LossFunction], LossFunction]:
    """Decorate `f(pairs: PairLogps, *, beta: float, ...) -> Tensor (batch,)` to train it as `pref_loss: name`.

    Args:
        name: what the YAML names; unique among the package's own losses and those of the loss file.
        needs_reference: False for a loss that never reads the reference log-probabilities; no reference model is
            loaded then, and the reported rewards are beta times the policy's per-token means, as LLaMA-Factory does.
        metrics: optional, called like the loss, returns named tensors of shape `(batch,)` to log. The names may
            depend on the hyper-parameters but not on the batch: every rank must log the same ones.

    Raises:
        ValueError: if another file has registered the name, or it cannot be one.
        TypeError: if the function does not take the pairs first and hyper-parameters by keyword after it, or there is
            no name.
    """

    _check_name(name)

    def register(function: LossFunction) -> LossFunction:
        _check_signature(name, function)
        previous = _losses.get(name)
        if previous is not None and _file(previous.function) != _file(function):
            raise ValueError(
                f"the name {name!r} is taken by the loss in {_file(previous.function)}: "
                "register yours under another name."
            )
        _losses[name] = Loss(name, function, needs_reference, metrics)
        return function

    return register


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f'register_loss needs a name, not {name!r}: write @register_loss("my_loss").')
    if not name or name != name.strip() or not name.isprintable():
        raise ValueError(f"a loss cannot be called {name!r}: write letters, digits and underscores, like 'my_loss'.")


def _check_signature(name: str, function: LossFunction) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if not parameters or any(p.kind not in by_keyword for p in parameters[1:]):
        raise TypeError(
            f"the loss {name!r} must take the pairs first and each hyper-parameter as a named keyword, "
            "like `def loss(pairs, *, beta: float)`."
        )


def _file(function: LossFunction) -> str:
    try:
        return str(Path(inspect.getfile(inspect.unwrap(function))).resolve())
    except TypeError:  # functools.partial and other objects that can be called
        return str(getattr(function, "__module__", type(function).__name__))


def loss_names() -> list[str]:
    """Every name that `pref_loss` can take now, sorted: the package's own and those of loaded loss files."""
    from . import logistic as losses  # noqa: F401  (registers the package's own)

    return sorted(_losses)


def get_loss(name: str) -> Loss:
    """Look a loss up: `get_loss("minor_dpo")(pairs, beta=0.1)` gives the loss of each pair, shape `(batch,)`.

    Raises:
        ValueError: for an unknown name; the message lists the known ones and the nearest.
    """
    known = loss_names()
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"pref_loss {name!r} is unknown: write one of {', '.join(known)}, "
            f"or name the file that registers it with pref_loss_file.{hint}"
        )
    return _losses[name]


def load_loss_file(path: str) -> list[str]:
    """Run a user's Python file and return the names of the losses that it registers.

    Args:
        path: the file; a relative path is looked up in the working directory.

    Raises:
        ValueError: if there is no such file, it registers nothing, or it fails; the message says which.
    """
    from . import logistic as losses  # noqa: F401  (so that a name of the package's own cannot be taken)

    before = dict(_losses)
    _load(path)
    names = [name for name, loss in _losses.items() if before.get(name) is not loss]
    if not names:
        raise ValueError(
            f"pref_loss_file {path!r} registers no loss: "
            'decorate a function in it with @llamafactory_ext.register_loss("name").'
        )
    return names


def loss_file(path: str) -> Path:
    """The file that `pref_loss_file` names, symbolic links resolved; there need be none.

    Raises:
        ValueError: if it cannot be a path, or may not be followed.
    """
    try:
        return Path(os.path.realpath(named_path("pref_loss_file", path)))  # `resolve` fails at links in a circle
    except OSError as error:
        raise ValueError(f"pref_loss_file {path!r} cannot be followed ({error}): write another path.") from error


def load_files_by(load: Callable[[str], None]) -> None:
    """For a process that must not run files itself: what is called with the path, in place of running it.

    It is to call `add` with what the file registers, or to raise a ValueError.
    """
    global _load
    _load = load


def add(losses: Iterable[Loss]) -> None:
    """Register losses as they are, in place of others of their names."""
    _losses.update({loss.name: loss for loss in losses})


@contextmanager
def forgotten_afterwards() -> Iterator[None]:
    """Losses that are registered in a with block are forgotten at its end, for a process that serves several users.

    One thread at a time, so that none sees another's losses.
    """
    from . import logistic as losses  # noqa: F401  (these are to stay)

    with _lock:
        before = dict(_losses)
        try:
            yield
        finally:
            _losses.clear()
            _losses.update(before)


def _run_file(path: str) -> None:
    file = loss_file(path)
    if not file.is_file():
        raise ValueError(f"pref_loss_file {path!r} is not a file (looked for {file}): write the path of a Python file.")
    # Under its own name in sys.modules, so that dataclasses and pickling work in the user's file.
    name = f"llamafactory_ext_loss_file_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"pref_loss_file {str(file)!r} is not a Python file: its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a main guard may end the process
        del sys.modules[name]
        raise ValueError(f"pref_loss_file {str(file)!r} could not be run: {type(error).__name__}: {error}") from error


_load: Callable[[str], None] = _run_file
