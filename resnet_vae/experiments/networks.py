"""The small classifiers and VAEs that the experiments compare: equal layers, whose blocks are of one of KINDS."""

import keras
import numpy as np

from resnet_vae.classifiers import build_classifier
from resnet_vae.config import Config
from resnet_vae.data import labelled, load_data
from resnet_vae.experiments.settings import KINDS
from resnet_vae.optimizer import AdamW, prepare
from resnet_vae.vae import build_vae

LOSSES = {"classifier": "cross-entropy, nats per image", "VAE": "reconstruction + β KL, nats per image"}
SMALL_VAE = {
    "latent_dim": 16,
    "intermediate_dim": 128,
    "precision": "float32",
    "kl_warmup_steps": 0,
    "shortcut": "projection",  # the papers'
    "initialization": "published",  # for plain and residual alike; by default residual blocks start as the identity
}


def load_labelled(settings, image_shape=None):
    """The data, with labels: training and test images, brought to a shape if one is given or set.

    Raises:
        DataError: they cannot be had, or have no labels.
    """
    shape = image_shape or settings.image_shape
    return labelled(load_data(Config(dataset=settings.dataset, validation="test", image_shape=shape)))


def build_network(settings, network, kind, depth, data, seed=0, **options):
    """Build one of NETWORKS of one of KINDS; further options are of `build_classifier` or of `Config`."""
    keras.utils.set_random_seed(seed)
    options = {"width": settings.width, **KINDS[kind], **options}
    if network == "classifier":
        options["gain"] = 0.0 if options.pop("initialization", None) == "identity" else 1.0
        return build_classifier(f"resnet{depth}", data.image_shape, len(data.classes), **options)
    return build_vae(Config(resnet_depth=depth, seed=seed, beta=settings.beta, **SMALL_VAE | options), data.image_shape)


def some(data, count, seed):
    """So many training images and their labels, at random: the first ones may all be of one class."""
    chosen = np.random.default_rng(seed).permutation(len(data.train))[:count]
    return data.train[chosen], data.labels[0][chosen]


def adam(settings, rate=None):
    """Adam, by default at the settings' rate, with a limit on the gradient."""
    return AdamW(rate or settings.learning_rate, weight_decay=0.0, global_clipnorm=200.0)


def compile_network(network, model, optimizer):
    """Compile one of NETWORKS with its own loss."""
    prepare(optimizer, model)
    if network == "classifier":
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    else:
        model.compile(optimizer)


def inputs(network, images, labels):
    """What `fit` of one of NETWORKS takes: images and labels, or the images alone."""
    return (images, labels) if network == "classifier" else (images,)


def batches(settings, network, images, labels):
    """The `inputs` of as many images as fill whole batches: a smaller one would be traced anew."""
    whole = max(1, len(images) // settings.batch_size) * settings.batch_size
    return inputs(network, images[:whole], labels[:whole])


def models(build, compile_, cases):
    """For each case yield the model that `build(*case)` makes, compiled, and the case.

    The models must differ in their weights only: it is one model each time, compiled and traced once, which takes on
    the others' weights; what is wanted of it has to be taken before the next is asked for.
    """
    model = None
    for case in cases:
        fresh = build(*case)
        if model is None:
            model = fresh
            compile_(model)
        else:
            _begin_anew(model, fresh)
        yield model, case


def _begin_anew(model, fresh):
    """Give a compiled model the weights and the noise of a fresh one, and let its optimizer forget."""
    for variable, value in zip(_state(model), _state(fresh), strict=True):
        variable.assign(value)
    for variable in model.optimizer.variables:
        if variable.name != "learning_rate":
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))


def _state(model):
    """All variables of a model, those of its noise among them, which its weights are without, and no metric's."""
    metrics = {id(variable) for variable in model.metrics_variables}
    return [variable for variable in model.variables if id(variable) not in metrics]
