"""The table from run folders alone, without a backend."""

import errno
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import once
from matplotlib.colors import to_hex
from matplotlib.image import imread, imsave

from resnet_vae import Config
from resnet_vae.__main__ import main
from resnet_vae.config import UserError
from resnet_vae.plots import MARKERS, curves, losses_by_epoch, of_sweep
from resnet_vae.records import FIGURES, HASHED, Run, read_run, read_sweep, sha256_of, whole
from resnet_vae.results import POST, swept, table_rows, write_table
from resnet_vae.verify import _parameters, verify

pytestmark = once("tables and figures are the same on every backend")
COUNTED = functools.cache(_parameters)
POSTS = "the post's own figures (each the lowest of its epochs: 384, 274, 209, ?)"
RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture(autouse=True)
def networks_are_counted_once(monkeypatch):
    monkeypatch.setattr("resnet_vae.verify._parameters", COUNTED)


def write_run(folder, depth, loss, name="cifar10", **settings):
    """A run folder as training writes it, with made-up figures."""
    folder.mkdir(parents=True)
    config = Config(**{"resnet_depth": depth, "image_shape": (32, 32, 3), **settings})
    figures = {"loss": loss, "reconstruction": loss - 40, "kl": 40.0, "penalty": 0.0}
    files = {
        "config.json": {"values": config.model_dump(mode="json"), "origins": config.origins},
        "metrics.json": {
            "parameters": 1234567,
            "epochs": settings.get("epochs", 2),
            "best_epoch": 2,
            "hours": 1.5,
            "train": figures | {"loss": loss - 5},
            "validation": figures,
            "validation_floor": 1683.0,
            "test": figures | {"loss": loss + 1},
            "test_floor": 1684.0,
        },
        "provenance.json": {"data": {"name": name}},
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    names = ["epoch", *FIGURES, *(f"val_{figure}" for figure in FIGURES)]
    rows = [[epoch, *[loss + 10 / epoch] * 8] for epoch in (1, 2)]
    (folder / "history.csv").write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n")


@pytest.fixture
def sweep(tmp_path):
    write_run(tmp_path / "depth-40", 40, 1840.0, validation="test")
    write_run(tmp_path / "depth-28", 28, 1850.0, validation="test")
    write_run(tmp_path / "post_28", 28, 1800.25, name="a_b<|$%\\", objective="published", beta=0.5, validation="test")
    (tmp_path / "unfinished").mkdir()
    return tmp_path


EXPECTED = """\
| depth-28 | 28 | elbo | 1 | 1,234,567 | 2 | 1.5 | 1845.0 | 1850.0 | 1810.0 | 40.00 | 127.0 | 1851.0 |
| depth-40 | 40 | elbo | 1 | 1,234,567 | 2 | 1.5 | 1835.0 | 1840.0 | 1800.0 | 40.00 | 117.0 | 1841.0 |
| post_28 | 28 | published, beta 0.5 | 1 | 1,234,567 | 2 | 1.5 | 1795.2 | 1800.2 | 1760.2 | 40.00 | 77.2 | 1801.2 |
| the post's | 28 | published | 1 | 26,815,683 | 384 | 79.2 | 1790.4 | 1794.7 | 1763.3 | 32.79 |  |  |
"""


def test_table_is_the_runs_beside_the_posts_rows(sweep):
    markdown = write_table(read_sweep(sweep), sweep)
    assert EXPECTED in markdown
    assert markdown.count("| the post's |") == 4
    for told in ("VALIDATION=test", "no bound on the likelihood", "Where beta is not 1", "a_b&lt;\\|$%\\"):
        assert told in markdown
    assert (sweep / "table.md").read_text() == markdown
    csv = (sweep / "table.csv").read_text().splitlines()
    assert csv[1] == "depth-28,28,elbo,1.0,1234567,2,1.5,1845.0,1850.0,1810.0,40.0,127.0,1851.0"
    assert csv[-1] == "the post's,100,published,1.0,57901251,,164.7,1782.3,1804.0,1787.75,29.94,,"
    latex = (sweep / "table.tex").read_text()
    assert r"post\_28 & 28 & published, beta 0.5 & 1 & 1,234,567" in latex
    assert latex.count("\\\\\n") == 1 + len(table_rows(read_sweep(sweep)))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("cifar10", {}), ("digits", {"objective": "published"}), ("cifar10", {"objective": "published", "beta": 0.5})],
)
def test_a_table_that_cannot_be_compared_with_the_post_says_so(tmp_path, name, settings):
    write_run(tmp_path / "a", 28, 1850.0, name, **settings)
    markdown = write_table(read_sweep(tmp_path), tmp_path)
    assert f"Images: {name}." in markdown
    assert "They must not be compared with the others, of other images or another objective." in markdown
    write_run(tmp_path / "b", 28, 1850.0, "cifar10", objective="published")
    assert "They must not be compared with row a, of other" in write_table(read_sweep(tmp_path), tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert "They must not be compared" not in write_table(read_sweep(tmp_path), tmp_path)


def test_what_was_swept_has_a_column_and_a_line_of_its_own(tmp_path):
    for number, (shortcut, augment) in enumerate([("projection", ("flip", "shift")), ("none", ())]):
        for depth in (28, 100):
            write_run(tmp_path / f"{shortcut}-{depth}", depth, 1850.0 + number, shortcut=shortcut, augment=augment)
    header, _, first, *_ = write_table(read_sweep(tmp_path), tmp_path).splitlines()
    assert "| Width | Augment | Shortcut | Parameters |" in header
    assert first.startswith("| none-28 | 28 | elbo | 1 | none | none | 1,234,567 |")
    figures = of_sweep(read_sweep(tmp_path))
    labels = [line.get_label() for line in figures["losses_by_depth"].axes[0].get_lines()]
    assert "negative ELBO, augment flip shift, shortcut projection (2 epochs)" in labels
    assert not any("the post's own" in label for label in labels)  # they are of another objective
    labels = [line.get_label() for line in figures["losses_by_epoch"].axes[0].get_lines()]
    assert "depth 100, elbo, augment none, shortcut none" in labels
    figure = losses_by_epoch([run for run in read_sweep(tmp_path) if run.config.resnet_depth == 100])
    assert figure.get_suptitle() == "depth 100, elbo"
    assert "augment none, shortcut none" in [line.get_label() for line in figure.axes[0].get_lines()]


def test_what_most_runs_have_is_told_once(tmp_path):
    changes = [{}, {"shortcut": "none"}, {"order": "pre"}, {"order": "pre", "shortcut": "none"}]
    changes += [{name: value} for name, value in (("stem", 2), ("learned_step", True), ("dropout", 0.5))]
    for number, change in enumerate(changes):
        write_run(tmp_path / f"run-{number}", 28, 1850.0, **change)
        write_run(tmp_path / f"run-{number}-100", 100, 1850.0, **change)
    (axes,) = of_sweep(read_sweep(tmp_path))["losses_by_depth"].axes
    labels = [label for label in axes.get_legend_handles_labels()[1] if label.startswith("negative ELBO")]
    usual = "order post, shortcut pool, learned step False, stem 0, dropout 0.0"
    expected = ["shortcut none", "order pre", "order pre, shortcut none", "stem 2", "learned step True", "dropout 0.5"]
    assert sorted(labels) == sorted(f"negative ELBO, {told} (2 epochs)" for told in [usual, *expected])


def test_long_trainings_have_their_second_half_beside(tmp_path):
    """Each its own, where differences of a few nats are to be seen."""
    losses = {28: [2000.0, 1900.0, *range(1810, 1802, -1)], 100: [1990.0, 1880.0, 1815.0]}
    runs = []
    for depth, values in losses.items():
        rows = [
            {"epoch": float(epoch), **dict.fromkeys(FIGURES, value), **{f"val_{name}": value for name in FIGURES}}
            for epoch, value in enumerate(values, 1)
        ]
        runs.append(Run(tmp_path, Config(resnet_depth=depth), rows, {}, {}))
    whole, late = losses_by_epoch(runs).axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in late.get_lines()}
    assert drawn["depth 28, elbo"] == [[6, 1807], [7, 1806], [8, 1805], [9, 1804], [10, 1803]]
    assert drawn["depth 100, elbo"] == [[2, 1880], [3, 1815]]
    assert late.get_ylim()[1] < whole.get_ylim()[1] - 100
    rows = [dict.fromkeys(rows[0], 9000.0) | {"epoch": epoch} for epoch in range(1, 9)]
    late = losses_by_epoch([*runs, *runs, Run(tmp_path, Config(resnet_depth=40), rows, {}, {})]).axes[1]
    assert late.get_ylim()[1] < 2500
    assert late.get_title() == "each run's second half\n(losses up to 9,000 left out)"


def test_the_figure_has_the_posts_losses_beside_those_that_they_can_be_compared_with(tmp_path):
    for depth in (100, 28):
        write_run(tmp_path / f"{depth}", depth, 1800.0 + depth, objective="published")
    (axes,) = of_sweep(read_sweep(tmp_path))["losses_by_depth"].axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    ours = list(zip(*lines["ours, the post's objective: no bound (2 epochs)"].get_data(), strict=True))
    posts = list(zip(*lines[POSTS].get_data(), strict=True))
    assert ours == [(28, 1828.0), (100, 1900.0)]
    assert posts == [(28, 1794.7), (40, 1795.7), (70, 1799.0), (100, 1804.0)]


@pytest.mark.parametrize(
    ("training", "validation", "told"),
    [
        ([40.0], [45.0], None),
        ([45.0], [40.0], None),
        ([40.0], [40.0], None),
        ([40.0, 39.9], [45.0, 44.9], None),  # above, but nothing would be left to be seen
        ([50.0, 40.0], [55.0, 45.0], None),
        ([50.0, 40.0], [300.0, 45.0], "validation up to 300,\nabove the figure"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_figures_of_few_epochs(tmp_path, training, validation, told):
    """All points are to be seen, at whole epochs, but for those that are said to be above the figure."""
    rows = [
        {"epoch": float(epoch), **dict.fromkeys(FIGURES, first), **{f"val_{name}": second for name in FIGURES}}
        for epoch, (first, second) in enumerate(zip(training, validation, strict=True), 1)
    ]
    run = Run(tmp_path, Config(), rows, {}, {})
    for axes in [*curves(run).axes, *losses_by_epoch([run]).axes]:
        low, high = axes.get_ylim()
        assert [text.get_text() for text in axes.texts] == ([told] if told else [])
        assert low < min(training + validation)
        assert high > (max(training) if told else max(training + validation))
        left, right = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if left < tick < right] == [row["epoch"] for row in rows]
        drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
        assert all(line.get_marker() in (".", *MARKERS) for line in drawn)


def test_same_runs_same_bytes_from_the_command_line_without_a_backend(sweep):
    code = (
        "import sys; from resnet_vae.__main__ import main; sys.argv = ['', 'table', sys.argv[1]]; code = main();"
        "sys.exit(code or bool({'keras', 'tensorflow', 'jax'} & set(sys.modules)))"
    )
    names = ("table.md", "table.csv", "table.tex", "losses_by_epoch.png", "losses_by_depth.png")
    written = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, str(sweep)], capture_output=True, text=True, check=True, env=os.environ
        )
        assert EXPECTED in done.stdout
        written.append([(sweep / name).read_bytes() for name in names])
    assert written[0] == written[1]
    assert {path.name for path in sweep.iterdir() if path.is_file()} == set(names)


def test_the_figures_are_drawn_though_nobody_reads_the_table(sweep):
    command = [sys.executable, "-u", "-m", "resnet_vae", "table", sweep]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
    assert {"table.md", "losses_by_epoch.png", "losses_by_depth.png"} <= {path.name for path in sweep.iterdir()}


def test_a_table_that_cannot_be_written_is_told_in_a_line(sweep, capsys, monkeypatch):
    (sweep / "table.md").mkdir()
    monkeypatch.setattr(sys, "argv", ["resnet_vae", "table", str(sweep)])
    assert main() == 2
    assert capsys.readouterr().err == f"error: {sweep / 'table.md'} cannot be written: Is a directory\n"
    (sweep / "table.md").rmdir()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert main() == 2
    assert capsys.readouterr().err == f"error: {sweep / 'table.md'} cannot be written: No space left on device\n"
    assert not list(sweep.glob("*table*"))


def test_what_is_written_is_whole_or_not_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("resnet_vae.records.sync", synced.append)
    with whole(tmp_path / "a") as partial:
        partial.write_text("new")
    assert synced == [partial, tmp_path]
    with pytest.raises(TypeError), whole(tmp_path / "a") as partial:
        partial.write_text(partial.write_text("half"))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_a_record_names_the_commit_and_whether_the_code_was_changed(tmp_path):
    """By files that git knows; records that are made again do not count, nor does a repository around the package."""
    package = tmp_path / "resnet_vae"
    shutil.copytree(RESULTS.parent / "resnet_vae", package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "table.md").touch()
    (tmp_path / ".gitignore").write_text("__pycache__\n")

    def git(*words):
        user = ("-c", "user.name=a", "-c", "user.email=a@b")
        own = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(["git", *user, *words], cwd=tmp_path, env=own, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def recorded():
        code = "import json; from resnet_vae.records import environment; print(json.dumps(environment('b', ['d'])))"
        done = subprocess.run(
            [sys.executable, "-c", code, "a word"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        told = json.loads(done.stdout)
        assert (told["backend"], told["devices"], told["command"]) == ("b", ["d"], "-c a word")
        assert told["versions"]["numpy"] == version("numpy")
        return told["commit"], told["dirty"]

    assert recorded() == (None, None)
    git("init", "-q")
    git("add", "results", ".gitignore")
    git("commit", "-qm", "of something else")
    assert recorded()[0] is None
    git("add", ".")
    git("commit", "-qm", "of the package")
    commit = git("rev-parse", "HEAD")
    assert recorded() == (commit, False)
    (tmp_path / "results" / "table.md").write_text("new")
    (tmp_path / "untracked.py").touch()
    assert recorded() == (commit, False)
    (package / "vae.py").write_text("")
    assert recorded() == (commit, True)


def test_files_are_in_utf8_whatever_the_locale_is(tmp_path):
    write = "import sys; from resnet_vae.records import *; write_text(Path(sys.argv[1]), chr(946))"
    environ = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", write, tmp_path / "a"], check=True, env=environ)
    assert (tmp_path / "a").read_bytes() == "β".encode()


def test_figures_tell_widths_apart_and_have_the_posts_losses_on_cifar10_alone(tmp_path):
    for number, (name, width, depth) in enumerate((w, x, d) for w in ["cifar100"] for x in (0.5, 1) for d in (28, 40)):
        write_run(tmp_path / "sweep" / str(number), depth, 1800.0, name, width=width, objective="published")
    write_run(tmp_path / "other" / "a", 28, 1800.0, "cifar10-jpeg", objective="published")
    write_run(tmp_path / "resized" / "a", 28, 480.0, objective="published", image_shape=(16, 16, 3))
    labels = []
    for sweep in ("sweep", "other", "resized"):
        (axes,) = of_sweep(read_sweep(tmp_path / sweep))["losses_by_depth"].axes
        labels.append([text for text in axes.get_legend_handles_labels()[1] if text not in ("validation", "training")])
    meaning = "the post's objective: no bound"
    assert labels == [
        [f"{meaning}, width 0.5 (2 epochs)", f"{meaning}, width 1.0 (2 epochs)"],
        [f"ours, {meaning} (2 epochs)", POSTS],
        [],  # of one depth: a row each
    ]


@pytest.mark.parametrize(("depths", "named"), [((28, 28), True), ((28, 40), False)])
def test_figures_name_the_epochs_where_runs_differ_in_nothing_else(tmp_path, depths, named):
    for depth, epochs in zip(depths, (7, 14), strict=True):
        write_run(tmp_path / f"epochs-{epochs}", depth, 1850.0 - epochs, epochs=epochs)
    for figure in of_sweep(read_sweep(tmp_path)).values():
        axes = figure.axes[0]
        labels = axes.get_legend_handles_labels()[1] + [label.get_text() for label in axes.get_yticklabels()]
        assert [sum(f"epochs {epochs}" in label for label in labels) for epochs in (7, 14)] == [named, named]
    assert ("negative ELBO (7, 14 epochs)" in labels) != named  # along a line, in the figure by depth


def test_runs_of_one_depth_have_a_row_each_and_the_legend_is_outside(tmp_path):
    for seed in range(8):
        write_run(tmp_path / f"seed-{seed}", 28, 1850.0 + seed, seed=seed)
    for figure in of_sweep(read_sweep(tmp_path)).values():
        figure.draw_without_rendering()
        (axes,), (legend,) = figure.axes, figure.legends
        assert not axes.get_window_extent().overlaps(legend.get_window_extent())
        assert figure.bbox.contains(*legend.get_window_extent().min)
        assert figure.bbox.contains(*legend.get_window_extent().max)
        assert axes.get_window_extent().height > 200
    rows = {label.get_text(): label.get_position()[1] for label in axes.get_yticklabels()}
    points = [
        line.get_xydata()[0].tolist()
        for line in axes.get_lines()
        if line.get_marker() == "o" and len(line.get_xydata())
    ]
    assert points == [[1850.0 + seed, rows[f"seed {seed}"]] for seed in range(8)]
    assert axes.get_title() == "depth 28, negative ELBO"


def test_a_table_tells_of_runs_that_were_stopped(tmp_path):
    """With their rate still high, so that they do not compare with those that were not."""
    for depth, epochs in ((28, 2), (34, 10)):
        write_run(tmp_path / f"depth-{depth}", depth, 1850.0, epochs=epochs)
    path = tmp_path / "depth-34" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 2}))
    table = write_table(read_sweep(tmp_path), tmp_path)
    assert "depth-34 was stopped after 2 of 10 epochs, by PATIENCE, before its rate had fallen." in table
    assert "depth-28 was stopped" not in table


def test_names_with_dollars_and_lines_are_drawn_and_typeset_as_they_are(tmp_path):
    for number, name in enumerate(("cost_$5_and_$6^", "two\nlines_$5_$6^")):
        write_run(tmp_path / str(number), 28, 1850.0, name, dataset=name)
    for figure in of_sweep(read_sweep(tmp_path)).values():
        figure.draw_without_rendering()
    write_table(read_sweep(tmp_path), tmp_path)
    after = (tmp_path / "table.tex").read_text().partition("\\end{tabular}\n")[2]
    assert all(line.startswith("%") for line in after.splitlines())


def test_a_table_has_the_bound_where_a_loss_is_none(tmp_path):
    write_run(tmp_path / "elbo", 28, 1830.0)
    write_run(tmp_path / "published", 28, 1800.0, objective="published")
    assert "bound" not in write_table(read_sweep(tmp_path), tmp_path).splitlines()[0]
    assert "Bounds compare" not in write_table(read_sweep(tmp_path), tmp_path)
    path = tmp_path / "published" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test"]["bound"] = 1836.8
    path.write_text(json.dumps(metrics))
    header, _, elbo, published, post, *_ = write_table(read_sweep(tmp_path), tmp_path).splitlines()
    assert header.endswith("| Test loss | Test bound |")
    assert elbo.endswith("| 1831.0 | 1831.0 |")
    assert published.endswith("| 1801.0 | 1836.8 |")
    assert post.endswith("|  |  |")
    assert "Bounds compare across objectives" in write_table(read_sweep(tmp_path), tmp_path)


def test_a_loss_that_is_far_off_is_told_at_the_edge(tmp_path):
    """Or else the differences of the others would not be seen."""
    for seed, loss in enumerate((1870.0, 1872.0, 1875.0, 1880.0, 3630.0)):
        write_run(tmp_path / f"seed-{seed}", 28, loss, seed=seed)
    (axes,) = of_sweep(read_sweep(tmp_path))["losses_by_depth"].axes
    left, right = axes.get_xlim()
    assert left < 1865 < 1880 < right < 1930
    assert [text.get_text() for text in axes.texts] == ["validation 3,630, training 3,625 → "]


def test_each_objective_has_a_panel_and_runs_of_other_epochs_are_not_joined(tmp_path):
    for depth, epochs in ((28, 20), (100, 8)):
        for objective in ("elbo", "published"):
            write_run(tmp_path / f"{objective}-{depth}", depth, 1800.0, objective=objective, epochs=epochs)
    panels = of_sweep(read_sweep(tmp_path))["losses_by_depth"].axes
    assert [axes.get_title() for axes in panels] == ["objective elbo", "objective published"]
    ours = [axes.get_lines()[0] for axes in panels]
    assert [line.get_label() for line in ours] == [
        "negative ELBO (20, 8 epochs)",
        "ours, the post's objective: no bound (20, 8 epochs)",
    ]
    assert [line.get_linestyle() for line in ours] == ["None", "None"]
    assert POSTS in [line.get_label() for line in panels[1].get_lines()]
    panels = of_sweep(read_sweep(tmp_path))["losses_by_epoch"].axes
    assert [axes.get_title() for axes in panels] == ["objective elbo", "objective published"]
    labels = [[label for label in axes.get_legend_handles_labels()[1] if "depth" in label] for axes in panels]
    assert [{label.partition(", ")[2] for label in line} for line in labels] == [
        {"elbo"},
        {"the post's objective: no bound"},
    ]


def test_one_depths_objectives_have_panels_of_their_own_as_well(tmp_path):
    for objective in ("elbo", "published"):
        write_run(tmp_path / objective, 28, 1850.0, "digits", objective=objective)
    panels = of_sweep(read_sweep(tmp_path))["losses_by_depth"].axes
    assert [axes.get_title() for axes in panels] == ["objective elbo", "objective published"]


@pytest.mark.parametrize(("depths", "scale"), [((28, 40, 100), "linear"), ((28, 100, 1000), "log")])
def test_depths_that_are_far_apart_are_on_a_logarithmic_axis(tmp_path, depths, scale):
    for depth in depths:
        write_run(tmp_path / f"depth-{depth}", depth, 1850.0)
    (axes,) = of_sweep(read_sweep(tmp_path))["losses_by_depth"].axes
    assert axes.get_xscale() == scale
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(depth) for depth in depths]
    assert not axes.get_xticks(minor=True).size


def test_runs_that_differ_in_many_settings_are_told_by_their_names(tmp_path):
    for number in (1, 2):
        changed = {"seed": number, "dropout": number / 10, "stem": number, "latent_dim": number, "decay": number / 10}
        write_run(tmp_path / f"named-{number}", 28, 1850.0, **changed)
    by_epoch, by_depth = of_sweep(read_sweep(tmp_path)).values()
    assert [label.get_text() for label in by_depth.axes[0].get_yticklabels()] == ["named-1", "named-2"]
    assert by_epoch.get_suptitle() == "depth 28, elbo"
    assert by_epoch.axes[0].get_lines()[0].get_label() == "named-1"


@pytest.mark.parametrize("row", POST, ids=lambda row: f"{row['depth']}")
def test_the_posts_numbers_of_parameters_are_those_of_its_recipe(row):
    assert _parameters(Config(preset="published", resnet_depth=row["depth"])) == row["parameters"]


def test_parameters_grow_with_the_image_as_the_readme_tells():
    counts = [_parameters(Config(image_shape=(side, side, 3))) / 1e6 for side in (32, 64, 128)]
    told = "the parameters grow with the image: {:.0f} million at 32×32, {:.0f} at 64×64, {:.0f} at 128×128"
    assert told.format(*counts) in " ".join((RESULTS.parent / "README.md").read_text().split())


def test_a_table_tells_of_rows_that_must_not_be_compared(tmp_path):
    """Of other images under one name, and of a training that diverged."""
    for depth, images in ((28, "1234567890"), (34, "1234567890"), (40, "abcdefghij")):
        write_run(tmp_path / f"depth-{depth}", depth, 1800.0)
        provenance = {"data": {"name": "own.npz", "fingerprint": images}}
        (tmp_path / f"depth-{depth}" / "provenance.json").write_text(json.dumps(provenance))
    history = tmp_path / "depth-40" / "history.csv"
    lines = history.read_text().splitlines()
    history.write_text("\n".join(f"{line},{last}" for line, last in zip(lines, ("rollbacks", 0, 2), strict=True)))
    table = write_table(read_sweep(tmp_path), tmp_path)
    assert "The images of own.npz are not the same in all rows" in table
    assert "depth-28, depth-34: 12345678; depth-40: abcdefgh." in table
    assert "depth-40 diverged and went on at half the learning rate, 2 times in all." in table
    assert table.count("diverged") == 1


def test_runs_that_are_not_finished_are_told(sweep, capsys, monkeypatch):
    for name in ("begun", "depth-40"):
        (sweep / name).mkdir(exist_ok=True)
        (sweep / name / "config.json").touch()
    (sweep / "depth-40" / "metrics.json").unlink()
    monkeypatch.setattr(sys, "argv", ["resnet_vae", "table", str(sweep)])
    assert main() == 0
    told = capsys.readouterr()
    assert told.err == "left out, since they are not finished: begun, depth-40\n"
    assert "| depth-28 |" in told.out
    assert "| depth-40 |" not in told.out


def test_rows_of_several_commits_or_seeds_are_told(tmp_path):
    """Seeds only where images are set apart by them."""
    for seed, commit, dirty in ((0, "a" * 40, False), (1, "b" * 40, True), (2, None, None)):
        write_run(tmp_path / f"seed-{seed}", 28, 1850.0, seed=seed)
        path = tmp_path / f"seed-{seed}" / "provenance.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "commit": commit, "dirty": dirty}))
    table = write_table(read_sweep(tmp_path), tmp_path)
    assert "The rows are not all of one commit of the code: seed-0: aaaaaaa; seed-1: bbbbbbb changed." in table
    for seed in range(3, 7):
        shutil.copytree(tmp_path / "seed-0", tmp_path / f"seed-{seed}")
    assert "code: the others: aaaaaaa; seed-1: bbbbbbb changed." in write_table(read_sweep(tmp_path), tmp_path)
    assert "losses of different seeds are of different images" in table
    write_run(tmp_path / "test" / "seed-0", 28, 1850.0, validation="test")
    write_run(tmp_path / "test" / "seed-1", 28, 1850.0, validation="test", seed=1)
    table = write_table(read_sweep(tmp_path / "test"), tmp_path / "test")
    assert "not all of one commit" not in table
    assert "of different seeds" not in table


def test_rows_of_several_backends_or_precisions_are_told(tmp_path):
    """Runs of one recipe on two backends are two lines, too."""
    for name, backend, precision in (("a", "tensorflow", "float32"), ("b", "jax", "float32"), ("c", "jax", "float32")):
        write_run(tmp_path / name, 40 if name == "c" else 28, 1850.0)
        path = tmp_path / name / "provenance.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "backend": backend, "precision": precision}))
    runs = read_sweep(tmp_path)
    told = "The rows are not all of one backend and precision: a: tensorflow, float32; b, c: jax, float32."
    assert told in write_table(runs, tmp_path)
    assert "not all of one" not in write_table(runs[1:], tmp_path)
    labels = [line.get_label() for line in of_sweep(runs)["losses_by_depth"].axes[0].get_lines()]
    assert [label for label in labels if label.endswith("epochs)")] == [
        f"negative ELBO, {name} (2 epochs)" for name in "abc"
    ]
    assert len([label for label in labels if not label.startswith("_")]) == 3 + 2


def test_no_runs_is_told(tmp_path):
    with pytest.raises(UserError, match="no finished runs below it"):
        write_table(read_sweep(tmp_path), tmp_path)


@pytest.mark.parametrize("recorded", sorted(path for path in RESULTS.iterdir() if path.is_dir()), ids=lambda p: p.name)
def test_what_is_recorded_still_follows_from_itself(recorded):
    assert verify(recorded) == []


def change(name, old, new):
    """What changes a file of a sweep."""

    def spoil(sweep):
        text, changes = re.subn(old, new, (sweep / name).read_text(), count=1)
        assert changes
        (sweep / name).write_text(text)

    return spoil


def another_hash(sweep):
    path = sweep / "depth-28" / "provenance.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {"history.csv": "0" * 64}}))


def another_picture(sweep):
    shutil.copy(sweep / "depth-28" / "samples.png", sweep / "depth-28" / "curves.png")


def faint_picture(sweep):
    """A grey line less."""
    path = sweep / "depth-28" / "curves.png"
    picture = imread(path)
    picture[40:60, 40:60, :3] -= 0.03
    imsave(path, picture.clip(0, 1))


def scaled(factor):
    """What multiplies the number after a name."""
    return lambda match: f"{match[1]}: {float(match[0].rpartition(':')[2]) * factor}"


def damaged_picture(name, length):
    """What leaves so many bytes of a picture, or puts others there."""

    def spoil(sweep):
        (sweep / name).write_bytes((sweep / name).read_bytes()[:length] if length else b"x\n")

    return spoil


METRICS, PROVENANCE = "depth-28/metrics.json", "depth-28/provenance.json"
CALM_HOURS = json.loads((RESULTS / "calm" / "depth-28" / "provenance.json").read_text())["seconds"] / 3600


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (change(METRICS, '(validation": {\\s+"loss"): [^,]*', r"\1: 1700.0"), "another validation loss"),
        (change(METRICS, '(train": {\\s+"loss"): [^,]*', scaled(1.00003)), "another train loss"),
        (change(METRICS, '(train": {[^}]*"kl"): [^,]*', scaled(1.00003)), "another train kl"),
        (
            change(METRICS, '(test": {\\s+"loss"): [^,]*', scaled(1.00003)),
            "a loss that is not reconstruction + beta × KL",
        ),
        (
            change(METRICS, '"loss_is": [^,]*', '"loss_is": "a bound"'),
            "calls the loss 'a bound'; it is 'negative ELBO'",
        ),
        (lambda sweep: (sweep / METRICS).unlink(), "metrics.json is missing"),
        (lambda sweep: (sweep / "losses_by_epoch.png").unlink(), "losses_by_epoch.png is missing"),
        (faint_picture, "curves.png is not the figure"),
        (another_hash, "not the file that was written"),
        (change("table.md", "elbo", "elbe"), "table.md is not the table"),
        (lambda sweep: (sweep / "table.tex").unlink(), "table.tex is missing"),
        (another_picture, "curves.png is not the figure"),
        (damaged_picture("losses_by_depth.png", 0), "losses_by_depth.png cannot be read as a picture: not a PNG file"),
        (damaged_picture("depth-28/curves.png", 2000), "curves.png cannot be read as a picture: "),
        (lambda sweep: (sweep / "depth-28" / "samples.png").unlink(), "samples.png is missing"),
        (
            change(PROVENANCE, '"seconds_per_epoch": [^,]*', '"seconds_per_epoch": 1.5'),
            "has 1.5 seconds_per_epoch; its seconds and images give 16.34",
        ),
        (
            change(PROVENANCE, '"images_per_second": [^,]*', '"images_per_second": 1.5'),
            "has 1.5 images_per_second; its seconds and images give 275.3",
        ),
        (
            change(PROVENANCE, '"precision": [^,]*', '"precision": "mixed_bfloat16"'),
            "has the precision mixed_bfloat16; in config.json it is float32",
        ),
        (lambda sweep: (sweep / "record.json").write_text('{"files": {}}'), "is not in record.json"),
        (change(METRICS, '"epochs": 6', '"epochs": 10000000000000'), "is not one row per epoch for 10000000000000"),
        (change(PROVENANCE, '"seconds": [^,]*', '"seconds": 0'), "holds a record that lacks something: ZeroDivision"),
        (change("depth-28/history.csv", "\n1,", "\n2,"), "history.csv is not one row per epoch for 6 epochs"),
        (change(METRICS, '"best_epoch": 6', '"best_epoch": 9'), "has epoch 9 for the best; in history.csv it is 6"),
        (change(METRICS, '"best_epoch"', '"worst_epoch"'), "best_epoch: Field required"),
        (change(METRICS, '"hours": [^,]*', '"hours": 99'), f"has 99 hours; in provenance.json it is {CALM_HOURS:.3g}"),
        (change(METRICS, '"parameters": [^,]*', '"parameters": 7'), "has 7 parameters; the network has 9,205,307"),
        (change(METRICS, '_floor": 1691[^,]*', '_floor": 0.0'), "a validation_floor of 0.0; expected more than 0"),
        (change(METRICS, '_floor": 1682[^\n]*', '_floor": 1900.1'), "a test_floor of 1900.1; expected more than 0"),
        (change(METRICS, '_floor": 1691', '_floor": -1691'), "a validation_floor of -1691.2; expected more than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verify_tells_what_does_not_match(tmp_path, spoil, told):
    """One thing is changed in a copy of a recorded sweep."""
    copy = shutil.copytree(RESULTS / "calm", tmp_path / "copy")
    spoil(copy)
    assert told in "\n".join(verify(copy))


@pytest.mark.parametrize("part", ["reconstruction", "kl", "loss", "floor"])
def test_test_images_that_were_the_validation_images_have_its_figures(tmp_path, part):
    copy = shutil.copytree(RESULTS / "table1-elbo-seeds", tmp_path / "copy")
    place = '("test_floor"): [^\n]*' if part == "floor" else f'(test": {{[^}}]*"{part}"): [^,]*'
    told = "test_floor than validation_floor, of" if part == "floor" else f"test {part} than that of the validation on"
    change("seed-1/metrics.json", place, scaled(1.01))(copy)
    assert f"has another {told} the same images" in "\n".join(verify(copy))


def test_an_evaluation_is_told_what_its_loss_is(tmp_path):
    copy = shutil.copytree(RESULTS / "table1-elbo-seeds", tmp_path / "copy")
    (path,) = (copy / "seed-1").glob("evaluation-*.json")
    change(f"seed-1/{path.name}", '"loss_is": [^,]*', '"loss_is": "a bound"')(copy)
    assert "calls the loss 'a bound'; it is 'negative ELBO'" in "\n".join(verify(copy))


def test_a_sweep_with_an_experiments_record_in_it_is_verified_as_well(tmp_path):
    copy = shutil.copytree(RESULTS / "calm", tmp_path / "copy")
    (copy / "losses_by_depth.png").unlink()
    files = {path.name: sha256_of(path) for path in copy.iterdir() if path.suffix in HASHED}
    (copy / "record.json").write_text(json.dumps({"files": files}))
    assert verify(copy) == [f"{copy / 'losses_by_depth.png'} is missing"]


def test_verify_tells_of_a_table_that_is_missing(tmp_path):
    copy = shutil.copytree(RESULTS / "euler", tmp_path / "copy")
    (copy / "spirals.csv").unlink()
    assert verify(copy) == [f"{copy / 'spirals.csv'} is missing"]


def test_verify_allows_for_figures_that_were_rounded(tmp_path):
    """In history.csv to six digits."""
    copy = shutil.copytree(RESULTS / "calm", tmp_path / "copy")
    change(METRICS, '(train": {[^}]*"kl"): [^,]*', scaled(1.000004))(copy)
    assert verify(copy) == []


def test_verify_tells_of_each_folder(tmp_path):
    """One without a record, one that cannot be read, one that is as recorded: none keeps the next from being told."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.json").write_text("{")
    folders = [str(tmp_path / "empty"), str(tmp_path / "broken"), str(RESULTS / "soak")]
    done = subprocess.run(
        [sys.executable, "-m", "resnet_vae", "verify", *folders], capture_output=True, text=True, check=False
    )
    first, second = done.stderr.splitlines()
    assert first.startswith(f"error: {folders[0]} holds no record; expected")
    assert second.startswith(f"error: {folders[1]}/record.json cannot be read")
    assert (done.returncode, done.stdout) == (1, f"as recorded: {folders[2]}\n")


def test_verify_leaves_no_networks_behind(monkeypatch):
    """Keras would draw the weights of those that it counts at the next opportunity, and keep them."""
    from resnet_vae.vae import build_vae

    built = []

    def watched(config):
        model = build_vae(config)
        built.append(weakref.ref(model.weights[0]))
        return model

    monkeypatch.setattr("resnet_vae.vae.build_vae", watched)
    _parameters(read_run(RESULTS / "calm" / "depth-28").config)
    gc.collect()
    assert [network() is None for network in built] == [True]


def test_the_readmes_table_is_a_recorded_one():
    """But for the test loss, and the runs' names, in place of which it has what they were trained on."""
    readme = (RESULTS.parent / "README.md").read_text()
    for sweep, label in (("table1-gpu", "H200"), ("table1-elbo-pool", "CPU")):
        _, _, *rows = [line for line in (RESULTS / sweep / "table.md").read_text().splitlines() if line.startswith("|")]
        assert len(rows) == 8
        for row in rows:
            _, name, *cells, test, _ = row.split("|")
            assert test.strip() in ("", cells[7].strip())  # the validation images
            assert f"| {label if name.startswith(' objective') else name.strip()} |{'|'.join(cells)}|\n" in readme


def test_one_run_of_each_validation_is_told(tmp_path):
    for depth, validation in ((28, "test"), (40, "holdout")):
        write_run(tmp_path / str(depth), depth, 1850.0, validation=validation)
    assert "VALIDATION=test" in write_table(read_sweep(tmp_path), tmp_path)


def test_a_setting_is_swept_though_the_last_run_has_the_firsts(tmp_path):
    for depth, shortcut in ((28, "pad"), (40, "none"), (70, "pad")):
        write_run(tmp_path / str(depth), depth, 1850.0, shortcut=shortcut)
    assert swept(read_sweep(tmp_path)) == ["shortcut"]


def test_runs_are_in_the_order_of_the_numbers_in_their_names(tmp_path):
    for seed in (10, 2, 1):
        write_run(tmp_path / f"seed-{seed}", 28, 1850.0, seed=seed)
    write_run(tmp_path / "３", 28, 1850.0, seed=3)  # a digit, but none of ASCII's
    assert [run.config.seed for run in read_sweep(tmp_path)] == [1, 2, 10, 3]


def test_more_than_ten_lines_have_colors_of_their_own(tmp_path):
    for seed in range(12):
        write_run(tmp_path / f"seed-{seed}", 28, 1850.0, seed=seed)
    for figure in of_sweep(read_sweep(tmp_path)).values():
        lines = [line for line in figure.axes[0].get_lines() if len(line.get_xdata())]  # validation and training
        assert (len({to_hex(line.get_color()) for line in lines}), len(lines)) == (12, 24)


def test_images_of_two_data_sets_may_differ(tmp_path):
    for depth, name in ((28, "a"), (40, "b")):
        write_run(tmp_path / name, depth, 1850.0, name)
        provenance = {"data": {"name": name, "fingerprint": 9 * name}}
        (tmp_path / name / "provenance.json").write_text(json.dumps(provenance))
    assert "not the same in all rows" not in write_table(read_sweep(tmp_path), tmp_path)


def test_verify_adds_up_evaluations(tmp_path):
    copy = shutil.copytree(RESULTS / "calm", tmp_path / "copy")
    (copy / "depth-28" / "evaluation-x.json").write_text(
        json.dumps({"loss_is": "", "loss": 3.0, "reconstruction": 1.0, "kl": 1.0})
    )
    assert "evaluation-x.json has a loss that is not" in "\n".join(verify(copy))


def test_verify_adds_up_with_the_runs_beta(tmp_path):
    copy = shutil.copytree(RESULTS / "calm", tmp_path / "copy")
    change("depth-28/config.json", '"beta": 1.0', '"beta": 0.5')(copy)
    assert "a loss that is not reconstruction + beta × KL" in "\n".join(verify(copy))
