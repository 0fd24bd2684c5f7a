"""Score a model on problems: greedy answers, read strictly (behind the marker) and flexibly (the last number)."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from llamafactory_ext.pairs import ANSWER_MARKER, PROMPT, Problem

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
BATCH = 8
MAX_NEW_TOKENS = 128


def marked_answer(text: str) -> Decimal | None:
    """The first number behind the last `So the answer is:`, or None."""
    _, marker, rest = text.rpartition(ANSWER_MARKER.strip())
    found = _NUMBER.search(rest) if marker else None
    return _decimal(found.group()) if found else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text, or None."""
    found = _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def score(model_folder: Path, problems: list[Problem], on_batch: Callable[[int], None]) -> dict[str, float]:
    """Answer every problem greedily.

    Args:
        model_folder: a Hugging Face folder with model and tokenizer.
        problems: what to ask; their answers are numbers.
        on_batch: called with the number of problems just answered.

    Returns:
        Shares of all problems: `strict` (the marked answer is right), `flexible` (the last number is right) and
        `marked` (there is a marked answer at all).
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device).eval()

    answers: list[str] = []
    for start in range(0, len(problems), BATCH):
        chats = [[{"role": "user", "content": PROMPT + p.question}] for p in problems[start : start + BATCH]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        on_batch(len(chats))

    def share(holds: Callable[[str, Decimal], bool]) -> float:
        return sum(holds(text, _decimal(p.answer)) for text, p in zip(answers, problems, strict=True)) / len(problems)

    return {
        "strict": share(lambda text, answer: marked_answer(text) == answer),
        "flexible": share(lambda text, answer: last_number(text) == answer),
        "marked": share(lambda text, answer: marked_answer(text) is not None),
    }
