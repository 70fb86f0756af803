"""The blocks against a float64 NumPy computation with the same weights."""

import contextlib
from functools import partial

import keras
import numpy as np
import pytest

from resnet_vae import blocks, initialization
from resnet_vae.blocks import Repeated, ResidualBlock, conv_block, identity_block
from resnet_vae.loop import traced_once
from resnet_vae.normalization import BatchNormalization, _batch_moments, fold

RNG = np.random.default_rng(0)
EPSILON = 0.1


def convolve(x, kernel, bias, stride=1):
    """Stride and "same" padding, by summing shifted images; kernels of side 1 and 3, sides a multiple of the stride."""
    side = kernel.shape[0]
    padded = np.pad(x, ((0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)))
    height, width = x.shape[1:3]
    total = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(side) for j in range(side))
    first = side // 2 - max(side - stride, 0) // 2  # where the first kernel lies; TensorFlow pads less at the beginning
    return total[:, first::stride, first::stride] + bias


def convolve_transposed(x, kernel, bias, stride):
    """A transposed convolution, "same": each position adds its multiple of the kernel to an upsampled image."""
    (batch, height, width, _), side = x.shape, kernel.shape[0]
    cut = max(side - stride, 0) // 2
    out = np.zeros((batch, (height + 1) * stride + side, (width + 1) * stride + side, kernel.shape[2]))
    for i in range(height):
        for j in range(width):  # Keras keeps transposed kernels as (h, w, out, in)
            block = np.einsum("bc,hwoc->bhwo", x[:, i, j], kernel)
            out[:, i * stride : i * stride + side, j * stride : j * stride + side] += block
    return out[:, cut : cut + height * stride, cut : cut + width * stride] + bias


def normalize(x, weights, training):
    gamma, beta, mean, variance = weights
    if training:
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return gamma * (x - mean) / np.sqrt(variance + EPSILON) + beta


def reference(block, x, training):
    def weights(layer):
        return [np.asarray(keras.ops.convert_to_numpy(w), "float64") for w in layer.weights]

    stride, pre = block.strides[0], block.order == "pre"
    strided = convolve_transposed if block.transpose else convolve
    y = skip = x
    for number, (convolution, normalization) in enumerate(zip(block.convolutions, block.normalizations, strict=True)):
        if pre:
            y = np.maximum(normalize(y, weights(normalization), training), 0)
            skip = y if number == 0 and block.shortcut is not None else skip
        kernel, bias = weights(convolution) if block.use_bias else (*weights(convolution), 0)
        y = strided(y, kernel, bias, stride) if number == 0 else convolve(y, kernel, bias)
        if not pre:
            y = normalize(y, weights(normalization), training)
            y = np.maximum(y, 0) if number < len(block.filters) - 1 else y
    if block.learned_step:
        y = y * keras.ops.convert_to_numpy(block.step)
    kind, (batch, height, width, channels) = block.shortcut_kind, skip.shape
    if kind == "pool" and not block.transpose:
        skip = skip.reshape(batch, height // stride, stride, width // stride, stride, channels).mean((2, 4))
    if kind == "projection":
        kernel, bias = weights(block.shortcut) if block.use_bias else (*weights(block.shortcut), 0)
        skip = strided(skip, kernel, bias, stride)
    if kind == "pool":
        skip = convolve(skip, *weights(block.shortcut))
    if block.shortcut_bn is not None:
        skip = normalize(skip, weights(block.shortcut_bn), training)
    if kind in ("pool", "pad") and block.transpose:
        skip = skip.repeat(stride, 1).repeat(stride, 2)
    if kind == "pad":
        skip = skip if block.transpose else skip[:, ::stride, ::stride]
        padded = np.zeros_like(y)
        count = min(y.shape[-1], channels)
        padded[..., :count] = skip[..., :count]
        skip = padded
    y = y if kind == "none" else y + skip
    return y if pre else np.maximum(y, 0)


CONV = {"filters": (3, 4, 8), "strides": (2, 2), "shortcut": "projection"}
UP = {**CONV, "transpose": True}
BASIC = {**CONV, "filters": (4, 8)}
KINDS = {
    "identity": {"filters": (3, 4, 6)},
    "conv": CONV,
    "conv, stride 1": {**CONV, "strides": (1, 1)},
    "transposed": UP,
    "pool": {**CONV, "shortcut": "pool"},
    "transposed, pool": {**UP, "shortcut": "pool"},
    "pad": {**CONV, "shortcut": "pad"},
    "transposed, pad": {**UP, "filters": (3, 4, 5), "shortcut": "pad"},
    "none": {**CONV, "shortcut": "none"},
    "transposed, none": {**UP, "shortcut": "none"},
    "learned step": {**CONV, "learned_step": True},
    "no biases": {**CONV, "use_bias": False},
}
PLAIN_KINDS = {
    "basic, identity": {"filters": (4, 6), "learned_step": True},
    "basic": BASIC,
    "basic, transposed": {**BASIC, "transpose": True},
    "pre, identity": {"filters": (3, 4, 6), "order": "pre"},
    "pre": {**CONV, "order": "pre"},
    "pre, basic, transposed, pool": {**BASIC, "transpose": True, "shortcut": "pool", "order": "pre"},
    "pre, basic, pad": {**BASIC, "shortcut": "pad", "order": "pre"},
    "pre, none": {**CONV, "shortcut": "none", "order": "pre"},
    "pre, learned step": {**CONV, "order": "pre", "learned_step": True},
}
FAST_KINDS = {
    "conv, narrow": {**CONV, "filters": (3, 4, 24)},
    "transposed, narrow": {**UP, "filters": (3, 4, 24), "strides": (1, 1)},
    "transposed, kernel 2": {**UP, "kernel_size": 2, "strides": (1, 2)},
    "transposed, kernel 4": {**UP, "kernel_size": 4},
    "transposed, kernel 5": {**UP, "kernel_size": 5, "strides": (2, 3)},
    "transposed, no biases, learned step": {**UP, "use_bias": False, "learned_step": True},
}


def make_block(kind, dtype):
    options = {**KINDS, **PLAIN_KINDS, **FAST_KINDS}[kind]
    block = ResidualBlock(**options, epsilon=EPSILON, dtype=dtype, name="block")
    block.build((None, 6, 8, 6))
    for weight in block.weights:  # nothing at its initial zero or one
        low = 0.5 if "variance" in weight.path or "gamma" in weight.path else -0.5
        weight.assign(RNG.uniform(low, low + 1, weight.shape))
    return block


PRECISIONS = [("float32", 2e-5)]
if keras.backend.backend() != "torch":  # where Keras computes parts of a float64 layer in float32
    PRECISIONS.append(("float64", 1e-12))


def computing_in(dtype):
    """A context in which a backend computes in a dtype; JAX has float64 only where it is told to."""
    if keras.backend.backend() != "jax" or dtype != "float64":
        return contextlib.nullcontext()
    import jax

    return jax.enable_x64(True)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *PLAIN_KINDS])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_block_is_what_numpy_computes(kind, training, dtype, tolerance):
    x = RNG.standard_normal((4, 6, 8, 6)).astype(dtype)
    with computing_in(dtype):
        block = make_block(kind, dtype)
        expected = reference(block, x.astype("float64"), training)
        output = keras.ops.convert_to_numpy(block(x, training=training))
    assert output.shape == block.compute_output_shape(x.shape) == expected.shape
    np.testing.assert_allclose(output, expected, rtol=tolerance, atol=tolerance * 10)


SHAPES = [(6, 8, 6), (2, 2, 6), (1, 1, 6)]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="float64 gradients as TensorFlow has them")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *FAST_KINDS])
@pytest.mark.parametrize("folded", [True, False])
def test_fast_block_is_the_plain_one(kind, shape, training, folded, monkeypatch):
    """Output, all gradients and the moving statistics of the fast computation in float64, folded and not."""
    monkeypatch.setattr(blocks, "FOLDED", blocks.FOLDED if folded else 0)
    import tensorflow as tf

    block, results = make_block(kind, "float64"), []
    state = block.get_weights()
    x, weights = (tf.constant(RNG.standard_normal((4, *size))) for size in (shape, (1, 1, 1)))
    for compute in (block.plain, block.call):
        block.set_weights(state)
        with tf.GradientTape() as tape:
            tape.watch(x)
            output = compute(x, training=training)
            total = tf.reduce_sum(weights * tf.square(output))
        parameters = [weight.value for weight in block.trainable_weights]
        gradients = tape.gradient(total, [x, *parameters], unconnected_gradients="zero")
        results.append([*gradients, output, *block.get_weights()])
    largest = max(np.abs(gradient).max() for gradient in results[0][: len(gradients)])
    for number, (plain, fast) in enumerate(zip(*results, strict=True)):
        # A bias before a normalisation has a gradient of zero, of which the plain block leaves rounding errors.
        zero = number < len(gradients) and not np.any(fast)
        scale = max(1, largest if zero else np.abs(plain).max())
        np.testing.assert_allclose(fast, plain, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("kind", ["conv", "transposed"])
def test_fast_block_of_images_far_from_zero(kind):
    """In float32 a mean a hundred times the spread costs the fast way no more than the plain one."""
    x = 300 + RNG.standard_normal((8, 6, 8, 6))
    block = make_block(kind, "float32")
    exact = reference(block, x, True)
    fast, plain = (
        keras.ops.convert_to_numpy(way(keras.ops.convert_to_tensor(x, "float32"), training=True))
        for way in (block.fast, block.plain)
    )
    assert np.abs(fast - exact).max() < 0.02
    assert np.abs(fast - exact).max() < 3 * np.abs(plain - exact).max() + 1e-4


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="second derivatives as TensorFlow has them")
@pytest.mark.parametrize("shape", [(12, 3), (4, 2, 2, 3)], ids=str)
def test_second_derivatives_of_a_normalization(shape):
    """The derivative of a gradient in a direction, in float64, is that of finite differences."""
    import tensorflow as tf

    layer = BatchNormalization(dtype="float64")
    layer.build(shape)
    x, direction = (tf.constant(RNG.standard_normal(shape)) for _ in range(2))

    def gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(tf.tanh(layer(x, training=True)) ** 2)
        return tape.gradient(total, x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        along = tf.reduce_sum(gradient(x) * direction)
    step = 1e-5
    expected = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(tape.gradient(along, x), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow with oneDNN")
@pytest.mark.parametrize("kind", ["conv", "transposed", "basic", "basic, transposed", "pre", "pool"])
def test_gradients_in_float32_are_those_in_float64(kind):
    """Few channels and a strided 1×1, of which oneDNN's weight gradients are wrong, or end the process."""
    import tensorflow as tf

    blocks = {dtype: make_block(kind, dtype) for dtype in ("float32", "float64")}
    blocks["float64"].set_weights(blocks["float32"].get_weights())
    x, results = RNG.standard_normal((8, 16, 16, 6)), []
    for dtype, block in blocks.items():

        @tf.function
        def gradients(images, block=block):
            with tf.GradientTape() as tape:
                tape.watch(images)
                total = tf.reduce_mean(tf.square(block.plain(images, training=True)))
            return tape.gradient(total, [images, *(weight.value for weight in block.trainable_weights)])

        results.append(gradients(tf.constant(x, dtype)))
    for single, double in zip(*results, strict=True):
        np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-3 * np.abs(double).max() + 1e-4)


@pytest.mark.parametrize(
    ("options", "short"),
    [
        ({}, 8),
        ({}, 0),
        ({"remat": True}, 8),
        ({"filters": (4, 6), "order": "pre", "learned_step": True}, 8),
        ({"shortcut": "none"}, 0),
    ],
    ids=["plain", "plain, as a loop", "remat", "basic, pre, learned step", "no shortcut"],
)
def test_repeated_blocks_are_single_ones_in_a_row(options, short, monkeypatch):
    """Outputs in training and after, moving statistics and the steps of an optimizer; split and join.

    Of two rows of one shape, which may share all but their weights.
    """
    if not options and not short and keras.backend.backend() != "jax":
        pytest.skip("of JAX's short loops")
    monkeypatch.setattr("resnet_vae.loop.SHORT", short)
    keras.utils.set_random_seed(3)
    image = keras.Input((4, 6, 6))
    loops = [Repeated(3, **{"filters": (3, 4, 6), "gain": 0.5, "momentum": 0.8, **options}) for _ in range(2)]
    looped = keras.Model(image, loops[1](loops[0](image)))
    kernels = keras.ops.convert_to_numpy(next(stack for stack in loops[0].stacks if "conv1_kernel" in stack.path))
    assert kernels.shape[0] == 3
    assert np.abs(kernels[0] - kernels[1]).min() > 0
    assert 0.4 < kernels.std() / np.sqrt(2 / np.prod(kernels.shape[1:4])) < 1.6  # he_normal's
    rows, y = [loop.split() for loop in loops], image
    for row in rows:
        for block in row:
            y = block(y)
    chained = keras.Model(image, y)

    x = RNG.standard_normal((5, 4, 6, 6)).astype("float32")
    y = RNG.standard_normal((5, 4, 6, 6)).astype("float32")
    for model in (looped, chained):
        model.compile(keras.optimizers.SGD(0.02), "mse")
        for _ in range(3):
            model.train_on_batch(x, y)
    single = chained.predict(x, verbose=0)
    np.testing.assert_allclose(looped.predict(x, verbose=0), single, rtol=2e-4, atol=2e-5)
    for loop, row in zip(loops, rows, strict=True):
        trained = [keras.ops.convert_to_numpy(stack) for stack in loop.stacks]
        loop.join(row)
        for stack, before in zip(loop.stacks, trained, strict=True):
            np.testing.assert_allclose(keras.ops.convert_to_numpy(stack), before, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("shortcut", ["projection", "pool"])
def test_repeated_blocks_may_have_kernels_in_their_shortcuts(shortcut):
    loop = Repeated(3, (3, 4, 6), shortcut=shortcut, gain=1.0)
    x = y = keras.ops.convert_to_tensor(RNG.standard_normal((2, 4, 6, 6)).astype("float32"))
    looped = loop(x)
    (kernels,) = (keras.ops.convert_to_numpy(stack) for stack in loop.stacks if stack.name == "shortcut_kernel")
    assert 0.5 < kernels.std() / np.sqrt(2 / 6) < 1.5  # he_normal's
    for block in loop.split():
        y = block(y)
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (looped, y)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", ["loaded", "cloned"])
def test_frozen_blocks_stay_frozen(again, tmp_path):
    image = keras.Input((4, 4, 6))
    frozen = [
        ResidualBlock((2, 2, 6), shortcut="projection", learned_step=True, name="frozen"),
        Repeated(2, (2, 2, 6), name="row"),
    ]
    model = keras.Model(image, identity_block(frozen[1](frozen[0](image)), 3, (2, 2, 6)))
    for block in frozen:
        block.trainable = False
    trained = [len(model.trainable_variables)]
    model.save(tmp_path / "model.keras")
    same = keras.models.clone_model(model) if again == "cloned" else keras.saving.load_model(tmp_path / "model.keras")
    trained.append(len(same.trainable_variables))
    for name in ("frozen", "row"):
        same.get_layer(name).trainable = True
    assert [*trained, len(same.trainable_variables)] == [12, 12, 12 + 17 + 12]


@pytest.mark.parametrize("kind", ["down", "up", "repeated"])
def test_a_frozen_block_computes_in_training_as_otherwise(kind):
    """With its moving averages, which stay as they are, also where normalisations are folded into convolutions."""
    if kind == "repeated":
        block = Repeated(2, (3, 4, 5), gain=1.0)
    else:
        block = ResidualBlock((3, 4, 8), strides=2, transpose=kind == "up", shortcut="projection", gain=1.0)
    x = RNG.standard_normal((3, 6, 4, 5)).astype("float32")
    block(x, training=True)
    block.trainable = False
    before, expected = block.get_weights(), keras.ops.convert_to_numpy(block(x, training=False))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(block(x, training=True)), expected)
    for value, former in zip(block.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, former)


def test_frozen_blocks_are_split_and_joined_like_others():
    loop = Repeated(2, (3, 4, 6))
    loop.build((None, 4, 6, 6))
    before = loop.get_weights()
    blocks_ = loop.split()
    blocks_[0].trainable = False
    loop.join(blocks_)
    loop.trainable = False
    assert [block.trainable for block in loop.split()] == [False, False]
    for weight, value in zip(loop.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_blocks_take_whole_numbers():
    """As they take the same numbers as floats."""
    images = RNG.integers(0, 256, (2, 8, 8, 6), "uint8")
    for block in (Repeated(3, (2, 2, 6)), ResidualBlock((2, 2, 6))):
        outputs = [keras.ops.convert_to_numpy(block(x)) for x in (images.astype("float32"), images)]
        np.testing.assert_array_equal(*outputs)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="traces are shared on TensorFlow")
def test_repeated_blocks_train_with_xla_after_they_trained_without():
    """Their loop is another one there, with the same loss, gradients and averages."""
    image = keras.Input((8, 8, 6))
    model = keras.Model(image, keras.layers.GlobalAveragePooling2D()(Repeated(3, (2, 2, 6), gain=0.5)(image)))
    images, targets = RNG.standard_normal((4, 8, 8, 6)).astype("float32"), np.ones((4, 6))
    start, losses, trained = model.get_weights(), [], []
    for jit_compile in (False, True):
        model.set_weights(start)
        model.compile("sgd", "mse", jit_compile=jit_compile)
        losses.append(model.train_on_batch(images, targets))
        trained.append([after - before for after, before in zip(model.get_weights(), start, strict=True)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for one, other in zip(*trained, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-6)
    moved = {weight.path: np.abs(step).max() for weight, step in zip(model.weights, trained[0], strict=True)}
    assert min(step for path, step in moved.items() if "bias" not in path) > 0


def test_repeated_blocks_from_their_configuration():
    config = {"remat": True, "momentum": 0.8, "gain": 0.5, "order": "pre", "epsilon": 0.01, "learned_step": True}
    loop = Repeated(3, (3, 4, 6), 5, **config, use_bias=False, dtype="mixed_bfloat16")
    same = Repeated.from_config(loop.get_config())
    assert (same.remat, same.momentum, same.count) == (True, 0.8, 3)
    for each in (loop, same):
        block = each.pattern()
        assert (block.compute_dtype, block.kernel_size, block.filters) == ("bfloat16", 5, (3, 4, 6))
        assert {name: getattr(block, name) for name in config if name not in ("remat", "momentum")} == {
            name: value for name, value in config.items() if name not in ("remat", "momentum")
        }
        assert not block.use_bias


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's loops and its eager functions")
def test_a_loop_may_be_run_eagerly():
    """As to look into it: with the gradients of a graph, also those of remat."""
    import tensorflow as tf

    loop, x = Repeated(3, (3, 4, 6), remat=True, gain=0.5), tf.constant(RNG.standard_normal((2, 4, 4, 6)), "float32")
    loop.build(x.shape)

    def gradients():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(loop(x, training=True) ** 2)
        return tape.gradient(loss, [weight.value for weight in loop.trainable_weights])

    expected = tf.function(gradients)()
    tf.config.run_functions_eagerly(True)
    try:
        for one, other in zip(gradients(), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's loops; JAX has jax.checkpoint")
def test_remat_computes_a_second_time_what_is_not_kept(monkeypatch):
    """Also after a loop of the same shape that keeps it."""
    import tensorflow as tf

    calls, call = [], ResidualBlock.call
    monkeypatch.setattr(ResidualBlock, "call", lambda *args, **options: calls.append(1) or call(*args, **options))
    x, counts = tf.constant(RNG.standard_normal((2, 4, 4, 6)), "float32"), []
    for remat in (False, True):
        loop = Repeated(3, (3, 4, 6), remat=remat)
        loop.build(x.shape)

        @tf.function
        def gradient(x, loop=loop):
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = tf.reduce_sum(loop(x, training=True))
            return tape.gradient(total, x)

        calls.clear()
        gradient(x)
        counts.append(len(calls))
    assert counts == [1, 2]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's traces")
def test_loops_of_one_shape_are_traced_once():
    traces = []

    def add_up(x, stacks):
        traces.append(x.shape)
        return x + stacks[0]

    x = keras.ops.ones((2, 3))
    first, second, other = (traced_once(add_up, key) for key in ("same", "same", "another"))
    for added in (x, keras.Variable(5 * x)):
        for function in (first, second, other):
            np.testing.assert_array_equal(function(x, [added]), x + added)
    assert traces == [(2, 3)] * 2


@pytest.mark.parametrize("kind", ["identity", "transposed"])
def test_block_in_bfloat16_is_close(kind):
    block = make_block(kind, "mixed_bfloat16")
    x = RNG.standard_normal((4, 6, 8, 6)).astype("float32")
    expected = reference(block, x.astype("float64"), True)
    output = keras.ops.convert_to_numpy(keras.ops.cast(block(x, training=True), "float32"))
    assert np.abs(output - expected).mean() < 0.02 * np.abs(expected).mean()


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="gradients as TensorFlow and JAX have them")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", ["conv", "transposed", "pool", "transposed, pool", "basic", "pre"])
def test_a_bias_before_a_normalisation_stays(kind, dtype):
    """Its gradient is exactly zero, or else Adam makes steps of rounding errors."""
    block, x = make_block(kind, dtype), RNG.standard_normal((4, 6, 8, 6)).astype("float32")

    def total(weights):
        fixed = [weight.value for weight in block.non_trainable_variables]
        output, _ = block.stateless_call(weights, fixed, x, training=True)
        return keras.ops.sum(keras.ops.square(keras.ops.cast(output, "float32")))

    weights = [weight.value for weight in block.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        gradients = jax.grad(total)(weights)
    else:
        import tensorflow as tf

        weights = [tf.constant(weight) for weight in weights]
        with tf.GradientTape() as tape:
            tape.watch(weights)
            loss = total(weights)
        gradients = tape.gradient(loss, weights)
    biases = [layer.bias for layer in block.convolutions]
    if block.order == "post":
        biases.append(block.shortcut.bias)
    else:
        biases.pop()  # after the last there is none
    paths = {bias.path for bias in biases}
    for weight, gradient in zip(block.trainable_variables, gradients, strict=True):
        assert np.any(keras.ops.convert_to_numpy(gradient)) == (weight.path not in paths)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's own gradient")
def test_gradient_of_moments_in_bfloat16():
    """It has no part that is the same at all positions, where what is left of rounding would add up."""
    import tensorflow as tf

    x, weights = tf.constant(RNG.standard_normal((16, 16, 16, 8)) + 3, "bfloat16"), RNG.standard_normal(8)
    results = []
    for dtype in ("float64", "bfloat16"):
        images = tf.cast(x, dtype)
        with tf.GradientTape() as tape:
            tape.watch(images)
            _, variance = _batch_moments(images, covariance=False)
            total = tf.reduce_sum(variance * tf.constant(weights, variance.dtype))
        results.append(tf.cast(tape.gradient(total, images), "float64").numpy())
    exact, rounded = results
    assert np.abs(rounded.mean((0, 1, 2))).max() < 2e-3 * np.sqrt(np.square(exact).mean())
    assert np.square(rounded - exact).mean() < 0.01**2 * np.square(exact).mean()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="float64 gradients as TensorFlow has them")
def test_gradients_of_a_normalized_convolution_in_bfloat16():
    """What is rounded must not add up over the positions; the inputs lie far from zero for their spread."""
    import tensorflow as tf

    x, kernel = np.maximum(RNG.standard_normal((16, 16, 16, 8)) + 2, 0), RNG.standard_normal((1, 1, 8, 32)) / 2
    weights, results = RNG.standard_normal((16, 16, 16, 32)), []
    for dtype in ("float64", "bfloat16"):
        policy = dtype if dtype == "float64" else "mixed_bfloat16"
        convolution = keras.layers.Conv2D(32, 1, dtype=policy)
        normalization = BatchNormalization(dtype=policy)
        convolution.build((None, 16, 16, 8))
        convolution.kernel.assign(kernel)
        normalization.build((None, 16, 16, 32))
        images = tf.constant(x, dtype)
        with tf.GradientTape() as tape:
            tape.watch(images)
            output, shifts = blocks._normalized(convolution, normalization, images, training=True)
            output += tf.cast(sum(shifts), dtype)
        sources = [images, convolution.kernel.value]
        gradients = tape.gradient(output, sources, tf.constant(weights, dtype))
        results.append([tf.cast(value, "float64").numpy() for value in (output, *gradients)])
    for exact, rounded in zip(*results, strict=True):
        assert np.square(rounded - exact).mean() < 0.02**2 * np.square(exact).mean()
    for exact, rounded in list(zip(*results, strict=True))[:2]:  # of these the sum over the positions is zero
        assert np.abs(rounded.mean((0, 1, 2))).max() < 1e-3 * np.sqrt(np.square(exact).mean())


@pytest.mark.parametrize("options", [{**BASIC, "strides": 1}, {**CONV, "strides": 1}, UP])
@pytest.mark.parametrize("training", [False, True])
def test_grey_levels_are_numbers_like_others(options, training):
    """uint8, as Keras's layers take it, and half precision throughout."""
    levels = RNG.integers(0, 256, (4, 8, 8, 3)).astype("uint8")
    block = ResidualBlock(**options, gain=1.0)
    outputs = [keras.ops.convert_to_numpy(block(x, training=training)) for x in (levels, levels.astype("float32"))]
    np.testing.assert_array_equal(*outputs)
    layer = BatchNormalization()
    outputs = [keras.ops.convert_to_numpy(layer(x, training=training)) for x in (levels, levels.astype("float32"))]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)
    for dtype, error in (("float16", 0.02), ("bfloat16", 0.1)):
        half = ResidualBlock(**options, gain=1.0, dtype=dtype)
        half.build((None, 8, 8, 3))
        for weight, source in zip(half.weights, block.weights, strict=True):
            weight.assign(keras.ops.cast(source, dtype))
        x = keras.ops.cast(levels / 255, dtype)
        outputs = [keras.ops.cast(each(x, training=training), "float32") for each in (half, block)]
        half, exact = map(keras.ops.convert_to_numpy, outputs)
        assert np.abs(half - exact).mean() < error * np.abs(exact).mean()


class Unregistered(keras.initializers.VarianceScaling):
    """One that Keras cannot find by its name."""

    def __init__(self, seed=None):
        super().__init__(0.5, "fan_in", "uniform", seed)
        self.given = seed

    def get_config(self):
        return {"seed": self.given}


class WithoutConfig(keras.initializers.Initializer):
    """One that Keras cannot clone."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, shape, dtype=None):
        return self.scale * keras.random.normal(shape, dtype=dtype)


INITIALIZERS = {
    "name": lambda: "he_normal",
    "object": keras.initializers.HeNormal,
    "generator": lambda: keras.initializers.HeNormal(keras.random.SeedGenerator(1)),
    "unregistered": Unregistered,
    "without config": lambda: WithoutConfig(0.1),
}


@pytest.mark.parametrize("filters", [(8, 8), (8, 8, 8)])
@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_no_two_kernels_start_equal(initializer, filters):
    """Though one initializer draws the same numbers whenever it is called; in a block, and in those of a loop."""
    block = ResidualBlock(filters, 1, shortcut="projection", kernel_initializer=INITIALIZERS[initializer]())
    loop = Repeated(3, filters, 1, kernel_initializer=INITIALIZERS[initializer]())
    for layer in (block, loop):
        layer.build((None, 8, 8, 8))
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in (*block.convolutions, block.shortcut)]
    stacks = [keras.ops.convert_to_numpy(stack) for stack in loop.stacks if len(stack.shape) == 5]
    for drawn in (kernels, [kernel for stack in stacks for kernel in stack]):
        assert len(drawn) > len(filters)
        assert len({kernel.tobytes() for kernel in drawn}) == len(drawn)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="elsewhere they are Keras's own")
@pytest.mark.parametrize(
    ("mode", "distribution"),
    [("fan_in", "truncated_normal"), ("fan_out", "untruncated_normal"), ("fan_avg", "uniform")],
)
def test_kernels_start_with_the_numbers_that_keras_draws(monkeypatch, mode, distribution):
    """Also kernels of another length than is drawn, and within a function that JAX traces."""
    import jax

    monkeypatch.setattr(initialization, "LENGTHS", (2**9, 2**11))
    theirs = keras.initializers.VarianceScaling(2.0, mode, distribution)
    ours = initialization.compiled_once(theirs)
    assert isinstance(ours, initialization.CompiledOnce)
    for shape in [(8, 12), (3, 3, 8, 12), (3, 3, 16, 24)]:
        expected = np.asarray(theirs(shape, "float32"))
        np.testing.assert_allclose(ours(shape, "float32"), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda: ours(shape, "float32"))(), expected, rtol=1e-6)
    with jax.threefry_partitionable(False):  # where the numbers depend on how many are drawn
        assert initialization.compiled_once(theirs) is theirs


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": False}, {"center": False}, {"renorm": True}, {"dtype": "bfloat16"}, {"epsilon": 1.0}, {"axis": 1}],
    ids=str,
)
def test_batch_normalization_is_kerass_own(options):
    """Outputs and moving statistics, against the layer it takes the place of; some channels lie far from zero."""
    kinds = BatchNormalization, keras.layers.BatchNormalization
    ours, theirs = (kind(**{"momentum": 0.8, **options}) for kind in kinds)
    for layer in (ours, theirs):
        layer.build((None, 5, 3, 5))
        for weight in (layer.gamma, layer.beta):
            if weight is not None:
                weight.assign(np.linspace(0.5, 2, 5))
    for _ in range(3):
        x = (RNG.standard_normal((2, 5, 3, 5)) * 3 + (1, 300, -300, 0, 30)).astype("float32")
        for training in (True, False):
            outputs = [keras.ops.cast(layer(x, training=training), "float32") for layer in (ours, theirs)]
            np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, outputs), rtol=1e-4, atol=1e-4)
    for ours_weight, theirs_weight in zip(ours.weights, theirs.weights, strict=True):
        weights = [keras.ops.cast(weight, "float32") for weight in (ours_weight, theirs_weight)]
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, weights), rtol=1e-5, atol=1e-6)


def normalized(layer, call, sources, weights):
    """An output, its gradients by inputs, bias, gamma and beta, and the layer's moving statistics after it."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        inputs, bias = (tf.constant(source) for source in sources)
        with tf.GradientTape() as tape:
            tape.watch([inputs, bias])
            output = call(inputs, bias)
        sources = [inputs, bias, layer.gamma.value, layer.beta.value]
        gradients = tape.gradient(output, sources, tf.constant(weights))
    else:
        import jax

        def total(inputs, bias, gamma, beta):
            with keras.StatelessScope([(layer.gamma, gamma), (layer.beta, beta)]) as scope:
                output = call(inputs, bias)
            moving = [scope.get_current_value(moving) for moving in layer.non_trainable_variables]
            return (output * weights).sum(), (output, moving)

        sources = [*sources, layer.gamma.value, layer.beta.value]
        gradients, (output, moving) = jax.grad(total, (0, 1, 2, 3), has_aux=True)(*sources)
        for variable, value in zip(layer.non_trainable_variables, moving, strict=True):
            if value is not None:
                variable.assign(value)
    return [np.array(each) for each in (output, *gradients, *layer.non_trainable_variables)]


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="gradients as TensorFlow and JAX have them")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(4, 3, 3, 5), (9, 5)])
def test_bias_before_a_normalization(dtype, shape):
    """Outputs, statistics and gradients are those of a bias that is added, but for its own in training, which is 0."""
    x, weights = RNG.standard_normal((2, *shape)).astype(dtype)
    bias = np.linspace(-2, 3, 5).astype(dtype)
    with computing_in(dtype):
        compare_biased(dtype, shape, x, bias, weights)


def compare_biased(dtype, shape, x, bias, weights):
    ours, theirs = (kind(momentum=0.8, dtype=dtype) for kind in (BatchNormalization, keras.layers.BatchNormalization))
    for layer in (ours, theirs):
        layer.build((None, *shape[1:]))
        layer.gamma.assign(np.linspace(0.5, 2, 5))
    exact = dtype == "float64" and keras.backend.backend() == "tensorflow"  # on JAX Keras's own is in part in float32
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if exact else {"rtol": 1e-4, "atol": 1e-5}
    for training, trainable in ((True, True), (False, True), (True, False)):
        ours.trainable = theirs.trainable = trainable
        results = [
            normalized(ours, lambda x, bias: ours.biased(x, bias, training), (x, bias), weights),  # noqa: B023
            normalized(theirs, lambda x, bias: theirs(x + bias, training=training), (x, bias), weights),  # noqa: B023
        ]
        if training and trainable:
            np.testing.assert_array_equal(results[0].pop(2), 0)
            assert np.abs(results[1].pop(2)).max() < 1e-4
        for value, expected in zip(*results, strict=True):
            np.testing.assert_allclose(value, expected, **tolerance)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's fused operation")
def test_fixed_statistics_are_not_fused_on_gpus(monkeypatch):
    """There the fused operation's gradient is an error where TensorFlow is to be deterministic, as `train` asks it."""
    import tensorflow as tf

    monkeypatch.setattr("resnet_vae.devices._gpus", list)
    x = RNG.standard_normal((4, 3, 3, 5)).astype("float32")
    layer, fused, normalize = BatchNormalization(), [], tf.compat.v1.nn.fused_batch_norm
    monkeypatch.setattr(tf.compat.v1.nn, "fused_batch_norm", lambda *a, **k: fused.append(1) or normalize(*a, **k))
    layer(x, training=True)
    expected = layer(x)
    assert len(fused) == 2
    monkeypatch.setattr("resnet_vae.devices._gpus", lambda: [("a GPU", (9, 0))])
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert len(fused) == 2
    layer(x, training=True)
    assert len(fused) == 3


def test_blocks_start_as_their_shortcuts():
    x = np.abs(RNG.standard_normal((2, 4, 4, 8))).astype("float32")
    for options in ({}, {"gain": 0.0}, {"gain": 0.0, "order": "pre"}):
        output = identity_block(x, 3, (2, 2, 8), **options)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(output), x)
    assert ResidualBlock((2, 2, 8), shortcut="none").gain == 1
    image = keras.Input((4, 4, 8))
    layer = keras.Model(image, conv_block(image, 3, (2, 2, 8))).layers[-1]
    assert (layer.shortcut_kind, layer.strides) == ("projection", (2, 2))


def test_shapes_and_the_wrong_channels():
    image = keras.Input((8, 12, 6))
    assert conv_block(image, 3, (2, 2, 10)).shape == (None, 4, 6, 10)
    assert conv_block(image, 3, (2, 2, 10), strides=(1, 1)).shape == (None, 8, 12, 10)
    assert conv_block(image, 3, (2, 2, 10), transpose=True).shape == (None, 16, 24, 10)
    for policy in ("float32", "mixed_bfloat16"):
        unknown = conv_block(keras.Input((None, None, 6)), 3, (2, 2, 10), transpose=True, dtype=policy)
        assert unknown.shape == (None, None, None, 10)
    assert identity_block(image, 3, (2, 2, 6)).shape == (None, 8, 12, 6)
    for shortcut in ("projection", "pool", "pad"):
        for transpose, shape in ((True, (None, 8, 24, 10)), (False, (None, 8, 6, 10))):
            y = conv_block(image, 3, (2, 2, 10), strides=(1, 2), transpose=transpose, shortcut=shortcut)
            assert y.shape == shape
    assert conv_block(image, (3, 3), [2, 2, 10], strides=4).shape == (None, 2, 3, 10)
    assert conv_block(image, np.int64(3), np.array([2, 2, 10]), np.int32(4)).shape == (None, 2, 3, 10)
    for options, told in (
        ({"shortcut": "some"}, "shortcut is 'some'; expected one of identity, projection, pool, pad, none"),
        ({"order": "last"}, "order is 'last'; expected one of post, pre"),
        ({"filters": 6}, r"filters is \(6,\); expected 2 or 3 numbers"),
        ({"kernel_size": (3, 5)}, r"kernel_size is \(3, 5\); expected one side"),
        ({"strides": (1, 1, 1)}, r"strides is \(1, 1, 1\); expected one number, or two"),
    ):
        with pytest.raises(ValueError, match=told):
            identity_block(image, **{"filters": (2, 2, 6), **options})
    with pytest.raises(ValueError, match="the input has 6 channels and the last filters are 7"):
        identity_block(image, 3, (2, 2, 7))
    for shortcut in ("identity", "none"):
        with pytest.raises(ValueError, match="the input has 6 channels and the last filters are 7"):
            Repeated(2, (2, 2, 7), shortcut=shortcut)(image)
    with pytest.raises(ValueError, match="their number is 0; expected 1 or more"):
        Repeated(0, (2, 2, 6))
    with pytest.raises(ValueError, match=r"strides \(2, 2\) change the size, which the shortcut 'identity' cannot"):
        identity_block(image, 3, (2, 2, 6), strides=2)


@pytest.mark.parametrize("kind", [ResidualBlock, partial(Repeated, 2)])
def test_an_input_of_other_channels_or_axes_is_refused(kind):
    """Else a convolution might take the channels for groups, in silence."""
    block = kind((3, 6), shortcut="none")
    block(np.zeros((1, 4, 4, 6), "float32"))
    for given in (np.zeros((1, 4, 4, 12), "float32"), keras.Input((4, 4, 12))):
        with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
            block(given)
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        kind((3, 6))(keras.Input((4, 6)))


def test_blocks_without_weights_or_of_others_are_not_split_or_joined():
    loop, other = Repeated(2, (2, 2, 6)), Repeated(2, (2, 3, 6), shortcut="none")
    with pytest.raises(ValueError, match="have no weights yet"):
        loop.split()
    for each in (loop, other):
        each(np.zeros((1, 4, 4, 6), "float32"))
    before = [keras.ops.convert_to_numpy(stack) for stack in loop.stacks]
    for given in (loop.split()[:1], [ResidualBlock((2, 2, 6))] * 2, other.split()):
        with pytest.raises(ValueError, match="expected 2 built blocks with weights as `split` gives"):
            loop.join(given)
    for stack, value in zip(loop.stacks, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(stack), value)


def test_a_convolution_within_a_block_can_be_made_anew():
    """From its own configuration, with the initializer that on JAX compiles once."""
    convolution = ResidualBlock((2, 2, 6), kernel_initializer=keras.initializers.HeNormal(seed=3)).convolutions[1]
    same = keras.layers.Conv2D.from_config(convolution.get_config())
    for layer in (convolution, same):
        layer.build((None, 4, 4, 2))
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (convolution.kernel, same.kernel)))


def test_the_other_order_of_axes_is_refused():
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match=r"need 'channels_last': keras.config.set_image_data_format"):
            ResidualBlock((2, 2, 6))
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.parametrize("shortcut", ["projection", "pool", "pad", "none"])
def test_a_block_that_is_there_keeps_its_order_of_axes(shortcut):
    """As Keras's own layers do."""
    x = RNG.standard_normal((2, 6, 6, 6)).astype("float32")
    options = {"shortcut": shortcut, "gain": 0.5}
    layers = [ResidualBlock((2, 2, 6), strides=2, **options), ResidualBlock((6, 6), strides=2, **options)]
    layers += [ResidualBlock((2, 2, 6), strides=2, transpose=True, **options), Repeated(3, (2, 2, 6), gain=0.5)]
    expected = [keras.ops.convert_to_numpy(layer(x)) for layer in layers]
    keras.config.set_image_data_format("channels_first")
    try:
        for layer, output in zip(layers, expected, strict=True):
            np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x)), output, rtol=1e-5, atol=1e-6)
    finally:
        keras.config.set_image_data_format("channels_last")


def _traced_gradient(loop, x):
    """The gradient on JAX of a built loop's weights as a function of them, the weights, and the loops in its trace."""
    import jax

    moving = [variable.value for variable in loop.non_trainable_variables]

    def loss(weights):
        return (loop.stateless_call(weights, moving, x, training=True)[0].astype("float32") ** 2).sum()

    def loops(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation
            for value in equation.params.values():
                yield from loops(getattr(value, "jaxpr", value)) if hasattr(value, "eqns") else ()

    weights = [variable.value for variable in loop.trainable_variables]
    return jax.grad(loss), weights, list(loops(jax.make_jaxpr(jax.grad(loss))(weights).jaxpr))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX's loops")
@pytest.mark.parametrize(("remat", "sizes"), [(False, [8, 8, 32, 32]), (True, [32])])
def test_a_loop_keeps_for_the_gradient_what_convolutions_give(remat, sizes, monkeypatch):
    """Of each block its input and three outputs in bfloat16, besides vectors and kernels; the input if it remats."""
    monkeypatch.setattr("resnet_vae.loop.SHORT", 0)
    count, positions = 3, (4, 8, 8)
    x = keras.ops.cast(RNG.standard_normal((*positions, 32)), "bfloat16")
    loop = Repeated(count, (8, 8, 32), remat=remat, dtype="mixed_bfloat16")
    loop.build(x.shape)
    *_, loops = _traced_gradient(loop, x)
    forward = next(equation for equation in loops if not equation.params["reverse"])
    size = count * np.prod(positions)
    kept = [variable.aval for variable in forward.outvars[1:] if variable.aval.size >= size]  # the first is the last x
    assert sorted(each.size // size for each in kept) == sizes
    assert {each.dtype.name for each in kept} == {"bfloat16"}


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX's loops")
@pytest.mark.parametrize(("count", "remat", "unrolled"), [(3, False, 3), (9, False, 1), (3, True, 1)])
def test_a_short_loop_is_none(count, remat, unrolled, monkeypatch):
    """With the same gradients; except where it rematerializes, which the compiler would undo."""
    x = RNG.standard_normal((2, 4, 4, 6)).astype("float32")
    loop = Repeated(count, (2, 2, 6), remat=remat, gain=0.3)
    loop.build(x.shape)
    gradient, weights, loops = _traced_gradient(loop, x)
    assert {each.params["unroll"] for each in loops} == {unrolled}
    if unrolled > 1:
        in_a_row = gradient(weights)
        monkeypatch.setattr("resnet_vae.loop.SHORT", 0)
        gradient, weights, loops = _traced_gradient(loop, x)
        assert {each.params["unroll"] for each in loops} == {1}
        for one, other in zip(in_a_row, gradient(weights), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX's transformations")
@pytest.mark.parametrize("kind", ["identity", "projection", "transposed"])
def test_second_derivatives_on_jax(kind):
    """Forward over reverse, fast against plain, in training: a Hessian-vector product."""
    import jax

    filters = (2, 2, 4) if kind == "identity" else (2, 2, 6)
    strides, shortcut = (1, "identity") if kind == "identity" else (2, "projection")
    block = ResidualBlock(filters, 3, strides, kind == "transposed", shortcut, gain=1.0)
    x, direction = RNG.standard_normal((2, 3, 4, 6, 4)).astype("float32")
    block.build(x.shape)
    weights = [variable.value for variable in block.trainable_variables]
    moving = [variable.value for variable in block.non_trainable_variables]
    toward = RNG.standard_normal(block.compute_output_shape(x.shape)).astype("float32")

    def product(call):
        block.call = call

        def loss(x):
            return (toward * block.stateless_call(weights, moving, x, training=True)[0]).sum()

        return np.asarray(jax.jvp(jax.grad(loss), (x,), (direction,))[1])

    fast, plain = product(block.fast), product(block.plain)
    np.testing.assert_allclose(fast, plain, rtol=1e-3, atol=1e-4 * np.abs(plain).max())


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's operations")
@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("filters", [(4, 4, 8), (4, 8)])
@pytest.mark.parametrize("shortcut", ["projection", "pool"])
def test_no_two_biases_have_the_same_operation_for_their_gradient(order, filters, shortcut):
    """TensorFlow joins one of them with a kernel's gradient, which of them differs from one process to the next."""
    import tensorflow as tf

    block = ResidualBlock(filters, strides=2, shortcut=shortcut, order=order)
    block.build((None, 8, 8, 4))

    @tf.function
    def gradients(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(block(x, training=True)))
        return tape.gradient(loss, block.trainable_variables)

    operations = gradients.get_concrete_function(tf.zeros((2, 8, 8, 4))).graph.get_operations()
    inputs = [operation.inputs[0].name for operation in operations if operation.type == "BiasAddGrad"]
    assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("remat", [False, True])
def test_a_loop_in_bfloat16_trains_as_single_blocks_do(remat):
    """Its averages move as theirs, by less than bfloat16 can tell."""
    loop = Repeated(2, (2, 2, 6), remat=remat, momentum=0.999, gain=1.0, dtype="mixed_bfloat16")
    loop.build((None, 4, 4, 6))
    x, row = keras.ops.cast(RNG.standard_normal((4, 4, 4, 6)), "bfloat16"), loop.split()
    for _ in range(5):
        y = x
        loop(x, training=True)
        for block in row:
            y = block(y, training=True)
    moved = [keras.ops.convert_to_numpy(stack) for stack in loop.stacks]
    loop.join(row)
    for stack, value in zip(loop.stacks, moved, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(stack), value, rtol=3e-4, atol=2e-5)


def test_a_folded_variance_is_never_below_zero():
    """As the difference of two nearly equal channels may be when it is rounded."""
    convolution, normalization = keras.layers.Conv2D(2, 1), BatchNormalization()
    for layer in (convolution, normalization):
        layer.build((None, 4, 4, 2))
    convolution.kernel.assign(np.array([[1.0, 1.0], [-1.0, -1.0]]).reshape(1, 1, 2, 2) * 1e3)
    for seed in range(20):
        x = np.random.default_rng(seed).standard_normal((4, 4, 4, 1)) * 1e3
        near = x * (1 + 1e-7 * np.random.default_rng(seed + 100).standard_normal(x.shape))
        images = keras.ops.convert_to_tensor(np.concatenate([x, near], -1).astype("float32"))
        matrix, _ = fold(convolution, normalization, images, training=True)
        assert np.isfinite(keras.ops.convert_to_numpy(matrix)).all()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras has it on TensorFlow alone")
def test_a_normalisation_over_several_devices_is_keras_own():
    layer, x = BatchNormalization(synchronized=True), keras.ops.ones((2, 3, 3, 5))
    layer.build(x.shape)
    assert not layer._fuses(x, training=True)
