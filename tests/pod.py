"""Runs of several processes on this machine. As a script it is one of them, with what a test wants to happen to it.

    python pod.py '{"configs": [...], "event": [POINT, COUNT, SIGNAL], "seen": FILE, "rows": [...]}' [FLAGS of hosts.py]
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

DEVICES = 4
FOLDER = pathlib.Path(__file__).parent


def start(specs: list[Any], *, script: pathlib.Path = FOLDER / "pod.py") -> list[subprocess.Popen]:
    """Starts a process for each spec, with four devices in all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    count = len(specs)
    environment = {**os.environ, "PYTHONPATH": f"{FOLDER.parent}{os.pathsep}{FOLDER}",
                   "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}"}
    return [subprocess.Popen(
        [sys.executable, str(script), json.dumps(spec), f"--coordinator_address=127.0.0.1:{port}",
         f"--num_processes={count}", f"--process_id={i}"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for i, spec in enumerate(specs)]


def finish(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """Returns the exit code and the output of each."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def after(owner: Any, name: str, do: Any) -> None:
    """Lets `do(calls so far, arguments)` follow each call of a function."""
    original, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(None)
        do(len(calls), args)
        return result

    setattr(owner, name, wrapped)


def main(spec: dict[str, Any], args: list[str]) -> None:
    from orpo_jax import checkpoint, evaluate, hosts, metrics, packing, train

    hosts.HEARTBEAT_SECONDS = 5
    seen: list[int] = []
    if "event" in spec:
        point, count, name = spec["event"]
        owner, function = {"step": (metrics.Meter, "add"), "save": (checkpoint.Checkpoints, "save"),
                           "evaluation": (evaluate, "to_devices")}[point]

        def strike(calls: int, _: Any) -> None:
            if calls == count:
                os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
                time.sleep(2)  # a signal takes its time to reach all; steps so small would be over by then

        after(owner, function, strike)
    if "seen" in spec:  # rows of a step are made by a thread, held-out rows by the main one
        after(packing, "build_rows", lambda _, args: threading.current_thread() is threading.main_thread() or
              seen.extend(i for row in args[1] for i in row))
    assert hosts.join(args) == []
    with hosts.failing_together():
        for config in spec["configs"]:
            train.run(config, train_rows=spec.get("rows"))
    if "seen" in spec:
        pathlib.Path(spec["seen"]).write_text(json.dumps(seen))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
