"""The reference model: prepared so that it starts out equal to the policy, to the last bit."""

from __future__ import annotations

from typing import Any

import torch


def autocast_dtype(args: Any) -> torch.dtype | None:
    """What training autocasts linear layers to, where the reference may keep it for good.

    None under FSDP: it flattens the parameters of a module together, which must have one dtype then.

    Args:
        args: transformers' training arguments.
    """
    from accelerate.utils import parse_flag_from_env

    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return None
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def match_precision(reference: torch.nn.Module, policy: torch.nn.Module, autocast: torch.dtype | None) -> None:
    """Give the reference's parameters, in place, the dtype that the policy's of the same name have.

    LLaMA-Factory upcasts the trainable parameters to float32 and leaves the reference in half precision. Run like
    that, the two differ before the first step (logratios from -0.7 to +0.3 were measured), which opens the gates of
    MinorDPO and DPOP at random. Weights of linear layers may stay as they are where autocast would round the policy's
    float32 copies of them to the same half-precision numbers; that keeps most of the memory.

    Args:
        reference: the reference model; a quantized one is left alone.
        policy: the model to be trained, already upcast.
        autocast: the dtype that training autocasts to (bf16 or fp16), or None.
    """
    if getattr(reference, "quantization_method", None) is not None:
        return

    wanted = {name: parameter.dtype for name, parameter in policy.named_parameters()}
    for prefix, module in reference.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            rounded_anyway = isinstance(module, torch.nn.Linear) and parameter.dtype == autocast
            if not rounded_anyway:
                parameter.data = parameter.data.to(wanted.get(name, parameter.dtype))
