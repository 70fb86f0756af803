#!/usr/bin/env bash
# A sweep: [DEPTHS="28 40 70 100"] [SWEEP="NAME …"] [RUNNER=notebook|command] run_all.sh [FOLDER]
#
# Trains one VAE a depth, each in a folder of its own below FOLDER (default runs/sweep), by executing the notebook, or
# by the command line where there is no Jupyter. Every setting is an environment variable; DEPTHS="28:20 100:8" gives a
# depth its own EPOCHS. SWEEP names other variables to sweep, each of which then holds a list, and one VAE is trained
# for every combination: SWEEP="SHORTCUT DEPTHS" SHORTCUT="pool none" DEPTHS="28 100". A finished run with the
# same settings is skipped, an unfinished one is continued; one that fails does not stop the others. EVALUATE names a
# data set on whose test images each finished run is evaluated, too. At the end the table and the figures are made anew.
# Exit code: 0 if all runs are finished, 1 if not, 2 for a mistake in the settings of any of them, before the first is
# trained, 130 or 143 when interrupted.
set -uo pipefail

scripts=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
. "$scripts/arguments.sh"
check_arguments 1 "$@"
sweep=$(expanded "${1:-runs/sweep}") || exit
export PYTHON=${PYTHON:-python} CMDLINE=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}

child=
interrupted() { # stop the run that is going on, then stop
  trap - INT TERM
  [ -n "$child" ] && kill -TERM "$child" 2> /dev/null && wait "$child"
  echo "interrupted; the same command goes on" >&2
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

runs=$("$PYTHON" -m resnet_vae sweep "$sweep") || exit # a line each: name, settings; mistakes are told here
if [ -z "${RUNNER:-}" ]; then
  if "$PYTHON" -c "import nbconvert, ipykernel" 2> /dev/null; then RUNNER=notebook; else RUNNER=command; fi
fi

failed=() busy=() EVALUATE=${EVALUATE:-}
evaluated=$("$PYTHON" -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$EVALUATE") # as a record has it
evaluate() { # a finished run, once
  [ -z "${EVALUATE//[[:space:]]/}" ] && return
  grep -qsF "\"dataset\": $evaluated" "$1"/evaluation-*.json && return
  "$PYTHON" -m resnet_vae evaluate "$1" "$EVALUATE" &
  child=$!
  wait "$child" || failed+=("evaluating $1")
  child=
}

is_finished() { # of a run's line: sets its name and its settings
  read -ra settings <<< "$1"
  name=${settings[0]}
  settings[0]=OUTDIR=$sweep/$name
  (export "${settings[@]}" && exec "$PYTHON" -m resnet_vae finished) # not env, which takes a path with = for a setting
}

while read -r run <&3; do # not mapfile, which macOS's bash is without
  is_finished "$run"
  case $? in
    0)
      echo "$name: finished already, in $sweep/$name"
      evaluate "$sweep/$name"
      continue
      ;;
    3) ;;
    *)
      failed+=("$name")
      continue
      ;;
  esac
  echo "$name: training in $sweep/$name"
  if [ "$RUNNER" = notebook ]; then
    (export "${settings[@]}" && exec "$scripts/run_notebook.sh" "$scripts/../notebooks/resnet_vae.ipynb" "$sweep/$name") &
  else
    (export "${settings[@]}" && exec "$PYTHON" -m resnet_vae train) &
  fi
  child=$!
  wait "$child"
  case $? in
    0) evaluate "$sweep/$name" ;;
    4) busy+=("$run") ;;
    *) failed+=("$name") ;;
  esac
  child=
done 3<<< "$runs"

for run in ${busy[@]+"${busy[@]}"}; do # in another process, which may have finished meanwhile, with other settings
  is_finished "$run"
  case $? in
    0 | 3)
      if [ -f "$sweep/$name/metrics.json" ]; then evaluate "$sweep/$name"; else failed+=("$name (in work elsewhere)"); fi
      ;;
    *) failed+=("$name") ;;
  esac
done
"$PYTHON" -m resnet_vae table "$sweep" || failed+=(table)
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: not finished: ${failed[*]}" >&2
  exit 1
fi
