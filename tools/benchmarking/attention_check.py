"""Whether the attention kernels run here, forward and backward, and how far they are from XLA's in float32.

Errors are norms over norms, of the output and of the gradients of queries, keys and values, without padding: about
0.004 is bfloat16's rounding. A back end that can't run here says why in its place.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orpo_jax import attention, batching, data, head, packing, standin
from orpo_jax import config as config_lib
from orpo_jax.model import unrolls

Array = jax.Array
Attend = Callable[[Array, Array, Array], Array]
BACKENDS = ("cudnn_packed", "cudnn", "cudnn_mask", "splash", "tokamax")
HEADS = ((14, 2, 64), (32, 8, 64), (32, 8, 128))  # query and key/value heads, size: Qwen2-0.5B's, Llama's 1B's and 8B's
TOLERANCE = 0.02


def sample_rows(row_length: int, scale: float) -> packing.Rows:
    """Returns a micro-batch of packed rows that share prompts, of UltraFeedback's lengths times `scale`."""
    table = data.from_pairs(standin.make_pairs(standin.lengths("ultrafeedback", 32, scale), 1000))
    config = config_lib.DataConfig(train="pairs", row_length=row_length)
    layout = batching.make_layout(table, config, len(table), 4, 1, jax.devices()[0].platform)
    batch, _ = batching.Batches(table, layout, len(table), config_lib.OrpoConfig(), None).batch(0)
    return jax.tree.map(lambda x: x[0], batch.groups[0].rows)


def lengths_of(rows: packing.Rows) -> dict[str, int]:
    """Returns the longest branch, and the most tokens that a row has once each branch has a trunk of its own."""
    trunk, chosen, rejected, end = np.moveaxis(np.asarray(rows.bounds), -1, 0)
    longest = np.maximum(rejected - trunk, chosen - trunk + end - rejected).max()
    expanded = (end - trunk + chosen - trunk).sum(axis=1).max()
    whole = lambda length: int(-(-length // 128) * 128)
    return {"branch_length": whole(longest), "expanded_length": whole(expanded)}


def outputs(attend: Attend, qkv: tuple[Array, ...], weight: Array) -> list[np.ndarray]:
    """Returns the output and the gradients of q, k and v for a given gradient of the output, in float32."""
    def both(weight: Array, *qkv: Array) -> Any:
        out, back = jax.vjp(attend, *qkv)
        return [out * weight.astype(bool), *back(weight.astype(out.dtype))]

    return [np.asarray(x, np.float32) for x in jax.jit(both)(weight, *qkv)]


def report_one(name: str, attend: Attend, expected: list[np.ndarray], qkv: tuple, weight: Array) -> bool:
    """Prints a line on a kernel; returns whether it ran and is right."""
    try:
        got = outputs(attend, qkv, weight)
    except Exception as error:  # what a kernel raises where it can't run is its own
        print(f"{name:<40} can't run: {' '.join(str(error).split())[:300]}", flush=True)
        return False
    errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(got, expected, strict=True)]
    right = all(error < TOLERANCE for error in errors)
    print(f"{name:<40} {'right' if right else 'WRONG'}: " + ", ".join(
        f"{what} {error:.1e}" for what, error in zip(("output", "dq", "dk", "dv"), errors, strict=True)), flush=True)
    return right


def xla(rows: packing.Rows, q_end: np.ndarray) -> Attend:
    """Returns XLA's attention, of float32 in float32."""
    unroll = unrolls(jax.devices()[0].platform)  # as it trains here

    def attend(q: Array, k: Array, v: Array) -> Array:
        with head.precision(q.dtype):
            return attention.row_attention(jnp.asarray(rows.positions), jnp.asarray(q_end), unroll=unroll)(
                q, k, v, None, None)[0]

    return attend


def own_kernels(rows: packing.Rows) -> dict[str, Attend]:
    """Returns the back ends of orpo_jax.kernels by name; none, and a line that says so, where it has no such module."""
    try:
        kernels = importlib.import_module("orpo_jax.kernels")
    except ModuleNotFoundError as error:
        print(f"the back ends of orpo_jax.kernels are not checked: {error}")
        return {}
    on_cpu = jax.devices()[0].platform == "cpu"  # there kernels are interpreted

    def one(name: str) -> Attend:
        return lambda q, k, v: kernels.row_attention_of(
            name, jax.tree.map(jnp.asarray, rows), **lengths_of(rows), interpret=on_cpu)(q, k, v, None, None)[0]

    return {name: one(name) for name in BACKENDS}


def main(row_length: int = 2048, scale: float = 1.0) -> None:
    """Prints a line per shape of heads and kernel."""
    rows = sample_rows(row_length, scale)
    one_sequence = np.full_like(rows.q_end, row_length)
    real = (np.arange(row_length) < rows.bounds[..., 3].max(axis=1)[:, None])[..., None, None]
    cudnn = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}; {len(rows.ids)} rows of {row_length}, bfloat16")
    checks = [("jax.nn, cudnn, causal", cudnn, one_sequence), ("xla", xla(rows, rows.q_end), rows.q_end),
              *((name, attend, rows.q_end) for name, attend in own_kernels(rows).items())]
    for heads, kv_heads, size in HEADS:
        q, k, v, weight = (jax.random.normal(jax.random.key(seed), (*rows.ids.shape, n, size))
                           for seed, n in enumerate((heads, kv_heads, kv_heads, heads)))
        halves = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
        for name, attend, q_end in checks:
            # The reference has the same rounded inputs.
            expected = outputs(xla(rows, q_end), tuple(x.astype(jnp.float32) for x in halves), weight * real)
            report_one(f"{name}, {heads}/{kv_heads} heads of {size}", attend, expected, halves, weight * real)
