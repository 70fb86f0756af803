"""The speed comparison: that its peer is the same network, and that it measures."""

import csv
import importlib
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from resnet_vae import Config, build_vae
from resnet_vae.blocks import ResidualBlock
from resnet_vae.verify import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
RNG = np.random.default_rng(0)


def copy_weights(ours, theirs):
    """Give the PyTorch layers the weights of the Keras ones, in the layouts that each library has."""
    import torch

    def copy(layer, module):
        first, second, *statistics = [keras.ops.convert_to_numpy(weight) for weight in layer.weights]
        if isinstance(layer, keras.layers.Dense):
            first = first.T
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.Conv2DTranspose)):
            same = isinstance(layer, keras.layers.Conv2DTranspose) == isinstance(module, torch.nn.ConvTranspose2d)
            first = first.transpose((3, 2, 0, 1) if same else (2, 3, 0, 1))
        targets = [module.weight, module.bias]
        targets += [module.running_mean, module.running_var] if statistics else []
        for target, value in zip(targets, (first, second, *statistics), strict=True):
            target.data.copy_(torch.from_numpy(np.ascontiguousarray(value)).reshape(target.shape))

    blocks = [
        layer for part in (ours.encoder, ours.decoder) for layer in part.layers if isinstance(layer, ResidualBlock)
    ]
    for block, module in zip(blocks, [*theirs.encoder, *theirs.decoder], strict=True):
        for layer in (*block.convolutions, *block.normalizations):
            copy(layer, getattr(module, layer.name))
        if block.shortcut is not None:
            copy(block.shortcut, module.shortcut[0])
            copy(block.shortcut_bn, module.shortcut[1])
    for part, name in ((ours.encoder, "encoder"), (ours.decoder, "decoder")):
        copy(part.get_layer("intermediate"), getattr(theirs, f"{name}_dense"))
        copy(part.get_layer("intermediate_bn"), getattr(theirs, f"{name}_bn"))
    for part, name in ((ours.encoder, "mean"), (ours.encoder, "log_var"), (ours.decoder, "image")):
        copy(part.get_layer(name), getattr(theirs, name))


@pytest.mark.parametrize(("decoder", "depth"), [("mirrored", 28), ("published", 28), ("mirrored", 40)])
def test_the_peer_is_the_same_network(decoder, depth):
    """The loss of equal weights on equal images, the noise taken out by a posterior of next to no width."""
    torch = pytest.importorskip("torch")
    from peer import VAE

    keras.utils.set_random_seed(0)
    size = {"width": 1 / 16, "latent_dim": 4, "intermediate_dim": 16}
    config = Config(**size, decoder=decoder, resnet_depth=depth, shortcut="projection", precision="float32")
    ours, theirs = build_vae(config, (16, 8, 3)), VAE(config, (16, 8, 3)).eval()
    for weight in ours.weights:
        if weight.name in ("kernel", "gamma") and not np.any(keras.ops.convert_to_numpy(weight)):
            weight.assign(RNG.uniform(-0.2, 0.2, weight.shape))  # small, so that no probability is at its limit
    ours.encoder.get_layer("log_var").bias.assign(np.full(4, -20.0))
    copy_weights(ours, theirs)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == sum(
        int(np.prod(weight.shape)) for weight in ours.trainable_weights
    )
    images = RNG.integers(0, 256, (6, 16, 8, 3), "uint8")
    ours.compile()
    expected = ours.evaluate(images, verbose=0)
    given, dtypes = torch.from_numpy(images).permute(0, 3, 1, 2), []
    with torch.no_grad():
        loss = theirs(given).item()
        for module in (theirs.mean, theirs.log_var, theirs.image):  # whose products are in bfloat16 in ours
            module.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            assert theirs(given).dtype == torch.float32
    assert dtypes == [torch.bfloat16] * 3
    assert loss == pytest.approx(expected[0] if isinstance(expected, list) else expected, rel=1e-5)


def test_arithmetic_of_a_step():
    """The counts of the original experiment's four depths, published and mirrored, by another hand."""
    import speed

    expected = {28: (29.0, 4.4), 40: (31.7, 6.1), 70: (64.7, 10.4), 100: (97.8, 14.7)}
    for depth, counts in expected.items():
        for decoder, gflop in zip(("published", "mirrored"), counts, strict=True):
            config = speed.BASE.replace(resnet_depth=depth, decoder=decoder)
            assert speed.training_gflop(config) == pytest.approx(gflop, abs=0.05)


def test_speed_is_measured(tmp_path, monkeypatch):
    """Two contestants in processes of their own take turns; the table holds it, and who cannot run is told."""
    import speed

    config = Config(width=1 / 16, latent_dim=4, intermediate_dim=16, batch_size=4, image_shape=(8, 8, 3))
    names = ["resnet_vae float32", "plain Keras float32"]
    rows = speed.measure("tiny", config, names, rounds=2, seconds=0)
    speed.write(tmp_path / "speed", rows, speed.COLUMNS, speed.draw(rows), {"commit": "of the start"})
    with open(tmp_path / "speed.csv", newline="") as file:
        recorded = list(csv.DictReader(file))
    assert [row["contestant"] for row in recorded] == names
    for row in recorded:
        assert 0 < float(row["lowest"]) <= float(row["images_per_second"]) <= float(row["highest"])
        assert float(row["build_seconds"]) > 0 < float(row["first_step_seconds"])
        assert 0 < float(row["input_share"]) < 50
        assert 0 < float(row["peak_share"]) < 100
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert verify(tmp_path) == []
    (tmp_path / "speed.md").write_text("")
    assert verify(tmp_path) == [f"{tmp_path / 'speed.md'} is not the file that was written (SHA-256)"]
    for words in (["--cases", "no such case"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            speed.main(words)
    monkeypatch.setitem(speed.CONTESTANTS, "nobody", ("torch.nonsense", "float64"))
    with pytest.raises(speed.BenchmarkError, match="nobody ended with exit code 2"):
        speed.measure("tiny", config, ["nobody"], rounds=1, seconds=0)


def test_speeds_and_ratios_are_those_of_the_answers(monkeypatch):
    """Of made-up contestants: ours takes a tenth of a second a step, the other one twice that, but for one turn."""
    import speed

    asked = []

    class Contestant:
        def __init__(self, name, config):
            self.name, self.turns = name, 0

        def ask(self, steps):
            asked.append((self.name, steps))
            if steps == "peak":
                return 0.5
            slow = self.name.startswith("plain")
            self.turns += steps > 3
            seconds = {0: 2.0, 1: 5.0}.get(steps, steps * (0.2 if slow else 0.1) * (10 if self.turns == 2 else 1))
            return {"seconds": seconds, "making": 0.03 * seconds, "peak": 700.0 + self.turns}

        def close(self):
            asked.append((self.name, "close"))

    monkeypatch.setattr(speed, "Contestant", Contestant)
    names = ["resnet_vae float32", "plain Keras float32"]
    ours, theirs = speed.measure("a case", speed.BASE, names, rounds=3, seconds=10)
    assert [steps for name, steps in asked if name == names[1]] == [0, 1, 3, 100, 100, 100, "peak", "close"]
    assert [name for name, steps in asked if steps == 100] == names * 3
    assert ours["images_per_second"] == ours["highest"] == pytest.approx(250)
    assert ours["lowest"] == pytest.approx(25)
    assert (theirs["images_per_second"], theirs["ratio"]) == pytest.approx((125, 2))
    assert ours["ratio"] == 1
    assert ours["teraflop_per_second"] == pytest.approx(250 * speed.training_gflop(speed.BASE) / 1000)
    assert ours["peak_share"] == pytest.approx(100 * ours["teraflop_per_second"] / 0.5)
    assert (ours["build_seconds"], ours["first_step_seconds"], ours["peak_megabytes"]) == (2, 5, 703)
    assert ours["input_share"] == pytest.approx(3)


def test_cost_as_work_grows(tmp_path, monkeypatch, capsys):
    """Exponents of made-up costs, and the files; an axis that cannot be measured is left out."""
    import scaling

    assert scaling.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)

    def measure(case, config, names, rounds, seconds):
        if config.width > 0.25:
            raise scaling.BenchmarkError("no memory")
        cost = config.resnet_depth**1.5
        seconds = {"build_seconds": 1.0, "first_step_seconds": 1.0}
        remat.append(config.remat)
        return [{"images_per_second": config.batch_size / cost, "peak_megabytes": cost**0.5, **seconds}]

    monkeypatch.setattr(scaling, "measure", measure)
    remat = []
    with pytest.raises(SystemExit):
        scaling.main([str(tmp_path / "none"), "--axes", "batch", "depth", "--most", "20"])
    assert "--most 20 leaves nothing of depth; expected 28 or more" in capsys.readouterr().err
    assert not remat
    assert scaling.main([str(tmp_path), "--axes", "depth", "width", "batch", "depth_remat", "--most", "250"]) == 1
    assert capsys.readouterr().err == "error: width: no memory; the axis is left out\n"
    assert remat == [False] * (4 + 2 + 3) + [True] * 2
    with open(tmp_path / "scaling.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["exponent"] for row in rows if row["exponent"]] == ["1.50", "0.00", "1.50"]
    assert [row["memory_exponent"] for row in rows if row["exponent"]] == ["0.75", "0.00", "0.75"]
    assert float(rows[0]["step_seconds"]) == pytest.approx(28**1.5, rel=1e-3)
    assert (tmp_path / "scaling.png").stat().st_size > 5000


@pytest.mark.parametrize("name", ["speed", "scaling"])
def test_a_benchmark_that_cannot_be_written_is_not_begun(name, tmp_path, monkeypatch, capsys):
    import speed

    benchmark = importlib.import_module(name)
    monkeypatch.setattr(benchmark, "measure", lambda *_: pytest.fail("measured in vain"))
    (tmp_path / "file").touch()
    assert speed.run(lambda: benchmark.main([str(tmp_path / "file" / "sub")])) == 2
    told = "error: .*sub cannot be written: Not a directory; choose another folder\n"
    assert re.fullmatch(told, capsys.readouterr().err)


def test_an_interrupted_benchmark_says_so_in_a_line(monkeypatch, capsys):
    """And leaves no contestant behind."""
    import speed

    small = speed.BASE.replace(width=1 / 16, latent_dim=4, intermediate_dim=16, image_shape=(8, 8, 3))
    started, ask = [], speed.Contestant.ask

    def interrupted(self, steps):
        if steps:
            raise KeyboardInterrupt
        started.append(self.process)
        return ask(self, steps)

    monkeypatch.setattr(speed.Contestant, "ask", interrupted)
    code = speed.run(lambda: speed.measure("tiny", small, ["resnet_vae float32"], rounds=1, seconds=0))
    assert (code, capsys.readouterr().err) == (130, "interrupted\n")
    assert [process.poll() for process in started] == [-9]
