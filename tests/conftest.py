# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from helpers import emulation
from helpers.backends import BACKENDS, Backend
from helpers.layouts import channels_last

# Tests are many and small: more threads cost more than they bring, and CI has two cores.
torch.set_num_threads(min(2, torch.get_num_threads()))
# The rival whose error bounds ours shall compute in float32 where it says so.
torch.backends.cudnn.allow_tf32 = False


def _backend_params():
    for backend in BACKENDS:
        marks = [pytest.mark.cuda] if backend.device == "cuda" else []
        yield pytest.param(backend, id=backend.name, marks=marks)


@pytest.fixture(params=_backend_params())
def backend(request) -> Iterator[Backend]:
    """An implementation of the operators; skips, saying why, where it cannot run."""
    reason = request.param.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with request.param.active():
        yield request.param


#: Where the kernels themselves are tested; other tests see no difference between CPU and emulator.
EMULATED_MODULES = (
    "test_cross_entropy",
    "test_dilated_conv2d",
    "test_dilated_conv2d_depthwise",
    "test_dilated_conv2d_kernels",
    "test_dilated_conv2d_patch",
    "test_upsample_add",
    "test_upsample_argmax",
    "test_upsample_cross_entropy",
)
#: Where a family of CUDA kernels is tested, whatever the plan would choose.
FAMILIES = ("test_dilated_conv2d_kernels", "test_dilated_conv2d_patch")
#: What says nothing about kernels (registration; double backward, which composes the three
#: convolutions that other tests compare), or what every emulated call does (repetition).
NOT_EMULATED = (
    "::test_opcheck",
    "::test_twenty_runs_give_the_same_bits",
    "test_dilated_conv2d.py::test_gradients_of_first_and_second_order",
    "test_dilated_conv2d.py::test_same_padding_is_differentiable_when_uneven",
)


#: In channels_last float16 takes the paths of bfloat16, and float64 those that it takes elsewhere.
CHANNELS_LAST_DTYPES = (torch.float32, torch.bfloat16)


def pytest_collection_modifyitems(items):
    def belongs(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend = params.get("backend")
        if backend is None or backend.name != "emulated":
            # The CPU has one implementation, whatever is preferred.
            return backend is None or backend.name != "cpu" or item.module.__name__ not in FAMILIES
        if item.module.__name__ not in EMULATED_MODULES:
            return False
        if any(part in item.nodeid for part in NOT_EMULATED):
            return False
        dtype = params.get("dtype", torch.float32)
        if dtype is torch.float16 and item.module.__name__ == "test_dilated_conv2d":
            return False  # the paths of bfloat16; the families of kernels have float16 in theirs
        return params.get("layout") is not channels_last or dtype in CHANNELS_LAST_DTYPES

    items[:] = filter(belongs, items)


@pytest.fixture
def device(backend) -> str:
    return backend.device


def _preferring(operators) -> Iterator[Callable[[str], None]]:
    yield operators._prefer_dilated_conv2d_kernel
    operators._prefer_dilated_conv2d_kernel("")


@pytest.fixture
def prefer(backend) -> Iterator[Callable[[str], None]]:
    """Lets the named family of kernels run every convolution that it can. No effect on the CPU."""
    emulated = backend.name == "emulated"
    yield from _preferring(torch.ops.dilseg_emulated if emulated else torch.ops.dilseg)


@pytest.fixture
def emulated_kernel() -> Iterator[Callable[[str], None]]:
    """As ``prefer``, where a test runs in the emulator only."""
    emulation.library()
    yield from _preferring(torch.ops.dilseg_emulated)


@pytest.fixture
def one_schedule(monkeypatch):
    """For what asks about numbers: that schedules agree is asked of the same kernels elsewhere."""
    monkeypatch.setattr(emulation, "SEEDS", emulation.SEEDS[:1])


@pytest.fixture
def counted() -> Iterator[Callable[[], AbstractContextManager[emulation.Traffic]]]:
    """Runs the operators in the emulator and counts the bytes of memory that kernels ask for."""
    if (reason := emulation.why_no_emulator()) is not None:
        pytest.skip(reason)
    if emulation.VARIANT != "checked":
        pytest.skip(f"bytes are counted by the variant checked, not by {emulation.VARIANT}")
    with emulation.active():
        yield emulation.traffic


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data, camvid/ and weights/; skips, saying why, where there is none."""
    named = os.environ.get("DILSEG_DATA")
    root = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(
            f"no real data: DILSEG_DATA={named} is no folder"
            if named
            else "no real data: DILSEG_DATA is not set and ../shared/data does not exist"
        )
    return root
