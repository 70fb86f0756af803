"""A training's state on disk: one file, written whole or not at all, checked when it is read, and the one before it.

The file is a line that names the format, the SHA-256 of all that follows, a line of JSON, and arrays in NumPy's
format, without pickle.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from resnet_vae.records import RecordError, sync, versions

FORMAT = b"resnet_vae checkpoint 1\n"
NAMES = ("checkpoint", "checkpoint-before", "partial-checkpoint")  # the newest, the one before, one being written
NETWORK = ("initialization", "loop", "convolution", "normalization", "blocks", "networks", "vae")
MODULES = ("config", "data", "devices", *NETWORK, "optimizer", "training")  # whose code decides what is trained
HASHES = ("data", "code")  # parts of what a training is that are told by their names alone


class DamagedError(Exception):
    """A file that is not, or not wholly, what was written."""


class _Hashing:
    """A file to write to that keeps the SHA-256 of what went through."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content):
        self.digest.update(content)
        return self.file.write(content)


def save(folder, values, arrays):
    """Write a checkpoint, which takes the place of the one before; that one is kept, too.

    Args:
        folder: the run's.
        values: what JSON can hold.
        arrays: arrays, or a generator of them, so that only one need be in memory.

    Raises:
        RecordError: it cannot be written; the checkpoints that there were are as they were.
    """
    newest, before, partial = (Path(folder, name) for name in NAMES)
    try:
        try:
            with open(partial, "wb") as file:
                file.write(FORMAT + bytes(32))
                content = _Hashing(file)
                content.write(json.dumps(values).encode() + b"\n")
                for array in arrays:
                    np.lib.format.write_array(content, np.asarray(array), allow_pickle=False)
                file.seek(len(FORMAT))
                file.write(content.digest.digest())
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if newest.exists():
            os.replace(newest, before)
        os.replace(partial, newest)
        sync(folder)
    except OSError as error:
        then = "goes on from the one before" if exists(folder) else "begins anew"
        raise RecordError(f"{newest} cannot be written: {error.strerror}; the same command {then}") from None


def exists(folder):
    """Whether a folder has a checkpoint, whole or not."""
    return any(Path(folder, name).exists() for name in NAMES[:2])


def load(folder):
    """Read the newest checkpoint that is whole; one that is not is reported on stderr, and a damaged one removed.

    Returns:
        (values, arrays), or None where there never was a checkpoint.

    Raises:
        RecordError: there are checkpoints, but none is whole.
    """
    found = [path for path in (Path(folder, name) for name in NAMES[:2]) if path.exists()]
    damages, damaged = [], None
    for path in found:
        try:
            content = _read(path)
        except (OSError, DamagedError) as error:
            damages.append(f"{path} {error}")
            damaged = damaged or (path if isinstance(error, DamagedError) else None)
        else:
            if damages:
                print(f"warning: {'; '.join(damages)}; going on from {path.name}, which is older", file=sys.stderr)
                if damaged:
                    damaged.unlink()  # or else the next one would put it in this one's place
            return content
    if damages:
        raise RecordError(f"{'; '.join(damages)}; to train from the beginning, move {folder} away")
    return None


def programs(backend):
    """What besides settings and data decides what is trained: a hash of the code, the backend, versions."""
    code, installed = hashlib.sha256(), versions()
    for name in MODULES:
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return {
        "code": code.hexdigest(),
        "backend": backend,
        "keras_version": installed["keras"],
        "backend_version": installed.get(backend),
    }


def check_recipe(config):
    """Refuse a folder with an unfinished run of something else, as far as is known without its arrays and Keras.

    Raises:
        RecordError: settings, code, backend or versions differ.
    """
    for path in (config.folder / name for name in NAMES[:2]):
        try:
            with open(path, "rb") as file:
                file.seek(len(FORMAT) + 32)
                recorded = json.loads(file.readline())["identity"]
                recipe = config.recipe()
                if recipe["image_shape"] is None:
                    recipe["image_shape"] = recorded["image_shape"]
                if recipe["precision"] == "auto":  # what that is here, is known when Keras is imported
                    recipe["precision"] = recorded["precision"]
                here = programs(os.environ.get("KERAS_BACKEND") or recorded.get("backend"))
                recipe |= {name: value for name, value in here.items() if name in recorded}
        except (OSError, ValueError, TypeError, KeyError):  # none, or one that `load` will tell of
            continue
        return check_identity(config.folder, recorded, recipe)


def check_identity(folder, recorded, asked):
    """Refuse to go on from a checkpoint of something else.

    Args:
        folder: the run's.
        recorded: what the checkpoint's training is, a dict.
        asked: what it is to be, or a part of that.

    Raises:
        RecordError: they differ.
    """
    differing = [
        f"another {name}" if name in HASHES else f"{name.upper()} {recorded.get(name)} there, {value} here"
        for name, value in asked.items()
        if recorded.get(name) != value
    ]
    if differing:
        raise RecordError(
            f"{folder} holds an unfinished run of something else ({'; '.join(differing)}); choose another OUTDIR or "
            "move that folder away"
        )


def _read(path):
    with open(path, "rb") as file:
        if file.read(len(FORMAT)) != FORMAT:
            raise DamagedError("is no checkpoint")
        expected = file.read(32)
        if hashlib.file_digest(file, "sha256").digest() != expected:
            raise DamagedError("is damaged: its content is not what was written")
        end = file.seek(0, os.SEEK_END)
        file.seek(len(FORMAT) + 32)
        try:
            values, arrays = json.loads(file.readline()), []
            while file.tell() < end:
                arrays.append(np.lib.format.read_array(file, allow_pickle=False))
        except ValueError as error:  # only of a file that was made up, hash and all
            raise DamagedError(f"cannot be read: {error}") from None
    return values, arrays


def remove_newest(folder):
    """Remove a folder's newest checkpoint, so that the one before is gone on from."""
    Path(folder, NAMES[0]).unlink(missing_ok=True)


def remove(folder):
    """Remove a folder's checkpoints."""
    for name in NAMES:
        Path(folder, name).unlink(missing_ok=True)
