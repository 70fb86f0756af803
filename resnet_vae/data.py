"""Images to train on: named data sets, folders of images and .npz archives, as uint8 arrays in memory."""

import hashlib
import math
import os
import warnings
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_vae.config import DATASETS, DOWNSAMPLING, UserError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names by number of channels
GREYS = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I", "F")  # Pillow's modes without colour
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")  # no others: for some, Pillow runs another program
ARCHIVES = {  # what Keras looks for below its datasets folder, and where that is to be had
    "cifar10": ("cifar-10-batches-py-target_archive", "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python-target_archive", "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"),
    "mnist": ("mnist.npz", "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"),
    "fashion_mnist": (
        "fashion-mnist/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
    ),
}
UNUSED_PARTS = ("val", "valid", "validation", "testing")  # folders whose images are not for training, by their names
HELD_OUT = 5000  # at most so many validation images


class DataError(UserError, ValueError):
    """Data that cannot be read or used; the text names the file or value and what was expected."""


@dataclass(frozen=True, eq=False)  # arrays have no one truth value
class Data:
    """A data set split for training: uint8 arrays of grey levels, (images, height, width, channels).

    `validation` is a part of the original training images, or the test images themselves, by config.validation.
    `fingerprint` is a SHA-256 over all the images before the split. `labels` are three arrays of class numbers,
    (images,), for train, validation and test, or None where there are none that can be used; `no_labels` then says why.
    `classes` are the classes' names. `seed` is what chose the images that are set apart, None where none are.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    fingerprint: str
    labels: tuple | None = None
    classes: tuple = ()
    no_labels: str = ""
    seed: int | None = None

    @property
    def image_shape(self):
        """(height, width, channels)."""
        return self.train.shape[1:]


@dataclass
class _Part:
    """The training or the test images as they are read: uint8 images, and what is given for their labels, or None."""

    images: np.ndarray
    labels: np.ndarray | None = None


@dataclass
class _Set:
    """A data set as it is read, brought to the image shape; without test images of its own, test is None."""

    train: _Part
    test: _Part | None
    fingerprint: str
    classes: tuple
    no_labels: str


def load_data(config):
    """Load the data set that a configuration names.

    Args:
        config: a `Config`; of it dataset, image_shape, validation and seed.

    Returns:
        A `Data`. Without a test set of its own, a tenth of the images, chosen by seed, are the test images.

    Raises:
        DataError: the data cannot be had, read, or brought to the image shape. Labels that cannot be used are none:
            a VAE does not need them; see `labelled`.
    """
    return _divided(_read(config), config)


def load_test_images(config, trained_on):
    """Load the test images of the data set that a configuration names, to evaluate on.

    Args:
        config: as of `load_data`.
        trained_on: `Config.dataset` and the fingerprint of the data that the network was trained on. Of other data
            without test images of their own these are all images.

    Returns:
        The data set's name, uint8 images (images, height, width, channels), and the set's fingerprint.

    Raises:
        DataError: as of `load_data`; or data without test images of their own that have changed since the training.
    """
    found, (dataset, fingerprint) = _read(config), trained_on
    whole = found.test is None and found.fingerprint != fingerprint
    if whole and len({os.path.realpath(os.path.expanduser(path)) for path in (config.dataset, dataset)}) == 1:
        raise DataError(
            f"{config.dataset} has changed since it was trained on, so that its test images are not known; expected "
            "the images of then, or other data"
        )
    images = found.train.images if whole else _divided(found, config).test
    return config.data_name, images, found.fingerprint


def _read(config):
    """The `_Set` that a configuration names; see `load_data`."""
    check_dataset(config.dataset)
    name, shape = config.dataset, config.image_shape
    if name == "digits":
        train, test = _digits()
    elif name in DATASETS:
        train, test = _keras_dataset(name)
    else:
        path = Path(os.path.expanduser(name))
        train, test = _folder(path, shape) if path.is_dir() else _npz(path)
    parts = [part for part in (train, test) if part is not None]
    classes, no_labels = _number_labels(name, parts)
    if shape:
        _check_room(name, sum(len(part.images) for part in parts), shape)
        for part in parts:
            part.images = _resize(part.images, shape)
    _check(name, train.images, "training")
    return _Set(train, test, _fingerprint(parts), classes, no_labels)


def _divided(found, config):
    """The `Data` of a set, with what has to be set apart set apart."""
    name, train, test = config.dataset, found.train, found.test
    if test is None:
        train, test = _hold_out(name, train, len(train.images) // 10, config.seed)
    _check(name, test.images, "test")
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{name}: training images are {train.images.shape[1:]} and test images {test.images.shape[1:]}; set "
            "IMAGE_SHAPE"
        )
    validation = test
    if config.validation == "holdout":
        train, validation = _hold_out(name, train, min(HELD_OUT, len(train.images) // 10), config.seed)
    parts = (train, validation, test)
    labels = None if found.no_labels else tuple(part.labels for part in parts)
    return Data(
        config.data_name,
        *(part.images for part in parts),
        found.fingerprint,
        labels,
        found.classes,
        found.no_labels,
        None if train is found.train else config.seed,
    )


def _fingerprint(parts):
    digest = hashlib.sha256(repr(tuple(part.images.shape for part in parts)).encode())
    for part in parts:
        digest.update(np.ascontiguousarray(part.images).data)
    return digest.hexdigest()


def check_dataset(dataset, setting="DATASET"):
    """Refuse what is neither the name of a data set nor a path that may hold one; nothing is read.

    Raises:
        DataError: it is neither; the text names the setting.
    """
    path = Path(os.path.expanduser(dataset))  # that of pathlib raises where there is no such user
    if not (dataset in DATASETS or path.is_dir() or (path.suffix.lower() == ".npz" and path.is_file())):
        raise DataError(
            f"{setting} is {dataset!r}: neither one of {', '.join(DATASETS)}, nor a folder of images, nor an .npz file"
        )


def check_data_of(config, data):
    """Refuse data that are not what `load_data` loads for a configuration, as far as they tell.

    Raises:
        DataError: images that are not uint8 arrays of one shape, one or more of each part; no fingerprint; another
            name, image shape, or choice of validation or test images.
    """
    for role in ("train", "validation", "test"):
        images = getattr(data, role)
        shape, dtype = getattr(images, "shape", ()), getattr(images, "dtype", type(images).__name__)
        if dtype != "uint8" or len(shape) != 4 or not shape[0] or shape[1:] != data.train.shape[1:]:
            raise DataError(
                f"these data's {role} images are {dtype} of shape {tuple(shape)}; expected uint8 arrays (images, "
                "height, width, channels), one image or more, all of one shape"
            )
    if not isinstance(data.fingerprint, str):
        raise DataError(f"these data's fingerprint is {data.fingerprint!r}; expected a text that is theirs alone")
    given = (data.name, data.image_shape, "test" if data.validation is data.test else "holdout", data.seed)
    shape = config.recipe()["image_shape"] or data.image_shape
    asked = (
        config.data_name,
        tuple(shape),
        config.validation,
        data.seed if data.seed is None else config.seed,
    )
    if given != asked:
        told = [", ".join(map(str, each)) for each in (given, asked)]
        raise DataError(
            f"these data are not the configuration's: name, image shape, validation and the seed of what is set apart "
            f"are {told[0]}; expected {told[1]}, as load_data(config) gives them"
        )


def labelled(data):
    """The data itself, if it has labels.

    Raises:
        DataError: it has none, or none that can be used; the text says why.
    """
    if data.labels is None:
        raise DataError(data.no_labels)
    return data


def entropy_floor(images):
    """Bernoulli entropy of uint8 images, nats per image: the least that the reconstruction loss can be on them.

    It is what a perfect reconstruction scores, since grey levels lie between 0 and 1.
    """
    level = np.arange(1, 255) / 255
    entropy = np.zeros(256)
    entropy[1:255] = -level * np.log(level) - (1 - level) * np.log1p(-level)
    step = max(1, 2**20 // max(1, math.prod(images.shape[1:])))  # images at a time: counting copies them to int64
    parts = (images[start : start + step] for start in range(0, len(images), step))
    return float(sum(np.bincount(part.ravel(), minlength=256) for part in parts) @ entropy / len(images))


SHIFT = 4  # pixels, at most, in each direction
COLOR = 0.2  # at most so much more or less of brightness and contrast, and of each channel


def augment(images, words, rng):
    """Change images at random, each in its own way, as a photograph of the same thing could differ.

    Args:
        images: uint8, or floats in [0, 1], (images, height, width, channels).
        words: of "flip" (left and right, one image in two), "shift" (up to 4 pixels, black at the border) and "color"
            (brightness, contrast and each channel, up to a fifth more or less).
        rng: a NumPy Generator, which alone decides.

    Returns:
        A new array of the same shape and dtype, or `images` itself without any words.
    """
    count, height, width, channels = images.shape
    if "flip" in words:
        chosen = rng.random(count) < 0.5
        images, flipped = images.copy(), images[chosen]
        for channel in range(channels):  # NumPy takes ten times as long over all channels at once
            flipped[..., channel] = flipped[:, :, ::-1, channel].copy()
        images[chosen] = flipped
    if "shift" in words:
        border = (SHIFT, SHIFT)
        padded = np.pad(images, ((0, 0), border, border, (0, 0)))
        rows, columns = rng.integers(0, 2 * SHIFT + 1, (2, count))
        rows, columns = rows[:, None] + np.arange(height), columns[:, None] + np.arange(width)
        images = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if "color" in words:
        brightness, contrast = rng.uniform(1 - COLOR, 1 + COLOR, (2, count, 1, 1, 1)).astype("float32")
        balance = rng.uniform(1 - COLOR, 1 + COLOR, (count, 1, 1, channels)).astype("float32")
        means = images.mean((1, 2, 3), keepdims=True, dtype="float32")
        changed = ((images - means) * contrast + means * brightness) * balance
        whole = images.dtype == "uint8"
        images = np.clip(np.round(changed) if whole else changed, 0, 255 if whole else 1).astype(images.dtype)
    return images


def _hold_out(name, part, count, seed):
    """Part `count` images, chosen by seed, from the others: two views of the arrays, whose order is changed."""
    if count < 1:
        told = f"{name}: {len(part.images)} images are too few to hold some out"
        raise DataError(f"{told}; at least 10 are needed, 11 where test images are held out as well")
    keep = len(part.images) - count
    chosen = np.sort(np.random.default_rng(seed).permutation(len(part.images))[:count])
    early, late = chosen[chosen < keep], np.setdiff1d(np.arange(keep, len(part.images)), chosen)
    arrays = [part.images] if part.labels is None else [part.images, part.labels]
    for array in arrays:
        array[early], array[late] = array[late], array[early]
    return _Part(*(array[:keep] for array in arrays)), _Part(*(array[keep:] for array in arrays))


def _check(name, images, role):
    """Refuse what the network cannot take, with the image shape to ask for instead."""
    if not len(images):
        raise DataError(f"{name}: no {role} images")
    height, width, channels = images.shape[1:]
    if height % DOWNSAMPLING or width % DOWNSAMPLING:
        nearest = "x".join(str(max(1, round(side / DOWNSAMPLING)) * DOWNSAMPLING) for side in (height, width))
        raise DataError(
            f"{name}: {role} images are {height}x{width}x{channels}; height and width must be multiples of "
            f"{DOWNSAMPLING}: set IMAGE_SHAPE, for example {nearest}x{channels}"
        )


def _resize(images, shape):
    """Bring uint8 images to (height, width, channels): bicubic, grey to colour and back as Pillow does."""
    if images.shape[1:] == tuple(shape):
        return images
    from PIL import Image

    height, width, channels = shape
    given = images.shape[-1]
    if given != channels and {given, channels} - set(MODES):
        told = f"images of {given} channels cannot be brought to IMAGE_SHAPE's {channels}"
        raise DataError(f"{told}; set IMAGE_SHAPE={height}x{width}x{given}")
    resized = np.empty((len(images), *shape), "uint8")
    for image, target in zip(images, resized, strict=True):
        if given != channels:
            picture = Image.fromarray(image[..., 0] if given == 1 else image)
            image = np.asarray(picture.convert(MODES[channels])).reshape(*image.shape[:2], channels)
        for channel in range(channels):
            plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
            target[..., channel] = plane.resize((width, height), Image.Resampling.BICUBIC)
    return resized


def _digits():
    """scikit-learn's 1,797 handwritten digits, 8×8 enlarged to 16×16; every fifth is a test image."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images[..., None] * (255 / 16)).astype("uint8")
    images, labels = _resize(images, DATASETS["digits"]), digits.target
    test = np.arange(len(images)) % 5 == 4
    return _Part(images[~test], labels[~test]), _Part(images[test], labels[test])


def keras_home():
    """The folder below which Keras keeps what it downloads."""
    home = Path(os.path.expanduser(os.environ.get("KERAS_HOME", "~/.keras")))
    writable = os.access(next(path for path in (home, *home.parents) if os.path.exists(path)), os.W_OK)
    return home if writable else Path("/tmp/.keras")


def _keras_dataset(name):
    """One of Keras's data sets, downloaded once; a lock keeps parallel runs from downloading into each other."""
    import keras
    from filelock import FileLock

    home = keras_home() / "datasets"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{name}.lock"):
            (train, train_labels), (test, test_labels) = getattr(keras.datasets, name).load_data()
    except Exception as error:
        file, origin = ARCHIVES[name]
        raise DataError(
            f"{name} cannot be loaded ({' '.join(str(error).split())[:200]}). Without a network, download {origin} "
            f"elsewhere and save it as {home / file}; or set DATASET=digits, which needs no download, or to a path"
        ) from None
    if train.ndim == 3:  # MNIST's 28×28, with a border to 32×32
        border = ((0, 0), (2, 2), (2, 2))
        train, test = np.pad(train, border)[..., None], np.pad(test, border)[..., None]
    return _Part(train, train_labels), _Part(test, test_labels)


def _number_labels(name, parts):
    """Bring the labels of both parts to class numbers 0, 1, 2, …, or take them away.

    Returns:
        The classes' names, and why there are no labels, or "".
    """
    try:
        numbers, classes = _class_numbers(name, parts)
    except DataError as error:
        for part in parts:
            part.labels = None
        return (), str(error)
    for part, labels in zip(parts, numbers, strict=True):
        part.labels = labels
    return classes, ""


def _class_numbers(name, parts):
    given = []
    for part in parts:
        if part.labels is None:
            raise DataError(f"{name} has no labels; expected folders by class, or y_train (and y_test) in an .npz")
        labels = np.asarray(part.labels)
        labels = labels.ravel() if labels.shape == (len(part.images), 1) else labels
        if labels.dtype == object:
            raise DataError(f"{name}: labels are Python objects, which are not read; save labels.astype(str)")
        if labels.shape != (len(part.images),) or labels.dtype.kind not in "uiU":
            raise DataError(
                f"{name}: labels are {labels.dtype} of shape {labels.shape}; expected a whole number or a text for "
                f"each of {len(part.images)} images"
            )
        given.append(labels if labels.dtype.kind == "U" else labels.astype("int64"))  # -1 is no unsigned number
    first = given[0]
    if len({labels.dtype.kind for labels in given}) > 1:
        raise DataError(f"{name}: training labels are {first.dtype}, test labels {given[-1].dtype}; expected one kind")
    if first.dtype.kind == "U":  # names
        classes, strange = tuple(np.unique(first).tolist()), sorted(set(given[-1]) - set(first))
        if strange:
            raise DataError(f"{name}: class {str(strange[0])!r} has test images and no training images")
        return [np.searchsorted(classes, labels) for labels in given], classes
    count = int(first.max(initial=-1)) + 1
    low, high = int(np.concatenate(given).min(initial=0)), int(np.concatenate(given).max(initial=-1))
    if low < 0 or high >= count:
        raise DataError(f"{name}: labels run from {low} to {high}, training labels to {count - 1}; expected 0, 1, 2, …")
    missing = count - len(np.unique(first))
    if missing:
        raise DataError(f"{name}: training labels run to {count - 1}, but {missing} of these classes have no images")
    return given, tuple(map(str, range(count)))


ARRAYS = {  # usual names in an .npz file
    "train": ("x_train", "xtr", "train", "train_images", "images", "x", "arr_0"),
    "test": ("x_test", "xte", "test", "test_images"),
    "train labels": ("y_train", "ytr", "train_labels", "labels", "y"),
    "test labels": ("y_test", "yte", "test_labels"),
}


def _npz(path):
    """Arrays of images by the usual names, and no others; float arrays hold values in [0, 1]."""
    names_of_any = [name for usual in ARRAYS.values() for name in usual]
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
            _check_memory("its arrays", size, "save fewer or smaller ones")
            others = [Path(member).stem for member in archive.namelist() if _axes(archive, member) > 2]
            others = [name for name in others if name not in names_of_any]
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            known = {role: [name for name in usual if name in names] for role, usual in ARRAYS.items()}
            found = {role: _array(arrays, those[0], role) for role, those in known.items() if those}
    except Exception as error:  # zipfile, zlib and NumPy each raise their own on a broken file
        raise DataError(f"{path} cannot be read as an .npz of arrays: {error}") from None
    for role, those in known.items():
        if len(those) > 1:
            what = role if "labels" in role else f"{role} images"
            raise DataError(f"{path} has arrays {' and '.join(those)}; expected one of them: each may be the {what}")
    if "train" not in found:
        raise DataError(f"{path} has arrays {', '.join(names) or '(none)'}; expected x_train (and x_test), or images")
    if others:
        raise DataError(
            f"{path} has arrays {', '.join(others)}, which may be images; expected x_train (and x_test), or images, "
            "and no others: rename them or leave them out"
        )
    return tuple(
        _Part(_levels(path, found[role]), found.get(f"{role} labels")) if role in found else None
        for role in ("train", "test")
    )


def _axes(archive, member):
    """The number of an array's axes, by its header alone; 0 of another file."""
    if not member.endswith(".npy"):
        return 0
    with archive.open(member) as file:
        old = np.lib.format.read_magic(file) == (1, 0)
        shape, *_ = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(file)
    return len(shape)


def _array(arrays, name, role):
    """An array of an .npz; labels that are Python objects, which are not read, as an array without any."""
    try:
        return arrays[name]
    except ValueError as error:
        if "labels" in role and "Object arrays" in str(error):
            return np.empty(0, object)
        raise


def _memory():
    """Bytes of memory that the machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # no POSIX
        return math.inf


def _check_memory(what, size, instead):
    """Refuse what would not fit into memory, before it is read or made."""
    if size > _memory():
        raise DataError(f"{what} need {size / 1e9:.0f} GB, which is more than this machine's memory; {instead}")


def _check_room(name, count, shape):
    what = f"{name}: {count} images of {'x'.join(map(str, shape))}"
    _check_memory(what, count * math.prod(shape), "set a smaller IMAGE_SHAPE")


def _levels(path, images):
    """Check an array of images and bring it to uint8 (images, height, width, channels)."""
    images = np.asarray(images)
    if images.ndim == 3:
        if 1 <= images.shape[2] <= 4:
            raise DataError(
                f"{path}: an array of shape {images.shape} is one image (height, width, channels) or grey images of "
                f"width {images.shape[2]}; expected (images, height, width, channels): save array[None] for the one, "
                "array[..., None] for the others"
            )
        images = images[..., None]
    if images.ndim != 4 or images.dtype.kind not in "buif" or 0 in images.shape[1:]:
        raise DataError(
            f"{path}: an array is {images.dtype} of shape {images.shape}; expected numbers (images, height, width) or "
            "(images, height, width, channels), each side at least 1"
        )
    if images.shape[1] <= 4 < images.shape[3]:
        raise DataError(
            f"{path}: an array of shape {images.shape} looks like (images, channels, height, width); expected the "
            "channels last: save array.transpose(0, 2, 3, 1)"
        )
    if not images.size:
        return images.astype("uint8")
    low, high = float(images.min()), float(images.max())
    if high == 1 and images.dtype.kind in "ui":
        raise DataError(
            f"{path}: {images.dtype} images run from {low:g} to 1, and whole numbers are grey levels from 0 to 255; "
            "expected floats or truth values for black and white: save array.astype(bool)"
        )
    if images.dtype == "uint8":
        return images
    limit = 255 if images.dtype.kind in "ui" else 1
    if not (low >= 0 and high <= limit):  # also when not finite
        raise DataError(
            f"{path}: {images.dtype} images run from {low:.9g} to {high:.9g}; expected 0 to {limit} "
            "(floats lie in [0, 1], whole numbers in 0 to 255)"
        )
    levels = np.empty(images.shape, "uint8")
    for start in range(0, len(images), 1000):  # in parts: no second copy in the array's own type
        part = slice(start, start + 1000)
        levels[part] = np.round(images[part] * (255 if limit == 1 else 1))
    return levels


def _folder(path, shape):
    """Images below train/ and test/ (in folders by class or not), or all images below the folder."""
    parts = _parts(path)
    files = [_image_files(part) for part in parts]
    for part, group in zip(parts, files, strict=True):
        if not group:
            raise DataError(f"{part}: no images; expected files ending in {' '.join(sorted(SUFFIXES))}")
    if shape and shape[2] not in MODES:
        raise DataError(f"IMAGE_SHAPE has {shape[2]} channels; image files have 1, 3 or 4")
    exact = not shape
    if exact:
        colour = any(_has_colour(file) for group in files for file in group)
        shape = _read_image(files[0][0], 3 if colour else 1).shape
    _check_room(path, sum(map(len, files)), shape)
    read = []
    for part, group in zip(parts, files, strict=True):
        images = np.empty((len(group), *shape), "uint8")
        for target, file in zip(images, group, strict=True):
            target[:] = _read_image(file, shape[2], shape[:2], exact)
        classes = [file.relative_to(part).parts[0] for file in group if file.parent != part]
        read.append(_Part(images, np.array(classes) if len(classes) == len(group) else None))
    return read[0], read[1] if len(read) == 2 else None


def _refuse(error):
    """Tell of a folder that cannot be opened."""
    raise DataError(f"{error.filename} cannot be read: {error.strerror}")


def _image_files(folder, below=True):
    """The image files in a folder, by default also those below it, sorted, without what is hidden."""
    files = []
    for place, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        place = Path(place)
        folders[:] = [name for name in folders if below and not name.startswith(".")]
        for link in (place / name for name in folders if (place / name).is_symlink()):
            if link.resolve() in (step.resolve() for step in (place, *place.parents, *place.resolve().parents)):
                raise DataError(f"{link} is a link to a folder that it is in; remove it")
        files += [place / name for name in names if not name.startswith(".")]
    for file in files:  # or a folder's name
        if file.is_symlink() and not file.exists():
            raise DataError(f"{file} is a link to nothing; remove it, or mount what it leads to")
    return sorted(file for file in files if file.suffix.lower() in SUFFIXES and file.is_file())


def _parts(path):
    """The folders train and test, in any case, or the folder itself; refuse what would mix them or lose images."""
    folders = sorted(each for each in path.glob("*") if each.is_dir() and not each.name.startswith("."))
    train, test = ([folder for folder in folders if folder.name.lower() == name] for name in ("train", "test"))
    others = [folder for folder in folders if folder not in train + test]
    parted = train or test
    unused = [folder for folder in others if folder.name.lower() in UNUSED_PARTS or (parted and _image_files(folder))]
    loose = _image_files(path, below=False) if parted else []
    if len(train) > 1 or len(test) > len(train) or unused or loose:
        found = ", ".join(entry.name for entry in [*train, *test, *unused, *loose[:1]])
        raise DataError(
            f"{path} has {found}; expected train/<class>/* and test/<class>/* and no other images (training images "
            "give those for validation), or just images in folders of other names: rename or move what differs"
        )
    return train + test or [path]


@contextmanager
def _opened(file):
    """An image file, opened with Pillow; whatever is wrong with it is a DataError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on a broken file
        raise DataError(f"{file} cannot be read as an image: {error}") from None


def _has_colour(file):
    with _opened(file) as image:
        return image.mode not in GREYS


def _read_image(file, channels, size=None, exact=False):
    """Read an image file upright as uint8 (height, width, channels), cut at the middle and resized to the size."""
    from PIL import Image, ImageOps

    with _opened(file) as image:
        image.load()
        with suppress(Exception):  # metadata that cannot be read says nothing
            ImageOps.exif_transpose(image, in_place=True)
        image = _eight_bits(file, image).convert(MODES[channels])
    if size and (image.height, image.width) != size:
        if exact:
            raise DataError(
                f"{file} is {image.height}x{image.width}, others are {size[0]}x{size[1]}; set IMAGE_SHAPE (height x "
                "width x channels) to bring all images to one size"
            )
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, channels)


def _eight_bits(file, image):
    """A Pillow image of 8 bits a channel: of more than these the upper 8, which Pillow's `convert` does not take."""
    from PIL import Image

    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # the same colours; straight to RGB, Pillow warns
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        bits = image.tag_v2[258][0] if image.format == "TIFF" else 16  # BitsPerSample: 12 is possible
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype("uint8"))
    if image.mode in ("I", "F"):
        raise DataError(
            f"{file} has pixels of Pillow's mode {image.mode}, whose range is not known; expected 8 or 16 bits a "
            "channel: convert it, or give all images as floats in [0, 1] in an .npz"
        )
    return image
