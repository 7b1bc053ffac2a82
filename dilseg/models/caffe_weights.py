# SPDX-License-Identifier: Apache-2.0
"""The original Caffe weights of FCN and DilatedNet, and Caffe's classifiers, in the models.

``load_caffemodel`` matches a file with a model layer by layer: what carries weights must have a
place of the same shape, and what carries none must be something that the model computes as well.
Only then is anything copied. The report accounts for every layer of the file.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dilseg.models.backbones import Inception, TrunkModel, single_layers
from dilseg.models.base import LOG_DEPTH, Normalization, SegmentationModel
from dilseg.models.caffe import CaffeLayer, CaffeNet, read_caffemodel
from dilseg.models.dilatednet import DilatedNet
from dilseg.models.fcn import FCN, LateFusionFCN
from dilseg.models.upsampling import BilinearUpsampling, LearnedUpsampling, bilinear_kernel
from dilseg.models.weights import FULLY_CONNECTED, LoadReport, trunks_of

__all__ = ["caffe_name", "load_caffemodel", "reorder_classes"]

_FCN_MEAN = (104.00698793, 116.66876762, 122.67891434)
"""B, G, R mean of the published FCNs for PASCAL VOC and PASCAL-Context."""

_EXACT = 1e-6  # the published bilinear kernels are exact in float32


def caffe_name(name: str, head: str | None = None) -> str:
    """Say what the models of this package call a layer of a published Caffe net.

    Args:
        name: The layer's name in the file.
        head: Suffix of the layers of one of several heads ("sem" or "geo" in the SIFT Flow nets).

    Example:
        >>> caffe_name("ct_conv1_1"), caffe_name("fc-final"), caffe_name("score_pool4_semc", "sem")
        ('ctx_conv1_1', 'final', 'score_pool4c')
    """
    if head is not None:
        name = re.sub(rf"_{re.escape(head)}(c?)$", r"\1", name)
    if name == "conv1_1_bgrd":  # early fusion: colour and depth
        return "conv1_1"
    if name.startswith("ct_"):
        return "ctx_" + name.removeprefix("ct_")
    return "final" if name == "fc-final" else name


def load_caffemodel(
    model: nn.Module,
    source: str | os.PathLike[str] | CaffeNet,
    *,
    mean: Sequence[float] | None = None,
    scale: float | None = None,
    bgr: bool = True,
    head: str | None = None,
) -> LoadReport:
    """Load a .caffemodel into a model: a published net whole, or a classifier into the trunk.

    Layers are matched by name, legacy blobs and fully connected layers by their values' order. A
    file with scores (score_fr, final) counts as a whole net, whose forward pass the model then
    reproduces: every weight must have a place, fixed deconvolutions must be bilinear, and kernels,
    paddings, strides, dilations, poolings, crops and sums that the file states must be the
    model's. A file without is a backbone, of which weights alone are taken; so is one without fc6
    and fc7. A net's front end goes into a DilatedNet with a fresh context module. A file for colour
    fills a model of colour and depth as ``load_backbone`` does.

    The factors of the Scale layers of the at-once nets are kept by an ``at_once`` model and
    multiplied into the score weights of any other.

    Args:
        model: An ``FCN``, a ``LateFusionFCN``, a ``DilatedFrontEnd`` or a ``DilatedNet`` of the
            file's shapes.
        source: A path, or what ``read_caffemodel`` returned.
        mean: Three values on 0-255, in the channel order of the file's net; six for colour and HHA.
            None takes what the file states, or else, for an FCN, the mean of the published FCNs.
        scale: Factor after the subtraction; None takes what the file states, or else 1.
        bgr: The net expects B, G, R. These input channels of the first layer are reversed on
            loading, so that the model takes RGB like any other. HHA keeps its order.
        head: See ``caffe_name``; layers of other heads are left out. None for a model that has all
            heads of the file, or for a file of one.

    Returns:
        A printable report that accounts for every layer of the file.

    Raises:
        TypeError: ``model`` is none of the above.
        ValueError: Layers are missing, have no place or do not fit; the message lists them. Or the
            mean is not known. The model is unchanged.
        FileNotFoundError, CaffeModelError: As ``read_caffemodel``.

    Example:
        >>> from dilseg.models import DilatedFrontEnd
        >>> trained, model = DilatedFrontEnd(4, "demo"), DilatedFrontEnd(4, "demo")
        >>> blobs = {name: [] for name, _ in trained.named_children() if name != "dropout"}
        >>> for key, value in trained.state_dict().items():
        ...     blobs[key.split(".")[0]].append(value.numpy())
        >>> layers = [CaffeLayer(n, "Convolution", 1, tuple(both)) for n, both in blobs.items()]
        >>> net = CaffeNet("my net", "", (*layers, CaffeLayer("prob", "Softmax", 1)))
        >>> print(load_caffemodel(model, net, mean=(104, 117, 123)))
        Loaded from my net: conv1_1, conv2_1, conv3_1, conv3_2, ..., fc6, fc7, final
        Not used: prob (Softmax: follows the scores)
        Input: (B, G, R on 0-255, minus 104, 117, 123) * 1 (given)

    Source: the published nets of Long et al. 2015 and Yu & Koltun 2016; ``transplant`` of
    ``surgery.py`` (fully connected layers); Caffe's layers.
    """
    trunks = trunks_of(model, "load_caffemodel")
    net = source if isinstance(source, CaffeNet) else read_caffemodel(source)
    normalization, note = _caffe_normalization(net, model, mean, scale, bgr)
    match = _CaffeMatch(model, trunks, net, head, bgr)
    if match.problems:
        shown = match.problems[:_MOST_PROBLEMS]
        rest = len(match.problems) - len(shown)
        raise ValueError(
            f"{net.source}: does not fit the {type(model).__name__} with "
            f"{match.num_classes} classes: {'; '.join(shown)}"
            f"{f'; and {rest} more' if rest else ''}. Build the model that the file was made for."
        )
    own = dict(model.named_parameters())
    with torch.no_grad():
        for key, array in match.new.items():
            own[key].copy_(torch.from_numpy(np.array(array, dtype=np.float32)))
    model.normalization = normalization  # type: ignore[assignment]
    if isinstance(model, DilatedNet):
        model.front_end.normalization = normalization
    return LoadReport(
        source=net.source,
        loaded=tuple(match.loaded),
        fresh=match.fresh,
        unused=match.unused,
        normalization=normalization,
        notes=(note,),
    )


_MOST_PROBLEMS = 12
# Layers without weights that compute what the models do anyway, or nothing that reaches the scores.
_PASSIVE = {
    "Accuracy": "measures, does not compute scores",
    "ArgMax": "follows the scores",
    "Dropout": "in the model",
    "HDF5Output": "follows the scores",
    "ReLU": "in the model",
    "Silence": "does nothing",
    "Softmax": "follows the scores",
    "SoftmaxWithLoss": "the loss",
    "Split": "copies",
    "padding": "in the model",
}


class _CaffeMatch:
    """What of a .caffemodel goes where in a model, and what does not fit."""

    def __init__(
        self,
        model: nn.Module,
        trunks: Mapping[str, TrunkModel],
        net: CaffeNet,
        head: str | None,
        bgr: bool,
    ) -> None:
        self.model = model
        self.bgr = bgr
        self.head = head
        trunk = next(iter(trunks.values()))
        self.num_classes = trunk.num_classes
        self.in_channels = trunk.in_channels
        # Fixed rows by their names in the file, in which a modality is a suffix.
        self.rows = {
            f"{row.name}{modality}": row
            for modality, trunk in trunks.items()
            for row in single_layers(trunk.layers)
            if row.channels is None
        }
        self.concatenations = {
            f"{row.name}/output" for row in trunk.layers if isinstance(row, Inception)
        }
        self.first = {f"{single_layers(trunk.layers)[0].name}{m}" for m in trunks}
        self.new: dict[str, NDArray[np.floating[Any]]] = {}  # by the model's parameter
        self.factors: dict[str, NDArray[np.float32]] = {}  # by the Scale layer
        self.loaded: list[str] = []
        self.fresh: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self.problems: list[str] = []
        self.convs: dict[str, nn.Conv2d] = {}
        self.upsamplings: dict[str, BilinearUpsampling | LearnedUpsampling] = {}
        self.paths: dict[str, str] = {}
        for path, module in model.named_modules():
            owner, _, name = path.rpartition(".")
            name += owner if owner in trunks else ""
            if isinstance(module, nn.Conv2d):
                self.convs[name] = module
            elif isinstance(module, BilinearUpsampling | LearnedUpsampling):
                self.upsamplings[name] = module
            self.paths[name] = path
        weighted = Counter(caffe_name(layer.name, head) for layer in net.layers if layer.blobs)
        # Of a map (scale_pool4) that is then scored (score_pool4).
        self.scales = {
            f"scale_{name.removeprefix('score_')}": conv
            for name, conv in self.convs.items()
            if name.startswith("score_")
        }
        self.whole = self._check_groups(set(weighted))
        for name, count in weighted.items():
            if count > 1:
                self.problems.append(f"{name} occurs {count} times")
        for layer in net.layers:
            if layer.blobs:
                self._with_weights(layer)
            else:
                self._without_weights(layer)
        self._apply_scales()

    def _check_groups(self, present: set[str]) -> bool:
        """Decide which layers start fresh; tell whether the file has a net's scores."""
        scores = [name for name in self.convs if name.startswith("score_") or name == "final"]
        context = [name for name in self.convs if name.startswith("ctx_")]
        fully = [name for name in self.convs if name.startswith(FULLY_CONNECTED)]
        rest = [name for name in self.convs if name not in (*scores, *context, *fully)]
        groups = [rest, fully, scores, context]
        for index, group in enumerate(groups):
            later = {name for names in groups[index:] for name in names}
            if index and not later & present:
                self.fresh |= dict.fromkeys(group, "not in the file")
                continue
            for name in group:
                if name not in present:
                    shape = tuple(self.convs[name].weight.shape)
                    self.problems.append(f"{name}: expected weights of shape {shape}, found none")
        for name, upsampling in self.upsamplings.items():
            if isinstance(upsampling, LearnedUpsampling) and name not in present:
                self.fresh[name] = "not in the file: bilinear"
        return bool(set(scores) & present)

    def _with_weights(self, layer: CaffeLayer) -> None:
        name = caffe_name(layer.name, self.head)
        if name in self.convs:
            self._convolution(name, layer, self.convs[name])
        elif name in self.upsamplings:
            self._upsampling(name, layer, self.upsamplings[name])
        elif self.whole and name in self.scales:
            self._scale(name, layer)
        elif name == "ctx_upsample" and isinstance(self.model, DilatedNet):
            self._context_upsampling(layer, self.model)
        elif not self.whole and name.startswith(("fc8", "loss")):
            self.unused[layer.name] = "classifies into other classes"
        elif self._of_another_head(layer):
            self.unused[layer.name] = "of another head"
        else:
            shapes = ", ".join(str(blob.shape) for blob in layer.blobs[:3])
            self.problems.append(
                f"{layer.name or 'a layer without a name'}: {layer.type or 'a layer'} with weights "
                f"{shapes}, for which the model has no place"
            )

    def _of_another_head(self, layer: CaffeLayer) -> bool:
        """Tell whether only another head uses the layer."""
        if self.head is None or caffe_name(layer.name, self.head) != layer.name:
            return False
        return layer.name.startswith(("score_", "upscore", "fuse_"))

    def _convolution(self, name: str, layer: CaffeLayer, module: nn.Conv2d) -> None:
        kinds = ["Convolution"]
        shape = tuple(module.weight.shape)
        accepted = [_squeezed(shape)]
        if name.startswith(FULLY_CONNECTED):
            kinds.append("InnerProduct")
            accepted.append(_squeezed((shape[0], math.prod(shape[1:]))))
        self._check_type(name, layer, kinds)
        if len(layer.blobs) != 2:
            self.problems.append(
                f"{name}: expected a weight and a bias, found {len(layer.blobs)} blobs"
            )
            return
        weight, bias = layer.blobs
        if name in self.first:
            weight = self._first_filters(name, weight)
        if _squeezed(weight.shape) not in accepted:
            self.problems.append(
                f"{name}: expected a weight of shape {shape}, found {weight.shape}"
            )
        elif _squeezed(bias.shape) != _squeezed(shape[:1]):
            self.problems.append(f"{name}: expected a bias of {shape[0]} values, found {bias.size}")
        elif self._finite(name, weight) and self._finite(name, bias):
            path = self.paths[name]
            self.new[f"{path}.weight"] = weight.reshape(shape)
            self.new[f"{path}.bias"] = bias.reshape(shape[:1])
            self.loaded.append(layer.name)
        expected: dict[str, tuple[float, ...]] = {
            "kernel": tuple(module.kernel_size),
            "stride": tuple(module.stride),
            "pad": tuple(int(side) for side in module.padding),
            "dilation": tuple(module.dilation),
            "group": (module.groups,),
            "transpose": (0,),
        }
        if layer.type == "InnerProduct":
            expected = {"transpose": (0,)}
        self._check_settings(name, layer, expected)

    def _first_filters(
        self, name: str, weight: NDArray[np.floating[Any]]
    ) -> NDArray[np.floating[Any]]:
        """Put the filters of the first layer into the model's order of channels: RGB, then others.

        Those of a net without depth get, for depth, the mean of the three.
        """
        if weight.ndim != 4 or weight.shape[1] not in (3, self.in_channels):
            return weight
        if self.bgr and not name.endswith("hha"):
            weight = np.concatenate([weight[:, 2::-1], weight[:, 3:]], axis=1)
        if weight.shape[1] < self.in_channels:
            weight = np.concatenate([weight, weight.mean(1, keepdims=True)], axis=1)
        return weight

    def _upsampling(
        self, name: str, layer: CaffeLayer, module: BilinearUpsampling | LearnedUpsampling
    ) -> None:
        if isinstance(module, BilinearUpsampling):
            channels, stride, kernel = module.channels, module.stride, module.kernel
        else:
            channels, stride, kernel = (
                module.in_channels, module.stride[0], module.kernel_size[0]
            )  # fmt: skip
        dense, grouped = (channels, channels, kernel, kernel), (channels, 1, kernel, kernel)
        self._check_type(name, layer, ["Deconvolution"])
        if len(layer.blobs) != 1 or layer.blobs[0].shape not in (dense, grouped):
            shapes = ", ".join(str(blob.shape) for blob in layer.blobs[:3])
            self.problems.append(f"{name}: expected one weight of shape {dense}, found {shapes}")
            return
        weight = layer.blobs[0]
        one_by_one = weight.shape == grouped != dense
        self._check_settings(
            name,
            layer,
            {
                "kernel": (kernel, kernel),
                "stride": (stride, stride),
                "pad": (0, 0),
                "dilation": (1, 1),
                "group": (channels if one_by_one else 1,),
            },
        )
        if not self._finite(name, weight):
            return
        if isinstance(module, LearnedUpsampling):
            if one_by_one:
                full = np.zeros(dense, np.float32)
                full[np.arange(channels), np.arange(channels)] = weight[:, 0]
                weight = full
            self.new[f"{self.paths[name]}.weight"] = weight
            self.loaded.append(layer.name)
            return
        if one_by_one:
            complaint = _why_not_bilinear(weight)
        else:
            tensor = torch.from_numpy(np.array(weight, dtype=np.float32))
            complaint = module.mismatch(tensor, tolerance=_EXACT)
        if complaint:
            self.problems.append(f"{name}: {complaint.rstrip('.')}")
        else:
            self.unused[layer.name] = "bilinear, as the model's own"

    def _context_upsampling(self, layer: CaffeLayer, model: DilatedNet) -> None:
        channels = self.num_classes
        kernel, stride, pad = 16, 8, 4
        name = layer.name
        if len(layer.blobs) != 1 or layer.blobs[0].shape != (channels, 1, kernel, kernel):
            shapes = ", ".join(str(blob.shape) for blob in layer.blobs[:3])
            self.problems.append(
                f"{name}: expected one weight of shape {(channels, 1, kernel, kernel)}, found "
                f"{shapes}"
            )
            return
        expected = {
            "kernel": (kernel, kernel),
            "stride": (stride, stride),
            "pad": (pad, pad),
            "dilation": (1, 1),
            "group": (channels,),
        }
        self._check_type(name, layer, ["Deconvolution"])
        self._check_settings(name, layer, expected)
        complaint = _why_not_bilinear(layer.blobs[0])
        if complaint:
            self.problems.append(f"{name}: {complaint}")
        elif model.border != "zero":
            self.problems.append(
                f"{name}: a deconvolution that takes what is outside as zero, but the model has "
                f"border={model.border!r}; build it with border='zero'"
            )
        else:
            self.unused[name] = "bilinear, as the model's own"

    def _scale(self, name: str, layer: CaffeLayer) -> None:
        channels = self.scales[name].weight.shape[1]
        self._check_type(name, layer, ["Scale"])
        if len(layer.blobs) != 1 or layer.blobs[0].size not in (1, channels):
            shapes = ", ".join(str(blob.shape) for blob in layer.blobs[:3])
            self.problems.append(f"{name}: expected {channels} factors, found blobs {shapes}")
        elif self._finite(name, layer.blobs[0]):
            self.loaded.append(layer.name)
            self.factors[name] = layer.blobs[0].reshape(-1).astype(np.float32)

    def _apply_scales(self) -> None:
        """Multiply the score weights by the file's factors, where they are not the model's own."""
        for name, score in self.scales.items():
            key = f"{self.paths[name.replace('scale_', 'score_')]}.weight"
            if key not in self.new:
                continue
            own = np.float32(getattr(score, "input_scale", 1.0))
            ratio = self.factors.get(name, np.ones(1, np.float32)) / own
            if (ratio != 1).any():
                self.new[key] = self.new[key] * ratio[None, :, None, None]

    def _without_weights(self, layer: CaffeLayer) -> None:
        shown = layer.name or "a layer without a name"
        name, kind = caffe_name(layer.name, self.head), layer.type
        if not self.whole or name in self.convs:  # whose missing weights are listed already
            self.unused[shown] = f"{kind or 'a layer'}: no weights"
        elif layer.inputs == 0:
            self.unused[shown] = f"{kind or 'a layer'}: feeds the net"
        elif self._of_another_head(layer):
            self.unused[shown] = "of another head"
        elif kind in ("Pooling", "LRN", "Concat", "Eltwise", "Crop"):
            self._check_fixed(name, layer)
        elif kind in _PASSIVE:
            self._check_settings(shown, layer, {"negative_slope": (0.0,)})
            self.unused[shown] = f"{kind}: {_PASSIVE[kind]}"
        else:
            self.problems.append(
                f"{shown}: {kind or 'a layer of unknown type'}, which the model does not compute"
            )

    def _check_fixed(self, name: str, layer: CaffeLayer) -> None:
        """Compare a layer without weights with the model's."""
        expected: dict[str, tuple[float, ...]] | None = None
        row = self.rows.get(name)
        if layer.type == "Eltwise" and isinstance(self.model, LateFusionFCN):
            expected = {"operation": (1,), "coefficients": (0.5, 0.5)}
        elif layer.type == "Eltwise":
            coefficients = layer.settings.get("coefficients", ())
            expected = {
                "operation": (1,),
                "coefficients": (1.0,) * len(coefficients),
            }
        elif layer.type == "LRN":
            if row is not None and row.normalizes:
                expected = {
                    "local_size": (5,),
                    "alpha": (float(np.float32(1e-4)),),
                    "beta": (0.75,),
                    "region": (0,),
                    "k": (1.0,),
                }
        elif layer.type == "Concat":
            early = name == "data" and self.in_channels == 4
            if early or name in self.concatenations:
                expected = {"axis": (1,), "concat_dim": (1,)}
        elif layer.type == "Pooling":
            if row is not None and not row.normalizes:
                expected = {
                    "method": (0,),
                    "kernel": (row.kernel, row.kernel),
                    "stride": (row.stride, row.stride),
                    "pad": (row.padding, row.padding),
                    "global": (0,),
                    "rounding": (0,),
                }
        elif isinstance(self.model, FCN | LateFusionFCN):
            offset = self._crops(self.model).get(name)
            if offset is not None:
                expected = {"axis": (2,), "offset": (offset, offset)}
        if expected is None:
            self.problems.append(f"{name}: {layer.type}, for which the model has no place")
            return
        self._check_settings(name, layer, expected)
        self.unused[layer.name] = f"{layer.type}: in the model"

    def _crops(self, model: FCN | LateFusionFCN) -> dict[str, int]:
        """Offsets of the crops, by their names in the file."""
        suffixes = [f"_{head}" for head in model.heads] or [""]
        crops = {f"score{suffix}": model.crop for suffix in suffixes}
        if isinstance(model, FCN):
            for suffix in suffixes:
                crops |= {f"{score}{suffix}c": at for score, at in model.skip_offsets.items()}
        return crops

    def _check_type(self, name: str, layer: CaffeLayer, kinds: list[str]) -> None:
        if layer.type and layer.type not in kinds:
            self.problems.append(f"{name}: expected a {' or '.join(kinds)}, found a {layer.type}")

    def _check_settings(
        self, name: str, layer: CaffeLayer, expected: Mapping[str, tuple[float, ...]]
    ) -> None:
        if not self.whole:
            expected = {key: value for key, value in expected.items() if key == "transpose"}
        for key, value in expected.items():
            found = layer.settings.get(key, value)
            if found != value:
                self.problems.append(
                    f"{name}: expected {key} {_plain(value)}, found {_plain(found)}"
                )

    def _finite(self, name: str, array: NDArray[np.floating[Any]]) -> bool:
        with np.errstate(over="ignore"):
            finite = bool(np.isfinite(array.astype(np.float32, copy=False)).all())
        if not finite:
            self.problems.append(f"{name}: expected finite values, found inf or nan")
        return finite


def _squeezed(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its dimensions of size 1: legacy blobs have four, whatever they hold."""
    return tuple(size for size in shape if size != 1)


def _plain(values: tuple[float, ...]) -> str:
    """One number for equal height and width."""
    numbers = [f"{value:g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else f"({', '.join(numbers)})"


def _why_not_bilinear(weight: NDArray[np.floating[Any]]) -> str:
    """Say how the weight ``[channels, 1, k, k]`` of a grouped deconvolution is not bilinear."""
    error = float(
        np.abs(weight[:, 0] - bilinear_kernel(weight.shape[-1], device="cpu").numpy()).max()
    )
    if error < _EXACT:
        return ""
    return f"expected the fixed bilinear kernel, but got weights up to {error:.3g} away from it"


def _caffe_normalization(
    net: CaffeNet,
    model: nn.Module,
    mean: Sequence[float] | None,
    scale: float | None,
    bgr: bool,
) -> tuple[Normalization, str]:
    """Find the input convention of a net; the second value says where it is from."""
    count = 6 if isinstance(model, LateFusionFCN) else 3
    sources = [layer.settings for layer in net.layers if layer.inputs == 0]
    means = {settings["mean"] for settings in sources if "mean" in settings}
    scales = {settings["scale"][0] for settings in sources if "scale" in settings}
    order = ("B, G, R" if bgr else "R, G, B") + (", H, H, A" if count == 6 else "")
    remedy = f"Give the mean (--mean), {count} values from 0 to 255 in the order {order}."
    where = "given"
    if mean is None:
        where = "stated in the file"
        if len(means) > 1:
            raise ValueError(
                f"{net.source}: expected one mean, but its data layers state {len(means)} "
                f"different ones. {remedy}"
            )
        if means:
            mean = means.pop()
            mean = mean * count if len(mean) == 1 else mean
        elif any("mean_file" in settings for settings in sources):
            raise ValueError(
                f"{net.source}: expected a mean, but the net subtracts a mean image that is not in "
                f"the file. {remedy}"
            )
        elif isinstance(model, FCN):
            mean, where = _FCN_MEAN if bgr else _FCN_MEAN[::-1], "of the published FCNs"
        else:
            raise ValueError(f"{net.source}: expected a mean, but the file states none. {remedy}")
    if scale is None:
        if len(scales) > 1:
            raise ValueError(
                f"{net.source}: expected one input scale, but its data layers state "
                f"{len(scales)} different ones. Give the scale (--scale)."
            )
        scale = scales.pop() if scales else 1.0
    if len(mean) != count or not all(math.isfinite(value) for value in mean):
        number = {3: "three", 6: "six"}[count]
        raise ValueError(
            f"{net.source}: expected a mean of {number} numbers, but got {tuple(mean)}."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{net.source}: expected an input scale above 0, but got {scale:g}.")
    note = (
        f"Input: ({order} on 0-255, minus {', '.join(f'{value:g}' for value in mean)}) "
        f"* {scale:g} ({where})"
    )
    normalization = Normalization.from_caffe(mean, bgr=bgr, scale=scale)
    if isinstance(model, SegmentationModel) and model.in_channels == 4:
        normalization += LOG_DEPTH
        note += (
            f"; then the logarithm of the depth in millimetres, minus {255 * LOG_DEPTH.mean[0]:g}"
        )
    return normalization, note


def reorder_classes(model: nn.Module, order: Sequence[int]) -> None:
    """Permute the classes that a model answers with, in place.

    Args:
        model: An ``FCN`` of one head, a ``LateFusionFCN``, a ``DilatedFrontEnd`` or a
            ``DilatedNet``.
        order: Class i of the model becomes what was class ``order[i]``.

    Raises:
        TypeError: ``model`` is none of the above.
        ValueError: ``order`` is no permutation of the classes, or the model has several heads.

    Example:
        >>> from dilseg.models import DilatedFrontEnd
        >>> model = DilatedFrontEnd(3, "demo")
        >>> before = model.final.weight.detach().clone()
        >>> reorder_classes(model, [2, 0, 1])
        >>> torch.equal(model.final.weight[0], before[2])
        True
    """
    trunks = trunks_of(model, "reorder_classes")
    count = next(iter(trunks.values())).num_classes
    if sorted(order) != list(range(count)):
        raise ValueError(
            f"dilseg.models.reorder_classes: expected order a permutation of 0 to {count - 1}, but "
            f"got {list(order)}. Name every class once."
        )
    if isinstance(model, FCN) and model.heads:
        raise ValueError(
            "dilseg.models.reorder_classes: expected a model with one head, but got one with "
            f"{', '.join(model.heads)}, each with classes of its own."
        )
    # Between a DilatedNet's parts the classes may keep their order: only the last layer answers.
    last = model.context if isinstance(model, DilatedNet) and model.context else model
    index = torch.tensor(list(order))
    with torch.no_grad():
        for path, layer in last.named_modules():
            name = path.rpartition(".")[2]
            if name.startswith(("score_", "final", "ctx_final")) or isinstance(
                layer, LearnedUpsampling
            ):
                for parameter in layer.parameters():
                    parameter.copy_(parameter[index.to(parameter.device)])
                if isinstance(layer, LearnedUpsampling):
                    layer.weight.copy_(layer.weight[:, index.to(layer.weight.device)])
