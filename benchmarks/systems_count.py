"""What each system must compute, counted: positions of the policy's passes, and floating-point operations of a step.

The reference's log-probabilities count as known. A ratio of these counts is what a system wins by computing less; what
it wins beyond comes from larger products and less memory traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training_tokens import PairTokens, Result, seen


@dataclass(frozen=True)
class Work:
    """Of a run, per pair.

    Args:
        body: positions that pass through the layers, padding included.
        head: hidden states that the language-model head multiplies.
        operations: floating-point operations of the policy's forward and backward pass.
    """

    body: float
    head: float
    operations: float


def scored(pair: PairTokens, prompt: int, shared: bool) -> int:
    """Tokens of both responses, those that both begin with twice or once."""
    chosen, rejected, prefix = pair
    return chosen + rejected - 2 * prompt - shared * max(prefix - prompt, 0)


def work(system: str, micro_batch: int, prompts: Sequence[int], run: Result, chunk: int) -> Work:
    """Count what a run did; its positions were counted while it ran.

    2 operations per parameter and position forward and 4 backward; in the head 2 more where the backward pass computes
    the logits again. In each layer 12 per hidden unit and (token, token that it sees). Embeddings are only looked up.

    Args:
        prompts: tokens of each pair's prompt.
        chunk: from so many logits in a micro-batch on, the plugin computes them again in the backward pass.
    """
    pairs, body, count = run["pairs"], run["positions"], len(run["pairs"])
    if system in ("stock", "trl"):
        # TRL leaves out the last position of each row, which predicts nothing.
        head = body - 2 * count * (system == "trl")
        again = head if system == "trl" else 0
    else:
        each = [scored(pair, prompt, system == "ours") for pair, prompt in zip(pairs, prompts, strict=True)]
        batches = [sum(each[start : start + micro_batch]) for start in range(0, count, micro_batch)]
        head = sum(batches)
        again = sum(size for size in batches if system != "ours" or size * run["vocabulary"] > chunk)
    in_head = run["vocabulary"] * run["hidden"]
    attention = 12 * run["layers"] * run["hidden"] * sum(seen(pair, shared=system == "ours") for pair in pairs)
    operations = 6 * (run["parameters"] - in_head) * body + in_head * (6 * head + 2 * again) + attention
    return Work(body / count, head / count, operations / count)
