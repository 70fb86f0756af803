"""Pictures of runs: curves, grids of images, and the figures of a sweep."""

import textwrap
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resnet_vae.records import PICTURES, natural, whole
from resnet_vae.results import POST, SHOWN, format_setting, like_the_post, swept

SAMPLES_SEED = 0
LONG = 8  # epochs, of which the second half gets a panel of its own
FEW = 4  # settings that differ, in a line's label
WIDE = 10  # times the shallowest, the depth from where the axis of depths is logarithmic
MARKERS = "osD^vP*X<>"  # of runs, besides their colours
FAR = 3  # interquartile ranges above the upper quartile, from where a loss is told and not drawn


def grid(images, columns, title=None, row_labels=None, side=0.55):
    """Draw images in a grid.

    Args:
        images: array (images, height, width, channels), uint8 or floats in [0, 1].
        columns: images a row.
        title: above the grid.
        row_labels: a word or two for each row, at its left.
        side: of an image, in inches, at least; large images are given more, so that no pixel is left out.

    Returns:
        A matplotlib Figure.
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        images = images / 255
    count, height, across, channels = images.shape
    rows = -(-count // columns)
    pad = 1
    side = max(side, (max(height, across) + pad) / 110)  # a dot or more a pixel: `save` draws 120 an inch
    sheet = np.ones((rows * (height + pad) - pad, columns * (across + pad) - pad, channels))
    for index, image in enumerate(images):
        top, left = index // columns * (height + pad), index % columns * (across + pad)
        sheet[top : top + height, left : left + across] = image
    if channels not in (1, 3, 4):
        sheet = sheet.mean(axis=-1, keepdims=True)
    width = max(columns * side + (1.3 if row_labels else 0.2), 3.5)  # with room for the words
    title = textwrap.wrap(title or "", max(20, int(12 * width)))  # about 12 characters an inch
    figure = Figure(figsize=(width, rows * side + 0.3 + 0.2 * len(title)))
    axes = figure.add_subplot()
    axes.imshow(sheet[..., 0] if sheet.shape[-1] == 1 else sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if row_labels:
        axes.set_yticks([row * (height + pad) + height / 2 for row in range(rows)], row_labels)
        axes.tick_params(axis="y", length=0)
    if title:
        axes.set_title("\n".join(title), fontsize=10)
    figure.tight_layout()
    return figure


def evenly(images, count):
    """Choose images evenly over an array, since folders hold them by class; fewer where there are fewer."""
    return images[np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)]


def _predict(model, inputs, size=32):
    """A model's outputs, a list, in batches of one size, the last filled up: it is compiled once for all pictures."""
    filled = np.concatenate([inputs, np.repeat(inputs[-1:], -len(inputs) % size, axis=0)])
    outputs = model.predict(filled, batch_size=size, verbose=0)
    return [output[: len(inputs)] for output in (outputs if isinstance(outputs, list) else [outputs])]


def samples(run, vae, count=64):
    """Draw images that the decoder generates from latents of the prior."""
    latents = np.random.default_rng(SAMPLES_SEED).standard_normal((count, run.config.latent_dim), "float32")
    (images,) = _predict(vae.decoder, latents)
    return grid(images, 8, f"samples from the prior, {_network(run)}")


def reconstructions(run, vae, images, count=10):
    """Draw uint8 images above their reconstructions from the posterior's mean."""
    images = evenly(images, count)
    mean, _ = _predict(vae.encoder, images)
    (decoded,) = _predict(vae.decoder, mean)
    rows = np.concatenate([images / 255, decoded])
    return grid(rows, len(images), f"test images, {_network(run)}", ["image", "reconstruction"], side=0.7)


def interpolations(run, vae, images, count=6, steps=10):
    """Draw straight lines in the latent space between the posterior means of pairs of uint8 images.

    A single image is paired with itself.
    """
    pairs = evenly(images, 2 * min(count, len(images) // 2)) if len(images) > 1 else np.concatenate([images, images])
    mean, _ = _predict(vae.encoder, pairs)
    weights = np.linspace(0, 1, steps)[:, None]
    lines = [(1 - weights) * start + weights * end for start, end in zip(mean[::2], mean[1::2], strict=True)]
    (decoded,) = _predict(vae.decoder, np.concatenate(lines))
    return grid(decoded, steps, f"interpolations between test images, {_network(run)}")


def _network(run):
    """Whose pictures they are, in a few words: not what a loss is, which they show none of."""
    return describe(run).partition(":")[0]


def curves(run):
    """Draw the losses, the reconstruction and the KL of a run against the epochs."""
    figure = Figure(figsize=(9, 3))
    for axes, name in zip(figure.subplots(1, 3), ("loss", "reconstruction", "kl"), strict=True):
        epochs = [row["epoch"] for row in run.history]
        training, validation = ([row[f"{of}{name}"] for row in run.history] for of in ("", "val_"))
        axes.plot(epochs, training, ".--", label="training")
        axes.plot(epochs, validation, ".-", label="validation")
        keep_in_sight(axes, training, validation, "validation")
        axes.set(xlabel="epoch", ylabel="nats per image", title="KL" if name == "kl" else name)
        whole_epochs(axes)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    figure.suptitle(describe(run), fontsize=10)
    figure.tight_layout()
    return figure


def losses_by_epoch(runs):
    """Draw the losses of a sweep's runs against the epochs: training dashed, validation solid.

    Each objective has a row of panels. Losses fall by hundreds of nats at first and runs end a few apart: long runs'
    second halves have their own panel. What describes all runs is told once, above.
    """
    objectives, longest = _objectives(runs), max(len(run.history) for run in runs)
    figure = Figure(layout="constrained")
    panels = figure.subplots(len(objectives), 2 if longest >= LONG else 1, squeeze=False)
    alone = any(len(run.history) == 1 for run in runs)  # where a line would not be seen
    described, told = {describe(run) for run in runs}, [_swept(run, runs) for run in runs]
    if len(described) == 1 and all(told):
        figure.suptitle(*described)
    else:
        told = [[describe(run), *words] for run, words in zip(runs, told, strict=True)]
    for objective, (first, *late) in zip(objectives, panels, strict=True):
        for number, run in enumerate(runs):
            if run.config.objective == objective:
                look = {"label": ", ".join(told[number]), "color": _color(number, len(runs))}
                look |= {"marker": MARKERS[number % len(MARKERS)], "alone": alone}
                _by_epoch(first, run.history, **look)
                for axes in late:
                    _by_epoch(axes, run.history[len(run.history) // 2 :], **look)
        chosen = [row for run in runs if run.config.objective == objective for row in run.history]
        training, validation = ([row[name] for row in chosen] for name in ("loss", "val_loss"))
        keep_in_sight(first, training, validation, "validation")
        if len(objectives) > 1:
            first.set_title(f"objective {objective}")
        for axes in late:
            axes.set(title="each run's second half", ylabel="")
            losses = np.concatenate([line.get_ydata() for line in axes.get_lines()])
            if max(losses) > (top := _farthest(losses)):
                axes.set_ylim(min(losses) - 0.05 * (top - min(losses)), top)
                axes.set_title(f"each run's second half\n(losses up to {max(losses):,.0f} left out)")
    _finish(figure, "o", "o" if alone else "")
    return figure


def _objectives(runs):
    """The objectives of a sweep, whose losses must not be compared: each has panels of its own."""
    return sorted({run.config.objective for run in runs})


def _by_epoch(axes, rows, label, color, marker, alone):
    """Draw a run's losses, rows of its history, against the epochs; those of training with points if they are alone."""
    epochs, look = [row["epoch"] for row in rows], {"color": color, "ms": 4, "fillstyle": "none"}
    axes.plot(epochs, [row["val_loss"] for row in rows], f"{marker}-", color=color, ms=4, label=label)
    axes.plot(epochs, [row["loss"] for row in rows], f"{marker if alone else ''}--", **look)
    axes.set(xlabel="epoch", ylabel="loss, nats per image")
    whole_epochs(axes)


def _farthest(losses):
    """How far losses may be drawn: one that is far off would press the others together."""
    usual, high = np.percentile(losses, [25, 75])
    return high + FAR * (high - usual)


def _color(number, count):
    """The colour of a line: of up to ten Matplotlib's own, of more evenly over its map turbo."""
    return f"C{number}" if count <= 10 else colormaps["turbo"](number / (count - 1))


def whole_epochs(axes):
    """Put the ticks of the x axis at whole epochs, also where there is but one."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def keep_in_sight(axes, training, others, name):
    """End the y axis where training begins if other figures, far above, would hide it; says how far those go.

    They are there in the first epochs of a short training, while the moving averages of normalisation are not those of
    the weights. If none of the others were left in sight, the axis stays as it is.
    """
    lowest, highest = min(*training, *others), max(training)
    margin = 0.1 * (highest - lowest)
    if margin and min(others) <= highest and max(others) > highest + 10 * margin:
        axes.set_ylim(lowest - 2 * margin, highest + margin)  # with room for the words
        told = f"{name} up to {max(others):,.0f},\nabove the figure"
        axes.text(0.02, 0.02, told, fontsize=8, transform=axes.transAxes)


def losses_by_depth(runs):
    """Draw the best epoch's losses of a sweep's runs against depth: training dashed, validation solid.

    Each objective has a panel, in which the post's losses stand beside ours where they may be compared: on CIFAR-10,
    under its objective. Runs of different numbers of epochs are not joined. Those of one depth, with nothing beside
    them, stand one below the other.
    """
    figure = Figure(layout="constrained")
    objectives = _objectives(runs)
    posts = POST if any(map(like_the_post, runs)) else ()
    if len(objectives) == len({run.config.resnet_depth for run in runs}) == 1 and not posts:
        return _one_depth(figure, runs)
    panels = figure.subplots(1, len(objectives), squeeze=False)[0]
    lines = {objective: _lines(objective, runs, bool(posts)) for objective in objectives}
    count = sum(map(len, lines.values()))
    colors = (_color(number, count) for number in range(count))
    for objective, axes in zip(objectives, panels, strict=True):
        _by_depth(axes, lines[objective], posts if objective == "published" else (), colors)
        if len(objectives) > 1:
            axes.set_title(f"objective {objective}")
    _finish(figure, "o", "s")
    return figure


def _lines(objective, runs, beside_posts):
    """The lines of a sweep's runs of one objective: pairs of a label and the runs that have it, by depth."""
    lines = {}
    for run in sorted(runs, key=lambda run: run.config.resnet_depth):
        if run.config.objective == objective:
            ours = ["ours"] if beside_posts and objective == "published" else []
            lines.setdefault(", ".join([*ours, run.config.loss_meaning, *_swept(run, runs)]), []).append(run)
    return sorted(lines.items(), key=lambda line: natural(line[0]))


def _by_depth(axes, lines, posts, colors):
    """Draw lines of a sweep, as of `_lines`, and the post's rows, against depth."""
    for label, line in lines:
        depths, color = [run.config.resnet_depth for run in line], next(colors)
        epochs = [f"{run.metrics['epochs']}" for run in line]
        joined = len(set(epochs)) == 1
        validation, training = ([run.metrics[part]["loss"] for run in line] for part in ("validation", "train"))
        told = f"{label} ({', '.join(epochs[:1] if joined else epochs)} epochs)"
        axes.plot(depths, validation, "o-" if joined else "o", color=color, label=told)
        axes.plot(depths, training, "s--" if joined else "s", color=color, fillstyle="none")
    ticks = {run.config.resnet_depth for _, line in lines for run in line} | {row["depth"] for row in posts}
    if posts:
        depths = [row["depth"] for row in posts]
        epochs = ", ".join(str(row["epochs"] or "?") for row in posts)
        told = f"the post's own figures (each the lowest of its epochs: {epochs})"
        axes.plot(depths, [row["val_loss"] for row in posts], "o-", color="gray", label=told)
        axes.plot(depths, [row["loss"] for row in posts], "s--", color="gray", fillstyle="none")
    if max(ticks) >= WIDE * min(ticks):
        axes.set_xscale("log")
    axes.set_xticks(sorted(ticks), sorted(ticks))
    axes.set_xticks([], minor=True)
    axes.set(xlabel="depth (weight layers)", ylabel="loss, nats per image")


def _one_depth(figure, runs):
    """Draw the losses of runs of one depth, a row each, in the colours of `losses_by_epoch`."""
    axes, meanings = figure.add_subplot(), {run.config.loss_meaning for run in runs}
    for number, run in enumerate(runs):
        color = _color(number, len(runs))
        axes.plot(run.metrics["validation"]["loss"], number, "o", color=color)
        axes.plot(run.metrics["train"]["loss"], number, "s", color=color, fillstyle="none")
    shown = [", ".join([*([run.config.loss_meaning] if len(meanings) > 1 else []), *_swept(run, runs)]) for run in runs]
    shown = [textwrap.fill(label or _literal(run.folder.name), 45) for label, run in zip(shown, runs, strict=True)]
    axes.set_yticks(range(len(runs)), shown)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    losses = [run.metrics[part]["loss"] for run in runs for part in ("validation", "train")]
    if max(losses) > (right := _farthest(losses)):
        axes.set_xlim(min(losses) - 0.05 * (right - min(losses)), right)
        for number, run in enumerate(runs):
            both = {"validation": run.metrics["validation"]["loss"], "training": run.metrics["train"]["loss"]}
            if told := ", ".join(f"{name} {loss:,.0f}" for name, loss in both.items() if loss > right):
                place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "fontsize": 8}
                axes.annotate(f"{told} → ", (1, number), **place)
    told = f", {meanings.pop()}" if len(meanings) == 1 else ""
    axes.set(xlabel="loss, nats per image", title=f"depth {runs[0].config.resnet_depth}{told}")
    axes.plot([], [], "ko", label="validation")
    axes.plot([], [], "ks", fillstyle="none", label="training")
    axes.grid(alpha=0.3)
    figure.set_size_inches(8, 1.4 + 0.27 * len(runs) * max(label.count("\n") + 1 for label in shown))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _finish(figure, validation, training):
    """The legend below a sweep's figure, in which the lines' styles and markers tell the two losses apart."""
    figure.axes[-1].plot([], [], f"k{validation}-", label="validation")
    figure.axes[-1].plot([], [], f"k{training}--", label="training", fillstyle="none")
    shown = {}
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(textwrap.fill(label, 105), handle)
    columns = 2 if max(map(len, shown)) < 50 else 1
    down, across = figure.axes[0].get_gridspec().get_geometry()
    figure.set_size_inches(
        4 + 3 * across, 0.8 + 3.2 * down + 0.18 * -(-sum(label.count("\n") + 1 for label in shown) // columns)
    )
    look = {"frameon": False, "fontsize": 8, "handlelength": 3}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=columns, **look)


def _swept(run, runs):
    """The run's values of what was swept, as "shortcut none"; of the epochs only where nothing else tells runs apart.

    Deeper networks are given fewer epochs, which is no other line of the figure. A run that has all that most have is
    told with it, however much; of the others only what differs is. If that is more than a few values, or runs have one
    recipe, as on two backends, all are told by the names of their folders.
    """
    names = swept(runs, SHOWN - {"width"})

    def told_apart():
        return len({(describe(each), *_values(each, names)) for each in runs}) == len(runs)

    if not told_apart():
        names = swept(runs, SHOWN - {"width", "epochs"})
    usual = _usual(runs, names)
    shortened = [[value for value in _values(each, names) if value not in usual] for each in runs]
    if max(map(len, shortened)) > FEW or not told_apart():
        return [_literal(run.folder.name)]
    own = _values(run, names)
    return own if usual <= set(own) else [value for value in own if value not in usual]


def _values(run, names):
    return [_literal(f"{name.replace('_', ' ')} {format_setting(run.config.recipe()[name])}") for name in names]


def _usual(runs, names):
    """The values that more than half of the runs have, a set of `_values`; none if no run has them all."""
    values = [set(_values(run, names)) for run in runs]
    usual = {value for own in values for value in own if 2 * sum(value in each for each in values) > len(runs)}
    return usual if any(usual <= own for own in values) else set()


def _literal(text):
    """A text whose dollars do not begin a formula."""
    return text.replace("$", r"\$")


def describe(run):
    """A few words that tell a run from the others of its sweep."""
    meaning = run.config.loss_meaning
    return f"depth {run.config.resnet_depth}, " + ("elbo" if meaning == "negative ELBO" else meaning)


def render(figure, file):
    """Write a figure as a PNG, or as the name's ending tells, without a date: equal figures are equal files."""
    without = "CreationDate" if str(file).endswith(".pdf") else "Software"
    figure.savefig(file, dpi=120, metadata={without: None})


def save(figure, path):
    """Save a figure as by `render`, whole or not at all; returns the path."""
    with whole(path) as partial:
        render(figure, partial)
    return path


def draw_run(run, vae, images):
    """Draw a run's pictures into its folder; returns their paths."""
    figures = (
        curves(run),
        reconstructions(run, vae, images),
        samples(run, vae),
        interpolations(run, vae, images),
    )
    return [save(figure, run.folder / f"{name}.png") for name, figure in zip(PICTURES, figures, strict=True)]


def of_sweep(runs):
    """The figures of a sweep: file name without ending → Figure."""
    return {"losses_by_epoch": losses_by_epoch(runs), "losses_by_depth": losses_by_depth(runs)}


def draw_sweep(runs, folder):
    """Draw a sweep's figures into a folder; returns their paths."""
    return [save(figure, Path(folder) / f"{name}.png") for name, figure in of_sweep(runs).items()]
