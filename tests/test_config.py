import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import once, processor_seconds
from pydantic import ValidationError
from test_results import RESULTS, write_run

from resnet_vae import Config
from resnet_vae.__main__ import main
from resnet_vae.config import IMAGENET, PUBLISHED, ConfigError, UserError, blocks_per_stage
from resnet_vae.data import check_dataset
from resnet_vae.experiments.settings import (
    NOTEBOOKS,
    Degradation,
    Euler,
    Gradients,
    Landscape,
    Preactivation,
    Transfer,
)
from resnet_vae.records import is_finished

pytestmark = once("no backend is asked for settings")


def test_depths_of_the_table_have_the_posts_blocks():
    assert [blocks_per_stage(depth) for depth in (28, 40, 70, 100)] == [
        (1, 1, 1, 1),
        (1, 2, 2, 1),
        (2, 3, 4, 2),
        (3, 4, 6, 3),
    ]


@pytest.mark.parametrize("blocks", [5, 7, 12, 33, 166])
def test_every_reachable_depth_counts_its_layers(blocks):
    depth = 2 * (3 * blocks + 2)
    stages = blocks_per_stage(depth)
    assert sum(stages) == blocks
    assert min(stages) >= 1
    assert all(abs(count - blocks * share / 16) < 1 for count, share in zip(stages, (3, 4, 6, 3), strict=True))


@pytest.mark.parametrize(
    ("depth", "told"), [(29, "28 and 34"), (99, "94 and 100"), (22, "28 and 34"), (-5, "28 and 34"), (1001, "1000 and")]
)
def test_unreachable_depth_names_the_two_nearest(depth, told):
    with pytest.raises(ConfigError, match=told):
        Config(resnet_depth=depth)


def test_the_posts_own_numbers_are_explained():
    for number, depth in enumerate((28, 40, 70, 100)):
        with pytest.raises(ConfigError, match=f"wrote {number} for depth {depth}"):
            Config(resnet_depth=number)


def test_words_are_apart_by_blanks_or_commas_and_none_is_no_word():
    told = ("flip,shift", "flip shift", "none", "")
    assert [Config.from_env({"AUGMENT": text}).augment for text in told] == [("flip", "shift")] * 2 + [()] * 2


BAD = {
    "PRESET": "postt",
    "DATASET": None,
    "IMAGE_SHAPE": "30x32x3",
    "AUGMENT": "flip, turn",
    "VALIDATION": "train",
    "RESNET_DEPTH": "deep",
    "DECODER": "flipped",
    "WIDTH": "0",
    "LATENT_DIM": "0",
    "INTERMEDIATE_DIM": "-1",
    "ACTIVATION": "rellu",
    "DROPOUT": "1",
    "INITIALIZATION": "zero",
    "NORM_MOMENTUM": "1",
    "NORM_BATCHES": "-1",
    "OBJECTIVE": "vae",
    "BETA": "-1",
    "KL_WARMUP_STEPS": "-1",
    "MEAN_L2": "nan",
    "LOG_VAR_L2": "inf",
    "BATCH_SIZE": "2.5",
    "EPOCHS": "0",
    "LEARNING_RATE": "fast",
    "SCHEDULE": "step",
    "WARMUP_STEPS": "-1",
    "DECAY": "-0.1",
    "WEIGHT_DECAY": "-1",
    "ADAM_BETA_2": "1",
    "CLIP_NORM": "-1",
    "PATIENCE": "-1",
    "MIN_DELTA": "-1",
    "BLOCK": "large",
    "ORDER": "mid",
    "SHORTCUT": "some",
    "LEARNED_STEP": "a bit",
    "STEM": "-1",
    "PRECISION": "float8",
    "DETERMINISTIC": "perhaps",
    "ROLLBACKS": "-1",
    "CHECKPOINT_SECONDS": "-1",
    "REMAT": "maybe",
    "SEED": f"{2**31 - 4}",
    "OUTDIR": None,
    "CMDLINE": None,
}


def test_every_field_has_a_bad_value_here():
    assert {name.lower() for name in BAD} == set(Config.model_fields)


@pytest.mark.parametrize("name", [name for name, value in BAD.items() if value is not None])
def test_a_bad_value_is_named_with_its_field(name):
    with pytest.raises(ConfigError) as error:
        Config.from_env({name: BAD[name]})
    told = str(error.value)
    assert name.lower() in told
    assert BAD[name].split("x")[0] in told
    assert "\n" not in told


@pytest.mark.parametrize(("name", "value"), [("EPOCHS", "9" * 20), ("RESNET_DEPTH", "6000000000000004")])
def test_what_no_training_could_come_to_an_end_with_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name.lower()} is '{value}'"):
        Config.from_env({name: value})


@pytest.mark.parametrize(
    ("name", "least", "less"),
    [("batch_size", 2, 1), ("seed", 0, -1), ("learning_rate", 1e-9, 0), ("mean_l2", 0, -1e-9), ("log_var_l2", 0, -1e-9)]
    + [("image_shape", shape, less) for shape, less in (((8, 8, 1), (8, 8, 0)), ((8, 16, 2), (0, 16, 2)))]
    + [("image_shape", (16, 8, 1), less) for less in ((16, 12, 1), (12, 16, 1), (16, 0, 1))],
)
def test_the_least_value_is_taken_and_no_less(name, least, less):
    assert getattr(Config(**{name: least}), name) == least
    with pytest.raises(ConfigError, match=name):
        Config(**{name: less})


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        Config.from_env({"WIDTH": "-1", "EPOCHS": "many", "RESNET_DEPTH": "3x", "LATNT_DIM": "4", "DROPUOT": "0.1"})
    told = str(error.value)
    assert len(told.splitlines()) == 5
    assert "LATNT_DIM is no setting; did you mean LATENT_DIM?" in told
    assert "DROPOUT" in told


def test_a_backend_that_keras_has_not_or_that_is_not_installed_is_told(monkeypatch):
    with pytest.raises(ConfigError, match=r"^KERAS_BACKEND is 'pytorch'; expected one of tensorflow, jax, torch$"):
        Config.from_env({"KERAS_BACKEND": "pytorch"})
    monkeypatch.setattr("resnet_vae.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^KERAS_BACKEND is 'jax', which is not installed"):
        Config.from_env({"KERAS_BACKEND": "jax"})


@pytest.mark.parametrize("words", ["sample run", "interpolate run", "evaluate run digits", "verify run"])
def test_a_backend_that_keras_has_not_is_told_where_no_settings_are_read(words, monkeypatch, capsys):
    monkeypatch.setenv("KERAS_BACKEND", "pytorch")
    monkeypatch.setattr(sys, "argv", ["resnet_vae", *words.split()])
    assert main() == 2
    assert capsys.readouterr().err == "error: KERAS_BACKEND is 'pytorch'; expected one of tensorflow, jax, torch\n"


def test_depth_and_shape_are_told_with_the_others():
    with pytest.raises(ConfigError) as error:
        Config.from_env({"WIDTH": "-1", "RESNET_DEPTH": "30", "IMAGE_SHAPE": "9x8x1"})
    assert [line.split()[0] for line in sorted(str(error.value).splitlines())] == [
        "image_shape",
        "resnet_depth",
        "width",
    ]


@pytest.mark.parametrize("depth", IMAGENET)
def test_experiments_refuse_the_depths_of_networks_for_imagenet(depth):
    for settings, name, given in ((Degradation, "DEPTHS", f"8 {depth}"), (Landscape, "DEPTH", f"{depth}")):
        with pytest.raises(ConfigError, match=rf"{name.lower()} is '{given}': {depth} layers are .* for ImageNet"):
            settings.from_env({name: given})
    assert Degradation.from_env({"DEPTHS": "8 20 29 56 110 164 1001"}).depths[-1] == 1001


def test_experiments_refuse_what_is_there_twice():
    with pytest.raises(ConfigError, match="depths is '8 20 8': 8 is there twice"):
        Degradation.from_env({"DEPTHS": "8 20 8"})


MISTYPED = {
    "RESNET_DEPTH": "DEPTH RESNETDEPTH RESNET_DEPHT",
    "LATENT_DIM": "LATENT LATNT_DIM",
    "BATCH_SIZE": "BATCH BATCHSIZE",
    "LEARNING_RATE": "LR LEARNINGRATE",
    "WIDTH": "WIDHT WIDTHS width",
    "EPOCHS": "EPCOHS EPOCH EPOCJS",
    "SEED": "SEDD SEEDS SEDE",
    "ORDER": "ODRER",
    "OUTDIR": "OUTDRI OUT_DIR",
    "SHORTCUT": "SHORCTU SHORTCUTS",
    "DEPTHS": "DEPHTS",
    "SWEEP": "SWEPE SWEP",
    "RUNNER": "RUNER",
    "EVALUATE": "EVALUTE EVALUAET",
}


@pytest.mark.parametrize(("meant", "name"), [(meant, name) for meant in MISTYPED for name in MISTYPED[meant].split()])
def test_a_mistyped_name_is_told_with_the_one_that_is_meant(meant, name):
    with pytest.raises(ConfigError) as error:
        Config.from_env({name: "3"})
    assert str(error.value) == f"{name} is no setting; did you mean {meant}? If not, unset {name}"


def test_a_mistyped_name_is_told_in_python_too():
    with pytest.raises(ConfigError, match=r"^depth is no setting; did you mean resnet_depth\?$"):
        Config(depth=40)


def test_a_name_that_is_an_experiments_setting_is_none_of_a_vaes():
    environ = {"DEPTH": "20", "VAE_DEPTH": "28", "STEPS": "3"}
    assert Transfer.from_env(environ).depth == 20
    Euler.from_env({"LATENT": "3", "DEPHTS": "28", "EVALUTE": "x"} | environ)  # of which it has none
    with pytest.raises(ConfigError, match="DEPTH is no setting; did you mean DEPTHS"):
        Degradation.from_env({"DEPTH": "20"})


def test_environment_that_has_nothing_to_do_with_us_is_left_alone():
    others = ("EDITOR", "LOGNAME", "RESULTS", "TERM", "SED", "SYSTEM", "SLEEP", "DELAY", "RUNNER_OS", "KERAS_HOME")
    Config.from_env(dict(os.environ) | {"DEPTHS": "28 40", "EPOCHS": ""} | dict.fromkeys(others, "x"))


def test_values_and_where_they_came_from():
    config = Config.from_env(
        {"PRESET": "published", "EPOCHS": "7", "BATCH_SIZE": "50", "IMAGE_SHAPE": "64x48x1", "CMDLINE": "1"},
        batch_size="9",
    )
    assert (config.epochs, config.batch_size, config.image_shape, config.cmdline) == (7, 9, (64, 48, 1), True)
    assert {name: getattr(config, name) for name in PUBLISHED if name not in ("epochs", "batch_size")} == {
        name: value for name, value in PUBLISHED.items() if name not in ("epochs", "batch_size")
    }
    assert [Config.from_env({"CMDLINE": text}).cmdline for text in ("yes", "0", "False", "no", "off")] == [True] + [
        False
    ] * 4
    origins = config.origins
    assert origins["epochs"] == "environment (EPOCHS)"
    assert origins["batch_size"] == "argument"
    assert origins["activation"] == "preset"
    assert origins["latent_dim"] == "default"
    told = [line.split(maxsplit=2) for line in config.describe().splitlines()]
    assert [name for name, *_ in told] == [name.upper() for name in Config.model_fields]
    for line in (
        ["IMAGE_SHAPE", "64x48x1", "environment (IMAGE_SHAPE)"],
        ["BATCH_SIZE", "9", "argument"],
        ["MEAN_L2", "0.01", "preset"],
        ["LATENT_DIM", "256", "default"],
    ):
        assert line in told


def test_what_means_the_same_is_the_same():
    assert Config(augment="shift,flip shift") == Config(augment=("flip", "shift"))
    assert Config(outdir=Path("a/b"), dataset=Path("c.npz")) == Config(outdir="a/b", dataset="c.npz")


def test_a_preset_that_is_put_in_later_is_the_preset():
    """What was given stays."""
    given = {"epochs": 7, "width": 0.5}
    for before, after in (("default", "published"), ("published", "default")):
        changed = Config(preset=before, **given).replace(preset=after, width=2.0)
        expected = Config(preset=after, **{**given, "width": 2.0})
        assert changed == expected
        assert changed.origins == expected.origins


def test_a_configuration_is_frozen_and_survives_its_record():
    config = Config(width=0.25, image_shape=(8, 16, 2))
    with pytest.raises(ValidationError):
        config.width = 1
    record = json.loads(json.dumps({"values": config.model_dump(mode="json"), "origins": config.origins}))
    assert Config.from_record(record) == config
    before = {"kl_warmup_steps": 0, "norm_batches": 0, "deterministic": False, "shortcut": "projection"}
    for name, value in before.items():
        del record["values"][name]  # as in records that are older than the setting
        assert getattr(Config.from_record(record), name) == value
    for broken in ({}, [], {"values": 3, "origins": {}}, {"values": {"width": "x"}, "origins": {}}):
        with pytest.raises(ConfigError):
            Config.from_record(broken)


def test_a_runs_folder_has_the_whole_name_of_the_data():
    names = ("cifar10", "data/cifar10.1", "data/tiny.npz", ".")
    folders = [Config(dataset=name).folder for name in names]
    assert folders == [Path(f"runs/{name}-depth-28") for name in ("cifar10", "cifar10.1", "tiny", Path.cwd().name)]
    for settings in (Config, Euler):
        assert settings(outdir="~/here").folder == Path.home() / "here"


def test_package_and_configuration_import_no_backend():
    code = (
        "import sys, resnet_vae; resnet_vae.Config.from_env({});"
        "sys.exit(bool({'tensorflow', 'keras', 'jax', 'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("command", ["config", "train", "finished"])
def test_command_line_tells_mistakes_quickly(command):
    began = processor_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "resnet_vae", command, "--latent-dim", "many"],
        env=os.environ | {"BATCH_SIZE": "x", "SEEDS": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert processor_seconds() - began < 2
    assert done.returncode == 2
    assert not done.stdout
    for told in ("latent_dim is 'many'", "batch_size is 'x'", "did you mean SEED?"):
        assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train --dataset nothere", "DATASET is 'nothere': neither one of digits"),
        ("train --dataset digits --outdir file", "OUTDIR is 'file': file is no folder"),
        ("train --dataset digits --outdir file/run", "OUTDIR is 'file/run': file is no folder"),
        ("config --dataset nothere", "DATASET is 'nothere': neither one of digits"),
        ("config degradation --dataset nothere", "DATASET is 'nothere': neither one of digits"),
        ("config degradatoin", "there is no notebook degradatoin; expected resnet_vae, .*did you mean degradation?"),
        ("config nothere/notebook.ipynb", "there is no notebook nothere/notebook.ipynb; expected resnet_vae, "),
        ("config file", "file is no notebook; expected an .ipynb file"),
        ("evaluate nothere digits", "nothere/config.json is missing"),
        ("evaluate run nothere", "DATASET is 'nothere': neither one of digits"),
        ("evaluate run digits", "run/model.keras is missing"),
        ("sample run -o nothere/x.png", "nothere: No such file or directory"),
        ("interpolate run -o file/x.png", "file: Not a directory"),
        ("reconstruct run -o x.foo", "x.foo is no name for a picture; expected one that ends in .png or .pdf"),
        ("train --depth 40", r"--depth is no option of train \(see .*\); did you mean --resnet-depth\?"),
        ("train --resnet-dept 40", r"--resnet-dept is no option of train \(see .*\); did you mean --resnet-depth\?"),
        ("sample run --epochs 3", r"--epochs is no option of sample \(see python -m resnet_vae sample --help\)$"),
        ("train --width", r"argument --width: expected one argument \(see python -m resnet_vae train --help\)$"),
        ("trian", r"argument COMMAND: invalid choice: 'trian' \(choose from .*\) \(see python -m resnet_vae --help\)$"),
        ("sample", r"the following arguments are required: RUN \(see python -m resnet_vae sample --help\)$"),
        ("sample run more", r"more is one argument too many \(see python -m resnet_vae sample --help\)"),
        ("sample .", ". is a sweep; expected one of the runs below it"),
        ("table run", "run is a run; expected a sweep, the folder above it"),
        ("compare run run", "run/model.keras is missing; models are not kept in git"),
    ],
)
@pytest.mark.usefixtures("without_backend")
def test_what_is_not_there_is_told_before_a_backend_is_imported(tmp_path, words, told):
    (tmp_path / "file").write_text("no folder")
    write_run(tmp_path / "run", 28, 1850.0)
    command = [sys.executable, "-m", "resnet_vae", *words.split()]
    began = processor_seconds()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert processor_seconds() - began < 2
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: {told}", line)


def test_a_python_without_the_packages_is_told_in_a_line(tmp_path):
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-S", "-m", "resnet_vae", "config"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"error: .*python\S* has no pydantic; install it, or in a checkout: make clean install, then source .*\n",
        done.stderr,
    )


def test_a_reader_that_closes_its_pipe_is_no_error(tmp_path):
    command = [sys.executable, "-m", "resnet_vae", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert running.stderr.read() == ""
    assert running.returncode == 128 + signal.SIGPIPE


def test_config_command_documents_every_field():
    done = subprocess.run(
        [sys.executable, "-m", "resnet_vae", "config"], capture_output=True, text=True, check=True, env=os.environ
    )
    for name, field in Config.model_fields.items():
        assert field.description
        assert re.search(rf"^{name.upper()} +{re.escape(field.description)}$", done.stdout, re.MULTILINE)


def test_config_command_has_the_settings_of_each_notebook():
    names = {path.stem for path in (Path(__file__).parent.parent / "notebooks").glob("*.ipynb")}
    assert names == set(NOTEBOOKS)
    done = subprocess.run(
        [sys.executable, "-m", "resnet_vae", "config", "results"], capture_output=True, text=True, check=True
    )
    assert re.search(r"^RESULTS +the sweep's folder", done.stdout, re.MULTILINE)
    assert "WIDTH" not in done.stdout


def test_readme_has_every_field_with_its_default():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name, field in Config.model_fields.items():
        default = "" if field.default in (None, "", ()) else field.default
        assert f"| `{name.upper()}` | {default} | {PUBLISHED.get(name, '')} | {field.description} |" in readme


def test_output_that_is_closed_or_ascii():
    command = f"{sys.executable} -m resnet_vae config"
    for redirected, environ in (("", {"PYTHONIOENCODING": "ascii"}), (">&-", {})):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirected}"],
            env=os.environ | environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert ("resnet_depth" in done.stdout.lower()) != redirected.startswith(">")


def test_nothing_is_written_to_a_closed_stderr():
    """What stands for it is there, as a progress bar needs it."""
    code = "import sys; from resnet_vae.__main__ import main; main(); print(sys.stderr.write('x'), file=sys.stdout)"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" config 2>&-'], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("\n1\n")


def test_what_does_not_make_another_run():
    others = {"outdir", "cmdline", "remat", "checkpoint_seconds", "rollbacks"}
    assert set(Config.model_fields) - set(Config().recipe()) == others


def test_no_bound_is_called_one():
    assert [Config(beta=beta).loss_meaning for beta in (0.5, 2.0)] == ["beta 0.5: no bound", "beta 2: a looser bound"]


@pytest.mark.parametrize("level", ["3", "0", ""])
def test_notices_at_import_are_left_out_and_a_crash_is_told(tmp_path, level):
    """Of a made-up Keras that writes as TensorFlow 2.21 does and ends the process, and of one that is none."""
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}", "TF_CPP_MIN_LOG_LEVEL": level}

    def run(keras, command):
        (tmp_path / "keras.py").write_text(keras)
        return subprocess.run([sys.executable, "-c", command], env=environ, capture_output=True, text=True)

    notices = "WARNING: All log messages before absl::InitializeLog() is called\nI0000 00:00:1 port.cc:153] a notice\n"
    told = "W0000 00:00:1 a warning\nF0000 00:00:1 no AVX, \0\n"
    done = run(f"import os; os.write(2, {(notices + told).encode()}); os.abort()", "import resnet_vae, keras")
    assert done.returncode == -signal.SIGABRT
    assert done.stderr.startswith(told if level == "3" else notices + told)
    later = "import os, resnet_vae\ntry: import keras\nexcept ImportError: os.write(2, b'I0000 later')"
    done = run("import sys; print('a warning', file=sys.stderr); raise ImportError", later)
    assert done.stderr == "a warning\nI0000 later"


def test_a_blank_variable_is_not_set():
    assert Config.from_env({"EPOCHS": " "}).epochs == 100


def test_an_experiment_does_not_write_into_anothers_record():
    for folder, told in (
        ("gradients", "it holds the record of gradients; expected another folder"),
        ("scaling", "it holds the record of a benchmark; expected another folder"),
        ("calm/depth-28", "it is the folder of a run or a sweep; expected another one"),
        ("calm", "it is the folder of a run or a sweep; expected another one"),
    ):
        with pytest.raises(ConfigError, match=f"outdir is '.*{folder}': {told}"):
            Euler.from_env({"OUTDIR": str(RESULTS / folder)})
    for kind, folder in ((Euler, "euler"), (Preactivation, "preactivation")):
        assert kind.from_env({"OUTDIR": str(RESULTS / folder)}).folder == RESULTS / folder


def test_the_readmes_commands_are_those_of_the_recorded_experiments():
    readme, done = (RESULTS.parent / "README.md").read_text(), set()
    for block in re.findall("```sh\n(.*?)```", readme, re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            if not (found := re.fullmatch(r"(.*)scripts/run_notebook\.sh notebooks/(\w+)\.ipynb runs/(\S+)", line)):
                continue
            words, notebook, name = found.groups()
            given = NOTEBOOKS[notebook].from_env(dict(word.split("=", 1) for word in shlex.split(words)))
            recorded = json.loads((RESULTS / name / "record.json").read_text())["settings"]
            values = given.model_dump(mode="json", exclude={"outdir"})
            assert values == {setting: recorded[setting] for setting in values}
            done.add(notebook)
    assert done == {"degradation", "preactivation", "gradients", "euler", "landscape", "transfer"}


def test_an_experiment_does_not_write_among_the_images_it_reads(tmp_path):
    with pytest.raises(UserError, match="within the folder of images, where its pictures would become images; choose"):
        Degradation.from_env({"DATASET": str(tmp_path), "OUTDIR": str(tmp_path / "record")})


def test_an_experiment_does_not_write_over_a_record_that_is_none(tmp_path):
    (tmp_path / "record.json").write_text("[]")
    with pytest.raises(ConfigError, match="it holds the record of a benchmark"):
        Euler.from_env({"OUTDIR": str(tmp_path)})


@pytest.mark.parametrize(("folder", "file"), [("sweep", "depth-28/config.json"), ("experiment", "record.json")])
def test_a_run_does_not_write_into_a_sweeps_or_an_experiments_folder(tmp_path, folder, file):
    place = tmp_path / folder
    (place / file).parent.mkdir(parents=True)
    (place / file).write_text("{}")
    with pytest.raises(UserError, match="the folder of a sweep, an experiment or a benchmark; choose another OUTDIR"):
        is_finished(Config(dataset="digits", outdir=str(place)))


def test_a_folder_of_nobody_is_a_folder_of_that_name():
    assert Config(outdir="~nobody-of-this-name/x").folder == Path("~nobody-of-this-name/x")
    assert Euler(outdir="~nobody-of-this-name/x").folder == Path("~nobody-of-this-name/x")
    with pytest.raises(UserError, match="DATASET is '~nobody-of-this-name': neither one of"):
        check_dataset("~nobody-of-this-name")


def test_a_misspelled_block_is_one_mistake():
    with pytest.raises(ConfigError) as told:
        Config.from_env({"BLOCK": "basics", "RESNET_DEPTH": "32"})
    assert "no network has this depth" not in str(told.value)
    assert "block is 'basics'" in str(told.value)


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (Preactivation, {"WIDTH": "5"}, "width is '5': input should be less than or equal to 4"),
        (Gradients, {"SEED": f"{2**40}"}, "seed is '1099511627776': input should be less than 2147483644"),
        (Transfer, {"CHANNELS": "2"}, "channels is '2': expected 1, 3 or 4, or 0 for those of the first images"),
    ],
)
def test_experiments_refuse_what_their_networks_would(kind, settings, told):
    with pytest.raises(ConfigError, match=told):
        kind.from_env(settings)
