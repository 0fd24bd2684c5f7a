import os
import sys

# Tiny models: a second thread only costs. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing here may ask a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import tiny

# In CI the same examples every time: a red run must be about the change, not about luck.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


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


def pytest_collection_modifyitems(items):
    """Fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(autouse=True)
def independent_runs():
    """Trainings in this process leave their precision behind, in the environment and in accelerate's state."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
