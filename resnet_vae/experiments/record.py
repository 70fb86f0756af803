"""What an experiment leaves behind: its tables, its figure, its settings and what it ran on."""

import csv
from pathlib import Path
from typing import Annotated

import keras
from pydantic import BeforeValidator, Field

from resnet_vae.config import Settings, parse_words
from resnet_vae.plots import save
from resnet_vae.records import RecordError, csv_text, environment, write_record, write_text
from resnet_vae.vae import devices

Numbers = Annotated[tuple[int, ...], BeforeValidator(parse_words), Field(min_length=1)]  # as "20 56" or 20,56


class Experiment(Settings):
    """What all settings of experiments have in common; OUTDIR is by default runs/ and the name of the experiment."""

    outdir: str = ""
    cmdline: bool = False

    @property
    def name(self):
        """The experiment's."""
        return type(self).__name__.lower()

    @property
    def folder(self):
        """Where the record goes."""
        return Path(self.outdir or f"runs/{self.name}")


def write_experiment(settings, tables, figures):
    """Write each table as NAME.csv, each figure as NAME.png, and record.json.

    Args:
        settings: an `Experiment`.
        tables: name → list of rows, dicts with equal keys.
        figures: name → matplotlib Figure, drawn from these tables alone.

    Returns:
        The folder, a Path.

    Raises:
        RecordError: the folder cannot be written.
    """
    folder = settings.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            write_text(folder / f"{name}.csv", csv_text(rows, rows[0]))
        for name, figure in figures.items():
            save(figure, folder / f"{name}.png")
        experiment = type(settings).__module__.rpartition(".")[2]
        ran_on = environment(keras.backend.backend(), devices())
        write_record(folder, ran_on, experiment=experiment, settings=settings.model_dump(mode="json"))
    except OSError as error:
        raise RecordError(f"OUTDIR {folder} cannot be written: {error.strerror}; choose another OUTDIR") from None
    return folder


def read_tables(folder):
    """Read a folder's csv files back: name → list of rows, numbers as numbers."""
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with open(path, newline="") as file:
            tables[path.stem] = [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]
    return tables


def _value(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
