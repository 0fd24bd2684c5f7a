"""Arms the plugin when `llamafactory` is first imported. Standard library only.

`llamafactory_ext.pth` imports this module at the start of every Python process of the environment, so it may cost
next to nothing and do nothing but put finders on `sys.meta_path`: they wait for a name and leave once they saw it.
`LLAMAFACTORY_EXT=0` switches the plugin off in the process and its children; only the stand-in for a missing
torchaudio stays, because without it a text-only machine cannot import LLaMA-Factory at all.
"""

import os
import sys


class _OnFirstImport:
    """A meta path finder that finds nothing: it acts when `name` is first looked for, and removes itself."""

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
    """Find LLaMA-Factory's `mm_plugin`, and let it see a stand-in while it is executed if torchaudio is missing.

    Only that module sees it: in `sys.modules` for good, it would make other libraries believe that torchaudio works.
    """
    from importlib.machinery import PathFinder
    from importlib.util import find_spec

    spec = PathFinder.find_spec(fullname, path)
    if spec is None or find_spec("torchaudio") is not None:
        return spec

    execute = spec.loader.exec_module

    def exec_module(module):
        from transformers.utils.import_utils import is_torchaudio_available

        is_torchaudio_available()  # transformers remembers the answer: ask while it is still the true one
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
            if name.startswith("__"):  # questions of the import system and of introspection, not a use
                raise AttributeError(name)
            raise ImportError(
                f"torchaudio.{name} was used, but torchaudio is not installed; audio data needs it: "
                "install the torchaudio build that belongs to your torch."
            )

    module = MissingTorchaudio("torchaudio", "Stand-in by llamafactory_ext for a torchaudio that is not installed.")
    module.__spec__ = ModuleSpec("torchaudio", loader=None)
    return module


sys.meta_path.insert(0, _OnFirstImport("llamafactory.data.mm_plugin", _lend_torchaudio))
if os.environ.get("LLAMAFACTORY_EXT") != "0":
    sys.meta_path.insert(0, _OnFirstImport("llamafactory", _arm))
