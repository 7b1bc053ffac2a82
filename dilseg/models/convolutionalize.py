# SPDX-License-Identifier: Apache-2.0
"""Classifiers made fully convolutional: every fully connected layer becomes a convolution.

    Linear on a flattened [c, k_h, k_w] map  ->  Conv2d(c, c_out, (k_h, k_w)), weight reshaped
    Linear on a vector                       ->  Conv2d(c, c_out, 1)

The classifier is traced with torch.fx, so it may be written any way (nn.Sequential, its own
``forward``, skips); flattening nodes disappear and what follows them stays four-dimensional.

Source: Long et al. 2015, section 3.1; ``surgery.py`` (transplant) of the published code.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["convolutionalize"]

# Element-wise: these do not care whether a vector is laid out flat or as a map.
ELEMENTWISE_MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Tanh,
)
_ELEMENTWISE: frozenset[Any] = frozenset(
    {
        *(F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.softplus),
        *(F.hardtanh, F.sigmoid, F.tanh),
        *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.neg),
        *(torch.add, torch.sub, torch.mul),
        *("relu", "relu_", "sigmoid", "tanh", "add", "sub", "mul", "contiguous", "float"),
    }
)
_DROPOUTS: dict[Any, Callable[..., nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout2d: nn.Dropout2d,
}
_SOFTMAXES: dict[Any, type[nn.Softmax | nn.LogSoftmax]] = {
    F.softmax: nn.Softmax,
    torch.softmax: nn.Softmax,
    "softmax": nn.Softmax,
    F.log_softmax: nn.LogSoftmax,
    torch.log_softmax: nn.LogSoftmax,
    "log_softmax": nn.LogSoftmax,
}
_LARGEST_SEARCHED = 512


class _Tracer(fx.Tracer):
    """Keeps subclasses of torch's convolutions whole, wherever they are defined."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


def convolutionalize(
    classifier: nn.Module, input_shape: tuple[int, int, int] | None = None
) -> fx.GraphModule:
    """Turn a classifier into a fully convolutional network that gives a map of class scores.

    On an image of the training size the result equals the classifier's output with a 1x1 map
    appended; on a larger image it is the classifier applied to every window at the stride of the
    last feature map, at the price of one pass (exactly so where the features have no padding).
    Sub-module names and parameter names stay; weights are copied, the classifier is not changed.

    Averages over the whole training-size map (adaptive pooling to 1x1, ``mean((2, 3))``) become
    average poolings of that size and stride 1; adaptive pooling to a x b keeps pooling by its
    training-size factor.

    Args:
        classifier: Takes ``[n, c, h, w]``, returns ``[n, classes]``; traceable by torch.fx.
        input_shape: ``(c, h, w)`` of the images it was trained on. None finds the smallest square
            that fits its fully connected layers; that is impossible with adaptive pooling or
            averaging, which fit any size.

    Returns:
        A module that takes ``[n, c, >= h, >= w]`` and returns ``[n, classes, rows, columns]``.

    Raises:
        ValueError: The classifier cannot be traced, does not accept ``input_shape``, has no fully
            connected layer, or ``input_shape`` is needed and None.
        NotImplementedError: A flattened map goes through an operation that has no equivalent
            on a map (the message names it).

    Example:
        >>> lenet = nn.Sequential(nn.Conv2d(1, 4, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        ...                       nn.Linear(4 * 12 * 12, 10))
        >>> dense = convolutionalize(lenet, (1, 28, 28))
        >>> dense(torch.zeros(1, 1, 28, 28)).shape, dense(torch.zeros(1, 1, 32, 40)).shape
        (torch.Size([1, 10, 1, 1]), torch.Size([1, 10, 3, 7]))

    Difference from torch: torch has no such function.
    Source: Long et al. 2015, section 3.1 and figure 2.
    """
    model = copy.deepcopy(classifier)
    training = {name: module.training for name, module in model.named_modules()}
    # Traced in evaluation mode, functional dropout that follows `self.training` shows as off.
    model.eval()
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            f"dilseg.models.convolutionalize: expected a classifier that torch.fx can trace, but "
            f"tracing {type(classifier).__name__} failed ({error}). Pass its layers as an "
            "nn.Sequential."
        ) from error
    dense = fx.GraphModule(model, graph)
    shapes = _shapes(dense, input_shape)
    _Conversion(dense, shapes).run()
    for name, module in dense.named_modules():
        module.training = training.get(name, classifier.training)
    return dense


class _ShapeRecorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> object:
        value: object = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = tuple(value.shape)
        return value


def _shapes(
    dense: fx.GraphModule, input_shape: tuple[int, int, int] | None
) -> dict[str, tuple[int, ...]]:
    """Find the shape of every node for two images of the training size."""
    # A copy on the meta device costs neither memory nor arithmetic.
    tensors = [*dense.parameters(), *dense.buffers()]
    memo: dict[int, Any] = {
        id(t): nn.Parameter(t.to("meta"), False) if isinstance(t, nn.Parameter) else t.to("meta")
        for t in tensors
    }
    on_meta = copy.deepcopy(dense, memo)
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)

    def run(shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        recorder = _ShapeRecorder(on_meta)
        recorder.run(torch.empty(2, *shape, dtype=dtype, device="meta"))
        return recorder.shapes

    if input_shape is not None:
        try:
            return run(input_shape)
        except (RuntimeError, ValueError) as error:
            reason = str(error).split("\n", 1)[0]
            raise ValueError(
                f"dilseg.models.convolutionalize: expected input_shape (c, h, w) that the "
                f"classifier accepts, but got {input_shape} ({reason}). Pass the shape of one "
                "image it was trained on."
            ) from error

    pooled = [node for node in dense.graph.nodes if _averages(dense, node)]
    first = next((m for m in dense.modules() if isinstance(m, nn.Conv2d)), None)
    if pooled or first is None:
        why = f"{pooled[0].name!r} fits any size" if pooled else "it has no convolution"
        raise ValueError(
            f"dilseg.models.convolutionalize: expected input_shape (c, h, w), but got None, and it "
            f"cannot be inferred: {why}. Pass the shape of one image the classifier was trained on."
        )
    for side in range(1, _LARGEST_SEARCHED + 1):
        try:
            return run((first.in_channels, side, side))
        except (RuntimeError, ValueError):
            continue
    raise ValueError(
        f"dilseg.models.convolutionalize: expected input_shape (c, h, w), but got None, and no "
        f"square image up to {_LARGEST_SEARCHED} pixels fits the fully connected layers. Pass the "
        "shape of one image the classifier was trained on."
    )


def _averages(dense: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node pools adaptively or averages over the whole map."""
    if node.op == "call_module":
        module = dense.get_submodule(str(node.target))
        return isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d)
    return node.target in (
        F.adaptive_avg_pool2d,
        F.adaptive_max_pool2d,
        torch.mean,
        "mean",
    ) and node.op in ("call_function", "call_method")


class _Conversion:
    """Rewrites a traced classifier in place.

    ``flat`` holds, for every value that used to be a vector, the ``[c, h, w]`` map it is now.
    """

    def __init__(self, dense: fx.GraphModule, shapes: dict[str, tuple[int, ...]]) -> None:
        self.dense = dense
        self.graph = dense.graph
        self.shapes = shapes
        self.flat: dict[fx.Node, tuple[int, int, int]] = {}
        self.converted: dict[str, tuple[int, int, int]] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "output":
                self._check_output(node)
            elif node.op == "call_module":
                self._module(node, self.dense.get_submodule(str(node.target)))
            elif node.op in ("call_function", "call_method"):
                self._call(node)
        if not self.converted:
            raise ValueError(
                "dilseg.models.convolutionalize: expected a classifier with nn.Linear layers after "
                "a flattening, but got none. It may be fully convolutional already."
            )
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.dense.delete_all_unused_submodules()
        self.dense.recompile()

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        source = node.all_input_nodes[0]
        if str(node.target) in self.converted:
            # A layer that is called twice was converted at its first call.
            if self.flat.get(source) != self.converted[str(node.target)]:
                self._unsupported(node)
            self.flat[node] = (self.shapes[node.name][1], 1, 1)
        elif isinstance(module, nn.Linear):
            self._linear(node, source, module)
        elif isinstance(module, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            self._pool(
                node, source, nn.AvgPool2d if "Avg" in type(module).__name__ else nn.MaxPool2d
            )
        elif self._flattens(node, source):
            self._flatten(node, source)
        elif source in self.flat:
            chw = self.flat[source]
            if isinstance(module, nn.BatchNorm1d) and chw[1:] == (1, 1):
                self.dense.set_submodule(str(node.target), _batch_norm_2d(module))
            elif isinstance(module, nn.Softmax | nn.LogSoftmax) and module.dim in (1, -1):
                if chw[1:] != (1, 1):
                    self._unsupported(node)
                self.dense.set_submodule(str(node.target), type(module)(dim=1))
            elif not isinstance(module, ELEMENTWISE_MODULES):
                self._unsupported(node)
            self.flat[node] = chw

    def _call(self, node: fx.Node) -> None:
        inputs = node.all_input_nodes
        if not inputs:
            return
        source = inputs[0]
        if node.target in _DROPOUTS:
            self._dropout(node, source)
        elif node.target is F.adaptive_avg_pool2d:
            self._pool(node, source, nn.AvgPool2d)
        elif node.target is F.adaptive_max_pool2d:
            self._pool(node, source, nn.MaxPool2d)
        elif node.target in (torch.mean, "mean") and self._means_over_map(node, source):
            self._pool(node, source, nn.AvgPool2d)
        elif self._flattens(node, source):
            self._flatten(node, source)
        elif source in self.flat and node.target in _SOFTMAXES:
            self._softmax(node, source)
        elif any(value in self.flat for value in inputs):
            maps = {self.flat.get(value) for value in inputs}
            if node.target not in _ELEMENTWISE or len(maps) != 1:
                # Reading the batch size of a vector is harmless once nothing uses it.
                if node.users:
                    self._unsupported(node)
                return
            self.flat[node] = self.flat[source]

    def _flattens(self, node: fx.Node, source: fx.Node) -> bool:
        before, after = self.shapes.get(source.name), self.shapes.get(node.name)
        if before is None or after is None or source in self.flat:
            return False
        return len(before) == 4 and after == (before[0], before[1] * before[2] * before[3])

    def _flatten(self, node: fx.Node, source: fx.Node) -> None:
        _, c, h, w = self.shapes[source.name]
        self.flat[self._use(node, source, nn.Identity())] = (c, h, w)

    def _linear(self, node: fx.Node, source: fx.Node, linear: nn.Linear) -> None:
        if source not in self.flat:
            self._unsupported(node)
        c, h, w = self.flat[source]
        conv = nn.Conv2d(
            c, linear.out_features, (h, w), bias=linear.bias is not None, device="meta"
        )
        conv.weight = nn.Parameter(
            linear.weight.detach().reshape(conv.weight.shape), linear.weight.requires_grad
        )
        conv.bias = linear.bias
        self.dense.set_submodule(str(node.target), conv)
        self.converted[str(node.target)] = (c, h, w)
        self.flat[node] = (linear.out_features, 1, 1)

    def _pool(
        self, node: fx.Node, source: fx.Node, kind: type[nn.AvgPool2d | nn.MaxPool2d]
    ) -> None:
        """Replace pooling to a fixed size by pooling with the window of the training size."""
        _, c, h, w = self.shapes[source.name]
        after = self.shapes[node.name]
        rows, columns = after[2:] if len(after) == 4 else (1, 1)
        if h % rows or w % columns:
            raise ValueError(
                f"dilseg.models.convolutionalize: expected {node.name!r} to pool windows of one "
                f"size, but got a {h} x {w} map for a {rows} x {columns} result. Pass an "
                "input_shape whose map is a multiple of it."
            )
        kernel = (h // rows, w // columns)
        if kernel == (1, 1):
            pool: nn.Module = nn.Identity()
        else:
            # One window over the whole map slides cell by cell; a grid of windows must not overlap.
            stride = (1 if rows == 1 else kernel[0], 1 if columns == 1 else kernel[1])
            pool = kind(kernel, stride)
        used = self._use(node, source, pool)
        if len(after) == 2:
            self.flat[used] = (c, 1, 1)

    def _dropout(self, node: fx.Node, source: fx.Node) -> None:
        """Make functional dropout that follows ``self.training`` a module that does so too."""
        arguments = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
        if arguments.get("training", True) is False:
            used = self._use(node, source, _DROPOUTS[node.target](arguments.get("p", 0.5)))
        else:
            used = node
        if source in self.flat:
            self.flat[used] = self.flat[source]

    def _softmax(self, node: fx.Node, source: fx.Node) -> None:
        """Make a functional softmax over the classes a module over the channels of the map."""
        chw = self.flat[source]
        arguments = dict(zip(("input", "dim"), node.args, strict=False)) | node.kwargs
        plain = len(node.args) <= 2 and arguments.get("dtype") is None
        if chw[1:] != (1, 1) or arguments.get("dim") not in (1, -1) or not plain:
            self._unsupported(node)
        self.flat[self._use(node, source, _SOFTMAXES[node.target](dim=1))] = chw

    def _use(self, node: fx.Node, source: fx.Node, module: nn.Module) -> fx.Node:
        """Let a node call this module on ``source``; a module node keeps its place and name."""
        if node.op == "call_module":
            self.dense.set_submodule(str(node.target), module)
            return node
        name = node.name
        while hasattr(self.dense, name):
            name += "_"
        self.dense.add_submodule(name, module)
        with self.graph.inserting_before(node):
            call = self.graph.call_module(name, (source,))
        self.shapes[call.name] = self.shapes[node.name]
        node.replace_all_uses_with(call)
        self.graph.erase_node(node)
        return call

    def _means_over_map(self, node: fx.Node, source: fx.Node) -> bool:
        before, after = self.shapes.get(source.name), self.shapes.get(node.name)
        if before is None or after is None or len(before) != 4:
            return False
        return after in (before[:2], (*before[:2], 1, 1))

    def _check_output(self, node: fx.Node) -> None:
        result = node.args[0]
        if self.converted and result not in self.flat:
            raise NotImplementedError(
                "dilseg.models.convolutionalize: expected a classifier that returns one tensor "
                f"[n, classes], but got one that returns {result}. Wrap it so that it returns the "
                "class scores alone."
            )

    def _unsupported(self, node: fx.Node) -> NoReturn:
        what = node.target
        if node.op == "call_module":
            what = self.dense.get_submodule(str(node.target))
        raise NotImplementedError(
            f"dilseg.models.convolutionalize: expected only linear and element-wise layers after "
            f"the flattening, but got {node.name!r} ({what}), which has no equivalent on a map. "
            "Convert up to the layer before it."
        )


def _batch_norm_2d(norm: nn.BatchNorm1d) -> nn.BatchNorm2d:
    """Make the same normalisation for maps."""
    converted = nn.BatchNorm2d(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    reference = next((t for t in norm.state_dict().values() if t.is_floating_point()), None)
    if reference is not None:
        converted = converted.to(reference.device, reference.dtype)
    converted.load_state_dict(norm.state_dict())
    return converted
