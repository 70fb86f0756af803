"""Bottleneck residual blocks, with strided and transposed convolutions.

The blocks of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figure 5 right,
with the activation after the addition. A block is one Keras layer, so that a network of a thousand weight layers is
a chain of a few hundred blocks, and so that a block can be computed in another way without its users seeing it.
"""

import keras
from keras import layers, ops

from resnet_vae.loop import scan
from resnet_vae.normalization import PACKAGE, BatchNormalization, fold, sparse


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
        gaps = max(self.strides) > (self.kernel_size + 1) // 2  # positions of an enlarged image that conv2 never fills
        return (self.plain if gaps or None in x.shape[1:3] else self.fast)(x, training)

    def plain(self, x, training=None):
        """The block as it is defined."""
        y = ops.relu(self.bn2(self._middle(x, training), training=training))
        y = self.bn3(self.conv3(y), training=training)
        if self.projection:
            x = self.shortcut_bn(self.shortcut(x), training=training)
        return ops.relu(x + y)

    def fast(self, x, training=None):
        """The same function in less time.

        The widest tensors are the outputs of the last 1×1 and of the shortcut: where a normalisation follows a 1×1 of
        a narrower input, it is folded into the kernel. A strided transposed 1×1 is computed only where its output
        depends on the input; see `resnet_vae.normalization`.
        """
        enlarges = self.transpose and self.strides != (1, 1)
        y = (self._enlarged if enlarges else self._middle)(x, training)
        y = ops.relu(self.bn2(y, training=training))
        kernel, bias = fold(self.conv3, self.bn3, y, training)
        y = ops.conv(y, kernel, padding="same")
        if enlarges:
            x, constant = sparse(self.shortcut, self.shortcut_bn, x, training)
            x, bias = _spread(x, self.strides), bias + constant
        elif self.projection and x.shape[-1] * 4 <= self.filters[-1]:
            x = x[:, :: self.strides[0], :: self.strides[1]]
            kernel, constant = fold(self.shortcut, self.shortcut_bn, x, training)
            x, bias = ops.conv(x, kernel, padding="same"), bias + constant
        elif self.projection:
            x = self.shortcut_bn(self.shortcut(x), training=training)
        return ops.relu(y + ops.cast(bias, y.dtype) + x)

    def _middle(self, x, training):
        return self.conv2(ops.relu(self.bn1(self.conv1(x), training=training)))

    def _enlarged(self, x, training):
        """The same for a strided transposed conv1.

        Less a constant a channel, the image that conv2 sees is zero except at the positions of x: so conv2 of it is a
        strided transposed convolution of x's size. The constant's own convolution varies only at the border.
        """
        signal, constant = sparse(self.conv1, self.bn1, x, training)
        constant = ops.cast(constant, x.dtype)
        height, width = (side * stride for side, stride in zip(x.shape[1:3], self.strides, strict=True))
        kernel = ops.convert_to_tensor(self.conv2.kernel)
        y = ops.relu(signal + constant) - ops.relu(constant)
        y = ops.conv_transpose(y, ops.transpose(ops.flip(kernel, (0, 1)), (0, 1, 3, 2)), self.strides, padding="valid")
        first = self.kernel_size // 2  # "same" padding: the image begins in the middle of the kernel
        y = y[:, first : first + height, first : first + width]
        return y + _convolved_constant(ops.relu(constant), kernel, height, width) + ops.cast(self.conv2.bias, y.dtype)

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


def _spread(x, strides):
    """Put zeros between the positions: (batch, height, width, c) → (batch, height rows, width columns, c)."""
    _, height, width, channels = x.shape
    rows, columns = strides
    x = ops.reshape(x, (-1, height, 1, width, 1, channels))
    x = ops.pad(x, ((0, 0), (0, 0), (0, rows - 1), (0, 0), (0, columns - 1), (0, 0)))
    return ops.reshape(x, (-1, height * rows, width * columns, channels))


def _convolved_constant(constant, kernel, height, width):
    """The "same" convolution of an image of one constant a channel, (1, height, width, filters).

    Computed on an image of the kernel's size, in which each row and column of the border occurs, and the middle once.
    """
    sides = [(side, min(side, kernel.shape[0])) for side in (height, width)]
    y = ops.broadcast_to(constant, (1, *(small for _, small in sides), constant.shape[0]))
    y = ops.conv(y, kernel, padding="same")
    for axis, (side, small) in enumerate(sides, start=1):
        middle = (small - 1) // 2
        y = ops.take(y, [*range(middle), *[middle] * (side - small + 1), *range(middle + 1, small)], axis=axis)
    return y


@keras.saving.register_keras_serializable(PACKAGE)
class Repeated(layers.Layer):
    """`count` bottleneck blocks in a row whose shortcuts are their inputs, computed as one block in a loop.

    So the time and the memory to trace and compile do not grow with their number. A weight is one variable for all
    blocks, of shape (count, …); `split` and `join` go over to single blocks and back.

    Args:
        count: number of blocks.
        filters: of a block's three convolutions; the input has the last as its number of channels.
        kernel_size: of the middle convolutions.
        remat: keep only the blocks' inputs for the gradient and compute what is within a block a second time
            (https://arxiv.org/abs/1604.06174).
        gain, momentum, kernel_initializer: as of `Bottleneck`.

    Input and output (batch, height, width, filters[2]).
    """

    def __init__(
        self,
        count,
        filters,
        kernel_size=3,
        remat=False,
        gain=0.0,
        momentum=0.99,
        kernel_initializer="he_normal",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.count, self.remat = count, remat
        options = {"gain": gain, "momentum": momentum, "kernel_initializer": kernel_initializer}
        pattern = Bottleneck(filters, kernel_size, dtype=self.dtype_policy, name="block", **options)
        self.pattern = lambda: pattern  # a function, so that Keras does not count the pattern's weights

    def build(self, input_shape):
        pattern = self.pattern()
        pattern.build(input_shape)
        self.stacks = [self._add_stack(weight) for weight in _weights(pattern)]

    def _add_stack(self, weight):
        kernel_initializer = self.pattern().kernel_initializer

        def initialize(shape, dtype=None):
            if weight.name == "kernel":  # the others start as constants
                return ops.stack([kernel_initializer.clone()(shape[1:], dtype) for _ in range(self.count)])
            return ops.concatenate([weight[None]] * self.count)

        return self.add_weight(
            name="_".join(weight.path.split("/")[-2:]),  # as conv1_kernel
            shape=(self.count, *weight.shape),
            dtype=weight.dtype,
            initializer=initialize,
            trainable=weight.trainable,
            autocast=False,
        )

    def call(self, x, training=None):
        pattern, trained = self.pattern(), len(self.pattern().trainable_variables)
        training = training and self.trainable

        def block(x, weights):
            return pattern.stateless_call(weights[:trained], weights[trained:], x, training=training)

        stacks = [ops.convert_to_tensor(stack) for stack in self.stacks]
        x, statistics = scan(block, x, stacks, trained, self.remat and bool(training))
        if training:
            for stack, value in zip(self.stacks[trained:], statistics, strict=True):
                stack.assign(value)
        return x

    def compute_output_shape(self, input_shape):
        return input_shape

    def split(self):
        """The same as a list of `Bottleneck` layers with weights of their own, to be called one after the other."""
        blocks = []
        for number in range(self.count):
            block = Bottleneck.from_config({**self.pattern().get_config(), "name": f"{self.name}_{number + 1}"})
            block.build((None, None, None, block.filters[-1]))
            for weight, stack in zip(_weights(block), self.stacks, strict=True):
                weight.assign(stack[number])
            blocks.append(block)
        return blocks

    def join(self, blocks):
        """Take over the weights of `count` built `Bottleneck` layers; the inverse of `split`."""
        for stack, weights in zip(self.stacks, zip(*map(_weights, blocks), strict=True), strict=True):
            stack.assign(ops.concatenate([weight[None] for weight in weights]))

    def get_config(self):
        pattern = self.pattern().get_config()
        options = ("filters", "kernel_size", "gain", "momentum", "kernel_initializer")
        return {
            **super().get_config(),
            "count": self.count,
            "remat": self.remat,
            **{name: pattern[name] for name in options},
        }


def _weights(block):
    return [*block.trainable_variables, *block.non_trainable_variables]


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
