"""The mesh, and which of its axes each axis of a weight or of a batch lies on.

`data`, `fsdp` and `expert` split the rows of a batch, and `sequence` splits the tokens of each row. `fsdp` and
`sequence` also split every weight and its optimiser state, which are gathered where they are used: all devices along
the two work on tokens of their own. `tensor` splits heads, mlp and vocabulary, `expert` experts. Around attention, and
in the head, where tokens of a row meet, `sequence` splits heads and vocabulary too.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor", "expert", "sequence")
BATCH_AXES = ("data", "fsdp", "expert")
# What splits heads in attention and words in the head, from the outer to the inner axis.
HEAD_AXES = ("tensor", "sequence")

# Letter of a weight's axis (tables.py) -> mesh axes. Axes not named here are whole on every device.
RULES = {"d": ("fsdp", "sequence"), "n": ("tensor",), "k": ("tensor",), "f": ("tensor",), "e": ("tensor",),
         "v": ("tensor",), "x": ("expert",)}
# Few key/value heads, and odd vocabularies, are whole where the mesh axis does not divide them.
WHOLE_IF_UNEVEN = "kv"
# What else splits `d` where it divides and no other dimension of the weight has it: no copies along `expert` of what is
# no expert's, nor along `tensor` of what is uneven there.
SPARE = ("expert",)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of the config's axis sizes, -1 filled in; ValueError if they do not fit the devices.

    Of several slices, which a slow network connects, `data` is the axis that crosses it, or else `fsdp`.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    known = 1
    for size in sizes.values():
        known *= size if size != -1 else 1
    if len(devices) % known or (known != len(devices) and -1 not in sizes.values()):
        shape = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"mesh: the axes must multiply to the number of devices ({len(devices)}), got {shape}; "
                         "set one axis to -1 to take what is left")
    sizes = {axis: size if size != -1 else len(devices) // known for axis, size in sizes.items()}
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        placed = mesh_utils.create_device_mesh(list(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        across = _across_slices(sizes, num_slices)
        within = [size // across.get(axis, 1) for axis, size in sizes.items()]
        placed = mesh_utils.create_hybrid_device_mesh(within, [across.get(axis, 1) for axis in sizes], devices,
                                                      allow_split_physical_axes=True)
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _across_slices(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
    """Returns how many slices lie along `data`, as many as it divides into, and along `fsdp`."""
    along_data = math.gcd(sizes["data"], num_slices)
    along_fsdp = num_slices // along_data
    if sizes["fsdp"] % along_fsdp:
        raise ValueError(f"mesh.data: must be a multiple of the number of slices ({num_slices}), or mesh.fsdp of what "
                         f"it leaves of them ({along_fsdp}), since only these two cross the network between slices, "
                         f"got mesh.data={sizes['data']}, mesh.fsdp={sizes['fsdp']}; choose mesh.data={num_slices}")
    return {"data": along_data, "fsdp": along_fsdp}


def parts(sizes: Mapping[str, int], axes: Iterable[str]) -> int:
    """Returns into how many parts some mesh axes split what lies on them."""
    return math.prod(sizes[axis] for axis in axes)


def names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes in one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def spec_entry(axes: Sequence[str]) -> Any:
    """Returns the entry of a PartitionSpec for some mesh axes."""
    return None if not axes else axes[0] if len(axes) == 1 else tuple(axes)


def within(sizes: Mapping[str, int], axes: Sequence[str], size: int) -> Sequence[str]:
    """Returns the first of some mesh axes, as many as together divide a dimension."""
    return max((axes[:n] for n in range(len(axes) + 1) if size % parts(sizes, axes[:n]) == 0), key=len)


def _placed(sizes: Mapping[str, int], axes: Sequence[str], shape: Sequence[int]) -> tuple[list[list[str]], list[int]]:
    """Returns the mesh axes of each dimension, and the dimensions that theirs must divide and do not."""
    placed: list[list[str]] = []
    uneven, spare = [], list(SPARE)
    for i, (letter, size) in enumerate(zip(axes, shape, strict=True)):
        # An axis of one device splits nothing.
        wanted = [axis for axis in RULES.get(letter, ()) if sizes[axis] > 1]
        if size % parts(sizes, wanted) and letter in WHOLE_IF_UNEVEN:
            spare += wanted
            wanted = []
        elif size % parts(sizes, wanted):
            uneven.append(i)
        placed.append(wanted)
    if "d" in axes:
        at = list(axes).index("d")
        for axis in spare:
            taken = any(axis in some for some in placed) or sizes[axis] == 1
            if not taken and shape[at] % parts(sizes, [*placed[at], axis]) == 0:
                placed[at].append(axis)
    return placed, uneven


def weight_spec(mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int]) -> P:
    """Returns the mesh axes of each dimension of a weight."""
    return P(*map(spec_entry, _placed(mesh.shape, axes, shape)[0]))


def problems(sizes: Mapping[str, int], weights: Iterable[tuple[str, Sequence[str], Sequence[int]]],
             fields: Mapping[str, str]) -> list[str]:
    """Returns a line for each rule that a mesh breaks for some weights, as (path, axes, shape).

    fields: of config.json, by letter.
    """
    broken: dict[tuple, list[str]] = {}
    for path, axes, shape in weights:
        placed, uneven = _placed(sizes, axes, shape)
        for i in uneven:
            broken.setdefault((tuple(placed[i]), axes[i], shape[i]), []).append(path)
        for i, some in enumerate(placed):
            for j, others in enumerate(placed[:i]):
                if shared := set(some) & set(others):
                    broken.setdefault((tuple(shared), axes[j] + axes[i], 0), []).append(path)
    lines = []
    for (mesh_axes, letters, size), paths in broken.items():
        keys = " * ".join(f"mesh.{axis}" for axis in mesh_axes)
        got = " * ".join(str(sizes[axis]) for axis in mesh_axes)
        of = paths[0] + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        if len(letters) > 1:
            lines.append(f"{keys}: must be 1 where it would split two dimensions of a weight, {letters[0]!r} and "
                         f"{letters[1]!r} of {of}, got {got}; choose 1")
            continue
        divisors = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        product = "a product" if len(mesh_axes) > 1 else "a divisor of it"
        lines.append(f"{keys}: must divide {fields.get(letters, 'a size')} of config.json (dimension {letters!r} of "
                     f"{of}), which is {size}, got {got}; choose {product}: {divisors}")
    return lines


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a step's batch [micro-batches, rows, ...]."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def num_shards(mesh: Mesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return parts(mesh.shape, BATCH_AXES)


def own_shards(mesh: Mesh) -> tuple[int, ...]:
    """Returns which of those parts lie on this process's devices, rising."""
    places = NamedSharding(mesh, P(BATCH_AXES)).devices_indices_map((num_shards(mesh),))
    return tuple(sorted({index[0].start or 0 for device, index in places.items()
                         if device.process_index == jax.process_index()}))


def shard_rows(x: jax.Array) -> jax.Array:
    """Keeps activations [B, T, ...] split by rows and their tokens; does nothing outside a mesh, so that models run in
    a notebook.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, "sequence", *[P.UNCONSTRAINED] * (x.ndim - 2)))
