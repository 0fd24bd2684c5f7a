"""The engine with transformers, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

from ..errors import UserError, in_a_line
from .chat_templates import Chat, apply_chat_template, check_question_is_read, prompt_ids
from .engines import RESUME, Job, Settings, check_chats, context_of, package_versions, refusal_of
from .generations import Generation
from .models import end_tokens, load_tokenizer


class TransformersEngine:
    """Generates with transformers in left-padded batches of prompts of similar length."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, chats: list[Chat]) -> None:
        check_chats(chats, self.settings, self.tokenizer)
        check_question_is_read(self.tokenizer, chats[0], self.settings.chat_template_kwargs)

    def refusal(self, chat: Chat, number: int) -> str | None:
        return refusal_of(chat, self.settings, self.tokenizer, number)

    @cached_property
    def tokenizer(self) -> Any:
        tokenizer = load_tokenizer(self.settings.model)
        tokenizer.padding_side = "left"
        # Padding is masked: any token will do.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        return tokenizer

    def versions(self) -> dict[str, str]:
        return package_versions("torch", "transformers", *(["peft"] if self.settings.adapters else []))

    def parameters(self) -> dict[str, Any]:
        """What the answers depend on, in the words of transformers' `GenerationConfig`."""
        sampling = self.settings.sampling
        if sampling.temperature == 0:
            return self._greedy()
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return {**self._greedy(), **drawn}

    def _greedy(self) -> dict[str, Any]:
        """The fields of transformers' `GenerationConfig`; others keep their defaults. `_Draw` does the sampling."""
        sampling = self.settings.sampling
        return {
            "do_sample": False,
            "num_beams": 1,
            "repetition_penalty": sampling.repetition_penalty,
            "max_new_tokens": sampling.max_tokens,
            "eos_token_id": end_tokens(self.settings.model, self.tokenizer) or None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    @cached_property
    def model(self) -> Any:
        """The model with its adapters, loaded once for all that is asked."""
        from transformers import GenerationConfig

        # Replaces the model's own, from which `generate` would take all fields that are not set.
        return load_model(self.settings, GenerationConfig(**self._greedy()))

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        import torch
        from transformers import GenerationConfig

        model, fields = self.model, self._greedy()
        for run in dict.fromkeys(job.run for job in jobs):
            for limit, batch in self._batches([job for job in jobs if job.run == run]):
                config = GenerationConfig(**{**fields, "max_new_tokens": limit})
                # No yield inside: the caller would run in these modes, too.
                with torch.inference_mode(), answering_as(model, self.settings.adapters, run):
                    try:
                        answers = self._answer(model, config, batch)
                    except Exception as error:
                        raise UserError(
                            f"transformers failed ({in_a_line(error)}): lower --batch-size or --max-tokens; {RESUME}."
                        ) from error
                yield from zip(batch, answers, strict=True)

    def _batches(self, jobs: list[Job]) -> Iterator[tuple[int, list[Job]]]:
        """Batches of prompts of similar length, for less padding, each with how many tokens an answer may have: those
        of the settings, or what the prompt leaves of the context, as vLLM has it."""
        most, context = self.settings.sampling.max_tokens, context_of(self.settings)
        by_limit: dict[int, list[tuple[int, int, Job]]] = {}
        for number, job in enumerate(jobs):
            length = len(prompt_ids(self.tokenizer, job.messages, self.settings.chat_template_kwargs))
            limit = most if context is None else min(most, context - length)
            by_limit.setdefault(limit, []).append((length, number, job))
        for limit, found in by_limit.items():
            ordered = [job for _, _, job in sorted(found, key=lambda each: each[:2])]
            for start in range(0, len(ordered), self.settings.batch_size):
                yield limit, ordered[start : start + self.settings.batch_size]

    def _answer(self, model: Any, config: Any, batch: list[Job]) -> list[Generation]:
        chats = [job.messages for job in batch]
        arguments = self.settings.chat_template_kwargs
        inputs = apply_chat_template(self.tokenizer, chats, arguments, padding=True, return_tensors="pt")
        inputs = inputs.to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            generation_config=config,
            logits_processor=self._processors(batch, model.device),
        )
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            self._generation(job.index, row, config.eos_token_id or []) for job, row in zip(batch, rows, strict=True)
        ]

    def _processors(self, batch: list[Job], device: Any) -> Any:
        """What makes greedy decoding sample: each answer with its own seed."""
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        sampling = self.settings.sampling
        if sampling.temperature == 0:
            return LogitsProcessorList()
        seeds = [sampling.seed + job.index if job.seed is None else job.seed for job in batch]
        warpers = [TemperatureLogitsWarper(sampling.temperature), TopPLogitsWarper(sampling.top_p)]
        return LogitsProcessorList([*warpers, _Draw(seeds, device)])

    def _generation(self, index: int, row: list[int], ends: list[int]) -> Generation:
        """A row of a batch, up to and including its end token; the rest is padding."""
        end = next((position for position, token in enumerate(row) if token in ends), None)
        ids = row if end is None else row[: end + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Generation(index, text, ids, "length" if end is None else "stop")


class _Draw:
    """Adds noise to the logits, so that the largest is a sample (the Gumbel-max trick, arXiv 1411.0030).

    Each row has a generator of its own. So an answer depends on its seed, not on the batch that it is in.
    """

    def __init__(self, seeds: list[int], device: Any) -> None:
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The logits of the next tokens, shape `(batch, vocabulary)`, with noise."""
        import torch

        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        # log(0) would make a token certain, or not a number where top-p has removed it.
        return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


def load_model(settings: Settings, generation_config: Any) -> Any:
    """A causal language model with all adapters, for inference, on the GPU if there is one.

    Args:
        settings: which model.
        generation_config: transformers' `GenerationConfig`, in place of the model's own.

    Raises:
        UserError: if it cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            settings.model, dtype=dtype, generation_config=generation_config
        )
        if settings.adapters:
            model = _with_adapters(model, settings.adapters)
    except Exception as error:
        said = in_a_line(error)
        raise UserError(f"The model cannot be loaded ({said}): correct --model, --adapter or --dtype.") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def answering_as(model: Any, adapters: dict[str, str], run: str) -> AbstractContextManager[Any]:
    """Within it, the model of `load_model` answers as a run: with its adapter, or without any."""
    if run in adapters:
        model.set_adapter(_module_name(adapters, run))
        return nullcontext()
    return model.disable_adapter() if adapters else nullcontext()


def _with_adapters(model: Any, adapters: dict[str, str]) -> Any:
    from peft import PeftModel

    first, *others = adapters
    model = PeftModel.from_pretrained(model, adapters[first], adapter_name=_module_name(adapters, first))
    for run in others:
        model.load_adapter(adapters[run], adapter_name=_module_name(adapters, run))
    return model


def _module_name(adapters: dict[str, str], run: str) -> str:
    """PEFT's name for a run's adapter: unlike modules, runs may have dots in their names, as in `beta0.1`."""
    return f"adapter_{list(adapters).index(run)}"
