"""Whether what is recorded still follows from itself: tables and figures from run folders, hashes, sums."""

import csv
import hashlib
import io
import math
import zipfile
from pathlib import Path

import h5py
import numpy as np
from matplotlib.image import imread

from resnet_vae import plots
from resnet_vae.config import UserError
from resnet_vae.records import FIGURES, RecordError, read_json, read_run, read_sweep
from resnet_vae.results import tables


def verify(folder):
    """Recompute what can be recomputed of a sweep: each run's hashes and figures, the table, the pictures.

    Args:
        folder: with a run in each folder below it that holds a config.json.

    Returns:
        A list of what does not match, a sentence each; empty if all is as recorded.

    Raises:
        RecordError: the folder holds no runs.
    """
    folder = Path(folder)
    places = sorted(path.parent for path in folder.glob("*/config.json"))
    if not places:
        raise RecordError(f"{folder} has no runs below it; expected folders with a config.json")
    runs, wrong = [], []
    for place in places:
        try:
            run = read_run(place)
            wrong += [f"{place / name} {what}" for name, what in _run(run)]
        except UserError as error:
            wrong.append(str(error))
        except (KeyError, TypeError, ValueError) as error:
            wrong.append(f"{place} holds a record that lacks something: {type(error).__name__} {error}")
        else:
            runs.append(run)
    if wrong:  # the table of what is left would not be the recorded one
        return wrong
    for name, text in tables(folder).items():
        if not (folder / name).exists():
            wrong.append(f"{folder / name} is missing")
        elif (folder / name).read_bytes() != text.encode():
            wrong.append(f"{folder / name} is not the table of these runs; python -m resnet_vae table {folder}")
    figures = {folder / f"{name}.png": figure for name, figure in plots.of_sweep(read_sweep(folder)).items()}
    figures |= {run.folder / "curves.png": plots.curves(run) for run in runs}
    return wrong + [f"{path} {what}" for path, figure in figures.items() if (what := _picture(path, figure))]


def _run(run):
    """What is wrong with a run: pairs of a file's name and a few words."""
    for name, digest in run.provenance.get("files", {}).items():
        path = run.folder / name
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            yield name, "is not the file that the run wrote (SHA-256)"
        if not path.exists() and path.suffix != ".keras":  # models are not in git
            yield name, "is missing"
    metrics, beta = run.metrics, run.config.beta
    if [row["epoch"] for row in run.history] != list(range(1, metrics["epochs"] + 1)):
        yield "history.csv", f"is not a row an epoch for {metrics['epochs']} epochs"
        return
    best = min(run.history, key=lambda row: row["val_loss"])
    if metrics["best_epoch"] != best["epoch"]:
        yield (
            "metrics.json",
            f"has epoch {metrics['best_epoch']} for the best; in history.csv it is {best['epoch']:.0f}",
        )
    for part, prefix in (("train", ""), ("validation", "val_")):
        for name in FIGURES:
            if not math.isclose(metrics[part][name], best[prefix + name], rel_tol=1e-5, abs_tol=1e-9):
                yield "metrics.json", f"has another {part} {name} than history.csv"
    if metrics["loss_is"] != run.config.loss_meaning:
        yield "metrics.json", f"calls the loss {metrics['loss_is']!r}; it is {run.config.loss_meaning!r}"
    evaluations = {path.name: read_json(path) for path in sorted(run.folder.glob("evaluation-*.json"))}
    for name, figures in [("metrics.json", metrics["test"]), *evaluations.items()]:
        if not math.isclose(figures["loss"], figures["reconstruction"] + beta * figures["kl"], rel_tol=1e-5):
            yield name, "has a loss that is not reconstruction + beta × KL"


def _picture(path, figure):
    if not path.exists():
        return "is missing"
    content = io.BytesIO()
    plots.save(figure, content)
    content.seek(0)
    new, old = imread(content), imread(path)
    if new.shape == old.shape and np.allclose(new, old, atol=0.02):
        return None
    return "is not the figure of these records"


def differences(folder, other):
    """What differs between two finished runs, in history (but for the time it took), weights and optimizer.

    Returns:
        A list of names of columns and arrays; empty for a run and the same run that was interrupted and gone on with.

    Raises:
        RecordError: a history or a model cannot be read.
    """
    first, second = ({**_columns(Path(place)), **_arrays(Path(place) / "model.keras")} for place in (folder, other))
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not _equal(first[name], second[name])
    )


def _equal(first, second):
    return np.array_equal(first, second, equal_nan=first.dtype.kind == second.dtype.kind == "f")


def _columns(folder):
    try:
        with open(folder / "history.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise RecordError(f"{folder / 'history.csv'} cannot be read: {error.strerror}") from None
    names = set().union(*rows) - {"seconds"}
    return {f"history {name}": np.array([row[name] for row in rows]) for name in names}


def _arrays(path):
    arrays = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            arrays[name] = item[()]

    try:
        with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            file.visititems(add)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    return arrays
