"""A tiny model whose answers differ, two adapters of it, and problems to score it on."""

from __future__ import annotations

import json

import pytest
import tiny
from engine_cases import QUESTIONS


@pytest.fixture(scope="session")
def model32(tmp_path_factory):
    """Wild weights, so that the answers differ; attention heads of a size that vLLM supports."""
    shape = {
        "hidden_size": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "max_position_embeddings": 1024,
    }
    return tiny.make_model(tmp_path_factory.mktemp("tiny32") / "model", dtype="float32", **shape)


@pytest.fixture(scope="session")
def adapters(model32, tmp_path_factory):
    """Two LoRA adapters whose random weights change every answer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model32), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"question": text, "answer": f"so\n#### {index}"} for index, text in enumerate(QUESTIONS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
