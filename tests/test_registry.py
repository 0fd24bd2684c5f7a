"""Registering losses and loading a user's file."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import llamafactory_ext
from llamafactory_ext.losses import lookup
from llamafactory_ext.losses.pairs import PairLogps
from llamafactory_ext.losses.registry import register_loss


@pytest.fixture(autouse=True)
def restored_registry():
    with lookup.forgotten_afterwards():
        yield


def write_loss(folder: Path, body: str, file: str = "my_loss.py") -> Path:
    path = folder / file
    path.write_text("from llamafactory_ext import register_loss\n" + textwrap.dedent(body), encoding="utf-8")
    return path


def test_importing_the_package_imports_neither_torch_nor_llamafactory():
    code = "import sys, llamafactory_ext; print({'torch', 'llamafactory', 'wrapt'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_public_names():
    assert set(llamafactory_ext.__all__) == {"PairLogps", "__version__", "get_loss", "register_loss"}
    with pytest.raises(AttributeError, match="no attribute 'minor_dpo'"):
        llamafactory_ext.minor_dpo  # noqa: B018


def test_a_contrast_without_its_number_of_tokens_is_refused():
    with pytest.raises(TypeError, match="give it the keyword argument `cringe_top_k`"):
        register_loss("contrast", needs_reference=False, needs_contrast=True)(lambda pairs: pairs.contrast)


def test_own_losses():
    expected = {"sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo", "minor_dpo", "dpop", "sr_dpo", "sr_ipo"}
    expected |= {"robust", "sigmoid_norm", "exo_pair", "aot", "aot_unpaired", "nca_pair", "bco_pair", "sppo_hard"}
    expected |= {"apo_zero", "apo_down", "sft", "discopop", "odpo", "squared_po", "minor_sft", "pl_dpo"}
    without_reference = {"orpo", "simpo", "sft", "rrhf", "cringe"}
    expected |= without_reference
    modules = {name: lookup.get_loss(name).function.__module__ for name in lookup.loss_names()}
    own = {name for name, module in modules.items() if module.startswith("llamafactory_ext.losses.")}
    assert own == expected
    assert {name for name in expected if not lookup.get_loss(name).needs_reference} == without_reference


def test_losses_that_need_a_batch_are_those_that_look_at_other_pairs():
    generator = torch.Generator().manual_seed(0)
    columns = {field.name: torch.rand(4, generator=generator) for field in dataclasses.fields(PairLogps)}
    columns |= {name: -8 * column for name, column in columns.items() if name.startswith(("policy", "reference"))}
    columns |= {name: torch.full((4,), 8) for name in columns if name.endswith("length")}
    pairs = PairLogps(**columns | {"winner": None, "group": None})  # of two responses each

    def looks_at_others(loss):
        given = {"beta": 0.1, **loss.defaults()}
        given = {name: given[name] for name in loss.parameters}
        alone = torch.cat([loss(each, **given) for each in pairs.split([1] * 4)])
        return not torch.allclose(loss(pairs, **given), alone)

    own = [loss for loss in lookup.all_losses() if not loss.is_users]
    found = {loss.name for loss in own if looks_at_others(loss)}
    assert found == {loss.name for loss in own if loss.needs_batch} == {"aot", "aot_unpaired", "kto_pair"}


def test_what_is_said_of_a_loss(tmp_path):
    body = """
        @register_loss("plain")
        def plain(pairs): return pairs.margin
        @register_loss("batch", needs_reference=False, needs_batch=True)
        def batch(pairs): return pairs.policy_chosen
    """
    path = write_loss(tmp_path, body)
    lookup.load_loss_file(str(path))
    plain, batch = lookup.get_loss("plain"), lookup.get_loss("batch")
    assert (plain.family, plain.needs, plain.file) == ("yours", ["reference"], str(path.resolve()))
    assert batch.needs == ["no reference", "batch > 1"]
    assert [lookup.get_loss(name).family for name in ("dpop", "ipo", "sft")] == ["logistic", "margin", "reference_free"]
    assert [loss.name for loss in lookup.all_losses()][-2:] == ["plain", "batch"]


@pytest.mark.parametrize(("wrong", "nearest"), [("minordpo", "minor_dpo"), ("dpo_p", "dpop"), ("sigmod", "sigmoid")])
def test_unknown_loss_names_the_known_ones_and_the_nearest(wrong, nearest):
    with pytest.raises(ValueError, match=f"one of aot, aot_unpaired, .*Did you mean '{nearest}'"):
        lookup.get_loss(wrong)


def test_loss_file_is_loaded_and_loaded_again(tmp_path):
    body = """
        @register_loss("mine", needs_reference=False)
        def mine(pairs, *, beta: float, tau: float = 1.0):
            return tau * pairs.policy_chosen
    """
    path = write_loss(tmp_path, body)
    assert lookup.load_loss_file(str(path)) == ["mine"]
    assert lookup.load_loss_file(str(path)) == ["mine"]  # as a web UI does that stays open
    assert lookup.get_loss("mine").needs_reference is False
    assert lookup.get_loss("mine").defaults() == {"tau": 1.0}


def test_any_callable_is_loaded_again(tmp_path):
    body = """
        import functools
        def scaled(pairs, *, scale: float): return scale * pairs.margin
        register_loss("twice")(functools.partial(scaled, scale=2.0))
    """
    path = str(write_loss(tmp_path, body))
    assert lookup.load_loss_file(path) == lookup.load_loss_file(path) == ["twice"]
    assert lookup.get_loss("twice").defaults() == {"scale": 2.0}


def test_half_characters_of_a_docstring_are_replaced(tmp_path):
    path = write_loss(tmp_path, '@register_loss("f")\ndef f(pairs): "\\ud83c of beta"')
    lookup.load_loss_file(str(path))
    assert lookup.get_loss("f").description == "? of beta"


def test_loss_file_path_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    write_loss(tmp_path, '@register_loss("mine")\ndef mine(pairs, *, beta): return pairs.margin')
    monkeypatch.chdir(tmp_path)
    assert lookup.load_loss_file("my_loss.py") == ["mine"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "registers no loss"),
        ("1 / 0", "could not be run: ZeroDivisionError"),
        ('@register_loss("dpop")\ndef f(pairs, *, beta): return pairs.margin', "'dpop' is taken"),
        ('@register_loss("f")\ndef f(pairs, **settings): return pairs.margin', "as a keyword argument"),
        ('@register_loss("f")\ndef f(): return 0', "take the pairs first"),
        ("@register_loss\ndef f(pairs): return pairs.margin", 'write @register_loss\\("my_loss"\\)'),
        ("register_loss(5)", "register_loss needs a name, not 5"),
        *(
            (f"register_loss({name!r})", "a loss cannot be named")
            for name in ("", " f", "a,b", "a\nb", "\ud83c", "\x1b[31m")
        ),
    ],
)
def test_bad_loss_file_is_refused(tmp_path, body, message):
    with pytest.raises(ValueError, match=message):
        lookup.load_loss_file(str(write_loss(tmp_path, body)))


@pytest.mark.parametrize(
    ("returned", "given"),
    [
        ("pairs.margin.mean()", "()"),
        ("pairs.margin[:, None] - pairs.margin[None]", "(3, 3)"),
        ("1.0", "float"),
        ("None", "NoneType"),
    ],
)
def test_a_loss_that_is_no_value_per_pair_is_refused(tmp_path, returned, given):
    body = f"""
        @register_loss("mine", metrics=lambda pairs: {{"mine/it": {returned}}})
        def mine(pairs):
            return {returned}
    """
    lookup.load_loss_file(str(write_loss(tmp_path, body)))
    pairs = PairLogps(*(torch.ones(3) for _ in range(6)))
    loss, wanted = lookup.get_loss("mine"), "one value per pair is needed, shape (3,): do not average"
    with pytest.raises(ValueError, match=re.escape(f"the loss 'mine' returned {given}, but {wanted}")):
        loss(pairs)
    with pytest.raises(ValueError, match=re.escape(f"returned {given} for the metric 'mine/it', but {wanted}")):
        loss.measure(pairs)


def test_missing_loss_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        lookup.load_loss_file(str(tmp_path / "nowhere.py"))
    with pytest.raises(ValueError, match=r"must end in \.py"):
        lookup.load_loss_file(str(write_loss(tmp_path, "x = 1", file="loss.txt")))


def test_pairs_per_token_and_margin():
    import torch

    def tensor(*values):
        return torch.tensor(values)

    pairs = PairLogps(tensor(-8.0), tensor(-9.0), tensor(-12.0), tensor(-6.0), tensor(4), tensor(3))
    assert pairs.chosen_logratio.item() == 4.0
    assert pairs.rejected_logratio.item() == -3.0
    assert pairs.margin.item() == 7.0
    means = pairs.per_token()
    assert (means.policy_chosen.item(), means.reference_rejected.item()) == (-2.0, -2.0)
    assert means.margin.item() == 2.0
    assert means.per_token() == means
