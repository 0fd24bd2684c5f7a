"""What SECURITY.md promises of the code: no pickle, nothing evaluated, no shell, network in named places only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path.relative_to(ROOT)
    for folder in ("llamafactory_ext", "evaluation", "examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "urllib3", "ftplib", "smtplib", "openai"}
NETWORK |= {"huggingface_hub"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "yaml.load"}
CALLS |= {"subprocess.getoutput", "subprocess.getstatusoutput", "numpy.load", "np.load", "pandas.read_pickle"}
CALLS |= {"yaml.unsafe_load", "load_dataset", "datasets.load_dataset"}
# What is allowed nowhere else, and why there.
ALLOWED = {
    ("llamafactory_ext/evaluation/openai_engine.py", "openai"): "the server that --base-url names",
    ("llamafactory_ext/evaluation/models.py", "huggingface_hub"): "a model that --model names as one of the hub",
    ("llamafactory_ext/evaluation/__main__.py", "exec_module"): "this package itself",
    ("llamafactory_ext/rows.py", "datasets.load_dataset"): "a data set that the command names as one of the hub",
    ("llamafactory_ext/losses/lookup.py", "exec_module"): "the loss file that pref_loss_file names",
    ("llamafactory_ext/_startup.py", "exec_module"): "LLaMA-Factory's own modules, as Python imports them",
}


def findings(source: str) -> set[str]:
    """What of a source file the rules forbid."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            found |= {f"{key}={keywords[key]}" for key in ("shell", "weights_only", "allow_pickle") if key in keywords}
        elif isinstance(node, ast.Attribute) and node.attr == "exec_module":
            found.add("exec_module")
    words = {"exec_module", "shell=True", "weights_only=False", "allow_pickle=True"}
    return found & (PICKLES | NETWORK | CALLS | words)


def test_no_file_breaks_the_rules():
    assert len(FILES) > 80
    found = {(path.as_posix(), what) for path in FILES for what in findings((ROOT / path).read_text(encoding="utf-8"))}
    assert found == set(ALLOWED), "forbidden, or allowed and not there any more"


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from urllib.request import urlopen", "urllib"),
        ("torch.load(path)", "torch.load"),
        ("eval('1')", "eval"),
        ("subprocess.run('ls', shell=True)", "shell=True"),
        ("spec.loader.exec_module(module)", "exec_module"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle=True"),
    ],
)
def test_the_walk_sees(source, what):
    assert what in findings(source)
