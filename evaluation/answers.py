"""Let models answer open questions: `llamafactory-ext eval answers` for where only vLLM is installed.

python evaluation/answers.py --help
"""

import sys
from pathlib import Path

checkout = Path(__file__).resolve().parents[1]
if (checkout / "llamafactory_ext").is_dir():  # else the installed package
    sys.path.insert(0, str(checkout))

from llamafactory_ext.evaluation.answers import app  # noqa: E402

if __name__ == "__main__":  # vLLM's workers import this file again
    app()
