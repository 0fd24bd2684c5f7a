"""Evaluates models: GSM8K, open questions, a judge. Imports torch only when needed, and LLaMA-Factory never.

vLLM needs other versions than LLaMA-Factory, so this subpackage also runs by its path in an environment without
LLaMA-Factory and this package; see `__main__`.
"""

from pathlib import Path

# argv after the interpreter's name that scores a model, in whichever environment the interpreter is.
GSM8K = (str(Path(__file__).with_name("__main__.py")), "gsm8k")
