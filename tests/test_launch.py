"""The launchers, as far as they can be tried without a cloud: what would be sent to a worker runs here, in /bin/sh,
with a stand-in for the trainer; gcloud, srun and scontrol are stand-ins too."""

import fnmatch
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import time
import tomllib

import pytest
import tpu_pod

ROOT = pathlib.Path(__file__).resolve().parent.parent
WHERE = ["--zone", "us-west4-a"]
CREATE = ["create", "orpo", *WHERE, "--accelerator-type", "v5litepod-16"]
CONFIG = ["--config", "configs/demo.py"]
# What a shell would change, had it not been quoted.
ODD = ["--config.run_name=two  words", "--config.a=it's", '--config.b="q"', "--config.c=$HOME", "--config.d=`id`;&|>*"]


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def wait_for(holds, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


@pytest.fixture
def printed(capsys):
    """A function: a tool's arguments -> the commands that --dry-run prints, each read back as a shell reads it."""
    def printed(*argv: str) -> list[list[str]]:
        own, separator, rest = [*argv], [], []
        if "--" in own:
            cut = own.index("--")
            own, separator, rest = own[:cut], ["--"], own[cut + 1:]
        tpu_pod.main([*own, "--dry-run", *separator, *rest])
        lines = capsys.readouterr().out.splitlines()
        commands = [shlex.split(line) for line in lines]
        assert [shlex.join(command) for command in commands] == lines
        assert all(command[:3] == ["gcloud", "compute", "tpus"] for command in commands)
        return commands
    return printed


def texts(commands: list[list[str]]) -> list[str]:
    return [arg.removeprefix("--command=") for command in commands for arg in command if arg.startswith("--command=")]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder in front of PATH. A second is a twentieth there."""
    folder = tmp_path / "bin"
    program(folder / "sleep", "exec /bin/sleep 0.05\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


class Worker:
    """A home folder as `setup` leaves it, whose trainer exits with the codes in turn, or saves on SIGTERM."""

    def __init__(self, home: pathlib.Path) -> None:
        self.home, self.run = home, home / "orpo_jax" / "run"

    def set_up(self, trainer: str) -> None:
        program(self.home / "orpo_jax/.venv/bin/python", f'printf "%s\\n" "$@" >>"$HOME/argv"; echo >>"$HOME/starts"\n'
                                                         f'{trainer}')

    def exits_with(self, *codes: int) -> None:
        self.set_up(f'n=$(wc -l <"$HOME/starts"); set -- {" ".join(map(str, codes))}; shift $((n - 1)); exit "$1"\n')

    def saves_on_sigterm(self) -> None:
        self.set_up("trap 'echo saving; /bin/sleep 0.3; echo saved; exit 75' TERM\n"
                    "echo ready; while :; do /bin/sleep 0.02; done\n")

    def sh(self, text: str) -> subprocess.CompletedProcess[str]:
        # A narrow terminal, to whose width some programs cut what they print.
        environment = os.environ | {"HOME": str(self.home), "COLUMNS": "40"}
        return subprocess.run(["/bin/sh", "-c", text], cwd=self.home, env=environment, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=15)

    def starts(self) -> int:
        return len((self.home / "starts").read_text().splitlines())

    def log(self) -> str:
        return (self.run / "log").read_text() if (self.run / "log").exists() else ""

    def exit_code(self) -> int:
        wait_for((self.run / "exit").exists)
        wait_for((self.run / "exit").read_text)
        return int((self.run / "exit").read_text())

    def pid(self) -> int:
        return int((self.run / "pid").read_text())


@pytest.fixture
def make_worker(tools, tmp_path):
    """A function: a name -> a worker, whose run ends with the test."""
    made = []

    def make_worker(name: str) -> Worker:
        (tmp_path / name).mkdir()
        made.append(Worker(tmp_path / name))
        return made[-1]
    yield make_worker
    for worker in made:
        if (worker.run / "pid").exists() and not (worker.run / "exit").exists():
            subprocess.run(["pkill", "-KILL", "-P", str(worker.pid())])
            os.kill(worker.pid(), signal.SIGKILL)


@pytest.fixture
def worker(make_worker):
    return make_worker("home")


# ---- What is printed

def test_create_names_the_runtime_of_the_chip(printed):
    for kind, runtime in (("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-32", "v2-alpha-tpuv5"),
                          ("v6e-8", "v2-alpha-tpuv6e"), ("v4-8", "tpu-ubuntu2204-base")):
        create, _ = printed("create", "orpo", *WHERE, "--accelerator-type", kind)
        assert f"--runtime-version={runtime}" in create and f"--accelerator-type={kind}" in create
    create, poll = printed(*CREATE, "--spot", "--project", "mine", "--valid-until-duration", "6h",
                           "--runtime-version", "other")
    assert create[3:] == ["queued-resources", "create", "orpo", "--node-id=orpo", "--accelerator-type=v5litepod-16",
                          "--runtime-version=other", "--spot", "--valid-until-duration=6h", "--async",
                          "--zone=us-west4-a", "--project=mine"]
    assert poll[3:] == ["queued-resources", "describe", "orpo", "--format=value(state.state)", "--zone=us-west4-a",
                        "--project=mine"]


def test_several_slices_are_tpu_vms_of_their_own(printed, tmp_path):
    slices = ["--node-count", "3"]
    create = printed(*CREATE, *slices)[0]
    assert "--node-count=3" in create and "--node-prefix=orpo" in create
    assert not any(arg.startswith("--node-id") for arg in create)
    names = ["orpo-0", "orpo-1", "orpo-2"]
    for argv in (["run", "orpo", *WHERE, *slices, "--", *CONFIG], ["stop", "orpo", *WHERE, *slices]):
        commands = printed(*argv)
        assert [command[5] for command in commands] == names
        assert all("--worker=all" in command for command in commands)
    assert [command[5] for command in printed("status", "orpo", *WHERE, *slices)[1:]] == names
    logs, = printed("logs", "orpo", *WHERE, *slices, "--node", "2", "--worker", "1")
    assert logs[5] == "orpo-2" and "--worker=1" in logs
    delete, = printed("delete", "orpo", *WHERE, *slices)
    assert delete[3:6] == ["queued-resources", "delete", "orpo"] and {"--force", "--quiet"} <= set(delete)
    token = tmp_path / "token"
    token.write_text("hf_secret")
    setup = printed("setup", "orpo", *WHERE, *slices, "--hf-token", str(token))
    assert [command[4] for command in setup] == ["ssh"] * 3 + ["scp"] * 6 + ["ssh"] * 3
    assert [command[-2] for command in setup if command[4] == "scp"] == [
        f"{name}:{target}" for target in ("orpo_jax/", ".cache/huggingface/token") for name in names]


def test_no_secret_is_printed(printed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "token").write_text("hf_secret")
    slices = ["--node-count", "2"]
    everything = [*printed(*CREATE, *slices), *printed("setup", "orpo", *WHERE, "--hf-token", str(tmp_path / "token")),
                  *printed("run", "orpo", *WHERE, "--", *CONFIG)]
    for name in ("status", "logs", "stop", "delete"):
        everything += printed(name, "orpo", *WHERE)
    assert not any("hf_secret" in arg or "HF_TOKEN" in arg for command in everything for arg in command)


@pytest.mark.parametrize("argv, said", [
    ([], "COMMAND"),
    (["start", "orpo"], "start"),
    (["create", "orpo", *WHERE], "--accelerator-type"),
    (["stop", "orpo"], "--zone"),
    (["create", "Orpo_1", *WHERE, "--accelerator-type", "v6e-8"], "lower-case"),
    (["create", "orpo", *WHERE, "--accelerator-type", "v9-8"], "v5litepod"),
    (["create", "orpo", *WHERE, "--accelerator-type", "tpu7x-8"], "GKE"),
    ([*CREATE, "--node-count", "0"], "at least 1, got '0'"),
    ([*CREATE, "--", "--config", "x"], "only `run`"),
    (["run", "orpo", *WHERE], "must be followed by"),
    (["run", "orpo", *WHERE, "--restarts", "many", "--", *CONFIG], "'many'"),
    (["run", "orpo", *WHERE, "--", "--config", "configs/none.py"], "configs/none.py"),
    (["run", "orpo", *WHERE, "--", "--config=/etc/passwd"], "/etc/passwd"),
    (["run", "orpo", *WHERE, "--", *CONFIG, "--config.x=hf_secret"], "HF_TOKEN"),
    (["run", "orpo", *WHERE, *CONFIG], "--config"),
    (["setup", "orpo", *WHERE, "--hf-token", "/none"], "--hf-token"),
    (["setup", "orpo", *WHERE, "--extras", "tpu]; id"], "--extras"),
    (["logs", "orpo", *WHERE, "--node", "1"], "below --node-count, 1"),
])
def test_wrong_arguments_get_one_sentence(argv, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(SystemExit) as stopped:
        tpu_pod.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error and "secret" not in error


# ---- What a worker runs

def start(printed, worker, *argv: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    text, = texts(printed("run", "orpo", *WHERE, "--restarts", str(restarts), "--", *CONFIG, *argv))
    return worker.sh(text)


def test_arguments_reach_the_trainer_unchanged(printed, worker):
    worker.exits_with(0)
    assert start(printed, worker, *ODD).returncode == 0
    assert worker.exit_code() == 0
    assert (worker.home / "argv").read_text().splitlines() == ["-m", "orpo_jax.train", *CONFIG, *ODD]


@pytest.mark.parametrize("codes, restarts, starts, code", [
    ((75, 75, 0), 5, 3, 0),      # goes on until it is finished
    ((75, 75, 75, 0), 2, 3, 75),  # no more often than said
    ((75, 0), 0, 1, 75),
    ((1, 0), 5, 1, 1),           # never after a failure
    ((75, 1, 0), 5, 2, 1),
    ((137, 0), 5, 1, 137),
])
def test_it_is_started_again_after_exit_code_75_alone(codes, restarts, starts, code, printed, worker):
    worker.exits_with(*codes)
    start(printed, worker, restarts=restarts)
    assert worker.exit_code() == code and worker.starts() == starts
    assert worker.log().count("saved and stopped") == starts - 1
    assert f"ended with exit code {code}" in worker.sh(texts(printed("status", "orpo", *WHERE))[0]).stdout


def test_stop_ends_the_run_after_it_has_saved(printed, worker):
    worker.saves_on_sigterm()
    start(printed, worker, restarts=5)
    wait_for(lambda: "ready" in worker.log())
    status, stop = texts(printed("status", "orpo", *WHERE))[0], texts(printed("stop", "orpo", *WHERE))[0]
    assert f"running, pid {worker.pid()}" in worker.sh(status).stdout
    again = start(printed, worker)
    assert again.returncode == 1 and "stop it first" in again.stderr
    clear = worker.sh(texts(printed("setup", "orpo", *WHERE))[0])
    assert clear.returncode == 1 and "stop it first" in clear.stderr

    stopped = worker.sh(stop)
    assert stopped.returncode == 0 and "ended with exit code 75" in stopped.stdout
    assert worker.log().splitlines() == ["ready", "saving", "saved"] and worker.starts() == 1
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(worker.pid())], stdout=subprocess.PIPE, text=True).stdout
    assert state[:1] in ("", "Z")  # Z: ended, and nobody has asked for its exit code
    assert "no run is going on" in worker.sh(stop).stdout
    # The same command again starts it again.
    assert start(printed, worker).returncode == 0
    wait_for(lambda: worker.starts() == 2)
    wait_for(lambda: worker.log().count("ready") == 2)
    assert worker.sh(stop).returncode == 0


def test_a_sigterm_to_the_trainer_alone_starts_it_again(printed, worker):
    worker.saves_on_sigterm()
    start(printed, worker, restarts=1)
    for number in (1, 2):
        wait_for(lambda number=number: worker.log().count("ready") == number)
        subprocess.run(["pkill", "-TERM", "-P", str(worker.pid())], check=True)
    assert worker.exit_code() == 75 and worker.starts() == 2


def test_stop_does_not_wait_for_ever(printed, worker):
    worker.set_up("trap '' TERM; echo ready; while :; do /bin/sleep 0.02; done\n")
    start(printed, worker)
    wait_for(lambda: "ready" in worker.log())
    stopped = worker.sh(texts(printed("stop", "orpo", *WHERE, "--timeout", "3"))[0])
    assert stopped.returncode == 1 and "still running after 3 s" in stopped.stderr


def test_a_pid_that_is_another_process_is_left_alone(printed, worker):
    worker.run.mkdir(parents=True)
    with subprocess.Popen(["/bin/sleep", "60"]) as other:
        (worker.run / "pid").write_text(str(other.pid))
        assert "no run is going on" in worker.sh(texts(printed("stop", "orpo", *WHERE))[0]).stdout
        assert "gone without an exit code" in worker.sh(texts(printed("status", "orpo", *WHERE))[0]).stdout
        assert other.poll() is None
        other.kill()
    (worker.run / "pid").unlink()


# ---- With a stand-in for gcloud

def test_two_slices_from_setup_to_stop(tools, make_worker, tmp_path, capfd):
    """ssh is a shell and scp is cp, in one home folder for each slice."""
    program(tools / "gcloud", f"""
        [ "$3" = tpu-vm ] || exit 0
        kind=$4; shift 4
        if [ "$kind" = ssh ]; then
          export HOME={tmp_path}/$1; mkdir -p "$HOME"; cd "$HOME"
          for arg; do case "$arg" in --command=*) exec /bin/sh -c "${{arg#--command=}}";; esac; done
        fi
        for arg; do
          case "$arg" in --*) ;; *:*) to={tmp_path}/${{arg%%:*}}/${{arg#*:}} ;; *) from="$from $arg" ;; esac
        done
        cp -r $from "$to"
        """)
    workers = [make_worker(name) for name in ("orpo-0", "orpo-1")]
    for worker in workers:
        program(worker.home / ".local/bin/uv", 'echo "$@" >>"$HOME/uv"; mkdir -p .venv\n')
        (worker.home / "orpo_jax/orpo_jax").mkdir(parents=True)
        (worker.home / "orpo_jax/orpo_jax/gone.py").touch()
    slices = [*WHERE, "--node-count", "2"]
    tpu_pod.main(["setup", "orpo", *slices])
    for worker in workers:
        assert not (worker.home / "orpo_jax/orpo_jax/gone.py").exists()
        for part in tpu_pod.PARTS:
            assert (worker.home / "orpo_jax" / part).exists(), part
        assert (worker.home / "orpo_jax/configs/demo.py").read_text() == (ROOT / "configs/demo.py").read_text()
        assert (worker.home / "uv").read_text().splitlines() == ["venv --python 3.12 .venv", "pip install -e .[tpu]"]
        worker.saves_on_sigterm()
    tpu_pod.main(["run", "orpo", *slices, "--restarts", "3", "--", *CONFIG])
    for worker in workers:
        wait_for(lambda worker=worker: "ready" in worker.log())
    tpu_pod.main(["stop", "orpo", *slices])
    assert [worker.exit_code() for worker in workers] == [75, 75]
    assert capfd.readouterr().out.count("ended with exit code 75") == 2
    # One slice that fails is enough to say so.
    workers[1].exits_with(0)
    (workers[0].home / "orpo_jax").rename(workers[0].home / "moved")
    with pytest.raises(SystemExit, match="tpu-vm ssh orpo-0: failed with exit code"):
        tpu_pod.main(["run", "orpo", *slices, "--", *CONFIG])


@pytest.mark.parametrize("states, timeout, outcome", [
    (["WAITING_FOR_RESOURCES", "PROVISIONING", "", "ACTIVE"], 60, None),
    (["PROVISIONING", "FAILED"], 60, "is FAILED"),
    (["SUSPENDED"], 60, "is SUSPENDED"),
    (["WAITING_FOR_RESOURCES"] * 2, 0, "stays in the queue"),
])
def test_create_waits_until_the_tpus_are_there(states, timeout, outcome, tools, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_pod, "POLL_SECONDS", 0)
    (tmp_path / "states").write_text("".join(state + "\n" for state in states))
    program(tools / "gcloud", f"""
        echo "$4" >>{tmp_path}/calls
        [ "$4" = create ] || {{ head -n 1 {tmp_path}/states; sed -i 1d {tmp_path}/states; }}
        """)
    argv = [*CREATE, "--timeout", str(timeout)]
    if outcome is None:
        tpu_pod.main(argv)
        assert (tmp_path / "calls").read_text().split() == ["create"] + ["describe"] * 4
    else:
        with pytest.raises(SystemExit, match=outcome):
            tpu_pod.main(argv)


def test_without_gcloud(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="gcloud: must be on PATH"):
        tpu_pod.main(CREATE)


# ---- Slurm

@pytest.mark.parametrize("code, requeued", [(75, "requeue 12345\n"), (1, ""), (0, "")])
def test_slurm_queues_a_job_again_after_exit_code_75_alone(code, requeued, tools, tmp_path):
    program(tools / "srun", f'printf "%s\\n" "$@" >{tmp_path}/srun; exit {code}\n')
    program(tools / "scontrol", f'echo "$@" >>{tmp_path}/scontrol\n')
    (tmp_path / "scontrol").touch()
    done = subprocess.run(["bash", ROOT / "tools/slurm_gpu.sh", *CONFIG, *ODD],
                          env=os.environ | {"SLURM_JOB_ID": "12345", "SLURM_CPUS_PER_TASK": "6"})
    assert done.returncode == code
    assert (tmp_path / "scontrol").read_text() == requeued
    assert (tmp_path / "srun").read_text().splitlines() == [
        "--kill-on-bad-exit=0", "--cpus-per-task=6", "python", "-m", "orpo_jax.train", *CONFIG, *ODD]


def test_slurm_script_is_bash_and_its_options_stand_before_any_command():
    assert subprocess.run(["bash", "-n", ROOT / "tools/slurm_gpu.sh"]).returncode == 0
    lines = (ROOT / "tools/slurm_gpu.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "TERM@120" and "requeue" in options


# ---- Docker

def test_dockerfile_copies_and_installs_what_there_is():
    text = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    sources = [source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources)
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(sources)
    assert not any(fnmatch.fnmatch("orpo_jax/model.py", line) for line in kept)  # a folder is kept by its name

    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {metadata["readme"], *metadata["license-files"]} <= set(sources)
    extras = re.search(r"(\S+)\) pip install \S+ -e \"\.\[\$EXTRA\]\"", text)
    assert extras and set(extras[1].split("|")) == {"tpu", "cuda13", "cuda12"} <= set(metadata["optional-dependencies"])
    # In exec form: no shell between `docker stop` and Python.
    entry, = [json.loads(rest) for step, rest in steps if step == "ENTRYPOINT"]
    assert entry == ["python", "-m", "orpo_jax.train"]
    assert [rest for step, rest in steps if step == "USER"] == ["${RUN_AS}"] and "ARG RUN_AS=trainer" in text


@pytest.mark.parametrize("extra, code, said", [
    ("none", 0, "install --no-cache-dir -e .\n"),
    ("cuda13", 0, "install --no-cache-dir -e .[cuda13]\n"),
    ("gpu", 1, "EXTRA: must be tpu, cuda13, cuda12 or none, got gpu\n"),
])
def test_dockerfile_refuses_an_extra_that_does_not_exist(extra, code, said, tools):
    program(tools / "pip", 'echo "$@"\n')
    text = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
    install = next(line.removeprefix("RUN ") for line in text.splitlines() if line.startswith("RUN case"))
    done = subprocess.run(["/bin/sh", "-c", install], env=os.environ | {"EXTRA": extra}, capture_output=True, text=True)
    assert done.returncode == code and done.stdout + done.stderr == said


# ---- The guide

def guide_commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/launch.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


def test_every_command_of_the_guide_is_accepted(printed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = set()
    for command in guide_commands():
        if command[:2] == ["python", "tools/tpu_pod.py"]:
            token = tmp_path / "token"
            token.touch()
            argv = [str(token) if arg.startswith("~") else arg for arg in command[2:]]
            argv = [arg for arg in argv if arg != "--dry-run"]
            assert printed(*argv), command
            seen.add(argv[0])
        for arg in command:
            if re.fullmatch(r"(tools|configs)/\S+", arg):
                assert (ROOT / arg).exists(), command
    assert seen == {"create", "setup", "run", "logs", "status", "stop", "delete"}
