"""Trains on Cloud TPU VMs from a computer that has Python and gcloud; nothing else of the project is needed there:

    python tools/tpu_pod.py create orpo --zone us-west4-a --accelerator-type v5litepod-16 --spot
    python tools/tpu_pod.py setup orpo --zone us-west4-a
    python tools/tpu_pod.py run orpo --zone us-west4-a -- --config configs/NAME.py [--config.KEY=VALUE ...]
    python tools/tpu_pod.py logs|status|stop|delete orpo --zone us-west4-a

`--dry-run` prints the gcloud commands, one a line as a shell reads them, and runs none. `--node-count N` means N
slices, in every command: TPU VMs NAME-0 to NAME-(N-1). tpu_worker.sh is what runs on the workers; docs/launch.md goes
through it all step by step.
"""

import argparse
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a run needs of the project. README.md and LICENSE because pyproject.toml names them.
PARTS = ("pyproject.toml", "README.md", "LICENSE", "orpo_jax", "configs", "tools/tpu_worker.sh")

# The image of each kind: https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX". TPU7x is GKE's alone.
RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}
POLL_SECONDS = 30
# From these a queued resource does not become ACTIVE any more.
LOST = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")


def gcloud(args: argparse.Namespace, *words: str) -> list[str]:
    project = [f"--project={args.project}"] if args.project else []
    return ["gcloud", "compute", "tpus", *words, f"--zone={args.zone}", *project]


def nodes(args: argparse.Namespace) -> list[str]:
    return [args.name] if args.node_count == 1 else [f"{args.name}-{i}" for i in range(args.node_count)]


def call(args: argparse.Namespace, commands: list[list[str]]) -> None:
    """Runs the commands at once, and exits where one of them fails; prints them with --dry-run."""
    if args.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return
    running = [subprocess.Popen(command) for command in commands]
    for command, code in zip(commands, [process.wait() for process in running], strict=True):
        if code:
            sys.exit(f"{shlex.join(command[:6])}: failed with exit code {code}; what it printed says why")


def state(args: argparse.Namespace) -> str:
    """Returns the state of the queued resource: ACTIVE once its TPUs are there, and with --dry-run."""
    command = gcloud(args, "queued-resources", "describe", args.name, "--format=value(state.state)")
    if args.dry_run:
        print(shlex.join(command))
        return "ACTIVE"
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()
    print(f"{time.strftime('%H:%M:%S')} {args.name}: {found or 'no answer'}", flush=True)
    return found


def on_workers(args: argparse.Namespace, *words: str) -> None:
    """Runs a command line on all workers of all slices.

    With `tpu-vm ssh` for each slice, since `queued-resources ssh --node=all` goes on and exits with 0 where it can't
    reach one (gcloud 528). Several slices find each other without more: the queued resource writes their addresses to
    the VMs' metadata, where JAX looks (jax/_src/clusters/cloud_tpu_cluster.py).
    """
    call(args, [gcloud(args, "tpu-vm", "ssh", node, "--worker=all", f"--command={shlex.join(words)}")
                for node in nodes(args)])


def copy(args: argparse.Namespace, sources: list[str], target: str) -> None:
    call(args, [gcloud(args, "tpu-vm", "scp", "--recurse", "--worker=all", *sources, f"{node}:{target}")
                for node in nodes(args)])


def create(args: argparse.Namespace) -> None:
    """ask for TPUs and wait until they are there; what follows -- goes to gcloud"""
    which = ([f"--node-id={args.name}"] if args.node_count == 1 else
             [f"--node-count={args.node_count}", f"--node-prefix={args.name}"])
    call(args, [gcloud(args, "queued-resources", "create", args.name, *which,
                       f"--accelerator-type={args.accelerator_type}", f"--runtime-version={args.runtime_version}",
                       *["--spot"] * args.spot, *args.rest)])
    while (found := state(args)) != "ACTIVE":
        if found in LOST:
            sys.exit(f"{args.name}: must become ACTIVE, and is {found}; delete it and create it again")
        time.sleep(POLL_SECONDS)


def setup(args: argparse.Namespace) -> None:
    """copy the project to all workers and install it there"""
    on_workers(args, "mkdir", "-p", "orpo_jax", ".cache/huggingface")
    copy(args, [str(ROOT / part) for part in PARTS], "orpo_jax/")
    if args.hf_token:
        copy(args, [args.hf_token], ".cache/huggingface/token")
    on_workers(args, "sh", "orpo_jax/tpu_worker.sh", "setup", args.extras)


def run(args: argparse.Namespace) -> None:
    """start training on all workers; what follows -- goes to the trainer"""
    on_workers(args, "sh", "orpo_jax/tpu_worker.sh", "run", *args.rest)


def logs(args: argparse.Namespace) -> None:
    """follow the log of one worker"""
    call(args, [gcloud(args, "tpu-vm", "ssh", nodes(args)[args.node], f"--worker={args.worker}",
                       "--command=tail -n 100 -F orpo_jax/run/log")])


def status(args: argparse.Namespace) -> None:
    """say how the TPUs are, and the run on each worker"""
    if state(args) == "ACTIVE":
        on_workers(args, "sh", "orpo_jax/tpu_worker.sh", "status")


def stop(args: argparse.Namespace) -> None:
    """send SIGTERM to the run on all workers, and wait until it has saved"""
    on_workers(args, "sh", "orpo_jax/tpu_worker.sh", "stop")


def delete(args: argparse.Namespace) -> None:
    """give the TPUs back, with all that is on their disks"""
    call(args, [gcloud(args, "queued-resources", "delete", args.name, "--force", "--quiet")])


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tpu_pod.py", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    subs = {}
    for function in (create, setup, run, logs, status, stop, delete):
        sub = subs[function] = commands.add_parser(function.__name__, help=function.__doc__,
                                                   description=function.__doc__)
        sub.set_defaults(function=function)
        sub.add_argument("name", help="of the queued resource, and of its TPU VM")
        sub.add_argument("--zone", required=True)
        sub.add_argument("--project", help="gcloud's own where not given")
        sub.add_argument("--node-count", type=int, default=1, metavar="N", help="slices (default 1)")
        sub.add_argument("--dry-run", action="store_true", help="print the gcloud commands and run none")
    subs[create].add_argument("--accelerator-type", required=True, metavar="TYPE", help="of a slice: v5litepod-16")
    subs[create].add_argument("--runtime-version", metavar="IMAGE", help="of the VM; follows from the type")
    subs[create].add_argument("--spot", action="store_true", help="cheaper, and can be taken away at any time")
    subs[setup].add_argument("--extras", default="tpu", help="of pyproject.toml (default tpu)")
    subs[setup].add_argument("--hf-token", metavar="FILE", help="with a Hugging Face token, to copy")
    subs[logs].add_argument("--node", type=int, default=0, metavar="N", help="the slice (default 0)")
    subs[logs].add_argument("--worker", type=int, default=0, metavar="N", help="of the slice (default 0)")

    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1:]
    if args.node_count < 1:
        parser.error(f"--node-count: must be at least 1, got {args.node_count}")
    if args.function is run and not args.rest:
        parser.error("--: must be followed by the trainer's arguments, got none; add `-- --config configs/NAME.py`")
    if args.function not in (create, run) and args.rest:
        parser.error(f"--: only create and run take more arguments, got {shlex.join(args.rest)}; leave them out")
    if args.function is logs and not 0 <= args.node < args.node_count:
        parser.error(f"--node: must be from 0 to --node-count - 1, got {args.node} of {args.node_count}")
    if args.function is create and not args.runtime_version:
        kind = args.accelerator_type.rpartition("-")[0]
        if kind not in RUNTIMES:
            parser.error(f"--accelerator-type: must be a kind, a hyphen and a size, of {', '.join(RUNTIMES)}, got "
                         f"{args.accelerator_type}; give --runtime-version for another kind")
        args.runtime_version = RUNTIMES[kind]
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if not args.dry_run and shutil.which("gcloud") is None:
        sys.exit("gcloud: must be on PATH, got none; install it (https://cloud.google.com/sdk/docs/install)")
    try:
        args.function(args)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
