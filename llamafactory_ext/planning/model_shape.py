"""The shapes of a model and of its LoRA adapter, from the configuration: no weights are loaded or downloaded."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import UserError, in_a_line

NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class ModelShape:
    """The properties of a model that determine its memory.

    Args:
        family: transformers' `model_type`.
        shapes: the shape of every parameter by name, tied ones once.
        matrices: name -> (in, out) of the layers that LoRA can adapt and bitsandbytes quantizes, without the head:
            linear layers and GPT-2's transposed ones.
        linear: the names of the linear layers among them, which LLaMA-Factory's `lora_target: all` selects.
        head, embedding: elements of the output and of the input embedding.
        tied: whether head and embedding are the same parameter.
        dtype_bytes: bytes per element of the checkpoint.
        hidden, intermediate, head_dim: widths of the residual stream, of the MLP and of an attention head.
        layers, heads, kv_heads: numbers of decoder layers, of query heads, and of key-value heads.
        vocabulary: number of tokens in the vocabulary.
        dense: False for a mixture of experts.
    """

    family: str
    shapes: Mapping[str, tuple[int, ...]]
    matrices: Mapping[str, tuple[int, int]]
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
        """The number of parameters, tied ones once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @functools.cached_property
    def matrix_parameters(self) -> int:
        """Elements of the weights of `matrices`; one that several of them share counts once."""
        return sum(math.prod(self.shapes.get(f"{name}.weight", (0,))) for name in self.matrices)

    @functools.cached_property
    def linear_parameters(self) -> int:
        """Elements of the weights of `linear`."""
        return sum(math.prod(self.shapes.get(f"{name}.weight", (0,))) for name in self.linear)

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
    """The shape of a model, from its configuration alone.

    Args:
        path: a folder with config.json, or a name on the Hugging Face Hub.
        trust_remote_code: whether the model's own code may run.

    Raises:
        UserError: if the configuration cannot be read, or is not that of a causal language model with attention.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever transformers raises
        raise UserError(
            f"the configuration of {path!r} cannot be read ({in_a_line(error)}): download its config.json and write "
            "the folder as model_name_or_path."
        ) from error
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except Exception as error:  # whatever the model's code raises
        raise UserError(
            f"only causal language models can be planned, and {path!r} is not one ({in_a_line(error)}): choose another."
        ) from error
    if any(isinstance(size := getattr(text, key, None), int) and size < 1 for key in NEEDED):
        raise UserError(f"the configuration of {path!r} has a size below 1: correct it, or choose another model.")
    missing = [key for key in NEEDED if not isinstance(getattr(text, key, None), int)]
    if missing or not all(isinstance(getattr(m, "weight", None), torch.Tensor) for m in (head, embedding)):
        raise UserError(
            f"a {config.model_type!r} model cannot be planned, only models with attention layers "
            f"({'its configuration has no ' + missing[0] if missing else 'its head is not a single matrix'}): choose "
            "another, or train two steps of it (max_steps=2) and look at the memory used."
        )

    modules = {
        name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head
    }
    return ModelShape(
        family=config.model_type,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        matrices={name: _in_and_out(module) for name, module in modules.items()},
        linear=frozenset(name for name, module in modules.items() if isinstance(module, torch.nn.Linear)),
        head=head.weight.numel(),
        embedding=embedding.weight.numel(),
        tied=head.weight is embedding.weight,
        dtype_bytes=(config.dtype or torch.float32).itemsize,
        hidden=text.hidden_size,
        intermediate=_widest(getattr(text, "intermediate_size", None)) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        dense=not any(getattr(text, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts")),
    )


def _in_and_out(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if type(module).__name__ == "Conv1D" else (columns, rows)


def _widest(size: int | Sequence[int] | None) -> int | None:
    """The largest width: some models have layers of several widths."""
    return max(size) if isinstance(size, Sequence) else size


@dataclass(frozen=True)
class Adapter:
    """LoRA's matrices: A of shape (rank, in) and B of shape (out, rank) for each target.

    Args:
        targets: (in, out) of each linear layer that LoRA adapts.
        rank: `lora_rank`.
        dora: whether a magnitude per output is trained as well (`use_dora`).
    """

    targets: tuple[tuple[int, int], ...]
    rank: int
    dora: bool = False

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(self.rank * (rows + columns) + (columns if self.dora else 0) for rows, columns in self.targets)


def lora_adapter(model: ModelShape, targets: list[str], rank: int, dora: bool = False) -> Adapter:
    """The adapter for `lora_target`: `["all"]`, or names that layer names end with, as in PEFT.

    Raises:
        UserError: if no layer matches.
    """
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"lora_target is {targets!r}: write `all`, or names of layers.")
    known = ", ".join(sorted({name.rpartition(".")[2] for name in model.matrices}))
    if targets == ["all"] and not model.linear:
        instead = f"name layers in lora_target, of {known}" if known else "write `finetuning_type: full`"
        raise UserError(f"`lora_target: all` selects linear layers, and a {model.family!r} model has none: {instead}.")
    chosen = set(model.linear) if targets == ["all"] else set()
    for target in targets if not chosen else []:
        matching = {name for name in model.matrices if name == target or name.endswith(f".{target}")}
        if not matching:
            everything = "all, or " if model.linear else ""
            raise UserError(f"lora_target {target!r} names no layer of the model: write {everything}one of {known}.")
        chosen |= matching
    return Adapter(tuple(model.matrices[name] for name in sorted(chosen)), rank, dora)
