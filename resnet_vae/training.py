"""Training: from a configuration to a run's folder, in one go or in many."""

import hashlib
import math
import random
import re
import signal
import threading
import time
import weakref
from contextlib import contextmanager
from datetime import UTC, datetime

import filelock
import keras
import numpy as np
from keras import ops

from resnet_vae import checkpoints
from resnet_vae.config import AUGMENTATIONS, UserError, parse_words
from resnet_vae.data import augment, check_data_of, entropy_floor, load_data
from resnet_vae.devices import devices, precision
from resnet_vae.optimizer import compile_vae
from resnet_vae.records import (
    FIGURES,
    HISTORY,
    RecordError,
    csv_text,
    environment,
    is_finished,
    json_text,
    sha256_of,
    whole,
    write_json,
    write_text,
)
from resnet_vae.vae import build_vae, count_parameters, kl_divergence

PLATEAU = {"factor": 0.5, "patience": 25}  # of SCHEDULE=plateau, the post's
ROLLBACK_FACTOR = 0.5  # of the learning rate, each time that a training goes back
SHARE = 0.01  # of the time that writing checkpoints may take
COLUMNS = (*HISTORY, "learning_rate", "seconds", "rollbacks")
OUT_OF_MEMORY = re.compile("RESOURCE_?EXHAUSTED|out ?of ?memory", re.IGNORECASE)


class TrainingError(UserError):
    """Training that cannot go on."""


class DivergenceError(TrainingError):
    """A loss or a weight that is no longer a number."""


class InterruptedTrainingError(UserError):
    """Training stopped by a signal, after its checkpoint was written if there was something to save."""

    def __init__(self, number, folder):
        self.exit_code = 128 + number  # as shells tell it
        then = f"goes on from the checkpoint in {folder}" if checkpoints.exists(folder) else "begins anew"
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command {then}")


class BusyError(UserError):
    """A run's folder that another process is training in."""

    exit_code = 4


class Batches(keras.utils.PyDataset):
    """Batches of images for `fit` and `evaluate`: uint8, (batch, height, width, channels).

    Args:
        images: array (images, height, width, channels), uint8 or floats in [0, 1].
        batch_size: images a batch, fewer where there are fewer.
        seed: batches are whole and in an order that is a function of the seed and the epoch; without a seed all
            images come, in order.
        epoch: number of the epoch, from 0; a `fit` of several epochs repeats it.
        skip: number of batches to leave out at the beginning.
        augmentations: words of `resnet_vae.data.augment`, whose chances are a function of seed, epoch and batch.

    Raises:
        ValueError: no images, or batches of none; unknown augmentations, or any without a seed.
    """

    def __init__(self, images, batch_size, seed=None, epoch=0, skip=0, augmentations=()):
        super().__init__()
        if len(images) < 1 or batch_size < 1:
            raise ValueError(f"{len(images)} images in batches of {batch_size}; expected one or more of both")
        augmentations = parse_words(augmentations)
        if unknown := [word for word in augmentations if word not in AUGMENTATIONS]:
            raise ValueError(f"augmentations {', '.join(unknown)}; expected some of {', '.join(AUGMENTATIONS)}")
        if augmentations and seed is None:
            raise ValueError(f"augmentations {', '.join(augmentations)} need a seed, as seed=0")
        self.images, self.batch_size, self.skip = images, min(batch_size, len(images)), skip
        self.seed, self.epoch, self.augmentations = seed, epoch, augmentations
        self.order = None if seed is None else np.random.default_rng((seed, epoch)).permutation(len(images))

    def __len__(self):
        count = len(self.images) / self.batch_size
        return (math.ceil(count) if self.order is None else math.floor(count)) - self.skip

    def __getitem__(self, index):
        index += self.skip
        chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
        images = self.images[chosen if self.order is None else self.order[chosen]]
        if self.augmentations:
            images = augment(images, self.augmentations, np.random.default_rng((self.seed, self.epoch, index)))
        return (images,)


def feed(batches):
    """`Batches` in the form that `fit` and `evaluate` iterate fastest.

    On TensorFlow a `tf.data.Dataset` that does not tune itself. The one that Keras makes does, and each `fit` ends with
    a wait for the tuner, whose naps double up to a minute: epochs took up to twice as long.
    """
    if keras.backend.backend() != "tensorflow":
        return batches
    import tensorflow as tf

    source = weakref.ref(batches)  # TensorFlow keeps the function for as long as the process lives

    def generate():
        batches = source()
        for index in range(len(batches)):
            yield batches[index]

    size = None if batches.order is None else batches.batch_size  # where it is known, the trace is shorter
    images = tf.TensorSpec((size, *batches.images.shape[1:]), batches.images.dtype)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=(images,))
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = dataset.with_options(options)
    dataset.batches = batches  # they live as long as the data set
    return dataset


def without_progress(losses, patience, min_delta=0.0):
    """How often `patience` epochs in a row brought no loss that is lower by min_delta; at the first, training stops.

    The rule of `keras.callbacks.EarlyStopping` and `ReduceLROnPlateau`, as a function of the losses so far, so that
    there are no counters that an interruption could lose.
    """
    best, waited, times = math.inf, 0, 0
    for loss in losses:
        if loss < best - min_delta:
            best, waited = loss, 0
            continue
        waited += 1
        if waited == patience:
            waited, times = 0, times + 1
    return times


class _AsTheyAre(keras.callbacks.CallbackList):
    """Hands on the figures of a step as they are, on a GPU perhaps yet to be computed, where Keras waits for them."""

    def on_train_batch_end(self, batch, logs=None):
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs)

    def on_test_batch_end(self, batch, logs=None):
        for callback in self.callbacks:
            callback.on_test_batch_end(batch, logs)


class Training(keras.callbacks.Callback):
    """One run's training, which may be stopped at any step and resumes from its checkpoint with the same results.

    As a callback it looks after `fit` and `evaluate`: a loss that is not finite or a signal stops them, and now and
    then they wait for a checkpoint.

    Args:
        config: a `Config`.
        data: its `Data`.
        folder: the run's; a checkpoint there is gone on from.
        before: the training that diverged, which goes back to its checkpoint with this one, to go on at half the rate.

    Raises:
        RecordError: there are checkpoints, but none is whole, or they are of another configuration, data or code.
    """

    KEPT = (
        "identity",
        "rows",
        "step",
        "figures",
        "rollbacks",
        "sessions",
        "seconds",
        "cpu_seconds",
        "saving_seconds",
        "began",
        "started",
    )

    def __init__(self, config, data, folder, before=None):
        super().__init__()
        self.config, self.data, self.folder = config, data, folder
        self.identity = identity(config, data)
        self.rows = []  # of the history, a dict an epoch
        self.step = 0  # steps done in the epoch after those
        self.figures = None  # that epoch's training figures, while it is being validated
        self.rollbacks = self.sessions = 0
        self.seconds = self.cpu_seconds = self.saving_seconds = 0.0  # of all sessions
        self.began = 0.0  # when the epoch began
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.interval, self.signal, self.bar = config.checkpoint_seconds, None, None
        self.metrics = self.best_weights = self.loss = None

        if before and before.figures is not None and before.saved == before._position():
            checkpoints.remove_newest(folder)  # written in the validation that failed: of weights that are lost
        loaded = checkpoints.load(folder)
        if loaded:
            checkpoints.check_identity(folder, loaded[0]["identity"], self.identity)
            for name in self.KEPT:
                setattr(self, name, loaded[0][name])
        self.sessions += 1
        if before:
            self._take_over(before)
        keras.utils.set_random_seed(config.seed)
        self.vae = build_vae(config)
        self.set_model(self.vae)
        self.steps = len(Batches(data.train, config.batch_size, config.seed))
        self.rate = config.learning_rate * ROLLBACK_FACTOR**self.rollbacks
        compile_vae(self.vae, config.replace(learning_rate=self.rate), self.steps)
        if loaded:
            self._restore(loaded[1])
        self._remember()
        if before:
            self.save()

    def _take_over(self, before):
        """Count one more rollback; the time that the diverged training took stays a part of this run's."""
        before._clock()
        self.rollbacks = before.rollbacks + 1
        for name in ("sessions", "seconds", "cpu_seconds", "saving_seconds", "started"):
            setattr(self, name, getattr(before, name))

    def _variables(self):
        """The state of the model and the optimizer; the rate follows from the configuration and the rows."""
        vae = self.model  # on JAX this brings the variables up to date
        optimizer = [variable for variable in vae.optimizer.variables if variable.name != "learning_rate"]
        return [*vae.trainable_variables, *vae.non_trainable_variables, *optimizer]

    def _restore(self, arrays):
        variables = self._variables()
        metrics = len(variables) + len(self.vae.metrics_variables)
        for variable, array in zip(variables, arrays, strict=False):
            variable.assign(array)
        self.metrics, self.best_weights = arrays[len(variables) : metrics], arrays[metrics:] or None

    def save(self):
        """Write the checkpoint.

        Raises:
            RecordError: it cannot be written.
            DivergenceError: a weight is not finite.
        """
        self._check_loss()
        began = self._clock()

        def arrays():
            # what `fit` is yet to be given back is in no variable
            for variable in [*self._variables(), *(self.metrics or self.vae.metrics_variables)]:
                array = ops.convert_to_numpy(variable)
                if not np.all(np.isfinite(array)):
                    raise self._diverged(f"the weight {variable.path} is not finite")
                yield array
            yield from self.best_weights or []

        checkpoints.save(self.folder, {name: getattr(self, name) for name in self.KEPT}, arrays())
        self._remember()
        self.saving_seconds += self.saved_at - began
        self.interval = max(self.config.checkpoint_seconds, (self.saved_at - began) / SHARE)

    def tell_where(self):
        """Print where training goes on, which after going back may be at the beginning."""
        print(f"going on in epoch {len(self.rows) + 1}, after step {self.step} of {self.steps}", flush=True)

    def _position(self):
        return len(self.rows), self.step, self.figures is None

    def _remember(self):
        self.saved, self.saved_at = self._position(), time.perf_counter()
        self.clock, self.cpu_clock = self.saved_at, time.process_time()

    def _clock(self):
        """Add the time since the last call to that of the run; returns the time."""
        now, cpu = time.perf_counter(), time.process_time()
        self.seconds += now - self.clock
        self.cpu_seconds += cpu - self.cpu_clock
        self.clock, self.cpu_clock = now, cpu
        return now

    def _diverged(self, what):
        config, place = self.config, f"epoch {len(self.rows) + 1}, step {self.step}"
        rollbacks = f"raise ROLLBACKS ({config.rollbacks})" if config.rollbacks else "set ROLLBACKS"
        advice = [f"lower LEARNING_RATE ({config.learning_rate:g})"]
        advice += [f"lower CLIP_NORM ({config.clip_norm:g})" if config.clip_norm else "set CLIP_NORM, as to 200"]
        advice += ["use PRECISION=float32"] if precision(config) != "float32" else []
        return DivergenceError(f"{what} in {place}; {rollbacks}, or, with another OUTDIR, {' or '.join(advice)}")

    def on_epoch_begin(self, epoch, logs=None):
        if self.metrics and self.step:  # fit has just emptied them
            for variable, array in zip(self.model.metrics_variables, self.metrics, strict=True):
                variable.assign(array)
        self.metrics = None

    def on_train_batch_end(self, batch, logs=None):
        self._check_loss()  # of the step before, while a GPU computes this one
        self.step, self.loss = self.step + 1, logs["loss"]
        if self.bar is not None:
            self.bar.update()
        if self.step < self.steps:  # after the last one, the epoch's figures are still to be taken
            self._look_up()

    def _check_loss(self):
        """Wait for the mean loss of the epoch's steps so far, which must be a number: one that is not stays in it."""
        if self.loss is None:
            return
        loss, self.loss = float(self.loss), None
        if not math.isfinite(loss):
            raise self._diverged(f"the loss is {loss}")
        if self.bar is not None:
            self.bar.set_postfix({"epoch": len(self.rows) + 1, "loss": f"{loss:.1f}"}, refresh=False)

    def on_test_batch_end(self, batch, logs=None):
        self._look_up()

    def _look_up(self):
        due = self.signal or time.perf_counter() - self.saved_at > self.interval
        if due and self.saved != self._position():  # which validation does not change
            self.save()
        if self.signal:
            raise InterruptedTrainingError(self.signal, self.folder)

    def _on_signal(self, number, frame):
        self.signal = number
        if self._position() == self.saved:  # nothing to save, nothing to wait for
            raise KeyboardInterrupt  # which passes through all that Keras and TensorFlow catch; `run` tells of it

    def run(self):
        """Train to the end.

        Raises:
            DivergenceError: a loss or a weight is not finite.
            InterruptedTrainingError: SIGINT or SIGTERM came; what was trained is saved.
        """
        handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            if not self.config.cmdline:
                from tqdm.auto import tqdm

                total, done = self.config.epochs * self.steps, len(self.rows) * self.steps + self.step
                self.bar = tqdm(total=total, initial=done, unit="step")
            self._write_history()
            while not self._is_over():
                self._run_epoch()
            if self.saved != self._position():
                self.save()
            if self.signal:  # which came when no step was to follow
                raise InterruptedTrainingError(self.signal, self.folder)
        except KeyboardInterrupt:
            if not self.signal:
                raise
            raise InterruptedTrainingError(self.signal, self.folder) from None
        finally:
            if self.bar is not None:
                self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _losses(self):
        return [row["val_loss"] for row in self.rows]

    def _is_over(self):
        config = self.config
        stopped = config.patience and without_progress(self._losses(), config.patience, config.min_delta)
        return len(self.rows) >= config.epochs or stopped > 0

    def _run_epoch(self):
        config, data = self.config, self.data
        if config.schedule == "plateau":
            times = without_progress(self._losses(), PLATEAU["patience"])
            self.vae.optimizer.learning_rate = max(self.rate * PLATEAU["factor"] ** times, self.rate / 1000)
        if self.step < self.steps:
            epoch = len(self.rows)
            batches = Batches(data.train, config.batch_size, config.seed, epoch, self.step, config.augment)
            callbacks = _AsTheyAre([self], add_history=True, model=self.vae)
            self.vae.fit(feed(batches), shuffle=False, verbose=0, callbacks=callbacks)
            self._check_loss()
        if self.figures is None:
            self.figures = {name: float(value) for name, value in self.vae.get_metrics_result().items()}
        if config.norm_batches:  # once more where a validation was interrupted: the same weights, the same batches
            batches = Batches(data.train, config.batch_size, config.seed, len(self.rows), 0, config.augment)
            self.vae.calibrate(feed(batches), steps=min(config.norm_batches, self.steps))
        watched = _AsTheyAre([self], model=self.vae)
        validation = evaluate(self.vae, data.validation, config.batch_size, watched)
        if not math.isfinite(validation["loss"]):
            raise self._diverged(f"the validation loss is {validation['loss']}")
        self._clock()
        row = {"epoch": len(self.rows) + 1, **{name: self.figures[name] for name in FIGURES}}
        row |= {f"val_{name}": value for name, value in validation.items()}
        row["learning_rate"] = self.vae.optimizer.current_rate()
        row |= {"seconds": self.seconds - self.began, "rollbacks": self.rollbacks}
        if row["val_loss"] < min(self._losses(), default=math.inf):
            self.best_weights = self.vae.get_weights()
        self.rows.append(row)
        self.step, self.figures, self.began = 0, None, self.seconds
        self._write_history()
        if config.cmdline:
            print(
                f"epoch {row['epoch']}/{config.epochs}  loss {row['loss']:.1f}  "
                f"reconstruction {row['reconstruction']:.1f}  kl {row['kl']:.2f}  val_loss {row['val_loss']:.1f}  "
                f"val_kl {row['val_kl']:.2f}  {row['seconds']:.1f} s"
                + ("" if config.loss_meaning == "negative ELBO" else f"  ({config.loss_meaning})"),
                flush=True,
            )

    def _write_history(self):
        rows = [{n: f"{v:.6g}" if isinstance(v, float) else v for n, v in row.items()} for row in self.rows]
        write_text(self.folder / "history.csv", csv_text(rows, COLUMNS))


def identity(config, data):
    """What must match for a checkpoint to be resumed: recipe, data, code, libraries, precision."""
    programs = checkpoints.programs(keras.backend.backend())
    return {**config.recipe(), "data": data.fingerprint, **programs, "precision": precision(config)}  # and not "auto"


@contextmanager
def _generators_kept():
    """Leave Python's and NumPy's global generators as they were: a training's seed is set in them, too."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@_generators_kept()
def train(config, data=None):
    """Train the VAE that a configuration describes and record the run.

    A folder that holds a finished run of the same configuration, and of the same data where they are given, is left as
    it is; an unfinished one is continued. The weights kept are those of the epoch with the lowest validation loss;
    the test images are looked at once, with these.

    With config.deterministic TensorFlow is asked for deterministic operations, for the whole process. Keras's global
    generator is set to config.seed; those of Python and of NumPy are afterwards as they were.

    Args:
        config: a `Config`.
        data: its `Data`, if it is loaded already.

    Returns:
        The run's folder, a Path, with config.json, history.csv, metrics.json, provenance.json and model.keras.

    Raises:
        UserError: data that cannot be had, or are not the configuration's; a folder of another configuration, other
            data or another process, or that cannot be written; a checkpoint that is damaged; a loss that is no longer
            a number; too little memory; a signal to stop.
    """
    folder = config.folder
    if data is not None:
        check_data_of(config, data)
    if is_finished(config, data):
        checkpoints.remove(folder)  # of a process that was killed when it had recorded the run
        print(f"{folder} holds a finished run of this configuration")
        return folder
    data = data or load_data(config)
    config = config.model_copy(update={"image_shape": data.image_shape})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock", timeout=0):
            try:
                if not is_finished(config, data):  # by another process meanwhile
                    _train(config, data, folder)
            finally:
                (folder / "lock").unlink(missing_ok=True)
    except filelock.Timeout:
        raise BusyError(
            f"{folder} is in use by another process, which trains there; wait for it, or choose another OUTDIR"
        ) from None
    except BrokenPipeError:  # nobody reads what is printed
        raise
    except OSError as error:
        raise RecordError(
            f"{error.filename or folder} cannot be written: {error.strerror}; choose another OUTDIR, or make room"
        ) from None
    except Exception as error:
        if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}")):
            raise
        raise TrainingError(
            f"out of memory; set REMAT=1, or, with another OUTDIR, lower BATCH_SIZE ({config.batch_size}) or WIDTH "
            f"({config.width:g})"
        ) from None
    return folder


def be_deterministic():
    """From here on compute the same bits each time, in the whole process: on TensorFlow this has to be asked for.

    JAX does so on CPUs by itself, on GPUs where XLA_FLAGS has --xla_gpu_deterministic_ops=true. PyTorch is not asked.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def _train(config, data, folder):
    if config.deterministic:
        be_deterministic()
    print(config.describe())
    ran_on = environment(keras.backend.backend(), devices())  # the code as it is now
    for path in folder.glob("partial-[0-9]*-????????-*"):  # left by a process that was killed
        path.unlink()
    if (folder / "config.json").exists():
        for path in folder.glob("evaluation-*.json"):  # of the run that was there
            path.unlink()
    training = Training(config, data, folder)
    write_json(folder / "config.json", {"values": config.model_dump(mode="json"), "origins": config.origins})
    if training.sessions > 1:
        training.tell_where()
    while True:
        try:
            training.run()
            break
        except DivergenceError as error:
            if training.rollbacks >= config.rollbacks:
                raise
            print(f"{error}; going back to the last good checkpoint, to go on at half the rate", flush=True)
            stopped = training.signal  # while the step that diverged was computed
            training = Training(config, data, folder, training)
            training.tell_where()
            if stopped:
                raise InterruptedTrainingError(stopped, folder) from None

    _record(training, ran_on)
    checkpoints.remove(folder)


def _record(training, ran_on):
    """Write what a training that has ended leaves in its folder; metrics.json last."""
    config, data, folder = training.config, training.data, training.folder
    vae, best = training.vae, min(training.rows, key=lambda row: row["val_loss"])
    vae.set_weights(training.best_weights)
    with whole(folder / "model.keras") as partial:
        vae.save(partial)
    epochs = len(training.rows)
    metrics = {
        "loss_is": config.loss_meaning,
        "parameters": count_parameters(vae),
        "epochs": epochs,
        "best_epoch": best["epoch"],
        "hours": training.seconds / 3600,
        "train": {name: best[name] for name in FIGURES},
        "validation": {name: best[f"val_{name}"] for name in FIGURES},
        "validation_floor": entropy_floor(data.validation),
        "test": score(vae, data.test, config.batch_size),
        "test_floor": entropy_floor(data.test),
    }
    files = {name: sha256_of(folder / name) for name in ("config.json", "history.csv", "model.keras")}
    files["metrics.json"] = hashlib.sha256(json_text(metrics).encode()).hexdigest()
    write_json(
        folder / "provenance.json",
        {
            **ran_on,
            "precision": precision(config),
            "started": training.started,
            "sessions": training.sessions,
            "seconds": training.seconds,
            "cpu_seconds": training.cpu_seconds,
            "checkpoint_seconds": training.saving_seconds,
            "seconds_per_epoch": training.seconds / epochs,
            "images_per_second": epochs * training.steps * min(config.batch_size, len(data.train)) / training.seconds,
            "data": {
                "name": data.name,
                "fingerprint": data.fingerprint,
                "train": len(data.train),
                "validation": len(data.validation),
                "test": len(data.test),
            },
            "files": files,
        },
    )
    write_json(folder / "metrics.json", metrics)  # it marks the run as finished


def evaluate(vae, images, batch_size, callbacks=None):
    """The objective's figures on uint8 images: a dict of nats per image."""
    figures = vae.evaluate(feed(Batches(images, batch_size)), return_dict=True, verbose=0, callbacks=callbacks)
    return {name: float(figures[name]) for name in FIGURES}


def score(vae, images, batch_size):
    """The figures of `evaluate`, and where their loss is no bound on the likelihood, "bound", the negative ELBO.

    It has the whole KL of the posterior that is sampled from: under the published objective that posterior's
    log-variance is twice what the objective's own KL counts.
    """
    figures = evaluate(vae, images, batch_size)
    if vae.objective == "published" or vae.beta != 1:
        mean, log_var = vae.encoder.predict(feed(Batches(images, batch_size)), verbose=0)
        kl = ops.convert_to_numpy(kl_divergence(mean, vae.sampler.log_variance(log_var)))
        figures["bound"] = figures["reconstruction"] + float(kl.mean(dtype="float64"))
    return figures
