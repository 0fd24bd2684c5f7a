"""Callbacks that watch a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .plots import plot_normalized_rewards


class RewardPlot(TrainerCallback):
    """Saves `normalized_rewards.png` in the output folder when training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            path = plot_normalized_rewards(state.log_history, Path(args.output_dir) / "normalized_rewards.png")
            if path is not None:
                print("Figure saved at:", path)
