"""How a batch of pairs is laid out for the model, and which of its tokens are scored for which response.

`padded` is LLaMA-Factory's layout: a row per answer. `shared_prefix` is a trie per pair, `shared prefix | chosen tail |
rejected tail`, all in one row without padding: what both answers begin with, prompt and response alike, is computed
once. Positions and attention let every token see exactly what it would see alone. Either way the language-model head
runs on scored tokens only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX

from .attention import TRIES, trie_lengths

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]

# Why something is not exact, where keys of the recipe alone decide it: they are checked before any model is loaded.
COUNTED_PADDING = "`ignore_pad_token_for_loss: false` counts padding, of which every batch has its own"
SHARED_NOISE = "with `neftune_noise_alpha`, both answers would see the same noise"

_SHARED, _CHOSEN, _REJECTED = range(3)  # the parts of a trie


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
        longest: at least the number of tokens of the longest response, known without asking a GPU.
        pairs: the number of pairs.
    """

    inputs: Batch
    row: Tensor
    column: Tensor
    target: Tensor
    entry: Tensor
    response: Tensor
    ordinal: Tensor
    longest: int
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
        longest=scored.shape[1],
        pairs=len(scored) // 2,
    )


def shared_prefix(batch: Batch, attention: str = "sdpa") -> Layout:
    """The batch as one row of tries.

    The shared prefix ends before the first differing token, and at least one token before the end of the shorter
    answer, so that every answer keeps a tail.

    Chosen by measurement (SmolLM2-135M, GSM8K pairs, forward and backward, two CPU cores): a row per trie, padded and
    under a mask, takes 0.98, 1.09 and 1.10 times as long at one, two and four pairs. One row under a mask takes 1.01
    and 1.21 times as long as a row per trie at four and eight pairs, because the mask costs the square of the row.

    Args:
        batch: as for `padded`; text only.
        attention: the model's implementation: `eager` is given a mask of shape `(1, 1, length, length)` that says who
            sees whom, others `attention.trie_lengths`, so they are to have been through `attention.take_tries`.
    """
    device = batch["input_ids"].device
    # One transfer from the device: how long the tries are decides the shapes of what follows.
    ids, mask, labels = torch.stack([batch[name] for name in ("input_ids", "attention_mask", "labels")]).cpu()
    answers = [(ids[row][mask[row] != 0], labels[row][mask[row] != 0]) for row in range(len(ids))]
    pairs = len(answers) // 2
    tries = [_trie(*answers[pair], *answers[pairs + pair]) for pair in range(pairs)]

    in_row = [0, *itertools.accumulate(len(trie.ids) for trie in tries)]
    in_scored = [0, *itertools.accumulate(len(trie.target) for trie in tries)]
    entries = [trie.chosen + start for trie, start in zip(tries, in_scored, strict=False)]
    entries += [trie.rejected + start for trie, start in zip(tries, in_scored, strict=False)]
    column = torch.cat([trie.column + start for trie, start in zip(tries, in_row, strict=False)])
    parts = {
        "row": torch.zeros_like(column),
        "column": column,
        "target": torch.cat([trie.target for trie in tries]),
        "entry": torch.cat(entries),
        "response": torch.cat([torch.full_like(entry, response) for response, entry in enumerate(entries)]),
        "ordinal": torch.cat([torch.arange(len(entry)) for entry in entries]),
    }
    lengths = [trie.lengths for trie in tries]
    inputs = {
        "input_ids": torch.cat([trie.ids for trie in tries])[None].to(device, non_blocking=True),
        "position_ids": torch.cat([trie.positions for trie in tries])[None].to(device, non_blocking=True),
        "attention_mask": _eager_mask(lengths, device) if attention == "eager" else trie_lengths(lengths),
    }
    tensors = {name: values.to(device, non_blocking=True) for name, values in parts.items()}
    return Layout(inputs=inputs, longest=max(map(len, entries)), pairs=pairs, **tensors)


@dataclass(frozen=True)
class _Trie:
    """A pair in a row; `chosen` and `rejected` say which of the scored tokens belong to each answer, in order."""

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, int, int]  # of shared prefix, chosen tail and rejected tail
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
        at: Tensor = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1
        return at

    at_chosen, at_rejected = scored(chosen_labels), scored(rejected_labels)
    both = int((at_chosen < shared).sum())
    at_tail = at_rejected[both:]
    # In the row, the rejected tail follows the whole chosen answer.
    before_tail = torch.where(at_tail - 1 < shared, at_tail - 1, at_tail - 1 + chosen_tail)
    return _Trie(
        ids=torch.cat([chosen_ids, rejected_ids[shared:]]),
        positions=torch.cat([torch.arange(len(chosen_ids)), torch.arange(shared, len(rejected_ids))]),
        lengths=(shared, chosen_tail, rejected_tail),
        column=torch.cat([at_chosen - 1, before_tail]),
        target=torch.cat([chosen_ids[at_chosen], rejected_ids[at_tail]]),
        chosen=torch.arange(len(at_chosen)),
        rejected=torch.cat([torch.arange(both), len(at_chosen) + torch.arange(len(at_tail))]),
    )


def _eager_mask(lengths: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    """What eager attention adds to its scores: nothing where a token sees its trie's prefix or its own tail."""
    tries = [torch.tensor([_SHARED] * s + [_CHOSEN] * c + [_REJECTED] * r, device=device) for s, c, r in lengths]
    seen = torch.block_diag(*((part[:, None] == part) | (part == _SHARED) for part in tries)).bool().tril()
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, lowest)[None, None]


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
    if not is_stock(model):
        return "its code is not transformers' own"
    if config.model_type not in FAMILIES:
        return f"models of the family {config.model_type!r} have not been tested with it"
    if config._attn_implementation not in ("sdpa", "eager", TRIES):
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


def depends_on_batch(config: Any, collator: Any) -> str | None:
    """Why the same pair has other log-probabilities beside other pairs, or in another layout, or None.

    Args:
        config: the model's.
        collator: LLaMA-Factory's pairwise collator.
    """
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if "'dynamic'" in rope or "'longrope'" in rope:
        return "the rotary embedding depends on the longest sequence of a batch"
    if collator.label_pad_token_id != IGNORE_INDEX:
        return COUNTED_PADDING
    return None


def is_stock(model: torch.nn.Module) -> bool:
    """Whether transformers' own code runs, and not Unsloth's or that of the model's repository."""
    return str(type(inner_model(model)).forward.__module__).startswith("transformers.models.")


def inner_model(model: Any) -> Any:
    """The model inside of DDP's, DeepSpeed's or PEFT's wrappers."""
    if hasattr(model, "module"):
        return inner_model(model.module)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_text(batch: Batch) -> bool:
    """Whether a batch holds nothing but text, such as images."""
    return set(batch) == {"input_ids", "attention_mask", "labels"}


def _drops_out(model: torch.nn.Module, config: Any) -> bool:
    rates = [
        getattr(config, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop")
    ]
    rates += [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    return any(rates)
