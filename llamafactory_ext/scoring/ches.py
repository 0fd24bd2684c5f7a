"""How similar the two responses of a pair are to a model: measures of which pairs may push their chosen response down.

DPO raises the margin between two responses, and may do so by lowering both. How much the chosen response loses depends
on how similar the model's hidden states for both are (arXiv 2410.08847, section 4); their distance in tokens says less.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UserError
from ..training.layout import Layout, inner_model
from ..training.logps import token_logps

if TYPE_CHECKING:
    from torch import Tensor

NO_TOKEN = -1  # beyond a response's end


def measures(model: torch.nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Run the model once over a batch of pairs, and measure each pair.

    Args:
        model: a causal language model.
        layout: the batch.

    Returns:
        By name, shape `(pairs,)` each: `normalized_ches` and `ches` (see `ches`), `edit_distance` (see that function),
        and of both sides the response's log-probability (`_logp`, in nats) and tokens (`_tokens`), and those of its
        tail (`_tail_logp`, `_tail_tokens`): what follows the tokens that both responses begin with.

    Raises:
        UserError: if the model has no language-model head.
    """
    with _head_input(model) as received:
        logps = token_logps(model, layout)
    if not received:
        raise UserError(
            "the model has no language-model head of its own, at whose input CHES is measured: name another."
        )
    hidden = received.pop()[layout.row, layout.column]
    plain, normalized = ches(hidden[layout.entry], layout.response, layout.responses // 2)
    ids = _in_rows(layout)
    found = {"normalized_ches": normalized, "ches": plain, "edit_distance": edit_distance(ids)}
    begins = _tail_begin(ids).repeat(2)[:, None]
    is_token = ids != NO_TOKEN
    in_tail = is_token & (torch.arange(ids.shape[1], device=ids.device) >= begins)
    of_sides = {
        "logp": logps.sum(dim=1),
        "tokens": is_token.sum(dim=1),
        "tail_logp": (logps * in_tail).sum(dim=1),
        "tail_tokens": in_tail.sum(dim=1),
    }
    for name, values in of_sides.items():
        found[f"chosen_{name}"], found[f"rejected_{name}"] = values.chunk(2)
    return found


def ches(hidden: Tensor, response: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """The centered hidden embedding similarity of the responses of each pair, and its length-normalized form.

    With S_w and S_l the sums over the hidden states that predict the tokens of the chosen and the rejected response,
    `CHES = <S_w, S_l> - <S_w, S_w>`. The length-normalized form has the means over the tokens in place of the sums. A
    hidden state is what the language-model head receives. Both forms are 0 for identical responses.

    Source: arXiv 2410.08847, Definition 2, and section 6 for the length-normalized form.

    Args:
        hidden: the hidden state that predicts each response token, shape `(response tokens, width)`.
        response: the response of each token, as in `Layout.response`; int64, shape `(response tokens,)`.
        pairs: the number of pairs.

    Returns:
        CHES and length-normalized CHES, float64, shape `(pairs,)` each.
    """
    sums = hidden.new_zeros((2 * pairs, hidden.shape[1]), dtype=torch.float64)
    sums.index_add_(0, response, hidden.double())
    lengths = torch.bincount(response, minlength=2 * pairs).clamp(min=1)
    return _centered(sums), _centered(sums / lengths[:, None])


def _centered(vectors: Tensor) -> Tensor:
    chosen, rejected = vectors.chunk(2)
    return (chosen * (rejected - chosen)).sum(dim=1)  # the same as above, with less rounding where both are similar


def edit_distance(ids: Tensor) -> Tensor:
    """Levenshtein's distance of the responses of each pair in tokens, divided by the tokens of the longer response.

    Args:
        ids: shape `(2 * pairs, longest)`, the chosen responses first, `NO_TOKEN` beyond a response's end.

    Returns:
        Float64, shape `(pairs,)`: from 0 (identical) to 1 (no token in common).
    """
    from rapidfuzz.distance import Levenshtein

    chosen, rejected = ([[each for each in row if each != NO_TOKEN] for row in side.tolist()] for side in ids.chunk(2))
    distances = [Levenshtein.normalized_distance(*pair) for pair in zip(chosen, rejected, strict=True)]
    return torch.tensor(distances, dtype=torch.float64, device=ids.device)


def _in_rows(layout: Layout) -> Tensor:
    """The tokens of each response, shape `(2 * pairs, longest)`, `NO_TOKEN` beyond its end."""
    ids = layout.target.new_full((layout.responses, layout.longest), NO_TOKEN)
    return ids.index_put((layout.response, layout.ordinal), layout.target[layout.entry])


def _tail_begin(ids: Tensor) -> Tensor:
    """At which token the responses of each pair begin to differ, shape `(pairs,)`; the width if they do not."""
    chosen, rejected = ids.chunk(2)
    differs = chosen != rejected
    return torch.where(differs.any(dim=1), differs.long().argmax(dim=1), ids.shape[1])


@contextmanager
def _head_input(model: Any) -> Iterator[list[Tensor]]:
    """Inside the with block, this list holds what the model's head last received, shape `(rows, length, width)`."""
    received: list[Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        received[:] = args[:1]

    head = inner_model(model).get_output_embeddings()
    if head is None:
        yield received
        return
    hook = head.register_forward_pre_hook(keep)
    try:
        yield received
    finally:
        hook.remove()
