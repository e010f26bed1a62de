"""Loads a model of random weights on one process and on several of this machine, and prints a table: what each must
hold, the most that it held, and the seconds from the first file to the last array.

    python tools/startup.py                    # Llama-3.2-1B's shape in bfloat16, on 1, 2 and 4 processes
    python tools/startup.py --model qwen2-0.5b --dtype float32 --processes 1 2

Four CPU devices in all, whose memory is the host's; each weight is split over all of them. `peak` is the process's own
memory while it loads, beyond what it had before (RssAnon of /proc/self/status, looked at every 2 ms): the pages of the
mapped files come on top, and the kernel takes those back whenever it wants to. The files were read just before, so that
the seconds are those of the code, not of a disk.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

DEVICES = 4


def own_memory() -> int:
    """Returns the bytes of this process that no file backs."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The most memory since `start`, in bytes, once it has `ended`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = own_memory()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.002):
            self.most = max(self.most, own_memory())


def load(folder: str, dtype: str, args: list[str]) -> None:
    """Prints what one process finds."""
    import jax
    import jax.numpy as jnp

    from orpo_jax import families, hosts, sharding, weights

    hosts.join(args)
    arch = families.architecture(json.loads((pathlib.Path(folder) / "config.json").read_text()), 1)
    mesh = sharding.make_mesh({"fsdp": -1})
    peak = Peak()
    peak.start()
    began = time.monotonic()
    params = jax.block_until_ready(weights.load_params(pathlib.Path(folder), arch, dtype=jnp.dtype(dtype), mesh=mesh))
    seconds = time.monotonic() - began
    peak.ended.set()
    peak.join()
    held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(json.dumps({"held": held, "peak": peak.most - peak.before, "seconds": seconds}), flush=True)
    hosts.exchange("done")


def measure(folder: pathlib.Path, dtype: str, count: int) -> list[dict[str, Any]]:
    """Returns what each of several processes found."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}"}
    processes = [subprocess.Popen(
        [sys.executable, __file__, "--load", str(folder), "--dtype", dtype, f"--coordinator_address={address}",
         f"--num_processes={count}", f"--process_id={i}"], env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(count)]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit(f"a process of {count} failed; what it printed says why")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", help="a shape of tools/benchmarking/models.py")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights in memory (default: the files')")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--load", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.load:
        return load(args.load, args.dtype, rest)
    if rest or any(DEVICES % count for count in args.processes):
        parser.error(f"must be known arguments, and numbers of processes that divide {DEVICES}, got {rest} and "
                     f"{args.processes}")
    from benchmarking import models

    with tempfile.TemporaryDirectory() as name:
        folder = models.write_model(args.model, pathlib.Path(name))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(f"{args.model}: files of {size / 1e9:.2f} GB, loaded as {args.dtype}\n")
        print("| processes | each must hold, GB | peak, GB | peak / held | seconds |")
        print("| ---: | ---: | ---: | ---: | ---: |")
        for count in args.processes:
            found = measure(folder, args.dtype, count)
            most = max(found, key=lambda one: one["peak"])
            print(f"| {count} | {most['held'] / 1e9:.2f} | {most['peak'] / 1e9:.2f} | "
                  f"{most['peak'] / most['held']:.2f} | {max(one['seconds'] for one in found):.1f} |", flush=True)
    return None


if __name__ == "__main__":
    main()
