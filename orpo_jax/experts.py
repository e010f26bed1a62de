"""A mixture of experts' mlps: each token through the few experts that its router chose; no token is dropped.

Shapes: B rows, T tokens, M = B * T, C experts that a token uses, X experts, D model, E an expert's mlp, S = M * C uses
sorted by expert, P places of blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from orpo_jax.sharding import BATCH_AXES, parts

Array = jax.Array
Weights = tuple[Array, Array, Array]  # gate and up [X, D, E], down [X, D, E]

# Uses of one expert that are multiplied at a time where XLA has no product of ragged groups.
BLOCK = 32


class Routed(NamedTuple):
    """Sums over tokens, each with its weight, and over layers; float32 [X]."""

    counts: Array  # how often each expert was used
    probs: Array  # the router's probability of each expert


def route(logits_BTX: Array, num_used: int, renormalise: bool) -> tuple[Array, Array, Array]:
    """Returns the router's probabilities [B, T, X] and, for the experts used, their weights and indices [B, T, C].

    Everything is float32: near a tie, rounding would choose another expert.
    """
    probs_BTX = jax.nn.softmax(logits_BTX.astype(jnp.float32), axis=-1)
    weights_BTC, chosen_BTC = jax.lax.top_k(probs_BTX, num_used)
    if renormalise:
        weights_BTC /= jnp.sum(weights_BTC, axis=-1, keepdims=True)
    return probs_BTX, weights_BTC, chosen_BTC


def routed(probs_BTX: Array, chosen_BTC: Array, token_weights_BT: Array) -> Routed:
    uses_BTX = jnp.sum(jax.nn.one_hot(chosen_BTC, probs_BTX.shape[-1], dtype=jnp.float32), axis=2)
    return Routed(*(jnp.einsum("bt,btx->x", token_weights_BT, x_BTX) for x_BTX in (uses_BTX, probs_BTX)))


def balance_loss(routed: Routed, counts_X: Array, total_weight: Any) -> Array:
    """Returns the part of the load-balancing loss that `routed` contributes; the parts of a step add up to it.

    counts_X: the whole step's Routed.counts, which have no gradient. total_weight: of its tokens, over all layers.
    Source: transformers' load_balancing_loss_func; Fedus et al. 2021 (arXiv:2101.03961), Eqs. 4 to 6.
    """
    share_X = jax.lax.stop_gradient(counts_X) / total_weight
    return counts_X.shape[0] * jnp.sum(share_X * routed.probs) / total_weight


def mix(activation: Callable[[Array], Array], x_BTD: Array, weights_BTC: Array, chosen_BTC: Array, experts: Weights,
        unroll: bool = False) -> Array:
    """Returns the weighted sum of the chosen experts' gated mlps, [B, T, D].

    On a mesh each device runs the experts that it holds on the tokens of all devices along `expert`. unroll: whether
    blocks are laid out one by one, so that the compiler counts them all.
    """
    run = partial(_on_device, activation, unroll)
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(0, x_BTD, weights_BTC, chosen_BTC, experts)
    B, T, _ = x_BTD.shape
    # A few rows to go on from, which the mesh may not divide, are filled up with tokens that weigh nothing.
    fill = ((0, -B % parts(mesh.shape, BATCH_AXES)), (0, -T % mesh.shape["sequence"]), (0, 0))
    x_BTD, weights_BTC, chosen_BTC = (jnp.pad(x, fill) for x in (x_BTD, weights_BTC, chosen_BTC))
    axes = tuple(axis for axis in ("expert", "tensor") if mesh.shape[axis] > 1)
    by_token, by_expert = P(BATCH_AXES, "sequence"), P("expert", None, "tensor")

    def on_device(x_BTD: Array, weights_BTC: Array, chosen_BTC: Array, experts: Weights) -> Array:
        first: Any = 0
        if "expert" in axes:
            first = jax.lax.axis_index("expert") * experts[0].shape[0]
            x_BTD, weights_BTC, chosen_BTC = (jax.lax.all_gather(x, "expert", axis=0, tiled=True)
                                              for x in (x_BTD, weights_BTC, chosen_BTC))
        y_BTD = run(first, x_BTD, weights_BTC, chosen_BTC, experts)
        if "tensor" in axes:
            y_BTD = jax.lax.psum(y_BTD, "tensor")
        if "expert" in axes:
            y_BTD = jax.lax.psum_scatter(y_BTD, "expert", scatter_dimension=0, tiled=True)
        return y_BTD

    return jax.shard_map(on_device, mesh=mesh, in_specs=(by_token,) * 3 + ((by_expert,) * 3,),
                         out_specs=by_token, check_vma=False)(x_BTD, weights_BTC, chosen_BTC, experts)[:B, :T]


def _on_device(activation: Callable[[Array], Array], unroll: bool, first: Any, x_BTD: Array, weights_BTC: Array,
               chosen_BTC: Array, experts: Weights) -> Array:
    """Returns what the experts from `first` on, which this device holds, add to each token."""
    B, T, D = x_BTD.shape
    num_experts, num_used = experts[0].shape[0], chosen_BTC.shape[-1]
    mine_S = chosen_BTC.reshape(-1) - first
    # The others' uses come last, and belong to no group.
    mine_S = jnp.where((mine_S >= 0) & (mine_S < num_experts), mine_S, num_experts)
    sizes_X = jnp.sum(jax.nn.one_hot(mine_S, num_experts, dtype=jnp.int32), axis=0)
    order_S = jnp.argsort(mine_S, stable=True)
    # Token by token, as chosen_BTC has them; 0 of the experts of other devices.
    y_SD = jax.lax.platform_dependent(
        x_BTD.reshape(-1, D), order_S, sizes_X, experts,
        cpu=partial(_in_blocks, activation, unroll), default=partial(_ragged, activation))
    return jnp.sum(y_SD.reshape(B, T, num_used, D) * weights_BTC[..., None].astype(x_BTD.dtype), axis=2)


# Uses are a permutation of the tokens' own order, C to a token: both gathers have gathers for gradients, where autodiff
# would make scatters, which are slow on accelerators.


@jax.custom_vjp
def _sorted(x_MD: Array, order_S: Array) -> Array:
    """Returns the token of each use, sorted by expert; order_S: the use that each place holds."""
    return x_MD[order_S // (len(order_S) // len(x_MD))]


@jax.custom_vjp
def _unsorted(y_SD: Array, order_S: Array) -> Array:
    """Returns what each use gave, token by token."""
    return y_SD[jnp.argsort(order_S)]


_sorted.defvjp(
    lambda x_MD, order_S: (_sorted(x_MD, order_S), (order_S, x_MD.shape)),
    lambda kept, g_SD: (jnp.sum(_unsorted(g_SD, kept[0]).reshape(kept[1][0], -1, kept[1][1]), axis=1), None))
_unsorted.defvjp(lambda y_SD, order_S: (_unsorted(y_SD, order_S), order_S),
                 lambda order_S, g_SD: (g_SD[order_S], None))


def _ragged(activation: Callable[[Array], Array], x_MD: Array, order_S: Array, sizes_X: Array, experts: Weights
            ) -> Array:
    """Returns the output of each use of an expert, [S, D]; 0 where no expert of this device is used."""
    gate_XDE, up_XDE, down_XDE = experts
    x_SD = _sorted(x_MD, order_S)
    h_SE = activation(jax.lax.ragged_dot(x_SD, gate_XDE, sizes_X)) * jax.lax.ragged_dot(x_SD, up_XDE, sizes_X)
    y_SD = jax.lax.ragged_dot(h_SE, down_XDE.swapaxes(1, 2), sizes_X)
    # What lies beyond the groups is up to the platform.
    return _unsorted(jnp.where((jnp.arange(len(order_S)) < jnp.sum(sizes_X))[:, None], y_SD, 0), order_S)


def _in_blocks(activation: Callable[[Array], Array], unroll: bool, x_MD: Array, order_S: Array, sizes_X: Array,
               experts: Weights) -> Array:
    """Returns the same, by blocks that belong to one expert each: XLA multiplies ragged groups with every expert on a
    CPU, 16 times the work of two experts out of 32.
    """
    S, X = len(order_S), len(sizes_X)
    blocks = -(-S // BLOCK) + X  # each expert may leave most of a block empty
    sizes_in_blocks_X = -(-sizes_X // BLOCK)
    ends_X = jnp.cumsum(sizes_in_blocks_X)
    expert_P = jnp.minimum(jnp.searchsorted(ends_X, jnp.arange(blocks), side="right"), X - 1)
    # Where each sorted use goes: past its expert's first block, by its rank among that expert's uses.
    rank = jnp.arange(S)
    sorted_expert = jnp.searchsorted(jnp.cumsum(sizes_X), rank, side="right")
    known = jnp.minimum(sorted_expert, X - 1)
    starts_X = jnp.cumsum(sizes_X) - sizes_X
    place = (ends_X - sizes_in_blocks_X)[known] * BLOCK + rank - starts_X[known]
    place = jnp.where(sorted_expert < X, place, blocks * BLOCK)  # none: written nowhere, read as 0
    use = jnp.full(blocks * BLOCK, S).at[place].set(rank, mode="drop")
    x_PD = _sorted(x_MD, order_S).at[use].get(mode="fill", fill_value=0)
    y_PCD: Any = _blocks(activation, unroll, x_PD.reshape(blocks, BLOCK, -1), expert_P, experts)
    y_PD = y_PCD.reshape(x_PD.shape)
    return _unsorted(y_PD.at[place].get(mode="fill", fill_value=0), order_S)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(activation: Callable[[Array], Array], unroll: bool, x_PCD: Array, expert_P: Array,
            experts: Weights) -> Array:
    """Returns each block through its expert. The gradient of the experts is added up in place."""
    def one(_: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        x_CD, expert = block
        return None, _mlp(activation, x_CD, tuple(weight[expert] for weight in experts))

    return jax.lax.scan(one, None, (x_PCD, expert_P), unroll=unroll)[1]


def _mlp(activation: Callable[[Array], Array], x_CD: Array, expert: Any) -> Array:
    gate_DE, up_DE, down_DE = expert
    return (activation(x_CD @ gate_DE) * (x_CD @ up_DE)) @ down_DE.T


def _blocks_forward(activation: Any, unroll: bool, x_PCD: Array, expert_P: Array, experts: Weights) -> Any:
    return _blocks(activation, unroll, x_PCD, expert_P, experts), (x_PCD, expert_P, experts)


def _blocks_backward(activation: Any, unroll: bool, residuals: Any, dy_PCD: Array) -> Any:
    x_PCD, expert_P, experts = residuals

    def one(dexperts: Any, block: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        x_CD, expert, dy_CD = block
        pull_back = jax.vjp(partial(_mlp, activation), x_CD, tuple(weight[expert] for weight in experts))[1]
        dx_CD, dexpert = pull_back(dy_CD)
        return tuple(all_.at[expert].add(one_) for all_, one_ in zip(dexperts, dexpert, strict=True)), dx_CD

    dexperts, dx_PCD = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, experts), (x_PCD, expert_P, dy_PCD),
                                    unroll=unroll)
    return dx_PCD, None, dexperts


_blocks.defvjp(_blocks_forward, _blocks_backward)
