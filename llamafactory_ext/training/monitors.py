"""What is watched while a run goes on: its reward curves, and whether it degenerates."""

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

DEGENERATING = "monitor/degenerating"  # the metric: 1 while there is a problem, else 0
STOPPED = "monitor/stopped"  # the metric, with pref_stop_on_degeneration: 1 in the log at which that ends the run
LOGPS = ("logps/chosen", "logps/rejected")
PER_TOKEN = ("normalized_rewards/chosen_per_token", "normalized_rewards/rejected_per_token")

# Nats per token. SmolLM2-135M on pairs from GSM8K (DPO, beta 0.1): at a learning rate of 1e-5, which leaves it able to
# answer, chosen answers stayed above -0.21 over 20 steps; at 1e-4 they passed -0.5 at step 4, and it ended up repeating
# one word. MinorDPO at 1e-4 ended at +0.3 and answered.
FALL = 0.5
IN_A_ROW = 3  # logs, so that one odd batch is no alarm

REMEDIES = "Try minor_dpo or dpop, a larger pref_beta, or a smaller learning_rate."


def problem(history: LogHistory) -> Problem | None:
    """What is wrong with a run, going by its latest logs.

    `fallen`: in `IN_A_ROW` logs, the tokens of chosen and rejected answers alike were less likely than under the
    reference by more than `FALL` on average. Pushing rejected answers down is what the loss asks for; where chosen ones
    go down with them, the model moves away from both, towards text that nobody wrote (arXiv 2408.09834, section 4).
    `not_a_number`: log-probabilities are not finite any more.

    Args:
        history: the trainer's logs, the latest at the end; those without log-probabilities are passed over.
    """
    scored = (log for log in reversed(history) if all(name in log for name in LOGPS))
    latest = list(itertools.islice(scored, IN_A_ROW))
    if latest and not all(math.isfinite(latest[0][name]) for name in LOGPS):
        return "not_a_number"
    fallen = [all(log.get(name, 0.0) < -FALL for name in PER_TOKEN) for log in latest]
    return "fallen" if len(fallen) == IN_A_ROW and all(fallen) else None


def describe(found: Problem, log: Mapping[str, Any]) -> str:
    """The problem in words, with the figures of the latest log, and what to try."""
    if found == "not_a_number":
        return f"The run has degenerated: log-probabilities are not finite numbers any more. {REMEDIES}"
    chosen, rejected = (f"{log[name]:+.2f}" for name in PER_TOKEN)
    return (
        "The run degenerates: chosen answers become unlikely together with rejected ones (log-ratios to the reference "
        f"of {chosen} and {rejected} nats per token). {REMEDIES}"
    )


def stopped_at(history: LogHistory) -> int | None:
    """The step at which pref_stop_on_degeneration ended a run before its last one; None if it did not."""
    last = next((log for log in reversed(history) if STOPPED in log), {})
    return int(last["step"]) if last.get(STOPPED) else None


class DegenerationMonitor(TrainerCallback):
    """Says when a run begins to degenerate, and ends it after a checkpoint where its log says `STOPPED`.

    Every rank logs the same metrics, so that all of them end.
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
                f"It ends here, at step {state.global_step} of {state.max_steps}, after a checkpoint, because of "
                "pref_stop_on_degeneration."
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
    """Whether it is one that a log may hold and a figure show: no truth value, and none that is absurdly large."""
    return type(value) in (int, float) and not 2**53 < abs(value) < float("inf")


def read_trainer_log(path: Path) -> list[dict[str, Any]]:
    """The numbers that a run has logged so far, from LLaMA-Factory's `trainer_log.jsonl`; none if there is no file.

    A run that was resumed from a checkpoint logs some steps again: those of the run before it are gone from there on.
    """
    logs: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if os.path.isfile(path) else []:
        try:
            log = json.loads(line)
        except (ValueError, RecursionError):  # the last line, while it is being written, or when its run was killed
            continue
        if not isinstance(log, dict):
            continue
        log = {key: value for key, value in log.items() if _is_number(value)}  # whoever reaches a board can send a file
        if "loss" not in log or not isinstance(log.get("current_steps"), int):
            continue
        while logs and logs[-1]["step"] >= log["current_steps"]:
            logs.pop()
        logs.append({**log, "step": log["current_steps"]})
    return logs
