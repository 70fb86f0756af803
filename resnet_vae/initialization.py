"""Initial kernels, on JAX drawn in a few lengths that are compiled once, instead of each shape."""

import math

import keras
import numpy as np

LENGTHS = (2**16, 2**22)  # the shortest that is long enough is drawn; a longer kernel in its own length
DRAWS = {  # distribution → how to draw it, and the standard deviation that it then has
    "truncated_normal": (keras.random.truncated_normal, 0.87962566103423978),
    "untruncated_normal": (keras.random.normal, 1.0),
    "uniform": (lambda shape, **options: keras.random.uniform(shape, -1.0, **options), 3**-0.5),
}


class CompiledOnce(keras.initializers.Initializer):
    """An initializer of kernels that scales variances, in less time on JAX, where each shape is compiled otherwise.

    It draws the same numbers: on JAX the n-th number of a seed does not depend on how many are drawn.

    Args:
        initializer: a `keras.initializers.VarianceScaling`, such as HeNormal, whose seed is a number.
    """

    def __init__(self, initializer):
        self.initializer = keras.initializers.get(initializer)

    def __call__(self, shape, dtype=None):
        size = math.prod(shape)
        length = next((length for length in LENGTHS if size <= length), size)
        draw, deviation = DRAWS[self.initializer.distribution]
        numbers = draw((length,), dtype=dtype, seed=self.initializer.seed)
        try:
            numbers = np.asarray(numbers)[:size]
        except TypeError:  # within a function that JAX traces there are no numbers
            return self.initializer(shape, dtype)
        inputs, outputs = (count * math.prod(shape[:-2]) for count in shape[-2:])
        fan = {"fan_in": inputs, "fan_out": outputs, "fan_avg": (inputs + outputs) / 2}[self.initializer.mode]
        scale = math.sqrt(self.initializer.scale / max(1.0, fan)) / deviation
        return np.reshape(numbers * numbers.dtype.type(scale), shape)

    def get_config(self):
        return {"initializer": keras.initializers.serialize(self.initializer)}


def compiled_once(initializer):
    """The initializer, by name or itself, as `CompiledOnce` where that is the same and quicker."""
    initializer = keras.initializers.get(initializer)
    scales = type(initializer).__call__ is keras.initializers.VarianceScaling.__call__  # and no class of its own
    if not scales or keras.backend.backend() != "jax":
        return initializer
    plain = isinstance(initializer.seed, int) and initializer.input_axes is initializer.output_axes is None
    return CompiledOnce(initializer) if plain else initializer
