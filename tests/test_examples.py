"""Every example recipe is parsed as LLaMA-Factory parses it, and its data is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples").rglob("*.yaml"))


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # as the recipes' comments say
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    parser = HfArgumentParser([ModelArguments, DataArguments, TrainingArguments, FinetuningArguments])
    *_, data_args, _, finetuning_args = parser.parse_dict(recipe)  # unknown keys are an error
    assert path.stem.endswith(f"_{finetuning_args.finetuning_type}_{finetuning_args.loss.name}")

    info = json.loads((ROOT / data_args.dataset_dir / "dataset_info.json").read_text(encoding="utf-8"))
    for name in data_args.dataset:
        assert (ROOT / data_args.dataset_dir / info[name]["file_name"]).is_file()


def test_the_shipped_sample_is_what_the_demo_makes():
    import itertools
    import random
    import sys

    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from problems import generate

    from llamafactory_ext.pairs.corruption import make_pair

    rng = random.Random(0)
    made = [make_pair(problem, rng) for problem in itertools.islice(generate(seed=0), 64)]
    lines = (ROOT / "data" / "arithmetic_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [pair for pair in made if pair is not None]
