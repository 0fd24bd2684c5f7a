"""Pictures, videos and sounds in a batch: which pairs have any, and whether they may be left out for the others.

LLaMA-Factory gives every batch of a vision model at least one picture, a blank one if need be, so that all ranks run
the same layers. No token attends to a blank one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from .layout import Batch, inner_model

if TYPE_CHECKING:
    from torch import Tensor

TEXT = ("input_ids", "attention_mask", "labels")
_PLACEHOLDER = re.compile("(image|video|audio)_token_(id|index)")


def placeholders(model: Any) -> frozenset[int]:
    """The ids of the tokens in whose place a model reads pictures, videos and sounds; none if they are unknown."""
    config = inner_model(model).config.to_dict()
    return frozenset(value for name, value in config.items() if _PLACEHOLDER.fullmatch(name) and isinstance(value, int))


def trains_language_only(model: Any) -> bool:
    """Whether no parameter is trained that only pictures, videos or sounds reach.

    Such a parameter gets a gradient of 0 from a blank picture, and none at all without: optimizers and DDP tell them
    apart.
    """
    inner = inner_model(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else None
    # Some releases of transformers give the whole model; Llama 3.2's decoder has layers for pictures.
    if decoder is None or decoder.config.get_text_config() is not decoder.config:
        return False
    if hasattr(decoder.config, "cross_attention_layers"):
        return False
    parts = (decoder, inner.get_input_embeddings(), inner.get_output_embeddings())
    language = {id(each) for part in parts if part is not None for each in part.parameters()}
    return all(id(each) in language for each in inner.parameters() if each.requires_grad)


def text_of(batch: Batch, placeholders: frozenset[int]) -> Batch | None:
    """The batch without a blank picture; None if its pairs have real ones, or if that is unknown.

    Args:
        batch: from LLaMA-Factory's pairwise collator.
        placeholders: as of the function of that name; empty if nothing may be left out.
    """
    if set(batch) == set(TEXT):
        return batch
    if not placeholders or _holds(batch, placeholders):
        return None
    return {name: batch[name] for name in TEXT}


def _holds(batch: Batch, placeholders: frozenset[int]) -> bool:
    ids: Tensor = batch["input_ids"][batch["attention_mask"] != 0]
    return bool(torch.isin(ids, torch.tensor(sorted(placeholders), device=ids.device)).any())
