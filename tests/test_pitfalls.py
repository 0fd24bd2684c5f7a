"""Recipes that LLaMA-Factory fails at without saying why: each fails in stock, is named here, and trains as told."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from llamafactory.train import tuner
from llamafactory.train.dpo import workflow

NEW_TOKENS = {"<a>": "the first letter", "<b>": "the second letter"}


@pytest.fixture
def train(model, data, tmp_path):
    def run(model=model, data=data, **changes):
        tuner.run_exp(tiny.recipe(model, data, tmp_path / "output", **changes))
        return json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"][0]["loss"]

    return run


@pytest.fixture
def stock(monkeypatch):
    """LLaMA-Factory's workflow, without what the seam wraps around it."""
    monkeypatch.setattr(tuner, "run_dpo", workflow.run_dpo.__wrapped__)


@pytest.fixture
def no_loading(monkeypatch):
    """The sentence comes before data and weights."""

    def loaded(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(workflow, "get_dataset", loaded)
    monkeypatch.setattr(workflow, "load_model", loaded)


@pytest.fixture
def descriptions(tmp_path):
    path = tmp_path / "tokens.yaml"
    path.write_text(json.dumps(NEW_TOKENS), encoding="utf-8")
    return str(path)


STREAMED = {"streaming": True, "overwrite_cache": None}
TOKENS = [
    {"add_tokens": "<a>,<b>"},
    {"add_special_tokens": "<a>,<b>"},
    {"add_tokens": "<a>", "finetuning_type": "freeze", "freeze_trainable_layers": 1, "bf16": True, "use_cpu": True},
    {"add_tokens": "<a>", "finetuning_type": "lora", "ref_model": "MODEL"},
]
SCALED = {"rope_scaling": "linear", "cutoff_len": 512}


@pytest.mark.parametrize("counts_padding", [{"precompute_ref_log_probs": True}, {"share_prefix": True}])
def test_counted_padding_rules_out_what_the_recipe_insists_on(train, no_loading, counts_padding):
    (key,) = counts_padding
    with pytest.raises(ValueError, match=f"`{key}: true` is not possible here: `ignore_pad_token_for_loss: false`"):
        train(ignore_pad_token_for_loss=False, **counts_padding)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precompute_ref_log_probs": True, "dataloader_num_workers": 1, **STREAMED}, "the data set is streamed"),
        ({"share_prefix": True, "neftune_noise_alpha": 5}, "both responses would get the same noise"),
    ],
)
def test_keys_that_rule_each_other_out(train, no_loading, changes, words):
    with pytest.raises(ValueError, match=words):
        train(**changes)


def test_stock_streams_nothing_without_workers(train, stock):
    with pytest.raises(StopIteration):
        train(**STREAMED, ref_log_probs_cache_dir=None)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("sets", [{}, {"eval_dataset": "pairs_eval", "do_eval": True}], ids=["train", "eval"])
def test_a_streamed_file_needs_a_worker(train, sets):
    with pytest.raises(ValueError, match=r"write `dataloader_num_workers: 1` or more to stream pairs(\.jsonl, |,)"):
        train(**STREAMED, **sets)


def test_a_streamed_file_with_a_worker_trains(train):
    assert train(**STREAMED, dataloader_num_workers=1) == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("tokens", TOKENS)
def test_stock_cannot_copy_the_arguments_of_new_tokens(train, stock, model, tokens):
    changes = {key: str(model) if value == "MODEL" else value for key, value in tokens.items()}
    with pytest.raises(AttributeError, match="'list' object has no attribute 'split'"):
        train(**changes, ref_log_probs_cache_dir=None)


AT_ONCE = {"learning_rate": 0.0, "pref_beta": 1.0}  # the loss is log 2 only if policy and reference are the same


@pytest.mark.parametrize("tokens", [{"train_from_scratch": True}, *TOKENS[:3]])
def test_random_weights_are_the_references_too(train, tokens):
    assert train(**tokens, **AT_ONCE) == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "others",
    [{"ref_model": "MODEL"}, TOKENS[3], {"precompute_ref_log_probs": False}, STREAMED | {"dataloader_num_workers": 1}],
)
@pytest.mark.parametrize("key", ["add_tokens", "train_from_scratch", "resize_vocab"])
def test_random_weights_that_a_reference_cannot_have(train, model, key, others):
    changes = {key: "<a>" if key == "add_tokens" else True} | {k: v for k, v in others.items() if k != "add_tokens"}
    changes = {name: str(model) if value == "MODEL" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=f"copy of the model first .*train that copy without `{key}`"):
        train(**changes)


def test_stock_draws_a_model_from_scratch_twice(train, stock):
    assert abs(train(train_from_scratch=True, ref_log_probs_cache_dir=None, **AT_ONCE) - 0.6931) > 1e-3


def test_stock_gives_the_reference_other_embeddings(train, stock, descriptions):
    loss = train(new_special_tokens_config=descriptions, ref_log_probs_cache_dir=None, **AT_ONCE)
    assert abs(loss - 0.6931) > 0.01


def test_described_tokens_with_random_embeddings(train, descriptions):
    assert train(new_special_tokens_config=descriptions, **AT_ONCE) == pytest.approx(0.6931, abs=1e-4)


def test_described_tokens_without_noise_train(train, descriptions):
    loss = train(new_special_tokens_config=descriptions, init_special_tokens="desc_init")
    assert loss == pytest.approx(0.6931, abs=1e-3)


def test_new_tokens_without_a_reference_train(train):
    assert train(add_tokens="<a>,<b>", pref_loss="orpo") > 0


def test_a_copy_of_the_model_with_the_tokens_trains(train, model, tmp_path):
    copy = tmp_path / "copy"
    tuner.export_model(
        {"model_name_or_path": str(model), "add_tokens": "<a>,<b>", "template": "smollm2", "export_dir": str(copy)}
    )
    assert train(model=copy) == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_rope_scaling_is_tried_before_data_and_weights(train, stock, kind, model, data, tmp_path, monkeypatch):
    """Where this transformers fails at LLaMA-Factory's config, the sentence comes; where it does not, the run."""
    changes = SCALED | {"rope_scaling": kind}
    try:
        train(**changes, ref_log_probs_cache_dir=None)
    except Exception:
        monkeypatch.undo()  # the plugin again
        with pytest.raises(ValueError, match=rf"`rope_scaling: {kind}`: .*Remove it; up to `cutoff_len: 256`"):
            tuner.run_exp(tiny.recipe(model, data, tmp_path / "again", **changes))
    else:
        monkeypatch.undo()
        tuner.run_exp(tiny.recipe(model, data, tmp_path / "again", **changes))


def test_rope_scaling_that_is_not_needed_trains(train):
    assert train(rope_scaling="linear", cutoff_len=128) == pytest.approx(0.6931, abs=1e-3)


def test_a_model_that_is_stretched_in_its_config_trains(train, model, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    key = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    config[key] = {**(config[key] or {}), "rope_type": "linear", "factor": 2.0}
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}), encoding="utf-8")
    assert train(model=copy, cutoff_len=512) == pytest.approx(0.6931, abs=1e-3)


def test_the_best_model_by_a_loss_that_is_not_there(train, no_loading):
    sets = {"eval_dataset": "pairs,pairs_eval", "eval_on_each_dataset": True, "eval_strategy": "steps", "eval_steps": 1}
    with pytest.raises(ValueError, match="such as `metric_for_best_model: eval_pairs_loss`"):
        train(**sets, load_best_model_at_end=True, save_strategy="steps", save_steps=1)


def test_fsdp2_must_be_told_to_save_a_model(train, no_loading, monkeypatch):
    monkeypatch.delenv("FSDP_STATE_DICT_TYPE", raising=False)
    fsdp = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}}
    second = fsdp | {"fsdp_config": fsdp["fsdp_config"] | {"version": 2}}
    with pytest.raises(ValueError, match="`FSDP_STATE_DICT_TYPE=FULL_STATE_DICT` in front of the command"):
        train(**second)
    with pytest.raises(AssertionError, match="something was loaded"):
        train(**fsdp)  # FSDP1 saves whole models
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(AssertionError, match="something was loaded"):
        train(**second)  # the user's choice


def test_a_number_of_samples_that_leaves_none(train, no_loading):
    with pytest.raises(ValueError, match="max_samples is -1: write a whole number of at least 1"):
        train(max_samples=-1)


@pytest.mark.parametrize(
    "line", ["{broken", '{"instruction": "a", "chosen": 3, "rejected": "b"}', '{"instruction": "\\ud83c"}']
)
def test_data_that_cannot_be_loaded(line, train, tmp_path):
    """`datasets` names no row; the check does."""
    data = tiny.make_data(tmp_path / "data")
    with (data / "pairs.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="Run `llamafactory-ext data check` with the same recipe"):
        train(data=data)
