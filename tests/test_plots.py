"""The figures: what is drawn, and that a file is whole or absent."""

from __future__ import annotations

import pytest

from llamafactory_ext import plots


def history(*rewards: tuple[float, float]) -> list[dict[str, float]]:
    logs = [
        {
            "step": step,
            "normalized_rewards/chosen": w,
            "normalized_rewards/rejected": l,
            "normalized_rewards/margins": w - l,
        }
        for step, (w, l) in enumerate(rewards, start=1)  # noqa: E741
    ]
    return [*logs, {"step": len(rewards), "train_runtime": 1.0}]


def test_curves_against_steps():
    axes = plots.new_figure(5, 4).subplots()
    plots._draw(axes, history((0.0, 0.0), (1.0, -2.0)), "MinorDPO")
    curves = {line.get_label(): line for line in axes.get_lines()[:3]}
    assert list(curves) == ["chosen", "rejected", "margin"]
    assert list(curves["chosen"].get_xdata()) == [1, 2]
    assert list(curves["margin"].get_ydata()) == [0.0, 3.0]
    assert axes.get_title() == "MinorDPO"


@pytest.mark.parametrize("steps", [1, 3])
def test_one_run(tmp_path, steps):
    path = tmp_path / "new" / "rewards.png"
    assert plots.plot_normalized_rewards(history(*[(1.0, -1.0)] * steps), path) == path
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]


def test_a_run_without_reference_has_no_figure(tmp_path):
    assert plots.plot_normalized_rewards([{"step": 1, "loss": 1.0}], tmp_path / "rewards.png") is None
    assert list(tmp_path.iterdir()) == []


def test_runs_side_by_side_leave_out_those_without_rewards(tmp_path):
    runs = {"DPO": history((1.0, 0.0)), "ORPO": [{"step": 1}], "MinorDPO": history((2.0, 0.0))}
    path = plots.plot_runs(runs, tmp_path / "rewards.svg")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<?xml")
