"""`USE_RAY=1`: LLaMA-Factory trains in a worker of Ray, a process of its own, which must know the plugin as well."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import yaml
from tiny import recipe
from two_ranks import PATH, logs

pytestmark = [pytest.mark.slow, pytest.mark.leg]

# LLaMA-Factory asks Ray for ten cores per device, and takes each core for a device where there is no GPU: there are
# never enough. Here it counts the GPUs that Ray was told of; everything else is the command line's own way.
COMMAND_LINE = """
from llamafactory.cli import main
from llamafactory.train import tuner

tuner.get_device_name = lambda: "gpu"
main()
"""


def test_the_worker_trains_the_loss_of_a_file(model, data, tmp_path):
    """The file is given relative to the working directory."""
    pytest.importorskip("ray", reason='needs Ray: pip install "ray[default]"')
    (tmp_path / "my_loss.py").write_text(
        "from llamafactory_ext import register_loss\n"
        '@register_loss("squared")\n'
        "def squared(pairs, *, beta: float, target: float = 1.0):\n"
        "    return (beta * pairs.margin - target) ** 2\n",
        encoding="utf-8",
    )
    settings = recipe(model, data, tmp_path / "out", pref_loss="squared", pref_loss_file="my_loss.py", max_steps=2)
    settings |= {"pref_loss_args": {"target": 2.0}, "ray_init_kwargs": {"num_cpus": 10, "num_gpus": 1}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    environment = os.environ | {"USE_RAY": "1", "PATH": PATH, "HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", COMMAND_LINE, "train", "recipe.yaml"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output[-4000:]
    assert re.search(r"\(Worker pid=\d+\).*is active and trains squared\(beta=0\.1, target=2\.0\)", output)
    assert logs(tmp_path / "out")[0]["loss"] == pytest.approx(4.0)  # the margin starts at 0
