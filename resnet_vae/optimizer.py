"""The optimizer, and what a configuration makes of it."""

import keras
from keras import ops

from resnet_vae.config import PACKAGE
from resnet_vae.devices import settle

LONG = 2**14  # elements of a gradient from which on skipping a pass over it saves more than the `tf.cond` costs


@keras.saving.register_keras_serializable(PACKAGE)
class AdamW(keras.optimizers.Adam):
    """AdamW (https://arxiv.org/abs/1711.05101) with time decay: the rate is divided by 1 + decay × steps.

    Unlike `keras.optimizers.AdamW` it asks the schedule for the rate once a step and not once more a variable, which
    was more than a third of TensorFlow's first step.

    Args:
        learning_rate: a number or a schedule.
        weight_decay: share of every variable that is taken off it a step, times the rate.
        decay: the time decay, Keras 2's `decay`; it applies on top of a schedule or a plateau's reductions.
        **kwargs: as of `keras.optimizers.Adam`.
    """

    def __init__(self, learning_rate=0.001, weight_decay=0.004, *, decay=0.0, **kwargs):
        super().__init__(learning_rate, weight_decay=weight_decay, **kwargs)
        self.decay, self._of_the_step = decay, None  # within `apply` a dict: what is the same for all variables

    def apply(self, grads, trainable_variables=None):
        object.__setattr__(self, "_of_the_step", {})  # not tracked by TensorFlow, which would keep a trace's tensors
        try:
            super().apply(grads, trainable_variables)
        finally:
            object.__setattr__(self, "_of_the_step", None)

    def decayed(self, rate):
        """What the time decay leaves of a rate by now."""
        return rate / (1.0 + self.decay * ops.cast(self.iterations, "float32")) if self.decay else rate

    def current_rate(self):
        """The learning rate of the next step, time decay included, as a float.

        On JAX it is computed without compiling: a schedule's condition would be compiled anew at each call.
        """
        if keras.backend.backend() != "jax":
            return float(ops.convert_to_numpy(self.decayed(self.learning_rate)))
        import jax

        with jax.disable_jit():
            return float(self.decayed(self.learning_rate))

    def _scalars(self, learning_rate):
        """What is the same for all variables of a step: the rate, what decay takes, and Adam's arguments."""
        step, rate = ops.cast(self.iterations, "float32"), self.decayed(ops.cast(learning_rate, "float32"))
        adam = {
            "beta1_power": self.beta_1 ** (step + 1.0),
            "beta2_power": self.beta_2 ** (step + 1.0),
            "beta1": ops.convert_to_tensor(self.beta_1, "float32"),
            "beta2": ops.convert_to_tensor(self.beta_2, "float32"),
            "epsilon": ops.convert_to_tensor(self.epsilon, "float32"),
        }
        return rate, (self.weight_decay or 0.0) * rate, adam

    def _apply_weight_decay(self, variables):
        """Keras's, which would be a second one to that of `update_step`."""

    def update_step(self, gradient, variable, learning_rate):
        known = {} if self._of_the_step is None else self._of_the_step
        if not known:
            known["scalars"] = self._scalars(learning_rate)
        rate, decayed, adam = known["scalars"]
        if self.weight_decay and self._use_weight_decay(variable):
            self.assign(variable, variable * (1.0 - ops.cast(decayed, variable.dtype)))
        if keras.backend.backend() != "tensorflow":
            super().update_step(gradient, variable, rate)
            return
        import tensorflow as tf

        plain = variable.dtype == "float32" and not self.amsgrad and not isinstance(gradient, tf.IndexedSlices)
        if not plain or tf.distribute.has_strategy():
            super().update_step(gradient, variable, rate)
            return
        # The same update as one operation a variable: a pass over the memory instead of ten, and a shorter trace.
        index = self._get_variable_index(variable)
        moments = self._momentums[index].value, self._velocities[index].value
        m, v = (moment.handle for moment in moments)
        tf.raw_ops.ResourceApplyAdam(var=variable.handle, m=m, v=v, lr=rate, grad=gradient, **adam)

    def _clip_gradients(self, grads):
        if keras.backend.backend() != "tensorflow" or not self.global_clipnorm:
            return super()._clip_gradients(grads)
        import tensorflow as tf

        if not all(isinstance(grad, tf.Tensor) and grad.dtype == "float32" for grad in grads):
            return super()._clip_gradients(grads)
        # The same, but long gradients are passed over once where the norm is small enough, and not three times.
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(grad) for grad in grads]))
        short_enough = norm <= self.global_clipnorm
        share = tf.where(short_enough, 1.0, self.global_clipnorm / norm + (norm - norm))  # NaN for one that is infinite
        long = {number: grad for number, grad in enumerate(grads) if (grad.shape.num_elements() or LONG) >= LONG}
        if long:
            long = tf.cond(short_enough, lambda: long, lambda: {number: long[number] * share for number in long})
        return [long[number] if number in long else grad * share for number, grad in enumerate(grads)]

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


def prepare(optimizer, model):
    """Build the optimizer of a model and `settle` the process, so that steps take less time, the first one most."""
    optimizer.build(model.trainable_variables)  # or else Keras traces the first step twice
    settle()


def compile_vae(vae, config, steps_per_epoch):
    """Compile a VAE with the optimizer and the schedule that a configuration asks for; see `prepare`."""
    rate, steps = config.learning_rate, config.epochs * steps_per_epoch
    if config.schedule == "cosine":
        warmup = min(config.warmup_steps, steps // 2)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0 if warmup else rate, steps - warmup, warmup_target=rate if warmup else None, warmup_steps=warmup
        )
    vae.kl_warmup_steps = min(config.kl_warmup_steps, steps // 2)
    optimizer = AdamW(
        rate,
        weight_decay=config.weight_decay,
        beta_2=config.adam_beta_2,
        global_clipnorm=config.clip_norm or None,
        decay=config.decay,
    )
    prepare(optimizer, vae)
    vae.compile(optimizer)
