"""A trained network put to other use: with new labels, with another number of channels, frozen or fine-tuned.

After "How transferable are features in deep neural networks?" (https://arxiv.org/abs/1411.1792).
"""

import keras
from keras import layers, ops

from resnet_vae.config import PACKAGE
from resnet_vae.networks import ImageModel


def take_over(target, source):
    """Copy a trained network's weights into one that was built for other images or other labels.

    The first layer's kernels may have another number of channels: theirs are then the mean over the source's channels,
    scaled so that a picture whose channels are all equal gives what it gave before. A decoder's last layer may, too:
    all channels of its logits are then the mean of the source's. The last layer of a classifier, where it has another
    number of classes, keeps the weights it has.

    Args:
        target: a classifier, an encoder or a decoder.
        source: of the same architecture but for channels of the images and number of classes.

    Returns:
        The paths of the target's weights that were not copied as they are.

    Raises:
        ValueError: the networks differ in more than that, or their first block passes the image itself on ("pad").
    """
    for model in (target, source):
        if hasattr(model, "encoder"):
            raise ValueError(f"{model.name} is a whole VAE; give its encoder, or its decoder")
    if len(target.weights) != len(source.weights):
        raise ValueError(
            f"{target.name} has {len(target.weights)} weights and {source.name} {len(source.weights)}; they must be "
            "the same network but for the images' channels and the number of classes"
        )
    channels = target.input_shape[-1], source.input_shape[-1]
    changed, values = [], []
    for ours, theirs in zip(target.weights, source.weights, strict=True):
        value = ops.convert_to_numpy(theirs)
        if ours.shape != theirs.shape:
            changed.append(ours.path)
            layer = ours.path.split("/")[-2]
            if len(ours.shape) == 4 and (ours.shape[2], theirs.shape[2]) == channels:
                block = next((each for each in target.layers if each.name in ours.path.split("/")), None)
                if getattr(block, "shortcut_kind", None) == "pad":
                    raise ValueError(
                        f"{block.name} passes the image's channels on as they are, by its shortcut pad, and no weights "
                        "bring others to the same; take networks with a stem (STEM=1) or another shortcut"
                    )
                value = (value.sum(2, keepdims=True) / channels[0]).repeat(channels[0], axis=2)
            elif layer == target.layers[-1].name:
                value = ops.convert_to_numpy(ours)
            elif layer == "image":  # a decoder's last, with a kernel (1, 1, channels, filters)
                axis = 2 if len(ours.shape) == 4 else 0
                value = value.mean(axis, keepdims=True).repeat(ours.shape[axis], axis)
            if ours.shape != value.shape:
                raise ValueError(
                    f"{ours.path} has shape {tuple(ours.shape)} in {target.name} and {tuple(theirs.shape)} in "
                    f"{source.name}; they must be the same network but for the images' channels and number of classes"
                )
        values.append(value)
    for ours, value in zip(target.weights, values, strict=True):
        ours.assign(value)
    return changed


@keras.saving.register_keras_serializable(PACKAGE)
class Features(keras.Model):
    """A functional Model that also in training computes as it does otherwise: normalisations use their averages.

    Keras passes the `training` of the outer model on, also where a model was called with training=False.
    """

    def __call__(self, *args, **kwargs):
        context = self._get_call_context()
        outer = context.get_value("training")
        try:
            return super().__call__(*args, **kwargs)
        finally:  # or else Keras would hand False on to the layers that come after this one in a model's `call`
            context.set_value("training", outer)
            if context.entry_layer is self:  # the outermost call, which may have failed before Keras ends its context
                self._maybe_reset_call_context()

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=False, mask=mask)


def adapt(model, classes, frozen=False, batch_statistics=False):
    """Put a new last layer on a network: images, uint8 or floats as it takes them → probabilities (batch, classes).

    Args:
        model: a classifier, a VAE or its encoder; its layers become the new model's, and are not copied.
        classes: number of classes.
        frozen: train the new layer only; otherwise all layers, also those that were frozen before.
        batch_statistics: let batch normalisation use the batch's moments in training, and dropout be active, as in a
            network trained from scratch. By default both work as in evaluation, also while scale and shift are trained:
            moving averages of a few images would spoil what was learned.

    Returns:
        A functional Model, not compiled. Its new layer reads what a classifier's last layer reads, or the mean of the
        latents. `model` shares the other layers, so it is frozen, too, until `adapt` is called with frozen=False.

    Raises:
        ValueError: a decoder, or a model that is not functional.
    """
    scaled = hasattr(model, "encoder") or isinstance(model, ImageModel)  # as a network of this package takes images
    model = getattr(model, "encoder", model)
    if not getattr(model, "outputs", None):
        raise ValueError(f"{model.name} has no outputs that are known; expected a functional model")
    if len(model.outputs) == 1 and len(model.output_shape) != 2:
        raise ValueError(
            f"{model.name} makes outputs of shape {model.output_shape[1:]}; expected a classifier, a VAE or its encoder"
        )
    inputs, outputs = model.inputs, model.outputs[0] if len(model.outputs) == 2 else model.layers[-1].input
    if [layer.name for layer in model.layers[1:-1]] == ["features"]:  # of a network that was adapted before
        inputs, outputs = model.layers[1].inputs, model.layers[1].outputs[0]
    features = (keras.Model if batch_statistics else Features)(inputs, outputs, name="features")
    for layer in features.layers:  # not `features` as a whole: set to what it already is, it would not reach them
        layer.trainable = not frozen
    images = keras.Input(features.input_shape[1:], dtype=None if scaled else features.inputs[0].dtype, name="image")
    x = features(images)
    x = layers.Dense(classes, activation="softmax", dtype="float32", name="classes")(x)
    return (ImageModel if scaled else keras.Model)(images, x, name=f"adapted_{model.name}")
