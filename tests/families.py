"""Which decoder families share prefixes: `python tests/families.py [FAMILY ...]` prints the table of docs/families.md.

Tiny models of random weights, in float32. Per family and attention: the verdict of the trial before the first step
(`training/proof.py`), the largest deviation of a token's log-probability from a row per response, in nats, and the
largest deviation of the gradients, of the largest gradient.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import plain_flash
import torch
import transformers

from llamafactory_ext.errors import in_a_line
from llamafactory_ext.training.attention import accept_prefix_trees
from llamafactory_ext.training.head import HeadOutput, head_output
from llamafactory_ext.training.layout import Layout, limits_of, padded, shared_prefix
from llamafactory_ext.training.logps import response_logps, token_logps
from llamafactory_ext.training.proof import made_up_pairs, prove

CPU = torch.device("cpu")
TOKENS = list(range(3, 96))
SHAPE = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "shared_expert_intermediate_size": 16,
}
LATENT = {  # DeepSeek's attention
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    **{"n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
LINEAR = {
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
    **EXPERTS,
}
NO_DROPOUT = {
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "residual_dropout": 0.0},
    **{"embedding_dropout": 0.0},
}
LOCAL = {"sliding_window": 64}  # some of the made-up pairs are longer
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, **NO_DROPOUT}
TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, **LOCAL}
PER_LAYER = {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, **TWO_KINDS}
# A family, perhaps with a remark behind a comma, and the shape of its model beside SHAPE.
FAMILIES = {
    "apertus": {},
    "arcee": {},
    "bloom": {"n_head": 4, "n_layer": 2},
    "cohere": {},
    "cohere2": LOCAL,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "ernie4_5": {},
    "exaone4": LOCAL,
    "falcon": {"new_decoder_architecture": False, "head_dim": None},
    "gemma": {},
    "gemma2": LOCAL | {"query_pre_attn_scalar": 8},
    "gemma3_text": TWO_KINDS | {"query_pre_attn_scalar": 8},
    "gemma3n_text": PER_LAYER
    | {"num_kv_shared_layers": 1, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2},
    "gemma4_text": PER_LAYER | {"global_head_dim": 8},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": LATENT | {"num_key_value_heads": 2},
    "gpt2": GPT,
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_oss": EXPERTS | LOCAL,
    "gptj": GPT | {"rotary_dim": 4},
    "granite": {
        **{"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
        "attention_multiplier": 0.3,
    },
    "helium": {},
    "hunyuan_v1_dense": {},
    "jamba": {
        **{"mamba_d_state": 4, "num_experts": 2, "expert_layer_period": 2, "attn_layer_period": 2},
        "attn_layer_offset": 1,
    },
    "lfm2": {"full_attn_idxs": [1, 3]},
    "llama": {},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 64, "intermediate_size_mlp": 48},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "minimax_m2": EXPERTS,
    "ministral3": {},
    "mistral": {"sliding_window": None},
    "mistral, window of 64": LOCAL,
    "mixtral": EXPERTS,
    "nemotron": {},
    "olmo2": {},
    "olmo3": LOCAL,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, **NO_DROPOUT},
    "phi": NO_DROPOUT,
    "phi3": NO_DROPOUT,
    "qwen2": {},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "seed_oss": NO_DROPOUT,
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None, **NO_DROPOUT},
}
FLASH = "flash_attention_2"  # with a kernel in plain torch
ATTENTIONS = ("sdpa", "eager", FLASH)


@dataclass(frozen=True)
class Row:
    """What a family's model does; without a reason, its numbers are those of the trial.

    Args:
        reason: why it could not be tried: it has no such attention, or does not take packed rows.
        is_exact: the verdict.
        deviation, gradients: the largest differences.
        head: what it does to its head's logits.
    """

    reason: str = ""
    is_exact: bool = False
    deviation: float = float("nan")
    gradients: float = float("nan")
    head: HeadOutput | None = None


def is_known(family: str) -> bool:
    """Whether this transformers has it."""
    return family.partition(",")[0] in transformers.CONFIG_MAPPING


def make(family: str, attention: str, dtype: torch.dtype = torch.float32, **changes):
    """A model of random weights that are large enough for attention to matter."""
    shape = {
        key: value for key, value in (SHAPE | FAMILIES[family] | changes).items() if (key, value) != ("head_dim", None)
    }
    config = transformers.AutoConfig.for_model(family.partition(",")[0], **shape)
    torch.manual_seed(0)
    loaded_with = "eager" if attention == FLASH else attention
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=loaded_with, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4
    model = model.to(dtype).eval()
    if attention == FLASH:
        plain_flash.switch_on(model)
    accept_prefix_trees(model)
    return model


def gradients(model, layout: Layout) -> list[torch.Tensor | None]:
    model.zero_grad()
    scored = response_logps(model, layout)
    (-torch.nn.functional.logsigmoid(0.05 * (scored.chosen - 0.7 * scored.rejected))).sum().backward()
    return [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]


def deviation_of_gradients(model, attention: str, window: int | None) -> float:
    batch = made_up_pairs(TOKENS, CPU, window)
    expected, actual = gradients(model, padded(batch)), gradients(model, shared_prefix(batch, attention))
    both = [(a, b) for a, b in zip(expected, actual, strict=True) if a is not None]
    return float(max((a - b).abs().max() for a, b in both) / max(a.abs().max() for a, _ in both))


def try_out(family: str, attention: str) -> Row:
    try:
        model = make(family, attention)
    except ValueError as error:
        return Row(reason=in_a_line(error))
    head, window, name = head_output(model, CPU), limits_of(model.config).sequence, model.config._attn_implementation
    score = functools.partial(token_logps, model)
    try:
        proof = prove(score, score, TOKENS, attention=name, device=CPU, dtype=torch.float32, window=window)
    except Exception as error:  # whatever a model does with a mask that it does not expect
        return Row(reason=in_a_line(error), head=head)
    return Row("", proof.holds, proof.deviation, deviation_of_gradients(model, name, window), head)


def table(families: list[str]) -> Iterator[str]:
    yield "| Family | SDPA | eager | FlashAttention | Head in chunks |"
    yield "|---|---|---|---|---|"
    for family in families:
        with plain_flash.installed():
            rows = [try_out(family, attention) for attention in ATTENTIONS]
        cells = [_cell(row) for row in rows]
        yield f"| {family} | {' | '.join(cells)} | {_head(rows[0].head or rows[1].head)} |"


def _cell(row: Row) -> str:
    if row.reason:
        return "no"
    return f"{'shared' if row.is_exact else 'no'} ({row.deviation:.0e}, {row.gradients:.0e})"


def _head(head: HeadOutput | None) -> str:
    if head is None:
        return "no"
    scale = "" if head.scale == 1 else f", scaled by {head.scale:g}"
    return f"yes{scale}{'' if head.cap is None else f', capped at {head.cap:g}'}"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for line in table(sys.argv[1:] or [family for family in FAMILIES if is_known(family)]):
        print(line, flush=True)
