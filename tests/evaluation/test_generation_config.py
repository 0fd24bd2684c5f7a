"""A model's own generation_config.json: only its end tokens count, whatever else it or a later transformers holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from engine_cases import jobs, settings
from transformers import GenerationConfig
from typer.testing import CliRunner

from llamafactory_ext.evaluation import gsm8k
from llamafactory_ext.evaluation.asking import make_engine
from llamafactory_ext.evaluation.engines import Sampling
from llamafactory_ext.evaluation.generations import Generation
from llamafactory_ext.evaluation.transformers_engine import TransformersEngine

OWN_END = 1  # the tokenizer's
GREEDY, DRAWN = Sampling(max_tokens=24), Sampling(temperature=0.8, max_tokens=24, seed=3)
END_FIELDS = {"eos_token_id", "pad_token_id"}
WRITTEN_ONLY = {"transformers_version", "_commit_hash", "_from_model_config"}  # about the file, not of the generation

# A value of each field that changes what `generate` does, or ends it, where it is obeyed.
HOSTILE = {
    "max_length": 3,
    "max_new_tokens": 2,
    "min_length": 300,
    "min_new_tokens": 24,
    "early_stopping": True,
    "max_time": 0.0,
    "stop_strings": ["a", "e"],
    "do_sample": True,
    "num_beams": 4,
    "use_cache": False,
    "cache_implementation": "quantized",
    "cache_config": {"backend": "quanto", "nbits": 4},
    "temperature": 9.0,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.99,
    "top_h": 0.01,
    "typical_p": 0.01,
    "epsilon_cutoff": 0.9,
    "eta_cutoff": 0.9,
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 2.0,
    "length_penalty": -5.0,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[token] for token in range(2, 200)],
    "renormalize_logits": True,
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 9,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 9.0],
    "suppress_tokens": list(range(2, 200)),
    "begin_suppress_tokens": list(range(2, 200)),
    "sequence_bias": [[[5], 99.0]],
    "token_healing": True,
    "guidance_scale": 3.0,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0},
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "bos_token_id": 7,
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 7,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.99,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 2,
    "target_lookbehind": 2,
    "compile_config": {"backend": "nowhere"},
    "disable_compile": False,
    "continuous_batching_config": {},
    "low_memory": True,
    "penalty_alpha": 0.9,
    "dola_layers": "low",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[5]],
    "prefill_chunk_size": 2,
    "custom_generate": "somewhere",
}
FIELDS = sorted({*vars(GenerationConfig()), *HOSTILE} - END_FIELDS - WRITTEN_ONLY)


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def answers(model, sampling: Sampling = GREEDY) -> list[Generation]:
    engine = TransformersEngine(settings(model, sampling=sampling))
    return [answer for _, answer in engine.generate(jobs())]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wild weights, so that answers differ and repeat themselves; its own settings end the first answer early."""
    shape = {"initializer_range": 0.3, "tie_word_embeddings": False, "max_position_embeddings": 1024}
    folder = tiny.make_model(tmp_path_factory.mktemp("plain") / "model", dtype="float32", **shape)
    rewrite(folder / "generation_config.json", eos_token_id=[OWN_END, answers(folder)[0].token_ids[6]])
    return folder


@pytest.fixture
def copy(model, tmp_path):
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture(scope="module")
def plain(model):
    return {sampling: answers(model, sampling) for sampling in (GREEDY, DRAWN)}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("field", FIELDS)
def test_no_other_field_of_generation_config_is_obeyed(field, sampling, plain, copy):
    rewrite(copy / "generation_config.json", **{field: HOSTILE.get(field, 2)})
    assert answers(copy, sampling) == plain[sampling]


@pytest.mark.parametrize("field", FIELDS)
def test_nor_is_one_that_an_older_checkpoint_has_in_its_config(field, plain, copy):
    (copy / "generation_config.json").rename(copy / "unused.json")
    ends = json.loads((copy / "unused.json").read_text())["eos_token_id"]
    rewrite(copy / "config.json", **{"eos_token_id": ends, field: HOSTILE.get(field, 2)})
    try:
        found = answers(copy)
    except gsm8k.UserError as refusal:  # transformers checks some of them there
        found = str(refusal)
    assert found == plain[GREEDY] or ("cannot be loaded" in found and field in found)


def test_nor_with_an_adapter(model, copy, tmp_path):
    adapter = {"one": str(tiny.make_adapter(tmp_path / "adapter", model))}
    rewrite(copy / "generation_config.json", no_repeat_ngram_size=2, num_beams=4, repetition_penalty=1.5)
    adapted, hostile = (TransformersEngine(settings(folder, adapters=adapter)) for folder in (model, copy))
    found = [list(engine.generate(jobs("base", "one"))) for engine in (adapted, hostile)]
    assert found[0] == found[1]


def test_what_transformers_cannot_load_ends_in_a_sentence(copy):
    rewrite(copy / "config.json", compile_config={"backend": "nowhere"})
    with pytest.raises(gsm8k.UserError, match=r"cannot be loaded .*compile_config"):
        answers(copy)


# --- end tokens ------------------------------------------------------------------------------------------------------


def test_end_tokens_are_the_checkpoints(model, copy):
    rewrite(copy / "generation_config.json", eos_token_id=OWN_END)
    endless, ended = answers(copy)[0], answers(model)[0]
    assert (endless.finish_reason, ended.finish_reason) == ("length", "stop")
    end = ended.token_ids[-1]
    assert ended.token_ids == endless.token_ids[: endless.token_ids.index(end) + 1]
    assert make_engine("hf", settings(model)).parameters()["eos_token_id"] == sorted([OWN_END, end])
    assert make_engine("vllm", settings(model)).parameters()["stop_token_ids"] == sorted([OWN_END, end])


@pytest.mark.parametrize(
    ("named", "ends"), [(7, [1, 7]), ([7, 9], [1, 7, 9]), ([1], [1]), (None, [1]), ([], [1]), (-1, [1])]
)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_tokenizers_end_token_always_counts(named, ends, file, copy):
    if file == "config.json":
        (copy / "generation_config.json").unlink()
    rewrite(copy / file, eos_token_id=named)
    engine = TransformersEngine(settings(copy))
    assert engine.parameters()["eos_token_id"] == ends
    assert len(list(engine.generate(jobs()))) == 3


@pytest.mark.parametrize("names", [("eos_token",), ("eos_token", "pad_token")])
def test_a_tokenizer_without_end_token_still_fills_a_batch(names, model, copy):
    rewrite(copy / "tokenizer_config.json", **dict.fromkeys(names))
    rewrite(copy / "generation_config.json", eos_token_id=None)
    together = answers(copy)
    assert [answer.finish_reason for answer in together] == ["length"] * 3
    alone = TransformersEngine(settings(copy, sampling=GREEDY, batch_size=1))
    assert together == [answer for _, answer in alone.generate(jobs())]


def ask(model, tmp_path, *words: str):
    data, output = tmp_path / "test.jsonl", tmp_path / "out"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n")
    words = ("--engine", "hf", "--model", str(model), "--data", str(data), "--output", str(output), *words)
    return CliRunner().invoke(gsm8k.app, [*words, "--max-tokens", "4"])


@pytest.mark.parametrize(
    "content",
    ['{"eos_token_id": "<|im_end|>"}', '{"eos_token_id": [1, 2.5]}', '{"eos_token_id": true}', "{", "[1]", "7"],
)
def test_end_tokens_that_are_none_are_refused(content, copy, tmp_path):
    (copy / "generation_config.json").write_text(content)
    result = ask(copy, tmp_path)
    assert result.exit_code == 2
    assert f"{copy}/generation_config.json" in result.output
    assert not (tmp_path / "out").exists()


def test_vllm_is_not_given_a_file_that_it_cannot_load(copy):
    rewrite(copy / "generation_config.json", max_new_tokens=-1)
    engine = make_engine("vllm", settings(copy))
    with pytest.raises(gsm8k.UserError, match=r"generation_config\.json cannot be loaded .*max_new_tokens"):
        engine.check([[{"role": "user", "content": "1 + 1?"}]])


# --- the manifest ----------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_sent(model, tmp_path):
    assert ask(model, tmp_path).exit_code == 0
    sent = json.loads((tmp_path / "out/base/manifest.json").read_text())["sent"]
    ends = json.loads((model / "generation_config.json").read_text())["eos_token_id"]
    assert sent == {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_new_tokens": 4,
        "eos_token_id": sorted(ends),
        "pad_token_id": OWN_END,
    }


def test_other_end_tokens_are_another_run(copy, tmp_path):
    assert ask(copy, tmp_path).exit_code == 0
    rewrite(copy / "generation_config.json", eos_token_id=[OWN_END, 5])
    result = ask(copy, tmp_path)
    assert result.exit_code == 2
    assert "belongs to another run" in result.output
