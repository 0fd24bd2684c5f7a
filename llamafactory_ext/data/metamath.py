"""MetaMath's few-shot pairs made zero-shot, by joining them with MetaMathQA.

A prompt of abacusai/MetaMath_DPO_FewShot holds worked examples and then the question; cutting it at a delimiter would
cut questions that hold the delimiter. MetaMathQA has the questions (`query`) by their answers (`response`), and the
pair's chosen answer is such a response: so the question is known, and only has to be found at the prompt's end.
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
    """What stands before a question on its line, and what follows it to the end of the prompt."""

    lead: str
    suffix: str


def index_queries(rows: Iterable[Row]) -> tuple[QueryIndex, Counter[str]]:
    """MetaMathQA by response: the queries that each response answers, both without surrounding white space.

    Returns:
        The index, and how often rows could not be used, by reason.

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
        raise UserError("the questions have no rows with `query` and `response`: name MetaMathQA with --questions.")
    return index, unusable


def learn_template(sample: Sequence[Fields], index: QueryIndex) -> Template:
    """The template that most of the sampled prompts share, read off where their questions stand.

    Args:
        sample: some of the pairs, with `prompt` and `chosen`.
        index: the queries by response.

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
            "that the two data sets belong together, or give the text around the last question with --lead and "
            "--suffix."
        )
    return template


def zero_shot_pair(fields: Fields, index: QueryIndex, template: Template, prompt: str = "") -> tuple[str, Fields]:
    """A few-shot pair with its question alone.

    Of the queries that the chosen answer belongs to, the one is taken that ends the prompt with nothing but the
    template's suffix behind it, the longest if there are several (then one is the end of another); a query that occurs
    in the examples only is not the question. Where there is none, the question is what stands between the template's
    last lead and its suffix.

    Args:
        fields: `prompt`, `chosen` and `rejected`.
        index: the queries by response.
        template: what stands around the question.
        prompt: put in front of the question.

    Returns:
        `matched` or `fallback`, and the pair in LLaMA-Factory's ranking layout.

    Raises:
        BadRow: if a side is empty, or the prompt does not end as the template says.
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
    """Whether the query is the whole last question, not the end of a longer one: the lead is before it."""
    before = body[: -len(query)]
    return body.endswith(query) and before.endswith(lead) and (lead != "" or before[-1:] in ("", "\n"))


def _last_question(body: str, template: Template) -> str:
    # Without a lead, an empty line is what parts the question from the examples.
    _, delimiter, question = body.rpartition(template.lead or "\n\n")
    if not delimiter and template.lead:
        raise BadRow(f"the prompt has no {template.lead!r} before a question")
    if not question.strip():
        raise BadRow("the prompt ends without a question")
    return question.strip()
