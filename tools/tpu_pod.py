"""Trains on Cloud TPU VMs from a computer that has Python and gcloud; nothing else of the project is needed there:

    python tools/tpu_pod.py create orpo --zone us-west4-a --accelerator-type v5litepod-16 --spot
    python tools/tpu_pod.py setup orpo --zone us-west4-a
    python tools/tpu_pod.py run orpo --zone us-west4-a --restarts 10 -- --config configs/NAME.py [--config.KEY=VALUE]
    python tools/tpu_pod.py logs|status|stop|delete orpo --zone us-west4-a

Every command takes --dry-run, which prints the gcloud commands, one a line as a shell reads them, and runs none.
`--node-count N` after the name means N slices: TPU VMs NAME-0 to NAME-(N-1), in all commands as in `create`.
docs/launch.md goes through it step by step.
"""

import argparse
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a run reads of the project. README.md and LICENSE because pyproject.toml names them.
PARTS = ("pyproject.toml", "README.md", "LICENSE", "orpo_jax", "configs")

# https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX". TPU7x can only be had through GKE.
RUNTIMES = {
    "v6e": "v2-alpha-tpuv6e",
    "v5p": "v2-alpha-tpuv5",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v4": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v2": "tpu-ubuntu2204-base",
}
POLL_SECONDS = 30
# States of a queued resource from which it does not become ACTIVE any more.
LOST = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")

Command = list[str]


# ---- What the workers run: POSIX shell, on one line, so that a printed command can be pasted.

# A pid alone may belong to another process after a reboot; a finished child that nobody waits for has no arguments.
# -ww: ps cuts lines to the width of a terminal that it finds, such as ssh's.
ALIVE = ('pid=$(cat run/pid 2>/dev/null); '
         'alive() { [ -n "$pid" ] && ps -ww -o args= -p "$pid" | grep -q "orpo_jax[.]train"; };')
GOING_ON = 'if alive; then echo "$(hostname): a run is going on, pid $pid; stop it first" >&2; exit 1; fi;'


def one_line(text: str) -> str:
    """Returns the shell text without its line breaks; its lines end as commands on one line must."""
    return " ".join(text.split())


def clear_text() -> str:
    """Returns what makes room for the project: a file that it no longer has must not stay behind."""
    return one_line(f"""
        mkdir -p orpo_jax .cache/huggingface && cd orpo_jax || exit 1; {ALIVE} {GOING_ON} rm -rf orpo_jax configs""")


def install_text(extras: str) -> str:
    """Returns what installs the copied project into orpo_jax/.venv, with Python 3.12: the images' own is 3.10."""
    return one_line(f"""
        chmod -f 600 .cache/huggingface/token; cd orpo_jax || exit 1;
        [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh;
        [ -d .venv ] || ~/.local/bin/uv venv --python 3.12 .venv || exit 1;
        ~/.local/bin/uv pip install -e '.[{extras}]'""")


def loop_text(train_args: list[str], restarts: int) -> str:
    """Returns what starts the trainer, again only after exit code 75: it saved because of a SIGTERM.

    A SIGTERM to the loop itself goes to the trainer and ends the loop. `wait` returns early on a signal, hence the
    second one. The pause lets the other workers' processes end, before the new ones look for the coordinator.
    """
    # one_line would squeeze the spaces of arguments.
    loop = one_line(f"""
        n=0; stopping=; child=;
        trap 'stopping=1; kill -TERM "$child" 2>/dev/null' TERM;
        while :; do
            TRAIN & child=$!;
            [ -z "$stopping" ] || kill -TERM "$child";
            wait "$child"; code=$?;
            while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done;
            [ "$code" = 75 ] && [ -z "$stopping" ] && [ "$n" -lt {restarts} ] || break;
            n=$((n + 1)); echo "saved and stopped; restart $n of {restarts}"; sleep 10;
            [ -z "$stopping" ] || break;
        done;
        echo "$code" >run/exit; exit "$code" """)
    return loop.replace("TRAIN", shlex.join([".venv/bin/python", "-m", "orpo_jax.train", *train_args]))


def run_text(train_args: list[str], restarts: int) -> str:
    """Returns what starts the loop in the background: run/log, run/pid, and run/exit once it has ended."""
    return one_line(f"""
        cd orpo_jax && mkdir -p run || exit 1; {ALIVE} {GOING_ON} rm -f run/exit;
        nohup sh -c LOOP >>run/log 2>&1 </dev/null & echo $! >run/pid""").replace(
            "LOOP", shlex.quote(loop_text(train_args, restarts)))


def status_text() -> str:
    """Returns what prints one line about the run and the log's last line."""
    return one_line(f"""
        cd orpo_jax 2>/dev/null || {{ echo "$(hostname): not set up"; exit 0; }}; {ALIVE}
        if alive; then echo "$(hostname): running, pid $pid";
        elif [ -f run/exit ]; then echo "$(hostname): ended with exit code $(cat run/exit)";
        elif [ -n "$pid" ]; then echo "$(hostname): gone without an exit code";
        else echo "$(hostname): no run"; fi;
        tail -n 1 run/log 2>/dev/null; exit 0""")


def stop_text(timeout: int) -> str:
    """Returns what sends SIGTERM and waits until the trainer has saved and ended."""
    return one_line(f"""
        cd orpo_jax || exit 1; {ALIVE} alive || {{ echo "$(hostname): no run is going on"; exit 0; }};
        kill -TERM "$pid"; t=0;
        while alive; do
            [ "$t" -lt {timeout} ] || {{ echo "$(hostname): still running after {timeout} s" >&2; exit 1; }};
            sleep 1; t=$((t + 1));
        done;
        echo "$(hostname): ended with exit code $(cat run/exit)" """)


# ---- The gcloud commands.

def gcloud(args: argparse.Namespace, *words: str) -> Command:
    project = [f"--project={args.project}"] if args.project else []
    return ["gcloud", "compute", "tpus", *words, f"--zone={args.zone}", *project]


def nodes(args: argparse.Namespace) -> list[str]:
    """Returns the names of the TPU VMs: with several slices, gcloud numbers them."""
    return [args.name] if args.node_count == 1 else [f"{args.name}-{i}" for i in range(args.node_count)]


def ssh(args: argparse.Namespace, text: str) -> list[Command]:
    """Returns one command for each slice, which runs the text on all of its workers.

    Not `queued-resources ssh --node=all`: where it cannot reach a slice, it goes on with the rest and exits 0 (gcloud
    528). Nor are the MEGASCALE_* variables set that several slices need: the queued resource puts them into the VMs'
    `tpu-env` metadata, where jax looks for what the environment lacks ("For both GCE via QueuedResources and GKE via
    JobSet, the Megascale coordinator address is set", jax/_src/clusters/cloud_tpu_cluster.py).
    """
    return [gcloud(args, "tpu-vm", "ssh", node, "--worker=all", f"--command={text}") for node in nodes(args)]


def scp(args: argparse.Namespace, sources: list[str], target: str) -> list[Command]:
    return [gcloud(args, "tpu-vm", "scp", "--recurse", "--worker=all", *sources, f"{node}:{target}")
            for node in nodes(args)]


def call(args: argparse.Namespace, commands: list[Command]) -> None:
    """Runs the commands at once, and exits where one fails; prints them with --dry-run."""
    if args.dry_run:
        print("\n".join(map(shlex.join, commands)))
        return
    running = [subprocess.Popen(command) for command in commands]
    for command, code in zip(commands, [process.wait() for process in running], strict=True):
        if code:
            sys.exit(f"{shlex.join(command[:6])}: failed with exit code {code}; what it printed says why")


def describe(args: argparse.Namespace) -> Command:
    return gcloud(args, "queued-resources", "describe", args.name, "--format=value(state.state)")


def create(args: argparse.Namespace) -> None:
    """Asks for the TPUs and waits until they are there."""
    which = (["--node-id=" + args.name] if args.node_count == 1 else
             [f"--node-count={args.node_count}", f"--node-prefix={args.name}"])
    until = [f"--valid-until-duration={args.valid_until_duration}"] if args.valid_until_duration else []
    call(args, [gcloud(args, "queued-resources", "create", args.name, *which,
                       f"--accelerator-type={args.accelerator_type}", f"--runtime-version={args.runtime_version}",
                       *["--spot"] * args.spot, *until, "--async")])
    if args.dry_run:
        call(args, [describe(args)])
        return
    deadline = time.monotonic() + args.timeout
    while True:
        # gcloud itself says what went wrong; a question that fails is no reason to stop waiting.
        state = subprocess.run(describe(args), stdout=subprocess.PIPE, text=True).stdout.strip()
        print(f"{time.strftime('%H:%M:%S')} {args.name}: {state or 'no answer'}", flush=True)
        if state == "ACTIVE":
            return
        if state in LOST:
            sys.exit(f"{args.name}: is {state}; delete it and create it again")
        if time.monotonic() >= deadline:
            sys.exit(f"{args.name}: not ACTIVE after {args.timeout} s; the request stays in the queue, and `status` "
                     "shows it, until `delete` takes it out")
        time.sleep(POLL_SECONDS)


def setup(args: argparse.Namespace) -> None:
    """Copies the project to all workers and installs it there."""
    call(args, ssh(args, clear_text()))
    call(args, scp(args, [str(ROOT / part) for part in PARTS], "orpo_jax/"))
    if args.hf_token:
        call(args, scp(args, [str(args.hf_token)], ".cache/huggingface/token"))
    call(args, ssh(args, install_text(args.extras)))


def run(args: argparse.Namespace) -> None:
    call(args, ssh(args, run_text(args.train_args, args.restarts)))


def logs(args: argparse.Namespace) -> None:
    node = nodes(args)[args.node]
    call(args, [gcloud(args, "tpu-vm", "ssh", node, f"--worker={args.worker}",
                       "--command=tail -n 100 -F orpo_jax/run/log")])


def status(args: argparse.Namespace) -> None:
    call(args, [describe(args)])
    call(args, ssh(args, status_text()))


def stop(args: argparse.Namespace) -> None:
    call(args, ssh(args, stop_text(args.timeout)))


def delete(args: argparse.Namespace) -> None:
    """Gives the TPUs back, with all that is on their disks."""
    call(args, [gcloud(args, "queued-resources", "delete", args.name, "--force", "--quiet")])


# ---- The command line.

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One sentence, without the usage text that argparse puts before it."""
        self.exit(2, f"{message}\n")


def at_least(low: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, got {text!r}")
        return int(text)
    return number


def make_parser() -> Parser:
    parser = Parser(prog="tpu_pod.py", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(function.__name__, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(function=function)
        sub.add_argument("name", help="of the queued resource, and of its TPU VM")
        sub.add_argument("--zone", required=True)
        sub.add_argument("--project", help="gcloud's own where not given")
        sub.add_argument("--node-count", type=at_least(1), default=1, metavar="N", help="slices (default 1)")
        sub.add_argument("--dry-run", action="store_true", help="print the gcloud commands and run none")
        return sub

    sub = add(create, "ask for TPUs and wait until they are there")
    sub.add_argument("--accelerator-type", required=True, metavar="TYPE", help="of a slice: v5litepod-16, v6e-8")
    sub.add_argument("--runtime-version", metavar="VERSION", help="of the VM's image; follows from the type")
    sub.add_argument("--spot", action="store_true", help="cheaper, and can be taken away at any time")
    sub.add_argument("--valid-until-duration", metavar="TIME", help="give up after so long, such as 6h")
    sub.add_argument("--timeout", type=at_least(0), default=3600, metavar="SECONDS", help="to wait (default 3600)")
    sub = add(setup, "copy the project to all workers and install it")
    sub.add_argument("--extras", default="tpu", help="of pyproject.toml (default tpu)")
    sub.add_argument("--hf-token", type=pathlib.Path, metavar="FILE", help="with a Hugging Face token, to copy")
    sub = add(run, "start training on all workers; the trainer's own arguments follow after --")
    sub.add_argument("--restarts", type=at_least(0), default=0, metavar="N", help="after exit code 75 (default 0)")
    sub = add(logs, "follow the log of a worker")
    sub.add_argument("--worker", type=at_least(0), default=0, metavar="N", help="of the slice (default 0)")
    sub.add_argument("--node", type=at_least(0), default=0, metavar="N", help="the slice (default 0)")
    add(status, "say how the TPUs and the run are")
    sub = add(stop, "send SIGTERM to the run on all workers and wait until it has saved")
    sub.add_argument("--timeout", type=at_least(1), default=600, metavar="SECONDS", help="to wait (default 600)")
    add(delete, "give the TPUs back")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the arguments, checked. Exits with code 2 and one sentence for what a user got wrong."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = make_parser()
    args = parser.parse_args(argv[:cut])
    args.train_args = argv[cut + 1:]

    def check(holds: object, key: str, rule: str, value: object, advice: str) -> None:
        if not holds:
            parser.error(f"{key}: {rule}, got {value}; {advice}")

    check(re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name), "name",
          "must be lower-case letters, digits and hyphens, at most 40, a letter first", args.name, "choose another")
    check(args.function is run or cut == len(argv), "--", "only `run` passes arguments on to the trainer",
          shlex.join(args.train_args), "leave it out")
    if args.function is create:
        kind = args.accelerator_type.rpartition("-")[0]
        check(args.runtime_version or kind in RUNTIMES, "--accelerator-type",
              f"must be one of {', '.join(RUNTIMES)}, a hyphen and a size", args.accelerator_type,
              "give --runtime-version for another kind; TPU7x is only to be had through GKE (docs/launch.md, xpk)")
        args.runtime_version = args.runtime_version or RUNTIMES[kind]
    if args.function is setup:
        check(re.fullmatch(r"\w+(,\w+)*", args.extras), "--extras", "must be names with commas between", args.extras,
              "see [project.optional-dependencies] in pyproject.toml")
        check(args.hf_token is None or args.hf_token.is_file(), "--hf-token", "must be a file that holds the token",
              "no such file", "`hf auth login` leaves one in ~/.cache/huggingface/token")
    if args.function is logs:
        check(args.node < args.node_count, "--node", f"must be below --node-count, {args.node_count}", args.node,
              "slices are numbered from 0")
    if args.function is run:
        token = os.environ.get("HF_TOKEN")
        check(not token or not any(token in arg for arg in args.train_args), "HF_TOKEN",
              "must not stand on a command line", "it among the trainer's arguments", "use `setup --hf-token FILE`")
        config = re.search(r"(?:^|\0)--config[=\0]([^\0]+)", "\0".join(args.train_args))
        check(config, "--", "must be followed by the trainer's --config FILE",
              shlex.join(args.train_args) or "nothing", "for example `-- --config configs/demo.py`")
        path = pathlib.PurePosixPath(config[1] if config else "")
        check(path.parts[:1] == ("configs",) and (ROOT / path).is_file(), "--config",
              "must be a file under the project's configs/, since that is what `setup` copies", path, "put it there")
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
