"""Let a judge rate answers: `llamafactory-ext eval grade` for where only vLLM is installed.

python evaluation/grade.py --help
"""

import sys
from pathlib import Path

checkout = Path(__file__).resolve().parents[1]
if (checkout / "llamafactory_ext").is_dir():  # else the installed package
    sys.path.insert(0, str(checkout))

from llamafactory_ext.evaluation.grading import app  # noqa: E402

if __name__ == "__main__":  # vLLM's workers import this file again
    app()
