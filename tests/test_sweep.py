"""What scripts/run_all.sh is told to train, and which mistakes it tells before it trains anything."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, once, processor_seconds
from test_results import RESULTS, write_run

from resnet_vae import Config, checkpoints
from resnet_vae.config import ConfigError, UserError
from resnet_vae.sweep import runs_of

pytestmark = once("no backend is asked for a sweep's runs")
SCRIPTS = Path(__file__).parent.parent / "scripts"


def run_all(folder, **settings):
    settings = {name.upper(): str(value) for name, value in {**TINY, "runner": "command", **settings}.items()}
    return subprocess.run(
        [SCRIPTS / "run_all.sh", "sweep"],
        cwd=folder,
        env=os.environ | {"PYTHON": sys.executable} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_combination_is_a_run_with_a_name_and_settings():
    assert runs_of("x", {}) == {f"depth-{depth}": {"RESNET_DEPTH": depth} for depth in ("28", "40", "70", "100")}
    sweep = {"SWEEP": "DATASET AUGMENT DEPTHS", "DATASET": "digits mnist", "AUGMENT": "flip,shift none"}
    runs = runs_of("x", {**sweep, "DEPTHS": "28:20 100", "EPOCHS": "3"})
    assert list(runs) == [
        f"dataset-{dataset}_augment-{words}_depth-{depth}"
        for dataset in ("digits", "mnist")
        for words in ("flip,shift", "none")
        for depth in (28, 100)
    ]
    digits = {"DATASET": "digits", "AUGMENT": "flip,shift"}
    assert runs["dataset-digits_augment-flip,shift_depth-28"] == {**digits, "RESNET_DEPTH": "28", "EPOCHS": "20"}
    assert runs["dataset-digits_augment-flip,shift_depth-100"] == {**digits, "RESNET_DEPTH": "100"}


def test_a_path_in_a_runs_name_makes_no_folders(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((20, 8, 8, 1), "uint8"))
    (name,) = runs_of("x", {"SWEEP": "DATASET", "DATASET": f"{tmp_path}/a.npz"})
    assert name.startswith("dataset-")
    assert "/" not in name


MISTAKES = {
    "SWEEP=LATENTS LATENTS=4+8": "SWEEP names LATENTS; expected DEPTHS or settings.*did you mean LATENT_DIM?",
    "SWEEP=widht widht=1+2": "SWEEP names widht; .*did you mean WIDTH?",
    "SWEEP=WIDTH,DEPTHS": "SWEEP names WIDTH,DEPTHS; expected DEPTHS or settings in capitals, separated by spaces",
    "SWEEP=A-B": "SWEEP names A-B; expected",
    "SWEEP=KERAS_BACKEND KERAS_BACKEND=jax": "SWEEP names KERAS_BACKEND; expected",
    "SWEEP=SHORTCUT": 'SWEEP names SHORTCUT, which is not set; expected a list, as SHORTCUT="a b"',
    "SWEEP=SEED SEED=1 DEPTHS=28": "DEPTHS is set and SWEEP does not name it",
    "SWEEP=DEPTHS+DEPTHS DEPTHS=28+29": "SWEEP names DEPTHS twice",
    "RESNET_DEPTH=40": 'RESNET_DEPTH is set, and a sweep\'s depths are DEPTHS; expected DEPTHS="40" instead',
    "DEPTHS=28:": "DEPTHS holds 28:; expected depths as 28, or with their epochs as 28:20, separated by spaces",
    "DEPTHS=28,40": "DEPTHS holds 28,40; expected depths as 28",
    "DEPTHS=28+30": "resnet_depth is '30'",
    "DEPTHS=28:1+28:2": "depth-28 is there twice",
    "SWEEP=EPOCHS+DEPTHS EPOCHS=5 DEPTHS=28:20": "SWEEP names EPOCHS, and DEPTHS has epochs of its own",
    "SWEEP=WIDTH WIDTH=1+1.0": "width-1 and width-1.0 are the same run",
    "SWEEP=REMAT REMAT=0+1": "remat-0 and remat-1 are the same run",
    "SWEEP=OUTDIR OUTDIR=a+b": "SWEEP names OUTDIR; expected DEPTHS or settings",
    "SWEEP=CMDLINE CMDLINE=0+1": "SWEEP names CMDLINE; expected DEPTHS or settings",
    "WIDTH=abc": "width is 'abc'",
    "WIDHT=1": "WIDHT is no setting; did you mean WIDTH?",
    "DEPHTS=28": "DEPHTS is no setting; did you mean DEPTHS?",
    "RUNNER=notebok": "RUNNER is 'notebok'; expected notebook or command",
    "DATASET=nothere": "DATASET is 'nothere': neither one of digits",
    "EVALUATE=nothere.npz": "EVALUATE is 'nothere.npz': neither one of digits",
    "OUTDIR=there": "OUTDIR is 'there', and a sweep's folder is its argument; expected OUTDIR unset",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_in_a_sweep_is_told_once(given):
    environ = {name: value.replace("+", " ") for name, value in (word.split("=") for word in given.split())}
    with pytest.raises(ConfigError) as error:
        runs_of("x", environ)
    (line,) = str(error.value).splitlines()
    assert re.match(MISTAKES[given], line)


def test_a_sweep_is_not_made_in_a_run_nor_in_an_experiment_nor_in_a_file(tmp_path):
    run, file = tmp_path / "run", tmp_path / "file"
    write_run(run, 28, 1850.0)
    file.write_text("")
    for place, told in (
        (run, "is a run; expected a sweep, the folder above it"),
        (file, "is no folder; expected"),
        (RESULTS / "euler", "holds the record of an experiment or a benchmark; expected the folder of a sweep"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{place} {told}")):
            runs_of(place, {"DATASET": "digits"})


def test_a_run_that_is_evaluated_is_not_evaluated_again(tmp_path):
    """Nor trained: it has no model, so that either would fail."""
    run = tmp_path / "sweep" / "depth-28"
    write_run(run, 28, 1850.0, **TINY, image_shape=(16, 16, 1))
    np.savez(tmp_path / "é.npz", x_train=np.zeros((20, 32, 32, 3), "uint8"))
    (run / "evaluation-é.json").write_text(json.dumps({"dataset": "é.npz"}, indent=2))
    done = run_all(tmp_path, depths="28", evaluate="é.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "depth-28: finished already" in done.stdout


@pytest.mark.usefixtures("without_backend")
def test_all_mistakes_are_told_before_the_first_training(tmp_path):
    """Those of a later depth and of the data, and a folder that is no folder, or another configuration's."""
    write_run(tmp_path / "sweep" / "depth-40", 40, 1850.0)
    (tmp_path / "sweep" / "depth-34").write_text("no folder")
    unfinished = Config(**TINY, resnet_depth=46, seed=7, outdir=str(tmp_path / "sweep" / "depth-46"))
    unfinished.folder.mkdir()
    checkpoints.save(unfinished.folder, {"identity": unfinished.recipe()}, [])
    began = processor_seconds()
    done = run_all(tmp_path, depths="28 30 34 40 46", evaluate="nothere")
    assert processor_seconds() - began < 5
    assert (done.returncode, done.stdout) == (2, "")
    told = (
        "error: EVALUATE is",
        "resnet_depth is '30'",
        "OUTDIR is 'sweep/depth-34'",
        "sweep/depth-40 holds a finished run of another configuration",
        "sweep/depth-46 holds an unfinished run of something else (SEED 7 there, 0 here)",
    )
    for line, beginning in zip(done.stderr.splitlines(), told, strict=True):
        assert line.startswith(beginning)
    assert not (tmp_path / "sweep" / "depth-28").exists()


@pytest.mark.parametrize("script", ["run_all", "table1", "soak", "run_notebook"])
def test_scripts_tell_what_they_do_and_take_no_option_for_a_folder(tmp_path, script):
    kept = tmp_path / "runs" / "soak" / "kept"
    kept.mkdir(parents=True)
    for words, code in (["--help"], 0), (["-h"], 0), (["a", "--folder"], 2), (["a", "b", "c"], 2), ([""], 2):
        done = subprocess.run(
            [SCRIPTS / f"{script}.sh", *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        if code:
            assert not done.stdout
            told = "--folder is no option|c is one argument too many|an argument is empty"
            assert re.fullmatch(f"error: ({told}); expected .*\n", done.stderr)
        else:
            head, *rest = done.stdout.splitlines()
            assert f"{script}.sh" in head
            assert len(rest) >= 4
            assert not [line for line in rest if line.startswith(("#", "set -"))]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert kept.exists()


def test_a_soak_of_no_number_of_seconds_removes_nothing(tmp_path):
    (tmp_path / "runs" / "soak").mkdir(parents=True)
    environ = os.environ | {"PYTHON": sys.executable, "SOAK_SECONDS": "15m"}
    done = subprocess.run([SCRIPTS / "soak.sh"], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    told = "error: SOAK_SECONDS is '15m'; expected a whole number of seconds\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    assert (tmp_path / "runs" / "soak").exists()
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("script", ["run_all", "table1", "soak", "run_notebook"])
def test_scripts_tell_in_a_line_that_there_is_no_python(tmp_path, script):
    (tmp_path / "a.ipynb").write_text("{}")
    environ = os.environ | {"PYTHON": "nopython"}
    words = [SCRIPTS / f"{script}.sh", "a.ipynb"]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: there is no nopython here; make clean install, then source .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ipynb"]


STAND_IN = """#!/bin/sh
case "$*" in
  -c*) exec "$REAL" "$@" ;;
  *" sweep "*) echo depth-28 RESNET_DEPTH=28; echo depth-34 RESNET_DEPTH=34 ;;
esac
echo "$* $OUTDIR $RESNET_DEPTH" >> calls
for word in $FAILS; do case "$*" in *" ${word%:*}"*) exit ${word#*:} ;; esac; done
"""


def write_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def stand_in(tmp_path):
    """What a script asks of Python, and how it ends where "finished:3 train:1" are the exit codes of two commands."""
    write_program(tmp_path / "python", STAND_IN)

    def run(fails, script="run_all", words=("sweep",), **settings):
        environ = {"REAL": sys.executable, "PYTHON": f"{tmp_path}/python", "RUNNER": "command", "FAILS": fails}
        done = subprocess.run(
            [SCRIPTS / f"{script}.sh", *words],
            cwd=tmp_path,
            env=os.environ | environ | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        calls = (tmp_path / "calls").read_text().replace("-m resnet_vae ", "").splitlines()
        return done.returncode, done.stderr, calls

    return run


FAILURES = {
    "finished:3 train:1": "depth-28 depth-34",
    "finished:3 train:4": "depth-28 (in work elsewhere) depth-34 (in work elsewhere)",
    "finished:2": "depth-28 depth-34",
    "evaluate:2": "evaluating sweep/depth-28 evaluating sweep/depth-34",
    "finished:3 evaluate:2": "evaluating sweep/depth-28 evaluating sweep/depth-34",
    "table:2": "table",
}


@pytest.mark.parametrize("fails", FAILURES)
def test_a_sweep_is_finished_when_all_of_it_is(stand_in, fails):
    assert stand_in(fails, EVALUATE="digits")[:2] == (1, f"error: not finished: {FAILURES[fails]}\n")


def test_what_another_process_has_finished_meanwhile_is_finished(stand_in, tmp_path):
    """The one that trained in it when its turn came."""
    for depth in (28, 34):
        write_run(tmp_path / "sweep" / f"depth-{depth}", depth, 1850.0)
    code, told, calls = stand_in("finished:3 train:4", EVALUATE="digits")
    assert (code, told) == (0, "")
    assert [call.split()[1] for call in calls if call.startswith("evaluate")] == ["sweep/depth-28", "sweep/depth-34"]


def test_what_another_process_has_finished_with_other_settings_is_not(stand_in, tmp_path):
    """By then this is known; before, while there is no checkpoint, it is not."""
    asked_again = 'case "$*" in *" finished") [ -f trained ] && exit 2 ;; *" train") touch trained ;; esac\nfor word'
    write_program(tmp_path / "python", STAND_IN.replace("for word", asked_again))
    for depth in (28, 34):
        write_run(tmp_path / "sweep" / f"depth-{depth}", depth, 1850.0)
    code, told, calls = stand_in("finished:3 train:4", EVALUATE=" ")
    assert (code, told) == (1, "error: not finished: depth-34 depth-28\n")
    assert not [call for call in calls if call.startswith("evaluate")]


@pytest.mark.usefixtures("without_backend")
def test_an_unfinished_run_of_other_code_or_another_backend_is_told_before_the_first_training(tmp_path, monkeypatch):
    config = Config(**TINY, resnet_depth=28, outdir=str(tmp_path / "depth-28"))
    config.folder.mkdir()
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    given = {name.upper(): str(value) for name, value in TINY.items()} | {"DEPTHS": "28"}
    for there, told in (({"code": "0"}, "another code"), ({"backend": "jax"}, "BACKEND jax there, tensorflow here")):
        identity = {**config.recipe(), **checkpoints.programs("tensorflow"), **there}
        checkpoints.save(config.folder, {"identity": identity}, [])
        with pytest.raises(ConfigError, match=told):
            runs_of(tmp_path, given)
    checkpoints.save(config.folder, {"identity": {**config.recipe(), **checkpoints.programs("tensorflow")}}, [])
    assert list(runs_of(tmp_path, given | {"ROLLBACKS": "2"})) == ["depth-28"]  # as is advised where it diverges


def test_a_run_by_another_spelling_is_not_another_run(tmp_path):
    """Also where it is in the sweep's folder already, trained or begun, with the shape of its images."""
    write_run(
        tmp_path / "learning_rate-0.01", 28, 1850.0, learning_rate=0.01, dataset="digits", image_shape=(16, 16, 1)
    )
    config = tmp_path / "learning_rate-0.01" / "config.json"
    record = json.loads(config.read_text())
    given = {"SWEEP": "LEARNING_RATE", "DATASET": "digits", "RESNET_DEPTH": "28"}
    for origin in ("given", "default"):
        record["origins"]["image_shape"] = origin
        config.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=r"learning_rate-0\.01 and learning_rate-1e-2 are the same run"):
            runs_of(tmp_path, {**given, "LEARNING_RATE": "1e-2"})
    assert list(runs_of(tmp_path, {**given, "LEARNING_RATE": "2e-2"})) == ["learning_rate-2e-2"]
    config.write_text("{")
    assert list(runs_of(tmp_path, {**given, "LEARNING_RATE": "1e-2"})) == ["learning_rate-1e-2"]


@pytest.mark.parametrize("place", ["bin", "a=b"])
def test_a_sweep_trains_evaluates_and_makes_the_table_in_this_order(stand_in, tmp_path, place):
    expected = [
        call.format(depth)
        for depth in (28, 34)
        for call in ("finished sweep/depth-{0} {0}", "train sweep/depth-{0} {0}", "evaluate sweep/depth-{0} digits  ")
    ]
    (tmp_path / place).mkdir()
    (tmp_path / place / "python").symlink_to(tmp_path / "python")
    code, error, calls = stand_in("finished:3", EVALUATE="digits", PYTHON=f"{tmp_path}/{place}/python")
    assert (code, error) == (0, "")
    assert calls == ["sweep sweep  ", *expected, "table sweep  "]


@pytest.mark.parametrize("jupyter", [True, False])
def test_a_sweep_runs_the_notebook_where_there_is_jupyter(stand_in, tmp_path, jupyter):
    program = STAND_IN.replace("-c*)", f"-c*nbconvert*) exit {int(not jupyter)} ;;\n  -c*)")
    write_program(tmp_path / "python", program)
    code, error, calls = stand_in("finished:3", RUNNER="")
    assert (code, error) == (0, "")
    trained = [call for call in calls if call.startswith("train") or "nbconvert" in call]
    assert ["nbconvert" in call for call in trained] == [jupyter] * 2


def test_the_demo_is_a_sweep_without_mistakes():
    lines = (SCRIPTS.parent / "Makefile").read_text().replace("\\\n", "").splitlines()
    (demo,) = [line for line in lines if line.endswith("scripts/run_all.sh runs/demo")]
    words = [word.split("=", 1) for word in shlex.split(demo) if re.match("[A-Z_]+=", word)]
    assert list(runs_of("x", dict(words))) == ["depth-28", "depth-40"]


def test_a_sweep_with_a_mistake_trains_nothing(stand_in):
    assert stand_in("sweep:2") == (2, "", ["sweep sweep  "])


@pytest.mark.parametrize(
    ("number", "code", "word", "fails"),
    [
        (signal.SIGINT, 130, "train", "finished:3"),
        (signal.SIGTERM, 143, "train", "finished:3"),
        (signal.SIGTERM, 143, "evaluate", ""),
    ],
)
def test_an_interrupted_sweep_stops_its_run_and_goes_no_further(tmp_path, number, code, word, fails):
    write_program(tmp_path / "python", f'{STAND_IN}case "$*" in *{word}*) echo $$ > pid; exec sleep 60 ;; esac\n')
    environ = {"REAL": sys.executable, "PYTHON": f"{tmp_path}/python", "RUNNER": "command", "FAILS": fails}
    environ["EVALUATE"] = "digits"
    calls, pid = tmp_path / "calls", tmp_path / "pid"
    with subprocess.Popen(
        [SCRIPTS / "run_all.sh", "sweep"],
        cwd=tmp_path,
        env=os.environ | environ,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    ) as running:
        while not (pid.exists() and pid.read_text()) and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(number)
        assert running.wait(20) == code
        assert not Path("/proc", pid.read_text().strip()).exists()
        assert running.stderr.read() == "interrupted; the same command goes on\n"
    assert calls.read_text().count(word) == 1


@pytest.mark.parametrize(
    ("given", "depths"),
    [
        ({}, "28:38 40:29 70:18 100:13"),
        ({"EPOCHS": "3"}, "28 40 70 100"),  # each with these, and not with its own
        ({"EPOCHS": "3", "DEPTHS": "28"}, "28"),
    ],
)
def test_table1_trains_both_objectives_where_there_is_no_gpu(stand_in, tmp_path, given, depths):
    write_program(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    write_program(tmp_path / "python", '#!/bin/sh\necho "$SWEEP $OBJECTIVE $DEPTHS $WIDTH" > calls; exit 2')
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, _, calls = stand_in("", "table1", ("table",), PATH=path, **given)
    assert (code, calls) == (2, [f"OBJECTIVE DEPTHS published elbo {depths} 0.25"])


@pytest.mark.parametrize(("words", "place"), [((), "there"), (("here",), "here")])
def test_a_notebooks_folder_is_the_argument_or_outdir(stand_in, tmp_path, words, place):
    (tmp_path / "a.ipynb").write_text("{}")
    code, _, calls = stand_in("", "run_notebook", ("a.ipynb", *words), OUTDIR="there")
    assert code == 0
    assert f"--output-dir {place} --output a.ipynb --ExecutePreprocessor.timeout=-1 {place} " in calls[-1]
    assert (tmp_path / place).is_dir()


def test_a_home_folder_that_the_shell_left_alone_is_found(stand_in, tmp_path):
    """By the scripts and by the command line alike."""
    (tmp_path / "a.ipynb").write_text("{}")
    code, _, calls = stand_in("", "run_notebook", ("a.ipynb", "~/here"), HOME=str(tmp_path))
    assert code == 0
    assert f"--output-dir {tmp_path}/here " in calls[-1]
    done = subprocess.run(
        [sys.executable, "-m", "resnet_vae", "table", "~/nothing"],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"{tmp_path}/nothing has no finished runs" in done.stderr


@pytest.mark.parametrize("script", ["run_all", "table1", "run_notebook"])
def test_a_home_folder_that_is_not_in_the_environment_is_the_users_own(stand_in, tmp_path, monkeypatch, script):
    """As where a scheduler starts it; without one a sweep would go to the root of the disk."""
    monkeypatch.delenv("HOME")
    own = os.path.expanduser("~")
    (tmp_path / "a.ipynb").write_text("{}")
    words = ["a.ipynb", "~/."] if script == "run_notebook" else ["~/here"]
    code, told, calls = stand_in("", script, words, CUDA_VISIBLE_DEVICES="")
    assert (code, told) == (0, "")
    assert any(f"{own}/" in call for call in calls)


@pytest.mark.parametrize(
    ("sees", "given", "told"),
    [
        ("jax", {}, "jax 1 250 flip published 28:32 40:32 70:32 100:32"),
        ("tensorflow", {}, "tensorflow 1 250 flip published 28:32 40:32 70:32 100:32"),
        ("torch", {"KERAS_BACKEND": "torch", "WIDTH": "2", "OBJECTIVE": "elbo"}, "torch 2 250 flip elbo 28:32"),
        ("jax", {"KERAS_BACKEND": "tensorflow"}, "error: this machine has an NVIDIA GPU that tensorflow cannot use;"),
        ("jax", {"CUDA_VISIBLE_DEVICES": ""}, "0.25 100 published elbo 28:38"),
        ("jax", {"CUDA_VISIBLE_DEVICES": "-1"}, "0.25 100 published elbo 28:38"),
        ("nothing", {}, "error: this machine has an NVIDIA GPU that neither JAX nor TensorFlow can use; expected a"),
    ],
)
def test_table1_takes_the_backend_that_can_use_the_gpu(tmp_path, sees, given, told):
    """With stand-ins for what tells of a GPU and for Python, which writes what it is asked to train."""
    stand_ins = {
        "nvidia-smi": "",
        "python": f"""
            case "$*" in
              -c*) case "$*" in *"import {sees}"* | *"sys, {sees}"*) exit 0 ;; *) exit 1 ;; esac ;;
              *) echo $KERAS_BACKEND $WIDTH $BATCH_SIZE $AUGMENT $OBJECTIVE $DEPTHS >&2; exit 2 ;;
            esac""",
    }
    for name, script in stand_ins.items():
        write_program(tmp_path / name, f"#!/bin/sh{script}\n")
    left_out = ("PYTHON", "KERAS_BACKEND", "RUNNER", "CUDA_VISIBLE_DEVICES")
    bare = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [SCRIPTS / "table1.sh", tmp_path / "table"],
        env=bare | {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(told)
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("script", ["run_all.sh", "run_notebook.sh", "table1.sh", "soak.sh"])
def test_scripts_are_found_through_links_and_whatever_cdpath_is(script, tmp_path):
    (tmp_path / "link.sh").symlink_to(SCRIPTS / script)
    for command in ([tmp_path / "link.sh", "--help"], [f"scripts/{script}", "--help"]):
        done = subprocess.run(
            command,
            cwd=SCRIPTS.parent,
            env=os.environ | {"PYTHON": sys.executable, "CDPATH": f".:{SCRIPTS.parent}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert script in done.stdout


def test_a_blank_variable_is_not_set():
    blank = dict.fromkeys(("OUTDIR", "SWEEP", "DEPTHS", "RESNET_DEPTH", "RUNNER", "EVALUATE"), " ")
    assert runs_of("x", {**blank, "DATASET": "digits"}) == runs_of("x", {"DATASET": "digits"})
