"""Several samples per problem: reproducible one by one, resumed, never mixed, and summed up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crashes import walk
from engine_cases import QUESTIONS, jobs, needs_vllm, settings
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint
from typer.testing import CliRunner

from llamafactory_ext.evaluation import sampling
from llamafactory_ext.evaluation.asking import ask_missing, make_engine
from llamafactory_ext.evaluation.engines import Job, Sampling
from llamafactory_ext.evaluation.generations import GENERATIONS, MANIFEST, Generation, Run
from llamafactory_ext.evaluation.questions import load_questions, messages
from llamafactory_ext.evaluation.scoring import pass_rates
from llamafactory_ext.evaluation.transformers_engine import TransformersEngine, _Draw

SCRIPT = Path(__file__).parents[2] / "evaluation" / "sample.py"


def invoke(*words: object):
    return CliRunner().invoke(sampling.app, [str(word) for word in words])


def sample_words(model, data, output, *more):
    return ("--engine", "hf", "--model", model, "--data", data, "--output", output, "--max-tokens", 12, *more)


def rows_of(output) -> dict[int, dict]:
    lines = (Path(output) / "base" / GENERATIONS).read_text(encoding="utf-8").splitlines()
    return {row["index"]: row for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def sampled(model32, tmp_path_factory):
    """Three problems, four samples each: the data and the output."""
    folder = tmp_path_factory.mktemp("sampled")
    rows = [{"question": text, "answer": f"so\n#### {index}"} for index, text in enumerate(QUESTIONS)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = invoke(*sample_words(model32, folder / "train.jsonl", folder / "out", "--samples", 4))
    assert done.exit_code == 0, done.output
    return folder / "train.jsonl", folder / "out"


# --- the command line ------------------------------------------------------------------------------------------------


def test_every_sample_is_saved_with_its_verdict(sampled):
    data, output = sampled
    rows = rows_of(output)
    questions, _ = load_questions(str(data))
    assert sorted(rows) == list(range(12))
    for index, row in rows.items():
        question = questions[index // 4]
        assert (row["problem"], row["sample"], row["gold"]) == (question.id, index % 4, str(question.gold))
        assert row["instruction"].endswith("\n" + question.text)
        assert row["correct"] is (row["answer"] == row["gold"])
        assert "system" not in row
    assert len({row["text"] for row in rows.values()}) == 12
    assert len({row["seed"] for row in rows.values()}) == 12
    assert len({row["run"] for row in rows.values()}) == 1
    rates = json.loads((output / "pass_rates.json").read_text(encoding="utf-8"))["base"]
    assert rates == json.loads((output / "base" / "pass_rates.json").read_text(encoding="utf-8"))
    assert (rates["problems"], rates["samples"]) == (3, 12)
    assert rates["pass@1"] == sum(row["correct"] for row in rows.values()) / 12
    assert json.loads((output / "base" / MANIFEST).read_text(encoding="utf-8"))["samples"] == 4


def test_nothing_is_asked_twice_and_another_setting_is_refused(model32, sampled):
    data, output = sampled
    written = (output / "base" / GENERATIONS).read_bytes()
    words = sample_words(model32, data, output)
    assert invoke(*words, "--samples", 4).exit_code == 0
    for more, key in (
        (("--samples", 5), "samples is 4, not 5"),
        (("--samples", 4, "--temperature", 0.5), "sampling is"),
        (("--samples", 4, "--seed", 1), "sampling is"),
        (("--samples", 4, "--prompt", "plain"), "prompt is"),
    ):
        refused = invoke(*words, *more)
        assert refused.exit_code == 2
        assert f"belongs to another run: its {key}" in " ".join(refused.output.split())
    assert (output / "base" / GENERATIONS).read_bytes() == written


def test_an_interrupted_run_ends_with_the_samples_of_a_whole_one(model32, sampled, tmp_path):
    """Also with another batch size: a sample depends on its seed alone."""
    data, whole = sampled
    words = sample_words(model32, data, tmp_path / "out", "--samples", 4, "--batch-size", 5)
    assert invoke(*words).exit_code == 0
    path = tmp_path / "out" / "base" / GENERATIONS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[3:8]) + lines[0][:40])
    assert invoke(*words).exit_code == 0
    assert len(path.read_bytes().splitlines()) == 12
    assert {i: row["text"] for i, row in rows_of(tmp_path / "out").items()} == {
        i: row["text"] for i, row in rows_of(whole).items()
    }


def test_a_sample_does_not_depend_on_how_many_problems_there_are(model32, sampled, tmp_path):
    data, whole = sampled
    assert invoke(*sample_words(model32, data, tmp_path, "--samples", 2, "--limit", 2)).exit_code == 0
    few, many = rows_of(tmp_path), rows_of(whole)
    assert [few[index]["text"] for index in range(4)] == [many[index]["text"] for index in (0, 1, 4, 5)]


def test_another_seed_gives_other_samples(model32, sampled, tmp_path):
    data, first = sampled
    assert invoke(*sample_words(model32, data, tmp_path, "--samples", 4, "--seed", 1)).exit_code == 0
    texts = [{row["text"] for row in rows_of(output).values()} for output in (first, tmp_path)]
    assert not texts[0] & texts[1]


def test_greedy_samples_would_all_be_alike(model32, sampled, tmp_path):
    data, _ = sampled
    words = sample_words(model32, data, tmp_path / "out", "--temperature", 0)
    refused = invoke(*words, "--samples", 2)
    assert refused.exit_code == 2
    assert "With --temperature 0 all samples of a problem are alike" in refused.output
    assert not (tmp_path / "out").exists()
    assert invoke(*words, "--samples", 1).exit_code == 0


def test_a_system_turn_is_saved_with_each_sample(model32, sampled, tmp_path):
    data, _ = sampled
    assert invoke(*sample_words(model32, data, tmp_path, "--samples", 1, "--system", "Brief.")).exit_code == 0
    assert {row["system"] for row in rows_of(tmp_path).values()} == {"Brief."}


def test_adapters_are_sampled_in_the_same_load(model32, adapters, sampled, tmp_path):
    data, _ = sampled
    more = ("--samples", 2, "--adapter", f"one={adapters['one']}", "--skip-base")
    assert invoke(*sample_words(model32, data, tmp_path, *more)).exit_code == 0
    assert list(json.loads((tmp_path / "pass_rates.json").read_text())) == ["one"]


@pytest.mark.slow
def test_killed_and_run_again_it_is_as_if_nothing_had_happened(model32, sampled, tmp_path):
    data, whole = sampled
    words = sample_words(model32, data, tmp_path / "out", "--samples", 4, "--batch-size", 1)
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    path = tmp_path / "out" / "base" / GENERATIONS
    process = subprocess.Popen(command, env=dict(os.environ), stdout=subprocess.DEVNULL)
    while not (path.is_file() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(Run(path.parent).read()) < 12
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {i: row["text"] for i, row in rows_of(tmp_path / "out").items()} == {
        i: row["text"] for i, row in rows_of(whole).items()
    }


# --- a server --------------------------------------------------------------------------------------------------------


def sample_from(server, data, output):
    words = ("--engine", "openai", "--model", "tiny", "--base-url", server.url, "--data", data, "--output", output)
    return invoke(*words, "--max-tokens", 12, "--concurrency", 1, "--prompt", "plain", "--samples", 2)


def test_a_server_is_sent_a_seed_per_sample_and_asked_only_what_is_missing(server, data, tmp_path):
    server.broken_after = 4
    assert sample_from(server, data, tmp_path / "out").exit_code == 2
    assert sorted(rows_of(tmp_path / "out")) == [0, 1, 2]  # the first request fails, and is sent again
    server.broken_after = 10**9
    server.requests.clear()
    server.requests.append({})  # as the first request, which would fail
    assert sample_from(server, data, tmp_path / "out").exit_code == 0
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == list(range(6))
    assert [request["seed"] for request in server.requests[1:]] == [rows[index]["seed"] for index in (3, 4, 5)]


def test_what_a_server_refuses_is_no_sample(server, data, tmp_path):
    server.refuse = lambda question: 400 if question == QUESTIONS[1] else None
    done = sample_from(server, data, tmp_path)
    assert done.exit_code == 0, done.output
    assert "2 samples were refused: 2 (sample 1), 2 (sample 2) (Error code: 400" in done.output
    rates = json.loads((tmp_path / "pass_rates.json").read_text())["base"]
    assert (rates["problems"], rates["samples"]) == (2, 4)


# --- vLLM ------------------------------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.slow
def test_vllm_samples_by_seed(model32):
    """The same seed gives the same answer, another gives another."""
    ask = settings(model32, sampling=Sampling(temperature=1.0, max_tokens=12), dtype="float32", max_model_len=1024)
    asked = [Job("base", index, jobs()[0].messages, seed) for index, seed in enumerate((5, 5, 6, 7))]
    texts = {job.index: reply.token_ids for job, reply in make_engine("vllm", ask).generate(asked)}
    assert texts[0] == texts[1]
    assert len({str(ids) for ids in texts.values()}) == 3


# --- how a token is drawn --------------------------------------------------------------------------------------------


def test_tokens_are_drawn_as_often_as_they_are_likely():
    import torch

    logits = torch.tensor([1.0, 0.0, -1.0, float("-inf")])
    drawn = _Draw(list(range(4000)), "cpu")(None, logits.expand(4000, -1)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[3] == 0
    assert torch.allclose(shares, logits.softmax(-1), atol=0.03)


def test_temperature_and_top_p_are_obeyed(model32):
    """Near temperature 0 or top-p 0, sampling is greedy."""
    greedy = {job.index: reply.text for job, reply in TransformersEngine(settings(model32)).generate(jobs())}
    for sharp in (Sampling(temperature=1e-6, max_tokens=12), Sampling(temperature=1.0, top_p=0.0, max_tokens=12)):
        engine = TransformersEngine(settings(model32, sampling=sharp))
        assert {job.index: reply.text for job, reply in engine.generate(jobs())} == greedy


# --- crashes ---------------------------------------------------------------------------------------------------------


class Scripted:
    """An engine that answers in order."""

    def generate(self, asked):
        for job in asked:
            yield job, Generation(job.index, f"The answer is {job.index % 3}. " * 8, [job.seed] * 50, "stop")


def test_every_crash_leads_to_the_same_samples(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"#### {n}"}) + "\n" for n in range(2)))
    questions, _ = load_questions(str(data))
    plan = sampling.Plan(questions, [messages(question, "{question}", None) for question in questions], 2, seed=0)

    def work(folder):
        runs = {"base": (folder, {"samples": 2})}
        verdicts = sampling.Verdicts(plan, {"base": "a run"})
        ask_missing(Scripted(), plan.asked, runs, seeds=plan.seeds, watch=verdicts.watch, columns=verdicts.columns)

    def result(folder):
        return {name: (folder / name).read_bytes() for name in (MANIFEST, GENERATIONS)}

    assert walk(work, tmp_path / "run", result=result) >= 10


# --- pass rates ------------------------------------------------------------------------------------------------------


def verdicts(*problems: str) -> list[dict]:
    """Samples of problems, each written like `10-`: right, wrong, unread."""
    return [
        {
            "problem": str(number),
            "correct": sign == "1",
            "answer": None if sign == "-" else sign,
            "degenerate": sign == "-",
            "finish_reason": "length" if sign == "-" else "stop",
        }
        for number, signs in enumerate(problems)
        for sign in signs
    ]


def test_pass_rates_worked_out_by_hand():
    rates = pass_rates(verdicts("1111", "1100", "00--", "1000"))
    assert (rates["problems"], rates["samples"]) == (4, 16)
    assert rates["pass@1"] == (1 + 0.5 + 0 + 0.25) / 4
    assert (rates["solved"], rates["all_right"], rates["all_wrong"]) == (0.75, 0.25, 0.25)
    assert (rates["unread"], rates["degenerate"], rates["cut_off"]) == (2 / 16, 2 / 16, 2 / 16)
    # The rates' variance is (0.5625² + 0.0625² + 0.4375² + 0.1875²) / 3 = 0.182..., of the mean 0.0456; so the samples
    # weigh as 0.4375 * 0.5625 / 0.0456 = 5.4 independent ones.
    effective = 0.4375 * 0.5625 / ((0.5625**2 + 0.0625**2 + 0.4375**2 + 0.1875**2) / 3 / 4)
    assert 5.3 < effective < 5.5
    expected = proportion_confint(0.4375 * effective, effective, method="wilson")
    assert rates["wilson_95"] == pytest.approx(expected)


def test_one_sample_per_problem_has_wilsons_interval():
    assert pass_rates(verdicts(*"1101001"))["wilson_95"] == pytest.approx(proportion_confint(4, 7, method="wilson"))


def test_samples_that_agree_count_once_per_problem():
    """Four samples that are always alike say no more than one."""
    assert pass_rates(verdicts("1111", "0000", "1111"))["wilson_95"] == pytest.approx(
        pass_rates(verdicts("1", "0", "1"))["wilson_95"]
    )
    for right in ("1", "0"):
        assert pass_rates(verdicts(right * 4, right * 4))["wilson_95"] == pytest.approx(
            pass_rates(verdicts(right, right))["wilson_95"]
        )


@given(st.lists(st.text("01", min_size=1, max_size=6), min_size=1, max_size=8))
def test_an_interval_holds_the_rate_and_is_as_wide_as_one_of_all_samples(problems):
    rates = pass_rates(verdicts(*problems))
    low, high = rates["wilson_95"]
    assert 0 <= low <= rates["pass@1"] + 1e-9
    assert rates["pass@1"] - 1e-9 <= high <= 1
    all_samples = proportion_confint(rates["pass@1"] * rates["samples"], rates["samples"], method="wilson")
    assert high - low >= all_samples[1] - all_samples[0] - 1e-9
    assert rates["solved"] + rates["all_wrong"] == pytest.approx(1)
