# SPDX-License-Identifier: Apache-2.0
"""Label maps and overlays for image files."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dilseg.data import (
    image_to_tensor,
    list_images,
    overlay,
    read_image,
    save_grey_png,
    save_image,
)
from dilseg.data import save_palette_png as save_labels
from dilseg.engine.checkpoint import for_photographs, load_model
from dilseg.engine.console import Progress, say
from dilseg.engine.evaluate import segment
from dilseg.engine.processes import processes

__all__ = ["find_images", "predict"]


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """The files meant by files, folders and patterns, in order, each once.

    Args:
        inputs: Files are taken as they are, folders for the images in them, anything else as a
            pattern such as ``photos/*.jpg``.

    Raises:
        FileNotFoundError: A folder without images, or a pattern or path without files.
        ValueError: Two files would get the same output name; the message names both.
    """
    found: dict[Path, None] = {}
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            files = list_images(path)
            if not files:
                raise FileNotFoundError(f"{path}: there are no image files in this folder.")
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(name) for name in glob.glob(str(given), recursive=True))
            files = [file for file in files if file.is_file()]
            if not files:
                raise FileNotFoundError(f"{given}: there is no such file, folder or match.")
        found.update(dict.fromkeys(files))
    stems: dict[str, Path] = {}
    for file in found:
        other = stems.setdefault(file.stem, file)
        if other != file:
            raise ValueError(
                f"{other} and {file}: both would be written as {file.stem}.png; predict them into "
                "two folders."
            )
    return list(found)


class _Outputs(NamedTuple):
    """The files made from one image; `confidence` is None where it is not wanted."""

    labels: Path
    overlay: Path
    confidence: Path | None


def _outputs(files: Sequence[Path], folder: Path, confidence: bool) -> list[_Outputs]:
    """The results of each file.

    Raises:
        ValueError: A result would replace an input or another's result; the message names it.
    """
    results = [
        _Outputs(
            folder / f"{file.stem}.png",
            folder / f"{file.stem}_overlay.png",
            folder / f"{file.stem}_confidence.png" if confidence else None,
        )
        for file in files
    ]
    inputs = {file.resolve() for file in files}
    made_from: dict[Path, Path] = {}
    for file, paths in zip(files, results, strict=True):
        for path in filter(None, paths):
            if path.resolve() in inputs:
                raise ValueError(f"{path}: is an input that a result would replace; change --out.")
            other = made_from.setdefault(path, file)
            if other != file:
                raise ValueError(
                    f"{other} and {file}: both have a result named {path.name}; predict them into "
                    "two folders."
                )
    return results


def _grey(shares: torch.Tensor) -> torch.Tensor:
    """Probabilities as uint8 on the CPU, 255 for 1; nan, which no class has, as 0."""
    return shares.nan_to_num(0.0).mul(255).round().to("cpu", torch.uint8)


def predict(
    checkpoint: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    device: str = "auto",
    amp: str = "off",
    channels_last: bool = False,
    alpha: float = 0.5,
    confidence: bool = False,
    head: str | None = None,
) -> list[str]:
    """Writes ``<stem>.png`` (class ids with a palette) and ``<stem>_overlay.png`` per image.

    With `confidence`, also ``<stem>_confidence.png``: in 8-bit grey, 255 times the softmax
    probability of each pixel's class, rounded.

    An image that cannot be read is reported and skipped; the others are still done.

    Args:
        checkpoint: A file of `dilseg train` or `dilseg convert`.
        inputs: Image files, folders or patterns, see `find_images`.
        out: Folder for the results; created.
        device: auto, cpu, cuda or cuda:N.
        amp: off, bf16 or fp16.
        channels_last: Run in channels_last.
        alpha: Opacity of the colours in the overlay, in [0, 1].
        confidence: Write the third file too.
        head: Which of several heads, such as "geo"; None for the first.

    Returns:
        One sentence per image that failed.

    Raises:
        FileNotFoundError: A missing checkpoint, or inputs that match nothing.
        ValueError: A damaged checkpoint, one of a network that takes more than photographs or has
            no such head, two images of one name, or a result that would replace an
            input.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--alpha: expected a number in [0, 1], but got {alpha}.")
    files = find_images(inputs)
    folder = Path(out)
    outputs = _outputs(files, folder, confidence)
    model, _, data_spec, _ = load_model(checkpoint)
    model, data_spec = for_photographs(model, data_spec, head)
    folder.mkdir(parents=True, exist_ok=True)
    failures = []
    with processes(device) as group, Progress(len(files), "predict") as progress:
        model.to(group.device)
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for file, paths in zip(files, outputs, strict=True):
            try:
                image = read_image(file)
                tensor = image_to_tensor(image, data_spec.mean, data_spec.std)[None]
                found = segment(
                    model,
                    tensor.to(group.device),
                    amp=amp,
                    channels_last=channels_last,
                    confidence=confidence,
                )
                labels, shares = found if isinstance(found, tuple) else (found, None)
            except (OSError, ValueError, RuntimeError) as error:
                text = str(error)
                failures.append(text if str(file) in text else f"{file}: {text}")
            else:
                ids = labels[0].cpu().numpy()
                save_labels(paths.labels, ids, data_spec.palette_array)
                picture = overlay(image, ids, data_spec.palette_array, alpha)
                save_image(paths.overlay, picture)
                if paths.confidence is not None and shares is not None:
                    save_grey_png(paths.confidence, _grey(shares[0]))
            progress.advance()
    say(f"{len(files) - len(failures)} of {len(files)} images segmented; results in {folder}")
    return failures
