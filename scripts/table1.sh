#!/usr/bin/env bash
# The post's Table 1 in one command: table1.sh [FOLDER]
#
# Trains the four depths on CIFAR-10, with the test images for validation as in the post, and makes the table. Where
# there is an NVIDIA GPU: at full width, under the post's objective, with flipped images, in 19 minutes on an H200, on
# JAX if it can use the GPU, else on TensorFlow. Elsewhere: at a quarter of the width, under both objectives, each run
# with as many epochs as take about 100 minutes on two cores of an Intel Xeon, half a day in all (both measured with
# SHORTCUT=projection). What is set beforehand stays as it is, but for SWEEP: DATASET=data/cifar10 and
# EVALUATE=data/other.npz, for instance. It is run_all.sh with these settings: it runs unattended, and after an
# interruption the same command goes on.
set -euo pipefail

scripts=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
. "$scripts/arguments.sh"
check_arguments 1 "$@"
folder=$(expanded "${1:-runs/table1}")
export RUNNER=${RUNNER:-command} DATASET=${DATASET:-cifar10} VALIDATION=${VALIDATION:-test} SWEEP="OBJECTIVE DEPTHS"
DEPTHS=${DEPTHS:-${EPOCHS:+28 40 70 100}} # with their own epochs below, EPOCHS would not count
sees_gpu() { # whether a backend does
  case $1 in
    jax) "${PYTHON:-python}" -c 'import jax; jax.devices("gpu")' ;;
    tensorflow) "${PYTHON:-python}" -c 'import sys, tensorflow as tf; sys.exit(not tf.config.list_physical_devices("GPU"))' ;;
    *) "${PYTHON:-python}" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ;;
  esac > /dev/null 2>&1
}
if [[ ! ${CUDA_VISIBLE_DEVICES-all} =~ ^(-1)?$ ]] && nvidia-smi -L > /dev/null 2>&1; then
  found=
  for backend in ${KERAS_BACKEND:-jax tensorflow}; do
    if [ -z "$found" ] && sees_gpu "$backend"; then found=$backend; fi
  done
  if [ -z "$found" ]; then
    echo "error: this machine has an NVIDIA GPU that ${KERAS_BACKEND:-neither JAX nor TensorFlow}" \
      "can${KERAS_BACKEND:+not} use; expected a backend with its CUDA libraries (README, Installing), or" \
      "CUDA_VISIBLE_DEVICES= to compute on the CPU" >&2
    exit 2
  fi
  export KERAS_BACKEND=$found
  # batches that divide the data, so that JAX compiles no other size; its search for matrix products makes none faster
  export WIDTH=${WIDTH:-1} BATCH_SIZE=${BATCH_SIZE:-250} AUGMENT=${AUGMENT:-flip} OBJECTIVE=${OBJECTIVE:-published}
  if [ "$KERAS_BACKEND" = jax ]; then export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false ${XLA_FLAGS:-}"; fi
  export DEPTHS=${DEPTHS:-28:32 40:32 70:32 100:32}
  export XLA_PYTHON_CLIENT_PREALLOCATE=${XLA_PYTHON_CLIENT_PREALLOCATE:-false}
  export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/compiled} # interrupted, it compiles once
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0}
else
  export WIDTH=${WIDTH:-0.25} BATCH_SIZE=${BATCH_SIZE:-100} OBJECTIVE=${OBJECTIVE:-published elbo}
  export DEPTHS=${DEPTHS:-28:38 40:29 70:18 100:13}
fi
exec "$scripts/run_all.sh" "$folder"
