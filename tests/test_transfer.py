"""Trained networks put to other use: weights that are taken over, layers that are frozen."""

import keras
import numpy as np
import pytest
from conftest import TINY
from scipy import special

from resnet_vae import Config, adapt, build_classifier, build_vae, take_over

RNG = np.random.default_rng(0)


def classifier(channels=1, classes=3, width=0.125):
    return build_classifier("resnet20", (8, 8, channels), classes, width=width)


@pytest.mark.parametrize("network", ["classifier", "encoder", "adapted"])
def test_grey_levels_and_floats_are_the_same_images(network, tmp_path):
    """Saved and loaded, too."""
    encoder = None if network == "classifier" else build_vae(Config(**TINY), (8, 8, 1)).encoder
    model = disturb(classifier() if encoder is None else encoder if network == "encoder" else adapt(encoder, 3))
    images = RNG.integers(0, 256, (5, 8, 8, 1), "uint8")
    expected = model.predict(images / np.float32(255), verbose=0)
    model.save(tmp_path / "model.keras")
    for same in (model, keras.saving.load_model(tmp_path / "model.keras")):
        for given, wanted in zip(same.predict(images, verbose=0), expected, strict=True):
            np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)


def test_images_may_come_by_name_or_in_a_list():
    model = disturb(classifier())
    images = RNG.integers(0, 256, (5, 8, 8, 1), "uint8")
    expected = model.predict(images, verbose=0)
    for given in ({model.inputs[0].name: images}, [images]):
        np.testing.assert_array_equal(model.predict(given, verbose=0), expected)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX has float64 only where it is switched on")
def test_images_in_double_precision_keep_it():
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        model = classifier()
        features = [kind(model.inputs, model.layers[-1].input) for kind in (type(model), keras.Model)]
        images = RNG.uniform(0, 1, (2, 8, 8, 1))
        ours, plain = (keras.ops.convert_to_numpy(each(images)) for each in features)
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
    assert ours.dtype == "float64"
    np.testing.assert_array_equal(ours, plain)


def disturb(model):
    """Let no weight be what it starts as; outputs stay far from saturation."""
    for weight in model.weights:
        value = keras.ops.convert_to_numpy(weight)
        if value.dtype == "float32":
            low = -0.05 if "kernel" in weight.path else 0.01
            weight.assign(value + RNG.uniform(low, 0.05, value.shape))
    return model


@pytest.mark.parametrize(("network", "channels"), [("classifier", (1, 3)), ("encoder", (1, 3)), ("classifier", (3, 2))])
def test_other_channels_keep_what_grey_pictures_give(network, channels):
    """A picture of equal channels gives the network of other channels what it gave its source."""
    if network == "classifier":
        source, target = (classifier(count) for count in channels)
    else:
        source, target = (build_vae(Config(**TINY), (8, 8, count)).encoder for count in channels)
    disturb(source)
    changed = take_over(target, source)
    first = {"classifier": {"stem"}, "encoder": {"conv1", "shortcut"}}
    assert {path.split("/")[-2] for path in changed} == first[network]
    grey = RNG.uniform(0, 1, (5, 8, 8, 1)).astype("float32")
    pairs = zip((source, target), channels, strict=True)
    outputs = [model.predict(grey.repeat(count, axis=-1), verbose=0) for model, count in pairs]
    for one, three in zip(*map(np.atleast_2d if network == "classifier" else list, outputs), strict=True):
        np.testing.assert_allclose(three, one, rtol=1e-4, atol=1e-5)


def test_a_first_block_that_passes_the_image_on_is_refused():
    """Three grey channels would be three times as many features as one."""
    target, source = (build_vae(Config(**TINY, shortcut="pad"), (8, 8, count)).encoder for count in (3, 1))
    before = [keras.ops.convert_to_numpy(weight) for weight in target.weights]
    with pytest.raises(ValueError, match="stage1_block1 passes the image's channels on as they are, by its"):
        take_over(target, source)
    for weight, value in zip(target.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), value)


@pytest.mark.parametrize("channels", [(1, 3), (3, 1)])
def test_a_decoder_of_other_channels_has_the_mean_of_the_logits_in_all_of_them(channels):
    source, target = (build_vae(Config(**TINY), (8, 8, count)).decoder for count in channels)
    disturb(source)
    assert {path.split("/")[-2] for path in take_over(target, source)} == {"image"}
    latents = RNG.standard_normal((5, *source.input_shape[1:])).astype("float32")
    before, after = (model.predict(latents, verbose=0).astype("float64") for model in (source, target))
    logits = np.log(before / (1 - before)).mean(-1, keepdims=True)
    np.testing.assert_allclose(after, np.broadcast_to(1 / (1 + np.exp(-logits)), after.shape), rtol=1e-4)


def test_other_classes_leave_the_last_layer_and_nothing_else():
    source, target = disturb(classifier()), classifier(classes=5)
    kept = target.layers[-1].get_weights()
    assert {path.split("/")[-2] for path in take_over(target, source)} == {"classes"}
    np.testing.assert_array_equal(target.layers[-1].get_weights()[0], kept[0])
    for ours, theirs in zip(target.weights[:-2], source.weights[:-2], strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))


def test_a_network_that_makes_images_is_not_adapted_to_labels():
    with pytest.raises(ValueError, match=r"decoder makes outputs of shape \(8, 8, 1\); expected a classifier"):
        adapt(build_vae(Config(**TINY), (8, 8, 1)).decoder, 5)


def test_other_networks_are_refused_before_anything_is_copied():
    target = classifier()
    before = target.get_weights()
    with pytest.raises(ValueError, match="is a whole VAE; give its encoder, or its decoder"):
        take_over(target, build_vae(Config(**TINY), (8, 8, 1)))
    for source in (classifier(width=0.25), build_classifier("resnet18", (32, 32, 1), 3, width=0.0625)):
        with pytest.raises(ValueError, match="must be the same network"):
            take_over(target, source)
    for ours, value in zip(target.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, value)
    target, source = (build_vae(Config(**{**TINY, "intermediate_dim": u}), (8, 8, 1)).encoder for u in (64, 32))
    before = target.get_weights()
    with pytest.raises(ValueError, match="must be the same network"):  # they differ in their last layers
        take_over(target, source)
    for ours, value in zip(target.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, value)


def test_the_new_layer_reads_the_mean_of_the_latents():
    vae = disturb(build_vae(Config(**TINY), (8, 8, 1)))
    model = adapt(vae, 4)
    images = RNG.uniform(0, 1, (5, 8, 8, 1)).astype("float32")
    features = model.get_layer("features").predict(images, verbose=0)
    np.testing.assert_allclose(features, vae.encoder.predict(images, verbose=0)[0], rtol=1e-5, atol=1e-6)
    assert model.output.dtype == "float32"


@pytest.mark.parametrize(
    ("options", "trained", "counted"),
    [({"frozen": True}, False, False), ({}, True, False), ({"batch_statistics": True}, True, True)],
    ids=["frozen", "fine-tuned", "from scratch"],
)
@pytest.mark.parametrize("network", ["classifier", "VAE"])
def test_what_an_adapted_network_trains(network, options, trained, counted):
    """Frozen layers keep every bit; fine-tuned ones their moving averages; those from scratch nothing."""
    source = disturb(classifier() if network == "classifier" else build_vae(Config(**TINY), (8, 8, 1)))
    model = adapt(source, 4, **options)
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    before = {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}
    images, labels = RNG.uniform(0, 1, (12, 8, 8, 1)).astype("float32"), np.arange(12) % 4
    first = model.evaluate(images, labels, verbose=0)
    model.fit(images, labels, epochs=8, verbose=0)
    assert model.evaluate(images, labels, verbose=0) < first or counted  # by the batch's moments it may not, so soon
    changed = {
        weight.path for weight in model.weights if np.any(before[weight.path] != keras.ops.convert_to_numpy(weight))
    }
    moving = {path for path in before if "moving" in path}
    last = {path for path in before if path.startswith("classes/")}
    assert len(moving) > 10
    assert len(last) == 2
    assert last <= changed
    assert (changed & moving == moving) if counted else not (changed & moving)
    assert bool(changed - moving - last) == trained


def test_what_was_adapted_is_adapted_again():
    """Also to be trained with the batch's moments, which it was not before."""
    source = disturb(classifier())
    first = adapt(source, 4)
    own = keras.Sequential([first.get_layer("features"), keras.layers.Dense(6), keras.layers.Dense(3)])
    assert adapt(own, 5).get_layer("features").output.shape == (None, 6)
    again = adapt(first, 3, batch_statistics=True)
    before = again.get_layer("features").get_layer("stem_bn").get_weights()[2]
    again.compile("sgd", "sparse_categorical_crossentropy")
    again.fit(RNG.uniform(0, 1, (12, 8, 8, 1)).astype("float32"), np.arange(12) % 3, verbose=0)
    assert np.any(source.get_layer("stem_bn").get_weights()[2] != before)
    adapt(source, 4, frozen=True)
    assert len(adapt(again, 5).trainable_weights) == len(source.trainable_weights)
    with pytest.raises(ValueError, match="expected a functional model"):
        adapt(keras.Sequential(), 3)


def test_a_network_of_keras_takes_images_as_it_did():
    """Adapted, it brings grey levels to [0, 1] by its own layer and not a second time."""
    for dtype in ("float32", "uint8"):
        image = keras.Input((8, 8, 1), dtype=dtype)
        x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(image))
        model = keras.Model(image, keras.layers.Dense(3)(keras.layers.Dense(6, name="read")(x)))
        images = RNG.integers(0, 256, (5, 8, 8, 1), "uint8")
        read = keras.Model(image, model.get_layer("read").output).predict(images, verbose=0)
        adapted = adapt(model, 4)
        kernel, bias = adapted.get_layer("classes").get_weights()
        expected = special.softmax(read @ kernel + bias, axis=-1)
        np.testing.assert_allclose(adapted.predict(images, verbose=0), expected, rtol=1e-4)
        assert np.ptp(expected, axis=0).min() > 0.01


def test_layers_after_frozen_features_know_that_they_train():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.features = adapt(classifier(), 4).get_layer("features")
            self.drop = keras.layers.Dropout(0.5)

        def call(self, x):
            return self.drop(self.features(x))

    model, images = Own(), np.ones((1, 8, 8, 1), "float32")
    plain, dropped = (keras.ops.convert_to_numpy(model(images, training=training)) for training in (False, True))
    with pytest.raises(ValueError, match="is incompatible with the layer"):  # before Keras has begun the call
        model.features(np.ones((1, 4), "float32"))
    drop = keras.layers.Dropout(0.5)
    drop(plain, training=True)  # calls of their own: the second knows nothing of the first
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(drop(plain)), plain)
    assert np.count_nonzero(plain)
    assert np.count_nonzero(dropped) < np.count_nonzero(plain)


def test_what_was_frozen_is_thawed():
    source = build_vae(Config(**TINY), (8, 8, 1))
    everything = len(source.encoder.trainable_weights)
    source.encoder.layers[1].trainable = False
    counts = [len(adapt(source, 4, frozen=frozen).trainable_weights) for frozen in (True, False)]
    assert counts[0] == 2
    assert counts[1] > 20
    assert len(source.encoder.trainable_weights) == everything


def test_an_adapted_network_gives_probabilities():
    model = adapt(build_classifier("resnet8", (8, 8, 1), 3, width=0.125), 4)
    probabilities = model.predict(RNG.integers(0, 256, (5, 8, 8, 1), "uint8"), verbose=0)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
