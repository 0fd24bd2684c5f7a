"""The engines on a tiny model, and the command line from question to table. vLLM's tests run where it is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import tiny
from engine_cases import QUESTIONS, answers, jobs, needs_vllm, settings, tokens
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from llamafactory_ext.evaluation import gsm8k
from llamafactory_ext.evaluation.asking import make_engine
from llamafactory_ext.evaluation.chat_templates import prompt_ids
from llamafactory_ext.evaluation.engines import Sampling
from llamafactory_ext.evaluation.transformers_engine import TransformersEngine
from llamafactory_ext.evaluation.vllm_engine import set_vllm_defaults

# --- transformers ----------------------------------------------------------------------------------------------------


def test_batches_answer_like_single_prompts(model32):
    one_by_one = answers(TransformersEngine(settings(model32, batch_size=1)), jobs())
    together = answers(TransformersEngine(settings(model32, batch_size=3)), jobs())
    assert together == one_by_one
    assert len(set(together.values())) > 1


def test_tokens_and_finish_reason(model32):
    for _, generation in TransformersEngine(settings(model32)).generate(jobs()):
        assert generation.finish_reason == "length"  # random weights never stop
        assert len(generation.token_ids) == 12


def test_a_penalty_in_the_models_own_settings_is_overruled(model32, tmp_path):
    penalized = tmp_path / "penalized"
    shutil.copytree(model32, penalized)
    config = json.loads((penalized / "generation_config.json").read_text())
    (penalized / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 9.0}))
    assert answers(TransformersEngine(settings(penalized)), jobs()) == answers(
        TransformersEngine(settings(model32)), jobs()
    )


def test_who_reads_the_answers_is_not_in_the_engines_modes(model32, adapters):
    """Neither inference mode, in which nothing can be trained, nor the adapter switched off, as for the base model."""
    import torch

    replies = TransformersEngine(settings(model32, adapters=adapters, batch_size=1)).generate(jobs("base", "one"))
    for _ in replies:
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_adapters_in_one_load(model32, adapters):
    adapters = {"beta0.1": adapters["one"], "beta0.2": adapters["two"]}  # dots, as names of a sweep's cells have
    everything = answers(TransformersEngine(settings(model32, adapters=adapters)), jobs("base", *adapters))
    base = answers(TransformersEngine(settings(model32)), jobs())
    for index in range(len(QUESTIONS)):
        assert everything["base", index] == base["base", index]
        assert len({everything[run, index] for run in ("base", *adapters)}) == 3


# --- the command line ------------------------------------------------------------------------------------------------


def invoke(*words: object):
    return CliRunner().invoke(gsm8k.app, [str(word) for word in words])


def test_from_questions_to_scores_and_again(model32, adapters, data, tmp_path):
    output = tmp_path / "out"
    words = ["--engine", "hf", "--model", model32, "--data", data, "--output", output, "--max-tokens", 12]
    words += [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    first = invoke(*words)
    assert first.exit_code == 0, first.output
    summaries = json.loads((output / "results.json").read_text())
    assert list(summaries) == ["base", "one", "two"]
    assert summaries["one"]["problems"] == 3
    manifest = json.loads((output / "one" / "manifest.json").read_text())
    assert manifest["sampling"]["repetition_penalty"] == 1.0
    assert set(manifest["adapter"]) >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" in manifest["model"]["files"]

    written = {path: path.read_bytes() for path in output.glob("*/generations.jsonl")}
    assert invoke(*words).exit_code == 0  # nothing is asked twice
    assert {path: path.read_bytes() for path in written} == written

    changed = invoke(*words, "--temperature", 0.5)
    assert changed.exit_code == 2
    assert "belongs to another run: its sampling is" in changed.output

    (output / "one" / "results.json").unlink()
    assert invoke("--score-only", "--data", data, "--output", output).exit_code == 0
    assert json.loads((output / "one" / "results.json").read_text())["summary"] == summaries["one"]


def test_compare_on_the_command_line(model32, adapters, data, tmp_path):
    from llamafactory_ext.evaluation.compare import app

    output = tmp_path / "out"
    invoke(
        *("--engine", "hf", "--model", model32, "--data", data, "--output", output, "--max-tokens", 4),
        *("--adapter", f"one={adapters['one']}"),
    )
    result = CliRunner().invoke(app, [str(output / "base"), str(output / "one"), "--output", str(tmp_path / "c.json")])
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "c.json").read_text())
    assert row["problems"] == 3
    assert CliRunner().invoke(app, [str(output / "base")]).exit_code == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": ""}, "--model is missing"),
        ({"--model": "/no/such/model"}, "/no/such/model is not a model"),
        ({"--model": "nobody/has-this"}, "neither a folder nor available on the Hub"),
        ({"--data": "/no/such.jsonl"}, "does not exist"),
        ({"--adapter": "dpo"}, "write NAME=DIR"),
        ({"--adapter": "base=/x"}, "write NAME=DIR"),
        ({"--adapter": "dpo=/no/such"}, "has no adapter_config.json"),
        ({"--prompt": "polite"}, "neither paper nor plain"),
        ({"--max-model-len": 20}, "raise --max-model-len"),
        ({"--system": "half \udcff"}, "The system turn of problem 1 is not text ("),
        ({"--dtype": "float99"}, "Invalid value for '--dtype'"),
        ({"--seed": -1}, "Invalid value for '--seed'"),
    ],
)
def test_wrong_arguments(model32, data, tmp_path, changes, message):
    words = {"--engine": "hf", "--model": model32, "--data": data, "--output": tmp_path / "out", **changes}
    result = invoke(*[part for item in words.items() for part in item])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_an_adapters_name_is_given_once(model32, adapters, data, tmp_path):
    words = ["--engine", "hf", "--model", model32, "--data", data, "--output", tmp_path / "out"]
    words += ["--adapter", f"a={adapters['one']}", "--adapter", f"a={adapters['two']}"]
    result = invoke(*words)
    assert result.exit_code == 2
    assert "the name a is taken" in result.output


def test_answers_end_where_the_context_does(model32, tmp_path):
    """Of 120 tokens, a prompt leaves each answer what is left, also in a batch with shorter prompts."""
    short = tmp_path / "short"
    shutil.copytree(model32, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 120}))
    engine = TransformersEngine(settings(short, sampling=Sampling(max_tokens=1000), batch_size=3))
    lengths = {job.index: len(prompt_ids(engine.tokenizer, job.messages, {})) for job in jobs()}
    ended = []
    for job, generation in engine.generate(jobs()):
        room = 120 - lengths[job.index]
        ended.append(generation.finish_reason)
        assert len(generation.token_ids) == room if ended[-1] == "length" else len(generation.token_ids) < room
    assert "length" in ended


def test_a_model_without_chat_template(model32, data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model32, bare)
    (bare / "chat_template.jinja").unlink()
    result = invoke("--engine", "hf", "--model", bare, "--data", data, "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "has no chat template" in result.output


def test_score_only_without_runs(data, tmp_path):
    result = invoke("--score-only", "--data", data, "--output", tmp_path)
    assert result.exit_code == 2
    assert "contains no runs" in result.output


def test_the_evaluation_runs_without_llamafactory():
    """Every module of it can be imported where vLLM lives: with LLaMA-Factory and what only it brings blocked."""
    names = sorted(path.stem for path in Path(gsm8k.__file__).parent.glob("*.py") if path.stem != "__init__")
    blocked = ["llamafactory", "trl", "accelerate", "peft", "gradio", "matplotlib", "torch", "transformers", "datasets"]
    code = (
        f"import sys, importlib; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        f"for name in {names!r}: importlib.import_module('llamafactory_ext.evaluation.' + name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lora_rank_above_vllms_limit(tmp_path):
    from llamafactory_ext.evaluation.vllm_engine import _lora_rank

    (tmp_path / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(gsm8k.UserError, match="rank 1024, above vLLM's limit of 512"):
        _lora_rank(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"r": "high"}', '{"r": null}'])
def test_an_adapter_without_rank(content, tmp_path):
    from llamafactory_ext.evaluation.vllm_engine import _lora_rank

    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(gsm8k.UserError, match="has no rank `r`"):
        _lora_rank(str(tmp_path))


def test_what_transformers_cannot_answer_ends_in_a_sentence_and_keeps_the_rest(tmp_path):
    """A model whose embedding has no row for a byte of the last question, as after a wrong tokenizer was saved."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    too_small = 2 + alphabet.index("Ġ") + 1  # special tokens, and bytes up to the space; "€" holds one beyond
    model = tiny.make_model(tmp_path / "model", dtype="float32", vocab_size=too_small)
    data = tmp_path / "test.jsonl"
    texts = ["1 + 1?", "How many?", "How much is it in €, all together?"]
    data.write_text("".join(json.dumps({"question": text, "answer": "#### 2"}) + "\n" for text in texts))
    words = ("--engine", "hf", "--model", model, "--data", data, "--output", tmp_path / "out", "--prompt", "plain")
    result = invoke(*words, "--batch-size", 1, "--max-tokens", 6)
    assert result.exit_code == 2
    assert "transformers failed (index out of range" in result.output
    assert "lower --batch-size or --max-tokens" in result.output
    assert len((tmp_path / "out/base/generations.jsonl").read_text().splitlines()) == 2


def test_learned_positions_are_never_exceeded(tmp_path):
    """GPT-2 fails beyond its last position."""
    shape = {"config": "GPT2Config", "max_position_embeddings": 132, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = tiny.make_model(tmp_path / "gpt2", dtype="float32", initializer_range=0.3, **shape)
    engine = TransformersEngine(settings(model, sampling=Sampling(max_tokens=1000)))
    assert len(list(engine.generate(jobs()))) == len(QUESTIONS)


# --- vLLM, where it is installed -------------------------------------------------------------------------------------


@needs_vllm
@pytest.mark.slow
def test_vllm_answers_like_transformers(model32, adapters):
    """Base and adapters in one load: the base must not get an adapter's answers."""
    changes = {"dtype": "float32", "adapters": adapters, "max_model_len": 1024}
    vllm = tokens(make_engine("vllm", settings(model32, **changes)), jobs("base", "one", "two"))
    hf = tokens(TransformersEngine(settings(model32, adapters=adapters)), jobs("base", "one", "two"))
    assert vllm == hf


@needs_vllm
@pytest.mark.slow
def test_vllm_and_its_server_obey_end_tokens_only(model32, tmp_path):
    """Both are given a generation_config.json with everything that vLLM would take from one."""
    hostile = shutil.copytree(model32, tmp_path / "hostile")
    end = tokens(TransformersEngine(settings(model32)), jobs())["base", 0][5]
    obeyed = {"temperature": 2.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5, "repetition_penalty": 1.5}
    obeyed |= {"presence_penalty": 1.5, "frequency_penalty": 1.5, "max_new_tokens": 3}
    ends = {"eos_token_id": [1, end]}
    (hostile / "generation_config.json").write_text(json.dumps({**ends, **obeyed, "do_sample": True, "num_beams": 2}))
    changes = {"dtype": "float32", "max_model_len": 1024}
    hf = tokens(TransformersEngine(settings(hostile)), jobs())
    assert hf["base", 0][-1] == end
    assert tokens(make_engine("vllm", settings(hostile, **changes)), jobs()) == hf
    with serve(hostile) as url:
        assert tokens(make_engine("openai", settings("tiny", base_url=url)), jobs()) == hf


@contextmanager
def serve(model: Path) -> Iterator[str]:
    """vLLM's own server, as it takes a model's settings by default."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--model", str(model), "--served-model-name", "tiny", "--dtype", "float32", "--port", str(port)]
    set_vllm_defaults()
    process = subprocess.Popen([sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words])
    try:
        while True:
            assert process.poll() is None
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@needs_vllm
@pytest.mark.slow
def test_vllm_replicas_share_the_jobs(model32):
    changes = {"dtype": "float32", "data_parallel": 2, "max_model_len": 1024}
    vllm = tokens(make_engine("vllm", settings(model32, **changes)), jobs())
    assert vllm == tokens(TransformersEngine(settings(model32)), jobs())
