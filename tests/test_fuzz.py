"""Whatever comes in, only our own errors come out: settings, run folders and data files, made up and broken."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import once
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_results import RESULTS

from resnet_vae import Config, load_data
from resnet_vae.config import ConfigError, UserError
from resnet_vae.data import DataError
from resnet_vae.records import PICTURES, read_run, read_sweep
from resnet_vae.results import tables
from resnet_vae.verify import verify

pytestmark = once("no backend is asked for anything")
FUZZ = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
VALUES = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["0", "1e400", "-0", "nan", "32x32x3", "[[1,2]]", "9" * 5000, "\x00", "published", " 28 ", "true"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@FUZZ
@given(st.dictionaries(st.sampled_from([name.upper() for name in Config.model_fields]), VALUES, max_size=6))
def test_settings(environ):
    try:
        config = Config.from_env(environ)
    except ConfigError as error:
        assert str(error)  # noqa: PT017, which would have it expected
    else:
        assert Config.from_record({"values": config.model_dump(mode="json"), "origins": config.origins}) == config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sweep of one recorded run without its pictures, but with an evaluation, and a place for a spoilt copy."""
    place = tmp_path_factory.mktemp("fuzz")
    run = place / "whole" / "run"
    run.mkdir(parents=True)
    for path in (RESULTS / "calm" / "depth-28").iterdir():
        if path.suffix in (".json", ".csv"):
            shutil.copy(path, run)
    metrics = read_run(run).metrics
    (run / "evaluation-a.json").write_text(json.dumps({"loss_is": metrics["loss_is"], **metrics["test"]}))
    with pytest.MonkeyPatch.context() as patched:  # counting takes a second
        patched.setattr("resnet_vae.verify._parameters", lambda config: metrics["parameters"])
        yield place


def spoilt_copy(folders, spoil, name):
    shutil.rmtree(folders / "copy", ignore_errors=True)
    shutil.copytree(folders / "whole", folders / "copy")
    path = folders / "copy" / "run" / name
    path.write_bytes(spoil(path.read_bytes()))
    try:
        tables(read_sweep(folders / "copy"))
    except UserError as error:
        assert str(error)  # noqa: PT017
    assert all(isinstance(line, str) for line in verify(folders / "copy"))


NAMES = st.sampled_from(["config.json", "metrics.json", "provenance.json", "evaluation-a.json", "history.csv"])


@FUZZ
@given(name=NAMES, place=st.floats(0, 1), junk=st.binary(max_size=4), cut=st.booleans())
def test_run_folders_with_broken_files(folders, name, place, junk, cut):
    def spoil(content):
        at = int(place * len(content))
        return content[:at] + junk + (b"" if cut else content[at + len(junk) :])

    spoilt_copy(folders, spoil, name)


@FUZZ
@given(name=NAMES.filter(lambda name: name.endswith("json")), data=st.data(), value=JSON)
def test_run_folders_with_other_values(folders, name, data, value):
    """One value somewhere in a file is another one, or gone."""

    def spoil(content):
        record = json.loads(content)
        inner, key = record, data.draw(st.sampled_from(sorted(record)))
        while isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
            inner = inner[key]
            key = data.draw(st.sampled_from(sorted(inner)))
        if data.draw(st.booleans()):
            inner[key] = value
        else:
            del inner[key]
        return json.dumps(record).encode()

    spoilt_copy(folders, spoil, name)


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 10_000, '{"a": NaN}', "\x00", "[]", "3", '"x"'])
@pytest.mark.parametrize("name", ["config.json", "metrics.json", "provenance.json"])
def test_run_folders_with_strange_json(folders, name, content):
    spoilt_copy(folders, lambda _: content.encode(), name)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small data files of all kinds."""
    place = tmp_path_factory.mktemp("files")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), "uint8")
    np.savez(place / "plain.npz", x_train=images)
    np.savez_compressed(place / "packed.npz", x_train=images)
    for suffix in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        (place / suffix).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image).save(place / suffix / f"{number}.{suffix}")
    return place


@FUZZ
@given(
    kind=st.sampled_from(["plain.npz", "packed.npz", "png", "jpg", "gif", "bmp", "tif", "webp", "ppm"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    keep=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_broken_data_files(files, kind, changes, keep):
    path = Path(files, kind)
    broken = path if path.is_file() else path / f"3.{kind}"
    whole = broken.read_bytes()
    content = bytearray(whole[: int(keep * len(whole))])
    for place, byte in changes:
        if content:
            content[int(place * len(content))] = byte
    try:
        broken.write_bytes(content)
        load_data(Config(dataset=str(path)))
    except DataError as error:
        assert str(error)  # noqa: PT017
    finally:
        broken.write_bytes(whole)


def test_an_npz_whose_header_claims_more_than_there_is(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 32, 32, 3), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as archive:
        archive.writestr("x_train.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64))
    with pytest.raises(DataError, match=r"claims\.npz cannot be read"):
        load_data(Config(dataset=str(tmp_path / "claims.npz")))


def test_the_corpus_is_read_when_it_is_whole(folders, files):
    """So that the tests above do not pass because nothing can be read at all."""
    assert tables(read_sweep(folders / "whole"))["table.md"]
    run = folders / "whole" / "run"
    assert verify(run.parent) == [f"{run / name}.png is missing" for name in PICTURES]
    for path in files.iterdir():
        assert len(load_data(Config(dataset=str(path))).train) == 10
