"""Sr's augmented pairs: the same responses token for token, the prompt where it belongs, and what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
import torch
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.data.processor import PairwiseDatasetProcessor
from llamafactory.hparams import DataArguments
from llamafactory.train import tuner
from tiny import recipe
from transformers import AutoTokenizer

from llamafactory_ext.training import trainer
from llamafactory_ext.training.layout import padded
from llamafactory_ext.training.logps import response_logps
from llamafactory_ext.training.modes import without_dropout
from llamafactory_ext.training.refinement import (
    MADE_WITH,
    PROMPT_IDS,
    AugmentingCollator,
    AugmentingProcessor,
    augment,
    joined,
    split_batch,
)

SHORT, LONG = "Write something of the highest usefulness. Query: "[:50], "Be useful, and then be useful again. " * 136
ROWS = [
    ("Add.", [("user", "1 + 1?")], "2", "3"),
    ("", [("user", "What is 2 + 5?")], "It is 7.", "It is 6, is it not?"),
    ("Sum up.", [("user", "Hello."), ("assistant", "Hi, what is it?"), ("user", "3 + 4?")], "7", "Seventy."),
]


@pytest.fixture(scope="module")
def tokenizer(model):
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture
def process(tokenizer):
    """Tokenize `ROWS`, by LLaMA-Factory's processor (without sr_prompt) or by ours."""

    def run(sr_prompt=None, cutoff_len=10**6, context=None):
        data_args = DataArguments(template="smollm2", default_system="Default.", cutoff_len=cutoff_len)
        template = get_template_and_fix_tokenizer(tokenizer, data_args)
        about = {"template": template, "tokenizer": tokenizer, "processor": None, "data_args": data_args}
        examples = {f"_{name}": [None] * len(ROWS) for name in ("tools", "images", "videos", "audios")}
        examples["_system"] = [row[0] for row in ROWS]
        examples["_prompt"] = [[{"role": role, "content": text} for role, text in row[1]] for row in ROWS]
        examples["_response"] = [[{"role": "assistant", "content": text} for text in row[2:]] for row in ROWS]
        if sr_prompt is None:
            return PairwiseDatasetProcessor(**about).preprocess_dataset(examples)
        return AugmentingProcessor(**about, sr_prompt=sr_prompt, context=context).preprocess_dataset(examples)

    return run


def rows_of(columns):
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def response(ids, labels):
    return [token for token, label in zip(ids, labels, strict=True) if label != -100]


@pytest.fixture
def collate(tokenizer):
    return AugmentingCollator(
        template=get_template_and_fix_tokenizer(tokenizer, DataArguments(template="smollm2")),
        tokenizer=tokenizer,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
    )


@pytest.mark.parametrize("sr_prompt", [SHORT, LONG])
def test_the_prompt_stands_before_the_first_user_message_only(sr_prompt, process, tokenizer):
    assert (len(SHORT), len(LONG)) == (50, 5032)
    base, augmented = process(), process(sr_prompt)
    assert {name: augmented[name] for name in base} == base  # the pair itself is LLaMA-Factory's
    for (system, turns, *_), ids in zip(ROWS, augmented[PROMPT_IDS], strict=True):
        told = [("system", system or "Default."), *turns]
        text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in told) + "<|im_start|>assistant\n"
        expected = text.replace("<|im_start|>user\n", f"<|im_start|>user\n{sr_prompt}", 1)
        assert tokenizer.decode(ids) == expected


@pytest.mark.parametrize("cutoff_len", [24, 40, 60, 90, 200])
@pytest.mark.parametrize("sr_prompt", [SHORT, LONG])
def test_truncation_leaves_responses_and_the_end_of_the_prompt_as_they_are(sr_prompt, cutoff_len, process, collate):
    base = rows_of(process(cutoff_len=cutoff_len))
    augmented = rows_of(process(sr_prompt, cutoff_len=cutoff_len))
    batch, augmented_batch = split_batch(collate(augmented))
    assert batch["input_ids"].shape[0] == augmented_batch["input_ids"].shape[0] == 2 * len(ROWS)
    assert set(batch) == set(augmented_batch)

    for index, (ours, theirs) in enumerate(zip(augmented, base, strict=True)):
        for side, row in (("chosen", index), ("rejected", len(ROWS) + index)):
            labels = theirs[f"{side}_labels"]
            prompt = theirs[f"{side}_input_ids"][: labels.count(-100)]
            # As many tokens more as p has bytes (the tiny tokenizer's tokens), and the same tokens after it.
            assert len(ours[PROMPT_IDS]) == len(prompt) + len(sr_prompt)
            scored = response(augmented_batch["input_ids"][row].tolist(), augmented_batch["labels"][row].tolist())
            assert scored == response(theirs[f"{side}_input_ids"], labels)
            mask = augmented_batch["attention_mask"][row].bool()
            assert augmented_batch["input_ids"][row][mask].tolist() == ours[PROMPT_IDS] + scored
            # p stands in one place; without it, the prompt is the unaugmented one, cut where that was cut.
            start = next(i for i in range(len(prompt) + 1) if i == len(prompt) or prompt[i] != ours[PROMPT_IDS][i])
            assert any(
                ours[PROMPT_IDS][:at] + ours[PROMPT_IDS][at + len(sr_prompt) :] == prompt
                for at in range(max(0, start - len(sr_prompt)), start + 1)
            )


def test_the_models_context_is_respected(process):
    longest = max(len(row[f"{side}_labels"]) for row in rows_of(process()) for side in ("chosen", "rejected"))
    process(SHORT, context=longest + 50)
    with pytest.raises(ValueError, match=rf"has {longest + 50} tokens.*write a smaller `cutoff_len`.*`sr_prompt`"):
        process(SHORT, context=longest + 49)


def test_delta_of_hand_built_ids_is_that_of_independent_calls(model, other_model, collate):
    """Two models, ids written down, every sequence scored alone."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32) for m in (model, other_model))
    pairs = [([5, 6, 7], [9, 9, 5, 6, 7], [20, 21, 1], [30, 1]), ([8], [9, 9, 8], [40, 1], [50, 51, 52, 53, 1])]
    features = []
    for prompt, augmented, *responses in pairs:
        feature = {PROMPT_IDS: augmented, MADE_WITH: "", "images": None, "videos": None, "audios": None}
        for side, response in zip(("chosen", "rejected"), responses, strict=True):
            feature[f"{side}_input_ids"] = prompt + response
            feature[f"{side}_attention_mask"] = [1] * len(prompt + response)
            feature[f"{side}_labels"] = [-100] * len(prompt) + response
        features.append(feature)
    _, batch = split_batch(collate(features))

    def alone(scorer, prompt, response):
        with torch.no_grad():
            logps = torch.log_softmax(scorer(torch.tensor([prompt + response])).logits[0].double(), dim=-1)
        return sum(logps[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))

    ours = [response_logps(scorer, padded(batch)) for scorer in (policy, reference)]
    margins = (ours[0].chosen - ours[1].chosen) - (ours[0].rejected - ours[1].rejected)
    for margin, (_, augmented, chosen, rejected) in zip(margins.tolist(), pairs, strict=True):
        ratios = [
            alone(policy, augmented, response) - alone(reference, augmented, response)
            for response in (chosen, rejected)
        ]
        assert margin == pytest.approx(ratios[0] - ratios[1], abs=1e-4)


def test_joined_batches_are_scored_as_each_is(model):
    """Of other lengths, one padded: the chosen responses of both, then the rejected ones, in their order."""
    from transformers import AutoModelForCausalLM

    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    shapes = ((4, 9), (2, 14))  # two pairs and one
    ids = [torch.randint(2, 250, shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
    batches[0]["attention_mask"][3, 6:], batches[0]["labels"][3, 6:] = 0, -100
    for batch, reference in zip(batches, ([[1, 2], [3, 4]], [[5, 6]]), strict=True):
        batch["labels"][:, :3] = -100
        batch["reference_logps"] = torch.tensor(reference)
    together = joined(batches)
    assert together.pop("reference_logps").tolist() == [[1, 2], [3, 4], [5, 6]]
    alone = [response_logps(scorer, padded({k: v for k, v in b.items() if k != "reference_logps"})) for b in batches]
    for side in ("chosen", "rejected"):
        expected = torch.cat([getattr(logps, side) for logps in alone])
        torch.testing.assert_close(getattr(response_logps(scorer, padded(together)), side), expected)


def test_without_dropout_restores_every_module():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Dropout(0.5))
    )
    model[2].eval()
    before = [module.training for module in model.modules()]
    x = torch.ones(8, 4)
    with without_dropout(model):
        assert torch.equal(model(x), model(x))
    assert [module.training for module in model.modules()] == before
    assert not torch.equal(model(x), model(x))


def test_augment_keeps_the_rest_of_a_message():
    messages = [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]
    assert augment(messages, "p ") == [{"role": "user", "content": "p a", "name": "x"}, messages[1]]
    assert messages[0]["content"] == "a"
    assert augment([], "p ") == []


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(data, tmp_path):
    count = itertools.count()

    def run(model, **changes):
        settings = {"pref_loss": "sr_dpo", "sr_prompt": "Rate 9 of 9: ", "max_steps": 2, **changes}
        output = tmp_path / f"run{next(count)}"
        tuner.run_exp(recipe(model, data, output, **settings))
        history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        return [log for log in history if "loss" in log or "eval_loss" in log]

    return run


def test_cached_tokenization_follows_the_prompt(model, data, other_model, train):
    """`datasets` must not hand out pairs that were augmented with another text."""
    changes = {"overwrite_cache": False, "ref_model": str(other_model), "max_steps": 1}
    first, second, again = (train(model, sr_prompt=p, **changes)[0] for p in ("Be good: ", "Be bad: ", "Be good: "))
    assert first["sr/refinement"] == again["sr/refinement"] != second["sr/refinement"]


def test_tokenized_path_made_with_another_prompt_is_refused(model, data, tmp_path, train):
    saved = {"tokenized_path": str(tmp_path / "tokenized")}
    train(model, **saved)  # tokenizes and saves
    assert "sr/refinement" in train(model, **saved)[0]
    with pytest.raises(ValueError, match="tokenized without this `sr_prompt`"):
        train(model, sr_prompt="Another: ", **saved)


def test_no_augmented_forward_without_lambda(model, data, monkeypatch, train):
    from llamafactory_ext.training import trainer

    def refused(*args):
        raise AssertionError("an augmented forward was run")

    monkeypatch.setattr(trainer.PreferenceTrainer, "_augmented_logps", refused)
    with pytest.raises(AssertionError, match="augmented forward"):
        train(model)
    changes = {"sr_prompt": None, "sr_lambda": 0}
    assert not [name for name in train(model, **changes)[0] if name.startswith("sr/")]
    assert [log["loss"] for log in train(model, **changes)] == [
        log["loss"] for log in train(model, pref_loss="sigmoid", sr_prompt=None)
    ]


def test_too_long_a_prompt_stops_before_the_weights(model, data, monkeypatch, train):
    from llamafactory.train.dpo import workflow

    monkeypatch.setattr(workflow, "load_model", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="more than the 256 that the model takes"):
        train(model, sr_prompt=None)


def test_dropout_is_off_in_the_augmented_pass_and_on_in_training(data, tmp_path, train):
    """With attention dropout, policy and reference of the same weights differ in training but not in the refinement."""
    model = tiny.make_model(tmp_path / "dropout", attention_dropout=0.5)
    first = train(model)[0]
    assert first["sr/refinement"] == 0.0
    assert abs(first["normalized_rewards/chosen"]) > 0.01


@pytest.mark.parametrize("precompute", [False, True])
def test_the_augmented_pairs_of_a_step_are_scored_some_at_a_time(precompute, model, other_model, train, monkeypatch):
    """Five micro-batches a step: four at once and one; the numbers are those of one at a time."""
    calls = []
    score = trainer.PreferenceTrainer._augmented_logps

    def counted(self, model, batch):
        calls.append(len(batch["labels"]) // 2)
        return score(self, model, batch)

    monkeypatch.setattr(trainer.PreferenceTrainer, "_augmented_logps", counted)
    changes = {"ref_model": str(other_model), "sr_prompt": SHORT, "gradient_accumulation_steps": 5}
    changes |= {"per_device_train_batch_size": 1, "max_steps": 2, "optim": "sgd"}
    changes |= {"precompute_ref_log_probs": precompute}
    at_once = train(model, **changes)
    assert calls == [4, 1, 4, 1]
    monkeypatch.setattr(trainer, "MICRO_BATCHES_AT_ONCE", 1)
    one_by_one = train(model, **changes)
    for ours, theirs in zip(at_once, one_by_one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["sr/refinement"] == pytest.approx(theirs["sr/refinement"], rel=1e-4)


def test_evaluation_sets_and_other_losses(model, other_model, train):
    changes = {"eval_dataset": "pairs_eval", "eval_strategy": "steps", "eval_steps": 2, "ref_model": str(other_model)}
    for name in ("minor_dpo", "dpop", "sr_ipo"):
        first, *_, evaluated = train(model, pref_loss=name, sr_lambda=0.2, **changes)
        assert first["sr/refinement"] != 0.0
        assert {"eval_sr/refinement", "eval_sr/augmented_accuracies", "eval_sr/augmented_margins"} <= set(evaluated)
