"""The embedding: ids -> vectors. On a mesh tokens travel, and no table does.

A table's gradient is as large as the table: left to the compiler, which gathers either the table or its gradient where
words or tokens are split, it would be whole on every device.
Shapes: B rows, T tokens, V words, D model.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from orpo_jax.sharding import BATCH_AXES, names, num_shards, weight_spec

Array = jax.Array


def lookup(table_VD: Array, ids_BT: Array, dtype: Any, axes: str = "vd") -> Array:
    """Returns the vector of each id, [B, T, D] in `dtype`; the gradient of the table adds up in the table's own type.

    axes: the table's, by which it is split (sharding.py). Rows that the mesh does not divide, such as a few prompts to
    go on from, are left to the compiler.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or ids_BT.shape[0] % num_shards(mesh) or ids_BT.shape[1] % mesh.shape["sequence"]:
        return table_VD[ids_BT].astype(dtype)
    return _on_mesh(jnp.dtype(dtype), axes, table_VD, ids_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _on_mesh(dtype: jnp.dtype, axes: str, table_VD: Array, ids_BT: Array) -> Array:
    """Returns the same, where each device looks up its words, in its part of D, for all devices that share its words.

    Those are the devices along the axes that split D and come with tokens of their own; then each one trades parts of D
    of others' tokens for all of D of its own.
    """
    mesh, spec_VD, stored_V, stored_D = _places(axes, table_VD)

    def on_device(table_VD: Array, ids_BT: Array) -> Array:
        at_BT, mine_BT = _found(table_VD, _all_ids(ids_BT, stored_D), stored_V)
        x_BTD = jnp.where(mine_BT[..., None], table_VD[at_BT], 0).astype(dtype)
        if stored_V:
            x_BTD = jax.lax.psum(x_BTD, stored_V)
        for axis in reversed(stored_D):
            if axis in TOKEN_AXES:
                x_BTD = jax.lax.all_to_all(x_BTD, axis, split_axis=TOKEN_AXES[axis], concat_axis=2, tiled=True)
            else:
                x_BTD = jax.lax.all_gather(x_BTD, axis, axis=2, tiled=True)
        return x_BTD

    return jax.shard_map(on_device, mesh=mesh, in_specs=(spec_VD, P(BATCH_AXES)), out_specs=P(BATCH_AXES, "sequence"),
                         check_vma=False)(table_VD, ids_BT)


# What splits tokens, and which of their axes.
TOKEN_AXES = {**dict.fromkeys(BATCH_AXES, 0), "sequence": 1}


def _places(axes: str, table_VD: Array) -> tuple[Any, P, tuple[str, ...], tuple[str, ...]]:
    """Returns the mesh, how it splits the table, and the axes along which it splits V and D."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    spec_VD = weight_spec(mesh, axes, table_VD.shape)
    return mesh, spec_VD, names(spec_VD[0]), names(spec_VD[1])


def _all_ids(ids_BT: Array, stored_D: tuple[str, ...]) -> Array:
    """Returns the ids of all rows whose vectors this device has a part of; ids are whole along `sequence`."""
    for axis in stored_D:
        if axis in BATCH_AXES:
            ids_BT = jax.lax.all_gather(ids_BT, axis, axis=0, tiled=True)
    return ids_BT


def _found(table_VD: Array, ids_BT: Array, stored_V: tuple[str, ...]) -> tuple[Array, Array]:
    """Returns where each id is in this device's part of the table, and whether it is there."""
    at_BT = ids_BT - (jax.lax.axis_index(stored_V) * table_VD.shape[0] if stored_V else 0)
    return jnp.clip(at_BT, 0, table_VD.shape[0] - 1), (at_BT >= 0) & (at_BT < table_VD.shape[0])


def _forward(dtype: jnp.dtype, axes: str, table_VD: Array, ids_BT: Array) -> tuple[Array, tuple[Array, Array]]:
    return _on_mesh(dtype, axes, table_VD, ids_BT), (table_VD, ids_BT)


def _backward(_: jnp.dtype, axes: str, residuals: tuple[Array, Array], dx_BTD: Array) -> tuple[Array, np.ndarray]:
    table_VD, ids_BT = residuals
    mesh, spec_VD, stored_V, stored_D = _places(axes, table_VD)
    summed = tuple(axis for axis in TOKEN_AXES if mesh.shape[axis] > 1 and axis not in stored_D)

    def on_device(table_VD: Array, ids_BT: Array, dx_BTD: Array) -> Array:
        for axis in stored_D:
            if axis in TOKEN_AXES:
                dx_BTD = jax.lax.all_to_all(dx_BTD, axis, split_axis=2, concat_axis=TOKEN_AXES[axis], tiled=True)
            else:
                width = dx_BTD.shape[2] // mesh.shape[axis]
                dx_BTD = jax.lax.dynamic_slice_in_dim(dx_BTD, jax.lax.axis_index(axis) * width, width, axis=2)
        at_BT, mine_BT = _found(table_VD, _all_ids(ids_BT, stored_D), stored_V)
        dtable_VD = jnp.zeros_like(table_VD).at[jnp.where(mine_BT, at_BT, len(table_VD))].add(
            dx_BTD.astype(table_VD.dtype), mode="drop")
        return jax.lax.psum(dtable_VD, summed) if summed else dtable_VD

    dtable_VD = jax.shard_map(on_device, mesh=mesh, in_specs=(spec_VD, P(BATCH_AXES), P(BATCH_AXES, "sequence")),
                              out_specs=spec_VD, check_vma=False)(table_VD, ids_BT, dx_BTD)
    return dtable_VD, np.zeros(ids_BT.shape, jax.dtypes.float0)


_on_mesh.defvjp(_forward, _backward)
