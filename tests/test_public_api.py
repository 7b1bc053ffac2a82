# SPDX-License-Identifier: Apache-2.0
import inspect
import re
import subprocess
import sys

import helpers.samples
import pytest
import torch
from torch.nn import functional as F

import dilseg
import dilseg.functional
import dilseg.nn
import dilseg.swap


@pytest.mark.parametrize("module", [dilseg, dilseg.functional, dilseg.nn, dilseg.swap])
def test_all_is_sorted_and_complete(module):
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", dilseg.__version__)
    assert dilseg.build_info()["version"] == dilseg.__version__


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'dilseg' has no attribute 'conv'"):
        _ = dilseg.conv


def test_import_stays_light():
    """Networks, datasets and what draws and reads images come only when they are asked for."""
    code = (
        "import sys, torch; before = set(sys.modules); import dilseg; "
        "print(sorted(set(sys.modules) - before))"
    )
    new = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    for heavy in ("matplotlib", "scipy", "PIL", "h5py", "dilseg.data", "dilseg.models"):
        assert f"'{heavy}" not in new


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (dilseg.functional.dilated_conv2d, ["input", "weight", "bias", "stride", "padding"]),
        (dilseg.functional.cross_entropy, ["input", "target", "weight"]),
        (dilseg.functional.upsample_cross_entropy, ["input", "target", "weight"]),
    ],
)
def test_arguments_are_in_torchs_order(ours, torchs):
    parameters = inspect.signature(ours).parameters
    assert list(parameters)[: len(torchs)] == torchs
    if ours.__name__ == "cross_entropy":
        assert set(torchs) <= set(inspect.signature(F.cross_entropy).parameters)


# They compute no tensor.
QUESTIONS_AND_SETTINGS = {
    "_get_float32_conv_precision",
    "_prefer_dilated_conv2d_kernel",
    "_set_float32_conv_precision",
    "dilated_conv2d_plan",
}


def registered_operators():
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.removeprefix("dilseg::") for n in names if n.startswith("dilseg::")}
    return sorted(ours - QUESTIONS_AND_SETTINGS)


# Each operator and the samples its opcheck runs on.
SAMPLES = {
    "cross_entropy": helpers.samples.LOSS_CASES,
    "cross_entropy_backward": helpers.samples.LOSS_CASES,
    "dilated_conv2d": helpers.samples.CONV_CASES,
    "dilated_conv2d_grad_input": helpers.samples.CONV_CASES,
    "dilated_conv2d_grad_weight": helpers.samples.CONV_CASES,
    "upsample_add": helpers.samples.UPSAMPLE_CASES,
    "upsample_add_backward": helpers.samples.UPSAMPLE_CASES,
    "upsample_argmax": helpers.samples.UPSAMPLE_LOSS_CASES,
    "upsample_cross_entropy": helpers.samples.UPSAMPLE_LOSS_CASES,
    "upsample_cross_entropy_backward": helpers.samples.UPSAMPLE_LOSS_CASES,
}


def test_every_operator_has_samples():
    assert registered_operators() == sorted(SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_operator_has_every_kernel(name):
    for key in ("CPU", "CUDA", "Meta", "Autograd", "FuncTorchBatched"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dilseg::{name}", key), key
    assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.dilseg, name).default.tags


@pytest.mark.skipif(dilseg.build_info()["kind"] == "cuda", reason="a CUDA build has kernels")
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_cpu_only_build_says_so(name):
    """What CUDA tensors reach; here by asking for the dispatch key itself."""
    schema = getattr(torch.ops.dilseg, name).default._schema
    blank = {
        "Tensor": torch.zeros(1),
        "Optional[Tensor]": None,
        "Optional[str]": None,
        "Optional[List[float]]": None,
        "List[int]": [1, 1, 1, 1],
        "str": "none",
        "int": 1,
        "float": 0.0,
        "bool": False,
    }
    args = [blank[str(a.type)] for a in schema.arguments]
    args = [
        v[: a.N] if isinstance(v, list) and a.N else v
        for v, a in zip(args, schema.arguments, strict=True)
    ]
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        RuntimeError, match=rf"dilseg::{name}: .*CPU-only build .*DILSEG_BUILD=cuda pip install \."
    ):
        getattr(torch.ops.dilseg, name).default.redispatch(key, *args)
