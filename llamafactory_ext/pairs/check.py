"""What a recipe's pairs are like, as LLaMA-Factory will tokenize and cut them: found before the GPUs burn."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..recipe import UNCUT, Settings, data_sets, parse_recipe
from .contamination import TestSet

if TYPE_CHECKING:
    import numpy as np

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)

# What is measured of each pair.
FLAGS = ("empty", "identical", "identical_cut", "truncated", "same_question", "similar_question")
COUNTS = ("prompt", "chosen", "rejected", "longer", "stock", "common")


@dataclass(frozen=True)
class Report:
    """What was found.

    Args:
        pairs: how many pairs the recipe's data sets hold.
        problems: what spoils a training, as name -> number of pairs.
        notes: what is worth knowing, as name -> number of pairs.
        tokens: of the prompt, each answer and the longer sequence, before truncation: name -> percentiles.
        stock_tokens: tokens per pair as LLaMA-Factory lays them out, after truncation (mean).
        shared_tokens: the same with the common prefix of prompt and answers only once (mean).
        cutoff_len: where sequences are cut.
        template: how the training's prompts differ from those of the tokenizer's own chat template; empty if they
            are the same.
    """

    pairs: int
    problems: dict[str, int]
    notes: dict[str, int]
    tokens: dict[str, list[int]]
    stock_tokens: float
    shared_tokens: float
    cutoff_len: int
    template: str

    @property
    def found_problems(self) -> bool:
        return self.pairs == 0 or any(self.problems.values())


def check_pairs(settings: Settings, test_set: TestSet | None = None) -> Report:
    """Load, tokenize and cut the pairs of a recipe exactly as its training will, and look at them.

    Args:
        settings: a recipe for stage dpo; its data, model (the tokenizer), template and cutoff_len are used.
        test_set: questions that the training must not have seen.

    Raises:
        UserError: if the recipe is wrong, or the tokenizer or the data cannot be loaded.
    """
    import datasets

    if settings.get("stage", "dpo") not in ("dpo", "rm"):
        raise UserError(f"stage {settings['stage']!r} does not train on pairs: check a recipe with `stage: dpo`.")
    model_args, data_args, _ = parse_recipe({"stage": "dpo", **settings})
    if data_args.dataset is None:
        raise UserError("the recipe names no data set: write `dataset:` and `dataset_dir:`.")
    data_args.streaming = False

    tokenizer, template, own_template = tokenizer_and_template(model_args, data_args)
    pairs = load_pairs(model_args, data_args)
    difference = _template_difference(pairs, template, tokenizer, own_template)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    measures = pairs.map(
        _Measure(template, tokenizer, data_args, test_set),
        remove_columns=pairs.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=False,
        desc="checking",
    )
    return _report(measures, data_args.cutoff_len, difference)


# --- loading, by LLaMA-Factory's own functions -----------------------------------------------------------------------


def tokenizer_and_template(model_args: Any, data_args: Any) -> tuple[Any, Any, str | None]:
    """The tokenizer, LLaMA-Factory's template, and the chat template that the tokenizer came with.

    Raises:
        UserError: if the tokenizer cannot be loaded, or there is no such template.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer

    try:
        tokenizer = load_tokenizer(model_args)["tokenizer"]
        own_template = tokenizer.chat_template
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the tokenizer of {model_args.model_name_or_path!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return tokenizer, template, own_template


def load_pairs(model_args: Any, data_args: Any) -> Any:
    """The pairs of the recipe's data sets in LLaMA-Factory's standard format, none skipped yet.

    Raises:
        UserError: if they cannot be loaded.
    """
    from llamafactory.data.loader import _get_merged_dataset
    from transformers import TrainingArguments

    data_sets(data_args.dataset, data_args.dataset_dir)
    training_args = TrainingArguments(output_dir="unused", report_to="none", use_cpu=True)
    try:
        return _get_merged_dataset(data_args.dataset, model_args, data_args, training_args, stage="rm")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the data sets {data_args.dataset} cannot be loaded: {error}") from error


def _template_difference(pairs: Any, template: Any, tokenizer: Any, own_template: str | None) -> str:
    """Where the first prompts part from what the tokenizer's own chat template makes of them, or an empty text."""
    if own_template is None:
        return ""  # LLaMA-Factory saves its own with the model then
    for row in pairs.select(range(min(8, len(pairs)))):
        if len(row["_prompt"]) % 2 == 0 or not row["_response"]:  # LLaMA-Factory skips it
            continue
        system = [{"role": "system", "content": row["_system"]}] if row["_system"] else []
        own = tokenizer.apply_chat_template(
            system + row["_prompt"], chat_template=own_template, add_generation_prompt=True, return_dict=False
        )
        ours, _ = template.encode_oneturn(tokenizer, row["_prompt"] + row["_response"][:1], row["_system"], "")
        if ours != own:
            at = common_prefix(ours, own)
            start = max(0, at - 8)
            return (
                f"training: …{tokenizer.decode(ours[start : at + 12])!r}… "
                f"chat template: …{tokenizer.decode(own[start : at + 12])!r}…"
            )
    return ""


# --- looking at pairs ------------------------------------------------------------------------------------------------


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with in common."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


class _Measure:
    """Maps a pair in LLaMA-Factory's standard format to what `_report` counts; picklable, for several processes."""

    def __init__(self, template: Any, tokenizer: Any, data_args: Any, test_set: TestSet | None) -> None:
        from llamafactory.data.processor import PairwiseDatasetProcessor

        def processor(data_args: Any) -> Any:
            return PairwiseDatasetProcessor(template, tokenizer, processor=None, data_args=data_args)

        self.cut, self.whole = processor(data_args), processor(replace(data_args, cutoff_len=UNCUT))
        self.test_set = test_set

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        batch = {name: [value] for name, value in row.items()}
        encoded = self.whole.preprocess_dataset(batch)
        if not encoded:
            return dict.fromkeys(FLAGS, False) | dict.fromkeys(COUNTS, 0) | {"valid": False, "pair": "", "question": ""}

        prompt = _count_prompt(encoded["chosen_labels"][0])
        chosen, rejected = encoded["chosen_input_ids"][0], encoded["rejected_input_ids"][0]
        longer = max(len(chosen), len(rejected))
        # What fits is not cut, and most pairs fit: tokenizing them again would double the time.
        cut = self.cut.preprocess_dataset(batch) if longer > self.cut.data_args.cutoff_len else encoded
        cut_chosen, cut_rejected = cut["chosen_input_ids"][0], cut["rejected_input_ids"][0]
        said = [response["content"] for response in row["_response"]]
        question = "\n".join(turn["content"] for turn in row["_prompt"] if turn["role"] == "user")
        overlap = self.test_set.overlap(question) if self.test_set else ""
        return {
            "valid": True,
            "pair": _digest(str(row["_prompt"]), row["_system"], *said),
            "question": _digest(str(row["_prompt"]), row["_system"]),
            "empty": not all(text.strip() for text in said),
            "identical": said[0] == said[1],
            "identical_cut": said[0] != said[1] and cut_chosen == cut_rejected,
            "truncated": len(cut_chosen) < len(chosen) or len(cut_rejected) < len(rejected),
            "prompt": prompt,
            "chosen": len(chosen) - prompt,
            "rejected": len(rejected) - prompt,
            "longer": longer,
            "stock": len(cut_chosen) + len(cut_rejected),
            "common": common_prefix(cut_chosen, cut_rejected),
            "same_question": overlap == "same",
            "similar_question": overlap == "similar",
        }


def _count_prompt(labels: Sequence[int]) -> int:
    from llamafactory.extras.constants import IGNORE_INDEX

    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=12).hexdigest()


def _report(measures: Any, cutoff_len: int, template: str) -> Report:
    import numpy as np

    valid = np.array(measures["valid"], dtype=bool)
    columns = {name: np.array(measures[name])[valid] for name in (*FLAGS, *COUNTS)}
    pairs, questions = (np.array(measures[name])[valid] for name in ("pair", "question"))
    copies = len(pairs) - len(set(pairs.tolist()))
    stock, common = columns["stock"], columns["common"]
    return Report(
        pairs=int(valid.sum()),
        problems={
            "rows that LLaMA-Factory skips": int((~valid).sum()),
            "an empty side": int(columns["empty"].sum()),
            "identical sides": int(columns["identical"].sum()),
            f"identical after truncation at cutoff_len {cutoff_len}": int(columns["identical_cut"].sum()),
            "the question is in the test set": int(columns["same_question"].sum()),
        },
        notes={
            "copies of another pair": copies,
            "further pairs for a question": len(questions) - len(set(questions.tolist())) - copies,
            f"truncated at cutoff_len {cutoff_len}": int(columns["truncated"].sum()),
            "13 words in common with a test question": int(columns["similar_question"].sum()),
        },
        tokens={name: _percentiles(columns[name]) for name in ("prompt", "chosen", "rejected", "longer")},
        stock_tokens=float(stock.mean()) if len(stock) else 0.0,
        shared_tokens=float((stock - common).mean()) if len(stock) else 0.0,
        cutoff_len=cutoff_len,
        template=template,
    )


def _percentiles(values: np.ndarray) -> list[int]:
    import numpy as np

    if not len(values):
        return []
    return [int(value) for value in np.percentile(values, PERCENTILES, method="higher")]


# --- showing ---------------------------------------------------------------------------------------------------------


def render(report: Report) -> Iterable[Any]:
    """The report as rich tables and lines."""
    from rich.markup import escape
    from rich.table import Table

    found = Table("found", "pairs", "share", title=f"{report.pairs:,} pairs", title_justify="left")
    for style, entries in (("red", report.problems), ("yellow", report.notes)):
        for name, count in entries.items():
            share = f"{count / report.pairs:.1%}" if report.pairs else ""
            found.add_row(name, f"{count:,}", share, style=style if count else None)
    yield found

    if report.pairs:
        tokens = Table(title="tokens before truncation, percentiles", title_justify="left")
        for heading in ("", *(f"{p}%" for p in PERCENTILES)):
            tokens.add_column(heading, justify="right" if heading else "left")
        names = {"longer": "prompt and longer answer"}
        for name, values in report.tokens.items():
            tokens.add_row(names.get(name, name), *(f"{value:,}" for value in values))
        yield tokens
        saved = 1 - report.shared_tokens / report.stock_tokens
        yield (
            f"{report.stock_tokens:,.0f} tokens a pair, {report.shared_tokens:,.0f} without the common prefix twice "
            f"({saved:.0%} less)"
        )
    if report.template:
        yield "[yellow]The prompts are not those of the tokenizer's chat template, which evaluations use:"
        yield escape(report.template)
