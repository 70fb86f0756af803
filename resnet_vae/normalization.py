"""Batch normalisation (https://arxiv.org/abs/1502.03167), and what it and a 1×1 convolution are in one.

Both functions at the end are exact: the batch moments of a 1×1 convolution's outputs follow from something smaller
than these outputs, so that the normalisation need not pass over them.
"""

import keras
from keras import layers, ops

PACKAGE = "resnet_vae"  # the prefix under which Keras registers the project's classes


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(layers.BatchNormalization):
    """Batch normalisation over all but the last axis, in the dtype of its input.

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
        self._remember(mean, variance * (count - 1) / count)  # the operation returns the unbiased variance
        return outputs

    def affine(self, moments, training=None):
        """Scale and shift, (channels,) each, that normalise an input: input × scale + shift.

        Args:
            moments: function → the input's mean and biased variance, (channels,) each; called in training only.
            training: as of `call`.
        """
        if training and self.trainable:
            mean, variance = moments()
            self._remember(mean, variance)
        else:
            mean, variance = (ops.convert_to_tensor(moving) for moving in (self.moving_mean, self.moving_variance))
        scale = self.gamma * ops.rsqrt(variance + self.epsilon)
        return scale, self.beta - mean * scale

    def _remember(self, mean, variance):
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            batch = ops.stop_gradient(batch)
            moving.assign(self.momentum * moving + (1 - self.momentum) * batch if self.momentum else batch)


def _precise(x):
    """The tensor in the dtype of statistics: float64 stays, all else is float32."""
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


def matrix(convolution):
    """The kernel of a 1×1 convolution, transposed or not, as (channels, filters)."""
    kernel = ops.reshape(convolution.kernel, convolution.kernel.shape[2:])  # indexing has a slower gradient
    return ops.transpose(kernel) if isinstance(convolution, layers.Conv2DTranspose) else kernel


def _bias(convolution):
    return _precise(ops.convert_to_tensor(convolution.bias)) if convolution.use_bias else 0.0


def pointwise(x, matrix, bias=None):
    """The 1×1 convolution of x, (batch, height, width, channels) in any dtype, with a matrix (channels, filters)."""
    matrix = ops.cast(matrix, x.dtype)
    if keras.backend.standardize_dtype(x.dtype) == "bfloat16":
        x = ops.conv(x, ops.reshape(matrix, (1, 1, *matrix.shape)), padding="same")
    elif None in x.shape[1:3]:
        x = ops.matmul(x, matrix)
    else:  # on CPUs up to 1.4 times as fast, except in bfloat16; of four axes TensorFlow's trace would be far longer
        rows = ops.matmul(ops.reshape(x, (-1, x.shape[-1])), matrix)
        x = ops.reshape(rows, (-1, *x.shape[1:3], matrix.shape[1]))
    return x if bias is None else ops.add(x, ops.cast(bias, x.dtype))


def _second_moments(x):
    """Mean (channels,) of x (batch, height, width, channels), and mean (channels, channels) of its products."""
    rows = _precise(ops.reshape(x, (-1, x.shape[-1])))
    count = ops.cast(ops.shape(rows)[0], rows.dtype)
    return ops.mean(rows, axis=0), ops.matmul(ops.transpose(rows), rows) / count


def _second_moments_tensorflow(x):
    """The same with its gradient in one pass over x instead of six: both parts of it are one 1×1 convolution."""
    import tensorflow as tf

    @tf.custom_gradient
    def moments(x):
        mean, products = _second_moments(x)

        def backward(of_mean, of_products):
            count = ops.cast(tf.size(x) // x.shape[-1], mean.dtype)
            return pointwise(x, (of_products + ops.transpose(of_products)) / count, of_mean / count)

        return (mean, products), backward

    return moments(x)


def fold(convolution, normalization, x, training=None):
    """Matrix and bias of the one 1×1 convolution that is a 1×1 convolution of x and its normalisation.

    The outputs' mean is the mean of x mapped by the kernel W; the mean square of output f is W[:, f]ᵀ E[x xᵀ] W[:, f].

    Args:
        convolution: Conv2D or Conv2DTranspose of kernel size 1.
        normalization: the `BatchNormalization` of its output.
        x: (batch, height, width, channels), at the positions that the convolution reads.
        training: whether the moments are the batch's.

    Returns:
        Matrix (channels, filters) and bias (filters,) for `pointwise`, in the dtype of statistics.
    """
    kernel, bias = _precise(matrix(convolution)), _bias(convolution)

    def moments():
        of_x = _second_moments_tensorflow if keras.backend.backend() == "tensorflow" else _second_moments
        mean, products = of_x(x)
        mean = ops.matmul(mean, kernel)
        variance = ops.sum(kernel * ops.matmul(products, kernel), axis=0) - ops.square(mean)
        return mean + bias, ops.maximum(variance, 0.0)

    scale, shift = normalization.affine(moments, training)
    return kernel * scale, bias * scale + shift


def sparse(convolution, normalization, x, training=None):
    """A strided transposed 1×1 convolution of x and its normalisation, without the positions that x does not reach.

    At one position in strides[0] × strides[1] the output depends on x; at all the others it is the bias, normalised.

    Args:
        convolution: Conv2DTranspose of kernel size 1.
        normalization: the `BatchNormalization` of its output.
        x: (batch, height, width, channels).
        training: whether the moments are the batch's.

    Returns:
        The output at the positions that depend on x, less the constant: (batch, height, width, filters) in the dtype
        of x; and that constant, the whole output at the others: (filters,) in the dtype of statistics.
    """
    bias = _bias(convolution)
    signal = pointwise(x, matrix(convolution))

    def moments():
        share = 1 / (convolution.strides[0] * convolution.strides[1])
        mean = share * ops.mean(_precise(signal), axis=(0, 1, 2))
        return mean + bias, share * ops.mean(ops.square(_precise(signal)), axis=(0, 1, 2)) - ops.square(mean)

    scale, shift = normalization.affine(moments, training)
    return signal * ops.cast(scale, x.dtype), bias * scale + shift
