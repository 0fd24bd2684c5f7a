"""What `llamafactory-ext env` finds: versions, whether the plugin acts, devices, and conflicts with their fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import __version__
from .arguments import STOCK_LOSSES

PACKAGES = ("llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm")
OPTIONAL = ("bitsandbytes", "flash-attn", "liger-kernel", "torchvision", "torchaudio")
SAFE_DEEPSPEED = "0.19.8"


@dataclass(frozen=True)
class Finding:
    """A line of the report; with a fix if it is a conflict."""

    name: str
    value: str
    fix: str = ""


def findings() -> list[Finding]:
    """Everything worth knowing when a training does not do what it should, in the order in which to read it."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _requirements, _plugin, _devices, _deepspeed)
    checks += (_vllm, _loss_dispatch, _torchvision)
    return [finding for check in checks for finding in check()]


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _older(package: str, bound: str) -> bool:
    from packaging.version import Version

    installed = version(package)
    return installed is not None and Version(installed) < Version(bound)


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("llamafactory-ext", __version__)
    for package in PACKAGES:
        yield Finding(package, version(package) or "not installed")
    for package in OPTIONAL:
        if installed := version(package):
            yield Finding(package, installed)


def _requirements() -> Iterator[Finding]:
    """What LLaMA-Factory and the plugin require of other packages, and do not get."""
    from packaging.requirements import Requirement

    for package in ("llamafactory", "llamafactory-ext"):
        for line in _requires(package):
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed = version(requirement.name)
            # torchvision and torchaudio are required of everybody, but a text-only machine does without.
            if installed is None and requirement.name not in ("torchvision", "torchaudio"):
                yield Finding(f"{package} needs", line, f'it is not installed: pip install "{line}"')
            if installed is not None and not requirement.specifier.contains(installed, prereleases=True):
                yield Finding(f"{package} needs", line, f'{installed} is installed: pip install "{line}"')


def _requires(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return []


def _plugin() -> Iterator[Finding]:
    if os.environ.get("LLAMAFACTORY_EXT") == "0":
        yield Finding("plugin", "off: LLAMAFACTORY_EXT=0 is set", "unset LLAMAFACTORY_EXT")
        return
    try:
        arguments = importlib.import_module("llamafactory.hparams")
    except ImportError as error:
        yield Finding("plugin", "off: LLaMA-Factory cannot be imported", f"{error}")
        return
    if hasattr(arguments.FinetuningArguments, "dpop_lambda"):
        yield Finding("plugin", "active: LLaMA-Factory knows its keys")
    else:
        fix = "install llamafactory-ext with pip into the environment of llamafactory; do not run Python with -S or -I"
        yield Finding("plugin", "off: its start-up hook (llamafactory_ext.pth) did not run", fix)


def _devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        yield Finding("CPU", f"{os.cpu_count()} cores, {memory:.0f} GiB; no GPU that torch can use")
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            yield Finding("torch", "built without CUDA", "there is an NVIDIA driver: install torch's CUDA build")


def _deepspeed() -> Iterator[Finding]:
    import torch

    if version("deepspeed") is None:
        yield Finding("DeepSpeed", 'not available: pip install "llamafactory-ext[deepspeed]"')
        return
    if _older("deepspeed", SAFE_DEEPSPEED) and not torch.cuda.is_available():
        fix = f"its ZeRO-3 corrupts weights on gloo: pip install deepspeed=={SAFE_DEEPSPEED}"
        yield Finding("DeepSpeed", f"{version('deepspeed')} without a GPU", fix)
    if _older("llamafactory", "0.9.5") and not _older("deepspeed", "0.16.10"):
        fix = "set DISABLE_VERSION_CHECK=1, or install llamafactory 0.9.5, which does not refuse DeepSpeed above 0.16.9"
        yield Finding("DeepSpeed", f"{version('deepspeed')} with LLaMA-Factory {version('llamafactory')}", fix)
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        fix = f"install {' and '.join(missing)}: DeepSpeed compiles what it needs at its first start"
        yield Finding("DeepSpeed", "cannot compile its operations", fix)
    else:
        yield Finding("DeepSpeed", "available; compiles what it needs at its first start")


def _vllm() -> Iterator[Finding]:
    if version("vllm") is None:
        yield Finding("vLLM", "not in this environment; `make eval-env` gives the evaluation one of its own")


def _loss_dispatch() -> Iterator[Finding]:
    if os.environ.get("LLAMAFACTORY_EXT") == "0" and not _older("trl", "0.20"):
        losses = ", ".join(name for name in STOCK_LOSSES if name not in ("sigmoid", "orpo", "simpo"))
        fix = "LLaMA-Factory alone does not pass pref_loss on to TRL 0.20 or later: unset LLAMAFACTORY_EXT"
        yield Finding("pref_loss", f"{losses} train sigmoid", fix)


def _torchvision() -> Iterator[Finding]:
    if version("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a missing symbol is a RuntimeError, a missing library an OSError
        fix = "install the build that belongs to your torch, or uninstall torchvision: text data does without"
        yield Finding("torchvision", f"cannot be imported ({type(error).__name__}: {error})", fix)
