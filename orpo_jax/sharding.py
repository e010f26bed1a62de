"""The mesh, and which of its axes each axis of a weight or of a batch lies on.

`data` and `fsdp` split the rows of a batch; `fsdp` also splits every weight and its optimiser state, which are
gathered where they are used; `tensor` splits heads, mlp and vocabulary; `expert` splits rows, and experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")

# Letter of a weight's axis (families.py) -> mesh axis. Axes not named here are whole on every device.
RULES = {"d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "e": "tensor", "v": "tensor", "x": "expert"}
# Few key/value heads, and odd vocabularies, are whole on every device where the mesh axis does not divide them.
WHOLE_IF_UNEVEN = "kv"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of the config's axis sizes, -1 filled in; ValueError if they do not multiply to the devices."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    known = 1
    for size in sizes.values():
        known *= size if size != -1 else 1
    if len(devices) % known or (known != len(devices) and -1 not in sizes.values()):
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"mesh: the axes must multiply to the number of devices ({len(devices)}), got {shape}; "
                         "set one axis to -1 to take what is left")
    shape = [size if size != -1 else len(devices) // known for size in sizes.values()]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def weight_sharding(mesh: Mesh | AbstractMesh, name: str, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Returns where a weight lives; ValueError names a dimension that its mesh axis does not divide."""
    spec = []
    for letter, size in zip(axes, shape, strict=True):
        axis = RULES.get(letter)
        if axis is not None and size % mesh.shape[axis]:
            if letter not in WHOLE_IF_UNEVEN:
                raise ValueError(f"mesh.{axis}: must divide dimension {letter!r} of {name}, which is {size}, "
                                 f"got {mesh.shape[axis]}; choose a divisor of {size}")
            axis = None
        spec.append(axis)
    return NamedSharding(mesh, P(*spec))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a step's batch [micro-batches, rows, ...]."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def num_shards(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard_rows(x: jax.Array) -> jax.Array:
    """Keeps activations [B, ...] split by rows; does nothing outside a mesh, so that models run in a notebook."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, *[P.UNCONSTRAINED] * (x.ndim - 1)))
