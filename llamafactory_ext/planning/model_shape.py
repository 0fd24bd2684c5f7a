"""The shape of a model and of its LoRA adapter, read from the configuration: no weights are loaded or downloaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides about memory.

    Args:
        family: transformers' `model_type`.
        shapes: the shape of every parameter by name, tied ones once.
        linear: the names of the linear layers except the head: what LLaMA-Factory's `lora_target: all` and
            bitsandbytes take.
        head, embedding: elements of the output and of the input embedding.
        tied: whether these are the same parameter.
        dtype_bytes: bytes per element of the checkpoint.
        dense: whether every token passes the same layers (False for a mixture of experts).
    """

    family: str
    shapes: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    head: int
    embedding: int
    tied: bool
    dtype_bytes: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    dense: bool

    @functools.cached_property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @functools.cached_property
    def linear_parameters(self) -> int:
        """Elements of the weights of `linear`."""
        return sum(math.prod(self.shapes[f"{name}.weight"]) for name in self.linear)

    @functools.cached_property
    def largest_layer(self) -> int:
        """Elements of the largest module's own parameters, as DeepSpeed's estimator for ZeRO-3 takes them."""
        sizes: dict[str, int] = {}
        for name, shape in self.shapes.items():
            module = name.rpartition(".")[0]
            sizes[module] = sizes.get(module, 0) + math.prod(shape)
        return max(sizes.values())

    @functools.cached_property
    def outside_layers(self) -> int:
        """Elements of the parameters that belong to no decoder layer: embeddings, last norm, head."""
        return sum(math.prod(shape) for name, shape in self.shapes.items() if ".layers." not in f".{name}")


@functools.cache
def read_model(path: str, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model from its configuration alone: the weights are neither needed nor downloaded.

    Args:
        path: a folder with config.json, or a name on the hub.

    Raises:
        UserError: if the configuration cannot be had, or is not that of a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the configuration of {path!r} cannot be read: download its config.json and write the folder "
            "as model_name_or_path."
        ) from error
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"{path!r} is no causal language model, and only those are planned: name another.") from error

    text = config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linears = (name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return ModelShape(
        family=config.model_type,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        linear=frozenset(linears),
        head=head.weight.numel(),
        embedding=embedding.weight.numel(),
        tied=head.weight is embedding.weight,
        dtype_bytes=(config.dtype or torch.float32).itemsize,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        dense=not any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")),
    )


@dataclass(frozen=True)
class Adapter:
    """LoRA's matrices: A of shape (rank, in) and B of (out, rank) beside every target.

    Args:
        targets: (in, out) of each linear layer that LoRA adapts.
        rank: `lora_rank`.
        dora: whether a magnitude per output is trained too (`use_dora`).
    """

    targets: tuple[tuple[int, int], ...]
    rank: int
    dora: bool = False

    @property
    def parameters(self) -> int:
        return sum(self.rank * (rows + columns) + (columns if self.dora else 0) for rows, columns in self.targets)


def lora_adapter(model: ModelShape, targets: list[str], rank: int, dora: bool = False) -> Adapter:
    """The adapter for `lora_target`: `["all"]`, or names that a linear layer's name must end with, as in PEFT.

    Raises:
        UserError: if a name matches no layer.
    """
    chosen = set(model.linear) if targets == ["all"] else set()
    for target in targets if not chosen else []:
        matching = {name for name in model.linear if name == target or name.endswith(f".{target}")}
        if not matching:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in model.linear}))
            raise UserError(f"lora_target {target!r} names no linear layer of the model: write all, or one of {known}.")
        chosen |= matching
    weights = (model.shapes[f"{name}.weight"] for name in sorted(chosen))
    return Adapter(tuple((columns, rows) for rows, columns in weights), rank, dora)
