"""Whether what is recorded still follows from itself: tables and figures from run folders, hashes, sums."""

import importlib
import io
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from matplotlib.image import imread

from resnet_vae import plots
from resnet_vae.config import UserError
from resnet_vae.records import (
    FIGURES,
    HASHED,
    PICTURES,
    RecordError,
    check_sweep,
    model_of,
    read_history,
    read_json,
    read_run,
    sha256_of,
    sort_sweep,
)
from resnet_vae.results import tables

EXPERIMENTS = ("degradation", "euler", "gradients", "landscape", "transfer")


def verify(folder):
    """Recompute what can be recomputed of what is recorded.

    Args:
        folder: of a sweep, with a run in each folder below it that holds a config.json: each run's hashes and figures,
            the table, the pictures. Or with a record.json, of an experiment or a benchmark: the hashes, and an
            experiment's pictures from its tables.

    Returns:
        A list of what does not match or cannot be read, a sentence each; empty if all is as recorded.
    """
    folder = Path(folder)
    try:
        if not (folder / "record.json").exists():
            return _sweep(folder)
        return _record(folder) + (_sweep(folder) if any(folder.glob("*/config.json")) else [])
    except (UserError, OSError) as error:
        return [str(error)]


def _record(folder):
    record = read_json(folder / "record.json")
    files = record.get("files") if isinstance(record, dict) else None
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        return [f"{folder / 'record.json'} has no hashes of the other files"]
    wrong = [f"{folder / name} {what}" for name, what in _hashes(folder, files)]
    unknown = sorted({path.name for path in folder.iterdir() if path.suffix in HASHED} - set(files))
    wrong += [f"{folder / name} is not in record.json" for name in unknown]
    experiment = record.get("experiment")
    if wrong or experiment is None:
        return wrong
    if experiment not in EXPERIMENTS:
        return [
            f"{folder / 'record.json'} is of the experiment {experiment!r}; expected one of {', '.join(EXPERIMENTS)}"
        ]
    from resnet_vae.experiments.record import read_tables

    try:
        figures = importlib.import_module(f"resnet_vae.experiments.{experiment}").figures(read_tables(folder))
    except (KeyError, TypeError, ValueError) as error:
        return [f"{folder} holds a table that lacks something: {type(error).__name__} {error}"]
    pictures = {folder / f"{name}.png": figure for name, figure in figures.items()}
    return [f"{path} {what}" for path, figure in pictures.items() if (what := _picture(path, figure))]


def _hashes(folder, files):
    """What is wrong with files of these hashes: pairs of a name and a few words. Models are not in git."""
    for name, digest in files.items():
        path = folder / Path(name).name
        if path.exists() and sha256_of(path) != digest:
            yield name, "is not the file that was written (SHA-256)"
        if not path.exists() and path.suffix != ".keras":
            yield name, "is missing"


def _sweep(folder):
    check_sweep(folder)
    places = sorted(path.parent for path in folder.glob("*/config.json"))
    if not places:
        raise RecordError(
            f"{folder} holds no record; expected a record.json, or runs below it, folders with a config.json"
        )
    runs, wrong = [], []
    for place in places:
        try:
            run = read_run(place)
            wrong += [f"{place / name} {what}" for name, what in _run(run)]
        except UserError as error:
            wrong.append(str(error))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            wrong.append(f"{place} holds a record that lacks something: {type(error).__name__} {error}")
        else:
            runs.append(run)
    if wrong:  # the table of what is left would not be the recorded one
        return wrong
    runs = sort_sweep(runs)
    for name, text in tables(runs).items():
        if not (folder / name).exists():
            wrong.append(f"{folder / name} is missing")
        elif (folder / name).read_bytes() != text.encode():
            wrong.append(f"{folder / name} is not the table of these runs; python -m resnet_vae table {folder}")
    figures = {folder / f"{name}.png": figure for name, figure in plots.of_sweep(runs).items()}
    figures |= {run.folder / "curves.png": plots.curves(run) for run in runs}
    return wrong + [f"{path} {what}" for path, figure in figures.items() if (what := _picture(path, figure))]


def _run(run):
    """What is wrong with a run: pairs of a file's name and a few words."""
    yield from _hashes(run.folder, run.provenance.get("files", {}))
    metrics, beta = run.metrics, run.config.beta
    epochs = [row["epoch"] for row in run.history]
    if len(epochs) != metrics["epochs"] or epochs != list(range(1, len(epochs) + 1)):
        yield "history.csv", f"is not one row per epoch for {metrics['epochs']} epochs"
        return
    least = min(row["val_loss"] for row in run.history)  # rounded: several epochs may have it
    best = {row["epoch"]: row for row in run.history if row["val_loss"] == least}
    if metrics["best_epoch"] not in best:
        told = " or ".join(f"{epoch:.0f}" for epoch in best)
        yield "metrics.json", f"has epoch {metrics['best_epoch']} for the best; in history.csv it is {told}"
        return
    best = best[metrics["best_epoch"]]
    for part, prefix in (("train", ""), ("validation", "val_")):
        for name in FIGURES:
            if not math.isclose(metrics[part][name], best[prefix + name], rel_tol=1e-5, abs_tol=1e-9):
                yield "metrics.json", f"has another {part} {name} than history.csv"
    hours = run.provenance["seconds"] / 3600
    if not math.isclose(metrics["hours"], hours):
        yield "metrics.json", f"has {metrics['hours']:.3g} hours; in provenance.json it is {hours:.3g}"
    parameters = _parameters(run.config)
    if metrics["parameters"] != parameters:
        yield "metrics.json", f"has {metrics['parameters']:,} parameters; the network has {parameters:,}"
    floors = {part: metrics[f"{part}_floor"] for part in ("validation", "test")}
    for part, floor in floors.items():
        most = metrics[part]["reconstruction"]
        if not 0 < floor <= most * (1 + 1e-5) and any(floors.values()):  # of black and white alone they are 0
            yield (
                "metrics.json",
                f"has a {part}_floor of {floor:.1f}; expected more than 0 and at most the reconstruction's {most:.1f}",
            )
    if run.config.validation == "test":  # the same images and the same weights
        for part in FIGURES:
            if not math.isclose(metrics["test"][part], metrics["validation"][part], rel_tol=1e-5, abs_tol=1e-9):
                yield "metrics.json", f"has another test {part} than that of the validation on the same images"
        if floors["validation"] != floors["test"]:
            yield "metrics.json", "has another test_floor than validation_floor, of the same images"
    seconds, trained_on = run.provenance["seconds"], run.provenance["data"]["train"]
    batch = min(run.config.batch_size, trained_on)
    rates = {
        "seconds_per_epoch": seconds / metrics["epochs"],
        "images_per_second": trained_on // batch * batch * metrics["epochs"] / seconds,
    }
    for name, rate in rates.items():
        if not math.isclose(run.provenance.get(name, rate), rate):
            yield "provenance.json", f"has {run.provenance[name]:.4g} {name}; its seconds and images give {rate:.4g}"
    computed_in = run.provenance.get("precision", run.config.precision)
    if run.config.precision not in ("auto", computed_in):
        yield "provenance.json", f"has the precision {computed_in}; in config.json it is {run.config.precision}"
    evaluations = {path.name: read_json(path) for path in sorted(run.folder.glob("evaluation-*.json"))}
    tests = {"metrics.json": {"loss_is": metrics["loss_is"], **metrics["test"]}, **evaluations}
    for name, figures in tests.items():
        if figures["loss_is"] != run.config.loss_meaning:
            yield name, f"calls the loss {figures['loss_is']!r}; it is {run.config.loss_meaning!r}"
        if not math.isclose(figures["loss"], figures["reconstruction"] + beta * figures["kl"], rel_tol=1e-5):
            yield name, "has a loss that is not reconstruction + beta × KL"
    for name in PICTURES:
        if not (run.folder / f"{name}.png").exists():
            yield f"{name}.png", "is missing"


def _parameters(config):
    """The number of parameters of a configuration's network."""
    import keras

    from resnet_vae.vae import build_vae, count_parameters

    def count():
        with keras.StatelessScope(initialize_variables=False):  # makes no weights, which is what takes time
            return count_parameters(build_vae(config))

    # In a thread of its own, with which Keras's list of weights that are yet to be made ends.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(count).result()


def _picture(path, figure):
    if not path.exists():
        return "is missing"
    content = io.BytesIO()
    plots.render(figure, content)
    content.seek(0)
    new = imread(content)
    try:
        old = imread(path)
    except Exception as error:  # Pillow raises almost anything on a broken file
        return f"cannot be read as a picture: {error}"
    if new.shape == old.shape and np.allclose(new, old, atol=0.02):
        return None
    return "is not the figure of these records"


def differences(folder, other):
    """What differs between two finished runs, in history (but for the time it took), weights and optimizer.

    Returns:
        A list of names of columns and arrays; empty for a run and the same run after interruptions.

    Raises:
        RecordError: a history or a model cannot be read.
    """
    first, second = ({**_columns(Path(place)), **_arrays(model_of(place))} for place in (folder, other))
    return sorted(
        name
        for name in first.keys() | second.keys()
        if name not in first or name not in second or not _equal(first[name], second[name])
    )


def _equal(first, second):
    return np.array_equal(first, second, equal_nan=first.dtype.kind == second.dtype.kind == "f")


def _columns(folder):
    rows = read_history(folder / "history.csv")
    names = rows[0].keys() - {"seconds"}
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
