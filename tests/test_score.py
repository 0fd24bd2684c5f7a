"""Offline scores are the numbers of a training, survive an interruption, and correlate with the data's own scores."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from llamafactory.train import tuner
from rich.console import Console
from tiny_answers import make_answers
from typer.testing import CliRunner

from llamafactory_ext import cli
from llamafactory_ext.errors import UserError
from llamafactory_ext.scoring.file import check_output, read_scores
from llamafactory_ext.scoring.scorer import reference_of, score_pairs
from llamafactory_ext.scoring.summary import correlate, summarize

SCRIPT = Path(sys.executable).with_name("llamafactory-ext")


@pytest.fixture
def settings(model, other_model, tmp_path):
    """Five pairs with scores, one of them no pair, in float32 and small batches."""
    data = tiny.make_data(tmp_path / "data", train=5)
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"score_chosen": 9.0 - n, "score_rejected": 2.0 * n} for n, row in enumerate(rows)]
    rows[3]["rejected"] = None
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def make(**changes):
        asked = {"stage": "dpo", "model_name_or_path": str(model), "ref_model": str(other_model), "template": "smollm2"}
        asked |= {"dataset_dir": str(data), "dataset": "pairs", "default_system": "Add.", "infer_dtype": "float32"}
        return {key: value for key, value in (asked | changes).items() if value is not None}

    return make


def run(settings, output, **options):
    list(score_pairs(settings, output, **options))
    return read_scores(output)


def test_scores_are_the_numbers_of_a_training_step(settings, tmp_path):
    """One step over the four pairs that can be trained on logs the means of what is written for each."""
    asked = settings(pref_loss="sr_dpo", sr_prompt="Rate 9 of 9: ")
    scored = [row for row in run(asked, tmp_path / "scores.jsonl", batch_size=3) if not row["skipped"]]
    recipe = {key: value for key, value in asked.items() if key != "infer_dtype"}
    changes = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0}
    tuner.run_exp(tiny.recipe(asked["model_name_or_path"], "", tmp_path / "out", **recipe | changes))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][0]
    names = {
        "loss": "loss",
        "chosen_logp": "logps/chosen",
        "chosen_logratio": "normalized_rewards/chosen",
        "rejected_logratio": "normalized_rewards/rejected",
        "margin": "normalized_rewards/margins",
        "refinement": "sr/refinement",
        "augmented_margin": "sr/augmented_margins",
        "dpo/coefficient": "dpo/coefficient",
    }
    for ours, logged in names.items():
        mean = sum(row[ours] for row in scored) / 4
        assert mean == pytest.approx(log[logged], rel=1e-3, abs=1e-4), ours


@pytest.mark.parametrize(
    ("changes", "columns"),
    [
        ({"pref_loss": "odpo", "pref_margin_column": ["score_chosen", "bad"], "pref_weight_column": "weight"}, []),
        ({"pref_loss": "minor_dpo,cringe", "cringe_top_k": 1}, ["loss/minor_dpo", "loss/cringe"]),
        ({"pref_loss": "hinge", "f_divergence": "js"}, []),
    ],
)
def test_losses_of_every_kind_are_scored(settings, tmp_path, changes, columns):
    """As a training logs them, but without weights, which stand beside."""
    path = tmp_path / "data" / "pairs.jsonl"
    rows = [json.loads(line) | {"bad": 1.5} for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = settings(**changes)
    scored = [row for row in run(asked, tmp_path / "scores.jsonl", batch_size=4) if not row["skipped"]]
    recipe = {key: value for key, value in asked.items() if key not in ("infer_dtype", "pref_weight_column")}
    about = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.0}
    tuner.run_exp(tiny.recipe(asked["model_name_or_path"], "", tmp_path / "out", **recipe | about))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"][0]
    for name in ["loss", *columns]:
        assert sum(row[name] for row in scored) / 4 == pytest.approx(log[name], rel=1e-3), name
    if "pref_weight_column" in changes:
        kept = [row for row in rows if row["rejected"] is not None]
        assert [row["pair_weight"] for row in scored] == [row["weight"] for row in kept]
        assert [row["score_gap"] for row in scored] == pytest.approx([row["score_chosen"] - 1.5 for row in kept])


@pytest.mark.parametrize("name", ["sft", "kto_pair", "aot"])
def test_a_pairs_loss_does_not_depend_on_those_beside_it(settings, tmp_path, name):
    """Not even that of a loss that looks at a micro-batch; SFT's is then the mean of the pair's own tokens."""
    asked = settings(pref_loss=f"{name},hinge")
    found = [
        [row for row in run(asked, tmp_path / f"{size}.jsonl", batch_size=size) if not row["skipped"]]
        for size in (1, 4)
    ]
    for alone, beside in zip(*found, strict=True):
        assert alone[f"loss/{name}"] == pytest.approx(beside[f"loss/{name}"], rel=1e-4)
        if name == "sft":
            assert alone["loss/sft"] == pytest.approx(-alone["chosen_logp"] / alone["chosen_tokens"], rel=1e-5)


def test_rows_keep_their_order_and_the_datas_scores(settings, tmp_path):
    rows = run(settings(), tmp_path / "scores.jsonl", batch_size=2)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["skipped"] for row in rows] == [False, False, False, True, False]
    assert [row.get("score_rejected") for row in rows] == [0.0, 2.0, 4.0, None, 8.0]
    assert {file.name for file in tmp_path.iterdir()} == {"data", "scores.jsonl"}

    assert run(settings(), tmp_path / "scores.parquet", batch_size=2)[4] == rows[4]
    whole = run(settings(), tmp_path / "whole.jsonl", batch_size=5)
    assert whole[1]["margin"] == pytest.approx(rows[1]["margin"], abs=1e-3)


def test_scores_of_the_data_that_are_no_numbers_are_none(settings, tmp_path):
    path = tmp_path / "data" / "pairs.jsonl"
    rows = [json.loads(line) | {"score_chosen": "9", "score_rejected": "2"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    scored = run(settings(), tmp_path / "scores.jsonl")
    assert {row["score_chosen"] for row in scored if not row["skipped"]} == {None}
    assert summarize(scored).correlations == {}


def test_an_adapter_is_scored_against_its_base(settings, model, tmp_path):
    adapter = tiny.make_adapter(tmp_path / "adapter", model, seed=3)
    asked = settings(ref_model=None, adapter_name_or_path=str(adapter))
    assert reference_of(asked) == settings(ref_model=None)
    with pytest.raises(UserError, match="with `finetuning_type: lora` only, not 'full': write finetuning_type=lora"):
        run(asked | {"finetuning_type": "full"}, tmp_path / "none.jsonl")
    rows = run(asked, tmp_path / "scores.jsonl")
    assert all(abs(row["margin"]) > 1e-4 for row in rows if not row["skipped"])

    both = settings(ref_model=str(model), adapter_name_or_path=str(adapter))
    again = run(both, tmp_path / "again.jsonl")
    assert [row.get("margin") for row in again] == [row.get("margin") for row in rows]


def test_a_reference_has_its_adapters_whatever_is_trained(settings, model, tmp_path):
    """As in a training: the model with this adapter is the reference, and so every log-ratio is far from 0."""
    adapter = tiny.make_adapter(tmp_path / "adapter", model, seed=3)
    asked = settings(ref_model=str(model), ref_model_adapters=str(adapter), finetuning_type="full")
    rows = [row for row in run(asked, tmp_path / "scores.jsonl") if not row["skipped"]]
    assert all(abs(row["chosen_logratio"]) > 1e-4 for row in rows)


@pytest.mark.parametrize("stage", ["sft", "rm", "kto"])
def test_other_stages_are_refused(stage, settings, tmp_path):
    with pytest.raises(UserError, match=f"of stage dpo, not '{stage}': write stage=dpo"):
        run(settings(stage=stage), tmp_path / "scores.jsonl")


def test_weights_that_would_be_drawn_anew_are_refused(settings, tmp_path):
    """With tokens that the model has already, nothing is drawn, and nothing refused."""
    tokens = {"add_tokens": "<a>,<b>", "resize_vocab": True}
    with pytest.raises(UserError, match=r"resize_vocab and add_tokens: .* new random weights"):
        run(settings(**tokens), tmp_path / "scores.jsonl")
    known = settings(add_tokens="!", resize_vocab=True)
    assert run(known, tmp_path / "known.jsonl") == run(settings(), tmp_path / "plain.jsonl")


def test_no_pair_at_all_is_said(settings, tmp_path, capsys):
    path = tmp_path / "data" / "pairs.jsonl"
    rows = [json.loads(line) | {"rejected": None} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"{key}={value}" for key, value in settings().items()]
    result = CliRunner().invoke(cli.app, ["score", *words, "--output", str(tmp_path / "scores.jsonl")])
    assert result.exit_code == 2
    assert "none of 5 rows is a pair that LLaMA-Factory would train on" in result.output


def test_an_interrupted_run_goes_on(settings, tmp_path):
    whole = run(settings(), tmp_path / "whole.jsonl", batch_size=1)
    output, unfinished = tmp_path / "scores.jsonl", tmp_path / ".scores.jsonl.unfinished"
    list(itertools.islice(score_pairs(settings(), output, batch_size=1), 3))  # two pairs, then no more
    assert not output.exists()
    unfinished.write_text(unfinished.read_text(encoding="utf-8") + '{"index": 2, "mar', encoding="utf-8")

    refused = "was started with other settings, data or models: its "
    with pytest.raises(UserError, match=refused):
        run(settings(pref_beta=0.5), output)
    pairs = Path(settings()["dataset_dir"], "pairs.jsonl")
    before = pairs.read_bytes()
    pairs.write_bytes(before.replace(b"0", b"1", 1))
    assert pairs.read_bytes() != before
    with pytest.raises(UserError, match=refused):
        run(settings(), output)
    pairs.write_bytes(before)
    tokenizer = Path(settings()["model_name_or_path"], "tokenizer_config.json")
    written = tokenizer.read_text()
    tokenizer.write_text(written + "\n")
    with pytest.raises(UserError, match=refused):
        run(settings(), output)
    tokenizer.write_text(written)
    (first, total), *_ = steps = list(score_pairs(settings(), output, batch_size=1))
    assert (first, total, len(steps)) == (2, 5, 4)
    assert read_scores(output) == whole
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref_model": None}, "its own reference"),
        ({"dataset": "pairs,pairs_eval"}, "one data set"),
        ({"pref_loss": "orpo"}, "'orpo' has no reference"),
        ({"pref_loss": "nope"}, "unknown"),
        ({"ref_model": "no/model"}, "the model 'no/model' cannot be loaded"),
        ({"model_name_or_path": "no/model"}, "the tokenizer of 'no/model'"),
    ],
)
def test_refused(settings, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(settings(**changes), tmp_path / "scores.jsonl")
    assert {file.name for file in tmp_path.iterdir()} == {"data"}


def test_outputs_that_are_refused(tmp_path):
    (tmp_path / "there.jsonl").touch()
    for name, message in (
        ("a.csv", "does not end in .jsonl or .parquet"),
        ("there.jsonl", "already exists and is complete"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(tmp_path / name)


def test_golden_correlations():
    # Ranks 1 2 3 4 against 1 3 2 4: Spearman 1 - 6 * 2 / (4 * 15); Kendall (5 - 1) / 6.
    found = correlate([1.0, 2.0, 3.0, 10.0], [1.0, 3.0, 2.0, 4.0])
    assert found["Spearman"][0] == pytest.approx(0.8)
    assert found["Kendall"][0] == pytest.approx(2 / 3)
    # Deviations -3 -2 -1 6 and -1.5 0.5 -0.5 1.5: 13 / sqrt(50 * 5).
    assert found["Pearson"][0] == pytest.approx(13 / 250**0.5)
    assert all(value != value for value, _ in correlate([1.0, 1.0], [1.0, 2.0]).values())


def test_a_recorded_table_by_hand(tmp_path, capsys, monkeypatch):
    """Four pairs that are scored, and one that is not; the last row of the data comes first, as after an interruption.

    margins 2, -1, 3, 4: mean 8 / 4 = 2; above 0: 3 of 4.
    losses 0.5, 1.5, 0.25, 0.25: mean 2.5 / 4 = 0.625
    differences of the data's scores 1, 2, 3, 5 against the margins:
        ranks of the margins 2 1 3 4 against 1 2 3 4: Spearman 1 - 6 * (1 + 1) / (4 * 15) = 0.8; Kendall (5 - 1) / 6
        deviations 0 -3 1 2 and -1.75 -0.75 0.25 2.25: Pearson (0 + 2.25 + 0.25 + 4.5) / sqrt(14 * 8.75) = 0.632
    """
    numbers = [(2.0, 0.5, 1), (-1.0, 1.5, 2), (3.0, 0.25, 3), (4.0, 0.25, 5)]
    rows = [
        {"index": n, "skipped": False, "margin": margin, "loss": loss, "score_chosen": score, "score_rejected": 0}
        for n, (margin, loss, score) in enumerate(numbers)
    ]
    rows = [{"index": 4, "skipped": True}, rows[3], *rows[:3]]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(cli, "console", Console(width=200))
    cli._show(summarize(read_scores(path)), Path("scores.jsonl"))
    shown = " ".join(word for word in capsys.readouterr().out.split() if word not in "│┃")
    for line in (
        "scores.jsonl: 4 pairs",
        "margin 2 ",
        "loss 0.625 ",
        "accuracy (margin > 0) 75.0%",
        "1 rows skipped",
        "Pearson 0.632 (p = ",
        "Spearman 0.800 (p = ",
        "Kendall 0.667 (p = ",
    ):
        assert line in shown


def test_scores_of_a_folders_rows_are_in_the_order_of_the_training(settings, tmp_path):
    """LLaMA-Factory reads all files of a folder as they come, of whichever split."""
    asked = settings()
    data = Path(asked["dataset_dir"])
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    (data / "folder").mkdir()
    for name, part in (("b-train", rows[:2]), ("a-test", rows[2:3]), ("c", rows[4:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (data / "folder" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    info = json.loads((data / "dataset_info.json").read_text(encoding="utf-8"))
    info["folder"] = info["pairs"] | {"file_name": "folder"}
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    expected = {
        row["score_rejected"]: row["chosen_logp"] for row in run(asked, tmp_path / "file.jsonl") if not row["skipped"]
    }
    found = {
        row["score_rejected"]: row["chosen_logp"] for row in run(settings(dataset="folder"), tmp_path / "folder.jsonl")
    }
    assert found == pytest.approx(expected, abs=1e-3)


def test_summary():
    rows = [{"index": i, "skipped": False, "margin": m, "score_chosen": 2.0, "score_rejected": 2.0 - m} for i, m in
            enumerate([1.0, 2.0, -3.0, 0.5])]  # fmt: skip
    summary = summarize([*rows, {"index": 4, "skipped": True}])
    assert (summary.pairs, summary.skipped, summary.accuracy) == (4, 1, 0.75)
    assert summary.means["margin"] == pytest.approx(0.125)
    assert summary.augmented_accuracy is None
    assert summary.correlations["margin"]["Pearson"][0] == pytest.approx(1.0)
    assert summarize([]).pairs == 0


@pytest.mark.slow
def test_command_line_survives_kill(settings, tmp_path):
    words = [f"{key}={value}" for key, value in settings(max_samples=3).items()]
    command = [str(SCRIPT), "score", *words, "--output", "scores.jsonl", "--batch-size", "1"]
    environment = dict(os.environ)
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    unfinished = tmp_path / ".scores.jsonl.unfinished"
    while not (unfinished.exists() and unfinished.read_text(encoding="utf-8").count("\n") > 1) and not killed.poll():
        time.sleep(0.001)
        if (tmp_path / "scores.jsonl").exists():
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / "scores.jsonl").unlink(missing_ok=True)  # had it been too quick for us

    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "scores.jsonl: 3 pairs" in done.stdout
    assert "correlation of margin with the data's scores: Pearson" in " ".join(done.stdout.split())
    assert len(read_scores(tmp_path / "scores.jsonl")) == 3

    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert "already exists and is complete" in again.stderr


def test_answers_of_several_turns_are_scored_and_more_than_two_refused(model, other_model, data, tmp_path):
    folder = make_answers(tmp_path / "data", data)
    recipe = tiny.recipe(model, folder, tmp_path / "out", dataset="turns", ref_model=str(other_model), cutoff_len=200)
    list(score_pairs(recipe, tmp_path / "turns.jsonl"))
    scored = read_scores(tmp_path / "turns.jsonl")
    assert len(scored) == 12
    assert all(row["chosen_tokens"] > 0 and not row["skipped"] for row in scored)
    with pytest.raises(UserError, match="row 1 has more than two answers, and only pairs are scored"):
        list(score_pairs(recipe | {"dataset": "four"}, tmp_path / "four.jsonl"))
