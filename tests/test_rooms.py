"""The package is built from the ground up: no module imports in a circle, none from a room above its own."""

from __future__ import annotations

import re

from rooms import ROOMS, ROOT, imports, in_order, modules, room

LINES = 400  # of a file that fits in one's head


def test_no_module_imports_in_a_circle():
    order = in_order(imports())
    assert set(order) == set(modules())


def test_no_module_imports_from_a_room_above_its_own():
    upward = [
        f"{name} imports {imported}"
        for name, found in imports().items()
        for imported in found
        if ROOMS.index(room(imported)) > ROOMS.index(room(name))
        and name != "__init__"  # which hands out what is public
    ]
    assert not upward


def test_files_fit_in_ones_head():
    longer = [name for name, path in modules().items() if len(path.read_text(encoding="utf-8").splitlines()) > LINES]
    assert not longer


def test_the_map_names_every_module_and_no_other():
    text = (ROOT.parent / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    map_ = text[text.index("## Where things are") :]
    assert not [name for name, path in modules().items() if path.name != "__init__.py" and path.name not in map_]
    package = map_[: map_.index("llamafactory_ext.pth")]
    there = {path.name for path in modules().values()}
    assert not [name for name in re.findall(r"\w+\.py", package) if name not in there | {"rooms.py"}]
