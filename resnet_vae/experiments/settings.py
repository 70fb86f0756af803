"""The experiments' settings. Nothing large is imported, so that a mistake is told at once."""

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from resnet_vae.config import (
    IMAGENET,
    Config,
    ConfigError,
    PathText,
    Seed,
    Settings,
    Shape,
    blocks_per_stage,
    cifar_blocks,
    did_you_mean,
    parse_words,
)
from resnet_vae.records import check_outside, read_json

NETWORKS = ("classifier", "VAE")
KINDS = {  # and their options; "zero-init" has residual blocks that start as the identity
    "plain": {"shortcut": "none"},
    "residual": {},
    "zero-init": {"initialization": "identity"},
    "pre-activation": {"order": "pre"},
}
COMPARED = {"plain": "tab:red", "residual": "tab:blue"}  # two of them, and their colours


def _check_classifier_depth(depth):
    expected = "expected 6n + 2 or 9n + 2 layers, as 8, 20, 32 or 29 (a VAE's depth is another setting)"
    if depth in IMAGENET:
        raise ValueError(f"{depth} layers are a network for ImageNet, of other blocks; {expected}")
    if cifar_blocks(depth) is None:
        raise ValueError(expected)
    return depth


def _check_vae_depth(depth):
    blocks_per_stage(depth)
    return depth


def _each_once(values):
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value} is there twice")
    return values


def _some(kind):
    """One or more of a kind, separated by spaces or commas."""
    return Annotated[tuple[kind, ...], BeforeValidator(parse_words), Field(min_length=1), AfterValidator(_each_once)]


Numbers = _some(Annotated[int, Field(ge=1)])
ClassifierDepth = Annotated[int, AfterValidator(_check_classifier_depth)]
VAEDepth = Annotated[int, AfterValidator(_check_vae_depth)]


class Experiment(Settings):
    """What all settings of experiments have in common."""

    outdir: PathText = Field("", description="the record's folder (default: runs/ and the experiment's name)")

    @field_validator("outdir")
    @classmethod
    def _check_outdir(cls, outdir):
        """Refuse a folder whose record would be overwritten or counted as this one's."""
        if not outdir:
            return outdir
        folder = Path(os.path.expanduser(outdir))
        if (folder / "config.json").exists() or any(folder.glob("*/config.json")):
            raise ValueError("it is the folder of a run or a sweep; expected another one")
        if (folder / "record.json").exists():
            record = read_json(folder / "record.json")
            experiment = record.get("experiment") if isinstance(record, dict) else None
            if experiment not in {each.__name__.lower() for each in cls.__mro__}:
                raise ValueError(f"it holds the record of {experiment or 'a benchmark'}; expected another folder")
        return outdir

    @property
    def folder(self):
        """Where the record goes."""
        return Path(os.path.expanduser(self.outdir or f"runs/{type(self).__name__.lower()}"))


class Networks(Experiment):
    """Of experiments with small classifiers and VAEs."""

    dataset: PathText = Field("digits", description="with labels; as for DATASET of a VAE")
    image_shape: Shape | None = Field(None, description="images are resized to it (default: as the data set has them)")
    width: float = Field(0.25, gt=0, le=4, description="multiplier of the networks' filters")
    beta: float = Field(0.02, ge=0, description="weight of the VAEs' KL; at 1, few steps leave all latents unused")

    @model_validator(mode="after")
    def _check_place(self):
        check_outside(self.folder, self.dataset)
        return self


class Trained(Networks):
    """Of experiments that train them."""

    batch_size: int = Field(64, ge=2, description="images per training step")
    learning_rate: float = Field(0.003, gt=0, description="of Adam, constant")


class Degradation(Trained):
    """Of plain against residual networks at several depths."""

    networks: _some(Literal[NETWORKS]) = Field(("classifier",), description="classifier, VAE or both")
    kinds: _some(Literal[tuple(KINDS)]) = Field(("plain", "residual"), description=", ".join(KINDS))
    depths: _some(ClassifierDepth) = Field((8, 32), description="layers of the classifiers, 6n + 2 or 9n + 2")
    vae_depths: _some(VAEDepth) = Field((28, 76), description="layers of the VAEs, 6 × blocks + 4")
    repetitions: int = Field(3, ge=1, description="networks of each kind, a seed each")
    epochs: int = Field(5, ge=1, description="passes over the training images")


class Preactivation(Degradation):
    """Of the same with other defaults: the classifier of 164 layers, post- against pre-activated."""

    kinds: _some(Literal[tuple(KINDS)]) = Field(("residual", "pre-activation"), description=", ".join(KINDS))
    depths: _some(ClassifierDepth) = Field((164,), description="layers of the classifiers, 6n + 2 or 9n + 2")
    repetitions: int = Field(2, ge=1, description="networks of each kind, a seed each")
    epochs: int = Field(3, ge=1, description="passes over the training images")


class Gradients(Networks):
    """Of the gradient by layer."""

    depths: Numbers = Field((10, 30, 100), description="layers of the chains")
    classifier_depths: _some(ClassifierDepth) = Field(
        (20, 56, 110), description="layers of the classifiers, 6n + 2 or 9n + 2"
    )
    vae_depths: _some(VAEDepth) = Field((28, 100, 250), description="layers of the VAEs, 6 × blocks + 4")
    beta: float = Field(1.0, ge=0, description="weight of the VAEs' KL")
    batch_size: int = Field(32, ge=2, description="images")
    repetitions: int = Field(30, ge=1, description="chains of each kind, a seed each")
    seed: Seed = Field(0, description="of the weights; of the chains the first")


class Euler(Experiment):
    """Of residual networks as steps of Euler's method."""

    finest: int = Field(512, ge=16, le=2**16, description="layers of the deepest chain; the chains have 8, 16, 32, …")
    width: int = Field(8, ge=1, le=1024, description="of the vectors")
    layers: int = Field(8, ge=1, le=1024, description="layers of the trained networks")
    repetitions: int = Field(5, ge=1, description="trained networks of each kind, a seed each")
    epochs: int = Field(60, ge=1, description="passes over the training points")
    points: int = Field(600, ge=10, description="training points of the two spirals, and as many to test on")


class Landscape(Trained):
    """Of the loss around a trained network."""

    depth: ClassifierDepth = Field(56, description="layers of the classifiers, 6n + 2 or 9n + 2")
    vae_depth: VAEDepth = Field(76, description="layers of the VAEs, 6 × blocks + 4")
    epochs: int = Field(6, ge=2, description="passes over the training images")
    points: int = Field(9, ge=3, description="on each side of a surface; an odd number has the network in the middle")
    reach: float = Field(1.0, gt=0, description="of lines and surfaces, in lengths of the network's own filters")
    images: int = Field(200, ge=1, description="training images on which the loss is taken")
    seed: Seed = Field(0, description="of weights and directions")


class Transfer(Trained):
    """Of trained networks on other labels or channels."""

    depth: ClassifierDepth = Field(20, description="layers of the classifier, 6n + 2 or 9n + 2")
    vae_depth: VAEDepth = Field(28, description="layers of the VAE, 6 × blocks + 4")
    epochs: int = Field(6, ge=1, description="passes over the training images before the transfer")
    channels: int = Field(0, ge=0, le=4, description="of the new classes' images, 1, 3 or 4 (0: as the first ones')")
    labels: Numbers = Field((2, 8, 32), description="labelled images of each new class")
    steps: int = Field(75, ge=1, description="training steps with them")
    tuning_rate: float = Field(0.001, gt=0, description="learning rate of fine-tuning; all else has LEARNING_RATE")
    repetitions: int = Field(3, ge=1, description="seeds, of the weights and of the labelled images")

    @field_validator("channels")
    @classmethod
    def _check_channels(cls, channels):
        if channels == 2:
            raise ValueError("expected 1, 3 or 4, or 0 for those of the first images")
        return channels


class Results(Settings):
    """Of the notebook that shows a sweep."""

    results: str = Field("", description="the sweep's folder (default: results/table1-gpu)")


NOTEBOOKS = {  # and whose settings they have
    "resnet_vae": Config,
    "results": Results,
    **{each.__name__.lower(): each for each in (Degradation, Preactivation, Gradients, Euler, Landscape, Transfer)},
}


def settings_of(notebook):
    """The class of a notebook's settings, by its name or path; a file that is none of NOTEBOOKS has a VAE's.

    Raises:
        ConfigError: there is no such notebook, or the file is none.
    """
    path = Path(notebook)
    if path.is_file():
        try:
            json.loads(path.read_text(encoding="utf-8"))["nbformat"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f"{path} is no notebook; expected an .ipynb file as Jupyter writes it") from None
    elif path.stem not in NOTEBOOKS:
        near = did_you_mean(path.stem, NOTEBOOKS)
        raise ConfigError(f"there is no notebook {path}; expected {', '.join(NOTEBOOKS)}, or a path{near}")
    return NOTEBOOKS.get(path.stem, Config)
