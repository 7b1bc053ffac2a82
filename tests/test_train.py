# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dilseg import models
from dilseg.data import IGNORE, Shapes, class_weights, open_dataset
from dilseg.engine import (
    DivergedError,
    Processes,
    SegmentationLoss,
    configure,
    load_checkpoint,
    load_model,
    processes,
    resume_config,
    train,
)
from dilseg.engine.checkpoint import ModelSpec, random_state, restore_random_state
from dilseg.engine.config import TrainConfig
from dilseg.engine.files import write_atomic, write_json
from dilseg.engine.optim import learning_rate_factor, make_optimizer, set_learning_rate
from dilseg.engine.samples import Cached, EpochBatches, Part, training_transform
from dilseg.engine.train import _train

ROOT = Path(__file__).resolve().parents[1]
CPU = Processes(0, 1, torch.device("cpu"))


def small(out, **arguments) -> TrainConfig:
    """A training of seconds: few small images, the demo backbone, every source of randomness."""
    defaults = {
        "data": "shapes", "model": "fcn32s", "limit": 6, "eval_every": 0, "batch_size": 2,
        "steps": 4, "crop": (48, 56), "scale": (0.8, 1.2), "dropout": 0.3, "device": "cpu",
    }  # fmt: skip
    return configure(**{**defaults, "out": str(out), **arguments})


def arguments_of(config: TrainConfig) -> list[str]:
    """The command line that gives this configuration."""
    words = []
    for name, value in dataclasses.asdict(config).items():
        flag = "--" + name.replace("_", "-")
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def command(*words, processes=1) -> list[str]:
    if processes == 1:
        return [sys.executable, "-m", "dilseg", *words]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1",
        f"--nproc-per-node={processes}", "-m", "dilseg", *words,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(*words, processes=1) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*words, processes=processes),
        env=environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def log_of(folder) -> list[str]:
    return (Path(folder) / "log.csv").read_text().splitlines()


def losses_of(folder) -> list[float]:
    return [float(line.split(",")[3]) for line in log_of(folder)[1:]]


def weights_of(folder, name="checkpoint.pt") -> dict[str, torch.Tensor]:
    return load_checkpoint(Path(folder) / name)["state_dict"]


def assert_same_weights(a, b, **tolerance):
    one, other = weights_of(a), weights_of(b)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(
            one[key], other[key], **tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


# Configuration ---------------------------------------------------------------------------------


def test_defaults_follow_data_and_model():
    demo = configure()
    assert (demo.data, demo.model, demo.backbone, demo.optimizer) == (
        "shapes", "fcn8s", "demo", "adamw",
    )  # fmt: skip
    real = configure(data="camvid", root="x", model="dilatednet", weights="vgg.pth")
    assert (real.backbone, real.context, real.momentum) == ("vgg16", "basic", None)
    assert configure(optimizer="sgd").momentum == 0.9
    staged = {"model": "dilatednet", "init": "front.pt"}
    joint, context = (configure(**staged, stage=stage).lr for stage in ("joint", "context"))
    assert joint == pytest.approx(context / 10)
    assert real.model_options() == {
        "backbone": "vgg16", "fc_channels": None, "dropout": 0.5, "context": "basic",
    }  # fmt: skip
    assert configure(steps=7).epochs is None


@pytest.mark.parametrize("model", ["fcn32s", "fcn16s", "fcn8s", "frontend", "dilatednet"])
def test_every_model_has_options_its_builder_takes(model):
    config = configure(model=model)
    with torch.device("meta"):
        assert models.build(model, 3, **config.model_options()).num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"model": "unet"}, r"--model: expected one of fcn32s, .*, but got 'unet'"),
        ({"optimizer": "lion"}, "--optimizer: expected one of sgd, adamw"),
        ({"lr": 0.0}, r"--lr: expected a number > 0, but got 0\.0"),
        ({"lr": math.nan}, "--lr: expected a number > 0, but got nan"),
        ({"batch_size": 0}, "--batch-size: expected a number >= 1"),
        ({"dropout": 1.0}, r"--dropout: expected a number below 1, but got 1\.0"),
        ({"crop": (0, 5)}, "--crop: expected two sizes"),
        ({"scale": (2.0, 1.0)}, "--scale: expected two numbers"),
        ({"epochs": 1, "steps": 2}, "--epochs and --steps: give one"),
        ({"context": "large"}, "--context: only dilatednet"),
        ({"stage": "joint"}, "--stage joint: only dilatednet trains in stages"),
        ({"model": "dilatednet", "stage": "context"}, "give its checkpoint with --init"),
        ({"data": "voc"}, "--root: give the folder"),
        ({"root": "x"}, "--root: shapes are generated"),
        ({"weights": "x"}, "--weights: VGG-16 weights fit --backbone vgg16 only"),
        ({"backbone": "vgg16", "weights": "x", "init": "y"}, "--weights and --init"),
        ({"model": "frontend", "learned_upsampling": True}, "--learned-upsampling: only an FCN"),
        ({"model": "fcn32s", "at_once": True}, "--at-once: only fcn16s and fcn8s"),
        ({"momentum": 0.5}, "--momentum belongs to --optimizer sgd"),
        ({"loss_sampling": 1.5}, r"--loss-sampling: expected a number in \(0, 1\], but got 1\.5"),
        ({"model": "dilatednet", "store_features": True}, "--store-features: only --stage context"),
        (
            {
                "model": "dilatednet",
                "stage": "context",
                "init": "x",
                "store_features": True,
                "crop": (8, 8),
            },
            "--store-features: stores the scores of whole images; leave out --scale and --crop",
        ),
        ({"cache": 0}, "--cache: expected a number > 0"),
        ({"accumulate": 0}, "--accumulate: expected a number >= 1"),
        ({"dilations": (1, 2)}, "--dilations: only dilatednet"),
        ({"model": "dilatednet", "dilations": (0,)}, "--dilations: expected numbers >= 1"),
        ({"colour": 1}, "unknown training argument 'colour'"),
    ],
)
def test_wrong_arguments_name_the_option(arguments, text):
    with pytest.raises(ValueError, match=text):
        configure(**arguments)


# Optimiser -------------------------------------------------------------------------------------


def test_a_default_batch_fits_the_limit():
    assert configure(limit=3).batch_size == 3
    assert configure(limit=3, batch_size=8).batch_size == 8
    assert configure(limit=300).batch_size == 16


def test_learning_rate_is_a_function_of_the_step():
    poly = [learning_rate_factor(s, 10, "poly", 0) for s in range(10)]
    assert poly == pytest.approx([(1 - s / 10) ** 0.9 for s in range(10)])
    warm = [learning_rate_factor(s, 10, "constant", 4) for s in range(6)]
    assert warm == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    both = learning_rate_factor(1, 10, "poly", 4)
    assert both == pytest.approx(0.5 * 0.9**0.9)


def _groups(model, config, fresh=()):
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, fresh, config)
    set_learning_rate(optimizer, config.lr)
    return {
        names[id(p)]: (group["lr"] / config.lr, group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def test_biases_learn_twice_as_fast_and_do_not_decay():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    config = configure(optimizer="sgd", lr=0.5, weight_decay=0.25)
    assert _groups(model, config) == (
        {"0.weight": (1, 0.25), "0.bias": (2, 0), "1.weight": (1, 0), "1.bias": (2, 0)}
    )
    config = configure(optimizer="adamw", lr=0.5, weight_decay=0.25)
    assert _groups(model, config)["0.bias"] == (1, 0)


def test_fresh_layers_have_their_multiplier_and_frozen_ones_stay_out():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    model[2].requires_grad_(False)
    config = configure(optimizer="sgd", lr=0.5, weight_decay=0.0, head_lr_multiplier=10.0)
    assert _groups(model, config, fresh={"1"}) == (
        {"0.weight": (1, 0), "0.bias": (2, 0), "1.weight": (10, 0), "1.bias": (20, 0)}
    )
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model trains"):
        make_optimizer(model, (), config)


# Order of the images ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_every_step_exactly(count):
    whole = EpochBatches(20, 6, seed=3)
    parts = [EpochBatches(20, 6, seed=3, rank=r, count=count) for r in range(count)]
    for epoch in range(2):
        for batches in (whole, *parts):
            batches.enter(epoch)
        steps = list(whole)
        assert len(steps) == len(whole) == 3
        shares = [list(part) for part in parts]
        assert {len(share) for steps_of_one in shares for share in steps_of_one} == {6 // count}
        for step, batch in enumerate(steps):
            assert sorted(i for share in shares for i in share[step]) == sorted(batch)
        used = [i for batch in steps for i in batch]
        assert len(set(used)) == 18
        assert set(used) <= set(range(20))


def test_an_epoch_can_be_entered_at_any_step_and_orders_differ():
    batches = EpochBatches(9, 2, seed=0)
    batches.enter(1)
    whole = list(batches)
    batches.enter(1, 3)
    assert list(batches) == whole[3:]
    assert len(batches) == 1
    batches.enter(2)
    assert list(batches) != whole


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="--batch-size: expected at most the 3 training images"):
        EpochBatches(3, 4, seed=0)
    with pytest.raises(ValueError, match="a multiple of the 2 processes, but got 3"):
        EpochBatches(9, 3, seed=0, count=2)


def test_part_is_spread_over_the_whole():
    whole = Shapes("val", length=10)
    part = Part(whole, 4)
    assert part.indices == [0, 3, 6, 9]
    assert part.name(1) == whole.name(3)
    assert np.array_equal(part.load(2)[1], whole.load(6)[1])
    assert len(Part(whole, 99)) == 10
    assert Part(whole, 1).indices == [0]
    with pytest.raises(ValueError, match="--limit: expected a number of images >= 1, but got 0"):
        Part(whole, 0)


def test_part_keeps_the_checks_of_the_whole():
    class Mismatched(Shapes):
        def load(self, index):
            raise ValueError(f"label {index} is not as large as its image")

    with pytest.raises(ValueError, match="label 9 is not as large"):
        Part(Mismatched("val", length=10), 2)[1]


def test_cached_images_are_those_of_the_set():
    whole = Shapes("val", length=5)
    size = sum(array.nbytes for array in whole.load(0))
    cached = Cached(whole, 3 * size)
    assert (cached.kept, cached.size, len(cached)) == (3, 3 * size, 5)
    assert (cached.split, cached.classes, cached.num_classes) == ("val", whole.classes, 7)
    for index in (*range(5), -1, -5):
        for ours, theirs in zip(cached.load(index), whole.load(index), strict=True):
            assert np.array_equal(ours, theirs)
    assert cached.load(1)[0] is cached.load(1)[0]
    assert np.array_equal(cached.load_label(2), whole.load_label(2))
    assert np.array_equal(cached.load_image(4), whole.load_image(4))
    with pytest.raises(IndexError):
        cached.load(5)


def test_a_cache_changes_nothing_but_reading(tmp_path, capsys):
    common = {"eval_every": 2, "eval_limit": 2}
    train(small(tmp_path / "files", **common))
    for gib, kept in ((1.0, 8), (1e-4, 2)):
        train(small(tmp_path / str(gib), cache=gib, **common))
        assert log_of(tmp_path / "files") == log_of(tmp_path / str(gib))
        assert f"{kept} images decoded into" in capsys.readouterr().out


# Loss ------------------------------------------------------------------------------------------


class _Affine(models.SegmentationModel):
    """The smallest thing with `segment`: a 1x1 convolution."""

    def __init__(self):
        super().__init__(3, output_stride=1, margin=0)
        self.conv = nn.Conv2d(3, 3, 1)

    def segment(self, images):
        return self.conv(images)


def _batch():
    rng = torch.Generator().manual_seed(1)
    target = torch.randint(0, 3, (2, 5, 7), generator=rng).to(torch.uint8)
    target[0, :2] = IGNORE
    return torch.rand(2, 3, 5, 7, generator=rng), target


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 1.0, 4.0])])
def test_sum_over_target_weight_is_torchs_mean(weight, smoothing):
    images, target = _batch()
    loss = SegmentationLoss(_Affine(), weight, smoothing)
    mean = loss(images, target) / loss.target_weight(target)
    expected = F.cross_entropy(
        loss.model.segment(images), target.long(), weight, ignore_index=IGNORE,
        label_smoothing=smoothing,
    )  # fmt: skip
    torch.testing.assert_close(mean.float(), expected)


def test_sum_loss_is_mean_loss_at_another_learning_rate(tmp_path):
    # One image, always the same: its labelled pixels are the factor between the two losses.
    fixed = {
        "limit": 1, "batch_size": 1, "flip": False, "optimizer": "sgd", "schedule": "constant",
        "weight_decay": 0.0, "dropout": 0.0, "steps": 3, "clip_norm": 1e9,
    }  # fmt: skip
    label = Part(open_dataset("shapes", split="train"), 1).load_label(0)
    pixels = int((label != IGNORE).sum())
    base = {"data": "shapes", "model": "fcn32s", "device": "cpu", "eval_every": 0, **fixed}
    train(configure(**base, out=str(tmp_path / "mean"), lr=0.1))
    train(configure(**base, out=str(tmp_path / "sum"), lr=0.1 / pixels, loss="sum"))
    assert losses_of(tmp_path / "sum") == pytest.approx(losses_of(tmp_path / "mean"), rel=1e-4)


def test_class_weights_reach_the_loss(tmp_path):
    train(small(tmp_path, class_weights="median", steps=1, scale=None, crop=None, flip=False))
    # Zero scores: every pixel costs ln(7), and a weighted mean of equals is that value.
    assert losses_of(tmp_path)[0] == pytest.approx(math.log(7), rel=1e-5)
    weights = class_weights(Part(Shapes("train"), 6))
    assert weights.min() < 0.5 < weights.max()


def test_a_sampled_loss_is_that_of_the_kept_cells(tmp_path):
    # Zero scores: whatever is kept costs ln(7) per pixel, and nothing else counts.
    config = small(tmp_path, model="fcn8s", loss_sampling=0.3, steps=3)
    train(config)
    assert losses_of(tmp_path)[0] == pytest.approx(math.log(7), rel=1e-5)
    train(small(tmp_path / "all", model="fcn8s", steps=3))
    assert losses_of(tmp_path)[1] != losses_of(tmp_path / "all")[1]

    image, label = Shapes("train").load(0)
    draw = np.random.default_rng
    plain = training_transform(dataclasses.replace(config, loss_sampling=1.0), (0.5,) * 3, cell=8)
    whole, sampled = (
        transform(image, label, draw(1))
        for transform in (plain, training_transform(config, (0.5,) * 3, cell=8))
    )
    assert np.array_equal(whole[0], sampled[0])  # the same crop
    kept = sampled[1] != IGNORE
    assert np.array_equal(whole[1][kept], sampled[1][kept])
    assert 0.1 < kept.mean() < 0.5


def _torchs_cross_entropy(scores, target, weight=None, **options):
    """What `Scores.cross_entropy` replaces: the published deconvolution and crop, torch's loss."""
    stride, classes = scores.scale_factor, scores.scores.shape[1]
    kernel = models.bilinear_kernel(2 * stride).expand(classes, 1, -1, -1)
    full = F.conv_transpose2d(
        scores.scores, kernel.to(scores.scores), stride=stride, groups=classes
    )
    (top, left), (h, w) = (o + stride // 2 for o in scores.origin), scores.size
    logits = full[:, :, top : top + h, left : left + w]
    return F.cross_entropy(logits, target.long(), weight, **options)


def test_the_fused_loss_trains_as_torchs_ops_do(tmp_path, monkeypatch):
    """FCN-8s with the default optimiser, 30 steps: one curve, whoever upsamples and takes the loss.

    In float64: AdamW divides even the smallest gradients by their own size, and so makes rounding
    grow, on some processors from 1e-7 of float32 to 1e-4 within these steps.
    """
    build, forward = ModelSpec.build, SegmentationLoss.forward
    monkeypatch.setattr(ModelSpec, "build", lambda self: build(self).double())
    monkeypatch.setattr(
        SegmentationLoss,
        "forward",
        lambda self, images, target: forward(self, images.double(), target),
    )
    arguments = {"model": "fcn8s", "steps": 30, "dropout": 0.0, "lr": 0.002, "eval_every": 0}
    train(small(tmp_path / "fused", **arguments))
    calls = []

    def by_torch(*args, **options):
        calls.append(args)
        return _torchs_cross_entropy(*args, **options)

    monkeypatch.setattr(models.Scores, "cross_entropy", by_torch)
    train(small(tmp_path / "torch", **arguments))
    assert len(calls) == 30
    fused, torchs = losses_of(tmp_path / "fused"), losses_of(tmp_path / "torch")
    assert fused == pytest.approx(torchs, rel=1e-9)
    assert len(set(fused)) == 30
    assert sum(fused[-5:]) < 0.7 * 5 * fused[0]  # and they learn: equal curves are no flat ones


# A run and its files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    config = small(
        folder, model="fcn8s", limit=2, steps=60, crop=None, scale=None, flip=False, lr=0.01,
        dropout=0.0, eval_every=30, eval_limit=2, train_split="val", save_every=25,
    )  # fmt: skip
    return folder, train(config)


def test_training_learns_and_says_so(finished):
    folder, result = finished
    assert result["status"] == "finished"
    losses = losses_of(folder)
    assert losses[0] == pytest.approx(math.log(7), rel=1e-5)  # zero-initialised scores
    assert np.mean(losses[-10:]) < 0.7 * losses[0]
    assert [e["step"] for e in result["evaluations"]] == [30, 60]
    assert result["best"] == max(e["mean_iou"] for e in result["evaluations"])


def test_log_has_one_line_per_step(finished):
    folder, _ = finished
    lines = log_of(folder)
    assert lines[0] == "step,epoch,lr,loss"
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(s + 1), str(s)] for s in range(60)]


def test_record_tells_the_whole_run(finished):
    folder, result = finished
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["arguments"]["lr"] == 0.01
    assert record["arguments"]["out"] == str(folder)
    assert record["step"] == record["steps"] == 60
    assert record["evaluations"] == result["evaluations"]
    assert record["best_mean_iou"] == result["best"]
    session = record["sessions"][0]
    assert session["start"] <= session["end"]
    environment = session["environment"]
    assert environment["torch"] == torch.__version__
    assert {"dilseg", "python", "build", "git_commit", "hardware"} <= environment.keys()
    assert environment["hardware"]["device"] == "cpu"


def test_curve_is_a_picture(finished):
    assert (finished[0] / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_temporary_files_stay(finished):
    assert {path.name for path in finished[0].iterdir()} == {
        "checkpoint.pt", "best.pt", "log.csv", "record.json", "curve.png", ".lock",
    }  # fmt: skip


def test_best_describes_itself(finished):
    model, model_spec, data_spec, content = load_model(finished[0] / "best.pt")
    assert not model.training
    assert (model_spec.name, model_spec.num_classes) == ("fcn8s", 7)
    assert data_spec.classes == Shapes.classes
    assert np.array_equal(data_spec.palette_array, Shapes.palette)
    assert data_spec.mean == pytest.approx((0.485, 0.456, 0.406))
    assert content["metrics"]["mean_iou"] == finished[1]["best"]
    assert "training" not in content
    assert model.segment(torch.zeros(1, 3, 32, 40)).shape == (1, 7, 32, 40)


def test_checkpoints_hold_no_code(finished):
    for name in ("best.pt", "checkpoint.pt"):
        assert torch.load(finished[0] / name, weights_only=True)["format"] == 1


def test_a_run_is_not_overwritten_unasked(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(ValueError, match=r"already holds a run .*--resume .*--overwrite"):
        train(small(folder))
    config = small(tmp_path / "r", steps=1)
    train(config)
    before = (tmp_path / "r" / "checkpoint.pt").read_bytes()
    with pytest.raises(FileNotFoundError, match="nowhere"):  # a mistake costs no old run
        train(dataclasses.replace(config, init="/nowhere/x.pt"), overwrite=True)
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() == before
    (tmp_path / "r" / "eval-val.json").write_text("scores of the old run")
    train(dataclasses.replace(config, seed=1), overwrite=True)
    assert not (tmp_path / "r" / "eval-val.json").exists()
    assert (tmp_path / "r" / "checkpoint.pt").read_bytes() != before


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_two_processes_do_not_train_in_one_folder(tmp_path, options):
    holder = "import sys; from pathlib import Path; from dilseg.engine.files import claim\n"
    holder += "with claim(Path(sys.argv[1])): print('claimed', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", holder, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=environment(), **pipes) as other:
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(ValueError, match="another process is training in it"):
            train(small(tmp_path, steps=1), **options)
        other.kill()
    if not options.get("resume"):
        assert train(small(tmp_path, steps=1), **options)["status"] == "finished"


def test_without_evaluation_the_last_weights_are_best(tmp_path):
    train(small(tmp_path, steps=2))
    last, best = weights_of(tmp_path), weights_of(tmp_path, "best.pt")
    assert all(torch.equal(last[key], best[key]) for key in last)


def test_seed_decides_everything(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(small(tmp_path / name, seed=seed))
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert log_of(tmp_path / "a") != log_of(tmp_path / "c")


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        train(small(tmp_path / str(workers), workers=workers, steps=5))
    assert log_of(tmp_path / "0") == log_of(tmp_path / "2")


def test_evaluating_changes_nothing(tmp_path):
    train(small(tmp_path / "never"))
    train(small(tmp_path / "often", eval_every=1, eval_limit=1))
    assert log_of(tmp_path / "never") == log_of(tmp_path / "often")


@pytest.mark.parametrize("arguments", [{"amp": "bf16"}, {"channels_last": True}])
def test_precision_and_layout_train_alike(tmp_path, arguments):
    train(small(tmp_path / "plain", dropout=0.0))
    train(small(tmp_path / "other", dropout=0.0, **arguments))
    tolerance = 0.05 if "amp" in arguments else 1e-4
    expected = losses_of(tmp_path / "plain")
    assert losses_of(tmp_path / "other") == pytest.approx(expected, rel=tolerance)


def test_half_precision_scales_its_gradients(tmp_path):
    # The scale starts too large on purpose: steps that overflow are skipped and halve it.
    train(small(tmp_path, amp="fp16", dropout=0.0, steps=10))
    losses = losses_of(tmp_path)
    assert losses[-1] < losses[0]
    scaler = load_checkpoint(tmp_path / "checkpoint.pt")["training"]["scaler"]
    assert 1 <= scaler["scale"] <= 65536


def own_images(root, sizes, void=()):
    """A folder of random images and labels of two classes; those in `void` have no label at all."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for index, size in enumerate(sizes):
            for kind, shape in (("images", (*size, 3)), ("labels", size)):
                folder = root / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                high = 256 if kind == "images" else 2
                array = rng.integers(0, high, shape).astype(np.uint8)
                if kind == "labels" and index in void:
                    array[:] = IGNORE
                image.fromarray(array).save(folder / f"{index}.png")
    (root / "classes.txt").write_text("ground\nthing\n")
    return root


def test_own_images_of_unequal_sizes(tmp_path):
    root = own_images(tmp_path / "data", [(20, 31), (33, 17), (25, 25)])
    result = train(
        configure(
            data="folder", root=str(root), model="fcn16s", backbone="demo", batch_size=3, steps=2,
            out=str(tmp_path / "run"), device="cpu",
        )
    )  # fmt: skip
    assert result["status"] == "finished"
    assert load_model(tmp_path / "run" / "best.pt")[2].classes == ("ground", "thing")


@pytest.mark.data
def test_real_images_from_imagenet_weights(tmp_path, data_root, capsys):
    weights = data_root / "weights" / "vgg16_imagenet_features_fp16.pth"
    if not weights.is_file():
        pytest.skip(f"no {weights}")
    result = train(
        configure(
            data="camvid", root=str(data_root / "camvid"), model="fcn8s", weights=str(weights),
            fc_channels=16, crop=(64, 96), limit=3, eval_every=0, steps=3, out=str(tmp_path),
            device="cpu",
        )
    )  # fmt: skip
    assert result["status"] == "finished"
    assert losses_of(tmp_path)[0] == pytest.approx(math.log(11), rel=1e-5)
    out = capsys.readouterr().out
    assert "conv5_3" in out
    assert "fc6" in out.split("Left fresh")[1]


# Stages ----------------------------------------------------------------------------------------


def test_dilatednet_in_stages(tmp_path):
    common = {"fc_channels": 16, "crop": (24, 24), "scale": None, "limit": 2, "steps": 2}
    train(small(tmp_path / "front", model="frontend", **common))
    front = weights_of(tmp_path / "front", "best.pt")

    init = str(tmp_path / "front" / "best.pt")
    common["model"] = "dilatednet"
    train(small(tmp_path / "context", stage="context", init=init, **common))
    context = weights_of(tmp_path / "context", "best.pt")
    for key, value in front.items():
        assert torch.equal(context[f"front_end.{key}"], value), key

    init = str(tmp_path / "context" / "best.pt")
    train(small(tmp_path / "joint", stage="joint", init=init, **common))
    joint = weights_of(tmp_path / "joint", "best.pt")
    changed = {key.split(".")[0] for key in joint if not torch.equal(joint[key], context[key])}
    assert changed == {"front_end", "context"}


def test_frozen_front_end_has_no_dropout(tmp_path):
    common = {"fc_channels": 16, "crop": (24, 24), "scale": None, "limit": 2, "steps": 2}
    train(small(tmp_path / "front", model="frontend", **common))
    init = str(tmp_path / "front" / "best.pt")
    for dropout in (0.0, 0.9):
        train(
            small(
                tmp_path / str(dropout), model="dilatednet", stage="context", init=init,
                **{**common, "dropout": dropout},
            )
        )  # fmt: skip
    assert log_of(tmp_path / "0.0") == log_of(tmp_path / "0.9")


@pytest.fixture(scope="module")
def front_end(tmp_path_factory):
    folder = tmp_path_factory.mktemp("front_end")
    train(small(folder, model="frontend", fc_channels=16, crop=(24, 24), limit=2, steps=2))
    return folder / "best.pt"


def context_stage(out, front_end, **arguments):
    common = {
        "model": "dilatednet", "stage": "context", "init": str(front_end), "fc_channels": 16,
        "crop": None, "scale": None, "limit": 4, "dropout": 0.5, "loss_sampling": 0.5,
        "schedule": "constant",
    }  # fmt: skip
    return small(out, **{**common, **arguments})


def test_stored_features_train_as_live_ones(tmp_path, front_end):
    """Two epochs, half of the images mirrored: what was computed once serves every step.

    The front end computes one image at a time instead of two, which may round its sums otherwise.
    """
    train(context_stage(tmp_path / "live", front_end))
    train(context_stage(tmp_path / "stored", front_end, store_features=True, steps=3))
    (features,) = (tmp_path / "stored").glob("features-*")
    written = {path.name: path.stat().st_mtime_ns for path in features.iterdir()}
    assert sorted(written) == [f"{i:06d}.npy" for i in range(4)]
    assert np.load(features / "000000.npy").shape == (2, 7, 12, 12)
    (features / "000001.npy").unlink()  # as after a kill: only what is missing is computed again
    train(resume_config(tmp_path / "stored", steps=4), resume=True)
    again = {path.name: path.stat().st_mtime_ns for path in features.iterdir()}
    assert {name for name in written if written[name] != again[name]} == {"000001.npy"}
    live = losses_of(tmp_path / "live")
    assert losses_of(tmp_path / "stored") == pytest.approx(live, rel=1e-5)
    assert len(set(live)) == 4
    assert_same_weights(tmp_path / "stored", tmp_path / "live", rtol=1e-4, atol=1e-5)


def test_stored_features_of_other_weights_are_not_read(tmp_path, front_end):
    content = load_checkpoint(front_end)
    content["state_dict"]["final.bias"] += 1
    torch.save(content, tmp_path / "other.pt")
    common = {"store_features": True, "steps": 1, "limit": 2}
    train(context_stage(tmp_path / "run", front_end, **common))
    (old,) = (tmp_path / "run").glob("features-*")
    train(context_stage(tmp_path / "run", tmp_path / "other.pt", **common), overwrite=True)
    (new,) = (tmp_path / "run").glob("features-*")
    assert new != old
    train(context_stage(tmp_path / "live", tmp_path / "other.pt", steps=1, limit=2))
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "live"), rel=1e-5)


def test_fcn16s_starts_where_fcn32s_ended(tmp_path, capsys):
    common = {"steps": 1, "crop": None, "scale": None, "dropout": 0.0, "fc_channels": 16}
    train(small(tmp_path / "32", **common))
    capsys.readouterr()
    train(
        small(
            tmp_path / "16", model="fcn16s", init=str(tmp_path / "32" / "best.pt"), lr=1e-12,
            **common,
        )
    )  # fmt: skip
    before, after = weights_of(tmp_path / "32"), weights_of(tmp_path / "16")
    torch.testing.assert_close(after["score_fr.weight"], before["score_fr.weight"])
    assert after["score_pool4.weight"].abs().max() < 1e-6
    assert "score_pool4" in capsys.readouterr().out


def test_a_stage_that_does_not_fit_names_the_key(tmp_path):
    train(small(tmp_path / "a", steps=1, fc_channels=16))
    with pytest.raises(ValueError, match=r"fc6\.weight"):
        train(small(tmp_path / "b", fc_channels=8, init=str(tmp_path / "a" / "best.pt")))


# Going wrong -----------------------------------------------------------------------------------


def test_divergence_stops_with_a_sentence_and_keeps_the_checkpoint(tmp_path):
    config = small(
        tmp_path, optimizer="sgd", lr=1e30, steps=50, save_every=1, clip_norm=1e30, dropout=0.0
    )
    with pytest.raises(
        DivergedError, match=r"became (nan|inf|nan or infinite) at step \d+: lower --lr"
    ):
        train(config)
    losses = losses_of(tmp_path)
    assert losses
    assert all(map(math.isfinite, losses))
    kept = load_checkpoint(tmp_path / "checkpoint.pt")
    assert kept["step"] <= len(losses)
    assert all(value.isfinite().all() for value in kept["state_dict"].values())
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"].startswith("stopped: ")


def test_a_first_loss_far_above_a_guess_is_announced(tmp_path, capsys):
    train(small(tmp_path / "a", steps=1))
    assert "warning" not in capsys.readouterr().out
    content = load_checkpoint(tmp_path / "a" / "best.pt")
    content["state_dict"]["score_fr.bias"][0] = -50.0
    torch.save(content, tmp_path / "bad.pt")
    train(small(tmp_path / "b", steps=1, init=str(tmp_path / "bad.pt")))
    assert "warning: the first loss is far above that of a guess" in capsys.readouterr().out


def test_missing_matplotlib_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs the package matplotlib.*pip install"):
        train(small(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"some text"])
def test_damaged_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_other_files_are_no_checkpoints(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a checkpoint of `dilseg train`"):
        load_checkpoint(tmp_path / "weights.pt")
    torch.save({"format": 99, "state_dict": {}}, tmp_path / "future.pt")
    with pytest.raises(ValueError, match="checkpoint format 99"):
        load_checkpoint(tmp_path / "future.pt")
    with pytest.raises(FileNotFoundError, match="this is a folder"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        load_checkpoint(tmp_path / "none.pt")


def test_devices_that_are_not_there(monkeypatch):
    for name, text in (
        ("gpu", "expected auto, cpu, cuda"),
        ("meta", "expected auto, cpu, cuda"),
        ("cuda", "give --device cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match=text), processes(name):
            pass


# Files -----------------------------------------------------------------------------------------


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "sub" / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"new, but only ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    write_atomic(path, lambda file: file.write(b"new"))
    assert [p.read_bytes() for p in path.parent.iterdir()] == [b"new"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_named(tmp_path, monkeypatch):
    def save(content, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match=r"checkpoint\.pt: cannot be written in full; is the disk"):
        train(small(tmp_path, steps=1))
    assert not (tmp_path / ".checkpoint.pt.tmp").exists()


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5], "b": (-math.inf, None)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": [None, None]}


def test_random_state_round_trip():
    cpu = torch.device("cpu")

    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    draw()
    state = random_state(cpu)
    first = draw()
    restore_random_state(state, cpu)
    assert draw() == first


# Resuming --------------------------------------------------------------------------------------


def test_a_longer_constant_run_continues_the_shorter(tmp_path):
    common = {"schedule": "constant", "save_every": 2}
    train(small(tmp_path / "whole", steps=7, **common))
    train(small(tmp_path / "parts", steps=3, **common))
    train(resume_config(tmp_path / "parts", steps=7), resume=True)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", rtol=0, atol=0)
    record = json.loads((tmp_path / "parts" / "record.json").read_text())
    assert [s["first_step"] for s in record["sessions"]] == [0, 3]


def test_what_cannot_be_resumed_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        resume_config(tmp_path)
    train(small(tmp_path / "run", steps=2))
    with pytest.raises(ValueError, match=r"finished \(step 2 of 2\)"):
        resume_config(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"--lr 0\.5: the run in .* has 0\.00\d+; leave the option"
    ):
        resume_config(tmp_path / "run", lr=0.5)
    with pytest.raises(ValueError, match="--steps 9"):  # poly: other steps, other learning rates
        resume_config(tmp_path / "run", steps=9)
    weights = tmp_path / "only"
    weights.mkdir()
    (weights / "checkpoint.pt").write_bytes((tmp_path / "run" / "best.pt").read_bytes())
    with pytest.raises(ValueError, match="weights only and cannot be resumed"):
        resume_config(weights)


def test_other_data_cannot_be_resumed_on(tmp_path):
    train(small(tmp_path, steps=2, schedule="constant"))
    config = dataclasses.replace(resume_config(tmp_path, steps=3), limit=5)
    with pytest.raises(ValueError, match="started on 6 training images, but the data now has 5"):
        train(config, resume=True)


def test_resume_accepts_what_may_change_and_what_is_equal(tmp_path):
    train(small(tmp_path, steps=2, schedule="constant"))
    config = resume_config(tmp_path, steps=3, workers=1, crop=[48, 56], save_every=7)
    assert (config.steps, config.workers, config.save_every) == (3, 1, 7)


def _wait_for_steps(folder, steps, process):
    """Waits until a running training has logged `steps` steps."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (folder / "log.csv").exists() and len(log_of(folder)) > steps:
            return
        time.sleep(0.005)
    raise AssertionError(f"no step {steps} within two minutes")


def _start(config) -> subprocess.Popen:
    return subprocess.Popen(
        command("train", *arguments_of(config)),
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_killed_training_resumes_to_the_same_curve(tmp_path):
    common = {
        "model": "fcn8s", "steps": 60, "save_every": 3, "threads": 1, "eval_every": 20,
        "eval_limit": 1,
    }  # fmt: skip
    threads = torch.get_num_threads()
    try:
        train(small(tmp_path / "whole", **common))
    finally:
        torch.set_num_threads(threads)

    # Two kills, at moments nobody chose: in a step, in a write, between two files.
    moment = random.Random()
    killed = tmp_path / "killed"
    process = _start(small(killed, **common))
    steps = moment.randint(4, 30)
    _wait_for_steps(killed, steps, process)
    time.sleep(moment.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    reached = load_checkpoint(killed / "checkpoint.pt")["step"]
    assert 3 <= reached < 60, f"killed after step {steps}"

    done = run("train", "--resume", "--out", str(killed))
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {reached}" in done.stdout
    for line, expected in zip(log_of(killed), log_of(tmp_path / "whole"), strict=True):
        assert line == expected, f"killed after step {steps}, resumed at {reached}"
    assert_same_weights(killed, tmp_path / "whole", rtol=0, atol=0)
    records = [json.loads((tmp_path / n / "record.json").read_text()) for n in ("whole", "killed")]
    assert records[0]["evaluations"] == records[1]["evaluations"]


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    config = small(tmp_path / "run", steps=5000, save_every=5000)
    process = _start(config)
    _wait_for_steps(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "go on with: dilseg train --resume --out" in out
    step = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert step == len(log_of(tmp_path / "run")) - 1
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "interrupted"


# Several processes -----------------------------------------------------------------------------


def test_two_processes_equal_one(tmp_path):
    # Random crops give the two processes different numbers of labelled pixels: the mean must be
    # that of all. Dropout is off since each process draws its own. Two of the six images are left
    # over in every epoch.
    common = {
        "batch_size": 2, "accumulate": 2, "steps": 4, "dropout": 0.0, "optimizer": "sgd",
        "lr": 0.05, "threads": 1,
        "eval_every": 2, "eval_limit": 3, "schedule": "constant", "clip_norm": 1e9,
    }  # fmt: skip
    threads = torch.get_num_threads()
    try:
        train(small(tmp_path / "one", **common))
    finally:
        torch.set_num_threads(threads)
    config = small(tmp_path / "two", **{**common, "steps": 3})
    done = run("train", *arguments_of(config), processes=2)
    assert done.returncode == 0, done.stderr
    done = run("train", "--resume", "--steps", "4", "--out", str(tmp_path / "two"), processes=2)
    assert done.returncode == 0, done.stderr

    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-6)
    records = [json.loads((tmp_path / n / "record.json").read_text()) for n in ("one", "two")]
    assert records[1]["processes"] == 2
    one, two = ({e["step"]: e["mean_iou"] for e in r["evaluations"]} for r in records)
    assert two[2] == pytest.approx(one[2], abs=1e-3)
    assert two[4] == pytest.approx(one[4], abs=1e-3)

    with pytest.raises(
        ValueError, match="was started with 2 processes, but this is a resume with 1"
    ):
        train(resume_config(tmp_path / "two", steps=6), resume=True)


def test_two_processes_share_unequal_images(tmp_path):
    """Images of all sizes, one process without a label or an image: still the steps of one.

    Seven images in batches of four leave three over. In the first step the second process has
    nothing but void, and evaluation has one image for two processes.
    """
    dry = next(iter(EpochBatches(7, 4, seed=0, rank=1, count=2)))
    sizes = [(20, 31), (33, 17), (25, 25), (18, 40), (29, 22), (40, 19), (23, 37)]
    root = own_images(tmp_path / "data", sizes, void=dry)
    common = {
        "data": "folder", "root": str(root), "model": "fcn8s", "backbone": "demo", "limit": None,
        "fc_channels": 16, "batch_size": 4, "steps": 3, "crop": None, "scale": None, "dropout": 0.0,
        "optimizer": "sgd", "lr": 0.05, "eval_every": 3, "eval_limit": 1, "threads": 1,
    }  # fmt: skip
    threads = torch.get_num_threads()
    try:
        train(small(tmp_path / "one", **common))
    finally:
        torch.set_num_threads(threads)
    done = run("train", *arguments_of(small(tmp_path / "two", **common)), processes=2)
    assert done.returncode == 0, done.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    assert_same_weights(tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-6)
    one, two = (
        json.loads((tmp_path / n / "record.json").read_text())["evaluations"]
        for n in ("one", "two")
    )
    assert two == [pytest.approx(e, abs=2e-3) for e in one]


def test_only_the_first_process_writes_and_prints(tmp_path, capsys):
    # A second process whose peers answer nothing: its collectives are the identity.
    other = Processes(1, 1, torch.device("cpu"))
    folder = tmp_path / "run"
    result = _train(small(folder, eval_every=2, eval_limit=2, save_every=1), other, resume=False)
    assert result["status"] == "finished"
    assert len(result["evaluations"]) == 2
    assert not folder.exists()
    assert capsys.readouterr().out == ""
