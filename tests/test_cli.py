"""`llamafactory-ext` as a user runs it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import few_shot_data
import pytest
import tiny
import yaml
from typer.testing import CliRunner

from llamafactory_ext.cli import app

SCRIPT = Path(sys.executable).with_name("llamafactory-ext")
DATA = Path(__file__).parents[1] / "data"


def run(folder, *words):
    """A command in this process, as the script would run it in a folder."""
    with contextlib.chdir(folder):
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="llamafactory-ext")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_help_waits_for_no_heavy_package():
    heavy = {"torch", "transformers", "datasets", "llamafactory", "matplotlib", "numpy", "pandas", "pyarrow", "scipy"}
    code = f"import sys, llamafactory_ext.cli; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["data"],
        *(
            ["data", name]
            for name in ("metamath", "corrupt", "hh-rlhf", "ultrafeedback", "from-samples", "check", "drop")
        ),
    ],
)
def test_help_has_examples(words, tmp_path):
    shown = run(tmp_path, *words, "--help")
    assert shown.exit_code == 0
    if len(words) == 2:
        assert f"llamafactory-ext {' '.join(words)}" in shown.stdout


@pytest.mark.parametrize(
    ("words", "sample"),
    [
        (["metamath", "few_shot", "--questions", DATA / "metamath_qa_sample.jsonl"], "metamath_zero_shot_sample.jsonl"),
        (["hh-rlhf", "hh_rlhf_raw"], "hh_rlhf_sample.jsonl"),
        (["ultrafeedback", "ultrafeedback_raw"], "ultrafeedback_sample.jsonl"),
    ],
)
def test_the_shipped_samples_are_what_the_commands_make(words, sample, tmp_path):
    source = {"few_shot": "metamath_few_shot"}.get(words[1], words[1])
    words = ["data", words[0], DATA / f"{source}_sample.jsonl", *words[2:], "--output", f"new/{sample}"]
    done = run(tmp_path, *words)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "new" / sample).read_bytes() == (DATA / sample).read_bytes()
    assert "is registered in new/dataset_info.json" in " ".join(done.stdout.split())

    name = Path(sample).stem
    shipped = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))[name]
    assert json.loads((tmp_path / "new" / "dataset_info.json").read_text(encoding="utf-8")) == {name: shipped}

    again = run(tmp_path, *words)
    assert again.exit_code == 2
    assert "already exists: choose another --output, or add --overwrite." in again.stderr
    assert run(tmp_path, *words, "--overwrite").exit_code == 0


def test_corrupt_reports_every_row(tmp_path):
    rows = lines(DATA / "gsm8k_sample.jsonl")
    source = tmp_path / "solutions.jsonl"
    bad = ['{"question": "Q", "answer": "Seven.\\n#### 7"}', "{broken", '{"text": "x"}']
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n".join(bad) + "\n", encoding="utf-8")
    done = run(tmp_path, "data", "corrupt", source, "--output", "pairs.jsonl", "--seed", 3)
    assert done.exit_code == 0, done.stderr
    made, dropped = lines(tmp_path / "pairs.jsonl"), lines(tmp_path / "pairs.dropped.jsonl")
    assert len(made) + len(dropped) == len(rows) + 3
    reasons = {row["line"]: row["reason"] for row in dropped}
    assert reasons[len(rows) + 1].startswith("nothing to change")
    assert reasons[len(rows) + 2] == "not valid JSON"
    assert reasons[len(rows) + 3].startswith("has none of these pairs of columns")
    assert all(str(line) in done.stdout for line in reasons)
    assert all(pair["chosen"] != pair["rejected"] for pair in made)

    for seed, same in ((3, True), (4, False)):
        run(tmp_path, "data", "corrupt", source, "--output", f"seed{seed}.jsonl", "--seed", seed)
        assert (lines(tmp_path / f"seed{seed}.jsonl") == made) is same


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["corrupt", "absent.jsonl"], "'absent.jsonl' does not exist: write the path of a"),
        (["corrupt", str(DATA / "gsm8k_sample.jsonl"), "--output", "y.csv"], "must end in .jsonl"),
        (["metamath", "x.jsonl", "--lead", "Q: "], "--lead and --suffix"),
        (["check", "absent.yaml"], "there is no recipe 'absent.yaml'"),
        (["check", "dataset"], "'dataset' is neither a YAML file nor key=value"),
    ],
)
def test_wrong_input_is_one_sentence(words, message, tmp_path):
    done = run(tmp_path, "data", *words)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("", "it is empty: write a path."),
        ("~nosuch/x.jsonl", "cannot be a path"),
        ("file/x.jsonl", "file: File exists. Fix that, then run the same command to resume."),
    ],
)
def test_what_cannot_be_written_is_a_sentence(output, words, tmp_path):
    (tmp_path / "file").touch()
    done = run(tmp_path, "data", "corrupt", str(DATA / "gsm8k_sample.jsonl"), "--output", output)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_kill_leaves_no_half_file(tmp_path):
    pairs, questions = few_shot_data.write(tmp_path, 20000)
    words = ["data", "metamath", pairs, "--questions", questions, "--output", tmp_path / "out.jsonl"]
    process = subprocess.Popen([str(SCRIPT), *map(str, words)], env=dict(os.environ), stdout=subprocess.DEVNULL)
    while not any(path.stat().st_size for path in tmp_path.glob(".out.jsonl.*.unfinished")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()

    done = run(tmp_path, *words)
    assert done.exit_code == 0, done.stderr
    expected = [e.question for e in few_shot_data.examples(20000) if e.how in ("matched", "fallback")]
    assert [row["instruction"] for row in lines(tmp_path / "out.jsonl")] == expected
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.slow
def test_check_ends_with_a_status(model, tmp_path):
    """Pairs of a good recipe pass; with a test set that they are taken from, and cut too short, they do not."""
    data = tiny.make_data(tmp_path / "data")
    settings = tiny.recipe(model, data, tmp_path / "out", deepspeed=str(DATA / "no matter, nothing is trained"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    good = run(tmp_path, "data", "check", "recipe.yaml", "max_samples=6", "--json", "found.json")
    assert good.exit_code == 0, good.stderr
    assert json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["pairs"] == 6
    assert "6 pairs" in good.stdout

    words = ["data", "check", "recipe.yaml", "cutoff_len=64", "--test-set", data / "pairs.jsonl"]
    bad = run(tmp_path, *words)
    assert bad.exit_code == 1, bad.stderr
    assert "the question is in the test set" in bad.stdout
    assert not (tmp_path / "out").exists()
