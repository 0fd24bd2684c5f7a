"""The runs of `benchmarks/training.py` and `systems.py`: recipes, processes, models made for them, where they ran."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from training_report import Case
from training_tokens import Result

import llamafactory_ext
from llamafactory_ext.distributions import version
from llamafactory_ext.errors import UserError
from llamafactory_ext.losses.lookup import get_loss
from llamafactory_ext.recipe.arguments import SR_PROMPT

WORKER = Path(__file__).with_name("training_worker.py")
TRL_WORKER = WORKER.with_name("systems_trl.py")
SOURCES = [WORKER, TRL_WORKER, WORKER.with_name("training_watch.py")]
# Of transformers' TrainingArguments, for LLaMA-Factory and TRL alike.
ARGUMENTS: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 1.0e-6,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 1,
}
# What makes TRL's DPO trainer fastest, and what it shares with the others here: order, precision, no checkpointing.
TRL_ARGUMENTS: dict[str, Any] = {
    "precompute_ref_log_probs": True,
    "max_length": None,
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "gradient_checkpointing": False,
}
PACKAGES = ("llamafactory-ext", "llamafactory", "torch", "transformers", "trl", "accelerate")
FULL = {"finetuning_type": "full"}
QWEN_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def is_refined(loss: str) -> bool:
    """Whether a loss has a refinement term by default."""
    return bool(get_loss(loss).defaults().get("sr_lambda"))


def is_plugin(case: Case) -> bool:
    return case.system in ("cold", "ours")


def check_model_and_sizes(model: Path, global_batch: int, micro_batches: Iterable[int]) -> None:
    """Stop at what no run can be made with.

    Raises:
        UserError: with one sentence that says what to write or do.
    """
    if not (model / "config.json").is_file():
        raise UserError(f"there is no model in {model}: run `make model`, or name a folder with --model.")
    for size in micro_batches:
        if global_batch % size:
            raise UserError(f"--global-batch {global_batch} is no multiple of --micro-batch {size}.")


def check_pairs(data: Path) -> None:
    """Stop if there is no such file.

    Raises:
        UserError: with the command that makes one.
    """
    if not data.is_file():
        raise UserError(
            f"there are no pairs in {data}: make them from GSM8K's train.jsonl with `llamafactory-ext data corrupt "
            f"train.jsonl --output {data}`, or name a file with --data."
        )


def is_trl(case: Case) -> bool:
    return case.system.startswith("trl")


@dataclass(frozen=True)
class Runner:
    """Runs recipes, each in a process of its own, and none again that has run with the same sources.

    Args:
        data: the file of the pairs, which LLaMA-Factory knows as `dataset`.
        output: results go to its `runs`, caches to its `cache`.
        tuning: the recipe's keys that say what is trained, and in which precision.
        trl: the Python of TRL's environment.
        clock: "wall"; or "cpu" for seconds of one thread, which count on a machine that others use, too.
    """

    model: Path
    template: str
    data: Path
    dataset: str
    output: Path
    tuning: Mapping[str, Any]
    trl: Path | None = None
    clock: str = "wall"

    def seconds(self, case: Case, turn: int, global_batch: int, steps: int) -> Result:
        """Time a step to warm up and then `steps`, on pairs that come once each."""
        # After a cache is built, steps are those of a warm one.
        measured = 0 if case.system == "cold" else steps
        job = self._job(case, "seconds", global_batch * (1 + steps), 1 + measured, global_batch // case.micro_batch)
        return self._run(case, job, f"{self.dataset}-round{turn}")

    def peak(self, case: Case) -> int:
        """Bytes in a step of one micro-batch, above weights, gradients and optimizer states."""
        return self._run(case, self._job(case, "peak", case.micro_batch, steps=1), self.model.name)["bytes"]

    def trial(self, case: Case, pairs: int) -> Result:
        """Seconds `per_pair` in micro-batches without the optimizer, and the peak `bytes` of one.

        The first pairs are timed, cold, and the micro-batch after them is the one whose peak is taken: whatever the
        micro-batch, it is the same pairs.
        """
        steps = pairs // case.micro_batch + 1
        result = self._run(case, self._job(case, "trial", steps * case.micro_batch, steps), self.dataset)
        return result | {"per_pair": sum(result["seconds"]) / ((steps - 1) * case.micro_batch)}

    def tokens(self) -> Path:
        """The file with the tokens of all pairs."""
        case = Case("stock", "sigmoid", 1)
        job = self._job(case, "tokens", None, steps=1)
        self._run(case, job, self.dataset)
        return self._result(case, job, self.dataset)

    def _job(self, case: Case, watch: str, pairs: int | None, steps: int, accumulation: int = 1) -> dict[str, Any]:
        """What a worker is told: `steps` optimizer steps on the first pairs (None: all)."""
        arguments = ARGUMENTS | {
            "per_device_train_batch_size": case.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": steps,
        }
        if is_trl(case):
            assert self.trl is not None
            return {
                "model": str(self.model.resolve()),
                "tokens": str(self.tokens()),
                "pairs": pairs,
                "arguments": arguments | TRL_ARGUMENTS,
                "responses_only": case.system == "trl_narrow",
                "watch": watch,
                "clock": self.clock,
                "versions": trl_versions(self.trl),
            }
        return {
            "recipe": self._recipe(case, pairs) | arguments,
            "watch": watch,
            "clock": self.clock,
            "naive_sr_prompt": SR_PROMPT if case.system == "naive" else None,
        }

    def _recipe(self, case: Case, pairs: int | None) -> dict[str, Any]:
        ours = {
            "pref_loss": case.loss,
            "precompute_ref_log_probs": True,
            "ref_log_probs_cache_dir": str(self._cache(case)),
        }
        return {
            "stage": "dpo",
            "do_train": True,
            "model_name_or_path": str(self.model.resolve()),
            "template": self.template,
            "dataset_dir": str(self.data.parent.resolve()),
            "dataset": self.dataset,
            "max_samples": pairs,
            "cutoff_len": 2048,
            "overwrite_cache": True,
            "disable_gradient_checkpointing": True,
            "disable_shuffling": True,  # every configuration takes the same pairs in the same steps
            **self.tuning,
            **(ours if is_plugin(case) else {}),
        }

    def _cache(self, case: Case) -> Path:
        return self.output.resolve() / "cache" / ("refined" if is_refined(case.loss) else "plain")

    def _run(self, case: Case, job: dict[str, Any], which: str) -> Result:
        result = self._result(case, job, which)
        if not result.is_file():
            print(f"running {result.stem.rpartition('-')[0]}", flush=True)
            if case.system == "cold":
                shutil.rmtree(self._cache(case), ignore_errors=True)
            threads = {"OMP_NUM_THREADS": "1"} if self.clock == "cpu" else {}
            switch = {"LLAMAFACTORY_EXT": "1" if is_plugin(case) else "0"}
            _launch(self._worker(case), job, result, threads | switch)
        return json.loads(result.read_text(encoding="utf-8"))

    def _worker(self, case: Case) -> list[str]:
        return [str(self.trl), str(TRL_WORKER)] if is_trl(case) else [sys.executable, str(WORKER)]

    def _result(self, case: Case, job: dict[str, Any], which: str) -> Path:
        data = hashlib.sha256(self.data.read_bytes()).hexdigest()
        key = hashlib.sha256(json.dumps([job, case.system, which, sources(), data]).encode()).hexdigest()[:12]
        name = f"{case.system}-{case.loss}-{case.micro_batch}-{job['watch']}-{which}"
        return self.output.resolve() / "runs" / f"{name}-{key}.json"


def _launch(worker: list[str], job: dict[str, Any], result: Path, variables: dict[str, str]) -> None:
    """Run a job in a process of its own, its output in a file that stays only if it fails."""
    result.parent.mkdir(parents=True, exist_ok=True)
    log = result.with_suffix(".log")
    environment = (
        os.environ
        | variables
        | {
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            # TRL's environment holds no LLaMA-Factory, so that this package cannot be installed there.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(WORKER.parents[1]), os.environ.get("PYTHONPATH")))),
        }
    )
    with log.open("w", encoding="utf-8") as output:
        command = [*worker, str(result)]
        ended = subprocess.run(
            command, input=json.dumps(job), text=True, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    if ended.returncode:
        raise UserError(f"a run ended with status {ended.returncode}: {log} says why.")
    log.unlink()


# --- models ----------------------------------------------------------------------------------------------------------


def head_only(model: Path, folder: Path) -> Path:
    """The model without its layers: what a step of it holds are log-probabilities, from the head to its gradient."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 0
    if hasattr(config, "layer_types"):
        config.layer_types = []
    return _make(config, model, folder)


def qwen_7b(tokenizer: Path, folder: Path) -> Path:
    """A model of random weights in Qwen1.5-7B's shape, with another model's tokenizer."""
    from transformers import Qwen2Config

    return _make(Qwen2Config(**QWEN_7B, dtype="bfloat16"), tokenizer, folder)


def _make(config: Any, tokenizer: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not folder.is_dir():
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        AutoModelForCausalLM.from_config(config, dtype=config.dtype).save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(unfinished)
        unfinished.replace(folder)
    return folder


# --- where -----------------------------------------------------------------------------------------------------------


@functools.cache
def sources() -> str:
    """A digest of what is measured: the plugin's files, and the packages' versions."""
    files = sorted(Path(llamafactory_ext.__file__).parent.rglob("*.py"))
    contents = b"".join(file.read_bytes() for file in [*files, *SOURCES])
    return hashlib.sha256(contents + json.dumps(versions()).encode()).hexdigest()


def versions() -> dict[str, str]:
    return {name: version(name) or "not installed" for name in PACKAGES}


@functools.cache
def trl_versions(python: Path) -> dict[str, str]:
    """Of TRL's environment, which another Python runs."""
    folders = python.parent.parent.glob("lib/python*/site-packages")
    found = distributions(path=[str(folder) for folder in folders])
    return {each.name: each.version for each in found if each.name in PACKAGES}


def commit() -> str | None:
    """The commit of this checkout, marked where files differ from it."""
    command = ["git", "-C", str(WORKER.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def machine() -> dict[str, Any]:
    """When, with what and on what, in words; nothing of it names the machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": versions(),
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {memory:.0f} GiB, {gpu}",
        "threads": torch.get_num_threads(),
    }
