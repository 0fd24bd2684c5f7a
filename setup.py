"""Build commands: `pyproject.toml` holds the metadata, this file ships the start-up hook and the examples.

setuptools has no way to say "this file belongs in the root of site-packages", so two commands are extended:
`build_py` for wheels, `editable_wheel` for `pip install -e`. Written into the wheel, the hook is listed in
RECORD like any other file and leaves with `pip uninstall`. The examples become llamafactory_ext/share; an editable
install has them in the checkout.
"""

import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))
from llamafactory_ext.examples import FOLDERS, is_shipped  # noqa: E402

HOOK = ROOT / "llamafactory_ext.pth"


class BuildPy(build_py):
    def run(self):
        super().run()
        for source, target in self._further_files():
            self.mkpath(str(Path(target).parent))
            self.copy_file(str(source), target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *(target for _, target in self._further_files())]

    def _further_files(self):
        if self.editable_mode:
            return []
        found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
        examples = [path.relative_to(ROOT) for path in sorted(found) if is_shipped(path.relative_to(ROOT))]
        share = Path(self.build_lib) / "llamafactory_ext" / "share"
        hook = (HOOK, str(Path(self.build_lib) / HOOK.name))
        return [hook, *((ROOT / path, str(share / path)) for path in examples)]


class EditableWheelWithHook(editable_wheel):
    def _select_strategy(self, *args, **kwargs):
        return _WithHook(super()._select_strategy(*args, **kwargs))


class _WithHook:
    """An editable strategy that also writes the hook into the wheel it fills."""

    def __init__(self, strategy):
        self.strategy = strategy

    def __enter__(self):
        self.strategy.__enter__()
        return self

    def __exit__(self, *exc_info):
        return self.strategy.__exit__(*exc_info)

    def __call__(self, wheel, files, mapping):
        self.strategy(wheel, files, mapping)
        wheel.writestr(HOOK.name, HOOK.read_bytes())


setup(cmdclass={"build_py": BuildPy, "editable_wheel": EditableWheelWithHook})
