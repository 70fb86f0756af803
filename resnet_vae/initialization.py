"""Kernel initializers; on JAX they draw random numbers in a few lengths, each compiled once, not in every shape."""

import math

import keras
import numpy as np

from resnet_vae.config import PACKAGE

LENGTHS = (2**16, 2**22)  # the shortest that is long enough is drawn; a longer kernel in its own length
DRAWS = {  # distribution → how to draw it, and the standard deviation that it then has
    "truncated_normal": (keras.random.truncated_normal, 0.87962566103423978),
    "untruncated_normal": (keras.random.normal, 1.0),
    "uniform": (lambda shape, **options: keras.random.uniform(shape, -1.0, **options), 3**-0.5),
}


@keras.saving.register_keras_serializable(PACKAGE)
class CompiledOnce(keras.initializers.Initializer):
    """A variance-scaling initializer that takes less time on JAX, where drawing compiles once for each shape.

    It gives the same numbers (in bfloat16, rounded differently): the n-th of a seed does not depend on how many are
    drawn.

    Args:
        initializer: a `keras.initializers.VarianceScaling`, such as HeNormal, whose seed is a number.
    """

    def __init__(self, initializer):
        self.initializer = initializer

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

    def clone(self):
        return CompiledOnce(self.initializer.clone())

    def get_config(self):
        return {"initializer": keras.initializers.serialize(self.initializer)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.initializers.get(config["initializer"]))


def compiled_once(initializer):
    """The initializer, by name or itself, as `CompiledOnce` where that is the same and quicker."""
    initializer = keras.initializers.get(initializer)
    scales = type(initializer).__call__ is keras.initializers.VarianceScaling.__call__  # and no class of its own
    if not scales or keras.backend.backend() != "jax":
        return initializer
    import jax

    plain = isinstance(initializer.seed, int) and initializer.input_axes is initializer.output_axes is None
    return CompiledOnce(initializer) if plain and jax.config.jax_threefry_partitionable else initializer


def another(initializer):
    """An initializer like it for one more kernel, since one alone draws the same numbers whenever it is called.

    Itself if it is a name or a function, draws on from a `keras.random.SeedGenerator`, or cannot be cloned.
    """
    seed = getattr(initializer, "seed", None)
    if not isinstance(initializer, keras.initializers.Initializer) or isinstance(seed, keras.random.SeedGenerator):
        return initializer
    try:
        return initializer.clone()
    except TypeError:  # without a get_config that has what its constructor needs
        return initializer
