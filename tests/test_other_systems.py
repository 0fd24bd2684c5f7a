"""Where a system lacks what Linux has, as Windows does, the command line starts, and says what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import yaml

# A Python in which this package, and no other, misses what only Unix has; then the command line.
WITHOUT = """
import builtins, os, sys

UNIX = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses"}
plain_import, plain_sysconf = builtins.__import__, os.sysconf

def is_ours(name):
    return name is not None and name.split(".")[0] == "llamafactory_ext"

def import_(name, globals=None, *more, **options):
    if name in UNIX and is_ours((globals or {}).get("__name__")):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return plain_import(name, globals, *more, **options)

def sysconf(name):
    if is_ours(sys._getframe(1).f_globals["__name__"]):
        raise AttributeError("module 'os' has no attribute 'sysconf'")
    return plain_sysconf(name)

builtins.__import__, os.sysconf = import_, sysconf
from llamafactory_ext.cli import main
main()
"""


def run(*words, cwd=None):
    command = [sys.executable, "-c", WITHOUT, *words]
    return subprocess.run(command, cwd=cwd, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["sweep", "--help"]])
def test_help(words):
    shown = run(*words)
    assert shown.returncode == 0, shown.stderr
    assert "Usage:" in shown.stdout


@pytest.mark.slow
def test_env():
    shown = run("env")
    assert shown.returncode in (0, 1)  # 1: a conflict of this environment
    assert "LLaMA-Factory knows its keys" in shown.stdout, shown.stderr
    assert " cores, " in shown.stdout or "GPU 0" in shown.stdout
    assert "Traceback" not in shown.stderr


@pytest.mark.slow
def test_a_sweep_says_what_it_needs_before_it_writes(model, data, tmp_path):
    recipe = {"stage": "dpo", "model_name_or_path": str(model), "template": "smollm2", "dataset": "pairs"}
    recipe |= {"dataset_dir": str(data), "finetuning_type": "full", "do_train": True, "use_cpu": True}
    sweep = {"recipe": recipe, "axes": {"seed": [1]}, "output": "out"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    refused = run("sweep", "sweep.yaml", cwd=tmp_path)
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert "A sweep needs the file locks of Linux or macOS" in refused.stderr
    assert not (tmp_path / "out").exists()
