"""Run as a process of its own, to be killed: answers every open problem of a run, slowly."""

import sys
import time
from pathlib import Path

from generations import Generation, Run

folder, count = Path(sys.argv[1]), int(sys.argv[2])
with Run(folder) as run:
    done = run.open({"problems": count})
    for index in range(count):
        if index not in done:
            run.append(Generation(index, f"answer {index} " * 50, [index] * 200, "stop"))
            time.sleep(0.005)
