"""Questions for the engines of evaluation/, and what they answer."""

from __future__ import annotations

import importlib.util

import pytest

from llamafactory_ext.evaluation.engines import Job, Sampling, Settings

QUESTIONS = ["How many?", "Tom has 3 pens and buys 4 more pens at the market. How many pens has he?", "1 + 1?"]


def jobs(*runs: str) -> list[Job]:
    return [
        Job(run, index, [{"role": "user", "content": text}])
        for run in runs or ("base",)
        for index, text in enumerate(QUESTIONS)
    ]


def settings(model, **changes) -> Settings:
    return Settings(**{"model": str(model), "adapters": {}, "sampling": Sampling(max_tokens=12), **changes})


def answers(engine, asked) -> dict[tuple[str, int], str]:
    return {(job.run, job.index): generation.text for job, generation in engine.generate(asked)}


def tokens(engine, asked) -> dict[tuple[str, int], list[int]]:
    """Where texts cannot be compared: vLLM leaves out the bytes of a last, unfinished character."""
    return {(job.run, job.index): generation.token_ids for job, generation in engine.generate(asked)}


needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM has an environment of its own: make test-eval"
)
