"""The optimizer, and what a configuration makes of it."""

import keras
from keras import ops

from resnet_vae.normalization import PACKAGE


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

    def __init__(self, learning_rate=0.001, weight_decay=0.004, decay=0.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.decoupled_decay, self.decay = weight_decay, decay

    def apply(self, grads, trainable_variables=None):
        step = ops.cast(self.iterations, "float32")
        self._of_the_step = 1.0 + self.decay * step, [beta ** (step + 1.0) for beta in (self.beta_1, self.beta_2)]
        super().apply(grads, trainable_variables)
        del self._of_the_step

    def update_step(self, gradient, variable, learning_rate):
        slowdown, powers = self._of_the_step
        rate = ops.cast(learning_rate, "float32") / slowdown if self.decay else learning_rate
        if self.decoupled_decay:
            self.assign(variable, variable * (1.0 - self.decoupled_decay * rate))
        if keras.backend.backend() != "tensorflow" or self.amsgrad:
            super().update_step(gradient, variable, rate)
            return
        import tensorflow as tf

        # The same update as one operation a variable: a pass over the memory instead of ten, and a shorter trace.
        index = self._get_variable_index(variable)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=powers[0],
            beta2_power=powers[1],
            lr=rate,
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def _clip_gradients(self, grads):
        if keras.backend.backend() != "tensorflow" or not self.global_clipnorm or None in grads:
            return super()._clip_gradients(grads)
        import tensorflow as tf

        # The same, but the gradients are passed over once where they are short enough, and not three times.
        norm = tf.sqrt(2.0 * tf.add_n([tf.nn.l2_loss(grad) for grad in grads]))

        def shortened():
            return [grad * (self.global_clipnorm / norm) for grad in grads]

        return tf.cond(norm <= self.global_clipnorm, lambda: grads, shortened)

    def get_config(self):
        return {**super().get_config(), "weight_decay": self.decoupled_decay, "decay": self.decay}


def prepare(optimizer, model):
    """Have the first step of a model with an optimizer take less time.

    On TensorFlow without a GPU this switches the rewriting of graphs off, for the whole process.
    """
    optimizer.build(model.trainable_variables)  # or else Keras traces the first step twice
    if keras.backend.backend() == "tensorflow" and not model.supports_jit:
        import tensorflow as tf

        # It takes a fifth of the first step and makes no other step quicker.
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


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
