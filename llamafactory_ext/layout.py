"""How a batch of pairs is laid out for the model, and which of its tokens are scored for which response.

`padded` is LLaMA-Factory's layout: a row per answer. `shared_prefix` is a trie per pair, `shared prefix | chosen tail |
rejected tail`, a row each: what both answers begin with, prompt and response alike, is computed once. Positions and
mask let every token see exactly what it would see alone. Either way the language-model head runs on scored tokens only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]

# The parts of a trie, and what fills its row up.
SHARED, CHOSEN, REJECTED, PADDING = range(4)


@dataclass(frozen=True)
class Layout:
    """A batch of pairs as a model takes it.

    Args:
        inputs: the model's keyword arguments; `input_ids` has shape `(rows, length)`.
        row, column: where the hidden state is that predicts a scored token, shape `(scored,)` each.
        target: the scored token, shape `(scored,)`.
        entry: which scored token belongs to a response, shape `(responses' tokens,)`: a token that both responses of
            a pair share is scored once, and belongs to both.
        response: which response it belongs to: `pair` for the chosen one, `pairs + pair` for the rejected one.
        ordinal: which token of that response it is, from 0.
        pairs: the number of pairs.
    """

    inputs: Batch
    row: Tensor
    column: Tensor
    target: Tensor
    entry: Tensor
    response: Tensor
    ordinal: Tensor
    pairs: int


def padded(batch: Batch) -> Layout:
    """The batch as it is: chosen answers in the first half of the rows, rejected ones in the second.

    Args:
        batch: of LLaMA-Factory's pairwise collator; `labels` of shape `(2 * pairs, length)` is -100 outside responses.
    """
    scored = batch["labels"][:, 1:] != IGNORE_INDEX
    row, column = scored.nonzero(as_tuple=True)
    return Layout(
        inputs={name: values for name, values in batch.items() if name != "labels"},
        row=row,
        column=column,
        target=batch["labels"][row, column + 1],
        entry=torch.arange(len(row), device=row.device),
        response=row,
        ordinal=scored.cumsum(dim=1)[row, column] - 1,
        pairs=len(scored) // 2,
    )


def shared_prefix(batch: Batch, attention: str = "sdpa") -> Layout:
    """The batch as one trie per row.

    The shared prefix ends before the first differing token, and at least one token before the end of the shorter
    answer, so that every answer keeps a tail.

    Several tries in one long row would need no padding, but attention under a mask costs the square of the row:
    SmolLM2-135M with GSM8K pairs took 1.01 times as long at four pairs, 1.21 times at eight (forward and backward, two
    CPU cores). Rows no longer than the longest trie hardly ever have room for a second one. FlexAttention would skip
    what the mask hides, but LLaMA-Factory has no setting for it.

    Args:
        batch: as for `padded`; text only.
        attention: the model's implementation, `sdpa` or `eager`: what its mask, of shape `(pairs, 1, length, length)`,
            must be like.
    """
    device = batch["input_ids"].device
    # One transfer from the device: how long the tries are decides the shapes of what follows.
    ids, mask, labels = (batch[name].cpu() for name in ("input_ids", "attention_mask", "labels"))
    answers = [(ids[row][mask[row] != 0], labels[row][mask[row] != 0]) for row in range(len(ids))]
    pairs = len(answers) // 2
    tries = [_trie(*answers[pair], *answers[pairs + pair]) for pair in range(pairs)]

    starts = [0, *itertools.accumulate(len(trie.target) for trie in tries)]
    entries = [trie.chosen + start for trie, start in zip(tries, starts, strict=False)]
    entries += [trie.rejected + start for trie, start in zip(tries, starts, strict=False)]
    parts = {
        "row": torch.cat([torch.full_like(trie.column, row) for row, trie in enumerate(tries)]),
        "column": torch.cat([trie.column for trie in tries]),
        "target": torch.cat([trie.target for trie in tries]),
        "entry": torch.cat(entries),
        "response": torch.cat([torch.full_like(entry, response) for response, entry in enumerate(entries)]),
        "ordinal": torch.cat([torch.arange(len(entry)) for entry in entries]),
    }
    inputs = {
        "input_ids": _rows([trie.ids for trie in tries]).to(device),
        "position_ids": _rows([trie.positions for trie in tries]).to(device),
        "attention_mask": _attention_mask(_rows([trie.branch for trie in tries], fill=PADDING).to(device), attention),
    }
    return Layout(inputs=inputs, pairs=pairs, **{name: values.to(device) for name, values in parts.items()})


@dataclass(frozen=True)
class _Trie:
    """A pair as one row; `chosen` and `rejected` say which of the scored tokens belong to each answer, in order."""

    ids: Tensor
    positions: Tensor
    branch: Tensor
    column: Tensor
    target: Tensor
    chosen: Tensor
    rejected: Tensor


def _trie(chosen_ids: Tensor, chosen_labels: Tensor, rejected_ids: Tensor, rejected_labels: Tensor) -> _Trie:
    end = min(len(chosen_ids), len(rejected_ids)) - 1
    differs = (chosen_ids[:end] != rejected_ids[:end]) | (chosen_labels[:end] != rejected_labels[:end])
    shared = int(differs.nonzero()[0]) if differs.any() else end
    chosen_tail, rejected_tail = len(chosen_ids) - shared, len(rejected_ids) - shared

    def scored(labels: Tensor) -> Tensor:
        """Positions of the scored tokens; the first token of all has nothing before it that could predict it."""
        return (labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1

    at_chosen, at_rejected = scored(chosen_labels), scored(rejected_labels)
    both = int((at_chosen < shared).sum())
    at_tail = at_rejected[both:]
    # In the row, the rejected tail follows the whole chosen answer.
    before_tail = torch.where(at_tail - 1 < shared, at_tail - 1, at_tail - 1 + chosen_tail)
    return _Trie(
        ids=torch.cat([chosen_ids, rejected_ids[shared:]]),
        positions=torch.cat([torch.arange(len(chosen_ids)), torch.arange(shared, len(rejected_ids))]),
        branch=torch.tensor([SHARED] * shared + [CHOSEN] * chosen_tail + [REJECTED] * rejected_tail),
        column=torch.cat([at_chosen - 1, before_tail]),
        target=torch.cat([chosen_ids[at_chosen], rejected_ids[at_tail]]),
        chosen=torch.arange(len(at_chosen)),
        rejected=torch.cat([torch.arange(both), len(at_chosen) + torch.arange(len(at_tail))]),
    )


def _attention_mask(branch: Tensor, attention: str) -> Tensor:
    """What each token sees of those before it: the shared prefix and its own tail."""
    queries, keys = branch[:, :, None], branch[:, None, :]
    length = branch.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=branch.device).tril()
    # Padding sees the padding before it: a row of the softmax that saw nothing would be undefined.
    seen = before & ((keys == queries) | ((keys == SHARED) & (queries != PADDING)))
    if attention == "eager":  # adds the mask to the scores
        lowest = torch.finfo(torch.float32).min
        return torch.zeros(seen.shape, device=branch.device).masked_fill_(~seen, lowest)[:, None]
    return seen[:, None]


def _rows(rows: list[Tensor], fill: int = 0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


# --- where a shared prefix is exact ----------------------------------------------------------------------------------

# Families whose log-probabilities and gradients are tested to be the same (tests/test_layout.py): their attention takes
# a mask of four dimensions, and what depends on a token's place goes by `position_ids`.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "mistral", "gpt_neox")


def obstacle(model: torch.nn.Module, config: Any) -> str | None:
    """Why a shared prefix would not give this model's numbers, or None.

    Args:
        model: as it is trained, wrapped or not.
        config: the model's.
    """
    if config.model_type not in FAMILIES:
        return f"models of the family {config.model_type!r} have not been tested with it"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention by {config._attn_implementation!r} takes no mask of its own: write `flash_attn: sdpa`"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "attention slides over a window, in which a tail's tokens would be further from the prefix"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some layers do not attend to everything"
    if getattr(config, "group_size_ratio", None) is not None:
        return "`shift_attn` moves attention about"
    if _drops_out(model, config):
        return "with dropout, both answers would see the same draw"
    return None


def is_text(batch: Batch) -> bool:
    """Whether a batch holds nothing but text, such as images."""
    return set(batch) == {"input_ids", "attention_mask", "labels"}


def _drops_out(model: torch.nn.Module, config: Any) -> bool:
    rates = [
        getattr(config, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop")
    ]
    rates += [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    return any(rates)
