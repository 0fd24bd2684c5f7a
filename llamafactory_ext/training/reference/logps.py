"""The reference log-probabilities of a run's pairs: read from the cache, or computed before the first step.

They do not change during training, so no reference model stays in memory, and later runs with the same reference and
pairs, such as the cells of a sweep, reuse them.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from llamafactory.extras import logging
from tqdm import tqdm

from ...errors import in_a_line, not_possible
from ...paths import named_path
from ..layout import depends_on_batch
from ..modes import ranks_wait_for_each_other
from ..ranking import BETWEEN, LENGTHS, has_several, responses_of
from ..refinement import BATCH_PREFIX, PROMPT_IDS, augmented_pair
from . import cache as cache
from .cache import Logps
from .content import columns_with_media, describe_processing
from .folders import default_folder
from .model import (
    NOT_PRECOMPUTED,
    PendingReference,
    describe,
    different_weights,
    folder_name,
    obstacle,
    random_weight_keys,
)
from .reading import rows_of

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.get_logger()  # LLaMA-Factory's own, whose lines reach the console and the web UI

Pair = dict[str, Any]  # tokenized by LLaMA-Factory

Place = tuple[int, int, bool]  # where a pair is: data set, row, whether it is the row's augmented pair

Batch = list[tuple[int, Place]]  # pairs, each with the tokens of its longer sequence

ENDS_EARLY = "the run ends before it has trained on every pair"
COLUMN = "reference_logps"  # key of a batch; see `from_column`
LOCK_SECONDS = 60  # how long to wait for another run before the ranks communicate again
BATCHES_PER_FILE = 16  # per rank; an interrupted run loses at most these
FOLDER_OF_RUN = "reference_logps"  # in the output folder, for a reference that only this run has


class UnknownContentError(ValueError):
    """A picture, video or sound cannot be identified, so that its pair's log-probabilities cannot be kept."""


def precomputed(
    pending: PendingReference, policy: torch.nn.Module, about_run: Mapping[str, Any]
) -> ReferenceLogps | None:
    """The reference log-probabilities that are cached so far, or None if they are computed in every step.

    Args:
        pending: the reference.
        policy: the model to be trained.
        about_run: the trainer's keyword arguments: data sets, collator, transformers' training arguments.

    Raises:
        ValueError: if the recipe sets `precompute_ref_log_probs: true` and that is not exact.
    """
    args, datasets = about_run["args"], datasets_of(about_run)
    wanted = pending.finetuning_args.precompute_ref_log_probs
    reason = obstacle(pending, args, datasets) or depends_on_batch(policy.config, about_run["data_collator"])
    if pending.only_this_run_has_it:
        return _of_this_run(pending, args, datasets, NOT_PRECOMPUTED if wanted is False else reason)
    if wanted is False:
        return None
    is_short = reason is None and _epochs(args, datasets[0]) < 1
    has_media = reason is None and any(columns_with_media(dataset) for dataset in datasets)
    if has_media and is_short and wanted is None:  # without reading their files
        reason = ENDS_EARLY
    about = describe(pending, policy, args) if reason is None else None
    references = None
    if about is not None:
        if has_media:
            about["media"] = describe_processing(about_run["data_collator"], pending.model_args)
        directory = pending.finetuning_args.ref_log_probs_cache_dir
        parent = named_path("ref_log_probs_cache_dir", directory) if directory else default_folder()
        folder = parent / folder_name(about)
        try:
            references = ReferenceLogps(folder, {"model": pending.model_args.model_name_or_path, **about}, datasets)
        except UnknownContentError as error:
            reason = str(error)
        if references is not None and wanted is None and references.missing and is_short:
            references, reason = None, ENDS_EARLY
    elif reason is None:
        reason = "the files of the reference model cannot be identified"

    if references is None:
        assert reason is not None
        if wanted:
            raise not_possible("precompute_ref_log_probs", reason)
        logger.info_rank0(f"Reference log-probabilities are computed in every step: {reason}.")
        return None
    references.announce()
    return references


def _of_this_run(pending: PendingReference, args: Any, datasets: list[Any], reason: str | None) -> ReferenceLogps:
    """Those of the policy before the first step, kept in the run's output: they cannot be computed again.

    Raises:
        ValueError: if they cannot be precomputed, for `reason`, or are missing in a resumed run.
    """
    keys = random_weight_keys(pending.model_args)
    if reason is not None:
        raise different_weights(keys, reason)
    resumed = args.resume_from_checkpoint
    parent = Path(resumed).parent if isinstance(resumed, str) else Path(args.output_dir)
    folder = parent / FOLDER_OF_RUN
    if not resumed and PartialState().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, which had other weights
    references = ReferenceLogps(folder, {"run": str(parent), "random weights": keys}, datasets)
    if resumed and references.missing:
        raise ValueError(
            f"`{keys[0]}`: {len(references.missing)} reference log-probabilities are missing from {folder} and cannot "
            "be computed after the first step: resume with the same data, or start a new run with another "
            "`output_dir`."
        )
    references.announce()
    return references


def _epochs(args: Any, dataset: Any) -> float:
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    pairs = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return float(pairs / len(dataset))


def datasets_of(about_run: Mapping[str, Any]) -> list[Any]:
    """The data sets of the run: the training set first, then those for evaluation."""
    args = about_run["args"]
    evaluation = about_run.get("eval_dataset") if args.do_eval or args.eval_strategy != "no" else None
    parts = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
    return [dataset for dataset in (about_run.get("train_dataset"), *parts) if dataset is not None]


class ReferenceLogps:
    """Reference log-probabilities by pair, the same on every rank.

    Args:
        folder: the reference's cache folder.
        about: describes the reference, for people who read the folder.
        datasets: tokenized pairs, with augmented pairs if the loss has a refinement term.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], datasets: Sequence[Any]) -> None:
        self.folder, self.about, self.datasets = folder, about, datasets
        self._look_up()

    def announce(self) -> None:
        """Log how many pairs are cached."""
        found, missing = len(self.table), len(self.missing)
        logger.info_rank0(
            f"Reference log-probabilities: {found} of {found + missing} pairs (training, evaluation and augmented) are "
            f"cached in {self.folder}; "
            + (f"computing {missing} before the first step." if missing else "no reference model is needed.")
        )

    def _look_up(self) -> None:
        found: list[Any] = [None]
        if PartialState().is_main_process:
            try:
                found = [self._known_and_missing()]
            except (OSError, TypeError) as error:  # for all ranks, which wait for an answer
                found = [f"a picture, video or sound cannot be read ({in_a_line(error)})"]
        broadcast_object_list(found)
        if isinstance(found[0], str):
            raise UnknownContentError(found[0])
        self.table, self.missing, self.longest = found[0]

    def _known_and_missing(self) -> tuple[Logps, list[tuple[int, Place]], int]:
        """What is cached, what is not, and the length of the longest pair of the training set."""
        table, places = cache.read(self.folder), self._places
        # Longest first: batches have similar lengths, and a lack of memory shows at once.
        missing = sorted({value for key, value in places.items() if key not in table}, reverse=True)
        longest = max((length for length, (number, *_) in places.values() if number == 0), default=0)
        return {key: table[key] for key in places if key in table}, missing, longest

    @cached_property
    def _places(self) -> dict[bytes, tuple[int, Place]]:
        """Key of each pair -> its length and first place. Only the main process reads the data, and only once."""
        places: dict[bytes, tuple[int, Place]] = {}
        for place, row in self._pairs():
            for key in cache.row_keys(row):
                places.setdefault(key, (_length(row), place))
        return places

    def _pairs(self) -> Iterator[tuple[Place, Pair]]:
        """Every pair, and where it is."""
        for number, dataset in enumerate(self.datasets):
            names = [name for name in (*cache.TOKENS, *BETWEEN, LENGTHS, PROMPT_IDS) if name in dataset.column_names]
            media = columns_with_media(dataset)
            shown: Iterable[dict[str, Any]] = itertools.repeat({})
            if media:
                shown = tqdm(dataset.select_columns(media), desc="Reading pictures, videos and sounds")
            for row, (tokens, seen) in enumerate(zip(rows_of(dataset.select_columns(names)), shown, strict=False)):
                pair = {**tokens, **seen}
                yield (number, row, False), pair
                if PROMPT_IDS in names:
                    yield (number, row, True), augmented_pair(pair)

    def fill(self, score: Callable[[list[Pair]], Tensor], tokens: int) -> None:
        """Compute the missing pairs on all ranks, and save them to the cache as they are done.

        Args:
            score: returns the reference log-probabilities of the responses of data rows, in nats, shape
                `(responses,)`: row by row, in the order of `ranking.responses_of`.
            tokens: the most tokens per call of `score`, padding included, but at least one pair. Halved when memory
                runs out.

        Raises:
            ValueError: if a log-probability is not finite.
            RuntimeError: if a single pair does not fit into memory.
        """
        with self._only_one_run():
            self._look_up()  # another run may have computed some
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
        """The log-probabilities of the missing pairs, one batch per rank at a time."""
        state, start = PartialState(), 0
        bar = tqdm(total=len(self.missing), desc="Reference log-probabilities", disable=not state.is_local_main_process)
        with bar:
            while start < len(self.missing):
                batches = _batches(self.missing, start, tokens, state.num_processes)
                # With fewer batches than ranks, some batches are computed twice: all ranks may have to gather weights.
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
        """Hold the cache's lock; ranks communicate between attempts, so that no collective times out."""
        locks: list[Any] = []
        said = False
        while True:
            done = [True]
            if PartialState().is_main_process:
                self._save(lambda: locks.append(cache.lock(self.folder, LOCK_SECONDS)))
                done = [not locks or locks[-1] is not None]  # go on without a lock where locking failed
            broadcast_object_list(done)
            if done[0]:
                break
            if not said:
                logger.info_rank0(f"Waiting: another run computes the reference log-probabilities in {self.folder}.")
                said = True
        try:
            yield
        finally:
            if locks:
                locks[-1].release()

    def _score(self, batch: Batch, score: Callable[[list[Pair]], Tensor]) -> Logps | None:
        """The log-probabilities of a batch's pairs; None if memory ran out."""
        pairs = [self._pair(*place) for _, place in batch]
        try:
            logps = score(pairs).float().cpu()
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or ranks_wait_for_each_other():
                raise
            logps = None
        if logps is None:  # outside of the except block, which keeps the tensors of the error's frames alive
            clear_device_cache(garbage_collection=True)
            return None
        if not torch.isfinite(logps).all():
            raise ValueError(
                "the reference model gives a response a log-probability that is not finite: check its weights, or use "
                "bf16 instead of fp16."
            )
        of_rows = logps.split([len(responses_of(pair)) for pair in pairs])
        return {
            key: values
            for pair, of_row in zip(pairs, of_rows, strict=True)
            for key, values in zip(cache.row_keys(pair), cache.two_by_two(of_row.tolist()), strict=True)
        }

    def _pair(self, number: int, row: int, augmented: bool) -> Pair:
        pair = self.datasets[number][row]
        return augmented_pair(pair) if augmented else pair

    def _save(self, write: Callable[..., Any], *args: Any) -> None:
        """Call `write`; if the cache cannot be written, only warn: this run does not need it."""
        try:
            write(*args)
        except (OSError, NotImplementedError) as error:
            logger.warning_rank0_once(
                f"Reference log-probabilities are kept for this run only: {error}. Free disk space, or name another "
                "folder in `ref_log_probs_cache_dir`, so that later runs can reuse them."
            )

    def column(self, pairs: Sequence[Pair]) -> Tensor:
        """Log-probabilities of data rows, int32, as a column of their batch; see `from_column`.

        Shape `(pairs, 2)`, and `(responses,)` in a batch that has a row of more than two (`ranking.Ranking`).

        Raises:
            ValueError: if a picture, video or sound has changed since they were computed.
        """
        found = [[self.table.get(key) for key in cache.row_keys(pair)] for pair in pairs]
        if any(None in each for each in found):
            raise ValueError(
                "a picture, video or sound of the data has changed since the reference's log-probabilities were "
                "computed: run the same command again."
            )
        rows = [[value for each in of_row if each is not None for value in each] for of_row in found]
        if any(map(has_several, pairs)):  # the last value may stand there twice
            rows = [[value for row, pair in zip(rows, pairs, strict=True) for value in row[: len(responses_of(pair))]]]
            return torch.tensor(rows[0]).view(torch.int32)
        return torch.tensor(rows).view(torch.int32)


def _length(pair: Pair) -> int:
    """The tokens of a pair's longer sequence; of more responses, as if they were a pair with as many in all."""
    responses = responses_of(pair)
    return math.ceil(max(len(labels) for _, labels in responses) * len(responses) / 2)


def _batches(missing: Sequence[tuple[int, Place]], start: int, tokens: int, count: int) -> list[Batch]:
    """Up to `count` batches from `missing[start:]`, which is sorted longest first."""
    batches: list[Batch] = []
    while len(batches) < count and start < len(missing):
        size = max(1, tokens // (2 * missing[start][0]))
        batches.append(list(missing[start : start + size]))
        start += size
    return batches


def _fewer(batches: list[Batch]) -> int:
    """Half the tokens of the largest of the batches, after memory ran out."""
    if all(len(batch) == 1 for batch in batches):
        raise RuntimeError(
            f"memory ran out while the reference scored a single pair of {batches[0][0][0]} tokens (prompt and longer "
            "response): write a smaller `cutoff_len`."
        )
    tokens = max(2 * batch[0][0] * len(batch) for batch in batches) // 2
    logger.warning_rank0(
        f"Memory ran out while the reference scored pairs: trying again with {tokens} tokens per batch."
    )
    return tokens


def from_column(column: Tensor) -> Tensor:
    """Log-probabilities, float32, from a column of a batch, whose shape they have (`ReferenceLogps.column`).

    The column holds their bits as int32, because DeepSpeed casts the floats of a batch to half precision.
    """
    return column.view(torch.float32)


class ReferenceCollator:
    """A collator that adds the reference log-probabilities of the pairs to their batch."""

    def __init__(self, collator: Any, references: ReferenceLogps) -> None:
        self.collator, self.references = collator, references

    def __call__(self, pairs: list[Pair]) -> dict[str, Tensor]:
        batch = {**self.collator(pairs), COLUMN: self.references.column(pairs)}
        if PROMPT_IDS in pairs[0]:
            batch[BATCH_PREFIX + COLUMN] = self.references.column([augmented_pair(pair) for pair in pairs])
        return batch
