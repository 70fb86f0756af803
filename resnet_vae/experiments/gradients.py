"""The gradient by layer: along feed-forward chains and ResNets, in the classifier and in the VAE, plain and residual.

What is measured is the norm of the loss's gradient by each weight at initialisation. In a product of L Jacobians it
vanishes or explodes with L; a skip connection adds the identity to each factor: small factors are then near 1, which
stops the vanishing, and large ones stay large.
"""

import keras
import numpy as np
from keras import ops
from matplotlib.figure import Figure

from resnet_vae.blocks import Repeated, ResidualBlock
from resnet_vae.experiments.chain import random_chain
from resnet_vae.experiments.networks import build_network, compile_network, inputs, load_labelled, some
from resnet_vae.experiments.settings import COMPARED, NETWORKS

FACTORS = (0.8, 1.0, 1.6)  # of the chains' weights, whose standard deviation is this / √width
CHAIN_WIDTH = 16
STYLES = {"plain": "--", "residual": "-"}


class GradientProbe(keras.optimizers.Optimizer):
    """An optimizer that changes nothing and keeps the last gradients, on every backend: `gradient_of(variable)`."""

    def __init__(self, **kwargs):
        super().__init__(learning_rate=0.0, **kwargs)

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.kept = [self.add_variable_from_reference(variable, name="gradient") for variable in variables]

    def update_step(self, gradient, variable, learning_rate):
        self.assign(self.kept[self._get_variable_index(variable)], gradient)

    def gradient_of(self, variable):
        """The gradient by a variable in the last step, an array."""
        return ops.convert_to_numpy(self.kept[self._get_variable_index(variable)])


def kernel_gradients(model, probe):
    """Gradient norms of the convolutions on the main path of the blocks, from the image on: a list of floats."""
    parts = [model.encoder, model.decoder] if hasattr(model, "encoder") else [model]
    rows = []
    for layer in (layer for part in parts for layer in part.layers):
        gradients = []
        if isinstance(layer, ResidualBlock):
            gradients = [[probe.gradient_of(convolution.kernel)] for convolution in layer.convolutions]
        elif isinstance(layer, Repeated):
            kernels = [stack for stack in layer.stacks if stack.name.startswith("conv") and "kernel" in stack.name]
            gradients = [probe.gradient_of(kernel) for kernel in kernels]
        for block in zip(*gradients, strict=True):
            rows += [float(np.linalg.norm(gradient)) for gradient in block]
    return rows


def of_network(network, model, images, labels):
    """Norms of the gradients in the first step on a batch of a classifier or a VAE, by `kernel_gradients`."""
    probe = GradientProbe()
    compile_network(network, model, probe)
    model.train_on_batch(*inputs(network, images, labels))
    return kernel_gradients(model, probe)


def of_chain(depth, width, factor, residual, seed=0):
    """Norms of the gradients by the weights of a random chain with tanh, by the product along its layers."""
    rng = np.random.default_rng(seed)
    chain = random_chain(rng, depth, width, factor, residual)
    u, slope = rng.standard_normal(width), rng.standard_normal(width)
    return [float(np.linalg.norm(gradient)) for gradient in chain.weight_gradients(u, slope)]


def measure(settings):
    """The table "gradients": network, kind (plain or residual), depth, layer, the gradient's norm, its range.

    Of the chains the norm is the geometric mean over the seeds and the range theirs; of the networks it is that of one.
    """
    rows = []

    def add(network, kind, depth, norms):
        with np.errstate(divide="ignore"):  # a gradient that vanished altogether
            mean = np.exp(np.mean(np.log(norms), axis=0))
        for layer, values in enumerate(zip(mean, np.min(norms, axis=0), np.max(norms, axis=0), strict=True), start=1):
            norm, lowest, highest = map(float, values)
            row = {"network": network, "kind": kind, "depth": depth, "layer": layer}
            rows.append({**row, "norm": norm, "lowest": lowest, "highest": highest})

    seeds = range(settings.seed, settings.seed + settings.repetitions)
    for factor in FACTORS:
        for depth in settings.depths:
            for residual in (False, True):
                norms = [of_chain(depth, CHAIN_WIDTH, factor, residual, seed) for seed in seeds]
                add(f"chain, weights × {factor}", "residual" if residual else "plain", depth, norms)
    data = load_labelled(settings)
    batch = some(data, settings.batch_size, settings.seed)
    for network, depths in zip(NETWORKS, (settings.classifier_depths, settings.vae_depths), strict=True):
        for kind in COMPARED:
            for depth in depths:
                model = build_network(settings, network, kind, depth, data, settings.seed)
                add(network, kind, depth, [of_network(network, model, *batch)])
    return {"gradients": rows}


def figures(tables):
    """The figures of these tables."""
    return {"gradients": draw(tables["gradients"])}


def draw(rows):
    """A panel a network: norm of the gradient against the place of the layer, with its range over the seeds.

    A line a depth, plain and residual; the deeper, the thicker.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(9, 3.6 * -(-len(networks) // 3)), layout="constrained")
    panels = iter(figure.subplots(-(-len(networks) // 3), 3, squeeze=False).flat)
    for network, axes in zip(networks, panels, strict=False):
        own = [row for row in rows if row["network"] == network]
        depths = sorted({row["depth"] for row in own})
        for kind, color in reversed(COMPARED.items()):  # broken lines last, between whose dashes others are seen
            for number, depth in enumerate(depths):
                chosen = [row for row in own if row["kind"] == kind and row["depth"] == depth]
                norms, lowest, highest = ([row[name] for row in chosen] for name in ("norm", "lowest", "highest"))
                places, alpha = np.linspace(0, 1, len(norms)), 0.35 + 0.65 * (number + 1) / len(depths)
                axes.semilogy(places, norms, STYLES[kind], color=color, alpha=alpha, lw=0.6 + 0.6 * number)
                if depth == depths[-1]:
                    axes.fill_between(places, lowest, highest, color=color, alpha=0.15, lw=0)
        title = network.replace("weights ×", "weights") + ("/√width" if "×" in network else "")
        axes.set(title=f"{title}\n{', '.join(map(str, depths))} layers")
        axes.set_xlabel("layer, first (0) to last (1)")
    unused = list(panels)  # that zip left
    for axes in unused:
        axes.set_axis_off()
    first = figure.axes[0]
    for kind, color in COMPARED.items():
        first.plot([], [], STYLES[kind], color=color, label=kind)
    first.plot([], [], color="gray", lw=0.6, label="the shallowest")
    most = max(len({row["depth"] for row in rows if row["network"] == network}) for network in networks)
    first.plot([], [], color="gray", lw=0.6 * most, label="the deepest")
    if any(row["lowest"] < row["highest"] for row in rows):
        first.fill_between([], [], [], color="gray", alpha=0.3, lw=0, label="its range over seeds")
    if unused:
        unused[-1].legend(*first.get_legend_handles_labels(), loc="center", frameon=False)
    else:
        first.legend(frameon=False)
    figure.supylabel("norm of the gradient with respect to a layer's weights")
    return figure
