# SPDX-License-Identifier: Apache-2.0
"""Self-describing checkpoints: what the network is, what its classes are, how to feed it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from dilseg.engine.files import write_atomic
from dilseg.models import HeadScores, Scores, SegmentationModel, build
from dilseg.models.weights import why_unreadable

__all__ = [
    "FORMAT",
    "DataSpec",
    "ModelSpec",
    "OneHead",
    "for_photographs",
    "load_checkpoint",
    "load_model",
    "random_state",
    "restore_random_state",
    "save_checkpoint",
    "specs",
]

FORMAT = 1


@dataclass(frozen=True)
class ModelSpec:
    """What `dilseg.models.build` needs to make the network again."""

    name: str
    num_classes: int
    options: dict[str, Any] = field(default_factory=dict)

    def build(self) -> SegmentationModel:
        """Makes the network with fresh weights."""
        return build(self.name, self.num_classes, **self.options)


@dataclass(frozen=True)
class DataSpec:
    """What the network was trained on: data set, class names, colours and normalisation.

    `mean` and `std` are per channel, for images divided by 255.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def palette_array(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The colours as uint8 ``[num_classes, 3]``."""
        return np.array(self.palette, dtype=np.uint8).reshape(-1, 3)


def save_checkpoint(
    path: Path,
    *,
    model: nn.Module,
    model_spec: ModelSpec,
    data_spec: DataSpec,
    training: Mapping[str, Any] | None = None,
    **about: object,
) -> None:
    """Writes a checkpoint atomically; `torch.load(path, weights_only=True)` reads it.

    Args:
        path: The file.
        model: The network whose state is kept.
        model_spec: How to build it.
        data_spec: What it was trained on.
        training: Everything a resumed training needs besides; None for a file to use, not resume.
        about: Further plain values: step, metrics, arguments, versions.

    Raises:
        OSError: The file cannot be written; an older one is still there.
    """
    content: dict[str, Any] = {
        "format": FORMAT,
        "model": {
            "name": model_spec.name,
            "num_classes": model_spec.num_classes,
            "options": dict(model_spec.options),
        },
        "data": {
            "name": data_spec.name,
            "classes": list(data_spec.classes),
            "palette": [list(colour) for colour in data_spec.palette],
            "mean": list(data_spec.mean),
            "std": list(data_spec.std),
        },
        "state_dict": model.state_dict(),
        **about,
    }
    if training is not None:
        content["training"] = dict(training)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of torch's writer, which hides the OSError below it
            raise OSError(f"{path}: cannot be written in full; is the disk full?") from error

    write_atomic(path, write)


def load_checkpoint(path: str | Path, *, lazy: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU without running any code stored in it.

    Args:
        path: The file.
        lazy: Map the tensors from the file instead of reading them: for a look at the rest.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or not a checkpoint of `dilseg train` or `convert`.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"{path}: expected a checkpoint file, but this is a folder; "
            "name the file in it, for example best.pt."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)
    except Exception as error:  # torch.load raises many types, from KeyError to UnpicklingError.
        raise ValueError(f"{path}: not a readable checkpoint ({why_unreadable(error)}).") from error
    if not isinstance(content, dict) or "format" not in content or "state_dict" not in content:
        raise ValueError(
            f"{path}: not a checkpoint of `dilseg train` or `dilseg convert`; `dilseg convert` "
            "makes one of a .caffemodel or of torchvision's weights, which also go to --weights."
        )
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {content['format']}, but this version of dilseg reads "
            f"format {FORMAT}."
        )
    return content


def specs(content: Mapping[str, Any]) -> tuple[ModelSpec, DataSpec]:
    """The two specifications kept in a checkpoint."""
    model, data = content["model"], content["data"]
    return (
        ModelSpec(model["name"], model["num_classes"], dict(model["options"])),
        DataSpec(
            name=data["name"],
            classes=tuple(data["classes"]),
            palette=tuple((c[0], c[1], c[2]) for c in data["palette"]),
            mean=tuple(map(float, data["mean"])),
            std=tuple(map(float, data["std"])),
        ),
    )


def load_model(path: str | Path) -> tuple[SegmentationModel, ModelSpec, DataSpec, dict[str, Any]]:
    """Builds the network of a checkpoint with its weights, in eval mode, on the CPU.

    Returns:
        The network, its specification, its data's, and the checkpoint's whole content.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, not a checkpoint, or does not fit the network it names.
    """
    content = load_checkpoint(path)
    model_spec, data_spec = specs(content)
    model = model_spec.build()
    try:
        model.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit {model_spec.name}: {error}") from error
    return model.eval(), model_spec, data_spec, content


class OneHead(SegmentationModel):
    """One head of a network that has several, as a network.

    Args:
        model: The network.
        head: The head's name.
    """

    def __init__(self, model: SegmentationModel, head: str) -> None:
        """See the class."""
        super().__init__(
            model.heads[head],
            output_stride=model.output_stride,
            margin=model.margin,
            in_channels=model.in_channels,
        )
        self.model = model
        self.position = list(model.heads).index(head)
        self.normalization = model.normalization

    def segment(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the head."""
        return self.scores(images).logits()

    def scores(self, images: torch.Tensor) -> Scores:
        """Scores of the head."""
        found = self.model.scores(images)
        assert isinstance(found, HeadScores)
        return found.heads[self.position]


def for_photographs(
    model: SegmentationModel, data: DataSpec, head: str | None
) -> tuple[SegmentationModel, DataSpec]:
    """The network and the classes that answer for an image file.

    Args:
        model: The network of a checkpoint.
        data: What it was trained on.
        head: Which of several heads; None for the first.

    Raises:
        ValueError: The network takes more than three channels, or has no such head.
    """
    if model.in_channels != 3:
        raise ValueError(
            f"--checkpoint: takes images of {model.in_channels} channels, which no image file has; "
            f"`dilseg eval --data {data.name} --predictions DIR` writes its label maps."
        )
    if head is None and not model.heads:
        return model, data
    if head is not None and head not in model.heads:
        known = ", ".join(model.heads) or "one without a name"
        raise ValueError(f"--head: expected one of the network's ({known}), but got {head!r}.")
    chosen = head or next(iter(model.heads))
    counts = list(model.heads.values())
    position = list(model.heads).index(chosen)
    start, stop = sum(counts[:position]), sum(counts[: position + 1])
    part = replace(data, classes=data.classes[start:stop], palette=data.palette[start:stop])
    return OneHead(model, chosen), part


def random_state(device: torch.device) -> dict[str, Any]:
    """State of every generator a training step may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, python_keys, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {
            "version": int(version),
            "keys": torch.tensor(python_keys, dtype=torch.int64),
            "gauss": python_gauss,
        },
    }


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    numpy = state["numpy"]
    np.random.set_state(
        (
            numpy["name"],
            numpy["keys"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["gauss"],
        )
    )
    python = state["python"]
    random.setstate((python["version"], tuple(int(key) for key in python["keys"]), python["gauss"]))
