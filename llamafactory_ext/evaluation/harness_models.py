"""Models as lm-evaluation-harness asks them: one load for a model and all of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

from ..errors import UserError, in_a_line
from .engines import Settings
from .models import EngineName, end_tokens, load_plain_tokenizer
from .transformers_engine import answering_as, load_model
from .vllm_engine import lora_settings, set_vllm_defaults, vllm_version

Ask = Callable[[str], AbstractContextManager[Any]]  # within it, lm_eval's `LM` answers as the run of this name

WITHOUT_GPU = 8  # prompts per batch: lm_eval finds out how many fit by running out of memory, which ends a process


def load(engine: EngineName, settings: Settings, batch_size: str) -> Ask:
    """The model, and how its adapters are chosen.

    Args:
        engine: vllm or hf.
        settings: which model, adapters and devices.
        batch_size: a number, or auto.

    Raises:
        UserError: if it cannot be loaded.
    """
    try:
        return (_load_vllm if engine is EngineName.vllm else _load_hf)(settings, batch_size)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The model cannot be loaded ({in_a_line(error)}): correct --model, --adapter, --dtype or --max-model-len."
        ) from error


def check_engine(engine: EngineName, settings: Settings) -> None:
    """Refuse what the engine cannot do here, before anything is loaded.

    Raises:
        UserError: says what to write instead.
    """
    if engine is EngineName.hf and settings.tensor_parallel * settings.data_parallel > 1:
        raise UserError("--engine hf uses one device: remove --tensor-parallel and --data-parallel, or use vllm.")
    if engine is EngineName.vllm:
        set_vllm_defaults()  # before it is imported
        vllm_version()
    if settings.data_parallel > 1 and find_spec("ray") is None:
        raise UserError("--data-parallel needs Ray in lm_eval: run `pip install ray`, or use --tensor-parallel.")


def _load_vllm(settings: Settings, batch_size: str) -> Ask:
    from lm_eval.models.vllm_causallms import VLLM
    from vllm.lora.request import LoRARequest

    model: Any = VLLM(
        pretrained=settings.model,
        dtype=settings.dtype,
        batch_size=batch_size,
        seed=settings.sampling.seed,
        tensor_parallel_size=settings.tensor_parallel,
        data_parallel_size=settings.data_parallel,
        max_model_len=settings.max_model_len,
        generation_config="vllm",
        **lora_settings(settings.adapters),
    )
    requests = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(settings.adapters.items(), 1)
    }

    def ask(run: str) -> AbstractContextManager[Any]:
        model.lora_request = requests.get(run)
        return nullcontext(model)

    return ask


def _load_hf(settings: Settings, batch_size: str) -> Ask:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    tokenizer = load_plain_tokenizer(settings.model)
    # In place of the model's own, whose repetition penalty would count as well. Loaded here, as HFLM would shrink the
    # vocabulary under an adapter to the tokenizer's, and change the probabilities.
    config = GenerationConfig(eos_token_id=end_tokens(settings.model, tokenizer) or None)
    weights = load_model(settings, config)
    fitting = batch_size if batch_size != "auto" or torch.cuda.is_available() else str(WITHOUT_GPU)
    model: Any = HFLM(
        pretrained=weights, tokenizer=settings.model, batch_size=fitting, max_length=settings.max_model_len
    )

    @contextmanager
    def ask(run: str) -> Iterator[Any]:
        with answering_as(weights, settings.adapters, run):
            yield model

    return ask
