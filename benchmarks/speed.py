"""Training speed against PyTorch and against the plain definition, in alternation: `make bench`.

Every contestant runs in a process of its own, which waits while another one is timed. A figure is the median over
the rounds; the ratios are those of one run on one machine.
"""

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from resnet_vae.config import Config

CASES = {  # what is trained
    "published, batch 25": Config(decoder="published", batch_size=25),
    "mirrored, batch 25": Config(batch_size=25),
    "mirrored, batch 128": Config(batch_size=128),
    "quarter width, batch 100": Config(width=0.25, batch_size=100),
}
CONTESTANTS = {  # who trains it: the library, its options, the precision
    "resnet_vae float32": ("ours", "float32"),
    "resnet_vae bfloat16": ("ours", "mixed_bfloat16"),
    "plain Keras float32": ("plain", "float32"),
    "PyTorch eager float32": ("torch", "float32"),
    "PyTorch eager bfloat16": ("torch", "mixed_bfloat16"),
    "PyTorch compiled float32": ("torch.compile", "float32"),
    "PyTorch compiled bfloat16": ("torch.compile", "mixed_bfloat16"),
}
IMAGE_SHAPE = (32, 32, 3)
COLUMNS = ("case", "contestant", "images_per_second", "lowest", "highest", "first_step_seconds", "peak_megabytes")


def make_step(library, config):
    """A function that does one training step on a batch of uint8 images and returns its loss."""
    if library.startswith("torch"):
        from peer import make_step

        return make_step(config, IMAGE_SHAPE, library == "torch.compile", config.precision == "mixed_bfloat16")
    import keras

    from resnet_vae import blocks, build_vae
    from resnet_vae.normalization import BatchNormalization
    from resnet_vae.training import compile_vae

    if library == "plain":
        blocks.Bottleneck.call = blocks.Bottleneck.plain
        BatchNormalization.call = keras.layers.BatchNormalization.call
    vae = build_vae(config, IMAGE_SHAPE)
    if library == "plain":
        rate, clip = config.learning_rate, config.clip_norm
        vae.compile(keras.optimizers.AdamW(rate, config.weight_decay, beta_2=config.adam_beta_2, global_clipnorm=clip))
    else:
        compile_vae(vae, config, 500)
    return lambda images: float(vae.train_on_batch(images)[0])


def work(library, precision, config):
    """A contestant's process: a line "N" on its input asks for N steps; it answers with the seconds they took."""
    import numpy as np

    config = Config(**{**json.loads(config), "precision": precision})
    images = np.random.default_rng(0).integers(0, 256, (config.batch_size, *IMAGE_SHAPE), "uint8")
    began, step = time.perf_counter(), None
    for line in sys.stdin:
        step = step or make_step(library, config)
        if int(line) > 0:
            began = time.perf_counter()
        for _ in range(max(1, int(line))):
            step(images)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak}), flush=True)


class Contestant:
    """A process that does training steps when asked to."""

    def __init__(self, name, config):
        self.name = name
        command = [
            sys.executable,
            __file__,
            "--work",
            *CONTESTANTS[name],
            config.model_dump_json(exclude={"precision"}),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"},
        )

    def ask(self, steps):
        """Have it do so many steps (0: the first, building included): the seconds, and its peak memory in MB."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(case, config, names, rounds, steps):
    """Rows of the table for one case: the contestants take turns, `rounds` times `steps` training steps each."""
    contestants, firsts, seconds, peaks = [], {}, {name: [] for name in names}, {}
    for name in names:
        contestant = Contestant(name, config)
        contestants.append(contestant)
        firsts[name] = contestant.ask(0)["seconds"]
        contestant.ask(2)  # what is tuned at the second step
    for _ in range(rounds):
        for contestant in contestants:
            answer = contestant.ask(steps)
            seconds[contestant.name].append(answer["seconds"] / steps)
            peaks[contestant.name] = answer["peak"]
    rows = []
    for contestant in contestants:
        contestant.close()
        name = contestant.name
        speeds = [config.batch_size / each for each in seconds[name]]
        figures = (statistics.median(speeds), min(speeds), max(speeds), firsts[name], peaks[name])
        rows.append(dict(zip(COLUMNS, (case, name, *figures), strict=True)))
        print(f"{case:<28}{name:<28}{figures[0]:8.1f} images/s   first step {firsts[name]:6.1f} s", flush=True)
    return rows


def write(folder, rows):
    """Write speed.csv, speed.md, speed.png and provenance.json."""
    from resnet_vae.records import environment, write_json, write_text

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "speed.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    text = "| Case | Contestant | Images a second | lowest to highest | First step, s | Peak memory, MB |\n"
    text += "| --- | --- | ---: | ---: | ---: | ---: |\n"
    for row in rows:
        text += (
            f"| {row['case']} | {row['contestant']} | {row['images_per_second']:.1f} | {row['lowest']:.1f} to "
            f"{row['highest']:.1f} | {row['first_step_seconds']:.1f} | {row['peak_megabytes']:.0f} |\n"
        )
    write_text(folder / "speed.md", text)
    write_json(folder / "provenance.json", environment("tensorflow", ["cpu:0"]))
    draw(rows).savefig(folder / "speed.png", dpi=120)


def draw(rows):
    """A panel a case: a bar a contestant, with the range over the rounds."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(4.2 * len(cases), 3), layout="constrained")
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        own = [row for row in rows if row["case"] == case][::-1]
        names, speeds = [row["contestant"] for row in own], [row["images_per_second"] for row in own]
        ranges = [[row["images_per_second"] - row["lowest"] for row in own]]
        ranges.append([row["highest"] - row["images_per_second"] for row in own])
        colors = ["tab:blue" if name.startswith("resnet_vae") else "tab:gray" for name in names]
        axes.barh(names, speeds, xerr=ranges, color=colors)
        axes.set(title=case, xlabel="training, images a second")
    return figure


def main(arguments=None):
    """Parse the command line; a contestant's process is this file, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/bench"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=3, help="training steps a turn")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work:
        work(*chosen.work)
        return
    rows = []
    for case in chosen.cases:
        rows += measure(case, CASES[case], chosen.contestants, chosen.rounds, chosen.steps)
    write(chosen.folder, rows)


if __name__ == "__main__":
    main()
