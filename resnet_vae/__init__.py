"""Residual-network variational autoencoders, swept over depth.

The public names are here and are imported when first used, so that importing the package is quick and starts no
backend: Config, build_vae, build_classifier, load_data, train, load_run, take_over, adapt.
"""

import importlib
import os
import sys
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
_WITH_KERAS = (
    "training",
    "classifiers",
    "optimizer",
    "vae",
    "networks",
    "blocks",
    "loop",
    "normalization",
)  # the first imports the others
__all__ = ["Config", "adapt", "build_classifier", "build_vae", "load_data", "load_run", "take_over", "train"]
__version__ = "0.1.0"

os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # TensorFlow uses it unasked only on processors with AVX-512


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] in _WITH_KERAS:
        importlib.import_module(f"{__name__}.training")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *__all__])


class _RegisterWithKeras:
    """Import hook: once Keras is imported, make it know this package's classes, so that load_model finds them."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "keras":
            return None
        sys.meta_path.remove(cls)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                if not any(f"{__name__}.{name}" in sys.modules for name in _WITH_KERAS):  # not from one of these
                    importlib.import_module(f"{__name__}.training")

            spec.loader.exec_module = execute_and_register
        return spec


if "keras" in sys.modules:
    importlib.import_module(f"{__name__}.training")
else:
    sys.meta_path.insert(0, _RegisterWithKeras)
