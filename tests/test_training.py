import gc
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops
from matplotlib.image import imread
from test_results import write_run

from resnet_vae import Config, build_vae, checkpoints, load_data, load_run, plots, train
from resnet_vae.blocks import ResidualBlock
from resnet_vae.config import UserError
from resnet_vae.data import DataError, entropy_floor
from resnet_vae.devices import computes_on_gpu
from resnet_vae.optimizer import LONG, AdamW, compile_vae
from resnet_vae.plots import draw_run
from resnet_vae.records import FIGURES, PICTURES, RecordError, is_finished, read_run, read_sweep, sha256_of, write_json
from resnet_vae.results import evaluate_run, write_table
from resnet_vae.training import (
    COLUMNS,
    PLATEAU,
    Batches,
    DivergenceError,
    InterruptedTrainingError,
    Training,
    TrainingError,
    evaluate,
    feed,
    identity,
    without_progress,
)
from resnet_vae.vae import VAE
from resnet_vae.verify import differences, verify

RNG = np.random.default_rng(0)


def test_batches_are_a_function_of_seed_and_epoch():
    images = np.arange(10, dtype="uint8").reshape(10, 1, 1, 1)

    def epoch(seed, number, skip=0):
        batches = Batches(images, 4, seed, number, skip)
        return [batches[i][0].ravel().tolist() for i in range(len(batches))]

    first, second = epoch(0, 0), epoch(0, 1)
    assert [first, second] == [epoch(0, 0), epoch(0, 1)]
    assert first != second
    assert epoch(0, 0, skip=1) == first[1:]
    assert first != epoch(1, 0)
    assert [len(batch) for batch in first] == [4, 4]
    assert len({*first[0], *first[1]}) == 8
    alike = np.tile(RNG.integers(0, 256, (1, 16, 16, 1), "uint8"), (8, 1, 1, 1))  # so that only the changes differ

    def changed(seed, number, index, skip=0):
        return Batches(alike, 4, seed, number, skip, ("shift",))[index - skip][0].tobytes()

    places = [(seed, number, index) for seed in (0, 1) for number in (0, 1) for index in (0, 1)]
    assert len({changed(*place) for place in places}) == 8
    assert changed(1, 1, 1) == changed(1, 1, 1, skip=1)
    in_order = Batches(images, 4)
    assert [in_order[i][0].ravel().tolist() for i in range(len(in_order))] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert np.shares_memory(in_order[0][0], images)
    assert len(Batches(images, 64, 0)) == 1
    with pytest.raises(ValueError, match="augmentations flip need a seed, as seed=0"):
        Batches(images, 4, augmentations=("flip",))
    with pytest.raises(ValueError, match="augmentations Flip, rotate; expected some of flip, shift, color"):
        Batches(images, 4, 0, augmentations="Flip, rotate")
    for few, size in ((images[:0], 4), (images, 0)):
        with pytest.raises(ValueError, match=f"{len(few)} images in batches of {size}; expected one or more of both"):
            Batches(few, size)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere these are the batches themselves")
def test_what_is_fed_to_tensorflow_is_the_batches_and_does_not_tune_itself():
    images = np.random.default_rng(0).integers(0, 256, (10, 1, 1, 1), "uint8")
    for seed in (None, 0):
        batches = Batches(images, 4, seed)
        dataset = feed(batches)
        assert len(dataset) == len(batches) == (3 if seed is None else 2)
        for (fed,), index in zip(dataset, range(len(batches)), strict=True):
            np.testing.assert_array_equal(fed.numpy(), batches[index][0])
        assert dataset.options().autotune.enabled is False  # the tuner's naps are waited for when `fit` ends


def test_an_epoch_is_of_the_training_images_and_tested_on_the_others(tmp_path, monkeypatch):
    """In an order, and with changes, of its seed and number; and the weights begin as the seed has them."""
    made = []

    class Noted(Batches):
        def __init__(self, images, *arguments):
            super().__init__(images, *arguments)
            made.append((images, *arguments))

    monkeypatch.setattr("resnet_vae.training.Batches", Noted)
    config = Config(**{**TINY, "epochs": 2, "batch_size": 512}, seed=3, augment="flip", norm_batches=0, cmdline=True)
    data = load_data(config)
    training = Training(config, data, tmp_path / "none")
    other = Training(config.replace(seed=4), data, tmp_path / "none")
    assert not np.array_equal(*(each.vae.encoder.get_layer("mean").get_weights()[0] for each in (training, other)))
    made.clear()
    training.folder = tmp_path
    training.run()
    parts = [
        (data.train, 512, 3, 0, 0, ("flip",)),
        (data.validation, 512),
        (data.train, 512, 3, 1, 0, ("flip",)),
        (data.validation, 512),
    ]
    assert [arguments for _, *arguments in made] == [arguments for _, *arguments in parts]
    assert all(images is expected for (images, *_), (expected, *_) in zip(made, parts, strict=True))


def test_adamw_with_decay_is_the_formula():
    """Five steps against float64 NumPy: AdamW's update at a rate divided by 1 + decay × steps, of limited gradients."""
    rate, decay, wd, b1, b2, eps, longest = 0.1, 0.5, 0.01, 0.9, 0.999, 1e-7, 100.0
    parts = slice(0, 3), slice(3, 3 + LONG)
    gradients = np.random.default_rng(0).standard_normal((5, 3 + LONG)) * np.array([[2], [0.5], [1], [0.2], [3]])
    variables = [keras.Variable(np.ones(part.stop - part.start, "float32")) for part in parts]
    lengths = np.linalg.norm(gradients, axis=1)
    assert lengths.min() < longest < lengths.max()
    optimizer = AdamW(rate, weight_decay=wd, decay=decay, global_clipnorm=longest)
    expected, m, v = np.ones(3 + LONG), 0.0, 0.0
    for step, gradient in enumerate(gradients):
        optimizer.apply([ops.convert_to_tensor(gradient[part], "float32") for part in parts], variables)
        gradient = gradient * min(1, longest / lengths[step])
        slowed = rate / (1 + decay * step)
        expected = expected * (1 - wd * slowed)
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        corrected = m / (1 - b1 ** (step + 1)) * np.sqrt(1 - b2 ** (step + 1)) / (np.sqrt(v) + eps)  # as Keras has ε
        expected = expected - slowed * corrected
    for variable, part in zip(variables, parts, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(variable), expected[part], rtol=1e-5)
    assert float(ops.convert_to_numpy(optimizer.decayed(rate))) == pytest.approx(rate / (1 + 5 * decay))
    same = AdamW.from_config(optimizer.get_config())
    assert (same.decay, same.weight_decay) == (decay, wd)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX has float64 only where it is enabled")
def test_a_small_weight_decay_counts_in_double_precision():
    variable = keras.Variable(np.ones(3), dtype="float64")
    AdamW(1e-5, weight_decay=1e-3).apply([0 * variable], [variable])
    np.testing.assert_allclose(1 - ops.convert_to_numpy(variable), 1e-8, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        ("float32", {}),
        ("float64", {}),
        ("bfloat16", {}),
        ("float32", {"amsgrad": True}),
        ("float32", {"global_clipnorm": None, "clipnorm": 1.0}),
    ],
)
def test_adamw_is_kerass_own(dtype, more):
    """But for the time decay: weights without decay, other dtypes, rows of an embedding, a norm that overflows.

    The weight decay can be read and set, and a variable updated by itself.
    """
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "global_clipnorm": 1.0, **more}
    values = []
    for kind in (AdamW, keras.optimizers.AdamW):
        optimizer, ones = kind(**options), keras.ops.ones((2, 3), dtype)
        variables = [keras.Variable(ones, name=name) for name in ("kernel", "bias")]
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        for size in (3, 0, 3):  # of one step without a gradient, where the variants of Adam differ
            optimizer.apply([size * ones, -ones], variables)
            optimizer.weight_decay /= 2
        optimizer.weight_decay = None
        optimizer.apply([ones, ones], variables)
        optimizer.update_step(ones, variables[0], keras.ops.convert_to_tensor(0.1))
        steps = [keras.ops.convert_to_numpy(keras.ops.cast(variable, "float64")) for variable in variables]
        optimizer.apply([1e30 * ones, ones], variables)
        lost = keras.ops.convert_to_numpy(keras.ops.isnan(variables[1]))
        values.append([*steps, lost])

        embedding = keras.Sequential([keras.Input((2,), dtype="int32"), keras.layers.Embedding(4, 3, "ones")])
        embedding.compile(kind(**options), "mse")
        embedding.train_on_batch(np.array([[0, 1]]), np.zeros((1, 2, 3)))
        values[-1].append(embedding.get_weights()[0])

        dense = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_initializer="ones", dtype=dtype)])
        dense.compile(kind(**options), "mse")
        dense.train_on_batch(np.ones((2, 4)), np.zeros((2, 3)))
        values[-1].append(keras.ops.convert_to_numpy(keras.ops.cast(dense.weights[0], "float64")))
    for ours, theirs in zip(*values, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2 if dtype == "bfloat16" else 1e-5)


REPLICAS = """
import keras, numpy as np, tensorflow as tf
from resnet_vae.optimizer import AdamW
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
for kind in (AdamW, keras.optimizers.AdamW):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, kernel_initializer="ones")])
        model.compile(kind(0.1, weight_decay=0.5), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 2)), batch_size=4, verbose=0)
    print(*model.get_weights()[0].ravel())
"""


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow tracks what is given to an optimizer")
def test_a_traced_step_leaves_no_tensor_in_the_optimizer():
    import tensorflow as tf

    optimizer, variable = AdamW(), keras.Variable([1.0, 2.0])
    optimizer.build([variable])
    tf.function(lambda: optimizer.apply([tf.ones(2)]))()
    assert optimizer._of_the_step is None
    assert "_of_the_step" not in optimizer._trackable_children()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow can be told of a GPU not to use it")
def test_a_gpu_that_tensorflow_may_not_use_is_none(monkeypatch):
    import tensorflow as tf

    hidden = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: [hidden])
    assert not computes_on_gpu()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's strategies")
def test_adamw_in_several_replicas_is_kerass_own():
    """Each of them has a thread."""
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (np.array(line.split(), "float64") for line in done.stdout.splitlines())
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_schedules():
    """Rates after some steps: half of a short training is the longest warm-up."""
    vae = build_vae(Config(**TINY))
    for settings, per_epoch, steps, rates in (
        ({"epochs": 21, "warmup_steps": 10}, 10, (0, 10, 110, 210), (0, 1, 0.5, 0)),
        ({"epochs": 21, "warmup_steps": 10, "schedule": "constant"}, 10, (0, 10, 110, 210), (1, 1, 1, 1)),
        ({"epochs": 2, "warmup_steps": 100}, 4, (2, 4, 8), (0.5, 1, 0)),
        ({"epochs": 2, "warmup_steps": 0}, 4, (0, 4, 8), (1, 0.5, 0)),
    ):
        config = Config(**{**TINY, "kl_warmup_steps": 500, "learning_rate": 0.3, **settings})
        compile_vae(vae, config, per_epoch)
        assert vae.kl_warmup_steps == min(500, config.epochs * per_epoch // 2)
        for step, rate in zip(steps, rates, strict=True):
            vae.optimizer.iterations.assign(step)
            assert float(ops.convert_to_numpy(vae.optimizer.learning_rate)) == pytest.approx(0.3 * rate, abs=1e-6)


@pytest.fixture
def copied_run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "copy")


PROVENANCE = "provenance.json"


def test_a_finished_run_is_recorded_whole(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.json", "history.csv", "metrics.json", PROVENANCE, "model.keras"}
    run = read_run(finished_run)
    assert [row["epoch"] for row in run.history] == [1, 2, 3]
    losses = {*FIGURES, *(f"val_{name}" for name in FIGURES)}
    assert set(run.history[0]) == losses | {"epoch", "learning_rate", "seconds", "rollbacks"}
    best = min(run.history, key=lambda row: row["val_loss"])
    assert run.metrics["best_epoch"] == best["epoch"]
    for name in FIGURES:
        assert run.metrics["train"][name] == pytest.approx(best[name], rel=1e-5)
        assert run.metrics["validation"][name] == pytest.approx(best[f"val_{name}"], rel=1e-5)
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert run.history[-1]["learning_rate"] < run.history[0]["learning_rate"]
    data = load_data(run.config)
    assert run.provenance["data"]["fingerprint"] == data.fingerprint
    assert run.metrics["validation_floor"] == entropy_floor(data.validation)
    assert run.provenance["backend"] == keras.backend.backend()
    assert run.provenance["versions"][keras.backend.backend()]
    told = run.provenance
    assert {name: told["data"][name] for name in ("train", "validation", "test")} == {
        "train": 1295,
        "validation": 143,
        "test": 359,
    }
    epochs = sum(row["seconds"] for row in run.history)
    assert 0.8 * told["seconds"] < epochs <= 1.001 * told["seconds"]  # after the last one a checkpoint is written
    assert run.metrics["hours"] * 3600 == pytest.approx(told["seconds"])
    assert told["seconds_per_epoch"] == pytest.approx(told["seconds"] / 3)
    assert told["images_per_second"] == pytest.approx(3 * 20 * 64 / told["seconds"])
    assert told["files"] == {name: sha256_of(finished_run / name) for name in names - {PROVENANCE}}
    origins = json.loads((finished_run / "config.json").read_text())["origins"]
    assert origins["width"] == "given"
    assert origins["beta"] == "default"


def test_load_run_gives_the_model_of_the_record(finished_run):
    run, vae = load_run(finished_run)
    test = load_data(run.config).test
    figures = vae.evaluate(Batches(test, run.config.batch_size), verbose=0, return_dict=True)
    assert figures == pytest.approx(run.metrics["test"], rel=1e-5)
    saved = keras.saving.load_model(finished_run / "model.keras")
    np.testing.assert_array_equal(vae.predict(test[:9], verbose=0), saved.predict(test[:9], verbose=0))


def test_what_is_trained_on_minimises_the_whole_kl(finished_run, images):
    """A finished run has its warm-up behind it, also one of fewer steps than KL_WARMUP_STEPS."""
    run, vae = load_run(finished_run)
    assert 0 < float(ops.convert_to_numpy(vae.trained_steps)) < run.config.kl_warmup_steps
    images = ops.convert_to_tensor(images)
    minimised = vae.compute_loss(images, y_pred=vae(images, training=True))
    figures = vae.get_metrics_result()
    assert float(figures["kl"]) > 0.01
    assert float(minimised) == pytest.approx(float(figures["loss"]), abs=1e-3)


def test_reconstructions_of_dark_images_become_bright(finished_run):
    """Above what the last layer's bias gives, which is the most where all its weights are negative."""
    run, vae = load_run(finished_run)
    images = load_data(run.config).test
    bias = float(vae.decoder.get_layer("image").bias[0])
    assert images.mean() < 100
    assert vae.predict(images, verbose=0).max() > 1 / (1 + np.exp(-bias)) + 0.2


def test_a_run_is_evaluated_on_other_data(finished_run, tmp_path):
    run, _ = load_run(finished_run)
    np.savez(tmp_path / "again.npz", x_train=load_data(run.config).train, x_test=load_data(run.config).test)
    result = evaluate_run(finished_run, tmp_path / "again.npz")
    assert {name: result[name] for name in FIGURES} == pytest.approx(run.metrics["test"], rel=1e-5)
    assert result["floor"] == run.metrics["test_floor"]
    assert result["precision"] == run.provenance["precision"]
    assert {name: run.provenance[name] for name in result["ran_on"]} == result["ran_on"]
    recorded = finished_run / "evaluation-again.json"
    assert json.loads(recorded.read_text()) == result
    recorded.unlink()


def test_a_run_is_evaluated_on_images_of_another_shape(copied_run, tmp_path):
    """Brought to its own; without labels."""
    large = RNG.integers(0, 256, (20, 32, 24, 3), "uint8")
    np.savez(tmp_path / "large.npz", x_train=large, x_test=large[:12])
    run, vae = load_run(copied_run)
    result = evaluate_run(copied_run, str(tmp_path / "large.npz"))
    small = load_data(Config(dataset=str(tmp_path / "large.npz"), image_shape=(16, 16, 1), validation="test")).test
    assert (result["images"], result["data"], result["floor"]) == (12, "large.npz", entropy_floor(small))
    assert result["loss"] == pytest.approx(evaluate(vae, small, run.config.batch_size)["loss"], rel=1e-5)


def test_a_finished_run_is_not_trained_again_and_not_overwritten(finished_run):
    config = Config(**TINY, outdir=str(finished_run), cmdline=True)
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    assert is_finished(config)
    assert is_finished(config.replace(checkpoint_seconds=7, remat=True, cmdline=False))  # which train the same
    assert train(config) == finished_run
    with pytest.raises(UserError, match=r"another configuration \(EPOCHS 3 there, 4 here; SEED 0 there, 1 here\)"):
        train(config.replace(epochs=4, seed=1))
    assert before == {path: path.stat().st_mtime_ns for path in finished_run.iterdir()}
    assert not is_finished(config.replace(outdir=str(finished_run.parent / "new")))


def test_a_run_of_other_sizes_is_another_one(tmp_path):
    """Without IMAGE_SHAPE images are as the data set has them: of one with a name this is known beforehand."""
    small = Config(**TINY, image_shape=(8, 8, 1), outdir=str(tmp_path / "run"), cmdline=True)
    told = r"IMAGE_SHAPE \[8, 8, 1\] there, \[16, 16, 1\] here"
    small.folder.mkdir()
    checkpoints.save(small.folder, {"identity": small.recipe()}, [])
    with pytest.raises(RecordError, match=told):
        checkpoints.check_recipe(small.replace(image_shape=None))
    own = small.replace(dataset="own.npz", image_shape=None)  # whose size is known when it is read
    checkpoints.save(small.folder, {"identity": {**own.recipe(), "image_shape": [8, 8, 1]}}, [])
    checkpoints.check_recipe(own)
    with pytest.raises(RecordError, match=told):
        checkpoints.check_recipe(own.replace(image_shape=(16, 16, 1)))
    write_run(tmp_path / "sweep" / "run", 28, 1850.0, **TINY, image_shape=(8, 8, 1))
    with pytest.raises(RecordError, match=told):
        is_finished(small.replace(image_shape=None, outdir=str(tmp_path / "sweep" / "run")))
    write_run(tmp_path / "sweep" / "own", 28, 1850.0, **{**TINY, "dataset": "own.npz"}, image_shape=(8, 8, 1))
    with pytest.raises(RecordError, match=r"IMAGE_SHAPE \[8, 8, 1\] there, None here"):
        is_finished(own.replace(outdir=str(tmp_path / "sweep" / "own")))


def test_a_finished_run_whose_record_is_damaged_is_told(copied_run):
    """Before a sweep has trained all others, which would then have no table."""
    (copied_run / "metrics.json").write_text("")
    with pytest.raises(RecordError, match=r"metrics\.json cannot be read"):
        is_finished(Config(**TINY, outdir=str(copied_run)))


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_vae.records.os.access", lambda *_: False)  # which root always has
    with pytest.raises(RecordError, match=r"run': .* cannot be written; choose another OUTDIR"):
        is_finished(Config(**TINY, outdir=str(tmp_path / "run")))


def test_what_another_program_left_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Other"]}')
    with pytest.raises(RecordError, match=r"config\.json cannot be read: the recorded configuration lacks values"):
        is_finished(Config(**TINY, outdir=str(tmp_path)))


def test_a_run_among_the_images_is_refused(tmp_path, monkeypatch):
    """Its pictures would be images of the next run."""
    monkeypatch.chdir(tmp_path)
    for settings in ({"dataset": "."}, {"dataset": str(tmp_path), "outdir": "."}):
        with pytest.raises(RecordError, match="within the folder of images, where its pictures would become images"):
            is_finished(Config(**{**TINY, **settings}))
    (tmp_path / "images").mkdir()
    assert not is_finished(Config(**{**TINY, "dataset": "images"}))


def test_training_leaves_the_callers_random_numbers_alone(tmp_path, monkeypatch):
    """Or else a search that draws its settings would draw the same ones after each training."""
    monkeypatch.setattr("resnet_vae.training._train", lambda *_: keras.utils.set_random_seed(0))
    drawn = []
    for trains in (False, True):
        random.seed(1)
        np.random.seed(1)
        if trains:
            train(Config(**TINY, outdir=str(tmp_path / "run")))
        drawn.append((random.random(), np.random.random()))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "other", [{"dataset": "a.npz"}, {"image_shape": (8, 8, 1)}, {"validation": "test"}, {"seed": 1}], ids=str
)
def test_data_of_another_configuration_are_refused(tmp_path, other):
    """The record would be of what was not trained on."""
    config = Config(**TINY, outdir=str(tmp_path / "run"))
    with pytest.raises(DataError, match="these data are not the configuration's"):
        train(config.replace(**other), load_data(config))
    with pytest.raises(DataError, match="these data are not the configuration's"):
        train(config, load_data(config.replace(image_shape=(8, 8, 1))))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: replace(data, train=data.train / 255), r"train images are float64 of shape \(1295, 16, 16, 1\)"),
        (lambda data: replace(data, validation=data.test[:0]), r"validation images are uint8 of shape \(0, 16"),
        (lambda data: replace(data, test=data.test[:, :8]), r"test images are uint8 of shape \(359, 8, 16, 1\)"),
        (lambda data: replace(data, fingerprint=None), "fingerprint is None; expected a text that is theirs alone"),
    ],
    ids=["floats", "none", "another shape", "no fingerprint"],
)
def test_data_that_could_not_be_recorded_are_refused(tmp_path, change, told):
    """Before they are trained on for hours."""
    config = Config(**TINY, outdir=str(tmp_path / "run"))
    with pytest.raises(DataError, match=told):
        train(config, change(load_data(config)))


def test_a_run_is_loaded_whatever_other_packages_warn_of(finished_run, monkeypatch):
    load_weights = VAE.load_weights

    def warning(self, *args, **kwargs):
        warnings.warn("a function will be gone", DeprecationWarning, stacklevel=2)
        return load_weights(self, *args, **kwargs)

    monkeypatch.setattr(VAE, "load_weights", warning)
    with pytest.warns(DeprecationWarning, match="will be gone"):
        load_run(finished_run)


def test_a_package_that_is_missing_is_told_in_a_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run_command("train", *flags(**TINY, outdir=tmp_path / "run")) == 2
    assert capsys.readouterr().err == (
        f"error: {sys.executable} has no sklearn.datasets; install it, or in a checkout: make clean install, "
        "then source .venv/bin/activate\n"
    )


def run_command(*words):
    """The exit code of the command line."""
    from resnet_vae.__main__ import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["resnet_vae", *map(str, words)])
        return main()


def flags(**settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.mark.parametrize("command", ["train", "reconstruct", "interpolate", None])
def test_a_finished_run_of_other_data_is_refused(copied_run, command, capsys):
    """As if the data had been other ones when it was trained; nothing is drawn. Without a command: from Python."""
    path = copied_run / "provenance.json"
    config = read_run(copied_run).config.replace(outdir=str(copied_run))
    data = load_data(config)
    path.write_text(path.read_text().replace(data.fingerprint, "0123456789abcdef"))
    before = sorted(copied_run.iterdir())
    prints = f"fingerprint 0123456789ab there, {data.fingerprint[:12]} here"
    told = f"{copied_run} holds a finished run of other data ({prints}); bring the digits of that run back, or choose"
    if command is None:
        with pytest.raises(UserError, match=re.escape(told)):
            train(config, data)
    else:
        words = flags(**TINY, outdir=copied_run) if command == "train" else [copied_run]
        assert run_command(command, *words) == 2
        assert told in capsys.readouterr().err
    assert sorted(copied_run.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("metrics.json", "{", "", "metrics.json cannot be read"),
        ("config.json", '"width": [^,]*', '"width": -1', "config.json cannot be read: width is -1"),
        ("config.json", "width", "wdth", "config.json cannot be read: wdth is no setting; did you mean width?"),
        ("history.csv", "epoch", "epic", "history.csv cannot be read: expected columns epoch, loss"),
        ("history.csv", "\n1,", "\nx,", "history.csv cannot be read: could not convert"),
        ("history.csv", "\n1,[^,]*", "\n1,nan", "history.csv cannot be read: loss is nan in row 1; expected a finite"),
        ("history.csv", "\n1,", "\n1,1,", "history.csv cannot be read: expected as many values in each row"),
        ("history.csv", "0\n2,", "inf\n2,", "history.csv cannot be read: rollbacks is inf in row 1"),
    ],
)
def test_a_broken_record_is_told(finished_run, tmp_path, name, old, new, told):
    """With its file, when the run is read and when it is asked whether it is finished."""
    for path in finished_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text, changes = re.subn(old, new, (tmp_path / name).read_text(), count=1)
    assert changes
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(told)):
        read_run(tmp_path)
    if name == "config.json":
        with pytest.raises(UserError, match=re.escape(told)):
            is_finished(Config(**TINY, outdir=str(tmp_path)))
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        read_run(tmp_path)


def test_broken_weights_are_told(finished_run, tmp_path):
    for path in finished_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.keras").write_bytes((finished_run / "model.keras").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.keras cannot be read as the weights"):
        load_run(tmp_path)


class Canary:
    """Unpickled, it opens a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "pickle in the archive", "lambda", "external link"])
def test_models_from_strangers_do_nothing(finished_run, tmp_path, kind):
    """A hostile model.keras: only its weights are read, and nothing in it is executed or followed."""
    run, canary = tmp_path / "run", tmp_path / "canary"
    shutil.copytree(finished_run, run)
    with zipfile.ZipFile(run / "model.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    if kind == "pickle":
        (run / "model.keras").write_bytes(pickle.dumps(Canary(canary)))
    else:
        if kind == "pickle in the archive":
            contents["model.weights.h5"] = pickle.dumps(Canary(canary))
        elif kind == "lambda":
            code = f"lambda x: open({str(canary)!r}, 'w') and x"
            layer = {"module": "keras.layers", "class_name": "Lambda", "config": {"function": code}}
            contents["config.json"] = json.dumps(layer).encode()
        else:
            with h5py.File(tmp_path / "elsewhere.h5", "w") as file:
                file["secret"] = np.ones(8)
            content = io.BytesIO(contents["model.weights.h5"])
            with h5py.File(content, "r+") as file:
                names = []
                file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
                del file[names[0]]
                file[names[0]] = h5py.ExternalLink(str(tmp_path / "elsewhere.h5"), "secret")
            contents["model.weights.h5"] = content.getvalue()
        with zipfile.ZipFile(run / "model.keras", "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
    try:
        _, vae = load_run(run)
    except UserError as error:
        assert "cannot be read as the weights of this run" in str(error)  # noqa: PT017
    else:
        assert kind == "lambda"  # the weights beside it are those of the run
        assert vae.count_params()
    assert not canary.exists()


DIVERGING = TINY | {"learning_rate": 1e30, "clip_norm": 0.0, "schedule": "constant", "warmup_steps": 0, "cmdline": True}


def test_divergence_stops_with_one_line_and_no_finished_run(tmp_path):
    with pytest.raises(
        TrainingError, match=r"(is nan|is inf|not finite) in epoch 1, step \d+; set .* lower .*\(1e\+30\)"
    ):
        train(Config(**DIVERGING, outdir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_divergence_goes_back_a_bounded_number_of_times(tmp_path, monkeypatch, capsys):
    """Going back once to a rate that works; the history tells. The test above is that of none at all."""
    monkeypatch.setattr("resnet_vae.training.ROLLBACK_FACTOR", 1e-33)
    settings = {**DIVERGING, "epochs": 1, "checkpoint_seconds": 1e6}  # no checkpoint of weights that are lost already
    fit = VAE.fit

    def slow(vae, *args, **kwargs):
        monkeypatch.setattr(VAE, "fit", fit)  # of the first attempt alone
        time.sleep(2)
        return fit(vae, *args, **kwargs)

    monkeypatch.setattr(VAE, "fit", slow)
    run = read_run(train(Config(**settings, rollbacks=1, outdir=str(tmp_path / "saved"))))
    assert run.provenance["seconds"] > 2  # what was given up was trained for, too
    assert run.provenance["sessions"] == 1
    told = capsys.readouterr().out
    assert told.count("going back to the last good checkpoint") == 1
    assert re.search("at half the rate\ngoing on in epoch 1, after step 0 of ", told)
    assert run.history[0]["rollbacks"] == 1
    assert run.history[0]["learning_rate"] == pytest.approx(1e-3)


def test_divergence_that_goes_on_is_told_in_the_end(tmp_path, monkeypatch, capsys):
    def diverged(self):
        rates.append(self.rate)
        raise DivergenceError("the loss is nan in epoch 1")

    rates = []
    monkeypatch.setattr(Training, "run", diverged)
    with pytest.raises(DivergenceError):
        train(Config(**TINY, rollbacks=2, outdir=str(tmp_path / "run"), cmdline=True))
    assert capsys.readouterr().out.count("going back to the last good checkpoint") == 2
    assert rates == pytest.approx([0.002, 0.001, 0.0005])


def test_a_step_is_not_waited_for(tmp_path, monkeypatch):
    """On a GPU the next one is given to it meanwhile; Keras would hand on numbers."""
    end, losses = Training.on_train_batch_end, []

    def noted(self, batch, logs=None):
        losses.append(logs["loss"])
        end(self, batch, logs)

    monkeypatch.setattr(Training, "on_train_batch_end", noted)
    train(Config(**{**TINY, "epochs": 1}, outdir=str(tmp_path / "run"), cmdline=True))
    assert losses
    assert all(map(ops.is_tensor, losses))


def test_a_training_that_goes_on_after_a_divergence_is_told_of_with_what_it_has(tmp_path):
    config = Config(**TINY, rollbacks=3, cmdline=True)
    data = load_data(config)
    again = Training(config, data, tmp_path, Training(config, data, tmp_path))
    assert str(again._diverged("the loss is nan")).endswith(
        "; raise ROLLBACKS (3), or, with another OUTDIR, lower LEARNING_RATE (0.002) or lower CLIP_NORM (200)"
    )


def test_a_signal_in_a_step_that_diverges_is_not_lost(tmp_path, monkeypatch):
    """It stops the training that goes back, after its checkpoint was written."""
    end = Training.on_train_batch_end

    def diverging(self, batch, logs=None):
        if self.step == 1:
            self.loss = float("nan")
            os.kill(os.getpid(), signal.SIGINT)
        end(self, batch, logs)

    monkeypatch.setattr(Training, "on_train_batch_end", diverging)
    with pytest.raises(InterruptedTrainingError, match="stopped by SIGINT; the same command goes on"):
        train(Config(**TINY, rollbacks=1, outdir=str(tmp_path / "run"), cmdline=True))
    assert (tmp_path / "run" / "checkpoint").exists()


def test_a_checkpoint_is_of_all_code_that_decides_what_is_trained():
    """What the modules below training import from the package, records and checkpoints aside."""
    folder = Path(sys.modules["resnet_vae.training"].__file__).parent
    found, new = set(), {"training"}
    while new:
        name = new.pop()
        found.add(name)
        new |= set(re.findall(r"^from resnet_vae\.(\w+) import", (folder / f"{name}.py").read_text(), re.M)) - found
    assert found - {"records"} == set(checkpoints.MODULES)


def test_a_validation_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    data = load_data(Config(**TINY))
    training = Training(Config(**TINY, cmdline=True), data, tmp_path)
    training.step, training.figures = training.steps, dict.fromkeys(FIGURES, 1.0)  # as after an epoch's last step
    monkeypatch.setattr("resnet_vae.training.evaluate", lambda *_: dict.fromkeys(FIGURES, float("nan")))
    with pytest.raises(TrainingError, match="validation loss is nan in epoch 1"):
        training.run()
    assert not training.rows


def test_validation_normalises_as_the_weights_are(tmp_path, monkeypatch):
    """At the loss as training has it, and averages that lag are not, of the post's momentum; then NORM_BATCHES=7, 0.

    The batches are the epoch's first, augmented; what is kept is calibrated.
    """
    config = Config(
        **{**TINY, "epochs": 1, "learning_rate": 0.012, "schedule": "constant", "norm_momentum": 0.99}, cmdline=True
    )
    data, calibrate, told = load_data(config), VAE.calibrate, []

    def looked_at(vae, *args, **kwargs):
        lagging = evaluate(vae, data.validation, config.batch_size)["loss"]
        images = ops.convert_to_tensor(data.validation)
        as_in_training = vae.compute_loss(images, y_pred=vae(images, training=True), training=False)
        told.append((lagging, float(as_in_training)))
        calibrate(vae, *args, **kwargs)

    monkeypatch.setattr(VAE, "calibrate", looked_at)
    training = Training(config, data, tmp_path)
    training.run()
    [(lagging, as_in_training)] = told
    assert lagging > as_in_training + 10
    assert training.rows[0]["val_loss"] == pytest.approx(as_in_training, abs=2)
    for weight, kept in zip(training.vae.get_weights(), training.best_weights, strict=True):
        np.testing.assert_array_equal(weight, kept)

    training.config = config.replace(norm_batches=7, augment="shift", epochs=2)
    training.run()
    before = training.vae.get_weights()
    batches = Batches(data.train, config.batch_size, config.seed, 1, 0, ("shift",))
    calibrate(training.vae, np.concatenate([batches[number][0] for number in range(7)]), batch_size=config.batch_size)
    for weight, expected in zip(before, training.vae.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)

    training.config = config.replace(norm_batches=0, epochs=3)
    training.run()
    assert [row["epoch"] for row in training.rows] == [1, 2, 3]
    assert len(told) == 2


def test_what_is_configured_is_what_is_trained():
    given = {"weight_decay": 0.03, "adam_beta_2": 0.9, "clip_norm": 7.0, "decay": 0.5, "learning_rate": 0.25}
    config = Config(
        **{**TINY, **given}, schedule="constant", norm_momentum=0.6, activation="elu", dropout=0.25, resnet_depth=40
    )
    vae = build_vae(config)
    compile_vae(vae, config, 10)
    optimizer = vae.optimizer
    assert (optimizer.weight_decay, optimizer.beta_2, optimizer.global_clipnorm, optimizer.decay) == (
        *(given[name] for name in ("weight_decay", "adam_beta_2", "clip_norm", "decay")),
    )
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == pytest.approx(0.25)
    every = [layer for layer in vae._flatten_layers() if hasattr(layer, "momentum")]
    assert len(every) > 20
    assert {layer.momentum for layer in every if not isinstance(layer, ResidualBlock)} == {0.6}
    for model in (vae.encoder, vae.decoder):
        assert model.get_layer("intermediate_activation").activation is keras.activations.elu
        assert model.get_layer("intermediate_dropout").rate == 0.25


def test_the_plateau_halves_the_rate(tmp_path):
    """As going back has done before, down to a thousandth; the decay of each step comes on top."""
    settings = {**TINY, "schedule": "plateau", "learning_rate": 0.25, "decay": 1.0, "norm_batches": 0}
    config = Config(**settings, cmdline=True)
    data = load_data(config)
    training = Training(config, data, tmp_path, Training(config, data, tmp_path))
    for epochs, rate in ((25, 0.125), (26, 0.125 / 2), (301, 0.125 / 1000)):
        steps = int(training.vae.optimizer.iterations) + 1
        training.rows = [{**dict.fromkeys(COLUMNS, 1.0), "val_loss": 1.0} for _ in range(epochs)]
        training.step = training.steps - 1
        training._run_epoch()
        assert training.rows[-1]["learning_rate"] == pytest.approx(rate / (1 + steps))


@pytest.mark.parametrize(("losses", "best"), [((3.0, 1.0, 2.0), 2), ((1.0, 1.0, 2.0), 1)])
def test_the_weights_kept_are_those_of_the_lowest_validation_loss(tmp_path, monkeypatch, losses, best):
    """Of the first epoch of equals, and its are the training figures; the test is of these weights."""
    config, kernels = Config(**TINY, outdir=str(tmp_path / "run"), cmdline=True), []

    def evaluated(vae, *_):
        kernels.append(vae.encoder.get_layer("mean").get_weights()[0])
        return dict.fromkeys(FIGURES, (*losses, 4.0)[len(kernels) - 1])

    monkeypatch.setattr("resnet_vae.training.evaluate", evaluated)
    run, vae = load_run(train(config))
    kept = vae.encoder.get_layer("mean").get_weights()[0]
    assert [np.array_equal(kept, kernel) for kernel in kernels] == [epoch in (best, 4) for epoch in (1, 2, 3, 4)]
    assert run.metrics["best_epoch"] == best
    assert (run.metrics["validation"]["loss"], run.metrics["test"]["loss"]) == (1, 4)
    assert run.metrics["train"]["loss"] == pytest.approx(run.history[best - 1]["loss"], rel=1e-5)


def test_going_back_keeps_the_figures_of_the_epoch_so_far(tmp_path, monkeypatch):
    """The checkpoint of a training that went back is that which it went back to."""
    config = Config(**{**TINY, "checkpoint_seconds": 1e6}, cmdline=True)
    data, end = load_data(config), Training.on_train_batch_end

    def diverging(self, batch, logs=None):
        end(self, batch, logs)
        if self.step == 3:
            self.save()
            raise DivergenceError("made up")

    monkeypatch.setattr(Training, "on_train_batch_end", diverging)
    training = Training(config, data, tmp_path)
    with pytest.raises(DivergenceError):
        training.run()
    _, arrays = checkpoints.load(tmp_path)
    for rollbacks in (1, 2):
        training = Training(config, data, tmp_path, training)
        values, again = checkpoints.load(tmp_path)
        assert values["rollbacks"] == rollbacks
        for one, other in zip(again, arrays, strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_checkpoint_of_weights_whose_validation_fails_is_not_gone_back_to(tmp_path):
    """It was written while that validation went on; the one before is gone back to, or else it begins anew."""
    config = Config(**TINY, rollbacks=3, cmdline=True)
    data = load_data(config)
    training = Training(config, data, tmp_path)
    training.step = 3
    training.save()
    for rollbacks in (1, 2):
        training.step, training.figures = training.steps, dict.fromkeys(FIGURES, 1.0)
        training.save()
        training = Training(config, data, tmp_path, training)
        assert (training.step, training.figures, training.rollbacks) == (3, None, rollbacks)
    checkpoints.remove(tmp_path)
    training.step, training.figures = training.steps, dict.fromkeys(FIGURES, 1.0)
    training.save()
    training = Training(config, data, tmp_path, training)
    assert (training.step, training.figures, training.rollbacks) == (0, None, 3)


def test_a_signal_before_the_first_step_leaves_no_handler(tmp_path, monkeypatch):
    """Sent while the progress bar is made."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr("tqdm.auto.tqdm", lambda **_: signal.raise_signal(signal.SIGTERM))
    config = Config(**TINY)
    with pytest.raises(InterruptedTrainingError):
        Training(config, load_data(config), tmp_path).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, monkeypatch):
    """A loop over several trainings would go on with the next; the same command writes the record."""
    config = Config(**{**TINY, "epochs": 1}, outdir=str(tmp_path / "run"), cmdline=True)
    save = checkpoints.save

    def signalled(folder, values, arrays):
        save(folder, values, arrays)
        if values["rows"]:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "save", signalled)
    with pytest.raises(InterruptedTrainingError, match="stopped by SIGTERM; the same command goes on from the check"):
        train(config)
    monkeypatch.undo()
    assert not is_finished(config)
    train(config)
    assert is_finished(config)


def test_what_a_training_was_is_gone_on_from(tmp_path, monkeypatch):
    """Its history, place, times and rollbacks; and how long saving takes sets how often there is time for it."""
    config = Config(**TINY, cmdline=True)
    data, save = load_data(config), checkpoints.save
    rows = [dict.fromkeys(COLUMNS, 1.0)]
    figures = dict.fromkeys(FIGURES, 2.0)

    def slow_save(*args):
        time.sleep(0.1)
        save(*args)

    monkeypatch.setattr("resnet_vae.training.checkpoints.save", slow_save)
    before = Training(config.replace(checkpoint_seconds=1), data, tmp_path)
    before.rows, before.step, before.figures, before.rollbacks = rows, 7, figures, 2
    before.seconds, before.cpu_seconds, before.saving_seconds = 100.0, 200.0, 3.0
    before.began, before.started = 90.0, "2020-02-02T00:00:00+00:00"
    before.best_weights = [np.full(2, 5.0)]
    before.save()
    assert before.interval == pytest.approx(100 * (before.saving_seconds - 3), rel=1e-6)
    assert before.interval > 10
    after = Training(config.replace(checkpoint_seconds=1e6), data, tmp_path)
    assert (after.rows, after.step, after.figures, after.rollbacks) == (rows, 7, figures, 2)
    assert after.saving_seconds == 3
    assert (after.began, after.started) == (90.0, "2020-02-02T00:00:00+00:00")
    assert 100 < after.seconds < 160
    assert 200 < after.cpu_seconds < 300
    assert after.sessions == before.sessions + 1 == 2
    assert after.rate == config.learning_rate / 4
    np.testing.assert_array_equal(after.best_weights, [[5.0, 5.0]])
    after.save()
    assert after.interval == 1e6


def test_a_checkpoint_of_something_else_is_refused(tmp_path, monkeypatch):
    config = Config(**TINY, cmdline=True)
    data = load_data(config)
    checkpoints.save(tmp_path, {"identity": identity(config, data)}, [])

    def refused(told, data=data, **settings):
        with pytest.raises(RecordError, match=re.escape(f"an unfinished run of something else ({told}")):
            Training(config.replace(**settings), data, tmp_path)

    refused("another data", data=replace(data, fingerprint="0123"))
    refused("PRECISION float32 there, mixed_bfloat16 here", precision="mixed_bfloat16")
    refused("BETA 1.0 there, 0.5 here", beta=0.5)
    monkeypatch.setattr("resnet_vae.training.precision", lambda _: "mixed_float16")  # of PRECISION=auto elsewhere
    refused("PRECISION float32 there, mixed_float16 here")
    monkeypatch.undo()
    versions = {"keras": "3", keras.backend.backend(): "1"}
    monkeypatch.setattr("resnet_vae.checkpoints.versions", lambda: versions)
    refused(f"KERAS_VERSION {keras.__version__} there, 3 here; BACKEND_VERSION ")
    monkeypatch.undo()
    monkeypatch.setattr("resnet_vae.training.keras.backend.backend", lambda: "numpy")
    monkeypatch.setattr("resnet_vae.checkpoints.versions", lambda: {"keras": "3", "numpy": "2"})
    refused(f"BACKEND {os.environ.get('KERAS_BACKEND', 'tensorflow')} there, numpy here")
    monkeypatch.undo()
    monkeypatch.setattr("resnet_vae.checkpoints.MODULES", checkpoints.MODULES[:-1])
    refused("another code")


def test_images_that_were_trained_on_do_not_stay_in_memory(tmp_path, monkeypatch):
    made = []

    class Watched(Batches):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(weakref.ref(self))

    monkeypatch.setattr("resnet_vae.training.Batches", Watched)
    config = Config(**{**TINY, "epochs": 1}, cmdline=True)
    training = Training(config, load_data(config), tmp_path)
    training.run()
    gc.collect()
    assert len(made) >= 3  # to train with, to calibrate, to validate
    assert not any(batches() for batches in made)


@pytest.mark.parametrize("step", [0, 3, 10, 40, 99])
def test_the_current_rate_is_the_schedules(step):
    """Less the time decay; on JAX it is told without compiling anything, after the first time."""
    schedule = keras.optimizers.schedules.CosineDecay(0.0, 90, warmup_target=0.5, warmup_steps=10)
    optimizer = AdamW(schedule, decay=0.1)
    expected = 0.5 * (step / 10 if step < 10 else (1 + math.cos(math.pi * (step - 10) / 90)) / 2) / (1 + 0.1 * step)
    optimizer.iterations.assign(step)
    assert optimizer.current_rate() == pytest.approx(expected, abs=1e-6)
    if keras.backend.backend() != "jax":
        return
    import jax

    compiled = []

    def note(event, *_, **__):
        compiled.extend([event] if "backend_compile" in event else [])

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        optimizer.current_rate()
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


@pytest.mark.parametrize("seed", range(5))
def test_progress_is_counted_as_keras_counts_it(seed):
    """Early stopping and the plateau's reductions against Keras's callbacks on random losses."""
    losses = np.random.default_rng(seed).uniform(0, 1, 60).round(2)

    class Model:
        """As much of a model as the callbacks look at."""

        optimizer = keras.optimizers.SGD(1.0)
        stop_training = False

    stopping = keras.callbacks.EarlyStopping(patience=5, min_delta=0.1)
    plateau = keras.callbacks.ReduceLROnPlateau(factor=PLATEAU["factor"], patience=5, min_delta=0)
    stopped = None
    for callback in (stopping, plateau):
        callback.set_model(Model())
        callback.on_train_begin()
        for epoch, loss in enumerate(losses):
            callback.on_epoch_end(epoch, {"val_loss": loss, "loss": loss})
            if callback.model.stop_training and stopped is None:
                stopped = epoch + 1
            if callback is plateau:
                rate = float(ops.convert_to_numpy(Model.optimizer.learning_rate))
                assert rate == PLATEAU["factor"] ** without_progress(losses[: epoch + 1], 5)
    counts = [without_progress(losses[: epoch + 1], 5, 0.1) for epoch in range(60)]
    assert stopped == counts.index(1) + 1


def test_published_recipe_with_early_stopping_and_plateau(tmp_path):
    """The post's preset trains; early stopping counts progress, and the best epoch's weights are kept all the same."""
    sizes = {name: TINY[name] for name in ("dataset", "width", "latent_dim", "intermediate_dim")}
    config = Config(
        preset="published", resnet_depth=28, **sizes, batch_size=256, patience=1, min_delta=1e6, epochs=9, cmdline=True
    )
    run = read_run(train(config.replace(outdir=str(tmp_path / "run"))))
    assert run.metrics["epochs"] == 2
    assert run.metrics["validation"]["penalty"] > 0
    row = run.history[0]
    assert row["loss"] == pytest.approx(row["reconstruction"] + row["kl"], rel=1e-4)
    assert run.metrics["test"].pop("bound") > run.metrics["test"]["reconstruction"]
    assert run.metrics["test"] == pytest.approx(run.metrics["validation"], rel=1e-4)


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate", "evaluate"])
def test_commands_on_a_folder_that_is_no_run(tmp_path, command):
    words = [command, str(tmp_path), *(["digits"] if command == "evaluate" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "resnet_vae", *words], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 2
    assert "config.json is missing" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "picture"),
    [("sample", "samples"), ("reconstruct", "reconstructions"), ("interpolate", "interpolations")],
)
def test_commands_draw_pictures(copied_run, tmp_path, command, picture, capsys):
    """Where they are told to, or into the run; by default the same."""
    drawn = [tmp_path / "picture.pdf", tmp_path / "picture.png", copied_run / f"{picture}.png"]
    for path in drawn:
        told = [] if path.parent == copied_run else ["-o", path]
        assert run_command(command, copied_run, *told) == 0
    assert capsys.readouterr().out.split() == [str(path) for path in drawn]
    pdf, png, default = (path.read_bytes() for path in drawn)
    assert pdf.startswith(b"%PDF")
    assert png.startswith(b"\x89PNG")
    assert default == png


def test_runs_that_differ_are_told_and_so_is_ctrl_c(finished_run, copied_run, capsys, monkeypatch):
    assert run_command("compare", finished_run, copied_run) == 0
    history = copied_run / "history.csv"
    history.write_text(history.read_text().replace("\n3,", "\n4,"))
    assert run_command("compare", finished_run, copied_run) == 1
    assert capsys.readouterr().out == "differences: 0\ndifferences: 1\nhistory epoch\n"
    history.write_text(history.read_text() + "1,2\n")
    assert run_command("compare", finished_run, copied_run) == 2
    assert "history.csv cannot be read: expected as many values" in capsys.readouterr().err

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("resnet_vae.verify.differences", interrupted)
    assert run_command("compare", finished_run, copied_run) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_pictures_show_what_they_are_called(finished_run, images, monkeypatch):
    """Test images from first to last above their reconstructions, decoded noise, and lines that end at two images."""
    run, vae = load_run(finished_run)
    shown = []
    monkeypatch.setattr(plots, "grid", lambda *args, **options: shown.append(args))
    plots.reconstructions(run, vae, images)
    plots.interpolations(run, vae, images, count=3, steps=5)
    for _ in range(2):
        plots.samples(run, vae)
    (rows, columns, *_), (lines, steps, _), (first, _, title), (second, *_) = shown

    def decoded(images):
        return vae.decoder.predict(vae.encoder.predict(images, verbose=0)[0], verbose=0)

    chosen = images[[0, 5, 10, 15, 20, 26, 31, 36, 41, 47]]
    assert (columns, steps) == (10, 5)
    np.testing.assert_allclose(rows[:10], chosen / 255)
    np.testing.assert_allclose(rows[10:], decoded(chosen), atol=1e-5)
    ends = images[[0, 9, 18, 28, 37, 47]]
    np.testing.assert_allclose(lines[::5], decoded(ends[::2]), atol=1e-5)
    np.testing.assert_allclose(lines[4::5], decoded(ends[1::2]), atol=1e-5)
    means = vae.encoder.predict(ends, verbose=0)[0]
    middle = vae.decoder.predict((means[::2] + means[1::2]) / 2, verbose=0)
    np.testing.assert_allclose(lines[2::5], middle, atol=1e-5)
    np.testing.assert_array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 64
    assert title == "samples from the prior, depth 28, elbo"


def test_a_runs_pictures_are_of_the_test_images(copied_run, monkeypatch):
    """As it is trained, and as they are drawn anew."""
    shown, test = [], load_data(Config(**TINY)).test
    for name in ("reconstructions", "interpolations"):

        def noted(run, vae, images):
            shown.append(images)
            return plots.curves(run)

        monkeypatch.setattr(plots, name, noted)
    assert run_command("train", *flags(**TINY, outdir=copied_run)) == 0
    assert run_command("reconstruct", copied_run) == run_command("interpolate", copied_run) == 0
    assert len(shown) == 4
    assert all(np.array_equal(images, test) for images in shown)


def test_a_grid_has_its_images_row_by_row():
    images = RNG.integers(0, 256, (5, 8, 16, 3), "uint8")
    for each in (images, images / 255):
        (sheet,) = (drawn.get_array() for drawn in plots.grid(each, 3).axes[0].get_images())
        assert sheet.shape == (8 + 1 + 8, 3 * 16 + 2, 3)
        np.testing.assert_allclose(sheet[:8, 17:33], images[1] / 255)
        np.testing.assert_allclose(sheet[9:, 17:33], images[4] / 255)
        assert np.all(sheet[9:, 34:] == 1)


def test_pictures_that_are_missing_are_drawn_by_the_same_command(copied_run):
    """A run without all of its pictures is not finished for the command line, unless no model is there to draw them."""
    settings = flags(**TINY, outdir=copied_run)
    before = {path: path.read_bytes() for path in copied_run.iterdir()}
    assert run_command("finished", *settings) == 3
    assert run_command("train", *settings) == 0
    assert run_command("finished", *settings) == 0
    pictures = {copied_run / f"{name}.png" for name in PICTURES}
    assert set(copied_run.iterdir()) == pictures | set(before)
    assert all(path.read_bytes() == content for path, content in before.items())
    pictures.pop().unlink()
    assert run_command("finished", *settings) == 3
    (copied_run / "model.keras").unlink()
    assert run_command("finished", *settings) == 0


def test_pictures_of_a_single_test_image(copied_run, images):
    drawn = draw_run(*load_run(copied_run), images[:1])
    assert {path.stem for path in drawn} == set(PICTURES)
    assert all(imread(path).std() > 0 for path in drawn)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="it compiles nothing")
def test_pictures_compile_encoder_and_decoder_once(copied_run, images, monkeypatch):
    record, vae = load_run(copied_run)
    traced = []
    for part in (vae.encoder, vae.decoder):

        def note(*args, _part=part, _call=part.call, **options):
            traced.append(_part.name)
            return _call(*args, **options)

        monkeypatch.setattr(part, "call", note)
    draw_run(record, vae, images)
    assert sorted(traced) == ["decoder", "encoder"]


def test_a_run_is_evaluated_on_all_images_of_a_set_without_test_images(copied_run, tmp_path):
    """Or else runs of other seeds would be evaluated on other images."""
    images = RNG.integers(0, 256, (5, 16, 16, 1), "uint8")  # too few to set some apart
    np.savez(tmp_path / "all.npz", images=images)
    result = evaluate_run(copied_run, str(tmp_path / "all.npz"))
    assert result["images"] == 5
    assert result["floor"] == pytest.approx(entropy_floor(images))
    assert result["fingerprint"] not in ("", read_run(copied_run).provenance["data"]["fingerprint"])
    (tmp_path / "elsewhere").mkdir()
    np.savez(tmp_path / "elsewhere" / "all.npz", images=images[:4])
    for _ in range(2):  # of the same name and other images: beside the first
        other = evaluate_run(copied_run, str(tmp_path / "elsewhere" / "all.npz"))
    recorded = [json.loads(path.read_text()) for path in sorted(copied_run.glob("evaluation-*.json"))]
    assert sorted(recorded, key=lambda each: each["images"]) == [other, result]


def test_a_run_is_not_evaluated_on_images_that_it_was_trained_on(copied_run, tmp_path):
    """Of its own set, without test images, it has a tenth: as in training."""
    own = tmp_path / "own.npz"
    np.savez(own, images=RNG.integers(0, 256, (40, 16, 16, 1), "uint8"))
    fingerprint = load_data(Config(dataset=str(own))).fingerprint
    provenance = json.loads((copied_run / PROVENANCE).read_text())
    provenance["data"]["fingerprint"] = fingerprint
    (copied_run / PROVENANCE).write_text(json.dumps(provenance))
    assert evaluate_run(copied_run, str(own))["images"] == 4
    record = json.loads((copied_run / "config.json").read_text())
    record["values"]["dataset"] = str(own)
    (copied_run / "config.json").write_text(json.dumps(record))
    np.savez(own, images=RNG.integers(0, 256, (41, 16, 16, 1), "uint8"))
    with pytest.raises(DataError, match="has changed since it was trained on"):
        evaluate_run(copied_run, own)


def test_what_was_copied_over_a_finished_run_is_told(copied_run):
    """And what a process left that was killed when it had recorded the run goes."""
    config = read_run(copied_run).config.replace(outdir=str(copied_run))
    (copied_run / "checkpoint").write_bytes(b"left")
    assert train(config) == copied_run
    assert not (copied_run / "checkpoint").exists()
    with open(copied_run / "history.csv", "a") as file:
        file.write(file.name)
    with pytest.raises(RecordError, match=r"history\.csv is not the file that the finished run there wrote"):
        is_finished(config)


def test_a_new_process_evaluates_to_the_recorded_figures(tmp_path):
    """In bfloat16 TensorFlow would round elsewhere after rewriting its graphs, which training does without."""
    folder = train(Config(**{**TINY, "epochs": 1, "precision": "mixed_bfloat16"}, outdir=str(tmp_path / "run")))
    subprocess.run([sys.executable, "-m", "resnet_vae", "evaluate", folder, "digits"], check=True, capture_output=True)
    result = json.loads((folder / "evaluation-digits.json").read_text())
    assert {name: result[name] for name in FIGURES} == load_run(folder)[0].metrics["test"]


def test_the_checkpoint_goes_when_the_run_is_finished_and_not_before(tmp_path, monkeypatch):
    there = []

    def noted(path, values):
        there.append((path.name, (path.parent / "checkpoint").exists()))
        write_json(path, values)

    monkeypatch.setattr("resnet_vae.training.write_json", noted)
    folder = train(Config(**{**TINY, "epochs": 1}, outdir=str(tmp_path / "run"), cmdline=True))
    assert there[-1] == ("metrics.json", True)
    assert not (folder / "checkpoint").exists()


def test_training_saves_before_an_epochs_last_step_or_with_its_figures_and_puts_handlers_back(tmp_path, monkeypatch):
    places, before = [], [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(checkpoints, "save", lambda folder, values, arrays: places.append(values))
    monkeypatch.setattr("resnet_vae.training.SHARE", 1e9)  # of the time that saving may take
    config = Config(**{**TINY, "epochs": 1, "checkpoint_seconds": 0}, cmdline=True)
    training = Training(config, load_data(config), tmp_path)
    training.run()
    places = [(values["step"], values["figures"] is None) for values in places]
    assert (training.steps - 1, True) in places
    assert places.count((training.steps, False)) == 1  # not for each batch of the validation
    assert (training.steps, True) not in places
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_loss_that_is_lost_in_the_last_step_is_told_at_once(tmp_path, monkeypatch):
    end = Training.on_train_batch_end

    def diverging(self, batch, logs=None):
        end(self, batch, logs)
        if self.step == self.steps:
            self.loss = float("nan")

    monkeypatch.setattr(Training, "on_train_batch_end", diverging)
    config = Config(**TINY, cmdline=True)
    training = Training(config, load_data(config), tmp_path)
    with pytest.raises(DivergenceError, match=f"the loss is nan in epoch 1, step {training.steps}"):
        training.run()
    assert not training.rows


@pytest.mark.parametrize("deterministic", [True, False])
def test_determinism_is_asked_for_and_partial_files_go(tmp_path, monkeypatch, deterministic):
    asked = []

    def stop(*_):
        raise DivergenceError("stop")

    monkeypatch.setattr("resnet_vae.training.be_deterministic", lambda: asked.append(1))
    monkeypatch.setattr(Training, "__init__", stop)
    (tmp_path / "partial-1-0123abcd-model.keras").touch()
    (tmp_path / "evaluation-mine.json").touch()  # of somebody else: there was no run
    with pytest.raises(DivergenceError):
        train(Config(**TINY, outdir=str(tmp_path), deterministic=deterministic, cmdline=True))
    assert bool(asked) == deterministic
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation-mine.json"]


def test_the_plateau_is_of_the_validation_loss(tmp_path):
    config = Config(**{**TINY, "schedule": "plateau", "learning_rate": 0.25, "norm_batches": 0}, cmdline=True)
    training = Training(config, load_data(config), tmp_path)
    training.rows = [{**dict.fromkeys(COLUMNS, 1.0), "val_loss": 1.0, "loss": 100.0 - n} for n in range(26)]
    training.step = training.steps - 1
    training._run_epoch()
    assert training.rows[-1]["learning_rate"] == pytest.approx(0.125)


def test_a_column_that_one_run_lacks_is_a_difference(finished_run, tmp_path):
    copy = shutil.copytree(finished_run, tmp_path / "copy")
    history = copy / "history.csv"
    history.write_text("\n".join(line.rpartition(",")[0] for line in history.read_text().splitlines()) + "\n")
    assert differences(finished_run, copy) == differences(copy, finished_run) == ["history rollbacks"]


def test_an_altered_test_loss_is_told(finished_run, tmp_path):
    """Where it adds up, and stands in no other file, too."""
    copy = shutil.copytree(finished_run, tmp_path / "sweep" / "depth-28")
    metrics = json.loads((copy / "metrics.json").read_text())
    for name in ("loss", "reconstruction"):
        metrics["test"][name] -= 10
    (copy / "metrics.json").write_text(json.dumps(metrics))
    write_table(read_sweep(copy.parent), copy.parent)
    assert "metrics.json is not the file that was written" in "\n".join(verify(copy.parent))


def test_samples_are_of_the_prior(finished_run, monkeypatch):
    run, vae = load_run(finished_run)
    given, predict = [], plots._predict
    monkeypatch.setattr(plots, "_predict", lambda model, inputs: given.append(inputs) or predict(model, inputs))
    plots.samples(run, vae)
    (latents,) = given
    assert latents.shape == (64, run.config.latent_dim)
    assert abs(latents.mean()) < 5 / np.sqrt(latents.size)
    assert abs(latents.std() - 1) < 5 / np.sqrt(2 * latents.size)
