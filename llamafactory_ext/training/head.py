"""What a model does to its language-model head's logits before it returns them: nothing, a scale, a cap.

The head runs in chunks only where this is known: it then returns log-probabilities (`logps.py`), to which the model
does the same as to logits, and which are read back from the result.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from .layout import inner_model
from .modes import without_dropout

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 8  # of the row that is tried
RANGE = 40.0  # of the values that are sent through it
CLOSE = 8  # units of rounding
SMALL = 1e-3  # what is sent through a cap is multiplied by this, so that float32 can undo the cap


@dataclass(frozen=True)
class HeadOutput:
    """The logits that a model returns, from those of its head: `cap * tanh(scale * logits / cap)`.

    Args:
        scale: a factor.
        cap: the bound of the logits, as Gemma 2 has it (arXiv 2408.00118, section 2); None: there is none.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def sent(self, values: Tensor) -> Tensor:
        """What the head returns for `received` to give these values, float32 or wider, from what the model returns."""
        return values * ((1 if self.cap is None else SMALL) / self.scale)

    def received(self, output: Tensor) -> Tensor:
        """The values that `sent` has put in place of logits."""
        return output if self.cap is None else torch.atanh(output / self.cap) * (self.cap / SMALL)


_KNOWN: weakref.WeakKeyDictionary[torch.nn.Module, HeadOutput | None] = weakref.WeakKeyDictionary()


def head_output(model: torch.nn.Module, device: torch.device) -> HeadOutput | None:
    """What a model does to its head's logits, found by trying once; None if the head cannot run in chunks.

    All processes of a sharded model call this together.

    Args:
        model: a causal language model, wrapped or not.
        device: of its inputs.
    """
    inner = inner_model(model)
    # ZeRO-3 cannot recompute a head that consists of submodules (LoRA).
    head = inner.get_output_embeddings()
    if head is None or (is_deepspeed_zero3_enabled() and any(head.children())):
        return None
    if inner not in _KNOWN:
        _KNOWN[inner] = _try(model, head, device)
    return _KNOWN[inner]


def _try(model: torch.nn.Module, head: torch.nn.Module, device: torch.device) -> HeadOutput | None:
    sent: list[Tensor] = []

    def replace(module: torch.nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Values of a wide range in place of logits, which may all be near 0: float32, as log-probabilities are."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        values = torch.linspace(-RANGE, RANGE, output.numel(), dtype=dtype, device=output.device)
        sent.append(values.reshape(output.shape))
        return sent[-1].clone()  # some models write into their logits

    hook = head.register_forward_hook(replace)
    ids = torch.arange(1, TOKENS + 1, device=device)[None]
    try:
        # Not compiled, if it is a compiled model: that would take a minute.
        with torch.no_grad(), without_dropout(model), torch.compiler.set_stance("force_eager"):
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True, use_cache=False).logits
    except Exception:  # a model that wants more than text
        return None
    finally:
        hook.remove()
    if len(sent) != 1 or sent[0].shape != logits.shape or sent[0].dtype != logits.dtype:
        return None
    errors = {each: (each(sent[0]) - logits).abs().max().item() for each in _candidates(inner_model(model).config)}
    best = min(errors, key=lambda each: errors[each])
    return best if errors[best] <= CLOSE * torch.finfo(logits.dtype).eps * logits.abs().max().item() else None


def _candidates(config: Any) -> Iterator[HeadOutput]:
    """What the keys of a config may mean, nothing last: a factor (Cohere), a divisor (Granite), a cap (Gemma 2)."""
    text = config.get_text_config()

    def positive(key: str) -> float | None:
        value = getattr(text, key, None)
        return float(value) if isinstance(value, int | float) and value > 0 else None

    divisor = positive("logits_scaling")
    scales = [positive("logit_scale"), 1 / divisor if divisor else None, 1.0]
    caps = [positive("final_logit_softcapping"), None]
    for scale, cap in dict.fromkeys(product(filter(None, scales), caps)):
        yield HeadOutput(scale, cap)
