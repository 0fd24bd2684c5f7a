"""The YAML keys: what they resolve to, and what is refused before anything is loaded."""

from __future__ import annotations

import math

import pytest
from llamafactory.hparams import FinetuningArguments
from transformers import HfArgumentParser

from llamafactory_ext import get_loss, register_loss
from llamafactory_ext.losses import lookup
from llamafactory_ext.recipe.arguments import SR_PROMPT
from llamafactory_ext.recipe.keys import keys_not_taken, keys_of

MINE = """
from __future__ import annotations
from llamafactory_ext import register_loss

@register_loss("mine")
def mine(pairs, *, beta: float, tau: float, steps: int = 3, on: bool = False, kind: str = "a"):
    return tau * pairs.margin

@register_loss("alone", needs_reference=False)
def alone(pairs):
    return -pairs.policy_chosen
"""


@pytest.fixture
def loss_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE, encoding="utf-8")
    with lookup.forgotten_afterwards():
        yield str(path)


def parse(**settings):
    """As LLaMA-Factory parses a YAML file: no types are checked on the way."""
    (args,) = HfArgumentParser(FinetuningArguments).parse_dict({"stage": "dpo", **settings})
    return args


@pytest.mark.parametrize(
    ("settings", "described", "needs_reference"),
    [
        ({}, "sigmoid(beta=0.1, label_smoothing=0.0, sr_lambda=0.0)", True),
        ({"dpo_label_smoothing": 0.2}, "sigmoid(beta=0.1, label_smoothing=0.2, sr_lambda=0.0)", True),
        ({"pref_loss": "minor_dpo", "pref_beta": 0.05}, "minor_dpo(beta=0.05, sr_lambda=0.0)", True),
        ({"pref_loss": "dpop"}, "dpop(beta=0.1, dpop_lambda=50.0, sr_lambda=0.0)", True),
        ({"pref_loss": "dpop", "dpop_lambda": 0}, "dpop(beta=0.1, dpop_lambda=0, sr_lambda=0.0)", True),
        ({"pref_loss": "ipo"}, "ipo(beta=0.1, length_normalize=True)", True),
        ({"pref_loss": "ipo", "ipo_length_normalize": False}, "ipo(beta=0.1, length_normalize=False)", True),
        ({"pref_loss": "hinge", "ld_alpha": 0.5}, "hinge(beta=0.1)", True),
        ({"pref_loss": "rrhf", "ld_alpha": 0.5}, "rrhf(rrhf_weight=1.0)", False),
        ({"pref_loss": "robust", "dpo_label_smoothing": 0.2}, "robust(beta=0.1, label_smoothing=0.2, sr_", True),
        ({"pref_loss": "pl_dpo", "pref_ranked_weights": "equal"}, "pl_dpo(beta=0.1)", True),
        ({"pref_loss": "pl_dpo", "f_divergence": "js"}, "pl_dpo(beta=0.1), f_divergence=js", True),
        ({"pref_loss": "pl_dpo", "pref_weight_column": "weight"}, "pl_dpo(beta=0.1)", True),
        ({"pref_loss": "exo_pair"}, "exo_pair(beta=0.1, label_smoothing=0.001)", True),
        ({"pref_loss": "discopop"}, "discopop(beta=0.1, discopop_tau=0.05, sr_lambda=0.0)", True),
        ({"pref_loss": "discopop", "discopop_tau": 0.1}, "discopop(beta=0.1, discopop_tau=0.1, sr_lambda=0.0)", True),
        ({"pref_loss": "sft"}, "sft()", False),
        ({"pref_loss": "simpo", "simpo_gamma": 1.5}, "simpo(beta=0.1, simpo_gamma=1.5)", False),
        ({"pref_loss": "orpo"}, "orpo(beta=0.1)", False),
        ({"pref_loss": "sr_dpo"}, "sr_dpo(beta=0.1, sr_lambda=0.3)", True),
        ({"pref_loss": "sr_ipo", "sr_lambda": 1}, "sr_ipo(beta=0.1, sr_lambda=1, length_normalize=False)", True),
        ({"pref_loss": "sr_ipo", "ipo_length_normalize": True, "sr_lambda": 0.1}, "sr_lambda=0.1, length_norm", True),
        ({"pref_loss": "minor_dpo", "sr_lambda": 0.5}, "minor_dpo(beta=0.1, sr_lambda=0.5)", True),
        ({"sr_lambda": 0.5}, "sigmoid(beta=0.1, label_smoothing=0.0, sr_lambda=0.5)", True),
        ({"pref_loss": ["orpo", "sft"]}, "orpo(beta=0.1) + sft()", False),
        (
            {"pref_loss": "orpo, hinge", "pref_loss_weights": "2,0.5"},
            "2 * orpo(beta=0.1) + 0.5 * hinge(beta=0.1)",
            True,
        ),
        ({"pref_loss": ["hinge", "sft"], "pref_loss_weights": [1, 0.1]}, "hinge(beta=0.1) + 0.1 * sft()", True),
        # Each loss has its own default; a key that is given is for all that take it.
        ({"pref_loss": "sr_ipo,ipo,minor_dpo"}, "length_normalize=False) + ipo(beta=0.1, length_normalize=True)", True),
        ({"pref_loss": "sr_dpo,minor_dpo", "sr_lambda": 0.2}, "0.2) + minor_dpo(beta=0.1, sr_lambda=0.2)", True),
        ({"f_divergence": "js"}, "sr_lambda=0.0), f_divergence=js", True),
        ({"pref_loss": "ipo,sft", "f_divergence": "alpha", "f_divergence_alpha": 2}, "f_divergence=alpha(2.0)", True),
        ({"pref_loss": "odpo", "pref_margin_column": "gap"}, "odpo(beta=0.1, odpo_alpha=1.0, sr_lambda=0.0)", True),
        ({"pref_loss": "minor_dpo", "ld_alpha": 0.5, "ld_alpha_reference": True}, "minor_dpo(beta=0.1", True),
        ({"pref_loss": "sr_dpo", "ld_alpha": 0.5, "ld_alpha_reference": True}, "sr_dpo(beta=0.1", True),
    ],
)
def test_resolved_loss(settings, described, needs_reference):
    args = parse(**settings)
    assert described in str(args.objective)
    assert args.use_ref_model is needs_reference


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pref_loss": "minor"}, "unknown: write one of .*Did you mean '.*minor_dpo'"),
        ({"pref_loss": 3}, "`pref_loss` is 3: write the name of a loss"),
        ({"pref_beta": 0}, "`pref_beta` is 0: write a number above 0"),
        ({"pref_beta": -0.1}, "number above 0"),
        ({"pref_beta": "abc"}, "`pref_beta` is 'abc'"),
        ({"pref_beta": math.nan}, "`pref_beta` is nan"),
        ({"pref_beta": True}, "`pref_beta` is True"),
        ({"pref_loss": "dpop", "dpop_lambda": -1}, "`dpop_lambda` is -1: write a finite number of at least 0"),
        ({"pref_loss": "dpop", "dpop_lambda": math.inf}, "`dpop_lambda` is inf"),
        ({"pref_loss": "dpop", "dpop_lambda": "50"}, "`dpop_lambda` is '50'"),
        ({"pref_loss": "discopop", "discopop_tau": 0}, "`discopop_tau` is 0: write a number above 0"),
        ({"discopop_tau": 0.1}, "`discopop_tau` is not a hyper-parameter of pref_loss 'sigmoid'"),
        ({"dpop_lambda": 50}, "`dpop_lambda` is not a hyper-parameter of pref_loss 'sigmoid', which takes `pref_beta`"),
        ({"pref_loss": "minor_dpo", "dpop_lambda": 50}, "remove `dpop_lambda`"),
        ({"pref_loss": "dpop", "simpo_gamma": 1.0}, "remove `simpo_gamma`"),
        ({"pref_loss": "hinge", "ipo_length_normalize": True}, "remove `ipo_length_normalize`"),
        ({"pref_loss": "ipo", "ipo_length_normalize": "yes"}, "value of type bool"),
        ({"dpo_label_smoothing": 0.5}, "at least 0 and below 0.5"),
        ({"dpo_label_smoothing": -0.1}, "at least 0 and below 0.5"),
        ({"dpo_label_smoothing": "a"}, "`dpo_label_smoothing` is 'a'"),
        ({"pref_loss": "minor_dpo", "dpo_label_smoothing": 0.1}, "remove `dpo_label_smoothing`"),
        ({"pref_ftx": -1}, "`pref_ftx` is -1"),
        ({"pref_ftx": None}, "`pref_ftx` is empty: write a number of at least 0, or remove the key"),
        ({"pref_beta": None}, "`pref_beta` is empty"),
        ({"pref_loss": "simpo", "simpo_gamma": None}, "`simpo_gamma` is empty"),
        ({"pref_beta": 10**400}, "`pref_beta` is 10{79}…: write a number above 0"),
        ({"pref_loss": "dpop", "dpop_lambda": 10**400}, "write a finite number"),
        ({"pref_bco_weight": "1"}, "`pref_bco_weight` is '1'"),
        ({"pref_loss": "minor_dpo", "ld_alpha": 0.5}, "remove `ld_alpha`"),
        ({"pref_loss": "apo_zero", "ld_alpha": 0.5}, "remove `ld_alpha`"),
        ({"pref_loss": "dpop", "ld_alpha": 0.5}, "remove `ld_alpha`"),
        ({"pref_loss": "sr_dpo", "ld_alpha": 0.5}, "remove `ld_alpha`"),
        ({"pref_loss": "sr_dpo", "sr_lambda": -0.1}, "`sr_lambda` is -0.1: write a finite number of at least 0"),
        ({"pref_loss": "sr_dpo", "sr_lambda": "0.1"}, "`sr_lambda` is '0.1'"),
        ({"pref_loss": "hinge", "sr_lambda": 0.3}, "`sr_lambda` is not a hyper-parameter of pref_loss 'hinge'"),
        ({"pref_loss": "orpo", "sr_lambda": 0.3}, "`sr_lambda` is not a hyper-parameter of pref_loss 'orpo'"),
        ({"pref_loss": "sr_dpo", "sr_prompt": " "}, "`sr_prompt` is empty"),
        ({"pref_loss": "sr_dpo", "sr_prompt": 5}, "`sr_prompt` is 5: write a value of type str"),
        ({"pref_loss": "sr_dpo", "sr_prompt": "Be \ud83c good. "}, "`sr_prompt` holds half a character"),
        ({"pref_loss": "sr_dpo", "sr_lambda": 0, "sr_prompt": "Be good. "}, "write an `sr_lambda` above 0"),
        ({"pref_loss": "minor_dpo", "sr_prompt": "Be good. "}, "write an `sr_lambda` above 0"),
        ({"pref_loss": "orpo", "sr_prompt": "Be good. "}, "or remove `sr_prompt`"),
        ({"stage": "sft", "sr_prompt": "Be good. "}, "belongs to `stage: dpo`"),
        ({"pref_loss_args": {"tau": 1}}, "for a loss of your own: name its file"),
        ({"pref_loss_file": "nowhere.py"}, "is not a file"),
        ({"pref_loss_file": "a\0b.py"}, "`pref_loss_file` is 'a.x00b.py', which cannot be a path"),
        ({"ref_log_probs_cache_dir": "a\0b"}, "which cannot be a path .*: write another one"),
        ({"ref_log_probs_cache_dir": "~nobody-by-that-name/references"}, "which cannot be a path"),
        ({"ref_log_probs_cache_dir": "n" * 300}, "which cannot be a path .*too long"),
        ({"ref_log_probs_cache_dir": "\ud83c"}, "which cannot be a path"),
        ({"stage": "sft", "dpop_lambda": 50}, "belongs to `stage: dpo`"),
        ({"stage": "sft", "f_divergence": "js"}, "belongs to `stage: dpo`"),
        ({"pref_loss": []}, "write the name of a loss, or a list of names"),
        ({"pref_loss": ["sigmoid", 3]}, "write the name of a loss, or a list of names"),
        ({"pref_loss": "sigmoid,"}, "write the name of a loss, or a list of names"),
        ({"pref_loss": "sft, sft"}, "names 'sft' twice: write it once"),
        ({"pref_loss": "hinge, minor"}, "'minor' is unknown"),
        ({"pref_loss_weights": [1.0]}, "`pref_loss_weights` are for several losses"),
        (
            {"pref_loss": "hinge,sft", "pref_loss_weights": [1.0]},
            "for each of the 2 losses, like .1.0",
        ),
        ({"pref_loss": "hinge,sft", "pref_loss_weights": [1, 0]}, "a number above 0 for each"),
        ({"pref_loss": "hinge,sft", "pref_loss_weights": "1,x"}, "a number above 0 for each"),
        ({"pref_loss": "hinge,sft", "pref_loss_weights": [1, math.nan]}, "a number above 0 for each"),
        (
            {"pref_loss": "hinge,sft", "dpop_lambda": 5},
            "of pref_loss 'hinge' and 'sft', which take `pref_beta`",
        ),
        ({"f_divergence": "kl"}, "`f_divergence` is 'kl': write one of reverse_kl, forward_kl, js, alpha"),
        ({"f_divergence": 1}, "`f_divergence` is 1: write a value of type str"),
        ({"f_divergence": "js", "f_divergence_alpha": 0.5}, "belongs to `f_divergence: alpha`"),
        ({"f_divergence": "alpha", "f_divergence_alpha": math.inf}, "`f_divergence_alpha` is inf"),
        (
            {"pref_loss": "minor_dpo", "f_divergence": "js"},
            "'minor_dpo' is made for log-ratios",
        ),
        ({"pref_loss": "sr_dpo", "f_divergence": "js"}, "refinement term is made of log-ratios"),
        ({"pref_loss": "simpo", "f_divergence": "js"}, "'simpo' has no reference to diverge from"),
        ({"pref_loss": "odpo"}, "'odpo' needs the scores of the responses: name their columns"),
        ({"pref_margin_column": "gap"}, "'sigmoid' does not use scores: write `pref_loss: odpo`"),
        ({"pref_loss": "odpo", "pref_margin_column": ["a", "b", "c"]}, "write the name of a column, or of two"),
        ({"pref_weight_column": "a,b"}, "`pref_weight_column` is 'a,b': write the name of a column"),
        ({"pref_weight_column": ""}, "`pref_weight_column` is ''"),
        (
            {"pref_loss": "sigmoid,aot", "pref_wpo": True},
            "'aot' compares the pairs .*remove `pref_wpo`",
        ),
        ({"pref_loss": "kto_pair", "pref_weight_column": "weight"}, "remove `pref_weight_column`"),
        ({"pref_wpo": "yes"}, "`pref_wpo` is 'yes': write a value of type bool"),
        ({"ld_alpha_reference": True}, "needs `ld_alpha`"),
        ({"pref_loss": "orpo", "ld_alpha": 0.5, "ld_alpha_reference": True}, "'orpo' has no reference"),
        ({"pref_loss": "cringe", "cringe_top_k": 0.5}, "a whole number of at least 1"),
        ({"pref_loss": "cringe", "cringe_top_k": 2.0}, "a whole number of at least 1"),
        ({"f_divergence": "alpha", "f_divergence_alpha": 1e3}, "write a number from -100 to 100"),
        ({"pref_loss": "cringe", "cringe_tau": 0}, "`cringe_tau` is 0: write a number above 0"),
        ({"pref_ranked_weights": "foo"}, "`pref_ranked_weights` is 'foo': write equal or score_gap"),
        ({"pref_ranked_weights": True}, "`pref_ranked_weights` is True: write equal or score_gap"),
        (
            {"pref_loss": "pl_dpo", "pref_ranked_weights": "score_gap"},
            "'pl_dpo' ranks all answers of a row at once, .*: remove `pref_ranked_weights`",
        ),
        ({"pref_loss": "sft,pl_dpo", "pref_ranked_weights": "score_gap"}, "'pl_dpo' .*remove `pref_ranked_weights`"),
        ({"pref_loss": "pl_dpo", "pref_wpo": True}, "'pl_dpo' .*remove `pref_wpo`"),
        ({"pref_loss": "pl_dpo", "ld_alpha": 0.5}, "remove `ld_alpha`"),
        ({"pref_loss": "pl_dpo", "sr_lambda": 0.3}, "`sr_lambda` is not a hyper-parameter of pref_loss 'pl_dpo'"),
        ({"stage": "sft", "pref_ranked_weights": "equal"}, "belongs to `stage: dpo`"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        parse(**settings)


@pytest.mark.parametrize(
    ("settings", "prompt"),
    [
        ({"pref_loss": "sr_dpo"}, SR_PROMPT),
        ({"pref_loss": "sr_ipo", "sr_prompt": "Be good. "}, "Be good. "),
        ({"pref_loss": "dpop", "sr_lambda": 0.1}, SR_PROMPT),
        ({"pref_loss": "sr_dpo", "sr_lambda": 0}, None),
        ({"pref_loss": "minor_dpo"}, None),
        ({"pref_loss": "sigmoid"}, None),
    ],
)
def test_refinement_prompt(settings, prompt):
    assert parse(**settings).refinement_prompt == prompt


@pytest.mark.parametrize("given", [{"tau": 0.5}, '{"tau": 0.5}'])
def test_loss_of_the_user(loss_file, given):
    args = parse(pref_loss="mine", pref_loss_file=loss_file, pref_loss_args=given)
    assert args.objective.parts[0].hyperparameters == {"steps": 3, "on": False, "kind": "a", "beta": 0.1, "tau": 0.5}
    assert str(args.objective).startswith("mine(")
    assert args.use_ref_model


def test_a_mixture_with_a_loss_of_the_user(loss_file):
    args = parse(pref_loss="sigmoid,mine", pref_loss_file=loss_file, pref_loss_args={"tau": 0.5}, sr_lambda=0.1)
    assert [dict(part.hyperparameters) for part in args.objective.parts] == [
        {"beta": 0.1, "label_smoothing": 0.0, "sr_lambda": 0.1},
        {"beta": 0.1, "tau": 0.5, "steps": 3, "on": False, "kind": "a"},
    ]
    assert args.pref_loss == "sigmoid,mine"


CONTRASTS = """
from llamafactory_ext import register_loss

@register_loss("con", needs_reference=False, needs_contrast=True)
def con(pairs, *, cringe_top_k=1):
    return pairs.contrast
"""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pref_loss": "cringe,con"}, "'cringe' and 'con' draw from different numbers of tokens"),
        (
            {"pref_loss": "con", "pref_loss_args": {"cringe_top_k": 0}},
            "of 'con' is 0: write a whole number",
        ),
        ({"pref_loss": "con", "pref_loss_args": {"cringe_top_k": "abc"}}, "is 'abc': write a whole number"),
    ],
)
def test_contrasts_of_losses_of_the_user(tmp_path, settings, message):
    path = tmp_path / "contrasts.py"
    path.write_text(CONTRASTS, encoding="utf-8")
    with lookup.forgotten_afterwards():
        assert parse(pref_loss="cringe,con", pref_loss_file=str(path), cringe_top_k=1).objective.contrast is not None
        with pytest.raises(ValueError, match=message):
            parse(pref_loss_file=str(path), **settings)


def test_a_new_loss_of_the_package_needs_no_key_of_its_own():
    """Until it has one, `pref_loss_args` gives its hyper-parameters, and everything else follows from the registry."""

    def novel(pairs, *, beta: float, steepness: float = 2.0, sr_lambda: float = 0.0):
        """NOVEL: softplus(-steepness beta (D_w - D_l))."""
        return steepness * beta * pairs.margin

    novel.__module__ = "llamafactory_ext.losses.logistic"
    with lookup.forgotten_afterwards():
        register_loss("novel", takes_divergence=True)(novel)
        args = parse(pref_loss="novel,sft", pref_loss_args={"steepness": 3.0}, sr_lambda=0.1)
        assert str(args.objective) == "novel(beta=0.1, steepness=3.0, sr_lambda=0.1) + sft()"
        assert keys_of(get_loss("novel"))["pref_loss_args.steepness"] == 2.0
        assert keys_not_taken({"pref_loss": "novel", "pref_loss_args": {}, "dpop_lambda": 1}) == ["dpop_lambda"]
        with pytest.raises(ValueError, match=r"holds 'sr_lambda', but .* takes `steepness` there"):
            parse(pref_loss="novel", pref_loss_args={"sr_lambda": 0.1})


def test_what_changes_the_objective_is_described():
    args = parse(pref_loss="hinge", pref_wpo=True, pref_weight_column=["weight"], pref_ftx=0.5)
    assert args.described == "hinge(beta=0.1), pref_ftx=0.5, pref_wpo=True, pref_weight_column=['weight']"


@pytest.mark.parametrize(("value", "by_gap"), [(None, False), ("equal", False), ("score_gap", True)])
def test_weights_of_the_pairs_of_a_row(value, by_gap):
    args = parse(pref_loss="hinge", pref_ranked_weights=value)
    assert args.weights_by_gap is by_gap
    assert ("pref_ranked_weights=score_gap" in args.described) is by_gap


def test_loss_of_the_user_without_reference_and_beta(loss_file):
    args = parse(pref_loss="alone", pref_loss_file=loss_file)
    assert args.objective.parts[0].hyperparameters == {}
    assert not args.use_ref_model


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "registers `mine`, `alone`, but pref_loss is 'sigmoid'"),
        ({"pref_loss": "mine"}, "needs a value for `tau`: write it under `pref_loss_args`"),
        ({"pref_loss": "mine", "pref_loss_args": {"tau": 1, "sigma": 2}}, "holds 'sigma', but .* takes `tau`, `steps`"),
        ({"pref_loss": "mine", "pref_loss_args": {"beta": 1}}, "write `pref_beta`"),
        ({"pref_loss": "mine", "pref_loss_args": {"tau": "high"}}, "tau as 'high': write a value of type float"),
        ({"pref_loss": "mine", "pref_loss_args": {"tau": 1, "steps": 1.5}}, "steps as 1.5: .* type int"),
        ({"pref_loss": "mine", "pref_loss_args": {"tau": 1, "on": 1}}, "on as 1: .* type bool"),
        ({"pref_loss": "mine", "pref_loss_args": "{tau}"}, "is not JSON"),
        ({"pref_loss": "mine", "pref_loss_args": "[1]"}, "must be a mapping"),
        ({"pref_loss": "mine", "pref_loss_args": {"tau": 1}, "dpop_lambda": 2}, "remove `dpop_lambda`"),
    ],
)
def test_refused_with_a_loss_of_the_user(loss_file, settings, message):
    with pytest.raises(ValueError, match=message):
        parse(pref_loss_file=loss_file, **settings)


def test_other_stages_are_left_alone():
    args = parse(stage="kto", pref_loss="whatever the board sends", pref_beta=0)
    assert not args.use_ref_model


@pytest.mark.parametrize("switch", ["USE_MCA", "USE_MEGATRON_BRIDGE"])
def test_a_trainer_of_megatron_refuses_our_losses_only(switch, monkeypatch):
    monkeypatch.setenv(switch, "1")
    assert parse(pref_loss="hinge").objective.name == "hinge"
    with pytest.raises(ValueError, match=f"'minor_dpo' cannot be trained with {switch}, .*: unset {switch}"):
        parse(pref_loss="minor_dpo")
    with pytest.raises(ValueError, match=f"`f_divergence` has no effect with {switch}"):
        parse(f_divergence="js")
    with pytest.raises(ValueError, match=f"'sigmoid,hinge' cannot be trained with {switch}"):
        parse(pref_loss="sigmoid,hinge")
    monkeypatch.setenv(switch, "0")
    assert parse(pref_loss="minor_dpo").objective.name == "minor_dpo"


def test_command_line_help_and_values():
    parser = HfArgumentParser(FinetuningArguments)
    for key in ("--pref_loss ", "--dpop_lambda", "--ipo_length_normalize", "--pref_loss_file", "--pref_loss_args"):
        assert key in parser.format_help()
    words = ["--stage", "dpo", "--pref_loss", "dpop", "--dpop_lambda", "5"]
    (args,) = parser.parse_args_into_dataclasses(words)
    assert str(args.objective) == "dpop(beta=0.1, dpop_lambda=5.0, sr_lambda=0.0)"


def test_arguments_go_by_llamafactorys_name():
    import pickle

    args = parse(pref_loss="dpop")
    assert type(args).__qualname__ == "FinetuningArguments"
    assert pickle.loads(pickle.dumps(args)).pref_loss == "dpop"
    assert args.to_dict()["dpop_lambda"] is None
