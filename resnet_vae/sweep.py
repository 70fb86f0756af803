"""The runs of a sweep, as scripts/run_all.sh trains them: all are checked before the first is trained."""

import itertools
import os
import re
from contextlib import suppress
from pathlib import Path

from resnet_vae import checkpoints
from resnet_vae.config import DATASETS, Config, ConfigError, UserError, did_you_mean
from resnet_vae.data import check_dataset
from resnet_vae.records import RecordError, check_sweep, is_finished, read_config

DEFAULTS = {"SWEEP": "DEPTHS", "DEPTHS": "28 40 70 100"}
RUNNERS = ("notebook", "command")
SWEPT = ("DEPTHS", *(name.upper() for name in Config.model_fields if name not in ("outdir", "cmdline")))


def runs_of(folder, environ=None):
    """The runs of a sweep, in order: name → settings, variables of the environment and their texts.

    SWEEP names variables that hold lists; each combination is a run, in a folder of its name below the sweep's.
    DEPTHS is a list of RESNET_DEPTH, or of RESNET_DEPTH:EPOCHS.

    Args:
        folder: the sweep's.
        environ: a mapping, by default os.environ.

    Raises:
        RecordError: the folder is that of a run, an experiment or a benchmark, or none.
        ConfigError: listing every mistake in the sweep's names, or else every mistake in its values, each once.
    """
    environ = os.environ if environ is None else environ
    environ = {name: value for name, value in environ.items() if value.strip()}
    check_sweep(Path(folder))
    if Path(folder, "record.json").exists():
        raise RecordError(f"{folder} holds the record of an experiment or a benchmark; expected the folder of a sweep")
    runs, alike, problems = {}, _recorded(Path(folder)), []
    if environ.get("RUNNER", RUNNERS[0]) not in RUNNERS:
        problems.append(f"RUNNER is {environ['RUNNER']!r}; expected {' or '.join(RUNNERS)}")
    if "OUTDIR" in environ:
        problems.append(f"OUTDIR is {environ['OUTDIR']!r}, and a sweep's folder is its argument; expected OUTDIR unset")
    if "EVALUATE" in environ:
        problems += _told(check_dataset, environ["EVALUATE"], "EVALUATE")

    def check(name, settings):
        config = Config.from_env({**environ, **settings, "OUTDIR": str(Path(folder, name))})
        first = alike.setdefault(_key(config), name)  # which the table can tell apart
        if name in runs or first != name:
            told = f"{first} and {name} are the same run; expected each once in {folder}: move one out of it"
            raise ConfigError(f"{name} is there twice" if name in runs else told)
        if not is_finished(config):
            checkpoints.check_recipe(config)
            check_dataset(config.dataset)

    for name, settings in _combinations(environ):
        problems += _told(check, name, settings)
        runs[name] = settings
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return runs


def _key(config):
    """A text that is equal for configurations of the same run, as given and as recorded."""
    recipe = config.recipe()
    if config.dataset not in DATASETS and config.origins["image_shape"] == "default":
        recipe["image_shape"] = None  # as a record has it, it is the data's
    return str(recipe)


def _recorded(folder):
    """The runs that a sweep's folder holds already: `_key` → name."""
    found = {}
    for path in sorted(folder.glob("*/config.json")):
        with suppress(RecordError):  # it is told when that run's turn comes
            found.setdefault(_key(read_config(path.parent)), path.parent.name)
    return found


def _told(check, *arguments):
    """The lines that a check tells of mistakes."""
    try:
        check(*arguments)
    except UserError as error:
        return str(error).replace("another OUTDIR", "another folder for the sweep").splitlines()
    return []


def _combinations(environ):
    """A name and settings for each combination of what is swept."""
    lists = DEFAULTS | environ
    swept, problems = lists["SWEEP"].split(), []
    for name in swept:
        if name not in SWEPT:
            told = "expected DEPTHS or settings in capitals, separated by spaces"
            problems.append(f"SWEEP names {name}; {told}{did_you_mean(name.upper(), SWEPT)}")
        elif name not in lists:
            problems.append(f'SWEEP names {name}, which is not set; expected a list, as {name}="a b"')
    problems += [f"SWEEP names {name} twice" for name in set(swept) if swept.count(name) > 1]
    if "DEPTHS" not in swept and "DEPTHS" in environ:
        problems.append(f'DEPTHS is set and SWEEP does not name it; expected SWEEP="{" ".join(swept)} DEPTHS"')
    if {"DEPTHS", "EPOCHS"} <= set(swept) and ":" in lists["DEPTHS"]:
        problems.append("SWEEP names EPOCHS, and DEPTHS has epochs of its own; expected depths alone, as DEPTHS=28")
    if "DEPTHS" in swept and "RESNET_DEPTH" in environ:
        depths = lists["RESNET_DEPTH"].strip()
        problems.append(f'RESNET_DEPTH is set, and a sweep\'s depths are DEPTHS; expected DEPTHS="{depths}" instead')
    for text in lists["DEPTHS"].split():
        if not re.fullmatch("[0-9]+(:[0-9]+)?", text):
            problems.append(
                f"DEPTHS holds {text}; expected depths as 28, or with their epochs as 28:20, separated by spaces"
            )
    if problems:
        raise ConfigError("\n".join(problems))
    for chosen in itertools.product(*([_choice(name, text) for text in lists[name].split()] for name in swept)):
        parts, settings = zip(*chosen, strict=True)
        yield "_".join(parts), {name: text for each in settings for name, text in each.items()}


def _choice(name, text):
    """A value of what is swept: its part of the run's name, and its settings."""
    if name == "DEPTHS":
        depth, _, epochs = text.partition(":")
        return f"depth-{depth}", {"RESNET_DEPTH": depth} | ({"EPOCHS": epochs} if epochs else {})
    return f"{name.removeprefix('RESNET_').lower()}-{text.replace('/', '-')}", {name: text}
