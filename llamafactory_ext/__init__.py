"""Preference losses for an unchanged LLaMA-Factory: MinorDPO, DPOP, and your own.

Python's start-up hook imports this package in every process, so nothing here may import torch:
the public names are looked up when they are first used.
"""

__version__ = "0.1.0"
__all__ = ["PairLogps", "__version__", "get_loss", "register_loss"]


def __getattr__(name: str) -> object:
    if name in __all__:
        from .losses import lookup, pairs, registry

        public = {"PairLogps": pairs.PairLogps, "get_loss": lookup.get_loss, "register_loss": registry.register_loss}
        return public[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
