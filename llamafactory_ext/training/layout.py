"""How a batch of responses is laid out for the model, and which of its tokens are scored for which response.

`padded` is LLaMA-Factory's layout: a row per response. `shared_prefix` packs a prefix tree per pair, `shared prefix |
chosen tail | rejected tail`, into one row without padding: the tokens that both sequences of a pair begin with, of
prompt and response alike, are computed once, and so are those of more than two responses to a prompt (`trie.py`).
Positions and attention are those of each sequence alone, so the numbers are the same. In both layouts the
language-model head runs on scored tokens only.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llamafactory.extras.constants import IGNORE_INDEX

from .attention import PREFIX_TREES, tree_mask
from .flash import is_flash
from .trie import Branch, branches, in_row, paths, places

if TYPE_CHECKING:
    from torch import Tensor

    from .ranking import Ranking

Batch = dict[str, "Tensor"]

# Reasons that the keys of the recipe alone decide, so that they are checked before any model is loaded.
COUNTED_PADDING = "`ignore_pad_token_for_loss: false` scores padding tokens, whose number differs from batch to batch"
SHARED_NOISE = "with `neftune_noise_alpha`, both responses would get the same noise"


@dataclass(frozen=True)
class Layout:
    """A batch of responses as the model receives it.

    Args:
        inputs: the model's keyword arguments; `input_ids` has shape `(rows, length)`.
        row, column: position of the hidden state that predicts each scored token, int64, shape `(scored,)` each.
        target: the scored tokens, int64, shape `(scored,)`.
        entry: per token of each response, its index among the scored tokens, int64, shape `(response tokens,)`. A
            token that responses share is scored once and occurs here for each of them.
        response: the response of each entry, by its row in the batch: the chosen ones first, then the rejected ones,
            unless there is a ranking; same shape.
        ordinal: the position of each entry among its response's scored tokens, from 0; same shape.
        longest: an upper bound of the tokens per response, known without waiting for the GPU.
        responses: the number of responses.
        ranking: which responses are compared; None: the first half with the second.
    """

    inputs: Batch
    row: Tensor
    column: Tensor
    target: Tensor
    entry: Tensor
    response: Tensor
    ordinal: Tensor
    longest: int
    responses: int
    ranking: Ranking | None = None

    def sides(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The values of the chosen and of the rejected response of each pair, from one per response."""
        if self.ranking is not None:
            return self.ranking.sides(values)
        chosen, rejected = values.chunk(2)
        return chosen, rejected


def padded(batch: Batch, ranking: Ranking | None = None) -> Layout:
    """The batch unchanged: chosen responses in the first half of the rows, rejected ones in the second.

    Args:
        batch: from LLaMA-Factory's pairwise collator; `labels`, shape `(responses, length)`, is -100 where no token is
            scored.
        ranking: which rows are compared, if not those.
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
        responses=len(scored),
        ranking=ranking,
    )


def shared_prefix(
    batch: Batch, attention: str = "sdpa", limits: Limits | None = None, ranking: Ranking | None = None
) -> Layout:
    """The batch as one row of prefix trees.

    Chosen by measurement (SmolLM2-135M, GSM8K pairs, forward and backward, two CPU cores): a padded, masked row per
    tree takes 0.98, 1.09 and 1.10 times as long at one, two and four pairs. One masked row takes 1.01 and 1.21 times as
    long as a row per tree at four and eight pairs, because the mask is quadratic in the row's length.

    Args:
        batch: as for `padded`; text only, as of `media.text_of`.
        attention: the model's implementation. `eager` gets an additive mask of shape `(1, 1, length, length)`; others
            get `attention.tree_mask` and need `attention.accept_prefix_trees` first.
        limits: beyond them the batch is `padded`.
        ranking: as for `padded`; the responses of a group are one tree.
    """
    device = batch["input_ids"].device
    # One transfer from the device: the lengths of the trees decide the shapes below.
    ids, mask, labels = torch.stack([batch[name] for name in ("input_ids", "attention_mask", "labels")]).cpu()
    sequences = [(ids[row][mask[row] != 0], labels[row][mask[row] != 0]) for row in range(len(ids))]
    pairs = len(sequences) // 2
    groups = [[pair, pairs + pair] for pair in range(pairs)] if ranking is None else ranking.groups
    trees = [_prefix_tree([sequences[row] for row in group]) for group in groups]
    if limits and not limits.allow([len(each) for each, _ in sequences], sum(len(tree.ids) for tree in trees)):
        return padded(batch, ranking)

    in_batch = [0, *itertools.accumulate(len(tree.ids) for tree in trees)]
    in_scored = [0, *itertools.accumulate(len(tree.target) for tree in trees)]
    entries: list[Tensor] = [torch.empty(0)] * len(sequences)
    for group, tree, start in zip(groups, trees, in_scored, strict=False):
        for row, entry in zip(group, tree.entries, strict=True):
            entries[row] = entry + start
    column = torch.cat([tree.column + start for tree, start in zip(trees, in_batch, strict=False)])
    parts = {
        "row": torch.zeros_like(column),
        "column": column,
        "target": torch.cat([tree.target for tree in trees]),
        "entry": torch.cat(entries),
        "response": torch.cat([torch.full_like(entry, response) for response, entry in enumerate(entries)]),
        "ordinal": torch.cat([torch.arange(len(entry)) for entry in entries]),
    }
    rows = [tree.branches for tree in trees]
    inputs = {
        "input_ids": torch.cat([tree.ids for tree in trees])[None].to(device, non_blocking=True),
        "position_ids": torch.cat([tree.positions for tree in trees])[None].to(device, non_blocking=True),
        "attention_mask": _eager_mask(rows, device) if attention == "eager" else tree_mask(rows),
    }
    tensors = {name: values.to(device, non_blocking=True) for name, values in parts.items()}
    return Layout(inputs=inputs, longest=max(map(len, entries)), responses=len(sequences), ranking=ranking, **tensors)


@dataclass(frozen=True)
class _PrefixTree:
    """The sequences of a group as one; `entries` are the indices of each response's tokens in `target`."""

    ids: Tensor
    positions: Tensor
    branches: list[Branch]
    column: Tensor
    target: Tensor
    entries: list[Tensor]


def _prefix_tree(sequences: list[tuple[Tensor, Tensor]]) -> _PrefixTree:
    tree = branches(sequences)
    column: list[Tensor] = []
    target: list[Tensor] = []
    entries: list[Tensor] = []
    scored = 0
    for branch, path, (_, labels) in zip(tree, paths(tree), sequences, strict=True):
        at = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0] + 1  # nothing predicts the very first token
        common = int((at < branch.shared).sum())
        own = at[common:]
        column.append(places(path)[own - 1])
        target.append(labels[own])
        parents = entries[branch.parent][:common] if common else own[:0]
        entries.append(torch.cat([parents, scored + torch.arange(len(own))]))
        scored += len(own)
    return _PrefixTree(
        ids=torch.cat([ids[branch.shared :] for branch, (ids, _) in zip(tree, sequences, strict=True)]),
        positions=torch.cat([torch.arange(branch.shared, branch.shared + branch.tail) for branch in tree]),
        branches=tree,
        column=torch.cat(column),
        target=torch.cat(target),
        entries=entries,
    )


def _eager_mask(trees: list[list[Branch]], device: torch.device) -> Tensor:
    """The additive mask of eager attention: 0 where a token attends to its sequence up to itself."""
    row = in_row(trees)
    length = sum(branch.tail for branch in row)
    seen = torch.zeros(length, length, dtype=torch.bool)
    for branch, path in zip(row, paths(row), strict=True):
        at = places(path)
        ones = torch.ones(branch.tail, len(at), dtype=torch.bool)
        seen[at[branch.shared :, None], at] = ones.tril(branch.shared)
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape).masked_fill_(~seen, lowest)[None, None].to(device, non_blocking=True)


# --- where a shared prefix is exact ----------------------------------------------------------------------------------


def obstacle(model: torch.nn.Module, config: Any) -> str | None:
    """Why a shared prefix would change this model's numbers, or None if only trying it can tell (`proof.prove`).

    Args:
        model: the model in training, wrapped or not.
        config: its config.
    """
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager", PREFIX_TREES) and not is_flash(attention):
        return f"{attention!r} attention takes no custom mask, unlike `flash_attn: sdpa`"
    if getattr(config, "group_size_ratio", None) is not None:
        return "`shift_attn` changes the attention pattern"
    if any(isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] > 1 for module in model.modules()):
        return "some layers mix neighboring tokens by a convolution"
    adapters = getattr(inner_model(model, with_adapters=True), "peft_config", None) or {}
    if any(getattr(each, "alora_invocation_tokens", None) for each in adapters.values()):
        return "activated LoRA counts tokens from an invocation in the row"
    if _drops_out(model, config):
        return "with dropout, both responses would share one dropout mask"
    return None


# Keys of a config with the number of tokens that some layers attend to: of a sequence that is not longer, to all.
# Not every model reads the keys that switch them off (`use_sliding_window`, `layer_types`).
SLIDING = "sliding_window"  # which FlashAttention applies to each sequence, however long
WINDOWS = (SLIDING, "attention_chunk_size", "index_topk", "keep_window_size")
# The same for models that count positions in the row and not in the sequence (GPT-Neo, Llama 4).
ROWS = ("window_size", "floor_scale")


@dataclass(frozen=True)
class Limits:
    """The tokens for which a shared prefix is exact, in a sequence and in the whole row; None: any number."""

    sequence: int | None = None
    row: int | None = None

    def allow(self, sequences: list[int], row: int) -> bool:
        """Whether a batch with sequences of these lengths, packed into a row of this length, stays within them."""
        return (self.sequence is None or max(sequences) <= self.sequence) and (self.row is None or row <= self.row)


def limits_of(*configs: Any) -> Limits:
    """The least limits of some models."""
    texts = [config.get_text_config() for config in configs]

    def least(keys: tuple[str, ...]) -> int | None:
        values = [
            getattr(text, key, None)
            for text in texts
            for key in keys
            if not (key == SLIDING and is_flash(text._attn_implementation or ""))
        ]
        return min((int(value) for value in values if isinstance(value, int | float) and value > 0), default=None)

    return Limits(least(WINDOWS), least(ROWS))


def depends_on_batch(config: Any, collator: Any) -> str | None:
    """Why a pair's log-probabilities depend on the other pairs in its batch or on the layout, or None.

    Args:
        config: the model's config.
        collator: LLaMA-Factory's pairwise collator.
    """
    rope = str(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None))
    if "'dynamic'" in rope or "'longrope'" in rope:
        return "the rotary embedding depends on the longest sequence in the batch"
    if collator.label_pad_token_id != IGNORE_INDEX:
        return COUNTED_PADDING
    return None


def inner_model(model: Any, with_adapters: bool = False) -> Any:
    """The model inside the wrappers of DDP, DeepSpeed and torch.compile, and of PEFT unless wanted `with_adapters`."""
    for wrapped in ("module", "_orig_mod"):
        if hasattr(model, wrapped):
            return inner_model(getattr(model, wrapped), with_adapters)
    return model.get_base_model() if hasattr(model, "get_base_model") and not with_adapters else model


def _drops_out(model: torch.nn.Module, config: Any) -> bool:
    rates = [
        getattr(config, name, 0.0) for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop")
    ]
    rates += [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    return any(rates)
