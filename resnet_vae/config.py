"""The configuration of a run: one frozen object, read from environment variables, flags or Python.

A field is described once, here; `python -m resnet_vae config` prints it. Nothing large is imported: a bad value is
told before TensorFlow or Keras is touched.
"""

import difflib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

PACKAGE = "resnet_vae"  # the prefix under which Keras registers the project's classes
DATASETS = {  # the data sets with a name, and their images' shapes
    "digits": (16, 16, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
    "mnist": (32, 32, 1),
    "fashion_mnist": (32, 32, 1),
}
BACKENDS = ("tensorflow", "jax", "torch")
OBJECTIVES = ("elbo", "published")
PUBLISHED = {  # what PRESET=published sets: the post's recipe
    "resnet_depth": 100,
    "shortcut": "projection",
    "decoder": "published",
    "activation": "sigmoid",
    "initialization": "published",
    "norm_momentum": 0.99,
    "norm_batches": 0,
    "objective": "published",
    "kl_warmup_steps": 0,
    "mean_l2": 0.01,
    "log_var_l2": 0.1,
    "validation": "test",
    "batch_size": 25,
    "epochs": 1000,
    "learning_rate": 0.001,
    "schedule": "plateau",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "adam_beta_2": 0.999,
    "clip_norm": 0.0,
    "patience": 50,
    "precision": "float32",
}
ALIASES = {  # what is no setting, and which one is meant
    "DEPTH": "RESNET_DEPTH",
    "LATENT": "LATENT_DIM",
    "BATCH": "BATCH_SIZE",
    "LR": "LEARNING_RATE",
}
BEFORE = {  # what was done before there was such a setting
    "norm_batches": 0,
    "kl_warmup_steps": 0,
    "deterministic": False,
    "shortcut": "projection",
}
NOT_OF_THE_RUN = {"outdir", "cmdline", "remat", "checkpoint_seconds", "rollbacks"}  # training is the same with others


class UserError(Exception):
    """What a user can put right: its text is the one message to show, no stack trace."""

    exit_code = 2  # of the command line


class ConfigError(UserError, ValueError):
    """Bad configuration; the text names every bad value, a line each."""


DOWNSAMPLING = 8  # an image's side is so many times that of the encoder's smallest feature map
LAYERS = {"bottleneck": 3, "basic": 2}  # weight layers of a block
IMAGENET = {  # the classifiers' depths that are the papers' networks for ImageNet: block, blocks of each stage
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
}
BOTTLENECK_ON_CIFAR = (164, 1001)  # these are 9n + 2 in the papers; 164 is 6n + 2 as well


def cifar_blocks(depth):
    """The classifier for CIFAR of a depth: its kind of block, and the blocks of its three stages; None if none has it.

    Basic blocks where the depth is 6n + 2, else bottleneck blocks where it is 9n + 2.
    """
    if depth >= 8 and depth % 6 == 2 and depth not in BOTTLENECK_ON_CIFAR:
        return "basic", (depth // 6,) * 3
    return ("bottleneck", (depth // 9,) * 3) if depth >= 11 and depth % 9 == 2 else None


def blocks_per_stage(depth, block="bottleneck"):
    """Number of blocks in each of the four stages for a depth as in Table 1 of the post: 28 → (1, 1, 1, 1).

    The depth counts the weight layers on the longest path through encoder and decoder, without a stem's:
    2 × (3 × blocks + 2), with basic blocks 2 × (2 × blocks + 2). The blocks are spread over the stages in the
    proportions of ResNet-50, 3 : 4 : 6 : 3, by largest remainders.

    Raises:
        ValueError: no number of blocks, 4 or more, has this depth.
    """
    layers = 2 * LAYERS[block]
    blocks, rest = divmod(depth - 4, layers)
    if rest or blocks < 4:
        least = 4 * layers + 4
        below = max(least, least + (depth - least) // layers * layers)
        first = ", ".join(str(least + number * layers) for number in range(3))
        told = (
            f"no network has this depth; depths are {first}, … ({layers} × blocks + 4), the nearest are {below} and "
            f"{below + layers}"
        )
        if 0 <= depth <= 3:
            told += f" (the post's notebook wrote {depth} for depth {(28, 40, 70, 100)[depth]})"
        raise ValueError(told)
    shares = [blocks * share / 16 for share in (3, 4, 6, 3)]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(4), key=lambda stage: counts[stage] - shares[stage])
    for stage in by_remainder[: blocks - sum(counts)]:
        counts[stage] += 1
    return tuple(counts)


def _parse_shape(value):
    if isinstance(value, str):
        return [part.strip() for part in value.replace("x", ",").strip("()[] ").split(",")]
    return value


def _check_shape(shape):
    if min(shape) < 1 or shape[0] % DOWNSAMPLING or shape[1] % DOWNSAMPLING:
        raise ValueError(f"height and width must be multiples of {DOWNSAMPLING}, channels at least 1, as 32x32x3")
    return shape


AUGMENTATIONS = ("flip", "shift", "color")


def parse_words(value):
    """A text of words, separated by spaces or commas, as a list; anything else as it is."""
    return value.replace(",", " ").split() if isinstance(value, str) else value


def _parse_augmentations(value):
    return () if value == "none" else parse_words(value)


def _in_order(words):
    """The words as they are applied, each once: in whatever order they are given, they are the same recipe."""
    return tuple(word for word in AUGMENTATIONS if word in words)


Augmentations = Annotated[
    tuple[Literal[AUGMENTATIONS], ...], BeforeValidator(_parse_augmentations), AfterValidator(_in_order)
]
PathText = Annotated[str, BeforeValidator(lambda path: os.fspath(path) if isinstance(path, os.PathLike) else path)]
Shape = Annotated[tuple[int, int, int], BeforeValidator(_parse_shape), AfterValidator(_check_shape)]
Seed = Annotated[int, Field(ge=0, lt=2**31 - 4)]  # the next three are seeds, too
Activation = Literal["relu", "sigmoid", "tanh", "elu", "gelu", "silu", "selu", "softplus", "leaky_relu", "linear"]


def did_you_mean(name, known, spelled=str):
    """The known name that is nearest to one that is none, as the end of a message; nothing if none is near."""
    alias = ALIASES.get(name.upper(), "")
    meant = [each for each in known if each.upper() == alias] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {spelled(meant[0])}?" if meant else ""


def _meant(name, known):
    """Which of the known names a variable of the environment must be meant for, or None: most are other programs'."""
    name = name.upper()
    if ALIASES.get(name) in known:
        return ALIASES[name]
    if len(name) < 4:  # SED is no SEED
        return None
    alike = difflib.get_close_matches(name, known, n=1, cutoff=0.83)
    same_letters = (each for each in known if set(each) == set(name) and abs(len(each) - len(name)) <= 1)
    return alike[0] if alike else next(same_letters, None)


def backend_problem(backend):
    """What is wrong with KERAS_BACKEND, in a line, or nothing; Keras tells it in a stack trace."""
    if backend and backend not in BACKENDS:
        return f"KERAS_BACKEND is {backend!r}; expected one of {', '.join(BACKENDS)}"
    if backend and not find_spec(backend):
        return f"KERAS_BACKEND is {backend!r}, which is not installed; install it, or choose another backend"
    return ""


class Settings(BaseModel):
    """Settings that environment variables, flags or Python give: frozen, and each knows where it came from.

    Raises:
        ConfigError: listing every bad value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    also: ClassVar = ()  # names that a script reads, and that may be mistyped as well
    _origins: dict = PrivateAttr(default_factory=dict)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_explain(error, values, type(self).model_fields)) from None
        except UserError as error:  # of a check of several fields
            raise ConfigError(str(error)) from None
        for name in type(self).model_fields:
            self._origins[name] = "given" if name in values else "default"

    @classmethod
    def from_env(cls, environ=None, **flags):
        """Read the configuration from environment variables, which are the fields' names in capitals.

        Args:
            environ: a mapping, by default os.environ. Empty values count as unset; other names are ignored, unless
                one is so like a field's that it must be meant for it.
            **flags: values that take precedence over the environment's, as the command line's do.

        Raises:
            ConfigError: listing every bad value and every mistyped name.
        """
        environ = os.environ if environ is None else environ
        names = {name.upper(): name for name in cls.model_fields}
        values = {field: environ[name] for name, field in names.items() if environ.get(name, "").strip()}
        problems, known = [], (*names, *cls.also)
        for name in sorted(set(environ) - set(known)):
            meant = _meant(name, known) if environ[name].strip() else None
            if meant:
                problems.append(f"{name} is no setting; did you mean {meant}? If not, unset {name}")
        if problem := backend_problem(environ.get("KERAS_BACKEND", "")):
            problems.append(problem)
        if "cmdline" in values:  # the post's meaning: set at all
            values["cmdline"] = environ["CMDLINE"].strip().lower() not in ("0", "false", "no", "off")
        try:
            config = cls(**{**values, **flags})
        except ConfigError as error:
            problems.insert(0, str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        for name in values:
            config._origins[name] = f"environment ({name.upper()})"
        for name in flags:
            config._origins[name] = "argument"
        return config

    @property
    def origins(self):
        """Where each field's value came from."""
        return dict(self._origins)

    def replace(self, **changes):
        """The same configuration with other values, which then count as given; another preset brings its own along."""
        by_itself = ("default", "preset") if "preset" in changes else ()
        kept = {name: value for name, value in self.model_dump().items() if self._origins[name] not in by_itself}
        config = type(self)(**{**kept, **changes})
        config._origins.update({**{n: self._origins[n] for n in kept}, **dict.fromkeys(changes, "given")})
        return config

    def describe(self):
        """A line a field: its name, its value, where that came from."""
        values = {name: "-" if value in (None, "", ()) else _as_given(name, value) for name, value in self}
        width, label = (max(map(len, texts)) + 2 for texts in (values.values(), values))
        return "\n".join(f"{n.upper():<{label}}{value:<{width}}{self._origins[n]}" for n, value in values.items())


def _as_given(name, value):
    """A setting's value as a variable or a flag may have it."""
    if isinstance(value, tuple):
        return ("x" if name == "image_shape" else " ").join(map(str, value))
    return str(value)


class Config(Settings):
    """Everything that decides a run. `Config()` is the default recipe, `Config.from_env()` the environment's.

    `Config(preset="published", epochs=2)` is the post's recipe with a change; `config.origins` tells for each field
    whether its value is the default, the preset's, or given.

    Raises:
        ConfigError: listing every bad value.
    """

    also: ClassVar = ("DEPTHS", "SWEEP", "RUNNER", "EVALUATE")  # of scripts/run_all.sh

    preset: Literal["default", "published"] = Field(
        "default", description="published: the post's recipe; whatever else is set takes precedence over it"
    )
    dataset: PathText = Field(
        "cifar10",
        min_length=1,
        description=f"{', '.join(DATASETS)}, or the path of a folder of images or of an .npz file",
    )
    image_shape: Shape | None = Field(
        None,
        description="height, width, channels, as 64x64x3; images are resized to it (default: as the data set has them)",
    )
    augment: Augmentations = Field(
        (), description="random changes to training images: none, flip, shift, color, or several, as flip,shift"
    )
    validation: Literal["holdout", "test"] = Field(
        "holdout",
        description="holdout: a tenth of the training images, at most 5000; test: the test images, as in the post",
    )
    block: Literal["bottleneck", "basic"] = Field(
        "bottleneck",
        description="bottleneck: 1x1, 3x3, 1x1 convolutions; basic: two 3x3, with a quarter of the output channels",
    )
    resnet_depth: int = Field(
        28,
        le=10**5,
        description="weight layers of encoder and decoder: 6 × blocks + 4, as 28, 40, 70, 100; basic: 4 × blocks + 4",
    )
    order: Literal["post", "pre"] = Field(
        "post",
        description="post: ReLU after the addition; pre: norm and ReLU before each convolution, a plain one first",
    )
    shortcut: Literal["projection", "pool", "pad", "none"] = Field(
        "pool",
        description="where the shape changes: projection, pool or pad; none: no shortcuts at all, a plain network",
    )
    learned_step: bool = Field(False, description="what a block adds is scaled by a trained number, 1 at first")
    stem: int = Field(0, ge=0, le=64, description="plain 3x3 convolutions before the first block and after the last")
    decoder: Literal["mirrored", "published"] = Field(
        "mirrored",
        description="the decoder's channels: mirrored, 2048 down to 256; published, 256 up to 2048 as in the post",
    )
    width: float = Field(1.0, gt=0, le=4, description="multiplier of the blocks' numbers of filters")
    latent_dim: int = Field(256, ge=1, le=65536, description="number of latents")
    intermediate_dim: int = Field(
        1024, ge=1, le=65536, description="units of the dense layer on either side of the latent"
    )
    activation: Activation = Field("relu", description="activation of these dense layers")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout rate after these dense layers")
    initialization: Literal["identity", "published"] = Field(
        "identity",
        description="identity: identity blocks start as the identity, heads near zero; published: Keras's defaults",
    )
    norm_momentum: float = Field(
        0.95, ge=0, lt=1, description="momentum of batch normalisation's moving averages, which evaluation uses"
    )
    norm_batches: int = Field(
        20,
        ge=0,
        description="training batches that validation's averages are computed from (0: training's moving averages)",
    )
    objective: Literal[OBJECTIVES] = Field(
        "elbo", description="elbo: the bound; published: the post's, whose sampler and KL disagree"
    )
    beta: float = Field(1.0, ge=0, description="weight of the KL; below 1 the loss is no bound, above 1 a looser one")
    kl_warmup_steps: int = Field(
        500,
        ge=0,
        description="steps over which the KL's weight rises to beta, at most half of all; printed losses use beta",
    )
    mean_l2: float = Field(0.0, ge=0, description="L2 penalty of the mean head's kernel and bias")
    log_var_l2: float = Field(0.0, ge=0, description="L2 penalty of the log-variance head's kernel and bias")
    batch_size: int = Field(100, ge=2, description="images per training step")
    epochs: int = Field(100, ge=1, le=10**6, description="passes over the training images, at most")
    learning_rate: float = Field(0.012, gt=0, description="peak learning rate")
    schedule: Literal["cosine", "plateau", "constant"] = Field(
        "cosine",
        description="cosine: to 0 over the epochs; plateau: halved after 25 epochs without a lower loss; constant",
    )
    warmup_steps: int = Field(
        100, ge=0, description="steps of linear warm-up, with SCHEDULE=cosine, at most half of all"
    )
    decay: float = Field(0.0, ge=0, description="time decay: the learning rate is divided by 1 + decay × steps")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay, multiplied by the learning rate")
    adam_beta_2: float = Field(0.99, ge=0, lt=1, description="decay of AdamW's average of squared gradients")
    clip_norm: float = Field(200.0, ge=0, description="largest norm of all gradients together (0: no limit)")
    patience: int = Field(0, ge=0, description="stop after this many epochs without progress (0: never)")
    min_delta: float = Field(0.1, ge=0, description="fall of the validation loss, in nats, that counts as progress")
    precision: Literal["auto", "float32", "mixed_bfloat16"] = Field(
        "auto",
        description="auto: mixed_bfloat16 where the device is faster in it, else float32; the loss stays float32",
    )
    remat: bool = Field(
        False, description="recompute the inside of repeated blocks for the gradient: less memory, slower steps"
    )
    deterministic: bool = Field(
        True,
        description="bit-identical on one machine (TensorFlow; JAX on CPUs), interrupted or not, but for rollbacks",
    )
    rollbacks: int = Field(
        0,
        ge=0,
        description="how often a run that diverges may go back to its last good checkpoint, then on at half the rate",
    )
    seed: Seed = Field(0, description="of the weights, the order of images, the noise and the held-out images")
    checkpoint_seconds: float = Field(
        30.0, ge=0, description="least time between checkpoints; never less than 100 times the time of writing one"
    )
    outdir: PathText = Field("", description="the run's folder (default: runs/DATASET-depth-DEPTH)")
    cmdline: bool = Field(False, description="plain output, one line per epoch, without progress bars and widgets")

    def __init__(self, **values):
        super().__init__(**values)
        preset = PUBLISHED if self.preset == "published" else {}
        self._origins.update({name: "preset" for name in preset if name not in values})

    @field_validator("resnet_depth")
    @classmethod
    def _check_depth(cls, depth, info):
        if "block" in info.data:  # and not a bad one, of which there is a line already
            blocks_per_stage(depth, info.data["block"])
        return depth

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values):
        return {**PUBLISHED, **values} if values.get("preset") == "published" else values

    @classmethod
    def from_record(cls, record):
        """The configuration as a run's config.json holds it, checked like any other.

        Raises:
            ConfigError: a bad value, or no configuration at all.
        """
        try:
            config = cls(**{**BEFORE, **record["values"]})
            config._origins.update({name: str(origin) for name, origin in record["origins"].items()})
        except (TypeError, KeyError, AttributeError):
            raise ConfigError("the recorded configuration lacks values or origins") from None
        return config

    @property
    def data_name(self):
        """The data set's name: one of DATASETS, or the last part of its path."""
        return Path(os.path.abspath(os.path.expanduser(self.dataset))).name

    @property
    def folder(self):
        """The run's folder."""
        data = self.data_name.removesuffix(".npz")
        return Path(os.path.expanduser(self.outdir or f"runs/{data}-depth-{self.resnet_depth}"))

    @property
    def loss_meaning(self):
        """What the loss is: "negative ELBO", which bounds the likelihood, or how it is another bound or none."""
        departures = ["the post's objective"] if self.objective == "published" else []
        if self.beta != 1:
            departures.append(f"beta {self.beta:g}")
        looser = self.objective == "elbo" and self.beta > 1  # as the KL is not negative
        return f"{', '.join(departures)}: {'a looser' if looser else 'no'} bound" if departures else "negative ELBO"

    def recipe(self):
        """The fields that decide what is trained, as plain values: two runs with equal recipes are the same run.

        The image shape is None where only the data tell: of a path, without IMAGE_SHAPE.
        """
        recipe = self.model_dump(mode="json", exclude=NOT_OF_THE_RUN)
        if self.image_shape is None and self.dataset in DATASETS:
            recipe["image_shape"] = list(DATASETS[self.dataset])
        return recipe


def _explain(error, given, known):
    """Put pydantic's findings into a line a field: its name, its value, what was expected."""
    lines = {}
    for finding in error.errors():
        name = str(finding["loc"][0])
        if finding["type"] == "extra_forbidden":
            lines[name] = f"{name} is no setting{did_you_mean(name, known)}"
            continue
        expected = finding["msg"].removeprefix("Value error, ")
        if name == "image_shape" and finding["type"] != "value_error":  # a part of it, or its length
            expected = "expected height, width and channels, as 32x32x3"
        lines[name] = f"{name} is {given.get(name)!r}: {expected[0].lower()}{expected[1:]}"
    return "\n".join(lines.values())
