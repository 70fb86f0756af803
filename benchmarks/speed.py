"""Training speed against PyTorch and against the plain definition, in alternation: `make bench`.

Every contestant runs in a process of its own, which waits while another one is timed. A figure is the median over
the rounds; the ratios are those of one run on one machine. Our contestants train as users do, through `fit` on the
package's batches, on the backend that KERAS_BACKEND names.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from resnet_vae.config import DOWNSAMPLING, Config, UserError
from resnet_vae.devices import devices, processor_prefers_bfloat16
from resnet_vae.records import code, csv_text, environment, make_writable, write_record, write_text

BASE = Config(image_shape=(32, 32, 3), batch_size=25, shortcut="projection")  # the post's, which PyTorch's has, too
DEPTHS = (28, 40, 70, 100)  # of the post
CASES = {  # what is trained
    "published, batch 25": BASE.replace(decoder="published"),
    "mirrored, batch 25": BASE,
    "mirrored, batch 128": BASE.replace(batch_size=128),
    "quarter width, batch 100": BASE.replace(width=0.25, batch_size=100),
    **{
        f"{decoder}, depth {depth}, batch {batch}": BASE.replace(decoder=decoder, resnet_depth=depth, batch_size=batch)
        for batch in (256, 1024)
        for decoder in ("published", "mirrored")
        for depth in DEPTHS
    },
    **{
        f"quarter width, depth {depth}, batch 100": BASE.replace(width=0.25, resnet_depth=depth, batch_size=100)
        for depth in DEPTHS
    },
}
CPU_CASES = list(CASES)[:4]
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}  # a GPU's memory
CONTESTANTS = {  # who trains it: the library, its options, the precision
    "resnet_vae float32": ("ours", "float32"),
    "resnet_vae bfloat16": ("ours", "mixed_bfloat16"),
    "resnet_vae float32, DETERMINISTIC=0": ("ours, not deterministic", "float32"),
    "plain Keras float32": ("plain", "float32"),
    "PyTorch eager float32": ("torch", "float32"),
    "PyTorch eager bfloat16": ("torch", "mixed_bfloat16"),
    "PyTorch compiled float32": ("torch.compile", "float32"),
    "PyTorch compiled bfloat16": ("torch.compile", "mixed_bfloat16"),
    "PyTorch eager float32, memory kept": ("torch, memory kept", "float32"),
    "PyTorch eager bfloat16, memory kept": ("torch, memory kept", "mixed_bfloat16"),
    "PyTorch compiled float32, memory kept": ("torch.compile, memory kept", "float32"),
    "PyTorch compiled bfloat16, memory kept": ("torch.compile, memory kept", "mixed_bfloat16"),
}
COLUMNS = {  # name in the CSV → (heading, format)
    "case": ("Case", "{}"),
    "contestant": ("Contestant", "{}"),
    "images_per_second": ("Images a second", "{:.1f}"),
    "lowest": ("lowest", "{:.1f}"),
    "highest": ("highest", "{:.1f}"),
    "ratio": ("The first to it", "{:.2f}"),
    "teraflop_per_second": ("TFLOP/s", "{:.3f}"),
    "peak_share": ("Of matrix products' speed, %", "{:.0f}"),
    "build_seconds": ("Import and build, s", "{:.1f}"),
    "first_step_seconds": ("First step, s", "{:.1f}"),
    "input_share": ("Making batches, %", "{:.2f}"),  # at most so long it waits for them: on TensorFlow it goes on
    "peak_megabytes": ("Peak memory of the host, MB", "{:.0f}"),
}


class BenchmarkError(Exception):
    """A contestant that cannot run."""


def training_gflop(config):
    """Arithmetic of one training step, GFLOP an image: six operations for each multiplication of a forward pass."""
    from resnet_vae.networks import stages

    height, width, channels = config.image_shape
    corner = height * width // DOWNSAMPLING**2
    depth = -(-config.intermediate_dim // corner)  # of the decoder's first image
    positions, total = height * width, 0
    for transpose in (False, True):
        if transpose:
            total += positions * channels * config.intermediate_dim + corner * depth * config.latent_dim
            positions, channels = corner, depth
        for count, (first, middle, last), (rows, columns) in stages(config, transpose):
            before = positions
            positions = positions * rows * columns if transpose else positions // (rows * columns)
            total += min(before, positions) * channels * (first + last)  # conv1 and the shortcut
            total += positions * (count * (9 * first * middle + middle * last) + (count - 1) * last * first)
            channels = last
    heads = 2 * corner * config.intermediate_dim * config.latent_dim
    return 6e-9 * (total + heads + positions * channels * config.image_shape[-1])


def matrix_speed(precision):
    """TFLOP/s in products of large matrices, which is about what the device can do at most.

    Of 4096×4096, or, where these take little time, as on GPUs, of 8192×8192 if that is faster.
    """
    speed = _matrix_speed(precision, 4096)
    return max(speed, _matrix_speed(precision, 8192)) if speed > 20 else speed


def _matrix_speed(precision, side):
    import keras

    matrix = keras.random.normal((side, side), stddev=side**-0.5, dtype=precision.removeprefix("mixed_"))

    def products(count):
        began, product = time.perf_counter(), matrix
        for _ in range(count):
            product = keras.ops.matmul(matrix, product)
        keras.ops.convert_to_numpy(product[0, :1])  # waits
        return time.perf_counter() - began

    count, seconds = 1, products(1)
    while seconds < 0.5:
        count *= 2
        seconds = products(count)
    return 2e-12 * count * side**3 / seconds


def make_training(library, config):
    """Build a contestant: a function that trains for so many steps and returns the seconds in which it made batches."""
    import numpy as np

    from resnet_vae.devices import keep_memory
    from resnet_vae.optimizer import compile_vae
    from resnet_vae.training import Batches, be_deterministic, feed

    pool = np.random.default_rng(0).integers(0, 256, (2 * config.batch_size, *config.image_shape), "uint8")

    class Timed(Batches):
        """So many batches of the pool, at random; it notes how long they took."""

        def __init__(self, steps):
            super().__init__(pool, config.batch_size, seed=0)
            self.steps, self.seconds = steps, 0.0

        def __len__(self):
            return self.steps

        def __getitem__(self, index):
            began = time.perf_counter()
            batch = super().__getitem__(index % 2)
            self.seconds += time.perf_counter() - began
            return batch

    if library.startswith("torch"):
        from peer import make_step

        if library.endswith("memory kept"):  # as ours does by itself; PyTorch leaves its allocator to the user
            keep_memory()
        step = make_step(config, library.startswith("torch.compile"), config.precision == "mixed_bfloat16")

        def train(steps):
            batches = Timed(steps)
            losses = [step(batches[index][0]) for index in range(steps)]
            losses[-1].item()  # waits
            return batches.seconds

        return train

    import keras

    from resnet_vae import blocks, build_vae
    from resnet_vae.normalization import BatchNormalization

    if library == "plain":
        blocks.ResidualBlock.call = blocks.ResidualBlock.plain
        BatchNormalization._fuses = lambda *_: False
    if library == "ours":  # the default of DETERMINISTIC
        be_deterministic()
    vae = build_vae(config)
    if library == "plain":
        rate, clip = config.learning_rate, config.clip_norm
        vae.compile(keras.optimizers.AdamW(rate, config.weight_decay, beta_2=config.adam_beta_2, global_clipnorm=clip))
    else:
        compile_vae(vae, config, 500)

    def train(steps):
        batches = Timed(steps)
        vae.fit(feed(batches), shuffle=False, verbose=0)
        return batches.seconds

    return train


def work(library, precision, config):
    """A contestant's process: a line "N" on its input asks for N steps; it answers with the seconds they took.

    It builds the network at the first line, which may ask for no steps. A line "peak" asks for `matrix_speed`.
    """
    config = Config(**{**json.loads(config), "precision": precision})
    train = None
    for line in sys.stdin:
        if line.strip() == "peak":
            print(json.dumps(matrix_speed(precision)), flush=True)
            continue
        began = time.perf_counter()
        train = train or make_training(library, config)
        making = train(int(line)) if int(line) else 0.0
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        print(json.dumps({"seconds": seconds, "making": making, "peak": peak}), flush=True)


class Contestant:
    """A process that trains when asked to."""

    def __init__(self, name, config):
        self.name = name
        library, precision = CONTESTANTS[name]
        environ = dict(os.environ)
        if library.startswith("torch"):
            environ["KERAS_BACKEND"] = "torch"  # so that no other library is in its process
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", library, precision, config.model_dump_json(exclude={"precision"})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,  # so that Ctrl-C ends this process, which ends the others
        )

    def ask(self, steps):
        """Have it train for so many steps; the first time it builds the network, too. Or ask for its "peak".

        Returns:
            A dict: the seconds, those in which batches were made, and its peak memory in MB. Or its TFLOP/s in products
            of matrices.

        Raises:
            BenchmarkError: the process died; what it had to say is on stderr.
        """
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            raise BenchmarkError(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(answer)

    def close(self):
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.communicate()


def measure(case, config, names, rounds, seconds):
    """Rows of the table for one case: the contestants take `rounds` turns of equally many training steps.

    As many as the quickest does in so many seconds, and at least three: where steps are short, what begins and ends a
    call of `fit` is not to count for more than it does in an epoch.
    """
    contestants = []
    try:
        builds, firsts, fastest = {}, {}, math.inf
        for name in names:
            contestants.append(Contestant(name, config))
            builds[name] = contestants[-1].ask(0)["seconds"]
            firsts[name] = contestants[-1].ask(1)["seconds"]
            fastest = min(fastest, contestants[-1].ask(3)["seconds"] / 3)  # what is tuned at the second step is now
        steps = max(3, math.ceil(seconds / fastest))
        answers = {name: [] for name in names}
        for _ in range(rounds):
            for contestant in contestants:
                answers[contestant.name].append(contestant.ask(steps))
        peaks = {contestant.name: contestant.ask("peak") for contestant in contestants}
    finally:
        for contestant in contestants:
            contestant.close()
    rows = []
    for name in names:
        speeds = [config.batch_size * steps / answer["seconds"] for answer in answers[name]]
        speed = statistics.median(speeds)
        teraflops = speed * training_gflop(config) / 1000
        row = {
            "case": case,
            "contestant": name,
            "images_per_second": speed,
            "lowest": min(speeds),
            "highest": max(speeds),
            "ratio": rows[0]["images_per_second"] / speed if rows else 1.0,
            "teraflop_per_second": teraflops,
            "peak_share": 100 * teraflops / peaks[name],
            "build_seconds": builds[name],
            "first_step_seconds": firsts[name],
            "input_share": 100 * statistics.median(a["making"] / a["seconds"] for a in answers[name]),
            "peak_megabytes": answers[name][-1]["peak"],
        }
        rows.append(row)
        print(f"{case:<36}{name:<37}{speed:8.1f} images/s   first step {firsts[name]:6.1f} s", flush=True)
    return rows


def write(path, rows, columns, figure, of_code):
    """Write path.csv, .md and .png, and record.json beside them.

    Args:
        path: without a suffix, in a folder that is there.
        rows: dicts.
        columns: name in the CSV → (heading, format).
        figure: a matplotlib Figure.
        of_code: what `code` told when it was imported.
    """
    import keras

    from resnet_vae.plots import save

    rounded = [{key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    write_text(path.with_suffix(".csv"), csv_text(rounded, columns))
    headings = [heading for heading, _ in columns.values()]
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    lines += [[form.format(row[name]) for name, (_, form) in columns.items()] for row in rows]
    write_text(path.with_suffix(".md"), "".join(f"| {' | '.join(line)} |\n" for line in lines))
    save(figure, path.with_suffix(".png"))
    write_record(path.parent, environment(keras.backend.backend(), devices()) | of_code)


def positive(text):
    """The type of an option: a whole number, 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is too few; expected 1 or more")
    return int(text)


def draw(rows):
    """A panel a case: a bar a contestant, with the range over the rounds. Of one contestant a panel: a bar a case."""
    from matplotlib.figure import Figure

    alone = len({row["contestant"] for row in rows}) == 1
    panel, bar = ("contestant", "case") if alone else ("case", "contestant")
    titles = list(dict.fromkeys(row[panel] for row in rows))
    across = min(2, len(titles))
    down = -(-len(titles) // across)
    bars = max(sum(row[panel] == title for row in rows) for title in titles)
    size = 3 + (4 if alone else 3.2) * across, max(2.6, 0.8 + 0.2 * bars) * down
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=True)  # the same bars in each panel
    for axes, title in zip(grid.flat, titles, strict=False):
        own = [row for row in rows if row[panel] == title][::-1]
        names, speeds = [row[bar] for row in own], [row["images_per_second"] for row in own]
        ranges = [[row["images_per_second"] - row["lowest"] for row in own]]
        ranges.append([row["highest"] - row["images_per_second"] for row in own])
        colors = ["tab:blue" if row["contestant"].startswith("resnet_vae") else "tab:gray" for row in own]
        axes.barh(names, speeds, xerr=ranges, color=colors)
        axes.set(title=title, xlabel="training, images a second")
    for axes in figure.axes[len(titles) :]:
        axes.remove()
    return figure


def contestants_here():
    """The contestants in float32, and those in bfloat16 where a processor here is faster in it, or there is a GPU."""
    fast = processor_prefers_bfloat16() or Path("/dev/nvidia0").exists()
    return [name for name, (_, precision) in CONTESTANTS.items() if precision == "float32" or fast]


def _listed(names):
    """An option's help: what it takes."""
    return f"one or more of: {'; '.join(names)}"


def main(arguments=None):
    """Parse the command line; a contestant's process is this file, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results/bench"), help="where the record goes")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CPU_CASES, metavar="CASE", help=_listed(CASES))
    contestants = {"choices": CONTESTANTS, "default": contestants_here(), "metavar": "CONTESTANT"}
    parser.add_argument("--contestants", nargs="+", help=_listed(CONTESTANTS), **contestants)
    parser.add_argument("--rounds", type=positive, default=5, help="turns of each contestant")
    parser.add_argument("--seconds", type=float, default=10, help="of the quickest contestant's turn, about")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work:
        work(*chosen.work)
        return 0
    make_writable(chosen.folder)
    rows, failed, of_code = [], [], code()
    for case in chosen.cases:
        try:
            rows += measure(case, CASES[case], chosen.contestants, chosen.rounds, chosen.seconds)
            write(chosen.folder / "speed", rows, COLUMNS, draw(rows), of_code)  # so that an interruption costs one case
        except BenchmarkError as error:
            print(f"error: {case}: {error}; the case is left out", file=sys.stderr)
            failed.append(case)
    return 1 if failed else 0


def run(main):
    """Run a benchmark; returns the exit code, 2 for a folder that cannot be written, 130 where Ctrl-C ended it."""
    for name, value in {"TF_CPP_MIN_LOG_LEVEL": "3", **SHARED}.items():  # of this process and of the contestants'
        os.environ.setdefault(name, value)
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(run(main))
