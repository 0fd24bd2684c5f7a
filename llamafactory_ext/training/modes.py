"""A model's mode for passes that must not draw random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the with block, except for its linear layers.

    Those have no dropout, and on a CPU those of bitsandbytes would repack their weights permanently.
    """
    switched = [module for module in model.modules() if module.training and not isinstance(module, torch.nn.Linear)]
    for module in switched:
        module.training = False
    try:
        yield
    finally:
        for module in switched:
            module.training = True
