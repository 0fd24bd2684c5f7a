"""`benchmarks/gpu.py`: its stages on the CPU, its time limits, and how it ends."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpu
import gpu_processes
import gpu_results
import gpu_stages
import pytest

SCRIPT = Path(gpu.__file__)
STAGE = gpu.Stage("paths", 60, "of a test")
ABOUT = {"stage": "paths", "unit": "", "goal": None, "met": None}


def environment(*folders):
    """Of stages whose modules, and whose worker, are those in these folders if they are there."""
    paths = [*folders, SCRIPT.parent, SCRIPT.parent.parent]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


@pytest.fixture
def run_worker(tmp_path):
    """Runs a stage with a worker of these lines; what was wrong with it, and its log."""

    def run(code, seconds=60.0):
        (tmp_path / "gpu_worker.py").write_text(code)
        (tmp_path / "results.jsonl").touch()
        found = environment(tmp_path)
        return gpu.run_stage(STAGE, tmp_path / "results.jsonl", found, rehearse=True, seconds=seconds)

    return run


def bare(*words, **changes):
    """`gpu.py` by the standard library alone, as before anything is installed."""
    command = [sys.executable, "-I", "-S", str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, **changes)


def start(folder, **changes):
    """A rehearsal of a stage that writes into a folder and has its models in another."""
    command = [sys.executable, str(SCRIPT), "--rehearse", "--only", "paths", "--output", str(folder / "out")]
    (folder / "models").mkdir()
    found = os.environ | {"TMPDIR": str(folder / "models")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=found, **pipes, **changes)


def wait_for(started, what):
    deadline = time.monotonic() + 120
    while not what():
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid):
    """Whether a process is there that is no zombie."""
    status = Path("/proc", str(pid), "stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for_end(pid):
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.1)


@pytest.mark.slow
def test_rehearsal_runs_every_stage_and_misses_no_goal(tmp_path):
    command = [sys.executable, str(SCRIPT), "--rehearse", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "out" / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["met"] for row in rows} == {True, None}
    assert all(row["versions"]["torch"] and "no GPU" in row["machine"] and row["date"] for row in rows)
    assert {"commit"} <= set.intersection(*(set(row) for row in rows))
    assert [row["stage"] for row in rows if row["what"] == gpu.ITSELF] == [stage.name for stage in gpu.STAGES]
    names = [(row["stage"], row["what"]) for row in rows]
    assert len(set(names)) == len(names), "two results under one name"
    *before, last = done.stdout.split("\nstage ")
    assert len(before) == 1 + len(gpu.STAGES)
    first = "full, float32: losses, largest absolute difference from stock's"
    assert first in before[0], "a result is shown as soon as it is known"
    assert before[1].splitlines()[-2].startswith("  "), "and that of the next stage below the table of the stage"
    assert [sum(line.startswith(stage.name) for line in last.splitlines()) > 0 for stage in gpu.STAGES] == [True] * 5
    assert last.endswith(f"\n\nThey are in {results}.\n")


def test_a_stage_ends_with_its_time(tmp_path, run_worker):
    starting = "import pathlib, subprocess, time\nchild = subprocess.Popen(['sleep', '600'])"
    starting += f"\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\ntime.sleep(600)"
    assert run_worker(starting, seconds=2) == "stopped after 2 s"
    wait_for_end(int((tmp_path / "pid").read_text()))


def test_how_a_stage_ended_is_said_in_words(tmp_path, run_worker):
    row = json.dumps({**ABOUT, "what": "a", "value": 1})
    log = tmp_path / "paths.log"
    kill = "import os, signal; os.kill(os.getpid(), signal.{})"
    assert run_worker(f"print({row!r}, flush=True)\n{kill.format('SIGKILL')}") == (
        f"killed by SIGKILL: out of memory? ({log})"
    )
    assert run_worker(kill.format("SIGSEGV")) == f"killed by SIGSEGV ({log})"
    failing = f"import sys\nprint('RuntimeError: no')\nprint({row!r})\nprint({row[:9]!r})\nsys.exit(3)"
    assert run_worker(failing) == f"ended with status 3: RuntimeError: no ({log})"
    assert run_worker("raise ValueError('no')") == f"ended with status 1: ValueError: no ({log})"
    assert run_worker(f"import sys\nprint({row!r})\nsys.exit(1)") == f"ended with status 1: no output ({log})"
    assert run_worker("") is None


@pytest.mark.skipif(not os.access(gpu_stages.MEMORY, os.W_OK), reason="needs /dev/shm")
def test_models_are_kept_in_memory_where_there_is_room(tmp_path, monkeypatch):
    touching = "import pathlib, sys\npathlib.Path(sys.argv[3], 'a').touch()\nprint(sys.argv[3])"
    (tmp_path / "gpu_worker.py").write_text(touching)
    results = tmp_path / "results.jsonl"
    results.touch()
    for room, parent in ((0, gpu_stages.MEMORY), (2**60, Path(tempfile.gettempdir()))):
        monkeypatch.setattr(gpu_stages, "ROOM", room)
        assert gpu.run_stage(STAGE, results, environment(tmp_path), rehearse=False) is None
        folder = Path((tmp_path / "paths.log").read_text().strip())
        assert folder.parent == parent
        assert not folder.exists()


@pytest.mark.slow
def test_a_worker_says_that_the_disk_is_full(tmp_path):
    (tmp_path / "gpu_filling.py").write_text(
        "def measure(record, folder, rehearse):\n"
        "    if str(record.results) != '/dev/full':\n"
        "        open('/dev/full', 'w').write('models')\n"
        "    with record.going_on('a part'):\n"
        "        record('a', 1)\n"
    )
    with (tmp_path / "log").open("w+") as log:
        command = gpu_processes.module("gpu_worker", "filling", "/dev/full", str(tmp_path), "--rehearse")
        assert gpu_processes.run(command, log, environment(tmp_path)) == gpu_stages.NO_SPACE
        log.seek(0)
        assert gpu_processes.last_line(log.read()) == "no space is left on the device (/dev/full)"


def test_a_run_whose_results_find_no_room_ends(tmp_path, capsys, monkeypatch):
    (tmp_path / "gpu_worker.py").write_text(f"raise SystemExit({gpu_stages.NO_SPACE})")
    monkeypatch.setattr(gpu, "prepared", lambda rehearse: environment(tmp_path))
    assert gpu.main(["--rehearse", "--output", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert output.err == f"gpu.py: no space is left on the device ({tmp_path / 'results.jsonl'}).\n"
    assert "large" not in output.out


def test_a_full_disk_is_said_by_its_name(tmp_path):
    full = Path("/dev/full")
    with pytest.raises(gpu_results.NoSpaceError) as raised:
        gpu_results.Recorder("paths", full, {}).failed("a", "stopped")
    assert gpu_results.in_words(raised.value) == "no space is left on the device (/dev/full)"
    record = gpu_results.Recorder("paths", tmp_path / "results.jsonl", {}, tmp_path)
    with record.going_on("models"), full.open("w") as file:
        file.write("models")
    with record.going_on("other"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    full_there = f"no space is left on the device ({tmp_path})"
    assert [row["value"] for row in gpu.read(record.results)] == [full_there, full_there]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_with_its_stage_and_its_models(tmp_path, number):
    # A shell's background jobs, of which these tests may be one, ignore Ctrl-C, and so would what they start.
    started = start(tmp_path, preexec_fn=functools.partial(signal.signal, number, signal.SIG_DFL))
    wait_for(started, lambda: list((tmp_path / "models").iterdir()))
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    wait_for(started, lambda: children.read_text().split())
    (stage,) = children.read_text().split()
    started.send_signal(number)
    started.send_signal(number)
    _, error = started.communicate(timeout=60)
    assert (started.returncode, error) == (
        128 + number,
        f"gpu.py: interrupted by {number.name}; nothing was measured.\n",
    )
    assert not is_running(stage)
    assert list((tmp_path / "models").iterdir()) == []


def test_a_run_under_nohup_goes_on_without_its_terminal(tmp_path):
    started = start(tmp_path, preexec_fn=functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN))
    wait_for(started, lambda: list((tmp_path / "models").iterdir()))
    started.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        started.wait(1)
    started.terminate()
    assert started.communicate(timeout=60)[1] == "gpu.py: interrupted by SIGTERM; nothing was measured.\n"


@pytest.mark.slow
def test_ctrl_c_ends_a_run_and_another_run_beside_it_is_refused(tmp_path):
    results = tmp_path / "out" / "results.jsonl"
    started = start(tmp_path, preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    wait_for(started, lambda: results.is_file() and results.stat().st_size)
    beside = subprocess.run(started.args, capture_output=True, text=True)
    assert (beside.returncode, beside.stderr) == (
        2,
        f"gpu.py: another run writes into {results}: name another folder with --output.\n",
    )
    started.send_signal(signal.SIGINT)
    output, error = started.communicate(timeout=60)
    assert (started.returncode, error) == (
        130,
        f"gpu.py: interrupted by SIGINT; what was measured is in {results}.\n",
    )
    assert "\nAll results\n\nstage " in output
    assert output.endswith(f"They are in {results}.\n")
    assert gpu.read(results)


@pytest.mark.slow
def test_a_stage_ends_with_what_started_it(tmp_path):
    results = tmp_path / "out" / "results.jsonl"
    started = start(tmp_path)
    wait_for(started, lambda: results.is_file() and results.stat().st_size)
    (stage,) = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
    started.kill()
    started.communicate()
    wait_for_end(stage)
    rows = gpu.read(results)
    assert rows
    assert not [row for row in rows if row["what"] == gpu.ITSELF]


def test_what_a_killed_run_left_ends_and_is_removed(tmp_path):
    sleeping = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    (tmp_path / "sleeping.py").write_text(f"{sleeping}\ntime.sleep(600)")
    (tmp_path / "folders").mkdir()
    code = "import pathlib, sys\nfrom gpu_processes import *\nwith own_folder(pathlib.Path(sys.argv[1])):"
    command = [sys.executable, "-c", f"{code}\n    run(module('sleeping'), sys.stderr)", str(tmp_path / "folders")]
    started = subprocess.Popen(command, env=environment(tmp_path))
    wait_for(started, lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    started.kill()
    started.wait()
    wait_for_end(int((tmp_path / "pid").read_text()))
    assert list((tmp_path / "folders").iterdir()), "what was killed could not remove its folder"
    gpu_processes.remove_leftovers(tmp_path / "folders")
    with gpu_processes.own_folder(tmp_path / "folders") as own:
        assert [*(tmp_path / "folders").iterdir()] == [own]
    assert not own.exists()


def test_a_process_whose_parent_is_gone_before_it_starts_ends(tmp_path):
    (tmp_path / "sleeping.py").write_text("import time; time.sleep(600)")
    command = gpu_processes.module("sleeping")
    command[command.index(str(os.getpid()))] = str(2**22 + 1)  # no process has that number
    ended = subprocess.run(command, env=environment(tmp_path), process_group=0, timeout=60)
    assert ended.returncode == -signal.SIGKILL


def test_folders_of_processes_that_are_no_more_are_removed(tmp_path):
    gone, own, other = (tmp_path / f"{gpu_processes.PREFIX}{pid}-x" for pid in (2**22 + 1, os.getpid(), 1))
    for folder in (gone, own, other):
        folder.mkdir()
    gpu_processes.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.slow
def test_without_a_gpu_it_says_what_to_write(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "out")]) == 2
    assert (
        capsys.readouterr().err == "gpu.py: there is no GPU that torch can use: write --rehearse to run on the CPU.\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("minutes", "left"), [(0.3, 18), (-1, 0)])
def test_what_does_not_fit_is_left_out(tmp_path, capsys, minutes, left):
    (tmp_path / "results.jsonl").touch()
    # 1, because nothing was measured
    assert gpu.measure([STAGE], tmp_path / "results.jsonl", dict(os.environ), minutes, rehearse=False) == 1
    assert capsys.readouterr().out == f"paths is left out: it takes 25 s to get anywhere, and {left} s are left.\n"


def test_help_and_errors_need_nothing_installed(tmp_path):
    shown = bare("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "LLaMA-Factory's own DPO stage" in shown.stdout
    wrong = bare("--minutes", "ten")
    assert (wrong.returncode, wrong.stderr.splitlines()[-1]) == (
        2,
        "gpu.py: error: --minutes takes a number of minutes above 0, such as 8 (1440 at most).",
    )
    nothing = bare("--rehearse", cwd=tmp_path)
    assert nothing.returncode == 2
    assert nothing.stderr == f"gpu.py: torch is missing: install it with `{sys.executable} -m pip install torch`.\n"


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "1e308", "1441", "", "8m"])
def test_minutes_that_are_none_are_refused(capsys, minutes):
    with pytest.raises(SystemExit):
        gpu.main([f"--minutes={minutes}"])
    assert "error: --minutes takes a number of minutes above 0, such as 8" in capsys.readouterr().err


def test_a_rehearsal_has_no_limit(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--minutes", "8"])
    assert "a rehearsal has no limit: leave one of them out." in capsys.readouterr().err


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--only", "path", "--output", str(tmp_path)])
    assert "invalid choice: 'path' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "out"])
def test_a_file_is_no_folder_for_results(tmp_path, capsys, inside):
    file = tmp_path / "file"
    file.touch()
    assert gpu.main(["--rehearse", "--output", str(file / inside)]) == 2
    assert capsys.readouterr().err == (
        f"gpu.py: {file / inside} is no folder, but a file or in a file: name a folder with --output.\n"
    )


def test_what_the_system_refuses_is_said_without_its_number(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    results.mkdir()
    assert gpu.main(["--rehearse", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"gpu.py: Is a directory ({results}).\n"


def test_what_a_killed_stage_has_left_is_read(tmp_path):
    results = tmp_path / "results.jsonl"
    rows = [{"what": what, "value": value, **ABOUT} for what, value in (("a", 1.0), ("b", 2.0), ("a", 3.0))]
    foreign = [
        b"\xff\xfe",
        b"[1]",
        b'"abc"',
        b"null",
        b'{"a": 1}',
        b'{"stage": [1], "what": "a", "met": null}',
        b'{"stage": "paths", "what": "a", "met": null}',
        b"[" * 10**5,
    ]
    lines = [*(json.dumps(row).encode() for row in rows), *foreign, b'{"stage": "paths", "wh']
    results.write_bytes(b"\n".join(lines))
    assert gpu.read(results) == [rows[2], rows[1]]
    gpu_results.whole_lines(results)
    gpu.failed(STAGE, results, "stopped after 90 s")
    *_, last = gpu.read(results)
    assert [row["value"] for row in gpu.read(results)] == [3.0, 2.0, "stopped after 90 s"]
    assert {"date", "commit"} <= set(last)


def test_what_stands_in_a_row_is_shown_as_text(tmp_path, capfd):
    words = [":smile: [red]a[/red]", "\x1b[31mred", "half \ud800", "two\nlines"]
    rows = [{**ABOUT, "what": word, "value": word} for word in words]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpu_results.show(tmp_path / "results.jsonl", 0)
    print(gpu.table(rows))
    shown = [":smile: [red]a[/red]", "\\x1b[31mred", "half \\ud800", "two\\nlines"]
    output = capfd.readouterr().out.splitlines()
    assert output[:4] == [f"  {word}  {word}" for word in shown]
    assert [line.split(None, 1)[1].split("  ")[0] for line in output[6:]] == shown


def test_the_table_says_what_is_met_missed_and_failed():
    rows = [
        {**ABOUT, "what": "a", "value": 0.123456, "unit": "s", "goal": "at most 1", "met": True},
        {**ABOUT, "what": "b " * 40, "value": 2, "goal": "at most 1", "met": False},
        {**ABOUT, "what": gpu.ITSELF, "value": "stopped after 2 s", "met": False},
        {**ABOUT, "what": gpu.ITSELF, "value": 83.21, "unit": "s"},
    ]
    lines = gpu.table(rows).splitlines()
    assert lines[2].split() == ["paths", "a", "0.1235", "s", "at", "most", "1", "met"]
    assert lines[3].split()[-5:] == ["2", "at", "most", "1", "missed"]
    assert lines[3].count("b") + lines[4].count("b") == 40
    assert lines[5].split() == ["paths", *gpu.ITSELF.split(), "stopped", "after", "2", "s", "failed"]
    assert lines[6].split() == ["paths", *gpu.ITSELF.split(), "83.21", "s"]


@pytest.mark.parametrize(("files", "is_there"), [([], False), (["__init__.py"], True)])
def test_a_folder_that_is_no_package_is_not_llamafactory(tmp_path, files, is_there):
    (tmp_path / "llamafactory").mkdir()
    for name in files:
        (tmp_path / "llamafactory" / name).touch()
    code = "import gpu; print(gpu.is_installed('llamafactory'))"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == (f"{is_there}\n", "")
