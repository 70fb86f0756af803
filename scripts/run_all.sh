#!/usr/bin/env bash
# The depth sweep: [DEPTHS="28 40 70 100"] [RUNNER=notebook|command] run_all.sh [FOLDER]
#
# Trains one VAE a depth, each in a folder of its own below FOLDER (default runs/sweep), by executing the notebook, or
# by the command line where there is no Jupyter. Every setting is an environment variable. A finished run with the
# same settings is skipped; one that fails does not stop the others. At the end the table and the figures are made
# anew. Exit code: 0 if all runs are finished, 1 if not, 130 or 143 when interrupted.
set -uo pipefail

scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sweep=${1:-runs/sweep}
export PYTHON=${PYTHON:-python} CMDLINE=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
if [ -z "${RUNNER:-}" ]; then
  if "$PYTHON" -c "import nbconvert, ipykernel" 2> /dev/null; then RUNNER=notebook; else RUNNER=command; fi
fi
case $RUNNER in
  notebook | command) ;;
  *)
    echo "error: RUNNER is '$RUNNER'; expected notebook or command" >&2
    exit 2
    ;;
esac

child=
interrupted() { # stop the run that is going on, then stop
  trap - INT TERM
  [ -n "$child" ] && kill -TERM "$child" 2> /dev/null && wait "$child"
  echo "interrupted; the same command goes on" >&2
  exit "$1"
}
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

failed=() epochs=${EPOCHS:-}
for entry in ${DEPTHS:-28 40 70 100}; do
  depth=${entry%%:*}
  case $entry in *:*) export EPOCHS=${entry#*:} ;; *) export EPOCHS=$epochs ;; esac
  export RESNET_DEPTH=$depth OUTDIR=$sweep/depth-$depth
  "$PYTHON" -m resnet_vae finished
  case $? in
    0)
      echo "depth $depth: finished already, in $OUTDIR"
      continue
      ;;
    3) ;;
    *)
      failed+=("$depth")
      continue
      ;;
  esac
  echo "depth $depth: training in $OUTDIR"
  if [ "$RUNNER" = notebook ]; then
    "$scripts/run_notebook.sh" "$scripts/../notebooks/resnet_vae.ipynb" "$OUTDIR" &
  else
    "$PYTHON" -m resnet_vae train &
  fi
  child=$!
  wait "$child"
  case $? in
    0) ;;
    4) failed+=("$depth (in work elsewhere)") ;;
    *) failed+=("$depth") ;;
  esac
  child=
done

"$PYTHON" -m resnet_vae table "$sweep" || failed+=(table)
if [ ${#failed[@]} -gt 0 ]; then
  echo "error: not finished: ${failed[*]}" >&2
  exit 1
fi
