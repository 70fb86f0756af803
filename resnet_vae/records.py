"""What a run leaves on disk, written whole or not at all, and read back.

A run's folder holds config.json, history.csv (one row per epoch), provenance.json, model.keras and, written last,
metrics.json: a run with metrics.json is finished. Its pictures are drawn afterwards.
"""

import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError

from resnet_vae.config import DATASETS, Config, ConfigError, UserError
from resnet_vae.devices import processor

FIGURES = ("loss", "reconstruction", "kl", "penalty")  # of every epoch and every evaluation
HISTORY = ("epoch", *FIGURES, *(f"val_{name}" for name in FIGURES))  # columns of every history.csv
HASHED = (".csv", ".md", ".png")  # endings of the files of a record.json
PICTURES = ("curves", "reconstructions", "samples", "interpolations")  # of a run, each a .png


class RecordError(UserError):
    """A run's folder that cannot be read, or cannot take the run."""


@dataclass(frozen=True)
class Run:
    """A recorded run: its folder and what the folder's files hold."""

    folder: Path
    config: Config
    history: list
    metrics: dict
    provenance: dict


class _Record(BaseModel):
    """What must be in a file for the tables and the figures to be made; whatever else is there stays."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Figures(_Record):
    loss: FiniteFloat
    reconstruction: FiniteFloat
    kl: FiniteFloat
    penalty: FiniteFloat


class _Metrics(_Record):
    loss_is: str = ""
    parameters: PositiveInt
    epochs: PositiveInt
    best_epoch: PositiveInt
    hours: FiniteFloat
    train: _Figures
    validation: _Figures
    validation_floor: FiniteFloat
    test: _Figures


class _Source(_Record):
    name: str
    fingerprint: str = ""


class _Provenance(_Record):
    data: _Source
    files: dict[str, str] = {}


def read_run(folder):
    """Read a finished run's record, without its model.

    Raises:
        UserError: a file is missing, cannot be read or lacks something.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists() and any(folder.glob("*/metrics.json")):
        raise RecordError(f"{folder} is a sweep; expected one of the runs below it")
    config = read_config(folder)
    metrics, provenance = _read(folder / "metrics.json", _Metrics), _read(folder / "provenance.json", _Provenance)
    return Run(folder, config, read_history(folder / "history.csv"), metrics, provenance)


def _read(path, schema):
    try:
        return schema.model_validate(read_json(path)).model_dump()
    except ValidationError as error:
        finding = error.errors()[0]
        place = ".".join(map(str, finding["loc"])) or "the whole"
        raise RecordError(f"{path} cannot be read: {place}: {finding['msg']}") from None


def read_config(folder):
    """The configuration in a run's folder, whether the run is finished or not.

    Raises:
        RecordError: it cannot be read.
    """
    path = folder / "config.json"
    try:
        return Config.from_record(read_json(path))
    except ConfigError as error:
        raise RecordError(f"{path} cannot be read: {'; '.join(str(error).splitlines())}") from None


def read_history(path):
    """The rows of a history.csv, name → number, all of them finite.

    Raises:
        RecordError: it is not there, is damaged, or lacks columns or numbers.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if any(None in (*row, *row.values()) for row in rows):
            raise ValueError("expected as many values in each row as there are columns")
        history = [{name: float(value) for name, value in row.items()} for row in rows]
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    if not history or not history[0].keys() >= set(HISTORY):
        raise RecordError(f"{path} cannot be read: expected columns {', '.join(HISTORY)}, and one row per epoch")
    for number, row in enumerate(history, 1):
        for name, value in row.items():
            if not math.isfinite(value):
                raise RecordError(f"{path} cannot be read: {name} is {value} in row {number}; expected a finite number")
    return history


def read_sweep(folder):
    """Read the finished runs in the folders directly below a folder, in the order of `sort_sweep`.

    Raises:
        RecordError: there is none.
    """
    folder = Path(folder)
    runs = [read_run(path.parent) for path in sorted(folder.glob("*/metrics.json"))]
    check_sweep(folder)
    if not runs:
        raise RecordError(f"{folder} has no finished runs below it; expected folders with a metrics.json")
    return sort_sweep(runs)


def sort_sweep(runs):
    """Runs by objective, depth and name."""
    return sorted(runs, key=lambda run: (run.config.objective, run.config.resnet_depth, natural(run.folder.name)))


def natural(name):
    """A key that sorts names by the numbers in them: seed-2 before seed-10."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split("([0-9]+)", name))]


def check_sweep(folder):
    """Refuse a file, or the folder of a single run, where the folder of a sweep is expected."""
    if folder.exists() and not folder.is_dir():
        raise RecordError(f"{folder} is no folder; expected that of a sweep")
    if (folder / "config.json").exists():
        raise RecordError(f"{folder} is a run; expected a sweep, the folder above it")


def model_of(folder):
    """The path of a run's model.

    Raises:
        RecordError: it is not there.
    """
    path = Path(folder) / "model.keras"
    if not path.exists():
        raise RecordError(
            f"{path} is missing; models are not kept in git: train again, in another OUTDIR, with the settings in the "
            "run's config.json"
        )
    return path


def is_finished(config, data=None):
    """Whether the run's folder holds a finished run of this configuration, and of these data where they are given.

    Raises:
        RecordError: the folder holds a finished run of another configuration or of other data, or one whose record is
            damaged, or it cannot take this one.
    """
    folder = config.folder
    if not (folder / "metrics.json").exists():
        _check_place(config)
        return False
    _read(folder / "metrics.json", _Metrics)
    former = read_config(folder)
    if (folder / "provenance.json").exists():  # or else the table tells
        files = _read(folder / "provenance.json", _Provenance)["files"]
        for name in ("config.json", "history.csv", "metrics.json"):
            if name in files and (folder / name).exists() and files[name] != sha256_of(folder / name):
                raise RecordError(
                    f"{folder / name} is not the file that the finished run there wrote, as when another run is copied "
                    "over it; bring it back, or move that folder away"
                )
    recorded, asked = former.recipe(), config.recipe()
    if asked["image_shape"] is None and former.origins["image_shape"] == "default":  # both as the data have it
        asked["image_shape"] = recorded["image_shape"]
    differing = [
        f"{name.upper()} {recorded[name]} there, {asked[name]} here" for name in asked if asked[name] != recorded[name]
    ]
    if differing:
        raise RecordError(
            f"{folder} holds a finished run of another configuration ({'; '.join(differing)}); choose another OUTDIR "
            "or move that folder away"
        )
    if data is not None:
        check_fingerprint(folder, data)
    return True


def _check_place(config):
    """Refuse a folder that can be neither written nor made, or that holds something else, or is among the images."""
    folder = config.folder
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise RecordError(f"OUTDIR is {str(folder)!r}: {there} is no folder; choose another OUTDIR")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RecordError(f"OUTDIR is {str(folder)!r}: {there} cannot be written; choose another OUTDIR")
    if (folder / "record.json").exists() or any(folder.glob("*/config.json")):
        raise RecordError(
            f"OUTDIR is {str(folder)!r}, the folder of a sweep, an experiment or a benchmark; choose another OUTDIR"
        )
    if (folder / "config.json").exists():  # of a run that is not finished, or of another program
        read_config(folder)
    check_outside(folder, config.dataset)


def check_outside(folder, dataset):
    """Refuse a folder for a record that is among the images of a data set.

    Raises:
        RecordError: it is.
    """
    images = Path(os.path.expanduser(dataset)).resolve()
    if dataset not in DATASETS and images.is_dir() and images in (folder.resolve(), *folder.resolve().parents):
        raise RecordError(
            f"OUTDIR is {str(folder)!r}, within the folder of images, where its pictures would become images; choose "
            "another OUTDIR"
        )


def make_writable(folder):
    """Make the folder of a record, before what it is to hold is measured.

    Raises:
        RecordError: it can be neither written nor made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise RecordError(f"{folder} cannot be written: {error.strerror}; choose another folder") from None


def check_fingerprint(folder, data):
    """Refuse data that are not those of a finished run.

    Raises:
        RecordError: their fingerprint is another.
    """
    recorded = _read(folder / "provenance.json", _Provenance)["data"]["fingerprint"]
    if recorded != data.fingerprint:
        raise RecordError(
            f"{folder} holds a finished run of other data (fingerprint {recorded[:12] or 'unknown'} there, "
            f"{data.fingerprint[:12]} here); bring the {data.name} of that run back, or choose another OUTDIR"
        )


def lacks_pictures(folder):
    """Whether a finished run's pictures are not all there, while its model is, from which they can be drawn."""
    return (folder / "model.keras").exists() and not all((folder / f"{name}.png").exists() for name in PICTURES)


def json_text(values):
    """Values as JSON text."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def write_json(path, values):
    """Write values as JSON, whole or not at all."""
    write_text(path, json_text(values))


def sha256_of(path):
    """The SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(folder, ran_on, **values):
    """Write record.json: values, what they were measured on, and the hashes of the other files in the folder.

    Args:
        folder: a Path, of an experiment or a benchmark whose tables and figures are written already.
        ran_on: of `environment`.
        **values: whatever else belongs to the record.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix in HASHED)
    write_json(folder / "record.json", {**values, **ran_on, "files": {path.name: sha256_of(path) for path in files}})


def csv_text(rows, columns):
    """Rows, dicts, as CSV text with a heading; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row[name] for name in columns] for row in rows)
    return text.getvalue()


def write_text(path, text):
    """Write a text file in UTF-8, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def whole(path):
    """The path to write a file at that is to be there whole or not at all; in the end it is moved to its own.

    What is there afterwards outlasts a power cut. Two processes may write the same file: the last one's stays.

    Raises:
        RecordError: the file cannot be written, as on a full disk.
    """
    path = Path(path)
    partial = path.with_name(f"partial-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except BaseException as error:
        if partial.is_file():
            partial.unlink()
        if isinstance(error, OSError):
            raise RecordError(f"{path} cannot be written: {error.strerror or error}") from None
        raise


def sync(path):
    """Have what was written to a file, or to a folder's list of files, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # as file systems say that cannot do it
            raise
    finally:
        os.close(descriptor)


def read_json(path):
    """Read a JSON file of a run.

    Raises:
        RecordError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecordError(f"{path} is missing; is {path.parent} the folder of a finished run?") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from None


def versions():
    """The versions of Keras, of its backends and of NumPy; None for what is not installed."""

    def installed(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in ("keras", "tensorflow", "jax", "torch", "numpy")}


def code():
    """The commit of the code as it is now, and whether it is changed; None where that is not known."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        ours = git("ls-files", "--error-unmatch", Path(__file__).name)  # and not a repository that this is installed in
        commit = git("rev-parse", "HEAD") if ours else None
        but_records = ("--", ":/", ":(top,exclude)results")  # a record that is made again changes these
        changes = git("status", "--porcelain", "--untracked-files=no", *but_records)
    except OSError:  # no git
        commit = changes = None
    return {"commit": commit, "dirty": None if commit is None or changes is None else bool(changes)}


def environment(backend, devices):
    """What a run ran on: commit, versions, the backend and its devices, processor and cores."""
    program = Path(sys.argv[0]).name
    return {
        **code(),
        "python": platform.python_version(),
        "backend": backend,
        "versions": versions(),
        "devices": devices,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "command": "a notebook" if program == "ipykernel_launcher.py" else " ".join([program, *sys.argv[1:]]),
    }
