"""What an experiment leaves behind: its tables, its figure, its settings and what it ran on."""

import csv

import keras

from resnet_vae.devices import devices
from resnet_vae.plots import save
from resnet_vae.records import csv_text, environment, make_writable, write_record, write_text


def conduct(settings, experiment):
    """Measure, and write each table as NAME.csv, each figure as NAME.png, and record.json.

    Args:
        settings: an `Experiment`.
        experiment: its module. `measure` there is settings → {name: table}, a list of rows, dicts with equal keys, and
            `figures` is tables → {name: matplotlib Figure}.

    Returns:
        The folder, a Path.

    Raises:
        RecordError: the folder cannot be written.
    """
    ran_on = environment(keras.backend.backend(), devices())  # the code as it is now
    folder = settings.folder
    make_writable(folder)
    tables = experiment.measure(settings)
    for name, rows in tables.items():
        write_text(folder / f"{name}.csv", csv_text(rows, rows[0]))
    for name, figure in experiment.figures(tables).items():
        save(figure, folder / f"{name}.png")
    name = experiment.__name__.rpartition(".")[2]
    write_record(folder, ran_on, experiment=name, settings=settings.model_dump(mode="json"))
    return folder


def read_tables(folder):
    """Read a folder's csv files back: name → list of rows, numbers as numbers."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            tables[path.stem] = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return tables


def _value(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
