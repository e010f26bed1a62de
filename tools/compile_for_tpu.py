"""Compiles programs for TPU chips that need not be there, and prints a line of JSON for each. With libtpu installed:

    python tools/compile_for_tpu.py step            # the train step of Qwen2-0.5B, 8 UltraFeedback-like pairs
    python tools/compile_for_tpu.py step --topologies v5e:2x2 --meshes 1,4,1 --attention splash --remats minimal full
    python tools/compile_for_tpu.py trl --attention splash --remats full  # the same pairs as TRL lays them out
    python tools/compile_for_tpu.py attention --attention tokamax         # attention alone, in many shapes

arguments, temporaries, aliased and needed (all that a step must hold): bytes per chip; of a program that does not fit,
the compiler says only what it would use. kernels: the calls of Pallas kernels in the text, where a scan over layers
counts once. scatters: what is scattered beside the gradient of the embedding. gathers: what is gathered of other chips,
in bfloat16.
"""

import argparse
import json
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarking import jax_side, models, systems
from orpo_jax import batching, data, kernels, packing, sharding, standin, weights
from orpo_jax import compile as compile_lib
from orpo_jax import config as config_lib
from orpo_jax import step as step_lib
from orpo_jax.families import Architecture, architecture
from orpo_jax.model import REMAT
from orpo_jax.program import make_program

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# What layouts are made of; a step takes some of them.
SAMPLE_PAIRS = 2048
TRL_LENGTH = 1024
SETTINGS = systems.Settings(model="", pairs_file="", device="tpu", dtype="bfloat16")

# Attention alone: two rows to a chip.
ROW_LENGTH, SLOTS, HEADS, KV_HEADS = 2048, 8, 4, 2
POLICIES = {"residuals": kernels.saves_residuals, "nothing": jax.checkpoint_policies.nothing_saveable}


def make_mesh(topology: str, sizes: tuple[int, ...]) -> Mesh:
    """Returns a mesh of the topology's first chips."""
    chips = compile_lib.topology_devices(topology)[:math.prod(sizes)]
    return sharding.make_mesh(dict(zip(sharding.MESH_AXES, sizes, strict=False)), chips)


def lower_step(args: argparse.Namespace, arch: Architecture, mesh: Mesh, attention: str, remat: str) -> Any:
    """Returns the project's train step, lowered for the pairs of args."""
    lengths = standin.lengths("ultrafeedback", SAMPLE_PAIRS)
    config = config_lib.build({
        "output_dir": "none", "model": {"path": args.model, "attention": attention, "dtype": SETTINGS.dtype},
        "data": {"train": "pairs", "row_length": args.row_length, "shuffle": False},
        "train": {"batch_size": args.pairs, "rows_per_device": args.rows, "rows_per_step": args.rows_per_step}})
    program = make_program(config, arch, mesh, data.from_pairs(standin.make_pairs(lengths, arch.spec.vocab_size)))
    return program.make_train_step(remat).lower(program.abstract_state(), program.abstract_batch())


def lower_trl(args: argparse.Namespace, arch: Architecture, mesh: Mesh, attention: str, remat: str) -> Any:
    """Returns a step over one batch in TRL's layout, as long as its longest pairs; logits of all tokens at once."""
    optimizer, _ = jax_side.make_optimizer(SETTINGS, arch)

    def attend_of(ids_BT: jax.Array, lengths_B: jax.Array) -> Any:
        # Each sequence is the chosen branch of a pair without a trunk, whose rejected branch is empty.
        bounds_BS4 = jnp.stack([0 * lengths_B, 0 * lengths_B, lengths_B, lengths_B], axis=-1)[:, None]
        rows = packing.empty_rows(*ids_BT.shape, max_pairs=1)._replace(
            ids=ids_BT, q_end=jnp.full_like(ids_BT, ids_BT.shape[1]), bounds=bounds_BS4)
        return kernels.row_attention_of(attention, rows, expanded_length=ids_BT.shape[1],
                                        softcap=arch.spec.attn_softcap)

    loss_of = jax_side.trl_layout_loss(arch, SETTINGS, attend_of, remat=remat)

    def train_step(params: weights.Params, opt_state: Any, micro: tuple[jax.Array, ...]) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(loss_of)(params, micro)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = weights.abstract_params(arch, jnp.float32, mesh)
    shardings = step_lib.state_shardings(params, optimizer, mesh)
    state = step_lib.abstract_state(params, optimizer, shardings)
    by_row = NamedSharding(mesh, P(sharding.BATCH_AXES))
    micro = tuple(jax.ShapeDtypeStruct((2 * args.pairs, *rest), jnp.int32, sharding=by_row)
                  for rest in ((TRL_LENGTH,), (), ()))
    return jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*shardings[1:], shardings.step)).lower(
        state.params, state.opt_state, micro)


def lower_attention(attention: str, mesh: Mesh, *, head_dim: int, window: int | None = None,
                    softcap: float | None = None, remat: str | None = None) -> Any:
    """Returns the loss of attention alone and the gradients of q, k, v, lowered."""
    rows_sharding = NamedSharding(mesh, P(sharding.BATCH_AXES))
    heads_sharding = NamedSharding(mesh, P(sharding.BATCH_AXES, None, "tensor"))
    num_rows = 2 * sharding.num_shards(mesh)
    rows = packing.empty_rows(num_rows, ROW_LENGTH, SLOTS)
    qkv = [jax.ShapeDtypeStruct((num_rows, ROW_LENGTH, heads, head_dim), jnp.bfloat16, sharding=heads_sharding)
           for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def loss_and_gradients(q: jax.Array, k: jax.Array, v: jax.Array, rows: packing.Rows) -> Any:
        attend = kernels.row_attention_of(attention, rows, softcap=softcap)
        layer: Any = lambda q, k, v: jnp.square(attend(q, k, v, window, None)[0].astype(jnp.float32)).sum()
        if remat is not None:
            layer = jax.checkpoint(layer, policy=POLICIES[remat])
        # With the loss, or the forward pass before the one for the gradients would not be needed at all.
        return jax.value_and_grad(layer, (0, 1, 2))(q, k, v)

    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows_sharding), rows)
    return jax.jit(loss_and_gradients).lower(*qkv, placed)


def compile_one(lower: Any, mesh: Mesh, embed_shape: tuple[int, ...] = ()) -> dict[str, Any]:
    """Returns what the compiler says of a program. embed_shape: of one chip's part of the embedding."""
    start = time.time()
    with jax.set_mesh(mesh):
        lowered = lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"fits": False, "needed": str(error)}
    memory, text = compiled.memory_analysis(), compiled.as_text()
    scatters = re.findall(r"= \(?(\w+\[[\d,]*\])[^=]* scatter\(", text)
    gathers = re.findall(r"= (bf16\[[\d,]+\])[^=]* all-gather\(", text)
    embedding = f"f32[{','.join(map(str, embed_shape))}]"
    return {"arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes, "needed": step_lib.bytes_needed(compiled), "fits": True,
            "kernels": compile_lib.kernel_calls(text),
            "scatters": sorted({scatter for scatter in scatters if scatter != embedding}),
            "gathers": sorted(set(gathers)),
            "seconds": round(time.time() - start)}


def steps(args: argparse.Namespace) -> None:
    """Prints a line for each program of the train step, or of one in TRL's layout."""
    arch = architecture(models.SHAPES[args.model] | json.loads(args.model_changes), TRL_LENGTH)
    attention = step_lib.choose_attention(args.attention, "tpu", arch.spec, SETTINGS.dtype, batching.ROW_UNIT)
    lower = {"step": lower_step, "trl": lower_trl}[args.program]
    for topology in args.topologies:
        for sizes in args.meshes:
            mesh = make_mesh(topology, sizes)
            embed = weights.abstract_params(arch, mesh=mesh)["embed"]
            for remat in args.remats:
                found = compile_one(lambda mesh=mesh, remat=remat: lower(args, arch, mesh, attention, remat), mesh,
                                    embed.sharding.shard_shape(embed.shape))
                print(json.dumps({"topology": topology, "mesh": sizes, "attention": attention, "remat": remat} | found),
                      flush=True)


def attentions(args: argparse.Namespace) -> None:
    """Prints a line for each shape of attention alone, on one chip and over four."""
    one, four = (1, 1, 1), (1, 2, 2)
    cases: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        *((sizes, dict(head_dim=head_dim)) for head_dim in (64, 80, 128, 256) for sizes in (one, four)),
        ((2, 1, 2), dict(head_dim=96, window=100)), (one, dict(head_dim=64, softcap=30.0)),
        (four, dict(head_dim=128, remat="residuals")), (four, dict(head_dim=128, remat="nothing"))]
    for sizes, case in cases:
        mesh = make_mesh(args.topologies[0], sizes)
        found = compile_one(lambda mesh=mesh, case=case: lower_attention(args.attention, mesh, **case), mesh)
        print(json.dumps({"mesh": sizes, "attention": args.attention, **case} | found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("step", "trl", "attention"))
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--meshes", nargs="+", default=[(1, 1, 1)], help=",".join(sharding.MESH_AXES),
                        type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--attention", default="auto", help="as model.attention")
    parser.add_argument("--remats", nargs="+", default=["full"], choices=REMAT)
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    rows_or_auto = lambda text: text if text == "auto" else int(text)
    parser.add_argument("--row-length", type=rows_or_auto, default=2048, help="as data.row_length")
    parser.add_argument("--rows", type=rows_or_auto, default="auto", help="as train.rows_per_device")
    parser.add_argument("--rows-per-step", type=int, help="as train.rows_per_step")
    parser.add_argument("--model", choices=models.SHAPES, default="qwen2-0.5b")
    parser.add_argument("--model-changes", default="{}", help="fields of config.json in place of the model's, as JSON")
    args = parser.parse_args()
    attentions(args) if args.program == "attention" else steps(args)


if __name__ == "__main__":
    main()
