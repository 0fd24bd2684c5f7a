"""The commands of a sweep in their order, and which of them are done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import hashes
from ..data.files import hash_of_data, hash_of_entry
from ..evaluation import command
from ..scoring.file import unfinished_path
from .evaluators import KINDS, Asking, HeldOut, Judged, option_words
from .judging import baseline_of
from .records import read_object, read_record
from .shapes import Judgments
from .spec import ADAPTERS, BASE, Cell, Sweep
from .work import LLAMAFACTORY, OURS, Task

PAIRS = "pairs.jsonl"
ANSWERS, JUDGE = Judged.folder, "judge"  # folders of a cell
MODEL_ITSELF = "base"  # what the evaluation's commands call the model that they were given, beside adapters
WHERE = ("output_dir", "ref_log_probs_cache_dir")  # keys of a recipe that do not change what is trained


class Agenda:
    """The commands of a sweep.

    Names and folders come from all of its cells, whichever are asked for: they stay the same with `--only`.
    """

    def __init__(self, sweep: Sweep, cells: Sequence[Cell]) -> None:
        self.sweep = sweep
        self.cells = cells
        adapted = dict.fromkeys(cell.base_model for cell in cells if cell.is_adapter)
        alone = dict.fromkeys(cell.base_model for cell in cells if cell.base_model not in adapted)
        self.groups = _names(list(adapted), ADAPTERS)
        self.bases = _names(list(alone), BASE)
        self._contents: dict[Path, str] = {}  # hashes, each computed once

    def chains(self, cells: Sequence[Cell]) -> list[list[Task]]:
        """Commands that need each other stand in one chain, in their order: the untrained models', then the cells'."""
        return [*([task] for task in self.base_tasks(cells)), *(self.cell_tasks(cell) for cell in cells)]

    def base_tasks(self, cells: Sequence[Cell]) -> list[Task]:
        """Asking each model that cells start from, but for those that are asked with adapters of theirs."""
        models = dict.fromkeys(cell.base_model for cell in cells if cell.base_model in self.bases)
        return [
            self._ask(evaluator, self.bases[model], self.sweep.output / self.bases[model], model)
            for model in models
            for evaluator in self.sweep.evaluators.asking
            if evaluator.base
        ]

    def cell_tasks(self, cell: Cell) -> list[Task]:
        """Training a cell and what is done with it alone; adapters are asked together, later."""
        tasks = [self.train_task(cell)]
        if not cell.is_adapter:
            asking = self.sweep.evaluators.asking
            tasks += [self._ask(evaluator, cell.name, cell.folder, str(cell.model)) for evaluator in asking]
        if self.sweep.evaluators.pairs is not None and cell.has_reference:
            tasks.append(self._pairs_task(self.sweep.evaluators.pairs, cell))
        return tasks

    def train_task(self, cell: Cell) -> Task:
        made = [cell.folder / PAIRS, unfinished_path(cell.folder / PAIRS)]
        for each in KINDS:  # also of evaluators that the file does not name now: they may come back
            made.append(cell.folder / each.folder)
            made += [self.sweep.output / group / each.folder / cell.name for group in self.groups.values()]
        made += self._verdicts_on(cell.name)
        return Task(
            cell.name,
            "train",
            cell.folder,
            (LLAMAFACTORY, "train", str(cell.recipe_file)),
            fingerprint=hashes.of_value({key: value for key, value in cell.settings.items() if key not in WHERE}),
            outputs=(cell.model,),
            invalidates=tuple(made),
        )

    def trained(self, cells: Sequence[Cell]) -> list[Cell]:
        """Those of the cells whose training is done."""
        return [cell for cell in cells if self.train_task(cell).record().state == "done"]

    def adapter_tasks(self, trained: Sequence[Cell]) -> list[Task]:
        """Asking all trained adapters of a model in one load of the engine."""
        tasks = []
        for model, group in self.groups.items():
            adapters = {c.name: c for c in trained if c.is_adapter and c.base_model == model}
            for evaluator in self.sweep.evaluators.asking if adapters else ():
                runs = [*adapters, *([MODEL_ITSELF] if evaluator.base else [])]
                asked = self._unasked(evaluator, group, model, runs) or runs
                words = [
                    word for run in asked if run in adapters for word in ("--adapter", f"{run}={adapters[run].model}")
                ]
                words += [] if MODEL_ITSELF in asked else ["--skip-base"]
                tasks.append(
                    self._ask(evaluator, group, self.sweep.output / group, model, *words, runs=runs, asked=asked)
                )
        return tasks

    def _unasked(self, evaluator: Asking, group: str, model: str, runs: Sequence[str]) -> list[str]:
        """The runs of a group without results: the others are not asked again when adapters have been added."""
        folder = self.sweep.output / group
        if read_record(folder, evaluator.step).fingerprint != self.fingerprint(evaluator, model):
            return list(runs)
        return [run for run in runs if not (folder / evaluator.folder / run / evaluator.result).is_file()]

    def _ask(
        self,
        evaluator: Asking,
        name: str,
        folder: Path,
        model: str,
        *more: str,
        runs: Sequence[str] = (MODEL_ITSELF,),
        asked: Sequence[str] = (MODEL_ITSELF,),
    ) -> Task:
        """Asking a model.

        Args:
            evaluator: what.
            name, folder: of the cell, the untrained model or the group of adapters.
            model: the model itself.
            more: further words of the command.
            runs: whose results there must be then.
            asked: whose are missing: verdicts on their earlier answers do not hold any more.
        """
        output = folder / evaluator.folder
        answered = [name if run == MODEL_ITSELF else run for run in asked] if isinstance(evaluator, Judged) else []
        words = [evaluator.python or sys.executable, *evaluator.command(), "--engine", evaluator.engine]
        words += ["--model", model, *evaluator.words(), "--output", str(output), *option_words(evaluator.options)]
        return Task(
            name,
            evaluator.step,
            folder,
            (*words, *more),
            fingerprint=self.fingerprint(evaluator, model),
            resumes=(output,),
            invalidates=tuple(path for each in answered for path in self._verdicts_on(each)),
            results=tuple(output / run / evaluator.result for run in runs),
        )

    def fingerprint(self, evaluator: Asking, model: str) -> str:
        """A hash of what the results of a model depend on, the content of local files included."""
        return hashes.of_value([model, evaluator.asked(), self._contents_of(evaluator.named())])

    def _contents_of(self, named: Sequence[Any]) -> list[str]:
        """Hashes of the files and folders among values that may be paths."""
        return [self._content(Path(each)) for each in named if isinstance(each, str) and _is_path(each)]

    def _content(self, path: Path) -> str:
        if path not in self._contents:
            self._contents[path] = hashes.of_data(path)
        return self._contents[path]

    # --- judging -----------------------------------------------------------------------------------------------------

    def judge_tasks(self, cells: Sequence[Cell]) -> list[Task]:
        """Comparing the answers of cells with those of their baselines, wherever both are there, and as they are asked
        for now."""
        judged = self.sweep.evaluators.judge
        asked = [cell for cell in cells if self._baseline_of(cell) is not None]
        if judged is None or not asked:
            return []
        trained = self.trained(self.cells)
        tasks = [*self.base_tasks(self.cells), *self.adapter_tasks(trained)]
        tasks += [self._ask(judged, c.name, c.folder, str(c.model)) for c in trained if not c.is_adapter]
        done = [task for task in tasks if task.step == judged.step and task.record().state == "done"]
        answered = {path.parent for task in done for path in task.results}
        return [task for task in map(self.judge_task, asked) if answered.issuperset(task.reads)]

    def _verdicts_on(self, name: str) -> list[Path]:
        """The folders of verdicts on the answers of a cell or of an untrained model: its own, and those that compare
        others with it."""
        against = [cell for cell in self.cells if name in (cell.name, self._compared_with(cell))]
        return [cell.folder / JUDGE for cell in against]

    def _compared_with(self, cell: Cell) -> str | None:
        """What a cell's answers are compared with; without a judge in the file, what they were compared with."""
        baseline = self._baseline_of(cell)
        if baseline is None:
            file = cell.folder / JUDGE / "results.json"
            return str(read_object(file, Judgments)["summary"]["b"]) if file.is_file() else None
        return (self.groups.get(cell.base_model) or self.bases[cell.base_model]) if baseline == BASE else baseline

    def _baseline_of(self, cell: Cell) -> str | None:
        return self._baselines[cell.name]

    @cached_property
    def _baselines(self) -> dict[str, str | None]:
        judged = self.sweep.evaluators.judge
        return {cell.name: None if judged is None else baseline_of(judged, cell, self.cells) for cell in self.cells}

    def judge_task(self, cell: Cell) -> Task:
        """Comparing a cell's answers with those of its baseline, which it must have."""
        judged, baseline = self.sweep.evaluators.judge, self._baseline_of(cell)
        assert judged is not None
        assert baseline is not None
        ours, theirs = self._answers(cell), self._answers_of_baseline(cell, baseline)
        words = [judged.python or sys.executable, *command("judge"), "--a", str(ours), "--b", str(theirs)]
        words += ["--names", f"{cell.name},{baseline}", *judged.judging(), "--output", str(cell.folder / JUDGE)]
        return Task(
            cell.name,
            "judge",
            cell.folder,
            tuple(words),
            fingerprint=hashes.of_value(
                [
                    judged.judged_by(),
                    self._contents_of(list(judged.judge_options.values())),
                    self.fingerprint(judged, f"{cell.name} {baseline}"),
                ]
            ),
            reads=(ours, theirs),
            resumes=(cell.folder / JUDGE,),
            results=(cell.folder / JUDGE / "results.json",),
        )

    def fingerprints(self, cell: Cell) -> dict[str, str]:
        """Of the commands of a cell's own, by step."""
        tasks = self.cell_tasks(cell)
        tasks += [self.judge_task(cell)] if self._baseline_of(cell) is not None else []
        return {task.step: task.fingerprint for task in tasks}

    def _answers(self, cell: Cell) -> Path:
        """Where the answers of a cell are."""
        if cell.is_adapter:
            return self.sweep.output / self.groups[cell.base_model] / ANSWERS / cell.name
        return cell.folder / ANSWERS / MODEL_ITSELF

    def _answers_of_baseline(self, cell: Cell, name: str) -> Path:
        if name == BASE:  # the untrained model that the cell starts from
            group = self.groups.get(cell.base_model) or self.bases[cell.base_model]
            return self.sweep.output / group / ANSWERS / MODEL_ITSELF
        return self._answers(next(other for other in self.cells if other.name == name))

    def _pairs_task(self, held_out: HeldOut, cell: Cell) -> Task:
        output = cell.folder / PAIRS
        most = "null" if held_out.max_samples is None else held_out.max_samples  # the recipe's is for training
        words = [OURS, "score", str(cell.recipe_file), f"dataset={held_out.dataset}", f"max_samples={most}"]
        if cell.is_adapter:
            words.append(f"adapter_name_or_path={cell.model}")
        else:
            reference = cell.settings.get("ref_model", cell.base_model)
            words += [f"model_name_or_path={cell.model}", f"ref_model={reference}"]
        return Task(
            cell.name,
            "pairs",
            cell.folder,
            (*words, "--output", str(output)),
            fingerprint=hashes.of_value([held_out.model_dump(), self.held_out_pairs[cell.data_folder]]),
            outputs=(output,),
            resumes=(unfinished_path(output),),
            results=(output,),
        )

    @cached_property
    def held_out_pairs(self) -> dict[str, str]:
        """A hash of the held-out pairs and of their columns, by the data folder that they are in."""
        held_out = self.sweep.evaluators.pairs
        folders = dict.fromkeys(cell.data_folder for cell in self.cells) if held_out else ()
        return {
            folder: hashes.of_value([hash_of_data(folder, held_out.dataset), hash_of_entry(folder, held_out.dataset)])
            for folder in folders
            if held_out
        }


def _is_path(text: str) -> bool:
    """Whether a file or folder has this name. An empty text is this folder, and does not count."""
    try:
        return bool(text) and Path(text).exists()
    except OSError:  # too long for a name
        return False


def _names(models: Sequence[str], stem: str) -> dict[str, str]:
    """A name per model: the stem alone if there is one model only."""
    return {model: stem if len(models) == 1 else f"{stem}.{number}" for number, model in enumerate(models, start=1)}
