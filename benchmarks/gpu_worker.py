"""One stage of `benchmarks/gpu.py`, in a process of its own that `gpu_processes.py` starts.

python -m gpu_worker STAGE results.jsonl FOLDER [--rehearse]
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
import traceback
from pathlib import Path

from gpu_results import ITSELF, NoSpaceError, Recorder, in_words
from gpu_stages import NO_GPU, NO_SPACE


def measure(stage: str, results: Path, folder: Path, rehearse: bool) -> None:
    started = time.monotonic()
    # What the start-up hook does where the plugin is installed: here it may be on PYTHONPATH only.
    import llamafactory_ext._startup  # noqa: F401, I001
    import torch
    from training_runs import machine

    if not rehearse and not torch.cuda.is_available():
        sys.exit(NO_GPU)
    facts = machine()
    about = {key: facts[key] for key in ("date", "commit", "versions", "machine")}
    record = Recorder(stage, results, about, folder)
    module = importlib.import_module(f"gpu_{stage}")
    gc.freeze()  # or each training's end goes through all that was imported, which takes longer than a tiny one
    module.measure(record, folder, rehearse)
    record(ITSELF, time.monotonic() - started, "s")


def main() -> None:
    """Measure; of what goes wrong, the last line that is printed says what, and the status that the disk is full."""
    stage, results, folder, *flags = sys.argv[1:]
    try:
        measure(stage, Path(results), Path(folder), "--rehearse" in flags)
    except NoSpaceError as error:
        print(in_words(error))
        sys.exit(NO_SPACE)
    except Exception as error:
        traceback.print_exc()
        sys.exit(in_words(error, Path(folder)))


if __name__ == "__main__":
    main()
