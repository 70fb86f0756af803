"""One function applied again and again with the weights of one layer after the other: a loop instead of copies."""

import contextvars
import weakref

import keras
from keras import ops

SHORT = 8  # layers up to which JAX has no loop; without it a step takes 0.9 of the time on CPUs, 0.7 to 0.8 on an H200
within_loop = contextvars.ContextVar("within_loop", default=False)  # whether a loop's function is being traced
_shared = weakref.WeakValueDictionary()


def traced_once(function, key):
    """The function; on TensorFlow, one that is traced and prepared once for all calls with one key.

    Args:
        function: tensor, list of tensors → tensors. All that it depends on, but for these, stands in the key.
        key: hashable. What is returned for it is shared as long as someone keeps it.
    """
    if keras.backend.backend() != "tensorflow":
        return function
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util  # TensorFlow has no public name for the question

    def share(by_xla):
        shared = _shared.get((key, by_xla))
        if shared is None:  # not inlined, or else TensorFlow prepares it once a call
            shared = tf.function(function, autograph=False, experimental_attributes={"_noinline": True})
            _shared[key, by_xla] = shared
        return shared

    each = {by_xla: share(by_xla) for by_xla in (False, True)}  # XLA's loops are traced in another way

    def call(x, stacks):
        by_xla = control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())
        return each[by_xla](x, [tf.convert_to_tensor(stack) for stack in stacks])  # values, not variables

    return call


def scan(function, x, stacks, outputs=(), remat=False):
    """Apply x, y = function(x, weights) for each index of stacked weights.

    Args:
        function: (tensor, list of weights) → tensor of the same shape, and a list of further tensors that are not
            differentiated.
        x: tensor.
        stacks: the weights, each (count, …).
        outputs: tensors like those further ones, of one axis each.
        remat: keep only each x for the gradient and apply the function a second time to get at the rest
            (https://arxiv.org/abs/1604.06174).

    Returns:
        The last x, and the list of stacked y.
    """
    if keras.backend.backend() == "tensorflow":
        return _scan_tensorflow(function, x, stacks, outputs, remat)
    if keras.backend.backend() == "jax":
        return _scan_jax(function, x, stacks, remat)
    step, written = keras.remat(function) if remat else function, []
    for weights in zip(*map(ops.unstack, stacks), strict=True):  # by indices each gradient would be of a stack's size
        x, y = step(x, list(weights))
        written.append(y)
    return x, [ops.stack(each) for each in zip(*written, strict=True)]


def _scan_jax(function, x, stacks, remat):
    """`scan` on JAX: in a loop, or a few layers one after the other."""
    import jax

    count = stacks[0].shape[0]
    if count <= SHORT and not remat:
        return ops.scan(function, x, stacks, unroll=count)

    def step(x, weights):
        token = within_loop.set(True)
        try:
            return function(x, weights)
        finally:
            within_loop.reset(token)

    step = jax.checkpoint(step, policy=None if remat else _is_kept, prevent_cse=False)  # a loop needs no such care
    return ops.scan(step, x, stacks)


def _is_kept(primitive, *_, **__):
    """Whether a loop on JAX keeps an operation's result for the gradient: what takes longer than reading it again.

    By itself JAX keeps whatever the gradient reads, normalised images, masks and copies in float32 among it, three to
    four times as much. It is computed again from what is kept, as XLA does where there is no loop.
    """
    return primitive.name in ("dot_general", "conv_general_dilated", "custom_vjp_call", "reduce_sum")


def _scan_tensorflow(function, x, stacks, outputs, remat):
    """`scan` on TensorFlow, where `keras.ops.scan` takes only y that are like x; with `remat`, its gradient too.

    What the loop reads and writes is packed into few arrays, since each of them makes the trace longer.
    """
    import tensorflow as tf

    count, widths = stacks[0].shape[0], [each.shape[0] for each in outputs]
    vectors = [number for number, stack in enumerate(stacks) if len(stack.shape) == 2]
    others = [number for number, stack in enumerate(stacks) if len(stack.shape) != 2]
    lengths = [stacks[number].shape[1] for number in vectors]

    def pack(stacks):
        packed = [stacks[number] for number in others]
        return [tf.concat([stacks[number] for number in vectors], 1), *packed] if vectors else packed

    def unpack(packed):
        parts = tf.split(packed[0], lengths) if vectors else []
        weights = dict(zip([*vectors, *others], [*parts, *packed[bool(vectors) :]], strict=True))
        return [weights[number] for number in range(len(weights))]

    def array(shape, dtype):
        return tf.TensorArray(dtype, count, element_shape=shape, clear_after_read=False)  # which counts eagerly

    def forward(x, packed, keep):
        weights = [array(each.shape[1:], each.dtype).unstack(each) for each in packed]

        def step(index, x, written, inputs):
            inputs = [kept.write(index, x) for kept in inputs]
            x, y = function(x, unpack([each.read(index) for each in weights]))
            y = tf.stop_gradient(tf.concat(y, 0)) if written else None
            return index + 1, x, [each.write(index, y) for each in written], inputs

        written = [array((sum(widths),), outputs[0].dtype)] if widths else []
        state = (0, x, written, [array(x.shape, x.dtype)] if keep else [])
        _, x, written, inputs = tf.while_loop(lambda index, *_: index < count, step, state, maximum_iterations=count)
        return x, [each.stack() for each in written], weights, inputs

    def split(written):
        return tf.split(written[0], widths, 1) if widths else []

    if not remat:
        x, written, *_ = forward(x, pack(stacks), keep=False)
        return x, split(written)

    @tf.custom_gradient
    def run(x, *packed):
        last, written, weights, (inputs,) = forward(x, packed, keep=True)

        def backward(gradient, *_):
            def step(index, gradient, gradients):
                sources = [inputs.read(index), *[each.read(index) for each in weights]]
                with tf.GradientTape() as tape:
                    tape.watch(sources)
                    y, _ = function(sources[0], unpack(sources[1:]))
                gradient, *new = tape.gradient(y, sources, gradient, unconnected_gradients="zero")
                gradients = [each.write(index, value) for each, value in zip(gradients, new, strict=True)]
                return index - 1, gradient, gradients

            state = (count - 1, gradient, [array(each.shape[1:], each.dtype) for each in packed])
            _, gradient, gradients = tf.while_loop(lambda index, *_: index >= 0, step, state, maximum_iterations=count)
            return gradient, *[each.stack() for each in gradients]

        return (last, *written), backward

    last, *written = run(x, *pack(stacks))
    return last, split(written)
