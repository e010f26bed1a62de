"""safetensors <-> parameters, both ways through the family's one table. No PyTorch, and bounded host memory.

Parameters are a nested dict of arrays, layers stacked along a leading axis. On import each device's part is read as
slices of the files' tensors; on export one tensor is gathered at a time.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from orpo_jax import sharding
from orpo_jax.families import Architecture, flatten, nest
from orpo_jax.metrics import Progress
from orpo_jax.model import NORMS
from orpo_jax.tables import Weight

Params = dict[str, Any]

INDEX = "model.safetensors.index.json"
# Buffers that old files carry and that transformers computes afresh, and a table that no layer reads.
NOT_WEIGHTS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|"
                         r"EncDecAttention\.relative_attention_bias\.weight)$")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def abstract_params(arch: Architecture, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Returns shapes, dtype and, given a mesh, shardings of the parameters; ValueError lists how it does not fit."""
    if mesh is not None:
        check_mesh(mesh.shape, arch)

    def leaf(weight: Weight) -> jax.ShapeDtypeStruct:
        shape = weight.shape(arch.spec.sizes)
        if mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        spec = sharding.weight_spec(mesh, weight.axes, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    return nest({weight.path: leaf(weight) for weight in arch.table})


def check_mesh(mesh_sizes: Mapping[str, int], arch: Architecture) -> None:
    """Raises a ValueError that lists every rule which a mesh breaks for a model."""
    sizes, heads, field_of = arch.spec.sizes, arch.spec.num_heads, arch.field_of
    problems = sharding.problems(mesh_sizes, [(weight.path, weight.axes, weight.shape(sizes)) for weight in arch.table],
                                 {letter: field_of(letter) for letter in sizes})
    tensor, sequence = (mesh_sizes[axis] for axis in sharding.HEAD_AXES)
    if sequence > 1 and arch.encodes:
        problems.append("mesh.sequence: must be 1 for an encoder-decoder, whose attention needs whole rows, got "
                        f"{sequence}; choose mesh.fsdp or mesh.data in its place")
    elif sequence > 1 and heads % tensor == 0 and heads % (tensor * sequence):
        choices = ", ".join(str(n) for n in range(1, heads + 1) if heads // tensor % n == 0)
        problems.append(f"mesh.tensor * mesh.sequence: must divide {field_of('n')} of config.json, since both split "
                        f"heads, which is {heads}, got {tensor} * {sequence}; choose mesh.sequence from {choices}")
    if 64 % sequence:
        problems.append(f"mesh.sequence: must divide 64, as rows are multiples of that, got {sequence}; choose a power "
                        "of two")
    if problems:
        raise ValueError("; and ".join(problems))


def make_graph(arch: Architecture) -> nnx.GraphDef:
    """Returns the module without its weights: `nnx.merge(graph, params)` is the module."""
    shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in
              flatten(abstract_params(arch)).items()}

    def param(path: str) -> nnx.Param | None:
        return nnx.Param(jnp.zeros(shapes[path].shape)) if path in shapes else None

    return nnx.split(nnx.eval_shape(lambda: arch.module(param, arch.spec)))[0]


def random_params(arch: Architecture, seed: int, scale: float = 0.02) -> Params:
    """Returns normal(scale) weights, norms that scale by 1, and biases of 0, float32; keyed by name, not by order."""
    def leaf(weight: Weight) -> jax.Array:
        shape = weight.shape(arch.spec.sizes)
        if weight.path.endswith("scale"):
            return jnp.full(shape, 1.0 - NORMS[arch.spec.norm][1])
        if not weight.decays:
            return jnp.zeros(shape)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(weight.path.encode()) & 0x7FFFFFFF)
        return scale * jax.random.normal(key, shape)

    return nest({weight.path: leaf(weight) for weight in arch.table})


# Import


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a model folder: which file holds each, by its name there."""

    files: Mapping[str, pathlib.Path]
    prefix: str  # what names have here and lack there

    def names(self) -> list[str]:
        return sorted(self.prefix + name for name in self.files)

    def slice(self, name: str) -> Any:
        there = name.removeprefix(self.prefix)
        try:
            with safe_open(self.files[there], framework="numpy") as file:
                return file.get_slice(there)
        except SafetensorError as error:
            raise ValueError(f"{self.files[there]}: tensor {there} can't be read: {error}") from error


def find_tensors(folder: pathlib.Path, arch: Architecture) -> Tensors:
    """Returns the tensors of a folder's safetensors files; ValueError names a file that is missing or broken.

    Files of a model without its head, such as GPT-2's, leave out the first part of all names; here they have it.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: must be a safetensors index with a weight_map, got {error!r}") from None
        for name in names:
            if pathlib.Path(name).name != name:
                raise ValueError(f"{index}: files must lie in the model's own folder, got {name!r}")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    found: dict[str, pathlib.Path] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a model needs its weights as safetensors")
        try:
            with safe_open(file, framework="numpy") as opened:
                names = list(opened.keys())
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}); download or copy it again") from None
        if twice := sorted(set(names) & set(found)):
            raise ValueError(f"{file}: {', '.join(twice[:3])} is also in {found[twice[0]]}; keep one of the two")
        found |= dict.fromkeys(names, file)
    prefix = arch.table[0].hf.split(".")[0] + "."
    return Tensors(found, "" if any(name.startswith(prefix) for name in found) else prefix)


def hf_names(weight: Weight, sizes: Mapping[str, int]) -> list[str]:
    """Returns the names of the tensors that a weight stacks, in the order of its stacked axes."""
    return [weight.hf_name(place) for place in np.ndindex(*(sizes[axis] for axis in weight.stacked))]


def _groups(layout: str) -> list[list[str]]:
    """Returns the letters of each dimension on the left of a layout: [['n', 'h'], ['d']] for '(n h) d -> d n h'."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w", layout.split(" -> ")[0])]


def _hf_size(weight: Weight, letter: str, sizes: Mapping[str, int]) -> int:
    """Returns the size of a letter in HF's tensor, which may hold more than this weight."""
    return sum(sizes[part] for part in weight.whole) if letter == weight.fused else sizes[letter]


def _hf_shape(weight: Weight, sizes: Mapping[str, int]) -> list[int]:
    return [math.prod(_hf_size(weight, letter, sizes) for letter in group) for group in _groups(weight.layout)]


def _separate(layout: str) -> str:
    """Returns the left side of a layout with a dimension for each letter, as einops writes it; s is 1."""
    return " ".join("1" if letter == "s" else letter for group in _groups(layout) for letter in group)


def check_tensors(tensors: Tensors, arch: Architecture, folder: pathlib.Path) -> None:
    """Raises a ValueError that lists every tensor which is missing, unexpected or of a wrong shape."""
    sizes = arch.spec.sizes | {"v": arch.spec.vocab_size - arch.added_rows}
    wanted = {name: weight for weight in arch.table for name in hf_names(weight, sizes)}
    there = {name for name in tensors.names() if not NOT_WEIGHTS.search(name)}
    copies = {name: weight.hf for weight in arch.table for name in weight.copies if name in there}
    found = there - set(copies)
    problems = [f"missing: {name}" for name in sorted(set(wanted) - found)]
    problems += [f"unexpected: {name}" for name in sorted(found - set(wanted))]
    problems += [f"{name}: must be {original} once more, and differs" for name, original in sorted(copies.items())
                 if original in found and not np.array_equal(tensors.slice(name)[:], tensors.slice(original)[:])]
    for name in sorted(found & set(wanted)):
        part, expected = tensors.slice(name), _hf_shape(wanted[name], sizes)
        if list(part.get_shape()) != expected:
            problems.append(f"shape of {name}: expected {expected}, got {list(part.get_shape())}")
        elif part.get_dtype() not in DTYPES:
            problems.append(f"type of {name}: expected one of {', '.join(DTYPES)}, got {part.get_dtype()}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{folder}: the weights do not fit config.json: {'; '.join(problems[:8])}{more}")


def tensor_dtypes(folder: pathlib.Path, arch: Architecture) -> dict[str, str]:
    """Returns the type of each tensor in the files, by HF name, so that an export can have them again."""
    tensors = find_tensors(folder, arch)
    return {name: DTYPES.get(tensors.slice(name).get_dtype(), "float32") for name in tensors.names()}


def load_params(folder: pathlib.Path, arch: Architecture, *, dtype: Any = jnp.float32,
                mesh: jax.sharding.Mesh | None = None) -> Params:
    """Returns a model folder's weights in `dtype`, each device holding its own part where a mesh is given."""
    tensors = find_tensors(folder, arch)
    check_tensors(tensors, arch, folder)
    abstract = flatten(abstract_params(arch, dtype, mesh))
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    flat = {}
    with Progress("loading weights", len(arch.table)) as progress:
        for weight in arch.table:
            leaf, parts = abstract[weight.path], {}

            def read(index: Any, weight=weight, shape=leaf.shape, parts=parts) -> np.ndarray:
                bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
                if bounds not in parts:  # devices that hold the same part share one read
                    parts[bounds] = _read_part(tensors, weight, bounds, arch, dtype)
                return parts[bounds]

            flat[weight.path] = jax.make_array_from_callback(leaf.shape, leaf.sharding or one_device, read)
            progress.advance()
    return nest(flat)


def _read_part(tensors: Tensors, weight: Weight, bounds: tuple, arch: Architecture, dtype: Any) -> np.ndarray:
    """Returns our array within `bounds` (start, stop of each axis), from slices of HF's tensors."""
    stacked = len(weight.stacked)
    names = [weight.hf_name(place) for place in itertools.product(*(range(*bound) for bound in bounds[:stacked]))]
    local = dict(zip(weight.axes[stacked:], bounds[stacked:], strict=True))
    if arch.added_rows and "v" in local:
        return _read_grown(tensors.slice(names[0]), local, arch.spec.vocab_size - arch.added_rows).astype(dtype)
    cut, shape, inner = _hf_part(weight, local, arch.spec.sizes)
    pattern = f"{_separate(weight.layout)} -> {' '.join(weight.axes[stacked:])}"
    part = np.empty([len(names), *(stop - start for start, stop in local.values())], dtype)
    for place, name in zip(part, names, strict=True):  # a tensor at a time: the host holds one beside the result
        place[...] = einops.rearrange(tensors.slice(name)[cut].reshape(shape)[inner], pattern)
    return part.reshape([stop - start for start, stop in bounds])


def _hf_part(weight: Weight, local: Mapping[str, tuple[int, int]], sizes: Mapping[str, int]
             ) -> tuple[tuple[slice, ...], list[int], tuple[slice, ...]]:
    """Returns where a part of ours lies in HF's tensor: slices of its dimensions, the shape of what those give with a
    dimension for each letter, and the slices of that.

    local: start and stop of each of our letters; of letters that share a dimension, only the first is ever cut.
    """
    before = {weight.fused: sum(sizes[part] for part in weight.before)}
    cut, shape, inner = [], [], []
    for first, *others in _groups(weight.layout):
        stride = math.prod(_hf_size(weight, letter, sizes) for letter in others)
        start, stop = (before.get(first, 0) + bound for bound in local.get(first, (0, sizes[first])))
        cut.append(slice(start * stride, stop * stride))
        shape.append(stop - start)
        inner.append(slice(None))
        for letter in others:
            assert letter not in local or local[letter] == (0, sizes[letter])
            shape.append(_hf_size(weight, letter, sizes))
            inner.append(slice(before.get(letter, 0), before.get(letter, 0) + sizes[letter]))
    return tuple(cut), shape, tuple(inner)


def _read_grown(part: Any, local: Mapping[str, tuple[int, int]], rows: int) -> np.ndarray:
    """Returns rows [start, stop) of a [V, ...] table that the files hold `rows` of; the others are the rows' mean."""
    start, stop = local["v"]
    rest = tuple(slice(*bounds) for letter, bounds in local.items() if letter != "v")
    have = part[(slice(min(start, rows), min(stop, rows)), *rest)]
    missing = stop - start - len(have)
    if not missing:
        return have
    mean = np.mean(part[(slice(None), *rest)].astype(np.float32), axis=0)
    return np.concatenate([have.astype(np.float32), np.repeat(mean[None], missing, axis=0)])


# Export


def hf_tensors(params: Params, arch: Architecture) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each tensor by its HF name, in HF's layout; every process takes part in the gathering."""
    flat, sizes = flatten(params), arch.spec.sizes
    rows: dict[str, list[Weight]] = {}
    for weight in arch.table:
        rows.setdefault(weight.hf, []).append(weight)
    for weights in rows.values():
        first = weights[0]
        for place in np.ndindex(*(sizes[axis] for axis in first.stacked)):
            tensor = np.empty(_hf_shape(first, sizes), flat[first.path].dtype)
            for weight in weights:
                array = flat[weight.path][place] if place else flat[weight.path]
                if not array.is_fully_addressable:
                    array = multihost_utils.process_allgather(array, tiled=True)
                axes = weight.axes[len(place):]
                cut, shape, inner = _hf_part(weight, {letter: (0, sizes[letter]) for letter in axes}, sizes)
                tensor[cut].reshape(shape)[inner] = einops.rearrange(
                    np.asarray(array), f"{' '.join(axes)} -> {_separate(weight.layout)}")
            yield first.hf_name(place), tensor


def save_params(params: Params, arch: Architecture, folder: pathlib.Path, dtypes: Mapping[str, str], *,
                max_shard_bytes: int = 5 * 10**9) -> None:
    """Writes the weights as one safetensors file, or as several and an index, in the given type of each tensor."""
    shards: list[list[str]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = folder / f"{len(shards)}.partial"
        file.touch()
        mode = file.stat().st_mode  # safetensors makes files that only their owner may read
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(mode)
        shards.append(list(pending))
        pending.clear()

    count = len({name for weight in arch.table for name in hf_names(weight, arch.spec.sizes)})
    with Progress("writing weights", count) as progress:
        for name, array in hf_tensors(params, arch):
            progress.advance()
            if jax.process_index() != 0:
                continue
            array = np.ascontiguousarray(array.astype(jnp.dtype(dtypes.get(name, "float32"))))
            if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > max_shard_bytes:
                flush()
            pending[name] = array
            total += array.nbytes
    if jax.process_index() != 0:
        return
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = ["model.safetensors"] if len(shards) == 1 else names
    for i, name in enumerate(names):
        os.rename(folder / f"{i}.partial", folder / name)
    if len(shards) > 1:
        weight_map = dict(itertools.chain.from_iterable(
            ((tensor, name) for tensor in shard) for shard, name in zip(shards, names, strict=True)))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a temporary folder beside `folder` to write in, and renames it into place once all is written.

    What `folder` held before is deleted only then. Every process gets the same name; process 0 makes and renames it.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{kind}-orpo_jax") for kind in ("new", "old"))
    if jax.process_index() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    yield temporary
    if jax.process_index() == 0:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
