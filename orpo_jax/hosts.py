"""Several processes that train together: they join, agree on what they do, and stop or fail as one.

JAX's own runtime connects them (`jax.distributed`). On Cloud TPU, Slurm, Open MPI and Kubernetes it finds out who they
are; elsewhere each is told, by `--coordinator_address HOST:PORT --num_processes N --process_id I`, or by the variables
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
from etils import epath

# What `jax.distributed` keeps to itself: who the processes are before they are connected, and the store of short texts
# through which they can say what is wrong where no array can be exchanged.
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state as runtime
from jax.experimental import multihost_utils

from orpo_jax.metrics import log, set_up_logging

FLAGS = {"--coordinator_address": str, "--num_processes": int, "--process_id": int, "--join_timeout": int}
# The exit code of a run that was told to stop, and saved: EX_TEMPFAIL of sysexits.h. The same command goes on.
PREEMPTED = 75
JOIN_SECONDS = 300
# How long the others may take to read and tokenise the data, say. One that dies meanwhile is noticed much earlier.
AGREE_SECONDS = 3600
# After how long of silence a process counts as dead, and the others end: JAX's own default is 100.
HEARTBEAT_SECONDS = 30
# How long a file system that hosts share may take to show one of them what another did; NFS remembers for a minute.
SEE_SECONDS = 90
# How long a process that fails stays, so that the others can read why: process 0 takes the store with it.
LAST_WORDS_SECONDS, WATCH_SECONDS = 3.0, 1.0


class Preempted(SystemExit):
    """Raised once a run that was told to stop is saved; a program that does not catch it exits with code 75."""

    def __init__(self, message: str):
        super().__init__(PREEMPTED)
        log.info(message)


# Joining


def join(args: list[str]) -> list[str]:
    """Connects this process to the others of its run, if there are any, and returns what is left of the arguments.

    To be called before anything else of JAX. Raises ValueError where processes do not come, or not as told.
    """
    found, rest = _parse(args)
    timeout = found.pop("join_timeout", None) or JOIN_SECONDS
    told = {name: found.get(name, os.environ.get(f"JAX_{name.upper()}")) for name in
            ("coordinator_address", "num_processes", "process_id")}
    count, index = (None if told[name] is None else _integer(told[name], name) for name in
                    ("num_processes", "process_id"))
    address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
        told["coordinator_address"], count, index, None, None, timeout)
    known = {"coordinator_address": address, "num_processes": count, "process_id": index}
    if count == 1 or set(known.values()) == {None}:  # alone, with all devices that there are
        return rest
    for name, value in known.items():
        if value is None:
            raise ValueError(f"--{name}: must be given where another of {', '.join(known)} is, got neither the flag "
                             f"nor JAX_{name.upper()}")
    assert address is not None and count is not None and index is not None
    if not address.rpartition(":")[2].isdigit():
        raise ValueError(f"--coordinator_address: must be HOST:PORT of process 0, got {address!r}")
    if not 0 <= index < count:
        raise ValueError(f"--process_id: must be from 0 to {count - 1}, since there are {count} processes, got {index}")
    names = roll_call(address, count, index, timeout)
    # It finds out by itself which devices are this process's: JAX_LOCAL_DEVICE_IDS, or on Slurm the one of its number.
    jax.distributed.initialize(address, count, index, initialization_timeout=timeout,
                               heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), daemon=True)
    watch.start()
    atexit.register(lambda: (ended.set(), watch.join()))
    if jax.process_index() != index:  # a TPU numbers its hosts itself
        raise ValueError(f"--process_id: must be {jax.process_index()} on {socket.gethostname()}, as its devices say, "
                         f"got {index}; leave the flags out, or number the hosts so")
    set_up_logging()
    log.info("%d processes joined, on %s", count, ", ".join(dict.fromkeys(names)))
    return rest


def _parse(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    found, rest, left = {}, [], list(args)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag not in FLAGS:
            rest.append(flag + equals + value)
            continue
        if not equals and not left:
            raise ValueError(f"{flag}: needs a value")
        value = value if equals else left.pop(0)
        found[flag[2:]] = value if FLAGS[flag] is str else _integer(value, flag[2:])
    return found, rest


def _integer(value: Any, name: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--{name}: must be a number, got {value!r}") from None


def roll_call(address: str, count: int, index: int, timeout: float) -> list[str]:
    """Returns where each process runs; ValueError in all that came, naming those that did not.

    JAX's runtime aborts a process whose peers are late, and does not say which. So all of them first report to process
    0, at the port that the runtime takes next.
    """
    deadline, here = time.monotonic() + timeout, socket.gethostname()
    host, _, port = address.rpartition(":")
    if index == 0:
        answer = _hear(int(port), count, here, deadline)
    else:
        answer = _report(host.strip("[]"), int(port), {"index": index, "count": count, "host": here}, deadline)
        if answer is None:
            raise ValueError(f"--coordinator_address: process 0 must answer at {address} within {timeout:.0f} s, and "
                             "did not; is it running, and is the port open to this host?")
    if "problem" in answer:
        raise ValueError(answer["problem"])
    return answer["names"]


def _hear(port: int, count: int, here: str, deadline: float) -> dict[str, Any]:
    """Returns what process 0 tells all others, once all are there or it is too late."""
    waiting: list[tuple[int, str, socket.socket]] = []
    came = {0: here}
    problem = None
    try:
        server = (socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
                  if socket.has_dualstack_ipv6() else socket.create_server(("", port)))
    except OSError as error:
        raise ValueError(f"--coordinator_address: port {port} must be free on process 0, got {error}; choose another "
                         "port, on all processes") from None
    with server:
        while len(came) < count and problem is None and time.monotonic() < deadline:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                try:
                    connection.settimeout(10)
                    said = json.loads(connection.makefile().readline())
                    index, other, name = said["index"], said["count"], said["host"]
                except (OSError, ValueError, KeyError, TypeError):  # no process of ours
                    connection.close()
                    continue
                waiting = [one for one in waiting if not _gone(one[2])]  # what is gone may be started again
                came = {0: here} | {i: where for i, where, _ in waiting}
                if other != count:
                    problem = (f"--num_processes: must be the same on all, got {count} on process 0 ({here}) and "
                               f"{other} on process {index} ({name})")
                elif index in came:
                    problem = (f"--process_id: must differ, got {index} on {came[index]} and on {name}; number the "
                               f"processes from 0 to {count - 1}")
                came[index] = name
                waiting.append((index, name, connection))
        if problem is None and len(came) < count:
            absent = sorted(set(range(count)) - set(came))
            problem = (f"--num_processes: {count} processes must join, and {_listed(absent)} did not in time "
                       f"({', '.join(f'{i} is {came[i]}' for i in sorted(came)[:8])} did); start them, or see why they "
                       "failed")
        answer: dict[str, Any] = {"problem": problem} if problem else {"names": [came[i] for i in range(count)]}
        for *_, connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")
                connection.recv(1)  # the other side closes first, so that the port is free at once
            connection.close()
    return answer


def _gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(10)


def _report(host: str, port: int, said: Mapping[str, Any], deadline: float) -> dict[str, Any] | None:
    """Returns what process 0 answers; None where it does not."""
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(json.dumps(said).encode() + b"\n")
                # Process 0 may have started earlier or later, and says at its own deadline who is missing.
                connection.settimeout(left + JOIN_SECONDS)
                if line := connection.makefile().readline():
                    return json.loads(line)
        except (OSError, ValueError):  # not there yet, or still another program's
            pass
        time.sleep(0.2)
    return None


def _listed(indices: list[int]) -> str:
    more = f" and {len(indices) - 16} more" if len(indices) > 16 else ""
    return ("process " if len(indices) == 1 else "processes ") + ", ".join(map(str, indices[:16])) + more


# Agreeing


def several() -> bool:
    """Returns whether this run has more than one process."""
    return runtime.client is not None and runtime.num_processes > 1


def me() -> str:
    return f"process {runtime.process_id} ({socket.gethostname()})"


def _store() -> Any:
    return runtime.client


T = TypeVar("T")
_exchanges = 0


def exchange(value: Any) -> list[Any]:
    """Returns the value of every process, in their order; each must call it equally often. For short plain values."""
    if not several():
        return [value]
    global _exchanges
    _exchanges += 1
    key, deadline = f"orpo_jax/exchange/{_exchanges}", time.monotonic() + AGREE_SECONDS
    _store().key_value_set(f"{key}/{runtime.process_id}", json.dumps(value))
    values = []
    for index in range(runtime.num_processes):
        left = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            values.append(json.loads(_store().blocking_key_value_get(f"{key}/{index}", left)))
        except jax.errors.JaxRuntimeError as error:
            raise ValueError(f"--num_processes: process {index} must come as far as the others within "
                             f"{AGREE_SECONDS} s, and did not ({str(error).splitlines()[0]})") from error
    return values


def told_by_first(question: Callable[[], T]) -> T:
    """Returns in every process what process 0 finds."""
    return exchange(question() if runtime.process_id == 0 else None)[0]


def agree(what: Mapping[str, Any]) -> None:
    """Raises a ValueError in every process where they differ in some values, by key, and says who has which."""
    first, *others = exchange({"host": socket.gethostname(), "what": dict(what)})
    problems = {}
    for index, other in enumerate(others, 1):
        for key in {**first["what"], **other["what"]}:
            one, two = first["what"].get(key), other["what"].get(key)
            if one != two:
                problems.setdefault(key, f"{key}: must be the same on every host, got {one!r} on process 0 "
                                         f"({first['host']}) and {two!r} on process {index} ({other['host']})")
    if problems:
        raise ValueError("; ".join(problems.values()))


def check_all_see(sees: Callable[[], bool], key: str, folder: epath.Path) -> None:
    """Raises a ValueError in every process unless each of them sees what is in a folder, at once or a little later."""
    deadline = time.monotonic() + SEE_SECONDS
    while not (seen := sees()) and time.monotonic() < deadline:
        time.sleep(1)
    if blind := [i for i, one in enumerate(exchange(seen)) if not one]:
        raise ValueError(f"{key}: must be a folder that every host sees, got {str(folder)!r}, in which "
                         f"{_listed(blind)} can't see what process 0 does; choose one on a shared file system, or a "
                         "bucket for checkpoint.folder")


def check_shared(folder: epath.Path, key: str) -> None:
    """Raises a ValueError in every process unless all of them have the same file system where `folder` is to be."""
    if not several():
        return

    def write() -> str:
        # A bucket has no folders, only names.
        nearest = folder if "://" in str(folder) else next(
            parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        probe = nearest / f".orpo_jax-{uuid.uuid4().hex}"
        probe.write_text("")
        return str(probe)

    probe = epath.Path(told_by_first(write))
    try:
        check_all_see(probe.exists, key, folder)
    finally:
        if runtime.process_id == 0:
            probe.unlink()


# Stopping and failing


_asks = 0  # of JAX's preemption service, which counts them over all runs of a process


class Stop:
    """Whether this run was told to stop: SIGTERM to any of its processes, as of spot machines and of Slurm."""

    def __init__(self):
        self.told = self.asked_before = False
        # Among several processes JAX's preemption service takes the signal, and settles where all of them stop.
        self.serviced = runtime.preemption_sync_manager is not None
        if not self.serviced and threading.current_thread() is threading.main_thread():
            self.before: Any = signal.signal(signal.SIGTERM, self._tell)

    def _tell(self, *_: Any) -> None:
        self.told = True
        if not self.asked_before:
            self.check()

    def asked(self) -> bool:
        """Returns the same answer in every process; each must ask equally often. Once True, a run has to stop."""
        self.asked_before = True
        if self.serviced and not self.told:
            global _asks
            _asks += 1
            self.told = multihost_utils.reached_preemption_sync_point(_asks)
        return self.told

    def check(self) -> None:
        """Raises Preempted if told to stop; to be called where nothing is to be saved."""
        if self.told or (self.serviced and self.asked()):
            raise Preempted("stopped before a step was taken; the same command starts again")

    def __enter__(self) -> "Stop":
        return self

    def __exit__(self, *_: Any) -> None:
        if hasattr(self, "before"):
            signal.signal(signal.SIGTERM, self.before)


_FAILED = "orpo_jax/failed"
_last_words = threading.Lock()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Ends all processes where one fails, each of them saying which and why: the others would wait for it."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if not several():
            raise
        _last_words.acquire()  # for good: nobody else may end this process now
        plain = isinstance(error, (ValueError, KeyboardInterrupt))
        text = (str(error) or "interrupted") if plain else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):  # the first one to fail is in the store already, or the store is gone
            _store().key_value_set(_FAILED, f"{me()}: {text}")
        if not plain:
            traceback.print_exception(error)
        _exit(f"error: {text}", LAST_WORDS_SECONDS)


def _watch(ended: threading.Event) -> None:
    # It looks, and does not wait in the store: a thread that is there when Python ends takes the process with it.
    while not ended.wait(WATCH_SECONDS):
        try:
            text = _store().key_value_try_get(_FAILED)
        except jax.errors.JaxRuntimeError:  # nobody failed; or the store is gone, and JAX's runtime ends this process
            continue
        if _last_words.acquire(blocking=False):
            _exit(f"error: {text}", LAST_WORDS_SECONDS if runtime.process_id == 0 else 0)
        return


def _exit(message: str, seconds: float) -> NoReturn:
    """Ends the process at once: an orderly end would wait for processes that are gone."""
    print(message, file=sys.stderr, flush=True)
    time.sleep(seconds)
    os._exit(1)
