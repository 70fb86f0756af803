"""What the tests share: tiny networks, and one finished run on digits."""

import os
import resource
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")  # whatever ~/.keras/keras.json names

import numpy as np
import pytest

from resnet_vae import Config, load_data
from resnet_vae.experiments.settings import NOTEBOOKS

TINY = {
    "dataset": "digits",
    "width": 1 / 16,
    "latent_dim": 8,
    "intermediate_dim": 64,
    "batch_size": 64,
    "epochs": 3,
    "warmup_steps": 10,
    "learning_rate": 0.002,
    "precision": "float32",
}


def pytest_configure(config):
    """Have what several tests compute in processes of their own be compiled once on JAX: it was half of their time."""
    if os.environ["KERAS_BACKEND"] == "jax" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_collection_modifyitems(items):
    """Begin with the files of the longest tests, or else one of two workers has them for itself in the end."""
    items.sort(key=lambda item: item.path.stem not in ("test_notebooks", "test_resumption", "test_benchmarks"))


def once(reason):
    """Mark a slow test of what is the same on every backend: it runs on TensorFlow."""
    return pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "tensorflow", reason=reason)


def processor_seconds():
    """What finished child processes have computed, which is the same on a busy machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """No setting of the caller's environment reaches a test."""
    for settings in NOTEBOOKS.values():
        for name in (*map(str.upper, settings.model_fields), *settings.also):
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def seeds(request):
    """A test's numbers and networks are the same every time, whatever ran before it."""
    if hasattr(request.module, "RNG"):
        request.module.RNG = np.random.default_rng(0)
    if keras := sys.modules.get("keras"):
        keras.utils.set_random_seed(0)


@pytest.fixture
def without_backend(tmp_path_factory, monkeypatch):
    """In processes that the test starts importing Keras or a backend is an error."""
    folder = tmp_path_factory.mktemp("without")
    for name in ("keras", "tensorflow", "jax", "torch"):
        (folder / f"{name}.py").write_text("raise RuntimeError('imported before it is needed')")
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


@pytest.fixture(scope="session")
def tiny_vae():
    """An untrained VAE whose blocks are no identities and whose posterior is not the prior."""
    import keras

    from resnet_vae import build_vae

    keras.utils.set_random_seed(1)
    vae = build_vae(Config(**TINY, initialization="published"))
    vae.compile("adam")
    return vae


@pytest.fixture(scope="session")
def images():
    """48 handwritten digits, uint8 (48, 16, 16, 1)."""
    return load_data(Config(**TINY)).test[:48]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a run of three epochs on digits."""
    from resnet_vae import train

    return train(Config(**TINY, outdir=str(tmp_path_factory.mktemp("sweep") / "depth-28"), cmdline=True))
