"""A feed-forward chain or a ResNet of simple layers, y ← P y + τ σ(W y + b), in float64.

The networks of "Lecture Notes: Neural Network Architectures" (https://arxiv.org/abs/2304.05133). Vectors, no batches;
NumPy only. The derivative of the loss by an early weight is the product along the layers:
∂L/∂W[ℓ] = ∂L/∂y[L] · ∏ J[j] · ∂y[ℓ+1]/∂W[ℓ], where J[j] is the layer's Jacobian, τ σ'(z) W, and in a ResNet plus
the identity (or the projection P where the widths differ).
"""

from dataclasses import dataclass

import numpy as np

ACTIVATIONS = {  # name → the function and its derivative
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (lambda z: (1 + np.tanh(z / 2)) / 2, lambda z: (1 - np.tanh(z / 2) ** 2) / 4),  # exp(-z) overflows
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "linear": (lambda z: z, np.ones_like),
}


@dataclass
class Chain:
    """A chain of layers.

    Args:
        weights: a matrix a layer, (width after, width before).
        biases: a vector a layer; zeros by default.
        activation: a name of ACTIVATIONS.
        residual: whether there are skip connections.
        steps: τ of each layer; ones by default.
        projections: P of each layer, None where it is the identity; used where `residual`.
    """

    weights: list
    biases: list = None
    activation: str = "tanh"
    residual: bool = False
    steps: list = None
    projections: list = None

    def __post_init__(self):
        count = len(self.weights)
        self.biases = self.biases or [np.zeros(len(weight)) for weight in self.weights]
        self.steps = [1.0] * count if self.steps is None else self.steps
        self.projections = self.projections or [None] * count

    def skip(self, layer):
        """What the shortcut of a layer multiplies its input with: (width after, width before)."""
        weight, projection = self.weights[layer], self.projections[layer]
        if not self.residual:
            return np.zeros_like(weight)
        return np.eye(*weight.shape) if projection is None else projection

    def forward(self, u):
        """The feature vectors y[0] = u, …, y[L]."""
        sigma, _ = ACTIVATIONS[self.activation]
        ys = [np.asarray(u, "float64")]
        for layer, (weight, bias, step) in enumerate(zip(self.weights, self.biases, self.steps, strict=True)):
            ys.append(self.skip(layer) @ ys[-1] + step * sigma(weight @ ys[-1] + bias))
        return ys

    def jacobians(self, ys):
        """∂y[j]/∂y[j-1] for j = 1, …, L: a matrix a layer."""
        _, derivative = ACTIVATIONS[self.activation]
        return [
            self.skip(layer) + self.steps[layer] * derivative(weight @ ys[layer] + self.biases[layer])[:, None] * weight
            for layer, weight in enumerate(self.weights)
        ]

    def weight_gradients(self, u, loss_gradient):
        """∂L/∂W of each layer by the product along the layers after it: a list of arrays of the weights' shapes.

        Args:
            u: the input.
            loss_gradient: ∂L/∂y[L].
        """
        ys, row, gradients = self.forward(u), np.asarray(loss_gradient, "float64"), []
        _, derivative = ACTIVATIONS[self.activation]
        for layer, jacobian in reversed(list(enumerate(self.jacobians(ys)))):
            outer = self.steps[layer] * row * derivative(self.weights[layer] @ ys[layer] + self.biases[layer])
            gradients.append(np.outer(outer, ys[layer]))
            row = row @ jacobian
        return gradients[::-1]


def random_chain(rng, depth, width, scale, residual, activation="tanh"):
    """A chain with weights N(0, scale² / width) and no biases: scale below 1 shrinks what passes, above 1 enlarges."""
    weights = [rng.standard_normal((width, width)) * scale / np.sqrt(width) for _ in range(depth)]
    return Chain(weights, activation=activation, residual=residual)
