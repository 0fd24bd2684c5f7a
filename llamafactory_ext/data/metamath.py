"""Turns MetaMath's few-shot pairs into zero-shot pairs by joining them with MetaMathQA.

A prompt of abacusai/MetaMath_DPO_FewShot holds worked examples and then the question. Cutting it at a delimiter would
cut questions that contain the delimiter. MetaMathQA has each question (`query`) with its `response`, and the chosen
response of a pair is one of these: so the question is known and only has to be found at the end of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import UserError
from ..rows import BadRow, Fields, Row, text

QueryIndex = dict[str, list[str]]


@dataclass(frozen=True)
class Template:
    """The text before a question on its line, and the text after it to the end of the prompt."""

    lead: str
    suffix: str


def index_queries(rows: Iterable[Row]) -> tuple[QueryIndex, Counter[str]]:
    """Index MetaMathQA: response -> its queries, both stripped.

    Returns:
        The index, and the number of unusable rows by reason.

    Raises:
        UserError: if no row has a query and a response.
    """
    index: QueryIndex = {}
    unusable: Counter[str] = Counter()
    for row in rows:
        try:
            if isinstance(row.fields, BadRow):
                raise row.fields
            query, response = text(row.fields, "query").strip(), text(row.fields, "response").strip()
        except BadRow as reason:
            unusable[str(reason)] += 1
        else:
            index.setdefault(response, []).append(query)
    if not index:
        raise UserError("--questions has no rows with `query` and `response`: name MetaMathQA.")
    return index, unusable


def learn_template(sample: Sequence[Fields], index: QueryIndex) -> Template:
    """The template that most of the sampled prompts share, learned from the places of their questions.

    Args:
        sample: some of the pairs, with `prompt` and `chosen`.
        index: from `index_queries`.

    Raises:
        UserError: if most of the questions are not found, or the prompts have no template in common.
    """
    seen: Counter[Template] = Counter()
    for fields in sample:
        prompt, chosen = str(fields.get("prompt")).rstrip(), str(fields.get("chosen")).strip()
        places = [(prompt.rfind(query) + len(query), len(query)) for query in index.get(chosen, []) if query in prompt]
        if places:
            end, length = max(places)  # the rightmost, the longest on ties
            line = prompt[: end - length].rpartition("\n")[2]
            seen[Template(line, prompt[end:])] += 1

    template, count = seen.most_common(1)[0] if seen else (Template("", ""), 0)
    if 2 * count <= len(sample):
        raise UserError(
            f"only {count} of the first {len(sample)} prompts have a question of --questions in the same place: check "
            "that both data sets belong together, or write the text around the last question with --lead and --suffix."
        )
    return template


def zero_shot_pair(fields: Fields, index: QueryIndex, template: Template, prompt: str = "") -> tuple[str, Fields]:
    """A few-shot pair reduced to its question.

    The question is the query of the chosen response that ends the prompt, with only the template's suffix after it; the
    longest if there are several (then one is the end of another). A query that occurs only in the examples is not the
    question. Without such a query, the question is the text between the template's last lead and its suffix.

    Args:
        fields: `prompt`, `chosen` and `rejected`.
        index: from `index_queries`.
        template: the text around the question.
        prompt: text to put before the question.

    Returns:
        `matched` or `fallback`, and the pair in LLaMA-Factory's ranking layout.

    Raises:
        BadRow: if a side is empty, or the prompt does not match the template.
    """
    chosen, rejected = text(fields, "chosen").strip(), text(fields, "rejected").strip()
    body = text(fields, "prompt").rstrip()
    if not body.endswith(template.suffix):
        raise BadRow(f"the prompt does not end in {template.suffix!r}")
    body = body.removesuffix(template.suffix)

    queries = [query for query in index.get(chosen, []) if _ends_with_question(body, query, template.lead)]
    how, question = ("matched", max(queries, key=len)) if queries else ("fallback", _last_question(body, template))
    return how, {"instruction": prompt + question, "chosen": chosen, "rejected": rejected}


def _ends_with_question(body: str, query: str, lead: str) -> bool:
    """Whether the query is the whole last question, not the end of a longer one: the lead precedes it."""
    before = body[: -len(query)]
    return body.endswith(query) and before.endswith(lead) and (lead != "" or before[-1:] in ("", "\n"))


def _last_question(body: str, template: Template) -> str:
    # Without a lead, an empty line separates the question from the examples.
    _, delimiter, question = body.rpartition(template.lead or "\n\n")
    if not delimiter and template.lead:
        raise BadRow(f"the prompt has no {template.lead!r} before a question")
    if not question.strip():
        raise BadRow("the prompt ends without a question")
    return question.strip()
