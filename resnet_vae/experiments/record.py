"""What an experiment leaves behind: its tables, its figure, its settings and what it ran on."""

from pathlib import Path
from typing import Annotated

import keras
from pydantic import BeforeValidator, Field

from resnet_vae.config import Settings, parse_words
from resnet_vae.plots import save
from resnet_vae.records import RecordError, csv_text, environment, write_json, write_text
from resnet_vae.vae import devices

Numbers = Annotated[tuple[int, ...], BeforeValidator(parse_words), Field(min_length=1)]  # as "20 56" or 20,56


class Experiment(Settings):
    """What all settings of experiments have in common; OUTDIR is by default runs/ and the name of the experiment."""

    outdir: str = ""
    cmdline: bool = False

    @property
    def folder(self):
        """Where the record goes."""
        return Path(self.outdir or f"runs/{type(self).__name__.lower()}")


def write_record(settings, tables, figures):
    """Write each table as NAME.csv, each figure as NAME.png, and record.json.

    Args:
        settings: an `Experiment`.
        tables: name → list of rows, dicts with equal keys.
        figures: name → matplotlib Figure.

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
        ran_on = environment(keras.backend.backend(), devices())
        write_json(folder / "record.json", {"settings": settings.model_dump(mode="json"), **ran_on})
    except OSError as error:
        raise RecordError(f"OUTDIR {folder} cannot be written: {error.strerror}; choose another OUTDIR") from None
    return folder
