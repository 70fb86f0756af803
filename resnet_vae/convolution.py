"""Convolutions of images, channels last, each in the way that takes the least time, gradients included."""

import functools

import keras
from keras import layers, ops

from resnet_vae.devices import computes_on_gpu, processor_has_amx
from resnet_vae.loop import within_loop

LAST = "channels_last"  # also where Keras's image_data_format has become another since a network was built


def matrix(convolution):
    """The kernel of a 1×1 convolution, transposed or not, as (channels, filters)."""
    kernel = ops.reshape(convolution.kernel, convolution.kernel.shape[2:])  # indexing has a slower gradient
    return ops.transpose(kernel) if isinstance(convolution, layers.Conv2DTranspose) else kernel


def pointwise(x, matrix, bias=None):
    """The 1×1 convolution of x, (batch, height, width, channels) in any dtype, with a matrix (channels, filters)."""
    matrix = ops.cast(matrix, x.dtype)
    if None in x.shape[1:3]:
        x = ops.matmul(x, matrix)
    else:  # on CPUs faster than a convolution; of four axes TensorFlow's trace would be far longer
        rows = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), matrix)
        x = ops.reshape(rows, (-1, *x.shape[1:3], matrix.shape[1]))
    return x if bias is None else ops.add(x, ops.cast(bias, x.dtype))


def convolve(x, kernel):
    """The "same" convolution: (batch, height, width, channels), (k, k, channels, filters) → (…, filters)."""
    if kernel.shape[0] % 2:
        if within_loop.get() and convolution_for_loops():
            return convolution_for_loops()(x, kernel)
        if _is_for_onednn(x) and _is_narrow(x):
            return _convolve_tensorflow(x, kernel)
    return ops.conv(x, kernel, padding="same", data_format=LAST)


def convolve_transposed(x, kernel, strides):
    """The "same" transposed convolution: (batch, height, width, channels), (k, k, filters, channels) → (…, filters)."""
    side = kernel.shape[0]
    if _is_for_xla_on_cpu() and max(strides) <= side and None not in x.shape[1:3]:
        return _in_phases(x, _turned(kernel), strides, [side - 1 - (side - stride) // 2 for stride in strides])
    return ops.conv_transpose(x, kernel, strides, padding="same", data_format=LAST)


def convolve_upsampled(x, kernel, strides):
    """`convolve` of images upsampled by `insert_zeros`, without multiplying by the zeros.

    Args:
        x: (batch, height, width, channels).
        kernel: (k, k, channels, filters).
        strides: (rows, columns), at most (k + 1) / 2.

    Returns:
        (batch, height rows, width columns, filters).
    """
    if _is_for_onednn(x):
        return _convolve_upsampled_tensorflow(x, kernel, strides)
    if _is_for_xla_on_cpu():
        return _in_phases(x, kernel, strides, ((kernel.shape[0] - 1) // 2,) * 2)
    return _upsampled_by_transpose(x, kernel, strides)


def _upsampled_by_transpose(x, kernel, strides):
    """`convolve_upsampled` as a part of a transposed convolution, which goes beyond the image."""
    (rows, columns), first = strides, kernel.shape[0] // 2
    height, width = x.shape[1] * rows, x.shape[2] * columns
    x = ops.conv_transpose(x, _turned(kernel), strides, padding="valid", data_format=LAST)
    return _part(x, (first, first, 0), (height, width, x.shape[-1]))


def _turned(kernel):
    """The kernel of a convolution's transpose, (k, k, channels, filters) → (k, k, filters, channels), and back."""
    return ops.transpose(ops.flip(kernel, (0, 1)), (0, 1, 3, 2))


def _in_phases(x, kernel, strides, middles):
    """The convolution of images with inserted zeros in its polyphase form, without the zeros.

    A position of x becomes rows × columns positions; each of these places is one convolution of x, without strides.
    Up to 2.5 times as fast as a transposed convolution of oneDNN in bfloat16, and up to 10 times as one of XLA's on
    CPUs, whose gradients take up to 50 times as long.

    Args:
        x, kernel, strides: as of `convolve_upsampled`.
        middles: which row and which column of the kernel lie upon the position that is computed.
    """
    side, (height, width) = kernel.shape[0], x.shape[1:3]

    def phases(stride, middle):
        """For each position before the next one of x: where the kernel that it sees begins, and how far around it."""
        for position in range(stride):
            before, begin = divmod(middle - position, stride)
            yield begin, (before, len(range(begin, side, stride)) - 1 - before)

    lines = []
    for top, above in phases(strides[0], middles[0]):
        rows, line = kernel[top :: strides[0]], []
        for left, beside in phases(strides[1], middles[1]):
            line.append(_padded(x, rows[:, left :: strides[1]], (above, beside)))
        lines.append(ops.stack(line, axis=3))
    y = ops.stack(lines, axis=2)  # (batch, height, rows, width, columns, filters)
    return ops.reshape(y, (-1, height * strides[0], width * strides[1], kernel.shape[3]))


def _padded(x, kernel, padding):
    """The convolution of images with so many rows and columns of zeros, before and after: ((2, 1), (1, 0))."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.nn.conv2d(x, kernel, 1, ((0, 0), *padding, (0, 0)))
    return ops.conv(ops.pad(x, ((0, 0), *padding, (0, 0))), kernel, padding="valid", data_format=LAST)


def every(x, strides):
    """Every stride-th position: (batch, height, width, c) → (batch, height / rows, width / columns, c), rounded up."""
    (_, height, width, channels), (rows, columns) = x.shape, strides
    if tuple(strides) == (1, 1):
        return x
    if None in (height, width) or height % rows or width % columns:
        return ops.average_pool(x, 1, strides, padding="valid", data_format=LAST)  # of single positions
    height, width = height // rows, width // columns
    x = ops.reshape(x, (-1, height, rows, width, columns * channels))
    return ops.reshape(_part(x, (0, 0, 0, 0), (height, 1, width, channels)), (-1, height, width, channels))


def averaged(x, strides):
    """Averages over the strides: (batch, height, width, c) → (batch, height / rows, width / columns, c), rounded up."""
    return x if tuple(strides) == (1, 1) else ops.average_pool(x, strides, strides, padding="same", data_format=LAST)


def repeated(x, strides):
    """Each position repeated: (batch, height, width, c) → (batch, height rows, width columns, c)."""
    for axis, stride in enumerate(strides, start=1):
        x = ops.repeat(x, stride, axis=axis) if stride > 1 else x
    return x


def _part(x, first, shape):
    """The part of x (batch, …) of a shape from the indices `first`, in all axes but the batch."""
    if keras.backend.backend() == "tensorflow":  # the gradient of indexing takes ten times as long
        import tensorflow as tf

        return tf.slice(x, (0, *first), (-1, *shape))
    return x[:, *(slice(start, start + size) for start, size in zip(first, shape, strict=True))]


def insert_zeros(x, strides):
    """Put zeros between the positions: (batch, height, width, c) → (batch, height rows, width columns, c)."""
    _, height, width, channels = x.shape
    rows, columns = strides
    x = ops.reshape(x, (-1, height, 1, width, 1, channels))
    x = ops.pad(x, ((0, 0), (0, 0), (0, rows - 1), (0, 0), (0, columns - 1), (0, 0)))
    return ops.reshape(x, (-1, height * rows, width * columns, channels))


def convolved_constant(constant, kernel, height, width):
    """The "same" convolution of an image of one constant a channel, (1, height, width, filters).

    Computed on an image of the kernel's size, in which each row and column of the border occurs, and the middle once.
    """
    sides = [(side, min(side, kernel.shape[0])) for side in (height, width)]
    y = ops.broadcast_to(constant, (1, *(small for _, small in sides), constant.shape[0]))
    y = ops.conv(y, kernel, padding="same", data_format=LAST)
    for axis, (side, small) in enumerate(sides, start=1):
        middle = (small - 1) // 2
        y = ops.take(y, [*range(middle), *[middle] * (side - small + 1), *range(middle + 1, small)], axis=axis)
    return y


def _is_for_onednn(x):
    """Whether convolutions of x are those of oneDNN in bfloat16, some of which take long, above all with AMX."""
    known = keras.backend.backend() == "tensorflow" and x.dtype == "bfloat16" and None not in x.shape[1:]
    return known and not computes_on_gpu()


def _is_for_xla_on_cpu():
    """Whether convolutions are those of JAX's compiler on a CPU, which is fast in a few of their forms alone."""
    if keras.backend.backend() != "jax":
        return False
    import jax

    return jax.default_backend() == "cpu"


def _is_narrow(x, strided=False):
    """Whether a kernel's gradient takes less time as a product of matrices where the smaller image is x.

    Up to seven times less: oneDNN's own is the slower, the fewer columns images have, without AMX half as much.
    """
    least = 16 if strided or processor_has_amx() else 32  # channels for each column
    return x.shape[2] <= min(16, x.shape[3] // least)


def _convolve_tensorflow(x, kernel):
    """`convolve` with the kernel's gradient as a product."""
    import tensorflow as tf

    @tf.custom_gradient
    def convolve(x, kernel):
        def backward(gradient):
            around = [(0, 0), *[(side // 2,) * 2 for side in kernel.shape[:2]], (0, 0)]
            of_kernel = _kernel_gradient(tf.pad(x, around), gradient, kernel.shape[0], (1, 1))
            return tf.nn.conv2d_transpose(gradient, kernel, tf.shape(x), 1, "SAME"), of_kernel

        return tf.nn.conv2d(x, kernel, 1, "SAME"), backward

    return convolve(x, kernel)


def _convolve_upsampled_tensorflow(x, kernel, strides):
    """`convolve_upsampled`, with AMX in phases, and its gradients by the convolution that it is the transpose of."""
    import tensorflow as tf

    side = kernel.shape[0]
    first = side // 2

    @tf.custom_gradient
    def convolve_upsampled(x, kernel):
        def backward(gradient):
            lengths, turned = [(first, side - stride - first) for stride in strides], _turned(kernel)
            gradient = tf.pad(gradient, ((0, 0), *lengths, (0, 0)))
            if _is_narrow(x, strided=True):
                of_kernel = _kernel_gradient(gradient, x, side, strides)
            else:
                of_kernel = tf.compat.v1.nn.conv2d_backprop_filter(gradient, turned.shape, x, [1, *strides, 1], "VALID")
            return tf.nn.conv2d(gradient, turned, strides, "VALID"), _turned(of_kernel)

        if processor_has_amx():
            return _in_phases(x, kernel, strides, (side - 1 - first,) * 2), backward
        return _upsampled_by_transpose(x, kernel, strides), backward

    return convolve_upsampled(x, kernel)


def _kernel_gradient(image, gradient, side, strides):
    """The gradient by the kernel of a strided "valid" convolution, as a product of matrices.

    Args:
        image: what is convolved, (batch, …, …, channels).
        gradient: by the result, (batch, height, width, filters).
        side: k.
        strides: of the convolution, (rows, columns).

    Returns:
        (k, k, channels, filters).
    """
    import tensorflow as tf

    (rows, columns), channels, (_, height, width, filters) = strides, image.shape[-1], gradient.shape
    tall, wide = height + (side - 1) // rows, width + (side - 1) // columns
    image = tf.pad(image, ((0, 0), (0, tall * rows - image.shape[1]), (0, wide * columns - image.shape[2]), (0, 0)))
    image = tf.reshape(image, (-1, tall, rows, wide, columns * channels))  # what a stride skips has axes of its own
    seen = [
        _part(image, (i // rows, i % rows, j // columns, j % columns * channels), (height, 1, width, channels))
        for i in range(side)
        for j in range(side)
    ]
    seen = tf.reshape(tf.concat(seen, -1), (-1, side * side * channels))  # by each position of the result
    product = tf.matmul(seen, tf.reshape(gradient, (-1, filters)), transpose_a=True)
    return tf.reshape(product, (side, side, channels, filters))


@functools.cache
def convolution_for_loops():
    """The "same" convolution whose gradient is fast within a loop; None where that of Keras is.

    On CPUs JAX's compiler computes a convolution's gradients ten times as slowly in a loop as elsewhere, since only
    elsewhere it lays them out for the fast implementation (XLA's `ConvCanonicalization`). Here they are in that layout.
    It can be differentiated in reverse, again and again, and not forward (`jax.jvp`).

    Returns:
        None, or a function: x (batch, height, width, channels), kernel (k, k, channels, filters) of odd k →
        (batch, height, width, filters).
    """
    if not _is_for_xla_on_cpu():
        return None
    import jax

    layout = ("NHWC", "HWIO", "NHWC")

    @jax.custom_vjp
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    def backward(sources, gradient):
        x, kernel = sources
        turned = _turned(kernel)
        channels_first, kernel_like = ops.transpose(x, (3, 1, 2, 0)), ops.transpose(gradient, (1, 2, 0, 3))
        # Without a barrier the transpositions become another layout of the convolutions, which is the slow one.
        turned, channels_first, kernel_like = jax.lax.optimization_barrier((turned, channels_first, kernel_like))
        around = [(kernel.shape[0] // 2,) * 2, (kernel.shape[1] // 2,) * 2]
        of_kernel = jax.lax.conv_general_dilated(channels_first, kernel_like, (1, 1), around, dimension_numbers=layout)
        return convolve(gradient, turned), ops.transpose(jax.lax.optimization_barrier(of_kernel), (1, 2, 0, 3))

    convolve.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), backward)
    return convolve
