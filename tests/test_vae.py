"""The objective against closed forms and Monte Carlo; the VAE as a Keras model."""

import os
import platform
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops
from scipy import integrate, special, stats

import resnet_vae.devices
from resnet_vae import Config, build_vae, networks
from resnet_vae.blocks import Repeated, ResidualBlock
from resnet_vae.config import blocks_per_stage
from resnet_vae.data import entropy_floor
from resnet_vae.devices import _cpuinfo, devices, precision, processor, processor_has_amx, settle
from resnet_vae.normalization import BatchNormalization
from resnet_vae.optimizer import AdamW
from resnet_vae.records import FIGURES
from resnet_vae.training import score
from resnet_vae.vae import VAE, Sampling, kl_divergence, reconstruction_loss

RNG = np.random.default_rng(0)
BATCH = ("train_on_batch", "test_on_batch", "predict_on_batch")


def to_numpy(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def test_kl_is_the_integral():
    """Each latent's KL by numerical integration of q log(q / p)."""
    mean, log_var = np.array([[0.0, 1.5, -2.0]]), np.array([[0.0, -3.0, 1.0]])

    def integral(m, lv):
        q, p = stats.norm(m, np.exp(lv / 2)), stats.norm()
        return integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), m - 12 * q.std(), m + 12 * q.std())[0]

    expected = sum(integral(m, lv) for m, lv in zip(mean[0], log_var[0], strict=True))
    got = to_numpy(kl_divergence(mean.astype("float32"), log_var.astype("float32")))
    np.testing.assert_allclose(got, [expected], rtol=1e-5)


@pytest.mark.parametrize("objective", ["elbo", "published"])
def test_sampler_against_its_definition_and_the_kl_by_monte_carlo(objective):
    """The samples' moments; and log q - log p averaged over them, which is the KL for the bound and not the post's."""
    count, mean, log_var = 200_000, np.array([0.5, -1.0]), np.array([-1.0, 0.5])
    rows = [np.tile(part, (count, 1)).astype("float32") for part in (mean, log_var)]
    z = to_numpy(Sampling(objective, seed=3)(*rows, training=True))
    deviation = np.exp(log_var / 2) if objective == "elbo" else np.exp(log_var)
    standardized = (z - mean) / deviation
    assert np.abs(standardized.mean(0)).max() < 5 / np.sqrt(count)
    assert np.abs(standardized.var(0) - 1).max() < 5 * np.sqrt(2 / count)
    assert np.abs(np.corrcoef(z.T)[0, 1]) < 5 / np.sqrt(count)

    terms = (stats.norm.logpdf(z, mean, np.exp(log_var / 2)) - stats.norm.logpdf(z)).sum(1)
    error = terms.std() / np.sqrt(count)
    kl = to_numpy(kl_divergence(*[row[:1] for row in rows]))[0]
    agrees = abs(terms.mean() - kl) < 5 * error
    assert agrees == (objective == "elbo")


def test_reconstruction_is_the_cross_entropy_in_float64():
    images, logits = RNG.uniform(size=(3, 4, 5, 2)), 10 * RNG.standard_normal((3, 4, 5, 2))
    images[0, 0, :2], logits[0, 0, :2] = (0, 1), ((-50, 60), (70, -80))
    expected = -(images * special.log_expit(logits) + (1 - images) * special.log_expit(-logits)).sum((1, 2, 3))
    got = to_numpy(reconstruction_loss(images.astype("float32"), logits.astype("float32")))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_pixel_that_is_certainly_wrong_is_still_put_right(images):
    """The gradient by the logit is probability less grey level, 1 where a black pixel is all but certainly white."""
    vae = build_vae(Config(**TINY))
    kernel, bias = vae.decoder.get_layer("image").trainable_weights
    kernel.assign(np.zeros(kernel.shape))
    bias.assign([25.0])
    vae.compile(keras.optimizers.SGD(1 / 256))
    figures = vae.train_on_batch(np.zeros_like(images), return_dict=True)
    assert figures["reconstruction"] == pytest.approx(256 * 25)
    np.testing.assert_allclose(to_numpy(bias), 24, rtol=1e-5)


def test_a_decoder_of_ones_own_ends_as_it_likes(tiny_vae, images):
    """One that gives images by a function of its own, and one that ends in a sigmoid: the same objective."""
    latents = keras.Input((8,))
    decoder = keras.Model(latents, keras.layers.Lambda(lambda x: 1.0 * x)(tiny_vae.decoder(latents)))
    figures = []
    for vae in (tiny_vae, VAE(tiny_vae.encoder, decoder)):
        vae.compile("sgd")
        figures.append(vae.evaluate(images, verbose=0, return_dict=True)["loss"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)


def test_the_kl_warms_up_in_what_is_minimised_and_not_in_what_is_told(images):
    """A warm-up of four steps: the first one's gradient has no KL in it, the second's a quarter, the last ones' all."""
    keras.utils.set_random_seed(4)
    beta = 0.5
    vae = build_vae(Config(**{**TINY, "kl_warmup_steps": 4, "beta": beta}))
    kernel, bias = vae.encoder.get_layer("log_var").trainable_weights
    vae.compile(keras.optimizers.SGD(1.0), run_eagerly=keras.backend.backend() != "jax")
    for step, share in ((0, 0.0), (1, 0.25), (9, 1.0)):
        assert to_numpy(vae.trained_steps) == min(step, 2)
        vae.trained_steps.assign(step)
        image = vae.decoder.get_layer("image").kernel
        image.assign(np.zeros(image.shape))  # so that only the KL moves the log-variance
        bias.assign(np.ones(8))
        kernel.assign(np.zeros(kernel.shape))
        figures = vae.train_on_batch(images, return_dict=True)
        np.testing.assert_allclose(to_numpy(bias), 1 - share * beta * (np.e - 1) / 2, rtol=1e-5)
        assert figures["loss"] == pytest.approx(figures["reconstruction"] + beta * figures["kl"], rel=1e-5)
        vae.evaluate(images, batch_size=48, verbose=0)  # which is no step of the warm-up


def dense_vae(subclass=keras.Model, activation="sigmoid", **options):
    """A VAE whose posterior does not depend on the image, N(0, e), and whose images, of one bias, not on the latent."""
    inputs, latents = keras.Input((16, 16, 1)), keras.Input((2,))
    flat = keras.layers.Flatten()(inputs)
    heads = [keras.layers.Dense(2, "linear", True, "zeros", start, name=start)(flat) for start in ("zeros", "ones")]
    grey = keras.layers.Dense(256, "linear", True, "zeros", keras.initializers.Constant(3.0))(latents)
    images = keras.layers.Activation(activation)(keras.layers.Reshape((16, 16, 1))(grey))
    return VAE(keras.Model(inputs, heads), subclass(latents, images), **options)


def test_beta_and_the_warm_up_may_change_while_training_goes_on(images):
    """They take effect with the next step, in a trace that was made with others, and in what is told."""
    vae = dense_vae()
    bias, betas, start = vae.encoder.get_layer("ones").bias, (1.0, 3.0, 0.5), vae.get_weights()

    class Changes(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            vae.beta = betas[epoch]
            vae.set_weights(start)

        def on_epoch_end(self, epoch, logs=None):
            np.testing.assert_allclose(to_numpy(bias), 1 - 0.1 * betas[epoch] * (np.e - 1) / 2, rtol=1e-5)
            assert logs["loss"] == pytest.approx(logs["reconstruction"] + betas[epoch] * logs["kl"], rel=1e-5)

    vae.compile(keras.optimizers.SGD(0.1))
    vae.fit(images, batch_size=48, epochs=3, verbose=0, callbacks=[Changes()])
    vae.kl_warmup_steps = 10  # of which this is the first
    vae.set_weights(start)
    vae.train_on_batch(images)
    np.testing.assert_array_equal(to_numpy(bias), 1)
    vae.test_on_batch(images)
    vae.beta = 100.0
    figures = vae.test_on_batch(images, return_dict=True)
    assert figures["loss"] == pytest.approx(figures["reconstruction"] + 100 * figures["kl"], rel=1e-5)


def test_a_decoder_with_a_call_of_its_own_is_trained_as_it_computes(images):
    class Inverted(keras.Model):
        def call(self, inputs, training=None, mask=None):
            return 1.0 - super().call(inputs, training=training, mask=mask)

    vae = dense_vae(Inverted)
    assert isinstance(vae.decoder, Inverted)
    np.testing.assert_allclose(vae.predict(images, verbose=0), special.expit(-3.0), rtol=1e-5)


def test_a_decoder_that_ends_in_anothers_sigmoid_is_trained_as_it_computes(images):
    """One whose last layer was called before on something else."""
    vae = dense_vae()
    *_, reshape, sigmoid = vae.decoder.layers
    other = VAE(vae.encoder, keras.Model(vae.decoder.input, sigmoid(reshape.output - 6.0)))
    np.testing.assert_allclose(other.predict(images, verbose=0), special.expit(-3.0), rtol=1e-5)


def test_floats_are_the_same_images_in_bfloat16(images):
    """They are not rounded where the loss compares with them."""
    vae = build_vae(Config(**{**TINY, "precision": "mixed_bfloat16"}))
    vae.compile()
    figures = [vae.evaluate(given, verbose=0, return_dict=True) for given in (images, images.astype("float32") / 255)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-6)


def test_what_keras_takes_and_this_objective_has_not(images):
    """Before an epoch is trained."""
    vae = dense_vae()
    vae.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="the VAE's objective is its own; compile it without loss"):
        vae.train_on_batch(images)
    vae.compile("sgd")
    start = vae.get_weights()
    for options, told in (
        ({"class_weight": {0: 1.0}}, "class_weight is not supported"),
        ({"sample_weight": np.ones(len(images))}, "sample_weight is not supported"),
        ({"validation_data": (images.astype("float32"),)}, r"float32 images run from 0 to 255; expected"),
    ):
        with pytest.raises(ValueError, match=told):
            vae.fit(images, verbose=0, **options)
    with pytest.raises(ValueError, match="sample_weight is not supported"):
        vae.evaluate(images, sample_weight=np.ones(len(images)), verbose=0)
    others = images[::-1].copy()
    for validation in ((images, None, np.ones(len(images))), (images, others)):
        with pytest.raises(ValueError, match=r"sample_weight is not supported|y differs from the images; a VAE learns"):
            vae.fit(images, validation_data=validation, verbose=0)
    for use in (vae.fit, vae.evaluate, vae.train_on_batch, vae.test_on_batch):
        with pytest.raises(ValueError, match="y differs from the images; a VAE learns to give its images back"):
            use(images, others)
    with pytest.raises(ValueError, match="sample_weight is not supported"):  # given by its place
        vae.evaluate(images, None, 8, 0, np.ones(len(images)))
    with pytest.raises(ValueError, match="float32 images run from 0 to 255; expected"):
        vae.fit(images, None, 8, 1, 0, None, 0.0, (images.astype("float32"),))
    with pytest.raises(ValueError, match="images are given as a NoneType; expected one array"):
        vae.evaluate(None)
    with pytest.raises(ValueError, match=r"images of shape \(16, 16, 1\).*; image\[None\] is a batch of one"):
        vae.predict(images[0])
    for one, other in zip(vae.get_weights(), start, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_encoder_and_a_decoder_that_do_not_fit_are_refused(tiny_vae):
    images, latents = keras.Input((16, 16, 1)), keras.Input((3,))
    decoder = keras.Model(latents, keras.layers.Reshape((16, 16, 1))(keras.layers.Dense(256, "sigmoid")(latents)))
    with pytest.raises(ValueError, match=r"makes latents of shape \(8,\), the decoder takes \(3,\)"):
        VAE(tiny_vae.encoder, decoder)
    with pytest.raises(ValueError, match="the encoder's outputs are 1; expected two: mean and log-variance"):
        VAE(keras.Model(images, keras.layers.Dense(3)(keras.layers.Flatten()(images))), decoder)


def test_a_decoder_of_logits_is_refused():
    with pytest.raises(ValueError, match=r"decoder's images run from 3 to 3; expected \[0, 1\]: if these are logits"):
        dense_vae(activation="linear")


def test_metrics_compare_reconstructions_with_images_in_one_scale(images):
    vae, expected = dense_vae(), np.square(images / 255 - special.expit(3.0)).mean()
    vae.compile("sgd", metrics=["mse"])
    for given in ((images,), (images, images), (images.astype("float32") / 255,)):
        figures = vae.evaluate(*given, batch_size=48, verbose=0, return_dict=True)
        assert figures["mse"] == pytest.approx(expected, rel=1e-5)
        assert figures["loss"] > 100


@pytest.fixture(scope="module")
def deep_vae():
    """A VAE with loops and dropout, one of whose normalisations has no momentum."""
    keras.utils.set_random_seed(5)
    vae = build_vae(Config(**TINY, resnet_depth=46, dropout=0.5, norm_momentum=0.8, initialization="published"))
    vae.encoder.get_layer("stage1_block1").normalizations[0].momentum = 0.0
    vae.compile("adam")
    vae.optimizer.build(vae.trainable_variables)
    vae.kl_metric.update_state(3.0)
    for layer in (vae.encoder.get_layer("intermediate_dropout"), vae.decoder.get_layer("intermediate_dropout")):
        layer(ops.ones((1, 4)), training=True)
    for training in (True, False):
        vae.sampler(ops.zeros((1, 8)), ops.zeros((1, 8)), training=training)
    return vae


def moving_averages(model):
    return [weight for weight in model.weights if "moving_" in weight.path]


def values(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


def spoil(variables):
    for variable in variables:
        variable.assign(RNG.normal(0, 100, variable.shape))


def test_calibration_changes_the_moving_averages_alone_and_forgets_what_they_were(deep_vae, images):
    moving = moving_averages(deep_vae)
    others = [*deep_vae.variables, *deep_vae.optimizer.variables, *deep_vae.metrics_variables]
    others = [variable for variable in others if not any(variable is average for average in moving)]
    assert {"iteration", "trained_steps", "total", "seed_generator_state"} <= {variable.name for variable in others}
    before, results = values(others), []
    for _ in range(2):
        spoil(moving)
        deep_vae.calibrate(images, batch_size=16)
        results.append(values(moving))
        for one, other in zip(values(others), before, strict=True):
            np.testing.assert_array_equal(one, other)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(deep_vae.get_weights()) == len(keras.models.clone_model(deep_vae).get_weights())


def test_calibration_does_not_depend_on_where_the_noise_stands(deep_vae, images):
    results = []
    for _ in range(2):
        deep_vae.calibrate(images, batch_size=16)
        results.append(values(moving_averages(deep_vae)))
        for model in (deep_vae.encoder, deep_vae.decoder):
            model.get_layer("intermediate_dropout")(ops.ones((1, 4)), training=True)
        deep_vae.sampler(ops.zeros((1, 8)), ops.zeros((1, 8)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_calibration_leaves_out_a_part_of_a_batch(deep_vae, images):
    """Otherwise two images would weigh as much as the sixteen before them."""
    results = []
    for count in (16, 18, 2):
        deep_vae.calibrate(images[:count], batch_size=16)
        results.append(np.concatenate([value.ravel() for value in values(moving_averages(deep_vae))]))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.allclose(results[0], results[2])


def test_calibration_is_of_the_network_as_it_was_last_compiled(images):
    vae, results = build_vae(Config(**TINY, dropout=0.1, initialization="published")), []
    for fresh in (False, True):
        for rate in (0.1,) if fresh else (0.9, 0.1):
            vae.decoder.get_layer("intermediate_dropout").rate = rate
            vae.compile("adam")
            if fresh:
                vae._calibration().predict_function = None
            vae.calibrate(images, batch_size=16)
        results.append(np.concatenate([value.ravel() for value in values(moving_averages(vae))]))
    np.testing.assert_array_equal(*results)


def test_calibrated_averages_are_the_batches_moments(deep_vae, images):
    """Of 1×1 convolutions in a block and in a loop, three batches: the moments in float64 NumPy."""
    block, loop = (deep_vae.encoder.get_layer(name) for name in ("stage1_block1", "stage3_blocks"))
    assert isinstance(loop, Repeated)
    before, first = keras.Model(deep_vae.encoder.input, loop.input), loop.split()[0]

    def moments(x, kernel, bias):
        y = to_numpy(x) @ to_numpy(kernel)[..., 0, 0, :, :] + to_numpy(bias)
        return y.mean((0, 1, 2)), y.var((0, 1, 2))

    stacks = {stack.path.split("/")[-1]: stack for stack in loop.stacks}
    batches = []
    for batch in np.split(images / np.float32(255), 3):
        inputs = [before(batch, training=True)]
        inputs.append(first(inputs[0], training=True))
        of_loop = [moments(x, stacks["conv1_kernel"][n], stacks["conv1_bias"][n]) for n, x in enumerate(inputs)]
        of_block = [moments(batch, layer.kernel, layer.bias) for layer in (block.convolutions[0], block.shortcut)]
        batches.append([*of_block, *of_loop])

    spoil(moving_averages(deep_vae))
    deep_vae.calibrate(images, batch_size=16)
    got = [(layer.moving_mean, layer.moving_variance) for layer in (block.normalizations[0], block.shortcut_bn)]
    got += [(stacks["bn1_moving_mean"][n], stacks["bn1_moving_variance"][n]) for n in range(2)]
    for number, (momentum, averages) in enumerate(zip((0.0, 0.8, 0.8, 0.8), got, strict=True)):
        weights = momentum ** np.arange(2, -1, -1)
        for part, average in enumerate(averages):
            expected = (weights / weights.sum()) @ np.stack([batch[number][part] for batch in batches])
            np.testing.assert_allclose(to_numpy(average), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [BatchNormalization, keras.layers.BatchNormalization])
def test_calibration_of_a_normalisation_that_is_called_twice_and_of_one_that_never_moves(images, kind):
    """A frozen scale beside the averages stays, too."""
    inputs, latents = keras.Input((16, 16, 1)), keras.Input((3,))
    twice, still, slow = kind(momentum=0.9), kind(), kind(momentum=1.0)
    evaluate = still.call
    still.call = lambda x, training=None, mask=None: evaluate(x, training=False)
    first = keras.layers.Conv2D(4, 1)(keras.layers.Rescaling(1.0)(inputs))
    second = keras.layers.Conv2D(4, 1)(twice(first))
    x = keras.layers.Flatten()(slow(still(twice(second))))
    decoder = keras.Model(latents, keras.layers.Reshape((16, 16, 1))(keras.layers.Dense(256, "sigmoid")(latents)))
    vae = VAE(keras.Model(inputs, [keras.layers.Dense(3)(x), keras.layers.Dense(3)(x)]), decoder)
    for variable in (twice.gamma, still.gamma):
        variable.trainable = False
        variable.assign([2.0, 2, 2, 2])
    for layer in (still, slow):
        layer.moving_mean.assign([1.0, 2, 3, 4])
    outputs = keras.Model(inputs, [first, second])(images[:16] / np.float32(255), training=True)
    means = [to_numpy(each).mean((0, 1, 2)) for each in outputs]
    vae.calibrate(images[:16], batch_size=16)
    np.testing.assert_allclose(to_numpy(twice.moving_mean), (0.9 * means[0] + means[1]) / 1.9, rtol=1e-4, atol=1e-5)
    for layer in (still, slow):
        np.testing.assert_array_equal(to_numpy(layer.moving_mean), [1, 2, 3, 4])
    for variable in (twice.gamma, still.gamma):
        np.testing.assert_array_equal(to_numpy(variable), [2, 2, 2, 2])


class Interrupted(keras.utils.PyDataset):
    """A batch of 16 images, and then Ctrl-C."""

    def __init__(self, images):
        super().__init__()
        self.images = images

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index:
            raise KeyboardInterrupt
        return (self.images[:16],)


def test_a_calibration_that_fails_changes_nothing(deep_vae, images):
    before = values(deep_vae.variables)
    for unusable, error in (
        (images[:0], ValueError),
        (np.repeat(images, 2, axis=-1), ValueError),
        (Interrupted(images), KeyboardInterrupt),
    ):
        with pytest.raises(error):
            deep_vae.calibrate(unusable, batch_size=16)
        for one, other in zip(values(deep_vae.variables), before, strict=True):
            np.testing.assert_array_equal(one, other)


def test_calibration_leaves_frozen_normalisations_alone(deep_vae, images):
    """Also where it was calibrated before they were frozen."""
    deep_vae.calibrate(images, batch_size=16)
    moving, frozen = moving_averages(deep_vae), []
    spoil(moving)
    before = values(moving)
    for name in ("stage1_block1", "stage3_blocks"):
        layer = deep_vae.encoder.get_layer(name)
        frozen += [weight.path for weight in moving_averages(layer)]
        layer.trainable = False
    deep_vae.calibrate(images, batch_size=16)
    deep_vae.trainable = True
    kept = [np.array_equal(one, other) for one, other in zip(values(moving), before, strict=True)]
    assert [average.path for average, same in zip(moving, kept, strict=True) if same] == frozen


def test_entropy_floor_is_the_score_of_a_perfect_reconstruction():
    """Also of more images than are looked at at once."""
    images = RNG.integers(0, 256, (4400, 16, 5, 3), "uint8")  # in parts of 4,369 and 31
    levels = images / 255
    expected = stats.bernoulli(levels).entropy().sum() / len(images)
    assert entropy_floor(images) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("objective", "beta", "l2"), [("elbo", 1.0, 0.0), ("published", 0.5, 0.01)])
def test_evaluate_is_the_objective(images, objective, beta, l2):
    """evaluate() against the sums in NumPy on the model's own encoder and decoder, an uneven last batch included."""
    keras.utils.set_random_seed(2)
    config = Config(**TINY, initialization="published", objective=objective, beta=beta, mean_l2=l2, log_var_l2=2 * l2)
    vae = build_vae(config)
    last = vae.decoder.get_layer("image").kernel
    last.assign(0.01 * last)  # or else the untrained network's probabilities are 0 and 1
    for name in ("mean", "log_var"):
        vae.encoder.get_layer(name).bias.assign(np.linspace(-2, 2, 8))  # a KL to be seen beside the reconstruction
    vae.compile("adam")
    figures = vae.evaluate(images, batch_size=20, verbose=0, return_dict=True)

    noise = Sampling(objective, seed=config.seed)
    reconstruction, kl = 0.0, 0.0
    for batch in np.split(images, [20, 40]):
        mean, log_var = vae.encoder.predict(batch / np.float32(255), verbose=0)
        decoded = vae.decoder.predict(noise(mean, log_var), verbose=0).astype("float64")
        levels, mean, log_var = batch / 255, to_numpy(mean), to_numpy(log_var)
        reconstruction -= (special.xlogy(levels, decoded) + special.xlog1py(1 - levels, -decoded)).sum()
        kl += 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum()
    assert figures["reconstruction"] == pytest.approx(reconstruction / len(images), rel=1e-4)
    assert figures["kl"] == pytest.approx(kl / len(images), rel=1e-4)
    assert figures["loss"] == pytest.approx((reconstruction + beta * kl) / len(images), rel=1e-4)
    heads = {name: vae.encoder.get_layer(name) for name in ("mean", "log_var")}
    penalty = sum(
        scale * (to_numpy(weight) ** 2).sum()
        for scale, name in ((l2, "mean"), (2 * l2, "log_var"))
        for weight in heads[name].weights
    )
    assert figures["penalty"] == pytest.approx(penalty, rel=1e-4, abs=1e-6)
    vae(images[:20])
    minimised = float(to_numpy(vae.compute_loss(images[:20], training=False)))
    kl, reconstruction, *_ = (float(to_numpy(part)) for part in vae.losses)
    assert minimised == pytest.approx(reconstruction + beta * kl + penalty, rel=1e-5)


def test_the_readmes_stages_are_the_networks():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    columns = []  # filters of a stage → the side of its images
    for side, factor, plan in (
        (32, 1 / 2, networks.stages(Config())),
        (4, 2, networks.stages(Config(), transpose=True)),
        (4, 2, networks.stages(Config(decoder="published"), transpose=True)),
    ):
        columns.append({})
        for _, filters, strides in plan:
            side = int(side * factor) if strides == (2, 2) else side
            columns[-1][filters] = f"{side}×{side}"
    for stage, filters in enumerate(networks.FILTERS):
        blocks = [blocks_per_stage(depth)[stage] for depth in (28, 40, 70, 100)]
        images = [column[filters] for column in columns]
        row = [str(stage + 1), ", ".join(map(str, filters)), ", ".join(map(str, blocks)), *images]
        assert f"| {' | '.join(row)} |" in readme


@pytest.mark.parametrize(("objective", "beta"), [("published", 1.0), ("elbo", 0.5), ("elbo", 1.0)])
def test_a_loss_that_is_no_bound_has_the_bound_beside_it(images, objective, beta):
    """Its KL against a Monte Carlo estimate over the samples that the sampler draws."""
    vae = build_vae(Config(**TINY, initialization="published", objective=objective, beta=beta))
    vae.encoder.get_layer("log_var").bias.assign(np.linspace(-2, 1, 8))
    vae.compile("adam")
    figures = score(vae, images, 20)
    if objective == "elbo" and beta == 1:
        assert figures.keys() == set(FIGURES)
        return
    draws = 2000
    mean, log_var = (np.repeat(to_numpy(x), draws, axis=0) for x in vae.encoder.predict(images, verbose=0))
    sampler = Sampling(objective, seed=3)
    z = to_numpy(sampler(mean.astype("float32"), log_var.astype("float32")))
    spread = np.exp(log_var if objective == "published" else log_var / 2)
    ratios = (stats.norm.logpdf(z, mean, spread) - stats.norm.logpdf(z)).sum(-1)
    error = ratios.reshape(len(images), draws).std(axis=1).mean() / np.sqrt(len(ratios))
    assert figures["bound"] - figures["reconstruction"] == pytest.approx(ratios.mean(), abs=4 * error + 1e-3)
    assert abs(figures["bound"] - figures["loss"]) > 100 * error  # so that the test can tell


def test_an_uneven_last_batch_counts_by_its_images(images):
    vae = build_vae(Config(**TINY, initialization="published"))
    vae.decoder.get_layer("image").bias.assign([2.0])  # so that dark images have other losses
    vae.compile()
    mixed = np.concatenate([images[:40], np.zeros((8, 16, 16, 1), "uint8")])
    mean, log_var = (to_numpy(head) for head in vae.encoder.predict(mixed, verbose=0))
    kl = 0.5 * (mean**2 + np.exp(log_var) - log_var - 1).sum(1)
    assert abs(kl[40:].mean() - kl[:40].mean()) > 0.1 * kl.mean()
    assert vae.evaluate(mixed, batch_size=40, verbose=0, return_dict=True)["kl"] == pytest.approx(kl.mean(), rel=1e-4)

    head = vae.encoder.get_layer("log_var")
    head.set_weights([np.zeros(head.kernel.shape), np.full(head.bias.shape, -20.0)])  # noise is another in each batch
    both = [vae.evaluate(part, verbose=0, return_dict=True) for part in (mixed[:40], mixed[40:])]
    parts = np.array([figures["reconstruction"] for figures in both])
    expected = parts @ [40, 8] / 48
    assert abs(parts.mean() - expected) > 0.03 * expected
    reconstruction = vae.evaluate(mixed, batch_size=40, verbose=0, return_dict=True)["reconstruction"]
    assert reconstruction == pytest.approx(expected, rel=1e-4)


def test_heads_take_the_average_over_positions_and_means_start_at_random():
    encoder = networks.build_encoder(Config(**TINY), (16, 24, 1))
    assert encoder.get_layer("position_average").scale == pytest.approx(1 / 6)
    assert np.any(encoder.get_layer("mean").get_weights()[0])


def test_a_stem_is_the_first_convolution_where_the_order_is_pre():
    names = {layer.name for layer in networks.build_encoder(Config(**TINY, order="pre", stem=1), (16, 16, 1)).layers}
    assert "first_convolution" not in names


def test_blocks_without_shortcuts_are_not_cut_off():
    vae = build_vae(Config(**TINY, resnet_depth=40, shortcut="none"))
    assert {layer.gain for layer in vae._flatten_layers() if isinstance(layer, ResidualBlock)} == {1.0}


@pytest.mark.parametrize("initialization", ["identity", "published"])
def test_log_variances_are_limited(images, initialization):
    """In a network, also in one that was saved and loaded."""
    vae = build_vae(Config(**TINY, initialization=initialization))
    head = vae.encoder.get_layer("log_var")
    head.kernel.assign(np.zeros(head.kernel.shape))
    head.bias.assign(np.resize([-50.0, 0.5, 50.0], 8))
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(vae.encoder))
    loaded.set_weights(vae.encoder.get_weights())
    for encoder in (vae.encoder, loaded):
        np.testing.assert_array_equal(to_numpy(encoder(images[:1])[1]), [np.resize([-20, 0.5, 10], 8)])


def test_a_vae_from_its_configuration(tiny_vae):
    given = {"objective": "published", "beta": 0.5, "seed": 7, "kl_warmup_steps": 9}
    vae = VAE(tiny_vae.encoder, tiny_vae.decoder, **given)
    for each in (vae, VAE.from_config(vae.get_config())):
        assert {name: getattr(each, name) for name in given} == given
        sampler = Sampling.from_config(each.sampler.get_config())
        assert (sampler.objective, sampler.seed) == ("published", 7)


@pytest.mark.parametrize("initialization", ["identity", "published"])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_how_each_initialization_begins(initialization, order):
    """And that what else is configured reaches each layer."""
    config = Config(
        **{**TINY, "norm_momentum": 0.6, "intermediate_dim": 50, "seed": 5, "resnet_depth": 46, "remat": True},
        initialization=initialization,
        order=order,
        stem=int(order == "post"),
        image_shape=(16, 24, 1),
    )
    vae, identity = build_vae(config), initialization == "identity"
    assert (vae.seed, vae.encoder.input_shape) == (5, (None, 16, 24, 1))
    assert vae.decoder.get_layer("reshape").target_shape == (2, 3, 9)
    every = [layer for layer in vae._flatten_layers() if hasattr(layer, "momentum")]
    assert {layer.momentum for layer in every if not isinstance(layer, ResidualBlock)} == {0.6}
    for number, part in enumerate((vae.encoder, vae.decoder)):
        inner = [layer for layer in part.layers if isinstance(layer, Repeated)]
        first = [layer for layer in part.layers if isinstance(layer, ResidualBlock) and layer.name.endswith("block1")]
        assert inner
        assert len(first) == 4
        assert {(layer.remat, layer.pattern().gain) for layer in inner} == {(True, 0.0 if identity else 1.0)}
        assert {layer.gain for layer in first} == {1.0}
        kernels = {type(layer.kernel_initializer) for layer in first}
        assert kernels == {keras.initializers.HeNormal if identity else keras.initializers.GlorotUniform}
        assert part.get_layer("intermediate_dropout").seed == 7 + number
        last = [layer.name for layer in part.layers if layer.name.startswith("last_")]
        assert last == (["last_bn", "last_relu"] if order == "pre" else [])
    names = [layer.name for layer in vae.encoder.layers]
    assert ("position_average" in names, "first_convolution" in names) == (identity, order == "pre")
    assert np.any(to_numpy(vae.encoder.get_layer("log_var").kernel)) != identity


def test_no_width_is_too_small():
    assert min(min(filters) for _, filters, _ in networks.stages(Config(width=1 / 256))) == 1


def test_evaluation_repeats_and_takes_grey_levels_or_floats(tiny_vae, images):
    first = tiny_vae.evaluate(images, verbose=0, return_dict=True)
    assert first == tiny_vae.evaluate(images, verbose=0, return_dict=True)
    floats = tiny_vae.evaluate(images.astype("float32") / 255, verbose=0, return_dict=True)
    assert floats == pytest.approx(first, rel=1e-6)
    reconstructions = tiny_vae.predict(images, verbose=0)
    assert reconstructions.shape == images.shape
    assert 0 <= reconstructions.min() < reconstructions.max() <= 1
    np.testing.assert_array_equal(reconstructions, tiny_vae.predict(images, verbose=0))


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict", "calibrate", *BATCH])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda x: x.astype("float32"), r"float32 images run from 0 to 255; expected floats in \[0, 1\], or grey"),
        (lambda x: keras.ops.convert_to_tensor(x.astype("float32")), "float32 images run from 0 to 255"),
        (lambda x: np.full(x.shape, 1.0000001, "float32"), r"run from 1\.00000012 to 1\.00000012; expected floats in"),
        (lambda x: np.full(x.shape, np.nan, "float32"), "images run from nan to nan"),
        (lambda x: x.astype("uint16") * 257, "uint16 images run from 0 to 65535"),
        (
            lambda x: (x > 127).astype("int64"),
            "int64 images run from 0 to 1; expected grey levels 0 to 255",
        ),
        (
            lambda x: x[..., 0],
            r"16, 16\); expected \(batch, 16, 16, 1\); images\[..., None\] have a channel",
        ),
        (lambda x: x.repeat(3, axis=-1), r"shape \(.*, 16, 16, 3\); expected \(batch, 16, 16, 1\)"),
        (lambda x: x[:0], "there are no images; expected one or more"),
        (lambda x: {"image": x}, "images are given as a dict; expected one array or tensor of them"),
    ],
    ids=["floats", "a tensor", "rounded", "NaN", "uint16", "0 and 1", "no channel", "channels", "none", "a dict"],
)
def test_what_are_no_images_is_refused_and_the_network_stays(tiny_vae, images, method, spoil, told):
    before = values(tiny_vae.variables)
    with pytest.raises(ValueError, match=told):
        getattr(tiny_vae, method)(spoil(images))
    for one, other in zip(values(tiny_vae.variables), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_decoder_of_other_images_is_refused(tiny_vae):
    """Otherwise the loss would be of images that are repeated, as a sum broadcasts them."""
    latents = keras.Input((8,))
    decoder = keras.Model(latents, keras.layers.Reshape((16, 1, 1))(keras.layers.Dense(16)(latents)))
    with pytest.raises(ValueError, match=r"takes images of shape \(16, 16, 1\), the decoder makes \(16, 1, 1\)"):
        VAE(tiny_vae.encoder, decoder)
    unknown = keras.layers.Lambda(lambda x: decoder(x))
    with pytest.raises(ValueError, match=r"16, 16, 1\); expected \(batch, 16, 1, 1\)"):
        VAE(tiny_vae.encoder, unknown).terms(keras.ops.zeros((16, 16, 16, 1)))


def test_log_variances_come_back_from_beyond_their_limits():
    """As the KL has them do; with the gradient of a clip, which is zero there, they would stay."""
    value = keras.Input((1,))
    bound = networks.Bound(dtype="float32")
    model = keras.Model(value, bound(keras.layers.Dense(1, use_bias=False, name="head")(value)))
    model.compile("sgd", loss=lambda _, log_var: keras.ops.mean(keras.ops.expm1(log_var) - log_var) / 2)
    for start, limit in ((-25.0, -20), (15.0, 10), (-7.0, -7)):
        model.get_layer("head").set_weights([np.full((1, 1), start)])
        one = np.ones((1, 1), "float32")
        assert model.predict(one, verbose=0) == limit
        model.fit(one, one, verbose=0)
        (after,) = model.get_layer("head").get_weights()
        assert after == pytest.approx(start - 0.01 * np.expm1(limit) / 2, rel=1e-4)


def test_a_subclass_may_add_losses_before_the_objectives(tiny_vae, images):
    class Penalised(VAE):
        def call(self, x, training=False):
            self.add_loss(keras.ops.convert_to_tensor(3.0))
            return super().call(x, training=training)

    class Another(VAE):
        def call(self, x, training=False):
            return self.decoder(self.encoder(x)[0])

    figures = []
    for kind in (VAE, Penalised):
        vae = kind(tiny_vae.encoder, tiny_vae.decoder)
        vae.compile()
        figures.append(vae.evaluate(images[:8], return_dict=True, verbose=0))
    plain, penalised = figures
    assert penalised == pytest.approx({**plain, "penalty": plain["penalty"] + 3}, rel=1e-5)
    with pytest.raises(ValueError, match="the objective's terms are not known; call the VAE first"):
        VAE(tiny_vae.encoder, tiny_vae.decoder).compute_loss(images[:8])
    vae = Another(tiny_vae.encoder, tiny_vae.decoder)
    vae(images[:8])
    with pytest.raises(ValueError, match="the objective's terms are not known"):
        vae.compute_loss(images[:8])


def test_another_librarys_array_is_looked_at_as_well(tiny_vae, images):
    """Keras takes it, and on values that are no images the loss would be meaningless."""
    if keras.backend.backend() == "jax":
        from tensorflow import constant as foreign
    else:
        from jax.numpy import asarray as foreign
    array = foreign(images[:8].astype("float32"))
    for method in (tiny_vae.fit, tiny_vae.train_on_batch, tiny_vae.evaluate, tiny_vae.predict, tiny_vae.calibrate):
        with pytest.raises(ValueError, match=r"float32 images run from .*; expected floats in \[0, 1\]"):
            method(array)


def test_what_cannot_be_changed_or_is_no_number_is_told(tiny_vae, images):
    vae = VAE(tiny_vae.encoder, tiny_vae.decoder)
    for name in ("beta", "kl_warmup_steps"):
        for value in (keras.Variable(0.5), -1, float("nan")):
            with pytest.raises(ValueError, match=f"{name} is .*; expected a number of 0 or more"):
                setattr(vae, name, value)
    for name, value in (("objective", "published"), ("seed", 3)):  # they are the sampler's
        with pytest.raises(AttributeError):
            setattr(vae, name, value)
    for seed in (None, -1, 2**31 - 1):
        with pytest.raises(ValueError, match=f"seed is {seed}; expected a whole number from 0 to 2147483646"):
            VAE(tiny_vae.encoder, tiny_vae.decoder, seed=seed)
    assert type(VAE(tiny_vae.encoder, tiny_vae.decoder, seed=np.int64(3)).seed) is int  # as Keras asks for
    vae.compile("sgd")
    with pytest.raises(ValueError, match="class_weight is not supported"):
        vae.train_on_batch(images[:8], class_weight={0: 1.0})


def test_parts_may_have_penalties_of_another_precision():
    """Of float64 or of bfloat16 as of float32, in which the loss is."""
    image = keras.Input((8, 8, 1))
    for dtype, options in (
        ("float64", {"kernel_regularizer": "l2"}),
        ("mixed_bfloat16", {"activity_regularizer": "l2"}),
    ):
        flat = keras.layers.Flatten(dtype=dtype)(image)
        heads = [keras.layers.Dense(4, dtype=dtype, **options)(flat) for _ in range(2)]
        latents = keras.Input((4,))
        images = keras.layers.Reshape((8, 8, 1))(keras.layers.Dense(64, "sigmoid")(latents))
        vae = VAE(keras.Model(image, heads), keras.Model(latents, images))
        vae.compile("sgd")
        images = RNG.uniform(0, 1, (4, 8, 8, 1))
        assert vae.fit(images, verbose=0).history["penalty"][0] > 0
        kl = kl_divergence(*(ops.cast(each, "float32") for each in vae.encoder.predict(images, verbose=0)))
        assert vae.evaluate(images, return_dict=True, verbose=0)["kl"] == pytest.approx(float(ops.mean(kl)), rel=0.02)


REPLICAS = """
import sys, keras, numpy as np, tensorflow as tf
from resnet_vae import Config, build_vae

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), "uint8")
images = np.concatenate([images, images])
for count in (1, 2):
    keras.utils.set_random_seed(0)
    with tf.distribute.MirroredStrategy([f"CPU:{number}" for number in range(count)]).scope():
        vae = build_vae(Config(width=1 / 16, latent_dim=4, intermediate_dim=16, kl_warmup_steps=0), (8, 8, 1))
        vae.compile(keras.optimizers.SGD(1e-4))
    vae.calibrate(np.concatenate([images] * 3), batch_size=16)
    print(*(weight.numpy().mean() for weight in vae.encoder.weights if "moving" in weight.path))
    vae.fit(images, batch_size=16, shuffle=False, verbose=0)
    print(vae.decoder.get_layer("image").bias.numpy()[0])
"""


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="of TensorFlow's strategies")
def test_several_replicas_train_and_calibrate_as_one():
    """Each sees the same images. The noise is another one, and so the step, if not twice as long."""
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    averages, step, averages_of_two, step_of_two = (np.array(line.split(), float) for line in done.stdout.splitlines())
    assert step_of_two == pytest.approx(step, rel=0.4)
    np.testing.assert_allclose(averages_of_two, averages, rtol=1e-3, atol=1e-4)


def test_training_noise_differs_and_evaluation_does_not_disturb_it(tiny_vae, images):
    posterior = np.zeros((2, 4, 8), "float32")
    draws = [to_numpy(tiny_vae.sampler(*posterior, training=True)) for _ in range(2)]
    assert np.abs(draws[0] - draws[1]).min() > 0
    state = to_numpy(tiny_vae.sampler.training_noise.state)
    tiny_vae.evaluate(images, verbose=0)
    np.testing.assert_array_equal(to_numpy(tiny_vae.sampler.training_noise.state), state)
    other = to_numpy(tiny_vae.sampler.evaluation_noise.state)
    tiny_vae(images[:2], training=True)
    assert np.any(to_numpy(tiny_vae.sampler.training_noise.state) != state)
    np.testing.assert_array_equal(to_numpy(tiny_vae.sampler.evaluation_noise.state), other)


def test_dropouts_and_sampler_are_independent():
    vae = build_vae(Config(**{**TINY, "dropout": 0.5, "intermediate_dim": 512}), (8, 8, 1))
    masks = [
        to_numpy(model.get_layer("intermediate_dropout")(ops.ones((1, 4096)), training=True)).ravel() > 0
        for model in (vae.encoder, vae.decoder)
    ]
    rows = ops.zeros((1, 4096)), ops.zeros((1, 4096))
    noise, evaluation = (to_numpy(vae.sampler(*rows, training=training)).ravel() for training in (True, False))
    for one, other in ((masks[0], masks[1]), (masks[0], abs(noise)), (masks[1], noise), (noise, evaluation)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(4096)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="exports as TensorFlow has them")
def test_an_exported_vae_encodes_and_decodes(images, tmp_path):
    """Floats in [0, 1] by itself, grey levels where it is told of them; without noise, so that they are the same."""
    import tensorflow as tf

    vae = build_vae(Config(**TINY, initialization="published"), images.shape[1:])
    kernel, bias = vae.encoder.get_layer("log_var").get_weights()
    vae.encoder.get_layer("log_var").set_weights([0 * kernel, bias - 20])
    kernel, bias = vae.decoder.get_layer("image").get_weights()
    vae.decoder.get_layer("image").set_weights([100 * kernel, bias])  # or else all reconstructions are alike
    vae(images[:1])  # Keras exports only what was called
    expected = vae.predict(images, verbose=0)
    signature = [keras.InputSpec(shape=(None, *images.shape[1:]), dtype="uint8")]
    for given, options in ((images / np.float32(255), {}), (images, {"input_signature": signature})):
        vae.export(str(tmp_path / given.dtype.name), verbose=False, **options)
        served = tf.saved_model.load(str(tmp_path / given.dtype.name))
        np.testing.assert_allclose(served.serve(tf.constant(given)).numpy(), expected, atol=2e-3)
    assert np.ptp(expected, axis=0).max() > 0.02


def test_a_loaded_model_is_compiled_by_xla_where_that_suits(tiny_vae):
    """And not because it was saved where there is a GPU."""
    tiny_vae.compile("adam", jit_compile=True)
    saved = tiny_vae.get_compile_config()
    assert saved["jit_compile"]
    tiny_vae.compile_from_config(saved)
    assert tiny_vae.jit_compile == (keras.backend.backend() == "jax")


def test_sample_weight_is_refused(tiny_vae, images):
    with pytest.raises(ValueError, match="sample_weight is not supported"):
        tiny_vae.compute_loss(images, None, images, sample_weight=np.ones(len(images)))
    for make in (Sampling, partial(VAE, tiny_vae.encoder, tiny_vae.decoder)):
        with pytest.raises(ValueError, match="objective is 'vae'"):
            make(objective="vae")


@pytest.fixture(scope="module")
def saved(images, tmp_path_factory):
    """A VAE after a few real steps of fit, and the folder where it is saved."""
    keras.utils.set_random_seed(4)
    settle()
    folder = tmp_path_factory.mktemp("saved")
    vae = build_vae(Config(**TINY))
    vae.compile(keras.optimizers.Adam(0.01))
    losses = vae.fit(images, batch_size=16, epochs=4, verbose=0).history["loss"]
    vae.save(folder / "vae.keras")
    np.save(folder / "images.npy", images)
    return vae, losses, folder


def test_fit_lowers_the_loss(saved):
    vae, losses, _ = saved
    assert losses[-1] < losses[0] - 2
    lines = []
    vae.summary(print_fn=lines.append)
    trained = sum(np.prod(weight.shape) for weight in vae.trainable_weights)
    assert f"Trainable params: {trained:,}" in "".join(lines)


LOAD = """
import sys
from types import SimpleNamespace
{imports}
import numpy as np
resnet_vae.devices.settle()
vae = keras.saving.load_model(sys.argv[1] + "/vae.keras")
images = np.load(sys.argv[1] + "/images.npy")
np.savez(
    sys.argv[1] + "/out.npz",
    predicted=vae.predict(images, verbose=0),
    generated=vae.decoder.predict(np.ones((2, 8), "float32"), verbose=0),
    evaluated=vae.evaluate(images, verbose=0),
)
"""


@pytest.mark.parametrize("imports", ["import resnet_vae, keras", "import keras, resnet_vae"])
def test_a_saved_model_is_the_same_in_a_new_process(saved, images, imports):
    """To the rounding of float32; both compute without TensorFlow's rewriting of graphs, as after a training."""
    vae, _, folder = saved
    command = [sys.executable, "-c", LOAD.format(imports=imports), str(folder)]
    subprocess.run(command, check=True, env=os.environ, capture_output=True)
    with np.load(folder / "out.npz") as loaded:
        np.testing.assert_allclose(loaded["predicted"], vae.predict(images, verbose=0), rtol=1e-6, atol=1e-6)
        generated = vae.decoder.predict(np.ones((2, 8), "float32"), verbose=0)
        np.testing.assert_allclose(loaded["generated"], generated, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(loaded["evaluated"], vae.evaluate(images, verbose=0), rtol=1e-6)


REGISTERED = """
import importlib.util
{imports}
import keras
for name in ("VAE", "Sampling", "ImageModel", "Features", "ResidualBlock", "Repeated", "BatchNormalization", "AdamW"):
    assert keras.saving.get_registered_object("resnet_vae>" + name), name
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import resnet_vae.blocks",
        "import resnet_vae; importlib.util.find_spec('keras')",
        "import keras, resnet_vae.vae",
    ],
)
def test_keras_knows_all_classes_whatever_is_imported_first(imports):
    subprocess.run([sys.executable, "-c", REGISTERED.format(imports=imports)], check=True, env=os.environ)


def count_blocks(model):
    counts = {ResidualBlock: lambda layer: 1, Repeated: lambda layer: layer.count}
    return sum(counts[type(layer)](layer) for layer in model.layers if type(layer) in counts)


@pytest.mark.parametrize("decoder", ["mirrored", "published"])
@pytest.mark.parametrize("depth", [28, 40, 70, 100])
def test_shapes_and_filters_at_every_depth_of_the_table(depth, decoder):
    vae = build_vae(Config(resnet_depth=depth, decoder=decoder, width=1 / 16))
    count = count_blocks(vae.decoder)
    assert 2 * (3 * count + 2) == depth
    assert [layer.filters[-1] for layer in vae.decoder.layers if layer.name.endswith("block1")] == [16, 32, 64, 128][
        :: -1 if decoder == "mirrored" else 1
    ]
    assert [tuple(shape) for shape in vae.encoder.output_shape] == [(None, 256), (None, 256)]
    assert vae.decoder.output_shape == (None, 32, 32, 3)
    weighted = [w for w in vae.encoder.weights if "kernel" in w.path and "shortcut" not in w.path]
    weighted = sum(w.shape[0] if "blocks" in w.path else 1 for w in weighted)  # repeated blocks have stacks of kernels
    assert weighted == 3 * count + 3  # the two heads lie beside each other on the longest path


def test_published_network_has_the_posts_shapes():
    """Parameters by the architecture's arithmetic, at full width, depth 28."""

    def stack(channels, order):
        total = 0
        for a, b, c in order:
            convolutions = channels * a + a + 9 * a * b + b + b * c + c + channels * c + c
            total += convolutions + 4 * (a + b + c + c)
            channels = c
        return total

    order = [(64, 64, 256), (128, 128, 512), (256, 256, 1024), (512, 512, 2048)]
    vae = build_vae(Config(preset="published", resnet_depth=28))
    dense = 2048 * 1024 + 1024 + 4 * 1024
    heads = 2 * (16 * 1024 * 256 + 256)
    assert vae.encoder.count_params() == stack(3, order) + dense + heads
    dense = 256 * 1024 + 1024 + 4 * 1024
    assert vae.decoder.count_params() == stack(64, order) + dense + 2048 * 3 + 3


@pytest.mark.parametrize("shape", [(8, 24, 1), (40, 16, 5)])
def test_other_image_shapes(shape):
    vae = build_vae(Config(**TINY), shape)
    mean, log_var = vae.encoder(keras.Input(shape))
    assert mean.shape == log_var.shape == (None, 8)
    assert vae.decoder(mean).shape == (None, *shape)
    assert vae(keras.Input(shape, dtype="uint8")).shape == (None, *shape)


def test_shapes_that_cannot_be():
    for shape in ((30, 32, 3), (None, None, 3), (8, 8, 0), (8, 8), (16.0, 16.0, 3), ("16", "16", "3")):
        with pytest.raises(ValueError, match="multiples of 8"):
            build_vae(Config(), shape)
    assert build_vae(Config(**TINY), np.array([8, 8, 1])).encoder.input_shape == (None, 8, 8, 1)
    with pytest.raises(ValueError, match="set IMAGE_SHAPE"):
        build_vae(Config(dataset="some/folder"))


def test_a_network_that_cannot_be_built_leaves_keras_as_it_is(monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("resnet_vae.vae.build_decoder", fail)
    policy = keras.config.dtype_policy()
    with pytest.raises(MemoryError):
        build_vae(Config(**{**TINY, "precision": "mixed_bfloat16"}))
    assert keras.config.dtype_policy() is policy


def test_precision_follows_the_processor_and_heads_give_float32(monkeypatch):
    found = resnet_vae.devices._gpus
    monkeypatch.setattr(resnet_vae.devices, "_gpus", list)  # whatever there is here

    def processor(vendor, flags, name="flags"):
        told = {"vendor_id": vendor, name: flags}
        monkeypatch.setattr("resnet_vae.devices._cpuinfo", lambda *names: next(filter(None, map(told.get, names)), ""))

    for vendor, flags in (("AuthenticAMD", "fpu avx2"), ("GenuineIntel", "fpu avx512f avx512_bf16")):
        processor(vendor, flags)
        assert precision(Config()) == "float32"
        assert not processor_has_amx()
    processor("GenuineIntel", "fpu avx512_bf16 amx_bf16")
    assert processor_has_amx()
    fast = "float32" if keras.backend.backend() == "jax" else "mixed_bfloat16"
    assert precision(Config()) == fast
    processor("", "fp asimd bf16", "Features")  # as Arm's are listed
    assert precision(Config()) == fast
    processor("AuthenticAMD", "fpu avx512f avx512_bf16")
    for name, capability, expected in (("Tesla T4", (7, 5), "float32"), ("NVIDIA A100", (8, 0), "mixed_bfloat16")):
        with monkeypatch.context() as gpu:
            gpu.setattr("resnet_vae.devices._gpus", lambda found=(name, capability): [found])
            assert precision(Config()) == expected
            assert devices() == [f"gpu:0, {name}"]
    if keras.backend.backend() == "jax":  # as JAX tells of AMD's and of NVIDIA's
        import jax

        for name, capability, expected in (("Instinct", "gfx90a", "float32"), ("A100", "8.0", "mixed_bfloat16")):
            card = SimpleNamespace(platform="gpu", device_kind=name, compute_capability=capability)
            with monkeypatch.context() as gpu:
                gpu.setattr(resnet_vae.devices, "_gpus", found)
                gpu.setattr(jax, "devices", lambda card=card: [card])
                assert (precision(Config()), devices()) == (expected, [f"gpu:0, {name}"])
    vae = build_vae(Config(**{**TINY, "precision": "auto"}))
    dtype = "float32" if keras.backend.backend() == "jax" else "bfloat16"
    assert vae.encoder.get_layer("stage2_block1").compute_dtype == dtype
    vae = build_vae(Config(**{**TINY, "precision": "mixed_bfloat16"}))
    mean, log_var = vae.encoder(keras.Input((16, 16, 1)))
    latent = vae.sampler(mean, log_var)
    assert {x.dtype for x in (mean, log_var, latent, vae.decoder(latent))} == {"float32"}
    assert vae.decoder.get_layer("stage2_block1").compute_dtype == "bfloat16"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow" or platform.libc_ver()[0] != "glibc",
    reason="memory is kept for TensorFlow, where the C library is GNU's",
)
def test_memory_is_not_asked_of_the_system_again_once_a_model_is_prepared():
    code = """
        import resource
        import keras
        from resnet_vae.optimizer import AdamW, prepare

        def pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            b"x" * 2**27
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        given_back = pages(), pages()
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        prepare(AdamW(), model)
        print(*given_back, pages(), pages())
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"},
        check=True,
        capture_output=True,
        text=True,
    )
    first, second, third, fourth = map(int, ran.stdout.split())
    assert min(first, second, third) > 50 > fourth  # of 4 kB or 2 MB


@pytest.mark.parametrize("kind", ["Dense", "Conv2DTranspose"])
def test_products_of_heads_and_image_are_in_the_dtype_of_their_input(kind):
    """Against float64; bias and output are in float32."""
    shape, more = ((4, 300), ()) if kind == "Dense" else ((4, 1, 1, 300), (1,))
    layer, x = getattr(networks, kind)(5, *more, dtype="float32"), RNG.standard_normal(shape).astype("float32")
    layer.build(shape)
    for weight in layer.weights:
        weight.assign(RNG.standard_normal(weight.shape))
    kernel, bias = (to_numpy(weight) for weight in layer.weights)
    expected = np.squeeze(x) @ (kernel if kind == "Dense" else kernel[0, 0].T) + bias
    for dtype, least, most in (("float32", 0, 1e-6), ("bfloat16", 1e-4, 1e-2)):
        y = layer(ops.cast(x, dtype))
        assert keras.backend.standardize_dtype(y.dtype) == "float32"
        assert least <= np.abs(np.squeeze(to_numpy(y)) - expected).max() / np.abs(expected).max() < most


def test_other_blocks_in_the_vae(images, tmp_path):
    """Every word of the blocks at once: it trains, and is the same after saving and loading."""
    words = {"block": "basic", "order": "pre", "shortcut": "pool", "learned_step": True, "stem": 1}
    keras.utils.set_random_seed(0)
    vae = build_vae(Config(**TINY, **words))
    assert count_blocks(vae.encoder) == count_blocks(vae.decoder) == (28 - 4) // 4
    assert [layer.name for layer in vae.encoder.layers[1:4]] == ["stem1", "stem1_bn", "stem1_relu"]
    assert [layer.name for layer in vae.decoder.layers[-5:-2]] == ["stem1", "stem1_bn", "stem1_relu"]
    steps = [weight for weight in vae.trainable_weights if weight.path.endswith("step")]
    assert sum(int(np.prod(step.shape)) for step in steps) == 12
    vae.compile(AdamW(0.01))
    losses = vae.fit(images, batch_size=16, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert any(np.any(keras.ops.convert_to_numpy(step) != 1) for step in steps)
    vae.save(tmp_path / "vae.keras")
    loaded, latents = keras.saving.load_model(tmp_path / "vae.keras"), np.ones((2, 8), "float32")
    for outputs in ([model.decoder(latents) for model in (vae, loaded)], [m.encoder(images)[0] for m in (vae, loaded)]):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, outputs))


@pytest.mark.parametrize(
    "words", [{"shortcut": "none"}, {"order": "pre"}, {"shortcut": "pad", "block": "basic"}], ids=str
)
def test_how_other_blocks_begin(images, words):
    """A plain network and the others begin near the loss of a grey picture, too."""
    vae = build_vae(Config(**TINY, resnet_depth=40, **words, kl_warmup_steps=0))
    vae.compile(run_eagerly=True)
    if "order" in words:  # where one normalisation, at the end, keeps a sum of blocks in bounds
        vae.calibrate(images, batch_size=48)
    figures = vae.evaluate(images, batch_size=48, verbose=0, return_dict=True)
    assert figures["reconstruction"] == pytest.approx(256 * np.log(2), rel=0.25)
    assert 0 <= figures["kl"] < 1
    steps = [layer for layer in vae.encoder.layers if isinstance(layer, ResidualBlock)]
    assert {layer.shortcut_kind for layer in steps[:1]} == {words.get("shortcut", "pool")}


def test_a_thousand_layers_start_calmly_and_learn(images, tmp_path):
    """Depth 1000 through fit: few layers to trace, a first loss that is small and falls, and the saved file."""
    keras.utils.set_random_seed(0)
    settings = {**TINY, "width": 1 / 64, "intermediate_dim": 16, "kl_warmup_steps": 0}  # what is told is minimised
    vae = build_vae(Config(**settings, resnet_depth=1000, remat=True), (8, 8, 1))
    assert count_blocks(vae.encoder) == 166
    assert len(vae.encoder.layers) < 20
    few = images[:4, 4:12, 4:12]
    vae.compile(AdamW(4e-3))
    losses = vae.fit(few, batch_size=4, epochs=6, verbose=0).history["loss"]
    assert losses[0] < 90  # a grey picture is at 44
    assert losses[-1] < losses[0]
    vae.save(tmp_path / "vae.keras")
    loaded = keras.saving.load_model(tmp_path / "vae.keras")
    np.testing.assert_array_equal(loaded.predict(few, verbose=0), vae.predict(few, verbose=0))


def test_image_layer_is_kerass_own_on_disk_and_in_value(monkeypatch, tmp_path):
    """Weights that were saved with Keras's layer in its place are read, and give the same images."""
    config = Config(**TINY)
    latents = RNG.standard_normal((3, config.latent_dim)).astype("float32")
    with monkeypatch.context() as patched:
        patched.setattr(networks, "Conv2DTranspose", keras.layers.Conv2DTranspose)
        former = build_vae(config)
    former.decoder.get_layer("image").bias.assign(RNG.standard_normal(1))
    former.save_weights(tmp_path / "former.weights.h5")
    vae = build_vae(config)
    vae.load_weights(tmp_path / "former.weights.h5")
    images = [to_numpy(model.decoder(latents)) for model in (former, vae)]
    np.testing.assert_allclose(*images, atol=1e-5)
    assert images[0].std() > 0.01  # neither is a picture of one grey


def test_truth_values_are_black_and_white(tiny_vae, images):
    """As the refusal of whole numbers of 0 and 1 advises; one nearly black image is one."""
    white = images > 127
    first, second = (tiny_vae.evaluate(x, verbose=0, return_dict=True) for x in (white, white.astype("uint8") * 255))
    assert first == pytest.approx(second, rel=1e-6)
    dark = np.zeros((1, 16, 16, 1), "uint8")
    dark[0, 3, 3] = 1
    assert tiny_vae.predict(dark, verbose=0).shape == dark.shape


@pytest.mark.parametrize("last", ["tanh", "step"])
def test_a_decoder_whose_images_are_at_the_limits_or_beyond(last):
    image, latents = keras.Input((8, 8, 1)), keras.Input((2,))
    heads = [keras.layers.Dense(2)(keras.layers.Flatten()(image)) for _ in range(2)]
    x = keras.layers.Reshape((8, 8, 1))(keras.layers.Dense(64)(latents))
    if last == "tanh":
        parts = keras.Model(image, heads), keras.Model(latents, keras.layers.Activation("tanh")(x))
        with pytest.raises(ValueError, match=r"decoder's images run from -0\.\d+ to 0\.\d+; expected \[0, 1\]"):
            VAE(*parts)
        return
    step = keras.layers.Lambda(lambda x: keras.ops.cast(x > 0, "float32"))  # 0 and 1 exactly
    vae = VAE(keras.Model(image, heads), keras.Model(latents, step(x)))
    vae.compile("sgd")
    figures = vae.evaluate(RNG.integers(0, 256, (4, 8, 8, 1), "uint8"), verbose=0, return_dict=True)
    assert np.isfinite(figures["reconstruction"])


def test_the_processor_is_read_from_the_system(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A: B\nflags\t\t: amx_bf16\n\nmodel name\t: C\n")
    monkeypatch.setattr("resnet_vae.devices.Path", lambda _: tmp_path / "cpuinfo")
    _cpuinfo.cache_clear()
    try:
        assert processor() == "A: B"
        assert processor_has_amx()
    finally:
        _cpuinfo.cache_clear()
