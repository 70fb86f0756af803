"""Residual blocks: bottleneck and basic, downsampling and upsampling, with the activation after the addition or before.

The blocks of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), figure 5, and of
"Identity Mappings in Deep Residual Networks" (https://arxiv.org/abs/1603.05027), figure 1. A block is one Keras layer,
so that a network of a thousand weight layers is a chain of a few hundred blocks, and so that a block can be computed
in another way without its users seeing it.
"""

import json
import operator
from collections.abc import Iterable

import keras
from keras import layers, ops

from resnet_vae.config import PACKAGE
from resnet_vae.convolution import (
    averaged,
    convolve,
    convolve_transposed,
    convolve_upsampled,
    convolved_constant,
    every,
    insert_zeros,
    matrix,
    pointwise,
    repeated,
)
from resnet_vae.initialization import another, compiled_once
from resnet_vae.loop import scan, traced_once
from resnet_vae.normalization import BatchNormalization, fold, sparse

SHORTCUTS = ("identity", "projection", "pool", "pad", "none")
ORDERS = ("post", "pre")
FOLDED = 128  # channels of a 1×1's input up to which it is quicker to fold its normalisation than to apply it
OPTIONS = ("shortcut", "order", "learned_step", "gain", "momentum", "epsilon", "use_bias", "kernel_initializer")


@keras.saving.register_keras_serializable(PACKAGE)
class ResidualBlock(layers.Layer):
    """A residual block: shortcut(x) + F(x), where F is two or three convolutions with normalisation and ReLU.

    In order "post" (the original, https://arxiv.org/abs/1512.03385) a normalisation follows each convolution, and ReLU
    the addition. In order "pre" (full pre-activation, https://arxiv.org/abs/1603.05027) normalisation and ReLU precede
    each convolution, and nothing follows the addition, so that a chain of blocks is a sum; what comes after the last
    block must then begin with a normalisation and ReLU.

    Args:
        filters: of the convolutions; the last is the number of channels that come out. Three make a bottleneck block
            (1×1, k×k, 1×1), two a basic one (k×k, k×k).
        kernel_size: k, or (k, k).
        strides: of the first convolution and of the shortcut, (rows, columns), or one number for both.
        transpose: upsample by the strides instead of downsampling: the first convolution is a transposed one.
        shortcut: "identity": x itself, whose shape must then be the output's. "projection": a 1×1 convolution with the
            strides (with order post, normalised). "pool": averages over the strides, then a 1×1 convolution without
            them; upsampling, the 1×1 convolution, then each position repeated. "pad": every stride-th position, or each
            one repeated, and channels of zeros added, or the last ones dropped. "none": no shortcut, a plain network.
        order: "post" or "pre".
        learned_step: F(x) is multiplied with a trained number that starts at 1.
        gain: initial scale of the last normalisation; at 0 the block starts as its shortcut
            (https://arxiv.org/abs/1706.02677, section 5.1), so that a deep chain starts as a shallow one. With order
            pre, 0 starts the last convolution's kernel at zero instead, and other values have no effect. By default 0,
            and 1 where there is no shortcut.
        momentum, epsilon: of the normalisations.
        use_bias: of the convolutions.
        kernel_initializer: of the convolutions. As in Keras, one whose seed is a number draws the same for all kernels
            of a shape.

    Input (batch, height, width, channels), output (batch, height / strides[0], width / strides[1], filters[-1]),
    rounded up, or times the strides with `transpose`. It is frozen as a whole: a part of it that is frozen is trained
    again in a copy or after loading.

    Raises:
        ValueError: an unknown shortcut or order, a number of filters that is not 2 or 3, a kernel that is not square,
            strides that are not one or two numbers, or more than 1 with the shortcut "identity", Keras's
            image_data_format "channels_first"; when it is built, an identity between different shapes; when it is
            called, an input of another rank, or of other channels than before.
    """

    def __init__(
        self,
        filters,
        kernel_size=3,
        strides=(1, 1),
        transpose=False,
        shortcut="identity",
        order="post",
        learned_step=False,
        gain=None,
        momentum=0.99,
        epsilon=1e-3,
        use_bias=True,
        kernel_initializer="he_normal",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.input_spec = layers.InputSpec(ndim=4)
        filters, sides, strides = (
            tuple(map(operator.index, given if isinstance(given, Iterable) else (given,)))
            for given in (filters, kernel_size, strides)
        )
        for name, given, right, expected in (
            ("filters", filters, len(filters) in (2, 3), "2 or 3 numbers"),
            ("kernel_size", sides, len(set(sides)) == 1, "one side, or the same for both"),
            ("strides", strides, len(strides) in (1, 2), "one number, or two"),
            ("shortcut", shortcut, shortcut in SHORTCUTS, f"one of {', '.join(SHORTCUTS)}"),
            ("order", order, order in ORDERS, f"one of {', '.join(ORDERS)}"),
        ):
            if not right:
                raise ValueError(f"block {self.name!r}: {name} is {given!r}; expected {expected}")
        if keras.config.image_data_format() != "channels_last":
            raise ValueError(
                f"block {self.name!r}: Keras's image_data_format is {keras.config.image_data_format()!r}; the blocks "
                "need 'channels_last': keras.config.set_image_data_format('channels_last')"
            )
        kernel_size, strides = sides[0], strides * (2 // len(strides))
        if shortcut == "identity" and set(strides) != {1}:
            raise ValueError(
                f"block {self.name!r}: strides {strides} change the size, which the shortcut 'identity' cannot; use "
                "conv_block, whose shortcut is a projection"
            )
        self.filters, self.kernel_size, self.strides = filters, kernel_size, strides
        self.transpose, self.shortcut_kind, self.order, self.learned_step = transpose, shortcut, order, learned_step
        gain = float(shortcut == "none") if gain is None else gain
        self.gain, self.momentum, self.epsilon, self.use_bias = gain, momentum, epsilon, use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        strided = layers.Conv2DTranspose if transpose else layers.Conv2D
        options = {"padding": "same", "dtype": self.dtype_policy, "use_bias": use_bias}

        def convolution(kind, count, side, name, kernel=kernel_initializer, **more):
            kernel = compiled_once(another(kernel))
            return kind(count, side, name=name, kernel_initializer=kernel, **options, **more)

        def normalization(name, scale=1.0):
            gamma = keras.initializers.Constant(scale)
            return BatchNormalization(
                momentum=momentum, epsilon=epsilon, gamma_initializer=gamma, dtype=self.dtype_policy, name=name
            )

        sides = (1, kernel_size, 1) if len(self.filters) == 3 else (kernel_size, kernel_size)
        last = len(sides) - 1
        self.convolutions, self.normalizations = [], []
        for number, (count, side) in enumerate(zip(self.filters, sides, strict=True)):
            name = f"conv{number + 1}"
            kernel = "zeros" if number == last and order == "pre" and gain == 0 else kernel_initializer
            if number == 0:
                layer = convolution(strided, count, side, name, kernel, strides=self.strides)
            else:
                layer = convolution(layers.Conv2D, count, side, name, kernel)
            scale = gain if number == last and order == "post" else 1.0
            self.convolutions.append(layer)
            self.normalizations.append(normalization(f"bn{number + 1}", scale))
        self.shortcut = self.shortcut_bn = None
        if shortcut == "projection":
            self.shortcut = convolution(strided, self.filters[-1], 1, "shortcut", strides=self.strides)
        elif shortcut == "pool":
            self.shortcut = convolution(layers.Conv2D, self.filters[-1], 1, "shortcut")
        if self.shortcut is not None and order == "post":
            self.shortcut_bn = normalization("shortcut_bn")

    def build(self, input_shape):
        if self.shortcut_kind == "identity" and input_shape[-1] != self.filters[-1]:
            raise ValueError(
                f"identity block {self.name!r}: the input has {input_shape[-1]} channels and the last filters are "
                f"{self.filters[-1]}; they must be equal, or use conv_block, whose shortcut is a projection"
            )
        self.input_spec, shape = layers.InputSpec(ndim=4, axes={-1: input_shape[-1]}), input_shape
        for convolution, normalization in zip(self.convolutions, self.normalizations, strict=True):
            convolution.build(shape)
            after = convolution.compute_output_shape(shape)
            normalization.build(shape if self.order == "pre" else after)
            shape = after
        if self.shortcut is not None:
            self.shortcut.build(input_shape)
        if self.shortcut_bn is not None:
            self.shortcut_bn.build(shape)
        if not self.trainable:  # as it is loaded or cloned: Keras keeps that of the block, and not of what is within
            for layer in self._flatten_layers(include_self=False):
                layer.trainable = False
        self.step = self.add_weight((), "ones", name="step") if self.learned_step else None

    def call(self, x, training=None):
        bottleneck = self.order == "post" and len(self.filters) == 3
        gaps = max(self.strides) > (self.kernel_size + 1) // 2  # positions of an upsampled image that conv2 never fills
        known = None not in x.shape[1:3]
        precise = self.variable_dtype in ("float32", "float64")  # as statistics are
        x = _floats(x, self.compute_dtype)
        return (self.fast if bottleneck and known and precise and not gaps else self.plain)(x, training)

    def plain(self, x, training=None):
        """The block as it is defined; a bias is added by the normalisation after it, see `biased` there."""
        y, pre, bias = x, self.order == "pre", None
        for number, (convolution, normalization) in enumerate(
            zip(self.convolutions, self.normalizations, strict=True), start=1
        ):
            if pre:
                y = ops.relu(normalization.biased(y, bias, training))
                if number == 1 and self.shortcut is not None:
                    x = y
                y, bias = _without_bias(convolution, y), convolution.bias
            else:
                y = normalization.biased(_without_bias(convolution, y), convolution.bias, training)
                y = ops.relu(y) if number < len(self.filters) else y
        if bias is not None:
            y = ops.add(y, ops.cast(bias, y.dtype))
        if self.learned_step:
            y = y * ops.cast(self.step, y.dtype)
        if self.shortcut_kind != "none":
            y = self._skip(x, training) + y
        return y if pre else ops.relu(y)

    def _skip(self, x, training):
        """What the shortcut makes of x."""
        kind = self.shortcut_kind
        if kind in ("pool", "pad") and not self.transpose:
            x = (averaged if kind == "pool" else every)(x, self.strides)
        if self.shortcut is not None:
            x = _without_bias(self.shortcut, x)
            if self.shortcut_bn is not None:
                x = self.shortcut_bn.biased(x, self.shortcut.bias, training)
            elif self.shortcut.use_bias:
                # Reshaped, so that its gradient is a plain sum. The last convolution's bias has the same gradient: of
                # two equal operations TensorFlow keeps one, and which one it fuses with a kernel's gradient differs
                # from process to process, and so does the rounding.
                x = x + ops.reshape(ops.cast(self.shortcut.bias, x.dtype), (1, 1, 1, -1))
        if kind in ("pool", "pad") and self.transpose:
            x = repeated(x, self.strides)
        if kind == "pad":
            missing = self.filters[-1] - x.shape[-1]
            x = ops.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing > 0 else x[..., : self.filters[-1]]
        return x

    def fast(self, x, training=None):
        """The same function in less time, for bottleneck blocks in order post.

        The widest tensors are the outputs of the last 1×1 and of the shortcut: where a normalisation follows a 1×1 of
        a narrow input, it is folded into the kernel. A strided 1×1 is computed only at the positions that it reads, a
        transposed one only where its output depends on the input; see `resnet_vae.normalization`.
        """
        upsamples, kind = self.transpose and self.strides != (1, 1), self.shortcut_kind
        if upsamples:
            y = self._upsampled(x, training)
        else:
            read = every(x, self.strides)
            y = pointwise(read, matrix(self.convolutions[0]))
            y = self.normalizations[0].biased(y, self.convolutions[0].bias, training)
            y = _without_bias(self.convolutions[1], ops.relu(y))
        y = ops.relu(self.normalizations[1].biased(y, self.convolutions[1].bias, training))
        shifts = []
        if upsamples and kind == "projection":
            x, constant = sparse(self.shortcut, self.shortcut_bn, x, training)
            x, shifts = insert_zeros(x, self.strides), [constant]
        elif kind in ("projection", "pool"):
            if not upsamples:
                x = read if kind == "projection" else averaged(x, self.strides)
            x, shifts = _normalized(self.shortcut, self.shortcut_bn, x, training)
            x = repeated(x, self.strides) if upsamples else x
        elif kind != "none":
            x = self._skip(x, training)
        last = self.convolutions[2], self.normalizations[2], y, training
        if self.learned_step:
            y, more = _normalized(*last)
            y, shifts = y * ops.cast(self.step, y.dtype), [*shifts, *(shift * self.step for shift in more)]
        else:
            y, shifts = _normalized(*last, shifts)
        y = y if kind == "none" else y + x
        return ops.relu(ops.add(y, ops.cast(sum(shifts), y.dtype)) if shifts else y)

    def _upsampled(self, x, training):
        """conv2's output without its bias, for a strided transposed conv1.

        Less a constant a channel, the image that conv2 sees is zero except at the positions of x: so conv2 of it is a
        strided transposed convolution of x's size. The constant's own convolution varies only at the border.
        """
        signal, constant = sparse(self.convolutions[0], self.normalizations[0], x, training)
        constant = ops.cast(constant, x.dtype)
        height, width = (side * stride for side, stride in zip(x.shape[1:3], self.strides, strict=True))
        kernel = ops.cast(self.convolutions[1].kernel, x.dtype)
        y = ops.relu(signal + constant) - ops.relu(constant)
        y = convolve_upsampled(y, kernel, self.strides)
        return y + convolved_constant(ops.relu(constant), kernel, height, width)

    def compute_output_shape(self, input_shape):
        return (*self.convolutions[0].compute_output_shape(input_shape)[:-1], self.filters[-1])

    def get_config(self):
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "strides": self.strides,
            "transpose": self.transpose,
            "shortcut": self.shortcut_kind,
            "order": self.order,
            "learned_step": self.learned_step,
            "gain": self.gain,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


def _floats(x, dtype):
    """x in the dtype if it is of whole numbers, which Keras leaves as they are."""
    return x if keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)) else ops.cast(x, dtype)


def _without_bias(convolution, x):
    """A convolution of x less its bias; a strided one of side 1 only at the positions that it reads or fills.

    TensorFlow's own, by oneDNN, has wrong gradients of the kernel where channels are few, and writes where it must not:
    https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    kernel, strides = ops.cast(convolution.kernel, x.dtype), convolution.strides
    transposed, strided = isinstance(convolution, layers.Conv2DTranspose), strides != (1, 1)
    if strided and convolution.kernel_size == (1, 1) and not (transposed and None in x.shape[1:3]):
        read = x if transposed else every(x, strides)
        x = pointwise(read, matrix(convolution))
        return insert_zeros(x, strides) if transposed else x
    if transposed:
        return convolve_transposed(x, kernel, strides)
    if strided:
        return ops.conv(x, kernel, strides, padding="same", data_format=convolution.data_format)
    return convolve(x, kernel)


def _normalized(convolution, normalization, x, training, shifts=()):
    """A 1×1 convolution of x, which holds only the positions that it reads, then its normalisation plus `shifts`.

    Not folded in bfloat16: the moments of exact outputs are not those of the rounded ones, and what is left of their
    difference, small as it is, adds up over all positions in the gradients.

    Returns:
        (batch, height, width, filters), and a list of what has yet to be added to it, (filters,) each.
    """
    if x.shape[-1] > FOLDED or keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        y = pointwise(x, matrix(convolution))
        return normalization.biased(y, convolution.bias, training, sum(shifts) if shifts else None), []
    folded, shift = fold(convolution, normalization, x, training)
    return pointwise(x, folded), [shift, *shifts]


@keras.saving.register_keras_serializable(PACKAGE)
class Repeated(layers.Layer):
    """`count` residual blocks of one shape in a row, computed as one block in a loop, on JAX from nine blocks on.

    So the time and the memory to trace and compile do not grow with their number. A weight is one variable for all
    blocks, of shape (count, …); `split` and `join` go over to single blocks and back. Single blocks it must be for
    what does not know loops: TFLite's converter, and forward-mode differentiation, `tf.autodiff.ForwardAccumulator` or
    on JAX on CPUs `jax.jvp`.

    Args:
        count: number of blocks.
        filters: of a block's convolutions; the input has the last as its number of channels.
        kernel_size: of a block.
        remat: keep only the blocks' inputs for the gradient and compute what is within a block a second time
            (https://arxiv.org/abs/1604.06174), when called with training=True and not frozen.
        **options: further ones of `ResidualBlock`, named in OPTIONS, and those of any layer.

    Input and output (batch, height, width, filters[-1]). It is frozen as a whole; `split` gives parts to freeze.

    Raises:
        ValueError: as of `ResidualBlock`, or fewer blocks than one; when it is built, other channels than filters[-1].
    """

    def __init__(self, count, filters, kernel_size=3, remat=False, **options):
        super().__init__(**{name: value for name, value in options.items() if name not in OPTIONS})
        self.input_spec = layers.InputSpec(ndim=4)
        self.count, self.remat = operator.index(count), remat
        if self.count < 1:
            raise ValueError(f"blocks {self.name!r}: their number is {count}; expected 1 or more")
        options = {name: value for name, value in options.items() if name in OPTIONS}
        self.momentum = options.pop("momentum", 0.99)
        # Without momentum, so that within the loop the moving averages are the batch's moments; they move after it.
        pattern = ResidualBlock(filters, kernel_size, momentum=0.0, dtype=self.dtype_policy, name="block", **options)
        self.pattern = lambda: pattern  # a function, so that Keras does not count the pattern's weights
        self._loops = {}  # by whether it is training

    def build(self, input_shape):
        pattern = self.pattern()
        if input_shape[-1] != pattern.filters[-1]:
            raise ValueError(
                f"blocks {self.name!r}: the input has {input_shape[-1]} channels and the last filters are "
                f"{pattern.filters[-1]}; they must be equal, or use conv_block before them"
            )
        self.input_spec = layers.InputSpec(ndim=4, axes={-1: input_shape[-1]})
        pattern.build(input_shape)
        self.stacks = [self._add_stack(weight) for weight in _weights(pattern)]

    def _add_stack(self, weight):
        pattern = self.pattern()
        convolutions = [*pattern.convolutions, *([pattern.shortcut] if pattern.shortcut else [])]
        kernels = {layer.name: layer.kernel_initializer for layer in convolutions}
        owner = weight.path.split("/")[-2]

        def initialize(shape, dtype=None):
            if weight.name == "kernel":  # the others start as constants
                return ops.stack([another(kernels[owner])(shape[1:], dtype) for _ in range(self.count)])
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
        training, trained = bool(training and self.trainable), len(self.pattern().trainable_variables)
        x = _floats(x, self.compute_dtype)
        stacks = self.stacks[:trained] if training else self.stacks
        x, moments = self._loop(training)(x, stacks)
        for stack, batch in zip(self.stacks[trained:] if training else (), moments, strict=True):
            stack.assign(self.momentum * stack + (1 - self.momentum) * batch)
        return x

    def _loop(self, training):
        """The blocks as a function of x and the stacks; layers that differ in their weights alone share its trace."""
        pattern, remat = self.pattern(), self.remat and training
        trained = len(pattern.trainable_variables)

        def loop(x, stacks):
            stacks = [ops.convert_to_tensor(stack) for stack in stacks]
            if not training:
                return scan(lambda x, each: (block(x, each[:trained], each[trained:])[0], []), x, stacks)
            initial = [ops.convert_to_tensor(weight) for weight in pattern.non_trainable_variables]
            return scan(lambda x, each: block(x, each, initial), x, stacks, initial, remat)

        def block(x, *weights):
            return pattern.stateless_call(*weights, x, training=training)

        if training not in self._loops:
            config = {**pattern.get_config(), "name": None}
            self._loops[training] = traced_once(loop, (json.dumps(config, default=str), training, remat))
        return self._loops[training]

    def compute_output_shape(self, input_shape):
        return input_shape

    def split(self):
        """The same as a list of `ResidualBlock` layers with weights of their own, to be called one after the other.

        Raises:
            ValueError: it has no weights yet.
        """
        self._check_built()
        blocks = []
        for number in range(self.count):
            config = {**self.pattern().get_config(), "momentum": self.momentum, "name": f"{self.name}_{number + 1}"}
            block = ResidualBlock.from_config(config)
            block.build((None, None, None, block.filters[-1]))
            block.trainable = self.trainable
            for weight, stack in zip(_weights(block), self.stacks, strict=True):
                weight.assign(stack[number])
            blocks.append(block)
        return blocks

    def join(self, blocks):
        """Take over the weights of `count` built `ResidualBlock` layers; the inverse of `split`.

        Raises:
            ValueError: it has no weights yet; another number of blocks, or weights of other numbers or shapes. It then
                keeps its own.
        """
        self._check_built()
        blocks = list(blocks)
        given = [[tuple(weight.shape) for weight in _weights(block)] for block in blocks]
        expected = [[tuple(stack.shape[1:]) for stack in self.stacks]] * self.count
        if given != expected:
            raise ValueError(f"blocks {self.name!r}: expected {self.count} built blocks with weights as `split` gives")
        for stack, *weights in zip(self.stacks, *map(_weights, blocks), strict=True):
            stack.assign(ops.concatenate([weight[None] for weight in weights]))

    def _check_built(self):
        if not self.built:
            raise ValueError(f"blocks {self.name!r} have no weights yet; call them on an image first")

    def get_config(self):
        pattern = self.pattern().get_config()
        return {
            **super().get_config(),
            "count": self.count,
            "remat": self.remat,
            **{name: pattern[name] for name in ("filters", "kernel_size", *OPTIONS)},
            "momentum": self.momentum,
        }


def _weights(block):
    """A block's weights, trained ones first, in one order whether or not they are frozen."""
    return sorted(block.weights, key=lambda weight: weight.name.startswith("moving_"))


def identity_block(x, kernel_size=3, filters=(64, 64, 256), **options):
    """Apply a residual block whose shortcut is the input itself.

    Args:
        x: tensor (batch, height, width, filters[-1]).
        kernel_size: k, of a bottleneck block's middle convolution or of both of a basic block's.
        filters: of the convolutions: three for a bottleneck block, two for a basic one.
        **options: further ones of `ResidualBlock`; shortcut "none" makes it a part of a plain network, which may
            change the channels.

    Returns:
        Tensor of the shape of `x`, but for shortcut "none", where it has filters[-1] channels.

    Raises:
        ValueError: as of `ResidualBlock`; the channels of `x` are not filters[-1].
    """
    return ResidualBlock(filters, kernel_size, **options)(x)


def conv_block(x, kernel_size=3, filters=(64, 64, 256), strides=(2, 2), transpose=False, **options):
    """Apply a residual block for changes of size or channels, by default with a strided 1×1 projection as its shortcut.

    Args:
        x: tensor (batch, height, width, channels).
        kernel_size: k, of a bottleneck block's middle convolution or of both of a basic block's.
        filters: of the convolutions: three for a bottleneck block, two for a basic one.
        strides: of the first convolution and of the shortcut.
        transpose: upsample by the strides instead of downsampling.
        **options: further ones of `ResidualBlock`, shortcut among them.

    Returns:
        Tensor (batch, height / strides[0], width / strides[1], filters[-1]), rounded up; times the strides with
        `transpose`.

    Raises:
        ValueError: as of `ResidualBlock`.
    """
    return ResidualBlock(filters, kernel_size, strides, transpose, **{"shortcut": "projection", **options})(x)
