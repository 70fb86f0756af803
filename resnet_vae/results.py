"""From run folders to tables: reading runs back, and the results table in Markdown, CSV and LaTeX."""

import os
import re
import warnings
from pathlib import Path

from resnet_vae.config import DATASETS, UserError
from resnet_vae.data import check_dataset, entropy_floor, load_data, load_test_images
from resnet_vae.devices import devices, precision, settle
from resnet_vae.records import (
    check_fingerprint,
    csv_text,
    environment,
    model_of,
    read_json,
    read_run,
    write_json,
    write_text,
)

# Table 1 of the post (https://bjlkeng.io/posts/residual-networks/): CIFAR-10 at full width on a GTX 1070, the post's
# objective. Training and validation loss are each the lowest of all epochs; the numbers of parameters and of epochs,
# and the KL and the log-loss of the last validation, are from its executed notebooks.
POST = [
    dict(zip(("depth", "parameters", "epochs", "hours", "loss", "val_loss", "rec", "kl"), row, strict=True))
    for row in (
        (28, 26_815_683, 384, 79.2, 1790.4, 1794.7, 1763.28, 32.79),
        (40, 29_624_003, 274, 61.9, 1787.5, 1795.7, 1764.05, 33.27),
        (70, 43_762_627, 209, 80.0, 1784.8, 1799.0, 1769.65, 32.48),
        (100, 57_901_251, None, 164.7, 1782.3, 1804.0, 1787.75, 29.94),
    )
]
COLUMNS = {  # name in the CSV → (heading, format)
    "run": ("Run", "{}"),
    "depth": ("Depth", "{}"),
    "objective": ("Objective", "{}"),
    "width": ("Width", "{:g}"),
    "parameters": ("Parameters", "{:,}"),
    "epochs": ("Epochs", "{}"),
    "hours": ("Hours", "{:.3g}"),
    "loss": ("Training loss", "{:.1f}"),
    "val_loss": ("Validation loss", "{:.1f}"),
    "rec": ("Reconstruction", "{:.1f}"),
    "kl": ("KL", "{:.2f}"),
    "excess": ("Excess over floor", "{:.1f}"),
    "test_loss": ("Test loss", "{:.1f}"),
    "bound": ("Test bound", "{:.1f}"),
}


def load_run(folder):
    """Load a finished run: its record and its trained model.

    The network is built anew from the recorded configuration, and only weights are read from model.keras. Of a run with
    PRECISION=auto it computes in what is faster here, which need not be what it was trained in.

    Returns:
        (record, vae): a `Run`, and a built `VAE`, ready for `evaluate` and `predict`; further training gives the KL its
        full weight.

    Raises:
        UserError: the folder holds no finished run, or its model does not fit its configuration.
    """
    run = read_run(folder)
    path = model_of(run.folder)
    from resnet_vae.vae import build_vae

    settle()
    vae = build_vae(run.config)
    vae.kl_warmup_steps = 0  # they are over, however few there were
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # Keras only warns of weights that are not in the file
            vae.load_weights(path)
    except Exception as error:  # zip, HDF5 and Keras each raise their own on a broken file
        raise UserError(f"{path} cannot be read as the weights of this run: {error}") from None
    vae.compile()
    return run, vae


def load_data_of(run):
    """Load the data that a finished run was trained on.

    Raises:
        UserError: the data cannot be had, or have changed since.
    """
    data = load_data(run.config)
    check_fingerprint(run.folder, data)
    return data


def evaluate_run(folder, dataset):
    """Evaluate a finished run on the test images of another data set, brought to the run's image shape.

    On all of its images where it has no test images of its own, unless the run was trained on it.

    Args:
        folder: the run's.
        dataset: as `Config.dataset`.

    Returns:
        A dict: the data set as asked for, its name, number of images and fingerprint, their entropy floor, the
        objective's figures and where these are no bound, the bound; the precision they were computed in, and what on
        ("ran_on", as in provenance.json). It is also written to evaluation-NAME.json in the run's folder, or where
        that is of other images, to evaluation-NAME-FINGERPRINT.json.

    Raises:
        UserError: no such run, or no such data.
    """
    dataset = os.fspath(dataset)
    check_dataset(dataset)
    run, vae = load_run(folder)
    import keras

    from resnet_vae.training import score

    ran_on = environment(keras.backend.backend(), devices())  # the code as it is now
    asked = run.config.replace(dataset=dataset, validation="test")
    trained_on = run.config.dataset, run.provenance["data"]["fingerprint"]
    name, images, fingerprint = load_test_images(asked, trained_on)
    result = {
        "dataset": dataset,
        "data": name,
        "fingerprint": fingerprint,
        "loss_is": run.config.loss_meaning,
        "images": len(images),
        "floor": entropy_floor(images),
        **score(vae, images, run.config.batch_size),
        "precision": precision(run.config),
        "ran_on": ran_on,
    }
    path = run.folder / f"evaluation-{name.removesuffix('.npz')}.json"
    if path.exists() and read_json(path).get("fingerprint") != fingerprint:  # of the same name, elsewhere
        path = path.with_stem(f"{path.stem}-{fingerprint[:12]}")
    write_json(path, result)
    return result


SHOWN = {"resnet_depth", "objective", "beta", "width", "epochs"}  # settings with columns of their own


def swept(runs, shown=SHOWN):
    """The names of the settings, beyond those that are shown anyway, in which the runs of a sweep differ."""
    recipes = [run.config.recipe() for run in runs]
    return [name for name in recipes[0] if name not in shown and any(r[name] != recipes[0][name] for r in recipes)]


def format_setting(value):
    """A setting's value for a table or a label."""
    return (" ".join(map(str, value)) or "none") if isinstance(value, list) else "" if value is None else f"{value}"


def columns(runs):
    """The table's columns: those of COLUMNS, with one for each setting that was swept.

    The bound has one where a run has one beside its loss.
    """
    extra = {name: (name.replace("_", " ").capitalize(), "{}") for name in swept(runs)}
    bound = any("bound" in run.metrics["test"] for run in runs)
    items = [(name, column) for name, column in COLUMNS.items() if bound or name != "bound"]
    place = list(COLUMNS).index("parameters")
    return dict([*items[:place], *extra.items(), *items[place:]])


def like_the_post(run):
    """Whether a run can be compared with the post's rows: on CIFAR-10, under the post's objective, with BETA=1."""
    name = run.provenance["data"]["name"].lower().replace("-", "")
    cifar10 = re.search("cifar10(?!0)", name) and run.config.image_shape == DATASETS["cifar10"]
    return bool(cifar10) and run.config.objective == "published" and run.config.beta == 1


def table_rows(runs):
    """A row for each run and for each of the post's: dicts by the names of `columns`, None where there is no figure.

    Training loss, validation loss, reconstruction and KL are those of the epoch with the lowest validation loss; the
    excess is the validation's reconstruction less the Bernoulli entropy floor of the validation images.
    """
    rows = []
    for run in runs:
        metrics, validation = run.metrics, run.metrics["validation"]
        bound = metrics["test"]["loss"] if run.config.loss_meaning == "negative ELBO" else None
        rows.append(
            {
                "run": run.folder.name,
                "depth": run.config.resnet_depth,
                "objective": run.config.objective + (f", beta {run.config.beta:g}" if run.config.beta != 1 else ""),
                "width": run.config.width,
                **{name: format_setting(run.config.recipe()[name]) for name in swept(runs)},
                "parameters": metrics["parameters"],
                "epochs": metrics["epochs"],
                "hours": metrics["hours"],
                "loss": metrics["train"]["loss"],
                "val_loss": validation["loss"],
                "rec": validation["reconstruction"],
                "kl": validation["kl"],
                "excess": validation["reconstruction"] - metrics["validation_floor"],
                "test_loss": metrics["test"]["loss"],
                "bound": metrics["test"].get("bound", bound),
            }
        )
    post = {"run": "the post's", "objective": "published", "width": 1.0}
    return rows + [{**dict.fromkeys(columns(runs)), **post, **row} for row in POST]


def _differing(runs, value):
    """The runs' folders by a value of each, as "a, b: x; c: y"; nothing where all have the same."""
    alike = {}
    for run in runs:
        alike.setdefault(value(run), []).append(run.folder.name)
    most = max(alike, key=lambda each: len(alike[each]), default=None)
    if len(alike.get(most, ())) > 4:
        alike[most] = ["the others"]
    return "; ".join(f"{', '.join(names)}: {each}" for each, names in alike.items()) if len(alike) > 1 else ""


def _commit(run):
    return str(run.provenance["commit"])[:7] + (" changed" if run.provenance.get("dirty") else "")


def notes(runs):
    """What a reader of the table must know, a sentence each."""
    remarks = ["Losses, reconstruction and KL in nats per image, at the epoch with the lowest validation loss."]
    names = sorted({run.provenance["data"]["name"] for run in runs})
    remarks.append(f"Images: {', '.join(names)}.")
    for name in names:
        own = [run for run in runs if run.provenance["data"]["name"] == name]
        if told := _differing(own, lambda run: str(run.provenance["data"].get("fingerprint"))[:8]):
            remarks.append(f"The images of {name} are not the same in all rows, which must not be compared: {told}.")
    told_of = [run for run in runs if {"backend", "precision"} <= set(run.provenance)]  # older records do not tell
    kept = ["backend"] if "precision" in swept(runs) else ["backend", "precision"]  # what no column tells
    if told := _differing(told_of, lambda run: ", ".join(str(run.provenance[name]) for name in kept)):
        remarks.append(f"The rows are not all of one {' and '.join(kept)}: {told}.")
    of_commits = [run for run in runs if run.provenance.get("commit")]
    if told := _differing(of_commits, _commit):
        remarks.append(f"The rows are not all of one commit of the code: {told}.")
    if "seed" in swept(runs) and any(run.config.validation == "holdout" for run in runs):
        remarks.append(
            "With another seed other images are set apart, for validation and, where the data have no test images of "
            "their own, for the test: losses of different seeds are of different images."
        )
    remarks.append(
        "The post's rows: CIFAR-10, at full width, on a GTX 1070, as the post gives them: training and validation loss "
        "are each the lowest of all epochs, with the L2 penalty of its heads, which ours leave out; reconstruction and "
        "KL are of the last validation in its notebooks."
    )
    if unlike := [run.folder.name for run in runs if not like_the_post(run)]:
        others = f"row{'s' * (len(unlike) > 1)} {', '.join(unlike)}" if len(unlike) < len(runs) else "the others"
        remarks[-1] += f" They must not be compared with {others}, of other images or another objective."
    if any(run.config.validation == "test" for run in runs):
        remarks.append(
            "VALIDATION=test: the test images were the validation images, as in the post, and chose the epoch."
        )
    remarks.append(
        "Objective published: the post's, whose sampler takes exp(log-variance) for the standard deviation while its "
        "KL takes it for the variance. It is no bound on the likelihood and must not be compared with elbo."
    )
    if "bound" in columns(runs):
        remarks.append(
            "Test bound: the negative ELBO on the test images, with the whole KL of the posterior that is sampled "
            "from. Bounds compare across objectives."
        )
    if any(run.config.beta != 1 for run in runs):
        remarks.append("Where beta is not 1, the loss is no bound; under elbo with beta above 1 it is a looser one.")
    for run in runs:
        if (done := run.metrics["epochs"]) < run.config.epochs:
            told = f"{run.folder.name} was stopped after {done} of {run.config.epochs} epochs, by PATIENCE"
            remarks.append(f"{told}{', before its rate had fallen' if run.config.schedule == 'cosine' else ''}.")
        if count := int(run.history[-1].get("rollbacks", 0)):
            remarks.append(f"{run.folder.name} diverged and went on at half the learning rate, {count} times in all.")
    return remarks


def tables(runs):
    """The table of runs, as `read_sweep` has them: file name → text; the same runs give the same text."""
    rows, remarks, shown = table_rows(runs), notes(runs), columns(runs)
    cells = [["" if row[n] is None else form.format(row[n]) for n, (_, form) in shown.items()] for row in rows]
    headings = [heading for heading, _ in shown.values()]

    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *([c.translate(MARKDOWN) for c in r] for r in cells)]
    markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
    markdown += "".join(f"- {note.translate(MARKDOWN)}\n" for note in remarks)

    latex = "\\begin{tabular}{l" + "r" * (len(headings) - 1) + "}\n\\hline\n"
    for number, line in enumerate([headings, *cells]):
        latex += " & ".join(cell.translate(LATEX) for cell in line) + " \\\\\n" + ("\\hline\n" if number == 0 else "")
    latex += "\\hline\n\\end{tabular}\n" + "".join(f"% {' '.join(note.splitlines())}\n" for note in remarks)

    return {"table.md": markdown, "table.csv": csv_text(rows, shown), "table.tex": latex}


def write_table(runs, folder):
    """Write table.md, table.csv and table.tex of a sweep's runs into a folder; returns the Markdown text."""
    texts = tables(runs)
    for name, text in texts.items():
        write_text(Path(folder) / name, text)
    return texts["table.md"]


MARKDOWN = str.maketrans({"|": "\\|", "<": "&lt;", ">": "&gt;", "\n": " "})
LATEX = str.maketrans(
    {
        "\\": "\\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "\n": " ",
    }
)
