"""The classifiers against the papers' counts and against keras.applications."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import once

from resnet_vae import Config, build_classifier, load_data
from resnet_vae.blocks import Repeated, ResidualBlock, conv_block
from resnet_vae.classifiers import load_imagenet, take_weights
from resnet_vae.config import UserError

RNG = np.random.default_rng(0)


def trainable(model):
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20", {}, 269_722),  # the paper's 0.27 M
        ("resnet32", {}, 464_154),
        ("resnet44", {}, 658_586),
        ("resnet56", {}, 853_018),
        ("resnet110", {}, 1_727_962),
        ("resnet1202", {}, 19_421_274),
        ("resnet18", {"classes": 1000, "image_shape": (224, 224, 3)}, 11_689_512),
        ("resnet34", {"classes": 1000, "image_shape": (224, 224, 3)}, 21_797_672),
    ],
)
def test_parameters_are_the_papers(name, options, expected):
    assert trainable(build_classifier(name, **options)) == expected


@pytest.mark.parametrize(("name", "millions"), [("resnet164", 1.7), ("resnet1001", 10.2)])
@pytest.mark.parametrize("order", ["post", "pre"])
def test_bottleneck_networks_on_cifar(name, millions, order):
    """Layers and parameters, as in table 4 of the pre-activation paper; a thousand layers are few to trace."""
    model = build_classifier(name, order=order)
    names = {layer.name for layer in model.layers}
    assert ("last_bn" in names, "stem_bn" in names) == (order == "pre", order == "post")
    assert trainable(model) == pytest.approx(millions * 1e6, rel=0.02)
    assert len(model.layers) < 20
    blocks = sum(
        layer.count if isinstance(layer, Repeated) else isinstance(layer, ResidualBlock) for layer in model.layers
    )
    assert 3 * blocks + 2 == int(name.removeprefix("resnet"))


@once("counts are the same on every backend")
@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_counts_of_keras_applications(name):
    theirs = getattr(keras.applications, name.replace("resnet", "ResNet"))(weights=None)
    ours = build_classifier(name, (224, 224, 3), 1000)
    assert (ours.count_params(), trainable(ours)) == (theirs.count_params(), trainable(theirs))


def test_outputs_of_keras_applications_with_its_weights():
    """ResNet50 at a small image size, random weights copied over, moving statistics and all."""
    theirs = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=7)
    for weight in theirs.weights:
        if any(word in weight.path for word in ("variance", "gamma")):
            weight.assign(RNG.uniform(0.5, 1.5, weight.shape))
        elif any(word in weight.path for word in ("mean", "beta", "bias")):
            weight.assign(RNG.uniform(-0.2, 0.2, weight.shape))
    ours = build_classifier("resnet50", (64, 64, 3), 7)
    take_weights(ours, theirs)
    images = RNG.uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
    np.testing.assert_allclose(ours.predict(images, verbose=0), theirs.predict(images, verbose=0), rtol=1e-3, atol=1e-5)


def test_weights_of_a_deeper_network_are_refused():
    """Its first blocks would fit; nothing is copied."""
    counts = enumerate((3, 4, 23, 3), start=2)
    names = [f"conv{stage}_block{number + 1}_1_conv" for stage, count in counts for number in range(count)]
    theirs = SimpleNamespace(name="resnet101", layers=[SimpleNamespace(name=name) for name in names])
    model = build_classifier("resnet50", (32, 32, 3), 7, width=1 / 16)
    with pytest.raises(UserError, match="resnet50 has 6 blocks in stage 3 and resnet101 23; expected a classifier of"):
        take_weights(model, theirs)


def test_what_is_asked_for_is_what_is_built():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = build_classifier("resnet20", gain=0.25, learned_step=True, remat=True, activation=None)
    finally:
        keras.config.set_dtype_policy(policy)
    loops = [layer for layer in model.layers if isinstance(layer, Repeated)]
    assert [(loop.remat, loop.pattern().gain, loop.pattern().learned_step) for loop in loops] == [
        (True, 0.25, True)
    ] * 3
    assert {layer.momentum for layer in [*loops, model.get_layer("stem_bn")]} == {0.9}
    assert model.output.dtype == "float32"
    assert model.layers[-1].activation is keras.activations.linear


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20", {"stem": 0}, []),
        ("resnet20", {"order": "pre"}, ["stem_pad", "stem"]),
        ("resnet18", {"order": "pre"}, ["stem_pad", "stem", "stem_bn", "stem_relu", "pool_pad", "pool"]),
    ],
)
def test_what_comes_before_the_blocks(name, options, expected):
    names = [layer.name for layer in build_classifier(name, (32, 32, 3), 3, width=1 / 16, **options).layers]
    assert names[1 : names.index(next(each for each in names if each.startswith("stage1")))] == expected


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_a_plain_stem_has_the_strides_of_the_papers(name):
    """After it images are as large as after the paper's one convolution."""
    models = [build_classifier(name, (64, 64, 3), 3, width=1 / 16, stem=stem) for stem in (None, 3)]
    shapes = [next(layer for layer in model.layers if "stage1" in layer.name).input.shape for model in models]
    assert shapes[0] == shapes[1]


def test_imagenet_weights_are_those_that_keras_offers(monkeypatch):
    """All but the last layer's, where there are other classes."""
    theirs = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), classes=7)
    monkeypatch.setattr(keras.applications, "ResNet50", lambda weights: theirs)
    ours = build_classifier("resnet50", (32, 32, 3), 5)
    before = ours.layers[-1].get_weights()
    load_imagenet(ours)
    np.testing.assert_array_equal(*(model.layers[2].get_weights()[0] for model in (ours, theirs)))
    np.testing.assert_array_equal(ours.layers[-1].get_weights()[0], before[0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shortcut": "none"}, "order 'post' and shortcut 'none'"),
        ({"shortcut": "pool"}, "order 'post' and shortcut 'pool'"),
        ({"order": "pre"}, "order 'pre' and shortcut 'projection'"),
    ],
    ids=str,
)
def test_imagenet_weights_are_for_their_own_network_alone(monkeypatch, options, told):
    """Before they are downloaded; nothing is copied."""
    monkeypatch.setattr(keras.applications, "ResNet50", lambda weights: pytest.fail("downloaded"))
    model = build_classifier("resnet50", (32, 32, 3), 5, width=1 / 16, **options)
    before = model.get_weights()
    with pytest.raises(UserError, match=f"resnet50 has blocks with {told}; expected order 'post' and shortcut 'proj"):
        load_imagenet(model)
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_imagenet_weights_that_cannot_be_had(monkeypatch):
    def fail(weights):
        raise OSError("no network")

    monkeypatch.setattr(keras.applications, "ResNet50", fail)
    with pytest.raises(UserError, match=r"weights of resnet50 cannot be had \(no network\)"):
        load_imagenet(build_classifier("resnet50", (32, 32, 3), 2))
    monkeypatch.undo()  # others are refused before anything is downloaded
    for shape, other in (((32, 32, 3), {"width": 1 / 16}), ((32, 32, 3), {"stem": 1}), ((32, 32, 1), {})):
        with pytest.raises(UserError, match="expected images of 3 channels, width 1 and no stem"):
            load_imagenet(build_classifier("resnet50", shape, 2, **other))
    with pytest.raises(UserError, match="no ImageNet weights for resnet20"):
        load_imagenet(build_classifier("resnet20"))


@pytest.mark.parametrize("shortcut", ["projection", "pool", "pad", "none"])
def test_any_image_size_and_every_shortcut(shortcut):
    """Built for one size it gives the same."""
    models = [
        build_classifier("resnet8", (side, side, 1), 3, shortcut=shortcut, width=0.25, stem=2) for side in (None, 12)
    ]
    assert models[0].get_layer("stem2").kernel.shape == (3, 3, 4, 4)
    models[1].set_weights(models[0].get_weights())
    for size in (8, 12, 33):
        images = RNG.uniform(0, 1, (2, size, size, 1))
        probabilities = models[0].predict(images, verbose=0)
        assert probabilities.shape == (2, 3)
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
        if size == 12:
            np.testing.assert_allclose(models[1].predict(images, verbose=0), probabilities, rtol=1e-4, atol=1e-6)


def test_a_small_fully_convolutional_classifier_learns_at_any_size():
    """Five downsampling blocks without shortcuts, an average, a dense layer: trained at one size, then at another."""
    x = images = keras.Input((None, None, 1))
    for filters in (16, 32, 64, 128, 256):
        x = conv_block(x, 3, (filters, filters), shortcut="none", momentum=0.9)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(10, activation="softmax")(x))
    model.compile(keras.optimizers.Adam(0.002), "sparse_categorical_crossentropy", metrics=["accuracy"])

    def digits(side):
        data = load_data(Config(dataset="digits", image_shape=(side, side, 1), validation="test"))
        (train, test), (labels, _, test_labels) = (data.train, data.test), data.labels
        return (train / np.float32(255), labels), (test / np.float32(255), test_labels)

    for side, epochs in ((16, 5), (24, 3)):
        train, test = digits(side)
        model.fit(*train, batch_size=64, epochs=epochs, verbose=0)
        assert model.evaluate(*test, verbose=0, return_dict=True)["accuracy"] > 0.9


@pytest.mark.parametrize("name", ["resnet", "resnet19", "resnet2", "vgg16", "resnet1001x"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match=f"the classifier is {name!r}; expected one of resnet18"):
        build_classifier(name)
    with pytest.raises(UserError, match="the order is 'mid'; expected one of post, pre"):
        build_classifier("resnet20", order="mid")
    with pytest.raises(UserError, match="the shortcut is 'identity'; expected one of projection, pool, pad, none"):
        build_classifier("resnet20", shortcut="identity")
    with pytest.raises(UserError, match="width -1, stem None; expected a width above 0"):
        build_classifier("resnet8", (8, 8, 1), width=-1)


@pytest.mark.parametrize(("name", "expected"), [("resnet20", (0.9, 1e-3)), ("resnet50", (0.99, 1.001e-5))])
def test_normalisations_and_initial_kernels_are_the_papers(name, expected):
    """Momentum and epsilon; those for ImageNet's weights are of `keras.applications`."""
    model = build_classifier(name, (32, 32, 3), width=1 / 16)
    parts = [layer for layer in model._flatten_layers() if hasattr(layer, "epsilon")]
    assert {(layer.momentum, layer.epsilon) for layer in parts} == {expected}
    blocks = [layer.pattern() if isinstance(layer, Repeated) else layer for layer in model.layers]
    kinds = {type(block.kernel_initializer) for block in blocks if isinstance(block, ResidualBlock)}
    assert kinds == {keras.initializers.HeNormal}
