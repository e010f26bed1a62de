"""The table of `python -m orpo_jax.compile`, held to arithmetic; nothing runs."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import what_fits
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from orpo_jax import compile as compile_lib
from orpo_jax import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
WIDTH, MLP, WORDS, HEADS, HEAD = 256, 384, 512, 4, 64
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": WORDS, "hidden_size": WIDTH,
         "intermediate_size": MLP, "num_hidden_layers": 1, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
         "head_dim": HEAD, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
         "tie_word_embeddings": True, "rope_theta": 10000.0}
# Over fsdp: the embedding, q, k, v and o, and the three of the MLP; two norms and the last one are split too.
WEIGHTS = WORDS * WIDTH + 4 * WIDTH * HEADS * HEAD + 3 * WIDTH * MLP + 3 * WIDTH
CONFIG = """
from orpo_jax import config as config_lib

def get_config():
    config = config_lib.default()
    config.output_dir = "run"
    config.model.path = "model"
    config.model.remat = "full"
    config.data.train = "some/set"
    config.data.max_length = 128
    config.data.row_length = 256
    config.train.batch_size = 8
    config.train.rows_per_device = {rows}
    return config
"""


@pytest.fixture
def folder(tmp_path):
    """A config, and a model that is config.json and nothing else."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "one_row.py").write_text(CONFIG.format(rows=1))
    (tmp_path / "two_rows.py").write_text(CONFIG.format(rows=2))
    return tmp_path


def run(folder, *args, config="one_row.py"):
    """Returns the command in a process of its own, with nothing set that it needs."""
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    return subprocess.run([sys.executable, "-m", "orpo_jax.compile", "--config", config, *args], cwd=folder,
                          env={**env, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
                          capture_output=True, text=True, check=False)


def needs_libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")


def check_state(report, devices):
    assert report["devices"] == devices
    assert report["params"] == 4 * WEIGHTS / devices
    # Two moments of Adam, its counter and the schedule's; the step is the trainer's own.
    assert report["optimizer"] == 2 * report["params"] + 8
    assert report["gradients"] == report["params"]
    assert 0 <= report["inputs"] < report["total"] and report["activations"] > 0
    assert report["total"] == pytest.approx(
        sum(report[part] for part in ("params", "optimizer", "inputs", "gradients", "activations")), abs=4096)


def test_a_tpu_slice(folder):
    """Four chips, of which each holds a quarter; the kernel runs, forward, forward again and two ways back."""
    needs_libtpu()
    result = run(folder, "--topology", "v5e:2x2", "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout)
    check_state(report, 4)
    assert report["kind"] == "TPU v5 lite" and report["limit"] == 15.75 * 2**30
    assert report["fits"] and report["advice"] is None
    assert report["kernels"] == 4 and "attention xla" not in report["step"]
    assert {"all-gather", "all-reduce"} <= set(report["collectives"])
    assert "stand-in pairs" in report["rows"]


def test_bytes_of_a_tpu_are_those_by_which_it_refuses():
    """A head's weight over four chips, its gradient whole on each, and a sum of it: one fits, and one does not."""
    needs_libtpu()
    mesh = Mesh(np.array(compile_lib.topology_devices("v5e:2x2")), ("x",))
    rows, width = 4, 1024

    def on_device(hidden_BTD, weight_VD):
        whole_VD = jax.lax.all_gather(weight_VD, "x", axis=1, tiled=True)

        def add_row(sum_VD, hidden_TD):
            return sum_VD + jnp.einsum("tv,td->vd", jax.nn.softmax(hidden_TD @ whole_VD.T), hidden_TD), None

        def add_pass(i, sum_VD):
            grad_VD, _ = jax.lax.scan(add_row, jnp.zeros_like(whole_VD), hidden_BTD * i)
            return sum_VD + jax.lax.psum_scatter(grad_VD, "x", scatter_dimension=1, tiled=True)

        return jax.lax.fori_loop(0, rows, add_pass, jnp.zeros_like(weight_VD))

    def compiled(words):
        by_second = P(None, "x")
        args = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, by_second))
                for shape in ((rows, 256, width), (words, width))]
        return jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=by_second, out_specs=by_second,
                                     check_vma=False)).lower(*args).compile()

    fits, too_large = 40 * 2**15, 44 * 2**15
    need = step_lib.bytes_needed(compiled(fits))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as refusal:
        compiled(too_large)
    assert compile_lib._bytes_asked(str(refusal.value)) == pytest.approx(too_large / fits * need, rel=0.01)


def test_the_page_has_the_table_of_what_was_compiled():
    lines = what_fits.read_lines()
    assert what_fits.START + what_fits.table(lines) + what_fits.END in what_fits.PAGE.read_text()
    assert all(line["kernels"] for line in lines if line["fits"])  # attention is the TPU's kernel in each


def test_this_machine_as_eight_devices(folder):
    result = run(folder, "--topology", "cpu:8")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "cpu:8: 8 devices (cpu)" in result.stdout and result.stdout.endswith("it fits\n")
    assert "attention xla" in result.stdout and "attention kernels   0 (tpu_custom_call)" in result.stdout
    check_state(json.loads(run(folder, "--topology", "cpu:8", "--json").stdout), 8)


def test_what_does_not_fit_names_the_first_change_that_does(folder):
    """A limit between two rows to a device and one: the change is compiled, and the other ones are not."""
    two, one = (json.loads(run(folder, "--topology", "cpu:2", "--json", config=config).stdout)
                for config in ("two_rows.py", "one_row.py"))
    assert one["total"] < two["total"]
    limit = (one["total"] + two["total"]) / 2
    result = run(folder, "--topology", "cpu:2", f"--hbm={limit / 1e9}", config="two_rows.py")
    assert result.returncode == 1
    assert result.stdout.endswith("it does not fit\nit fits with --config.train.rows_per_device=1\n")
    tried = [line.split("tried ")[1] for line in result.stderr.splitlines() if "tried " in line]
    assert tried == [f"--config.train.rows_per_device=1: {one['total'] / 1e9:.3f} GB"]

    # Not even the parameters: nothing is compiled but what needs less of them.
    result = run(folder, "--topology", "cpu:2", f"--hbm={2 * WEIGHTS / 1e9}")
    assert result.returncode == 1 and result.stdout.endswith("nothing that was tried fits (0 programs compiled)\n")
    assert "parameters, optimiser state and gradients alone take" in result.stderr


@pytest.mark.parametrize(("args", "message"), [
    (["--topology", "v5e"], "--topology: must be a kind of chip and the shape of a slice, such as v5e:4x4"),
    (["--topology", "cpu:2x2"], "--topology: must be a kind of chip"),
    (["--topology", "cpu:8", "--config.mesh.tensor=3"], "mesh: the axes must multiply to the number of devices (8)"),
    (["--topology", "cpu:8", "--config.model.pth=x"], "--config.model.pth: no such key; did you mean model.path?"),
    (["--topology", "cpu:8", "--config.model.path=/nowhere"], "model.path: must be a model folder or a hub id"),
])
def test_errors_are_one_line(folder, args, message):
    result = run(folder, *args)
    assert result.returncode == 1
    assert next(line for line in result.stderr.splitlines() if line.startswith("error: ")).startswith(
        f"error: {message}")


@pytest.mark.parametrize("topology", ["v5e:3x5", "v9:2x2"])
def test_a_slice_that_libtpu_does_not_know(topology):
    needs_libtpu()
    with pytest.raises(ValueError, match=f"must be a kind of chip .* got '{topology}', of which libtpu says: INVALID"):
        compile_lib.topology_devices(topology)


def test_libtpu_is_asked_for(monkeypatch):
    monkeypatch.setattr(compile_lib.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ValueError, match=r"needs libtpu.* pip install 'jax\[tpu\]'"):
        compile_lib.topology_devices("v5e:2x2")


def test_collectives_are_counted_by_channel():
    text = """
  %a.1 = f32[1,2048]{1,0:T(1,128)S(1)} all-gather(%p), channel_id=7, dimensions={1}
  %a.2 = f32[1,2048]{1,0:T(1,128)} all-gather(%q), channel_id=7, dimensions={1}
  %a.3 = (bf16[2,8]{1,0}, bf16[16,8]{1,0:T(8,128)(2,1)}) all-gather-start(%p), channel_id=8
  %c = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=9
  %d = bf16[4,8]{1,0} collective-permute-done(%c)
  %r = (f32[], s8[3]{0}) all-reduce(%y, %z), channel_id=10
"""
    assert compile_lib.collectives(text) == {
        "all-gather": (2, 4 * 2048 + 2 * 128), "all-reduce": (1, 4 + 3), "collective-permute": (1, 64)}


def test_what_a_refusal_says_of_its_size():
    asked = compile_lib._bytes_asked
    assert asked("the total memory required for HLO temporaries (600.00G) exceeds available HBM (15.75G).") == (
        600 * 2**30)
    assert asked("Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.") == int(20.5 * 2**30)
    assert asked("no room") == 0
