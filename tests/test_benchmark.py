"""The training benchmark: its numbers on pairs counted by hand, its naive Sr-DPO, and its runs on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
import training
import training_runs
from llamafactory.train import tuner
from llamafactory.train.dpo import workflow
from rich.console import Console
from tiny import make_model, recipe
from training_report import Build, Case, Report, plot, show, targets, timing
from training_runs import FULL, Runner, head_only
from training_tokens import common_prefix, flops, padding_share, prefix_histogram, tokens
from training_watch import parameters
from training_worker import naive_sr
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

SR_PROMPT = "Rate 9 of 9: "  # the Sr paper's is too long for the tiny model, whose tokens are bytes
# Tokens of the chosen and the rejected answer with their prompts, and of what both begin with.
PAIRS = [(10, 8, 6), (5, 5, 2)]
SIZE = {"parameters": 10, "trained": 4, "layers": 2, "hidden": 3}


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([1, 2, 3, 4], [1, 2, 5], 2),
        ([1, 2], [3, 4], 0),
        ([1, 2, 3], [1, 2, 3], 2),  # every answer keeps a token of its own
        ([1, 2, 3], [1, 2], 1),
    ],
)
def test_common_prefix(chosen, rejected, shared):
    assert common_prefix(chosen, rejected) == shared


def test_tokens_and_padding():
    assert [tokens(pair, shared=False) for pair in PAIRS] == [18, 10]
    assert [tokens(pair, shared=True) for pair in PAIRS] == [12, 8]
    # Four rows of 16 hold 28 tokens, two rows of 12 hold 20.
    assert padding_share(PAIRS, shared=False, positions=64) == 36 / 64
    assert padding_share(PAIRS, shared=True, positions=24) == pytest.approx(4 / 24)


def test_histogram_of_prefixes():
    # 12 of 18 tokens, 4 of 10, none of 7, 198 of 200.
    assert prefix_histogram([*PAIRS, (4, 3, 0), (100, 100, 99)]) == [1, 0, 0, 0, 1, 0, 1, 0, 0, 1]


def test_flops():
    # 4 * 10 + 2 * 4 = 48 per token; 12 * 2 * 3 = 72 per token that is seen: (10^2 + 8^2) / 2, less 6^2 / 2.
    assert flops((10, 8, 6), shared=False, size=SIZE) == 48 * 18 + 72 * 82
    assert flops((10, 8, 6), shared=True, size=SIZE) == 48 * 12 + 72 * 64
    full = SIZE | {"trained": 10, "layers": 0}
    assert flops((10, 8, 6), shared=False, size=full) == 6 * 10 * 18


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_that_tokens_are_multiplied_with(tmp_path, tied):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", tie_word_embeddings=tied))
    everything = sum(parameter.numel() for parameter in model.parameters())
    looked_up = 0 if tied else model.get_input_embeddings().weight.numel()
    model.get_output_embeddings().weight.requires_grad = False
    assert parameters(model, trained=False) == everything - looked_up
    assert parameters(model, trained=True) == everything - looked_up - model.get_output_embeddings().weight.numel()


def run_of(*steps, losses=(0.7, 0.7)):
    return {"setup": 0.0, "steps": list(steps), "losses": list(losses), "pairs": PAIRS, "positions": 64, **SIZE}


def test_rounds_are_joined_without_their_first_steps():
    joined = timing(Case("stock", "sigmoid", 1), [run_of(9.0, 4.0, 2.0), run_of(9.0, 1.0, 5.0)], 6, "NVIDIA H200")
    assert joined.steps == [4.0, 2.0, 1.0, 5.0]
    assert (joined.seconds, joined.pairs_per_second, joined.tokens_per_second) == (3.0, 2.0, 2 * 28 / 2)
    work = sum(flops(pair, shared=False, size=SIZE) for pair in PAIRS) / 2
    assert joined.mfu == pytest.approx(2 * work / 989e12)
    assert timing(joined.case, [run_of(9.0, 4.0)], 6, "CPU").mfu is None


def test_targets():
    seconds = {
        Case("stock", "sigmoid", 1): 8.0,
        Case("stock", "sigmoid", 4): 12.0,
        Case("ours", "sigmoid", 1): 4.0,
        Case("ours", "sigmoid", 4): 5.0,
        Case("ours", "dpop", 1): 5.0,
        Case("ours", "sr_dpo", 1): 6.0,
        Case("naive", "sr_dpo", 1): 15.0,
    }
    timings = [timing(case, [run_of(9.0, value)], 16, "CPU") for case, value in seconds.items()]
    memory = {
        "training": {"stock": {1: 10, 2: 20}, "ours": {1: 4, 2: 12, 4: 30}},
        "head": {"stock": {}, "ours": {1: 10, 2: 18, 4: 19}},
    }
    # 10 s for 16 pairs are 10 more per step of 16.
    found = targets(timings, [Build("sigmoid", 10.0, 16), Build("sr_dpo", 9.0, 16)], memory, refined=["sr_dpo"])
    assert [(target.value, target.reached) for target in found] == [
        (pytest.approx(8 / 4), True),
        (pytest.approx(12 / 5), False),
        (pytest.approx(8 / 5), False),
        (pytest.approx(6 / 8), True),
        (pytest.approx(15 / 6), True),
        (pytest.approx(8 / (4 + 10)), False),
        (pytest.approx(12 / 20), False),
        (pytest.approx(19 / 18), True),
    ]


def test_what_is_shown_and_written(tmp_path):
    losses = {
        Case("stock", "sigmoid", 1): (0.7, 0.5),
        Case("ours", "sigmoid", 1): (0.7, 0.75),
        Case("naive", "sr_dpo", 1): (0.6, 0.5),
        Case("ours", "sr_dpo", 1): (0.6, 0.5),
    }
    timings = [timing(case, [run_of(9.0, 4.0, losses=each)], 16, "NVIDIA H200") for case, each in losses.items()]
    memory = {part: {"stock": {1: 2**21}, "ours": {1: 2**20, 2: 2**21}} for part in ("training", "head")}
    about = {"commit": "abc", "versions": {"torch": "2.13"}}
    report = Report(about, PAIRS, timings, [Build("sigmoid", 10.0, 16)], memory, refined=["sr_dpo"])

    console = Console(record=True, width=120, file=StringIO())
    show(report, console)
    shown = console.export_text()
    assert "versions: torch 2.13" in shown
    assert "2 pairs of 14 tokens, 10 with the common prefix once" in shown
    written = json.loads(json.dumps(report.as_json()))
    assert written["loss_difference"] == 0.25
    assert written["timings"][0]["case"] == {"system": "stock", "loss": "sigmoid", "micro_batch": 1}
    assert [target["reached"] for target in written["targets"]] == [False, False, False, False, True, False]
    plot(report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_curves_end_before_the_limit():
    class Linear:
        def peak(self, case):
            return 10 * case.micro_batch if case.system == "stock" else case.micro_batch

    curves = training.peaks(Linear(), (1, 2, 4, 8), limit=40)
    assert curves == {"stock": {1: 10, 2: 20, 4: 40}, "ours": {1: 1, 2: 2, 4: 4, 8: 8}}


def test_naive_sr_dpo_trains_what_the_plugin_does(data, tmp_path, monkeypatch):
    # Saved in float32, because LLaMA-Factory leaves a reference in the precision that it was saved in.
    model, reference = (make_model(tmp_path / f"model{seed}", seed=seed, dtype="float32") for seed in (1, 0))

    def losses(output, **changes):
        tuner.run_exp(recipe(model, data, output, ref_model=str(reference), disable_shuffling=True, **changes))
        history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return [log["loss"] for log in history if "loss" in log]

    ours = losses(tmp_path / "ours", pref_loss="sr_dpo", sr_prompt=SR_PROMPT)
    for module, name, value in naive_sr(SR_PROMPT):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tuner, "run_dpo", workflow.run_dpo.__wrapped__)
    assert losses(tmp_path / "naive") == pytest.approx(ours, rel=1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runner(model, data, tmp_path):
    return Runner(model, "smollm2", data / "pairs.jsonl", "pairs", tmp_path / "out", FULL)


@pytest.mark.slow
def test_a_run_is_timed_once(runner, monkeypatch):
    case = Case("cold", "sigmoid", 2)
    result = runner.seconds(case, turn=0, global_batch=4, steps=1)
    assert len(result["steps"]) == len(result["losses"]) == 1
    assert len(result["pairs"]) == 8
    # A trie a row, two rows a batch, for the four pairs of the step.
    shortest, longest = (extreme(tokens(pair, shared=True) for pair in result["pairs"]) for extreme in (min, max))
    assert 4 * shortest <= result["positions"] <= 4 * longest
    assert list((runner.output / "cache" / "plain").rglob("*"))

    def fail(*args, **kwargs):
        raise AssertionError("it was run again")

    monkeypatch.setattr(training_runs, "_launch", fail)
    assert runner.seconds(case, turn=0, global_batch=4, steps=1) == result
    with pytest.raises(AssertionError):
        runner.seconds(case, turn=1, global_batch=4, steps=1)


@pytest.mark.slow
def test_peak_of_stock_log_probabilities(runner, tmp_path):
    head = replace(runner, model=head_only(runner.model, tmp_path / "head"))
    peak = head.peak(Case("stock", "sigmoid", 1))
    # The longer answer has 137 tokens with its prompt, padded to 144, and each position 258 logits: these in float32,
    # their log-softmax, and in the backward pass the gradients of both and a product. Hidden states are small.
    assert peak == pytest.approx(5 * 4 * 2 * 144 * 258, rel=0.1)


def test_a_failed_run_names_its_log(runner, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit('no memory')", encoding="utf-8")
    monkeypatch.setattr(training_runs, "WORKER", worker)
    with pytest.raises(training.UserError, match=r"status 1: .*ours-sigmoid-1-peak.*\.log says why"):
        runner.peak(Case("ours", "sigmoid", 1))
    (log,) = runner.output.rglob("*.log")
    assert log.read_text(encoding="utf-8").strip() == "no memory"


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "nowhere"], "there is no model in nowhere: run `make model`"),
        (["--data", "nowhere.jsonl"], "llamafactory-ext data corrupt train.jsonl --output nowhere.jsonl"),
        (["--losses", "minor_dbo"], "Did you mean 'minor_dpo'"),
        (["--losses", "simpo"], "--losses simpo has no reference"),
        (["--micro-batch", "3"], "--global-batch 16 is no multiple of --micro-batch 3"),
        (["--steps", "9"], "pairs.jsonl holds 12 pairs where 160 are needed"),
    ],
)
def test_what_cannot_be_run_is_said_at_once(model, data, tmp_path, words, sentence):
    named = ["--model", str(model), "--data", str(data / "pairs.jsonl"), "--output", str(tmp_path)]
    result = CliRunner().invoke(training.app, [*named, *words])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
