# SPDX-License-Identifier: Apache-2.0
"""A published experiment from one command: trainings in order, scores on test, one record."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dilseg.data import open_dataset
from dilseg.engine.config import TrainConfig, configure
from dilseg.engine.console import say
from dilseg.engine.evaluate import evaluate
from dilseg.engine.files import write_atomic, write_json
from dilseg.engine.processes import Processes, processes
from dilseg.engine.record import environment
from dilseg.engine.train import FinishedError, resume_config, train

__all__ = ["REPRODUCTIONS", "Reproduction", "Stage", "reproduce"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training of an experiment.

    Attributes:
        name: Of its run folder.
        title: Of its column.
        arguments: Fields of `TrainConfig`.
        after: The stage whose ``best.pt`` it starts from; None for the classifier's weights.
    """

    name: str
    title: str
    arguments: Mapping[str, Any]
    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """An experiment.

    Attributes:
        title: What is compared, as a heading.
        stages: Its trainings, in order.
        common: Fields that all of them share.
        split: Split that is scored.
        published: IoU per class in percent, as published.
        mean_iou: Their mean as published.
        source: Where these were published, and with what.
    """

    title: str
    stages: tuple[Stage, ...]
    common: Mapping[str, Any]
    split: str
    published: Mapping[str, float]
    mean_iou: float
    source: str


_CAMVID = Reproduction(
    title="CamVid test, IoU in percent",
    stages=(
        Stage(
            name="frontend",
            title="front end",
            arguments={"model": "frontend", "batch_size": 8, "crop": (256, 256), "steps": 3000},
        ),
        Stage(
            name="context",
            title="DilatedNet (front end + context Basic)",
            after="frontend",
            arguments={
                "model": "dilatednet", "context": "basic", "stage": "context",
                "store_features": True, "batch_size": 8, "lr": 1e-3, "steps": 2000,
            },
        ),
        Stage(
            name="fcn8s",
            title="FCN-8s",
            arguments={"model": "fcn8s", "batch_size": 2, "steps": 4000},
        ),
    ),
    # Layers without ImageNet weights (often fc6 and fc7) learn in so few steps with AdamW. A
    # checkpoint of VGG-16 with its optimiser has 1.6 GB: few of them.
    common={
        "data": "camvid", "optimizer": "adamw", "amp": "bf16", "channels_last": True, "cache": 2.0,
        "eval_every": 1000, "save_every": 1000,
    },
    split="test",
    published={
        "building": 82.6, "tree": 76.2, "sky": 89.9, "car": 84.0, "sign": 46.9, "road": 92.2,
        "pedestrian": 56.3, "fence": 35.8, "pole": 23.4, "pavement": 75.3, "bicyclist": 55.5,
    },
    mean_iou=65.3,
    source="Dilation8, Yu & Koltun 2016, table 5: images of 640 x 480, front end of 20 000 steps, "
    "then both parts together",
)  # fmt: skip

REPRODUCTIONS: Mapping[str, Reproduction] = {"camvid": _CAMVID}
"""The experiments by name."""


def reproduce(
    name: str,
    *,
    root: str,
    out: str,
    weights: str | None = None,
    steps: Sequence[int] | None = None,
    **arguments: object,
) -> dict[str, Any]:
    """Trains what an experiment asks for, scores it, and writes ``reproduction.json`` and ``.md``.

    Every stage is a run folder below `out`. Called again, it goes on where it was stopped: finished
    stages and scores are kept, an interrupted one is resumed.

    Args:
        name: A key of `REPRODUCTIONS`.
        root: Folder of the data set.
        out: Folder for the stages and the record.
        weights: torchvision VGG-16 state dict to start from.
        steps: Steps of every stage; None for the experiment's own.
        arguments: Fields of `TrainConfig` for every stage, in place of the experiment's;
            ``eval_limit`` also counts for the scores.

    Returns:
        What ``reproduction.json`` holds; with ``status`` interrupted, only that.

    Raises:
        ValueError: An unknown experiment, arguments that are wrong or differ from those of the
            stages in `out`, or no weights for VGG-16.
        FileNotFoundError: Missing data or weights.
    """
    if name not in REPRODUCTIONS:
        raise ValueError(f"expected one of {', '.join(REPRODUCTIONS)}, but got {name!r}.")
    experiment = REPRODUCTIONS[name]
    if steps is not None and len(steps) != len(experiment.stages):
        raise ValueError(
            f"--stage-steps: expected {len(experiment.stages)} numbers, one per stage "
            f"({', '.join(stage.name for stage in experiment.stages)}), but got {len(steps)}."
        )
    configs = _configurations(experiment, root, out, weights, steps, arguments)
    # One group for all trainings and scores: torchrun's address serves only one.
    with processes(next(iter(configs.values())).device) as group:
        results = {}
        for stage in experiment.stages:
            config = configs[stage.name]
            if _train_stage(config, group) == "interrupted":
                say("stopped; the same command goes on from here", quiet=not group.is_first)
                return {"status": "interrupted"}
            results[stage.name] = _scores(config, experiment.split)
        record = _record(name, experiment, configs, results)
        record["environment"] = environment(group.device)
        if group.is_first:
            folder = Path(out)
            text = _table(experiment, record)
            write_json(folder / "reproduction.json", record)
            write_atomic(folder / "reproduction.md", lambda file: file.write(text.encode()))
            say(text)
            say(f"written to {folder / 'reproduction.json'} and .md")
    return record


def _configurations(
    experiment: Reproduction,
    root: str,
    out: str,
    weights: str | None,
    steps: Sequence[int] | None,
    arguments: Mapping[str, object],
) -> dict[str, TrainConfig]:
    """The arguments of every stage; all are checked before the first one trains."""
    configs: dict[str, TrainConfig] = {}
    for index, stage in enumerate(experiment.stages):
        values = {**experiment.common, **stage.arguments}
        if steps is not None:
            values["steps"] = steps[index]
        given = {key: value for key, value in arguments.items() if value is not None}
        values.update(given, root=root, out=str(Path(out) / stage.name))
        if stage.after is None:
            values["weights"] = weights
        else:
            values["init"] = str(Path(out) / stage.after / "best.pt")
        configs[stage.name] = configure(**values)
    if weights is None and configs[experiment.stages[0].name].backbone == "vgg16":
        raise ValueError("--weights: give torchvision's VGG-16 weights to start from.")
    return configs


def _train_stage(config: TrainConfig, group: Processes) -> str:
    """Trains, resumes, or leaves a finished run alone; returns how it ended."""
    if not (Path(config.out) / "checkpoint.pt").exists():
        return str(train(config)["status"])
    # What a run started from is in its checkpoint; the files may have moved since.
    given = {k: v for k, v in config.as_dict().items() if k not in ("weights", "init")}
    try:
        resumed = resume_config(**given)
    except FinishedError:
        say(f"{config.out}: finished, kept", quiet=not group.is_first)
        return "finished"
    return str(train(resumed, resume=True)["status"])


def _scores(config: TrainConfig, split: str) -> dict[str, Any]:
    """Scores of a finished stage; those that are there already are kept."""
    folder = Path(config.out)
    images = len(open_dataset(config.data, config.root, split))
    images = min(images, config.eval_limit or images)
    path = folder / f"eval-{split}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept["images"] == images:
            return kept
    return evaluate(
        folder / "best.pt",
        root=config.root,
        split=split,
        limit=config.eval_limit,
        device=config.device,
        amp=config.amp,
        channels_last=config.channels_last,
        workers=config.workers or 0,
    )


def _record(
    name: str,
    experiment: Reproduction,
    configs: Mapping[str, TrainConfig],
    results: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    stages = {}
    for stage in experiment.stages:
        config, result = configs[stage.name], results[stage.name]
        run = json.loads((Path(config.out) / "record.json").read_text(encoding="utf-8"))
        stages[stage.name] = {
            "title": stage.title,
            "arguments": config.as_dict(),
            "steps": run["step"],
            "training_seconds": sum(map(_seconds, run["sessions"])),
            "best_mean_iou_on_eval_split": run["best_mean_iou"],
            "best_step": result["step"],
            "images": result["images"],
            "scoring_seconds": result["seconds"],
            "scores": result["scores"],
            "classes": result["classes"],
        }
    return {
        "status": "finished",
        "experiment": name,
        "published": {
            "mean_iou": experiment.mean_iou,
            "classes": dict(experiment.published),
            "source": experiment.source,
        },
        "split": experiment.split,
        "stages": stages,
    }


def _seconds(session: Mapping[str, str]) -> float:
    start, end = (datetime.datetime.fromisoformat(session[key]) for key in ("start", "end"))
    return (end - start).total_seconds()


def _table(experiment: Reproduction, record: Mapping[str, Any]) -> str:
    """The record as Markdown: classes down, published and own columns across."""
    stages = list(record["stages"].values())
    ious = [{row["class"]: row["iou"] for row in stage["classes"]} for stage in stages]
    lines = [
        f"# {experiment.title}",
        "",
        "| | published | " + " | ".join(stage["title"] for stage in stages) + " |",
        "|---" * (len(stages) + 2) + "|",
    ]
    for name, value in experiment.published.items():
        lines.append(_row(name, f"{value:.1f}", [iou[name] for iou in ious]))
    means = [stage["scores"]["mean_iou"] for stage in stages]
    lines.append(_row("**mean IoU**", f"**{experiment.mean_iou:.1f}**", means))
    accuracies = [stage["scores"]["pixel_accuracy"] for stage in stages]
    lines.append(_row("pixel accuracy", "-", accuracies))
    lines += ["", f"Published: {experiment.source}. Here:", ""]
    for stage in stages:
        arguments = stage["arguments"]
        lines.append(
            f"- {stage['title']}: {stage['steps']} steps of "
            f"{arguments['batch_size'] * arguments['accumulate']} in "
            f"{stage['training_seconds']:.0f} s (precision {arguments['amp']}), weights of step "
            f"{stage['best_step']}; {stage['images']} images scored in "
            f"{stage['scoring_seconds']:.0f} s"
        )
    hardware = record["environment"]["hardware"]
    lines.append(f"- on {hardware.get('gpu', hardware['cpu'])}")
    return "\n".join(lines) + "\n"


def _row(name: str, published: str, shares: Sequence[float | None]) -> str:
    cells = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
    return f"| {name} | {published} | {' | '.join(cells)} |"
