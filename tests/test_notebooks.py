"""The notebooks and the sweep, headlessly, as a person runs them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import nbformat
import numpy as np
import pytest
from conftest import TINY, once

from resnet_vae.experiments.gradients import CHAIN_WIDTH, of_chain
from resnet_vae.experiments.record import read_tables
from resnet_vae.verify import verify

HOME = Path(__file__).parent.parent
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.ipynb"))


def environment(**settings):
    settings = {name.upper(): str(value) for name, value in {**TINY, "epochs": 1, **settings}.items()}
    return os.environ | {"PYTHON": sys.executable} | settings


def test_notebooks_are_committed_without_outputs():
    assert len(NOTEBOOKS) == 8
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None


def processes_with(text):
    """The processes whose environment holds a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if text.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:  # ended meanwhile
            pass
    return found


def test_sweep_through_the_notebook_interrupted_and_run_again(tmp_path):
    """Stopped within the second depth, both are kept as far as they came; the same command trains what is missing."""
    sweep = tmp_path / "sweep"
    command = [HOME / "scripts" / "run_all.sh", sweep]
    options = {"cwd": tmp_path, "env": environment(depths="28 34:8"), "text": True}
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options)
        deadline = time.monotonic() + 400
        while "epoch 1/8  loss" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            assert running.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)  # a SIGINT is ignored where the tests run in a shell's background
        assert running.wait(60) == 143
    log = (tmp_path / "log").read_text()
    assert "epoch 1/1  loss" in log
    assert "interrupted; the notebook as far as it came is" in log
    assert (sweep / "depth-28" / "metrics.json").exists()
    assert not (sweep / "depth-34" / "metrics.json").exists()
    assert (sweep / "depth-34" / "checkpoint").exists()
    assert "InterruptedTrainingError" in str(nbformat.read(sweep / "depth-34" / "resnet_vae.ipynb", 4).cells)
    assert not processes_with(str(sweep / "depth-34"))
    first = (sweep / "depth-28" / "metrics.json").stat().st_mtime_ns

    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "depth-28: finished already" in done.stdout
    assert "going on in epoch" in done.stdout
    assert len((sweep / "depth-34" / "history.csv").read_text().splitlines()) == 1 + 8
    assert (sweep / "depth-28" / "metrics.json").stat().st_mtime_ns == first
    for depth in (28, 34):
        run = sweep / f"depth-{depth}"
        cells = nbformat.read(run / "resnet_vae.ipynb", 4).cells
        assert all(cell.execution_count for cell in cells if cell.cell_type == "code")
        pictures = {"curves.png", "reconstructions.png", "samples.png", "interpolations.png"}
        assert pictures <= {path.name for path in run.iterdir()}
        assert f"| depth-{depth} | {depth} |" in done.stdout
    assert {"table.md", "table.csv", "table.tex", "losses_by_depth.png"} <= {path.name for path in sweep.iterdir()}

    shown = subprocess.run(
        [HOME / "scripts" / "run_notebook.sh", HOME / "notebooks" / "results.ipynb", tmp_path / "shown"],
        cwd=tmp_path,
        env=environment(results=sweep),
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    outputs = [
        output
        for cell in nbformat.read(tmp_path / "shown" / "results.ipynb", 4).cells
        for output in cell.get("outputs", [])
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6


def kernels_that_ignore_sigint(text):
    """The notebook kernels whose environment holds a text and which ignore SIGINT."""
    found = []
    for process in processes_with(text):
        try:
            status = Path("/proc", process, "status").read_text()
            kernel = b"ipykernel_launcher" in Path("/proc", process, "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        ignored = int(re.search("SigIgn:\\s*([0-9a-f]+)", status)[1], 16)
        if kernel and ignored & 1 << signal.SIGINT - 1:
            found.append(process)
    return found


@once("the scripts are the same on every backend")
def test_a_soak_is_recorded(tmp_path):
    """One sweep, killed now and then."""
    done = subprocess.run(
        [HOME / "scripts" / "soak.sh", "record"],
        cwd=tmp_path,
        env=environment(soak_seconds=0, epochs=1, depths="28", cuda_visible_devices=-1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert (record["sweeps"], record["runs"], record["runs_that_differ"]) == (1, 1, 0)
    assert (record["backend"], record["devices"]) == ("tensorflow", ["cpu:0"])
    assert (tmp_path / "runs" / "soak" / "compare.log").read_text() == "differences: 0\n"


@once("the package is used in the same way on every backend")
def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """One block after the other, with less to train."""
    monkeypatch.chdir(tmp_path)
    text = (HOME / "README.md").read_text()
    blocks = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    code = "\n".join(blocks)
    for given, less in (("resnet_depth=40, width=0.25, epochs=20", "width=0.0625, epochs=1"), ("epochs=2", "epochs=1")):
        assert code.count(given) == 1
        code = code.replace(given, less)
    names = {}
    exec(code, names)
    assert names["images"].shape == (1295, 16, 16, 1)
    assert names["model"].output_shape == (None, 5)


@once("the scripts are the same on every backend")
def test_a_signal_while_the_kernel_starts_is_not_lost(tmp_path):
    """The kernel ignores it then; no cell is begun afterwards.

    In a folder whose name is a pattern, too, and with another Python's Jupyter before this one's.
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import time\ntime.sleep(300)")])
    (tmp_path / "old [copy]").mkdir()
    nbformat.write(notebook, tmp_path / "old [copy]" / "long.ipynb")
    (tmp_path / "jupyter-nbconvert").write_text("#!/bin/sh\nexit 3")
    (tmp_path / "jupyter-nbconvert").chmod(0o755)
    command = [HOME / "scripts" / "run_notebook.sh", tmp_path / "old [copy]" / "long.ipynb", tmp_path / "out"]
    environ = environment()
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    options = {"env": environ, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **options)
    deadline = time.monotonic() + 200
    while not (seen := kernels_that_ignore_sigint(str(tmp_path / "out"))) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    told, _ = running.communicate(timeout=100)
    assert seen, told
    assert running.returncode == 143, told
    assert "interrupted; the notebook as far as it came is" in told
    assert not processes_with(str(tmp_path / "out"))


def test_sweep_by_the_command_line_goes_on_after_a_failure(tmp_path):
    """A folder in use, and a depth with a number of epochs of its own; the sweep of another setting, too.

    In a bash without what came after version 3, which is macOS's.
    """
    (tmp_path / "former_bash").write_text("enable -n mapfile readarray")
    (tmp_path / "sweep" / "decoder-mirrored_depth-34").mkdir(parents=True)
    with filelock.FileLock(tmp_path / "sweep" / "decoder-mirrored_depth-34" / "lock"):
        done = subprocess.run(
            [HOME / "scripts" / "run_all.sh", "sweep"],
            cwd=tmp_path,
            env=environment(
                sweep="DECODER DEPTHS", decoder="mirrored", depths="34:1 28:2", runner="command", bash_env="former_bash"
            ),
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "depth-34 is in use by another process" in done.stderr
    assert "not finished: decoder-mirrored_depth-34 (in work elsewhere)" in done.stderr
    assert "| decoder-mirrored_depth-28 | 28 |" in done.stdout
    run = tmp_path / "sweep" / "decoder-mirrored_depth-28"
    assert len((run / "history.csv").read_text().splitlines()) == 1 + 2
    assert (run / "samples.png").exists()
    assert "Traceback" not in done.stderr


@once("the same sweep on every backend, whose parts are tested on each")
def test_table1_in_one_command(tmp_path):
    """The script of the post's table, tiny: it trains, evaluates on other images, makes the table, and goes on.

    The second time the other images are in another file of the same name.
    """
    rng = np.random.default_rng(0)
    (tmp_path / "more").mkdir()
    for name, count in (("train", 32), ("other", 32), ("more/other", 16)):
        parts = {part: rng.integers(0, 256, (count, 8, 8, 3), "uint8") for part in ("x_train", "x_test")}
        np.savez(tmp_path / f"{name}.npz", **parts)
    settings = {"dataset": "train.npz", "depths": "28:1", "batch_size": 16}
    for objective, other in (("published", "other"), ("published elbo", "more/other")):  # as if stopped after a run
        done = subprocess.run(
            [HOME / "scripts" / "table1.sh", "table"],
            cwd=tmp_path,
            env=environment(objective=objective, evaluate=f"{other}.npz", **settings),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert "objective-published_depth-28: finished already" in done.stdout
    runs = sorted(path.parent for path in (tmp_path / "table").glob("*/metrics.json"))
    assert [run.name for run in runs] == ["objective-elbo_depth-28", "objective-published_depth-28"]
    for run in runs:
        assert f"| {run.name} |" in done.stdout
        assert json.loads((run / "config.json").read_text())["values"]["validation"] == "test"
        evaluations = [json.loads(path.read_text()) for path in run.glob("evaluation-other*.json")]
        counts = [16] if "elbo" in run.name else [16, 32]
        assert sorted(evaluation["images"] for evaluation in evaluations) == counts
        assert min(evaluation["loss"] for evaluation in evaluations) > 0
    assert "| the post's | 100 | published |" in done.stdout
    assert verify(tmp_path / "table") == []


def run_experiment(name, folder, **settings):
    """Execute an experiment's notebook at a small size; its record must be whole."""
    done = subprocess.run(
        [HOME / "scripts" / "run_notebook.sh", HOME / "notebooks" / f"{name}.ipynb", folder],
        env=os.environ | {"PYTHON": sys.executable} | {key.upper(): str(value) for key, value in settings.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verify(folder) == []
    assert json.loads((folder / "record.json").read_text())["command"] == "a notebook"
    return read_tables(folder)


@once("the same code on every backend, which the tests of its parts run on each")
def test_notebook_of_euler_steps(tmp_path):
    """By the kernel of the Python that runs it, whatever kernel of that name the user has installed."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["false"], "display_name": "another Python", "language": "python"}))
    users = {"jupyter_data_dir": tmp_path / "jupyter", "jupyter_prefer_env_path": 0}
    small = {"finest": 64, "layers": 2, "repetitions": 1, "epochs": 3, "points": 20}
    tables = run_experiment("euler", tmp_path / "euler", **small, **users)
    assert tables["euler"][-1]["order"] == pytest.approx(1, abs=0.1)
    fixed, learned, longer = tables["spirals"]
    assert [row["tau"] for row in tables["spirals"]] == ["fixed", "learned", "fixed at the learned mean"]
    assert fixed["mean_tau"] == 0.5 != learned["mean_tau"]
    assert longer["mean_tau"] == pytest.approx(learned["mean_tau"], rel=1e-6)


@once("the same code on every backend, which the tests of its parts run on each")
def test_notebook_of_gradients(tmp_path):
    """Deep plain chains against residual ones; the networks' layers are all there. It prints a × on any terminal."""
    small = {
        "pythonioencoding": "ascii",
        "depths": "4,40",
        "classifier_depths": "20",
        "vae_depths": "28",
        "width": 0.0625,
        "batch_size": 4,
    }
    rows = run_experiment("gradients", tmp_path, repetitions=3, **small)["gradients"]

    def norms(**chosen):
        return [row["norm"] for row in rows if all(row[key] == value for key, value in chosen.items())]

    shrinking, growing = "chain, weights × 0.8", "chain, weights × 1.6"
    plain = {depth: norms(network=shrinking, kind="plain", depth=depth)[0] for depth in (4, 40)}
    assert plain[40] < 1e-2 * plain[4]
    assert norms(network=shrinking, kind="residual", depth=40)[0] > 0.1
    assert norms(network=growing, kind="residual", depth=40)[0] > 1e2
    assert len(norms(network="VAE", kind="plain")) == len(norms(network="VAE", kind="residual")) == 24
    assert len(norms(network="classifier", kind="residual")) == 18
    chains = [row for row in rows if row["network"] == shrinking and row["depth"] == 4 and row["kind"] == "plain"]
    seeds = np.array([of_chain(4, CHAIN_WIDTH, 0.8, False, seed) for seed in range(3)])
    for column, reduced in (
        ("norm", seeds.prod(axis=0) ** (1 / 3)),
        ("lowest", seeds.min(0)),
        ("highest", seeds.max(0)),
    ):
        np.testing.assert_allclose([row[column] for row in chains], reduced, rtol=1e-6)


SMALL = {"width": 0.0625, "epochs": 2, "batch_size": 256, "depth": 8, "vae_depth": 28}


@once("the same code on every backend, which the tests of its parts run on each")
def test_notebook_of_the_loss_landscape(tmp_path):
    """The networks' own losses are in the middle of their surfaces and of their lines, and at their paths' ends."""
    tables = run_experiment("landscape", tmp_path, **SMALL, points=3, images=20, reach=0.5)
    assert len(tables["surfaces"]) == 4 * 2 * 9
    for network in ("classifier", "VAE"):
        for kind in ("plain", "residual"):
            surface, line, path = (
                [row for row in tables[name] if (row["network"], row["kind"]) == (network, kind)]
                for name in ("surfaces", "lines", "paths")
            )
            assert [max(row["x"] for row in rows if row.get("plane") != "path") for rows in (surface, line)] == [
                0.5,
                0.5,
            ]
            middle = [row["loss"] for row in surface if row["plane"] == "random" and row["x"] == row["y"] == 0]
            assert middle == [row["loss"] for row in line if row["x"] == 0]
            assert [row["epoch"] for row in path] == [0, 1, 2]
            assert path[-1]["x"] == pytest.approx(0, abs=1e-9)


@once("the same code on every backend, which the tests of its parts run on each")
def test_notebook_of_transfer(tmp_path):
    """Each way, with other channels, too."""
    rows = run_experiment("transfer", tmp_path, **SMALL, labels="1", steps=2, repetitions=1, channels=3)["transfer"]
    assert len(rows) == 2 * 3
    assert {(row["network"], row["way"]) for row in rows} == {
        (network, way) for network in ("classifier", "VAE") for way in ("scratch", "frozen", "fine-tuned")
    }
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


@once("the same code on every backend, which the tests of its parts run on each")
def test_notebook_of_degradation(tmp_path):
    """Over two seeds: deeper plain networks train worse than shallower ones, and than residual ones as deep."""
    small = {"image_shape": "8x8x1", "width": 0.125, "learning_rate": 0.01, "epochs": 4, "repetitions": 2}
    networks = {"networks": "classifier VAE", "depths": "8 20", "vae_depths": "28 52"}
    tables = run_experiment("degradation", tmp_path, **networks, **small)
    losses = {(row["network"], row["kind"], row["depth"]): row for row in tables["summary"]}
    assert {row["seeds"] for row in losses.values()} == {2}
    for network, shallow, deep in (("classifier", 8, 20), ("VAE", 28, 52)):
        assert losses[network, "plain", deep]["loss"] > losses[network, "plain", shallow]["loss"] + 0.3
        assert losses[network, "plain", deep]["lowest"] > losses[network, "plain", shallow]["loss"]
        assert losses[network, "residual", deep]["highest"] < losses[network, "plain", deep]["lowest"]


@once("the same code on every backend, which the tests of its parts run on each")
def test_notebook_of_preactivation(tmp_path):
    small = {"depths": 11, "width": 0.0625, "epochs": 1, "batch_size": 256, "repetitions": 1}
    kinds = [row["kind"] for row in run_experiment("preactivation", tmp_path, **small)["summary"]]
    assert kinds == ["residual", "pre-activation"]


OURS = """
from resnet_vae.config import UserError
class BusyError(UserError):
    exit_code = 4
raise BusyError("the folder is in use")
"""


@once("the scripts are the same on every backend")
@pytest.mark.parametrize(
    ("cell", "code", "told"),
    [
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import os; os._exit(1)", 1, "Kernel died"),
        (OURS, 4, r"\A(\[IPKernelApp\] .*\n)?error: the folder is in use\n\Z"),
    ],
    ids=["error", "death", "ours"],
)
def test_a_notebook_that_fails_is_kept_as_far_as_it_came(tmp_path, cell, code, told):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in ("print('so far')", cell)]
    )
    nbformat.write(notebook, tmp_path / "failing.ipynb")
    done = subprocess.run(
        [HOME / "scripts" / "run_notebook.sh", tmp_path / "failing.ipynb", tmp_path / "out"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert "so far" in done.stdout
    assert re.search(told, done.stderr)
    kept = nbformat.read(tmp_path / "out" / "failing.ipynb", 4)
    assert kept.cells[0].outputs[0].text == "so far\n"


@once("the scripts are the same on every backend")
def test_a_refused_run_leaves_the_notebook_of_the_finished_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    (out / "failing.ipynb").write_text("the finished run's")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(OURS)]), tmp_path / "failing.ipynb")
    script = [HOME / "scripts" / "run_notebook.sh", tmp_path / "failing.ipynb", out]
    done = subprocess.run(script, env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (4, "error: the folder is in use")
    assert (out / "failing.ipynb").read_text() == "the finished run's"


@once("the scripts are the same on every backend")
def test_two_notebooks_at_once_in_one_folder(tmp_path):
    for name in ("one", "two"):
        cells = [nbformat.v4.new_code_cell(source) for source in ("import time; time.sleep(3)", f"print({name!r})")]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / f"{name}.ipynb")
    script, options = HOME / "scripts" / "run_notebook.sh", {"cwd": tmp_path, "env": environment(), "text": True}
    running = [
        subprocess.Popen([script, f"{name}.ipynb", name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        for name in ("one", "two")
    ]
    for name, process in zip(("one", "two"), running, strict=True):
        output, _ = process.communicate()
        assert (process.returncode, name in output.splitlines()) == (0, True), output
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "one.ipynb", "two.ipynb"}


@once("the scripts are the same on every backend")
def test_run_notebook_tells_mistakes_before_it_starts(tmp_path):
    script = HOME / "scripts" / "run_notebook.sh"
    missing = subprocess.run([script, "no.ipynb"], capture_output=True, text=True, check=False, env=environment())
    assert (missing.returncode, "no.ipynb is no file" in missing.stderr) == (2, True)
    for name, bad, told in (
        ("resnet_vae.ipynb", {"latent_dim": "some"}, "latent_dim is 'some'"),
        ("degradation.ipynb", {"depths": "8 9"}, "depths is '8 9': expected 6n + 2 or 9n + 2 layers"),
        ("resnet_vae.ipynb", {"dataset": "nothere"}, "DATASET is 'nothere': neither one of digits"),
        ("../README.md", {}, "README.md is no notebook"),
    ):
        done = subprocess.run(
            [script, HOME / "notebooks" / name, tmp_path / "out"],
            capture_output=True,
            text=True,
            check=False,
            env=environment(**bad),
        )
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
