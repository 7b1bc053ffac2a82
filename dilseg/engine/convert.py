# SPDX-License-Identifier: Apache-2.0
"""Foreign weights as a checkpoint: the original .caffemodel files, and torchvision's VGG-16."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dilseg.data import DATASETS, dataset_classes, voc_palette
from dilseg.engine.checkpoint import DataSpec, ModelSpec, save_checkpoint
from dilseg.engine.config import MODELS
from dilseg.engine.console import say
from dilseg.models import (
    PUBLISHED,
    CaffeNet,
    LoadReport,
    Normalization,
    SegmentationModel,
    find_published,
    load_backbone,
    load_caffemodel,
    read_caffemodel,
    reorder_classes,
)
from dilseg.models.caffe_weights import caffe_name

__all__ = ["convert"]

_DATASETS = tuple(name for name in DATASETS if name not in ("shapes", "folder"))
_MOST_CLASSES = 255  # label maps are 8 bits wide, and 255 is void
_MOST_CONTEXT_LEVELS = 10  # of growing dilation; the published nets have at most six


def convert(
    source: str | Path,
    model: str | None = None,
    *,
    net: str | None = None,
    backbone: str | None = None,
    depth: bool = False,
    classes: int | None = None,
    data: str | None = None,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    scale: float | None = None,
    bgr: bool | None = None,
    head: str | None = None,
    heads: Mapping[str, int] | None = None,
    learned_upsampling: bool = False,
    out: str | Path | None = None,
) -> Path:
    """Writes the checkpoint of a network with weights from another framework, and prints a report.

    `dilseg eval`, `predict` and `train --init` take the checkpoint as one of their own. Of a
    .caffemodel the options of the network (width of fc6, at-once scales, context module) are those
    of the file; see `dilseg.models.load_caffemodel` for what must match.

    Args:
        source: A .caffemodel, or a torchvision VGG-16 state dict (which fills the backbone only).
        model: fcn32s, fcn32s-late, fcn16s, fcn8s, frontend or dilatednet; None for a released net.
        net: Name of a released net in `dilseg.models.PUBLISHED`, which gives model, backbone,
            classes, mean and order of channels where they are not given; None, without `model`,
            for the name of the file.
        backbone: vgg16, alexnet or googlenet; None for vgg16.
        depth: The network takes depth as a fourth channel; of a file without it, the mean of its
            colour filters.
        classes: Number of classes; None for that of `data` or `class_names`.
        data: Data set whose class names and colours the checkpoint gets; None for none.
        class_names: Names in the order of the file's classes. With `data` they must be its
            classes, and the network's outputs are put into its order.
        mean: Three values on 0-255 in the file's channel order, six for colour and HHA; None as in
            `load_caffemodel`, or torchvision's own.
        scale: Factor after the subtraction of the mean.
        bgr: The weights expect B, G, R; None for yes with a .caffemodel, no otherwise.
        head: Suffix of the layers of one of several heads, such as "sem", to take it alone.
        heads: Classes of each head by its suffix, to take them all; together they are `classes`.
        learned_upsampling: Keep the deconvolutions of an FCN as trainable weights.
        out: The checkpoint; None for the name of `source` with the suffix .pt, beside it.

    Returns:
        The checkpoint's path.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown name, classes that do not agree, or a file that is damaged or does
            not fit the network; the message lists what does not.
    """
    path = Path(source)
    target = path.with_suffix(".pt") if out is None else Path(out)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a weights file, but there is no such file.")
    if target.resolve() == path.resolve():
        raise ValueError(f"--out: {target} is the file to convert; give another name.")
    given_classes = any(given is not None for given in (classes, data, class_names))
    if model is None:
        entry = find_published(_net_name(path, net))
        model = entry.model
        backbone = backbone or entry.options.get("backbone")
        depth = depth or entry.options.get("in_channels") == 4
        mean = entry.mean if mean is None else mean
        bgr = entry.bgr if bgr is None else bgr
        if head is None and heads is None:
            heads = entry.options.get("heads")
        if head is None and not given_classes:
            data = entry.data
    elif net is not None:
        raise ValueError("--net and --model: give one of them.")
    if model not in MODELS:
        raise ValueError(f"--model: expected one of {', '.join(MODELS)}, but got {model!r}.")
    if learned_upsampling and not model.startswith("fcn"):
        raise ValueError(f"--learned-upsampling: only an FCN has it, not {model}.")
    if heads and (head is not None or model not in ("fcn32s", "fcn16s", "fcn8s")):
        raise ValueError("--heads: goes with fcn32s, fcn16s or fcn8s, and without --head.")
    if heads and not given_classes and data is None:
        classes = sum(heads.values())
    names, palette, order = _classes(classes, data, class_names)
    options: dict[str, Any] = {"backbone": backbone or "vgg16"}
    if model.startswith("fcn"):
        options["learned_upsampling"] = learned_upsampling
    if depth:
        if model not in ("fcn32s", "fcn16s", "fcn8s"):
            raise ValueError(f"--depth: goes with fcn32s, fcn16s or fcn8s, not with {model}.")
        options["in_channels"] = 4
    if heads:
        options["heads"] = dict(heads)
    if _is_torch_file(path):
        if head is not None or heads:
            raise ValueError("--head, --heads: only a .caffemodel has several heads.")
        spec = ModelSpec(model, len(names), options)
        network, report = _from_torch(path, spec, mean, scale, bool(bgr))
    else:
        content = read_caffemodel(path)
        options |= _caffe_options(content, model, len(names), head)
        spec = ModelSpec(model, len(names), options)
        given: dict[str, Any] = {"mean": mean, "scale": scale, "bgr": bgr is not False}
        # A network on the meta device has no memory: what does not fit the file is found before
        # the file's numbers decide how much is allocated.
        with torch.device("meta"):
            sketch = spec.build()
        load_caffemodel(sketch, content, head=head, **given)
        network = _build(spec)
        report = load_caffemodel(network, content, head=head, **given)
    if order is not None:
        reorder_classes(network, order)
        note = f"Classes put into the order of {data}: {', '.join(names)}"
        report = dataclasses.replace(report, notes=(*report.notes, note))
    say(str(report))
    save_checkpoint(
        target,
        model=network,
        model_spec=spec,
        data_spec=DataSpec(
            name=data or "folder",
            classes=names,
            palette=palette,
            mean=report.normalization.mean,
            std=report.normalization.std,
        ),
        step=0,
        converted=str(report),
    )
    count = sum(parameter.numel() for parameter in network.parameters())
    say(f"{model}, {len(names)} classes, {count} parameters; written to {target}")
    return target


def _net_name(path: Path, net: str | None) -> str:
    """The released net that a file holds, by what is said of it or else by its own name."""
    if net is not None and net not in PUBLISHED:
        raise ValueError(f"--net: expected one of {', '.join(PUBLISHED)}, but got {net!r}.")
    if net is None and path.stem not in PUBLISHED:
        raise ValueError(
            f"--model: give the network, or with --net the released one that {path.name} holds: "
            f"{', '.join(PUBLISHED)}."
        )
    return net or path.stem


def _classes(
    classes: int | None, data: str | None, class_names: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[tuple[int, int, int], ...], list[int] | None]:
    """Names and colours of the classes, and where to find them in the file; None for in place."""
    if data is not None and data not in _DATASETS:
        raise ValueError(f"--data: expected one of {', '.join(_DATASETS)}, but got {data!r}.")
    known = None if data is None else dataset_classes(data)
    if class_names is not None and len(set(class_names)) != len(class_names):
        raise ValueError("--class-names: expected different names, but one occurs twice.")
    order = None
    if known is not None:
        names = known[0]
        if class_names is not None:
            missing = sorted(set(names) ^ set(class_names))
            if missing:
                raise ValueError(
                    f"--class-names: expected the classes of {data} in the order of the file "
                    f"({', '.join(names)}), but {missing[0]!r} is not in both."
                )
            order = [list(class_names).index(name) for name in names]
    elif class_names is not None:
        names = tuple(class_names)
    elif classes is not None:
        names = tuple(f"class{index}" for index in range(min(classes, _MOST_CLASSES)))
    else:
        raise ValueError("--classes: give the number of classes, or --data or --class-names.")
    count = len(names) if classes is None else classes
    if not 1 <= count <= _MOST_CLASSES:
        raise ValueError(
            f"--classes: expected a number from 1 to {_MOST_CLASSES}, but got {count}."
        )
    if count != len(names):
        raise ValueError(
            f"--classes: expected {len(names)}, the classes named, but got {count}. Leave it out."
        )
    colours = voc_palette(count) if known is None else known[1]
    return names, tuple((int(r), int(g), int(b)) for r, g, b in colours.tolist()), order


def _is_torch_file(path: Path) -> bool:
    if path.suffix in (".pt", ".pth"):
        return True
    with path.open("rb") as file:
        start = file.read(4)
    return start == b"PK\x03\x04" or start[:1] == b"\x80"


def _build(spec: ModelSpec) -> SegmentationModel:
    """The network; what starts fresh in it is the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.build()


def _from_torch(
    path: Path, spec: ModelSpec, mean: Sequence[float] | None, scale: float | None, bgr: bool
) -> tuple[SegmentationModel, LoadReport]:
    normalization = None
    if mean is not None:
        values = [*mean, 1.0 if scale is None else scale]
        if len(values) != 4 or not all(map(math.isfinite, values)) or values[3] <= 0:
            raise ValueError(f"--mean, --scale: expected three numbers and one > 0, got {values}.")
        normalization = Normalization.from_caffe(values[:3], bgr=bgr, scale=values[3])
    elif bgr or scale is not None:
        raise ValueError("--bgr, --scale: give the --mean of these weights too.")
    network = _build(spec)
    report = load_backbone(network, path, normalization=normalization, bgr=bgr)
    fresh = dict(report.fresh)
    for name, module in network.named_modules():
        short = name.removeprefix("front_end.")
        if any(True for _ in module.parameters(recurse=False)) and short not in report.loaded:
            fresh.setdefault(short, "not part of the backbone")
    return network, dataclasses.replace(report, fresh=fresh)


def _caffe_options(net: CaffeNet, model: str, classes: int, head: str | None) -> dict[str, Any]:
    """The options of the network that the layers of a file ask for."""
    layers = {caffe_name(layer.name, head): layer for layer in net.layers if layer.blobs}
    options: dict[str, Any] = {}
    fc6 = layers.get("fc6color" if model == "fcn32s-late" else "fc6")
    if fc6 is not None:
        options["fc_channels"] = int(fc6.blobs[-1].size)
    if model in ("fcn16s", "fcn8s"):
        options["at_once"] = "scale_pool4" in layers
    if model != "dilatednet":
        return options
    options["border"] = "zero" if "ctx_upsample" in layers else "clamp"
    first = layers.get("ctx_conv1_1")
    if first is None:
        return options
    levels = sum(1 for name in layers if re.fullmatch(r"ctx_conv([2-9]|[1-9][0-9]+)_1", name))
    if levels > _MOST_CONTEXT_LEVELS:
        raise ValueError(
            f"{net.source}: expected a context module with at most {_MOST_CONTEXT_LEVELS} levels "
            f"(ctx_conv2_1, ...), but found {levels}. No published net has more than six."
        )
    dilations = [1, 1, *(2**level for level in range(1, levels + 1)), 1]
    pad = first.settings.get("pad")
    once = pad[0] == sum(dilations) if pad is not None else first.name.startswith("ct_")
    options["context"] = "basic" if first.blobs[-1].size == classes else "large"
    options["dilations"] = dilations
    options["padding"] = "input" if once else "layer"
    return options
