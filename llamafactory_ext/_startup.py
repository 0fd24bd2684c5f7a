"""Arms the plugin when `llamafactory` is first imported. Standard library only.

`llamafactory_ext.pth` imports this module at the start of every Python process of the environment. It must cost next
to nothing, so it only puts finders on `sys.meta_path`; each waits for one module and then removes itself.
`LLAMAFACTORY_EXT=0` turns the plugin off in the process and its children, except for the stand-in for a missing
torchaudio: without it, LLaMA-Factory cannot be imported on a text-only machine.
"""

import os
import sys


class _OnFirstImport:
    """A meta path finder that calls `act` when `name` is first imported, then removes itself."""

    def __init__(self, name, act):
        self.name = name
        self.act = act

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        return self.act(fullname, path)


def _arm(fullname, path):
    from . import seam

    seam.arm()


def _lend_torchaudio(fullname, path):
    """Find LLaMA-Factory's `mm_plugin`; if torchaudio is missing, provide a stand-in while the module is executed.

    Only then: left in `sys.modules`, the stand-in would make other libraries believe that torchaudio works.
    """
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    spec = PathFinder.find_spec(fullname, path)
    if spec is None or find_spec("torchaudio") is not None:
        return spec

    execute = spec.loader.exec_module

    def exec_module(module):
        from transformers.utils.import_utils import is_torchaudio_available

        is_torchaudio_available()  # transformers caches the result: ask before the stand-in is there
        sys.modules["torchaudio"] = _missing_torchaudio()
        try:
            execute(module)
        finally:
            del sys.modules["torchaudio"]

    spec.loader.exec_module = exec_module
    return spec


def _missing_torchaudio():
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    class MissingTorchaudio(ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):  # lookups by the import system and introspection, not a use
                raise AttributeError(name)
            raise ImportError(
                f"torchaudio.{name} was used, but torchaudio is not installed. Audio data needs it: "
                "install the torchaudio build that matches your torch."
            )

    module = MissingTorchaudio("torchaudio", "Stand-in by llamafactory_ext: torchaudio is not installed.")
    module.__spec__ = ModuleSpec("torchaudio", loader=None)
    return module


sys.meta_path.insert(0, _OnFirstImport("llamafactory.data.mm_plugin", _lend_torchaudio))
if os.environ.get("LLAMAFACTORY_EXT") != "0":
    sys.meta_path.insert(0, _OnFirstImport("llamafactory", _arm))
