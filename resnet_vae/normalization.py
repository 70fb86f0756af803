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
            moving.assign(self.momentum * moving + (1 - self.momentum) * ops.stop_gradient(batch))


def _precise(x):
    """The tensor in the dtype of statistics: float64 stays, all else is float32."""
    return x if keras.backend.standardize_dtype(x.dtype) == "float64" else ops.cast(x, "float32")


def _matrix(convolution):
    """The kernel of a 1×1 convolution, transposed or not, as (channels, filters)."""
    kernel = convolution.kernel[0, 0]
    return ops.transpose(kernel) if isinstance(convolution, layers.Conv2DTranspose) else kernel


def _bias(convolution):
    return _precise(ops.convert_to_tensor(convolution.bias)) if convolution.use_bias else 0.0


def fold(convolution, normalization, x, training=None):
    """Kernel and bias of the one 1×1 convolution that is a 1×1 convolution of x and its normalisation.

    The outputs' mean is the mean of x mapped by the kernel W; the variance of output f is W[:, f]ᵀ cov(x) W[:, f].

    Args:
        convolution: Conv2D or Conv2DTranspose of kernel size 1.
        normalization: the `BatchNormalization` of its output.
        x: (batch, height, width, channels), at the positions that the convolution reads.
        training: whether the moments are the batch's.

    Returns:
        Kernel (1, 1, channels, filters) in the dtype of x, bias (filters,) in that of statistics.
    """
    kernel, bias = _precise(_matrix(convolution)), _bias(convolution)

    def moments():
        rows = _precise(ops.reshape(x, (-1, x.shape[-1])))
        mean = ops.mean(rows, axis=0)
        rows = rows - mean
        covariance = ops.matmul(ops.transpose(rows), rows) / ops.cast(ops.shape(rows)[0], rows.dtype)
        return ops.matmul(mean, kernel) + bias, ops.sum(kernel * ops.matmul(covariance, kernel), axis=0)

    scale, shift = normalization.affine(moments, training)
    return ops.cast(kernel * scale, x.dtype)[None, None], bias * scale + shift


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
    signal = ops.matmul(x, _matrix(convolution))

    def moments():
        share = 1 / (convolution.strides[0] * convolution.strides[1])
        mean = share * ops.mean(_precise(signal), axis=(0, 1, 2))
        return mean + bias, share * ops.mean(ops.square(_precise(signal)), axis=(0, 1, 2)) - ops.square(mean)

    scale, shift = normalization.affine(moments, training)
    return signal * ops.cast(scale, x.dtype), bias * scale + shift
