"""Commands in processes of their own: how they end, and what is left where they do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from llamafactory_ext.sweep.display import _seconds_per_step, _time
from llamafactory_ext.sweep.records import Record, read_record
from llamafactory_ext.sweep.work import Task, end, ended, keep_checkpoints, prepare, start

pytestmark = pytest.mark.slow


def task(folder, code, **changes):
    script = folder / "script.py"
    folder.mkdir(exist_ok=True)
    script.write_text(code)
    return Task(**{"name": "cell", "step": "train", "folder": folder, "argv": (sys.executable, str(script))} | changes)


def execute(command, environment=None):
    process = start(command, environment or {})
    process.join(60)
    return ended(command, process)


def test_a_command_that_ends_well(tmp_path):
    command = task(tmp_path / "cell", "import os; print('hello', os.environ['WORD'])")
    assert command.record() == Record("to do")
    record = execute(command, {"WORD": "there"})
    assert (record.state, record.error) == ("done", None)
    assert record.seconds > 0
    assert "hello there" in command.log.read_text()
    assert command.record() == record
    assert os.environ.get("WORD") is None


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise ValueError('no such thing\\nand more')", "ValueError: no such thing"),
        ("import sys; sys.exit(3)", "ended with status 3"),
        ("import os; os._exit(7)", "ended by status 7"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "ended by signal 9 (the system does this",
        ),
    ],
)
def test_a_command_that_fails(code, error, tmp_path):
    record = execute(task(tmp_path / "cell", code))
    assert record.state == "failed"
    assert record.error.startswith(error)


def test_an_exit_status_of_0_is_no_failure(tmp_path):
    assert execute(task(tmp_path / "cell", "import sys; sys.exit(0)")).state == "done"


def test_another_interpreter(tmp_path):
    command = task(tmp_path / "cell", "", argv=("/bin/sh", "-c", "echo from a shell; exit 4"))
    assert execute(command).error == "ended with status 4"
    assert "from a shell" in command.log.read_text()


def test_a_record_of_other_settings_does_not_count_and_what_it_left_is_removed(tmp_path):
    made, resumed = tmp_path / "cell" / "model", tmp_path / "cell" / "scores"
    for folder in (made / "checkpoint-2", resumed):
        folder.mkdir(parents=True)
    (made / "checkpoint-2" / "trainer_state.json").write_text("{}")
    places = {"outputs": (made,), "resumes": (resumed,)}
    execute(task(tmp_path / "cell", "", fingerprint="one"))
    other = task(tmp_path / "cell", "", fingerprint="another", **places)
    assert other.record() == Record("to do")
    assert read_record(tmp_path / "cell", "train").state == "done"
    prepare(task(tmp_path / "cell", "", fingerprint="one", **places))
    assert made.exists()
    assert resumed.exists()
    assert execute(other).state == "done"
    assert not made.exists()
    assert not resumed.exists()


def test_without_its_results_a_command_is_not_done(tmp_path):
    result = tmp_path / "cell" / "result"
    write = f"open({str(result)!r}, 'w')"
    assert (
        execute(task(tmp_path / "cell", "", results=(result,))).error == "ended without an error, but wrote no result"
    )
    command = task(tmp_path / "cell", write, results=(result,))
    assert execute(command).state == "done"
    result.unlink()
    assert command.record().state == "to do"


def test_what_was_made_of_earlier_results_is_removed(tmp_path):
    scores = tmp_path / "cell" / "scores"
    scores.mkdir(parents=True)
    execute(task(tmp_path / "cell", "", invalidates=(scores,)))
    assert not scores.exists()


def test_a_command_that_is_ended_takes_what_it_started_with_it_and_is_no_failure(tmp_path):
    started = tmp_path / "started"
    command = task(tmp_path / "cell", "", argv=("/bin/sh", "-c", f"echo $$ > {started}; exec sleep 100"))
    process = start(command, {})
    wait_for(lambda: started.exists() and started.read_text().strip())
    end(process)
    process.join()
    wait_for(lambda: not psutil.pid_exists(int(started.read_text())))
    assert ended(command, process).state == "interrupted"
    assert command.record().state == "interrupted"


def test_what_a_killed_command_has_started_still_counts_as_running(tmp_path):
    started = tmp_path / "started"
    command = task(tmp_path / "cell", "", argv=("/bin/sh", "-c", f"echo $$ > {started}; sleep 2"))
    process = start(command, {})
    wait_for(lambda: started.exists() and started.read_text().strip())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert command.record().state == "running"
    wait_for(lambda: command.record().state == "interrupted")


def test_a_killed_command_is_interrupted_and_begins_afresh(tmp_path):
    model = tmp_path / "cell" / "model"
    code = f"""
import pathlib, time
assert not pathlib.Path({str(model)!r}).exists()
pathlib.Path({str(model)!r}).mkdir()
while pathlib.Path({str(tmp_path / "wait")!r}).exists(): time.sleep(0.05)
"""
    command = task(tmp_path / "cell", code, outputs=(model,))
    (tmp_path / "wait").touch()
    process = start(command, {})
    wait_for(model.is_dir)
    assert command.record().state == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert command.record().state == "interrupted"
    (tmp_path / "wait").unlink()
    assert execute(command).state == "done"


def test_a_command_waits_for_one_that_a_killed_sweep_has_left_and_takes_its_result(tmp_path):
    count = tmp_path / "count"
    command = task(tmp_path / "cell", f"open({str(count)!r}, 'a').write('x'); import time; time.sleep(1)")
    first = start(command, {})
    wait_for(count.exists)
    second = start(command, {})
    for process in (first, second):
        process.join()
    assert ended(command, second).state == "done"
    assert count.read_text() == "x"


def test_a_command_that_goes_on_from_a_checkpoint_says_so(tmp_path):
    """Its seconds are those of its last attempt only, which must not be read as its speed."""
    checkpoint = tmp_path / "cell" / "model" / "checkpoint-1"
    code = f"""
import pathlib, sys
checkpoint = pathlib.Path({str(checkpoint)!r})
if not checkpoint.exists():
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{{}}")
    sys.exit(1)
"""
    command = task(tmp_path / "cell", code, outputs=(checkpoint.parent,))
    assert [(record.state, record.resumed) for record in (execute(command), execute(command))] == [
        ("failed", False),
        ("done", True),
    ]
    assert (_time(command.record()), _time(Record("done", seconds=9.0))) == ("0 s since resumed", "9 s")
    records = {"a": Record("done", seconds=1.0, resumed=True), "b": Record("done", seconds=9.0)}
    assert _seconds_per_step(records, {"a": 3, "b": 3}) == 3.0


INTERRUPTED = """
import sys, time
from pathlib import Path
from llamafactory_ext.sweep.run import Runner
from llamafactory_ext.sweep.work import Task

if __name__ == "__main__":
    command = Task("cell", "train", Path("cell"), (sys.executable, "no script"))
    try:
        Runner([{}], False, print).run([[command]], lambda: print("watching", flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def test_ctrl_c_while_the_commands_server_imports_prints_no_frames(tmp_path):
    (tmp_path / "script.py").write_text(INTERRUPTED)
    process = subprocess.Popen(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "watching\n"
    children = psutil.Process(process.pid).children
    wait_for(lambda: any("forkserver" in " ".join(child.cmdline()) for child in children()))
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "")


def test_checkpoints_that_a_kill_cut_off_are_removed(tmp_path):
    for name, state in {
        "checkpoint-2": '{"global_step": 2}',
        "checkpoint-4": '{"global_st',
        "checkpoint-6": None,
    }.items():
        (tmp_path / name).mkdir()
        if state is not None:
            (tmp_path / name / "trainer_state.json").write_text(state)
    assert keep_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert not keep_checkpoints(tmp_path / "nowhere")


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
