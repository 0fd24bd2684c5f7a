"""Tiny vision-language models with real processors, and pairs about tiny pictures: as `tiny`, with images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

# Per model: the template that LLaMA-Factory trains it with. Qwen's processors need torchvision, LLaVA's does not.
TEMPLATES = {"llava": "llava", "qwen2_vl": "qwen2_vl", "qwen2_5_vl": "qwen2_vl", "qwen3_vl": "qwen3_vl_nothink"}
TOKENS = {
    "llava": ["<image>"],
    "qwen": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
}
COLORS = ["red", "green", "blue", "black", "white", "gray", "brown", "pink"]
SIZES = [(56, 56), (84, 56), (56, 112)]

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for the picture to show in the log-probabilities of an answer.
    "initializer_range": 0.2,
}


def make_images(folder: Path) -> list[Path]:
    """A picture per color, of several sizes, each with a stripe so that no two patches are alike."""
    from PIL import Image

    files = []
    for number, color in enumerate(COLORS):
        image = Image.new("RGB", SIZES[number % len(SIZES)], color)
        image.paste("orange", (0, 0, 9 * number + 5, 20))
        files.append(folder / f"{color}.png")
        image.save(files[-1])
    return files


def make_pairs(path: Path, images: list[int]) -> None:
    """A row per number of images: one, several, or none, whose question is about text."""
    rows, at = [], 0
    for number, count in enumerate(images):
        shown = [COLORS[(at + offset) % len(COLORS)] for offset in range(count)]
        at += count
        color = shown[0] if shown else COLORS[number % len(COLORS)]
        question = f"{'<image>' * count}Which color?" if count else f"Which color is {color}?"
        rows.append({"instruction": question, "input": "", "chosen": f"It is {color}.", "rejected": f"Not {color}!"})
        rows[-1]["images"] = [str(path.parent / f"{name}.png") for name in shown]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path) -> Path:
    """A data folder for LLaMA-Factory's `dataset_dir`, with the sets `pictures`, `pictures_eval` and `texts`.

    `pictures` has rows with one, two and no image. Every micro-batch of two of its rows, in their order, holds a number
    of images of its own, and one micro-batch holds none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_images(folder)
    make_pairs(folder / "pictures.jsonl", [1, 0, 2, 1, 0, 0, 1, 1])
    make_pairs(folder / "pictures_eval.jsonl", [0, 1, 2])
    make_pairs(folder / "texts.jsonl", [0] * 8)
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    with_images = {"ranking": True, "columns": {**columns, "images": "images"}}
    info = {name: {"file_name": f"{name}.jsonl", **with_images} for name in ("pictures", "pictures_eval")}
    info["texts"] = {"file_name": "texts.jsonl", "ranking": True, "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def make_model(folder: Path, family: str, seed: int = 0) -> Path:
    """A model of random weights in float32, with its processor.

    Args:
        family: a key of `TEMPLATES`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(folder))
    tokens = TOKENS["llava" if family == "llava" else "qwen"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    shape = _llava(ids) if family == "llava" else _qwen(family, ids)
    shape["text_config"] |= {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **shape))
    _processor(family, tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _llava(ids: dict[str, int]) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 14, "initializer_factor": 5.0, "model_type": "clip_vision_model"}
    return {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": vision,
        "image_token_index": ids["<image>"],
        "image_seq_length": 4,
    }


def _qwen(family: str, ids: dict[str, int]) -> dict[str, Any]:
    vision = {"depth": 2, "num_heads": 4}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    if family == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    if family == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    if family != "qwen3_vl":
        del rope["mrope_interleaved"]
    heads = {"head_dim": 8} if family == "qwen3_vl" else {}
    return {
        "text_config": {**TEXT, **heads, "rope_parameters": rope},
        "vision_config": vision,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _processor(family: str, tokenizer: Any) -> Any:
    import transformers

    if family == "llava":
        # Without torchvision, transformers has this one under another name.
        # transformers 5 has one with torchvision and one without; that of transformers 4 needs none.
        needs_torchvision = hasattr(transformers, "CLIPImageProcessorPil")
        without = needs_torchvision and not transformers.utils.is_torchvision_available()
        name = "CLIPImageProcessorPil" if without else "CLIPImageProcessor"
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        images = getattr(transformers, name)(**size)
        about_tower = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, tokenizer, **about_tower)
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor, Qwen3VLVideoProcessor

    size = {"size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}}
    size |= {"patch_size": 16 if family == "qwen3_vl" else 14}
    videos = (Qwen3VLVideoProcessor if family == "qwen3_vl" else Qwen2VLVideoProcessor)(**size)
    processor = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
    }[family]
    return processor(Qwen2VLImageProcessor(**size), tokenizer, videos)


def recipe(model: Path, family: str, data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A DPO recipe about pictures, with steps by SGD that are large enough to show in the next loss."""
    settings: dict[str, Any] = {
        "template": TEMPLATES[family],
        "dataset": "pictures",
        "cutoff_len": 256,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_steps": 3,
        "freeze_vision_tower": False,
        "freeze_multi_modal_projector": False,
        "preprocessing_num_workers": 1,
    }
    return tiny.recipe(model, data, output, **{**settings, **changes})
