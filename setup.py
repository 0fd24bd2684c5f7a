"""Build commands: `pyproject.toml` holds the metadata, this file ships the start-up hook.

setuptools has no way to say "this file belongs in the root of site-packages", so two commands are extended:
`build_py` for wheels, `editable_wheel` for `pip install -e`. Written into the wheel, the hook is listed in
RECORD like any other file and leaves with `pip uninstall`.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

HOOK = Path(__file__).parent / "llamafactory_ext.pth"


class BuildPyWithHook(build_py):
    def run(self):
        super().run()
        for target in self._hook_targets():
            self.copy_file(str(HOOK), target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *self._hook_targets()]

    def _hook_targets(self):
        return [] if self.editable_mode else [str(Path(self.build_lib) / HOOK.name)]


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


setup(cmdclass={"build_py": BuildPyWithHook, "editable_wheel": EditableWheelWithHook})
