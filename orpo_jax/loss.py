"""ORPO (Hong et al. 2024, arXiv:2403.07691) as pure functions of token log-probabilities.

    L = NLL + beta * mean over pairs of L_OR                                              (Eq. 6, beta is its lambda)
    L_OR = -log sigmoid(log_odds(chosen) - log_odds(rejected))                            (Eqs. 4, 5 and 7)
    log_odds(y) = logp(y) - log(1 - exp(logp(y))), logp(y) the mean over response tokens  (Eqs. 3, 4)

Everything is a weighted sum, so that micro-batches, devices and packed rows add up to one number: `orpo_sums` of each
part, added, then `step_loss` and `metrics` of the whole. Metrics have TRL's names and meanings.
Shapes: B rows, T tokens of a row, S pair slots of a row, P pairs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

# exp(-1e-6) is the float32 nearest to 1 at which log(1 - p) and its gradient still have six digits.
MAX_LOGP = -1e-6


def log_odds(logps_P: Array) -> Array:
    """Returns log(p / (1 - p)) for mean log-probabilities in nats, float32, finite from 0 to -200 and beyond."""
    logps_P = jnp.minimum(logps_P.astype(jnp.float32), MAX_LOGP)
    return logps_P - jax.nn.log1mexp(-logps_P)


def odds_ratio_terms(chosen_logps_P: Array, rejected_logps_P: Array) -> tuple[Array, Array]:
    """Returns L_OR and the log odds ratio of each pair, float32, shape [P].

    logps are mean log-probabilities per response token, in nats, at most 0. Weights, beta and the step's counts are
    the caller's: a pair's terms do not depend on the pairs beside it. Source: Eqs. 3-7.
    """
    log_odds_ratio_P = log_odds(chosen_logps_P) - log_odds(rejected_logps_P)
    return -jax.nn.log_sigmoid(log_odds_ratio_P), log_odds_ratio_P


def orpo_loss(chosen_logps_P: Array, rejected_logps_P: Array, nll_loss: Array, *, beta: float,
              weights_P: Array | None = None) -> tuple[Array, dict[str, Array]]:
    """Returns the ORPO loss and TRL's metrics of one whole batch, for people who write their own loop.

    chosen_logps_P, rejected_logps_P: mean log-probability per response token. nll_loss: the scalar NLL of the chosen
    sequences. weights_P: 1 for a pair that counts (the default), 0 for one that does not.
    """
    weights_P = jnp.ones_like(chosen_logps_P, jnp.float32) if weights_P is None else weights_P.astype(jnp.float32)
    sums = pair_sums(chosen_logps_P, rejected_logps_P, weights_P)
    sums |= {"nll": jnp.asarray(nll_loss, jnp.float32), "nll_weight": jnp.ones((), jnp.float32)}
    return step_loss(sums, beta=beta, nll_weight=1.0, pairs=jnp.maximum(sums["pairs"], 1.0)), metrics(sums, beta=beta)


def pair_sums(chosen_logps_P: Array, rejected_logps_P: Array, weights_P: Array) -> dict[str, Array]:
    """Returns the weighted sums over pairs that the odds-ratio loss and its metrics are made of, float32 scalars."""
    loss_P, log_odds_ratio_P = odds_ratio_terms(chosen_logps_P, rejected_logps_P)
    terms = {
        "pairs": jnp.ones_like(loss_P),
        "odds_ratio_loss": loss_P,
        "log_odds_chosen": log_odds_ratio_P,
        "logps/chosen": chosen_logps_P,
        "logps/rejected": rejected_logps_P,
        "rewards/accuracies": (chosen_logps_P > rejected_logps_P).astype(jnp.float32),
    }
    return {name: jnp.sum(weights_P * term_P) for name, term_P in terms.items()}


def orpo_sums(logps_BT: Array, mean_logits_BT: Array, nll_weights_BT: Array, segments_BT: Array,
              pair_weights_BS: Array) -> dict[str, Array]:
    """Returns every sum of the loss and the metrics over some rows, float32 scalars.

    logps_BT: log-probability of each position's target. mean_logits_BT: the mean of its logits over the vocabulary.
    segments_BT: 2s+1 where the target is a chosen, 2s+2 where it is a rejected response token of the row's pair slot
    s, 0 elsewhere. pair_weights_BS: 0 in an empty slot, and for a pair with an empty response.
    """
    num_slots = pair_weights_BS.shape[1]
    in_segment_BTC = segments_BT[..., None] == jnp.arange(1, 2 * num_slots + 1)  # C: chosen and rejected by turns

    def per_response(values_BT: Array) -> Array:  # [B, S, 2]
        sums_BC = jnp.sum(jnp.where(in_segment_BTC, values_BT[..., None], 0.0), axis=1)
        return sums_BC.reshape(-1, num_slots, 2)

    counts_BS2 = per_response(jnp.ones_like(logps_BT))
    # An empty response has no mean. Its pair weighs 0; -1 keeps its terms and their gradients finite.
    mean_logps_BS2 = jnp.where(counts_BS2 > 0, per_response(logps_BT) / jnp.maximum(counts_BS2, 1), -1.0)
    weights_BS2 = pair_weights_BS[..., None]
    logits_2 = jnp.sum(weights_BS2 * per_response(jax.lax.stop_gradient(mean_logits_BT)), axis=(0, 1))
    tokens_2 = jnp.sum(weights_BS2 * counts_BS2, axis=(0, 1))
    return pair_sums(mean_logps_BS2[..., 0], mean_logps_BS2[..., 1], pair_weights_BS) | {
        "nll": -jnp.sum(nll_weights_BT * logps_BT),
        "nll_weight": jnp.sum(nll_weights_BT),
        "logits/chosen": logits_2[0],
        "logits/rejected": logits_2[1],
        "chosen_tokens": tokens_2[0],
        "rejected_tokens": tokens_2[1],
    }


def step_loss(sums: Mapping[str, Array], *, beta: float, nll_weight: Any, pairs: Any) -> Array:
    """Returns the part of an optimiser step's loss that `sums` contributes; the parts of a step add up to its loss.

    nll_weight, pairs: the denominators of the whole step, not of this part.
    """
    return sums["nll"] / nll_weight + beta * sums["odds_ratio_loss"] / pairs


def metrics(sums: Mapping[str, Any], *, beta: float) -> dict[str, Any]:
    """Returns TRL's metrics from sums over one step, several steps or an evaluation: exact weighted means."""
    def mean(name: str, weight: str) -> Any:
        return sums[name] / jnp.maximum(sums[weight], 1e-9) if isinstance(sums[name], Array) else (
            sums[name] / max(sums[weight], 1e-9))

    logps = {side: mean(f"logps/{side}", "pairs") for side in ("chosen", "rejected")}
    odds_ratio_loss = mean("odds_ratio_loss", "pairs")
    nll_loss = mean("nll", "nll_weight")
    result = {
        "loss": nll_loss + beta * odds_ratio_loss,
        "nll_loss": nll_loss,
        "log_odds_ratio": -odds_ratio_loss,
        "log_odds_chosen": mean("log_odds_chosen", "pairs"),
        "rewards/chosen": beta * logps["chosen"],
        "rewards/rejected": beta * logps["rejected"],
        "rewards/accuracies": mean("rewards/accuracies", "pairs"),
        "rewards/margins": beta * (logps["chosen"] - logps["rejected"]),
        "logps/chosen": logps["chosen"],
        "logps/rejected": logps["rejected"],
    }
    if "aux_loss" in sums:
        result["aux_loss"] = mean("aux_loss", "steps")
        result["loss"] += mean("weighted_aux_loss", "steps")
    if "chosen_tokens" in sums:
        result |= {f"logits/{side}": mean(f"logits/{side}", f"{side}_tokens") for side in ("chosen", "rejected")}
    return result
