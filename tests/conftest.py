import gc
import os
import shutil
import sys
import tempfile

# Tiny models: a second thread only costs. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may ask a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Workers that share the user's cache of data sets have read files that another was writing.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")

import hypothesis
import pytest
import tiny

# In CI the same examples every time: a red run must be about the change, not about luck.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model", seed=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    """A different model of the same shape: as a reference, it makes every logratio large (and most negative)."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "other", seed=0)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("tiny") / "data")


# What takes longest on workers of their own (make test) comes first, so that none is left alone with it at the end.
LONGEST_FIRST = (
    "tests/integration/test_deepspeed.py",
    "tests/integration/test_fsdp_recipes.py",
    "tests/integration/test_board.py",
    "tests/test_trainer.py",
    "tests/test_self_pairs.py",
    "tests/planning/test_plan.py",
    "tests/integration/test_command_line.py",
    "tests/integration/test_sweep.py",
    "tests/integration/test_studies.py",
    "tests/integration/test_two_ranks.py",
    "tests/test_gpu.py",
    "tests/test_demo.py",
    "tests/test_vision.py",
    "tests/test_reference.py",
    "tests/test_options.py",
    "tests/test_ranked_training.py",
    "tests/test_foresight.py",
    "tests/test_cli.py",
    "tests/integration/test_install.py",
    "tests/test_examples.py",
)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config, items):
    """In one process, fast tests first; on workers, which take a file at a time, long files first.

    Whoever asks for the fixture `train`, whichever it is, trains.
    """
    for item in items:
        if "train" in item.fixturenames:
            item.add_marker("trains")
    if not hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)
        return
    place = {file: index for index, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.location[0], len(place)))


def pytest_collection_finish():
    """What was imported stays: going through it at the end of every training takes most of a tiny one's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder that all workers of a run share; what they put there needs a lock."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def independent_runs():
    """Trainings in this process leave their precision behind, in the environment and in accelerate's state; recipes
    leave the losses of their files, those of a fixture that many tests share, too."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "llamafactory_ext.losses.registry" in sys.modules:
        losses = sys.modules["llamafactory_ext.losses.registry"].LOSSES
        for name, loss in list(losses.items()):
            if loss.is_users:
                del losses[name]
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
