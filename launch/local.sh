#!/usr/bin/env bash
# Starts several processes of one run on this machine:
#
#   launch/local.sh 2 cpu:4 --config configs/k400.py:debug --workdir runs/two   # 4 virtual devices each
#   launch/local.sh 8 gpu --config configs/k400.py --workdir runs/k400         # a GPU each
#
# What follows goes to `stretchysnake train`, or to another command that is named first. Ctrl-C or
# SIGTERM reaches all of them: they save and leave. The exit status is the highest of theirs.
# JAX_COORDINATOR_PORT sets the port; STRETCHYSNAKE the program, where it isn't on the PATH.
set -u

if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ && $2 =~ ^(gpu|cpu:[1-9][0-9]*)$ ]]; then
  echo "usage: launch/local.sh PROCESSES cpu:DEVICES|gpu [COMMAND] ARGUMENT ..." >&2
  exit 2
fi
processes=$1 devices=$2
shift 2
case ${1:-} in
  "" | -*) set -- train "$@" ;;
esac
program=${STRETCHYSNAKE:-stretchysnake}
if ! command -v "$program" >&- 2>&-; then
  echo "$program isn't on the PATH: activate its environment, or set STRETCHYSNAKE" >&2
  exit 2
fi

port=${JAX_COORDINATOR_PORT:-}
while [ -z "$port" ]; do
  port=$((20000 + RANDOM % 12000))
  # A port that answers is taken.
  if (exec 3<>"/dev/tcp/localhost/$port") 2>&-; then port=; fi
done
export JAX_COORDINATOR_ADDRESS=localhost:$port JAX_NUM_PROCESSES=$processes

if [ "$devices" = gpu ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  fi
  if [ "${#gpus[@]}" -lt "$processes" ]; then
    echo "$processes processes need a GPU each, there are ${#gpus[@]}" >&2
    exit 2
  fi
else
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${devices#cpu:}"
fi

pids=() told=0
interrupted=
# Processes in the background don't get Ctrl-C, so this passes it on as SIGTERM.
trap 'interrupted=1; kill -TERM "${pids[@]}" 2>&-; told=${#pids[@]}' INT TERM
for ((process = 0; process < processes; process++)); do
  export JAX_PROCESS_ID=$process
  if [ "$devices" = gpu ]; then export CUDA_VISIBLE_DEVICES=${gpus[process]}; fi
  "$program" "$@" &
  pids+=($!)
done
# Those that had no number yet when the signal came.
if [ -n "$interrupted" ]; then kill -TERM "${pids[@]:told}" 2>&-; fi

highest=0
for pid in "${pids[@]}"; do
  interrupted=1
  while [ -n "$interrupted" ]; do # a signal ends `wait` before the process has ended
    interrupted=
    wait "$pid"
    status=$?
  done
  if [ "$status" -gt "$highest" ]; then highest=$status; fi
done
exit "$highest"
