"""The sweep files of the papers' studies at toy size: with a tiny model, a few rows, and nothing from a hub.

`python tests/integration/studies.py FOLDER` runs all three, with all values of their axes, from sweep file to report.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(Path(__file__).parent)]

import tiny  # noqa: E402
from json_server import InJson  # noqa: E402
from sweeps import report, sweep  # noqa: E402

EXAMPLES = ROOT / "examples"
STUDIES = {
    "metamath": ["metamath_qwen1.5_7b/sweep.yaml"],
    "hh_rlhf": ["hh_rlhf_pythia2.8b/lambda.yaml", "hh_rlhf_pythia2.8b/sweep.yaml"],
    "ultrafeedback": ["ultrafeedback_zephyr7b/lambda.yaml", "ultrafeedback_zephyr7b/sweep.yaml"],
}
SAMPLES = {
    "metamath_zero_shot": "metamath_zero_shot_sample",
    "hh_rlhf": "hh_rlhf_sample",
    "hh_rlhf_test": "hh_rlhf_sample",
    "ultrafeedback": "ultrafeedback_sample",
    "ultrafeedback_test": "ultrafeedback_sample",
}
LARGE = (
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "bf16",
    "save_steps",
    "save_total_limit",
    "plot_loss",
    "optim",
    "ddp_timeout",
)
SMALL = {
    "model_name_or_path": "model",
    "dataset_dir": "data",
    "cutoff_len": 256,
    "preprocessing_num_workers": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_gradient_checkpointing": True,
}
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
output_type: multiple_choice
test_split: test
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def make_place(folder: Path) -> Path:
    """A model, the samples under the names that the recipes have, problems, questions, and a benchmark."""
    tiny.make_model(folder / "model", dtype="float32", max_position_embeddings=1024)
    (folder / "data").mkdir()
    known = json.loads((ROOT / "data" / "dataset_info.json").read_text())
    info = {name: known[sample] for name, sample in SAMPLES.items()}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info))
    for sample in {*SAMPLES.values(), "gsm8k_sample", "open_questions_sample"}:
        content = (ROOT / "data" / f"{sample}.jsonl").read_bytes()
        (folder / "data" / f"{sample}.jsonl").write_bytes(content)
    (folder / "tasks").mkdir()
    rows = [
        {"question": f"{a} + {b}?", "choices": [str(a + b), str(a + b + 1)], "answer": 0} for a, b in tiny.SUMS[:12]
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks" / "sums.yaml").write_text(TASK.replace("FILE", str(folder / "sums.jsonl")))
    return folder


def write_toy(study: str, number: int, folder: Path, judge: str, most: int) -> Path:
    """A study's sweep file in a place, at toy size; a list of an axis keeps at most so many values."""
    settings = yaml.safe_load((EXAMPLES / STUDIES[study][number]).read_text())
    recipe = yaml.safe_load((ROOT / settings["recipe"]).read_text())
    settings["recipe"] = {k: v for k, v in recipe.items() if k not in (*LARGE, "output_dir")} | SMALL
    settings["output"] = f"{study}{number}"
    settings |= {"gpus_per_cell": 0, "at_once": 2}
    grids = settings["axes"] if isinstance(settings["axes"], list) else [settings["axes"]]
    settings["axes"] = [{key: _toy_axis(key, value, study, most) for key, value in grid.items()} for grid in grids]
    settings["evaluators"] = [
        {kind: _toy_evaluator(kind, keys, judge)} for each in settings["evaluators"] for kind, keys in each.items()
    ]
    file = folder / f"{study}{number}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False))
    return file


def _toy_axis(key: str, value: object, study: str, most: int) -> object:
    if isinstance(value, dict) and "best_of" in value:
        return value | {"best_of": f"{study}0.yaml"}
    if key == "max_samples" and isinstance(value, list):
        return [4, 6, 8][: max(2, most)]
    return value[:most] if isinstance(value, list) and key != "pref_loss" else value


def _toy_evaluator(kind: str, keys: dict, judge: str) -> dict:
    if kind == "pairs":
        return keys
    kept = {key: value for key, value in keys.items() if key in ("base", "baseline", "judge")}
    own = {
        "gsm8k": {"data": "data/gsm8k_sample.jsonl", "options": {"limit": 4, "max-tokens": 8}},
        "lm_eval": {"tasks": "sums", "include_path": "tasks"},
        "judge": {"data": "data/open_questions_sample.jsonl", "base_url": judge, "options": {"max-tokens": 8}},
    }
    return kept | {"engine": "hf"} | own[kind]


@contextmanager
def judge_server() -> Iterator[str]:
    """A judge whose verdicts are arbitrary, but the same for the same request; its address."""

    class Handler(InJson, BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.dumps(self.request_body()["messages"])
            verdict = "ABC"[hashlib.sha256(content.encode()).digest()[0] % 3]
            message = {"role": "assistant", "content": f"I compared them.\n\n[[{verdict}]]"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.reply(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()


def run_study(study: str, folder: Path, judge: str, most: int) -> Path:
    """All sweeps of a study, one after another, and the report of the last; its folder."""
    for number in range(len(STUDIES[study])):
        file = write_toy(study, number, folder, judge, most)
        run = sweep(folder, file.name)
        assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    run = report(folder, f"{study}{number}")
    assert run.returncode == 0, run.stderr
    return folder / f"{study}{number}"


if __name__ == "__main__":
    place = make_place(Path(sys.argv[1]).resolve())
    with judge_server() as address:
        for name in STUDIES:
            print(run_study(name, place, address, most=99), flush=True)
