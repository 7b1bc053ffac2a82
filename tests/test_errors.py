# SPDX-License-Identifier: Apache-2.0
"""Texts of errors: operator, argument, wanted, got, mend; the same from every implementation."""

import re
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from dilseg.functional import (
    cross_entropy,
    dilated_conv2d,
    upsample_add,
    upsample_argmax,
    upsample_cross_entropy,
)


def zeros(*shape, dtype=torch.float32):
    """A function that makes the tensor on a device."""
    return lambda device: torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Case:
    name: str
    call: object
    tensors: tuple
    error: type
    pattern: str


X, W = zeros(2, 6, 9, 8), zeros(4, 3, 3, 3)


def conv(**options):
    return lambda *tensors: dilated_conv2d(*tensors, **options)


def up(**options):
    return lambda *tensors: upsample_add(*tensors, **options)


def loss(**options):
    return lambda *tensors: cross_entropy(*tensors, **options)


def up_loss(**options):
    return lambda *tensors: upsample_cross_entropy(*tensors, **options)


def up_argmax(**options):
    return lambda *tensors: upsample_argmax(*tensors, **options)


CONV_CASES = [
    Case(
        "weight_channels",
        conv(groups=3),
        (X, W),
        ValueError,
        r"expected weight of shape \[c_out, c_in/groups, k_h, k_w\] = \[4, 6/3, 3, 3\].*"
        r"\[4, 3, 3, 3\].*\[2, 6, 9, 8\].*groups=3|expected c_out divisible by groups.*c_out=4",
    ),
    Case(
        "weight_channels_ungrouped",
        conv(),
        (X, W),
        ValueError,
        r"expected weight of shape \[c_out, c_in/groups, k_h, k_w\] = \[4, 6/1, 3, 3\], but got "
        r"weight of shape \[4, 3, 3, 3\] for input of shape \[2, 6, 9, 8\] with groups=1\. .*3.*6",
    ),
    Case("groups_divide_input", conv(groups=4), (X, W), ValueError, r"c_in=6 with groups=4"),
    Case("groups_divide_output", conv(groups=3), (X, W), ValueError, r"c_out=4 with groups=3"),
    Case("groups_positive", conv(groups=0), (X, W), ValueError, r"groups of at least 1, .* got 0"),
    Case(
        "window_exceeds_input",
        conv(groups=2, dilation=(6, 2), padding=(1, 0)),
        (X, W),
        ValueError,
        r"effective kernel, 13x5 \(kernel 3x3, dilation 6x2\), but got padded size 11x8 "
        r"\(input 9x8, .*\)\. The smallest padding on each side that works is \(2, 0\)",
    ),
    Case("input_rank", conv(), (zeros(9, 8), W), ValueError, r"input of rank 4 .* got rank 2"),
    Case("weight_rank", conv(), (X, zeros(4, 6, 9)), ValueError, r"weight of rank 4 .* got rank 3"),
    Case(
        "weight_rank_same",
        conv(padding="same"),
        (X, zeros(4)),
        ValueError,
        r"weight of rank 4 .* got rank 1 with shape \[4\]",
    ),
    Case(
        "bias_shape",
        conv(groups=2),
        (X, W, zeros(5)),
        ValueError,
        r"expected bias of shape \[c_out\] = \[4\], but got \[5\]",
    ),
    Case(
        "dtypes_mixed",
        conv(groups=2),
        (X, zeros(4, 3, 3, 3, dtype=torch.float16)),
        TypeError,
        r"expected weight of the dtype of input, torch\.float32, but got weight of dtype "
        r"torch\.float16\. Use torch\.autocast or convert with weight\.to\(input\.dtype\)",
    ),
    Case(
        "bias_dtype",
        conv(groups=2),
        (X, W, zeros(4, dtype=torch.float64)),
        TypeError,
        r"expected bias of the dtype of input",
    ),
    Case(
        "dtype_unsupported",
        conv(),
        (zeros(1, 1, 3, 3, dtype=torch.int32), zeros(1, 1, 1, 1, dtype=torch.int32)),
        TypeError,
        r"expected input of dtype float64, float32, float16 or bfloat16, but got torch\.int32",
    ),
    Case(
        "stride_zero",
        conv(groups=2, stride=0),
        (X, W),
        ValueError,
        r"expected stride from 1 .* got \[0, 0\]",
    ),
    Case(
        "dilation_zero",
        conv(groups=2, dilation=0),
        (X, W),
        ValueError,
        r"expected dilation from 1 .* got \[0, 0\]",
    ),
    Case(
        "padding_negative",
        conv(groups=2, padding=-1),
        (X, W),
        ValueError,
        r"padding .* from 0 .* Crop the input",
    ),
    Case(
        "stride_triple", conv(stride=(1, 2, 3)), (X, W), ValueError, r"stride .* pair .* 3 values"
    ),
    Case("stride_float", conv(stride=1.5), (X, W), TypeError, r"stride to be an int .* got 1\.5"),
    Case("groups_float", conv(groups=1.0), (X, W), TypeError, r"groups to be an int, .* got 1\.0"),
    Case(
        "activation_callable",
        conv(activation=torch.relu),
        (X, W),
        TypeError,
        r'to be "relu" or None',
    ),
    Case("padding_name", conv(padding="half"), (X, W), ValueError, r"padding .* got 'half'"),
    Case(
        "same_with_stride",
        conv(padding="same", stride=2),
        (X, W),
        ValueError,
        r"expected stride 1 with padding='same'.* but got stride \(2, 2\)",
    ),
    Case(
        "activation",
        conv(groups=2, activation="gelu"),
        (X, W),
        ValueError,
        r'activation None or "relu", but got "gelu"',
    ),
    Case("not_a_tensor", lambda w: dilated_conv2d([1], w), (W,), TypeError, r"input .* got list"),
]

COARSE, SKIP = zeros(2, 3, 5, 7), zeros(2, 3, 10, 14)

UPSAMPLE_CASES = [
    Case(
        "neither_scale_nor_size", up(), (COARSE, SKIP), ValueError, r"scale_factor or size .* nei"
    ),
    Case(
        "skip_too_small",
        up(scale_factor=2, offset=(1, 0)),
        (COARSE, SKIP),
        ValueError,
        r"expected skip of size at least offset \+ output size = \(1 \+ 10, 0 \+ 14\) = "
        r"\(11, 14\), but got skip of size \(10, 14\)\. .*size=skip\.shape",
    ),
    Case(
        "skip_channels",
        up(scale_factor=2),
        (COARSE, zeros(2, 4, 10, 14)),
        ValueError,
        r"with n=2, c=3 as input, but got skip of shape \[2, 4, 10, 14\]",
    ),
    Case(
        "dtypes_mixed",
        up(scale_factor=2),
        (COARSE, zeros(2, 3, 10, 14, dtype=torch.float64)),
        TypeError,
        r"expected skip of the dtype of input, torch\.float32, .* skip of dtype torch\.float64",
    ),
    Case("border", up(scale_factor=2, border="wrap"), (COARSE, SKIP), ValueError, r'got "wrap"'),
    Case("offset", up(scale_factor=2, offset=(-1, 0)), (COARSE, SKIP), ValueError, r"\(-1, 0\)"),
    Case(
        "origin", up(size=4, origin=(1, 0)), (COARSE, SKIP), ValueError, r"origin .* got \(1, 0\)"
    ),
    Case("scale_zero", up(scale_factor=0), (COARSE, SKIP), ValueError, r"greater than 0 .* got 0"),
    Case(
        "scale_triple", up(scale_factor=(1, 2, 3)), (COARSE, SKIP), TypeError, r"scale_factor .* pa"
    ),
    Case("border_none", up(size=4, border=None), (COARSE, SKIP), TypeError, r'"clamp" or "zero"'),
    Case(
        "align_corners_word",
        up(size=4, align_corners="yes"),
        (COARSE, SKIP),
        TypeError,
        r"align_corners to be True or False, but got 'yes'",
    ),
    Case("size_zero", up(size=0), (COARSE, SKIP), ValueError, r"output map of .* 0x0 .* 5x7"),
    Case("map_empty", up(size=2), (zeros(1, 1, 0, 3), None), ValueError, r"input map .* got 0x3"),
    Case("input_rank", up(size=2), (zeros(3, 3), None), ValueError, r"input of rank 4"),
    Case("input_rank_scale", up(scale_factor=2), (zeros(3), None), ValueError, r"got rank 1"),
    Case(
        "dtype_unsupported",
        up(size=2),
        (zeros(1, 1, 3, 3, dtype=torch.uint8), None),
        TypeError,
        r"expected input of dtype float64.* got torch\.uint8",
    ),
]

LOGITS, LABELS = zeros(2, 5, 4, 3), zeros(2, 4, 3, dtype=torch.int64)

LOSS_CASES = [
    Case(
        "target_shape",
        loss(),
        (LOGITS, zeros(2, 4, 4, dtype=torch.int64)),
        ValueError,
        r"expected target of shape \[2, 4, 3\].* but got \[2, 4, 4\] for input \[2, 5, 4, 3\]",
    ),
    Case(
        "target_rank", loss(), (LOGITS, zeros(2, 4, dtype=torch.int64)), ValueError, r"\[2, 4, 3\]"
    ),
    Case(
        "target_probabilities",
        loss(),
        (LOGITS, LOGITS),
        NotImplementedError,
        r"target of dtype int64, int32 or uint8, but got torch\.float32\. Class probabilities .* "
        r"use torch\.nn\.functional\.cross_entropy",
    ),
    Case(
        "target_dtype",
        loss(),
        (LOGITS, zeros(2, 4, 3, dtype=torch.int16)),
        TypeError,
        r"expected target of dtype int64, int32 or uint8, but got torch\.int16",
    ),
    Case(
        "weight_shape",
        loss(),
        (LOGITS, LABELS, zeros(4)),
        ValueError,
        r"expected weight of shape \[c\] = \[5\], but got shape \[4\]",
    ),
    Case(
        "weight_dtype",
        loss(),
        (LOGITS, LABELS, zeros(5, dtype=torch.float64)),
        TypeError,
        r"expected weight of the dtype of input, torch\.float32, .* dtype torch\.float64",
    ),
    Case("reduction", loss(reduction="avg"), (LOGITS, LABELS), ValueError, r'got "avg"'),
    Case("reduction_none", loss(reduction=None), (LOGITS, LABELS), TypeError, r'"none".* got None'),
    Case("ignore_float", loss(ignore_index=2.0), (LOGITS, LABELS), TypeError, r"int, but got 2\.0"),
    Case("smoothing_word", loss(label_smoothing="0"), (LOGITS, LABELS), TypeError, r"a number"),
    Case("smoothing", loss(label_smoothing=1.5), (LOGITS, LABELS), ValueError, r"\[0, 1\].* 1\.5"),
    Case("no_class", loss(), (zeros(2, 0, 4, 3), LABELS), ValueError, r"at least 1 class"),
    Case(
        "scalar_input", loss(), (zeros(), zeros(dtype=torch.int64)), ValueError, r"but got a scalar"
    ),
    Case(
        "input_dtype",
        loss(),
        (zeros(2, 5, 4, 3, dtype=torch.int64), LABELS),
        TypeError,
        r"expected input of dtype float64.* got torch\.int64",
    ),
]

SCORES, FINE_LABELS = zeros(2, 5, 4, 3), zeros(2, 8, 6, dtype=torch.int64)

UPSAMPLE_LOSS_CASES = [
    Case(
        "target_rank",
        up_loss(),
        (SCORES, zeros(2, 8, dtype=torch.int64)),
        ValueError,
        r"expected target of rank 3 \[n, h_out, w_out\], but got rank 2 with shape \[2, 8\]",
    ),
    Case(
        "target_batch",
        up_loss(),
        (SCORES, zeros(3, 8, 6, dtype=torch.int64)),
        ValueError,
        r"target of shape \[n, h_out, w_out\] = \[2, 8, 6\], but got shape \[3, 8, 6\]",
    ),
    Case(
        "target_probabilities",
        up_loss(),
        (SCORES, zeros(2, 5, 8, 6)),
        NotImplementedError,
        r"got torch\.float32\. Class probabilities .* use torch\.nn\.functional\.cross_entropy",
    ),
    Case(
        "target_dtype",
        up_loss(),
        (SCORES, zeros(2, 8, 6, dtype=torch.int16)),
        TypeError,
        r"expected target of dtype int64, int32 or uint8, but got torch\.int16",
    ),
    Case(
        "target_empty",
        up_loss(),
        (SCORES, zeros(2, 0, 6, dtype=torch.int64)),
        ValueError,
        r"output map of at least 1x1, but got 0x6 from an input map of 4x3",
    ),
    Case(
        "input_rank",
        up_loss(),
        (zeros(5, 4, 3), FINE_LABELS),
        ValueError,
        r"expected input of rank 4 \[n, c, h_in, w_in\], but got rank 3",
    ),
    Case(
        "input_dtype",
        up_loss(),
        (zeros(2, 5, 4, 3, dtype=torch.int64), FINE_LABELS),
        TypeError,
        r"expected input of dtype float64.* got torch\.int64",
    ),
    Case("map_empty", up_loss(), (zeros(2, 5, 0, 3), FINE_LABELS), ValueError, r"map .* got 0x3"),
    Case("no_class", up_loss(), (zeros(2, 0, 4, 3), FINE_LABELS), ValueError, r"at least 1 class"),
    Case(
        "weight_shape",
        up_loss(),
        (SCORES, FINE_LABELS, zeros(4)),
        ValueError,
        r"expected weight of shape \[c\] = \[5\], but got shape \[4\]",
    ),
    Case(
        "border", up_loss(border="wrap"), (SCORES, FINE_LABELS), ValueError, r'got "wrap".* repeats'
    ),
    Case(
        "origin", up_loss(origin=(1, 0)), (SCORES, FINE_LABELS), ValueError, r"got \(1, 0\)\. Pass"
    ),
    Case(
        "scale_zero", up_loss(scale_factor=0), (SCORES, FINE_LABELS), ValueError, r"greater than 0"
    ),
    Case(
        "scale_word", up_loss(scale_factor="2"), (SCORES, FINE_LABELS), TypeError, r"scale_factor"
    ),
    Case("reduction", up_loss(reduction="avg"), (SCORES, FINE_LABELS), ValueError, r'got "avg"'),
    Case(
        "smoothing",
        up_loss(label_smoothing=-0.5),
        (SCORES, FINE_LABELS),
        ValueError,
        r"\[0, 1\].* -0\.5",
    ),
]

UPSAMPLE_ARGMAX_CASES = [
    Case(
        "no_size",
        up_argmax(),
        (SCORES,),
        ValueError,
        r"scale_factor or size to be given, but got neither.* size=image\.shape\[-2:\]",
    ),
    Case("input_rank", up_argmax(size=4), (zeros(5, 4, 3),), ValueError, r"input of rank 4"),
    Case(
        "input_dtype",
        up_argmax(size=4),
        (zeros(2, 5, 4, 3, dtype=torch.int64),),
        TypeError,
        r"expected input of dtype float64.* got torch\.int64",
    ),
    Case("no_class", up_argmax(size=4), (zeros(2, 0, 4, 3),), ValueError, r"at least 1 class"),
    Case("map_empty", up_argmax(size=4), (zeros(2, 5, 0, 3),), ValueError, r"input map .* got 0x3"),
    Case("size_zero", up_argmax(size=0), (SCORES,), ValueError, r"output map of .* 0x0 .* 4x3"),
    Case(
        "dtype",
        up_argmax(size=4, dtype=torch.int16),
        (SCORES,),
        TypeError,
        r"expected dtype int64, int32 or uint8, but got torch\.int16",
    ),
    Case("dtype_word", up_argmax(size=4, dtype="uint8"), (SCORES,), TypeError, r"a torch\.dtype"),
    Case(
        "dtype_too_small",
        up_argmax(size=4, dtype=torch.uint8),
        (zeros(1, 257, 2, 2),),
        ValueError,
        r"expected at most 256 classes for dtype uint8, but got 257\. Pass dtype=torch\.int64",
    ),
    Case("confidence", up_argmax(size=4, confidence=1), (SCORES,), TypeError, r"True or False"),
    Case("border", up_argmax(size=4, border="wrap"), (SCORES,), ValueError, r'got "wrap"'),
    Case("origin", up_argmax(size=4, origin=(0, 2)), (SCORES,), ValueError, r"got \(0, 2\)"),
]

CASES = [
    pytest.param(op, case, id=f"{op}-{case.name}")
    for op, cases in (
        ("dilated_conv2d", CONV_CASES),
        ("upsample_add", UPSAMPLE_CASES),
        ("cross_entropy", LOSS_CASES),
        ("upsample_cross_entropy", UPSAMPLE_LOSS_CASES),
        ("upsample_argmax", UPSAMPLE_ARGMAX_CASES),
    )
    for case in cases
]


def text_of(case, device, mode):
    with mode, pytest.raises(case.error) as info:
        case.call(*(t if t is None else t(device) for t in case.tensors))
    assert type(info.value) is case.error
    return str(info.value)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_text(op, case, device):
    text = text_of(case, device, nullcontext())
    assert text.startswith(f"dilseg::{op}: expected "), text
    assert re.search(case.pattern, text), text
    assert text.endswith("."), text


@pytest.mark.parametrize(("op", "case"), CASES)
def test_text_is_the_same_for_meta_and_fake_tensors(op, case):
    text = text_of(case, "cpu", nullcontext())
    assert text_of(case, "meta", nullcontext()) == text
    assert text_of(case, "cpu", FakeTensorMode()) == text
    assert text_of(case, "cuda", FakeTensorMode()) == text


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("weight", lambda a, b: dilated_conv2d(a(2, 6, 9, 8), b(4, 6, 3, 3))),
        ("bias", lambda a, b: dilated_conv2d(a(2, 6, 9, 8), a(4, 6, 3, 3), b(4))),
        ("skip", lambda a, b: upsample_add(a(1, 1, 2, 2), b(1, 1, 4, 4), scale_factor=2)),
        ("target", lambda a, b: cross_entropy(a(1, 2, 3), b(1, 3).long())),
        ("weight", lambda a, b: cross_entropy(a(1, 2, 3), a(1, 3).long(), b(2))),
        ("target", lambda a, b: upsample_cross_entropy(a(1, 2, 3, 3), b(1, 6, 6).long())),
        ("weight", lambda a, b: upsample_cross_entropy(a(1, 2, 3, 3), a(1, 6, 6).long(), b(2))),
    ],
)
def test_devices_mixed(name, call, mode):
    with (
        mode(),
        pytest.raises(
            RuntimeError,
            match=rf"^dilseg::\w+: expected {name} on the device of input, cpu, but got {name} on "
            rf"meta\. Move it with {name}\.to\(input\.device\)\.$",
        ),
    ):
        call(torch.zeros, lambda *shape: torch.zeros(*shape, device="meta"))


def test_devices_mixed_has_the_binarys_text():
    """functional's check repeats the binary's; whoever calls torch.ops meets the latter."""
    x, w = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 1, 1, device="meta")
    with pytest.raises(RuntimeError) as from_python:
        dilated_conv2d(x, w)
    with pytest.raises(RuntimeError) as from_binary:
        torch.ops.dilseg.dilated_conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 1, None)
    assert str(from_binary.value) == str(from_python.value)


@pytest.mark.parametrize("label", [5, 255, -1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_label_out_of_range_on_the_cpu(label, dtype):
    if dtype == torch.uint8 and label < 0:
        pytest.skip("uint8 has no negative labels")
    target = torch.zeros(2, 4, 3, dtype=dtype)
    target[1, 2, 0] = label
    with pytest.raises(
        ValueError,
        match=rf"^dilseg::cross_entropy: expected target labels in \[0, 5\) for 5 classes, or "
        rf"ignore_index=-100, but got label {label} at pixel n=1, h=2, w=0; did you forget "
        r"ignore_index=255\?$",
    ):
        cross_entropy(torch.zeros(2, 5, 4, 3), target)
    with pytest.raises(
        ValueError,
        match=rf"^dilseg::upsample_cross_entropy: expected target labels in \[0, 5\) for 5 "
        rf"classes, or ignore_index=-100, but got label {label} at pixel n=1, h=2, w=0; ",
    ):
        upsample_cross_entropy(torch.zeros(2, 5, 1, 2), target)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input", lambda x, dual: dilated_conv2d(dual, x)),
        ("weight", lambda x, dual: dilated_conv2d(x, dual)),
        ("input", lambda x, dual: upsample_add(dual, None, scale_factor=2)),
        ("skip", lambda x, dual: upsample_add(x, dual, scale_factor=1)),
        ("input", lambda x, dual: cross_entropy(dual, torch.zeros_like(x[:, 0]).long())),
        ("input", lambda x, dual: upsample_cross_entropy(dual, torch.zeros_like(x[:, 0]).long())),
    ],
)
def test_forward_mode_is_refused(name, call, device):
    """torch would drop the tangent in silence."""
    x = torch.ones(2, 2, 3, 3, device=device)
    pattern = rf"^dilseg::\w+: expected {name} without a forward-mode tangent, .* reverse mode"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=pattern):
        call(x, forward_ad.make_dual(x, x))
    with pytest.raises(NotImplementedError, match=pattern):
        torch.func.jvp(lambda dual: call(x, dual), (x,), (x,))


def test_class_weights_carry_no_gradient(device):
    weight = torch.ones(5, device=device, requires_grad=True)
    with pytest.raises(
        NotImplementedError, match=r"^dilseg::cross_entropy: .* pass weight\.detach\(\)\.$"
    ):
        cross_entropy(LOGITS(device).requires_grad_(), LABELS(device), weight)
    with pytest.raises(
        NotImplementedError, match=r"^dilseg::upsample_cross_entropy: .* pass weight\.detach\(\)\.$"
    ):
        upsample_cross_entropy(SCORES(device).requires_grad_(), FINE_LABELS(device), weight)


@pytest.mark.parametrize(
    ("op", "args", "pattern"),
    [
        (
            "dilated_conv2d_grad_input",
            (zeros(1, 2, 3, 3), zeros(2, 1, 3, 3), [4, 5], [1, 1], [0] * 4, [1, 1], 1),
            r"expected grad_output of shape \[n, c_out, h_out, w_out\] = \[1, 2, 2, 3\], but got "
            r"\[1, 2, 3, 3\]",
        ),
        (
            "dilated_conv2d_grad_weight",
            (zeros(1, 2, 3, 3), zeros(1, 1, 5, 5), [2, 3], [1, 1], [0] * 4, [1, 1], 1, False),
            r"expected grad_output of shape .* = \[1, 2, 4, 3\], but got \[1, 2, 3, 3\]",
        ),
        (
            "upsample_add_backward",
            (zeros(1, 2, 4, 4), [0, 2], [2.0, 2.0], False, "clamp", [0, 0]),
            r"expected an input map of at least 1x1, but got 0x2",
        ),
    ],
)
def test_text_of_gradient_operators(op, args, pattern, device):
    for where, mode in (
        (device, nullcontext()),
        ("meta", nullcontext()),
        ("cpu", FakeTensorMode()),
    ):
        with mode, pytest.raises(ValueError, match=rf"^dilseg::{op}: {pattern}"):
            getattr(torch.ops.dilseg, op)(*(a(where) if callable(a) else a for a in args))
