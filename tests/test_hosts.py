"""Runs of several processes: they train like one, name who is missing or differs, and survive being stopped."""

import collections
import concurrent.futures
import json
import pathlib
import re
import shutil
import signal
import socket
import time

import numpy as np
import pod
import pytest
import tiny
from safetensors.numpy import load_file

from orpo_jax import hosts, train

PAIRS, BATCH, PREEMPTED = 20, 4, 75
LAYOUTS = {"shared": {}, "apart": {"packing": False, "share_prompt": False}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {"train": str(tiny.write_rows(folder / "train.jsonl", tiny.make_rows(PAIRS, "standard"))),
            "eval": str(tiny.write_rows(folder / "eval.jsonl", tiny.make_rows(7, "implicit", seed=9)))}


def config_of(folder, model, rows, *, steps=10, **data):
    return {"output_dir": str(folder), "model": {"path": str(model)}, "data": {"max_length": 64, **rows, **data},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 3}, "train": {"batch_size": BATCH, "max_steps": steps},
            "checkpoint": {"save_steps": 4}, "log": {"logging_steps": 1},
            "eval": {"eval_strategy": "steps", "eval_steps": 5, "batch_size": 2,
                     "generate": {"num_samples": 4, "max_new_tokens": 2}}}


def lines_of(folder):
    """Returns metrics.jsonl without what takes time."""
    times = ("per_second", "runtime", "seconds", "memory", "mfu")
    return [{key: value for key, value in json.loads(line).items() if not any(time in key for time in times)}
            for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder):
    return load_file(folder / "hf" / "model.safetensors")


def assert_close(folder, expected):
    """The design's tolerances: of metrics, and of weights after ten steps of Adam at 1e-3."""
    for line, other in zip(lines_of(folder), lines_of(expected), strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            if key != "padding_fraction":  # of how many rows there are, and more shards have more
                assert abs(value - other[key]) <= 1e-4 * max(abs(other[key]), 1e-2), (line["step"], key)
    for name, tensor in weights_of(expected).items():
        assert np.linalg.norm(weights_of(folder)[name] - tensor) <= 5e-5 * np.linalg.norm(tensor), name


def assert_bitwise(folder, expected):
    assert lines_of(folder) == lines_of(expected)
    for name, tensor in weights_of(expected).items():
        assert weights_of(folder)[name].tobytes() == tensor.tobytes(), name


def layouts(folder, model, rows):
    """Returns a config for each layout, without evaluation."""
    return [config_of(folder / name, model, rows, **data) | {"eval": {}} for name, data in LAYOUTS.items()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model_folder, rows):
    """The run of one process, in each layout."""
    folder = tmp_path_factory.mktemp("alone")
    for config in layouts(folder, model_folder, rows):
        train.run(config)
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_like_one(tmp_path, model_folder, rows, alone, count):
    configs = layouts(tmp_path, model_folder, rows)
    results = pod.finish(pod.start([{"configs": configs, "seen": str(tmp_path / f"{i}.json")} for i in range(count)]))
    assert [code for code, _ in results] == [0] * count, results
    for name in LAYOUTS:
        assert_close(tmp_path / name, alone / name)
    epochs = len(LAYOUTS) * 10 * BATCH // PAIRS
    parts = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(count)]
    assert collections.Counter(i for part in parts for i in part) == dict.fromkeys(range(PAIRS), epochs)
    assert all(len(part) < epochs * PAIRS for part in parts)  # nobody built it all
    assert not any("step 1 of" in output for _, output in results[1:])  # only process 0 speaks


# Joining


def roll_call(told, timeout=10.0):
    """Returns what each process, told its (count, index), is answered: the hosts, or the problem."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

    def one(count, index):
        try:
            return hosts.roll_call(address, count, index, timeout)
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(len(told)) as pool:
        return list(pool.map(one, *zip(*told, strict=True)))


def test_all_of_them_join():
    assert roll_call([(3, 0), (3, 1), (3, 2)]) == [[socket.gethostname()] * 3] * 3


@pytest.mark.parametrize("told, timeout, problem", [
    ([(4, 0), (4, 1), (4, 3)], 1.0, "4 processes must join, and process 2 did not in time"),
    ([(3, 1), (3, 0), (3, 1)], 10.0, "--process_id: must differ, got 1 on"),
    ([(2, 0), (3, 1)], 10.0, "--num_processes: must be the same on all, got 2 on process 0"),
])
def test_all_that_came_say_what_is_wrong(told, timeout, problem):
    answers = roll_call(told, timeout)
    assert all(problem in answer for answer in answers), answers


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_one_that_is_started_again_while_the_others_wait(order):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        join = lambda index: pool.submit(hosts.roll_call, "{}:{}".format(*address), 3, index, 10.0)
        joined = [join(0)]
        time.sleep(0.3)
        with socket.create_connection(address) as dead:
            dead.sendall(json.dumps({"index": 1, "count": 3, "host": "dead"}).encode() + b"\n")
            time.sleep(0.3)
        for index in order:
            joined.append(join(index))
            time.sleep(0.3)
        assert [one.result() for one in joined] == [[socket.gethostname()] * 3] * 3


def test_process_0_that_never_comes_is_named():
    [answer] = roll_call([(2, 1)], 0.5)
    assert "--coordinator_address: process 0 must answer at 127.0.0.1:" in answer


@pytest.mark.parametrize("flags, problem", [
    (["--num_processes=2"], "--coordinator_address: must be given where another"),
    (["--coordinator_address=host", "--num_processes=2", "--process_id=0"], "must be HOST:PORT of process 0, got"),
    (["--coordinator_address=host:1", "--num_processes=2", "--process_id=2"], "--process_id: must be from 0 to 1"),
    (["--num_processes", "two"], "--num_processes: must be a number, got 'two'"),
    (["--process_id"], "--process_id: needs a value"),
])
def test_flags_that_do_not_do(flags, problem, monkeypatch):
    for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
        monkeypatch.delenv(f"JAX_{name}", raising=False)
    with pytest.raises(ValueError) as error:
        hosts.join(flags)
    assert problem in str(error.value)


def test_a_run_that_is_told_nothing_is_alone():
    assert hosts.join(["--config", "x.py", "--config.seed=1"]) == ["--config", "x.py", "--config.seed=1"]
    assert not hosts.several()


# Agreeing


def test_two_that_differ_are_named_in_both(tmp_path, model_folder, rows):
    """Each case in turn; then one of them fails, and both end."""
    results = pod.finish(pod.start([{"folder": str(tmp_path), "index": i} for i in range(2)],
                                   script=pathlib.Path(__file__)))
    for code, output in results:
        assert code == 1
        for line in ("agreed", "seed: must be the same on every host, got 0 on process 0", "and 1 on process 1",
                     "in which process 1 can't see what process 0 does", "process 1 is the one"):
            assert line in output, (line, output)
    assert "optim" not in results[0][1]


def member(spec, args):
    """What each of those two does."""
    from etils import epath

    hosts.SEE_SECONDS = 1
    hosts.join(args)
    folder, index = epath.Path(spec["folder"]), spec["index"]
    with hosts.failing_together():
        hosts.agree({"seed": 3, "optim": {"lr": [1.0]}})
        assert hosts.exchange(index) == [0, 1] and hosts.told_by_first(lambda: index) == 0
        hosts.check_shared(folder / "new" / "one", "output_dir")
        assert index or not list(folder.iterdir())  # process 0 takes away what it wrote
        print("agreed")
        for wrong in (lambda: hosts.agree({"seed": index, "optim": 1}),
                      lambda: hosts.check_all_see(lambda: index == 0, "output_dir", folder)):
            try:
                wrong()
                raise SystemExit("nothing was wrong")
            except ValueError as error:
                print(error)
        if index == 1:
            raise ValueError("process 1 is the one")
        hosts.exchange("for ever")


@pytest.mark.slow
@pytest.mark.parametrize("change, problem", [
    ({"seed": 5}, "seed: must be the same on every host, got 42 on process 0"),
    ({"data": {"max_length": 32}}, "data.max_length: must be the same"),
    ({"output_dir": "elsewhere"}, "output_dir: must be the same on every host"),
])
def test_a_run_of_two_configs_does_not_start(tmp_path, model_folder, rows, change, problem):
    configs = [config_of(tmp_path / "run", model_folder, rows) for _ in range(2)]
    for section, value in change.items():
        configs[1][section] = configs[1][section] | value if isinstance(value, dict) else value
    for code, output in pod.finish(pod.start([{"configs": [config]} for config in configs])):
        assert code == 1 and problem in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_of_two_data_sets_does_not_start(tmp_path, model_folder, rows):
    """One file by name, with other rows on each host, as after a copy that was cut short."""
    first = {"configs": [config_of(tmp_path / "run", model_folder, rows)]}
    second = {**first, "rows": tiny.make_rows(PAIRS, "standard", seed=1)}
    for code, output in pod.finish(pod.start([first, second])):
        assert code == 1 and "data.train: must be the same on every host" in output


# Stopping


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_folder, rows):
    """The run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    results = pod.finish(pod.start([{"configs": [config_of(folder, model_folder, rows)]}] * 2))
    assert [code for code, _ in results] == [0, 0], results
    return folder


def disturb(config, events, count=2):
    """Runs a config, with an event (or None) for each process; returns their exit codes and outputs."""
    return pod.finish(pod.start([{"configs": [config], **({"event": event} if event else {})} for event in events]
                                + [{"configs": [config]}] * (count - len(events))))


def stopped(results):
    return [code for code, _ in results] == [PREEMPTED] * len(results) and "the same command goes on" in results[0][1]


def test_a_run_that_is_stopped_in_every_way_ends_like_one_that_was_not(tmp_path, model_folder, rows, undisturbed):
    config = config_of(tmp_path / "run", model_folder, rows)
    results = disturb(config, [None, ("step", 2, "TERM")])
    assert stopped(results) and re.search("stopped and saved at step [34] of", results[0][1]), results
    # The second batch of the evaluation at step 5: it is owed, and taken again.
    results = disturb(config, [("evaluation", 2, "TERM"), ("evaluation", 2, "TERM")])
    assert stopped(results) and "stopped and saved at step 5" in results[0][1], results
    assert "held-out" not in results[0][1] and lines_of(tmp_path / "run")[-1]["step"] == 5
    results = disturb(config, [None, ("save", 1, "KILL")])
    assert results[1][0] == -signal.SIGKILL and results[0][0] not in (0, PREEMPTED), results
    results = disturb(config, [])
    assert [code for code, _ in results] == [0, 0] and "going on from step" in results[0][1], results
    assert_bitwise(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("events", [["TERM", None], [None, "TERM"], ["TERM", "TERM"], ["KILL", None], [None, "KILL"]])
@pytest.mark.parametrize("point, count", [("step", 6), ("save", 2), ("evaluation", 2)])
def test_every_stop_at_every_point(tmp_path, model_folder, rows, undisturbed, point, count, events):
    """And each goes on with two processes, with one and with four."""
    config = config_of(tmp_path / "run", model_folder, rows)
    results = disturb(config, [event and (point, count, event) for event in events])
    if "KILL" in events:
        assert all(code not in (0, PREEMPTED) for code, _ in results), results
    else:
        assert stopped(results), results
    for again in (2, 1, 4):
        copy = shutil.copytree(tmp_path / "run", tmp_path / f"on{again}")
        results = disturb({**config, "output_dir": str(copy)}, [], again)
        assert [code for code, _ in results] == [0] * again and "going on from step" in results[0][1], results
        (assert_bitwise if again == 2 else assert_close)(copy, undisturbed)


if __name__ == "__main__":
    import sys

    member(json.loads(sys.argv[1]), sys.argv[2:])
