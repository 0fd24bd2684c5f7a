"""The engine with vLLM in this process, with LoRA adapters, tensor parallelism and replicas."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
from collections.abc import Generator, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError, in_a_line
from .chat_templates import Chat
from .engines import RESUME, Job, Settings, check_chats, package_versions, refusal_of
from .generations import Generation
from .models import end_tokens, load_tokenizer

FINISHED = ()  # what a replica sends last
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts as max_lora_rank


class VllmEngine:
    """vLLM in this process: loaded once, all problems queued at once, answers yielded as they are finished."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        set_vllm_defaults()

    def check(self, chats: list[Chat]) -> None:
        check_chats(chats, self.settings, self.tokenizer)
        lora_settings(self.settings.adapters)
        _check_generation_config(self.settings.model)

    def refusal(self, chat: Chat, number: int) -> str | None:
        return refusal_of(chat, self.settings, self.tokenizer, number)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.settings.model)

    @cached_property
    def llm(self) -> Any:
        """vLLM in this process, loaded once for all that is asked."""
        return load_vllm(self.settings)

    def versions(self) -> dict[str, str]:
        return {**vllm_version(), **package_versions("torch", "transformers")}

    def parameters(self) -> dict[str, Any]:
        return vllm_parameters(self.settings, self.tokenizer)

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        if self.settings.data_parallel > 1:
            yield from _generate_on_replicas(self.settings, jobs)
            return
        try:
            yield from ask_vllm(self.llm, self.settings, jobs)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"vLLM failed ({type(error).__name__}: {in_a_line(error)}): see its output above; {RESUME}."
            ) from error


def vllm_version() -> dict[str, str]:
    """The version of vLLM, whose distribution has another name without a GPU.

    Raises:
        UserError: if it cannot be imported.
    """
    try:
        import vllm
    except ImportError as error:
        raise UserError(f"vLLM cannot be imported ({error}): run `make eval-env`, or choose --engine hf.") from error
    return {"vllm": vllm.__version__}


def set_vllm_defaults() -> None:
    """Without a GPU, use one process and all cores: vLLM would reserve a core and take a minute to start."""
    import torch

    if torch.cuda.is_available():
        return
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def load_vllm(settings: Settings) -> Any:
    """A `vllm.LLM` that can answer for the base model and every adapter."""
    from vllm import LLM

    return LLM(
        model=settings.model,
        dtype=settings.dtype,
        seed=settings.sampling.seed,
        tensor_parallel_size=settings.tensor_parallel,
        max_model_len=settings.max_model_len,
        enable_prefix_caching=True,
        generation_config="vllm",
        **lora_settings(settings.adapters),
    )


def vllm_parameters(settings: Settings, tokenizer: Any) -> dict[str, Any]:
    """The fields of vLLM's `SamplingParams`; others keep their neutral defaults."""
    return {**vars(settings.sampling), "top_k": 0, "stop_token_ids": end_tokens(settings.model, tokenizer)}


def vllm_sampling(settings: Settings, jobs: list[Job]) -> list[Any]:
    """vLLM's `SamplingParams` of each job."""
    from vllm import SamplingParams

    parameters = vllm_parameters(settings, load_tokenizer(settings.model))
    return [SamplingParams(**job.seeded(parameters)) for job in jobs]


def _check_generation_config(model: str) -> None:
    """vLLM reads the end tokens in generation_config.json with transformers, which checks all other fields as well."""
    from transformers import GenerationConfig

    if not Path(model, "generation_config.json").is_file():
        return
    try:
        GenerationConfig.from_pretrained(model)
    except Exception as error:
        raise UserError(
            f"{model}/generation_config.json cannot be loaded ({in_a_line(error)}): correct it, or remove it."
        ) from error


def ask_vllm(llm: Any, settings: Settings, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
    """Queue all jobs at once and yield each answer when it is finished."""
    from vllm.lora.request import LoRARequest

    adapters = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(settings.adapters.items(), 1)
    }
    ids = llm.enqueue_chat(
        [job.messages for job in jobs],
        vllm_sampling(settings, jobs),
        use_tqdm=False,
        chat_template_kwargs=settings.chat_template_kwargs,
        lora_request=[adapters.get(job.run) for job in jobs] if adapters else None,
    )
    # vLLM queues under `N-random` and reports under `N`.
    waiting = {queued.partition("-")[0]: job for queued, job in zip(ids, jobs, strict=True)}
    # As in LLM.chat, but each answer is yielded when it is finished, not when all are.
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                job, answer = waiting.pop(output.request_id), output.outputs[0]
                yield job, Generation(job.index, answer.text, list(answer.token_ids), answer.finish_reason)


def lora_settings(adapters: dict[str, str]) -> dict[str, Any]:
    if not adapters:
        return {}
    rank = max(_lora_rank(folder) for folder in adapters.values())
    return {
        "enable_lora": True,
        "max_lora_rank": next(size for size in LORA_RANKS if size >= rank),
        # One slot more than adapters: vLLM's CPU kernels (0.32) read index -1, "no adapter", as the last slot. If an
        # adapter were there, the base model would silently answer with it.
        "max_loras": len(adapters) + 1,
    }


def _lora_rank(folder: str) -> int:
    try:
        rank = int(json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}/adapter_config.json has no rank `r`: name the folder of a LoRA adapter.") from error
    if rank > LORA_RANKS[-1]:
        raise UserError(
            f"{folder} has LoRA rank {rank}, above vLLM's limit of {LORA_RANKS[-1]}: merge it into the model first."
        )
    return rank


def _generate_on_replicas(settings: Settings, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
    """Independent copies of the model, each with its share of the devices and of the jobs."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shares = [jobs[rank :: settings.data_parallel] for rank in range(settings.data_parallel)]
    replicas = [
        context.Process(target=_replica, args=(settings, rank, share, results)) for rank, share in enumerate(shares)
    ]
    for process in replicas:
        process.start()
    try:
        running = len(replicas)
        while running:
            try:
                item = results.get(timeout=5)
            except queue.Empty:
                item = _died(replicas)
                if item is None:
                    continue
            if isinstance(item, str):
                raise UserError(f"A replica of vLLM failed ({item}): see its output above; {RESUME}.")
            if item == FINISHED:
                running -= 1
            else:
                yield item
    finally:
        for process in replicas:
            process.terminate()
            process.join()


def _replica(settings: Settings, rank: int, jobs: list[Job], results: Any) -> None:
    _take_share_of_devices(rank, settings.data_parallel, settings.tensor_parallel)
    try:
        for item in ask_vllm(load_vllm(settings), settings, jobs) if jobs else ():
            results.put(item)
        results.put(FINISHED)
    except Exception as error:  # the parent reports it
        results.put(f"{type(error).__name__}: {error}")


def _died(replicas: list[Any]) -> str | None:
    """The exit code of a replica that ended without a message, such as one killed for its memory; None if all run."""
    return next((f"exit code {process.exitcode}" for process in replicas if process.exitcode), None)


def _take_share_of_devices(rank: int, replicas: int, per_replica: int) -> None:
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
        share = devices[rank * per_replica : (rank + 1) * per_replica]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(share)
    else:
        cores = sorted(os.sched_getaffinity(0))
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[rank::replicas]))
