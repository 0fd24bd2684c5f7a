"""What the tests of the report share."""

from __future__ import annotations

import pytest
from sweeps import make_large_sweep


@pytest.fixture(scope="session")
def large_sweep(tmp_path_factory):
    """Made once: its loss can be registered from one file only."""
    return make_large_sweep(tmp_path_factory.mktemp("large"))
