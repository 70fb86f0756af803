#!/usr/bin/env bash
# A sweep of small runs that is killed again and again, compared with one left alone: [SOAK_SECONDS=900] soak.sh [FOLDER]
#
# While there is time, a sweep of two depths on the embedded digits is started, killed within 40 seconds by a random
# signal, and started again, until it is finished; then its runs are compared, bit for bit, with the calm sweep's. The
# record (signals, resumptions, differences) goes to FOLDER/record.json (default results/soak), the runs to runs/soak.
# Exit code: 0 if nothing differs, 1 if something does or the record cannot be made, 2 if FOLDER cannot be written or
# SOAK_SECONDS is no number, 130 or 143 when interrupted.
set -uo pipefail

scripts=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
. "$scripts/arguments.sh"
check_arguments 1 "$@"
folder=$(expanded "${1:-results/soak}") limit=${SOAK_SECONDS:-900} runs=runs/soak
export PYTHON=${PYTHON:-python} TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3} RUNNER=command CHECKPOINT_SECONDS=1
export DATASET=digits WIDTH=0.0625 LATENT_DIM=8 INTERMEDIATE_DIM=64 BATCH_SIZE=32 LEARNING_RATE=0.002 EPOCHS=${EPOCHS:-12}
export DEPTHS=${DEPTHS:-28 46}
if [[ ! $limit =~ ^[0-9]+$ ]]; then
  echo "error: SOAK_SECONDS is '$limit'; expected a whole number of seconds" >&2
  exit 2
fi
rm -rf "$runs"
if ! mkdir -p "$runs" "$folder" 2> /dev/null || [ ! -w "$folder" ]; then
  echo "error: $runs or $folder cannot be made or written; expected folders that can be written" >&2
  exit 2
fi
group=
trap '[ -n "$group" ] && kill -KILL -- "-$group" 2> /dev/null; exit 130' INT
trap '[ -n "$group" ] && kill -KILL -- "-$group" 2> /dev/null; exit 143' TERM

start() { # a sweep, in a process group of its own, so that all of it dies
  setsid env --default-signal=INT bash "$scripts/run_all.sh" "$1" >> "$1.log" 2>&1 &
  group=$!
}

start "$runs/calm"
wait "$group" || { echo "error: the calm sweep failed: $runs/calm.log" >&2; exit 1; }
began=$SECONDS
declare -A sent=([KILL]=0 [TERM]=0 [INT]=0)
rounds=0 differences=0
while [ $((SECONDS - began)) -lt "$limit" ] || [ "$rounds" -eq 0 ]; do
  sweep=$runs/round-$((rounds + 1))
  until [ -f "$sweep/table.md" ]; do
    start "$sweep"
    for _ in $(seq $((RANDOM % 400))); do # tenths of a second
      kill -0 "$group" 2> /dev/null || break
      sleep 0.1
    done
    signal=$(shuf -n 1 -e KILL KILL KILL TERM INT)
    if kill -s "$signal" -- "-$group" 2> /dev/null; then sent[$signal]=$((sent[$signal] + 1)); fi
    wait "$group" 2> /dev/null
    while pgrep -g "$group" > /dev/null; do sleep 0.1; done
    group=
  done
  for run in "$sweep"/*/; do
    "$PYTHON" -m resnet_vae compare "$runs/calm/$(basename "$run")" "$run" | tee -a "$runs/compare.log"
    [ "${PIPESTATUS[0]}" -eq 0 ] || differences=$((differences + 1))
  done
  rounds=$((rounds + 1))
done

"$PYTHON" - "$folder" "$runs" "$rounds" "$((SECONDS - began))" "$differences" \
  "${sent[KILL]}" "${sent[TERM]}" "${sent[INT]}" << 'PYTHON' || exit 1
import json
import sys
from pathlib import Path

from resnet_vae.records import code, environment, write_record

folder, runs, *numbers = sys.argv[1:]
rounds, seconds, differences, *signals = map(int, numbers)
sessions = [json.loads(each.read_text())["sessions"] for each in sorted(Path(runs).glob("round-*/*/provenance.json"))]
record = {
    "seconds": seconds,
    "sweeps": rounds,
    "runs": len(sessions),
    "signals": dict(zip(("SIGKILL", "SIGTERM", "SIGINT"), signals)),
    "resumptions": sum(sessions) - len(sessions),
    "runs_that_differ": differences,
}
calm = [json.loads(each.read_text()) for each in sorted(Path(runs).glob("calm/*/provenance.json"))]
spent, trained = (sum(run[name] for run in calm) for name in ("checkpoint_seconds", "seconds"))
record["checkpoints_percent_of_time"] = round(100 * spent / trained, 2)
ran_on = environment(calm[0]["backend"], calm[0]["devices"]) | {name: calm[0][name] for name in code()}
write_record(Path(folder), {**ran_on, "command": "scripts/soak.sh"}, **record)
print(json.dumps(record))
PYTHON
[ "$differences" -eq 0 ]
