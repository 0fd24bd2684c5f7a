"""`llamafactory-cli` itself, as a user runs it, and the training that LLaMA Board spawns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import recipe

from llamafactory_ext.losses import lookup

pytestmark = [pytest.mark.slow, pytest.mark.command_line]

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def command_line(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["llamafactory-cli", *words]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": PATH} | environment, capture_output=True, text=True
    )


def write_recipe(folder: Path, settings: dict) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return "recipe.yaml"


def test_train(model, data, tmp_path):
    file = write_recipe(tmp_path, recipe(model, data, tmp_path / "out", pref_loss="dpop", plot_loss=True))
    run = command_line(tmp_path, "train", file, "dpop_lambda=7")
    assert run.returncode == 0, run.stderr[-4000:]
    assert "is active and trains dpop(beta=0.1, dpop_lambda=7, sr_lambda=0.0)" in run.stdout + run.stderr
    assert "normalized_rewards/chosen" in run.stdout + run.stderr
    assert (tmp_path / "out" / "normalized_rewards.png").is_file()


def test_wrong_value_stops_before_the_weights(model, data, tmp_path):
    file = write_recipe(tmp_path, recipe(model, data, tmp_path / "out", pref_loss="minor_dp"))
    run = command_line(tmp_path, "train", file)
    assert run.returncode != 0
    assert "Did you mean 'minor_dpo'" in run.stderr.strip().splitlines()[-1]
    assert "Loading" not in run.stdout + run.stderr
    assert not (tmp_path / "out").exists()


def test_v1_engine_refuses(model, data, tmp_path):
    file = write_recipe(tmp_path, recipe(model, data, tmp_path / "out", pref_loss="minor_dpo"))
    run = command_line(tmp_path, "train", file, USE_V1="1")
    assert run.returncode != 0
    assert "cannot be trained with USE_V1" in run.stderr.strip().splitlines()[-1]


def test_help_lists_the_keys(tmp_path):
    run = command_line(tmp_path, "train", "-h")
    assert run.returncode == 0
    for key in ("--dpop_lambda", "--ipo_length_normalize", "--pref_loss_file", "--pref_loss_args"):
        assert key in run.stdout


def test_training_that_the_board_spawns(model, data, tmp_path, monkeypatch):
    """The board's own runner, fed with its own components, starts its own `llamafactory-cli train`."""
    import gradio as gr
    from llamafactory.webui.components import create_top
    from llamafactory.webui.engine import Engine
    from llamafactory.webui.interface import create_train_tab

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", PATH)
    monkeypatch.setattr(lookup, "_load", lookup._load)  # what a board puts in its place is gone with this test
    engine = Engine(demo_mode=False, pure_chat=False)
    with gr.Blocks():
        engine.manager.add_elems("top", create_top())
        engine.manager.add_elems("train", create_train_tab(engine))

    chosen = {
        "top.lang": "en",
        "top.model_name": "Custom",
        "top.model_path": str(model),
        "top.template": "smollm2",
        "train.training_stage": "DPO",
        "train.dataset_dir": str(data),
        "train.dataset": ["pairs"],
        "train.pref_loss": "minor_dpo",
        "train.compute_type": "fp32",
        "train.logging_steps": 1,
        "train.output_dir": "board",
        "train.extra_args": json.dumps({"max_steps": 2, "preprocessing_num_workers": 1}),
    }
    components = {engine.manager.get_elem_by_id(name): value for name, value in chosen.items()}
    settings = {element: element.value for element in engine.manager.get_base_elems()}
    settings |= {element: getattr(element, "value", None) for element in engine.manager.get_elem_list()}
    for _ in engine.runner.run_train(settings | components):
        pass

    (log,) = tmp_path.glob("saves/Custom/lora/board/trainer_log.jsonl")
    first = json.loads(log.read_text(encoding="utf-8").splitlines()[0])
    assert first["minor_dpo/rejected_active"] == 0.0
    assert first["normalized_rewards/chosen"] == 0.0
