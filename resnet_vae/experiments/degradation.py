"""Degradation: a deeper plain network trains worse than a shallower one, a deeper residual one hardly.

The observation of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figures 1 and 6,
for its classifiers and, beyond it, for the VAE: the same layers with and without shortcuts, at several depths, over
several seeds. And, as one more kind of network, the comparison of "Identity Mappings in Deep Residual Networks"
(https://arxiv.org/abs/1603.05027), figure 1: activation after the addition against before the convolutions.
"""

from functools import partial

import numpy as np
from matplotlib.figure import Figure

from resnet_vae.experiments.networks import (
    LOSSES,
    adam,
    batches,
    build_network,
    compile_network,
    inputs,
    load_labelled,
    train_each,
)
from resnet_vae.experiments.record import write_experiment
from resnet_vae.plots import keep_in_sight, whole_epochs


def measure(settings):
    """Rows: network, kind, depth, seed, epoch, and training and test figures: loss, and a classifier's error.

    Args:
        settings: a `Degradation` or `Preactivation`.
    """
    data, rows = load_labelled(settings), []
    options = {"batch_size": settings.batch_size, "epochs": settings.epochs, "verbose": 0}
    for network in settings.networks:
        training = batches(settings, network, data.train, data.labels[0])
        test = inputs(network, data.test, data.labels[2])
        for depth in settings.depths if network == "classifier" else settings.vae_depths:
            for kind in settings.kinds:
                named = {"network": network, "kind": kind, "depth": depth}

                def build(seed, network=network, kind=kind, depth=depth):
                    return build_network(settings, network, kind, depth, data, seed)

                def fit(model, seed, named=named, training=training, test=test):
                    history = model.fit(*training, validation_data=test, **options).history
                    return [{**named, "seed": seed, **row} for row in _epochs(history)]

                compile_ = partial(compile_network, network, optimizer=adam(settings))
                seeds = ((seed,) for seed in range(settings.repetitions))
                for more in train_each(build, compile_, fit, seeds):
                    rows += more
                print(f"{network}, {kind}, depth {depth}: done", flush=True)
    return rows


def _epochs(history):
    """A row an epoch of a model's history; a VAE has no error."""
    rows = []
    for epoch in range(len(history["loss"])):
        row = {"epoch": epoch + 1, "loss": history["loss"][epoch], "test_loss": history["val_loss"][epoch]}
        for name, accuracy in (("error", "accuracy"), ("test_error", "val_accuracy")):
            row[name] = 1 - history[accuracy][epoch] if accuracy in history else ""
        rows.append(row)
    return rows


def summarize(rows):
    """What is left after the last epoch: a row a network, kind and depth, over the seeds.

    The mean, the lowest and the highest training loss, and the mean test loss.
    """
    last, summary = max(row["epoch"] for row in rows), []
    for network, kind, depth in dict.fromkeys((row["network"], row["kind"], row["depth"]) for row in rows):
        own = [row for row in rows if (row["network"], row["kind"], row["depth"]) == (network, kind, depth)]
        losses = [row["loss"] for row in own if row["epoch"] == last]
        summary.append(
            {
                "network": network,
                "kind": kind,
                "depth": depth,
                "seeds": len(losses),
                "loss": float(np.mean(losses)),
                "lowest": min(losses),
                "highest": max(losses),
                "test_loss": float(np.mean([row["test_loss"] for row in own if row["epoch"] == last])),
            }
        )
    return summary


def run(settings):
    """Measure, and write epochs.csv, summary.csv and learning.png into the settings' folder, which is returned."""
    rows = measure(settings)
    tables = {"epochs": rows, "summary": summarize(rows)}
    return write_experiment(settings, tables, figures)


def figures(tables):
    """The figures of these tables."""
    return {"learning": draw(tables["epochs"])}


def draw(rows):
    """Training (dashed) and test figures against the epochs, a panel a network and kind; the seeds' mean and range."""
    networks, kinds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("network", "kind"))
    figure = Figure(figsize=(4 * len(kinds), 3.2 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), len(kinds), squeeze=False, sharey="row")
    for across, network in zip(grid, networks, strict=True):
        column = "error" if network == "classifier" else "loss"
        for axes, kind in zip(across, kinds, strict=True):
            own = [row for row in rows if (row["network"], row["kind"]) == (network, kind)]
            epochs = sorted({row["epoch"] for row in own})
            for number, depth in enumerate(sorted({row["depth"] for row in own})):
                for name, style in ((column, ".--"), (f"test_{column}", ".-")):
                    seeds = np.array([[r[name] for r in own if (r["depth"], r["epoch"]) == (depth, e)] for e in epochs])
                    label = f"depth {depth}" if style == ".-" else None
                    axes.plot(epochs, seeds.mean(1), style, color=f"C{number}", label=label)
                    axes.fill_between(epochs, seeds.min(1), seeds.max(1), color=f"C{number}", alpha=0.15, lw=0)
            told = "ReLU after the addition" if kind == "residual" and "pre-activation" in kinds else kind
            axes.set(title=f"{network}, {told}", xlabel="epoch")
            whole_epochs(axes)
        axes.plot([], [], "k--", label="training images")
        axes.plot([], [], "k-", label="test images")
        axes.legend(frameon=False, fontsize=8)
        of_network = [row for row in rows if row["network"] == network]
        training, test = ([row[name] for row in of_network] for name in (column, f"test_{column}"))
        keep_in_sight(across[0], training, test, "test")
        across[0].set_ylabel("error, share of the images" if column == "error" else LOSSES[network])
    return figure
