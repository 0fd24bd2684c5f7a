"""transformers, for machines without vLLM."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

from engines import Chat, Job, Settings, check_chats, package_versions
from generations import Generation


class TransformersEngine:
    """transformers, in left-padded batches of prompts of similar length: for machines without vLLM."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, chats: list[Chat]) -> None:
        check_chats(chats, self.settings)

    def versions(self) -> dict[str, str]:
        return package_versions("torch", "transformers", *(["peft"] if self.settings.adapters else []))

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
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
                model.set_adapter(_module_name(self.settings.adapters, run))
            base_only = bool(self.settings.adapters) and run not in self.settings.adapters
            for batch in _batches([job for job in jobs if job.run == run], self.settings.batch_size):
                # Nothing is handed over inside: what reads the answers would run in these modes, too.
                with torch.inference_mode(), model.disable_adapter() if base_only else nullcontext():
                    answers = self._answer(model, tokenizer, batch)
                yield from zip(batch, answers, strict=True)

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

    first, *others = adapters
    model = PeftModel.from_pretrained(model, adapters[first], adapter_name=_module_name(adapters, first))
    for run in others:
        model.load_adapter(adapters[run], adapter_name=_module_name(adapters, run))
    return model


def _module_name(adapters: dict[str, str], run: str) -> str:
    """What PEFT calls a run's adapter: names of runs may hold dots, as in `beta0.1`, which those of modules may not."""
    return f"adapter_{list(adapters).index(run)}"


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Prompts of similar length together: less padding."""
    jobs = sorted(jobs, key=lambda job: sum(len(message["content"]) for message in job.messages))
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]
