"""Transfer: what a trained network is worth on few labelled images, against the same network from scratch.

A classifier learns the first half of the classes, a VAE all images without their labels. Then the second half of the
classes is learned from few images of each: with the trained layers frozen, or fine-tuned, or from scratch, in as many
steps. After "How transferable are features in deep neural networks?" (https://arxiv.org/abs/1411.1792).
"""

from functools import partial

import numpy as np
from matplotlib.figure import Figure

from resnet_vae.data import DataError
from resnet_vae.experiments.networks import (
    adam,
    batches,
    build_network,
    compile_network,
    inputs,
    load_labelled,
    models,
)
from resnet_vae.experiments.settings import NETWORKS
from resnet_vae.transfer import adapt, take_over

WAYS = {"scratch": "tab:gray", "frozen": "tab:orange", "fine-tuned": "tab:blue"}  # and their colours


def choose(labels, classes, count, rng):
    """Numbers of `count` images of each class, at random."""
    return np.concatenate([rng.permutation(np.flatnonzero(labels == each))[:count] for each in classes])


def measure(settings):
    """The table "transfer": network, way, labelled images of a class, seed, accuracy.

    The accuracy is on the test images of the new classes.
    """
    data = new = load_labelled(settings)
    if settings.channels:
        new = load_labelled(settings, (*data.image_shape[:2], settings.channels))
    if len(data.classes) < 4:
        raise DataError(f"{settings.dataset} has {len(data.classes)} classes; expected 4 or more, two in each half")
    half = len(data.classes) // 2
    old_classes, new_classes = range(half), range(half, len(data.classes))
    fewest, most = min(np.count_nonzero(new.labels[0] == each) for each in new_classes), max(settings.labels)
    if most > fewest:
        raise DataError(f"LABELS holds {most}, and {settings.dataset} has a class of {fewest} images; expected no more")
    is_old = np.isin(data.labels[0], old_classes)
    is_test = np.isin(new.labels[2], new_classes)
    if not is_test.any():
        told = "expected images of the second half of the classes among the test images"
        raise DataError(f"{settings.dataset} has none; {told}")
    test = inputs("classifier", new.test[is_test], new.labels[2][is_test] - half)
    batch = {"batch_size": settings.batch_size, "verbose": 0}
    rows = []
    for network, depth in zip(NETWORKS, (settings.depth, settings.vae_depth), strict=True):
        known = is_old if network == "classifier" else slice(None)
        first = data.train[known], data.labels[0][known]
        kind = "residual" if network == "classifier" else "zero-init"  # as each begins by default
        build = partial(build_network, settings, network, kind, depth)
        source = build(data)

        learned = []
        seeds = [(seed,) for seed in range(settings.repetitions)]
        compile_ = partial(compile_network, network, optimizer=adam(settings))
        for model, _ in models(partial(build, data), compile_, seeds):
            model.fit(*batches(settings, network, *first), epochs=settings.epochs, **batch)
            learned.append(model.get_weights())
        print(f"{network}: trained", flush=True)
        for way in WAYS:

            def begin(seed, _count, way=way, network=network, build=build, source=source, learned=learned):
                model = build(new, seed)
                model, trained = (model.encoder, source.encoder) if network == "VAE" else (model, source)
                if way != "scratch":
                    source.set_weights(learned[seed])
                    take_over(model, trained)
                return adapt(model, len(new_classes), frozen=way == "frozen", batch_statistics=way == "scratch")

            rate = settings.tuning_rate if way == "fine-tuned" else settings.learning_rate
            compile_ = partial(compile_network, "classifier", optimizer=adam(settings, rate))
            cases = [(seed, count) for count in settings.labels for seed in range(settings.repetitions)]
            for model, (seed, count) in models(begin, compile_, cases):
                rng = np.random.default_rng((seed, count))
                few = choose(new.labels[0], new_classes, count, rng)
                drawn = rng.choice(few, settings.steps * settings.batch_size)
                model.fit(*inputs("classifier", new.train[drawn], new.labels[0][drawn] - half), shuffle=False, **batch)
                accuracy = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
                row = {"network": network, "way": way, "labels": count, "seed": seed, "accuracy": accuracy}
                rows.append(row)
            print(f"{network}, {way}: done", flush=True)
    return {"transfer": rows}


def figures(tables):
    """The figures of these tables."""
    return {"transfer": draw(tables["transfer"])}


def draw(rows):
    """A panel a network: accuracy against the number of labelled images, a line a way, a point a seed."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(NETWORKS), sharey=True), NETWORKS, strict=True):
        for number, (way, color) in enumerate(WAYS.items()):
            own = [row for row in rows if (row["network"], row["way"]) == (network, way)]
            counts = sorted({row["labels"] for row in own})
            means = [np.mean([row["accuracy"] for row in own if row["labels"] == count]) for count in counts]
            line = "-" if len(counts) > 1 else "_"  # of one point nothing would be seen
            axes.semilogx(counts, means, line, ms=20, color=color, label="from scratch" if way == "scratch" else way)
            beside = 1.06 ** (number - 1)  # so that points do not hide each other
            axes.semilogx([row["labels"] * beside for row in own], [row["accuracy"] for row in own], ".", color=color)
            axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set(title=f"{network}'s layers", xlabel="labelled images of each new class")
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("accuracy on test images")
    return figure
