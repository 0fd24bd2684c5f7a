"""Rows in, pairs out: nothing silently skipped, no half files, and registered once."""

from __future__ import annotations

import codecs
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llamafactory_ext.cli import app
from llamafactory_ext.data import commands
from llamafactory_ext.data.files import alpaca, register, whole_file, write_pairs
from llamafactory_ext.errors import UserError
from llamafactory_ext.rows import BadRow, parse, read_rows, text

ROWS = [{"chosen": "yes", "rejected": "no", "n": n} for n in range(5)]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path, rows=ROWS):
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".json":
        data = json.dumps(rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(name, tmp_path):
    rows = list(read_rows(str(write(tmp_path / name))))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]


def test_a_folder_of_parquet_files(tmp_path):
    for half in (0, 1):
        write(tmp_path / f"train-{half}.parquet", ROWS[half * 3 : half * 3 + 3])
    rows = list(read_rows(str(tmp_path)))
    assert [(row.number, row.fields["n"]) for row in rows] == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]


LAYOUTS = [
    ("train.parquet", "test.parquet"),
    ("train-00000-of-00002.parquet", "test-00000-of-00001.parquet"),
    ("data/train-00000-of-00001-6f3344faa23e9b0a.parquet", "data/test-00000-of-00001-6f3344faa23e9b0a.parquet"),
    ("train/0000.parquet", "test/0000.parquet"),
    ("train/any.jsonl", "test/any.jsonl"),
    ("train.jsonl.gz", "test.jsonl.gz"),
    ("train.jsonl", "train.dropped.jsonl"),
    ("train.jsonl", "train_prefs.jsonl"),
    ("default/train/part-1.jsonl", "default/test/part-1.jsonl"),
    ("part-0.parquet", ".cache/part-1.parquet"),
    ("train.jsonl", "test.parquet"),
]


@pytest.mark.parametrize(("own", "other"), LAYOUTS)
def test_of_a_folder_the_split_only_is_read(own, other, tmp_path):
    for name, rows in ((own, ROWS[:2]), (other, ROWS[2:])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, rows)
    assert [row.fields for row in read_rows(str(tmp_path), "train")] == ROWS[:2]


def test_shards_of_a_split_are_numbered_through(tmp_path):
    for number, rows in enumerate((ROWS[:3], ROWS[3:])):
        write(tmp_path / f"test-0000{number}-of-00002.jsonl", rows)
    assert [(row.number, row.fields["n"]) for row in read_rows(str(tmp_path), "test")] == list(enumerate(range(5), 1))


def test_a_folder_without_the_split_names_those_that_are_there(tmp_path):
    write(tmp_path / "train_prefs-00000-of-00001.parquet")
    write(tmp_path / "test_prefs-00000-of-00001.parquet")
    with pytest.raises(UserError, match=r"has no split 'train': choose one of test_prefs, train_prefs"):
        read_rows(str(tmp_path))


def test_a_split_in_two_formats_is_not_read_twice(tmp_path):
    write(tmp_path / "train.jsonl")
    write(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="'train' both as parquet and as jsonl: name"):
        read_rows(str(tmp_path))


def test_splits_on_the_command_line(tmp_path):
    """UltraFeedback's layout: its test pairs stay out of the training pairs, and a file has no split to choose."""

    def messages(answer):
        return [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": answer}]

    for split in ("train_prefs", "test_prefs"):
        rows = [{"chosen": messages(f"{split} yes"), "rejected": messages("no")}]
        write(tmp_path / f"{split}-00000-of-00001.parquet", rows)
    for words, expected in (((), "train_prefs yes"), (("--split", "test_prefs"), "test_prefs yes")):
        output = tmp_path / f"{len(words)}.jsonl"
        result = CliRunner().invoke(commands.app, ["ultrafeedback", str(tmp_path), "--output", str(output), *words])
        assert result.exit_code == 0, result.output
        assert [row["chosen"] for row in lines(output)] == [expected]
    file = tmp_path / "test_prefs-00000-of-00001.parquet"
    words = ["ultrafeedback", str(file), "--output", str(tmp_path / "out.jsonl"), "--split", "train_prefs"]
    with pytest.raises(UserError, match="files have no splits: remove the split 'train_prefs'"):
        CliRunner().invoke(commands.app, words, catch_exceptions=False)


def test_lines_keep_their_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n\n{"n": \n[1]\n\xff\n{"n": 6}')
    rows = {row.number: row.fields for row in read_rows(str(tmp_path / "a.jsonl"))}
    assert rows[1] == {"n": 1}
    assert rows[6] == {"n": 6}
    assert {n: str(rows[n]) for n in (3, 4, 5)} == {
        3: "not valid JSON",
        4: "not a JSON object",
        5: "not UTF-8: save the file as UTF-8",
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "does not exist: write the path"),
        ("rows.csv", b"a,b", "has an unsupported file type"),
        ("rows.json", b"{", "is not valid JSON"),
        ("rows.json", b"{}", "is not a list of rows: write one"),
        ("rows.json", b'{"a": [], "b": []}', "is not a list of rows: write one"),
        ("rows.json", b'{"version": 1, "data": [{}]}', "if 'data' holds the rows, write only that list to the file"),
        ("rows.parquet", b"no parquet", "cannot be read as parquet"),
        (".", None, "contains no parquet or jsonl file"),
        ("x" * 300, None, "does not exist: write the path"),
        ("rows.json", b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_wrong_sources(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "train/rows.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_no_data(name, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(POINTER)
    with pytest.raises(UserError, match="is a Git LFS pointer, not the data: run `git lfs pull`"):
        list(read_rows(str(file if file.parent == tmp_path else tmp_path)))


def test_a_damaged_archive_says_how_far_it_could_be_read(tmp_path):
    whole = write(tmp_path / "whole.jsonl.gz", [{"text": "x" * n, "n": n} for n in range(2000)]).read_bytes()
    broken = bytearray(whole)
    broken[len(broken) // 2] ^= 0xFF
    for name, content in {"cut": whole[:-9], "plain": b'{"n": 1}\n', "broken": bytes(broken)}.items():
        file = tmp_path / f"{name}.jsonl.gz"
        file.write_bytes(content)
        rows = read_rows(str(file))
        with pytest.raises(UserError, match=r"cannot be read beyond row \d+ \(.+\): download it again"):
            list(rows)
        words = ["ultrafeedback", str(file), "--output", str(tmp_path / "out.jsonl")]
        with pytest.raises(UserError, match="cannot be read beyond row"):
            CliRunner().invoke(commands.app, words, catch_exceptions=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_json_lines_by_the_name_of_a_list(tmp_path):
    """As many data sets of the hub have them, and as `datasets` reads them."""
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    assert [(row.number, row.fields) for row in read_rows(str(tmp_path / "rows.json"))] == list(enumerate(ROWS, 1))


def test_rows_of_a_parquet_file_that_python_cannot_hold(tmp_path):
    texts = pyarrow.array([b"a", b"\xff", b"c"]).cast(pyarrow.string(), safe=False)
    times = pyarrow.array([0, 1, 2**62], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "time": times}), tmp_path / "rows.parquet")
    first, second, third = read_rows(str(tmp_path / "rows.parquet"))
    assert first.fields["text"] == "a"
    assert "not UTF-8" in str(second.fields)
    assert "out of range" in str(third.fields)


HALF = "\ud83c"  # half of an emoji, as a text that was cut in the middle of one ends


@pytest.mark.parametrize("command", ["ultrafeedback", "hh-rlhf", "corrupt"])
def test_half_a_character_drops_its_row_and_no_other(command, tmp_path):
    def fields(end):
        if command == "corrupt":
            return {"question": f"Q{end}", "answer": "2 + 2 = 4, then 4 + 1 = 5.\n#### 5"}
        said = [("user", "Hi."), ("assistant", f"Hello{end}")]
        other = [said[0], ("assistant", "No.")]
        if command == "hh-rlhf":
            names = {"user": "Human", "assistant": "Assistant"}
            return {
                side: "".join(f"\n\n{names[role]}: {words}" for role, words in turns)
                for side, turns in (("chosen", said), ("rejected", other))
            }
        return {
            side: [{"role": role, "content": words} for role, words in turns]
            for side, turns in (("chosen", said), ("rejected", other))
        }

    unused = fields("") | {"id": HALF}
    source = write(tmp_path / "rows.jsonl", [fields("."), fields(HALF), unused, fields("!")])
    output = tmp_path / "out.jsonl"
    result = CliRunner().invoke(commands.app, [command, str(source), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert len(lines(output)) == 3
    (dropped,) = lines(tmp_path / "out.dropped.jsonl")
    assert (dropped["line"], dropped["row"]) == (2, fields(HALF))
    assert "half a character" in dropped["reason"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(HALF),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": st.sampled_from(["a", "b", HALF, " "])}
    ),
    max_size=4,
)
SPOKEN = st.lists(st.sampled_from(["\n\nHuman: a", "\n\nAssistant: b", "\n\nAssistant:", HALF])).map("".join)
SIDE = JSON | MESSAGES | SPOKEN
FIELDS = st.fixed_dictionaries(
    {}, optional={"chosen": SIDE, "rejected": SIDE, "score_chosen": JSON, "question": JSON, "answer": JSON}
)
LINES = st.lists(
    FIELDS.map(json.dumps).map(str.encode) | JSON.map(json.dumps).map(str.encode) | st.binary(max_size=20), max_size=6
)
GOOD = {
    "ultrafeedback": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A"}],
    "hh-rlhf": "\n\nHuman: Q?\n\nAssistant: A",
}
GOOD_ROWS = {
    command: {"chosen": chosen, "rejected": json.loads(json.dumps(chosen).replace("A", "B").replace("Bss", "Ass"))}
    for command, chosen in GOOD.items()
} | {"corrupt": {"question": "Q", "answer": "2 + 2 = 4\n#### 5"}}


@pytest.mark.parametrize("command", GOOD_ROWS)
@given(content=LINES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_line_is_written_or_reported(command, content, tmp_path):
    """Whatever the lines hold; and what is written is read by the library that a training reads it with."""
    from pyarrow import json as arrow

    source, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join([json.dumps(GOOD_ROWS[command]).encode(), *content]))
    result = CliRunner().invoke(commands.app, [command, str(source), "--output", str(output), "--overwrite"])
    assert result.exit_code == 0, result.exception
    dropped = tmp_path / "out.dropped.jsonl"
    reported = [row["line"] for row in lines(dropped)] if dropped.exists() else []
    numbers = [number for number, line in enumerate(source.read_bytes().split(b"\n"), 1) if line.strip()]
    assert arrow.read_json(output).num_rows == len(lines(output)) == len(numbers) - len(reported)
    assert set(reported) < set(numbers)
    assert len(set(reported)) == len(reported)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet"])
@given(cut=st.integers(0, 400), at=st.integers(0, 400), byte=st.integers(1, 255), content=st.binary(max_size=30))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_gives_rows_or_a_sentence(name, cut, at, byte, content, tmp_path):
    """Bytes of any kind; a good file cut short; and a good file with one byte changed."""
    whole = write(tmp_path / name).read_bytes()
    changed = bytearray(whole)
    changed[at % len(whole)] ^= byte
    for data in (content, whole[: cut % len(whole)], bytes(changed)):
        (tmp_path / name).write_bytes(data)
        try:
            rows = list(read_rows(str(tmp_path / name)))
        except UserError:
            continue
        assert all(isinstance(row.fields, dict | BadRow) for row in rows)


def test_a_hub_that_cannot_be_reached_is_one_sentence():
    with pytest.raises(UserError, match="cannot be loaded from the Hugging Face Hub"):
        read_rows("nobody-at-all/no-such-data-set")


def test_a_column_must_hold_text():
    assert text({"a": " b"}, "a") == " b"
    for fields, message in [({}, "no text in the column 'a'"), ({"a": None}, "no text"), ({"a": " \n"}, "is empty")]:
        with pytest.raises(BadRow, match=message):
            text(fields, "a")


def keep(row, fields):
    if fields["n"] == 3:
        raise BadRow("three")
    return "kept", fields


def test_written_and_dropped_rows_are_all_rows(tmp_path):
    source = write(tmp_path / "rows.jsonl", [*ROWS, {"chosen": "same", "rejected": "same", "n": 9}])
    source.write_bytes(source.read_bytes() + b"{broken\n")
    tally = write_pairs(read_rows(str(source)), keep, tmp_path / "new" / "out.jsonl")
    assert tally.written == {"kept": 4}
    assert [row["n"] for row in lines(tmp_path / "new" / "out.jsonl")] == [0, 1, 2, 4]
    dropped = lines(tmp_path / "new" / "out.dropped.jsonl")
    assert [(row["line"], row["reason"]) for row in dropped] == [
        (4, "three"),
        (6, "chosen and rejected are identical"),
        (7, "not valid JSON"),
    ]
    assert dropped[0]["row"] == ROWS[3]
    assert tally.dropped == {row["reason"]: 1 for row in dropped}
    assert tally.first_lines["kept"] == [1, 2, 3, 5]


def test_nothing_dropped_leaves_one_file(tmp_path):
    source = write(tmp_path / "rows.jsonl", ROWS[:2])
    write_pairs(read_rows(str(source)), keep, tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}


def test_no_pair_at_all_is_an_error_and_writes_nothing(tmp_path):
    source = write(tmp_path / "rows.jsonl", [ROWS[3]] * 2)
    with pytest.raises(UserError, match=r"no row makes a pair: three \(2 rows, the first in line 1\)"):
        write_pairs(read_rows(str(source)), keep, tmp_path / "out.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_an_interrupted_run_leaves_what_was_there(tmp_path):
    output = write(tmp_path / "out.jsonl", ROWS[:1])

    def interrupted(row, fields):
        if row.number == 3:
            raise KeyboardInterrupt
        return "kept", fields

    with pytest.raises(UserError, match="already exists"):
        write_pairs(read_rows(str(output)), keep, output)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(read_rows(str(write(tmp_path / "rows.jsonl"))), interrupted, output, overwrite=True)
    assert lines(output) == ROWS[:1]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl"}


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "a") as file:
        file.write(f"half{1 / 0}")
    assert not list(tmp_path.iterdir())


def test_register(tmp_path):
    output = tmp_path / "pairs.jsonl"
    assert register(output, alpaca(["history"])) is True
    columns = {"prompt": "instruction", "history": "history", "chosen": "chosen", "rejected": "rejected"}
    info = json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8"))
    assert info == {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}

    info["pairs"]["columns"]["system"] = "mine"
    info["other"] = {"file_name": "elsewhere.jsonl"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    assert register(output, alpaca()) is False
    assert json.loads((tmp_path / "dataset_info.json").read_text(encoding="utf-8")) == info

    odd = [("pairs", json.dumps({"pairs": entry})) for entry in (None, 3, [], "pairs.jsonl", {"file_name": 3})]
    for name, content in (("other", None), ("pairs", "[]"), *odd):
        if content is not None:
            (tmp_path / "dataset_info.json").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"another data set named|is not a JSON object"):
            write_pairs(read_rows(str(write(tmp_path / "rows.jsonl"))), keep, tmp_path / f"{name}.jsonl")
        assert not (tmp_path / f"{name}.jsonl").exists()


@pytest.mark.parametrize("command", ["corrupt", "hh-rlhf", "ultrafeedback"])
def test_the_source_is_never_replaced(command, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text('{"question": "Q?", "answer": "1 + 1 = 2, 2 + 1 = 3\\n#### 3"}\n')
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for name in ("rows.jsonl", "link.jsonl"):
        words = ["data", command, str(source), "--output", str(tmp_path / name), "--overwrite"]
        refused = CliRunner().invoke(app, words)
        assert refused.exit_code == 2
        assert "is what the pairs are made from: choose another --output" in refused.output
    assert source.read_bytes() == before


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_another_encoding_is_named(encoding, tmp_path):
    """With its mark, as PowerShell and editors write it, the file is refused; without, every line is."""
    (tmp_path / "rows.jsonl").write_bytes('{"a": "b"}\n'.encode(encoding))
    if encoding == "utf-16":
        with pytest.raises(UserError, match="is encoded as UTF-16: save it as UTF-8"):
            list(read_rows(str(tmp_path / "rows.jsonl")))
    else:
        assert all(isinstance(row.fields, BadRow) for row in read_rows(str(tmp_path / "rows.jsonl")))


def test_a_null_character_is_no_matter_of_encoding():
    assert str(parse(b'{"a": "b"}\0\0')) == "not valid JSON"


def test_the_mark_of_utf_8_is_no_part_of_the_data(tmp_path):
    for name, content in (("rows.jsonl", '{"a": "b"}\n'), ("rows.json", '[{"a": "b"}]')):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content.encode())
        assert [row.fields for row in read_rows(str(tmp_path / name))] == [{"a": "b"}]
    with pytest.raises(UserError, match="no data is named"):
        list(read_rows(""))
