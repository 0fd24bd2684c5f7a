"""Several answers to a prompt as one tree, against the same pairs as rows of their own: pairs a second, and tokens.

    python benchmarks/answers.py --model outputs/SmolLM2-135M-Instruct --data data/gsm8k_pairs.jsonl

Both sides are the plugin's, with shared prefixes and known reference log-probabilities. Timed are the forward and the
backward pass of DPO's loss over all pairs of a prompt: the optimizer's step comes on top, and costs both the same per
prompt. The pairs go through the model one by one or several at once, whichever is faster. All take turns.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from llamafactory_ext.training.attention import accept_prefix_trees
from llamafactory_ext.training.layout import shared_prefix
from llamafactory_ext.training.logps import response_logps
from llamafactory_ext.training.ranking import Ranking

Response = tuple[list[int], list[int]]
MODEL, DATA = Path("outputs/SmolLM2-135M-Instruct"), Path("data/gsm8k_pairs.jsonl")
BETA = 0.1
AT_ONCE = 6  # pairs
HALF = "differ after half of the response"
PROMPT = "share the prompt only"


def main(
    model: Annotated[Path, typer.Option(exists=True, help="A small model's folder (make model).")] = MODEL,
    data: Annotated[Path, typer.Option(exists=True, help="Pairs, as `llamafactory-ext data corrupt` writes.")] = DATA,
    answers: Annotated[list[int] | None, typer.Option(min=2, help="Answers to a prompt.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each kind.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 2,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    accept_prefix_trees(policy)
    with data.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    table = Table(
        "answers",
        "answers that",
        "pairs",
        "tokens",
        "of pairs",
        "ratio",
        "pairs/s",
        "of pairs",
        "ratio",
        title=f"{model.name}, float32, {torch.get_num_threads()} threads; {prompts} prompts, {rounds} rounds, medians",
    )
    for kind, count in itertools.product((PROMPT, HALF), answers or [2, 4, 8]):
        groups = [responses_of(rows, number, count, kind, tokenizer) for number in range(prompts)]
        measured = measure(policy, groups, rounds)
        pairs = prompts * count * (count - 1) // 2
        rates = [pairs / seconds for seconds in measured["seconds"]]
        tokens = measured["tokens"]
        table.add_row(
            str(count),
            kind,
            str(pairs),
            *(f"{value / prompts:,.0f}" for value in tokens),
            f"{tokens[1] / tokens[0]:.2f}",
            *(f"{rate:.2f}" for rate in rates),
            f"{rates[0] / rates[1]:.2f}",
        )
    Console(width=120).print(table)


def responses_of(rows: Sequence[dict[str, str]], number: int, count: int, kind: str, tokenizer: Any) -> list[Response]:
    """A problem's prompt with its solution and those of the next problems, cut to its length.

    They follow the prompt at once, or after half of the solution.
    """
    row = rows[number]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["instruction"]}], add_generation_prompt=True, return_dict=False
    )
    own = tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
    begin = own[: len(own) // 2] if kind == HALF else []
    found = []
    for other in range(count):
        text = rows[(number + 7 * other) % len(rows)]["chosen"]
        said = tokenizer(text, add_special_tokens=False)["input_ids"]
        said = begin + (said * 8)[: len(own) - len(begin)] if other else own
        found.append((prompt + said, [-100] * len(prompt) + said))
    return found


def measure(policy: torch.nn.Module, groups: Sequence[Sequence[Response]], rounds: int) -> dict[str, list[float]]:
    """Seconds for all prompts and tokens in the model's rows, as one tree each and as pairs."""
    layouts = {
        "tree": [[layout_of(responses)] for responses in groups],
        "one by one": [[layout_of(pair) for pair in itertools.combinations(responses, 2)] for responses in groups],
        "several": [
            [layout_of(*part) for part in parts(list(itertools.combinations(responses, 2)))] for responses in groups
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for turn in range(rounds + 1):
        for name, of_groups in layouts.items():
            taken = timed(lambda of_groups=of_groups: [train(policy, each) for each in of_groups])
            if turn:  # the first warms up
                seconds[name].append(taken)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = {
        name: sum(each.inputs["input_ids"].numel() for group in of_groups for each in group)
        for name, of_groups in layouts.items()
    }
    return {
        "seconds": [medians["tree"], min(medians["one by one"], medians["several"])],
        "tokens": [tokens["tree"], tokens["several"]],
    }


def parts(pairs: list[Any]) -> list[list[Any]]:
    return [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]


def layout_of(*groups: Sequence[Response]) -> Any:
    """Groups of responses, each better than the next, in one row."""
    responses = [response for group in groups for response in group]
    length = max(len(ids) for ids, _ in responses)
    columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in responses:
        fill = length - len(ids)
        columns["input_ids"].append(ids + [0] * fill)
        columns["attention_mask"].append([1] * len(ids) + [0] * fill)
        columns["labels"].append(labels + [-100] * fill)
    sizes = [len(group) for group in groups]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    pairs = [
        pair
        for start, size in zip(starts, sizes, strict=True)
        for pair in itertools.combinations(range(start, start + size), 2)
    ]
    ranking = Ranking(tuple(sizes), tuple(pairs), (1.0,) * len(pairs))
    return shared_prefix({name: torch.tensor(values) for name, values in columns.items()}, ranking=ranking)


def train(policy: torch.nn.Module, layouts: Sequence[Any]) -> None:
    """The gradient of DPO's loss, whose reference is the policy itself as it is."""
    for layout in layouts:
        logps = response_logps(policy, layout)
        margin = (logps.chosen - logps.chosen.detach()) - (logps.rejected - logps.rejected.detach())
        (-torch.nn.functional.logsigmoid(BETA * margin)).mean().backward()
    policy.zero_grad()


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
