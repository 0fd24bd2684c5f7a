"""Questions of several turns: each asked on top of the model's own answers, killed, resumed, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from chat_server import RefusalError, chat_server
from crashes import walk
from engine_cases import needs_vllm
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from llamafactory_ext.errors import UserError
from llamafactory_ext.evaluation import answers
from llamafactory_ext.evaluation.answered import exchanges, load_answered
from llamafactory_ext.evaluation.answers import Turns, write_answers
from llamafactory_ext.evaluation.asking import ask_rounds
from llamafactory_ext.evaluation.generations import GENERATIONS, MANIFEST, Generation, Run
from llamafactory_ext.evaluation.open_questions import Query, load_queries

SAMPLE = Path(__file__).parents[2] / "data" / "open_questions_sample.jsonl"
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
    {"question_id": 82, "category": "math", "turns": ["1 + 1?", "And 2 + 2?", "And 3 + 3?"], "reference": ["2", "4"]},
    {"question_id": 83, "turns": ["Hi?"]},
]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def invoke(*words: object):
    return CliRunner().invoke(answers.app, [str(word) for word in words])


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def echo(messages: list[dict]) -> str:
    """An answer that depends on the whole chat."""
    return "<" + " ".join(turn["content"] for turn in messages) + ">"


class Echo:
    """An engine that answers with `answer(messages)`, and cannot ask what is longer than `context` characters."""

    def __init__(self, answer=echo, context: int = 1000) -> None:
        self.answer, self.context, self.asked = answer, context, []

    def refusal(self, chat, number):
        length = sum(len(turn["content"]) for turn in chat)
        return f"problem {number} has {length} characters" if length > self.context else None

    def generate(self, jobs):
        for job in jobs:
            self.asked.append(job.messages)
            text = self.answer(job.messages)
            refused = text.removeprefix("!") if text.startswith("!") else None
            yield job, Generation(job.index, "" if refused else text, None, "stop", refused)


def ask(engine, queries: list[Query], folder: Path) -> list[list[Generation]]:
    """The replies by question and turn."""
    turns = Turns(engine, queries, None)
    replies = ask_rounds(engine, turns.rounds(), {"base": (folder, {})})["base"]
    return [turns.of(number, replies) for number in range(len(queries))]


@pytest.fixture
def queries(tmp_path):
    return load_queries(write(tmp_path / "mt_bench.jsonl", MT_BENCH))


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_mt_benchs_layout(queries):
    assert [query.turns for query in queries] == [row["turns"] for row in MT_BENCH]
    assert [query.category for query in queries] == ["writing", "math", None]
    assert [query.references for query in queries] == [(), ("2", "4", None), ()]
    assert queries[1].chat("Brief.", ["two"]) == [
        {"role": "system", "content": "Brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "And 2 + 2?"},
    ]


def test_the_sample_is_in_mt_benchs_layout():
    found = load_queries(SAMPLE)
    assert [len(query.turns) for query in found] == [2] * 6
    assert len({query.category for query in found}) == 6
    assert [len(query.references) for query in found] == [0, 0, 2, 2, 0, 0]


def test_turns_after_a_history_and_an_input(tmp_path):
    row = {"prompt": ["Why?", "Who?"], "input": "this", "history": [["Hi", "Hello"]], "system": "Brief."}
    (query,) = load_queries(write(tmp_path / "q.jsonl", [row]))
    assert query.turns == ["System: Brief.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?\nthis", "Who?"]
    assert [turn["content"] for turn in query.chat("Other.", ["So."])] == [
        *("Brief.", "Hi", "Hello", "Why?\nthis", "So.", "Who?")
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": []}, "line 1 has no question"),
        ({"turns": [5]}, "line 1 has no question"),
        ({"turns": [{"role": "user"}]}, "line 1 has no question"),
        ({"turns": {"0": "Q?"}}, "line 1 has no question"),
        ({"turns": ["Q?", ""]}, "turn 2 in `turns` is not a text"),
        ({"prompt": ["Q?", None]}, "turn 2 in `prompt` is not a text"),
        ({"turns": [" ", "Q?"]}, "turn 1 in `turns` is not a text"),
        ({"turns": ["Q?", "R?"], "reference": "4"}, "`reference` must be a list"),
        ({"turns": ["Q?"], "reference": [4]}, "`reference` must be a list"),
        ({"question": "Q?", "reference": {"a": 1}}, "`reference` must be a list"),
        ({"turns": ["Q?"], "reference": ["4", "5"]}, "has 2 references, but 1 turns"),
        ({"turns": ["Q?"], "category": 5}, "`category` is not a text"),
    ],
)
def test_rows_that_are_no_questions(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        load_queries(write(tmp_path / "q.jsonl", [row]))


@pytest.mark.parametrize(
    ("given", "found"), [(None, ()), ([], ()), (["", None], ()), (["4"], ("4", None)), ([None, "5"], (None, "5"))]
)
def test_references_may_be_fewer_than_turns(tmp_path, given, found):
    (query,) = load_queries(write(tmp_path / "q.jsonl", [{"turns": ["Q?", "R?"], "reference": given}]))
    assert query.references == found


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=5).filter(str.strip)
REPLY = st.builds(
    lambda text, refused: (text, None) if text else ("", refused), st.text(max_size=4), st.text(max_size=4)
)


@given(st.lists(st.lists(st.tuples(TEXT, st.none() | TEXT, REPLY), min_size=1, max_size=4), min_size=1, max_size=4))
def test_what_is_written_is_what_is_judged(tmp_path_factory, questions):
    """From the data's rows, through `answers.jsonl`, to the turns that a judge sees."""
    folder = tmp_path_factory.mktemp("layout")
    data = [
        {"turns": [turn for turn, _, _ in each], "reference": [known for _, known, _ in each]} for each in questions
    ]
    turns = Turns(Echo(), load_queries(write(folder / "q.jsonl", data)), None)
    replies = {}
    for (number, turn), index in turns.index.items():
        text, refused = questions[number][turn][2]
        replies[index] = Generation(index, text, None, "stop", refused)
    write_answers(folder, turns, replies)
    if all(reply.refused is not None for reply in replies.values()):
        with pytest.raises(UserError, match="Every question was refused"):
            exchanges(load_answered([folder]), [folder])
        return
    found, refused = exchanges(load_answered([folder]), [folder])
    expected = [
        (str(number), turn, tuple(text for text, _, _ in each[:turn]), tuple(reply for _, _, (reply, _) in each[:turn]))
        for number, each in enumerate(questions, start=1)
        for turn in range(1, len(each) + 1)
        if each[turn - 1][2][1] is None
    ]
    assert [(each.id, each.turn, each.turns, each.answers[0]) for each in found] == expected
    assert [each.reference for each in found] == [questions[int(each.id) - 1][each.turn - 1][1] for each in found]
    assert len(found) + len(refused) == len(replies)


# --- asking ----------------------------------------------------------------------------------------------------------


def test_each_turn_is_asked_on_top_of_the_models_own_answers(queries, tmp_path):
    engine = Echo()
    replies = ask(engine, queries, tmp_path)
    assert [reply.text for reply in replies[1]] == [
        "<1 + 1?>",
        "<1 + 1? <1 + 1?> And 2 + 2?>",
        "<1 + 1? <1 + 1?> And 2 + 2? <1 + 1? <1 + 1?> And 2 + 2?> And 3 + 3?>",
    ]
    assert [len(chat) for chat in engine.asked] == [1, 1, 1, 3, 3, 5]  # all first turns, all second, the third
    ask(engine, queries, tmp_path)
    assert len(engine.asked) == 6  # nothing is asked twice
    assert sorted(Run(tmp_path).read()) == list(range(6))


def test_every_crash_leads_to_the_same_answers(queries, tmp_path):
    def result(folder):
        return {name: (folder / name).read_bytes() for name in (MANIFEST, GENERATIONS)}

    assert walk(lambda folder: ask(Echo(), queries, folder), tmp_path / "run", result=result) >= 12


def test_a_turn_without_an_earlier_answer_is_refused_and_says_why(queries, tmp_path):
    def moody(messages):
        return {"Write.": "!too rude", "1 + 1?": " \n"}.get(messages[-1]["content"], echo(messages))

    replies = ask(Echo(moody), queries, tmp_path)
    assert [reply.refused for reply in replies[0]] == ["too rude", "turn 1 of the question was refused: too rude"]
    empty = "the answer to turn 1 of the question is empty"
    assert [reply.refused for reply in replies[1]] == [None, empty, empty]
    assert replies[2][0].refused is None
    written = (tmp_path / GENERATIONS).read_bytes()
    ask(Echo(moody), queries, tmp_path)
    (_, again) = (tmp_path / GENERATIONS).read_bytes().split(written)
    assert [json.loads(line)["refused"] for line in again.splitlines()] == ["too rude"]

    replies = ask(Echo(), queries, tmp_path)  # only what was refused, and what follows it, is asked again
    assert [reply.text for reply in replies[0]] == ["<Write.>", "<Write. <Write.> Rewrite.>"]
    assert [reply.refused for reply in replies[1]] == [None, empty, empty]


def test_what_does_not_fit_the_context_is_refused_turn_by_turn(queries, tmp_path):
    replies = ask(Echo(context=30), queries, tmp_path)
    assert [reply.refused for reply in replies[1]] == [
        *(None, None),
        "problem 2 has 62 characters",
    ]
    assert [reply.refused for reply in replies[0]] == [None, None]


def test_a_turn_is_asked_again_if_its_earlier_answer_is_another(queries, tmp_path):
    """As where somebody has removed a line that was damaged: the second turn would follow what was never said."""
    ask(Echo(), queries, tmp_path)
    path = tmp_path / GENERATIONS
    first, *others = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(others), encoding="utf-8")
    assert json.loads(first)["text"] == "<Write.>"
    engine = Echo(lambda messages: echo(messages).upper())
    replies = ask(engine, queries, tmp_path)
    assert [reply.text for reply in replies[0]] == ["<WRITE.>", "<WRITE. <WRITE.> REWRITE.>"]
    assert len(engine.asked) == 2
    assert replies[1][0].text == "<1 + 1?>"


@given(st.data())
def test_whichever_lines_are_lost_the_answers_fit_together(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("lost")
    queries = load_queries(write(folder / "q.jsonl", MT_BENCH))
    ask(Echo(), queries, folder)
    path = folder / GENERATIONS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if data.draw(st.booleans())), encoding="utf-8")
    replies = ask(Echo(lambda messages: echo(messages).upper()), queries, folder)
    for query, own in zip(queries, replies, strict=True):
        texts = [reply.text for reply in own]
        for turn, text in enumerate(texts):
            assert text in (known := echo(query.chat(None, texts[:turn])), known.upper())


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with chat_server() as http:
        http.answer = lambda request: echo(request["messages"])
        yield http


def words_for(server, data: Path, output: Path) -> list[str]:
    return [
        *("--engine", "openai", "--model", "m", "--base-url", server.url, "--data", str(data)),
        *("--output", str(output), "--concurrency", "1"),
    ]


def test_the_rows_of_a_server(server, tmp_path):
    data, output = write(tmp_path / "q.jsonl", MT_BENCH), tmp_path / "out"
    done = invoke(*words_for(server, data, output))
    assert done.exit_code == 0, done.output
    assert "answers.jsonl: 6 answers, 0 cut off at 1024 tokens" in done.output
    assert rows_of(output / "base") == [
        {
            "id": "81",
            "turns": ["Write.", "Rewrite."],
            "answers": ["<Write.>", "<Write. <Write.> Rewrite.>"],
            "finish_reasons": ["stop", "stop"],
            "category": "writing",
        },
        {
            "id": "82",
            "turns": MT_BENCH[1]["turns"],
            "answers": [*(echo(request["messages"]) for request in server.requests if "1 + 1?" in str(request))],
            "finish_reasons": ["stop"] * 3,
            "category": "math",
            "reference": ["2", "4", None],
        },
        {"id": "83", "question": "Hi?", "answer": "<Hi?>", "finish_reason": "stop"},
    ]


def test_a_limit_counts_questions(server, tmp_path):
    data, output = write(tmp_path / "q.jsonl", MT_BENCH), tmp_path / "out"
    assert invoke(*words_for(server, data, output), "--limit", 1).exit_code == 0
    assert [row["id"] for row in rows_of(output / "base")] == ["81"]
    assert len(server.requests) == 2


def test_what_a_server_refuses_is_told_with_its_turn(server, tmp_path):
    def picky(request):
        if request["messages"][-1]["content"] == "And 2 + 2?":
            raise RefusalError(400, "too long")
        return echo(request["messages"]) if "Write." not in str(request) else "half \ud800"

    server.answer = picky
    data, output = write(tmp_path / "q.jsonl", MT_BENCH), tmp_path / "out"
    done = invoke(*words_for(server, data, output))
    assert done.exit_code == 0, done.output
    assert "3 turns were refused: 81 (turn 2), 82 (turn 2), 82 (turn 3) (" in done.output
    rows = rows_of(output / "base")
    assert rows[0]["refused"][0] is None
    assert rows[0]["refused"][1].startswith("The assistant turn of problem 1 is not text (")
    assert rows[1]["answers"] == ["<1 + 1?>", "", ""]
    assert "too long" in rows[1]["refused"][1]
    assert rows[1]["refused"][2].startswith("turn 2 of the question was refused: Error code: 400")
    server.answer = lambda request: echo(request["messages"])
    assert "were refused: 81 (turn 2) (" in invoke(*words_for(server, data, output)).output
    assert "refused" not in rows_of(output / "base")[1]


def test_killed_in_the_second_turn_and_resumed(server, tmp_path):
    """The server holds its fifth reply, of a second turn, back until the asking process is dead."""
    data, output, dead = write(tmp_path / "q.jsonl", MT_BENCH), tmp_path / "out", []

    def patient(request):
        while len(server.requests) == 5 and not dead:
            time.sleep(0.02)
        return echo(request["messages"])

    server.answer = patient
    process = subprocess.Popen(
        [sys.executable, "-m", "llamafactory_ext.evaluation", "answers", *words_for(server, data, output)]
    )
    while len(server.requests) < 5 or len(Run(output / "base").read()) < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    dead.append(True)
    assert invoke(*words_for(server, data, output)).exit_code == 0
    assert invoke(*words_for(server, data, tmp_path / "whole")).exit_code == 0
    assert rows_of(output / "base") == rows_of(tmp_path / "whole" / "base")
    assert len(server.requests) == 5 + 2 + 6


def test_other_turns_are_another_run(server, tmp_path):
    data, output = write(tmp_path / "q.jsonl", MT_BENCH), tmp_path / "out"
    assert invoke(*words_for(server, data, output)).exit_code == 0
    told = [{**row, "category": "x", "reference": ["r"]} for row in MT_BENCH]
    assert invoke(*words_for(server, write(data, told), output)).exit_code == 0  # on these no answer depends
    assert rows_of(output / "base")[2]["reference"] == ["r"]
    write(data, [{**MT_BENCH[0], "turns": ["Write.", "Sing."]}, *MT_BENCH[1:]])
    refused = invoke(*words_for(server, data, output))
    assert refused.exit_code == 2
    assert "belongs to another run: its data is" in refused.output
    assert len(server.requests) == 6


def test_the_sample_on_a_model_and_its_adapter(tmp_path):
    """Some second turns fit the context after the first answer, and others do not."""
    model = tiny.make_model(tmp_path / "model", initializer_range=0.3, max_position_embeddings=330)
    adapter = tiny.make_adapter(tmp_path / "lora", model)
    words = ("--engine", "hf", "--model", model, "--adapter", f"sr={adapter}", "--data", SAMPLE)
    done = invoke(*words, "--output", tmp_path / "out", "--max-tokens", 24)
    assert done.exit_code == 0, done.output
    replies = {name: Run(tmp_path / "out" / name).read() for name in ("base", "sr")}
    for name, own in replies.items():
        assert "turns were refused: " in done.output
        refused = {index: reply.refused for index, reply in own.items() if reply.refused}
        assert refused, name
        assert min(refused) >= 6
        assert all("tokens, but the context length is 330" in reason for reason in refused.values())
        assert len(refused) < 6
        for row in rows_of(tmp_path / "out" / name):
            assert row["answers"][0]
            assert ("refused" in row) is (row["answers"][1] == "")
    assert replies["base"] != replies["sr"]


def test_a_template_of_one_turn_is_named_before_a_model_loads(tmp_path):
    model = tiny.make_model(tmp_path / "model")
    one = "{% if messages | length > 1 %}{{ raise_exception('One turn only.') }}{% endif %}"
    (model / "chat_template.jinja").write_text(one + tiny.CHATML, encoding="utf-8")
    done = invoke("--engine", "hf", "--model", model, "--data", SAMPLE, "--output", tmp_path / "out")
    assert done.exit_code == 2
    said = " ".join(done.output.split())
    assert "does not accept the turns before the last question of problem 1 (One turn only.)" in said
    assert "later `turns` from the data" in said
    assert not (tmp_path / "out").exists()


# --- vLLM ------------------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.slow
def test_vllm_asks_all_turns_in_one_load(model32, adapters, tmp_path, monkeypatch):
    """In float32, its answers are those of transformers, with an adapter, too."""
    from llamafactory_ext.evaluation import vllm_engine

    loads, load = [], vllm_engine.load_vllm
    monkeypatch.setattr(vllm_engine, "load_vllm", lambda settings: loads.append(settings) or load(settings))
    rows = {}
    for engine in ("hf", "vllm"):
        words = ("--engine", engine, "--model", model32, "--adapter", f"one={adapters['one']}", "--dtype", "float32")
        done = invoke(*words, "--data", SAMPLE, "--output", tmp_path / engine, "--max-tokens", 12)
        assert done.exit_code == 0, done.output
        rows[engine] = [
            [reply.token_ids for _, reply in sorted(Run(tmp_path / engine / name).read().items())]
            for name in ("base", "one")
        ]
    assert len(loads) == 1
    # The first answers to the letter; a later one as far as the texts of the earlier ones are the same: vLLM leaves out
    # the bytes of a last, unfinished character.
    texts = {
        engine: [Run(tmp_path / engine / name).read()[index].text for name in ("base", "one") for index in range(6)]
        for engine in rows
    }
    same = [a == b for a, b in zip(texts["hf"], texts["vllm"], strict=True)]
    parts = (slice(0, 6), slice(6, 12))
    first, later = ([[ids for run in rows[engine] for ids in run[part]] for engine in rows] for part in parts)
    assert first[0] == first[1]
    assert any(same)
    assert [ids for ids, known in zip(later[0], same, strict=True) if known] == [
        ids for ids, known in zip(later[1], same, strict=True) if known
    ]
