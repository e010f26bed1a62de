"""The launchers, as far as they can be tried without a cloud: gcloud, srun, scontrol, uv and the trainer are stand-ins;
what they would send to a worker runs here, and Slurm's variables are read by jax itself."""

import json
import os
import pathlib
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib

import pytest
import tpu_pod

ROOT = pathlib.Path(__file__).resolve().parent.parent
ZONE = ["--zone", "z"]
CREATE = ["create", "orpo", *ZONE, "--accelerator-type", "v5litepod-16"]
SLICES = ["--node-count", "2"]
# What a shell would change, had it not been quoted.
ODD = ["--config", "c.py", "--config.run_name=two  words", "--a=it's", '--b="q"', "--c=$HOME", "--d=`id`;&|*", ""]


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def wait_for(holds) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.02)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A folder in front of PATH. A second is a twentieth there."""
    program(tmp_path / "bin/sleep", "exec /bin/sleep 0.05\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "bin"


# Cloud TPU: what is sent


def create_line(runtime: str, rest: str = "", kind: str = "v5litepod-16", which: str = "--node-id=orpo") -> str:
    return f"queued-resources create orpo {which} --accelerator-type={kind} --runtime-version={runtime}{rest} --zone=z"


DESCRIBE = "queued-resources describe orpo '--format=value(state.state)' --zone=z"
WORKER = "tpu-vm ssh {} --worker=all '--command=sh orpo_jax/tpu_worker.sh {}' --zone=z"
PARTS = " ".join(f"{ROOT}/{part}" for part in tpu_pod.PARTS)


@pytest.mark.parametrize("argv, lines", [
    (CREATE, [create_line("v2-alpha-tpuv5-lite"), DESCRIBE]),
    (["create", "orpo", *ZONE, "--accelerator-type", "v6e-8"],
     [create_line("v2-alpha-tpuv6e", kind="v6e-8"), DESCRIBE]),
    ([*CREATE, "--runtime-version", "other", "--spot", "--", "--network=mine"],
     [create_line("other", " --spot --network=mine"), DESCRIBE]),
    ([*CREATE, *SLICES], [create_line("v2-alpha-tpuv5-lite", which="--node-count=2 --node-prefix=orpo"), DESCRIBE]),
    (["setup", "orpo", *ZONE, "--hf-token", "t"],
     ["tpu-vm ssh orpo --worker=all '--command=mkdir -p orpo_jax .cache/huggingface' --zone=z",
      f"tpu-vm scp --recurse --worker=all {PARTS} orpo:orpo_jax/ --zone=z",
      "tpu-vm scp --recurse --worker=all t orpo:.cache/huggingface/token --zone=z",
      WORKER.format("orpo", "setup tpu")]),
    (["run", "orpo", *ZONE, *SLICES, "--", "--config", "c.py"],
     [WORKER.format(node, "run --config c.py") for node in ("orpo-0", "orpo-1")]),
    (["stop", "orpo", *ZONE, "--project", "p"], [WORKER.format("orpo", "stop") + " --project=p"]),
    (["status", "orpo", *ZONE], [DESCRIBE, WORKER.format("orpo", "status")]),
    (["logs", "orpo", *ZONE, *SLICES, "--node", "1", "--worker", "3"],
     ["tpu-vm ssh orpo-1 --worker=3 '--command=tail -n 100 -F orpo_jax/run/log' --zone=z"]),
    (["delete", "orpo", *ZONE, *SLICES], ["queued-resources delete orpo --force --quiet --zone=z"]),
])
def test_dry_run_prints_the_commands(argv, lines, capsys):
    tpu_pod.main([argv[0], "--dry-run", *argv[1:]])
    assert capsys.readouterr().out.splitlines() == ["gcloud compute tpus " + line for line in lines]


@pytest.mark.parametrize("argv, said", [
    (["start", "orpo", *ZONE], "start"),
    (["stop", "orpo"], "--zone"),
    (["create", "orpo", *ZONE, "--accelerator-type", "v9-8"], "v5litepod"),
    ([*CREATE, "--node-count", "0"], "at least 1, got 0"),
    (["stop", "orpo", *ZONE, "--", "--force"], "only create and run"),
    (["run", "orpo", *ZONE], "-- --config"),
    (["logs", "orpo", *ZONE, *SLICES, "--node", "2"], "got 2 of 2"),
])
def test_wrong_arguments_are_named(argv, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        tpu_pod.main(argv)
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("states, outcome", [
    (["WAITING_FOR_RESOURCES", "PROVISIONING", "", "ACTIVE"], None),
    (["PROVISIONING", "FAILED"], "is FAILED"),
])
def test_create_waits_until_the_tpus_are_there(states, outcome, tools, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_pod, "POLL_SECONDS", 0)
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    program(tools / "gcloud", f'[ "$4" = create ] || {{ head -n 1 {tmp_path}/states; sed -i 1d {tmp_path}/states; }}\n')
    if outcome is None:
        tpu_pod.main(CREATE)
    else:
        with pytest.raises(SystemExit, match=outcome):
            tpu_pod.main(CREATE)
    assert (tmp_path / "states").read_text() == ""


# Cloud TPU: what the workers do


class Pod:
    """Two slices of one worker, each a home folder as `setup` leaves it: ssh is a shell there, and scp is cp."""

    def __init__(self, tools: pathlib.Path, folder: pathlib.Path):
        program(tools / "gcloud", f"""
            [ "$3" = tpu-vm ] || {{ echo ACTIVE; exit; }}
            if [ "$4" = ssh ]; then
              export HOME={folder}/$5 && cd "$HOME" || exit 1
              for arg; do case "$arg" in --command=*) exec /bin/sh -c "${{arg#--command=}}";; esac; done
            fi
            shift 4
            for arg; do
              case "$arg" in --*) ;; *:*) to={folder}/${{arg%%:*}}/${{arg#*:}} ;; *) from="$from $arg" ;; esac
            done
            cp -r $from "$to"
            """)
        self.homes = [folder / "orpo-0", folder / "orpo-1"]
        for home in self.homes:
            program(home / ".local/bin/uv", 'echo "$@" >>"$HOME/uv"; [ "$1" != venv ] || mkdir .venv\n')
        (folder / "token").write_text("hf_secret")
        self("setup", "--hf-token", f"{folder}/token")

    def __call__(self, command: str, *argv: str) -> None:
        tpu_pod.main([command, "orpo", *ZONE, *SLICES, *argv])

    def trainer(self, text: str) -> None:
        for home in self.homes:
            program(home / "orpo_jax/.venv/bin/python",
                    f'printf "%s\\n" "$@" >"$HOME/argv"; echo >>"$HOME/starts"\n{text}')

    def read(self, name: str) -> list[str]:
        return [(home / name).read_text() if (home / name).exists() else "" for home in self.homes]

    def starts(self) -> list[int]:
        return [text.count("\n") for text in self.read("starts")]

    def ended(self) -> bool:
        return all(self.read("orpo_jax/run/exit"))


SAVES = """trap 'echo saving; /bin/sleep 0.2; echo saved; exit 75' TERM
echo ready; while :; do /bin/sleep 0.02; done\n"""


@pytest.fixture
def pod(tools, tmp_path):
    pod = Pod(tools, tmp_path)
    yield pod
    for pid in filter(None, pod.read("orpo_jax/run/pid")):
        subprocess.run(["pkill", "-KILL", "-P", pid.strip()])


def test_setup_copies_and_installs(pod):
    for home in pod.homes:
        for part in tpu_pod.PARTS:
            assert (home / "orpo_jax" / pathlib.Path(part).name).exists(), part
        assert (home / "uv").read_text() == "venv --python 3.12 .venv\npip install -e .[tpu]\n"
        token = home / ".cache/huggingface/token"
        assert token.read_text() == "hf_secret" and token.stat().st_mode & 0o77 == 0
    pod("setup", "--extras", "tpu,tokamax")  # again, for what has changed
    assert pod.read("uv")[0].endswith("\npip install -e .[tpu,tokamax]\n") and pod.read("uv")[0].count("venv") == 2


def test_the_trainer_gets_its_arguments_as_they_stand(pod):
    pod.trainer("exit 0\n")
    pod("run", "--", *ODD)
    wait_for(pod.ended)
    assert pod.read("argv") == ["\n".join(["-m", "orpo_jax.train", *ODD, ""])] * 2


@pytest.mark.parametrize("codes, starts", [((75, 75, 0), 3), ((1, 0), 1), ((75, 1, 0), 2), ((143, 0), 1)])
def test_it_is_started_again_after_exit_code_75_alone(codes, starts, pod, capfd):
    pod.trainer(f'set -- {" ".join(map(str, codes))}; shift $(($(wc -l <"$HOME/starts") - 1)); exit "$1"\n')
    pod("run", "--", "x")
    wait_for(pod.ended)
    assert pod.starts() == [starts] * 2
    pod("status")
    assert capfd.readouterr().out.count(f"ended with exit code {codes[starts - 1]};") == 2


def test_stop_waits_until_all_have_saved_and_ends_the_run(pod, capfd):
    pod.trainer(SAVES)
    pod("run", "--", "x")
    wait_for(lambda: pod.read("orpo_jax/run/log") == ["ready\n"] * 2)
    pod("status")
    assert capfd.readouterr().out.count("running; ready\n") == 2
    with pytest.raises(SystemExit, match="tpu-vm ssh orpo-0: failed with exit code 1"):
        pod("run", "--", "x")
    assert capfd.readouterr().err.count("stop it first") == 2

    # A SIGTERM to the trainers alone, as of a host's maintenance: they go on.
    for pid in pod.read("orpo_jax/run/pid"):
        subprocess.run(["pkill", "-TERM", "-P", pid.strip()], check=True)
    wait_for(lambda: pod.read("orpo_jax/run/log") == ["ready\nsaving\nsaved\nready\n"] * 2)
    pod("stop")
    assert pod.read("orpo_jax/run/log") == ["ready\nsaving\nsaved\n" * 2] * 2 and pod.starts() == [2, 2]
    assert capfd.readouterr().out.count("ended with exit code 75") == 2
    pod("stop")  # nothing is left to be stopped
    pod("run", "--", "x")
    wait_for(lambda: pod.starts() == [3, 3] and all(log.endswith("ready\n") for log in pod.read("orpo_jax/run/log")))
    pod("stop")


def test_a_pid_that_is_another_process_is_left_alone(pod, capfd):
    with subprocess.Popen(["/bin/sh", "-c", "/bin/sleep 60; :"]) as other:
        for home in pod.homes:
            (home / "orpo_jax/run/pid").write_text(str(other.pid))
        pod("stop")
        assert capfd.readouterr().out.count("gone without an exit code") == 2
        assert other.poll() is None
        subprocess.run(["pkill", "-P", str(other.pid)], check=True)


# Slurm


@pytest.mark.parametrize("code, requeued", [(75, "requeue 12345\n"), (1, ""), (0, "")])
def test_slurm_queues_a_job_again_after_exit_code_75_alone(code, requeued, tools, tmp_path):
    program(tools / "srun", f'printf "%s\\n" "$@" >{tmp_path}/srun; exit {code}\n')
    program(tools / "scontrol", f'echo "$@" >>{tmp_path}/scontrol\n')
    (tmp_path / "scontrol").touch()
    done = subprocess.run(["bash", ROOT / "tools/slurm_gpu.sh", *ODD],
                          env=os.environ | {"SLURM_JOB_ID": "12345", "SLURM_CPUS_PER_TASK": "6"})
    assert done.returncode == code and (tmp_path / "scontrol").read_text() == requeued
    assert (tmp_path / "srun").read_text().split("\n")[:-1] == [
        "--kill-on-bad-exit=0", "--cpus-per-task=6", "python", "-m", "orpo_jax.train", *ODD]


def test_sbatch_finds_its_options():
    """It reads none after the first command."""
    head = re.split(r"^[^#\n]", (ROOT / "tools/slurm_gpu.sh").read_text(), maxsplit=1, flags=re.MULTILINE)[0]
    options = dict(line.partition("=")[::2] for line in re.findall(r"^#SBATCH --(.*)", head, re.MULTILINE))
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert options["signal"] == "TERM@120" and "requeue" in options


def test_a_slurm_process_takes_the_gpu_of_its_number_or_those_it_is_told():
    with socket.socket() as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    text = ("from orpo_jax import hosts; assert hosts.join(['x']) == ['x']; import jax; "
            "print(jax.process_count(), jax._src.xla_bridge.CUDA_VISIBLE_DEVICES.value)")
    job = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(port), "SLURM_JOB_ID": "1",
                        "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    both = [subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                             env=job | told | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)})
            for i, told in enumerate([{"JAX_LOCAL_DEVICE_IDS": "2,3"}, {}])]
    assert [process.communicate(timeout=60)[0] for process in both] == ["2 2,3\n", "2 1\n"]


# Docker


def test_dockerfile(tools):
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = [source for step, rest in steps if step == "COPY" for source in rest.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    assert all((ROOT / source).exists() for source in copied)
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {metadata["readme"], *metadata["license-files"]} <= set(copied)
    # In exec form: no shell between `docker stop` and Python.
    assert [json.loads(rest) for step, rest in steps if step == "ENTRYPOINT"] == [["python", "-m", "orpo_jax.train"]]

    program(tools / "pip", 'echo "$@"\n')
    install = " && ".join(f"{{ {rest}; }}" for step, rest in steps if step == "RUN")
    for extra, code, said in (("", 0, "install --no-cache-dir -e .[]\n"),
                              ("tpu,tokamax", 0, "install --no-cache-dir -e .[tpu,tokamax]\n"),
                              ("tpu,gpu", 1, "EXTRA: pyproject.toml has no extra gpu\n")):
        done = subprocess.run(["/bin/sh", "-c", install], cwd=ROOT, env=os.environ | {"EXTRA": extra},
                              capture_output=True, text=True)
        assert (done.returncode, done.stdout + done.stderr) == (code, said)


# The guide


def test_every_command_of_the_guide_is_accepted(capsys):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/launch.md").read_text(), re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in "".join(blocks).replace("\\\n", " ").splitlines()]
    seen = set()
    for command in commands:
        for word in command:
            assert not re.match(r"(tools|configs)/", word) or (ROOT / word).exists(), command
        if command[:2] == ["python", "tools/tpu_pod.py"]:
            tpu_pod.main([command[2], "--dry-run", *command[3:]])
            seen.add(command[2])
    assert seen == {"create", "setup", "run", "logs", "status", "stop", "delete"}
