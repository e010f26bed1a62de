"""The compiler's count of the work of the JAX systems, from shapes alone: nothing is computed, and no step is compiled.

XLA's cost analysis counts the body of a loop once, and layers, micro-batches and the rows of the head are loops. So it
is asked about the gradient of one row, with its layers laid out one by one, of a model with one layer and with two:
every further layer is the difference. Programs are compiled for the CPU on any machine, with XLA's attention, since
the work inside a kernel is not counted. It is laid out without loops too, over all keys up to a block's end: where rows
hold several pairs, or layers have a window, a CPU computes less than is counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orpo_jax import head, packing, weights
from orpo_jax.families import Architecture
from orpo_jax.step import Model


def counted(function: Callable[..., Any], *args: Any) -> float:
    """Returns the FLOPs of the function, compiled for the shapes of its arguments."""
    return (jax.jit(function).lower(*args).compile().cost_analysis() or {})["flops"]


def with_layers(arch: Architecture, layers: int) -> Architecture:
    """Returns the model with that many of its layers."""
    spec = dataclasses.replace(arch.spec, num_layers=layers, windows=arch.spec.windows[:layers])
    return dataclasses.replace(arch, spec=spec)


def at_full_depth(count: Callable[[Architecture], float], arch: Architecture) -> float:
    """Returns a count at the model's depth from those at one layer and at two."""
    one, two = (count(with_layers(arch, layers)) for layers in (1, 2))
    return one + (arch.spec.num_layers - 1) * (two - one)


def row_flops(model: Model, arch: Architecture, row_length: int) -> float:
    """Returns the FLOPs of the loss and the gradients of one row, what is computed again included."""
    rows = packing.empty_rows(1, row_length, model.layout.max_pairs)
    hidden_TD = jax.ShapeDtypeStruct((row_length, arch.spec.d_model), model.dtype)
    weight_VD = jax.ShapeDtypeStruct((arch.spec.vocab_size, arch.spec.d_model), jnp.float32)
    # In chunks the head is a loop too: it is counted whole, and the logits that chunks compute again are added.
    whole_head = model.head_settings._replace(chunks=1)
    chunks = model.head_settings.chunks or head.num_chunks(row_length, arch.spec.vocab_size)
    again = counted(head.logits, hidden_TD, weight_VD) if chunks > 1 else 0.0

    def count(arch: Architecture) -> float:
        one = dataclasses.replace(model, graph=weights.make_graph(arch), attention="xla", unroll=True,
                                  head_settings=whole_head)
        return counted(jax.grad(one.loss, has_aux=True), weights.abstract_params(arch), rows, head.Counts(1.0, 1.0))

    return at_full_depth(count, arch) + again
