"""The mixes of pairs that `benchmarks/systems.py` trains on, made from pairs of worked solutions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from llamafactory_ext.data.corruption import PROMPT
from llamafactory_ext.errors import UserError
from llamafactory_ext.whole_files import write_whole

Pair = dict[str, str]  # instruction, chosen, rejected

EXAMPLES = 4  # worked solutions before a question
SHORT = 160  # characters of a short response: about 60 tokens


def differ_late(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs themselves: a rejected solution is the chosen one with a number changed."""
    return list(pairs)


def share_prompt(pairs: Sequence[Pair]) -> list[Pair]:
    """Each rejected solution is that of another problem, about as long; the two differ from their first token on."""

    def unrelated(pair: Pair) -> Pair:
        others = [each for each in pairs if each["chosen"][0] != pair["chosen"][0]]
        return min(others, key=lambda each: abs(len(each["chosen"]) - len(pair["chosen"])))

    return [pair | {"rejected": unrelated(pair)["chosen"]} for pair in pairs]


def long_prompt(pairs: Sequence[Pair]) -> list[Pair]:
    """Short solutions after `EXAMPLES` problems that are solved in the prompt, as few-shot data has them."""
    short = [pair for pair in pairs if len(pair["chosen"]) <= SHORT]
    solved = [f"{_question(pair)}\n{pair['chosen']}" for pair in pairs if len(pair["chosen"]) > SHORT]
    # Each prompt has examples of its own: nothing here shares prefixes between pairs.
    shots = [solved[start : start + EXAMPLES] for start in range(0, len(solved) - EXAMPLES + 1, EXAMPLES)]
    return [
        pair | {"instruction": PROMPT + "\n\n".join([*examples, _question(pair)])}
        for pair, examples in zip(short, shots, strict=False)
    ]


def _question(pair: Pair) -> str:
    return pair["instruction"].removeprefix(PROMPT)


MIXES: dict[str, Callable[[Sequence[Pair]], list[Pair]]] = {
    "differ_late": differ_late,
    "share_prompt": share_prompt,
    "long_prompt": long_prompt,
}


def write_mix(source: Path, folder: Path, mix: str, count: int) -> Path:
    """Write the first `count` pairs of a mix to `<folder>/<mix>.jsonl`, a data set of the same name.

    Raises:
        UserError: if the source does not give so many.
    """
    with source.open(encoding="utf-8") as file:
        made = MIXES[mix]([json.loads(line) for line in file])[:count]
    if len(made) < count:
        raise UserError(f"{source} gives {len(made)} pairs of {mix} where {count} are needed: write a smaller --steps.")
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    about = {name: {"file_name": f"{name}.jsonl", "ranking": True, "columns": columns} for name in MIXES}
    write_whole(folder / "dataset_info.json", json.dumps(about, indent=2) + "\n")
    path = folder / f"{mix}.jsonl"
    write_whole(path, "".join(json.dumps(pair) + "\n" for pair in made))
    return path
