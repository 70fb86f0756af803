"""The loss around a trained network: along lines, on planes, and on the plane in which its training moved.

The method of "Visualizing the Loss Landscape of Neural Nets" (https://arxiv.org/abs/1712.09913): random directions
whose filters are as long as the network's own, so that networks can be compared whatever the scale of their weights;
biases and the parameters of normalisations stay as they are. The loss is that of training, in which a normalisation
takes the batch's statistics: the moving averages are those of other weights once the kernels are moved, and a loss with
them would show how far off they are. For the classifier and the VAE, plain and residual.
"""

import keras
import numpy as np
from keras import layers, ops
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from resnet_vae.experiments.networks import (
    LOSSES,
    adam,
    batches,
    build_network,
    compile_network,
    inputs,
    load_labelled,
    some,
)
from resnet_vae.experiments.settings import COMPARED, NETWORKS
from resnet_vae.vae import VAE


def _nats(exponents):
    """A format of losses by their log10, with as many digits as tell these apart."""
    losses = [10**exponent for exponent in exponents]
    digits = next((n for n in range(3, 9) if len({f"{loss:.{n}g}" for loss in losses}) == len(losses)), 9)
    return FuncFormatter(lambda exponent, _: f"{float(f'{10**exponent:.{digits}g}'):.9g}")


def kernels(model):
    """The weights that directions change: pairs of a variable and the axes over which the norm of a filter is taken."""
    transposed = {
        id(layer.kernel) for layer in model._flatten_layers() if isinstance(layer, layers.Conv2DTranspose)
    }  # (rows, columns, filters, channels); the others' filters are the last axis
    found = []
    for variable in model.trainable_variables:
        if variable.name.endswith("kernel"):
            kept = {len(variable.shape) - (2 if id(variable) in transposed else 1)}
            if len(variable.shape) == 5:  # of repeated blocks, a kernel each
                kept.add(0)
            found.append((variable, tuple(axis for axis in range(len(variable.shape)) if axis not in kept)))
    return found


def random_direction(model, rng):
    """A direction in weight space, an array a kernel: normal numbers, each filter as long as the model's own."""
    direction = []
    for variable, axes in kernels(model):
        weight, drawn = ops.convert_to_numpy(variable), rng.standard_normal(variable.shape)
        own, new = (np.sqrt(np.sum(np.square(array), axis=axes, keepdims=True)) for array in (weight, drawn))
        direction.append(drawn * (own / new))
    return direction


def position(model):
    """The kernels' values, a list of arrays."""
    return [ops.convert_to_numpy(variable) for variable, _ in kernels(model)]


def surface(model, loss, first, second, xs, ys):
    """Loss at weights + x × first + y × second, (len(ys), len(xs)); the weights are as before afterwards.

    Args:
        model: whose kernels are moved.
        loss: function → the model's loss as it is.
        first, second: directions, an array a kernel, as of `random_direction`.
        xs, ys: how far to go.
    """
    variables, start = [variable for variable, _ in kernels(model)], position(model)
    losses = np.empty((len(ys), len(xs)))
    try:
        for row, y in enumerate(ys):
            for column, x in enumerate(xs):
                for variable, weight, a, b in zip(variables, start, first, second, strict=True):
                    variable.assign(weight + x * a + y * b)
                losses[row, column] = loss()
    finally:
        for variable, weight in zip(variables, start, strict=True):
            variable.assign(weight)
    return losses


class TrainingLoss(keras.Model):
    """What training minimises of a classifier or a VAE: [images, labels] or images → a loss an image, (batch,).

    As in training normalisations take the statistics of the batch, which also moves their averages.
    """

    def __init__(self, model, **kwargs):
        super().__init__(**kwargs)
        self.model, self.built = model, True

    def call(self, inputs):
        if isinstance(self.model, VAE):
            kl, reconstruction, _ = self.model.terms(inputs, training=True)
            return reconstruction + self.model.beta * kl
        images, labels = inputs
        return keras.losses.sparse_categorical_crossentropy(labels, self.model(images, training=True))


def training_loss(model, *few):
    """A function that tells a model's `TrainingLoss`, the mean over few images, and leaves the model as it is.

    The noise of a VAE is the same each time.
    """
    computed = TrainingLoss(model)
    variables = model.non_trainable_variables  # noise and moving averages
    before = [ops.convert_to_numpy(variable) for variable in variables]

    def loss():
        try:
            losses = computed.predict(few if len(few) > 1 else few[0], batch_size=len(few[0]), verbose=0)
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)
        return float(np.mean(losses, dtype="float64"))

    return loss


def principal_plane(positions):
    """The plane through the last position in which most of a path lies.

    Args:
        positions: of the weights along a training, as of `position`.

    Returns:
        Two orthogonal directions of length 1, the path's coordinates in them, (positions, 2), the last one (0, 0), and
        the share of the path's squared distance from its end that lies in the plane.
    """
    flat = np.array([np.concatenate([array.ravel() for array in each]) for each in positions], "float64")
    moved = flat - flat[-1]
    _, sizes, axes = np.linalg.svd(moved[:-1], full_matrices=False)
    directions = []
    for axis in axes[:2]:
        ends = np.cumsum([array.size for array in positions[-1]])[:-1]
        parts = np.split(axis, ends)
        directions.append([part.reshape(array.shape) for part, array in zip(parts, positions[-1], strict=True)])
    return directions, moved @ axes[:2].T, float(np.sum(sizes[:2] ** 2) / np.sum(sizes**2))


def train(settings, network, kind, data):
    """Train one network.

    Returns:
        The model, a function that tells its loss on a few training images, and its positions from start to end.
    """
    depth = settings.depth if network == "classifier" else settings.vae_depth
    model = build_network(settings, network, kind, depth, data, settings.seed)
    compile_network(network, model, adam(settings))
    positions = [position(model)]
    remember = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: positions.append(position(model)))
    images, labels = data.train, data.labels[0]
    options = {"batch_size": settings.batch_size, "epochs": settings.epochs, "verbose": 0}
    model.fit(*batches(settings, network, images, labels), callbacks=[remember], **options)
    few = inputs(network, *some(data, settings.images, settings.seed))
    return model, training_loss(model, *few), positions


def measure(settings):
    """Rows of the surfaces, of the lines and of the paths, by these names."""
    tables = {"surfaces": [], "lines": [], "paths": []}
    data, ends = load_labelled(settings), np.linspace(-settings.reach, settings.reach, settings.points)
    fine = np.linspace(-settings.reach, settings.reach, 4 * settings.points + 1)
    for network in NETWORKS:
        for kind in COMPARED:
            named = {"network": network, "kind": kind}
            model, loss, positions = train(settings, network, kind, data)
            rng = np.random.default_rng(settings.seed)
            random = random_direction(model, rng), random_direction(model, rng)
            principal, path, share = principal_plane(positions)
            margins = 0.25 * np.ptp(path, axis=0)
            sides = np.linspace(path.min(0) - margins, path.max(0) + margins, settings.points).T
            for plane, directions, xs, ys in (("random", random, ends, ends), ("path", principal, *sides)):
                losses = surface(model, loss, *directions, xs, ys)
                points = [(x, y, losses[row, column]) for row, y in enumerate(ys) for column, x in enumerate(xs)]
                tables["surfaces"] += [{**named, "plane": plane, **_numbers("x y loss", point)} for point in points]
            line = surface(model, loss, *random, fine, [0.0])[0]
            tables["lines"] += [{**named, **_numbers("x loss", point)} for point in zip(fine, line, strict=True)]
            tables["paths"] += [
                {**named, "epoch": epoch, **_numbers("x y share", (*point, share))} for epoch, point in enumerate(path)
            ]
            print(f"{network}, {kind}: done", flush=True)
    return tables


def _numbers(names, values):
    return {name: float(value) for name, value in zip(names.split(), values, strict=True)}


def figures(tables):
    """The figures of these tables."""
    return {
        "lines": draw_lines(tables["lines"]),
        "surfaces": draw_surfaces(tables["surfaces"]),
        "contours": draw_contours(tables["surfaces"], tables["paths"]),
    }


def _each(rows):
    """Pairs of the title and the rows of each network and kind."""
    names = dict.fromkeys((row["network"], row["kind"]) for row in rows)
    return [(", ".join(name), [row for row in rows if (row["network"], row["kind"]) == name]) for name in names]


def _grid(rows, plane):
    """x, y and log10 of the loss of a plane's rows, each (ys, xs)."""
    rows = [row for row in rows if row["plane"] == plane]
    count = len({row["y"] for row in rows})
    x, y, loss = (np.array([row[key] for row in rows]).reshape(count, -1) for key in ("x", "y", "loss"))
    return x, y, np.log10(np.maximum(loss, 1e-12))


def draw_lines(rows):
    """A panel a network: the loss along one direction, plain and residual."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(NETWORKS)), NETWORKS, strict=True):
        for kind, color in COMPARED.items():
            own = [row for row in rows if (row["network"], row["kind"]) == (network, kind)]
            axes.plot([row["x"] for row in own], [row["loss"] for row in own], color=color, label=kind)
        losses = [row["loss"] for row in rows if row["network"] == network]
        if max(losses) > 10 * min(losses):
            axes.set_yscale("log")
        axes.set(title=f"{network}, training images", ylabel=LOSSES[network])
        axes.set_xlabel("random direction, in lengths of the filters")
        axes.legend(frameon=False)
    return figure


def _ticks(low, high):
    """Round numbers from low to high for a logarithmic axis."""
    far = high / low
    locator = LogLocator(subs=(1, 2, 5) if far < 300 else (1,)) if far > 10 else MaxNLocator(5)
    return [tick for tick in locator.tick_values(low, high) if low <= tick <= high]


def draw_surfaces(rows):
    """A panel a network: the loss over the random plane as a surface; heights and colours compare in each row."""
    figure = Figure(figsize=(8.4, 3.9 * len(NETWORKS)), layout="constrained")
    figure.suptitle(
        "training loss around the trained network (+), on a logarithmic scale,\n"
        "over two random directions in lengths of its filters"
    )
    networks = _each(rows)
    across = len(networks) // len(NETWORKS)
    heights = {name: _grid([row for row in rows if row["network"] == name], "random")[2] for name in NETWORKS}
    for number, (title, own) in enumerate(networks, start=1):
        axes = figure.add_subplot(len(NETWORKS), across, number, projection="3d", computed_zorder=False)
        height = heights[own[0]["network"]]
        limits = {"vmin": height.min(), "vmax": height.max()}
        x, y, z = _grid(own, "random")
        axes.plot_surface(x, y, z, cmap="viridis", rcount=200, ccount=200, **limits)
        distance = x**2 + y**2
        nearest = distance < 1.01 * distance.min() + 1e-12  # four, where the number of points is even
        axes.plot([0], [0], [z[nearest].mean()], "r+", ms=10, mew=1.5)
        axes.set_zlim(height.min(), height.max())
        axes.set_xlabel("first direction", labelpad=8)
        axes.set_ylabel("second direction", labelpad=8)
        ticks = _ticks(10 ** height.min(), 10 ** height.max())
        labels = [f"{tick:g}" for tick in ticks]
        axes.set_zticks(np.log10(ticks), labels)
        axes.set_zlabel("loss, nats", labelpad=max(4, 4 * max(map(len, labels)) - 12))
        axes.set_title(title, y=0.95)
        axes.set_box_aspect(None, zoom=0.85)
    return figure


def draw_contours(rows, paths):
    """A column a network: the random plane above, below it the plane of the training's path, with the path."""
    networks = list(zip(_each(rows), _each(paths), strict=True))
    figure = Figure(figsize=(3.6 * len(networks), 6.8), layout="constrained")
    told = "loss in nats, on a logarithmic scale, each panel with its own colours"
    figure.suptitle(f"{told}; + the trained network, ○ the start of its training")
    grid = figure.subplots(2, len(networks), squeeze=False)
    for (above, below), ((title, own), (_, path)) in zip(grid.T, networks, strict=True):
        for axes, plane in ((above, "random"), (below, "path")):
            filled = axes.contourf(*_grid(own, plane), levels=20)
            figure.colorbar(filled, ax=axes, format=_nats(filled.levels))
            axes.plot(0, 0, "r+", ms=10)
        above.set(title=title, xlabel="first random direction")
        below.plot([row["x"] for row in path], [row["y"] for row in path], "r.-", lw=1)
        below.plot(path[0]["x"], path[0]["y"], "ro", ms=8, fillstyle="none")
        below.set(title=f"path of training ({path[0]['share']:.0%} in plane)", xlabel="first principal component")
    grid[0, 0].set_ylabel("second random direction")
    grid[1, 0].set_ylabel("second principal component")
    return figure
