"""Run by torchrun on every rank: trains each recipe of a JSON file (a list) through LLaMA-Factory's own `run_exp`.

One launch for the whole list, because a launch costs more than all the trainings together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist
from llamafactory.train.tuner import run_exp

# LLaMA-Factory takes the process group down after a run; the next run of the list still needs it.
end_process_group, dist.destroy_process_group = dist.destroy_process_group, lambda *args: None
for settings in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    run_exp(settings)
end_process_group()
