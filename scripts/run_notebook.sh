#!/usr/bin/env bash
# Execute a notebook headlessly: run_notebook.sh NOTEBOOK [OUTDIR]
#
# The executed notebook goes to OUTDIR (default: $OUTDIR, or runs/NAME-<unix time>), which the notebook is told too.
# Its log is shown as it comes. When a cell fails or the kernel dies, the notebook as far as it came is in OUTDIR and
# the exit code is not 0: 2 for a mistake in the settings or the data, 4 for a folder in use, 130 or 143 when interrupted.
set -euo pipefail

scripts=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
. "$scripts/arguments.sh"
check_arguments 2 "$@"
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: $0 NOTEBOOK [OUTDIR]${1:+ ($1 is no file)}" >&2
  exit 2
fi
name=$(basename "$1")
OUTDIR=$(expanded "${2:-${OUTDIR:-runs/${name%.ipynb}-$(date +%s)}}")
export OUTDIR CMDLINE=1 PYDEVD_DISABLE_FILE_VALIDATION=1
export JUPYTER_PREFER_ENV_PATH=1 # the kernel of PYTHON, and not one of the same name that the user has installed
"${PYTHON:-python}" -m resnet_vae config "$1" > /dev/null # a mistake in the settings is told here, in one message
if ! mkdir -p "$OUTDIR" 2> /dev/null || [ ! -w "$OUTDIR" ]; then
  echo "error: OUTDIR is '$OUTDIR', which cannot be made or written; expected a folder that can be written" >&2
  exit 2
fi
notebook=$(printf '%s\n' "$1" | sed 's/[][*?]/[&]/g') # nbconvert takes a pattern
exec "${PYTHON:-python}" -m nbconvert --config "$scripts/nbconvert_config.py" --log-level=WARN --to notebook \
  --execute "$notebook" --output-dir "$OUTDIR" --output "$name" --ExecutePreprocessor.timeout=-1
