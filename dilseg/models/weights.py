# SPDX-License-Identifier: Apache-2.0
"""Loading weights: ImageNet VGG-16 into a trunk, and one training stage into the next.

Both functions read a file or a state dict, check every name and shape before they touch the model,
raise one error that names the offending key, and return a ``LoadReport`` that says what was loaded
and what was left as it was.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dilseg.models.backbones import Backbone, TrunkModel, single_layers
from dilseg.models.base import IMAGENET, IMAGENET_FEATURES, LOG_DEPTH, Normalization
from dilseg.models.dilatednet import DilatedNet
from dilseg.models.fcn import LateFusionFCN
from dilseg.models.upsampling import BilinearUpsampling

__all__ = ["LoadReport", "load_backbone", "load_stage", "read_state_dict"]


@dataclass(frozen=True)
class LoadReport:
    """What a loading function did; ``print(report)`` shows it.

    Attributes:
        source: The file, or "state dict".
        loaded: Layers of the model that now hold weights of the source.
        fresh: Layers of the model that were left as they were, with the reason.
        unused: Layers of the source that the model has no place for, with the reason.
        normalization: The input convention the model now has.
        notes: Sentences on what else was done.
    """

    source: str
    loaded: tuple[str, ...]
    fresh: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    normalization: Normalization = IMAGENET
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Format as a few lines: what was loaded, one per reason for the rest, the notes."""
        lines = [f"Loaded from {self.source}: {', '.join(self.loaded)}"]
        for title, layers in (("Left fresh", self.fresh), ("Not used", self.unused)):
            by_reason: dict[str, list[str]] = {}
            for layer, reason in layers.items():
                by_reason.setdefault(reason, []).append(layer)
            lines += [f"{title}: {', '.join(names)} ({why})" for why, names in by_reason.items()]
        lines += self.notes
        return "\n".join(lines)


_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """Read a state dict from a file or a mapping, and take off its wrappings.

    Accepted around the state dict: a training checkpoint that holds it under "state_dict",
    "model_state_dict" or "model", and the prefixes "module." (DistributedDataParallel) and
    "_orig_mod." (torch.compile) on every key.

    Args:
        source: A path, read with ``torch.load(weights_only=True)`` onto the CPU; or a mapping.

    Returns:
        The tensors by name, not copied.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no PyTorch file, or holds something other than a state dict.

    Example:
        >>> list(read_state_dict({"model": {"module.fc6.bias": torch.zeros(1)}}))
        ['fc6.bias']
    """
    where = "state dict"
    content: Any = source
    if not isinstance(source, Mapping):
        where = os.fspath(source)
        if not os.path.isfile(where):
            raise FileNotFoundError(f"{where}: expected a weights file, but there is no such file.")
        try:
            content = torch.load(where, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            ValueError,
            zipfile.BadZipFile,
        ) as e:
            raise ValueError(
                f"{where}: expected a state dict saved by torch.save, but it cannot be read "
                f"({why_unreadable(e)}). Check that the file is complete and that it holds "
                "model.state_dict(), not the model."
            ) from e
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{where}: expected a state dict, but got a {type(content).__name__}. "
            "Save model.state_dict()."
        )
    state = dict(content)
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{where}: expected a state dict of tensors, but the entry {key!r} is a "
                f"{type(value).__name__}. Save model.state_dict()."
            )
    for prefix in _PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def why_unreadable(error: Exception) -> str:
    """Say in a few words why ``torch.load(weights_only=True)`` refused a file."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own text recommends weights_only=False, which runs whatever the file says.
        return "it is no PyTorch file, or holds objects other than tensors and plain values"
    return str(error).strip().split("\n", 1)[0][:200] or type(error).__name__


def _describe(source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    return "state dict" if isinstance(source, Mapping) else os.fspath(source)


def trunks_of(model: nn.Module, function: str) -> dict[str, TrunkModel]:
    """Return the parts of a model that begin with a layer table, or raise for ``function``.

    They come by modality; a single one has the name "".
    """
    if isinstance(model, LateFusionFCN):
        return {"color": model.color, "hha": model.hha}
    trunk = model.front_end if isinstance(model, DilatedNet) else model
    if not isinstance(trunk, TrunkModel):
        raise TypeError(
            f"dilseg.models.{function}: expected model an FCN, a DilatedFrontEnd or a DilatedNet, "
            f"but got {type(model).__name__}."
        )
    return {"": trunk}


def _torchvision_names(trunk: TrunkModel, where: str) -> dict[str, str]:
    """Map layer names to torchvision's; ``features`` counts conv, ReLU and pooling."""
    if not isinstance(trunk.backbone, Backbone):
        raise ValueError(
            f"{where}: expected the published weights of {trunk.backbone.name!r}, but got "
            "torchvision's layout, which is another network. Convert Caffe's file "
            "(dilseg.models.load_caffemodel)."
        )
    names, index = {}, 0
    for stage, widths in enumerate(trunk.backbone.stages, start=1):
        for position in range(1, len(widths) + 1):
            names[f"conv{stage}_{position}"] = f"features.{index}"
            index += 2
        index += 1
    return names | {"fc6": "classifier.0", "fc7": "classifier.3"}


FULLY_CONNECTED = ("fc6", "fc7")
_INVALID_CLASSIFIER = "no valid classifier weights in the source"
# Layers that classify into ImageNet's or another net's classes.
_OTHER_HEADS = ("classifier.6", "fc8", "loss", "score", "upscore", "final", "fc-final")


def load_backbone(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    normalization: Normalization | None = None,
    bgr: bool = False,
) -> LoadReport:
    """Load ImageNet weights into the trunk of a model, or into both of them.

    Two layouts are understood: torchvision's ``vgg16`` (features.N, classifier.N; the fully
    connected weights are reshaped into convolutions) and the published layer names (conv1_1.weight
    ... fc7.bias), for VGG-16 or for any backbone. A file may lack fc6 and fc7 altogether; they stay
    fresh then, as they do when the model's fc_channels differs from the file's or the file has no
    valid values there (torchvision's IMAGENET1K_FEATURES). Half-precision files are converted to
    the model's dtype.

    A model of four channels gets the file's three filters of the first layer and, for depth, their
    mean. Both trunks of a ``LateFusionFCN`` get the same weights.

    Args:
        model: An ``FCN``, a ``LateFusionFCN``, a ``DilatedFrontEnd`` or a ``DilatedNet``, with the
            "vgg16" backbone or one of the file's shapes.
        source: A path or a state dict, see ``read_state_dict``.
        normalization: The input convention of the weights; becomes ``model.normalization``, with
            ``LOG_DEPTH`` for a fourth channel, twice for six. None stands for that of torchvision's
            file: ``IMAGENET``, or ``IMAGENET_FEATURES`` for the one that has no valid values in its
            classifier.
        bgr: The weights expect channels in B, G, R order (Caffe). The input channels of conv1_1
            are reversed on loading, so that the model takes RGB like any other.

    Returns:
        A printable report.

    Raises:
        TypeError: ``model`` is none of the above.
        ValueError: A key is missing, unexpected, of the wrong shape or not finite. The model is
            unchanged.
        FileNotFoundError: There is no such file.

    Example:
        >>> from dilseg.models import DilatedFrontEnd, fcn8s
        >>> trained = DilatedFrontEnd(4, "demo")
        >>> print(load_backbone(fcn8s(9, "demo"), trained.state_dict()))
        Loaded from state dict: conv1_1, conv2_1, conv3_1, conv3_2, ..., fc6, fc7
        Not used: final (classifies into other classes)

    Source: Long et al. 2015, sections 4.1 and 5 (early fusion: the authors' solve.py of
    nyud-fcn32s-color-d).
    """
    trunks = trunks_of(model, "load_backbone")
    where = _describe(source)
    state = read_state_dict(source)
    reports = {
        modality: _load_trunk(trunk, where, state, normalization, bgr)
        for modality, trunk in trunks.items()
    }
    report = next(iter(reports.values()))
    if len(reports) > 1:
        report = replace(
            report,
            loaded=tuple(f"{m}.{name}" for m, each in reports.items() for name in each.loaded),
            fresh={f"{m}.{k}": why for m, each in reports.items() for k, why in each.fresh.items()},
            normalization=report.normalization + report.normalization,
        )
    model.normalization = report.normalization  # type: ignore[assignment]
    return report


def _load_trunk(
    trunk: TrunkModel,
    where: str,
    state: Mapping[str, Tensor],
    normalization: Normalization | None,
    bgr: bool,
) -> LoadReport:
    torchvision = any(key.startswith("features.") for key in state)
    rows = [layer for layer in single_layers(trunk.layers) if layer.channels is not None]
    layers, first = [layer.name for layer in rows], rows[0].name
    source_names = (
        _torchvision_names(trunk, where) if torchvision else {name: name for name in layers}
    )

    unused, known = {}, set(source_names.values())
    for key in state:
        layer = key.rpartition(".")[0]
        if layer in known and key.endswith((".weight", ".bias")):
            continue
        if layer.startswith(_OTHER_HEADS):
            unused[layer] = "classifies into other classes"
            continue
        raise ValueError(
            f"{where}: expected the weights of a plain {trunk.backbone.name}, but found the key "
            f"{key!r}. {_hint(trunk, state)}"
        )

    reason = _why_fresh(state, source_names, trunk.feature_channels)
    fresh = dict.fromkeys(FULLY_CONNECTED, reason) if reason else {}
    if normalization is None:
        normalization = IMAGENET_FEATURES if reason == _INVALID_CLASSIFIER else IMAGENET
    loaded = tuple(name for name in layers if name not in fresh)
    new: dict[str, Tensor] = {}
    for name in loaded:
        for part in ("weight", "bias"):
            key = f"{source_names[name]}.{part}"
            shape = getattr(getattr(trunk, name), part).shape
            place = f"{key!r} of shape {tuple(shape)} ({name} of {trunk.backbone.name})"
            tensor = state.get(key)
            if tensor is None:
                raise ValueError(
                    f"{where}: expected {place}, but there is no such key. {_hint(trunk, state)}"
                )
            if name in FULLY_CONNECTED and tensor.numel() == shape.numel():
                tensor = tensor.reshape(shape)
            if name == first and part == "weight":
                tensor = _first_filters(tensor, trunk.in_channels, bgr)
            if tensor.shape != shape:
                raise ValueError(
                    f"{where}: expected {place}, but got the shape {tuple(tensor.shape)}. "
                    f"{_hint(trunk, state)}"
                )
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{where}: expected finite values in {key!r}, but got inf or nan. "
                    "The file is damaged; fetch it again."
                )
            new[f"{name}.{part}"] = tensor
    _copy(trunk, new)
    if trunk.in_channels == 4:
        normalization += LOG_DEPTH
    trunk.normalization = normalization
    return LoadReport(
        source=where,
        loaded=loaded,
        fresh=fresh,
        unused=unused,
        normalization=normalization,
    )


def _first_filters(weight: Tensor, channels: int, bgr: bool) -> Tensor:
    """Filters ``[c_out, channels, k, k]`` for RGB and depth, of those of three channels."""
    if weight.dim() != 4 or weight.shape[1] != 3:
        return weight
    if bgr:
        weight = weight.flip(1)
    return weight if channels == 3 else torch.cat([weight, weight.mean(1, keepdim=True)], dim=1)


def _hint(trunk: TrunkModel, state: Mapping[str, Tensor]) -> str:
    if any(key.endswith("running_mean") for key in state):
        return "That is a network with batch normalisation; use the plain vgg16."
    if trunk.backbone.name != "vgg16":
        return f"The model has the backbone {trunk.backbone.name!r}; build it with 'vgg16'."
    return "Use a torchvision vgg16 state dict, whole or its convolutions only."


def _why_fresh(state: Mapping[str, Tensor], names: Mapping[str, str], fc_channels: int) -> str:
    """Say why fc6 and fc7 are not to be loaded; an empty string if they are."""
    if "fc6" not in names:
        return ""
    keys = [f"{names[fc]}.{part}" for fc in FULLY_CONNECTED for part in ("weight", "bias")]
    present = [state[key] for key in keys if key in state]
    if not present:
        return "no classifier weights in the source"
    bias = state.get(keys[1])
    if bias is not None and bias.dim() == 1 and len(bias) != fc_channels:
        return f"the source has {len(bias)} channels there, the model {fc_channels}"
    if not all(torch.isfinite(tensor).all() for tensor in present):
        return _INVALID_CLASSIFIER
    return ""


def _copy(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for key, tensor in tensors.items():
            own[key].copy_(tensor)


# What a later stage may add to an earlier one, by the first part of its keys.
_STAGE_LAYERS = ("score_pool4", "score_pool3", "upscore", "context")


def load_stage(model: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any]) -> LoadReport:
    """Initialise a model from the previous stage of its training.

    FCN-16s from FCN-32s, FCN-8s from FCN-16s, a DilatedNet from its front end or from a DilatedNet
    without context; a model of the same form is copied whole. What the earlier stage lacks stays
    as it was built: skip scores (zero), deconvolutions (bilinear), the context module (identity).

    Args:
        model: The model of the new stage.
        source: A path or a state dict, see ``read_state_dict``.

    Returns:
        A printable report.

    Raises:
        ValueError: Any other key is missing or unexpected, or a shape differs (another number of
            classes, backbone or fc_channels). The model is unchanged.
        FileNotFoundError: There is no such file.

    Example:
        >>> from dilseg.models import fcn16s, fcn32s
        >>> print(load_stage(fcn16s(3, "demo"), fcn32s(3, "demo").state_dict()))
        Loaded from state dict: conv1_1, conv2_1, conv3_1, conv3_2, ..., fc7, score_fr
        Left fresh: score_pool4 (not in the earlier stage)

    Source: Long et al. 2015, section 4.2 (skips start at zero on a trained coarser net); Yu &
    Koltun 2016, section 5 (context on a trained front end).
    """
    where = _describe(source)
    state = read_state_dict(source)
    wanted = model.state_dict()
    if isinstance(model, DilatedNet) and not any(key.startswith("front_end.") for key in state):
        state = {f"front_end.{key}": tensor for key, tensor in state.items()}

    modules = dict(model.named_modules())
    new, fresh, unused = {}, {}, {}
    for key, tensor in wanted.items():
        found = state.get(key)
        if found is None:
            if not key.startswith(_STAGE_LAYERS):
                raise ValueError(
                    f"{where}: expected the key {key!r} of shape {tuple(tensor.shape)}, but there "
                    f"is none. {_STAGE_HINT}"
                )
            fresh[_layer(key)] = "not in the earlier stage"
        elif found.shape != tensor.shape:
            raise ValueError(
                f"{where}: expected {key!r} of shape {tuple(tensor.shape)}, but got "
                f"{tuple(found.shape)}. {_STAGE_HINT}"
            )
        else:
            new[key] = found
    for key in state:
        if key not in wanted:
            if not key.startswith("upscore"):
                raise ValueError(f"{where}: found the unexpected key {key!r}. {_STAGE_HINT}")
            upsampling = modules.get(_layer(key))
            if isinstance(upsampling, BilinearUpsampling):
                complaint = upsampling.mismatch(state[key])
                if complaint:
                    raise ValueError(f"{where}: {key}: {complaint}")
            unused[_layer(key)] = "the new stage upsamples by fixed weights or from elsewhere"
    _copy(model, new)
    return LoadReport(
        source=where,
        loaded=tuple(dict.fromkeys(_layer(key) for key in new)),
        fresh=fresh,
        unused=unused,
        normalization=getattr(model, "normalization", IMAGENET),
    )


_STAGE_HINT = "Load an earlier stage of the same model: same num_classes, backbone and fc_channels."


def _layer(key: str) -> str:
    return key.rpartition(".")[0]
