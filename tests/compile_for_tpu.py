"""Compiles a TPU back end of attention, forward and backward, for chips that need not be there.

Prints a line of JSON for each program: its kernels, and the types of what it scatters. Usage, with libtpu installed:
TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python tests/compile_for_tpu.py splash|tokamax
"""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orpo_jax import kernels, packing, sharding

ROW_LENGTH, SLOTS, HEADS, KV_HEADS = 2048, 8, 4, 2
POLICIES = {"residuals": kernels.saves_residuals, "nothing": jax.checkpoint_policies.nothing_saveable}


def program(backend, head_dim, mesh_sizes, window=None, softcap=None, remat=None):
    """Returns the compiled program of a loss and the gradients of q, k, v."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    chips = np.array(chips[:np.prod(mesh_sizes)]).reshape(mesh_sizes)
    mesh = Mesh(chips, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    rows_sharding = NamedSharding(mesh, P(sharding.BATCH_AXES))
    heads_sharding = NamedSharding(mesh, P(sharding.BATCH_AXES, None, "tensor"))
    num_rows = 2 * sharding.num_shards(mesh)
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding),
                        packing.empty_rows(num_rows, ROW_LENGTH, SLOTS))
    qkv = [jax.ShapeDtypeStruct((num_rows, ROW_LENGTH, heads, head_dim), jnp.bfloat16, sharding=heads_sharding)
           for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def loss_and_gradients(q, k, v, rows):
        attend = kernels.row_attention_of(backend, rows, softcap=softcap)
        layer = lambda *qkv: jnp.square(attend(*qkv, window, None)[0].astype(jnp.float32)).sum()
        if remat is not None:
            layer = jax.checkpoint(layer, policy=POLICIES[remat])
        # With the loss, or the forward pass before the one for the gradients would not be needed at all.
        return jax.value_and_grad(layer, (0, 1, 2))(q, k, v)

    with jax.set_mesh(mesh):
        return jax.jit(loss_and_gradients).lower(*qkv, rows).compile()


def main(backend):
    cases = [dict(head_dim=head_dim, mesh_sizes=mesh_sizes)
             for head_dim in (64, 80, 128, 256) for mesh_sizes in ((1, 1, 1), (1, 2, 2))]
    cases += [dict(head_dim=96, mesh_sizes=(2, 1, 2), window=100),
              dict(head_dim=64, mesh_sizes=(1, 1, 1), softcap=30.0),
              dict(head_dim=128, mesh_sizes=(1, 2, 2), remat="residuals"),
              dict(head_dim=128, mesh_sizes=(1, 2, 2), remat="nothing")]
    for case in cases:
        start = time.time()
        text = program(backend, **case).as_text()
        print(json.dumps({"backend": backend, **case, "kernels": text.count('custom_call_target="tpu_custom_call"'),
                          "scatters": re.findall(r"= \(?(\w+)\[[^=]* scatter\(", text),
                          "seconds": round(time.time() - start, 1)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
