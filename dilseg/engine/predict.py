# SPDX-License-Identifier: Apache-2.0
"""Label maps, overlays and probabilities for image files and data sets."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

from dilseg.data import (
    IMAGE_SUFFIXES,
    SegmentationDataset,
    image_to_tensor,
    list_images,
    open_dataset,
    read_image,
    save_grey_png,
    save_image,
    save_palette_png,
)
from dilseg.data import overlay as draw_overlay
from dilseg.data.base import Image
from dilseg.data.files import FileDataset
from dilseg.engine.checkpoint import for_photographs, load_model
from dilseg.engine.console import Progress, say
from dilseg.engine.evaluate import (
    check_batch_size,
    check_inference,
    choose_data,
    infer,
    runs_of,
)
from dilseg.engine.files import write_atomic
from dilseg.engine.processes import processes
from dilseg.engine.samples import Part
from dilseg.engine.submission import find_submission
from dilseg.models import Scores

__all__ = ["find_images", "predict"]


class _Input(NamedTuple):
    """One image: the name of its results, without a suffix, and where it comes from.

    `files` are those that no result may replace.
    """

    name: Path
    source: str
    load: Callable[[], Image]
    files: tuple[Path, ...]


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sorts frame2 before frame10."""
    parts = re.split(r"([0-9]+)", str(path))
    return [(0, int(part)) if index % 2 else (1, part) for index, part in enumerate(parts)]


def find_images(inputs: Sequence[str | Path], *, recursive: bool = False) -> dict[Path, Path]:
    """The files meant by files, folders and patterns, each once, and the names of their results.

    Args:
        inputs: Files are taken as they are, folders for the images in them, anything else as a
            pattern such as ``photos/*.jpg`` or, for the frames of a video, ``frames/%05d.png``.
            What a folder or a pattern means comes in natural order: frame 2 before frame 10.
        recursive: Take the images in the folders inside a folder too. The names of their results
            are their paths below the folder that was given.

    Returns:
        The name of each file's results, without a suffix: the file's stem, or its path.

    Raises:
        FileNotFoundError: A folder without images, or a pattern or path without files.
        ValueError: Two files would get the same output name; the message names both.
    """
    found: dict[Path, Path] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir() and recursive:
            files = {file: file.relative_to(path).with_suffix("") for file in _below(path)}
        elif path.is_dir():
            files = {file: Path(file.stem) for file in list_images(path)}
        elif path.is_file():
            files = {path: Path(path.stem)}
        else:
            files = {file: Path(file.stem) for file in _matches(str(given))}
        if not files and path.is_dir():
            raise FileNotFoundError(f"{path}: there are no image files in this folder.")
        if not files:
            raise FileNotFoundError(f"{given}: there is no such file, folder or match.")
        for file in sorted(files, key=_natural):
            found.setdefault(file, files[file])
    names: dict[Path, Path] = {}
    for file, name in found.items():
        other = names.setdefault(name, file)
        if other != file:
            raise ValueError(
                f"{other} and {file}: both would be written as {name}.png; predict them into "
                "two folders."
            )
    return found


def _below(folder: Path) -> list[Path]:
    """Image files in a folder and the folders inside it; hidden ones are left out."""
    return [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def _matches(pattern: str) -> list[Path]:
    """Files that a pattern of the shell means, or one of printf such as ``%05d.png``."""
    names = glob.glob(pattern, recursive=True)
    numbered = re.compile(r"%0?([0-9]*)d")
    if not names and numbered.search(pattern):
        exact = "".join(
            f"[0-9]{{{part or 1},}}" if index % 2 else re.escape(part)
            for index, part in enumerate(numbered.split(pattern))
        )
        among = glob.glob(numbered.sub("*", glob.escape(pattern)))
        names = [name for name in among if re.fullmatch(exact, name)]
    return [file for file in map(Path, names) if file.is_file()]


class _Outputs(NamedTuple):
    """The files made from one image; None for those that are not wanted."""

    labels: Path
    overlay: Path | None
    confidence: Path | None
    probabilities: Path | None


def _check_outputs(images: Sequence[_Input], outputs: Sequence[_Outputs]) -> None:
    """Refuses results that would replace an input or another's result.

    Raises:
        ValueError: One would; the message names it.
    """
    inputs = {file.resolve() for image in images for file in image.files}
    made_from: dict[Path, str] = {}
    for image, paths in zip(images, outputs, strict=True):
        for path in filter(None, paths):
            if path.resolve() in inputs:
                raise ValueError(f"{path}: is an input that a result would replace; change --out.")
            other = made_from.setdefault(path, image.source)
            if other != image.source:
                raise ValueError(
                    f"{other} and {image.source}: both have a result named {path.name}; predict "
                    "them into two folders."
                )


def _grey(shares: torch.Tensor) -> torch.Tensor:
    """Probabilities as uint8 on the CPU, 255 for 1; nan, which no class has, as 0."""
    return shares.nan_to_num(0.0).mul(255).round().to("cpu", torch.uint8)


def _save_probabilities(path: Path, shares: torch.Tensor, classes: Sequence[str]) -> None:
    def write(file: BinaryIO) -> None:
        np.savez_compressed(
            file, probabilities=shares.to("cpu", torch.float16).numpy(), classes=np.array(classes)
        )

    write_atomic(path, write)


def _reason(image: _Input, error: Exception) -> str:
    text = str(error)
    return text if image.source in text else f"{image.source}: {text}"


def _pixels(
    images: Sequence[_Input], positions: range, failures: list[str]
) -> Iterator[tuple[int, Image]]:
    """Position and pixels of every image that can be read; of others the reason is noted."""
    for position in positions:
        try:
            pixels = images[position].load()
        except (OSError, ValueError) as error:
            failures.append(_reason(images[position], error))
        else:
            yield position, pixels


def predict(
    checkpoint: str | Path,
    inputs: Sequence[str | Path] | None,
    out: str | Path,
    *,
    recursive: bool = False,
    data: str | None = None,
    root: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    amp: str = "off",
    channels_last: bool = False,
    batch_size: int = 1,
    tile: int | None = None,
    anchor: str = "centre",
    alpha: float = 0.5,
    overlay: bool = True,
    confidence: bool = False,
    head: str | None = None,
    probabilities: bool = False,
    submission: str | None = None,
) -> list[str]:
    """Writes ``<name>.png`` (class ids with a palette) and ``<name>_overlay.png`` per image.

    With `confidence`, also ``<name>_confidence.png``: in 8-bit grey, 255 times the softmax
    probability of each pixel's class, rounded. With `probabilities`, ``<name>_probabilities.npz``:
    ``probabilities``, float16 ``[classes, h, w]``, and ``classes``, their names.

    An image that cannot be read is reported and skipped; the others are still done.

    Args:
        checkpoint: A file of `dilseg train` or `dilseg convert`.
        inputs: Image files, folders or patterns, see `find_images`; None for those of `data`.
        out: Folder for the results; created.
        recursive: Take the images in the folders inside a folder too, into folders of equal names.
        data: Data set whose images to take instead of `inputs`; it needs no labels. Without
            `inputs`, None is the one the network was trained on.
        root: Its folder; None for the one it was trained on.
        split: Its split; None for the one that the training evaluated on.
        limit: Only this many of its images, evenly spaced.
        device: auto, cpu, cuda or cuda:N.
        amp: off, bf16 or fp16.
        channels_last: Run in channels_last.
        batch_size: Neighbouring images of equal size that the network sees together, at most.
        tile: As in `segment`.
        anchor: As in `segment`.
        alpha: Opacity of the colours in the overlay, in [0, 1].
        overlay: Write the overlay.
        confidence: Write the probability of each pixel's class.
        head: Which of several heads, such as "geo"; None for the first.
        probabilities: Write the probabilities of all classes.
        submission: Write the label maps alone, as a server expects them: see
            `dilseg.engine.submission.find_submission`.

    Returns:
        One sentence per image that failed.

    Raises:
        FileNotFoundError: A missing checkpoint, or inputs that match nothing.
        ValueError: A damaged checkpoint, one of a network that takes more than photographs or has
            no such head, two images of one name, a result that would replace an input, or options
            that do not go together.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha: expected a number in [0, 1], but got {alpha}.")
    check_batch_size(batch_size)
    if submission is not None and (confidence or probabilities):
        raise ValueError(
            "--submission: goes without --confidence and --probabilities; it writes label maps "
            "alone."
        )
    if inputs is not None and (data, root, split, limit) != (None, None, None, None):
        raise ValueError("--input: goes without --data, --root, --split and --limit.")
    if inputs is None and recursive:
        raise ValueError("--recursive: goes with --input.")
    # Wrong inputs are found before a large checkpoint is read.
    images = [] if inputs is None else _files(find_images(inputs, recursive=recursive))
    model, _, spec, content = load_model(checkpoint)
    model, spec = for_photographs(model, spec, head)
    check_inference(model, tile=tile, anchor=anchor)
    if inputs is None:
        data, root, split = choose_data(content, data, root, split)
        images = _images_of(open_dataset(data, root, split), limit)
    form = (
        None if submission is None else find_submission(submission, split or "test", spec.classes)
    )
    folder = Path(out)

    def outputs_of(name: Path) -> _Outputs:
        if form is not None:
            return _Outputs(folder / form.path(str(name)), None, None, None)
        return _Outputs(
            folder / f"{name}.png",
            folder / f"{name}_overlay.png" if overlay else None,
            folder / f"{name}_confidence.png" if confidence else None,
            folder / f"{name}_probabilities.npz" if probabilities else None,
        )

    outputs = [outputs_of(image.name) for image in images]
    _check_outputs(images, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []

    def segment_run(run: Sequence[tuple[int, Image]]) -> None:
        tensors = [image_to_tensor(pixels, spec.mean, spec.std) for _, pixels in run]
        try:
            scores = infer(
                model,
                torch.stack(tensors).to(group.device),
                amp=amp,
                channels_last=channels_last,
                tile=tile,
                anchor=anchor,
            )
            assert isinstance(scores, Scores)  # of one head: see `for_photographs`
            with torch.inference_mode():
                labels, shares = (
                    scores.labels(confidence=True) if confidence else (scores.labels(), None)
                )
                all_shares = scores.probabilities() if probabilities else None
        except (ValueError, RuntimeError) as error:
            if len(run) == 1:
                failures.append(_reason(images[run[0][0]], error))
            else:  # each by itself: the others may be done
                for one in run:
                    segment_run([one])
            return
        for index, (position, pixels) in enumerate(run):
            paths = outputs[position]
            paths.labels.parent.mkdir(parents=True, exist_ok=True)
            ids = labels[index].cpu().numpy()
            save = (
                partial(save_palette_png, palette=spec.palette_array) if form is None else form.save
            )
            save(paths.labels, ids)
            if paths.overlay is not None:
                save_image(paths.overlay, draw_overlay(pixels, ids, spec.palette_array, alpha))
            if paths.confidence is not None and shares is not None:
                save_grey_png(paths.confidence, _grey(shares[index]))
            if paths.probabilities is not None and all_shares is not None:
                _save_probabilities(paths.probabilities, all_shares[index], spec.classes)

    with processes(device) as group:
        own = range(group.rank, len(images), group.count)
        model.to(group.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with Progress(len(own), "predict", quiet=not group.is_first) as progress:
            done = 0
            pixels = _pixels(images, own, failures)
            for run in runs_of(pixels, lambda item: item[1].shape, batch_size):
                segment_run(run)
                before, done = done, own.index(run[-1][0]) + 1
                progress.advance(done - before)
            if done < len(own):  # the last ones could not be read
                progress.advance(len(own) - done)
        if group.count > 1:
            failures = [reason for share in group.gather(failures) for reason in share]
        good = len(images) - len(failures)
        say(
            f"{good} of {len(images)} images segmented; results in {folder}",
            quiet=not group.is_first,
        )
    return failures


def _files(names: Mapping[Path, Path]) -> list[_Input]:
    return [
        _Input(name, str(file), partial(read_image, file), (file,)) for file, name in names.items()
    ]


def _images_of(dataset: SegmentationDataset, limit: int | None) -> list[_Input]:
    indices = range(len(dataset)) if limit is None else Part(dataset, limit).indices
    images = []
    for index in indices:
        name = dataset.name(index)
        pair = dataset.files(index) if isinstance(dataset, FileDataset) else None
        files = () if pair is None else tuple(filter(None, pair))
        source = name if pair is None else str(pair.image)
        images.append(_Input(Path(name), source, partial(dataset.load_image, index), files))
    return images
