"""A model's mode for passes that must not draw random numbers, and whether ranks share it out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


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


def uses_fsdp(args: Any) -> bool:
    """Whether a run is to shard its models with FSDP; known before its trainer is made.

    Args:
        args: transformers' training arguments; `accelerate launch` sets an environment variable in place of `fsdp`.
    """
    return bool(args.fsdp) or bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def ranks_wait_for_each_other() -> bool:
    """Whether ranks gather weights within a forward pass, so that no rank can abort it alone and try again."""
    sharded: bool = is_deepspeed_zero3_enabled() or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return sharded and PartialState().num_processes > 1
