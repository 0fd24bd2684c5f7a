"""Reading a recipe: data sets that `dataset_info.json` describes in odd ways."""

from __future__ import annotations

import json

import pytest

from llamafactory_ext.errors import UserError
from llamafactory_ext.recipe.reading import data_sets, read_recipe


@pytest.mark.parametrize("entry", [None, 3, [], {}, "pairs.jsonl", {"file_name": "a", "columns": 3}])
def test_an_odd_entry_is_a_sentence(entry, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": entry}))
    with pytest.raises(UserError, match="entry that LLaMA-Factory can read for each of pairs: write one as an object"):
        data_sets(["pairs"], str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"other": {}}'])
def test_an_odd_file_is_a_sentence(content, tmp_path):
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(UserError):
        data_sets(["pairs"], str(tmp_path))


def test_a_good_entry_is_read_beside_an_odd_one(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"odd": None, "pairs": {"file_name": "pairs.jsonl"}}))
    (found,) = data_sets(["pairs"], str(tmp_path))
    assert (found.load_from, found.dataset_name) == ("file", "pairs.jsonl")


@pytest.mark.parametrize("words", [["a=["], ["a={b:"], ["a=\ud800"], ["LIST"]])
def test_what_is_no_recipe_ends_in_a_sentence(words, tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(UserError):
        read_recipe([word.replace("LIST", str(tmp_path / "list.yaml")) for word in words])
