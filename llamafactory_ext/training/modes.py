"""A model's mode for passes that must not draw random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the with block, except for its linear layers.

    Those have no dropout, and on a CPU those of bitsandbytes would repack their weights permanently. Routers of
    transformers' models may be linear layers, too, but draw jitter.
    """
    switched = [module for module in model.modules() if module.training and not _is_plain_linear(module)]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True


def _is_plain_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) and not type(module).__module__.startswith("transformers.models.")
