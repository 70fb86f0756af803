"""The variational autoencoder: an encoder and a decoder nested in one Model that holds the objective.

"Auto-Encoding Variational Bayes" (https://arxiv.org/abs/1312.6114). All figures are in nats per image: sums over
pixels, channels and latents, averages over images.
"""

import inspect
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real

import keras
import numpy as np
from keras import layers, ops

from resnet_vae.blocks import Repeated
from resnet_vae.config import DATASETS, DOWNSAMPLING, OBJECTIVES, PACKAGE
from resnet_vae.devices import precision
from resnet_vae.networks import build_decoder, build_encoder, scale


def reconstruction_loss(images, logits):
    """Binary cross-entropy summed over pixels and channels: images in [0, 1] and logits, (batch, …) → (batch,) nats.

    Grey levels between 0 and 1 make it a score and not a normalised likelihood (https://arxiv.org/abs/1907.06845);
    it is least, not zero, at a perfect reconstruction: see `resnet_vae.data.entropy_floor`. Of logits, since where a
    probability is rounded to 0 or 1 there would be no gradient.
    """
    images, logits = ops.cast(images, "float32"), ops.cast(logits, "float32")
    return ops.sum(ops.softplus(logits) - images * logits, axis=tuple(range(1, len(images.shape))))


def _logits(decoder):
    """The function latents, training → logits of a decoder's images."""
    last = decoder.layers[-1] if getattr(decoder, "outputs", None) else None  # of a functional Model
    sigmoid = isinstance(last, layers.Activation) and last.activation is keras.activations.sigmoid
    if sigmoid and last.output is decoder.outputs[0]:  # and not a layer's that another model uses as well
        functional = keras.Model(decoder.inputs, last.input, name="logits")
        if type(decoder).call in (type(functional).call, keras.Sequential.call):  # and not a subclass's own
            return functional
    _check_output(decoder)

    def logits(latents, training):  # of probabilities 1e-7 away from 0 and 1 at least
        images = ops.clip(ops.cast(decoder(latents, training=training), "float32"), 1e-7, 1 - 1e-7)
        return ops.log(images) - ops.log1p(-images)

    return logits


def _check_output(decoder):
    """Refuse a decoder that makes something else of a few latents than images in [0, 1]."""
    shape = getattr(decoder, "input_shape", None)
    if isinstance(shape, tuple) and None not in shape[1:]:
        latents = np.random.default_rng(0).standard_normal((8, *shape[1:])).astype("float32")
        images = ops.convert_to_numpy(ops.cast(decoder(latents), "float32"))
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"the decoder's images run from {images.min():g} to {images.max():g}; expected [0, 1]: if these are "
                "logits, let it end with a sigmoid"
            )


def kl_divergence(mean, log_var):
    """KL(N(mean, exp(log_var)) ‖ N(0, I)) summed over the latents: (batch, latents) twice → (batch,) nats."""
    return 0.5 * ops.sum(ops.square(mean) + ops.expm1(log_var) - log_var, axis=-1)


@keras.saving.register_keras_serializable(PACKAGE)
class Sampling(layers.Layer):
    """Draw a latent from the posterior: mean, log-variance (batch, latents) → sample (batch, latents).

    Args:
        objective: "elbo": the standard deviation is exp(log_var / 2). "published": exp(log_var), the post's, which
            is at odds with the KL that takes exp(log_var) for the variance.
        seed: of the noise, a whole number. Training and evaluation have a generator each, so that evaluating does not
            change how training goes on.

    Raises:
        ValueError: an unknown objective, a seed that is no whole number from 0 on.
    """

    def __init__(self, objective="elbo", seed=0, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        if objective not in OBJECTIVES:
            raise ValueError(f"objective is {objective!r}; expected one of {', '.join(OBJECTIVES)}")
        if not isinstance(seed, Integral) or not 0 <= seed < 2**31 - 1:
            raise ValueError(f"seed is {seed!r}; expected a whole number from 0 to {2**31 - 2}")
        self.objective, self.seed = objective, int(seed)  # as Keras asks for
        self.training_noise = keras.random.SeedGenerator(self.seed, name="training_noise")
        self.evaluation_noise = keras.random.SeedGenerator(self.seed + 1, name="evaluation_noise")

    def call(self, mean, log_var, training=False):
        generator = self.training_noise if training else self.evaluation_noise
        noise = keras.random.normal(ops.shape(mean), dtype=mean.dtype, seed=generator)
        return mean + ops.exp(self.log_variance(log_var) / 2) * noise

    def log_variance(self, log_var):
        """The log-variance of the samples, which is not what the published objective's KL takes it for."""
        return 2 * log_var if self.objective == "published" else log_var

    def restart_evaluation(self):
        """Let the noise of evaluation begin anew, so that equal weights and images give equal figures."""
        _restart(self.evaluation_noise)

    def get_config(self):
        return {**super().get_config(), "objective": self.objective, "seed": self.seed}


def _restart(generator):
    """Let a seed generator begin anew."""
    state, seed = generator.state, generator.get_config()["seed"] or 0  # one without a seed cannot tell its first
    state.assign(ops.convert_to_tensor([seed, 0], dtype=state.dtype))


class _Model(keras.Model):
    """A Model whose state on JAX is set directly: Keras would look for layers in hundreds of arrays at each step."""

    def __setattr__(self, name, value):
        if name == "_jax_state":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class _Moves:
    """Counts how often a pass through a network moves each of some averages."""

    def __init__(self):
        self.averages, self.counts = [], {}

    @contextmanager
    def counted(self):
        """Count what is assigned to the averages from here on."""
        self.counts = dict.fromkeys(map(id, self.averages), 0)

        def assign(average, value):
            self.counts[id(average)] += 1
            return type(average).assign(average, value)

        for average in self.averages:
            average.assign = partial(assign, average)
        try:
            yield
        finally:
            for average in self.averages:
                del average.assign


class _Calibration(_Model):
    """Runs encoder and decoder in training mode, which updates their moving averages: images → a 1 per batch."""

    def __init__(self, encoder, decoder, sampler, **kwargs):
        super().__init__(**kwargs)
        self.encoder, self.decoder, self.sampler = encoder, decoder, sampler
        self.moves, self.built = _Moves(), True

    def call(self, images):
        with self.moves.counted():
            mean, log_var = (ops.cast(x, "float32") for x in self.encoder(scale(images), training=True))
            self.decoder(self.sampler(mean, log_var), training=True)
        return ops.ones((1,))

    def put_back(self, values):
        """Have values in all variables again after `predict` failed: on JAX Keras takes them out while it computes.

        Args:
            values: the variables' values before `predict`; JAX takes their memory over in the first step.
        """
        if keras.backend.backend() != "jax":
            return
        if getattr(self, "_jax_state", None):  # what the last step gave
            self.jax_state_sync()
            self._jax_state = None
        else:
            for variable, value in zip(self.variables, values, strict=True):
                variable.assign(value)


def _agree(first, second):
    """Whether two shapes are the same as far as their numbers are known."""
    known = [(one, other) for one, other in zip(first, second, strict=False) if None not in (one, other)]
    return len(first) == len(second) and all(one == other for one, other in known)


def _check_shape(images, expected):
    """Refuse another shape than (batch, *expected), where its numbers are known: the loss would broadcast it."""
    given = tuple(images.shape[1:])
    if not _agree(given, expected):
        told = ", ".join("any" if size is None else str(size) for size in expected)
        hint = ""
        if len(given) == 2 and len(expected) == 3:
            single = _agree(images.shape, expected)
            hint = "; image[None] is a batch of one" if single else "; images[..., None] have a channel"
        raise ValueError(f"images of shape {tuple(images.shape)}; expected (batch, {told}){hint}")


def _is_array(images):
    """Whether it is an array or a tensor, of whatever library: Keras takes what can be made a NumPy array."""
    return hasattr(images, "__array__") or ops.is_tensor(images)


def _check_levels(images):
    """Refuse arrays whose values cannot be images: the loss would be meaningless."""
    kind = keras.backend.standardize_dtype(images.dtype)
    low, high = images.min(), images.max()
    if "int" in kind and high == 1 and len(images) > 1:
        raise ValueError(
            f"{kind} images run from {low} to 1; expected grey levels 0 to 255; black and white: images.astype(bool)"
        )
    limit = 255 if "int" in kind else 1
    if not (low >= 0 and high <= limit):  # also when not finite
        raise ValueError(
            f"{kind} images run from {low:.9g} to {high:.9g}; expected floats in [0, 1], or grey levels 0 to 255 as "
            "uint8"
        )


def _given(method, *args, **kwargs):
    """The arguments of a call by their names, however they are given."""
    return inspect.signature(method).bind_partial(*args, **kwargs).arguments


def _check_weights(options):
    """Refuse weights, which Keras leaves out in silence where there are no targets."""
    for name in ("sample_weight", "class_weight"):
        if options.get(name) is not None:
            raise ValueError(f"the VAE's objective is an average over images; {name} is not supported")


def _check_options(images, options):
    """Refuse weights, and targets that are not the images."""
    _check_weights(options)
    y = options.get("y")
    if y is not None and y is not images and not np.array_equal(*map(ops.convert_to_numpy, (images, y))):
        raise ValueError("y differs from the images; a VAE learns to give its images back: expected no y")


@keras.saving.register_keras_serializable(PACKAGE)
class VAE(_Model):
    """A variational autoencoder for `fit`, `evaluate` and `predict`, without a target: `vae.fit(images)`.

    Images are uint8 grey levels, or floats in [0, 1]; the output is the reconstruction in [0, 1] from a sample of
    the posterior. `evaluate` and `predict` restart the noise, so they repeat exactly. Weights of samples or classes are
    refused, since the objective is a mean over images.

    In a training loop of one's own, `compute_loss(images)` after a call is what is minimised; `losses` are the terms
    without beta and warm-up. By itself `export` is for floats; for uint8 images:
    `input_signature=[keras.InputSpec(shape=(None, height, width, channels), dtype="uint8")]`.

    Metrics, nats per image: `loss` = reconstruction + beta × kl, `reconstruction`, `kl`, and `penalty`, the L2
    penalties of the heads, which training minimises too and `loss` leaves out.

    Args:
        encoder: Model, floats in [0, 1] → [mean, log-variance]; that of `build_encoder` takes uint8 by itself, too.
        decoder: Model, latents → images in [0, 1], not logits; the generator by itself.
        objective: "elbo" or "published", see `Sampling`.
        beta: weight of the KL, a number; below 1 the loss is no bound, above 1 a looser one. It may be changed at any
            time, as in a callback; the next training step is then compiled anew, as it is when kl_warmup_steps are
            changed.
        seed: of the sampler.
        kl_warmup_steps: training steps over which the KL's weight rises from 0 to beta, in what is minimised, not in
            what is printed; so that latents come into use before the KL switches them off
            (https://arxiv.org/abs/1602.02282).

    Raises:
        ValueError: an unknown objective; a seed that is no whole number, a beta or kl_warmup_steps that are no numbers;
            a decoder of other images, or of values beyond [0, 1]; images of another shape than the encoder's. Of an
            array or a tensor also: no images, floats beyond [0, 1], whole numbers beyond [0, 255] or 0 and 1 alone.
            Weights of samples or classes; targets that are not the images.
    """

    def __init__(self, encoder, decoder, objective="elbo", beta=1.0, seed=0, kl_warmup_steps=0, **kwargs):
        super().__init__(**{**kwargs, "autocast": False})  # targets in bfloat16 would be other images
        shapes = [getattr(encoder, "input_shape", None), getattr(decoder, "output_shape", None)]
        if all(isinstance(shape, tuple) for shape in shapes) and not _agree(*shapes):
            raise ValueError(f"the encoder takes images of shape {shapes[0][1:]}, the decoder makes {shapes[1][1:]}")
        outputs, latents = getattr(encoder, "outputs", None), getattr(decoder, "input_shape", None)
        if outputs and len(outputs) != 2:
            raise ValueError(f"the encoder's outputs are {len(outputs)}; expected two: mean and log-variance")
        if isinstance(latents, tuple):
            for output in outputs or ():
                if not _agree(output.shape, latents):
                    raise ValueError(
                        f"the encoder makes latents of shape {tuple(output.shape[1:])}, the decoder takes {latents[1:]}"
                    )
        self.encoder, self.decoder = encoder, decoder
        self.beta, self.kl_warmup_steps = beta, kl_warmup_steps
        self._terms = ()  # the identities of KL and reconstruction in `losses`, where a part's own may come first
        self.trained_steps = self.add_weight((), "zeros", "float32", trainable=False, name="trained_steps")
        self.sampler = Sampling(objective, seed, name="sampler")
        self.reconstruction_metric = keras.metrics.Mean(name="reconstruction", dtype="float32")
        self.kl_metric = keras.metrics.Mean(name="kl", dtype="float32")
        self.penalty_metric = keras.metrics.Mean(name="penalty", dtype="float32")
        logits = _logits(decoder)
        calibration = _Calibration(encoder, decoder, self.sampler, dtype=self.dtype_policy, name="calibration")
        self._logits, self._calibration = (lambda: logits), (lambda: calibration)  # so that Keras counts no layer twice
        self.build(getattr(encoder, "input_shape", None))

    @property
    def objective(self):
        """The sampler's objective."""
        return self.sampler.objective

    @property
    def seed(self):
        """The sampler's seed."""
        return self.sampler.seed

    def __setattr__(self, name, value):
        numbers = name in ("beta", "kl_warmup_steps")  # in the traces of the steps
        if numbers and not (isinstance(value, Real) and value >= 0):
            raise ValueError(f"{name} is {value!r}; expected a number of 0 or more, which may be changed at any time")
        super().__setattr__(name, value)
        if numbers:
            if getattr(self, "train_function", None):
                self.make_train_function(force=True)
            if getattr(self, "test_function", None):
                self.make_test_function(force=True)
        if name == "predict_function" and value is None and hasattr(self, "_calibration"):  # as `compile` sets it
            self._calibration().predict_function = None  # or else it would go on computing what was there before

    def build(self, input_shape=None):
        self.sampler.built = self.built = True  # encoder and decoder come built

    def terms(self, images, training=False):
        """The objective's two terms for each image, and what they are of.

        Returns:
            KL and reconstruction, (batch,) each, in nats; and the logits of the output, (batch, height, width,
            channels). The loss is the mean of reconstruction + beta × KL.
        """
        self._check_input(images)
        images = scale(images)
        mean, log_var = (ops.cast(x, "float32") for x in self.encoder(images, training=training))
        logits = self._logits()(self.sampler(mean, log_var, training=training), training=training)
        _check_shape(images, logits.shape[1:])
        return kl_divergence(mean, log_var), reconstruction_loss(images, logits), logits

    def call(self, images, training=False):
        *terms, logits = self.terms(images, training)
        terms = [ops.mean(term) for term in terms]
        self._terms = tuple(map(id, terms))
        self.add_loss(terms)  # compute_loss reads them
        return ops.sigmoid(logits)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        _check_weights({"sample_weight": sample_weight})
        if self._compile_loss is not None:
            raise ValueError("the VAE's objective is its own; compile it without loss (metrics may be given)")
        losses = {id(loss): loss for loss in self.losses}
        if not losses.keys() >= set(self._terms or (None,)):
            raise ValueError(
                "the objective's terms are not known; call the VAE first, and in a subclass's `call` super().call"
            )
        kl, reconstruction = map(losses.pop, self._terms)
        penalty = sum((ops.cast(each, "float32") for each in losses.values()), start=ops.zeros((), "float32"))
        count = ops.shape(x)[0]
        self.reconstruction_metric.update_state(reconstruction, sample_weight=count)
        self.kl_metric.update_state(kl, sample_weight=count)
        self.penalty_metric.update_state(penalty, sample_weight=count)
        weight = self.beta
        if training and self.kl_warmup_steps:
            weight *= ops.minimum(self.trained_steps / self.kl_warmup_steps, 1.0)
            self.trained_steps.assign_add(1.0)
        return self._aggregate_additional_loss(reconstruction + weight * kl + penalty)  # a replica's share of it

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Metrics given to `compile` compare the reconstruction with the images, both in [0, 1]."""
        return super().compute_metrics(x, scale(x), y_pred, sample_weight)

    def get_metrics_result(self):
        figures = super().get_metrics_result()
        if "kl" in figures:
            figures["loss"] = figures["reconstruction"] + self.beta * figures["kl"]
        return figures

    def _check(self, images):
        """Refuse an array or a tensor that are no images for this network, before Keras begins."""
        if images is None or isinstance(images, (list, tuple, dict)):
            raise ValueError(f"images are given as a {type(images).__name__}; expected one array or tensor of them")
        if _is_array(images):
            self._check_input(images)
            images = ops.convert_to_numpy(images)
            if not len(images):
                raise ValueError("there are no images; expected one or more")
            _check_levels(images)

    def _check_input(self, images):
        shape = getattr(self.encoder, "input_shape", None)  # of a functional encoder
        if isinstance(shape, tuple):
            _check_shape(images, shape[1:])

    def fit(self, x=None, *args, **kwargs):
        self._check(x)
        given = _given(super().fit, x, *args, **kwargs)
        _check_options(x, given)
        validation = given.get("validation_data")  # Keras would look at them after the first epoch
        if validation is not None:
            images, *others = validation if isinstance(validation, (list, tuple)) else (validation,)
            self._check(images)
            _check_options(images, dict(zip(("y", "sample_weight"), others, strict=False)))
        return super().fit(x, *args, **kwargs)

    def train_on_batch(self, x, *args, **kwargs):
        self._check(x)
        _check_options(x, _given(super().train_on_batch, x, *args, **kwargs))
        return super().train_on_batch(x, *args, **kwargs)

    def test_on_batch(self, x, *args, **kwargs):
        self._check(x)
        _check_options(x, _given(super().test_on_batch, x, *args, **kwargs))
        return super().test_on_batch(x, *args, **kwargs)

    def predict_on_batch(self, x):
        self._check(x)
        return super().predict_on_batch(x)

    def evaluate(self, x=None, *args, **kwargs):
        self._check(x)
        _check_options(x, _given(super().evaluate, x, *args, **kwargs))
        self.sampler.restart_evaluation()
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x, *args, **kwargs):
        self._check(x)
        self.sampler.restart_evaluation()
        return super().predict(x, *args, **kwargs)

    def calibrate(self, x, **kwargs):
        """Set the moving averages of all normalisations to the moments of batches, with the weights as they are.

        While the weights change fast, the averages that training moves are those of other weights; these are not:
        "precise BN" of "Rethinking 'Batch' in BatchNorm" (https://arxiv.org/abs/2105.07576), section 3. The mean over
        the batches is weighted as a moving average weights them, the last most, whatever was there before; of one with
        momentum 0 it is the last batch. Dropout and noise begin anew and are put back: the averages are a function of
        weights and images, and nothing else changes. Normalisations that are frozen, have momentum 1, or do not train
        are left as they are. Of an array or a tensor, images after the last whole batch are left out: a batch of a few
        would weigh as much as a whole one.

        Args:
            x: images, as for `predict`, in random order: a batch of one class has other moments. At least one batch.
            **kwargs: of `predict`, such as batch_size and steps.

        Raises:
            ValueError: as by `predict`.
        """
        self._check(x)
        if _is_array(x):
            size = kwargs.get("batch_size") or 32
            x = x[: max(len(x) // size * size, min(len(x), size))]
        averages = [
            (average, layer.momentum)
            for layer in self._flatten_layers()
            if isinstance(layer, (layers.BatchNormalization, Repeated)) and layer.trainable and layer.momentum < 1
            for average in layer.non_trainable_variables
            if average.name.endswith(("moving_mean", "moving_variance"))
        ]
        generators = [generator for layer in self._flatten_layers() for generator in layer._seed_generators]
        states = [ops.copy(ops.convert_to_tensor(generator.state)) for generator in generators]
        model, moved = self._calibration(), [average for average, _ in averages]
        if list(map(id, model.moves.averages)) != list(map(id, moved)):  # what is frozen is told in the trace
            model.moves.averages, model.predict_function = moved, None
        former = [ops.copy(ops.convert_to_tensor(average)) for average in moved]
        held = [variable.value for variable in model.variables]
        try:
            for generator in generators:
                _restart(generator)
            for average in moved:
                average.assign(ops.zeros(average.shape))
            batches = len(model.predict(x, **{"verbose": 0, **kwargs}))
            if strategy := getattr(model, "distribute_strategy", None):  # TensorFlow's, in which a batch is in parts
                batches //= strategy.num_replicas_in_sync
            for (average, momentum), value in zip(averages, former, strict=True):
                times = batches * model.moves.counts[id(average)]  # a layer may be applied more than once
                # as Adam corrects its averages, which begin at 0
                average.assign(average / (1 - momentum**times) if times else value)
        except BaseException:
            model.put_back(held)
            for average, value in zip(moved, former, strict=True):
                average.assign(value)
            raise
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.state.assign(state)

    def compile_from_config(self, config):
        """Compile as a saved model was; whether by XLA, as it suits here: where it was saved there may be a GPU."""
        super().compile_from_config({**config, "jit_compile": "auto"})

    def get_config(self):
        return {
            **super().get_config(),
            "encoder": keras.saving.serialize_keras_object(self.encoder),
            "decoder": keras.saving.serialize_keras_object(self.decoder),
            "objective": self.objective,
            "beta": self.beta,
            "seed": self.seed,
            "kl_warmup_steps": self.kl_warmup_steps,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        parts = {
            name: keras.saving.deserialize_keras_object(config[name], custom_objects) for name in ("encoder", "decoder")
        }
        return cls(**{**config, **parts})


def build_vae(config, image_shape=None):
    """Build the VAE that a configuration describes.

    Args:
        config: a `Config`.
        image_shape: (height, width, channels); by default config.image_shape, or that of the named data set.

    Returns:
        A built, not yet compiled `VAE`. Its weights are drawn by Keras's global generator, which
        `keras.utils.set_random_seed` sets; its precision is the configuration's, whatever Keras's dtype policy is.

    Raises:
        ValueError: a height or width that is not a multiple of 8, or an image shape that only the data can tell.
    """
    if image_shape is None:
        image_shape = config.image_shape or DATASETS.get(config.dataset)
    if image_shape is None:
        raise ValueError(f"the image shape of {config.dataset} is not known here; pass image_shape or set IMAGE_SHAPE")
    shape = [size if isinstance(size, (int, np.integer)) else 0 for size in image_shape]
    if len(shape) != 3 or shape[0] % DOWNSAMPLING or shape[1] % DOWNSAMPLING or min(shape) < 1:
        raise ValueError(
            f"image shape {tuple(image_shape)}: expected height, width and channels, the first two multiples of "
            f"{DOWNSAMPLING}"
        )
    image_shape = tuple(map(int, shape))
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision(config))
    try:
        encoder, decoder = build_encoder(config, image_shape), build_decoder(config, image_shape)
        vae = VAE(encoder, decoder, config.objective, config.beta, config.seed, config.kl_warmup_steps, name="vae")
    finally:
        keras.config.set_dtype_policy(policy)
    return vae


def count_parameters(vae):
    """The number of parameters of a VAE's encoder and decoder."""
    return vae.encoder.count_params() + vae.decoder.count_params()
