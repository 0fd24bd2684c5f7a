"""Models asked and scored: GSM8K, open questions, a judge. Imports neither torch nor LLaMA-Factory before it must.

vLLM pins versions that LLaMA-Factory refuses, so this room also runs in an environment that holds neither LLaMA-Factory
nor this package: as a file, see `__main__`.
"""

from pathlib import Path

# The words behind an interpreter's name that score a model, in whichever environment that lives.
GSM8K = (str(Path(__file__).with_name("__main__.py")), "gsm8k")
