"""The checks of `llamafactory-ext env`: versions, whether the plugin is active, devices, conflicts and their fixes."""

from __future__ import annotations

import importlib
import logging
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import __version__
from .distributions import distribution, requires, unreadable, version
from .losses import STOCK_LOSSES

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.version import Version

PACKAGES = ("llamafactory", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm")
OPTIONAL = ("bitsandbytes", "flash-attn", "liger-kernel", "torchvision", "torchaudio")
COMPANIONS = ("torchvision", "torchaudio")
SAFE_DEEPSPEED = "0.19.8"
# torchaudio 2.11, the last one, requires no torch, but stops beside another CUDA than its own, which is 13.0. These are
# the releases of torch on PyPI with that CUDA; each earlier torchaudio requires the torch that it was built for.
LAST_TORCHAUDIO, ITS_TORCH = "2.11.0", ">=2.11,<2.15"


@dataclass(frozen=True)
class Finding:
    """A line of the report; with a fix if it is a conflict."""

    name: str
    value: str
    fix: str = ""


def findings() -> Iterator[Finding]:
    """Run each check and yield what it finds, in the order in which to read it."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (_versions, _metadata, _requirements, _torch, _companions)
    checks += (_optional, _training, _plugin)
    checks += (*((_devices, _deepspeed) if _import_error("torch") is None else ()), _vllm, _loss_dispatch)
    for check in checks:
        yield from check()


def _parsed(package: str) -> Version | None:
    """The installed version, or None; also None if it is not a valid version, which `_metadata` reports."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(version(package) or "")
    except InvalidVersion:
        return None


def _required(package: str) -> list[Requirement]:
    """The requirements of a package, without those that cannot be read."""
    return [line for line in map(_requirement, requires(package)) if line is not None]


def _requirement(line: str) -> Requirement | None:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        return Requirement(line)
    except InvalidRequirement:
        return None


def _older(package: str, bound: str) -> bool:
    from packaging.version import Version

    installed = _parsed(package)
    return installed is not None and installed < Version(bound)


def _versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("llamafactory-ext", __version__)
    for package in PACKAGES:
        yield Finding(package, version(package) or "not installed")
    for package in OPTIONAL:
        if installed := version(package):
            yield Finding(package, installed)


def _metadata() -> Iterator[Finding]:
    """Packages whose metadata cannot be read, not even by pip."""
    for folder in unreadable():
        fix = f"reinstall its package, or remove the folder: rm -r {shlex.quote(folder)}"
        yield Finding("metadata", f"{folder} is damaged", fix)
    for package in ("llamafactory-ext", *PACKAGES, *OPTIONAL):
        found, lines = distribution(package), requires(package)
        unread = [line for line in lines if _requirement(line) is None]
        if found is not None and (unread or _parsed(package) is None):
            what = f"the requirement {unread[0]!r}" if unread else f"the version {version(package)!r}"
            fix = f"pip install --force-reinstall --no-deps {package}"
            yield Finding(package, f"has damaged metadata: {what} cannot be read", fix)


def _requirements() -> Iterator[Finding]:
    """Requirements of LLaMA-Factory and the plugin that the installed packages do not meet."""
    for package in ("llamafactory", "llamafactory-ext"):
        found = distribution(package)
        for requirement in _required(package):
            line = str(requirement)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            requirement.marker = None
            installed = version(requirement.name)
            needs = f"{package if found is None else found.name} needs"
            # torchvision and torchaudio are required, but text-only training works without them.
            if installed is None and requirement.name not in COMPANIONS:
                yield Finding(needs, line, f'it is not installed: pip install "{requirement}"')
            if installed is not None and not requirement.specifier.contains(installed, prereleases=True):
                yield Finding(needs, line, f'{installed} is installed: pip install "{requirement}"')


def _import_error(module: str) -> BaseException | None:
    """The root cause if an import fails, else None: an OSError for a missing library, for example, or a SystemExit."""
    logging.disable(logging.WARNING)  # DeepSpeed would log, between our lines, that there is no GPU
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # some raise SystemExit
        while error.__cause__ is not None:
            error = error.__cause__
        return error
    finally:
        logging.disable(logging.NOTSET)
    return None


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _torch() -> Iterator[Finding]:
    installed, error = _parsed("torch"), _import_error("torch")
    if installed is not None and error is not None:
        fix = f'pip install --force-reinstall "torch=={installed.public}"'
        yield Finding("torch", f"{installed} cannot be imported ({_told(error)})", fix)


def _companions() -> Iterator[Finding]:
    """torchvision and torchaudio are built for one version of torch: with another, LLaMA-Factory cannot import them."""
    broken = {package: reason for package in COMPANIONS if (reason := _misfit(package))}
    for package, reason in broken.items():
        yield Finding(package, f"{version(package)} {reason}", _companions_fix(tuple(broken)))


def _misfit(companion: str) -> str | None:
    """Why an installed companion does not work with the installed torch; None if it does, or one is not installed."""
    if _parsed(companion) is None or _parsed("torch") is None or _import_error("torch") is not None:
        return None
    if wanted := _torch_refused_by(companion):
        return f"needs {wanted}, but {version('torch')} is installed"
    error = _import_error(companion)
    return None if error is None else f"cannot be imported ({_told(error)})"


def _torch_refused_by(companion: str) -> str | None:
    """The torch that a companion's metadata requires, if the installed one does not meet it."""
    wanted = [each for each in _required(companion) if each.name == "torch"]
    refused = [each for each in wanted if not each.specifier.contains(version("torch") or "", prereleases=True)]
    return str(refused[0]) if refused else None


def _companions_fix(broken: tuple[str, ...]) -> str:
    """One pip command that makes torch, torchvision and torchaudio compatible with each other and with LLaMA-Factory.

    It keeps torch, unless no torchaudio is built for its CUDA. pip finds the right torchvision by its metadata.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    installed = {name: found for name in ("torch", *COMPANIONS) if (found := _parsed(name))}
    wanted = {name: SpecifierSet() for name in installed} | {"torch": SpecifierSet(f"=={installed['torch'].public}")}
    if "torchaudio" in broken and installed["torch"] < Version(LAST_TORCHAUDIO):
        wanted["torchaudio"] = SpecifierSet(f"<{LAST_TORCHAUDIO}")
    elif "torchaudio" in broken:
        wanted["torchaudio"] = SpecifierSet(f"=={LAST_TORCHAUDIO}")
        if installed["torch"] not in SpecifierSet(ITS_TORCH):
            wanted["torch"] = SpecifierSet(ITS_TORCH)
    are_wanted = all(installed[name] in wanted[name] for name in wanted) and not any(map(_torch_refused_by, broken))
    # A build like 2.13.0+cu126 comes from an index of its own; its companions must come from the same index.
    if are_wanted or any(installed[name].local for name in ("torch", *broken)):
        names = " ".join(broken)
        return (
            f"install {names} from the package index that torch came from; for text-only data: pip uninstall -y {names}"
        )
    return "pip install " + " ".join(f'"{name}{wanted[name]}"' if wanted[name] else name for name in wanted)


def _optional() -> Iterator[Finding]:
    """Optional packages, which transformers, PEFT and accelerate import if they are installed."""
    if _import_error("torch") is not None:
        return
    for package in (*OPTIONAL, "deepspeed"):
        if package not in COMPANIONS and version(package) is not None:
            error = _import_error(package.replace("-", "_"))
            if error is not None:
                fix = f"reinstall it, or remove it: pip uninstall -y {package}"
                yield Finding(package, f"cannot be imported ({_told(error)})", fix)
    if version("flash-attn") is not None and version("transformers") == "5.6.0":
        fix = 'pip install "transformers<5.6.0"'
        yield Finding("flash-attn", "`flash_attn: fa2` fails with transformers 5.6.0", fix)


def _training() -> Iterator[Finding]:
    """Whether LLaMA-Factory starts; skipped if torch or its companions are already known to be broken."""
    if any(_torch()) or any(_companions()):
        return
    error = _import_error("llamafactory.train.tuner") or _refusal()
    if error is None:
        return
    advised = re.search(r"`pip install ([^`\s]+)", str(error))  # by LLaMA-Factory, without the quotes a shell needs
    if advised:
        fix = f'pip install "{advised[1]}"'
    elif isinstance(error, ModuleNotFoundError) and error.name == "llamafactory":
        fix = 'pip install "llamafactory>=0.9.4,<0.9.7"'
    elif sys.flags.optimize == 2:
        fix = "unset PYTHONOPTIMIZE (or run without -OO): transformers needs its docstrings"
    else:
        fix = 'see the traceback: python -c "import llamafactory.train.tuner"'
    yield Finding("LLaMA-Factory", f"does not start ({_told(error)})", fix)


def _refusal() -> BaseException | None:
    """The error of LLaMA-Factory's own version check, or None: its development version runs the check at launch."""
    try:
        importlib.import_module("llamafactory.extras.misc").check_dependencies()
    except Exception as error:
        return error
    return None


def _plugin() -> Iterator[Finding]:
    if os.environ.get("LLAMAFACTORY_EXT") == "0":
        yield Finding("plugin", "off: LLAMAFACTORY_EXT=0 is set", "unset LLAMAFACTORY_EXT")
        return
    if _import_error("llamafactory.hparams") is not None:
        yield Finding("plugin", "not active: LLaMA-Factory cannot be imported")
        return
    if not hasattr(importlib.import_module("llamafactory.hparams").FinetuningArguments, "dpop_lambda"):
        fix = "install llamafactory-ext with pip into the environment of llamafactory; do not run Python with -S"
        yield Finding("plugin", "off: its start-up hook (llamafactory_ext.pth) did not run", fix)
        return
    error = _import_error("llamafactory_ext.training.trainer")
    if error is None:
        yield Finding("plugin", "active: LLaMA-Factory knows its keys")
    else:
        fix = 'see the traceback: python -c "import llamafactory_ext.training.trainer"'
        yield Finding("plugin", f"active, but it cannot train ({_told(error)})", fix)


def _devices() -> Iterator[Finding]:
    import psutil
    import torch

    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        memory = psutil.virtual_memory().total / 2**30
        yield Finding("CPU", f"{os.cpu_count()} cores, {memory:.0f} GiB; no GPU that torch can use")
        if shutil.which("nvidia-smi") and torch.version.cuda is None:
            yield Finding(
                "torch", "built without CUDA", "this machine has an NVIDIA driver: install a CUDA build of torch"
            )


def _deepspeed() -> Iterator[Finding]:
    import torch

    if version("deepspeed") is None:
        yield Finding("DeepSpeed", 'not available: pip install "llamafactory-ext[deepspeed]"')
        return
    if _older("deepspeed", SAFE_DEEPSPEED) and not torch.cuda.is_available():
        fix = f"its ZeRO-3 corrupts weights on gloo: pip install deepspeed=={SAFE_DEEPSPEED}"
        yield Finding("DeepSpeed", f"{version('deepspeed')} without a GPU", fix)
    if _older("llamafactory", "0.9.5") and not _older("deepspeed", "0.16.10"):
        fix = "set DISABLE_VERSION_CHECK=1, or install llamafactory 0.9.5, which accepts DeepSpeed above 0.16.9"
        yield Finding("DeepSpeed", f"{version('deepspeed')} with LLaMA-Factory {version('llamafactory')}", fix)
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        fix = f"install {' and '.join(missing)}: DeepSpeed compiles its operators at the first start"
        yield Finding("DeepSpeed", "cannot compile its operators", fix)
    else:
        yield Finding("DeepSpeed", "available; compiles its operators at the first start")


def _vllm() -> Iterator[Finding]:
    if version("vllm") is None:
        yield Finding("vLLM", "not installed here; `make eval-env` creates an environment with vLLM for the evaluation")


def _loss_dispatch() -> Iterator[Finding]:
    if os.environ.get("LLAMAFACTORY_EXT") == "0" and not _older("trl", "0.20"):
        losses = ", ".join(name for name in STOCK_LOSSES if name not in ("sigmoid", "orpo", "simpo"))
        fix = "LLaMA-Factory alone does not pass pref_loss to TRL 0.20 or later: unset LLAMAFACTORY_EXT"
        yield Finding("pref_loss", f"{losses} train the sigmoid loss instead", fix)
