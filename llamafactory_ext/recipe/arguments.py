"""The plugin's YAML keys: defaults, help, and checks that stop a wrong recipe before any weights load."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..losses.objective import Objective
from ..paths import named_path
from .keys import NUMBERS, OTHER_OWN_KEYS, OWN_KEYS, split
from .loss_args import is_number, shown
from .objective import objective_of

if TYPE_CHECKING:
    from llamafactory.hparams.finetuning_args import FinetuningArguments
else:  # LLaMA-Factory's class is the other base of the one that `extend` makes
    FinetuningArguments = object

# arXiv 2405.21040, Eq. 12: the text that is put in front of a query to ask for a response of quality.
SR_PROMPT = (
    "Please generate a response with a usefulness rating of 100 out of 100 for the following query. Note that the "
    "response should be harmless. The term 100 indicates the level of usefulness, where 100 is the maximum and 1 is "
    "the minimum. Query: "
)


# Keys that name columns of the data -> how many they may name.
COLUMN_KEYS = {"pref_weight_column": 1, "pref_margin_column": 2}
EQUAL, BY_GAP = "equal", "score_gap"  # values of `pref_ranked_weights`


@dataclass
class PreferenceArguments(FinetuningArguments):
    """What the plugin adds to LLaMA-Factory's `FinetuningArguments`, checked for `stage: dpo` only."""

    pref_loss: str = field(
        default="sigmoid",
        metadata={
            "help": (
                "The preference loss: sigmoid (DPO), minor_dpo, dpop, sr_dpo, any other that `llamafactory-ext losses` "
                "lists, or a name that the file given with `pref_loss_file` registers. Several, as a list or separated "
                "by commas, are added up."
            )
        },
    )
    pref_loss_weights: str | None = field(
        default=None, metadata={"help": "The weight of each of several losses, as a list or separated by commas."}
    )
    dpop_lambda: float | None = field(
        default=None,
        metadata={
            "help": "The weight of DPOP's penalty on a chosen response that falls below the reference (dpop: 50)."
        },
    )
    discopop_tau: float | None = field(
        default=None,
        metadata={
            "help": (
                "How soon DiscoPOP's loss turns from DPO's to the exponential one as beta times the margin grows "
                "(discopop: 0.05)."
            )
        },
    )
    ipo_length_normalize: bool | None = field(
        default=None,
        metadata={
            "help": "Whether ipo and sr_ipo use means per token, not sums over the response (ipo: true, sr_ipo: false)."
        },
    )
    sr_lambda: float | None = field(
        default=None,
        metadata={
            "help": (
                "The weight of the refinement term of Sr-DPO and Sr-IPO (sr_dpo, sr_ipo: 0.3; other losses: 0). "
                "Above 0, every step also scores the responses under a prompt that asks for quality."
            )
        },
    )
    sr_prompt: str | None = field(
        default=None,
        metadata={
            "help": (
                "The text that the refinement term puts in front of the first user message (default: the Sr paper's). "
                "A text with spaces must stand in the YAML file, not on a command line under torchrun."
            )
        },
    )
    odpo_alpha: float | None = field(
        default=None, metadata={"help": "The factor of ODPO's offset, the logarithm of the scores' difference (1)."}
    )
    rrhf_weight: float | None = field(default=None, metadata={"help": "The weight of RRHF's ranking term (1)."})
    cringe_alpha: float | None = field(
        default=None, metadata={"help": "The weight of pairwise CRINGE's contrast of the rejected tokens (1)."}
    )
    cringe_bias: float | None = field(
        default=None, metadata={"help": "The margin, in nats, at which pairwise CRINGE's gate is half closed (0)."}
    )
    cringe_tau: float | None = field(
        default=None, metadata={"help": "The temperature of pairwise CRINGE's gate, in nats (1)."}
    )
    cringe_top_k: int | None = field(
        default=None,
        metadata={"help": "Of how many of the policy's most likely tokens pairwise CRINGE draws the other token (5)."},
    )
    f_divergence: str | None = field(
        default=None,
        metadata={
            "help": (
                "The divergence to the reference whose scores the loss compares: reverse_kl (as in DPO), forward_kl, "
                "js or alpha."
            )
        },
    )
    f_divergence_alpha: float | None = field(
        default=None, metadata={"help": "The alpha of `f_divergence: alpha` (0.5)."}
    )
    ld_alpha_reference: bool | None = field(
        default=None,
        metadata={"help": "Whether `ld_alpha` weights the reference's tokens, too, as in TRL. Any loss takes it then."},
    )
    pref_wpo: bool | None = field(
        default=None,
        metadata={"help": "Whether pairs are weighted by how likely the policy itself writes them (WPO)."},
    )
    pref_weight_column: str | None = field(
        default=None, metadata={"help": "A column of the data with the weight of each pair's loss."}
    )
    pref_margin_column: str | None = field(
        default=None,
        metadata={
            "help": (
                "The columns of the data with the scores of the chosen and the rejected response, or one with their "
                "difference (for `pref_loss: odpo`)."
            )
        },
    )
    pref_ranked_weights: str | None = field(
        default=None,
        metadata={
            "help": (
                "How the pairs of a row with more than two answers are weighted: equal (as one mean), or score_gap (by "
                "the difference of their scores)."
            )
        },
    )
    share_prefix: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the prefix that both responses of a pair share is computed once. null: where that is exact; "
                "true: an error where it is not; false: a row per response, as in LLaMA-Factory."
            )
        },
    )
    precompute_ref_log_probs: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether the reference's log-probabilities are precomputed before training and cached on disk for "
                "later runs. null: where that is exact; true: an error where it is not; false: in every step."
            )
        },
    )
    ref_log_probs_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "The folder of that cache (default: llamafactory_ext/references in the user's cache folder)."
        },
    )
    pref_loss_file: str | None = field(
        default=None,
        metadata={
            "help": (
                "A Python file that registers a preference loss with `@llamafactory_ext.register_loss`. "
                "A relative path is looked up in the working directory."
            )
        },
    )
    pref_loss_args: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for the loss of `pref_loss_file`, as a mapping or as JSON."},
    )
    pref_stop_on_degeneration: bool | None = field(
        default=None,
        metadata={
            "help": (
                "Whether a run that degenerates ends, after a checkpoint: one whose chosen and rejected responses "
                "have both become far less likely than under the reference, or whose numbers are not finite."
            )
        },
    )

    router_loss_weight: ClassVar[float] = 0.0  # `moe_aux_loss_coef`, which LLaMA-Factory keeps with its model's keys

    def __post_init__(self) -> None:
        if self.stage == "dpo":
            _check_keys(self)  # first, because LLaMA-Factory's own checks compare these values
        given = self.dpo_label_smoothing
        self.dpo_label_smoothing: float = 0.0  # LLaMA-Factory lets `sigmoid` alone have it
        super().__post_init__()
        self.dpo_label_smoothing = given
        if self.stage == "dpo":
            self.objective: Objective = objective_of(self)
            self.use_ref_model = self.objective.needs_reference
            self.pref_loss = self.objective.name  # as text, for LLaMA-Factory
        else:
            own = [key for key in (*OWN_KEYS, *OTHER_OWN_KEYS) if getattr(self, key) is not None]
            if own:
                raise ValueError(f"`{own[0]}` belongs to `stage: dpo`: remove it from this `stage: {self.stage}` run.")

    @property
    def refinement_prompt(self) -> str | None:
        """The text in front of the augmented prompts, or None if no loss has a refinement term."""
        if self.objective.refined is None:
            return None
        return SR_PROMPT if self.sr_prompt is None else self.sr_prompt

    @property
    def described(self) -> str:
        """The objective, and what else changes it, like `sigmoid(beta=0.1, …), pref_wpo=True`."""
        keys = ("pref_ftx", "pref_bco_weight", "ld_alpha", "ld_alpha_reference", "pref_wpo", *COLUMN_KEYS)
        keys += ("pref_ranked_weights",)
        return ", ".join([str(self.objective), *(f"{key}={getattr(self, key)}" for key in keys if getattr(self, key))])

    @property
    def weights_by_gap(self) -> bool:
        """Whether the pairs of a row with more than two answers weigh as much as their scores differ."""
        return self.pref_ranked_weights == BY_GAP

    @property
    def data_columns(self) -> list[str]:
        """The columns of the data that the recipe names: of weights, and of scores."""
        return [name for key in COLUMN_KEYS if getattr(self, key) is not None for name in split(getattr(self, key))]


def extend(base: type) -> type:
    """LLaMA-Factory's `FinetuningArguments` with the plugin's keys; the class goes by the base's own name."""
    extended: type = dataclass(type(base.__name__, (PreferenceArguments, base), {"__doc__": base.__doc__}))
    extended.__module__, extended.__qualname__ = base.__module__, base.__qualname__
    return extended


def _check_keys(args: PreferenceArguments) -> None:
    """Refuse values of the wrong type or range: a YAML value arrives here as it was written."""
    defaults = {each.name: each.default for each in fields(args)}
    for key, (wanted, accepts) in NUMBERS.items():
        value = getattr(args, key)
        if value is None and defaults[key] is not None:
            raise ValueError(f"`{key}` is empty: write {wanted}, or remove the key.")
        if value is not None and not (is_number(value) and accepts(value)):
            raise ValueError(f"`{key}` is {shown(value)}: write {wanted}.")
    kinds: dict[str, type] = dict.fromkeys(
        ("pref_loss_file", "sr_prompt", "ref_log_probs_cache_dir", "f_divergence"), str
    )
    kinds |= dict.fromkeys(("precompute_ref_log_probs", "ipo_length_normalize", "share_prefix"), bool)
    kinds |= dict.fromkeys(("pref_stop_on_degeneration", "ld_alpha_reference", "pref_wpo"), bool)
    for key, kind in kinds.items():
        value = getattr(args, key)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{key}` is {shown(value)}: write a value of type {kind.__name__}.")
    names = split(args.pref_loss)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"`pref_loss` is {shown(args.pref_loss)}: write the name of a loss, or a list of names.")
    for key, most in COLUMN_KEYS.items():
        names = split(getattr(args, key))
        if names != [None] and not (0 < len(names) <= most and all(isinstance(name, str) and name for name in names)):
            wanted = "the name of a column" if most == 1 else "the name of a column, or of two"
            raise ValueError(f"`{key}` is {shown(getattr(args, key))}: write {wanted}.")
    if args.pref_ranked_weights not in (None, EQUAL, BY_GAP):
        raise ValueError(f"`pref_ranked_weights` is {shown(args.pref_ranked_weights)}: write {EQUAL} or {BY_GAP}.")
    if args.ref_log_probs_cache_dir is not None:
        named_path("ref_log_probs_cache_dir", args.ref_log_probs_cache_dir)
