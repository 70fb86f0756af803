"""Training: from a configuration to a run's folder."""

import csv
import math
import os
import time
from datetime import UTC, datetime

import keras
import numpy as np
from keras import ops

from resnet_vae.config import UserError
from resnet_vae.data import entropy_floor, load_data
from resnet_vae.normalization import PACKAGE
from resnet_vae.records import FIGURES, RecordError, environment, is_finished, write_json
from resnet_vae.vae import build_vae, devices, precision

PLATEAU = {"factor": 0.5, "patience": 25}  # of SCHEDULE=plateau, the post's
COLUMNS = ("epoch", *FIGURES, *(f"val_{name}" for name in FIGURES), "learning_rate", "seconds")


class TrainingError(UserError):
    """Training that cannot go on."""


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
            self.assign_sub(variable, variable * (self.decoupled_decay * rate))
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

    def get_config(self):
        return {**super().get_config(), "weight_decay": self.decoupled_decay, "decay": self.decay}


class Batches(keras.utils.PyDataset):
    """Batches of images for `fit` and `evaluate`: uint8, (batch, height, width, channels).

    Args:
        images: array (images, height, width, channels).
        batch_size: images a batch, fewer where there are fewer.
        seed: batches are whole and in an order that is a function of the seed and the epoch; without a seed all
            images come, in order.
    """

    def __init__(self, images, batch_size, seed=None):
        super().__init__()
        self.images, self.batch_size, self.seed = images, min(batch_size, len(images)), seed
        self.epoch = 0
        self._order()

    def _order(self):
        if self.seed is not None:
            self.order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.images))

    def __len__(self):
        whole = len(self.images) // self.batch_size
        return whole if self.seed is not None else math.ceil(len(self.images) / self.batch_size)

    def __getitem__(self, index):
        chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return (self.images[chosen if self.seed is None else self.order[chosen]],)

    def on_epoch_end(self):
        self.epoch += 1
        self._order()


class Recorder(keras.callbacks.Callback):
    """Write a row of history.csv after each epoch and, where asked, a plain line; keep the best epoch's weights.

    The best epoch is that of the lowest validation loss. Its weights are the model's when training ends.
    """

    def __init__(self, path, config):
        super().__init__()
        self.path, self.config = path, config
        self.rows, self.best, self.weights = [], None, None

    def on_train_begin(self, logs=None):
        self._write(COLUMNS, "w")

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        seconds = time.perf_counter() - self.began
        row = {"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}}
        row |= {"learning_rate": rate, "seconds": seconds}
        if not math.isfinite(row["val_loss"]):
            raise TrainingError(f"the validation loss is {row['val_loss']} in epoch {epoch + 1}; lower LEARNING_RATE")
        self.rows.append(row)
        if self.best is None or row["val_loss"] < self.best["val_loss"]:
            self.best, self.weights = row, self.model.get_weights()
        self._write([f"{row[name]:.6g}" if name != "epoch" else row[name] for name in COLUMNS], "a")
        if self.config.cmdline:
            print(
                f"epoch {epoch + 1}/{self.config.epochs}  loss {row['loss']:.1f}  "
                f"reconstruction {row['reconstruction']:.1f}  "
                f"kl {row['kl']:.2f}  val_loss {row['val_loss']:.1f}  val_kl {row['val_kl']:.2f}  {seconds:.1f} s"
                + ("" if self.config.loss_meaning == "negative ELBO" else f"  ({self.config.loss_meaning})"),
                flush=True,
            )

    def on_train_end(self, logs=None):
        self.model.set_weights(self.weights)
        self.weights = None

    def _write(self, values, mode):
        with open(self.path, mode, newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(values)


def compile_vae(vae, config, steps_per_epoch):
    """Compile a VAE with the optimizer and the schedule that a configuration asks for."""
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
    optimizer.build(vae.trainable_variables)  # or else Keras traces the first step twice
    vae.compile(optimizer)


def train(config, data=None):
    """Train the VAE that a configuration describes and record the run.

    A folder that holds a finished run of the same configuration is left as it is. The weights kept are those of the
    epoch with the lowest validation loss; the test images are looked at once, with these.

    Args:
        config: a `Config`.
        data: its `Data`, if it is loaded already.

    Returns:
        The run's folder, a Path, with config.json, history.csv, metrics.json, provenance.json and model.keras.

    Raises:
        UserError: data that cannot be had, a folder in use by another configuration or not writable, or a loss that
            is no longer a number.
    """
    folder = config.folder
    if is_finished(config):
        print(f"{folder} holds a finished run of this configuration")
        return folder
    data = data or load_data(config)
    config = config.model_copy(update={"image_shape": data.image_shape})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"values": config.model_dump(mode="json"), "origins": config.origins})
    except OSError as error:
        raise RecordError(f"OUTDIR {folder} cannot be written: {error.strerror}; choose another OUTDIR") from None
    print(config.describe())

    keras.utils.set_random_seed(config.seed)
    vae = build_vae(config)
    batches = Batches(data.train, config.batch_size, config.seed)
    compile_vae(vae, config, len(batches))
    recorder = Recorder(folder / "history.csv", config)
    callbacks = [keras.callbacks.TerminateOnNaN(raise_error=True), recorder]
    watched = {"monitor": "val_loss", "mode": "min"}
    if config.patience:
        stopping = keras.callbacks.EarlyStopping(patience=config.patience, min_delta=config.min_delta, **watched)
        callbacks.append(stopping)
    if config.schedule == "plateau":
        lowest = config.learning_rate / 1000
        callbacks.append(keras.callbacks.ReduceLROnPlateau(min_lr=lowest, **PLATEAU, **watched))
    if not config.cmdline:
        from tqdm.keras import TqdmCallback

        callbacks.append(TqdmCallback())

    ran_on = environment(keras.backend.backend(), devices())  # the code as it is now
    started, clock, cpu = datetime.now(UTC), time.perf_counter(), time.process_time()
    validation = Batches(data.validation, config.batch_size)
    try:
        vae.fit(
            batches, epochs=config.epochs, validation_data=validation, callbacks=callbacks, shuffle=False, verbose=0
        )
    except RuntimeError as error:
        if "NaN or Inf" not in str(error):
            raise
        raise TrainingError(
            f"the loss became not finite in epoch {len(recorder.rows) + 1}; lower LEARNING_RATE "
            f"({config.learning_rate:g}) or CLIP_NORM ({config.clip_norm:g}), or use PRECISION=float32"
        ) from None
    seconds, cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu

    save_model(vae, folder / "model.keras")
    metrics = {
        "loss_is": config.loss_meaning,
        "parameters": vae.encoder.count_params() + vae.decoder.count_params(),
        "epochs": len(recorder.rows),
        "best_epoch": recorder.best["epoch"],
        "hours": seconds / 3600,
        "train": {name: recorder.best[name] for name in FIGURES},
        "validation": {name: recorder.best[f"val_{name}"] for name in FIGURES},
        "validation_floor": entropy_floor(data.validation),
        "test": evaluate(vae, data.test, config.batch_size),
        "test_floor": entropy_floor(data.test),
    }
    trained = len(recorder.rows) * len(batches) * batches.batch_size
    write_json(
        folder / "provenance.json",
        {
            **ran_on,
            "precision": precision(config),
            "started": started.isoformat(timespec="seconds"),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "seconds_per_epoch": seconds / len(recorder.rows),
            "images_per_second": trained / seconds,
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
            },
        },
    )
    write_json(folder / "metrics.json", metrics)  # last: it marks the run as finished
    return folder


def evaluate(vae, images, batch_size):
    """The objective's figures on uint8 images: a dict of nats per image."""
    figures = vae.evaluate(Batches(images, batch_size), return_dict=True, verbose=0)
    return {name: float(figures[name]) for name in FIGURES}


def save_model(vae, path):
    """Save a model as .keras, whole or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    vae.save(partial)
    os.replace(partial, path)
