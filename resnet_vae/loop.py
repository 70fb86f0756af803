"""One function applied again and again with the weights of one layer after the other: a loop instead of copies."""

import keras
from keras import ops


def scan(function, x, stacks, trained, remat=False):
    """Apply x, y = function(x, weights) for each index of stacked weights.

    Args:
        function: (tensor, list of weights) → tensor of the same shape, and a list of new values for those weights
            that are not trained.
        x: tensor.
        stacks: the weights, each (count, …); those that are trained come first.
        trained: how many these are.
        remat: keep only each x for the gradient and apply the function a second time to get at the rest
            (https://arxiv.org/abs/1604.06174).

    Returns:
        The last x, and the list of stacked y.
    """
    if keras.backend.backend() == "tensorflow":
        return _scan_tensorflow(function, x, stacks, trained, remat)
    return ops.scan(keras.remat(function) if remat else function, x, stacks)


def _scan_tensorflow(function, x, stacks, trained, remat):
    """`scan` on TensorFlow, where `keras.ops.scan` takes only y that are like x; with `remat`, its gradient too."""
    import tensorflow as tf

    count = stacks[0].shape[0]

    def arrays(tensors):
        return [tf.TensorArray(each.dtype, count, element_shape=each.shape[1:]) for each in tensors]

    def stack(written):
        return [array.stack() for array in written]

    def forward(x, stacks, keep):
        weights = [array.unstack(each) for array, each in zip(arrays(stacks), stacks, strict=True)]

        def step(index, x, outputs, inputs):
            inputs = [array.write(index, x) for array in inputs]
            x, values = function(x, [array.read(index) for array in weights])
            return index + 1, x, [array.write(index, y) for array, y in zip(outputs, values, strict=True)], inputs

        inputs = [tf.TensorArray(x.dtype, count, element_shape=x.shape)] if keep else []
        state = (0, x, arrays(stacks[trained:]), inputs)
        _, x, outputs, inputs = tf.while_loop(lambda index, *_: index < count, step, state, maximum_iterations=count)
        return x, stack(outputs), weights, inputs

    if not remat:
        return forward(x, stacks, keep=False)[:2]

    @tf.custom_gradient
    def run(x, *stacks):
        last, outputs, weights, (inputs,) = forward(x, stacks, keep=True)

        def backward(gradient, *_):
            def step(index, gradient, gradients):
                values = [array.read(index) for array in weights]
                sources = [inputs.read(index), *values[:trained]]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    y, _ = function(sources[0], [*sources[1:], *values[trained:]])
                gradient, *new = tape.gradient(y, sources, gradient, unconnected_gradients="zero")
                return (
                    index - 1,
                    gradient,
                    [array.write(index, each) for array, each in zip(gradients, new, strict=True)],
                )

            state = (count - 1, gradient, arrays(stacks[:trained]))
            _, gradient, gradients = tf.while_loop(lambda index, *_: index >= 0, step, state, maximum_iterations=count)
            return gradient, *stack(gradients), *[tf.zeros_like(each) for each in stacks[trained:]]

        return (last, *outputs), backward

    last, *outputs = run(x, *stacks)
    return last, outputs
