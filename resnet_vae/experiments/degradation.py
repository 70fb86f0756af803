"""Degradation: a deeper plain network trains worse than a shallower one, a deeper residual network does not.

The observation of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figures 1 and 6,
for its classifiers and, beyond it, for the VAE: the same layers with and without shortcuts, at several depths, over
several seeds.
"""

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pydantic import Field

from resnet_vae.classifiers import build_classifier
from resnet_vae.config import Config
from resnet_vae.data import labelled, load_data
from resnet_vae.experiments.record import Experiment, Numbers, write_record
from resnet_vae.vae import build_vae

KINDS = ("plain", "residual")


class Degradation(Experiment):
    """Settings of the experiment."""

    dataset: str = Field("digits", description="with labels, as for DATASET of a VAE")
    depths: Numbers = Field((8, 44), description="layers of the classifiers, 6n + 2")
    vae_depths: Numbers = Field((28, 148), description="layers of the VAEs, 6 × blocks + 4")
    width: float = Field(0.25, gt=0, description="multiplier of the networks' filters")
    repetitions: int = Field(3, ge=1, description="networks of each kind, a seed each")
    epochs: int = Field(6, ge=1, description="passes over the training images")
    batch_size: int = Field(64, ge=1, description="images a step")
    learning_rate: float = Field(0.003, gt=0, description="of Adam, constant")


def _restart(model, fresh):
    """Give a compiled model the weights of a fresh one and forget what its optimizer knew: nothing is traced again."""
    model.set_weights(fresh.get_weights())
    for variable in model.optimizer.variables:
        if variable.name != "learning_rate":
            variable.assign(ops.zeros(variable.shape, variable.dtype))


def repeat(build, compile_, fit, repetitions):
    """Train the network that `build` makes once for each seed; yields the seed and what `fit` returns."""
    model = None
    for seed in range(repetitions):
        keras.utils.set_random_seed(seed)
        fresh = build(seed)
        if model is None:
            model = fresh
            compile_(model)
        else:
            _restart(model, fresh)
        yield seed, fit(model)


def measure(settings):
    """Rows: network, kind, depth, seed, epoch, and training and test figures: loss, and a classifier's error."""
    data = labelled(load_data(Config(dataset=settings.dataset, validation="test")))
    images, test = (part.astype("float32") / 255 for part in (data.train, data.test))
    labels, _, test_labels = data.labels
    options = {"batch_size": settings.batch_size, "epochs": settings.epochs, "verbose": 0}
    rows = []

    def add(network, kind, depth, seed, history):
        for epoch in range(settings.epochs):
            row = {"network": network, "kind": kind, "depth": depth, "seed": seed, "epoch": epoch + 1}
            row |= {"loss": history["loss"][epoch], "test_loss": history["val_loss"][epoch]}
            accuracy = [history[name][epoch] if name in history else None for name in ("accuracy", "val_accuracy")]
            row |= dict(zip(("error", "test_error"), ("" if a is None else 1 - a for a in accuracy), strict=True))
            rows.append(row)

    def optimizer():
        return keras.optimizers.Adam(settings.learning_rate, global_clipnorm=200.0)

    for depth in settings.depths:
        for kind in KINDS:
            shortcut = "none" if kind == "plain" else None

            def build(seed, depth=depth, shortcut=shortcut):
                name, shape = f"resnet{depth}", data.image_shape
                return build_classifier(name, shape, len(data.classes), shortcut=shortcut, width=settings.width)

            def compile_(model):
                model.compile(optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])

            def fit(model):
                return model.fit(images, labels, validation_data=(test, test_labels), **options).history

            for seed, history in repeat(build, compile_, fit, settings.repetitions):
                add("classifier", kind, depth, seed, history)
    for depth in settings.vae_depths:
        for kind in KINDS:
            config = Config(
                resnet_depth=depth,
                shortcut="none" if kind == "plain" else "projection",
                width=settings.width,
                latent_dim=16,
                intermediate_dim=128,
                precision="float32",
            )

            def build(seed, config=config):
                return build_vae(config.replace(seed=seed, kl_warmup_steps=0), data.image_shape)

            def fit(model):
                return model.fit(data.train, validation_data=(data.test,), **options).history

            for seed, history in repeat(build, lambda model: model.compile(optimizer()), fit, settings.repetitions):
                add("VAE", kind, depth, seed, history)
    return rows


def final_losses(rows, network, kind, depth):
    """The training losses of the last epoch, a number a seed."""
    own = [row for row in rows if (row["network"], row["kind"], row["depth"]) == (network, kind, depth)]
    last = max(row["epoch"] for row in own)
    return [row["loss"] for row in own if row["epoch"] == last]


def run(settings):
    """Measure, and write degradation.csv and degradation.png into the settings' folder, which is returned."""
    rows = measure(settings)
    return write_record(settings, {"degradation": rows}, {"degradation": draw(rows)})


def draw(rows):
    """Training (dashed) and test figures against the epochs, a panel a network and kind; mean over the seeds."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(8, 3.2 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 2, squeeze=False, sharey="row")
    for across, network in zip(grid, networks, strict=True):
        column = "error" if network == "classifier" else "loss"
        for axes, kind in zip(across, KINDS, strict=True):
            own = [row for row in rows if (row["network"], row["kind"]) == (network, kind)]
            for number, depth in enumerate(sorted({row["depth"] for row in own})):
                epochs = sorted({row["epoch"] for row in own})
                for name, style in ((column, ".--"), (f"test_{column}", ".-")):
                    seeds = np.array([[r[name] for r in own if (r["depth"], r["epoch"]) == (depth, e)] for e in epochs])
                    label = f"depth {depth}" if style == ".-" else None
                    axes.plot(epochs, seeds.mean(1), style, color=f"C{number}", label=label)
                    if style == ".-":
                        axes.fill_between(epochs, seeds.min(1), seeds.max(1), color=f"C{number}", alpha=0.15, lw=0)
            axes.plot([], [], "k--", label="training")
            axes.set(title=f"{network}, {kind}", xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.legend(frameon=False, fontsize=8)
        across[0].set_ylabel("error, share of images" if column == "error" else "loss, nats per image")
    return figure
