"""Evaluates models: GSM8K, open questions, a judge. Imports torch only when needed, and LLaMA-Factory never.

vLLM needs other versions than LLaMA-Factory, so this subpackage also runs by its path in an environment without
LLaMA-Factory and this package; see `__main__`.
"""

from pathlib import Path


def command(name: str) -> tuple[str, ...]:
    """What follows the interpreter's name in a command of the evaluation's, in whichever environment that is."""
    return (str(Path(__file__).with_name("__main__.py")), name)
