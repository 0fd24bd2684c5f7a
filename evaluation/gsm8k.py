"""Score a model on GSM8K: `llamafactory-ext eval gsm8k` for where only vLLM is installed.

python evaluation/gsm8k.py --help
"""

import sys
from pathlib import Path

checkout = Path(__file__).resolve().parents[1]
if (checkout / "llamafactory_ext").is_dir():  # else the installed package
    sys.path.insert(0, str(checkout))

from llamafactory_ext.evaluation.gsm8k import app  # noqa: E402

if __name__ == "__main__":  # vLLM's workers import this file again
    app()
