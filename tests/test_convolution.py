"""Convolutions, and above all their gradients, against those of the backend."""

import re
from functools import partial

import keras
import numpy as np
import pytest

from resnet_vae import convolution
from resnet_vae.convolution import (
    convolution_for_loops,
    convolve,
    convolve_transposed,
    convolve_upsampled,
    every,
    insert_zeros,
)

RNG = np.random.default_rng(0)


def on_xla():
    """Whether convolutions here are XLA's on a CPU, told without the package, or else its mistake would skip tests."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return {device.platform for device in jax.devices()} == {"cpu"}


def transposed(x, kernel, strides, convolve=convolve_transposed):
    return convolve(x, keras.ops.transpose(kernel, (0, 1, 3, 2)), strides)


PAIRS = {  # ours, and the same by the backend's own operations: of x, a kernel (k, k, channels, filters) and strides
    "same": (
        lambda x, kernel, strides: convolve(x, kernel),
        lambda x, kernel, strides: keras.ops.conv(x, kernel, padding="same"),
    ),
    "upsampled": (
        convolve_upsampled,
        lambda x, kernel, strides: keras.ops.conv(insert_zeros(x, strides), kernel, padding="same"),
    ),
    "transposed": (transposed, partial(transposed, convolve=partial(keras.ops.conv_transpose, padding="same"))),
}
UPSAMPLED = [("upsampled", *case) for case in [(3, (2, 2)), (3, (1, 2)), (5, (2, 2)), (5, (3, 1)), (4, (2, 1))]]
TRANSPOSED = [("transposed", *case) for case in [(3, (2, 2)), (5, (2, 3)), (4, (2, 1)), (2, (2, 2))]]


@pytest.mark.skipif(not on_xla(), reason="of JAX on CPUs; `make test-jax` runs it")
def test_gradients_of_a_convolution_in_a_loop():
    """They are those of Keras's convolution, and compiled to convolutions in the one layout that XLA has fast."""
    import jax

    def chain(convolve):
        def loss(x, kernels):
            return (jax.lax.scan(lambda x, kernel: (convolve(x, kernel), None), x, kernels)[0] * weights).sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    x, weights = RNG.standard_normal((2, 5, 4, 6, 3)).astype("float32")
    kernels = RNG.standard_normal((7, 3, 3, 3, 3)).astype("float32") / 5
    ours = chain(convolution_for_loops())
    theirs = chain(lambda x, kernel: keras.ops.conv(x, kernel, padding="same"))
    for gradient, expected in zip(ours(x, kernels), theirs(x, kernels), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    layouts = set(re.findall(r" convolution\(.*dim_labels=(\S+?)[,\s]", ours.lower(x, kernels).compile().as_text()))
    assert layouts == {"b01f_01io->b01f"}


@pytest.mark.skipif(not on_xla(), reason="of JAX on CPUs; `make test-jax` runs it")
@pytest.mark.parametrize(("pair", "side", "strides"), UPSAMPLED + TRANSPOSED)
def test_convolutions_of_spread_images_on_xla(pair, side, strides):
    """They and their gradients are Keras's, and compiled to convolutions that XLA has fast, which Keras's are not."""
    import jax

    def compiled(function):
        def loss(x, kernel):
            y = function(x, kernel, strides)
            return (y * np.cos(np.arange(y.size)).reshape(y.shape)).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(x, kernel).compile()

    def slow(computation):
        convolutions = re.findall(r" convolution\(.*", computation.as_text())
        assert convolutions
        return any("dim_labels=b01f_01io->b01f" not in line or "_dilate=" in line for line in convolutions)

    x, kernel = RNG.standard_normal((16, 6, 4, 32)), RNG.standard_normal((side, side, 32, 32))
    x, kernel = x.astype("float32"), kernel.astype("float32")
    ours, theirs = map(compiled, PAIRS[pair])
    for value, exact in zip(jax.tree.leaves(ours(x, kernel)), jax.tree.leaves(theirs(x, kernel)), strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())
    assert not slow(ours)
    assert slow(theirs) or pair == "upsampled"


@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (3, 2), (1, 1), (4, 5)])
def test_every_position_of_a_stride(strides):
    """Also where the strides do not divide the sides."""
    x = RNG.standard_normal((2, 6, 8, 3)).astype("float32")
    rows, columns = strides
    read = keras.ops.convert_to_numpy(every(x, strides))
    np.testing.assert_array_equal(read, x[:, ::rows, ::columns])
    placed = keras.ops.convert_to_numpy(insert_zeros(x, strides))
    assert placed.shape == (2, 6 * rows, 8 * columns, 3)
    np.testing.assert_array_equal(placed[:, ::rows, ::columns], x)
    assert np.count_nonzero(placed) == x.size


def gradients(function, dtype, arrays):
    """A function's value and its gradients, on TensorFlow, in float64."""
    import tensorflow as tf

    sources = [tf.constant(array, dtype) for array in arrays]
    with tf.GradientTape() as tape:
        tape.watch(sources)
        y = function(*sources)
        loss = tf.reduce_sum(tf.cast(y, "float64") * np.cos(np.arange(np.prod(y.shape))).reshape(y.shape))
    return [tf.cast(value, "float64").numpy() for value in (y, *tape.gradient(loss, sources))]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's gradients")
@pytest.mark.parametrize(("pair", "side", "strides"), [*(("same", side, None) for side in (3, 5, 4)), *UPSAMPLED])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("amx", [True, False])
def test_convolutions_for_onednn(pair, side, strides, narrow, amx, monkeypatch):
    """In float64, where they are not used, they and their gradients are TensorFlow's own but for rounding errors."""
    monkeypatch.setattr(convolution, "_is_for_onednn", lambda x: True)
    monkeypatch.setattr(convolution, "_is_narrow", lambda x, strided=False: narrow)
    monkeypatch.setattr(convolution, "processor_has_amx", lambda: amx)
    x, kernel = RNG.standard_normal((2, 3, 4, 5)), RNG.standard_normal((side, side, 5, 6))
    values, expected = (gradients(partial(kind, strides=strides), "float64", (x, kernel)) for kind in PAIRS[pair])
    for value, exact in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's gradients")
@pytest.mark.parametrize("pair", ["same", "upsampled"])
@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_where_images_are_narrow(pair, amx, monkeypatch):
    """Gradients of kernels are taken as products, and within a hundredth of those in double precision.

    So are the output and the gradient of the images where TensorFlow's own are, to which these are left: on processors
    without bfloat16 they may be a little beyond.
    """
    import tensorflow as tf

    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [])  # as on a machine without a GPU
    monkeypatch.setattr(convolution, "processor_has_amx", lambda: amx)
    products, kernel_gradient = [], convolution._kernel_gradient
    monkeypatch.setattr(convolution, "_kernel_gradient", lambda *args: products.append(1) or kernel_gradient(*args))
    x, kernel = RNG.standard_normal((8, 4, 4, 128)), RNG.standard_normal((3, 3, 128, 128))
    ours, theirs = (partial(kind, strides=(2, 2)) for kind in PAIRS[pair])
    exact = gradients(ours, "float64", (x, kernel))
    assert not products

    def errors(function):
        values = gradients(function, "bfloat16", (x, kernel))
        return [np.linalg.norm(v - e) / np.linalg.norm(e) for v, e in zip(values, exact, strict=True)]

    (output, of_images, of_kernel), (their_output, their_images, _) = errors(ours), errors(theirs)
    assert products == [1]
    assert of_kernel < 0.01
    assert output < max(0.01, 1.05 * their_output)
    assert of_images < max(0.01, 1.05 * their_images)
