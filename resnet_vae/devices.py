"""The processor and the backend's devices, the precision that is fast on them, and keeping freed memory."""

import ctypes
import functools
import platform
from pathlib import Path


@functools.cache
def _cpuinfo(*names):
    """The value of the first line of /proc/cpuinfo with one of these names, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in names), "")


def processor():
    """The processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def processor_prefers_bfloat16():
    """Whether the processor computes faster in bfloat16 than in float32, as far as Linux tells.

    It does with AMX, with Arm's BF16 and with AMD's AVX512_BF16. Intel's AVX512_BF16 takes twice as long as float32:
    in matrix products on two cores a Sapphire Rapids without AMX reaches 168 GFLOP/s in bfloat16 and 339 in float32,
    an AMD EPYC 780 to 890 and 480 to 510 (`results/bench-epyc`).
    """
    flags, amd = _flags(), _cpuinfo("vendor_id") == "AuthenticAMD"
    return not flags.isdisjoint({"amx_bf16", "bf16"}) or (amd and "avx512_bf16" in flags)


def processor_has_amx():
    """Whether the processor multiplies matrices in tiles, by Intel's AMX, in bfloat16."""
    return "amx_bf16" in _flags()


def _flags():
    return set(_cpuinfo("flags", "Features").split())


def devices():
    """List the devices that the backend computes on, as "gpu:0, NVIDIA H200", or as "cpu:0"."""
    import keras

    gpus = [f"gpu:{number}, {name}" for number, (name, _) in enumerate(_gpus())]
    if gpus:
        return gpus
    if keras.backend.backend() == "torch":  # "cpu", or a Mac's "mps:0"
        return [str(keras.ops.zeros(()).device)]
    return keras.distribution.list_devices()


def _gpus():
    """The name and the compute capability of each GPU that the backend computes on."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        details = map(tf.config.experimental.get_device_details, tf.config.get_visible_devices("GPU"))
        return [(each.get("device_name", "unknown"), each.get("compute_capability", (0, 0))) for each in details]
    if backend == "jax":
        import jax

        gpus = [device for device in jax.devices() if device.platform == "gpu"]
        versions = [str(getattr(gpu, "compute_capability", "")).split(".") for gpu in gpus]
        numbers = [tuple(int(part) for part in each if part.isdecimal()) for each in versions]  # AMD's is gfx90a
        return [(gpu.device_kind, number) for gpu, number in zip(gpus, numbers, strict=True)]
    import torch

    numbers = range(torch.cuda.device_count())
    return [(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)) for number in numbers]


def computes_on_gpu():
    """Whether the backend computes on an NVIDIA or AMD GPU."""
    return bool(_gpus())


def keep_memory():
    """From here on keep what is freed for what is allocated next, in the whole process, where the C library is GNU's.

    By default it gives large tensors back to the system, which clears them when the next step asks for them: without
    that a mirrored step of 25 images takes 5 % less time on two cores, in 4 % more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4  # the parameters' numbers in malloc.h
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


def settle():
    """Make the backend compute as in training, in the whole process, so that a figure is the same in each process.

    On TensorFlow without a GPU, where Keras does not use XLA, this switches the rewriting of graphs off, which takes a
    fifth of the first step, makes no other step quicker, and in bfloat16 rounds elsewhere; and it keeps freed memory.
    """
    import keras

    if keras.backend.backend() != "tensorflow" or computes_on_gpu():
        return
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    keep_memory()


def precision(config):
    """The dtype policy that a configuration asks for; "auto" depends on what computes here.

    mixed_bfloat16 on GPUs that have it (NVIDIA's since compute capability 8.0) and, except on JAX, on processors that
    compute faster in it; on others it is emulated, several times slower than float32.
    """
    if config.precision != "auto":
        return config.precision
    return "mixed_bfloat16" if _computes_in_bfloat16() else "float32"


def _computes_in_bfloat16():
    import keras

    gpus = _gpus()
    if gpus:
        return gpus[0][1] >= (8, 0)
    return keras.backend.backend() != "jax" and processor_prefers_bfloat16()
