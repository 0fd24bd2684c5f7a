"""What a sweep does with every trained model: its evaluators, each with its keys and the command that it is."""

from __future__ import annotations

import glob
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from ..errors import UserError
from ..evaluation import command
from .records import Step

MAPPING = "chat-template-kwargs"  # the one option of the evaluation's commands that is a mapping
# Options that the sweep writes itself.
OWN = ("model", "data", "tasks", "include-path", "engine", "adapter", "output", "skip-base", "score-only")
JUDGE_OWN = ("a", "b", "names", "judge", "base-url", "output", "show-prompt")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Asking(Strict):
    """What all evaluators have in common that let models answer.

    Args:
        engine: what generates.
        python: the interpreter of the engine's environment; None: this one (`hf` and `openai` only).
        options: more options of the command, by name without the dashes; `true` is a flag, `false` is left out, a
            mapping (`chat_template_kwargs`) becomes JSON.
        base: whether the untrained model is asked as well.
    """

    kind: ClassVar[str]  # what the sweep's file calls it
    step: ClassVar[Step]
    folder: ClassVar[str]  # where the command writes, in a cell's folder
    result: ClassVar[str] = "results.json"  # of a run; there when it is done

    engine: Literal["vllm", "openai", "hf"] = "vllm"
    python: str | None = None
    options: dict[str, JsonValue] = {}
    base: bool = True

    def command(self) -> tuple[str, ...]:
        """What follows the interpreter."""
        raise NotImplementedError

    def words(self) -> list[str]:
        """What is asked, as options of the command."""
        raise NotImplementedError

    def asked(self) -> Any:
        """What the results depend on, beside the model and the content of files."""
        return self.model_dump(mode="json", exclude={"python", "base"})

    def named(self) -> list[JsonValue]:
        """What may be the path of a file or folder whose content the results depend on."""
        return list(self.options.values())

    def check(self) -> None:
        """
        Raises:
            UserError: if a value is wrong; one sentence says what to write instead.
        """
        check_options(self.options, OWN, self.kind)
        if self.engine == "vllm" and self.python is None:
            raise UserError(
                f"vLLM needs an environment of its own: write its interpreter as `python` under `{self.kind}` "
                "(`make eval-env` makes .venv-eval/bin/python), or write `engine: hf`."
            )

    def check_files(self) -> None:
        """
        Raises:
            UserError: if what it needs on this machine is not there; a dry run does not need it yet.
        """
        if self.python is not None and shutil.which(self.python) is None:
            raise UserError(f"there is no {self.python}: write an interpreter as `python` under `{self.kind}`.")


class Problems(Asking):
    """`gsm8k`: problems are solved, by `llamafactory-ext eval gsm8k`.

    Args:
        data: a GSM8K file, or a hub's name of it.
        script: a gsm8k.py of the user's own, in place of `llamafactory-ext eval gsm8k`.
    """

    kind = "gsm8k"
    step = "score"
    folder = "scores"

    data: str
    script: Path | None = None

    def command(self) -> tuple[str, ...]:
        return command("gsm8k") if self.script is None else (str(self.script),)

    def words(self) -> list[str]:
        return ["--data", self.data]

    def asked(self) -> Any:
        return self.model_dump(mode="json", exclude={"python", "base", "script"})

    def named(self) -> list[JsonValue]:
        return [self.data, *super().named()]

    def check_files(self) -> None:
        super().check_files()
        if self.script is not None and not self.script.is_file():
            raise UserError(f"there is no {self.script}: leave `script` under `gsm8k` out, or name a file.")
        if self.data.endswith((".jsonl", ".parquet")) and not Path(self.data).is_file():
            raise UserError(f"there is no {self.data}: write the file of problems as `data` under `gsm8k`.")


class Benchmarks(Asking):
    """`lm_eval`: tasks of lm-evaluation-harness, by `llamafactory-ext eval harness`.

    Args:
        tasks: `open_llm_leaderboard`, or tasks as the command takes them: `name`, `name:shots`, `name:shots:metric`.
        include_path: a folder with tasks of the user's own.
    """

    kind = "lm_eval"
    step = "lm_eval"
    folder = "lm_eval"

    engine: Literal["vllm", "hf"] = "vllm"
    tasks: str | list[str]
    include_path: Path | None = None

    def command(self) -> tuple[str, ...]:
        return command("harness")

    def words(self) -> list[str]:
        tasks = self.tasks if isinstance(self.tasks, str) else ",".join(self.tasks)
        return ["--tasks", tasks, *([] if self.include_path is None else ["--include-path", str(self.include_path)])]

    def named(self) -> list[JsonValue]:
        if self.include_path is None:
            return super().named()
        return [*super().named(), str(self.include_path), *sorted(_named_in(self.include_path))]

    def check(self) -> None:
        super().check()
        if not self.tasks:
            raise UserError("`tasks` under `lm_eval` is empty: write `open_llm_leaderboard`, or names of tasks.")

    def check_files(self) -> None:
        super().check_files()
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"there is no folder {self.include_path}: correct `include_path` under `lm_eval`.")


class Judged(Asking):
    """`judge`: open questions are answered (`llamafactory-ext eval answers`), then a judge compares each cell's answers
    with those of a baseline (`llamafactory-ext eval judge`).

    Args:
        data: the questions, in MT-Bench's layout or with one question a row.
        judge: the judge's name on its server.
        base_url: the server's address.
        baseline: the name of the cell to compare with, or `base` for the untrained model; or a loss per loss: a cell is
            compared with the other loss's cell of the same settings, and those of other losses are not judged.
        judge_options: more options of `eval judge`.
    """

    kind = "judge"
    step = "answers"
    folder = "answers"
    result = "answers.jsonl"

    base: bool = False
    data: Path
    judge: str = Field(min_length=1)
    base_url: str = "http://127.0.0.1:8000/v1"
    baseline: str | dict[str, str]
    judge_options: dict[str, JsonValue] = {}

    def command(self) -> tuple[str, ...]:
        return command("answers")

    def words(self) -> list[str]:
        return ["--data", str(self.data)]

    def asked(self) -> Any:
        return self.model_dump(mode="json", include={"data", "engine", "options"})

    def named(self) -> list[JsonValue]:
        return [str(self.data), *super().named()]

    def judging(self) -> list[str]:
        """The judge and its options, as words of `eval judge`."""
        return ["--judge", self.judge, "--base-url", self.base_url, *option_words(self.judge_options)]

    def judged_by(self) -> Any:
        """What verdicts depend on, beside the answers and the content of files; not where and how fast they are got."""
        return [self.judge, {key: value for key, value in self.judge_options.items() if key != "concurrency"}]

    def check(self) -> None:
        super().check()
        check_options(self.judge_options, JUDGE_OWN, "judge")

    def check_files(self) -> None:
        super().check_files()
        if not self.data.is_file():
            raise UserError(f"there is no {self.data}: write the file of questions as `data` under `judge`.")


DATA_FILE = re.compile(r"[^\s'\",\[\]{}]+\.(?:jsonl?|csv|tsv|parquet|txt)\b")


def _named_in(folder: Path) -> set[str]:
    """The data files that YAML files of tasks name. They are read as text, as they may have tags of lm_eval's."""
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in folder.rglob("*.yaml"))
    return {path for text in texts for word in DATA_FILE.findall(text) for path in glob.glob(word, recursive=True)}


class HeldOut(Strict):
    """`pairs`: each trained model is scored on them by `llamafactory-ext score`.

    Args:
        dataset: of the recipe's `dataset_dir`.
        max_samples: only so many of its pairs, from the first.
    """

    dataset: str
    max_samples: int | None = Field(default=None, ge=1)


KINDS = (Problems, Benchmarks, Judged)  # those that let models answer


class Evaluators(Strict):
    """The evaluators of a sweep, at most one of each kind; in the sweep's file, a list of them."""

    gsm8k: Problems | None = None
    pairs: HeldOut | None = None
    lm_eval: Benchmarks | None = None
    judge: Judged | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_list(cls, found: Any) -> Any:
        if not isinstance(found, list):
            return found
        together: dict[str, Any] = {}
        for entry in found:
            if not (isinstance(entry, Mapping) and len(entry) == 1):
                raise ValueError("write each evaluator as its kind and its keys, such as `- gsm8k: {data: test.jsonl}`")
            ((kind, keys),) = entry.items()
            if keys is None:
                raise ValueError(f"`{kind}` has no keys: write them, or remove it")
            if kind in together:
                raise ValueError(f"`{kind}` is there twice: a sweep has one evaluator of each kind")
            together[kind] = keys
        return together

    @property
    def asking(self) -> list[Problems | Benchmarks | Judged]:
        """Those that let models answer."""
        return [each for each in (self.gsm8k, self.lm_eval, self.judge) if each is not None]

    @property
    def steps(self) -> list[Step]:
        """The commands after a training, in their order."""
        found: list[Step] = [each.step for each in self.asking]
        return found + ["pairs"] * (self.pairs is not None) + ["judge"] * (self.judge is not None)

    @property
    def any(self) -> bool:
        return bool(self.asking) or self.pairs is not None


def check_options(options: Mapping[str, JsonValue], own: tuple[str, ...], kind: str) -> None:
    """
    Raises:
        UserError: if the sweep writes an option itself, or its value is none of a command line.
    """
    for key, value in options.items():
        name = key.replace("_", "-")
        if name in own:
            raise UserError(f"The sweep sets `{key}` itself: remove it from the options under `{kind}`.")
        if name == MAPPING:
            if not isinstance(value, dict):
                raise UserError(
                    f"`{key}` under `{kind}` is not a mapping: write one, such as {{enable_thinking: false}}."
                )
        elif value is None or isinstance(value, dict | list):
            raise UserError(f"`{key}` under `{kind}` is {value}: write a number, a string, true or false.")


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line, `--batch-size=8`, mappings as JSON; true is the name alone, false nothing."""
    return list(_option_words(options))


def _option_words(options: Mapping[str, Any]) -> Iterator[str]:
    for key, value in options.items():
        name = f"--{key.replace('_', '-')}"
        if value is not False:
            given = json.dumps(value) if isinstance(value, dict) else value
            yield name if value is True else f"{name}={given}"
