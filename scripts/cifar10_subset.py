"""Make the small CIFAR-10 of the recorded experiments.

The first 1,017 images of each of the archive's six batches, five of training images and one of test images, with their
labels: what results/README.md calls cifar10-lossless-subset.npz (default: data/cifar10-lossless-subset.npz). Keras
downloads CIFAR-10 once, 170 MB. Exit code: 0 if the file holds the images of the records, 2 if it cannot be made, 130
when interrupted.
"""

import argparse
import os
import sys
from pathlib import Path


def _tell_what_is_missing(error):
    """A package that is not installed, in one line."""
    told = f"error: {sys.executable} has no {error.name}; make clean install, then source .venv/bin/activate"
    print(told, file=sys.stderr)
    return 2


try:
    import numpy as np

    from resnet_vae.config import Config, UserError, backend_problem
    from resnet_vae.data import keras_home, load_data
    from resnet_vae.records import whole
except ModuleNotFoundError as error:
    sys.exit(_tell_what_is_missing(error))

EACH, BATCH = 1017, 10_000
FINGERPRINT = "e207a8f2a6c3d5a5b218eb7d80826006e84286a01539a40e2fa4b532f92ed225"  # as records have it


def make(path):
    """Write the file, whole or not at all.

    Raises:
        UserError: there is no CIFAR-10, it is another one, or the file cannot be written.
    """
    data = load_data(Config(dataset="cifar10", validation="test"))
    train, test = (np.arange(len(images)) % BATCH < EACH for images in (data.train, data.test))
    arrays = {"xtr": data.train[train], "ytr": data.labels[0][train]}
    arrays |= {"xte": data.test[test], "yte": data.labels[2][test]}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial:
        np.savez_compressed(partial, **arrays)
        made = load_data(Config(dataset=str(partial), validation="test")).fingerprint
        if made != FINGERPRINT:
            raise UserError(
                f"these images are not those of the records (fingerprint {made[:12]} here, {FINGERPRINT[:12]} there); "
                f"remove {keras_home() / 'datasets' / 'cifar-10*'}, so that CIFAR-10 is downloaded again"
            )


def main():
    """Parse the command line; returns the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path("data/cifar10-lossless-subset.npz")
    parser.add_argument("file", nargs="?", type=Path, default=default, metavar="FILE.npz", help=f"default: {default}")
    path = parser.parse_args().file
    try:
        if path.suffix != ".npz":
            raise UserError(f"{path} is no name for the file; expected one that ends in .npz")
        if problem := backend_problem(os.environ.get("KERAS_BACKEND", "")):
            raise UserError(problem)
        make(path)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # as of a backend
        return _tell_what_is_missing(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
