"""ResNets as Euler steps: y ← y + τ σ(W y + b) is a step of the explicit Euler method for dy/dt = σ(W(t) y + b(t)).

That a ResNet is such a method: "Stable architectures for deep neural networks" (https://arxiv.org/abs/1705.03341).
Two questions: how fast the network comes near the differential equation's solution as τ falls (order 1 is what the
method promises), and whether it helps to learn τ, a number a layer, by gradient descent
(https://arxiv.org/abs/2204.08528). As learned steps may help merely by being longer, there is a third network, whose τ
is fixed at the mean of the learned ones.
"""

import textwrap

import keras
import numpy as np
from keras import layers, ops
from matplotlib.figure import Figure

from resnet_vae.experiments.chain import Chain

STEPS = ("fixed", "learned", "fixed at the learned mean")  # kinds of τ; the first two start at one over the layers


def field(width, seed=0):
    """A smooth vector field: functions W(t), (width, width), and b(t), (width,)."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, width, width)) / np.sqrt(width)
    offset = rng.standard_normal(width)
    return lambda t: np.cos(2 * t) * first + np.sin(3 * t) * second, lambda t: np.cos(t) * offset


def network_output(count, u, weights, biases):
    """y[L] of the ResNet whose layers are `count` Euler steps from 0 to 1."""
    step = 1 / count
    times = step * np.arange(count)
    chain = Chain([weights(t) for t in times], [biases(t) for t in times], "tanh", residual=True, steps=[step] * count)
    return chain.forward(u)[-1]


def convergence(counts, width=8, seed=0):
    """Distance of the network's output from the differential equation's solution: a row a number of layers.

    The observed order is log2 of the error's ratio to that of half as many layers; explicit Euler's is 1.
    """
    from scipy.integrate import solve_ivp

    weights, biases = field(width, seed)
    u = np.random.default_rng(seed + 1).standard_normal(width)
    solved = solve_ivp(lambda t, y: np.tanh(weights(t) @ y + biases(t)), (0, 1), u, rtol=1e-12, atol=1e-12)
    rows = []
    for count in counts:
        error = float(np.linalg.norm(network_output(count, u, weights, biases) - solved.y[:, -1]))
        halved = rows and rows[-1]["layers"] * 2 == count
        order = float(np.log2(rows[-1]["error"] / error)) if halved else ""
        rows.append({"layers": count, "step": 1 / count, "error": error, "order": order})
    return rows


class EulerStep(layers.Layer):
    """y ← P y + τ tanh(W y + b): (batch, width before) → (batch, width).

    Args:
        width: of the output.
        step: τ, or where it starts.
        learned: whether τ is trained.

    P is the identity, or a trained projection where the widths differ.
    """

    def __init__(self, width, step=1.0, learned=False, **kwargs):
        super().__init__(**kwargs)
        self.width, self.step, self.learned = width, step, learned
        self.inner = layers.Dense(width, activation="tanh", name="inner")
        self.projection = None

    def build(self, input_shape):
        self.inner.build(input_shape)
        if input_shape[-1] != self.width:
            self.projection = layers.Dense(self.width, use_bias=False, name="projection")
            self.projection.build(input_shape)
        start = keras.initializers.Constant(self.step)
        self.tau = self.add_weight((), start, name="tau", trainable=self.learned)

    def call(self, y):
        return (y if self.projection is None else self.projection(y)) + self.tau * self.inner(y)


def spirals(count, seed):
    """Points of two spirals in the plane, (count, 2), and which of the two each is on, (count,)."""
    rng = np.random.default_rng(seed)
    turn = np.sqrt(rng.uniform(0.05, 1, count)) * 3 * np.pi
    label = rng.integers(0, 2, count)
    angle = turn + np.pi * label
    points = turn[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) / (3 * np.pi)
    return (points + rng.standard_normal((count, 2)) * 0.02).astype("float32"), label.astype("float32")


def train_on_spirals(settings, seed, kind, step):
    """Train one network of Euler steps; a row: the seed, which of STEPS, the mean τ in the end, loss and accuracy."""
    keras.utils.set_random_seed(seed)
    point = keras.Input((2,))
    y = point
    for _ in range(settings.layers):
        y = EulerStep(settings.width, step, learned=kind == "learned")(y)
    model = keras.Model(point, layers.Dense(1, activation="sigmoid")(y))
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
    model.fit(*spirals(settings.points, seed), batch_size=50, epochs=settings.epochs, verbose=0)
    loss, accuracy = model.evaluate(*spirals(settings.points, seed + 10_000), verbose=0)
    steps = [float(ops.convert_to_numpy(each.tau)) for each in model.layers if isinstance(each, EulerStep)]
    return {
        "seed": seed,
        "tau": kind,
        "mean_tau": float(np.mean(steps)),
        "loss": float(loss),
        "accuracy": float(accuracy),
    }


def measure(settings):
    """Two tables: "euler", of `convergence`, and "spirals", of `train_on_spirals`."""
    counts = [8]
    while counts[-1] * 2 <= settings.finest:
        counts.append(counts[-1] * 2)
    rows = convergence(counts, settings.width)
    trained = []
    for seed in range(settings.repetitions):
        step = 1 / settings.layers
        for kind in STEPS:
            trained.append(train_on_spirals(settings, seed, kind, step))
            step = trained[-1]["mean_tau"]  # of fixed ones still the same
    return {"euler": rows, "spirals": trained}


def figures(tables):
    """The figures of these tables."""
    return {"euler": draw(tables["euler"], tables["spirals"])}


def draw(rows, trained):
    """Left: error against layers, with a line of order 1. Right: test loss by the kind of τ, of each seed."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    counts, errors = [row["layers"] for row in rows], [row["error"] for row in rows]
    left.loglog(counts, errors, "o-", label="distance from the solution")
    left.loglog(counts, [errors[0] * counts[0] / count for count in counts], "k:", label="order 1")
    left.set(xlabel="layers (each a step of 1 / layers)", ylabel="error", title="Euler steps and the equation")
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    left.legend(frameon=False)
    losses = [[row["loss"] for row in trained if row["tau"] == kind] for kind in STEPS]
    taus = [np.mean([row["mean_tau"] for row in trained if row["tau"] == kind]) for kind in STEPS]
    names = [f"{textwrap.fill(kind, 14)}\n(mean {tau:.3g})" for kind, tau in zip(STEPS, taus, strict=True)]
    for number, pairs in enumerate(zip(*losses, strict=True)):
        right.plot(names, pairs, "o-", color="gray", alpha=0.7, label=None if number else "a seed")
    right.plot(names, [np.mean(each) for each in losses], "D-", color="tab:blue", label="mean of the seeds")
    right.set(xlabel="step τ", ylabel="test loss, nats per point", title="two spirals", yscale="log")
    right.set_xlim(-0.4, len(STEPS) - 0.6)
    right.legend(frameon=False)
    return figure
