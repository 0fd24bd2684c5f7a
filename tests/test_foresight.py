"""`data check --model` and `data drop`: their numbers, what they refuse, and that a killed run resumes."""

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
import torch
from crashes import walk
from llamafactory.data.processor.processor_utils import infer_seqlen
from rapidfuzz.distance import Levenshtein
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llamafactory_ext.cli import app
from llamafactory_ext.errors import UserError
from llamafactory_ext.scoring import foresight
from llamafactory_ext.scoring.file import ScoreFile, read_scores
from llamafactory_ext.scoring.foresight import foresee
from llamafactory_ext.scoring.scorer import score_pairs

SCRIPT = Path(sys.executable).with_name("llamafactory-ext")
SCORE = "normalized_ches"


@pytest.fixture
def settings(model, tmp_path):
    """Two data sets in one recipe, one of whose rows is no pair; rows have columns that LLaMA-Factory does not know."""
    data = tiny.make_data(tmp_path / "data", train=6, evaluation=4)
    rows = read(data / "pairs.jsonl")
    rows[3]["rejected"] = None
    write(data / "pairs.jsonl", rows)

    def make(**changes):
        about = {"dataset": "pairs,pairs_eval", "infer_dtype": "float32", **changes}
        asked = tiny.recipe(model, data, tmp_path / "out", **about)
        return {key: value for key, value in asked.items() if value is not None}

    return make


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scored(asked, output, **options):
    list(foresee(asked, output, **options))
    return read_scores(output, SCORE)


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], prog_name="llamafactory-ext")


def words_of(asked):
    return [f"{key}={value}" for key, value in asked.items()]


def plain(model, row, cutoff_len):
    """CHES of a row by transformers alone, in float64, with the prompt written out by hand."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model).double().eval()
    prompt = (
        f"<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
    )
    prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [
        tokenizer(row[side] + "<|im_end|>\n", add_special_tokens=False)["input_ids"] for side in ("chosen", "rejected")
    ]
    kept, room = infer_seqlen(len(prompt), max(map(len, ids)), cutoff_len)
    ids, prompt = [each[:room] for each in ids], prompt[:kept]
    means = []
    for response in ids:
        with torch.no_grad():
            states = policy(input_ids=torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1][0]
        means.append(states[len(prompt) - 1 : -1].mean(0))
    return (means[0] @ means[1] - means[0] @ means[0]).item(), Levenshtein.normalized_distance(*ids)


@pytest.mark.parametrize("cutoff_len", [128, 60])
@pytest.mark.parametrize("share_prefix", [None, False])
def test_scores_are_the_plain_formula(cutoff_len, share_prefix, settings, model, tmp_path):
    """Whole responses and cut ones, in both layouts, in batches and through two data sets."""
    asked = settings(cutoff_len=cutoff_len, share_prefix=share_prefix)
    rows = read(tmp_path / "data" / "pairs.jsonl") + read(tmp_path / "data" / "pairs_eval.jsonl")
    found = scored(asked, tmp_path / "scores.jsonl", batch_tokens=600)
    assert [row["index"] for row in found] == list(range(10))
    assert [row["index"] for row in found if row["skipped"]] == [3]
    for row in found:
        if not row["skipped"]:
            wanted, distance = plain(model, rows[row["index"]], cutoff_len)
            assert row[SCORE] == pytest.approx(wanted, rel=1e-3, abs=1e-4)
            assert row["edit_distance"] == pytest.approx(distance)
            mean = row["chosen_tail_logp"] / row["chosen_tail_tokens"]
            assert row["chosen_tail_mean_logp"] == pytest.approx(mean)


def test_log_probabilities_are_those_of_score(settings, other_model, tmp_path):
    asked = settings(dataset="pairs")
    found = scored(asked, tmp_path / "scores.jsonl")
    list(score_pairs(asked | {"ref_model": str(other_model)}, tmp_path / "margins.jsonl"))
    names = ("chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens")
    for ours, theirs in zip(found, read_scores(tmp_path / "margins.jsonl"), strict=True):
        for name in names if not ours["skipped"] else ():
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


def test_an_adapter_reads_the_pairs_too(settings, model, tmp_path):
    adapter = tiny.make_adapter(tmp_path / "adapter", model, seed=3)
    without = scored(settings(dataset="pairs"), tmp_path / "without.jsonl")
    asked = settings(dataset="pairs", finetuning_type="lora", adapter_name_or_path=str(adapter))
    found = scored(asked, tmp_path / "with.jsonl")
    assert all(abs(a[SCORE] - b[SCORE]) > 1e-6 for a, b in zip(found, without, strict=True) if not a["skipped"])


def test_batches_have_similar_lengths_and_fit():
    lengths = [10, 0, 40, 20, 39]
    assert list(foresight._by_tokens(lengths, 160, [0, 1, 2, 3, 4])) == [[2, 4], [3, 0, 1]]
    assert list(foresight._by_tokens(lengths, 1, [0, 2, 4])) == [[2], [4], [0]]


def test_an_interrupted_run_resumes(settings, tmp_path):
    whole = scored(settings(), tmp_path / "whole.jsonl", batch_tokens=1)
    output, unfinished = tmp_path / "scores.jsonl", tmp_path / ".scores.jsonl.unfinished"
    list(itertools.islice(foresee(settings(), output, batch_tokens=1), 4))  # three pairs, then no more
    unfinished.write_text(unfinished.read_text(encoding="utf-8") + '{"index": 2, "ch', encoding="utf-8")
    with pytest.raises(UserError, match="was started with other settings, data or models: its "):
        scored(settings(cutoff_len=60), output)
    (first, total), *_ = steps = list(foresee(settings(), output, batch_tokens=1))
    assert (first, total, len(steps)) == (3, 10, 8)
    assert read_scores(output, SCORE) == whole
    assert not unfinished.exists()


def test_every_crash_leads_to_the_same_scores(tmp_path):
    """Batches by length, so that rows are written out of order."""
    lengths = [5, 9, 7]

    def work(folder):
        file = ScoreFile(folder / "scores.jsonl", {"settings": 1}, SCORE)
        try:
            with file:
                rows = lambda batch: [{"index": n, "skipped": False, SCORE: n / 4} for n in batch]  # noqa: E731
                list(file.fill(3, rows, lambda indices: foresight._by_tokens(lengths, 1, indices)))
        except UserError as error:
            assert "is complete" in str(error)  # noqa: PT017

    def result(folder):
        (name,) = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
        return (folder / name).read_bytes()

    assert walk(work, tmp_path / "folder", result) >= 10
    assert [row["index"] for row in read_scores(tmp_path / "folder" / "scores.jsonl", SCORE)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, "names no data set"),
        ({"stage": "rm"}, "of stage dpo, not 'rm': write stage=dpo"),
        ({"model_name_or_path": "no/model"}, "the tokenizer of 'no/model'"),
        ({"add_tokens": "<a>", "resize_vocab": True}, "new random weights"),
    ],
)
def test_wrong_recipes_are_refused(changes, message, settings, tmp_path):
    with pytest.raises(UserError, match=message):
        scored(settings() | changes, tmp_path / "scores.jsonl")
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_shared_prefix_that_is_not_exact_is_refused_if_it_is_wanted(settings, tmp_path):
    drops_out = str(tiny.make_model(tmp_path / "drops_out", attention_dropout=0.1))
    with pytest.raises(UserError, match="`share_prefix: true` is not possible here: with dropout"):
        scored(settings(model_name_or_path=drops_out, share_prefix=True), tmp_path / "scores.jsonl")
    assert len(scored(settings(model_name_or_path=drops_out), tmp_path / "scores.jsonl")) == 10


def test_scores_that_are_not_finite_are_refused(settings, model, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(model)
    broken.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "broken")
    with pytest.raises(UserError, match=r"row \d+ has a score that is not finite"):
        scored(settings(model_name_or_path=str(tmp_path / "broken"), share_prefix=False), tmp_path / "scores.jsonl")


def test_memory_that_runs_out_is_said(settings, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(foresight, "rows_of", fail)
    with pytest.raises(UserError, match=r"memory ran out at \d+ pairs of \d+ tokens: .* fewer --batch-tokens"):
        scored(settings(), tmp_path / "scores.jsonl")


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_worst_pairs_are_shown_and_dropped(settings, tmp_path):
    """From both data sets, with all columns, as a data set that a recipe can name."""
    asked, scores, rest = settings(), tmp_path / "scores.jsonl", tmp_path / "data" / "kept.jsonl"
    checked = command("data", "check", *words_of(asked), "--model", "--output", scores)
    assert checked.exit_code == 1, checked.output  # a row is no pair
    found = [row for row in read_scores(scores, SCORE) if not row["skipped"]]
    worst = [row["index"] for row in sorted(found, key=lambda row: -row[SCORE])]
    shown = checked.stdout[checked.stdout.index("Highest length-normalized CHES") :]
    numbers = [int(line.strip(" │┃").split()[0]) for line in shown.splitlines()[4:9]]
    assert numbers == [index + 1 for index in worst[:5]]

    dropped = command("data", "drop", *words_of(asked), "--scores", scores, "--worst", "0.34", "--output", rest)
    assert dropped.exit_code == 0, dropped.output
    rows = read(tmp_path / "data" / "pairs.jsonl") + read(tmp_path / "data" / "pairs_eval.jsonl")
    assert read(rest) == [row for index, row in enumerate(rows) if index not in worst[:3]]
    gone = read(tmp_path / "data" / "kept.dropped.jsonl")
    assert [row["line"] for row in gone] == sorted(index + 1 for index in worst[:3])
    info = json.loads((tmp_path / "data" / "dataset_info.json").read_text(encoding="utf-8"))
    assert info["kept"] == info["pairs"] | {"file_name": "kept.jsonl"}
    again = scored(settings(dataset="kept"), tmp_path / "again.jsonl")
    assert [row[SCORE] for row in again if not row["skipped"]] == pytest.approx(
        [row[SCORE] for row in found if row["index"] not in worst[:3]], rel=1e-4
    )


def test_of_max_samples_the_first_are_kept(settings, tmp_path):
    asked, scores = settings(max_samples=2), tmp_path / "scores.jsonl"
    scored(asked, scores)
    words = ["data", "drop", *words_of(asked), "--scores", scores, "--worst", "0.5"]
    done = command(*words, "--output", tmp_path / "data" / "kept.jsonl")
    assert done.exit_code == 0, done.output
    parts = [read(tmp_path / "data" / f"{name}.jsonl")[:2] for name in ("pairs", "pairs_eval")]
    kept = read(tmp_path / "data" / "kept.jsonl")
    assert len(kept) == 2
    assert all(row in parts[0] + parts[1] for row in kept)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model"], "--model writes its scores to --output"),
        (["--output", "scores.jsonl"], "--model writes its scores to --output"),
        (["--model", "--output", "scores.csv"], "does not end in .jsonl or .parquet"),
        (["--model", "--output", "there.jsonl"], "already exists and is complete"),
        (["--model", "--output", "scores.jsonl", "stage=rm"], "of stage dpo, not 'rm'"),
    ],
)
def test_wrong_words_of_check(words, message, settings, tmp_path, monkeypatch):
    """Before anything is loaded: there is no such model."""
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").touch()
    done = command("data", "check", *words_of(settings(model_name_or_path="no/model")), *words)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_rows_at_which_a_training_stops_are_not_scored(settings, tmp_path):
    path = tmp_path / "data" / "pairs.jsonl"
    write(path, [row | {"history": [["Hi.", None]]} for row in read(path)])
    info = json.loads((path.parent / "dataset_info.json").read_text(encoding="utf-8"))
    info["pairs"]["columns"] |= {"history": "history"}
    (path.parent / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    words = words_of(settings(dataset="pairs"))
    done = command("data", "check", *words, "--model", "--output", tmp_path / "scores.jsonl")
    assert done.exit_code == 1
    assert "The pairs are not scored" in done.stdout
    assert not (tmp_path / "scores.jsonl").exists()


def test_no_pair_at_all_is_said(settings, tmp_path):
    path, scores = tmp_path / "data" / "pairs.jsonl", tmp_path / "scores.jsonl"
    write(path, [row | {"rejected": None} for row in read(path)])
    words = words_of(settings(dataset="pairs"))
    checked = command("data", "check", *words, "--model", "--output", scores)
    assert checked.exit_code == 1
    assert "No row is a pair that LLaMA-Factory would train on" in checked.stdout
    dropped = command("data", "drop", *words, "--scores", scores, "--output", tmp_path / "kept.jsonl")
    assert dropped.exit_code == 2
    assert "--worst 0.1 drops 0 of 0 pairs" in dropped.stderr


def _another_row(folder):
    path = folder / "data" / "pairs.jsonl"
    rows = read(path)
    rows[1]["chosen"] += "!"
    write(path, rows)


def _fewer_rows(folder):
    path = folder / "data" / "pairs.jsonl"
    write(path, read(path)[:-1])


def _other_columns(folder):
    path = folder / "data" / "dataset_info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["pairs_eval"]["columns"]["system"] = "input"
    path.write_text(json.dumps(info), encoding="utf-8")


def _sampled(folder):
    path = folder / "data" / "dataset_info.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    info["pairs_eval"]["num_samples"] = 4
    path.write_text(json.dumps(info), encoding="utf-8")


def _margins(folder):
    rows = [{"index": row["index"], "skipped": False, "margin": 1.0} for row in read(folder / "scores.jsonl")]
    write(folder / "scores.jsonl", rows)


def _unfinished(folder):
    (folder / "scores.jsonl").rename(folder / ".scores.jsonl.unfinished")


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, ["--worst", "0"], "--worst is 0: write a number between 0 and 1"),
        (None, ["--worst", "nan"], "--worst is nan: write a number between 0 and 1"),
        (None, ["--worst", "0.1"], "--worst 0.1 drops 0 of 9 pairs"),
        (None, ["--output", "kept.csv"], "must end in .jsonl"),
        (None, ["--output", "data/pairs.jsonl"], "already exists"),
        (None, ["--output", "data/pairs.jsonl", "--overwrite"], "is what the pairs are made from"),
        (None, ["mix_strategy=interleave_under"], "mixes the data sets: name one at a time"),
        (None, ["--scores", "absent.jsonl"], "does not exist: write it with"),
        (_another_row, [], "row 2 is not the pair that 'scores.jsonl' has a score of"),
        (_fewer_rows, [], "has scores of 10 rows, and the recipe 9 rows"),
        (_other_columns, [], "different columns or formats"),
        (_sampled, [], "num_samples of 'pairs_eval' draws rows at random"),
        (_margins, [], "holds other scores: name the --output of `data check --model`"),
        (_unfinished, [], "is not complete: run `data check --model` again"),
    ],
)
def test_what_drop_refuses(change, words, message, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = settings()
    scored(asked, Path("scores.jsonl"))
    if change is not None:
        change(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()}
    given = ["--worst", "0.3", "--scores", "scores.jsonl", "--output", "data/kept.jsonl", *words]
    done = command("data", "drop", *words_of(asked), *given)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_the_command_line_survives_kill(settings, tmp_path):
    words = [str(SCRIPT), "data", "check", *words_of(settings()), "--model", "--output", "scores.jsonl"]
    words += ["--batch-tokens", "1"]
    unfinished = tmp_path / ".scores.jsonl.unfinished"
    killed = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not (unfinished.exists() and unfinished.read_text().count("\n") > 1):
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tmp_path / "scores.jsonl").unlink(missing_ok=True)  # had it been too quick for us
    done = subprocess.run(words, cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-2000:]  # a row is no pair
    assert "9 pairs, percentiles" in done.stdout
    assert len(read_scores(tmp_path / "scores.jsonl", SCORE)) == 10
