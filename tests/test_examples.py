"""Every example recipe is parsed as LLaMA-Factory parses it, its files are there, and its numbers add up."""

from __future__ import annotations

import itertools
import json
import random
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments, FinetuningArguments, ModelArguments, TrainingArguments
from omegaconf import OmegaConf
from transformers import AutoTokenizer, HfArgumentParser, Qwen2Config

from llamafactory_ext.planning.plan import make_plan
from llamafactory_ext.recipe.reading import parse_recipe, read_recipe
from llamafactory_ext.sweep.choice import choose
from llamafactory_ext.sweep.spec import Sweep

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "examples").rglob("*.yaml"))
# Whose recipes and sweeps are run on data that `make reproduce` and `make self-pairs` make.
STUDIES = (ROOT / "examples" / "reproduce", ROOT / "examples" / "self_pairs_gsm8k")
SWEEPS = [path for path in FILES if "axes" in yaml.safe_load(path.read_text(encoding="utf-8"))]
RECIPES = [path for path in FILES if path not in SWEEPS and path.parent not in STUDIES]
INFO = json.loads((ROOT / "data" / "dataset_info.json").read_text(encoding="utf-8"))
# Made by `llamafactory-ext data`, far too large to ship; each has a sample in its place to try recipes with.
MADE = {"metamath_zero_shot", "gsm8k_pairs", "hh_rlhf", "hh_rlhf_chosen", "ultrafeedback"}
GLOBAL_BATCH = {"metamath_qwen1.5_7b": 128, "hh_rlhf_pythia2.8b": 64, "ultrafeedback_zephyr7b": 64}
PAPER = [path for path in RECIPES if path.parent.name in GLOBAL_BATCH]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def launch_lines(path):
    """The command lines in a recipe's head, as (environment, arguments)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#   ") and "llamafactory-cli train" in line:
            words = shlex.split(line[1:])
            at = words.index("llamafactory-cli")
            yield dict(word.split("=", 1) for word in words[:at]), words[at + 2 :]


def test_there_are_recipes():
    assert {path.parent.name for path in RECIPES} == {"custom_loss", "demo", *GLOBAL_BATCH}
    tunings = {(tuning, loss) for tuning in ("full", "lora", "qlora") for loss in ("sigmoid", "dpop", "minor_dpo")}
    names = {path.stem for path in PAPER if path.parent.name == "metamath_qwen1.5_7b"}
    assert names == {f"qwen1.5-7b_{tuning}_{loss}" for tuning, loss in tunings}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # as the recipes' comments say
    recipe = read(path)
    # DeepSpeed and FSDP would start what needs a GPU; their settings are read below.
    alone = {key: value for key, value in recipe.items() if key not in ("deepspeed", "fsdp", "fsdp_config")}
    alone |= {"use_cpu": True, "bf16": False}
    parser = HfArgumentParser([ModelArguments, DataArguments, TrainingArguments, FinetuningArguments])
    model_args, data_args, _, finetuning_args = parser.parse_dict(alone)  # unknown keys are an error

    tuning = "qlora" if model_args.quantization_bit else finetuning_args.finetuning_type
    trained = finetuning_args.objective.name if finetuning_args.stage == "dpo" else finetuning_args.stage
    assert path.stem.endswith(f"_{tuning}_{trained}")
    assert recipe["output_dir"] == f"outputs/{path.stem}"

    if "deepspeed" in recipe:
        assert (ROOT / recipe["deepspeed"]).is_file()
    for name in data_args.dataset:
        assert INFO[name].get("ranking", False) is (finetuning_args.stage == "dpo")
        assert name in MADE or (ROOT / data_args.dataset_dir / INFO[name]["file_name"]).is_file()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_sweep(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = yaml.safe_load(path.read_text(encoding="utf-8").replace("LOW", "1.0e-6").replace("HIGH", "1.0e-5"))
    sweep, _ = choose(Sweep(**settings), preliminary=True)
    cells = sweep.cells()
    for cell in cells:
        parse_recipe(cell.recipe)
    assert len({cell.name for cell in cells}) == len(cells)


def test_the_papers_grid(monkeypatch):
    monkeypatch.chdir(ROOT)
    cells = Sweep(**read_recipe(["examples/metamath_qwen1.5_7b/sweep.yaml"])).cells()
    assert len(cells) == 3 * 2 * 5
    assert {cell.settings["learning_rate"] for cell in cells} == {1e-6, 1e-5}
    assert all(("dpop_lambda" in cell.settings) is (cell.settings["pref_loss"] == "dpop") for cell in cells)


@pytest.mark.parametrize("name", sorted(INFO))
def test_data_sets(name):
    entry = INFO[name]
    if name in MADE:
        sample = INFO[{"gsm8k_pairs": "arithmetic_pairs"}.get(name, f"{name}_sample")]
        assert entry["columns"] == sample["columns"]
        assert entry.get("ranking") == sample.get("ranking")
        return
    if "hf_hub_url" in entry:
        return
    rows = [json.loads(line) for line in (ROOT / "data" / entry["file_name"]).read_text(encoding="utf-8").splitlines()]
    assert all(set(entry["columns"].values()) <= set(row) for row in rows)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_every_launch_line_has_the_papers_global_batch(path):
    recipe = read(path)
    gpus_seen = set()
    for environment, words in launch_lines(path):
        assert words[0] == str(path.relative_to(ROOT))
        merged = OmegaConf.merge(recipe, OmegaConf.from_cli(words[1:]))
        assert set(merged) == set(recipe), "an override of a key that the recipe does not have"
        if "deepspeed" in merged:
            assert (ROOT / merged.deepspeed).is_file()
        assert environment.get("FSDP_STATE_DICT_TYPE") == ("FULL_STATE_DICT" if "fsdp" in recipe else None)
        gpus = int(environment.get("NPROC_PER_NODE", 1)) * int(environment.get("NNODES", 1))
        batch = merged.per_device_train_batch_size * merged.gradient_accumulation_steps * gpus
        assert batch == GLOBAL_BATCH[path.parent.name], words
        gpus_seen.add(gpus)
    assert gpus_seen >= (
        {1, 2, 4, 8, 16} if "deepspeed" in recipe else {1, 4, 8} if "lora" in path.stem else {4, 8, 16}
    )


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_settings_of_the_papers(path):
    recipe = read(path)
    assert recipe["num_train_epochs"] == 1.0
    if path.parent.name == "metamath_qwen1.5_7b":
        assert (recipe["lr_scheduler_type"], recipe["warmup_ratio"]) == ("linear", 0.1)
        assert 0.02 <= recipe["pref_beta"] <= 0.2
        assert recipe.get("dpop_lambda") == (50 if recipe["pref_loss"] == "dpop" else None)
        assert "lora" in path.stem or recipe["learning_rate"] in (1e-6, 1e-5)
    else:
        assert (recipe["optim"], recipe["learning_rate"], recipe["cutoff_len"]) == ("rmsprop", 5e-7, 512)
        assert (recipe["fsdp"], recipe["fsdp_config"]["version"]) == ("full_shard auto_wrap", 2)
    sources = [read(other)["output_dir"] for other in PAPER]
    if recipe["model_name_or_path"].startswith("outputs/"):
        assert recipe["model_name_or_path"] in sources


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen1.5-7B's config, which is all that a plan needs."""
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = Qwen2Config(vocab_size=151936, num_key_value_heads=32, tie_word_embeddings=False, **shape)
    config.dtype = "bfloat16"
    folder = tmp_path_factory.mktemp("qwen")
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", [path for path in PAPER if "qwen" in path.stem], ids=lambda path: path.stem)
def test_every_launch_line_fits_the_gpus_that_the_recipe_names(path, qwen, monkeypatch):
    monkeypatch.chdir(ROOT)
    memory = float(re.search(r"--gpu-memory (\d+)", path.read_text(encoding="utf-8")).group(1))
    assert memory == (24 if "lora" in path.stem else 80)
    for environment, words in launch_lines(path):
        nodes, per_node = (int(environment.get(name, 1)) for name in ("NNODES", "NPROC_PER_NODE"))
        settings = read_recipe([*words, f"model_name_or_path={qwen}"])
        plan = make_plan(settings, nodes * per_node, memory, gpus_per_node=per_node)
        assert plan.fits, (words, plan.memory)
        assert plan.parameters == 7_721_324_544


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_settings(name):
    settings = json.loads((ROOT / "examples" / "deepspeed" / f"{name}.json").read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in settings["zero_optimization"]) is name.endswith("offload")


# --- training and evaluation see the same prompt ---------------------------------------------------------------------

# What the models' own templates write, in the words of this test.
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize("path", [p for p in PAPER if "pythia" not in p.stem], ids=lambda path: path.stem)
def test_training_prompts_are_those_of_the_chat_template(path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny.make_model(tmp_path))
    tokenizer.chat_template = QWEN if "qwen" in path.stem else ZEPHYR
    recipe = read(path)
    about = DataArguments(template=recipe.get("template"), default_system=recipe.get("default_system"))
    own = tokenizer.chat_template
    template = get_template_and_fix_tokenizer(tokenizer, about)

    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "And 2 + 2?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt, answer = template.encode_oneturn(tokenizer, [*messages, {"role": "assistant", "content": "4"}])
    options = {"chat_template": own, "return_dict": False}
    assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "4"}], **options)
    assert (prompt + answer)[: len(whole)] == whole[: len(prompt + answer)]


# --- samples ----------------------------------------------------------------------------------------------------------


def test_the_shipped_sample_is_what_the_demo_makes():
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from problems import generate

    from llamafactory_ext.data.corruption import make_pair

    rng = random.Random(0)
    made = [make_pair(problem, rng) for problem in itertools.islice(generate(seed=0), 64)]
    lines = (ROOT / "data" / "arithmetic_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [pair for pair in made if pair is not None]


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory):
    """A tiny model whose context has room for the Sr paper's prompt, every byte of which is a token."""
    return tiny.make_model(tmp_path_factory.mktemp("roomy") / "model", max_position_embeddings=1024)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_step_with_a_tiny_model_and_the_sample(path, roomy_model, tmp_path, monkeypatch):
    """As the recipes' comments say how to try them on a CPU; without the launcher that DeepSpeed needs."""
    from llamafactory.train.tuner import run_exp

    monkeypatch.chdir(ROOT)
    recipe = {key: value for key, value in read(path).items() if key != "deepspeed"}
    tried = {"model_name_or_path": str(roomy_model), "dataset": f"{recipe['dataset']}_sample", "bf16": False}
    if "fsdp" in recipe:
        tried |= {"fsdp": None}
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 1, "logging_steps": 1}
    quiet = {"preprocessing_num_workers": 1, "output_dir": str(tmp_path), "overwrite_cache": True}
    run_exp(recipe | tried | small | quiet)
    (first, *_) = json.loads((tmp_path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    if recipe["stage"] == "dpo":
        assert first["normalized_rewards/margins"] == 0.0  # policy and reference start out equal
        names = {"sigmoid": "dpo/coefficient", "minor_dpo": "minor_dpo/rejected_active", "dpop": "dpop/penalty"}
        names |= dict.fromkeys(("sr_dpo", "sr_ipo"), "sr/refinement")
        assert names.get(recipe["pref_loss"], "rewards/margins") in first
    else:
        assert first["loss"] > 0
