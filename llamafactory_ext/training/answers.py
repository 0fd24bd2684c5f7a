"""Rows whose answers have several turns, or are more than two: from the data's columns to tokens.

LLaMA-Factory's ranking format holds a chosen and a rejected last message. Here `chosen` and `rejected` may be lists of
messages, `rejected` may hold several answers, and `answers` with `scores` takes the place of both (columns named in
dataset_info.json). Its own converters read the messages, and its own template makes tokens of each turn.

In its standard format, a row's `_response` is the messages of all answers, one after the other. An answer begins and
ends with a turn of the assistant, and no other two of these are neighbors: that is where one answer ends.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

from llamafactory.data.data_utils import Role
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.data.processor.processor_utils import infer_seqlen
from llamafactory.extras import logging
from llamafactory.extras.constants import IGNORE_INDEX

from ..recipe.loss_args import is_number, shown
from .ranking import HIGHEST, LEAST_GAP, MEDIA, SCORES, Response, between_columns

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

Message = dict[str, str]
STANDARD_SCORES = "_scores"  # column of the standard format
CUT = "tokens_cut"  # column of the tokenized data: tokens that `cutoff_len` took from the prompt and from the responses
LOOKED_AT = 100  # rows of a stream in which a first answer is looked for
ASSISTANT = (Role.ASSISTANT.value, Role.FUNCTION.value)


# --- which data sets ---------------------------------------------------------------------------------------------


def aligned_with_answers(align: Callable[..., Any]) -> Callable[..., Any]:
    """LLaMA-Factory's `align_dataset`, for data sets of such rows as well."""

    def align_dataset(dataset: Any, dataset_attr: Any, *args: Any, **kwargs: Any) -> Any:
        from llamafactory.data import converter

        from ..patching import replaced

        if not _holds_answers(dataset, dataset_attr):
            return align(dataset, dataset_attr, *args, **kwargs)
        make = converter.get_dataset_converter
        with replaced(converter, "get_dataset_converter", lambda *about: _AnswersConverter.of(make, *about)):
            return align(dataset, dataset_attr, *args, **kwargs)

    return align_dataset


def _holds_answers(dataset: Any, attr: Any) -> bool:
    """Whether a data set's rows have more than one message, or more than one answer, on a side.

    Raises:
        ValueError: if dataset_info.json names one of `answers` and `scores` without the other, or no answers.
    """
    answers, scores = getattr(attr, "answers", None), getattr(attr, "scores", None)
    if (answers is None) != (scores is None):
        missing = "scores" if scores is None else "answers"
        raise ValueError(
            f"data set {attr}: dataset_info.json names a column of {'answers' if answers else 'scores'}: name one of "
            f'"{missing}", too, under "columns".'
        )
    if answers is not None:
        return True
    if attr.ranking and attr.chosen is None and attr.rejected is None:
        raise ValueError(
            f'data set {attr}: dataset_info.json names no column of answers: write "chosen" and "rejected", or '
            '"answers" and "scores", under "columns".'
        )
    if not attr.ranking or attr.chosen is None or attr.rejected is None:
        return False
    sides = [attr.chosen, attr.rejected]
    if dataset.features is not None:
        return any(_is_list(dataset.features.get(side)) for side in sides)
    return any(isinstance(row.get(side), list) for row in islice(dataset, LOOKED_AT) for side in sides)


def _is_list(feature: Any) -> bool:
    """Whether a column's type is a list: written as one, or one of several classes, by release of `datasets`."""
    return isinstance(feature, list) or type(feature).__name__ in ("List", "LargeList", "Sequence")


# --- the data's columns ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AnswersConverter:
    """A converter to LLaMA-Factory's standard format.

    Args:
        pair: LLaMA-Factory's own, for rows in its ranking format.
        conversation: the same for rows without `chosen` and `rejected`: of a conversation's messages.
        attr: the data set's entry in dataset_info.json.
        messages: the column of the prompt's messages, which the data may lack.
    """

    pair: Callable[[dict[str, Any]], dict[str, Any]]
    conversation: Callable[[dict[str, Any]], dict[str, Any]]
    attr: Any
    messages: str

    @classmethod
    def of(cls, make: Callable[..., Any], name: str, attr: Any, data_args: Any) -> _AnswersConverter:
        messages = attr.messages or "messages of the prompt"  # a column that no data has
        plain = replace(attr, ranking=False, kto_tag=None, response=None, messages=messages)
        plain.answers, plain.scores = attr.answers, attr.scores  # no fields of LLaMA-Factory's
        return cls(make(name, attr, data_args), make(name, plain, data_args), attr, messages)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row in the standard format, its best answer first; without answers if LLaMA-Factory is to skip it.

        Raises:
            ValueError: if the row's answers or scores are of another kind.
        """
        try:
            answers, scores = self._answers_and_scores(row)
        except ValueError as error:
            raise ValueError(f"data set {self.attr}: {error}") from error
        if answers is None:
            return {**self.pair(row), STANDARD_SCORES: scores}
        there = [number for number, answer in enumerate(answers) if answer is not None]
        answers, scores = [answers[number] for number in there], [scores[number] for number in there]
        if len(answers) < 2 or max(scores) - min(scores) < LEAST_GAP:
            return self._skipped(row)
        converted = self._of_texts(row, answers) if self.attr.formatting == "alpaca" else self._of_turns(row, answers)
        standard, found = converted
        if not all(found):
            return self._skipped(row)
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        return {
            **standard,
            "_response": [turn for number in order for turn in found[number]],
            STANDARD_SCORES: [scores[number] for number in order],
        }

    def _skipped(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with one answer, which is skipped. It has every column in its type, whatever rows stand beside it."""
        standard = self.conversation({**row, self.messages: []})
        empty = [{"role": role.value, "content": ""} for role in (Role.USER, Role.ASSISTANT)]
        return {**standard, "_prompt": empty[:1], "_response": empty[1:], STANDARD_SCORES: [0.0]}

    def _answers_and_scores(self, row: Mapping[str, Any]) -> tuple[list[Any] | None, list[float]]:
        """A row's answers, None for a pair in LLaMA-Factory's own format, and a score for each."""
        attr = self.attr
        if getattr(attr, "answers", None) is not None:
            return _scored(row, attr.answers, attr.scores)
        chosen, rejected = row.get(attr.chosen), row.get(attr.rejected)
        if not isinstance(chosen, list) and not isinstance(rejected, list):
            return None, [1.0, 0.0]
        if rejected == []:
            return [chosen], [1.0]
        others = rejected if isinstance(rejected, list) and _are_several(rejected) else [rejected]
        return [chosen, *others], [1.0] + [0.0] * len(others)

    def _of_texts(self, row: dict[str, Any], answers: list[Any]) -> tuple[dict[str, Any], list[list[Message]]]:
        if not all(isinstance(answer, str) for answer in answers):
            raise ValueError(
                f"data set {self.attr}: an answer of {_row(row)} is not a text: for messages, write "
                '"formatting": "sharegpt" or "openai" in dataset_info.json.'
            )
        return self.conversation(row), [[{"role": Role.ASSISTANT.value, "content": answer}] for answer in answers]

    def _of_turns(self, row: dict[str, Any], answers: list[Any]) -> tuple[dict[str, Any], list[list[Message]]]:
        """The row in the standard format, and the turns of each answer; none of one that is no conversation."""
        attr = self.attr
        conversations = [_messages(answer, attr, row) for answer in answers]
        prompt = row.get(self.messages) or []
        if not isinstance(prompt, list):
            raise ValueError(
                f"data set {attr}: column {self.messages!r} of {_row(row)} is no list of messages: if the answers "
                'begin with the prompt, remove "messages" from "columns" in dataset_info.json.'
            )
        if not prompt:
            kept = _common_prompt(conversations, attr)
            prompt, conversations = conversations[0][:kept], [turns[kept:] for turns in conversations]
        asked = [*prompt, {attr.role_tag: attr.assistant_tag, attr.content_tag: ""}]
        standard = self.conversation({**row, self.messages: asked})
        before = len(standard["_prompt"])
        found = []
        for turns in conversations:
            converted = self.conversation({**row, self.messages: [*prompt, *turns]})
            whole = [*converted["_prompt"], *converted["_response"]]
            # LLaMA-Factory leaves out a tool's result at the end, which no turn of the assistant follows.
            ends = turns[-1:] and turns[-1][attr.role_tag] in (attr.assistant_tag, attr.function_tag)
            goes_on = before and whole[before - 1 : before] == standard["_prompt"][-1:]
            found.append(whole[before:] if ends and goes_on else [])
        return standard, found


def _scored(row: Mapping[str, Any], answers: str, scores: str) -> tuple[list[Any], list[float]]:
    for name in (answers, scores):
        if name not in row:
            there = ", ".join(map(repr, row))
            raise ValueError(
                f"dataset_info.json names the column {name!r}, but the data has {there}: write one of these."
            )
        if not isinstance(row[name], list):
            raise ValueError(f"column {name!r} of {_row(row)} is {shown(row.get(name))}: write a list.")
    if len(row[answers]) != len(row[scores]):
        raise ValueError(
            f"{_row(row)} has {len(row[answers])} answers and {len(row[scores])} scores: write a score for each."
        )
    for score in row[scores]:
        if not is_number(score) or math.isnan(score):
            raise ValueError(f"a score of {_row(row)} is {shown(score)}: write a number.")
        if abs(score) > HIGHEST:
            raise ValueError(f"a score of {_row(row)} is {shown(score)}: write one from -{HIGHEST:g} to {HIGHEST:g}.")
    return row[answers], [float(score) for score in row[scores]]


def _are_several(answers: list[Any]) -> bool:
    """Whether a list in `rejected` is one of answers, that is of texts or lists, and not of one answer's messages."""
    return all(isinstance(each, str | list | None) for each in answers)


def _messages(answer: Any, attr: Any, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of an answer, which is one or a list of them.

    Raises:
        ValueError: if it is neither, or two turns of the assistant follow one another.
    """
    messages = answer if isinstance(answer, list) else [answer]
    if not messages or not all(isinstance(each, dict) and attr.role_tag in each for each in messages):
        raise ValueError(
            f"data set {attr}: an answer of {_row(row)} is {shown(answer)}: write a message with {attr.role_tag!r} and "
            f"{attr.content_tag!r}, or a list of messages."
        )
    if not all(isinstance(each.get(attr.content_tag), str) or each.get("tool_calls") for each in messages):
        raise ValueError(
            f"data set {attr}: a turn in an answer of {_row(row)} has no text: write one, or remove the row."
        )
    roles = [each[attr.role_tag] for each in messages]
    if any(first == second == attr.assistant_tag for first, second in pairwise(roles)):
        raise ValueError(
            f"data set {attr}: in an answer of {_row(row)}, two turns of the assistant follow one another: if they are "
            "several answers, write each as a list of its own, [[…], […]]."
        )
    return messages


def _common_prompt(conversations: Sequence[Sequence[Any]], attr: Any) -> int:
    """How many messages all conversations begin with, before a turn of the assistant."""
    shortest = min(map(len, conversations))
    first = conversations[0]
    common = next(
        (at for at in range(shortest) if any(each[at] != first[at] for each in conversations)), max(shortest - 1, 0)
    )
    said_by_assistant = (attr.assistant_tag, attr.function_tag)
    while common and any(each[common][attr.role_tag] not in said_by_assistant for each in conversations):
        common -= 1
    return common


def _row(row: Mapping[str, Any]) -> str:
    return f"the row that begins with {shown(next((value for value in row.values() if value), ''))}"


# --- tokens ------------------------------------------------------------------------------------------------------


def answers_of(response: Sequence[Message]) -> list[list[Message]]:
    """The answers whose messages a row's `_response` holds."""
    answers: list[list[Message]] = []
    for number, message in enumerate(response):
        if number == 0 or {message["role"], response[number - 1]["role"]} <= {*ASSISTANT}:
            answers.append([])
        answers[-1].append(message)
    return answers


@dataclass
class AnswersProcessor(PairwiseDatasetProcessor):
    """LLaMA-Factory's tokenization of pairs, and the same for answers of several turns, and for more than two.

    The assistant's turns are trained; tool results and user turns within an answer are not. `cutoff_len` splits the
    tokens between the prompt and the longest answer as LLaMA-Factory does for pairs.
    """

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokenize a batch of rows in the standard format."""
        if STANDARD_SCORES not in examples:
            stock: dict[str, list[Any]] = super().preprocess_dataset(examples)
            return stock
        inputs: dict[str, list[Any]] = defaultdict(list)
        for number in range(len(examples["_prompt"])):
            row = {name: values[number] for name, values in examples.items()}
            answers = answers_of(row["_response"])
            if len(row["_prompt"]) % 2 != 1 or len(answers) < 2:
                logger.warning_rank0_once(
                    "Some rows are skipped: they lack a prompt or a second answer, their turns do not alternate, their "
                    "answers follow different questions, or all scores are the same. `llamafactory-ext data check` "
                    "says which."
                )
                continue
            for name, value in self._tokenized(row, answers).items():
                inputs[name].append(value)
        return inputs

    def _tokenized(self, row: Mapping[str, Any], answers: list[list[Message]]) -> dict[str, Any]:
        media = [row[f"_{name}"] or [] for name in MEDIA]
        encoded = [self._encode(row, answer, media) for answer in answers]
        prompt = self.template.mm_plugin.process_token_ids(encoded[0][0], None, *media, self.tokenizer, self.processor)[
            0
        ]
        longest = max(len(ids) for _, (ids, _) in encoded)
        kept, most = infer_seqlen(len(prompt), longest, self.data_args.cutoff_len)
        responses: list[Response] = []
        cut = 0
        for _, (ids, labels) in encoded:
            ended = _trained_end(labels[:most])
            responses.append(([*prompt[:kept], *ids[:ended]], [IGNORE_INDEX] * kept + labels[:ended]))
            cut += len(ids) - ended
        found: dict[str, Any] = {}
        for side, response in (("chosen", responses[0]), ("rejected", responses[-1])):
            found |= {
                f"{side}_input_ids": response[0],
                f"{side}_attention_mask": [1] * len(response[0]),
                f"{side}_labels": response[1],
            }
        found |= between_columns(responses[1:-1])
        found |= {SCORES: row[STANDARD_SCORES] or [1.0, 0.0], CUT: [len(prompt) - kept, cut]}
        return found | {name: row[f"_{name}"] for name in MEDIA}

    def _encode(
        self, row: Mapping[str, Any], answer: list[Message], media: list[list[Any]]
    ) -> tuple[list[int], tuple[list[int], list[int]]]:
        """Token ids of the prompt, and ids and labels of an answer."""
        messages = self.template.mm_plugin.process_messages(row["_prompt"] + answer, *media, self.processor)
        about = (row["_system"], row["_tools"])
        first = len(row["_prompt"]) + 1
        # As in a pair, what was thought before the last question is left out of a prompt.
        prompt, ids = self.template.encode_oneturn(self.tokenizer, messages[:first], *about)
        ids, labels = list(ids), list(ids)
        if len(answer) > 1:
            turns = self.template.encode_multiturn(self.tokenizer, messages, *about)
            for asked, said in turns[first // 2 :]:
                ids += asked + said
                labels += self._unscored(asked) + said
        if self.template.efficient_eos:
            ids.append(self.tokenizer.eos_token_id)
            labels.append(self.tokenizer.eos_token_id)
        return prompt, (ids, labels)

    def _unscored(self, asked: list[int]) -> list[int]:
        """Labels of what the assistant is asked; where the next turn itself ends its turn, that is what it learns."""
        if self.template.efficient_eos:
            return [self.tokenizer.eos_token_id] + [IGNORE_INDEX] * (len(asked) - 1)
        return [IGNORE_INDEX] * len(asked)


def _trained_end(labels: Sequence[int]) -> int:
    """The end of the last trained token."""
    return max((at + 1 for at, label in enumerate(labels) if label != IGNORE_INDEX), default=0)


def say_what_was_cut(dataset: Any) -> None:
    """Log how much `cutoff_len` took from tokenized rows; nothing for a stream, or for LLaMA-Factory's own."""
    if CUT not in (getattr(dataset, "column_names", None) or []) or not hasattr(dataset, "__len__"):
        return
    cut = dataset[CUT]
    rows = sum(any(each) for each in cut)
    same = sum(
        row["chosen_input_ids"] == row["rejected_input_ids"]
        for row in dataset.select([number for number, each in enumerate(cut) if each[1]])
    )
    if rows:
        prompts, responses = (sum(each[part] for each in cut) for part in range(2))
        equal = f" In {same} of them, the best and the worst answer are the same now and teach nothing." if same else ""
        logger.warning_rank0(
            f"`cutoff_len` cut {rows:,} of {len(cut):,} rows: {prompts:,} tokens of prompts, {responses:,} of "
            f"answers.{equal}"
        )
