"""`llamafactory-ext examples`, and what the distribution says of itself."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rooms import modules

from llamafactory_ext import examples
from llamafactory_ext.errors import UserError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAMES = {"yaml": "pyyaml"}  # where a distribution is called otherwise
OPTIONAL = {"deepspeed", "lm_eval", "submitit", "openai", "vllm"}  # extras, and an environment of its own


def test_what_is_versioned_is_shipped_but_for_scripts(tmp_path):
    written = {path.relative_to(tmp_path) for path, is_new in examples.write_examples(tmp_path) if is_new}
    listed = subprocess.check_output(["git", "ls-files", *examples.FOLDERS], cwd=ROOT, text=True).split()
    examples_of_code = [path for path in listed if path.startswith("examples/") and path.endswith(".py")]
    scripts = {Path(path) for path in examples_of_code if not path.startswith("examples/custom_loss/")}
    assert written == set(map(Path, listed)) - scripts
    for path in written:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()


def test_what_is_there_stays(tmp_path):
    own = tmp_path / "data" / "dataset_info.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert [path for path, is_new in examples.write_examples(tmp_path) if not is_new] == [own]
    assert own.read_text() == "{}"
    assert not [path for path, is_new in examples.write_examples(tmp_path) if is_new]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "data" / "dataset_info.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"dataset_info\.json' is a folder"):
        list(examples.write_examples(tmp_path))


def test_every_package_that_is_imported_is_declared():
    declared = {re.match(r"[\w-]+", each).group() for each in PROJECT["dependencies"]}
    imported = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert {NAMES.get(name, name) for name in imported - sys.stdlib_module_names} - OPTIONAL - {
        "llamafactory_ext"
    } == declared
