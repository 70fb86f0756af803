"""The encoder and the decoder: four stages of residual blocks between an image and its latent.

The architecture is the post's (https://bjlkeng.io/posts/residual-networks/), but that by default the decoder is
mirrored and shortcuts average. There is no stem unless it is asked for, and the first block reads the image (with
ORDER=pre a plain 3×3 convolution comes before it); a dense layer stands on either side of the latent.
"""

import math

import keras
from keras import layers, ops

from resnet_vae.blocks import Repeated, conv_block, identity_block
from resnet_vae.config import DOWNSAMPLING, LAYERS, PACKAGE, blocks_per_stage
from resnet_vae.convolution import matrix, pointwise
from resnet_vae.normalization import BatchNormalization

FILTERS = ((64, 64, 256), (128, 128, 512), (256, 256, 1024), (512, 512, 2048))  # of a stage's blocks
LOG_VAR_RANGE = (-20.0, 10.0)  # standard deviations 5e-5 to 148, the published 2e-9 to 22,026: nothing overflows


def scale(images):
    """Bring images to [0, 1] in Keras's floatx: whole numbers are grey levels 0 to 255, floats are there already."""
    whole = "int" in keras.backend.standardize_dtype(images.dtype)
    images = ops.cast(images, keras.config.floatx())
    return images / 255.0 if whole else images


@keras.saving.register_keras_serializable(PACKAGE)
class ImageModel(keras.Model):
    """A functional Model of images, which come as uint8 grey levels or as floats in [0, 1]."""

    def call(self, inputs, training=None, mask=None):
        return super().call(keras.tree.map_structure(scale, inputs), training=training, mask=mask)


@keras.saving.register_keras_serializable(PACKAGE)
class Bound(layers.Layer):
    """Clip log-variances to LOG_VAR_RANGE, (batch, latent) → the same, so that exp never overflows.

    The gradient is that of the identity: of a clip it is zero beyond, and a latent that is there would stay for ever,
    at a KL of 9.5 nats where its variance is least.
    """

    def call(self, x):
        return ops.stop_gradient(ops.clip(x, *LOG_VAR_RANGE)) + (x - ops.stop_gradient(x))

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable(PACKAGE)
class Conv2DTranspose(layers.Conv2DTranspose):
    """Keras's transposed convolution, of side 1, without strides and with a bias, as a product of matrices.

    The product is in the dtype of the input, which is not copied; bias, activation and output are in the layer's. The
    name is Keras's since files of weights are by the names of classes.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "autocast": False})

    def call(self, x):
        return self.activation(ops.cast(pointwise(x, matrix(self)), self.compute_dtype) + self.bias)


@keras.saving.register_keras_serializable(PACKAGE)
class Dense(layers.Dense):
    """Keras's dense layer of vectors, with the product in the dtype of the input, as by `Conv2DTranspose`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "autocast": False})

    def call(self, x):
        return self.activation(ops.cast(ops.matmul(x, ops.cast(self.kernel, x.dtype)), self.compute_dtype) + self.bias)


def stages(config, transpose=False):
    """The four stages of the encoder, or with `transpose` of the decoder, in their order.

    Returns:
        For each stage its number of blocks, their numbers of filters, and the strides of the first block, which changes
        the image's size in all stages but the first.
    """
    plan = list(zip(blocks_per_stage(config.resnet_depth, config.block), FILTERS, strict=True))
    if transpose and config.decoder == "mirrored":
        plan.reverse()
    return [
        (
            count,
            tuple(max(1, round(width * config.width)) for width in widths[: LAYERS[config.block]]),
            (2, 2) if stage else (1, 1),
        )
        for stage, (count, widths) in enumerate(plan)
    ]


def identity_blocks(x, count, filters, name, remat=False, **options):
    """Apply `count` blocks whose shortcuts are their inputs: one as it is, several as a loop (`Repeated`)."""
    if count == 1:
        return identity_block(x, filters=filters, name=name.removesuffix("s") + "2", **options)
    return Repeated(count, filters, remat=remat, name=name, **options)(x) if count else x


def plain_convolutions(x, count, filters, strides=1, momentum=0.99, epsilon=1e-3, **options):
    """A stem: `count` times 3×3 convolution, the first with the strides → BN → ReLU; options are the convolutions'."""
    for number in range(1, count + 1):
        stride = strides if number == 1 else 1
        x = layers.Conv2D(filters, 3, stride, padding="same", name=f"stem{number}", **options)(x)
        x = BatchNormalization(momentum=momentum, epsilon=epsilon, name=f"stem{number}_bn")(x)
        x = layers.ReLU(name=f"stem{number}_relu")(x)
    return x


def _apply_stages(x, config, transpose):
    """Apply the stages, each a conv_block and its identity_blocks, and the stem on the side of the image."""
    identity, plain = config.initialization == "identity", config.shortcut == "none"
    options = {
        "momentum": config.norm_momentum,
        "kernel_initializer": "he_normal" if identity else "glorot_uniform",
    }
    stem = {"count": config.stem, "filters": max(1, round(FILTERS[0][0] * config.width)), **options}
    if not transpose:
        x = plain_convolutions(x, **stem)
        if config.order == "pre" and not config.stem:  # or else the ReLU of the first block takes half of the image
            x = layers.Conv2D(stem["filters"], 3, padding="same", name="first_convolution")(x)
    options |= {"order": config.order, "learned_step": config.learned_step}
    for stage, (count, filters, strides) in enumerate(stages(config, transpose), start=1):
        name = f"stage{stage}_block"
        x = conv_block(
            x, 3, filters, strides, transpose, name=f"{name}1", shortcut=config.shortcut, gain=1.0, **options
        )
        x = identity_blocks(
            x,
            count - 1,
            filters,
            remat=config.remat,
            name=f"{name}s",
            shortcut="none" if plain else "identity",
            gain=0.0 if identity and not plain else 1.0,
            **options,
        )
    if config.order == "pre":
        x = BatchNormalization(momentum=config.norm_momentum, name="last_bn")(x)
        x = layers.ReLU(name="last_relu")(x)
    return plain_convolutions(x, **stem) if transpose else x


def _intermediate(x, units, config, seed):
    """Dense → BN → activation → dropout on the last axis; the layers on either side of the latent."""
    x = layers.Dense(units, name="intermediate")(x)
    x = BatchNormalization(momentum=config.norm_momentum, name="intermediate_bn")(x)
    x = layers.Activation(config.activation, name="intermediate_activation")(x)
    return layers.Dropout(config.dropout, seed=seed, name="intermediate_dropout")(x)


def build_encoder(config, image_shape):
    """Build the encoder: images → the Gaussian posterior's mean and log-variance.

    Args:
        config: a `Config`.
        image_shape: (height, width, channels), height and width multiples of 8.

    Returns:
        A functional Model: images, uint8 or floats in [0, 1], (batch, *image_shape) → [mean, log-variance], each
        (batch, latent_dim) in float32.
    """
    identity = config.initialization == "identity"
    images = keras.Input(image_shape, name="image")
    x = _apply_stages(images, config, transpose=False)  # (batch, height / 8, width / 8, filters)
    x = _intermediate(x, config.intermediate_dim, config, config.seed + 2)  # the sampler has the two seeds before
    x = layers.Flatten(name="flatten")(x)
    if identity:
        # The heads sum over tens of thousands of inputs, none negative: one step of Adam in which these agree can
        # throw a mean by tens of standard deviations. Averaged over the positions, it throws it that much less.
        x = layers.Rescaling(DOWNSAMPLING**2 / (image_shape[0] * image_shape[1]), name="position_average")(x)

    def head(name, initializer, l2):
        regularizer = keras.regularizers.L2(l2) if l2 else None
        return Dense(
            config.latent_dim,
            kernel_initializer=initializer,
            kernel_regularizer=regularizer,
            bias_regularizer=regularizer,
            dtype="float32",
            name=name,
        )(x)

    mean = head("mean", "lecun_normal" if identity else "glorot_uniform", config.mean_l2)
    log_var = head("log_var", "zeros" if identity else "glorot_uniform", config.log_var_l2)
    log_var = Bound(name="log_var_bound", dtype="float32")(log_var)
    return ImageModel(images, [mean, log_var], name="encoder")


def build_decoder(config, image_shape):
    """Build the decoder, which is also the generator: latents → images.

    With `config.decoder` "mirrored" the channels between blocks fall from 2048 to 256 (basic blocks: 512 to 64; both
    times `config.width`) while the image grows; with "published" they rise as in the encoder, as the post had it, at 9
    to 12 times the arithmetic (5 to 7 times that of the whole VAE).

    Args:
        config: a `Config`.
        image_shape: (height, width, channels), height and width multiples of 8.

    Returns:
        A functional Model: latents (batch, latent_dim) → images in [0, 1], (batch, *image_shape) in float32.
    """
    height, width, channels = image_shape
    rows, columns = height // DOWNSAMPLING, width // DOWNSAMPLING
    depth = math.ceil(config.intermediate_dim / (rows * columns))  # the published 1024 / 16 for 32×32 images
    latents = keras.Input((config.latent_dim,), name="latent")
    x = _intermediate(latents, rows * columns * depth, config, config.seed + 3)
    x = layers.Reshape((rows, columns, depth), name="reshape")(x)
    x = _apply_stages(x, config, transpose=True)  # (batch, height, width, filters)
    logits = Conv2DTranspose(channels, 1, dtype="float32", name="image")(x)
    images = layers.Activation("sigmoid", dtype="float32", name="image_sigmoid")(logits)
    return keras.Model(latents, images, name="decoder")
