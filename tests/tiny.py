"""A tiny model, tokenizer and preference data set, made on the spot: real files for real runs, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUMS = [(a, b) for a in range(2, 10) for b in range(3, 9)]


def make_pairs(path: Path, count: int) -> None:
    rows = []
    for a, b in SUMS[:count]:
        rows.append(
            {
                "instruction": f"What is {a} + {b}?",
                "input": "",
                "chosen": f"{a} + {b} = {a + b}.",
                "rejected": f"{a} plus {b} is equal to {a + b + 1}.",
                "gap": a / 4,
                "weight": b / 4,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path, train: int = 12, evaluation: int = 5) -> Path:
    """A data folder for LLaMA-Factory's `dataset_dir`, with the sets `pairs` and `pairs_eval`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    sets = {"pairs": train, "pairs_eval": evaluation}
    info = {name: {"file_name": f"{name}.jsonl", "ranking": True, "columns": columns} for name in sets}
    for name, count in sets.items():
        make_pairs(folder / f"{name}.jsonl", count)
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def make_model(
    folder: Path, seed: int = 0, dtype: str = "bfloat16", config: str = "LlamaConfig", **changes: Any
) -> Path:
    """A two-layer model of random weights with a byte-level tokenizer, saved in bfloat16 as most models are."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )

    fast.chat_template = CHATML

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    made = AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**shape, **changes}))
    made.to(getattr(torch, dtype)).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def make_adapter(folder: Path, model: Path, seed: int = 0) -> Path:
    """A LoRA adapter of random weights: unlike a new one, it has moved the policy off its reference, the base model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def recipe(model: Path, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A DPO recipe for `llamafactory-cli train` that takes well under a second to train; None drops a key."""
    settings: dict[str, Any] = {
        "model_name_or_path": str(model),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(data),
        "dataset": "pairs",
        "template": "smollm2",
        "default_system": "Add.",
        "cutoff_len": 128,
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "seed": 1,
        "overwrite_cache": True,
        "ref_log_probs_cache_dir": str(output / "references"),  # of the plugin's, and empty
        **changes,
    }
    if settings["stage"] != "dpo":
        del settings["ref_log_probs_cache_dir"]
    return {key: value for key, value in settings.items() if value is not None}
