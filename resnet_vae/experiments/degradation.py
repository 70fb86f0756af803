"""Degradation: a deeper plain network trains worse than a shallower one, a deeper residual one hardly.

The observation of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figures 1 and 6,
for its classifiers and, beyond it, for the VAE: the same layers with and without shortcuts, at several depths, over
several seeds. And, as one more kind of network, the comparison of "Identity Mappings in Deep Residual Networks"
(https://arxiv.org/abs/1603.05027), figure 1: activation after the addition against before the convolutions.
"""

from functools import partial

import numpy as np
from matplotlib.figure import Figure

from resnet_vae.config import Config
from resnet_vae.experiments.networks import (
    LOSSES,
    adam,
    batches,
    build_network,
    compile_network,
    inputs,
    load_labelled,
    models,
)
from resnet_vae.plots import keep_in_sight, whole_epochs
from resnet_vae.vae import VAE

CALIBRATED = Config.model_fields["norm_batches"].default  # batches a VAE's averages are of before each test


def measure(settings):
    """Two tables: "epochs", a row a network, kind, depth, seed and epoch, of `train`, and "summary", of `summarize`.

    Args:
        settings: a `Degradation` or `Preactivation`.
    """
    data, rows = load_labelled(settings), []
    for network in settings.networks:
        training = batches(settings, network, data.train, data.labels[0])
        test = inputs(network, data.test, data.labels[2])
        for depth in settings.depths if network == "classifier" else settings.vae_depths:
            for kind in settings.kinds:
                named = {"network": network, "kind": kind, "depth": depth}

                build = partial(build_network, settings, network, kind, depth, data)
                compile_ = partial(compile_network, network, optimizer=adam(settings))
                for model, (seed,) in models(build, compile_, ((seed,) for seed in range(settings.repetitions))):
                    rows += [{**named, "seed": seed, **row} for row in train(settings, model, training, test)]
                print(f"{network}, {kind}, depth {depth}: done", flush=True)
    return {"epochs": rows, "summary": summarize(rows)}


def train(settings, model, training, test):
    """Train a compiled model, and test it after each epoch.

    In so short a training the moving averages of a VAE's normalisations lag behind its weights, so that they are
    computed anew before each test.

    Args:
        settings: a `Degradation`.
        model: of `compile_network`.
        training, test: of `inputs`.

    Yields:
        A row an epoch: training and test loss, and training and test error, the share of wrong answers, which are ""
        of a VAE.
    """
    size = {"batch_size": settings.batch_size, "verbose": 0}
    some = np.random.default_rng(0).permutation(len(training[0]))[: CALIBRATED * settings.batch_size]
    for epoch in range(settings.epochs):
        trained = model.fit(*training, initial_epoch=epoch, epochs=epoch + 1, **size).history
        if isinstance(model, VAE):
            model.calibrate(training[0][some], **size)
        tested = model.evaluate(*test, return_dict=True, **size)
        errors = {"error": "", "test_error": ""}
        if "accuracy" in tested:
            errors = {"error": 1 - trained["accuracy"][0], "test_error": 1 - tested["accuracy"]}
        yield {"epoch": epoch + 1, "loss": trained["loss"][0], "test_loss": tested["loss"], **errors}


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
