"""Residual classifiers by their papers' names, from the same blocks as the VAE.

Of "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385), tables 1 and 6, and of "Identity
Mappings in Deep Residual Networks" (https://arxiv.org/abs/1603.05027), table 4.
"""

import re

import keras
from keras import layers

from resnet_vae.blocks import ORDERS, SHORTCUTS, Repeated, ResidualBlock, conv_block
from resnet_vae.config import IMAGENET, UserError, cifar_blocks
from resnet_vae.networks import ImageModel, identity_blocks, plain_convolutions
from resnet_vae.normalization import BatchNormalization

NAMES = "resnet18, 34, 50, 101, 152; resnet20, 32, 44, 56, 110, 1202 (6n + 2); resnet164, resnet1001 (9n + 2)"
KERAS_EPSILON = 1.001e-5  # of keras.applications' normalisations


def build_classifier(
    name,
    image_shape=(32, 32, 3),
    classes=10,
    order="post",
    shortcut=None,
    stem=None,
    width=1.0,
    gain=1.0,
    learned_step=False,
    remat=False,
    activation="softmax",
):
    """Build a residual classifier: images (batch, *image_shape) → probabilities (batch, classes) in float32.

    uint8 images are brought to [0, 1]; floats are taken as they are. So that the features of a layer are those of the
    same images, make their model an `ImageModel` of `resnet_vae.networks`, too: ImageModel(model.inputs,
    model.get_layer("average").output). A `keras.Model` would take grey levels for floats.

    Before the last layer it averages over all positions, so that with the image shape (None, None, channels) images
    of any size can come, and a network trained at one size runs at others.

    Args:
        name: "resnet18", 34, 50, 101 or 152: the papers' networks for ImageNet, a 7×7 convolution and a pooling first;
            of these, 50 and more have biases, as in `keras.applications`, whose weights fit. Any other depth is of the
            family for CIFAR, three stages of 16, 32 and 64 filters: of basic blocks where it is 6n + 2, of bottleneck
            blocks for resnet164, resnet1001 and where it is 9n + 2 only.
        image_shape: (height, width, channels); height and width may be None.
        classes: number of classes.
        order: of the blocks, "post" or "pre".
        shortcut: where shapes change: "projection", "pool" or "pad"; "none" for the plain network of the same layers.
            By default the papers': pad in CIFAR's basic networks, projection in the others.
        stem: number of plain 3×3 convolutions before the first block, instead of the papers' one convolution; the first
            has its strides. Three for ImageNet are the stem of https://arxiv.org/abs/1812.01187, but for its filters.
        width: multiplier of all filters.
        gain: initial scale of each identity block's last normalisation; 0 lets blocks start as the identity.
        learned_step: see `ResidualBlock`.
        remat: compute what is within repeated blocks a second time for the gradient instead of keeping it.
        activation: of the last layer; None for logits.

    Raises:
        UserError: a name that is none of these, an unknown order or shortcut, or no width.
    """
    match = re.fullmatch(r"resnet(\d{1,6})", str(name))
    depth = int(match[1]) if match else 0
    family = IMAGENET.get(depth) or cifar_blocks(depth)
    if family is None:
        raise UserError(f"the classifier is {name!r}; expected one of {NAMES}")
    block, counts = family
    imagenet = depth in IMAGENET
    shortcut = shortcut or ("pad" if block == "basic" and not imagenet else "projection")
    for word, given, known in (("order", order, ORDERS), ("shortcut", shortcut, SHORTCUTS[1:])):
        if given not in known:
            raise UserError(f"the {word} is {given!r}; expected one of {', '.join(known)}")
    if not width > 0 or (stem is not None and stem < 0):
        raise UserError(f"width {width}, stem {stem}; expected a width above 0 and a stem of 0 or more, or None")
    convolutions = {"kernel_initializer": "he_normal", "use_bias": depth >= 50 and imagenet}
    momentum, epsilon = (0.99, KERAS_EPSILON) if imagenet else (0.9, 1e-3)
    options = {**convolutions, "momentum": momentum, "epsilon": epsilon, "order": order, "learned_step": learned_step}

    images = keras.Input(image_shape, name="image")
    first = max(1, round((64 if imagenet else 16) * width))
    x, strides = images, 2 if imagenet else 1
    if stem is not None:
        x = plain_convolutions(x, stem, first, strides, momentum=momentum, epsilon=epsilon, **convolutions)
    else:
        side = 7 if imagenet else 3
        x = layers.ZeroPadding2D(side // 2, name="stem_pad")(x)
        x = layers.Conv2D(first, side, strides, name="stem", **convolutions)(x)
        if order == "post" or imagenet:
            x = BatchNormalization(momentum=momentum, epsilon=epsilon, name="stem_bn")(x)
            x = layers.ReLU(name="stem_relu")(x)
    if imagenet:
        x = layers.ZeroPadding2D(1, name="pool_pad")(x)
        x = layers.MaxPooling2D(3, 2, name="pool")(x)
    repeated = {"shortcut": "none" if shortcut == "none" else "identity", "gain": gain, "remat": remat, **options}
    for stage, count in enumerate(counts, start=1):
        inner = first * 2 ** (stage - 1)
        filters = (inner, inner) if block == "basic" else (inner, inner, 4 * inner)
        strides = (1, 1) if stage == 1 else (2, 2)
        name = f"stage{stage}_block"
        changes = strides != (1, 1) or x.shape[-1] != filters[-1]
        if changes:
            x = conv_block(x, 3, filters, strides, name=f"{name}1", shortcut=shortcut, gain=1.0, **options)
        x = identity_blocks(x, count - changes, filters, name=f"{name}s", **repeated)
    if order == "pre":
        x = BatchNormalization(momentum=momentum, epsilon=epsilon, name="last_bn")(x)
        x = layers.ReLU(name="last_relu")(x)
    x = layers.GlobalAveragePooling2D(name="average")(x)
    probabilities = layers.Dense(classes, activation=activation, dtype="float32", name="classes")(x)
    return ImageModel(images, probabilities, name=f"resnet{depth}")


def take_weights(model, application):
    """Copy the weights of `keras.applications`' ResNet50, 101 or 152 into a classifier of the same name.

    Args:
        model: from `build_classifier`, in order post, with projections; where its number of classes is another, its
            last layer stays.
        application: the Keras model, with or without its top.

    Raises:
        UserError: a block is of another order or has another shortcut, or a stage has another number of blocks; nothing
            is copied then.
        ValueError: a layer is missing, or weights have other shapes.
    """
    _check_published(model)
    names = {layer.name for layer in application.layers}
    for stage in range(1, 5):
        count = 1 + model.get_layer(f"stage{stage}_blocks").count
        theirs = sum(f"conv{stage + 1}_block{number}_1_conv" in names for number in range(1, len(names)))
        if count != theirs:
            raise UserError(
                f"{model.name} has {count} blocks in stage {stage} and {application.name} {theirs}; expected a "
                "classifier of the same name"
            )

    def copy(layer, name):
        layer.set_weights(application.get_layer(name).get_weights())

    copy(model.get_layer("stem"), "conv1_conv")
    copy(model.get_layer("stem_bn"), "conv1_bn")
    for stage in range(1, 5):
        loop = model.get_layer(f"stage{stage}_blocks")
        repeated = loop.split()
        for number, block in enumerate([model.get_layer(f"stage{stage}_block1"), *repeated], start=1):
            name = f"conv{stage + 1}_block{number}"
            for place, (convolution, normalization) in enumerate(
                zip(block.convolutions, block.normalizations, strict=True), start=1
            ):
                copy(convolution, f"{name}_{place}_conv")
                copy(normalization, f"{name}_{place}_bn")
            if block.shortcut is not None:
                copy(block.shortcut, f"{name}_0_conv")
                copy(block.shortcut_bn, f"{name}_0_bn")
        loop.join(repeated)
    last = model.get_layer("classes")
    if application.layers[-1].name == "predictions" and application.output_shape[-1] == last.units:
        copy(last, "predictions")


def _check_published(model):
    """Refuse a classifier whose blocks are not those of `keras.applications`."""
    for layer in model.layers:
        block = layer.pattern() if isinstance(layer, Repeated) else layer
        if isinstance(block, ResidualBlock) and (
            block.order != "post" or block.shortcut_kind not in ("identity", "projection")
        ):
            raise UserError(
                f"{model.name} has blocks with order {block.order!r} and shortcut {block.shortcut_kind!r}; expected "
                "order 'post' and shortcut 'projection', as keras.applications' weights are for"
            )


def load_imagenet(model):
    """Give a resnet50, 101 or 152 the weights that Keras offers, trained on ImageNet.

    They expect images as `keras.applications.resnet.preprocess_input` makes them: blue first, means subtracted.

    Raises:
        UserError: another classifier, one of other blocks, width, stem or channels of the images, or the weights cannot
            be downloaded.
    """
    name = model.name.replace("resnet", "ResNet")
    if name not in ("ResNet50", "ResNet101", "ResNet152"):
        raise UserError(f"there are no ImageNet weights for {model.name}; expected resnet50, resnet101 or resnet152")
    _check_published(model)
    stem = [tuple(layer.kernel.shape) for layer in model.layers if layer.name == "stem"]
    if stem != [(7, 7, 3, 64)]:
        raise UserError(
            f"{model.name} does not begin as keras.applications' does; expected images of 3 channels, width 1 and no "
            "stem of one's own"
        )
    try:
        application = getattr(keras.applications, name)(weights="imagenet")
    except Exception as error:
        raise UserError(
            f"the ImageNet weights of {model.name} cannot be had ({' '.join(str(error).split())[:200]}). Keras "
            "downloads them into ~/.keras/models; without a network, bring that folder from a machine that has one"
        ) from None
    take_weights(model, application)
