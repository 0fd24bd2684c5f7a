"""DeepSpeed's ZeRO-2 and ZeRO-3 on two gloo ranks: every loss, precision of the reference, resume, a killed worker."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from llamafactory.extras.env import VERSION
from tiny import recipe
from two_ranks import ENDS_AT_ONCE, LOSSES, PATH, assert_same_training, logs, models, train_on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
    pytest.mark.skipif(VERSION < "0.9.5", reason="LLaMA-Factory 0.9.4 refuses DeepSpeed 0.19.8"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "c++")) is None,
        reason="DeepSpeed on CPU compiles an operator at its first use, and there is no C++ compiler",
    ),
]

CONFIGS = Path(__file__).parents[2] / "examples" / "deepspeed"
STAGES = (2, 3)
PRECISIONS = {"float32": {}, "bfloat16": {"bf16": True}}
IN_EVERY_STEP = [("minor_dpo", "full"), ("minor_dpo", "lora"), ("sr_dpo", "full")]
TIMEOUT = 300  # seconds; generous: what is tested is that a run does not hang

# MinorDPO; but where the environment says so, rank 1 stops within a step, to be killed.
MORTAL = """
import itertools, os, pathlib, signal
from llamafactory_ext import get_loss, register_loss

steps = itertools.count(1)

@register_loss("mortal")
def mortal(pairs, *, beta: float):
    if os.environ["RANK"] == "1" and next(steps) == int(os.environ.get("STOP_IN_STEP", 0)):
        pathlib.Path(f"stopped-{os.getpid()}").touch()
        signal.pause()
    return get_loss("minor_dpo")(pairs, beta=beta)
"""


def deepspeed(stage):
    return {"deepspeed": str(CONFIGS / f"zero{stage}.json")}


@pytest.fixture(scope="module")
def long_run(model, data, tmp_path_factory):
    """A recipe of eight steps that saves after four, with Adam and BCO's baseline, which are state of the run."""
    loss_file = tmp_path_factory.mktemp("loss") / "mortal.py"
    loss_file.write_text(ENDS_AT_ONCE + MORTAL, encoding="utf-8")

    def recipe_of(stage, output, **changes):
        settings = {"pref_loss": "mortal", "pref_loss_file": str(loss_file), "pref_bco_weight": 0.5, "max_steps": 8}
        settings |= {"per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 4, **deepspeed(stage)}
        return recipe(model, data, output, **settings | changes)

    return recipe_of


@pytest.fixture(scope="module")
def trained(model, data, recipe_for, long_run, tmp_path_factory):
    """All runs that end by themselves, in one launch; the stages take turns, so that a leak between runs shows."""
    folder = tmp_path_factory.mktemp("deepspeed")
    recipes = []
    for name in LOSSES:
        for tuning in ("full", "lora"):
            for stage in STAGES:
                recipes.append(recipe_for(name, tuning, folder / f"{name}-{tuning}-{stage}", **deepspeed(stage)))
    for name, tuning in IN_EVERY_STEP:
        for stage in STAGES:
            changes = {"precompute_ref_log_probs": False, **deepspeed(stage)}
            recipes.append(recipe_for(name, tuning, folder / f"in-every-step-{name}-{tuning}-{stage}", **changes))
    for stage in STAGES:
        whole = folder / f"whole-{stage}"
        recipes.append(long_run(stage, whole))
        resume = {"resume_from_checkpoint": str(whole / "checkpoint-4")}
        recipes.append(long_run(stage, folder / f"resumed-{stage}", **resume))
    for precision, changes in PRECISIONS.items():
        settings = {"pref_loss": "minor_dpo", "per_device_train_batch_size": 1, "max_steps": 2, **changes}
        settings |= {"precompute_ref_log_probs": False}
        for stage in STAGES:
            recipes.append(recipe(model, data, folder / f"{precision}-{stage}", **settings, **deepspeed(stage)))
    train_on_two_ranks(recipes, folder)
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_as_in_one_process(name, tuning, stage, trained, one_process):
    assert_same_training(one_process(name, tuning), logs(trained / f"{name}-{tuning}-{stage}"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "tuning"), IN_EVERY_STEP)
def test_reference_computed_in_every_step(name, tuning, stage, trained, one_process):
    output = trained / f"in-every-step-{name}-{tuning}-{stage}"
    assert_same_training(one_process(name, tuning), logs(output))
    for held in models(output):
        assert ("reference" in held) == (tuning == "full")
        if tuning == "full":
            # TRL gives a reference under ZeRO-2 an engine that cuts up nothing.
            zero_stage = 3 if stage == 3 else 0
            assert (held["reference"]["class"], held["reference"]["zero_stage"]) == ("DeepSpeedEngine", zero_stage)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_zero_2_is_on(name, tuning, trained):
    for held in models(trained / f"{name}-{tuning}-2"):
        assert (held["policy"]["class"], held["policy"]["zero_stage"]) == ("DeepSpeedEngine", 2)
        assert held["policy"]["stepped"] * 2 == held["policy"]["trainable"]
        assert "reference" not in held  # its log-probabilities were computed before the first step


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", LOSSES)
def test_zero_3_holds_every_model_in_parts(name, tuning, trained):
    for held in models(trained / f"{name}-{tuning}-3"):
        assert "reference" not in held
        for model in held.values():
            assert (model["class"], model["zero_stage"]) == ("DeepSpeedEngine", 3)
            assert model["whole"] < 0.01 * model["partitioned"]  # norms, which stay whole once they were used
            assert model["part"] * 2 == model["partitioned"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_reference_starts_equal_to_the_policy(precision, stage, trained):
    """The model is saved in bf16; without `ref_model` the reference is that model, in the policy's precision."""
    output = trained / f"{precision}-{stage}"
    for held in models(output):
        assert held["policy"]["dtypes"] == held["reference"]["dtypes"] == [f"torch.{precision}"]
    first, second = logs(output)
    for curve in ("chosen", "rejected", "margins"):
        assert first[f"normalized_rewards/{curve}"] == 0.0
        assert second[f"normalized_rewards/{curve}"] != 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_resume(stage, trained):
    assert_same_steps(logs(trained / f"resumed-{stage}"), logs(trained / f"whole-{stage}"))


def assert_same_steps(resumed, whole):
    """Every step, those before the checkpoint (taken over with it) as well as those after it."""
    assert [log["loss"] for log in resumed] == pytest.approx([log["loss"] for log in whole], rel=1e-5)


def test_killed_worker_ends_the_run_which_resumes(long_run, trained, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log.txt"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(long_run(3, output)), encoding="utf-8")
    command = ["llamafactory-cli", "train", "recipe.yaml"]
    environment = os.environ | {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "PATH": PATH}

    with open(log, "wb") as file:
        doomed = environment | {"STOP_IN_STEP": "6"}
        run = psutil.Popen(command, cwd=tmp_path, env=doomed, stdout=file, stderr=subprocess.STDOUT)
    with no_process_left(run):
        worker = stopped_worker(run, tmp_path, log)
        processes = [run, *run.children(recursive=True)]
        worker.kill()
        assert run.wait(timeout=TIMEOUT) != 0
        assert psutil.wait_procs(processes, timeout=TIMEOUT)[1] == []
    assert "SIGKILL" in log.read_text()
    assert (output / "checkpoint-4").is_dir()
    assert not (output / "checkpoint-8").exists()

    resume = f"resume_from_checkpoint={output / 'checkpoint-4'}"
    again = subprocess.run([*command, resume], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-4000:]
    assert_same_steps(logs(output), logs(trained / "whole-3"))


def stopped_worker(run, folder, log):
    """Wait for rank 1 to stop in its step."""
    end = time.monotonic() + TIMEOUT
    while not (marks := list(folder.glob("stopped-*"))):
        assert run.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.1)
    return psutil.Process(int(marks[0].name.removeprefix("stopped-")))


@contextlib.contextmanager
def no_process_left(run):
    """Whatever fails, a stopped worker must not wait for ever."""
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # none is left if all went well
            for process in [*run.children(recursive=True), run]:
                process.kill()
