"""What the TPU compiler makes of attention and of the whole train step; nothing runs."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def programs(attention, *args):
    """Returns what tools/compile_for_tpu.py prints of each program."""
    for module in ["libtpu"] + ["tokamax"] * (attention == "tokamax"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    root = pathlib.Path(__file__).parents[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "XLA_FLAGS": "",
           "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
           "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    result = subprocess.run(
        [sys.executable, str(root / "tools" / "compile_for_tpu.py"), *args, "--attention", attention], env=env,
        capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    for program in found:
        print(program)
        # tokamax lists its blocks by a scatter of a few integers; nothing scatters activations.
        assert all(attention == "tokamax" and scatter.startswith("s32[") for scatter in program["scatters"]), program
    return found


@pytest.mark.parametrize(("attention", "backward"), [("splash", 2), ("tokamax", 1)])
def test_attention_compiles(attention, backward):
    """Forward and backward, bfloat16, on one chip and over four: two rows of 2,048 tokens to each."""
    found = programs(attention, "attention")
    assert len(found) == 12
    for program in found:
        # Another forward only where jax.checkpoint keeps nothing.
        assert program["kernels"] == 1 + backward + (program.get("remat") == "nothing"), program


@pytest.mark.parametrize(("attention", "backward"), [("splash", 2), ("tokamax", 1)])
def test_the_whole_step_compiles(attention, backward):
    """Two layers of Qwen2-0.5B over fsdp=2 x tensor=2, four rows of 2,048 tokens to a chip's micro-batch."""
    layers, words, rows, length = 2, 32768, 4, 2048
    width, mlp, layer_weights = 896, 4864, 14_912_384
    args = ("step", "--topologies", "v5e:2x2", "--meshes", "1,2,2", "--rows", str(rows), "--model-changes",
            json.dumps({"num_hidden_layers": layers, "vocab_size": words}))
    minimal, full = programs(attention, *args, "--rows-per-step", str(2 * rows), "--remats", "minimal", "full")
    # The scan holds the layers once. Forward again only where the kernel's residuals are not kept.
    assert (minimal["kernels"], full["kernels"]) == (1 + backward, 2 + backward)

    # The logits of one row, and the head's weight in bfloat16 and its gradient in float32, a shard of the words; the
    # layers' inputs, and what one layer computes again, twelve arrays as wide as the model and its half of the MLP's
    # three; the layers' weights and their gradients in bfloat16.
    head = (4 * length + 6 * width) * words // 2
    again = 2 * rows * length * (12 * width + 3 * mlp // 2)
    bound = head + 2 * rows * length * width * layers + again + 4 * layers * layer_weights // 4
    assert full["temporaries"] < bound < full["temporaries"] + 4 * (rows - 1) * length * words // 2
    # Kept: q, k, v and the MLP's two inputs, the attention's output and its log-sum-exp, which fills a tile's lanes.
    kept = 2 * rows * length * layers * (mlp + 3 * width)
    assert minimal["temporaries"] < bound + kept

    # Several micro-batches take the sum of the gradients in float32; one does not.
    (several,) = programs(attention, *args, "--rows-per-step", str(4 * rows), "--remats", "full")
    weights = words * width + layers * layer_weights
    assert several["temporaries"] - full["temporaries"] > 0.9 * 4 * weights / 4


def test_a_long_row_over_chips():
    """A row of 4,096 tokens on one chip, and over four: attention is the kernel, and all else is a quarter."""
    layers, length, width = 2, 4096, 2048
    args = ("step", "--topologies", "v5e:2x2", "--meshes", "1", "1,1,1,1,4", "--row-length", str(length), "--rows", "1",
            "--rows-per-step", "1", "--remats", "attention", "--model", "llama-1b", "--model-changes",
            json.dumps({"num_hidden_layers": layers, "vocab_size": 32768}))
    one, four = programs("tokamax", *args)
    assert one["kernels"] == four["kernels"] == 2
    assert four["temporaries"] < 0.33 * one["temporaries"] and four["arguments"] < 0.26 * one["arguments"]
    # Whole rows of hidden states come together in the head alone, one at a time.
    whole = [shape for shape in four["gathers"] if re.search(rf"\b{length}\b", shape)]
    assert whole == [f"bf16[1,{length},{width}]"], four["gathers"]
