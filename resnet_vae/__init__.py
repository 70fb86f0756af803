"""Residual-network variational autoencoders, swept over depth.

The public names are here and are imported when first used, so that importing the package is quick and starts no
backend: Config, build_vae, build_classifier, load_data, train, load_run, take_over, adapt.
"""

import importlib
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext, suppress
from importlib.machinery import PathFinder

_HOMES = {
    "Config": "config",
    "adapt": "transfer",
    "build_classifier": "classifiers",
    "build_vae": "vae",
    "load_data": "data",
    "load_run": "results",
    "take_over": "transfer",
    "train": "training",
}
_WITH_CLASSES = ("training", "transfer")  # importing these makes Keras know all classes of the package
_NOTICES = "^(WARNING: All log messages before absl::InitializeLog|I0000 )"  # and nothing that is a warning
__all__ = [*_HOMES]
__version__ = "0.1.0"

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # TensorFlow uses it unasked only on processors with AVX-512


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])


def _register():
    for name in _WITH_CLASSES:
        importlib.import_module(f"{__name__}.{name}")


@contextmanager
def _without_notices():
    """Leave TensorFlow's notices out of stderr, which TF_CPP_MIN_LOG_LEVEL is to do and while it is imported does not.

    Another process does that, so that what a crash writes is told all the same.
    """
    stderr = grep = None
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "0") not in ("", "0"):
        with suppress(OSError):  # no stderr, or no grep
            stderr = os.dup(2)
            grep = subprocess.Popen(["grep", "-avE", _NOTICES], stdin=subprocess.PIPE, stdout=stderr)
    try:
        if grep:
            os.dup2(grep.stdin.fileno(), 2)
        yield
    finally:
        if grep:
            os.dup2(stderr, 2)
            grep.stdin.close()
            with suppress(subprocess.TimeoutExpired):  # what was started meanwhile, and goes on, may hold it
                grep.wait(5)
        if stderr is not None:
            os.close(stderr)


class _RegisterWithKeras:
    """Import hook: once Keras is imported, make it know this package's classes, so that load_model finds them.

    Not before a module of this package that imports Keras is there itself.
    """

    depth = 0  # of imports within imports

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "keras" and not name.startswith(f"{__name__}."):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                cls.depth += 1
                try:
                    with _without_notices() if name == "keras" else nullcontext():
                        execute(module)
                finally:
                    cls.depth -= 1
                if "keras" in sys.modules and not cls.depth and cls in sys.meta_path:
                    sys.meta_path.remove(cls)
                    _register()

            spec.loader.exec_module = execute_and_register
        return spec


if "keras" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterWithKeras)
