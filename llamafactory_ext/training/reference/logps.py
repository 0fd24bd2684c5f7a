"""The reference's log-probabilities of a run's pairs: found on disk, or computed by all ranks before the first step.

They are constants of a pair, so no reference model is held while the policy is trained, and later runs with the same
reference and pairs, such as all cells of a sweep, compute nothing.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from llamafactory.extras import logging
from tqdm import tqdm
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ...errors import not_possible
from ...paths import named_path
from ..layout import depends_on_batch
from ..refinement import BATCH_PREFIX, PROMPT_IDS, augmented_pair
from . import cache as cache
from .cache import Logps
from .folders import default_folder
from .model import INSISTED, PendingReference, describe, drawn_weights, folder_name, not_the_same_weights, obstacle

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

Pair = dict[str, Any]  # as LLaMA-Factory tokenizes it

Place = tuple[int, int, bool]  # of a pair: data set, row, whether it is that row's augmented pair

Batch = list[tuple[int, Place]]  # of pairs, each with the length of its longer answer

COLUMN = "reference_logps"  # of a batch; see `from_column`
LOCK_SECONDS = 60  # of waiting for another run, before the ranks hear of each other again
ROWS_AT_ONCE = 1000  # that are read from a data set
BATCHES_PER_FILE = 16  # per rank; what a killed run loses at most
FOLDER_OF_RUN = "reference_logps"  # in the output folder, of a reference that only this run has


def known_beforehand(
    pending: PendingReference, policy: torch.nn.Module, about_run: Mapping[str, Any]
) -> ReferenceLogps | None:
    """The reference's log-probabilities as far as they are on disk, or None if they are to be computed in every step.

    Args:
        pending: the reference.
        policy: the model to be trained.
        about_run: the trainer's keyword arguments, with the data sets and transformers' training arguments.

    Raises:
        ValueError: if the recipe insists where it is not exact.
    """
    args, datasets = about_run["args"], _datasets(about_run)
    wanted = pending.finetuning_args.precompute_ref_log_probs
    reason = obstacle(pending, args, datasets) or depends_on_batch(policy.config, about_run["data_collator"])
    if pending.only_this_run_has_it:
        return _of_this_run(pending, args, datasets, INSISTED if wanted is False else reason)
    if wanted is False:
        return None
    about = describe(pending, policy, args) if reason is None else None
    references = None
    if about is not None:
        directory = pending.finetuning_args.ref_log_probs_cache_dir
        parent = named_path("ref_log_probs_cache_dir", directory) if directory else default_folder()
        folder = parent / folder_name(about)
        references = ReferenceLogps(folder, {"model": pending.model_args.model_name_or_path, **about}, datasets)
        if wanted is None and references.missing and _epochs(args, datasets[0]) < 1:
            references, reason = None, "the run ends before it has trained on every pair"
    elif reason is None:
        reason = "the content of its files is not known"

    if references is None:
        assert reason is not None
        if wanted:
            raise not_possible("precompute_ref_log_probs", reason)
        logger.info_rank0(f"The reference's log-probabilities are computed in every step: {reason}.")
        return None
    references.announce()
    return references


def _of_this_run(pending: PendingReference, args: Any, datasets: list[Any], reason: str | None) -> ReferenceLogps:
    """Those of the policy before the first step, kept with the run: nothing could compute them once more.

    Raises:
        ValueError: if they cannot be computed ahead, for that reason, or are missing in a run that is resumed.
    """
    keys = drawn_weights(pending.model_args)
    if reason is not None:
        raise not_the_same_weights(keys, reason)
    resumed = args.resume_from_checkpoint
    parent = Path(resumed).parent if isinstance(resumed, str) else Path(args.output_dir)
    folder = parent / FOLDER_OF_RUN
    if not resumed and PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, which had other weights
    references = ReferenceLogps(folder, {"run": str(parent), "random weights": keys}, datasets)
    if resumed and references.missing:
        raise ValueError(
            f"`{keys[0]}`: {len(references.missing)} of the log-probabilities that the policy gave before the first "
            f"step are not in {folder}, and nothing can compute them now: resume with the same data, or start anew "
            "with another `output_dir`."
        )
    references.announce()
    return references


def _epochs(args: Any, dataset: Any) -> float:
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    pairs = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return float(pairs / len(dataset))


def _datasets(about_run: Mapping[str, Any]) -> list[Any]:
    """The data sets that the run goes through: for training first, then for evaluation."""
    args = about_run["args"]
    evaluation = about_run.get("eval_dataset") if args.do_eval or args.eval_strategy != "no" else None
    parts = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return [dataset for dataset in (about_run.get("train_dataset"), *parts) if dataset is not None]


class ReferenceLogps:
    """A table by pair, the same on every rank.

    Args:
        folder: where it is kept; a folder per reference.
        about: what the reference is, for the folder's readers.
        datasets: tokenized pairs, each with its augmented pair where the refinement term needs one.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], datasets: Sequence[Any]) -> None:
        self.folder, self.about, self.datasets = folder, about, datasets
        self._look_up()

    def announce(self) -> None:
        """Say how many are known."""
        found, missing = len(self.table), len(self.missing)
        logger.info_rank0(
            f"Reference log-probabilities: {found} of {found + missing} pairs (training, evaluation and augmented "
            f"ones) are in {self.folder}: "
            + (f"{missing} are computed before the first step." if missing else "no reference model is needed.")
        )

    def _look_up(self) -> None:
        found: list[Any] = [None]
        if PartialState().is_main_process:
            table, places = cache.read(self.folder), self._places
            # Longest first: batches of like lengths, and what does not fit into memory shows at once.
            missing = sorted((value for key, value in places.items() if key not in table), reverse=True)
            longest = max((length for length, (number, *_) in places.values() if number == 0), default=0)
            found = [({key: table[key] for key in places if key in table}, missing, longest)]
        broadcast_object_list(found)
        self.table, self.missing, self.longest = found[0]

    @cached_property
    def _places(self) -> dict[bytes, tuple[int, Place]]:
        """Per pair its length and where it is first. The main process alone goes through the data, and once."""
        places: dict[bytes, tuple[int, Place]] = {}
        for place, pair in self._pairs():
            places.setdefault(cache.pair_key(pair), (_length(pair), place))
        return places

    def _pairs(self) -> Iterator[tuple[Place, Pair]]:
        """Every pair, and where it is."""
        for number, dataset in enumerate(self.datasets):
            names = [name for name in (*cache.TOKENS, PROMPT_IDS) if name in dataset.column_names]
            for row, pair in enumerate(_rows(dataset.select_columns(names))):
                yield (number, row, False), pair
                if PROMPT_IDS in names:
                    yield (number, row, True), augmented_pair(pair)

    def fill(self, score: Callable[[list[Pair]], Tensor], tokens: int) -> None:
        """Compute what is missing, shared out over the ranks; what is done is on disk, whatever happens then.

        Args:
            score: gives the reference's log-probabilities of some pairs, shape `(pairs, 2)`, chosen first.
            tokens: the most that it is given at a time, padding included; at least one pair. Where memory runs out, it
                is given fewer.

        Raises:
            ValueError: if a log-probability is not a number.
            RuntimeError: if not even one pair fits into memory.
        """
        with self._only_one_run():
            self._look_up()  # another run may have been faster
            rounds = self._rounds(score, tokens)
            while part := list(itertools.islice(rounds, BATCHES_PER_FILE)):
                computed = {key: logps for batch in part for key, logps in batch.items()}
                self.table |= computed
                if PartialState().is_main_process:
                    self._save(cache.append, self.folder, computed, self.about)
            if PartialState().is_main_process:
                self._save(cache.merge, self.folder, self.about)
        self.missing = []

    def _rounds(self, score: Callable[[list[Pair]], Tensor], tokens: int) -> Iterator[Logps]:
        """What is missing, a batch of every rank at a time."""
        state, start = PartialState(), 0
        bar = tqdm(total=len(self.missing), desc="Reference log-probabilities", disable=not state.is_local_main_process)
        with bar:
            while start < len(self.missing):
                batches = _batches(self.missing, start, tokens, state.num_processes)
                # With fewer batches than ranks, some compute what others do: they may gather the weights together.
                computed = self._score(batches[state.process_index % len(batches)], score)
                everyone: list[Logps | None] = gather_object([computed])
                if None in everyone:
                    tokens = _fewer(batches)
                    continue
                yield {key: logps for part in everyone if part is not None for key, logps in part.items()}
                start += sum(map(len, batches))
                bar.update(sum(map(len, batches)))

    @contextmanager
    def _only_one_run(self) -> Iterator[None]:
        """Waits until no other run computes for the same reference; between attempts, ranks do not wait too long."""
        locks: list[Any] = []
        said = False
        while True:
            done = [True]
            if PartialState().is_main_process:
                self._save(lambda: locks.append(cache.lock(self.folder, LOCK_SECONDS)))
                done = [not locks or locks[-1] is not None]  # without a lock where there can be none
            broadcast_object_list(done)
            if done[0]:
                break
            if not said:
                logger.info_rank0(f"Another run computes the reference's log-probabilities in {self.folder}: waiting.")
                said = True
        try:
            yield
        finally:
            if locks:
                locks[-1].release()

    def _score(self, batch: Batch, score: Callable[[list[Pair]], Tensor]) -> Logps | None:
        """The values of a batch's pairs; None if memory ran out."""
        pairs = [self._pair(*place) for _, place in batch]
        try:
            logps = score(pairs).float().cpu()
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or _ranks_wait_for_each_other():
                raise
            logps = None
        if logps is None:  # outside of the except block, which keeps the tensors of the error's frames alive
            clear_device_cache(garbage_collection=True)
            return None
        if not torch.isfinite(logps).all():
            raise ValueError(
                "the reference gives some response a log-probability that is not a number: check its weights and "
                "precision (bf16 in place of fp16)."
            )
        return dict(zip(map(cache.pair_key, pairs), map(tuple, logps.tolist()), strict=True))

    def _pair(self, number: int, row: int, augmented: bool) -> Pair:
        pair = self.datasets[number][row]
        return augmented_pair(pair) if augmented else pair

    def _save(self, write: Callable[..., Any], *args: Any) -> None:
        """A folder that cannot be written costs later runs their time, and this one nothing."""
        try:
            write(*args)
        except (OSError, NotImplementedError) as error:
            logger.warning_rank0_once(
                f"The reference log-probabilities are kept for this run only: {error}. Make room or name another "
                "folder with `ref_log_probs_cache_dir`, so that later runs need not compute them again."
            )

    def column(self, pairs: Sequence[Pair]) -> Tensor:
        """The values of some pairs, as a column of their batch; see `from_column`."""
        return torch.tensor([self.table[cache.pair_key(pair)] for pair in pairs]).view(torch.int32)


def _rows(dataset: Any) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a data set whose columns are lists of numbers.

    Straight from Arrow: the formatters of `datasets` import what they find of torchvision and others, with names that
    releases of today no longer have, and convert number by number.
    """
    tables = dataset.with_format("arrow")
    for start in range(0, len(dataset), ROWS_AT_ONCE):
        table = tables[start : start + ROWS_AT_ONCE]
        columns = [_lists(table[name]) for name in dataset.column_names]
        for row in zip(*columns, strict=True):
            yield dict(zip(dataset.column_names, row, strict=True))


def _lists(column: pa.ChunkedArray) -> Iterator[np.ndarray]:
    for array in column.chunks:
        values, offsets = array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()
        yield from (values[start:end] for start, end in itertools.pairwise(offsets.tolist()))


def _length(pair: Pair) -> int:
    return max(len(pair["chosen_labels"]), len(pair["rejected_labels"]))


def _batches(missing: Sequence[tuple[int, Place]], start: int, tokens: int, count: int) -> list[Batch]:
    """As many batches, from `missing[start:]`, which is sorted by length, longest first; fewer at its end."""
    batches: list[Batch] = []
    while len(batches) < count and start < len(missing):
        size = max(1, tokens // (2 * missing[start][0]))
        batches.append(list(missing[start : start + size]))
        start += size
    return batches


def _fewer(batches: list[Batch]) -> int:
    """Half the tokens of the largest of some batches, with which memory ran out."""
    if all(len(batch) == 1 for batch in batches):
        raise RuntimeError(
            f"memory ran out while the reference scored a single pair of {batches[0][0][0]} tokens an answer: write a "
            "smaller `cutoff_len`."
        )
    tokens = max(2 * batch[0][0] * len(batch) for batch in batches) // 2
    logger.warning_rank0(f"Memory ran out while the reference scored pairs: going on with {tokens} tokens at a time.")
    return tokens


def _ranks_wait_for_each_other() -> bool:
    """Whether ranks gather weights within a forward pass, so that one of them cannot leave it and try again."""
    sharded: bool = is_deepspeed_zero3_enabled() or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return sharded and PartialState().num_processes > 1


def from_column(column: Tensor) -> Tensor:
    """Log-probabilities of shape `(pairs, 2)`, float32, chosen first.

    A batch carries their bits as integers, because DeepSpeed's half precision would round what is no integer.
    """
    return column.view(torch.float32)


class ReferenceCollator:
    """A collator whose batches also have the reference's log-probabilities of their pairs."""

    def __init__(self, collator: Any, references: ReferenceLogps) -> None:
        self.collator, self.references = collator, references

    def __call__(self, pairs: list[Pair]) -> dict[str, Tensor]:
        batch = {**self.collator(pairs), COLUMN: self.references.column(pairs)}
        if PROMPT_IDS in pairs[0]:
            batch[BATCH_PREFIX + COLUMN] = self.references.column([augmented_pair(pair) for pair in pairs])
        return batch
