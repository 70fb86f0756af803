import importlib
import io
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import once
from PIL import Image
from sklearn.datasets import load_digits

from resnet_vae import Config, load_data
from resnet_vae.data import HELD_OUT, DataError, augment, entropy_floor, keras_home, labelled

pytestmark = once("no backend is asked for data")
RNG = np.random.default_rng(0)


def pictures(count, *shape):
    return RNG.integers(0, 256, (count, *shape), "uint8")


def load(path, **settings):
    return load_data(Config(dataset=str(path), **settings))


def write_folder(folder, images, suffix="png"):
    for number, image in enumerate(images):
        path = folder / f"class{number % 2}" / f"{number:03}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path)


def test_digits_are_digits_and_split_without_overlap_or_copy():
    data = load("digits")
    assert (len(data.train), len(data.validation), len(data.test)) == (1295, 143, 359)
    assert data.image_shape == (16, 16, 1)
    assert {part.dtype.name for part in (data.train, data.validation, data.test)} == {"uint8"}
    assert data.train.base is data.validation.base is not None
    both = np.concatenate([data.train, data.validation])
    whole = load("digits", validation="test")
    assert np.array_equal(whole.validation, whole.test)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in whole.train)
    assert data.fingerprint == whole.fingerprint == load("digits", seed=1).fingerprint
    assert not np.array_equal(data.validation, load("digits", seed=1).validation)
    assert np.array_equal(data.validation, load("digits").validation)
    theirs = load_digits().images  # of levels 0 to 16
    assert np.concatenate([whole.train, whole.test]).mean() == pytest.approx(theirs.mean() * 255 / 16, rel=0.03)


def test_so_many_images_are_held_out_at_most(monkeypatch):
    assert HELD_OUT == 5000
    monkeypatch.setattr("resnet_vae.data.HELD_OUT", 100)
    data = load("digits")
    assert (len(data.train), len(data.validation)) == (1338, 100)


def test_augmentation_is_a_function_of_its_generator_and_keeps_what_it_should():
    images = pictures(64, 16, 8, 3)
    images[:, :, 0] = 255  # the left column tells a flipped image
    before = images.copy()
    assert augment(images, (), RNG) is images
    flipped = augment(images, ("flip",), np.random.default_rng(1))
    turned = (flipped[:, :, -1] == 255).all((1, 2))
    assert 16 < turned.sum() < 48
    np.testing.assert_array_equal(flipped[turned], images[turned][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~turned], images[~turned])
    shifted = augment(images, ("shift",), np.random.default_rng(1))
    places = []
    for image, moved in zip(images, shifted, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        found = [(i, j) for i in range(9) for j in range(9) if np.array_equal(padded[i : i + 16, j : j + 8], moved)]
        places += found[:1]
    assert len(places) == 64
    assert len({i for i, _ in places}) == len({j for _, j in places}) == 9
    colored = augment(images, ("color",), np.random.default_rng(1)).astype(float)
    floats = augment((images / 255).astype("float32"), ("color",), np.random.default_rng(1))
    assert floats.dtype == "float32"
    np.testing.assert_allclose(floats * 255, colored, atol=0.501)  # which is rounded
    ratio = colored.mean((1, 2, 3)) / images.mean((1, 2, 3))
    assert 0.6 < ratio.min() < 0.95 < 1.05 < ratio.max() < 1.45
    dull = RNG.integers(100, 150, (256, 16, 8, 1)).astype("uint8")  # nothing is cut off
    spread = augment(dull, ("color",), np.random.default_rng(1)).std((1, 2, 3)) / dull.std((1, 2, 3))
    assert spread.min() < 0.75 < 1.25 < spread.max()  # by contrast and balance; by one of them a fifth at most
    white = augment(np.full((64, 8, 8, 3), 255, "uint8"), ("color",), np.random.default_rng(1))
    assert white.min() > 0.6 * 255  # brighter than white is white
    assert (white == white[:, :1, :1]).all()
    assert (white[:, 0, 0, 0] != white[:, 0, 0, 1]).any()  # each channel by itself
    every = ("flip", "shift", "color")
    first, again, other = (augment(images, every, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == "uint8"
    np.testing.assert_array_equal(first, again)
    assert (first != other).any((1, 2, 3)).all()
    np.testing.assert_array_equal(images, before)


def test_labels_go_with_their_images(tmp_path):
    """Through the splits of all kinds of data sets: the label of an image is what it was."""
    digits = load("digits")
    whole = load("digits", validation="test")
    known = {image.tobytes(): label for image, label in zip(whole.train, whole.labels[0], strict=True)}
    for images, labels in ((digits.train, digits.labels[0]), (digits.validation, digits.labels[1])):
        assert [known[image.tobytes()] for image in images] == labels.tolist()
    assert digits.classes == tuple("0123456789")
    assert [len(labels) for labels in digits.labels] == [1295, 143, 359]
    images = pictures(40, 8, 8, 1)
    images[:, 0, 0, 0] = np.arange(40) % 2
    np.savez(tmp_path / "a.npz", images=images, y=np.arange(40)[:, None] % 2)
    write_folder(tmp_path / "set", images)
    for path, classes in ((tmp_path / "a.npz", ("0", "1")), (tmp_path / "set", ("class0", "class1"))):
        data = labelled(load(path))
        assert data.classes == classes
        for part, labels in zip((data.train, data.validation, data.test), data.labels, strict=True):
            assert part[:, 0, 0, 0].tolist() == labels.tolist()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint64", "int64"])
def test_labels_are_whole_numbers_of_any_kind(tmp_path, monkeypatch, dtype):
    """Keras's CIFAR-10 has uint8."""
    images, labels = pictures(20, 8, 8, 3), (np.arange(20) % 3).astype(dtype)
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels)
    data = labelled(load(tmp_path / "a.npz"))
    assert data.classes == ("0", "1", "2")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    parts = tuple((part, numbers[:, None]) for part, numbers in ((images, labels), (images[:7], labels[::-1][:7])))
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: parts)
    data = labelled(load("cifar10", validation="test"))
    np.testing.assert_array_equal(data.labels[0], labels)
    np.testing.assert_array_equal(data.labels[2], labels[::-1][:7])


def test_a_folder_that_may_not_be_opened_is_told(tmp_path, monkeypatch):
    """The images in it would be left out."""
    for folder in ("", ".hidden"):
        write_folder(tmp_path / folder, pictures(20, 8, 8))
    opened, closed = os.scandir, ".hidden"

    def scandir(path):
        if Path(path).name == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert len(load(tmp_path, validation="test").train) == 18
    closed = "class1"
    with pytest.raises(DataError, match="class1 cannot be read: Permission denied"):
        load(tmp_path)


def test_truth_values_are_black_and_white_and_suffixes_may_be_capitals(tmp_path):
    with open(tmp_path / "A.NPZ", "wb") as file:
        np.savez(file, images=np.eye(8, dtype=bool)[None].repeat(20, 0))
    np.testing.assert_array_equal(load(tmp_path / "A.NPZ").train[0, ..., 0], 255 * np.eye(8))


def test_arrays_of_which_either_could_be_meant(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=pictures(20, 8, 8), images=pictures(30, 8, 8))
    with pytest.raises(DataError, match="arrays x_train and images; expected one of them: each may be"):
        load(tmp_path / "a.npz")


def test_the_fingerprint_is_of_all_images_whatever_the_seed(tmp_path):
    np.savez(tmp_path / "a.npz", images=pictures(30, 8, 8))
    first, second = (load(tmp_path / "a.npz", seed=seed) for seed in (0, 1))
    assert (first.test != second.test).any()
    assert first.fingerprint == second.fingerprint
    np.savez(tmp_path / "b.npz", images=np.zeros((30, 8, 16), "uint8"))
    np.savez(tmp_path / "c.npz", images=np.zeros((30, 16, 8), "uint8"))
    assert load(tmp_path / "b.npz").fingerprint != load(tmp_path / "c.npz").fingerprint


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (None, "has no labels"),
        ({"y_train": np.arange(19)}, "labels are int64 of shape"),
        ({"y_train": np.ones(20)}, "labels are float64"),
        ({"y_train": np.array(["cat", "dog"] * 10, dtype=object)}, "labels are Python objects, which are not read"),
        ({"y_train": np.arange(20) - 1}, "run from -1 to 18"),
        ({"y_train": np.arange(20) * 2}, "training labels run to 38, but 19 of these classes have no images"),
        ({"y_train": np.arange(20) % 3, "x_test": pictures(2, 8, 8), "y_test": np.array([0, 3])}, "run from 0 to 3"),
        ({"y_train": np.arange(20) % 3, "x_test": pictures(2, 8, 8)}, "has no labels"),
        (
            {"y_train": np.arange(20) % 3, "x_test": pictures(2, 8, 8), "y_test": np.array(["0", "1"])},
            "training labels are int64, test labels <U1; expected one kind",
        ),
    ],
)
def test_labels_that_cannot_be_used_are_told_only_to_who_needs_them(tmp_path, labels, told):
    np.savez(tmp_path / "a.npz", x_train=pictures(20, 8, 8), **(labels or {}))
    data = load(tmp_path / "a.npz")
    assert data.labels is None
    with pytest.raises(DataError, match=told):
        labelled(data)


def test_a_class_with_test_images_only(tmp_path):
    write_folder(tmp_path / "train", pictures(20, 8, 8, 3))
    write_folder(tmp_path / "test", pictures(4, 8, 8, 3))
    (tmp_path / "test" / "class1").rename(tmp_path / "test" / "other")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError, match="class 'other' has test images and no training images"):
        labelled(load(tmp_path))


def test_folder_with_train_and_test(tmp_path):
    train, test = pictures(20, 16, 8, 3), pictures(6, 16, 8, 3)
    write_folder(tmp_path / "train", train)
    write_folder(tmp_path / "test", test)
    (tmp_path / "train" / "README.txt").write_text("no image")
    data = load(tmp_path, validation="test")
    assert data.name == tmp_path.name
    assert sorted(i.tobytes() for i in data.train) == sorted(i.tobytes() for i in train)
    assert sorted(i.tobytes() for i in data.test) == sorted(i.tobytes() for i in test)
    test[0, 0, 0, 0] ^= 1
    write_folder(tmp_path / "test", test)
    assert load(tmp_path, validation="test").fingerprint != data.fingerprint


def test_folder_of_just_images_of_any_size(tmp_path):
    for number, size in enumerate([(30, 50), (64, 20), (16, 16)] * 7):
        Image.fromarray(pictures(1, *size)[0]).save(tmp_path / f"{number}.jpg")
    data = load(tmp_path, image_shape=(24, 32, 1))
    assert data.image_shape == (24, 32, 1)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 1, 2)
    with pytest.raises(DataError, match=r"16x16.*others are 30x50; set IMAGE_SHAPE|64x20"):
        load(tmp_path)
    assert load(tmp_path, image_shape=(16, 16, 3)).image_shape == (16, 16, 3)


def test_images_of_all_kinds_that_are_usual(tmp_path):
    suffixes = ["png", "PNG", "jpg", "jpeg", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm"]
    for suffix in suffixes:
        write_folder(tmp_path / suffix, pictures(2, 8, 8), suffix)
    (tmp_path / "notes.txt").write_text("no image")
    assert len(load(tmp_path, validation="test").train) == round(0.9 * 2 * len(suffixes))


@pytest.mark.filterwarnings("error")
def test_transparent_colours_of_a_palette(tmp_path):
    """Several, of which Pillow warns where they are made to RGB."""
    from PIL import Image

    image = Image.fromarray(np.arange(256, dtype="uint8").reshape(16, 16), "P")
    image.putpalette(RNG.integers(0, 256, 768).tolist())
    for number in range(6):
        image.save(tmp_path / f"a{number}.png", transparency=bytes(range(256)))
        image.convert("RGB").save(tmp_path / f"b{number}.png")
    data = load(tmp_path)
    images = np.concatenate([data.train, data.validation, data.test])
    assert images.shape == (12, 16, 16, 3)
    assert len(np.unique(images, axis=0)) == 1


def test_data_sets_are_the_same_where_they_are_one():
    data = load("digits")
    assert data == data
    assert data != load("digits")


def test_colours_become_grey_as_pillow_has_it_and_grey_becomes_all_colours(tmp_path):
    """Pure green is 150 of 255: by ITU-R 601-2 the three channels count 0.299, 0.587 and 0.114."""
    green = np.zeros((20, 8, 8, 3), "uint8")
    green[..., 1] = 255
    np.savez(tmp_path / "green.npz", x_train=green)
    np.savez(tmp_path / "grey.npz", x_train=np.full((20, 8, 8, 1), 77, "uint8"))
    np.savez(tmp_path / "two.npz", x_train=np.zeros((20, 8, 8, 2), "uint8"))
    assert np.all(load_data(Config(dataset=str(tmp_path / "green.npz"), image_shape=(8, 8, 1))).train == 150)
    assert np.all(load_data(Config(dataset=str(tmp_path / "grey.npz"), image_shape=(8, 8, 3))).train == 77)
    with pytest.raises(DataError, match=r"images of 2 channels cannot be brought to .* 3; set IMAGE_SHAPE=8x8x2"):
        load_data(Config(dataset=str(tmp_path / "two.npz"), image_shape=(8, 8, 3)))
    Image.fromarray(green[0]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="IMAGE_SHAPE has 2 channels; image files have 1, 3 or 4"):
        load_data(Config(dataset=str(tmp_path), image_shape=(8, 8, 2)))


def test_images_are_cut_at_the_middle_and_resized_smoothly(tmp_path):
    """Black and white files of one bit are grey; classes are the folders below the top, whatever is below these."""
    picture = np.zeros((8, 32), bool)
    picture[:, 12:20], picture[4, 4] = True, True
    for number in range(20):
        path = tmp_path / f"class{number % 2}" / "more" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    assert (load(tmp_path, image_shape=(8, 8, 1)).train == 255).all()
    data = labelled(load(tmp_path))
    assert (data.image_shape, data.classes) == ((8, 32, 1), ("class0", "class1"))
    larger = load(tmp_path, image_shape=(16, 64, 1)).train
    assert len(np.unique(larger)) > 4
    np.savez(tmp_path / "a.npz", images=data.train)
    assert len(np.unique(load(tmp_path / "a.npz", image_shape=(16, 64, 1)).train)) > 4


def unsplit(data):
    """All images of a set, in one order."""
    return sorted(image.tobytes() for image in np.concatenate([data.train, data.validation, data.test]))


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "u2")])
def test_images_of_16_bits_keep_their_levels(tmp_path, suffix, dtype):
    images = pictures(20, 8, 8)
    write_folder(tmp_path, images.astype(dtype) * 256 + 7, suffix)
    data = load(tmp_path)
    assert data.image_shape == (8, 8, 1)
    assert unsplit(data) == sorted(image.tobytes() for image in images)


def test_images_of_12_bits_keep_their_levels(tmp_path):
    write_folder(
        tmp_path, np.tile(np.frombuffer(b"\xab\xca\xbc" * 32 + bytes(32), "u2").reshape(8, 8), (20, 1, 1)), "tif"
    )
    for file in tmp_path.rglob("*.tif"):
        bits = (struct.pack("<HHIH", 258, 3, 1, count) for count in (16, 12))
        file.write_bytes(file.read_bytes().replace(*bits))
    assert (load(tmp_path).train == 0xAB).all()


@pytest.mark.parametrize(("dtype", "mode"), [("int32", "I"), ("float32", "F")])
def test_images_of_other_numbers_are_refused(tmp_path, dtype, mode):
    write_folder(tmp_path, pictures(12, 8, 8).astype(dtype), "tif")
    with pytest.raises(DataError, match=rf"000\.tif.*mode {mode}.*8 or 16 bits"):
        load(tmp_path)


def test_one_grey_image_does_not_take_the_colour_of_the_others(tmp_path):
    """Whatever its name and its part of the set; grey images have three equal channels among colours."""
    colours, greys = pictures(20, 8, 8, 3), pictures(2, 8, 8)
    write_folder(tmp_path / "train", colours)
    write_folder(tmp_path / "test", greys)
    Image.fromarray(greys[0]).save(tmp_path / "train" / "a.png")
    data = load(tmp_path, validation="test")
    assert [image.tobytes() for image in data.test] == [np.stack([grey] * 3, -1).tobytes() for grey in greys]
    assert {image.tobytes() for image in colours} < {image.tobytes() for image in data.train}
    for file in tmp_path.rglob("*.png"):
        Image.open(file).convert("LA").save(file)
    assert load(tmp_path).image_shape == (8, 8, 1)
    Image.fromarray(colours[0]).save(tmp_path / "test" / "z.png")
    assert load(tmp_path).image_shape == (8, 8, 3)


def test_folders_train_and_test_in_any_case(tmp_path):
    write_folder(tmp_path / "Train", pictures(20, 8, 8))
    write_folder(tmp_path / "TEST", pictures(4, 8, 8))
    data = load(tmp_path, validation="test")
    assert (len(data.train), len(data.test)) == (20, 4)


def test_hidden_folders_are_not_read(tmp_path):
    for folder in ("", ".thumbnails", "class0/.cache"):
        write_folder(tmp_path / folder, pictures(20, 8, 8))
    data = load(tmp_path)
    assert sum(map(len, (data.train, data.validation, data.test))) == 20


def test_folders_that_are_links_are_followed(tmp_path):
    """As where a data set is put together of parts that are elsewhere."""
    write_folder(tmp_path / "elsewhere", pictures(20, 8, 8))
    (tmp_path / "data" / "train").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "data" / "train" / f"class{number}").symlink_to(tmp_path / "elsewhere" / f"class{number}")
    assert load(tmp_path / "data").fingerprint == load(tmp_path / "elsewhere").fingerprint
    (tmp_path / "elsewhere" / "class0" / "lost.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(DataError, match=r"lost\.png is a link to nothing; remove it"):
        load(tmp_path / "data")
    (tmp_path / "elsewhere" / "class0" / "lost.png").unlink()
    for name in ("train/class9", "test"):  # folders that are not there just now
        (tmp_path / "data" / name).symlink_to(tmp_path / "unmounted")
        with pytest.raises(DataError, match=f"data/{name} is a link to nothing; remove it, or mount"):
            load(tmp_path / "data")
        (tmp_path / "data" / name).unlink()
    (tmp_path / "elsewhere" / "class1" / "again").symlink_to(tmp_path / "data")
    with pytest.raises(DataError, match="class1/again is a link to a folder that it is in"):
        load(tmp_path / "data")


@pytest.mark.parametrize(
    "names",
    [
        ("Test",),
        ("training", "testing"),
        ("train", "val"),
        ("train", "test", "Validation"),
        ("", "val"),
        ("", "valid"),
        ("", "validation"),
        ("", "test"),
        ("", "train"),
        ("train", "test", "more"),
        ("train", "cat"),
    ],
)
def test_a_layout_that_would_mix_or_lose_images_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(pictures(1, 8, 8)[0]).save(tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"expected train/<class>/\*") as error:
        load(tmp_path)
    assert all(name in str(error.value) for name in (str(tmp_path), names[-1]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_photographs_stand_upright(tmp_path, suffix):
    """As a camera turned by a quarter writes them: lying, with a note in the metadata."""
    upright = np.zeros((16, 8, 3), "uint8")
    upright[:8] = 255  # the upper half is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned clockwise
    for number in range(20):
        Image.fromarray(np.rot90(upright)).save(tmp_path / f"{number}.{suffix}", exif=exif)
    for data in (load(tmp_path), load(tmp_path, image_shape=(32, 16, 3))):
        height = data.image_shape[0]
        assert data.image_shape == (height, height // 2, 3)
        assert data.train[:, : height // 4].min() > 200
        assert data.train[:, -height // 4 :].max() < 50


def test_photographs_whose_metadata_cannot_be_read(tmp_path):
    for number in range(20):
        Image.new("L", (8, 16)).save(tmp_path / f"{number}.jpg", exif=b"Exif\0\0junk")
    assert load(tmp_path).image_shape == (16, 8, 1)


@pytest.mark.parametrize("names", [("x_train", "x_test"), ("xtr", "xte")])
def test_npz_of_arrays(tmp_path, names):
    arrays = {names[0]: pictures(30, 8, 8, 2), names[1]: pictures(5, 8, 8, 2), "ytr": np.arange(30)}
    np.savez(tmp_path / "a.npz", **arrays, mean_of_pixels=np.zeros((8, 2)))  # which is no array of images
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("license.txt", "free")
    data = load(tmp_path / "a.npz", validation="test")
    np.testing.assert_array_equal(data.train, arrays[names[0]])
    np.testing.assert_array_equal(data.test, arrays[names[1]])


def test_npz_of_floats_and_without_channels(tmp_path):
    images = pictures(40, 16, 8)
    np.savez(tmp_path / "a.npz", images=images / 255)
    data = load(tmp_path / "a.npz")
    assert data.image_shape == (16, 8, 1)
    whole = np.concatenate([data.train, data.validation, data.test])[..., 0]
    assert sorted(i.tobytes() for i in whole) == sorted(i.tobytes() for i in images)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x_train": np.full((20, 8, 8), np.nan)}, "run from nan to nan; expected 0 to 1"),
        ({"x_train": np.full((20, 8, 8), 7.0)}, "expected 0 to 1"),
        ({"x_train": np.full((20, 8, 8), -1)}, "expected 0 to 255"),
        ({"x_train": np.full((20, 8, 8), 256)}, "expected 0 to 255"),
        ({"x_train": np.eye(8, dtype="uint8")[None].repeat(20, 0)}, r"from 0 to 1, and.*save array\.astype\(bool"),
        ({"x_train": np.zeros((20, 8), "uint8")}, "expected numbers"),
        ({"x_train": np.full((20, 8, 8), "a")}, "expected numbers"),
        ({"x_train": np.zeros((20, 8, 8), object)}, "cannot be read"),
        ({"pictures": np.zeros((20, 8, 8))}, "has arrays pictures; expected x_train"),
        ({"x_train": pictures(20, 8, 8), "X_test": pictures(5, 8, 8)}, "has arrays X_test, which may be images"),
        ({"x_train": np.zeros((0, 8, 8), "uint8")}, "no training images"),
        ({"x_train": np.zeros((9, 8, 8), "uint8")}, "9 images are too few to hold some out; at least 10 are needed"),
        ({"x_train": np.zeros((10, 8, 8), "uint8")}, "too few.* 11 where test images are held out as well"),
        ({"x_train": pictures(20, 30, 33)}, "set IMAGE_SHAPE, for example 32x32x1"),
        ({"x_train": pictures(20, 8, 8), "x_test": pictures(5, 16, 8)}, "set IMAGE_SHAPE"),
        ({"x_train": pictures(20, 3, 32, 32)}, r"looks like \(images, channels, height.*transpose\(0, 2, 3, 1\)"),
        ({"x_train": pictures(20, 1, 8, 8)}, "looks like"),
        (
            {"x_train": pictures(1, 32, 32, 3)[0]},
            r"shape \(32, 32, 3\) is one image .* or grey .* width 3; .*: save array\[None\]",
        ),
        ({"x_train": np.zeros((20, 0, 8), "uint8")}, r"uint8 of shape \(20, 0, 8, 1\).*at least 1"),
        ({"x_train": np.zeros((20, 8, 8, 0))}, "at least 1"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, told):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=told) as error:
        load(tmp_path / "bad.npz")
    assert "bad.npz" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="neither one of digits"):
        load("no-such-set")
    with pytest.raises(DataError, match="no images"):
        load(tmp_path)
    write_folder(tmp_path / "own" / "train", pictures(20, 8, 8, 3))
    (tmp_path / "own" / "test").mkdir()
    (tmp_path / "own" / "test" / "picture.heic").touch()
    with pytest.raises(DataError, match=r"own/test: no images; expected files ending in .*\.png"):
        load(tmp_path / "own")
    np.savez(tmp_path / "cut.npz", x_train=pictures(20, 8, 8))
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.npz cannot be read"):
        load(tmp_path / "cut.npz")
    with zipfile.ZipFile(tmp_path / "junk.npz", "w") as archive:
        archive.writestr("x_train.npy", b"junk")
    with pytest.raises(DataError, match=r"junk\.npz"):
        load(tmp_path / "junk.npz")
    write_folder(tmp_path / "set", pictures(12, 8, 8))
    png = io.BytesIO()
    Image.fromarray(pictures(1, 8, 8)[0]).save(png, "png")
    (tmp_path / "set" / "class0" / "zz.png").write_bytes(png.getvalue()[:40])
    with pytest.raises(DataError, match=r"zz\.png cannot be read as an image"):
        load(tmp_path / "set")


def test_an_image_file_of_another_kind_than_pictures(tmp_path):
    """PostScript under a picture's name, for which Pillow would run a program."""
    write_folder(tmp_path / "set", pictures(12, 8, 8))
    program = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
    (tmp_path / "set" / "class0" / "zz.png").write_text(program)
    with pytest.raises(DataError, match=r"zz\.png cannot be read as an image: cannot identify image file"):
        load(tmp_path / "set")


def test_bombs(tmp_path):
    """A picture of too many pixels, and an archive whose arrays would not fit into memory."""
    write_folder(tmp_path / "set", pictures(12, 8, 8))
    Image.new("1", (20000, 10000)).save(tmp_path / "set" / "class0" / "zz.png")
    with pytest.raises(DataError, match=r"zz\.png cannot be read as an image"):
        load(tmp_path / "set")
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x_train.npy", bytes(1000))
    content = bytearray((tmp_path / "bomb.npz").read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = b"\xfe\xff\xff\xff"  # the size that the directory claims: 4 GB
    (tmp_path / "bomb.npz").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resnet_vae.data._memory", lambda: 2**31)
        with pytest.raises(DataError, match="more than this machine's memory"):
            load(tmp_path / "bomb.npz")


@pytest.mark.parametrize("kind", ["folder", "npz", "digits"])
def test_an_image_shape_that_would_not_fit_into_memory(tmp_path, monkeypatch, kind):
    write_folder(tmp_path / "folder", pictures(12, 8, 8))
    np.savez(tmp_path / "npz.npz", x_train=pictures(12, 8, 8))
    path = {"folder": tmp_path / "folder", "npz": tmp_path / "npz.npz"}.get(kind, kind)
    monkeypatch.setattr("resnet_vae.data._memory", lambda: 10**5)
    with pytest.raises(DataError, match=r"images of 160x160x1 need .* GB, which is more than .* smaller IMAGE_SHAPE"):
        load(path, image_shape=(160, 160, 1))


def test_a_folder_that_would_not_fit_into_memory(tmp_path, monkeypatch):
    write_folder(tmp_path / "train", pictures(12, 8, 8))
    write_folder(tmp_path / "test", pictures(4, 8, 8))
    monkeypatch.setattr("resnet_vae.data._memory", lambda: 16 * 8 * 8)
    load(tmp_path)
    monkeypatch.setattr("resnet_vae.data._memory", lambda: 16 * 8 * 8 - 1)
    with pytest.raises(DataError, match=r"16 images of 8x8x1 need .* smaller IMAGE_SHAPE"):
        load(tmp_path)


def test_a_named_set_that_cannot_be_downloaded_says_where_to_put_it(tmp_path, monkeypatch):
    def fail():
        raise OSError("no network")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fail)
    assert keras_home() == tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        assert keras_home() == Path("/tmp/.keras")  # where Keras then looks, too
    with monkeypatch.context() as patch:
        stat = os.stat

        def closed(path, *args, **kwargs):
            if str(path) == str(tmp_path):
                raise PermissionError
            return stat(path, *args, **kwargs)

        patch.setattr(os, "stat", closed)  # as in a home folder that may not be entered
        assert keras_home() == tmp_path
    with pytest.raises(DataError) as error:
        load("cifar10")
    for told in ("no network", "cifar-10-python.tar.gz", str(tmp_path / "datasets"), "DATASET=digits"):
        assert told in str(error.value)


def test_mnist_gets_a_border(monkeypatch, tmp_path):
    images = pictures(20, 28, 28)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(keras.datasets.mnist, "load_data", lambda: ((images, None), (images, None)))
    data = load("mnist", validation="test")
    np.testing.assert_array_equal(data.train[:, 2:-2, 2:-2, 0], images)
    assert data.image_shape == (32, 32, 1)
    assert not data.train[:, :2].any()


def test_the_small_cifar10_is_the_first_images_of_each_batch(tmp_path, monkeypatch, capsys):
    """With its labels; what is not as recorded is told, and no file is left."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "scripts")
    import cifar10_subset

    numbers = np.arange(60_000, dtype="uint32").reshape(-1, 1, 1, 1)
    images = np.tile(numbers, (1, 8, 8, 1)).view("uint8").reshape(-1, 8, 32, 1)
    parts = [(part, part[:, 0, 0].astype("int64") % 10) for part in (images[:50_000], images[50_000:])]
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: parts)
    path = tmp_path / "data" / "small.npz"
    monkeypatch.setattr(sys, "argv", ["cifar10_subset.py", str(path)])
    assert cifar10_subset.main() == 2
    assert re.match("error: these images are not those of the records .fingerprint", capsys.readouterr().err)
    assert not list((tmp_path / "data").iterdir())
    expected = np.concatenate([np.arange(start, start + 1017) for start in range(0, 60_000, 10_000)])
    np.savez(tmp_path / "other.npz", xtr=images[expected[:5085]], xte=images[expected[5085:]])
    monkeypatch.setattr(cifar10_subset, "FINGERPRINT", load(tmp_path / "other.npz", validation="test").fingerprint)
    assert cifar10_subset.main() == 0
    data = labelled(load(path, validation="test"))
    for part, labels in zip((data.train, data.test), (data.labels[0], data.labels[2]), strict=True):
        np.testing.assert_array_equal(labels, part[:, 0, 0, 0] % 10)
    monkeypatch.setattr(sys, "argv", ["cifar10_subset.py", str(tmp_path / "small.png")])
    assert cifar10_subset.main() == 2
    assert "small.png is no name for the file; expected one that ends in .npz" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["cifar10_subset.py", str(path)])
    with monkeypatch.context() as without:
        without.setattr(cifar10_subset, "load_data", lambda _: importlib.import_module("no_backend"))
        assert cifar10_subset.main() == 2
        assert "has no no_backend; make clean install" in capsys.readouterr().err
    monkeypatch.setenv("KERAS_BACKEND", "theano")
    assert cifar10_subset.main() == 2
    assert capsys.readouterr().err.startswith("error: KERAS_BACKEND is 'theano'; expected one of")


COLD_START = """
import sys, time
from pathlib import Path
import keras, numpy
from resnet_vae import Config, load_data
cache = Path(sys.argv[1]) / "datasets" / "mnist.npz"
def download():
    if not cache.exists():
        with open(f"{cache}.begun", "x"):
            time.sleep(0.5)
        numpy.savez(cache, images=numpy.arange(20 * 28 * 28, dtype="uint8").reshape(20, 28, 28))
        Path(f"{cache}.begun").unlink()
        print("downloaded")
    with numpy.load(cache) as arrays:
        return ((arrays["images"], None), (arrays["images"], None))
keras.datasets.mnist.load_data = download
print(load_data(Config(dataset="mnist", validation="test")).fingerprint)
"""


def test_four_cold_starts_at_once_download_one_after_the_other(tmp_path):
    """Only the first of four processes downloads; the others wait for it and read what it saved."""
    environ = os.environ | {"KERAS_HOME": str(tmp_path), "KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", COLD_START, str(tmp_path)]
    processes = [subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(len(lines) for lines in outputs) == [1, 1, 1, 2]
    assert len({lines[-1] for lines in outputs}) == 1


@pytest.mark.parametrize("content", [b"one changed byte", b"", None], ids=["changed", "emptied", "half a download"])
def test_a_cached_archive_that_is_not_the_right_one(tmp_path, monkeypatch, content):
    """It is not read; without a network the error says so, in a line, and where to put the right one."""
    import urllib.error

    from keras.src.utils import file_utils

    def no_network(origin, target, *_):
        if content is None:
            Path(target).write_bytes(b"half")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(file_utils, "urlretrieve", no_network)
    monkeypatch.setattr(file_utils.config, "keras_home", lambda: str(tmp_path))  # Keras reads KERAS_HOME once
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    archive = tmp_path / "datasets" / "cifar-10-batches-py-target_archive"
    archive.parent.mkdir()
    if content is not None:
        archive.write_bytes(content)
    with pytest.raises(
        DataError, match=r"cifar10 cannot be loaded \(.*no network.*download https.*save it as"
    ) as error:
        load("cifar10")
    assert "\n" not in str(error.value)


def test_brightness_changes_and_each_image_about_its_own_mean():
    even = np.full((256, 8, 8, 1), 150, "uint8")
    even[::2] = 60
    ratio = augment(even, ("color",), np.random.default_rng(1)).mean((1, 2, 3)) / even.mean((1, 2, 3))
    assert 0.62 < ratio.min() < 0.75
    assert 1.25 < ratio.max() < 1.46


def test_one_image_in_two_is_flipped():
    images = np.zeros((1000, 8, 8, 1), "uint8")
    images[:, :, 0] = 255
    flipped = augment(images, ("flip",), np.random.default_rng(1))[:, 0, -1, 0] == 255
    assert 0.45 < flipped.mean() < 0.55


def test_the_floor_of_large_images_is_that_of_their_pixels():
    """Also of parts of a million numbers, of which one image is several."""
    images = RNG.integers(0, 256, (3, 600, 600, 3), "uint8")
    level = np.clip(images / 255, 1e-12, 1 - 1e-12)
    expected = -(level * np.log(level) + (1 - level) * np.log1p(-level)).sum((1, 2, 3)).mean()
    assert entropy_floor(images) == pytest.approx(expected, rel=1e-9)


def test_floats_are_rounded_to_grey_levels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((20, 8, 8), 0.999))
    assert (load_data(Config(dataset=str(tmp_path / "a.npz"))).train == 255).all()


@pytest.mark.parametrize("dtype", ["int64", "uint16", "float32"])
def test_grey_levels_of_any_kind_and_of_many_images(tmp_path, dtype):
    images = RNG.integers(0, 256, (2345, 8, 8, 1))
    given = (images / 255 if dtype == "float32" else images).astype(dtype)
    np.savez(tmp_path / "a.npz", x_train=given, x_test=given[:9])
    np.testing.assert_array_equal(load(tmp_path / "a.npz", validation="test").train, images)


def test_each_channel_is_resized_by_itself(tmp_path):
    red = np.zeros((20, 8, 16, 3), "uint8")
    red[..., 0], red[..., 2] = 200, 50
    np.savez(tmp_path / "a.npz", x_train=red)
    assert (load(tmp_path / "a.npz", image_shape=(16, 8, 3)).train == (200, 0, 50)).all()


def test_a_high_picture_is_cut_to_its_middle(tmp_path):
    picture = np.zeros((32, 8), "uint8")
    picture[12:20] = 255
    for number in range(20):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    assert (load(tmp_path, image_shape=(8, 8, 1)).train == 255).all()


@pytest.mark.parametrize(
    ("train", "test", "told"),
    [
        ((30, 32), (30, 32), "set IMAGE_SHAPE, for example 32x32x1"),
        ((32, 30), (32, 30), "set IMAGE_SHAPE, for example 32x32x1"),
        ((8, 8), None, "no test images"),
    ],
)
def test_each_side_and_each_part_is_checked(tmp_path, train, test, told):
    images = pictures(20, *train)
    np.savez(tmp_path / "a.npz", x_train=images, x_test=pictures(5, *test) if test else images[:0])
    with pytest.raises(DataError, match=told):
        load(tmp_path / "a.npz")


def test_a_picture_of_which_pillow_only_warns_is_refused(tmp_path):
    """A hundred megapixels, in a file of some kilobytes."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"large\.png cannot be read as an image"):
        load(tmp_path)
