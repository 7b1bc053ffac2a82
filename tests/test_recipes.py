# SPDX-License-Identifier: Apache-2.0
"""The published trainings: their values, what may be given beside them, Caffe's arithmetic."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dilseg import cli, models
from dilseg.data import IGNORE, Augmented, open_dataset
from dilseg.engine import (
    RECIPES,
    Processes,
    configure,
    load_checkpoint,
    resume_config,
    train,
)
from dilseg.engine.config import changed_from_recipe
from dilseg.engine.optim import make_optimizer, set_learning_rate
from dilseg.engine.samples import EpochBatches, Part, TrainingStream, training_transform

DOCS = Path(__file__).resolve().parents[1] / "docs"


def given_with(recipe, **arguments):
    """What a user gives beside the name of a recipe."""
    vgg16 = recipe.after is None and "backbone" not in recipe.arguments
    start = {"weights": "vgg16.pth"} if vgg16 else {"init": "best.pt"}
    return {"recipe": recipe.name, "root": "data", **start, **arguments}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_is_a_training(recipe):
    config = configure(**given_with(recipe))
    for name, value in recipe.arguments.items():
        assert getattr(config, name) == value, name
    assert changed_from_recipe(config) == {}
    assert config.out == str(Path("runs") / recipe.name)
    with torch.device("meta"):
        models.build(config.model, 3, **config.model_options())
    assert recipe.source
    assert recipe.after is None or recipe.after in RECIPES


# Images per step, loss, momentum, rate, steps; None where none are published.
PUBLISHED = {
    "fcn32s-voc": (1, "sum", 0.99, 1e-10, 100_000),
    "fcn16s-voc": (1, "sum", 0.99, 1e-12, 100_000),
    "fcn8s-voc": (1, "sum", 0.99, 1e-14, 100_000),
    "fcn8s-atonce-voc": (1, "sum", 0.99, 1e-10, 300_000),
    "fcn32s-accumulated-voc": (20, "mean", 0.9, 1e-4, None),
    "fcn32s-alexnet-voc": (20, "mean", 0.9, 1e-4, 100_000),
    "fcn32s-nyud": (1, "sum", 0.99, 1e-10, 100_000),
    "fcn32s-nyud-rgbd": (1, "sum", 0.99, 1e-10, 100_000),
    "fcn32s-nyud-rgb-hha": (1, "sum", 0.99, 1e-12, 100_000),
    "fcn32s-nyud-hha": (1, "sum", 0.99, 1e-10, 100_000),
    "fcn32s-siftflow": (1, "sum", 0.99, 1e-10, 100_000),
    "fcn16s-siftflow": (1, "sum", 0.99, 1e-12, 100_000),
    "fcn8s-siftflow": (1, "sum", 0.99, 1e-12, 100_000),
    "fcn32s-pascal-context": (1, "sum", 0.99, 1e-10, 400_000),
    "fcn16s-pascal-context": (1, "sum", 0.99, 1e-12, 400_000),
    "fcn8s-pascal-context": (1, "sum", 0.99, 1e-14, 400_000),
    "frontend-voc": (14, "mean", 0.9, 1e-3, 60_000),
    "context-voc": (60, "mean", 0.9, 1e-3, None),
    "joint-voc": (14, "mean", 0.9, 1e-5, None),
    "frontend-camvid": (8, "mean", 0.99, 1e-4, 20_000),
    "joint-camvid": (1, "mean", 0.9, 1e-5, None),
    "frontend-kitti": (8, "mean", 0.99, 1e-4, 10_000),
    "joint-kitti": (1, "mean", 0.99, 1e-5, 20_000),
    "frontend-cityscapes": (8, "mean", 0.99, 1e-4, 40_000),
    "context-cityscapes": (100, "mean", 0.99, 1e-4, 24_000),
    "joint-cityscapes": (1, "mean", 0.99, 1e-5, 60_000),
}


def test_values_are_those_of_the_papers():
    found = {}
    for recipe in RECIPES.values():
        config = configure(**given_with(recipe))
        steps = config.steps
        if "number of steps is ours" in recipe.note:
            steps = None
        found[recipe.name] = (
            config.batch_size * config.accumulate, config.loss, config.momentum, config.lr, steps,
        )  # fmt: skip
        assert (config.optimizer, config.schedule, config.weight_decay) == ("sgd", "constant", 5e-4)
        # The FCN release draws whole images with replacement and never mirrors; DilatedNet does.
        assert config.flip is not config.replacement is config.model.startswith("fcn")
    assert found == PUBLISHED


def test_what_is_given_takes_the_place_of_the_recipes():
    config = configure(recipe="fcn8s-atonce-voc", root="data", lr=1e-9, amp="bf16")
    assert (config.lr, config.loss, config.at_once) == (1e-9, "sum", True)
    assert changed_from_recipe(config) == {"lr": 1e-9, "amp": "bf16"}

    # The splits go with the data, the length is one of two, the rate belongs to the optimiser.
    other = configure(
        recipe="fcn32s-voc", data="folder", root="x", epochs=3, optimizer="adamw", out="y"
    )
    assert (other.train_split, other.eval_split) == ("train", "val")
    assert (other.epochs, other.steps) == (3, None)
    assert (other.lr, other.momentum, other.weight_decay) == (1e-4, None, 1e-2)
    same = configure(recipe="fcn32s-voc", data="sbd", root="x", optimizer="sgd")
    assert (same.eval_split, same.lr) == ("seg11valid", 1e-10)
    assert configure(recipe="fcn32s-accumulated-voc", root="x", steps=9).epochs is None


def test_mistakes_with_recipes_are_said():
    with pytest.raises(ValueError, match=r"--recipe: expected one of fcn32s-voc, .*`dilseg rec"):
        configure(recipe="fcn4s-voc")
    with pytest.raises(
        ValueError, match="--recipe fcn16s-voc continues fcn32s-voc: give its checkpoint with"
    ):
        configure(recipe="fcn16s-voc", root="data", weights="vgg16.pth")


def test_the_command_lists_and_shows_recipes(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == list(RECIPES)
    assert cli.main(["recipes", "joint-kitti", "fcn8s-voc"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "from frontend-kitti (--init)" in out
    assert "--dilations 1 1 2 4 8 1 --stage joint" in out
    assert "--no-flip --replacement --loss sum" in out
    assert cli.main(["recipes", "fcn4s"]) == 2


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_shown_values_are_a_command_line(recipe):
    words = re.sub(r"\s+", " ", str(recipe)).split(" values ")[1].split()
    given = vars(cli._parser().parse_args(["train", *words]))
    given.pop("run")
    shown = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    assert shown == dict(recipe.arguments)


def test_the_documentation_names_every_recipe():
    text = (DOCS / "training.md").read_text(encoding="utf-8")
    assert {name for name in RECIPES if f"`{name}`" not in text} == set()


# A recipe in use -------------------------------------------------------------------------------


def quick(out, **arguments):
    """A recipe on generated images: seconds."""
    return configure(
        **{
            "data": "shapes", "limit": 6, "crop": (48, 56), "eval_every": 0, "steps": 3,
            "fc_channels": 16, "device": "cpu", "out": str(out), **arguments,
        }
    )  # fmt: skip


def rows_of(folder):
    with (Path(folder) / "log.csv").open() as file:
        return list(csv.DictReader(file))


def losses_of(folder):
    return [float(row["loss"]) for row in rows_of(folder)]


def test_the_record_tells_recipe_and_changes(tmp_path):
    train(quick(tmp_path, recipe="fcn8s-atonce-voc", lr=1e-7))
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["recipe"] == record["arguments"]["recipe"] == "fcn8s-atonce-voc"
    changed = record["changed_from_recipe"]
    assert changed["lr"] == 1e-7
    assert changed["data"] == "shapes"
    assert {"momentum", "loss", "at_once", "replacement", "out"}.isdisjoint(changed)
    config = resume_config(tmp_path, steps=4)
    assert (config.recipe, config.lr, config.steps) == ("fcn8s-atonce-voc", 1e-7, 4)


# Caffe's arithmetic ----------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_steps_are_caffes(plain):
    """Caffe: v = m v + k lr (g + d w), w = w - v; biases have k = 2 and d = 0, mostly."""
    torch.manual_seed(0)
    model = models.fcn32s(3, "demo").double()
    config = configure(
        optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.05, plain_trunk_biases=plain
    )
    optimizer = make_optimizer(model, (), config)
    set_learning_rate(optimizer, config.lr)
    weights = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    velocities = {name: np.zeros_like(w) for name, w in weights.items()}
    for _ in range(3):
        for name, parameter in model.named_parameters():
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            caffes = name.endswith("bias") and not (plain and not name.startswith("score"))
            factor, decay = (2, 0.0) if caffes else (1, config.weight_decay)
            velocities[name] = config.momentum * velocities[name] + config.lr * factor * (
                gradient.numpy() + decay * weights[name]
            )
            weights[name] = weights[name] - velocities[name]
        optimizer.step()
    assert {name.split(".")[0] for name in weights} > {"conv1_1", "fc7", "score_fr"}
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(
            parameter.detach().numpy(), weights[name], rtol=1e-12, atol=1e-15, err_msg=name
        )


def test_trunk_biases_are_found_below_a_front_end():
    with torch.device("meta"):
        model = models.dilatednet(3, "demo")
    config = configure(
        optimizer="sgd", model="dilatednet", lr=1.0, weight_decay=0.5, plain_trunk_biases=True
    )
    names = {id(p): name for name, p in model.named_parameters()}
    doubled = {
        names[id(p)]
        for group in make_optimizer(model, (), config).param_groups
        if group["lr_multiplier"] == 2
        for p in group["params"]
    }
    assert "front_end.final.bias" in doubled
    assert not any(re.match(r"front_end\.(conv|fc)", name) for name in doubled)
    assert sum(name.startswith("context.") for name in doubled) == 8


def plain_sgd(**arguments):
    """Nothing random but the order, so that batches add up."""
    return {
        "optimizer": "sgd", "lr": 0.05, "weight_decay": 0.0, "momentum": 0.9, "dropout": 0.0,
        "schedule": "constant", "flip": False, **arguments,
    }  # fmt: skip


def test_accumulated_sums_are_one_large_batch(tmp_path):
    common = plain_sgd(model="fcn8s", loss="sum", lr=1e-6, clip_norm=1e9)
    train(quick(tmp_path / "one", batch_size=6, **common))
    train(quick(tmp_path / "three", batch_size=2, accumulate=3, **common))
    one, three = (load_checkpoint(tmp_path / n / "best.pt")["state_dict"] for n in ("one", "three"))
    for name in one:
        torch.testing.assert_close(three[name], one[name], rtol=1e-4, atol=1e-6)
    assert losses_of(tmp_path / "one")[2] < losses_of(tmp_path / "one")[0]
    assert [row["epoch"] for row in rows_of(tmp_path / "three")] == ["0", "1", "2"]


def test_accumulated_means_count_each_batch_alike(tmp_path):
    """As Caffe's iter_size: every batch divides by its own labelled pixels."""
    common = plain_sgd(momentum=0.0, scale=(0.3, 1.2), crop=(40, 40))
    config = quick(tmp_path, model="fcn32s", batch_size=1, accumulate=3, steps=1, **common)
    train(config)

    torch.manual_seed(config.seed)
    model = models.build("fcn32s", 7, **config.model_options())
    samples = Augmented(
        Part(open_dataset("shapes"), 6),
        training_transform(config, model.normalization.mean, 32),
        seed=config.seed,
        mean=model.normalization.mean,
        std=model.normalization.std,
    )
    stream = TrainingStream(samples, config, Processes(0, 1, torch.device("cpu")))
    batches = list(stream.batches(0, 1))
    assert len(batches) == 3
    assert len({int((target != IGNORE).sum()) for _, target in batches}) > 1
    losses = [model.scores(image).cross_entropy(t, ignore_index=IGNORE) for image, t in batches]
    mean = torch.stack(losses).mean()
    mean.backward()
    assert losses_of(tmp_path)[0] == pytest.approx(mean.item(), rel=1e-6)
    trained = load_checkpoint(tmp_path / "checkpoint.pt")["state_dict"]
    bias = model.score_fr.bias
    torch.testing.assert_close(trained["score_fr.bias"], (bias - 2 * 0.05 * bias.grad).detach())


def test_accumulation_resumes_to_the_same_curve(tmp_path):
    common = {"model": "fcn32s", "batch_size": 1, "accumulate": 2, "schedule": "constant"}
    train(quick(tmp_path / "whole", steps=5, **common))
    train(quick(tmp_path / "parts", **common))  # three steps: an epoch; then two of the next
    train(resume_config(tmp_path / "parts", steps=4), resume=True)
    train(resume_config(tmp_path / "parts", steps=5), resume=True)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


# Order of the images ---------------------------------------------------------------------------


def test_accumulated_batches_are_large_ones_in_parts():
    large = EpochBatches(20, 6, seed=1)
    small = EpochBatches(20, 2, seed=1, accumulate=3)
    assert (small.steps, len(small)) == (3, 9)
    joined = list(small)
    assert [joined[i] + joined[i + 1] + joined[i + 2] for i in (0, 3, 6)] == list(large)
    small.enter(0, 2)
    assert list(small) == joined[6:]
    with pytest.raises(
        ValueError, match="at most the 5 training images, but got 2 x --accumulate 3"
    ):
        EpochBatches(5, 2, seed=0, accumulate=3)


def test_drawing_with_replacement():
    batches = EpochBatches(50, 10, seed=1, replacement=True)
    drawn = [i for batch in batches for i in batch]
    assert len(drawn) == 50
    assert set(drawn) < set(range(50))
    shares = [EpochBatches(50, 10, seed=1, replacement=True, rank=r, count=2) for r in range(2)]
    for batch, one, two in zip(batches, *shares, strict=True):
        assert sorted(batch) == sorted(one + two)
