# SPDX-License-Identifier: Apache-2.0
"""Whole-image evaluation: one image at a time at its own size, one confusion matrix for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from dilseg.data import IGNORE, Augmented, SegmentationDataset, open_dataset, save_palette_png
from dilseg.engine.checkpoint import DataSpec, load_model
from dilseg.engine.console import Progress, say
from dilseg.engine.files import write_atomic, write_json
from dilseg.engine.memory import explain_memory
from dilseg.engine.metrics import ConfusionMatrix
from dilseg.engine.processes import Processes, processes
from dilseg.engine.record import environment
from dilseg.engine.samples import Part
from dilseg.engine.tables import markdown
from dilseg.models import DilatedFrontEnd, DilatedNet, HeadScores, Scores, SegmentationModel

__all__ = [
    "autocast",
    "check_batch_size",
    "check_channels",
    "check_classes",
    "check_inference",
    "choose_data",
    "evaluate",
    "evaluate_heads",
    "evaluate_model",
    "infer",
    "questions",
    "runs_of",
    "segment",
]

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> AbstractContextManager[Any]:
    """Autocast in the given precision (off, bf16, fp16), or a context that does nothing."""
    if amp == "off":
        return nullcontext()
    if device.type == "cpu":
        # oneDNN reads this at its first use. Its bfloat16 convolutions for AMX, as torch 2.13 has
        # them, write beyond their buffers in backward (a plain VGG-16 aborts in malloc).
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    return torch.autocast(device.type, dtype=_AMP[amp])


def check_inference(model: SegmentationModel, *, tile: int | None, anchor: str) -> None:
    """Refuses options that the network does not have, before any image is read.

    Raises:
        ValueError: Tiles or an anchor for another network than a DilatedNet, or wrong values.
    """
    if anchor not in ("centre", "corner"):
        raise ValueError(f"--anchor: expected centre or corner, but got {anchor}.")
    dilated = isinstance(model, DilatedFrontEnd | DilatedNet)
    if tile is not None and not dilated:
        raise ValueError(
            "--tile: expected a DilatedNet or its front end, which pad no layer, but got "
            f"{type(model).__name__}, whose layers would see zeros at the edges of tiles where the "
            "image goes on; leave it out: whole images."
        )
    if tile is not None and (tile < 1 or tile % model.output_stride):
        raise ValueError(
            f"--tile: expected a positive multiple of {model.output_stride}, but got {tile}."
        )
    if anchor == "corner" and not dilated:
        raise ValueError(
            "--anchor corner: expected a DilatedNet or its front end, but got "
            f"{type(model).__name__}, which upsamples by its own deconvolution; leave it out."
        )
    if anchor == "corner" and isinstance(model, DilatedNet) and model.border == "zero":
        raise ValueError(
            "--anchor corner: this network upsamples by its own deconvolution, as the published "
            "one for Cityscapes; leave it out."
        )


def infer(
    model: SegmentationModel,
    images: torch.Tensor,
    *,
    amp: str = "off",
    channels_last: bool = False,
    tile: int | None = None,
    anchor: str = "centre",
) -> Scores | HeadScores:
    """Runs a network without gradients: arguments and errors as `segment`."""
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    # Only a DilatedNet has these, and only where they are given: see `check_inference`.
    options: dict[str, Any] = {} if tile is None else {"tile": tile}
    if anchor != "centre":
        options["anchor"] = anchor
    item = images.element_size() if amp == "off" else 2
    with (
        explain_memory(model, images, tile=tile, item=item),
        torch.inference_mode(),
        autocast(images.device, amp),
    ):
        return model.scores(images, **options)


@overload
def segment(
    model: SegmentationModel,
    images: torch.Tensor,
    *,
    amp: str = ...,
    channels_last: bool = ...,
    confidence: Literal[False] = ...,
    tile: int | None = ...,
    anchor: str = ...,
) -> torch.Tensor: ...


@overload
def segment(
    model: SegmentationModel,
    images: torch.Tensor,
    *,
    amp: str = ...,
    channels_last: bool = ...,
    confidence: Literal[True],
    tile: int | None = ...,
    anchor: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def segment(
    model: SegmentationModel,
    images: torch.Tensor,
    *,
    amp: str = "off",
    channels_last: bool = False,
    confidence: bool = False,
    tile: int | None = None,
    anchor: str = "centre",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Predicts class ids at image resolution, without gradients.

    Where the network's last step is a fixed upsampling, no logits of that size are made.

    Args:
        model: A network with `scores`, in eval mode.
        images: Normalised float ``[n, c, h, w]`` on the network's device.
        amp: off, bf16 or fp16.
        channels_last: Convert the images to channels_last first.
        confidence: Return the softmax probability of each pixel's class too.
        tile: For a DilatedNet or its front end, the side of the tiles that the front end computes
            one after another, a multiple of 8: the same result in less memory. None for one pass.
        anchor: For a DilatedNet or its front end, "centre" or "corner", as in
            `dilseg.models.Scores`.

    Returns:
        uint8 ``[n, h, w]``; with `confidence` the pair of it and float ``[n, h, w]`` in [0, 1].
        Of several heads, both ``[n, heads, h, w]``.

    Raises:
        ValueError: The network has more than 256 classes, or `tile` or `anchor` is wrong.
        RuntimeError: The device has too little memory for this size; the message names the size.
    """
    check_inference(model, tile=tile, anchor=anchor)
    scores = infer(model, images, amp=amp, channels_last=channels_last, tile=tile, anchor=anchor)
    with torch.inference_mode():
        return scores.labels(dtype=torch.uint8, confidence=confidence)


_T = TypeVar("_T")


def runs_of(items: Iterable[_T], key: Callable[[_T], object], count: int) -> Iterator[list[_T]]:
    """Neighbours of equal key, at most `count` of them together, in order.

    Example:
        >>> list(runs_of([1, 1, 1, 2, 1], lambda item: item, 2))
        [[1, 1], [1], [2], [1]]
    """
    run: list[_T] = []
    for item in items:
        if run and (len(run) == count or key(run[0]) != key(item)):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def evaluate_model(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    **options: Any,  # noqa: ANN401
) -> ConfusionMatrix:
    """Scores a network as `evaluate_heads`; returns the matrix of its one head, or of the first."""
    return evaluate_heads(model, dataset, **options)[0]


def evaluate_heads(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    *,
    group: Processes,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    amp: str = "off",
    channels_last: bool = False,
    workers: int = 0,
    batch_size: int = 1,
    tile: int | None = None,
    anchor: str = "centre",
    label: str = "eval",
    on_prediction: Callable[[int, np.ndarray[Any, np.dtype[np.uint8]]], None] | None = None,
) -> tuple[ConfusionMatrix, ...]:
    """Scores a network on every image of a data set, each exactly once over all processes.

    Args:
        model: A network with `scores`; put into eval mode and back.
        dataset: The images and labels.
        group: The processes that share the images; every one gets the whole matrix.
        mean: Per channel, for RGB in [0, 1].
        std: Per channel.
        amp: off, bf16 or fp16.
        channels_last: Feed channels_last images.
        workers: Loader processes.
        batch_size: Neighbouring images of equal size that the network sees together, at most.
        tile: As in `segment`.
        anchor: As in `segment`.
        label: Name of the progress bar.
        on_prediction: Called with the image's index and its class ids, uint8 ``[h, w]``, or
            ``[heads, h, w]``.

    Returns:
        The confusion matrix of the whole set, on the CPU, for each head.
    """
    samples = Augmented(dataset, None, seed=0, mean=mean, std=std)
    mine = list(range(group.rank, len(dataset), group.count))
    loader: DataLoader[Any] = DataLoader(
        Subset(samples, mine),
        batch_size=1,
        num_workers=workers,
        pin_memory=group.device.type == "cuda",
        generator=torch.Generator(),  # leaves the default generator, and so a training, alone
    )
    classes = [part.num_classes for part in questions(dataset).values()]
    matrices = [ConfusionMatrix(n, ignore_index=IGNORE, device=group.device) for n in classes]
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with Progress(len(mine), label, quiet=not group.is_first) as progress:
            found = zip(mine, loader, strict=True)
            for run in runs_of(found, lambda item: item[1][0].shape, batch_size):
                images, target = (torch.cat([item[1][part] for item in run]) for part in (0, 1))
                prediction = segment(
                    model,
                    images.to(group.device, non_blocking=True),
                    amp=amp,
                    channels_last=channels_last,
                    tile=tile,
                    anchor=anchor,
                )
                target = target.to(group.device, non_blocking=True)
                for position, matrix in enumerate(matrices):
                    head = (slice(None), position) if dataset.heads else ()
                    matrix.update(prediction[head], target[head])
                if on_prediction is not None:
                    for (index, _), labels in zip(run, prediction.cpu().numpy(), strict=True):
                        on_prediction(index, labels)
                progress.advance(len(run))
    finally:
        for module, training in was_training:
            module.training = training
    results = []
    for matrix in matrices:
        group.sum(matrix.counts)
        result = ConfusionMatrix(matrix.num_classes, ignore_index=IGNORE)
        result.counts += matrix.counts.cpu()
        results.append(result)
    return tuple(results)


def questions(dataset: SegmentationDataset) -> dict[str, SegmentationDataset]:
    """The data set of each head by its name; for a single one the set itself, named ""."""
    return dict(dataset.heads) or {"": dataset}


def check_classes(dataset: SegmentationDataset, spec: DataSpec, checkpoint: str | Path) -> None:
    """Refuses data whose classes are not those the network was trained on.

    Raises:
        ValueError: The class names differ; the message says where first.
    """
    own, given = spec.classes, tuple(dataset.classes)
    if own == given:
        return
    if len(own) != len(given):
        raise ValueError(
            f"{checkpoint}: trained on {len(own)} classes ({spec.name}), but the data has "
            f"{len(given)}."
        )
    index = next(i for i, (a, b) in enumerate(zip(own, given, strict=True)) if a != b)
    raise ValueError(
        f"{checkpoint}: its class {index} is {own[index]!r}, but the data's is {given[index]!r}."
    )


def check_channels(
    dataset: SegmentationDataset, model: SegmentationModel, checkpoint: str | Path
) -> None:
    """Refuses images with other channels, or other label maps, than those of the network.

    Raises:
        ValueError: They differ.
    """
    if dataset.channels != model.in_channels:
        raise ValueError(
            f"{checkpoint}: takes images of {model.in_channels} channels, but the data has "
            f"{dataset.channels}."
        )
    if list(dataset.heads) != list(model.heads):
        own, given = (", ".join(heads) or "one" for heads in (model.heads, dataset.heads))
        raise ValueError(f"{checkpoint}: its heads are {own}, but those of the data {given}.")


def check_batch_size(batch_size: int) -> None:
    """Refuses a number of images that is no number of images.

    Raises:
        ValueError: It is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected a number of images >= 1, but got {batch_size}.")


def choose_data(
    content: Mapping[str, Any], data: str | None, root: str | None, split: str | None
) -> tuple[str, str | None, str]:
    """Data set, folder and split; what is not given comes from the training of the checkpoint.

    Args:
        content: Of the checkpoint.
        data: Its name, or None.
        root: Its folder, or None.
        split: Its split, or None.
    """
    trained_on = str(content["data"]["name"])
    arguments: dict[str, Any] = content.get("arguments", {})
    name = data or trained_on
    if root is None and name == trained_on:
        root = arguments.get("root")
    return name, root, split or arguments.get("eval_split", "val")


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    root: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    predictions: str | Path | None = None,
    device: str = "auto",
    amp: str = "off",
    channels_last: bool = False,
    workers: int = 0,
    batch_size: int = 1,
    tile: int | None = None,
    anchor: str = "centre",
) -> dict[str, Any]:
    """Scores a checkpoint on a data set, prints the table, and writes it as JSON and Markdown.

    Args:
        checkpoint: A file of `dilseg train` or `dilseg convert`.
        data: Data set; None for the one it was trained on.
        root: Its folder; None for the one it was trained on.
        split: Split; None for the one that its training evaluated on.
        limit: Only this many images, evenly spaced.
        out: Where to write the JSON; None for ``eval-<split>.json`` beside the checkpoint. The
            Markdown goes beside it, with the suffix ``.md``.
        predictions: Folder for a palette PNG of class ids per image; None for none.
        device: auto, cpu, cuda or cuda:N.
        amp: off, bf16 or fp16.
        channels_last: Run in channels_last.
        workers: Loader processes.
        batch_size: Neighbouring images of equal size that the network sees together, at most.
        tile: As in `segment`.
        anchor: As in `segment`.

    Returns:
        What was written: scores, whose means are over the first of the data set's `score_sets`,
        rows per class and category, confusion matrix, versions. Of several heads these are the
        first one's, and all are below "heads".

    Raises:
        FileNotFoundError: A missing checkpoint or data file.
        ValueError: A damaged checkpoint, other classes, a split without labels, bad data files.
    """
    if out is not None and Path(out).suffix.lower() == ".md":
        raise ValueError(
            f"--out: expected a name for the JSON, such as scores.json, but got {out}."
        )
    check_batch_size(batch_size)
    model, model_spec, data_spec, content = load_model(checkpoint)
    check_inference(model, tile=tile, anchor=anchor)
    name, root, split = choose_data(content, data, root, split)
    dataset: SegmentationDataset = open_dataset(name, root, split)
    check_classes(dataset, data_spec, checkpoint)
    check_channels(dataset, model, checkpoint)
    if limit is not None:
        dataset = Part(dataset, limit)
    folder = None if predictions is None else Path(predictions)

    parts = questions(dataset)

    def keep(index: int, labels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        if folder is None:
            return
        maps = labels.reshape(-1, *labels.shape[-2:])
        for (head, part), ids in zip(parts.items(), maps, strict=True):
            ending = f"_{head}.png" if head else ".png"
            save_palette_png(folder / f"{dataset.name(index)}{ending}", ids, part.palette)

    with processes(device) as group:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        model.to(group.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        started = time.monotonic()
        matrices = evaluate_heads(
            model,
            dataset,
            group=group,
            mean=data_spec.mean,
            std=data_spec.std,
            amp=amp,
            channels_last=channels_last,
            workers=workers,
            batch_size=batch_size,
            tile=tile,
            anchor=anchor,
            label=f"eval {split}",
            on_prediction=None if folder is None else keep,
        )
        seconds = time.monotonic() - started
        found = {
            head: _scores(matrix, part)
            for (head, part), matrix in zip(parts.items(), matrices, strict=True)
        }
        result: dict[str, Any] = {
            "checkpoint": str(checkpoint),
            "model": {
                "name": model_spec.name,
                "num_classes": model_spec.num_classes,
                "options": model_spec.options,
            },
            "step": content.get("step"),
            "data": name,
            "root": root,
            "split": split,
            "images": len(dataset),
            **found[next(iter(found))],
            "heads": {head: scores for head, scores in found.items() if head},
            "arguments": {
                "amp": amp,
                "channels_last": channels_last,
                "processes": group.count,
                "batch_size": batch_size,
                "tile": tile,
                "anchor": anchor,
            },
            "seconds": round(seconds, 3),
            "environment": environment(group.device),
        }
        if group.is_first:
            path = Path(out) if out is not None else _beside(checkpoint, split)
            text = markdown(result)
            write_json(path, result)
            write_atomic(path.with_suffix(".md"), lambda file: file.write(text.encode()))
            for (head, part), matrix in zip(parts.items(), matrices, strict=True):
                if head:
                    say(f"head {head}")
                say(matrix.table(part.classes, next(iter(_score_sets(part).values()))))
                _say_the_other_scores(found[head])
            say(f"{len(dataset)} images in {seconds:.1f} s; written to {path} and .md")
    return result


def _score_sets(dataset: SegmentationDataset) -> dict[str, list[int]]:
    """Class ids of the sets that means are over, by name; all classes where there is no set."""
    sets = dataset.score_sets or {f"all {dataset.num_classes} classes": dataset.classes}
    return {name: [dataset.classes.index(one) for one in names] for name, names in sets.items()}


def _scores(matrix: ConfusionMatrix, dataset: SegmentationDataset) -> dict[str, Any]:
    """Every score that is read from the matrix, by its name in the JSON."""
    sets = {name: matrix.scores(ids) for name, ids in _score_sets(dataset).items()}
    result: dict[str, Any] = {
        "scores": next(iter(sets.values())),
        "score_sets": sets,
        "classes": matrix.per_class(dataset.classes),
        "categories": [],
        "category_mean_iou": None,
        "confusion": matrix.counts.tolist(),
    }
    if dataset.categories:
        groups = dataset.categories.values()
        merged = matrix.merged([[dataset.classes.index(n) for n in names] for names in groups])
        result["categories"] = merged.per_class(list(dataset.categories))
        result["category_mean_iou"] = merged.mean_iou()
    return result


def _say_the_other_scores(result: dict[str, Any]) -> None:
    """The means over other classes, and of categories, for a terminal."""
    first, *others = result["score_sets"].items()
    if others:
        say(f"means over {first[0]}")
    for name, scores in others:
        say(f"mean IoU over {name}: {100 * scores['mean_iou']:.2f} %")
    if result["categories"]:
        count = len(result["categories"])
        say(f"mean IoU of the {count} categories: {100 * result['category_mean_iou']:.2f} %")


def _beside(checkpoint: str | Path, split: str) -> Path:
    return Path(checkpoint).resolve().parent / f"eval-{split}.json"
