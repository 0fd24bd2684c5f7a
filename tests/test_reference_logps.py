"""The table of reference log-probabilities: how pairs are read, batched, and scored in what memory there is."""

from __future__ import annotations

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamafactory_ext.training.ranking import between_columns, responses_of
from llamafactory_ext.training.reference import cache as cache
from llamafactory_ext.training.reference import logps as reference_logps
from llamafactory_ext.training.reference import reading
from llamafactory_ext.training.reference.logps import ReferenceLogps, _batches
from llamafactory_ext.training.refinement import PROMPT_IDS, augmented_pair


def rows(count):
    """Pairs of unlike length, with augmented prompts; the one of row n has n + 4 tokens in its longer response."""
    for n in range(count):
        prompt, chosen, rejected = [1] * (n % 3), [n, 7], [8] * (n + 4 - n % 3)
        row = {PROMPT_IDS: [5, *prompt], "images": None}
        for side, response in (("chosen", chosen), ("rejected", rejected)):
            row[f"{side}_input_ids"] = prompt + response
            row[f"{side}_labels"] = [-100] * len(prompt) + response
        yield row


def plain(pair):
    return {name: list(pair[name]) for name in (*cache.TOKENS, PROMPT_IDS)}


@pytest.mark.parametrize("at_once", [1, 4, 1000])
@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_pairs_are_read_as_the_data_set_gives_them(kind, at_once, monkeypatch, tmp_path):
    """Of several chunks, in another order, and left out in part, as LLaMA-Factory splits and samples."""
    monkeypatch.setattr(reading, "ROWS_AT_ONCE", at_once)
    features = {name: datasets.Sequence(datasets.Value(kind)) for name in (*cache.TOKENS, PROMPT_IDS)}
    features = datasets.Features(features | {"images": datasets.Value("null")})
    made = datasets.concatenate_datasets(
        [datasets.Dataset.from_list(list(rows(9))[part], features=features) for part in (slice(0, 2), slice(2, 9))]
    )
    for dataset in (made, made.shuffle(seed=1), made.select([8, 0, 3]), made.shuffle(seed=2).select(range(2, 7))):
        references = ReferenceLogps(tmp_path, {}, [dataset, dataset.select(range(2))])
        read = dict(references._pairs())
        assert len(read) == 2 * (len(dataset) + 2)
        for (number, row, augmented), pair in read.items():
            expected = references.datasets[number][row]
            expected = augmented_pair(expected) if augmented else expected
            assert plain(pair) == plain(expected)
            assert cache.row_keys(pair) == cache.row_keys(expected)
        assert references.longest == max(len(pair["rejected_labels"]) for pair in read.values())


def test_rows_of_several_responses_are_read_and_kept_two_by_two(tmp_path):
    """A pair's key is the same whether it stands alone or in a longer row; the last of an odd number stands twice."""
    others = [([7, 8], [-100, 8]), ([9], [9]), ([4, 5], [4, 5])]
    of_two, several, five = (next(rows(1)) | between_columns(others[:count]) for count in (0, 2, 3))
    references = ReferenceLogps(tmp_path, {}, [datasets.Dataset.from_list([of_two, several, five, several])])
    read = [pair for (_, _, augmented), pair in references._pairs() if not augmented]
    assert [cache.row_keys(pair) for pair in read] == [cache.row_keys(row) for row in (of_two, several, five, several)]
    assert [len(cache.row_keys(pair)) for pair in read] == [1, 2, 3, 2]
    alone = {"chosen_input_ids": several["chosen_input_ids"], "chosen_labels": several["chosen_labels"]}
    alone |= {"rejected_input_ids": [7, 8], "rejected_labels": [-100, 8]}
    assert cache.row_keys(alone) == cache.row_keys(several)[:1] == cache.row_keys(five)[:1]
    assert {place for _, place in references.missing} == {(0, row, kind) for row in (0, 1, 2) for kind in (False, True)}

    def score(pairs):
        sums = [float(sum(ids)) + len(labels) / 8 for pair in pairs for ids, labels in responses_of(pair)]
        return torch.tensor(sums)

    references.fill(score, tokens=40)
    again = ReferenceLogps(tmp_path, {}, references.datasets)
    assert again.missing == []
    column = reference_logps.from_column(again.column([of_two, several, five]))
    assert column.tolist() == score([of_two, several, five]).tolist()
    assert reference_logps.from_column(again.column([of_two])).shape == (1, 2)


def test_an_empty_data_set(tmp_path):
    empty = datasets.Dataset.from_list(list(rows(1))).select([])
    references = ReferenceLogps(tmp_path, {}, [empty])
    assert (references.missing, references.longest) == ([], 0)
    references.fill(pytest.fail, 100)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(0, 500), st.integers(1, 5))
def test_batches_are_everything_in_order_and_within_their_tokens(lengths, tokens, ranks):
    missing = [(length, (0, row, False)) for row, length in enumerate(sorted(lengths, reverse=True))]
    start, taken = 0, []
    while start < len(missing):
        batches = _batches(missing, start, tokens, ranks)
        assert 1 <= len(batches) <= ranks
        for batch in batches:
            assert len(batch) == 1 or 2 * len(batch) * batch[0][0] <= tokens
        taken += [pair for batch in batches for pair in batch]
        start = len(taken)
    assert taken == missing


# --- in what memory there is ------------------------------------------------------------------------------------------


def scoring(fits, asked):
    """Scores as many pairs at a time as `fits`; for more, it asks torch for memory that no machine has."""

    def score(pairs):
        asked.append(len(pairs))
        if len(pairs) > fits:
            torch.empty(2**60, dtype=torch.uint8)
        return torch.tensor([[-float(sum(pair["chosen_input_ids"])), -1.0] for pair in pairs]).flatten()

    return score


def test_where_memory_runs_out_it_goes_on_with_fewer_pairs(tmp_path):
    dataset = datasets.Dataset.from_list(list(rows(9))).remove_columns(PROMPT_IDS)
    references, asked = ReferenceLogps(tmp_path, {}, [dataset]), []
    references.fill(scoring(2, asked), tokens=2 * 12 * 8)
    assert asked[:3] == [8, 4, 2]  # half of it, until it fits
    assert sum(size for size in asked if size <= 2) == 9
    values = reference_logps.from_column(references.column(list(dataset)))
    assert values[:, 0].tolist() == [-sum(row["chosen_input_ids"]) for row in dataset]
    assert len(cache.read(tmp_path)) == 9


def test_where_not_even_one_pair_fits_it_says_so(tmp_path):
    references = ReferenceLogps(tmp_path, {}, [datasets.Dataset.from_list(list(rows(3))).remove_columns(PROMPT_IDS)])
    with pytest.raises(RuntimeError, match=r"a single pair of 6 tokens .*: write a smaller `cutoff_len`"):
        references.fill(scoring(0, []), tokens=50)


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path):
    references = ReferenceLogps(tmp_path, {}, [datasets.Dataset.from_list(list(rows(3))).remove_columns(PROMPT_IDS)])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        references.fill(lambda pairs: torch.ones(2, 3) @ torch.ones(2, 3), tokens=50)
