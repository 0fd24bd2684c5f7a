"""Monitoring of a run: whether it degenerates, its reward plot, and its log."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from llamafactory.extras import logging
from transformers import TrainerCallback

from ..plots import LogHistory, plot_normalized_rewards

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

Problem = Literal["fallen", "not_a_number"]

DEGENERATING = "monitor/degenerating"  # metric: 1 while there is a problem, else 0
STOPPED = "monitor/stopped"  # metric, with pref_stop_on_degeneration: 1 in the log that ends the run, else 0
LOGPS = ("logps/chosen", "logps/rejected")
PER_TOKEN = ("normalized_rewards/chosen_per_token", "normalized_rewards/rejected_per_token")

# Nats per token. SmolLM2-135M on pairs from GSM8K (DPO, beta 0.1): at a learning rate of 1e-5 it could still answer,
# and chosen responses stayed above -0.21 over 20 steps. At 1e-4 they fell below -0.5 at step 4, and it ended up
# repeating one word. MinorDPO at 1e-4 ended at +0.3 and could still answer.
FALL = 0.5
IN_A_ROW = 3  # logs, so that one odd batch raises no alarm

REMEDIES = "Try `pref_loss: minor_dpo` or `dpop`, a larger `pref_beta`, or a smaller `learning_rate`."


def problem(history: LogHistory) -> Problem | None:
    """The problem that the latest logs of a run show, or None.

    `fallen`: in the last `IN_A_ROW` logs, the mean log-ratio per token was below -`FALL` for chosen and rejected
    responses alike. The loss is meant to lower rejected responses; if chosen ones fall too, the model moves to text
    that is in neither (arXiv 2408.09834, section 4).
    `not_a_number`: the log-probabilities are no longer finite.

    Args:
        history: the trainer's logs, latest last; logs without log-probabilities are skipped.
    """
    scored = (log for log in reversed(history) if all(name in log for name in LOGPS))
    latest = list(itertools.islice(scored, IN_A_ROW))
    if latest and not all(math.isfinite(latest[0][name]) for name in LOGPS):
        return "not_a_number"
    fallen = [all(log.get(name, 0.0) < -FALL for name in PER_TOKEN) for log in latest]
    return "fallen" if len(fallen) == IN_A_ROW and all(fallen) else None


def describe(found: Problem, log: Mapping[str, Any]) -> str:
    """The warning for a problem, with the numbers of the latest log and what to try."""
    if found == "not_a_number":
        return f"The run has degenerated: its log-probabilities are no longer finite. {REMEDIES}"
    chosen, rejected = (f"{log[name]:+.2f}" for name in PER_TOKEN)
    return (
        "The run is degenerating: chosen and rejected responses have both become far less likely than under the "
        f"reference (log-ratios of {chosen} and {rejected} nats per token). {REMEDIES}"
    )


def stopped_at(history: LogHistory) -> int | None:
    """The step at which `pref_stop_on_degeneration` ended a run early, or None."""
    last = next((log for log in reversed(history) if STOPPED in log), {})
    return int(last["step"]) if last.get(STOPPED) else None


class DegenerationMonitor(TrainerCallback):
    """Warns when a run begins to degenerate; if its log has `STOPPED`, saves a checkpoint and ends the run.

    Every rank logs the same metrics, so all ranks end together.
    """

    def __init__(self) -> None:
        self.said: Problem | None = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        log = state.log_history[-1]
        if DEGENERATING not in log:
            return
        found = problem(state.log_history)
        if found is not None and found != self.said:
            logger.warning_rank0(describe(found, log))
        if log.get(STOPPED):
            logger.warning_rank0(
                f"Training stops after a checkpoint at step {state.global_step} of {state.max_steps}: "
                "`pref_stop_on_degeneration` is true."
            )
            control.should_save = control.should_training_stop = True
        self.said = found


class RewardPlot(TrainerCallback):
    """Saves `normalized_rewards.png` in the output folder when training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = plot_normalized_rewards(state.log_history, Path(args.output_dir) / "normalized_rewards.png")
            if path is not None:
                print("Figure saved at:", path)


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a figure can show: no boolean, nothing absurdly large."""
    return type(value) in (int, float) and not 2**53 < abs(value) < float("inf")


def read_trainer_log(path: Path) -> list[dict[str, Any]]:
    """The numbers that a run has logged so far, from LLaMA-Factory's `trainer_log.jsonl`; empty without the file.

    A resumed run logs some steps again; the logs of the interrupted run are dropped from there on.
    """
    logs: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if os.path.isfile(path) else []:
        try:
            log = json.loads(line)
        except (ValueError, RecursionError):  # the last line, if it is being written or the run was killed
            continue
        if not isinstance(log, dict):
            continue
        log = {key: value for key, value in log.items() if _is_number(value)}  # users of the web UI can upload any file
        if "loss" not in log or not isinstance(log.get("current_steps"), int):
            continue
        while logs and logs[-1]["step"] >= log["current_steps"]:
            logs.pop()
        logs.append({**log, "step": log["current_steps"]})
    return logs
