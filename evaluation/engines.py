"""What produces the answers: vLLM in process, an OpenAI-compatible server, or transformers.

Every engine takes jobs and yields each answer as soon as it is finished, so that the caller can keep it at once.
Sampling is greedy unless asked otherwise, and the repetition penalty is always sent: vLLM would take a model's
generation_config.json for it otherwise, and a penalty there hides the very degeneration that is to be measured.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from generations import Generation
from questions import UserError


@dataclass(frozen=True)
class Sampling:
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 1024
    seed: int = 0


Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Job:
    """One problem for one model: `run` is the name of the adapter, or `base`."""

    run: str
    index: int
    messages: Chat


@dataclass(frozen=True)
class Settings:
    """What the engines need to know; each uses its part."""

    model: str
    adapters: dict[str, str]
    sampling: Sampling
    dtype: str = "auto"
    tensor_parallel: int = 1
    data_parallel: int = 1
    max_model_len: int | None = None
    batch_size: int = 16
    base_url: str = "http://127.0.0.1:8000/v1"
    concurrency: int = 64


class Engine(Protocol):
    def check(self, chats: list[Chat]) -> None:
        """Refuse, with a UserError, what could not be answered, before anything is loaded or written."""

    def versions(self) -> dict[str, str]:
        """What the answers depend on, for the manifest."""

    def generate(self, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
        """Each job with its answer, in the order in which they are finished."""


def make_engine(name: str, settings: Settings) -> Engine:
    """The engine by name; nothing is loaded before `generate`."""
    engines: dict[str, Callable[[Settings], Engine]] = {
        "vllm": VllmEngine,
        "openai": OpenAIEngine,
        "hf": TransformersEngine,
    }
    return engines[name](settings)


def check_chats(chats: list[Chat], settings: Settings) -> None:
    """Refuse a model without chat template, or with a context too short for a prompt.

    Raises:
        UserError: with the key to change.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(settings.model)
    if tokenizer.chat_template is None:
        raise UserError(f"{settings.model} has no chat template: add a chat_template.jinja to its folder.")
    config = AutoConfig.from_pretrained(settings.model).get_text_config()
    context = settings.max_model_len or config.max_position_embeddings
    for number, chat in enumerate(chats):
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) >= context:
            raise UserError(
                f"The prompt of problem {number} has {len(ids)} tokens, the context {context}: raise "
                "--max-model-len, or leave that problem out of the data."
            )


# --- vLLM ------------------------------------------------------------------------------------------------------------

FINISHED = ()  # what a replica sends last
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM can be configured for


class VllmEngine:
    """vLLM in this process: one load, every problem queued at once, answers taken as the scheduler finishes them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _set_vllm_defaults()

    def check(self, chats: list[Chat]) -> None:
        check_chats(chats, self.settings)
        _lora_settings(self.settings.adapters)

    def versions(self) -> dict[str, str]:
        try:
            import vllm
        except ImportError as error:
            raise UserError(f"vLLM does not import ({error}): run `make eval-env`, or choose --engine hf.") from error
        return {"vllm": vllm.__version__, **_versions("torch", "transformers")}

    def generate(self, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
        if self.settings.data_parallel > 1:
            yield from _generate_on_replicas(self.settings, jobs)
        else:
            yield from _generate_with_vllm(self.settings, jobs)


def _set_vllm_defaults() -> None:
    """Without a GPU: one process and every core; vLLM would keep one core to itself and start for a minute."""
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


def _generate_with_vllm(settings: Settings, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
    yield from ask_vllm(load_vllm(settings), settings, jobs)


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
        **_lora_settings(settings.adapters),
    )


def vllm_sampling(sampling: Sampling) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
    )


def ask_vllm(llm: Any, settings: Settings, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
    """Queue every job at once and yield each answer when the scheduler has finished it."""
    from vllm.lora.request import LoRARequest

    adapters = {
        name: LoRARequest(name, number, folder) for number, (name, folder) in enumerate(settings.adapters.items(), 1)
    }
    ids = llm.enqueue_chat(
        [job.messages for job in jobs],
        vllm_sampling(settings.sampling),
        use_tqdm=False,
        lora_request=[adapters.get(job.run) for job in jobs] if adapters else None,
    )
    # vLLM queues under `N-random` and reports under `N`.
    waiting = {queued.partition("-")[0]: job for queued, job in zip(ids, jobs, strict=True)}
    # What LLM.chat does inside, but each answer is handed on when it is finished and not when all are.
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                job, answer = waiting.pop(output.request_id), output.outputs[0]
                yield job, Generation(job.index, answer.text, list(answer.token_ids), answer.finish_reason)


def _lora_settings(adapters: dict[str, str]) -> dict[str, Any]:
    if not adapters:
        return {}
    rank = max(_lora_rank(folder) for folder in adapters.values())
    return {
        "enable_lora": True,
        "max_lora_rank": next(size for size in LORA_RANKS if size >= rank),
        # One slot more than adapters: vLLM's CPU kernels (0.32) take index -1, "no adapter", for the last slot, so the
        # base model would silently answer with the last adapter if that slot were taken.
        "max_loras": len(adapters) + 1,
    }


def _lora_rank(folder: str) -> int:
    rank = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    if rank > LORA_RANKS[-1]:
        raise UserError(f"{folder} has LoRA rank {rank}, above vLLM's {LORA_RANKS[-1]}: merge it into the model first.")
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
                raise UserError(f"A replica failed ({item}): what was answered is kept; the same command goes on.")
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
        for item in _generate_with_vllm(settings, jobs) if jobs else ():
            results.put(item)
        results.put(FINISHED)
    except Exception as error:  # the parent reports it
        results.put(f"{type(error).__name__}: {error}")


def _died(replicas: list[Any]) -> str | None:
    """What to report of a replica that ended without a word, such as one killed for its memory."""
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


# --- an OpenAI-compatible server --------------------------------------------------------------------------------------


class OpenAIEngine:
    """Any server with the chat API, such as `vllm serve`; adapters are models that it serves by their names."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, chats: list[Chat]) -> None:
        """The server knows its model's context and template, and says so."""

    def versions(self) -> dict[str, str]:
        from openai import OpenAIError

        try:
            served = [model.id for model in self._client().models.list()]
        except OpenAIError as error:
            raise UserError(
                f"The server at {self.settings.base_url} does not answer ({error}): start it, or change --base-url."
            ) from error
        for name in (self.settings.model, *self.settings.adapters):
            if name not in served:
                raise UserError(f"The server serves {', '.join(served)}, not {name}: write one of these.")
        return _versions("openai")

    def _client(self) -> Any:
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY", "none")
        return OpenAI(base_url=self.settings.base_url, api_key=key, max_retries=5, timeout=3600)

    def generate(self, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
        from openai import OpenAIError

        client = self._client()  # retries with exponential back-off by itself
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = {pool.submit(self._ask, client, job): job for job in jobs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except OpenAIError as error:
                pool.shutdown(cancel_futures=True)
                raise UserError(
                    f"The server at {self.settings.base_url} failed ({error}): what it answered is kept, and the same "
                    "command goes on from there."
                ) from error

    def _ask(self, client: Any, job: Job) -> Generation:
        sampling = self.settings.sampling
        answer = client.chat.completions.create(
            model=job.run if job.run in self.settings.adapters else self.settings.model,
            messages=job.messages,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            extra_body={"repetition_penalty": sampling.repetition_penalty, "return_token_ids": True},
        ).choices[0]
        ids = getattr(answer, "token_ids", None)
        return Generation(job.index, answer.message.content or "", ids, answer.finish_reason)


# --- transformers -----------------------------------------------------------------------------------------------------


class TransformersEngine:
    """transformers, in left-padded batches of prompts of similar length: for machines without vLLM."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, chats: list[Chat]) -> None:
        check_chats(chats, self.settings)

    def versions(self) -> dict[str, str]:
        return _versions("torch", "transformers", *(["peft"] if self.settings.adapters else []))

    def generate(self, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

        set_seed(self.settings.sampling.seed)
        dtype = self.settings.dtype if self.settings.dtype == "auto" else getattr(torch, self.settings.dtype)
        tokenizer: Any = AutoTokenizer.from_pretrained(self.settings.model, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model: Any = AutoModelForCausalLM.from_pretrained(self.settings.model, dtype=dtype)
        if self.settings.adapters:
            model = _with_adapters(model, self.settings.adapters)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

        for run in dict.fromkeys(job.run for job in jobs):
            if run in self.settings.adapters:
                model.set_adapter(run)
            base_only = bool(self.settings.adapters) and run not in self.settings.adapters
            for batch in _batches([job for job in jobs if job.run == run], self.settings.batch_size):
                with torch.inference_mode(), model.disable_adapter() if base_only else torch.inference_mode():
                    yield from zip(batch, self._answer(model, tokenizer, batch), strict=True)

    def _answer(self, model: Any, tokenizer: Any, batch: list[Job]) -> list[Generation]:
        sampling = self.settings.sampling
        inputs = tokenizer.apply_chat_template(
            [job.messages for job in batch],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(model.device)
        greedy = sampling.temperature == 0
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=not greedy,
            temperature=None if greedy else sampling.temperature,
            top_p=None if greedy else sampling.top_p,
            top_k=None if greedy else 0,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=sampling.max_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        ends = model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [_generation(job.index, row, ends, tokenizer) for job, row in zip(batch, rows, strict=True)]


def _generation(index: int, row: list[int], ends: set[int], tokenizer: Any) -> Generation:
    """A row of a batch up to and with its end token, which batching pads beyond."""
    end = next((position for position, token in enumerate(row) if token in ends), None)
    ids = row if end is None else row[: end + 1]
    return Generation(index, tokenizer.decode(ids, skip_special_tokens=True), ids, "length" if end is None else "stop")


def _with_adapters(model: Any, adapters: dict[str, str]) -> Any:
    from peft import PeftModel

    (first, folder), *others = adapters.items()
    model = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, adapter_name=name)
    return model


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Prompts of similar length together: less padding."""
    jobs = sorted(jobs, key=lambda job: sum(len(message["content"]) for message in job.messages))
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def _versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}
