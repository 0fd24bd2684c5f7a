"""Checks a recipe's pairs, tokenized and truncated as in training, before you spend GPU time."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UserError, in_a_line
from ..recipe.loading import Tokenization, load_pairs, load_tokenization
from ..recipe.reading import UNCUT, Settings, data_sets, parse_recipe
from .contamination import CHARACTERS, NGRAM, TestSet

if TYPE_CHECKING:
    import numpy as np

TRAINING, EVALUATION = "dataset", "eval_dataset"  # the keys of a recipe that name pairs
PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
FIRST_ROWS = 5  # shown of each problem and note

# What is measured for each pair.
FLAGS = ("empty", "identical", "identical_cut", "truncated", "same_question", "similar_question")
COUNTS = ("prompt", "chosen", "rejected", "longer", "augmented", "stock", "common")
SAME = "the question is in the test set"
SIMILAR = f"{NGRAM} words or {CHARACTERS} characters in common with a test question"
SKIPPED, STOPS = NO_PAIRS = ("rows that LLaMA-Factory skips", "rows at which the training stops")
NOT_MEASURED = {**dict.fromkeys(FLAGS, False), **dict.fromkeys(COUNTS, 0), "pair": "", "question": ""}


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Args:
        pairs: number of pairs that LLaMA-Factory trains on.
        problems: what spoils or stops a training, as name -> number of rows.
        notes: what is worth knowing, as name -> number of rows.
        first_rows: name of a problem or note -> the numbers of its first rows, counted from 1 through the recipe's data
            sets as LLaMA-Factory loads them.
        tokens: name -> PERCENTILES of the tokens before truncation: of the prompt, each response, and the prompt with
            the longer response; with a refinement term, also of the longer augmented sequence, after truncation.
        stock_tokens: mean tokens per pair after truncation in LLaMA-Factory's layout, with the augmented pair.
        shared_tokens: the same with prefix sharing, which computes the common prefix of a pair once.
        cutoff_len: tokens at which sequences are truncated.
        template: how the training's prompts differ from the tokenizer's own chat template; empty if they do not.
        stop: the first row at which a training would stop, and why; empty if there is none.
    """

    pairs: int
    problems: dict[str, int]
    notes: dict[str, int]
    first_rows: dict[str, list[int]]
    tokens: dict[str, list[int]]
    stock_tokens: float
    shared_tokens: float
    cutoff_len: int
    template: str
    stop: str

    @property
    def found_problems(self) -> bool:
        """Whether there are no pairs, or any problems."""
        return self.pairs == 0 or any(self.problems.values())


def check_pairs(settings: Settings, test_set: TestSet | None = None, key: str = TRAINING) -> Report:
    """Load, tokenize and truncate a recipe's pairs exactly as in training, and check them.

    Args:
        settings: a recipe with `stage: dpo` or `rm`; its data, tokenizer, template and cutoff_len are used.
        test_set: questions that must not occur in the pairs.
        key: which pairs: the recipe's `dataset` or `eval_dataset`.

    Raises:
        UserError: if the recipe is wrong, the tokenizer or the data cannot be loaded, or a column that the recipe names
            is missing or holds no number.
    """
    import datasets

    from ..training.loading import loaded_as_trained

    if settings.get("stage", "dpo") not in ("dpo", "rm"):
        raise UserError(f"stage {settings['stage']!r} does not train on pairs: write `stage: dpo` or `stage: rm`.")
    model_args, data_args, finetuning_args = parse_recipe({"stage": "dpo", **settings})
    data_args.dataset = getattr(data_args, key)
    if data_args.dataset is None:
        raise UserError(f"the recipe names no data set: write `{key}` and `dataset_dir`.")
    data_args.streaming = False

    tools = load_tokenization(model_args, data_args)
    is_dpo = settings.get("stage", "dpo") == "dpo"
    if not is_dpo and any(
        getattr(each, "answers", None) for each in data_sets(data_args.dataset, data_args.dataset_dir)
    ):
        raise UserError("a data set has a column of `answers` in dataset_info.json, which only `stage: dpo` takes.")
    with loaded_as_trained(finetuning_args) if is_dpo else nullcontext():
        pairs = load_pairs(model_args, data_args)
    difference = _template_difference(pairs, tools)
    sr_prompt = finetuning_args.refinement_prompt if is_dpo else None
    context = _context(model_args) if sr_prompt is not None else None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    measures = pairs.map(
        _Measure(tools, data_args, test_set, sr_prompt, context, is_dpo and finetuning_args.ld_alpha is not None),
        with_indices=True,
        remove_columns=pairs.column_names,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=False,
        desc="checking",
    )
    return _report(measures, data_args.cutoff_len, difference, has_test_set=test_set is not None)


def _context(model_args: Any) -> int | None:
    from ..training.refinement import model_context

    try:
        return model_context(model_args)
    except Exception as error:  # whatever transformers raises
        name = model_args.model_name_or_path
        raise UserError(f"the configuration of {name!r} cannot be read: {in_a_line(error)}") from error


# --- looking at templates --------------------------------------------------------------------------------------------

MEDIA = ("_images", "_videos", "_audios")


def _template_difference(pairs: Any, tools: Tokenization) -> str:
    """The first difference between the first prompts and the tokenizer's own chat template; empty if there is none."""
    if tools.chat_template is None:
        return ""  # LLaMA-Factory then saves its own with the model
    # As `eval` prompts such a model, with --chat-template-kwargs.
    thinking = {"enable_thinking": False} if tools.template.enable_thinking is False else {}
    for row in pairs.select(range(min(8, len(pairs)))):
        if len(row["_prompt"]) % 2 == 0 or not row["_response"] or any(row[name] for name in MEDIA):
            continue  # LLaMA-Factory skips it, or it has more than text
        try:
            messages = row["_prompt"] + row["_response"][:1]
            ours, _ = tools.template.encode_oneturn(tools.tokenizer, messages, row["_system"], "")
        except Exception:  # the training stops at this row: `_Measure` reports it
            continue
        system = [{"role": "system", "content": row["_system"]}] if row["_system"] else []
        try:
            own = tools.tokenizer.apply_chat_template(
                system + row["_prompt"],
                chat_template=tools.chat_template,
                add_generation_prompt=True,
                return_dict=False,
                **thinking,
            )
        except Exception as error:  # whatever a template raises, as Gemma's does for a system message
            return f"training: {_excerpt(tools, ours, 0)} chat template: rejects the messages ({in_a_line(error)})"
        if ours != own:
            at = common_prefix(ours, own)
            return f"training: {_excerpt(tools, ours, at)} chat template: {_excerpt(tools, own, at)}"
    return ""


def _excerpt(tools: Tokenization, ids: Sequence[int], at: int) -> str:
    return f"…{tools.tokenizer.decode(ids[max(0, at - 8) : at + 12])!r}…"


# --- looking at pairs ------------------------------------------------------------------------------------------------


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens that two sequences begin with in common."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


class _Measure:
    """Maps a row in LLaMA-Factory's standard format to what `_report` counts; picklable, for several processes."""

    def __init__(
        self,
        tools: Tokenization,
        data_args: Any,
        test_set: TestSet | None,
        sr_prompt: str | None,
        context: int | None,
        only_pairs: bool,
    ) -> None:
        from ..training.answers import AnswersProcessor
        from ..training.refinement import AugmentingProcessor

        about = (tools.template, tools.tokenizer, tools.processor)
        self.whole = AnswersProcessor(*about, replace(data_args, cutoff_len=UNCUT))
        self.augments = sr_prompt is not None
        if sr_prompt is None:
            self.cut = AnswersProcessor(*about, data_args)
        else:
            self.cut = AugmentingProcessor(*about, data_args, sr_prompt=sr_prompt, context=context)
        self.test_set, self.only_pairs = test_set, only_pairs

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            measured = self._measure(row)
        except Exception as error:  # whatever the tokenizer, the template or an image file raises
            return {**NOT_MEASURED, "kind": "stops", "stop": f"row {index + 1}: {in_a_line(error)}"}
        return {**NOT_MEASURED, **measured, "kind": "valid" if measured else "skipped", "stop": ""}

    def _measure(self, row: dict[str, Any]) -> dict[str, Any]:
        """The measures of a pair; empty if LLaMA-Factory skips the row."""
        batch = {name: [value] for name, value in row.items()}
        from ..training.answers import STANDARD_SCORES, answers_of
        from ..training.ranking import LD_ALPHA, SCORES, Ranking
        from ..training.refinement import prompt_length

        encoded = self.whole.preprocess_dataset(batch)
        if not encoded:
            return {}

        prompt = prompt_length(encoded["chosen_labels"][0])
        whole = _sequences(encoded)
        longer = max(map(len, whole))
        # Most pairs are not truncated; tokenizing them again would double the time.
        is_cut = longer > self.cut.data_args.cutoff_len
        cut = self.cut.preprocess_dataset(batch) if is_cut or self.augments else encoded
        kept, answers = _sequences(cut), answers_of(row["_response"])
        if self.only_pairs and len(answers) > 2:
            raise ValueError(LD_ALPHA)
        compared = Ranking.of_rows([{SCORES: row.get(STANDARD_SCORES)}]).pairs
        question = "\n".join(turn["content"] for turn in row["_prompt"] if turn["role"] == "user")
        overlap = self.test_set.overlap(question) if self.test_set else ""
        asked = (str(row["_prompt"]), row["_system"] or "", str([row[name] for name in ("_tools", *MEDIA)]))
        measured = {
            "pair": _digest(*asked, *map(_text, answers)),
            "question": _digest(*asked),
            "empty": not all(map(_says_something, answers)),
            "identical": any(answers[one] == answers[other] for one, other in compared),
            "identical_cut": any(
                answers[one] != answers[other] and kept[one] == kept[other] for one, other in compared
            ),
            "truncated": any(len(after) < len(before) for after, before in zip(kept, whole, strict=True)),
            "prompt": prompt,
            "chosen": len(whole[0]) - prompt,
            "rejected": len(whole[-1]) - prompt,
            "longer": longer,
            "stock": sum(map(len, kept)),
            "common": _tokens_twice(kept),
            "same_question": overlap == "same",
            "similar_question": overlap == "similar",
        }
        return measured | self._augmented(cut, measured) if self.augments else measured

    @staticmethod
    def _augmented(cut: dict[str, Any], measured: dict[str, Any]) -> dict[str, int]:
        """The counts with the augmented pair: the same responses after another prompt."""
        from ..training.refinement import PROMPT_IDS, prompt_length

        further = len(cut[PROMPT_IDS][0]) - prompt_length(cut["chosen_labels"][0])
        sequences = _sequences(cut)
        return {
            "augmented": max(map(len, sequences)) + further,
            "stock": 2 * measured["stock"] + len(sequences) * further,
            "common": 2 * measured["common"] + (len(sequences) - 1) * further,
        }


def _sequences(encoded: dict[str, Any]) -> list[list[int]]:
    """The token ids of a row's prompt with each response."""
    from ..training.ranking import responses_of

    return [list(ids) for ids, _ in responses_of({name: values[0] for name, values in encoded.items()})]


def _tokens_twice(sequences: list[list[int]]) -> int:
    """How many tokens of some sequences stand in a prefix that another one has, too, and are computed once."""
    return sum(common_prefix(*pair) for pair in itertools.pairwise(sorted(sequences)))


def _text(answer: Sequence[dict[str, str]]) -> str:
    return answer[0]["content"] if len(answer) == 1 else str(answer)


def _says_something(answer: Sequence[dict[str, str]]) -> bool:
    """Whether no turn of the assistant, which are every other one, is empty."""
    return all(turn["content"].strip() for turn in answer[::2])


def _digest(*texts: str) -> str:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=12).hexdigest()


def _report(measures: Any, cutoff_len: int, template: str, has_test_set: bool) -> Report:
    import numpy as np

    kinds = np.array(measures["kind"])
    valid = kinds == "valid"
    flags = {name: np.array(measures[name], dtype=bool) for name in FLAGS}
    counts = {name: np.array(measures[name])[valid] for name in COUNTS}
    stock, common = counts["stock"], counts["common"]
    copies = valid & _repeated(measures["pair"])
    problems = {
        SKIPPED: kinds == "skipped",
        STOPS: kinds == "stops",
        "an empty side": flags["empty"],
        "identical sides": flags["identical"],
        f"identical after truncation at cutoff_len {cutoff_len}": flags["identical_cut"],
        SAME: flags["same_question"],
    }
    notes = {
        "copies of another pair": copies,
        "further pairs for a question": valid & _repeated(measures["question"]) & ~copies,
        f"truncated at cutoff_len {cutoff_len}": flags["truncated"],
        SIMILAR: flags["similar_question"],
    }
    if not has_test_set:  # 0 would say that there is none in common
        del problems[SAME], notes[SIMILAR]
    return Report(
        pairs=int(valid.sum()),
        problems={name: int(rows.sum()) for name, rows in problems.items()},
        notes={name: int(rows.sum()) for name, rows in notes.items()},
        first_rows={
            name: (np.flatnonzero(rows)[:FIRST_ROWS] + 1).tolist() for name, rows in (problems | notes).items()
        },
        tokens={
            name: _percentiles(counts[name])
            for name in ("prompt", "chosen", "rejected", "longer", "augmented")
            if name != "augmented" or counts[name].any()
        },
        stock_tokens=float(stock.mean()) if len(stock) else 0.0,
        shared_tokens=float((stock - common).mean()) if len(stock) else 0.0,
        cutoff_len=cutoff_len,
        template=template,
        stop=next(filter(None, measures["stop"]), ""),
    )


def _repeated(values: Sequence[str]) -> np.ndarray:
    """For each value, whether it has occurred before."""
    import numpy as np

    repeated = np.ones(len(values), dtype=bool)
    repeated[np.unique(np.array(values), return_index=True)[1]] = False
    return repeated


def _percentiles(values: np.ndarray) -> list[int]:
    import numpy as np

    if not len(values):
        return []
    return [int(value) for value in np.percentile(values, PERCENTILES, method="higher")]


# --- showing ---------------------------------------------------------------------------------------------------------


def render(report: Report, of: str = "") -> Iterable[Any]:
    """The report as tables and lines for a rich console; `of` says in the title which pairs these are."""
    from rich.markup import escape
    from rich.table import Table

    found = Table("found", "rows", "share", "first rows", title=f"{report.pairs:,} pairs{of}", title_justify="left")
    rows_in_all = report.pairs + sum(report.problems[name] for name in NO_PAIRS)
    for style, entries in (("red", report.problems), ("yellow", report.notes)):
        for name, count in entries.items():
            share = f"{count / rows_in_all:.1%}" if rows_in_all else ""
            rows = ", ".join(map(str, report.first_rows[name]))
            found.add_row(name, f"{count:,}", share, rows, style=style if count else None)
    yield found
    if any(report.first_rows.values()):
        yield "Row numbers count from 1 through the recipe's data sets, as LLaMA-Factory loads them."

    if report.pairs:
        tokens = Table(title="Tokens before truncation, percentiles", title_justify="left")
        for heading in ("", *(f"{p}%" for p in PERCENTILES)):
            tokens.add_column(heading, justify="right" if heading else "left")
        names = {"longer": "prompt and longer response", "augmented": "the same, augmented and truncated"}
        for name, values in report.tokens.items():
            tokens.add_row(names.get(name, name), *(f"{value:,}" for value in values))
        yield tokens
        saved = 1 - report.shared_tokens / report.stock_tokens if report.stock_tokens else 0
        yield (
            f"Tokens per pair after truncation: {report.stock_tokens:,.0f}, with prefix sharing "
            f"{report.shared_tokens:,.0f} ({saved:.0%} fewer)."
        )
    if report.stop:
        yield f"[red]The training stops at {escape(report.stop)}"
    if report.template:
        yield "[yellow]The training prompts differ from the tokenizer's chat template, which evaluations use:"
        yield escape(report.template)
