# SPDX-License-Identifier: Apache-2.0
"""Loading ImageNet weights and earlier stages: every value lands, every mistake is named."""

import pytest
import torch
from torch import nn

from dilseg import models

# VGG-16's sixteen layers with few channels; torchvision's file layout follows from the stages.
TINY = models.Backbone(
    name="vgg16",
    stages=((3, 2), (3, 4), (4, 3, 5), (5, 6, 4), (3, 4, 5)),
    fc_kernel=7,
    fc_channels=6,
    fcn_image_padding=100,
    fcn_fc_padding=0,
)
TORCHVISION = {
    "conv1_1": "features.0",
    "conv1_2": "features.2",
    "conv2_1": "features.5",
    "conv2_2": "features.7",
    "conv3_1": "features.10",
    "conv3_2": "features.12",
    "conv3_3": "features.14",
    "conv4_1": "features.17",
    "conv4_2": "features.19",
    "conv4_3": "features.21",
    "conv5_1": "features.24",
    "conv5_2": "features.26",
    "conv5_3": "features.28",
    "fc6": "classifier.0",
    "fc7": "classifier.3",
}
CONVS = [name for name in TORCHVISION if name.startswith("conv")]


def torchvision_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A state dict in torchvision's layout with random values, classifier included."""
    shapes = {n: p.shape for n, p in models.fcn32s(2, TINY).named_parameters()}
    state = {}
    for name, key in TORCHVISION.items():
        state[f"{key}.weight"] = torch.randn(shapes[f"{name}.weight"], dtype=dtype)
        state[f"{key}.bias"] = torch.randn(shapes[f"{name}.bias"], dtype=dtype)
    for key in ("classifier.0.weight", "classifier.3.weight"):
        state[key] = state[key].flatten(1)
    state["classifier.6.weight"] = torch.randn(1000, 6, dtype=dtype)
    state["classifier.6.bias"] = torch.randn(1000, dtype=dtype)
    return state


def features_only(state):
    return {key: value for key, value in state.items() if key.startswith("features.")}


def assert_holds(model, state, names):
    own = dict(model.named_parameters())
    for name in names:
        for part in ("weight", "bias"):
            expected = state[f"{TORCHVISION[name]}.{part}"].float()
            assert torch.equal(own[f"{name}.{part}"], expected.view_as(own[f"{name}.{part}"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [models.fcn32s, models.fcn8s, models.DilatedFrontEnd])
def test_whole_classifier(build, dtype):
    state = torchvision_state(dtype)
    model = build(3, TINY)
    report = models.load_backbone(model, state)
    assert_holds(model, state, TORCHVISION)
    assert report.loaded == tuple(TORCHVISION)
    assert not report.fresh
    assert report.unused == {"classifier.6": "classifies into other classes"}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_convolutions_only_leaves_the_rest_fresh():
    state = features_only(torchvision_state())
    model = models.fcn8s(3, TINY)
    before = {n: p.clone() for n, p in model.named_parameters()}
    report = models.load_backbone(model, state)
    assert_holds(model, state, CONVS)
    assert torch.equal(model.fc6.weight, before["fc6.weight"])
    assert list(report.fresh) == ["fc6", "fc7"]
    assert "Left fresh: fc6, fc7 (no classifier weights in the source)" in str(report)


def test_fully_connected_weights_compute_the_same():
    state = torchvision_state()
    model = models.fcn32s(3, TINY)
    models.load_backbone(model, state)
    features = torch.randn(4, 5, 7, 7)
    hidden = features.flatten(1) @ state["classifier.0.weight"].T + state["classifier.0.bias"]
    torch.testing.assert_close(model.fc6(features).flatten(1), hidden.relu())


def test_narrow_head_keeps_its_own_fully_connected_layers():
    model = models.fcn8s(3, TINY, fc_channels=4)
    report = models.load_backbone(model, torchvision_state())
    assert report.loaded == tuple(CONVS)
    assert report.fresh["fc6"] == "the source has 6 channels there, the model 4"


def test_classifier_without_values_is_not_loaded():
    state = torchvision_state()
    state["classifier.0.weight"].fill_(float("nan"))
    model = models.fcn8s(3, TINY)
    report = models.load_backbone(model, state)
    assert report.fresh["fc7"] == "no valid classifier weights in the source"
    assert model.normalization == report.normalization == models.IMAGENET_FEATURES
    models.load_backbone(model, state, normalization=models.IMAGENET)
    assert model.normalization == models.IMAGENET


def test_into_a_dilatednet():
    net = models.dilatednet(3, TINY)
    state = torchvision_state()
    convention = models.Normalization.from_bgr_255((103.939, 116.779, 123.68))
    models.load_backbone(net, state, normalization=convention)
    assert_holds(net.front_end, state, TORCHVISION)
    assert net.normalization == net.front_end.normalization == convention


def test_published_names():
    trained = models.fcn8s(9, TINY)
    model = models.fcn16s(3, TINY)
    report = models.load_backbone(model, trained.state_dict())
    assert torch.equal(model.fc6.weight, trained.fc6.weight)
    assert report.loaded == tuple(TORCHVISION)
    assert list(report.unused) == ["score_fr", "score_pool4", "score_pool3"]
    assert not model.score_fr.weight.any()


def test_bgr_weights_take_rgb_images():
    state = torchvision_state()
    model = models.DilatedFrontEnd(2, TINY)
    models.load_backbone(model, state, bgr=True)
    rgb = torch.randn(1, 3, 5, 5)
    expected = nn.functional.conv2d(
        rgb.flip(1), state["features.0.weight"], state["features.0.bias"]
    ).relu()
    torch.testing.assert_close(model.conv1_1(rgb), expected)


def test_caffe_convention():
    convention = models.Normalization.from_bgr_255((51.0, 102.0, 153.0))
    assert convention.mean == pytest.approx((0.6, 0.4, 0.2))
    assert convention.std == pytest.approx((1 / 255,) * 3)
    assert models.fcn8s(2, "demo").normalization == models.IMAGENET


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_files(tmp_path, wrapper, prefix):
    state = {prefix + key: value for key, value in torchvision_state().items()}
    content = state if wrapper is None else {"epoch": 3, wrapper: state}
    path = tmp_path / "vgg.pth"
    torch.save(content, path)
    report = models.load_backbone(models.fcn32s(2, TINY), path)
    assert report.loaded == tuple(TORCHVISION)
    assert str(report).startswith(f"Loaded from {path}: conv1_1, conv1_2")


def change(state, key, value):
    state = dict(state)
    if value is None:
        del state[key]
    else:
        state[key] = value
    return state


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "features.14.bias",
            None,
            r"expected 'features.14.bias' of shape \(5,\) \(conv3_3 of vgg16\), but there is no",
        ),
        (
            "features.7.weight",
            torch.zeros(4, 3, 5, 5),
            r"'features.7.weight' of shape \(4, 3, 3, 3\) .* but got the shape \(4, 3, 5, 5\)",
        ),
        (
            "classifier.3.bias",
            None,
            r"expected 'classifier.3.bias' of shape \(6,\) \(fc7 of vgg16\), but there is no",
        ),
        (
            "classifier.0.weight",
            torch.zeros(6, 36),
            r"'classifier.0.weight' of shape \(6, 5, 7, 7\) .* but got the shape \(6, 36\)",
        ),
        ("features.30.weight", torch.zeros(1), "plain vgg16, but found the key 'features.30.wei"),
        (
            "features.1.running_mean",
            torch.zeros(3),
            "found the key 'features.1.running_mean'. That is a network with batch normalisation",
        ),
        ("features.0.bias", torch.full((3,), float("inf")), "finite values in 'features.0.bias'"),
    ],
)
def test_wrong_weights_are_named_and_change_nothing(key, value, message):
    model = models.fcn8s(2, TINY)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        models.load_backbone(model, change(torchvision_state(), key, value))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_other_backbone_is_named():
    with pytest.raises(ValueError, match="The model has the backbone 'demo'; build it with 'vgg"):
        models.load_backbone(models.fcn8s(2, "demo"), torchvision_state())


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="FCN, a DilatedFrontEnd or a DilatedNet, but got Linear"):
        models.load_backbone(nn.Linear(1, 1), {})


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 cut short"])
def test_unreadable_files_are_named(tmp_path, content):
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.pth: expected a state dict saved by torch.save"):
        models.load_backbone(models.fcn8s(2, "demo"), path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth: expected a weights file"):
        models.read_state_dict(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected a state dict, but got a list"),
        ({"lr": 0.1}, "the entry 'lr' is a float"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        models.read_state_dict(tmp_path / "other.pth")


def trained(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_fcn_stages(learned):
    coarse = trained(models.fcn32s(3, TINY, learned_upsampling=learned))
    middle = models.fcn16s(3, TINY, learned_upsampling=learned)
    report = models.load_stage(middle, coarse.state_dict())
    assert torch.equal(middle.score_fr.weight, coarse.score_fr.weight)
    assert not middle.score_pool4.weight.any()
    assert set(report.fresh) == {"score_pool4"} | ({"upscore2", "upscore16"} if learned else set())
    assert set(report.unused) == ({"upscore"} if learned else set())

    trained(middle)
    fine = models.fcn8s(3, TINY, learned_upsampling=learned)
    report = models.load_stage(fine, middle.state_dict())
    assert torch.equal(fine.score_pool4.bias, middle.score_pool4.bias)
    assert not fine.score_pool3.weight.any()
    assert "score_pool3" in report.fresh
    if learned:
        assert torch.equal(fine.upscore2.weight, middle.upscore2.weight)


def test_dilatednet_stages(tmp_path):
    front_end = trained(models.DilatedFrontEnd(3, "demo")).eval()
    net = models.dilatednet(3, "demo", sigma=0.0).eval()
    report = models.load_stage(net, front_end.state_dict())
    assert all(name.startswith("context.") for name in report.fresh)
    images = torch.randn(1, 3, 20, 30)
    # The identity passes on what the ReLU lets through.
    torch.testing.assert_close(net.cells(images), front_end.cells(images).relu())

    alone = trained(models.dilatednet(3, "demo", context=None))
    torch.save({"model": alone.state_dict(), "step": 7}, tmp_path / "checkpoint.pt")
    models.load_stage(net, tmp_path / "checkpoint.pt")
    assert torch.equal(net.front_end.final.weight, alone.front_end.final.weight)


def test_same_form_is_copied_whole():
    source = trained(models.fcn8s(3, "demo"))
    model = models.fcn8s(3, "demo")
    report = models.load_stage(model, source.state_dict())
    assert not report.fresh
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_stage_mistakes_are_named_and_change_nothing():
    model = models.fcn16s(3, "demo")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"'score_fr.weight' of shape \(3, 128, 1, 1\), but got"):
        models.load_stage(model, models.fcn32s(4, "demo").state_dict())
    with pytest.raises(ValueError, match=r"the unexpected key 'score_pool3.weight'. Load an"):
        models.load_stage(model, models.fcn8s(3, "demo").state_dict())
    with pytest.raises(ValueError, match=r"the key 'fc6.bias' of shape \(128,\), but there is"):
        models.load_stage(model, change(models.fcn32s(3, "demo").state_dict(), "fc6.bias", None))
    learned = trained(models.fcn16s(3, "demo", learned_upsampling=True))
    with pytest.raises(ValueError, match=r"upscore2.weight: expected the fixed bilinear kernel"):
        models.load_stage(model, learned.state_dict())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_unreadable_files_bring_no_advice_to_run_their_code(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"weights\.pth: .* no PyTorch file, or holds objects"):
        models.read_state_dict(path)
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match=r"no PyTorch file.*not the model\.$") as caught:
        models.read_state_dict(path)
    assert "weights_only" not in str(caught.value)


@pytest.mark.data
def test_real_vgg16_weights(data_root):
    path = data_root / "weights" / "vgg16_imagenet_features_fp16.pth"
    if not path.is_file():
        pytest.skip(f"no real data: {path} does not exist")
    model = models.fcn32s(2, "vgg16", fc_channels=8)
    report = models.load_backbone(model, path)
    assert report.loaded == tuple(CONVS)
    assert "fc6, fc7 (no classifier weights in the source)" in str(report)
    state = torch.load(path, weights_only=True)
    assert torch.equal(model.conv5_3.weight, state["features.28.weight"].float())
    # Trained filters: activations neither vanish nor explode over thirteen layers.
    images = torch.randn(1, 3, 32, 32)
    _, pools = model.eval().extract(images, ("pool5",))
    assert 0.01 < pools["pool5"].abs().max() < 100
