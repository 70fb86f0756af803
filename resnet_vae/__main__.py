"""The command line: python -m resnet_vae COMMAND."""

import argparse
import os
import signal
import sys
from pathlib import Path


def _tell_what_is_missing(error):
    """A package that is not installed, in one line."""
    told = f"error: {sys.executable} has no {error.name}; install it, or in a checkout: make clean install, then source"
    print(f"{told} .venv/bin/activate", file=sys.stderr)
    return 2


try:
    from resnet_vae.config import Config, UserError, backend_problem, did_you_mean
    from resnet_vae.experiments.settings import NOTEBOOKS, settings_of
except ModuleNotFoundError as error:
    sys.exit(_tell_what_is_missing(error))
except KeyboardInterrupt:
    sys.exit(130)

SUFFIXES = (".png", ".pdf")  # of pictures
DRAWN = {"sample": "samples", "reconstruct": "reconstructions", "interpolate": "interpolations"}  # and their names


def _path(text):
    return Path(os.path.expanduser(text))


def _flag(name):
    return f"--{name.replace('_', '-')}"


def _add_fields(parser):
    """Give a command the configuration's fields as flags, as --resnet-depth 40."""
    group = parser.add_argument_group("settings, each also an environment variable in capitals")
    for name, field in Config.model_fields.items():
        group.add_argument(_flag(name), dest=name, metavar="VALUE", help=field.description)


class _Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line."""

    def error(self, message):
        self.exit(UserError.exit_code, f"error: {message} (see {self.prog} --help)\n")


def _parser():
    about = {"prog": "python -m resnet_vae", "description": "Residual-network VAEs, swept over depth"}
    parser = _Parser(**about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, *, fields=False, run=False):
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if fields:
            _add_fields(added)
        if run:
            added.add_argument("run", type=_path, metavar="RUN", help="the folder of a finished run")
            added.add_argument(
                "-o", "--output", type=_path, metavar="FILE", help="the picture, .png or .pdf (default: in the run)"
            )
        return added

    config = command("config", "print the settings: values, where they come from, what they mean", fields=True)
    told = f"whose settings: {', '.join(NOTEBOOKS)}, or the path of one (default: resnet_vae, a VAE's)"
    config.add_argument("notebook", nargs="?", default="resnet_vae", metavar="NOTEBOOK", help=told)
    command("train", "train a VAE and draw its pictures", fields=True)
    command(
        "finished",
        "exit 0 if the run of these settings is finished and, where its model is there, drawn, else 3",
        fields=True,
    )
    sweep = command("sweep", "check all runs of a sweep, and print a line for each: its name, what is set for it")
    sweep.add_argument("folder", type=_path, metavar="FOLDER", help="the sweep's")
    command("sample", "draw images generated from the prior", run=True)
    command("reconstruct", "draw test images and their reconstructions", run=True)
    command("interpolate", "draw lines in latent space between test images", run=True)
    table = command("table", "write the table and the figures of the runs below a folder")
    table.add_argument("folder", type=_path, metavar="FOLDER")
    check = command("verify", "recompute tables, figures, hashes and sums of recorded sweeps; print what differs")
    check.add_argument("folders", type=_path, nargs="+", metavar="FOLDER")
    compare = command("compare", "print what differs between two finished runs: history, weights, optimizer")
    compare.add_argument("runs", type=_path, nargs=2, metavar="RUN")
    evaluate = command("evaluate", "evaluate a run on the test images of another data set, and record it")
    evaluate.add_argument("run", type=_path, metavar="RUN", help="the folder of a finished run")
    evaluate.add_argument("dataset", metavar="DATASET", help="a data set by name, a folder of images, or an .npz file")
    return parser


def _configuration(arguments, settings=Config):
    flags = {name: value for name, value in vars(arguments).items() if name in Config.model_fields}
    return settings.from_env(**{name: value for name, value in flags.items() if value is not None})


def _config(arguments):
    from resnet_vae.data import check_dataset

    settings = settings_of(arguments.notebook)
    configuration = _configuration(arguments, settings)
    if "dataset" in settings.model_fields:
        check_dataset(configuration.dataset)
    print(configuration.describe())
    print()
    for name, field in settings.model_fields.items():
        print(f"{name.upper():<20}{field.description}")


def _train(arguments):
    from resnet_vae.checkpoints import check_recipe
    from resnet_vae.data import load_data
    from resnet_vae.records import is_finished

    config = _configuration(arguments)
    if not is_finished(config):  # other settings are told before the data are read,
        check_recipe(config)
    data = load_data(config)
    is_finished(config, data)  # and other data before anything large is imported
    from resnet_vae.training import train

    folder = train(config, data)
    _draw_run(folder, data)
    print(f"run: {folder}")


def _finished(arguments):
    from resnet_vae.records import is_finished, lacks_pictures

    config = _configuration(arguments)
    return 0 if is_finished(config) and not lacks_pictures(config.folder) else 3


def _sweep(arguments):
    from resnet_vae.sweep import runs_of

    for name, settings in runs_of(arguments.folder).items():
        print(name, *(f"{variable}={text}" for variable, text in settings.items()))


def _draw_run(folder, data):
    from resnet_vae.plots import draw_run
    from resnet_vae.results import load_run

    run, vae = load_run(folder)
    for path in draw_run(run, vae, data.test):
        print(path)


def _check_picture(path):
    """Refuse a picture's path before the picture is made."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path} is no name for a picture; expected one that ends in {' or '.join(SUFFIXES)}")
    os.scandir(path.parent).close()  # an OSError where there is no such folder


def _draw(arguments):
    if arguments.output:
        _check_picture(arguments.output)
    from resnet_vae import plots
    from resnet_vae.results import load_data_of, load_run

    run, vae = load_run(arguments.run)
    if arguments.command == "sample":
        figure = plots.samples(run, vae)
    else:
        draw = plots.reconstructions if arguments.command == "reconstruct" else plots.interpolations
        figure = draw(run, vae, load_data_of(run).test)
    print(plots.save(figure, arguments.output or run.folder / f"{DRAWN[arguments.command]}.png"))


def _table(arguments):
    from resnet_vae import plots, results
    from resnet_vae.records import read_sweep

    runs = read_sweep(arguments.folder)
    table = results.write_table(runs, arguments.folder)
    figures = plots.draw_sweep(runs, arguments.folder)
    begun = sorted(path.parent for path in arguments.folder.glob("*/config.json"))
    if unfinished := [folder.name for folder in begun if not (folder / "metrics.json").exists()]:
        print(f"left out, since they are not finished: {', '.join(unfinished)}", file=sys.stderr)
    print(table, *figures, sep="\n")


def _verify(arguments):
    from resnet_vae.verify import verify

    right = []
    for folder in arguments.folders:
        wrong = verify(folder)
        for line in wrong:
            print(f"error: {line}", file=sys.stderr)
        if not wrong:
            right.append(str(folder))
    if right:
        print(f"as recorded: {', '.join(right)}")
    return 0 if len(right) == len(arguments.folders) else 1


def _compare(arguments):
    from resnet_vae.verify import differences

    differing = differences(*arguments.runs)
    print(f"differences: {len(differing)}")
    for name in differing:
        print(name)
    return 1 if differing else 0


def _evaluate(arguments):
    from resnet_vae.results import evaluate_run

    for name, value in evaluate_run(arguments.run, arguments.dataset).items():
        if name != "ran_on":  # many lines
            print(f"{name:<16}{value}")


COMMANDS = {
    "config": _config,
    "train": _train,
    "finished": _finished,
    "sweep": _sweep,
    "sample": _draw,
    "reconstruct": _draw,
    "interpolate": _draw,
    "table": _table,
    "verify": _verify,
    "compare": _compare,
    "evaluate": _evaluate,
}


def _refuse(word, arguments):
    """Tell of a word that a command does not take."""
    command = arguments.command
    what, meant = "is one argument too many", ""
    if word.startswith("-"):
        what = f"is no option of {command}"
        if hasattr(arguments, "epochs"):  # one that takes settings
            meant = did_you_mean(word.partition("=")[0].strip("-").replace("-", "_"), Config.model_fields, _flag)
    raise UserError(f"{word} {what} (see python -m resnet_vae {command} --help){meant}")


def main():
    """Run the command line; returns the exit code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, it stays open
    if hasattr(sys.stdout, "reconfigure"):  # which a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # where it is ASCII
    arguments, rest = _parser().parse_known_args()
    try:
        if rest:
            _refuse(rest[0], arguments)
        reads_no_settings = arguments.command in (*DRAWN, "evaluate", "verify")
        if reads_no_settings and (problem := backend_problem(os.environ.get("KERAS_BACKEND", ""))):
            raise UserError(problem)
        code = COMMANDS[arguments.command](arguments) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:  # as of a backend, or of an extra
        return _tell_what_is_missing(error)
    except BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
