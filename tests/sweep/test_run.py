"""Where a sweep's cells run: groups of GPUs, or places that share the cores."""

from __future__ import annotations

import pytest
import torch

from llamafactory_ext.errors import UserError
from llamafactory_ext.sweep.run import slots
from llamafactory_ext.sweep.spec import Sweep


@pytest.fixture
def slots_with(monkeypatch, tmp_path):
    """The slots on a machine with so many GPUs."""

    def slots_of(gpus, visible=None, **settings):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return slots(Sweep(recipe={}, axes={"seed": [1]}, output=tmp_path, **settings))

    return slots_of


def test_a_slot_per_group_of_gpus(slots_with):
    assert slots_with(5, gpus_per_cell=2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert slots_with(2, visible="4,7") == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "7"}]


def test_cells_share_the_cores_where_there_is_no_gpu(slots_with):
    assert slots_with(0, at_once=2) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_gpus_that_are_not_wanted_are_not_seen(slots_with):
    assert slots_with(4, gpus_per_cell=0) == [{"OMP_NUM_THREADS": "3", "CUDA_VISIBLE_DEVICES": ""}]


def test_more_gpus_than_there_are(slots_with):
    with pytest.raises(UserError, match="`gpus_per_cell` is 4, but this machine has 2 GPUs"):
        slots_with(2, gpus_per_cell=4)
