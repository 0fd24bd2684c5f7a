"""Score a model on benchmarks: `llamafactory-ext eval harness` for where only vLLM is installed.

python evaluation/harness.py --help
"""

import sys
from pathlib import Path

checkout = Path(__file__).resolve().parents[1]
if (checkout / "llamafactory_ext").is_dir():  # else the installed package
    sys.path.insert(0, str(checkout))

from llamafactory_ext.evaluation.harness import app  # noqa: E402

if __name__ == "__main__":  # vLLM's workers import this file again
    app()
