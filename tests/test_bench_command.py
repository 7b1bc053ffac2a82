# SPDX-License-Identifier: Apache-2.0
"""`dilseg bench`: somebody's own model before and after the swap, and layers against torch's."""

import json

import pytest
import torch
from helpers.backends import why_no_cuda

import dilseg
from dilseg import cli
from dilseg.engine import bench_layers

MODEL = '''
import torch
from helpers.backends import why_no_cuda
from torch import nn

class Net(nn.Module):
    """Dropout, statistics of the batch, a nested result, a layer that is never called."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.deep = nn.Conv2d(8, 8, 3, padding=4, dilation=4, groups=8)
        self.spare = nn.Conv2d(8, 8, 3, dilation=2)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x, scale=None):
        x = self.norm(self.wide(self.first(x).relu_()).relu_())
        x = self.last(self.drop(self.deep(x)))
        return {"out": x if scale is None else x * scale, "extra": [x.argmax(1), (x.mean(),)]}

def make():
    return Net()

def plain():
    return nn.Conv2d(3, 4, 3)

def number():
    return 3

def labels():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()
        def forward(self, x):
            return self.net(x)["out"].argmax(1)
    return Labels()

def wants(argument):
    return Net()

def broken():
    raise KeyError("weights")

class Keyword(nn.Module):
    """Names its layer's argument, and is bound to float32."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 3, padding=2, dilation=2)

    def forward(self, x):
        return self.wide(input=x.float())
'''
SHORT = ("--seconds", "0.02", "--device", "cpu")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "their_model.py"
    path.write_text(MODEL)
    return path


def bench(capsys, *arguments):
    code = cli.main(["bench", *map(str, arguments), *SHORT])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("step", [False, True])
def test_every_swapped_layer_is_compared_and_timed(file, tmp_path, capsys, step):
    out = tmp_path / "figures.json"
    code, printed, _ = bench(
        capsys, "--model", f"{file}:make", "--input", "2,3,17,19", "--json", out,
        *(["--step"] if step else []),
    )  # fmt: skip
    assert code == 0
    assert "DIFFERENT" not in printed
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert "8 -> 8, 3x3, padding 2, dilation 2" in rows["wide"]
    assert "groups 8" in rows["deep"]
    assert "never called" in rows["spare"]
    assert "first" not in rows  # not dilated
    figures = json.loads(out.read_text())
    assert list(figures["layers"]) == ["wide", "deep"]
    assert figures["mode"] == ("step" if step else "forward")
    for pair in (figures["seconds"], *figures["layers"].values()):
        assert pair["ratio"] == pytest.approx(pair["before"] / pair["after"])
        word = "gain" if pair["ratio"] > 1.03 else "loss" if pair["ratio"] < 1 / 1.03 else "tie"
        assert pair["verdict"] == word
    assert 0 < figures["error"] <= figures["allowed_error"]


def test_half_types_channels_last_and_all_layers(file, capsys):
    code, printed, _ = bench(
        capsys, "--model", f"{file}:make", "--input", "1,3,9,9", "--input", "1,1,1,1",
        "--dtype", "bfloat16", "--channels-last", "--min-dilation", "1",
    )  # fmt: skip
    assert code == 0
    assert {"first", "wide", "deep", "spare", "last"} <= {
        line.split()[0] for line in printed.splitlines() if line
    }


def test_another_result_is_reported_by_the_exit_code(file, capsys, monkeypatch):
    right = dilseg.DilatedConv2d.forward
    monkeypatch.setattr(dilseg.DilatedConv2d, "forward", lambda s, x: right(s, x) + 1e-3)
    code, printed, _ = bench(capsys, "--model", f"{file}:make", "--input", "1,3,9,9")
    assert code == 1
    assert printed.startswith("DIFFERENT results: off by 0.00")


def test_a_model_without_a_finer_dtype_is_compared_with_itself(file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    arguments = ("--model", f"{file}:Keyword", "--input", "1,3,9,9", "--json", out)
    code, printed, _ = bench(capsys, *arguments)
    assert code == 0
    assert "from the original at most" in printed
    assert "4 roundings for each of 1 convolutions" in printed
    assert json.loads(out.read_text())["peak_bytes"] is None  # not counted on a CPU
    right = dilseg.DilatedConv2d.forward
    monkeypatch.setattr(dilseg.DilatedConv2d, "forward", lambda s, input: right(s, input) + 1e-4)
    assert bench(capsys, *arguments)[0] == 1


@pytest.mark.cuda
@pytest.mark.skipif(why_no_cuda() is not None, reason=str(why_no_cuda()))
def test_peak_memory_is_told_on_a_gpu(file, tmp_path, capsys):
    out = tmp_path / "figures.json"
    arguments = ["--model", f"{file}:make", "--input", "1,3,33,33", "--json", str(out)]
    assert cli.main(["bench", *arguments, "--seconds", "0.02", "--device", "cuda"]) == 0
    assert "peak memory beyond weights and inputs" in capsys.readouterr().out
    assert min(json.loads(out.read_text())["peak_bytes"].values()) > 0


def test_a_result_that_is_not_finite_differs(file, capsys, monkeypatch):
    right = dilseg.DilatedConv2d.forward
    monkeypatch.setattr(dilseg.DilatedConv2d, "forward", lambda s, x: right(s, x) * float("nan"))
    assert bench(capsys, "--model", f"{file}:make", "--input", "1,3,9,9")[0] == 1


def test_an_importable_module_and_nothing_to_swap(file, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    code, printed, _ = bench(capsys, "--model", "their_model:plain", "--input", "1,3,9,9")
    assert code == 0
    assert "dilation 1 is below min_dilation 2" in printed
    assert "nothing to swap" in printed


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        ("{}", ("--input", "1,3,9,9"), "expected module:factory"),
        ("{}:missing", ("--input", "1,3,9,9"), "has no function or class 'missing'; it has"),
        ("{}:wants", ("--input", "1,3,9,9"), "without arguments"),
        ("{}:broken", ("--input", "1,3,9,9"), "broken failed: KeyError: 'weights'"),
        ("{}:number", ("--input", "1,3,9,9"), "torch.nn.Module, but got int"),
        ("{}:labels", ("--input", "1,3,9,9"), "returns floating-point tensors"),
        ("{}x.py:make", ("--input", "1,3,9,9"), "could not be imported: FileNotFoundError"),
        ("no_such_module:make", ("--input", "1,3,9,9"), "could not be imported: ModuleNotFound"),
        ("{}:make", (), "needs --input"),
        ("{}:make", ("--input", "1,3,0,9"), "expected sizes such as 1,3,512,512"),
        ("{}:make", ("--input", "1,5,9,9"), "could not be run on 1,5,9,9"),
        ("{}:make", ("--input", "1,3,9,9", "--dtype", "int8"), "--dtype: expected one of float32"),
        ("{}:make", ("--input", "1,3,9,9", "-k", "conv"), "goes without -k"),
        ("{}:make", ("--input", "1,3,9,9", "--min-dilation", "0"), "at least 1"),
    ],
)
def test_bad_usage_is_one_sentence(file, capsys, model, arguments, words):
    code, printed, error = bench(capsys, "--model", model.format(file), *arguments)
    assert (code, printed) == (2, "")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_without_a_model_layers_are_compared_with_torchs(
    tmp_path, capsys, monkeypatch, name, channels
):
    monkeypatch.setattr(bench_layers, "SIZE", 6)
    out = tmp_path / "figures.json"
    options = ["--channels-last"] if channels else []
    code, printed, _ = bench(capsys, "--dtype", name, "--json", out, *options)
    assert code == 0, printed
    words = " ".join(printed.split())
    figures = json.loads(out.read_text())
    modes = [(row["layer"], row["mode"]) for row in figures["layers"]]
    assert len(modes) == len(set(modes)) == 11
    assert (figures["dtype"], figures["channels_last"]) == (name, channels)
    for row in figures["layers"]:
        assert row["error"] <= row["allowed_error"]
        assert f"{row['seconds']['ratio']:.2f}x {row['seconds']['verdict']}" in words


def test_a_wrong_layer_is_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_layers, "SIZE", 6)
    right = dilseg.functional.upsample_argmax
    monkeypatch.setattr(
        dilseg.functional, "upsample_argmax", lambda x, **options: (right(x, **options) + 1) % 21
    )
    out = tmp_path / "figures.json"
    code, printed, _ = bench(capsys, "--json", out)
    assert code == 1
    assert printed.count("DIFFERENT: off by") == 1
    wrong = [row["layer"] for row in json.loads(out.read_text())["layers"] if not row["seconds"]]
    assert wrong == ["upsample x8 and argmax"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--step",), "goes with --model"),
        (("--dtype", "int8"), "expected one of float32"),
        (("--seconds", "0"), "expected a positive number"),
    ],
)
def test_bad_usage_without_a_model_is_one_sentence(capsys, arguments, words):
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_input_alone_is_refused(capsys):
    code, _, error = bench(capsys, "--input", "1,3,9,9")
    assert code == 2
    assert "goes with --model" in error


def test_torchvisions_deeplab(tmp_path, capsys):
    pytest.importorskip("torchvision", reason="needs torchvision")
    path = tmp_path / "deeplab.py"
    path.write_text(
        "from torchvision.models.segmentation import deeplabv3_resnet50\n"
        "def make():\n"
        "    return deeplabv3_resnet50(weights=None, weights_backbone=None)\n"
    )
    code, printed, _ = bench(capsys, "--model", f"{path}:make", "--input", "1,3,65,65")
    assert code == 0
    assert "classifier.0.convs.1.0" in printed


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
