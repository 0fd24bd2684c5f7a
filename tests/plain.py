"""The losses once more, as naive formulas in float64: what the package is compared with. D_w, D_l as in the papers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llamafactory_ext import PairLogps


def log_sigma(x: Tensor) -> Tensor:
    return torch.log(1 / (1 + torch.exp(-x)))


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.zeros_like(x))


def plain_loss(name: str, pairs: PairLogps, **hyper: Any) -> Tensor:
    """The loss `name` of pairs in float64, shape `(batch,)`; every hyper-parameter must be given."""
    w, l = pairs.policy_chosen, pairs.policy_rejected  # noqa: E741
    n_w, n_l = pairs.chosen_length, pairs.rejected_length
    beta = hyper.get("beta")
    if name == "orpo":
        p_w, p_l = torch.exp(w / n_w), torch.exp(l / n_l)
        ratio = (p_w / (1 - p_w)) / (p_l / (1 - p_l))
        return -w / n_w - beta * log_sigma(torch.log(ratio))
    if name == "simpo":
        return -log_sigma(beta * w / n_w - beta * l / n_l - hyper["simpo_gamma"])

    if name == "sft":
        return -w / n_w.double().mean()
    if name == "rrhf":
        return hyper["rrhf_weight"] * relu(l / n_l - w / n_w) - w
    if name == "cringe":
        gate = 1 / (1 + torch.exp((w - l - hyper["cringe_bias"]) / hyper["cringe_tau"]))
        return gate * (-w + hyper["cringe_alpha"] * pairs.contrast)

    d_w, d_l = w - pairs.reference_chosen, l - pairs.reference_rejected
    if name == "hinge":
        return relu(1 - beta * (d_w - d_l))
    if name == "ipo":
        scale_w, scale_l = (n_w, n_l) if hyper["length_normalize"] else (1, 1)
        return (d_w / scale_w - d_l / scale_l - 1 / (2 * beta)) ** 2
    if name == "kto_pair":
        kl_w, kl_l = relu(d_w.mean()), relu(d_l.mean())
        return ((1 - 1 / (1 + torch.exp(-beta * (d_w - kl_l)))) + (1 - 1 / (1 + torch.exp(-beta * (kl_w - d_l))))) / 2
    if name in ("exo_pair", "aot", "aot_unpaired"):
        return _plain_with_smoothing(name, pairs, beta, hyper["label_smoothing"])
    if name == "pl_dpo":
        return _plain_plackett_luce(pairs, beta * (d_w - d_l))
    sigma_w, sigma_l = (1 / (1 + torch.exp(-beta * d)) for d in (d_w, d_l))
    others = {
        "squared_po": lambda: -log_sigma(beta * (d_w * torch.exp(-d_w) - d_l * torch.exp(-d_l))),
        "minor_sft": lambda: -2 / beta * torch.log(sigma_w) / n_w,
        "nca_pair": lambda: -torch.log(sigma_w) - (torch.log(1 - sigma_w) + torch.log(1 - sigma_l)) / 2,
        "bco_pair": lambda: -torch.log(sigma_w) - torch.log(1 - sigma_l),
        "sppo_hard": lambda: (d_w - 0.5 / beta) ** 2 + (d_l + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - sigma_w + sigma_l,
        "apo_down": lambda: sigma_w + 1 - 1 / (1 + torch.exp(-beta * (d_w - d_l))),
    }
    if name in others:
        return others[name]()
    # A constant: a number without a history, whatever was given.
    refined = hyper["sr_lambda"] * torch.tensor(pairs.refinement.tolist(), dtype=torch.float64)
    if name in ("sigmoid", "robust"):
        e, argument = hyper["label_smoothing"], beta * (d_w - d_l) - refined
        clean, swapped = -log_sigma(argument), -log_sigma(-argument)
        return (1 - e) * clean + e * swapped if name == "sigmoid" else ((1 - e) * clean - e * swapped) / (1 - 2 * e)
    if name == "discopop":
        rho = beta * (d_w - d_l) - refined
        m = 1 / (1 + torch.exp(-rho / hyper["discopop_tau"]))
        return (1 - m) * -log_sigma(rho) + m * torch.exp(-rho)
    if name == "sigmoid_norm":
        return -log_sigma(beta * (d_w / n_w - d_l / n_l) - refined)
    if name == "odpo":
        return -log_sigma(beta * (d_w - d_l) - hyper["odpo_alpha"] * torch.log(pairs.score_gap) - refined)
    if name == "minor_dpo":
        return -log_sigma(beta * d_w - beta * relu(d_l) - refined)
    if name == "dpop":
        return -log_sigma(beta * (d_w - d_l - hyper["dpop_lambda"] * relu(-d_w)) - refined)
    if name == "sr_dpo":
        return -log_sigma(beta * (d_w - d_l) - refined)
    if name == "sr_ipo":
        scale_w, scale_l = (n_w, n_l) if hyper["length_normalize"] else (1, 1)
        return (d_w / scale_w - d_l / scale_l - refined - 1 / (2 * beta)) ** 2
    raise KeyError(name)


def _plain_with_smoothing(name: str, pairs: PairLogps, beta: float, e: float) -> Tensor:
    policy = pairs.policy_chosen - pairs.policy_rejected
    reference = pairs.reference_chosen - pairs.reference_rejected
    margin = policy - reference
    if name == "exo_pair":
        q = 1 / (1 + torch.exp(-beta * margin))
        return q * torch.log(q / (1 - e)) + (1 - q) * torch.log((1 - q) / e)
    above, below = policy, reference
    if name == "aot_unpaired":
        above, below = pairs.policy_chosen - pairs.reference_chosen, pairs.policy_rejected - pairs.reference_rejected
    in_order = sorted(range(len(above)), key=lambda at: above[at].item())
    opposite = dict(zip(in_order, sorted(range(len(below)), key=lambda at: below[at].item()), strict=True))
    margins = torch.stack([above[at] - below[opposite[at]] for at in range(len(above))])
    return -(1 - e) * log_sigma(beta * margins) - e * log_sigma(-beta * margins)


def _plain_plackett_luce(pairs: PairLogps, argument: Tensor) -> Tensor:
    """Of each response, how likely it is to come before those that it beats: split among its pairs, times its row's."""
    alone = list(range(len(argument)))
    winners, rows = (alone if each is None else each.tolist() for each in (pairs.winner, pairs.group))
    values = []
    for winner, row in zip(winners, rows, strict=True):
        beaten = [at for at in alone if winners[at] == winner]
        first = 1 / (1 + sum(torch.exp(-argument[at]) for at in beaten))
        values.append(-torch.log(first) / len(beaten) * rows.count(row))
    return torch.stack(values)


def plain_logps(model: torch.nn.Module, tokenizer: Any, prompt: str, response: str) -> tuple[float, int]:
    """The summed log-probability of one response after one prompt, alone and without padding, and its length."""
    logits, tokens = plain_logits(model, tokenizer, prompt, response)
    logps = torch.log(torch.softmax(logits, dim=-1))
    return sum(logps[i, token].item() for i, token in enumerate(tokens)), len(tokens)


def plain_logits(model: torch.nn.Module, tokenizer: Any, prompt: str, response: str) -> tuple[torch.Tensor, list[int]]:
    """The logits that predict each token of a response, in float64, and the tokens."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0].double()
    return logits[len(prompt_ids) - 1 : -1], response_ids


def plain_contrast(logits: torch.Tensor, tokens: list[int]) -> float:
    """CRINGE's contrast of tokens with the most likely other one: -log(e^s* / (e^s* + e^s)), summed."""
    total = 0.0
    for row, token in zip(logits, tokens, strict=True):
        other = max(value.item() for index, value in enumerate(row) if index != token)
        total -= torch.log(torch.sigmoid(other - row[token])).item()
    return total


def plain_weight(logits: torch.Tensor, tokens: list[int]) -> float:
    """WPO's weight of a response: the geometric mean over tokens of p(y_t) / sum_v p(v)^2."""
    p = torch.softmax(logits, dim=-1)
    ratios = [p[i, token] / (p[i] ** 2).sum() for i, token in enumerate(tokens)]
    return torch.stack(ratios).log().mean().exp().item()
