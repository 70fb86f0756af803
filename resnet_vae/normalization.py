"""Batch normalisation (https://arxiv.org/abs/1502.03167), and a 1×1 convolution and its normalisation in one.

Both functions at the end are exact: the batch moments of a 1×1 convolution's outputs follow from something smaller
than these outputs, so that the normalisation need not pass over them.
"""

import math

import keras
from keras import layers, ops

from resnet_vae.config import PACKAGE
from resnet_vae.convolution import matrix, pointwise
from resnet_vae.devices import computes_on_gpu


@keras.saving.register_keras_serializable(PACKAGE)
class BatchNormalization(layers.BatchNormalization):
    """Batch normalisation over all but the last axis, in the dtype of its input.

    The same function and the same weights as `keras.layers.BatchNormalization`. On TensorFlow images are normalised by
    one fused operation, with float32 statistics, instead of ten small ones, where the weights are float32; that loses
    digits where a channel's mean is more than some thousand times its spread, as raw measurements may have it. On JAX
    one pass over the input gives both moments, and its gradient takes two passes.
    """

    def call(self, inputs, training=None, mask=None):
        if mask is not None or not self._fuses(inputs, training):
            return super().call(inputs, training=training, mask=mask)
        return self._fused(inputs, None, None, training)

    def _moments(self, inputs, mask):
        if mask is None and keras.backend.backend() == "tensorflow" and not self.synchronized:
            # `tf.nn.moments` takes the mean for a constant in the variance, so that second derivatives are wrong
            x = _precise(inputs)
            mean = ops.mean(x, axis=self._reduction_axes, keepdims=True)
            variance = ops.mean(ops.square(x - mean), axis=self._reduction_axes)
            return tuple(ops.cast(each, inputs.dtype) for each in (ops.reshape(mean, (-1,)), variance))
        return super()._moments(inputs, mask)

    def biased(self, inputs, bias, training=None, shift=None):
        """The normalisation of inputs + bias, and a shift added to it.

        In training the bias, which changes nothing but the mean, need not be added, and its gradient is exactly zero.
        Otherwise rounding errors reach it, of which Adam makes steps of the usual length: the bias wanders, and the
        moving mean lags behind it.

        Args:
            inputs: as of `call`.
            bias: (channels,), or None.
            training: as of `call`.
            shift: (channels,), or None.
        """
        if self._fuses(inputs, training):
            return self._fused(inputs, bias, shift, training)
        if bias is not None:
            if training and self.trainable:
                bias = ops.stop_gradient(bias) + 0.0 * bias  # a gradient of zero; none would be a mistake to Keras
            inputs = ops.add(inputs, ops.cast(bias, inputs.dtype))
        outputs = self.call(inputs, training=training)
        return outputs if shift is None else ops.add(outputs, ops.cast(shift, outputs.dtype))

    def _fuses(self, inputs, training):
        simple = self.scale and self.center and not (self.renorm or self.synchronized)
        simple = simple and self.axis in (-1, len(inputs.shape) - 1)
        if keras.backend.backend() == "tensorflow":
            known = keras.backend.standardize_dtype(inputs.dtype) in ("float16", "bfloat16", "float32")
            # with fixed statistics its gradient is an error on GPUs if TensorFlow is to be deterministic
            known = known and ((training and self.trainable) or not computes_on_gpu())
            return simple and known and len(inputs.shape) == 4 and self.variable_dtype == "float32"
        precise = self.variable_dtype in ("float32", "float64") and keras.backend.is_float_dtype(inputs.dtype)
        return keras.backend.backend() == "jax" and simple and precise

    def _fused(self, inputs, bias, shift, training):
        fused = self._fused_tensorflow if keras.backend.backend() == "tensorflow" else self._fused_jax
        return fused(inputs, bias, shift, training)

    def _fused_jax(self, inputs, bias, shift, training):
        x, bias = _precise(inputs), 0.0 if bias is None else _precise(bias)
        if training and self.trainable:
            origin = _origin(x)
            x = x - origin
            mean, variance = _moments_about(x)
            self._remember(mean + origin + bias, variance)
            bias = 0.0 * bias
        else:
            mean, variance = self.moving_mean - bias, self.moving_variance
            bias = 0.0
        scale = self.gamma * ops.rsqrt(variance + self.epsilon)
        shift = bias + (self.beta if shift is None else self.beta + shift)
        return ops.cast(x * scale + (shift - mean * scale), inputs.dtype)

    def _fused_tensorflow(self, inputs, bias, shift, training):
        import tensorflow as tf

        normalize = tf.compat.v1.nn.fused_batch_norm
        shift = self.beta if shift is None else self.beta + tf.cast(shift, "float32")
        bias = None if bias is None else tf.cast(bias, "float32")
        if training and self.trainable:
            shift = shift if bias is None else shift + 0.0 * bias
            outputs, mean, variance = normalize(inputs, self.gamma, shift, epsilon=self.epsilon)
            count = tf.cast(tf.size(inputs, tf.int64) // inputs.shape[-1], "float32")
            mean = mean if bias is None else mean + bias
            self._remember(mean, variance * (count - 1) / count)  # the operation returns the unbiased variance
            return outputs
        if bias is not None:
            shift += bias * self.gamma * tf.math.rsqrt(self.moving_variance + self.epsilon)
        moving = {"mean": self.moving_mean, "variance": self.moving_variance}
        return normalize(inputs, self.gamma, shift, **moving, epsilon=self.epsilon, is_training=False)[0]

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


def _bias(convolution):
    return _precise(ops.convert_to_tensor(convolution.bias)) if convolution.use_bias else 0.0


def _origin(x):
    """What is in the middle of the first image of x (batch, …, channels), as a constant (channels,).

    Moments are taken about it: differences of large squares would be rounding errors where the mean is far from zero
    for the spread, and the mean itself would have to be known first, a pass over x more.
    """
    return ops.stop_gradient(x[0, *((side or 0) // 2 for side in x.shape[1:-1])])


def _moments_about(x):
    """Mean and variance, (channels,) each, of x (…, channels) that is near zero for its spread, in one pass over it."""
    axes = tuple(range(len(x.shape) - 1))
    count = math.prod(x.shape[:-1])  # `ops.mean` would be of float32 on JAX, whatever x is
    mean, square = ops.sum(x, axis=axes) / count, ops.sum(ops.square(x), axis=axes) / count
    return mean, ops.maximum(square - ops.square(mean), 0.0)  # rounded, 0 may be less


def _batch_moments(x, covariance):
    """Mean (channels,) of x (batch, height, width, channels), and its variance, (channels,).

    With `covariance`, the covariances of any two channels instead, (channels, channels).
    """
    if keras.backend.backend() == "tensorflow":
        return _moments_tensorflow(x, covariance)
    origin = _origin(_precise(x))
    rows = _precise(ops.reshape(x, (-1, x.shape[-1]))) - origin
    if not covariance:
        mean, variance = _moments_about(rows)
        return origin + mean, variance
    mean = ops.sum(rows, axis=0) / rows.shape[0]
    second = ops.matmul(ops.transpose(rows), rows) / rows.shape[0]
    return origin + mean, second - ops.outer(mean, mean)


def _moments_tensorflow(x, covariance):
    """The same in fewer passes over x: no transposed copy, and one or two for the gradient instead of six."""
    import tensorflow as tf

    @tf.custom_gradient
    def moments(x):
        rows = _precise(tf.reshape(x, (-1, x.shape[-1])))
        number = tf.shape(rows)[0]
        count = tf.cast(number, rows.dtype)
        shares = tf.ones((1, number), rows.dtype) / count

        def average(rows):  # two to five times as fast as `tf.reduce_mean` over this axis
            return tf.squeeze(tf.matmul(shares, rows), 0)

        mean = average(rows)
        if covariance:
            rows = tf.nn.bias_add(rows, -mean)
            second = tf.matmul(rows, rows, transpose_a=True) / count
        else:
            second = average(tf.math.squared_difference(rows, mean))

        def backward(of_mean, of_second):
            if covariance:
                of_second = (of_second + tf.transpose(of_second)) / count
                return pointwise(x, of_second, of_mean / count - tf.linalg.matvec(of_second, mean))
            # in bfloat16 a difference of two rounded numbers would be off by the same at each position, which adds up
            centred = tf.cast(tf.nn.bias_add(_precise(x), -mean), x.dtype)
            return ops.add(centred * tf.cast(2.0 * of_second / count, x.dtype), tf.cast(of_mean / count, x.dtype))

        return (mean, second), backward

    return moments(x)


def fold(convolution, normalization, x, training=None):
    """Matrix and bias of the single 1×1 convolution that equals this one followed by its normalisation.

    The outputs' mean is the mean of x mapped by the kernel W; the variance of output f is W[:, f]ᵀ Cov(x) W[:, f].

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
        mean, covariance = _batch_moments(x, covariance=True)
        variance = ops.sum(kernel * ops.matmul(covariance, kernel), axis=0)
        return ops.matmul(mean, kernel) + bias, ops.maximum(variance, 0.0)  # rounded, 0 may be less

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
        mean, variance = _batch_moments(signal, covariance=False)
        return share * mean + bias, share * variance + share * (1 - share) * ops.square(mean)

    scale, shift = normalization.affine(moments, training)
    return signal * ops.cast(scale, x.dtype), bias * scale + shift
