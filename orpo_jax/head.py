"""The language-model head: hidden states -> ORPO's loss and its gradients. Logits of one row live at a time.

A pair never leaves its row and the step's counts are known beforehand, so a row's logits give its log-probabilities,
its share of the loss, and the gradients of that at once: three matmuls, none of them computed again, and then the next
row. Where even one row's logits are too many, they are computed in chunks, and again for the gradients: four matmuls.
Shapes: B rows, T tokens, C tokens of a chunk, D model, V vocabulary, S pair slots of a row.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec as P

from orpo_jax import loss
from orpo_jax.packing import Rows
from orpo_jax.sharding import BATCH_AXES, HEAD_AXES, names, weight_spec

Array = jax.Array
Sums = dict[str, Array]

# Bytes of float32 logits that may live at a time on one device: a row of 2,048 tokens by 152k words passes whole.
# (With a soft cap, a CPU holds their exps beside them.)
LOGITS_BUDGET = 3 * 2**29
# The logit of no word: its exp is 0, and its square finite.
NO_WORD = -1e9


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
    return next(n for n in range(1, T + 1) if T % n == 0 and (n * most_at_once(V) >= T or n == T))


def most_at_once(V: int) -> int:
    """Returns the most tokens whose logits fit the budget: a row of more computes its logits twice."""
    return LOGITS_BUDGET // (4 * V)


class Settings(NamedTuple):
    beta: float
    # Chunks of a row: 1 keeps its logits for the gradients, more compute them twice. None: as many as the budget asks.
    chunks: int | None = None
    softcap: float | None = None
    # Positions of a row that may have a weight in the loss; None: all.
    scored: int | None = None


class Counts(NamedTuple):
    """The denominators of a whole optimiser step."""

    nll_weight: Any  # float32, sum of nll_weights
    pairs: Any  # float32, pairs that count
    inputs: Any = 1.0  # float32, input tokens of all sequences, prompts of both


class Wanted(NamedTuple):
    """Which gradients are asked for."""

    hidden: bool
    weight: bool
    bias: bool


Gradients = tuple[Array | None, Array | None, Array | None]  # of hidden states, weight and bias


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def orpo(settings: Settings, hidden_BTD: Array, weight_VD: Array, bias_V: Array | None, rows: Rows,
         counts: Counts) -> tuple[Array, Sums]:
    """Returns the rows' part of the step's loss, and every sum of its metrics (loss.py); float32.

    Gradients of hidden states, weight and bias are those of the loss: the sums are for reading, and their cotangents
    are ignored. Undifferentiated it makes none; a weight that is not differentiated (a frozen head) costs none.
    """
    return _on_mesh(settings, Wanted(False, False, False), hidden_BTD, weight_VD, bias_V, rows, counts)[0]


def _forward(settings: Settings, *args: Any) -> tuple[Any, Any]:
    values = jax.tree.map(lambda x: x.value, args, is_leaf=lambda x: isinstance(x, CustomVJPPrimal))
    wanted = Wanted(*(x is not None and x.perturbed for x in args[:3]))
    result, grads = _on_mesh(settings, wanted, *values)
    return result, jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, tuple(
        x if want else None for x, want in zip(values, wanted, strict=False)))


def _backward(settings: Settings, grads: Gradients, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    of_loss = jnp.zeros(()) if isinstance(cotangents[0], SymbolicZero) else cotangents[0]
    return *jax.tree.map(lambda grad: of_loss.astype(grad.dtype) * grad, grads), None, None


orpo.defvjp(_forward, _backward, symbolic_zeros=True)


class Words(NamedTuple):
    """The words of the vocabulary whose logits a device makes."""

    index_V: Array  # of each; -1 for what only fills up the device's share
    total: int  # of all devices
    axes: tuple[str, ...] = ()  # of the mesh, along which they are split
    filled: bool = False


def _share(mesh: Any, axes: Sequence[str], total: int) -> Words:
    """Returns this device's words: those of its part along the first axis, of that along the second, and so on."""
    first, stop, size, filled = jnp.int32(0), total, total, False
    for axis in axes:
        filled |= size % mesh.shape[axis] > 0
        size = -(-size // mesh.shape[axis])
        first += jax.lax.axis_index(axis) * size
        stop = jnp.minimum(stop, first + size)
    index_V = first + jnp.arange(size)
    return Words(jnp.where(index_V < stop, index_V, -1), total, tuple(axes), filled)


def _on_mesh(settings: Settings, wanted: Wanted, hidden_BTD: Array, weight_VD: Array, bias_V: Array | None, rows: Rows,
             counts: Counts) -> tuple[tuple[Array, Sums], Gradients]:
    """Runs each device's rows on it and, of devices that share rows, along `tensor` and `sequence`, each one's words.

    The weight's parts come together once: along axes with rows of their own they are gathered, along the others parts
    of D are traded for parts of V. Its gradient goes back the same way, and is split as the weight is.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        words = Words(jnp.arange(weight_VD.shape[0]), weight_VD.shape[0])
        return _rows(settings, wanted, words, hidden_BTD, weight_VD.astype(hidden_BTD.dtype), bias_V, rows, counts)
    spec_VD, by_word = weight_spec(mesh, "vd", weight_VD.shape), weight_spec(mesh, "v", weight_VD.shape[:1])
    stored_V, stored_D = map(names, spec_VD)
    traded = tuple(axis for axis in reversed(stored_D) if axis in HEAD_AXES)
    row_axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    by_row, by_token = P(BATCH_AXES), P(BATCH_AXES, "sequence")

    def summed(x: Any, axes: Sequence[str]) -> Any:
        return jax.lax.psum(x, tuple(axes)) if axes else x

    def together(weight_VD: Array) -> Array:
        for axis in reversed(stored_D):
            if axis in traded:
                weight_VD = jnp.pad(weight_VD, ((0, -weight_VD.shape[0] % mesh.shape[axis]), (0, 0)))
                weight_VD = jax.lax.all_to_all(weight_VD, axis, split_axis=0, concat_axis=1, tiled=True)
            else:
                weight_VD = jax.lax.all_gather(weight_VD, axis, axis=1, tiled=True)
        return weight_VD

    def on_device(hidden_BTD: Array, weight_VD: Array, bias_V: Array | None, rows: Rows, counts: Counts) -> Any:
        words = _share(mesh, stored_V + traded, total)
        of_share = lambda bias_V: bias_V[jnp.clip(words.index_V - _share(mesh, stored_V, total).index_V[0], 0)]
        back = lambda function, grad, of: jax.linear_transpose(function, jax.ShapeDtypeStruct(of.shape, grad.dtype))(
            grad)[0]
        result, (dhidden_BTD, dweight_VD, dbias_V) = _rows(
            settings, wanted, words, hidden_BTD, together(weight_VD.astype(hidden_BTD.dtype)),
            None if bias_V is None else of_share(bias_V), rows, counts)
        if dhidden_BTD is not None:
            dhidden_BTD = summed(dhidden_BTD, [axis for axis in words.axes if axis != "sequence"])
        if dweight_VD is not None:
            dweight_VD = summed(back(together, dweight_VD, weight_VD),
                                [axis for axis in row_axes if axis not in stored_D])
        if dbias_V is not None:
            dbias_V = summed(back(of_share, dbias_V, bias_V), row_axes + traded)
        return summed(result, row_axes), (dhidden_BTD, dweight_VD, dbias_V)

    total = weight_VD.shape[0]
    # check_vma=False: it would ask for a cast of each number that is the same on all devices.
    return jax.shard_map(on_device, mesh=mesh, in_specs=(by_token, spec_VD, by_word, by_row, P()),
                         out_specs=(P(), (by_token, spec_VD, by_word)), check_vma=False)(
        hidden_BTD, weight_VD, bias_V, rows, counts)


def _rows(settings: Settings, wanted: Wanted, words: Words, hidden_BTD: Array, weight_VD: Array, bias_V: Array | None,
          rows: Rows, counts: Counts) -> tuple[tuple[Array, Sums], Gradients]:
    """Returns the loss and sums of one device's rows and their gradients, float32; None for those not wanted.

    Along `sequence` the device is given its part of each row's hidden states, and returns that of their gradient.
    """
    scored = rows.targets.shape[1] if settings.scored is None else settings.scored
    settings = settings._replace(chunks=settings.chunks or num_chunks(scored, weight_VD.shape[0]))

    def one_row(dweights: Any, row: tuple[Array, Rows]) -> tuple[Any, Any]:
        hidden_TD, of_row = row
        if "sequence" in words.axes:
            hidden_TD = jax.lax.all_gather(hidden_TD, "sequence", axis=0, tiled=True)
        pick, put = _scored(of_row, scored)
        of_scored = of_row._replace(targets=pick(of_row.targets), nll_weights=pick(of_row.nll_weights),
                                    segments=pick(of_row.segments))
        part, dhidden_CD, dweights = _row(settings, wanted, words, pick(hidden_TD), of_scored, weight_VD, bias_V,
                                          total_word, counts, dweights)
        dhidden_TD = None if dhidden_CD is None else put(dhidden_CD)
        if dhidden_TD is not None and "sequence" in words.axes:
            dhidden_TD = jax.lax.psum_scatter(dhidden_TD, "sequence", scatter_dimension=0, tiled=True)
        return dweights, (part, dhidden_TD)

    total_word = _total(words, weight_VD, bias_V)
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) if x is not None and want else None
                  for x, want in ((weight_VD, wanted.weight), (bias_V, wanted.bias)))
    dweights, (parts, dhidden_BTD) = jax.lax.scan(one_row, zeros, (hidden_BTD, rows))
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), parts), (dhidden_BTD, *dweights)


class TotalWord(NamedTuple):
    """The sum of a device's words, float32: what it gives a hidden state is the sum of their logits."""

    weight_D: Array
    bias: Array | float


def _exps(logits_CV: Array, offset_C: Array) -> Array:
    return jnp.exp(logits_CV - offset_C[:, None])


def _sum_of_exps(logits_CV: Array, max_C: Array) -> Array:
    """Returns the sums of exp(logit - max) over the words.

    On CPUs as a matrix product: a reduction makes the exps on one core, in memory of its own; so they are made by all
    cores, and once, since XLA finds that `_probabilities` asks for the same ones where a row's logits are kept. With
    gradients a row of 896 tokens and 49,152 words takes 0.56 s in place of 0.65 on two cores with JAX 0.10, and 0.55 in
    place of 0.61 with 0.12.
    """
    return jax.lax.platform_dependent(
        logits_CV, max_C, cpu=lambda logits_CV, max_C: _exps(logits_CV, max_C) @ jnp.ones(logits_CV.shape[-1]),
        default=lambda logits_CV, max_C: jnp.sum(_exps(logits_CV, max_C), axis=-1))


def _probabilities(logits_CV: Array, max_C: Array, lse_C: Array) -> Array:
    """Returns exp(logit - lse): on CPUs by the exps of `_sum_of_exps`, elsewhere in a pass over the logits."""
    return jax.lax.platform_dependent(
        logits_CV, max_C, lse_C,
        cpu=lambda logits_CV, max_C, lse_C: _exps(logits_CV, max_C) * jnp.exp(max_C - lse_C)[:, None],
        default=lambda logits_CV, _, lse_C: _exps(logits_CV, lse_C))


def _total(words: Words, weight_VD: Array, bias_V: Array | None) -> TotalWord:
    is_word_V = (words.index_V >= 0).astype(jnp.float32)
    return TotalWord(jnp.sum(weight_VD * is_word_V[:, None], axis=0),
                     0.0 if bias_V is None else jnp.sum(bias_V * is_word_V))


def _scored(row: Rows, count: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Returns the gather of the positions that have a weight in the loss, [T, ...] -> [count, ...], and that back."""
    T = row.targets.shape[0]
    if count == T:
        return lambda x: x, lambda x: x
    has_weight_T = (row.nll_weights > 0) | (row.segments > 0)
    places = jnp.nonzero(has_weight_T, size=count, fill_value=T)[0]
    back_T = jnp.where(has_weight_T, jnp.cumsum(has_weight_T) - 1, count)
    take = lambda x, at: x.at[at].get(mode="fill", fill_value=0)
    return lambda x_T: take(x_T, places), lambda x: take(x, back_T)


def _row(settings: Settings, wanted: Wanted, words: Words, hidden_TD: Array, row: Rows, weight_VD: Array,
         bias_V: Array | None, total_word: TotalWord, counts: Counts, dweights: Any
         ) -> tuple[Any, Array | None, Any]:
    """Returns a row's loss and sums, the gradient of its hidden states, and `dweights` with its part added."""
    words_V, first = words.index_V, words.index_V[0]
    if words.axes:
        across, largest = (partial(f, axis_name=words.axes) for f in (jax.lax.psum, jax.lax.pmax))
    else:
        across, largest = lambda x: x, lambda x: x

    def of_words(logits_CV: Array, otherwise: float) -> Array:
        return jnp.where(words_V >= 0, logits_CV, otherwise) if words.filled else logits_CV

    def logits_of(hidden_CD: Array) -> Array:
        return of_words(logits(hidden_CD, weight_VD, bias_V, settings.softcap), NO_WORD)

    def read(hidden_CD: Array, logits_CV: Array, targets_C: Array) -> tuple[Array, Array, Array, Array]:
        """Returns each target's logit, the log of the sum of all exps, the mean logit, and the largest."""
        max_C = largest(jnp.max(logits_CV, axis=-1))
        at_C = jnp.clip(targets_C - first, 0, weight_VD.shape[0] - 1)
        target_C = jnp.where(words_V[at_C] == targets_C, jnp.take_along_axis(logits_CV, at_C[:, None], 1)[:, 0], 0.0)
        sum_C = across(_sum_of_exps(logits_CV, max_C))
        if settings.softcap is None:  # the sum of linear maps is one: no pass over all logits
            total_C = jnp.sum(hidden_CD.astype(jnp.float32) * total_word.weight_D, axis=-1) + total_word.bias
        else:
            total_C = jnp.sum(of_words(logits_CV, 0.0), axis=-1)
        return across(target_C), max_C + jnp.log(sum_C), across(total_C) / words.total, max_C

    def pull_back(dweights: Any, chunk: tuple[Array, ...]) -> tuple[Any, Array | None]:
        """Returns `dweights` with a chunk's gradients of weight and bias added, and that of its hidden states."""
        hidden_CD, targets_C, lse_C, max_C, dlogps_C, logits_CV = chunk
        probs_CV = _probabilities(logits_CV, max_C, lse_C)
        dlogits_CV = jnp.where(words_V == targets_C[:, None], 1 - probs_CV, -probs_CV) * dlogps_C[:, None]
        if settings.softcap is not None:
            dlogits_CV *= 1 - jnp.square(logits_CV / settings.softcap)
        dweight_VD, dbias_V = dweights
        if wanted.bias:
            dbias_V += jnp.sum(dlogits_CV, axis=0)
        dlogits_CV = dlogits_CV.astype(hidden_CD.dtype)
        if wanted.weight:
            dweight_VD += jnp.einsum("cv,cd->vd", dlogits_CV, hidden_CD, preferred_element_type=jnp.float32)
        dhidden_CD = None
        if wanted.hidden:
            dhidden_CD = jnp.einsum("cv,vd->cd", dlogits_CV, weight_VD, preferred_element_type=jnp.float32)
        return (dweight_VD, dbias_V), dhidden_CD

    def loss_of(logps_T: Array, mean_logits_T: Array) -> tuple[Array, Sums]:
        of_row = jax.tree.map(lambda x: x[None], row)
        sums = loss.orpo_sums(logps_T[None], mean_logits_T[None], of_row.nll_weights, of_row.segments,
                              of_row.pair_weights)
        return loss.step_loss(sums, beta=settings.beta, nll_weight=counts.nll_weight, pairs=counts.pairs), sums

    def in_chunks(*xs: Array) -> tuple[Array, ...]:
        return tuple(x.reshape(settings.chunks, -1, *x.shape[1:]) for x in xs)

    def joined(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)

    if settings.chunks == 1:
        logits_TV = logits_of(hidden_TD)
        target_T, lse_T, mean_T, max_T = read(hidden_TD, logits_TV, row.targets)
    else:
        target_T, lse_T, mean_T, max_T = joined(jax.lax.map(
            lambda chunk: read(chunk[0], logits_of(chunk[0]), chunk[1]), in_chunks(hidden_TD, row.targets)))
    if not any(wanted):
        return loss_of(target_T - lse_T, mean_T), None, dweights
    part, dlogps_T = jax.value_and_grad(loss_of, has_aux=True)(target_T - lse_T, mean_T)
    known = (hidden_TD, row.targets, lse_T, max_T, dlogps_T)
    if settings.chunks == 1:
        dweights, dhidden_TD = pull_back(dweights, (*known, logits_TV))
    else:
        dweights, dhidden = jax.lax.scan(lambda dweights, chunk: pull_back(dweights, (*chunk, logits_of(chunk[0]))),
                                         dweights, in_chunks(*known))
        dhidden_TD = joined(dhidden)
    return part, dhidden_TD, dweights
