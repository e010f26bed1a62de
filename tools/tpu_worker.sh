#!/bin/sh
# A TPU worker's side of tpu_pod.py, which copies this file to ~/orpo_jax on every worker and calls it there:
#
#     tpu_worker.sh setup EXTRAS | run TRAINER_ARGUMENTS... | status | stop
#
# A run leaves run/log, run/pid (of the loop that keeps the trainer going) and, once it has ended, run/exit.

cd "$(dirname "$0")" && mkdir -p run || exit 1

say() { echo "$(hostname): $*"; }

# The pid alone may be another process's after a reboot. -ww: ps cuts lines to the width of a terminal.
alive() { [ -f run/pid ] && ps -ww -o args= -p "$(cat run/pid)" | grep -q "tpu_worker.sh loop"; }

command=$1
shift
case "$command" in
setup)
  chmod -f 600 ~/.cache/huggingface/token
  # The images have Python 3.10, and the trainer needs 3.11 or later.
  [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  [ -d .venv ] || ~/.local/bin/uv venv --python 3.12 .venv || exit 1
  exec ~/.local/bin/uv pip install -e ".[$1]"
  ;;
run)
  if alive; then
    say "a run is going on; stop it first" >&2
    exit 1
  fi
  rm -f run/exit run/stop
  nohup sh tpu_worker.sh loop "$@" >>run/log 2>&1 </dev/null &
  echo $! >run/pid
  ;;
loop)
  # Again after exit code 75 alone: the trainer was told to stop, on any worker, and all of them saved.
  until [ -e run/stop ]; do
    .venv/bin/python -m orpo_jax.train "$@"
    code=$?
    [ "$code" -eq 75 ] || break
    # Until the processes of the other workers have ended too: a new one must not find the old process 0.
    sleep 10
  done
  echo "${code:-75}" >run/exit
  ;;
status)
  if alive; then
    now="running"
  elif [ -s run/exit ]; then
    now="ended with exit code $(cat run/exit)"
  elif [ -f run/pid ]; then
    now="gone without an exit code"
  else
    now="no run"
  fi
  say "$now; $(tail -n 1 run/log 2>/dev/null)"
  ;;
stop)
  if alive; then
    touch run/stop
    pkill -TERM -P "$(cat run/pid)"
    while alive; do sleep 1; done
  fi
  exec sh tpu_worker.sh status
  ;;
*)
  echo "tpu_worker.sh: no such command: $command" >&2
  exit 2
  ;;
esac
