"""The experiments' mathematics against automatic differentiation and SciPy."""

import json
from functools import partial

import keras
import numpy as np
import pytest
from conftest import TINY, once

from resnet_vae import Config, build_classifier, build_vae, records
from resnet_vae.blocks import ResidualBlock
from resnet_vae.data import Data, DataError
from resnet_vae.experiments import degradation, euler, gradients, landscape, transfer
from resnet_vae.experiments.chain import ACTIVATIONS, Chain, random_chain
from resnet_vae.experiments.euler import EulerStep, convergence
from resnet_vae.experiments.networks import (
    adam,
    batches,
    build_network,
    compile_network,
    inputs,
    load_labelled,
    models,
    some,
)
from resnet_vae.experiments.record import conduct
from resnet_vae.experiments.settings import NETWORKS, Degradation, Euler, Trained, Transfer
from resnet_vae.records import sha256_of
from resnet_vae.verify import verify

RNG = np.random.default_rng(0)


def automatic(chain, u, loss_gradient, layer):
    """∂(loss_gradient · y[L])/∂W[layer] by TensorFlow's automatic differentiation in float64."""
    import tensorflow as tf

    functions = {"tanh": tf.tanh, "sigmoid": tf.sigmoid, "relu": tf.nn.relu, "linear": tf.identity}
    weights = [tf.constant(weight) for weight in chain.weights]
    with tf.GradientTape() as tape:
        tape.watch(weights[layer])
        y = tf.constant(u, "float64")[:, None]
        for number, weight in enumerate(weights):
            z = weight @ y + chain.biases[number][:, None]
            skip = 0.0
            if chain.residual:
                projection = chain.projections[number]
                skip = y if projection is None else tf.constant(projection) @ y
            y = skip + chain.steps[number] * functions[chain.activation](z)
        loss = tf.reduce_sum(loss_gradient[:, None] * y)
    return tape.gradient(loss, weights[layer]).numpy()


@once("NumPy against TensorFlow's automatic differentiation, whatever the backend")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu", "linear"])
def test_the_product_along_the_layers_is_the_gradient(residual, activation):
    """Square layers, widths that change (with projections), steps that are not 1; to 1e-10."""
    widths = [5, 5, 3, 7, 7, 2]
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    chain = Chain(
        [RNG.standard_normal(shape) for shape in shapes],
        [RNG.standard_normal(shape[0]) for shape in shapes],
        activation,
        residual,
        list(RNG.uniform(0.2, 2, len(shapes))),
        [None if shape[0] == shape[1] else RNG.standard_normal(shape) for shape in shapes],
    )
    u, loss_gradient = RNG.standard_normal(5), RNG.standard_normal(2)
    for layer, gradient in enumerate(chain.weight_gradients(u, loss_gradient)):
        np.testing.assert_allclose(gradient, automatic(chain, u, loss_gradient, layer), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("residual", [False, True])
def test_the_scalar_example_with_two_hidden_layers(residual):
    """One node a layer, no biases, depth 3: the product formula, factor by factor."""
    w, u, slope = RNG.uniform(0.5, 1.5, 3), 0.7, 1.3
    chain = Chain([np.array([[weight]]) for weight in w], residual=residual)
    y0, y1, y2, _ = (float(y[0]) for y in chain.forward([u]))
    a = [1 - np.tanh(weight * y) ** 2 for weight, y in zip(w, (y0, y1, y2), strict=True)]
    one = 1.0 if residual else 0.0
    expected = slope * (one + a[2] * w[2]) * (one + a[1] * w[1]) * a[0] * y0
    assert chain.weight_gradients([u], [slope])[0][0, 0] == pytest.approx(expected, rel=1e-12)


def test_the_sigmoid_far_from_zero():
    function, derivative = ACTIVATIONS["sigmoid"]
    z = np.array([-800.0, 0.0, 800.0])
    np.testing.assert_array_equal([function(z), derivative(z)], [[0, 0.5, 1], [0, 0.25, 0]])


def test_gradients_vanish_and_explode_and_a_skip_connection_stops_only_the_first():
    def first_over_last(scale, residual):
        chain = random_chain(np.random.default_rng(1), 60, 32, scale, residual, "linear")
        u, slope = np.ones(32) / 32, np.ones(32)
        first, *_, last = map(np.linalg.norm, chain.weight_gradients(u, slope))
        return first / np.linalg.norm(u) / (last / np.linalg.norm(chain.forward(u)[59]))

    assert first_over_last(0.5, residual=False) < 1e-12
    assert first_over_last(2.0, residual=False) > 1e12
    assert first_over_last(0.1, residual=True) > 0.1
    assert first_over_last(2.0, residual=True) > 1e12


@pytest.mark.parametrize("seed", range(3))
def test_euler_steps_converge_at_order_one(seed):
    """Half the step, half the distance from what SciPy's solver finds."""
    rows = convergence([64, 128, 256, 512], seed=seed)
    assert [row["order"] for row in rows[1:]] == pytest.approx([1, 1, 1], abs=0.1)
    assert rows[-1]["error"] < 0.01


def test_an_euler_step_is_a_layer_of_the_chain():
    """With a projection where widths differ, and its τ trained only where asked for."""
    step = EulerStep(3, 0.3, learned=True)
    u = RNG.standard_normal((4, 5)).astype("float32")
    y = keras.ops.convert_to_numpy(step(u))
    kernel, bias, projection = (
        np.asarray(keras.ops.convert_to_numpy(weight), "float64")
        for weight in (step.inner.kernel, step.inner.bias, step.projection.kernel)
    )
    chain = Chain([kernel.T], [bias], residual=True, steps=[0.3], projections=[projection.T])
    np.testing.assert_allclose(y, [chain.forward(row)[-1] for row in u], rtol=1e-5, atol=1e-6)
    assert step.tau in step.trainable_weights
    fixed = EulerStep(5, 0.3)
    fixed.build((None, 5))
    assert fixed.projection is None
    assert fixed.tau in fixed.non_trainable_weights


def test_the_probe_holds_the_gradients():
    """Against what a step of plain gradient descent takes off the weights, repeated blocks' among them."""
    keras.utils.set_random_seed(0)
    model = build_classifier("resnet20", (8, 8, 1), 3, width=0.125)
    images, labels = RNG.integers(0, 256, (8, 8, 8, 1), "uint8"), np.arange(8) % 3
    before = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_weights]
    state = model.get_weights()
    norms = gradients.of_network("classifier", model, images, labels)
    assert len(norms) == 18
    assert min(norms) > 0
    for weight, value in zip(model.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), value)
    kept = [model.optimizer.gradient_of(weight) for weight in model.trainable_weights]
    model.set_weights(state)
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy")
    model.train_on_batch(images / np.float32(255), labels)
    for weight, value, gradient in zip(model.trainable_weights, before, kept, strict=True):
        np.testing.assert_allclose(value - keras.ops.convert_to_numpy(weight), gradient, rtol=1e-3, atol=1e-5)
    loop = model.get_layer("stage1_blocks")
    kernel = next(place for place, weight in enumerate(model.trainable_weights) if weight is loop.stacks[0])
    assert norms[0] == pytest.approx(np.linalg.norm(kept[kernel][0]), rel=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_kinds_are_what_they_are_called_and_differ_in_nothing_else(network):
    """Above all, the scales of the normalisations start alike, but for zero-init's."""
    images = RNG.integers(0, 256, (16, 8, 8, 1), "uint8")
    data = Data("made up", images, images, images, "", (np.arange(16) % 3,) * 3, ("0", "1", "2"))
    for kind, order, plain in (
        ("plain", "post", True),
        ("residual", "post", False),
        ("zero-init", "post", False),
        ("pre-activation", "pre", False),
    ):
        model = build_network(Trained(width=0.0625), network, kind, {"classifier": 8, "VAE": 34}[network], data)
        layers = model.layers if network == "classifier" else model.encoder.layers + model.decoder.layers
        blocks = [layer for layer in layers if isinstance(layer, ResidualBlock)]
        assert blocks
        assert {(block.order, block.shortcut_kind == "none") for block in blocks} == {(order, plain)}
        zeros = [f"{block.name}/bn{len(block.convolutions)}" for block in blocks if block.shortcut_kind == "identity"]
        scales = [weight for weight in model.weights if weight.path.endswith("gamma")]
        assert scales
        for scale in scales:
            start = 0 if kind == "zero-init" and scale.path.removesuffix("/gamma") in zeros else 1
            assert np.all(keras.ops.convert_to_numpy(scale) == start)


def test_images_are_chosen_at_random():
    """The first ones may all be of one class, whose moments training never sees."""
    labels = np.repeat(np.arange(4), 25)
    images = labels[:, None, None, None].astype("uint8")
    images_chosen, labels_chosen = some(Data("made up", images, images, images, "", (labels,) * 3), 12, 0)
    assert len(set(labels_chosen)) == 4
    np.testing.assert_array_equal(images_chosen[:, 0, 0, 0], labels_chosen)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_trained_after_others_is_what_it_is_alone(network):
    """Weights, noise, optimizer: nothing of the networks before it is left."""
    settings = Trained(width=0.0625, batch_size=8, learning_rate=0.01)
    images, labels = RNG.integers(0, 256, (16, 8, 8, 1), "uint8"), np.arange(16) % 3
    data = Data("made up", images, images, images, "", (labels,) * 3, ("0", "1", "2"))
    depth = {"classifier": 8, "VAE": 28}[network]

    training = batches(settings, network, images, labels)
    build = partial(build_network, settings, network, "residual", depth, data)
    compile_ = partial(compile_network, network, optimizer=adam(settings))
    first, other, again = (
        model.fit(*training, epochs=2, batch_size=8, shuffle=False, verbose=0).history["loss"]
        for model, _ in models(build, compile_, [(0,), (1,), (0,)])
    )
    assert again == pytest.approx(first, rel=1e-5)
    assert other != pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_tested_after_each_epoch(network):
    """With a VAE's normalisations as they fit its weights; a classifier has errors. The epochs are those of one fit."""
    settings = Degradation(width=0.0625, batch_size=8, learning_rate=0.01, epochs=2)
    images, labels = RNG.integers(0, 256, (16, 8, 8, 1), "uint8"), np.arange(16) % 3
    data = Data("made up", images, images, images, "", (labels,) * 3, ("0", "1", "2"))
    model = build_network(settings, network, "residual", {"classifier": 8, "VAE": 28}[network], data)
    compile_network(network, model, adam(settings))
    others, their_labels = RNG.integers(0, 256, (16, 8, 8, 1), "uint8"), np.arange(16) % 3
    tests = inputs(network, others, their_labels)
    rows = list(degradation.train(settings, model, inputs(network, images, labels), tests))
    assert [row["epoch"] for row in rows] == [1, 2]
    assert model.optimizer.iterations == 4
    assert all(row["loss"] > 0 for row in rows)
    if network == "VAE":
        assert all(row["error"] == row["test_error"] == "" for row in rows)
        model.calibrate(images[np.random.default_rng(0).permutation(16)], batch_size=8)
        assert rows[1]["test_loss"] == pytest.approx(model.evaluate(others, batch_size=8, verbose=0)[0], rel=1e-5)
    else:
        loss, accuracy = model.evaluate(others, their_labels, batch_size=8, verbose=0)
        assert (rows[1]["test_loss"], rows[1]["test_error"]) == pytest.approx((loss, 1 - accuracy))
        assert 0 <= rows[1]["error"] <= 1


def made_up(classes=4):
    """24 training and 16 test images, each of one grey level, no two alike."""
    images = np.arange(40, dtype="uint8").repeat(64).reshape(40, 8, 8, 1)
    labels = np.arange(40) % classes
    parts, labels = np.split(images, [24]), np.split(labels, [24])
    names = tuple(map(str, range(classes)))
    return Data("made up", parts[0], parts[1], parts[1], "", (labels[0], labels[1], labels[1]), names)


@pytest.mark.parametrize("network", NETWORKS)
def test_degradation_is_of_training_and_of_test_images(network, monkeypatch):
    data, given = made_up(), []

    def noted(settings, model, training, test):
        given.append((training, test))
        yield {"epoch": 1, "loss": 1.0, "test_loss": 1.0}

    monkeypatch.setattr(degradation, "load_labelled", lambda settings: data)
    monkeypatch.setattr(degradation, "models", lambda build, compile_, cases: ((None, case) for case in cases))
    monkeypatch.setattr(degradation, "train", noted)
    degradation.measure(Degradation(networks=network, kinds="plain", depths="8", vae_depths="28", batch_size=8))
    assert given
    for pair in given:
        for part, images, labels in zip(pair, (data.train, data.test), (data.labels[0], data.labels[2]), strict=True):
            for each, expected in zip(part, inputs(network, images, labels), strict=True):
                np.testing.assert_array_equal(each, expected)


def test_more_labels_than_there_are_are_refused(monkeypatch):
    monkeypatch.setattr(transfer, "load_labelled", lambda settings: made_up())
    with pytest.raises(DataError, match="LABELS holds 7, and digits has a class of 6 images; expected no more"):
        transfer.measure(Transfer(labels="2 7"))
    half = made_up()
    half.labels[2][:] = 0
    monkeypatch.setattr(transfer, "load_labelled", lambda settings: half)
    with pytest.raises(DataError, match="digits has none; expected images of the second half of the classes among the"):
        transfer.measure(Transfer(labels="2"))


def test_each_way_of_transfer_is_what_it_is_called(monkeypatch):
    """On made-up networks: what was learned before and is taken over, what stays, the rates, images and labels."""
    data, first, tuned = made_up(), [], []

    class Network:
        learned = way = rate = None

        def __init__(self, network, seed=0):
            self.network, self.weights, self.encoder = network, seed, self

        def fit(self, images, labels=None, **options):
            (first if self.way is None else tuned).append((self, images, labels, options))

        def get_weights(self):
            return f"learned with seed {self.weights}"

        def set_weights(self, weights):
            self.weights = weights

        def evaluate(self, images, labels, **_):
            np.testing.assert_array_equal(images, data.test[data.labels[2] >= 2])
            np.testing.assert_array_equal(labels, data.labels[2][data.labels[2] >= 2] - 2)
            return {"accuracy": 0.5}

    def models(build, compile_, cases):
        for case in cases:
            model = build(*case)
            compile_(model)
            yield model, case

    def adapt(model, classes, **way):
        assert classes == 2
        model.way = way
        return model

    for name, fake in {
        "load_labelled": lambda settings: data,
        "build_network": lambda settings, network, kind, depth, data, seed=0: Network(network, seed),
        "models": models,
        "adam": lambda settings, rate=None: rate or settings.learning_rate,
        "compile_network": lambda network, model, optimizer: setattr(model, "rate", optimizer),
        "take_over": lambda model, source: setattr(model, "learned", source.weights),
        "adapt": adapt,
    }.items():
        monkeypatch.setattr(transfer, name, fake)
    rates = {"learning_rate": 0.25, "tuning_rate": 0.125}
    rows = transfer.measure(Transfer(**rates, labels="3", repetitions=2, steps=5, batch_size=4, epochs=7))["transfer"]
    assert [(row["network"], row["way"], row["seed"]) for row in rows] == [
        (network, way, seed) for network in NETWORKS for way in ("scratch", "frozen", "fine-tuned") for seed in (0, 1)
    ]
    for model, images, labels, options in first:
        known = data.labels[0] < 2 if model.network == "classifier" else np.full(24, True)
        np.testing.assert_array_equal(images, data.train[known])
        if model.network == "classifier":
            np.testing.assert_array_equal(labels, data.labels[0][known])
        assert (model.rate, options["epochs"]) == (0.25, 7)
    ways = {  # what was taken over, how it is adapted, the rate
        "scratch": (None, {"frozen": False, "batch_statistics": True}, 0.25),
        "frozen": ("learned with seed {}", {"frozen": True, "batch_statistics": False}, 0.25),
        "fine-tuned": ("learned with seed {}", {"frozen": False, "batch_statistics": False}, 0.125),
    }
    for row, (model, images, labels, _) in zip(rows, tuned, strict=True):
        learned, way, rate = ways[row["way"]]
        assert (model.learned, model.way, model.rate) == (learned and learned.format(row["seed"]), way, rate)
        assert len(images) == 5 * 4
        assert len(np.unique(images)) <= 3 * 2
        np.testing.assert_array_equal(labels, images[:, 0, 0, 0] % 4 - 2)


def test_what_is_left_of_a_degradation():
    """Of made-up losses: after the last epoch, the seeds' mean and range."""
    epochs = [{"epoch": 1, "loss": 3.0, "test_loss": 4.0}, {"epoch": 2, "loss": 1.0, "test_loss": 2.0}]
    rows = [
        {"network": "VAE", "kind": kind, "depth": depth, "seed": seed, **row, "loss": row["loss"] * (depth + seed)}
        for kind in ("plain", "residual")
        for depth in (28, 76)
        for seed in (0, 4, 5)
        for row in epochs
    ]
    summary = degradation.summarize(rows)
    assert [(row["kind"], row["depth"]) for row in summary] == [(k, d) for k in ("plain", "residual") for d in (28, 76)]
    expected = {"seeds": 3, "loss": 79.0, "lowest": 76.0, "highest": 81.0, "test_loss": 2.0}
    assert summary[1] == {"network": "VAE", "kind": "plain", "depth": 76, **expected}


def test_experiments_train_on_all_training_images_and_test_on_the_others():
    data = load_labelled(Trained())
    assert (len(data.train), len(data.test)) == (1438, 359)
    assert data.validation is data.test
    assert load_labelled(Trained(image_shape="8x8x3")).image_shape == (8, 8, 3)


def test_few_images_of_each_class_are_chosen_at_random():
    labels = np.arange(60) % 3
    chosen = transfer.choose(labels, (1, 2), 5, np.random.default_rng(0))
    assert labels[chosen].tolist() == [1] * 5 + [2] * 5
    assert len(set(chosen)) == 10
    assert set(chosen) != set(transfer.choose(labels, (1, 2), 5, np.random.default_rng(1)))


def test_spirals_are_learned_from_some_points_and_told_by_others(monkeypatch):
    drawn, spirals = [], euler.spirals

    def noted(count, seed):
        drawn.append(spirals(count, seed))
        return drawn[-1]

    monkeypatch.setattr(euler, "spirals", noted)
    settings = Euler(points=50, epochs=1, layers=1)
    euler.train_on_spirals(settings, 3, "fixed", 1.0)
    (points, labels), (others, _) = drawn
    assert points.shape == others.shape == (50, 2)
    assert not np.isin(others, points).any()
    assert 10 < labels.sum() < 40


def filters_one_by_one(model, arrays):
    """Every filter of a tiny VAE's kernels as vectors, by the axis that the layer's documentation names."""
    found, of_decoder = [], {id(variable) for variable in model.decoder.variables}
    for (variable, _), array in zip(landscape.kernels(model), arrays, strict=True):
        transposed = any(f"{layer}/kernel" in variable.path for layer in ("block1/conv1", "block1/shortcut", "image"))
        for kernel in array if array.ndim == 5 else [array]:
            kernel = np.moveaxis(kernel, 2, 3) if transposed and id(variable) in of_decoder else kernel
            found += list(kernel.reshape(-1, kernel.shape[-1]).T)
    return found


def test_directions_are_as_long_as_the_filters():
    """Of every kernel, dense, transposed and repeated ones too; nothing else is moved."""
    vae = build_vae(Config(**TINY, initialization="published", shortcut="projection"))
    moved = {variable.path for variable, _ in landscape.kernels(vae)}
    assert moved == {each.path for each in vae.trainable_variables if "kernel" in each.path}
    direction = landscape.random_direction(vae, np.random.default_rng(0))
    pairs = zip(*(filters_one_by_one(vae, arrays) for arrays in (direction, landscape.position(vae))), strict=True)
    for drawn, own in pairs:
        assert np.linalg.norm(drawn) == pytest.approx(np.linalg.norm(own), rel=1e-5)


def test_a_surface_has_the_evaluated_loss_in_the_middle_and_leaves_the_weights(tiny_vae, images):
    def loss():
        return tiny_vae.evaluate(images[:16], verbose=0, return_dict=True)["loss"]

    before, expected = tiny_vae.get_weights(), loss()
    rng = np.random.default_rng(1)
    first, second = (landscape.random_direction(tiny_vae, rng) for _ in range(2))
    losses = landscape.surface(tiny_vae, loss, first, second, [-0.5, 0, 0.5], [0, 0.25])
    assert losses[0, 1] == expected
    for weight, value in zip(tiny_vae.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)
    for (variable, _), a, b in zip(landscape.kernels(tiny_vae), first, second, strict=True):
        variable.assign(keras.ops.convert_to_numpy(variable) + 0.5 * a + 0.25 * b)
    assert losses[1, 2] == pytest.approx(loss(), rel=1e-6)
    tiny_vae.set_weights(before)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        landscape.surface(tiny_vae, fail, first, second, [1.0], [1.0])
    for weight, value in zip(tiny_vae.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_loss_is_that_of_a_training_step_and_leaves_the_network_as_it_is(network):
    """With the batch's statistics, whatever the moving averages are, and noise that is the same each time."""
    settings = Trained(image_shape="8x8x1", width=0.125)
    data = load_labelled(settings)
    model = build_network(settings, network, "plain", {"classifier": 8, "VAE": 28}[network], data)
    for variable in model.non_trainable_variables:
        if "moving" in variable.name:
            variable.assign(100.0 + keras.ops.zeros(variable.shape))
    few = inputs(network, data.train[:20], data.labels[0][:20])
    before = [keras.ops.convert_to_numpy(variable) for variable in model.variables]
    loss = landscape.training_loss(model, *few)
    told = [loss(), loss()]
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
    compile_network(network, model, adam(settings))
    assert told == pytest.approx(2 * [float(model.train_on_batch(*few, return_dict=True)["loss"])], rel=1e-5)
    assert told[0] == told[1]


def test_the_plane_of_a_path_is_that_of_its_largest_scatter():
    """Against the eigenvalues of the scatter matrix; in the plane, distances from the end are kept."""
    shapes, rng = ((2, 3), (5,)), np.random.default_rng(2)
    axes = np.linalg.qr(rng.standard_normal((11, 2)))[0].T
    coordinates = rng.standard_normal((6, 2)) * (3, 1)
    flat = coordinates @ axes + 0.01 * rng.standard_normal((6, 11))
    positions = [[row[:6].reshape(shapes[0]), row[6:]] for row in flat]
    directions, path, share = landscape.principal_plane(positions)
    moved = flat - flat[-1]
    scatter = np.sort(np.linalg.eigvalsh(moved.T @ moved))[::-1]
    assert share == pytest.approx(scatter[:2].sum() / scatter.sum(), rel=1e-9)
    assert path[-1] == pytest.approx([0, 0], abs=1e-12)
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), np.linalg.norm(moved, axis=1), atol=0.1)
    for direction, coordinate in zip(directions, path.T, strict=True):
        assert [array.shape for array in direction] == list(shapes)
        vector = np.concatenate([array.ravel() for array in direction])
        assert np.linalg.norm(vector) == pytest.approx(1)
        np.testing.assert_allclose(moved @ vector, coordinate, atol=1e-9)


def test_an_experiment_that_cannot_be_written_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(euler, "measure", lambda settings: pytest.fail("measured in vain"))
    (tmp_path / "file").touch()
    with pytest.raises(records.RecordError, match=r"file/sub cannot be written: Not a directory; choose another"):
        conduct(Euler(outdir=str(tmp_path / "file" / "sub")), euler)
    monkeypatch.setattr(euler, "measure", lambda settings: (tmp_path / "no data").read_bytes())
    with pytest.raises(FileNotFoundError, match="no data"):  # which is not told of the folder
        conduct(Euler(outdir=str(tmp_path / "there")), euler)


def test_a_record_that_was_changed_is_told(tmp_path, monkeypatch):
    """By its hashes; and where these were changed, too, by its picture. It names the code that it began with."""
    monkeypatch.setattr(records, "code", lambda: {"commit": "of the start", "dirty": False})
    fit = keras.Model.fit

    def committed_meanwhile(*args, **kwargs):
        monkeypatch.setattr(records, "code", lambda: {"commit": "a later one", "dirty": True})
        return fit(*args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", committed_meanwhile)
    folder = conduct(Euler(outdir=str(tmp_path), finest=16, layers=1, repetitions=1, epochs=1, points=10), euler)
    assert verify(folder) == []
    record, table = json.loads((folder / "record.json").read_text()), (folder / "euler.csv").read_text()
    assert record["settings"]["finest"] == 16
    assert (record["commit"], record["dirty"]) == ("of the start", False)
    assert record["versions"]["numpy"] == np.__version__
    (folder / "more.csv").write_text("a\n1\n")
    assert verify(folder) == [f"{folder / 'more.csv'} is not in record.json"]
    (folder / "more.csv").unlink()

    def rewritten(text, **changes):
        (folder / "euler.csv").write_text(text)
        files = record["files"] | {"euler.csv": sha256_of(folder / "euler.csv")}
        (folder / "record.json").write_text(json.dumps(record | {"files": files} | changes))
        return " ".join(verify(folder))

    (folder / "euler.csv").write_text(table.replace("0.125", "0.5"))
    assert verify(folder) == [f"{folder / 'euler.csv'} is not the file that was written (SHA-256)"]
    assert rewritten(table) == ""
    assert "euler.png is not the figure of these records" in rewritten(table.replace("8,0.125,0", "8,0.125,1"))
    assert "lacks something" in rewritten(table.replace("error", "mistake"))
    assert "'os'; expected one of degradation" in rewritten(table, experiment="os")
    assert "has no hashes" in rewritten(table, files=None)
