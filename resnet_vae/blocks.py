"""Bottleneck residual blocks, with strided and transposed convolutions.

The blocks of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figure 5 right,
with the activation after the addition. A block is one Keras layer, so that a network of a thousand weight layers is
a chain of a few hundred blocks, and so that a block can be computed in another way without its users seeing it.
"""

import keras
from keras import layers, ops

PACKAGE = "resnet_vae"  # the prefix under which Keras registers the project's classes


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(layers.BatchNormalization):
    """Batch normalisation (https://arxiv.org/abs/1502.03167) over all but the last axis, in the dtype of its input.

    The same function and the same weights as `keras.layers.BatchNormalization`. On TensorFlow it runs as one fused
    operation, with float32 statistics, instead of ten small ones in float32.
    """

    def call(self, inputs, training=None, mask=None):
        fused = keras.backend.backend() == "tensorflow" and len(inputs.shape) == 4 and mask is None
        if not fused or self.axis not in (-1, 3) or keras.backend.standardize_dtype(inputs.dtype) == "float64":
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        normalize, options = tf.compat.v1.nn.fused_batch_norm, {"epsilon": self.epsilon}
        if not (training and self.trainable):
            options |= {"mean": self.moving_mean, "variance": self.moving_variance, "is_training": False}
            return normalize(inputs, self.gamma, self.beta, **options)[0]
        outputs, mean, variance = normalize(inputs, self.gamma, self.beta, **options)
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], "float32")
        variance *= (count - 1) / count  # the operation returns the unbiased one, Keras averages the biased one
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(self.momentum * moving + (1 - self.momentum) * batch)
        return outputs


@keras.saving.register_keras_serializable(PACKAGE)
class Bottleneck(layers.Layer):
    """A bottleneck residual block: relu(shortcut(x) + F(x)).

    F is 1×1 `filters[0]` → BN → ReLU → k×k `filters[1]` → BN → ReLU → 1×1 `filters[2]` → BN. The first 1×1 carries
    the strides; with `transpose` it is a transposed convolution, which enlarges the image instead of reducing it.

    Args:
        filters: three numbers of filters; the block's output has the last of them.
        kernel_size: of the middle convolution.
        strides: of the first 1×1 and of the shortcut, (rows, columns).
        transpose: transposed convolutions where the strides are.
        projection: the shortcut is a strided 1×1 → BN (equation 1 of the post); otherwise the input itself, whose
            shape must then be the output's.
        gain: the last normalisation's initial scale. At 0 the block starts as its shortcut
            (https://arxiv.org/abs/1706.02677, section 5.1), which is what makes very deep networks trainable.
        momentum: of the normalisations' moving averages.
        kernel_initializer: of the convolutions.

    Input (batch, height, width, channels), output (batch, height / strides[0], width / strides[1], filters[2]), or
    times the strides with `transpose`.
    """

    def __init__(
        self,
        filters,
        kernel_size=3,
        strides=(1, 1),
        transpose=False,
        projection=False,
        gain=0.0,
        momentum=0.99,
        kernel_initializer="he_normal",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.filters, self.kernel_size, self.strides = tuple(filters), kernel_size, tuple(strides)
        self.transpose, self.projection, self.gain, self.momentum = transpose, projection, gain, momentum
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        strided = layers.Conv2DTranspose if transpose else layers.Conv2D
        options = {"padding": "same", "dtype": self.dtype_policy, "kernel_initializer": kernel_initializer}
        first, middle, last = self.filters

        def normalization(name, scale=1.0):
            gamma = keras.initializers.Constant(scale)
            return BatchNormalization(momentum=momentum, gamma_initializer=gamma, dtype=self.dtype_policy, name=name)

        self.conv1 = strided(first, 1, strides=self.strides, name="conv1", **options)
        self.bn1 = normalization("bn1")
        self.conv2 = layers.Conv2D(middle, kernel_size, name="conv2", **options)
        self.bn2 = normalization("bn2")
        self.conv3 = layers.Conv2D(last, 1, name="conv3", **options)
        self.bn3 = normalization("bn3", scale=gain)
        self.shortcut = self.shortcut_bn = None
        if projection:
            self.shortcut = strided(last, 1, strides=self.strides, name="shortcut", **options)
            self.shortcut_bn = normalization("shortcut_bn")

    def build(self, input_shape):
        if not self.projection and input_shape[-1] != self.filters[-1]:
            raise ValueError(
                f"identity block {self.name!r}: the input has {input_shape[-1]} channels and the last filters are "
                f"{self.filters[-1]}; they must be equal, or use conv_block, whose shortcut is a projection"
            )
        shape = input_shape
        for convolution, normalization in [
            (self.conv1, self.bn1),
            (self.conv2, self.bn2),
            (self.conv3, self.bn3),
        ]:
            convolution.build(shape)
            shape = convolution.compute_output_shape(shape)
            normalization.build(shape)
        if self.projection:
            self.shortcut.build(input_shape)
            self.shortcut_bn.build(shape)

    def call(self, x, training=None):
        y = ops.relu(self.bn1(self.conv1(x), training=training))
        y = ops.relu(self.bn2(self.conv2(y), training=training))
        y = self.bn3(self.conv3(y), training=training)
        if self.projection:
            x = self.shortcut_bn(self.shortcut(x), training=training)
        return ops.relu(x + y)

    def compute_output_shape(self, input_shape):
        return (*self.conv1.compute_output_shape(input_shape)[:-1], self.filters[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "transpose": self.transpose,
            "projection": self.projection,
            "gain": self.gain,
            "momentum": self.momentum,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def identity_block(x, kernel_size=3, filters=(64, 64, 256), **options):
    """Apply a bottleneck block whose shortcut is the input itself.

    Args:
        x: tensor (batch, height, width, filters[2]).
        kernel_size: of the middle convolution.
        filters: of the three convolutions.
        **options: further ones of `Bottleneck`.

    Returns:
        Tensor of the shape of `x`.

    Raises:
        ValueError: the channels of `x` are not filters[2].
    """
    return Bottleneck(filters, kernel_size, **options)(x)


def conv_block(x, kernel_size=3, filters=(64, 64, 256), strides=(2, 2), transpose=False, **options):
    """Apply a bottleneck block whose shortcut is a strided 1×1 projection; for changes of size or channels.

    Args:
        x: tensor (batch, height, width, channels).
        kernel_size: of the middle convolution.
        filters: of the three convolutions.
        strides: of the first 1×1 and of the shortcut.
        transpose: enlarge by the strides instead of reducing (Conv2DTranspose for those two).
        **options: further ones of `Bottleneck`.

    Returns:
        Tensor (batch, height / strides[0], width / strides[1], filters[2]); times the strides with `transpose`.
    """
    return Bottleneck(filters, kernel_size, strides, transpose, projection=True, **options)(x)
