"""The language-model head: hidden states -> ORPO's loss and its gradients. Logits of one row live at a time.

A pair never leaves its row and the step's counts are known beforehand, so a row's logits give its log-probabilities,
its share of the loss, and the gradients of that at once: three matmuls, none of them computed again, and then the next
row. Where even one row's logits are too many, they are computed in chunks, and again for the gradients: four matmuls.
Shapes: B rows, T tokens, C tokens of a chunk, D model, V vocabulary, S pair slots of a row.
"""

import contextlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from orpo_jax import loss
from orpo_jax.packing import Rows
from orpo_jax.sharding import BATCH_AXES, weight_sharding

Array = jax.Array
Sums = dict[str, Array]

# Bytes of float32 logits that may live at a time on one device: a row of 2,048 tokens by 152k words passes whole.
LOGITS_BUDGET = 3 * 2**29


def precision(dtype: jnp.dtype) -> Any:
    """Returns the context in which float32 matmuls are float32 on accelerators too, which else round their inputs."""
    return jax.default_matmul_precision("float32") if dtype == jnp.float32 else contextlib.nullcontext()


def logits(hidden: Array, weight_VD: Array, bias_V: Array | None = None, softcap: float | None = None) -> Array:
    """Returns float32 logits [..., V] of hidden states [..., D]; the weight is cast to the type of those."""
    result = jax.lax.dot_general(hidden, weight_VD.astype(hidden.dtype), (((hidden.ndim - 1,), (1,)), ((), ())),
                                 preferred_element_type=jnp.float32)
    if bias_V is not None:
        result += bias_V.astype(jnp.float32)
    return result if softcap is None else softcap * jnp.tanh(result / softcap)


def num_chunks(T: int, V: int) -> int:
    """Returns the least divisor of T that cuts a row into chunks whose logits stay under the budget."""
    need = T * V * 4 / LOGITS_BUDGET
    return next(n for n in range(1, T + 1) if T % n == 0 and (n >= need or n == T))


class Settings(NamedTuple):
    beta: float
    # Chunks of a row: 1 keeps the logits of a row for its gradients, more compute them twice.
    chunks: int = 1
    softcap: float | None = None


class Counts(NamedTuple):
    """The denominators of a whole optimiser step."""

    nll_weight: Any  # float32, sum of nll_weights
    pairs: Any  # float32, pairs that count


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def orpo(settings: Settings, hidden_BTD: Array, weight_VD: Array, bias_V: Array | None, rows: Rows,
         counts: Counts) -> tuple[Array, Sums]:
    """Returns the rows' part of the step's loss, and every sum of its metrics (loss.py); float32.

    Gradients of hidden states, weight and bias are those of the loss: the sums are for reading, and their cotangents
    are ignored. Undifferentiated it makes none; a weight that is not differentiated (a frozen head) costs none.
    """
    return _on_mesh(settings, (False, False, False), hidden_BTD, weight_VD, bias_V, rows, counts)[0]


def _forward(settings: Settings, hidden: Any, weight: Any, bias: Any, rows: Any, counts: Any) -> tuple[Any, Any]:
    wanted = tuple(x is not None and x.perturbed for x in (hidden, weight, bias))
    args = jax.tree.map(lambda x: x.value, (hidden, weight, bias, rows, counts), is_leaf=lambda x: hasattr(x, "value"))
    return _on_mesh(settings, wanted, *args)


def _backward(settings: Settings, grads: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    scale = cotangents[0]
    scaled = [None if g is None else (scale * g.astype(jnp.float32)).astype(g.dtype) for g in grads]
    return *scaled, None, None


orpo.defvjp(_forward, _backward, symbolic_zeros=True)


def _on_mesh(settings: Settings, wanted: tuple[bool, bool, bool], hidden_BTD: Array, weight_VD: Array,
             bias_V: Array | None, rows: Rows, counts: Counts) -> tuple[tuple[Array, Sums], tuple]:
    """Runs each device's rows on it: the weight is gathered once, and its gradient lies as it does."""
    mesh = jax.sharding.get_abstract_mesh()
    local = partial(_local, settings, wanted)
    if mesh.empty:
        return local(None, hidden_BTD, weight_VD, bias_V, rows, counts)
    weight_spec = weight_sharding(mesh, "unembed", "vd", weight_VD.shape).spec
    bias_spec, by_row = P(weight_spec[0]), P(BATCH_AXES)
    grad_specs = [spec if want else P() for want, spec in zip(wanted, (by_row, weight_spec, bias_spec), strict=True)]
    sharded = jax.shard_map(
        partial(local, weight_spec), mesh=mesh, in_specs=(by_row, weight_spec, bias_spec, by_row, P()),
        out_specs=(P(), tuple(grad_specs)), check_vma=False)
    return sharded(hidden_BTD, weight_VD, bias_V, rows, counts)


def _local(settings: Settings, wanted: tuple[bool, bool, bool], weight_spec: P | None, hidden_BTD: Array,
           weight_VD: Array, bias_V: Array | None, rows: Rows, counts: Counts) -> tuple[tuple[Array, Sums], tuple]:
    """Returns the loss and sums of all devices' rows, and the gradients: of this device's rows, of all for weights."""
    vocab_axis, model_axis = weight_spec or (None, None)
    whole_VD = weight_VD.astype(hidden_BTD.dtype)
    if model_axis is not None:
        whole_VD = jax.lax.all_gather(whole_VD, model_axis, axis=1, tiled=True)

    def one_row(grads: Any, row: tuple[Array, Rows]) -> tuple[Any, Any]:
        part, dhidden_TD, grads = _row(settings, wanted, vocab_axis, *row, whole_VD, bias_V, counts, grads)
        return grads, (part, dhidden_TD)

    none = [jnp.zeros(x.shape, jnp.float32) if want else None for want, x in zip(wanted[1:], (whole_VD, bias_V),
                                                                                strict=True)]
    (dweight_VD, dbias_V), (parts, dhidden_BTD) = jax.lax.scan(one_row, tuple(none), (hidden_BTD, rows))
    result = jax.tree.map(lambda x: jnp.sum(x, axis=0), parts)
    if weight_spec is not None:
        result = jax.lax.psum(result, BATCH_AXES)
        if vocab_axis is not None and wanted[0]:
            dhidden_BTD = jax.lax.psum(dhidden_BTD, vocab_axis)
        if wanted[1]:
            summed_over = [axis for axis in BATCH_AXES if axis != model_axis]
            if model_axis is not None:
                dweight_VD = jax.lax.psum_scatter(dweight_VD, model_axis, scatter_dimension=1, tiled=True)
            dweight_VD = jax.lax.psum(dweight_VD, summed_over)
        if wanted[2]:
            dbias_V = jax.lax.psum(dbias_V, BATCH_AXES)
    if wanted[0]:
        dhidden_BTD = dhidden_BTD.astype(hidden_BTD.dtype)
    types = (None, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
    weights = [g if g is None else g.astype(t) for g, t in zip((dweight_VD, dbias_V), types[1:], strict=True)]
    return result, (dhidden_BTD, *weights)


def _row(settings: Settings, wanted: tuple[bool, bool, bool], vocab_axis: str | None, hidden_TD: Array, row: Rows,
         weight_VD: Array, bias_V: Array | None, counts: Counts, grads: Any) -> tuple[Any, Array | None, Any]:
    """Returns a row's loss and sums, the gradient of its hidden states, and `grads` with its part added."""
    first = 0 if vocab_axis is None else jax.lax.axis_index(vocab_axis) * weight_VD.shape[0]
    across = (lambda x: x) if vocab_axis is None else partial(jax.lax.psum, axis_name=vocab_axis)
    words_V = first + jnp.arange(weight_VD.shape[0])

    def of_chunk(hidden_CD: Array) -> Array:
        return logits(hidden_CD, weight_VD, bias_V, settings.softcap)

    def read(hidden_CD: Array, targets_C: Array, logits_CV: Array) -> tuple[Array, Array, Array]:
        """Returns the logit of each target, the log of the sum of all exps, and the sum of logits."""
        max_C = jax.lax.stop_gradient(jnp.max(logits_CV, axis=-1))
        if vocab_axis is not None:
            max_C = jax.lax.pmax(max_C, vocab_axis)
        at_C = jnp.clip(targets_C - first, 0, weight_VD.shape[0] - 1)
        target_C = jnp.where(words_V[at_C] == targets_C, jnp.take_along_axis(logits_CV, at_C[:, None], 1)[:, 0], 0.0)
        sum_C = across(jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=-1))
        return across(target_C), max_C + jnp.log(sum_C), across(jnp.sum(logits_CV, axis=-1))

    def pull_back(grads: Any, hidden_CD: Array, targets_C: Array, logits_CV: Array, lse_C: Array,
                  dlogps_C: Array) -> tuple[Any, Array | None]:
        """Adds a chunk's gradients of weight and bias to `grads`, and returns that of its hidden states."""
        probs_CV = jnp.exp(logits_CV - lse_C[:, None])
        dlogits_CV = jnp.where(words_V == targets_C[:, None], 1 - probs_CV, -probs_CV) * dlogps_C[:, None]
        if settings.softcap is not None:
            dlogits_CV *= 1 - jnp.square(logits_CV / settings.softcap)
        dweight_VD, dbias_V = grads
        if dbias_V is not None:
            dbias_V += jnp.sum(dlogits_CV, axis=0)
        dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
        if dweight_VD is not None:
            dweight_VD += jnp.einsum("cv,cd->vd", dlogits_CV, hidden_CD, preferred_element_type=jnp.float32)
        dhidden_CD = jnp.einsum("cv,vd->cd", dlogits_CV, weight_VD, preferred_element_type=jnp.float32)
        return (dweight_VD, dbias_V), dhidden_CD if wanted[0] else None

    def loss_of(logps_T: Array) -> tuple[Array, Sums]:
        by_row = jax.tree.map(lambda x: x[None], row)
        sums = loss.orpo_sums(logps_T[None], mean_logits_T[None], by_row.nll_weights, by_row.segments,
                              by_row.pair_weights)
        return loss.step_loss(sums, beta=settings.beta, nll_weight=counts.nll_weight, pairs=counts.pairs), sums

    T = hidden_TD.shape[0]
    split = lambda *xs: tuple(x.reshape(settings.chunks, T // settings.chunks, *x.shape[1:]) for x in xs)
    join = lambda xs: jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), xs)
    kept_TV = of_chunk(hidden_TD) if settings.chunks == 1 else None
    if kept_TV is not None:
        target_T, lse_T, sum_T = read(hidden_TD, row.targets, kept_TV)
    else:
        target_T, lse_T, sum_T = join(jax.lax.map(
            lambda chunk: read(*chunk, of_chunk(chunk[0])), split(hidden_TD, row.targets)))
    mean_logits_T = sum_T / (weight_VD.shape[0] if vocab_axis is None else
                             weight_VD.shape[0] * jax.lax.axis_size(vocab_axis))
    if not any(wanted):
        return loss_of(target_T - lse_T), None, grads
    part, dlogps_T = jax.value_and_grad(loss_of, has_aux=True)(target_T - lse_T)
    if kept_TV is not None:
        grads, dhidden_TD = pull_back(grads, hidden_TD, row.targets, kept_TV, lse_T, dlogps_T)
        return part, dhidden_TD, grads
    grads, dhidden = jax.lax.scan(
        lambda grads, chunk: pull_back(grads, chunk[0], chunk[1], of_chunk(chunk[0]), *chunk[2:]), grads,
        split(hidden_TD, row.targets, lse_T, dlogps_T))
    return part, join(dhidden), grads
