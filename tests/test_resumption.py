"""Interrupted trainings: real processes are killed, and what comes of it is compared with an undisturbed run."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import TINY, once

from resnet_vae import Config, checkpoints, load_data
from resnet_vae.config import UserError
from resnet_vae.records import RecordError
from resnet_vae.verify import differences

# What is run in a process of its own: the command line with a checkpoint after each step, and a mishap.
CHILD = """
import os, signal, sys
import resnet_vae.training as training
training.SHARE = 1e9
{mishap}
from resnet_vae.__main__ import main
sys.exit(main())
"""
KILLED_INSIDE_THE_35TH_SAVE = """
from resnet_vae import checkpoints
count, replace = 0, os.replace
def killing(source, target):
    global count
    count += str(source).endswith("partial-checkpoint")
    if count == 35:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killing
"""
TERMINATED_WHILE_VALIDATING = """
look = training.Training.on_test_batch_end
def terminating(self, batch, logs=None):
    if len(self.rows) == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    look(self, batch, logs)
training.Training.on_test_batch_end = terminating
"""

INTERRUPTED_WHILE_A_STEP_IS_TRACED = """
from resnet_vae import blocks
call = blocks.ResidualBlock.call
def interrupting(self, x, training=None):
    if training:
        os.kill(os.getpid(), signal.{name})
    return call(self, x, training)
blocks.ResidualBlock.call = interrupting
"""
INTERRUPTED_WHERE_PYTHON_IGNORES_EXCEPTIONS = """
begin = training.Training.on_epoch_begin
class Told:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        for _ in range(1000): pass
def ignoring(self, epoch, logs=None):
    Told()
    begin(self, epoch, logs)
training.Training.on_epoch_begin = ignoring
"""

NOISE_FORGOTTEN = """
import keras
restore = training.Training._restore
def forgetful(self, arrays):
    noise = self.vae.sampler.training_noise.state
    fresh = keras.ops.convert_to_numpy(noise)
    restore(self, arrays)
    noise.assign(fresh)
training.Training._restore = forgetful
"""


def train_in_a_process(folder, mishap="", **settings):
    settings = {
        name.upper(): str(value) for name, value in {**TINY, "cmdline": 1, "checkpoint_seconds": 0, **settings}.items()
    }
    return subprocess.run(
        [sys.executable, "-c", CHILD.format(mishap=mishap), "train"],
        env=os.environ | settings | {"OUTDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_killed_and_terminated_training_is_the_undisturbed_one(finished_run, tmp_path):
    """kill -9 inside a save in the second epoch; SIGTERM in a validation; then to the end: bit for bit the same.

    And not the same where one variable is forgotten, the state of the noise: so what is compared does see it.
    """
    run = tmp_path / "run"
    done = train_in_a_process(run, KILLED_INSIDE_THE_35TH_SAVE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (run / "partial-checkpoint").exists()
    done = train_in_a_process(run, TERMINATED_WHILE_VALIDATING)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "going on in epoch 2, after step" in done.stdout
    assert "stopped by SIGTERM; the same command goes on from the checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    done = train_in_a_process(run, learning_rate=0.001)
    assert done.returncode == 2
    assert "unfinished run of something else (LEARNING_RATE 0.002 there, 0.001 here)" in done.stderr
    shutil.copytree(run, tmp_path / "forgetful")
    done = train_in_a_process(run)
    assert done.returncode == 0, done.stderr
    assert "going on in epoch 2" in done.stdout
    assert not [name for name in checkpoints.NAMES if (run / name).exists()]
    assert json.loads((run / "provenance.json").read_text())["sessions"] == 3

    assert differences(run, finished_run) == []
    history = (run / "history.csv").read_text()
    (run / "history.csv").write_text(history.replace("\n3,", "\n4,"))
    assert differences(run, finished_run) == ["history epoch"]

    done = train_in_a_process(tmp_path / "forgetful", NOISE_FORGOTTEN)
    assert done.returncode == 0, done.stderr
    differing = differences(tmp_path / "forgetful", finished_run)
    assert "history loss" in differing
    assert any("encoder" in name for name in differing)


@pytest.mark.parametrize(
    ("mishap", "signal_name"),
    [(INTERRUPTED_WHILE_A_STEP_IS_TRACED, "SIGINT"), (INTERRUPTED_WHERE_PYTHON_IGNORES_EXCEPTIONS, "SIGTERM")],
    ids=["tracing", "ignored"],
)
def test_a_signal_before_the_first_step_is_done_is_told_in_a_line(tmp_path, mishap, signal_name):
    """Neither does Keras make another exception of it, nor does it get lost."""
    done = train_in_a_process(tmp_path / "run", mishap.format(name=signal_name), epochs=1)
    assert done.returncode == 128 + signal.Signals[signal_name], done.stderr
    anew = signal_name == "SIGINT"
    then = "begins anew" if anew else f"goes on from the checkpoint in {tmp_path / 'run'}"
    assert done.stderr.endswith(f"error: stopped by {signal_name}; the same command {then}\n")
    assert "InterruptedTrainingError" not in done.stderr
    kept = {"config.json", "history.csv"} | (set() if anew else {"checkpoint"})
    assert {path.name for path in (tmp_path / "run").iterdir()} == kept


def test_a_killed_training_with_loops_is_the_undisturbed_one(tmp_path):
    """As above, with what the small networks lack: loops, dropout, augmentation, precision as it suits."""
    settings = {"resnet_depth": 46, "dropout": 0.5, "augment": "shift", "order": "pre", "remat": 1, "epochs": 2}
    settings["precision"] = "auto"
    done = train_in_a_process(tmp_path / "run", KILLED_INSIDE_THE_35TH_SAVE, **settings)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for run in ("run", "undisturbed"):
        done = train_in_a_process(tmp_path / run, **settings)
        assert done.returncode == 0, done.stderr
        assert ("going on in epoch 2, after step" in done.stdout) == (run == "run")
    assert differences(tmp_path / "run", tmp_path / "undisturbed") == []


SAVER = """
import sys, numpy as np
from resnet_vae import checkpoints
for number in range(int(sys.argv[2]), 10**9):
    checkpoints.save(sys.argv[1], {"number": number}, [np.full(100_000, number), np.arange(number % 7)])
    print(number, flush=True)
"""


@once("no backend saves checkpoints")
def test_killed_at_any_moment_of_a_save_a_whole_checkpoint_remains(tmp_path):
    """Twenty processes that do nothing but save, each killed at a random moment."""
    last = -1
    for attempt in range(20):
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, tmp_path, str(last + 1)], stdout=subprocess.PIPE, text=True
        ) as process:
            process.stdout.readline()
            time.sleep(random.Random(attempt).uniform(0, 0.05))
            process.kill()
            written = [int(line) for line in process.stdout.read().split()]
        values, (first, second) = checkpoints.load(tmp_path)
        assert values["number"] >= max([last + 1, *written])
        np.testing.assert_array_equal(first, np.full(100_000, values["number"]))
        np.testing.assert_array_equal(second, np.arange(values["number"] % 7))
        last = values["number"]


@pytest.fixture
def two_generations(tmp_path):
    for number in (1, 2):
        checkpoints.save(tmp_path, {"number": number}, [np.full(1000, number)])
    return tmp_path


def spoil(path, how):
    content = bytearray(path.read_bytes())
    if how == "a bit":
        content[len(content) // 2] ^= 4
    elif how == "truncated":
        del content[-10:]
    elif how == "emptied":
        content.clear()
    elif how == "a tail of another":
        content[-200:] = path.with_name("checkpoint-before").read_bytes()[-200:]
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["a bit", "truncated", "emptied", "a tail of another"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_taken(two_generations, how, capsys):
    spoil(two_generations / "checkpoint", how)
    values, _ = checkpoints.load(two_generations)
    assert values == {"number": 1}
    assert "checkpoint is" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:  # killed before the next one has its place
        replace = os.replace
        patch.setattr(os, "replace", lambda old, new: replace(old, new) if "partial" not in str(old) else sys.exit())
        with pytest.raises(SystemExit):
            checkpoints.save(two_generations, {"number": 3}, [])
    assert checkpoints.load(two_generations)[0] == {"number": 1}
    spoil(two_generations / "checkpoint-before", "truncated")
    with pytest.raises(RecordError, match=r"is damaged.*to train from the beginning, move"):
        checkpoints.load(two_generations)


def test_a_checkpoint_with_pickled_objects_is_refused(two_generations):
    class Canary:
        def __reduce__(self):
            return open, (str(two_generations / "canary"), "w")

    content = io.BytesIO()
    np.save(content, np.array([Canary()]), allow_pickle=True)
    (two_generations / "checkpoint-before").unlink()
    body = b"{}\n" + content.getvalue()
    whole = checkpoints.FORMAT + hashlib.sha256(body).digest() + body
    (two_generations / "checkpoint").write_bytes(whole)
    with pytest.raises(RecordError, match="cannot be read"):
        checkpoints.load(two_generations)
    assert not (two_generations / "canary").exists()


def test_a_full_disk_leaves_the_checkpoint_before(two_generations):
    (two_generations / "partial-checkpoint").symlink_to("/dev/full")
    with pytest.raises(RecordError, match=r"checkpoint cannot be written: No space left.*goes on from the one before"):
        checkpoints.save(two_generations, {"number": 3}, [np.arange(9)])
    assert checkpoints.load(two_generations)[0] == {"number": 2}
    checkpoints.save(two_generations, {"number": 3}, [np.arange(9)])
    assert checkpoints.load(two_generations)[0] == {"number": 3}


def test_a_full_disk_before_the_first_checkpoint(tmp_path):
    (tmp_path / "partial-checkpoint").symlink_to("/dev/full")
    with pytest.raises(
        RecordError, match=r"checkpoint cannot be written: No space left.*; the same command begins anew"
    ):
        checkpoints.save(tmp_path, {}, [np.arange(9)])


def test_a_folder_that_another_process_trains_in(tmp_path, monkeypatch):
    """The second process is told so, and does nothing."""
    import filelock

    from resnet_vae import train

    config = Config(**TINY, outdir=str(tmp_path), cmdline=True)
    with filelock.FileLock(tmp_path / "lock"), pytest.raises(UserError, match="in use by another process") as told:
        train(config, load_data(config))
    assert told.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("place", ["__init__", "_run_epoch"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), r"out of memory; set REMAT=1, or, with .*, lower BATCH_SIZE \(64\) or WIDTH \(0.0625\)"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), "out of memory"),
        (OSError(28, "No space left"), "No space"),
    ],
)
def test_memory_and_disk_that_run_out_are_told_in_a_line(tmp_path, monkeypatch, error, told, place):
    from resnet_vae import train, training

    def fail(self, *_):
        raise error

    monkeypatch.setattr(training.Training, place, fail)
    config = Config(**TINY, outdir=str(tmp_path / "run"), cmdline=True)
    with pytest.raises(UserError, match=told):
        train(config)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_reader_that_has_read_enough_is_no_full_disk(tmp_path, monkeypatch):
    """As of `| head`: the command line ends without a word."""
    from resnet_vae import train

    def closed(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        train(Config(**TINY, outdir=str(tmp_path / "run"), cmdline=True))


def test_a_checkpoint_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replaced") or replace(old, new))
    checkpoints.save(tmp_path, {}, [np.arange(3)])
    assert done == ["partial-checkpoint", "replaced", tmp_path.name]


def test_a_checkpoint_that_cannot_be_read_just_now_stays(tmp_path, monkeypatch):
    for number in (1, 2):
        checkpoints.save(tmp_path, {"number": number}, [])
    read = checkpoints._read

    def failing(path):
        if path.name == "checkpoint":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checkpoints, "_read", failing)
    assert checkpoints.load(tmp_path)[0] == {"number": 1}
    monkeypatch.undo()
    assert checkpoints.load(tmp_path)[0] == {"number": 2}


def test_one_bit_of_one_weight_is_a_difference(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    with zipfile.ZipFile(run / "model.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    content = io.BytesIO(contents["model.weights.h5"])
    with h5py.File(content, "r+") as file:
        place = file["encoder/layers/dense/vars/0"]
        value = place[()]
        value.flat[0] = np.nextafter(value.flat[0], np.float32(9))
        place[...] = value
    contents["model.weights.h5"] = content.getvalue()
    with zipfile.ZipFile(run / "model.keras", "w") as archive:
        for name, each in contents.items():
            archive.writestr(name, each)
    assert differences(finished_run, run) == ["encoder/layers/dense/vars/0"]
