"""What the study starts from, made on the spot: data sets, a tokenizer, and a decoder of random weights."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stories import stories

from llamafactory_ext.data.corruption import Problem, make_pair
from llamafactory_ext.whole_files import write_whole

# Problems are dealt from one stream, so that none is in two sets.
SIZES = {"sft": 50_000, "pairs": 1_024, "pilot": 1_024, "held_out": 200, "calibration": 200, "test": 400}

RANKED = ("pairs", "pilot", "held_out")

# What the refinement puts in front of a query must mean something to the model. A model of the Sr paper's kind knows
# what a rating is from its pretraining; this one is told in SFT: some queries stand behind a rating, and of those rated
# 1 the answers are corrupted. Without a rating, a share of the answers is corrupted, as in text that nobody rated.
RATED = "Usefulness {rating} of 100. Query: "
SHARE_RATED, SHARE_UNRATED_CORRUPT = 0.2, 0.1

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 512


def make_data(folder: Path, seed: int = 0) -> Path:
    """A folder for LLaMA-Factory's `dataset_dir`: each of `SIZES` as a file; the last two are problems to score on."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = stories(seed)
    sets = {name: list(itertools.islice(stream, size)) for name, size in SIZES.items()}
    rng = random.Random(seed)
    write_rows(folder / "sft.jsonl", (sft_row(problem, rng) for problem in sets["sft"]))
    for name in RANKED:
        write_rows(folder / f"{name}.jsonl", filter(None, (make_pair(p, rng, prompt="") for p in sets[name])))
    for name in ("calibration", "test"):
        rows = ({"question": p.question, "answer": f"{p.steps}\n#### {p.answer}"} for p in sets[name])
        write_rows(folder / f"{name}.jsonl", rows)
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info: dict[str, Any] = {"sft": {"file_name": "sft.jsonl"}}
    info |= {name: {"file_name": f"{name}.jsonl", "ranking": True, "columns": columns} for name in RANKED}
    write_whole(folder / "dataset_info.json", json.dumps(info, indent=1))
    return folder


def sft_row(problem: Problem, rng: random.Random) -> dict[str, str]:
    draw = rng.random()
    rating = None if draw >= SHARE_RATED else rng.choice((1, 100))
    corrupt = rating == 1 or (rating is None and rng.random() < SHARE_UNRATED_CORRUPT)
    pair = make_pair(problem, rng, prompt="") if corrupt else None
    prefix = "" if rating is None else RATED.format(rating=rating)
    output = pair["rejected"] if pair else problem.solution
    return {"instruction": prefix + problem.question, "input": "", "output": output}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Shape:
    """Of a decoder: 2.5 million parameters."""

    hidden: int = 192
    intermediate: int = 512
    layers: int = 6
    heads: int = 6


def make_model(folder: Path, data: Path, shape: Shape = Shape(), seed: int = 0) -> Path:
    """A Qwen2 decoder of random weights, and a tokenizer trained on the SFT data (every digit a token, as Qwen2's)."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"\d| ?[^\W\d]+| ?[^\w\s]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rows = (json.loads(line) for line in (data / "sft.jsonl").read_text(encoding="utf-8").splitlines()[:5000])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((f"user\n{row['instruction']}\nassistant\n{row['output']}" for row in rows), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
