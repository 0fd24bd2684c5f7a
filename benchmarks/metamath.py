"""How long `llamafactory-ext data metamath` takes for as many pairs as MetaMath has, and how much memory it needs.

    python benchmarks/metamath.py --count 395000

Reading the same files line by line with json alone, in the same run, is the yardstick.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from few_shot_data import write

YARDSTICK = "import json, sys\nfor name in sys.argv[1:]:\n    for line in open(name, 'rb'):\n        try: json.loads(line)\n        except ValueError: pass"  # noqa: E501


def main(count: Annotated[int, typer.Option(help="Pairs.")] = 395_000) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs, questions = write(folder, count)
        size = sum(path.stat().st_size for path in (pairs, questions)) / 2**20
        print(f"{count:,} pairs, {size:,.0f} MiB in both files")
        command = [sys.executable, "-m", "llamafactory_ext.cli", "data", "metamath", str(pairs)]
        yardstick = seconds([sys.executable, "-c", YARDSTICK, str(pairs), str(questions)])
        joined = seconds([*command, "--questions", str(questions), "--output", str(folder / "out.jsonl")])
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        with (folder / "out.jsonl").open(encoding="utf-8") as file:
            written = sum(1 for line in file if json.loads(line))
    print(f"metamath: {joined:.1f} s, {joined / yardstick:.1f} times json alone ({yardstick:.1f} s)")
    print(f"peak memory {peak:.2f} GiB; {written:,} pairs written")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
