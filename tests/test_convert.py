# SPDX-License-Identifier: Apache-2.0
"""Original weights in the models: the same forward pass as a float64 re-computation of the nets.

``helpers.caffe`` states the published nets layer by layer, writes them as files and computes them;
here the files become models, and the two must agree.
"""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch
from helpers import caffe
from helpers.caffe import Layer, changed, mutated

from dilseg import cli, models
from dilseg.data import VOC2012, CamVid, dataset_classes, save_image
from dilseg.engine import convert, load_model
from dilseg.models import CaffeModelError, load_caffemodel, read_caffemodel

# VGG-16's sixteen layers with few channels.
TINY = models.Backbone(
    name="vgg16",
    stages=caffe.STAGES,
    fc_kernel=7,
    fc_channels=caffe.FC,
    fcn_image_padding=100,
    fcn_fc_padding=0,
)
FCN = {32: models.fcn32s, 16: models.fcn16s, 8: models.fcn8s}
FCN_MEAN = (104.00698793, 116.66876762, 122.67891434)
CLASSES = 3


@pytest.fixture
def tiny(monkeypatch):
    """Checkpoints name their backbone; here the names stand for few channels."""
    monkeypatch.setitem(models.BACKBONES, "vgg16", TINY)
    monkeypatch.setitem(models.BACKBONES, "alexnet", ALEXNET)


@pytest.fixture
def write(tmp_path):
    def write(layers, generation="current", style="current", name="net.caffemodel"):
        path = tmp_path / name
        path.write_bytes(caffe.encode(layers, generation, style))
        return path

    return write


def photograph(h: int, w: int) -> np.ndarray:
    """A random image, uint8 ``[h, w, 3]``, RGB."""
    return np.random.default_rng(h * 1000 + w).integers(0, 256, (h, w, 3), dtype=np.uint8)


def as_caffe(image: np.ndarray, mean=FCN_MEAN, scale=1.0) -> np.ndarray:
    """What the published data layers feed: BGR, mean subtracted, ``[1, 3, h, w]``."""
    bgr = image[:, :, ::-1].astype(np.float64) - np.array(mean)
    return scale * bgr.transpose(2, 0, 1)[None]


def as_ours(image: np.ndarray, model) -> torch.Tensor:
    """What the model's own convention makes of the image, in float64."""
    rgb = image.astype(np.float64) / 255
    normal = (rgb - np.array(model.normalization.mean)) / np.array(model.normalization.std)
    return torch.from_numpy(normal.transpose(2, 0, 1)[None].copy())


def agree(ours: torch.Tensor, theirs: np.ndarray, tolerance: float = 1e-10) -> None:
    assert tuple(ours.shape) == theirs.shape
    spread = theirs.std()
    assert spread > 0
    assert abs(ours.numpy() - theirs).max() < tolerance * spread


def forward(model, images):
    with torch.no_grad():
        return model.double().eval()(images)


# FCN -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize(
    ("stride", "at_once"), [(32, False), (16, False), (8, False), (16, True), (8, True)]
)
def test_fcn_is_the_original_forward_pass(write, stride, at_once, learned):
    layers = caffe.fcn_layers(stride, CLASSES, at_once=at_once)
    options = {"at_once": at_once} if stride != 32 else {}
    model = FCN[stride](CLASSES, TINY, learned_upsampling=learned, **options)
    report = load_caffemodel(model, write(layers))
    # The file's factors are float32, those of the double model exact decimals.
    tolerance = 1e-7 if at_once else 1e-10
    for h, w in [(1, 2), (33, 65), (60, 47)]:
        image = photograph(h, w)
        score = caffe.run(layers, as_caffe(image))["score"]
        assert score.shape == (1, CLASSES, h, w)
        agree(forward(model, as_ours(image, model)), score, tolerance)
    assert not report.fresh
    accounted = {*report.loaded, *report.unused}
    assert accounted == {layer.name for layer in layers}
    assert set(report.loaded) == {
        layer.name for layer in layers if layer.blobs and (learned or layer.type != "Deconvolution")
    }
    assert report.unused["score"] == "Crop: in the model"
    assert "Input: (B, G, R on 0-255, minus 104.007, 116.669, 122.679) * 1" in str(report)


@pytest.mark.parametrize("style", ["current", "legacy", "unpacked", "double"])
def test_every_form_of_blob(write, style):
    layers = caffe.fcn_layers(16, CLASSES)
    if style == "legacy":  # before there were crops with offsets in files
        layers = [layer for layer in layers if layer.type not in ("Crop", "Python")]
    path = write(layers, "v1" if style == "legacy" else "current", style)
    model = models.fcn16s(CLASSES, TINY)
    load_caffemodel(model, path)
    image = photograph(40, 33)
    score = caffe.run(caffe.fcn_layers(16, CLASSES), as_caffe(image))["score"]
    agree(forward(model, as_ours(image, model)), score)


def test_scale_layers_fold_into_a_model_without_them(write):
    """Factors that are not the published ones, too; float32 rounds the products once."""
    layers = caffe.fcn_layers(8, CLASSES, at_once=True)
    factors = np.linspace(0.005, 0.02, caffe.STAGES[3][-1], dtype=np.float32)
    layers = changed(layers, "scale_pool4", blobs=[factors])
    path = write(layers)
    image = photograph(50, 50)
    score = caffe.run(layers, as_caffe(image))["score"]
    for at_once in (False, True):
        model = models.fcn8s(CLASSES, TINY, at_once=at_once)
        load_caffemodel(model, path)
        agree(forward(model, as_ours(image, model)), score, 1e-6)
    plain = caffe.fcn_layers(8, CLASSES)
    model = models.fcn8s(CLASSES, TINY, at_once=True)
    load_caffemodel(model, write(plain))
    score = caffe.run(plain, as_caffe(image))["score"]
    agree(forward(model, as_ours(image, model)), score, 1e-6)


def test_published_factors_leave_the_weights_as_they_are(write):
    layers = caffe.fcn_layers(8, CLASSES, at_once=True)
    model = models.fcn8s(CLASSES, TINY, at_once=True)
    load_caffemodel(model, write(layers))
    stored = next(layer for layer in layers if layer.name == "score_pool3").blobs[0]
    assert np.array_equal(model.score_pool3.weight.detach().numpy(), stored)


def test_learned_deconvolutions_are_kept(write):
    layers = caffe.fcn_layers(16, CLASSES)
    random = np.random.default_rng(0)
    for name in ("upscore2", "upscore16"):
        weight = next(layer for layer in layers if layer.name == name).blobs[0]
        noisy = weight + random.standard_normal(weight.shape).astype(np.float32) * 0.05
        layers = changed(layers, name, blobs=[noisy.astype(np.float32)])
    path = write(layers)
    with pytest.raises(ValueError, match=r"upscore2: expected the fixed bilinear.*learned_upsampl"):
        load_caffemodel(models.fcn16s(CLASSES, TINY), path)
    model = models.fcn16s(CLASSES, TINY, learned_upsampling=True)
    load_caffemodel(model, path)
    image = photograph(45, 38)
    score = caffe.run(layers, as_caffe(image))["score"]
    agree(forward(model, as_ours(image, model)), score)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_grouped_deconvolutions(write, learned):
    layers = caffe.fcn_layers(32, CLASSES)
    kernels = np.tile(caffe.upsampling_kernel(64).astype(np.float32), (CLASSES, 1, 1, 1))
    layers = changed(layers, "upscore", blobs=[kernels], params={"group": CLASSES})
    model = models.fcn32s(CLASSES, TINY, learned_upsampling=learned)
    load_caffemodel(model, write(layers))
    image = photograph(33, 34)
    agree(forward(model, as_ours(image, model)), caffe.run(layers, as_caffe(image))["score"])
    wrong = changed(layers, "upscore", blobs=[kernels * np.float32(1.001)])
    if not learned:
        with pytest.raises(ValueError, match="upscore: expected the fixed bilinear kernel"):
            load_caffemodel(models.fcn32s(CLASSES, TINY), write(wrong))


@pytest.mark.parametrize("head", ["sem", "geo"])
def test_one_of_two_heads(write, head):
    """The SIFT Flow nets have a semantic and a geometric head on one trunk."""
    layers = caffe.two_headed_layers(16, {"sem": CLASSES, "geo": CLASSES})
    model = models.fcn16s(CLASSES, TINY)
    report = load_caffemodel(model, write(layers), head=head)
    image = photograph(45, 38)
    agree(
        forward(model, as_ours(image, model)), caffe.run(layers, as_caffe(image))[f"score_{head}"]
    )
    other = {"sem": "geo", "geo": "sem"}[head]
    assert report.unused[f"score_fr_{other}"] == "of another head"
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}
    with pytest.raises(ValueError, match="score_fr_sem: Convolution with weights"):
        load_caffemodel(models.fcn16s(CLASSES, TINY), write(layers))


# Other backbones and several inputs ------------------------------------------------------------


def narrow(name: str, widths) -> models.TableBackbone:
    """A published backbone's geometry with the channels of ``helpers.caffe``."""

    def few(layer):
        if isinstance(layer, models.Inception):
            branches = tuple(tuple(map(few, branch)) for branch in layer.branches)
            return dataclasses.replace(layer, branches=branches)
        known = widths(layer.name)
        return layer if layer.channels is None else dataclasses.replace(layer, channels=known)

    return models.TableBackbone(name, tuple(map(few, models.BACKBONES[name].layers)))


GOOGLENET_WIDTHS = {"conv1/7x7_s2": 4, "conv2/3x3_reduce": 3, "conv2/3x3": 5}
ALEXNET = narrow("alexnet", caffe.CAFFENET.get)
GOOGLENET = narrow(
    "googlenet",
    lambda name: GOOGLENET_WIDTHS.get(name, caffe.INCEPTION.get(name.rpartition("/")[2])),
)
TABLES = {
    "alexnet": (ALEXNET, caffe.alexnet_layers),
    "googlenet": (GOOGLENET, caffe.googlenet_layers),
}


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("name", TABLES)
def test_fcn32s_on_other_backbones_is_the_forward_pass_of_their_nets(write, name, learned):
    backbone, net = TABLES[name]
    layers = net(CLASSES)
    model = models.fcn32s(CLASSES, backbone, learned_upsampling=learned)
    report = load_caffemodel(model, write(layers))
    for h, w in [(1, 2), (33, 65), (90, 71)]:
        image = photograph(h, w)
        score = caffe.run(layers, as_caffe(image))["score"]
        assert score.shape == (1, CLASSES, h, w)
        agree(forward(model, as_ours(image, model)), score)
    assert not report.fresh
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}
    if name == "alexnet":
        assert report.unused["norm1"] == "LRN: in the model"
        for layer, change, text in [
            ("norm1", {"alpha": 2e-4}, "norm1: expected alpha 0.0001, found 0.0002"),
            ("conv4", {"group": 1}, "conv4: expected group 2, found 1"),
            ("score", {"offset": 19}, "score: expected offset 18, found 19"),
            ("upscore", {"kernel_size": 64}, "upscore: expected kernel 63, found 64"),
        ]:
            with pytest.raises(ValueError, match=text):
                load_caffemodel(model, write(changed(layers, layer, params=change)))


class Classifier(torch.nn.Module):
    """The ILSVRC classifier of a Caffe file: the trunk's layers, then fully connected ones."""

    def __init__(self, trunk, layers):
        super().__init__()
        self.trunk = trunk
        self.features = [row for row in trunk.layers if not row.name.startswith("fc")]
        self.average = torch.nn.AvgPool2d(7, 1) if trunk.backbone.name == "googlenet" else None
        head = [layer for layer in layers if layer.type == "InnerProduct"]
        self.head = torch.nn.Sequential()
        for layer in [head[-1]] if self.average else head:
            weight, bias = map(torch.from_numpy, layer.blobs)
            linear = torch.nn.Linear(*reversed(weight.shape)).double()
            linear.load_state_dict({"weight": weight, "bias": bias})
            self.head.append(linear)
            if layer.name.startswith("fc") and layer.name != "fc8":
                self.head.append(torch.nn.ReLU())

    def forward(self, images):
        x = self.trunk._run(self.features, images, (), {})
        x = x if self.average is None else self.average(x)
        return self.head(torch.flatten(x, 1))


@pytest.mark.parametrize("name", TABLES)
def test_other_classifiers_into_the_trunk(write, name):
    """CaffeNet's and GoogLeNet's ILSVRC files give what ``convolutionalize`` makes of them."""
    backbone, net = TABLES[name]
    layers = net()
    path = write(layers, "v1", "legacy")
    model = models.fcn32s(CLASSES, backbone)
    report = load_caffemodel(model, path)
    assert set(report.fresh) == {"score_fr"}
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}

    first, *rest = backbone.layers
    own_padding = {"alexnet": 0, "googlenet": 3}[name]
    unpadded = (dataclasses.replace(first, padding=own_padding), *rest)
    trunk = models.fcn32s(CLASSES, models.TableBackbone(name, unpadded))
    load_caffemodel(trunk, path)
    classifier = Classifier(trunk.double(), layers).eval()
    image = as_ours(photograph(227, 227), model)
    scores = caffe.run(layers, as_caffe(photograph(227, 227)))
    expected = scores["fc8" if name == "alexnet" else "loss3/classifier"]
    with torch.no_grad():
        agree(classifier(image), expected)
    dense = models.convolutionalize(classifier, (3, 227, 227))
    with torch.no_grad():
        agree(dense(image)[:, :, 0, 0], expected)
        features, _ = model.double().eval().extract(image)
        margin = first.padding - own_padding
        theirs = dense(torch.nn.functional.pad(image, [margin] * 4))
        if name == "googlenet":  # the FCN drops the pooling before the classifier
            features = torch.nn.functional.avg_pool2d(features, 7, 1)
        ours = list(dense.head.children())[-1](features)
    agree(ours, theirs.numpy())


def rgb_hha(h, w):
    """Images of colour and HHA ``[1, 6, h, w]``, and the two of them as Caffe gets them."""
    color, hha = photograph(h, w), photograph(h + 1, w)[:h]
    mean = np.array(HHA_MEAN)
    blobs = as_caffe(color, NYUD_MEAN), (hha.astype(np.float64) - mean).transpose(2, 0, 1)[None]
    return np.concatenate([color, hha], axis=2), blobs


NYUD_MEAN, HHA_MEAN = (116.190, 97.203, 92.318), (132.431, 94.076, 118.477)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_late_fusion_is_the_forward_pass_of_both_nets(write, learned):
    layers = caffe.late_fusion_layers(CLASSES)
    model = models.fcn32s_late(CLASSES, TINY, learned_upsampling=learned)
    path = write(layers)
    with pytest.raises(ValueError, match=r"Give the mean \(--mean\), 6 values .* B, G, R, H, H, A"):
        load_caffemodel(model, path)
    with pytest.raises(ValueError, match="expected a mean of six numbers"):
        load_caffemodel(model, path, mean=NYUD_MEAN)
    report = load_caffemodel(model, path, mean=(*NYUD_MEAN, *HHA_MEAN))
    assert not report.fresh
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}
    for h, w in [(1, 2), (60, 47)]:
        image, blobs = rgb_hha(h, w)
        agree(forward(model, as_ours(image, model)), caffe.run(layers, blobs)["score"])
    summed = changed(layers, "score_fused", params={"coeff": (1.0, 1.0)})
    with pytest.raises(ValueError, match=r"score_fused: expected coefficients 0\.5, found 1"):
        load_caffemodel(model, write(summed), mean=(*NYUD_MEAN, *HHA_MEAN))
    plain = [layer for layer in layers if layer.name != "conv3_2hha"]
    with pytest.raises(ValueError, match=r"conv3_2hha: expected weights of shape .*found none"):
        load_caffemodel(model, write(plain), mean=(*NYUD_MEAN, *HHA_MEAN))


def test_early_fusion_is_the_forward_pass_of_the_net(write):
    layers = caffe.early_fusion_layers(CLASSES)
    model = models.fcn32s(CLASSES, TINY, in_channels=4)
    report = load_caffemodel(model, write(layers), mean=NYUD_MEAN)
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}
    assert "logarithm of the depth in millimetres, minus 7.844" in str(report)
    color = photograph(45, 38)
    depth = np.random.default_rng(0).uniform(700, 9000, (45, 38))
    blobs = as_caffe(color, NYUD_MEAN), (np.log(depth) - 7.844)[None, None]
    image = np.concatenate([color, np.log(depth)[:, :, None]], axis=2)
    agree(forward(model, as_ours(image, model)), caffe.run(layers, blobs)["score"])


def test_a_net_for_colour_starts_early_fusion(write):
    """The depth filter is the mean of the colour filters, as in the authors' solve.py."""
    layers = caffe.fcn_layers(32, CLASSES)
    model = models.fcn32s(CLASSES, TINY, in_channels=4)
    load_caffemodel(model, write(layers), mean=NYUD_MEAN)
    stored = next(layer for layer in layers if layer.name == "conv1_1").blobs[0]
    own = model.conv1_1.weight.detach().numpy()
    np.testing.assert_array_equal(own[:, :3], stored[:, ::-1])
    np.testing.assert_allclose(own[:, 3], stored.mean(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stride", FCN)
def test_both_heads_of_a_siftflow_net(write, stride):
    classes = {"sem": 5, "geo": 3}
    layers = caffe.two_headed_layers(stride, classes)
    model = FCN[stride](8, TINY, heads=classes)
    report = load_caffemodel(model, write(layers))
    assert not report.fresh
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}
    image = photograph(45, 38)
    maps = caffe.run(layers, as_caffe(image))
    expected = np.concatenate([maps["score_sem"], maps["score_geo"]], axis=1)
    agree(forward(model, as_ours(image, model)), expected)
    if stride != 32:
        wrong = changed(layers, "score_pool4_geoc", params={"offset": 4})
        with pytest.raises(ValueError, match="score_pool4_geoc: expected offset 5, found 4"):
            load_caffemodel(model, write(wrong))


# DilatedNet ------------------------------------------------------------------------------------

FORMS = {
    "voc": {"context": "large", "padding": "input"},
    "camvid": {},
    "kitti": {"dilations": (1, 1, 2, 4, 8, 1)},
    "cityscapes": {"dilations": (1, 1, 2, 4, 8, 16, 32, 64, 1), "border": "zero"},
}
DILATED_MEAN = (102.93, 111.36, 116.52)


@pytest.mark.parametrize("form", FORMS)
def test_dilatednet_is_the_original_forward_pass(write, form):
    layers = caffe.dilated_layers(form, CLASSES)
    model = models.dilatednet(CLASSES, TINY, **FORMS[form])
    report = load_caffemodel(model, write(layers), mean=DILATED_MEAN)
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}
    assert not report.fresh
    image = photograph(372 + 8 * 5, 372 + 8 * 3 + 5)  # a width that only rounding up fits
    last = "ct_final" if form == "voc" else "ctx_final"
    cells = caffe.run(layers, as_caffe(image, DILATED_MEAN))[last]
    assert cells.shape[2:] == (5, 4)
    agree(forward(model, as_ours(image, model)), cells)


def test_cityscapes_logits_are_those_of_the_deconvolution(write):
    layers = caffe.dilated_layers("cityscapes", CLASSES)
    model = models.dilatednet(CLASSES, TINY, **FORMS["cityscapes"])
    load_caffemodel(model, write(layers), mean=DILATED_MEAN)
    image = photograph(40, 56)
    padded = np.pad(image, ((186, 186), (186, 186), (0, 0)), mode="reflect")  # BORDER_REFLECT_101
    logits = caffe.run(layers, as_caffe(padded, DILATED_MEAN))["ctx_upsample"]
    with torch.no_grad():
        ours = model.double().eval().segment(as_ours(image, model))
    agree(ours, logits)
    clamped = models.dilatednet(
        CLASSES, TINY, dilations=FORMS["cityscapes"]["dilations"], border="clamp"
    )
    with pytest.raises(ValueError, match=r"ctx_upsample: .*build it with border='zero'"):
        load_caffemodel(clamped, write(layers), mean=DILATED_MEAN)


def test_front_end_alone_and_under_a_fresh_context(write):
    layers = caffe.dilated_layers("voc", CLASSES, context=False)
    weight, _ = next(layer for layer in layers if layer.name == "fc-final").blobs
    layers = changed(layers, "fc-final", blobs=[weight, np.float32([0, 9, 99])])
    image = photograph(388, 380)
    cells = caffe.run(layers, as_caffe(image, DILATED_MEAN))["fc-final"]
    front_end = models.DilatedFrontEnd(CLASSES, TINY)
    load_caffemodel(front_end, write(layers), mean=DILATED_MEAN)
    agree(forward(front_end, as_ours(image, front_end)), cells)
    net = models.dilatednet(CLASSES, TINY, sigma=0.0)
    report = load_caffemodel(net, write(layers), mean=DILATED_MEAN)
    assert set(report.fresh) == {name for name, _ in net.context.named_children()}
    assert (cells > 0).any()
    agree(forward(net, as_ours(image, net)), np.maximum(cells, 0))  # the identity, after ReLUs
    assert net.normalization == net.front_end.normalization == front_end.normalization


# Backbone, mean and channels -------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["current", "v1", "v0"])
@pytest.mark.parametrize("build", [models.fcn8s, models.DilatedFrontEnd])
def test_vgg16_classifier_into_the_trunk(write, build, generation):
    layers = caffe.vgg_layers()
    style = "current" if generation == "current" else "legacy"
    model = build(CLASSES, TINY)
    report = load_caffemodel(model, write(layers, generation, style), mean=FCN_MEAN)
    fc6 = next(layer for layer in layers if layer.name == "fc6")
    features = torch.randn(2, 5, 7, 7)
    hidden = features.flatten(1) @ torch.from_numpy(fc6.blobs[0]).T + torch.from_numpy(fc6.blobs[1])
    dense = torch.nn.functional.conv2d(features, model.fc6.weight, model.fc6.bias)
    torch.testing.assert_close(dense.flatten(1), hidden)
    assert report.unused["fc8"] == "classifies into other classes"
    assert set(report.fresh) == {n for n, _ in model.named_children() if n.startswith(("sc", "fi"))}
    assert {*report.loaded, *report.unused} == {layer.name for layer in layers}


def test_a_backbone_has_no_scale_layers(write):
    scale = Layer("scale_pool4", "Scale", ("pool4",), ("x",), {}, [np.ones(4, np.float32)])
    with pytest.raises(ValueError, match=r"scale_pool4: Scale with weights .* has no place"):
        load_caffemodel(models.fcn8s(CLASSES, TINY), write([*caffe.vgg_layers(), scale]))


def test_convolutions_alone(write):
    layers = [layer for layer in caffe.vgg_layers() if not layer.name.startswith("fc")]
    model = models.fcn32s(CLASSES, TINY)
    report = load_caffemodel(model, write(layers))
    assert set(report.fresh) == {"fc6", "fc7", "score_fr"}
    partly = [layer for layer in caffe.vgg_layers() if layer.name not in ("fc7", "fc8")]
    with pytest.raises(
        ValueError, match=r"fc7: expected weights of shape \(6, 6, 1, 1\), found none"
    ):
        load_caffemodel(model, write(partly))


def test_a_stated_mean_and_scale_are_taken(write):
    stated = {"mean_value": (10.0, 20.0, 30.0), "scale": 0.5}
    layers = caffe.fcn_layers(32, CLASSES)
    layers = [Layer("data", "Data", (), ("data", "label"), stated), *layers[1:]]
    path = write(layers)
    model = models.fcn32s(CLASSES, TINY)
    report = load_caffemodel(model, path)
    assert "minus 10, 20, 30) * 0.5 (stated in the file)" in str(report)
    image = photograph(33, 40)
    score = caffe.run(layers, as_caffe(image, (10, 20, 30), 0.5))["score"]
    agree(forward(model, as_ours(image, model)), score)
    load_caffemodel(model, path, mean=(1, 2, 3), scale=2.0)
    score = caffe.run(layers, as_caffe(image, (1, 2, 3), 2.0))["score"]
    agree(forward(model, as_ours(image, model)), score)


def test_what_a_file_states_about_its_mean_must_be_one_thing(write):
    def file(*stated):
        data = [Layer(f"data{i}", "Data", (), ("data",), params) for i, params in enumerate(stated)]
        return write([*data, *caffe.fcn_layers(32, CLASSES)[1:]])

    model = models.fcn32s(CLASSES, TINY)
    one, other = {"mean_value": (1.0, 2.0, 3.0)}, {"mean_value": (4.0,)}
    with pytest.raises(
        ValueError, match=r"but its data layers state 2 different ones\. Give the me"
    ):
        load_caffemodel(model, file(one, other))
    load_caffemodel(model, file(one, one))
    expected = models.Normalization.from_bgr_255((1, 2, 3)).mean
    assert model.normalization.mean == pytest.approx(expected)
    load_caffemodel(model, file(other))
    assert model.normalization.mean == pytest.approx((4 / 255,) * 3)
    with pytest.raises(ValueError, match="subtracts a mean image that is not in the file"):
        load_caffemodel(model, file({"mean_file": "mean.binaryproto"}))
    with pytest.raises(ValueError, match=r"expected one input scale.*Give the scale"):
        load_caffemodel(model, file({"scale": 0.5}, {"scale": 2.0}))
    with pytest.raises(ValueError, match="expected a mean of three numbers"):
        load_caffemodel(model, file({"mean_value": (1.0, 2.0)}))


def test_files_in_rgb_order(write):
    layers = caffe.fcn_layers(32, CLASSES)
    model = models.fcn32s(CLASSES, TINY)
    load_caffemodel(model, write(layers), bgr=False, mean=(132.431, 94.076, 118.477))
    image = photograph(33, 40)
    data = image.astype(np.float64) - (132.431, 94.076, 118.477)
    score = caffe.run(layers, data.transpose(2, 0, 1)[None])["score"]
    agree(forward(model, as_ours(image, model)), score)


def test_an_unknown_mean_is_asked_for(write):
    path = write(caffe.dilated_layers("camvid", CLASSES))
    with pytest.raises(
        ValueError, match=r"expected a mean, but the file states none\. Give the mean"
    ):
        load_caffemodel(models.dilatednet(CLASSES, TINY), path)
    for mean in [(1, 2), (1, 2, float("nan"))]:
        with pytest.raises(ValueError, match="expected a mean of three numbers"):
            load_caffemodel(models.dilatednet(CLASSES, TINY), path, mean=mean)
    with pytest.raises(ValueError, match="expected an input scale above 0"):
        load_caffemodel(models.dilatednet(CLASSES, TINY), path, mean=(1, 2, 3), scale=0.0)


# What does not match ---------------------------------------------------------------------------


def fcn(**changes):
    def make():
        layers = caffe.fcn_layers(8, CLASSES)
        for name, change in changes.items():
            layers = changed(layers, name, **change)
        return layers

    return make


def without(*names):
    return lambda: [layer for layer in caffe.fcn_layers(8, CLASSES) if layer.name not in names]


def extra(layer):
    return lambda: [*caffe.fcn_layers(8, CLASSES), layer]


ONES = np.ones((CLASSES, 5, 1, 1), np.float32)
MISMATCHES = {
    "other classes": (
        lambda: caffe.fcn_layers(8, CLASSES + 1),
        ["with 3 classes", r"score_fr: expected a weight of shape (3, 6, 1, 1), found (4, 6, 1, 1)",
         "score_pool4: expected", "upscore8: expected one weight of shape (3, 3, 16, 16)"],
    ),
    "coarser net": (
        lambda: caffe.fcn_layers(16, CLASSES),
        ["score_pool3: expected weights of shape (3, 5, 1, 1), found none", "upscore16: Deconv"],
    ),
    "missing layer": (without("conv3_2"), ["conv3_2: expected weights of shape", "found none"]),
    "missing fc7": (without("fc7"), ["fc7: expected weights of shape (6, 6, 1, 1), found none"]),
    "unknown layer": (
        extra(Layer("score_pool2", "Convolution", ("pool2",), ("x",), {}, [ONES])),
        ["score_pool2: Convolution with weights (3, 5, 1, 1), for which the model has no place"],
    ),
    "layer twice": (
        lambda: [*caffe.fcn_layers(8, CLASSES), caffe.fcn_layers(8, CLASSES)[2]],
        ["conv1_1 occurs 2 times"],
    ),
    "no bias": (
        fcn(conv2_1={"blobs": [np.ones((3, 2, 3, 3), np.float32)]}),
        ["conv2_1: expected a weight and a bias, found 1 blobs"],
    ),
    "short bias": (
        fcn(fc7={"blobs": [np.ones((6, 6, 1, 1), np.float32), np.ones(5, np.float32)]}),
        ["fc7: expected a bias of 6 values, found 5"],
    ),
    "transposed kernel": (
        fcn(score_fr={"blobs": [np.ones((6, 3, 1, 1), np.float32), np.ones(3, np.float32)]}),
        ["score_fr: expected a weight of shape (3, 6, 1, 1), found (6, 3, 1, 1)"],
    ),
    "nan": (
        fcn(score_fr={"blobs": [np.full((3, 6, 1, 1), np.nan, "f4"), np.ones(3, "f4")]}),
        ["score_fr: expected finite values"],
    ),
    "other padding": (
        fcn(conv1_1={"params": {"pad": 1}}), ["conv1_1: expected pad 100, found 1"],
    ),
    "other stride": (
        fcn(upscore8={"params": {"stride": 4}}), ["upscore8: expected stride 8, found 4"],
    ),
    "dilation": (
        fcn(conv5_1={"params": {"dilation": 2}}), ["conv5_1: expected dilation 1, found 2"],
    ),
    "other crop": (
        fcn(score_pool3c={"params": {"offset": 8}}), ["score_pool3c: expected offset 9, found 8"],
    ),
    "average pooling": (
        fcn(pool3={"params": {"pool": 1}}), ["pool3: expected method 0, found 1"],
    ),
    "product": (
        fcn(fuse_pool4={"params": {"operation": 0}}),
        ["fuse_pool4: expected operation 1, found 0"],
    ),
    "leaky ReLU": (
        fcn(relu6={"params": {"negative_slope": 0.25}}),
        ["relu6: expected negative_slope 0, found 0.25"],
    ),
    "another layer type": (
        fcn(conv4_2={"type": "LocallyConnected"}),
        ["conv4_2: expected a Convolution, found a LocallyConnected"],
    ),
    "normalisation": (
        extra(Layer("norm1", "LRN", ("pool1",), ("norm1",))),
        ["norm1: LRN, for which the model has no place"],
    ),
    "extra pooling": (
        extra(Layer("pool6", "Pooling", ("fc7",), ("pool6",), {"pool": 0, "kernel_size": 2})),
        ["pool6: Pooling, for which the model has no place"],
    ),
    "scale of nothing": (
        extra(Layer("scale_pool2", "Scale", ("pool2",), ("x",), {}, [np.ones(4, np.float32)])),
        ["scale_pool2: Scale with weights (4,), for which the model has no place"],
    ),
    "scale with a bias": (
        extra(Layer("scale_pool4", "Scale", ("pool4",), ("x",), {}, [np.ones(4, np.float32)] * 2)),
        ["scale_pool4: expected 4 factors, found blobs (4,), (4,)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "texts"), MISMATCHES.values(), ids=MISMATCHES)
def test_what_does_not_match_is_listed_and_changes_nothing(write, make, texts):
    model = models.fcn8s(CLASSES, TINY)
    before = {name: p.clone() for name, p in model.named_parameters()}
    path = write(make())
    with pytest.raises(ValueError, match=r"does not fit the FCN") as caught:
        load_caffemodel(model, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for text in texts:
        assert text in message
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.normalization == models.IMAGENET


def test_a_long_list_is_cut(write):
    bare = [Layer(layer.name, layer.type) for layer in caffe.fcn_layers(8, CLASSES)]
    with pytest.raises(ValueError, match=r"and \d+ more\. Build the model") as caught:
        load_caffemodel(models.fcn8s(CLASSES, TINY), write(bare))
    assert len(str(caught.value)) < 2000


def test_dilatednet_mismatches(write):
    net = models.dilatednet(CLASSES, TINY, context="large")
    with pytest.raises(ValueError, match=r"ctx_conv1_1: expected pad 1, found 33"):
        load_caffemodel(net, write(caffe.dilated_layers("voc", CLASSES)), mean=DILATED_MEAN)
    net = models.dilatednet(CLASSES, TINY)
    with pytest.raises(ValueError, match=r"ctx_conv5_1: expected weights of shape .*found none"):
        load_caffemodel(net, write(caffe.dilated_layers("kitti", CLASSES)), mean=DILATED_MEAN)
    layers = caffe.dilated_layers("camvid", CLASSES)
    layers = changed(layers, "ctx_conv3_1", params={"dilation": 3})
    with pytest.raises(ValueError, match=r"ctx_conv3_1: expected dilation 4, found 3"):
        load_caffemodel(net, write(layers), mean=DILATED_MEAN)
    front_end = models.DilatedFrontEnd(CLASSES, TINY)
    with pytest.raises(ValueError, match=r"ctx_conv1_1: Convolution with weights"):
        load_caffemodel(front_end, write(layers), mean=DILATED_MEAN)
    city = caffe.dilated_layers("cityscapes", CLASSES)
    city = changed(city, "ctx_upsample", blobs=[np.ones((CLASSES, 1, 16, 16), np.float32)])
    net = models.dilatednet(CLASSES, TINY, **FORMS["cityscapes"])
    with pytest.raises(ValueError, match="ctx_upsample: expected the fixed bilinear kernel"):
        load_caffemodel(net, write(city), mean=DILATED_MEAN)


def test_other_models_are_refused(write):
    with pytest.raises(TypeError, match="load_caffemodel: expected model an FCN"):
        load_caffemodel(torch.nn.Linear(1, 1), write(caffe.fcn_layers(8, CLASSES)))


# The command -----------------------------------------------------------------------------------


def run(capsys, *words):
    code = cli.main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *words) -> str:
    code, _, err = run(capsys, *words)
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("dilseg: ")
    return err


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("stride", "at_once"), [(32, False), (16, False), (8, False), (8, True)])
def test_convert_makes_a_checkpoint_that_predicts(write, tmp_path, capsys, stride, at_once):
    pytest.importorskip("PIL", reason="needs Pillow")
    layers = caffe.fcn_layers(stride, 21, at_once=at_once)
    path, out = write(layers), tmp_path / "made" / "model.pt"
    words = ("--from", path, "--model", f"fcn{stride}s", "--data", "voc", "--out", out)
    code, text, _ = run(capsys, *words)
    assert code == 0
    for layer in layers:
        assert layer.name in text
    assert sorted(p.name for p in out.parent.iterdir()) == ["model.pt"]
    model, spec, data, content = load_model(out)
    assert data.classes == VOC2012.classes
    assert spec.options.get("at_once", False) is at_once
    assert content["converted"] in text
    image = photograph(61, 48)
    score = caffe.run(layers, as_caffe(image))["score"]
    agree(forward(model, as_ours(image, with_normalization(model, data))), score, 1e-7)

    save_image(tmp_path / "photo.png", image)
    labels = tmp_path / "labels"
    words = ["--checkpoint", out, "--input", tmp_path / "photo.png", "--out", labels]
    assert cli.main(["predict", *map(str, words), "--device", "cpu"]) == 0
    from PIL import Image

    found = np.asarray(Image.open(labels / "photo.png"))
    top = np.sort(score[0], axis=0)
    clear = top[-1] - top[-2] > 1e-4 * score.std()
    assert clear.mean() > 0.99
    assert np.array_equal(found[clear], score[0].argmax(0)[clear])


def with_normalization(model, data):
    model.normalization = models.Normalization(data.mean, data.std)
    return model


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("form", FORMS)
def test_convert_finds_the_form_of_a_dilatednet(write, tmp_path, capsys, form):
    layers = caffe.dilated_layers(form, CLASSES)
    words = ("--from", write(layers), "--model", "dilatednet", "--classes", CLASSES)
    assert "expected a mean" in refused(capsys, *words)
    assert not (tmp_path / "net.pt").exists()
    assert run(capsys, *words, "--mean", *DILATED_MEAN)[0] == 0
    model, spec, data, _ = load_model(tmp_path / "net.pt")
    for name, value in FORMS[form].items():
        assert tuple(spec.options[name]) == tuple(value)
    image = photograph(404, 396)
    cells = caffe.run(layers, as_caffe(image, DILATED_MEAN))[
        "ct_final" if form == "voc" else "ctx_final"
    ]
    agree(forward(model, as_ours(image, with_normalization(model, data))), cells)


@pytest.mark.usefixtures("tiny")
def test_eval_scores_a_converted_net_in_the_order_of_the_data(write, tmp_path, capsys):
    """fyu's CamVid order differs from SegNet's: the names of the file's classes put it right."""
    image_module = pytest.importorskip("PIL.Image", reason="needs Pillow")
    theirs = ["building", "tree", "sky", "car", "sign", "road", "pedestrian", "fence", "pole",
              "pavement", "bicyclist"]  # fmt: skip
    layers = caffe.dilated_layers("camvid", 11)
    words = ("--from", write(layers), "--model", "dilatednet", "--data", "camvid")
    words += ("--mean", *DILATED_MEAN, "--class-names", *theirs)
    code, text, _ = run(capsys, *words)
    assert code == 0
    assert "Classes put into the order of camvid: sky, building" in text
    model, _, data, _ = load_model(tmp_path / "net.pt")
    assert data.classes == CamVid.classes
    image = photograph(404, 396)
    cells = caffe.run(layers, as_caffe(image, DILATED_MEAN))["ctx_final"]
    ours = forward(model, as_ours(image, with_normalization(model, data)))
    agree(ours, cells[:, [theirs.index(name) for name in CamVid.classes]])

    root = tmp_path / "camvid"
    for name in ("test", "testannot"):
        (root / name).mkdir(parents=True)
    save_image(root / "test" / "a.png", photograph(24, 32))
    label = np.random.default_rng(0).integers(0, 12, (24, 32), dtype=np.uint8)
    image_module.fromarray(label).save(root / "testannot" / "a.png")
    words = ["--checkpoint", tmp_path / "net.pt", "--root", root, "--split", "test"]
    assert cli.main(["eval", *map(str, words), "--device", "cpu"]) == 0
    assert "mean IoU" in capsys.readouterr().out


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_reordered_classes_are_the_same_scores(learned):
    model = models.fcn8s(CLASSES, TINY, learned_upsampling=learned).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=(2 / max(1, parameter[0].numel())) ** 0.5)
    images = torch.randn(1, 3, 33, 40, dtype=torch.float64)
    before = forward(model, images)
    models.reorder_classes(model, [2, 0, 1])
    torch.testing.assert_close(forward(model, images), before[:, [2, 0, 1]])
    for order in ([0, 1], [0, 1, 1], [1, 2, 3]):
        with pytest.raises(ValueError, match="expected order a permutation of 0 to 2"):
            models.reorder_classes(model, order)


NETS = {
    "fcn8s-atonce-pascal": lambda: caffe.fcn_layers(8, 21, at_once=True),
    "fcn-alexnet-pascal": lambda: caffe.alexnet_layers(21),
    "nyud-fcn32s-hha-heavy": lambda: caffe.fcn_layers(32, 40),
    "nyud-fcn32s-color-d": lambda: caffe.early_fusion_layers(40),
    "nyud-fcn32s-color-hha-heavy": lambda: caffe.late_fusion_layers(40),
    "siftflow-fcn16s-heavy": lambda: caffe.two_headed_layers(16, {"sem": 33, "geo": 3}),
    "pascalcontext-fcn32s-heavy": lambda: caffe.fcn_layers(32, 60),
    "dilation7_kitti": lambda: caffe.dilated_layers("kitti", 11),
    "dilation10_cityscapes": lambda: caffe.dilated_layers("cityscapes", 19),
}


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", NETS)
def test_a_released_net_needs_its_name_alone(write, tmp_path, capsys, name):
    layers = NETS[name]()
    path, out = write(layers, name=f"{name}.caffemodel"), tmp_path / f"{name}.pt"
    assert run(capsys, "--from", path)[0] == 0
    model, spec, data, _ = load_model(out)
    entry = models.PUBLISHED[name]
    assert (spec.name, spec.num_classes, data.name) == (entry.model, entry.num_classes, entry.data)
    assert data.classes == dataset_classes(entry.data)[0]
    for option, value in entry.options.items():
        assert spec.options[option] == (list(value) if isinstance(value, tuple) else value)
    with_normalization(model, data)
    assert model.normalization == entry.normalization
    h, w = (404, 396) if name.startswith("dilation") else (33, 65)
    color = photograph(h, w)
    image, blobs = color, as_caffe(color, entry.mean[:3])
    if name == "nyud-fcn32s-hha-heavy":
        blobs = (color.astype(np.float64) - HHA_MEAN).transpose(2, 0, 1)[None]
    elif name == "nyud-fcn32s-color-hha-heavy":
        image, blobs = rgb_hha(h, w)
    elif name == "nyud-fcn32s-color-d":
        depth = np.random.default_rng(0).uniform(700, 9000, (h, w, 1))
        image = np.concatenate([color, np.log(depth)], axis=2)
        blobs = blobs, (np.log(depth) - 7.844).transpose(2, 0, 1)[None]
    maps = caffe.run(layers, blobs)
    if name.startswith("dilation"):
        expected = maps["ctx_final"]
    elif name.startswith("siftflow"):
        expected = np.concatenate([maps["score_sem"], maps["score_geo"]], axis=1)
    else:
        expected = maps["score"]
    agree(forward(model, as_ours(image, model)), expected, 1e-7)

    other = write(layers, name="renamed.caffemodel")
    assert "--model: give the network" in refused(capsys, "--from", other)
    assert run(capsys, "--from", other, "--net", name, "--out", tmp_path / "b.pt")[0] == 0
    _, again, _, _ = load_model(tmp_path / "b.pt")
    assert again == spec


@pytest.mark.usefixtures("tiny")
def test_classifiers_become_checkpoints_to_train_from(write, tmp_path, capsys):
    path, out = write(caffe.alexnet_layers()), tmp_path / "caffenet.pt"
    words = ("--model", "fcn32s", "--classes", 4)
    assert run(capsys, "--from", path, *words, "--backbone", "alexnet", "--out", out)[0] == 0
    model, spec, _, _ = load_model(out)
    assert spec.options["backbone"] == "alexnet"
    fc6 = next(layer for layer in caffe.alexnet_layers() if layer.name == "fc6").blobs[0]
    assert np.array_equal(model.fc6.weight.detach().flatten(1).numpy(), fc6)
    stage = spec.build()
    models.load_stage(stage, out)
    assert torch.equal(stage.conv2.weight, model.conv2.weight)

    path, out = write(caffe.vgg_layers()), tmp_path / "vgg.pt"
    assert run(capsys, "--from", path, *words, "--depth", "--out", out)[0] == 0
    model, _, data, _ = load_model(out)
    assert (model.in_channels, len(data.mean)) == (4, 4)
    torch.testing.assert_close(model.conv1_1.weight[:, 3], model.conv1_1.weight[:, :3].mean(1))


@pytest.mark.usefixtures("tiny")
def test_mistakes_about_nets_and_heads(write, tmp_path, capsys):
    layers = caffe.two_headed_layers(16, {"sem": 5, "geo": 3})
    path = write(layers)
    assert "--net: expected one of fcn32s-heavy-pascal" in refused(
        capsys, "--from", path, "--net", "unet"
    )
    given = ("--from", path, "--model", "fcn16s")
    assert "--net and --model: give one" in refused(capsys, *given, "--net", "dilation7_kitti")
    assert "expected SUFFIX=N such as sem=33, but got 'sem'" in refused_words(
        capsys, *given, "--heads", "sem"
    )
    assert "--heads: goes with fcn32s" in refused(
        capsys, *given, "--heads", "sem=5", "--head", "sem"
    )
    assert "--depth: goes with fcn32s" in refused(
        capsys, "--from", path, "--model", "dilatednet", "--depth", "--classes", 3
    )
    out = tmp_path / "out.pt"
    assert run(capsys, *given, "--heads", "sem=5", "geo=3", "--out", out)[0] == 0
    _, spec, data, _ = load_model(out)
    assert spec.options["heads"] == {"sem": 5, "geo": 3}
    assert len(data.classes) == 8
    assert run(capsys, *given, "--head", "geo", "--classes", 3, "--out", out)[0] == 0
    assert "found none" in refused(capsys, *given, "--heads", "sem=5", "sky=3")


def refused_words(capsys, *words) -> str:
    """What argparse refuses."""
    with pytest.raises(SystemExit):
        run(capsys, *words)
    return capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_names_without_a_known_data_set(write, tmp_path, capsys):
    path = write(caffe.fcn_layers(32, CLASSES))
    words = ("--from", path, "--model", "fcn32s", "--class-names", "sky", "road", "rest")
    assert run(capsys, *words, "--out", tmp_path / "a.pt")[0] == 0
    _, _, data, _ = load_model(tmp_path / "a.pt")
    assert data.classes == ("sky", "road", "rest")
    assert data.name == "folder"


@pytest.mark.usefixtures("tiny")
def test_torchvision_state_dict(tmp_path, capsys):
    source = models.fcn32s(2, TINY)
    index, state = 0, {}
    for stage, widths in enumerate(TINY.stages, 1):
        for i in range(1, len(widths) + 1):
            for part in ("weight", "bias"):
                tensor = getattr(getattr(source, f"conv{stage}_{i}"), part)
                state[f"features.{index}.{part}"] = tensor.detach().clone()
            index += 2
        index += 1
    for name, key in (("fc6", "classifier.0"), ("fc7", "classifier.3")):
        state[f"{key}.weight"] = getattr(source, name).weight.detach().flatten(1)
        state[f"{key}.bias"] = getattr(source, name).bias.detach()
    state["classifier.6.weight"], state["classifier.6.bias"] = torch.ones(10, 6), torch.ones(10)
    path = tmp_path / "vgg16.pth"
    torch.save(state, path)
    words = ("--from", path, "--model", "fcn8s", "--classes", 4, "--out", tmp_path / "a.pt")
    code, text, _ = run(capsys, *words)
    assert code == 0
    assert "Left fresh: score_fr, score_pool4, score_pool3 (not part of the backbone)" in text
    assert "Not used: classifier.6 (classifies into other classes)" in text
    model, _, data, _ = load_model(tmp_path / "a.pt")
    assert torch.equal(model.fc6.weight, source.fc6.weight)
    assert (data.mean, data.std) == (models.IMAGENET.mean, models.IMAGENET.std)

    assert "give the --mean" in refused(capsys, *words, "--bgr")
    caffe_mean = (103.939, 116.779, 123.68)
    assert run(capsys, *words, "--bgr", "--mean", *caffe_mean)[0] == 0
    model, _, data, _ = load_model(tmp_path / "a.pt")
    assert torch.equal(model.conv1_1.weight, source.conv1_1.weight.flip(1))
    assert data.mean == models.Normalization.from_bgr_255(caffe_mean).mean


@pytest.mark.usefixtures("tiny")
def test_a_conversion_is_the_same_every_time(write, tmp_path):
    path = write(caffe.vgg_layers())
    states = []
    for name in ("a.pt", "b.pt"):
        torch.manual_seed(len(states))
        convert(path, "dilatednet", classes=CLASSES, mean=DILATED_MEAN, out=tmp_path / name)
        states.append(load_model(tmp_path / name)[0].state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.usefixtures("tiny")
def test_mistakes_are_one_sentence_and_leave_no_file(write, tmp_path, capsys):
    path = write(caffe.fcn_layers(8, CLASSES))
    given = ("--from", path, "--model", "fcn8s")
    assert "--classes: give the number" in refused(capsys, *given)
    assert "score_fr: expected a weight" in refused(capsys, *given, "--classes", 4)
    assert "from 1 to 255" in refused(capsys, *given, "--classes", 0)
    assert "from 1 to 255" in refused(capsys, *given, "--classes", 10**12)
    assert "--data: expected one of voc, voc2011, sbd" in refused(capsys, *given, "--data", "coco")
    assert "expected 21, the classes" in refused(capsys, *given, "--data", "voc", "--classes", 3)
    assert "'sky' is not in both" in refused(
        capsys, *given, "--data", "camvid", "--class-names", "building"
    ).replace("'bicyclist'", "'sky'")
    assert "occurs twice" in refused(capsys, *given, "--class-names", "a", "a", "b")
    assert "--model: expected one of fcn32s" in refused(
        capsys, "--from", path, "--model", "unet", "--classes", 3
    )
    assert "only an FCN has it" in refused(
        capsys, "--from", path, "--model", "frontend", "--classes", 3, "--learned-upsampling"
    )
    assert "is the file to convert" in refused(capsys, *given, "--classes", 3, "--out", path)
    assert "no such file" in refused(
        capsys, "--from", tmp_path / "no.caffemodel", "--model", "fcn8s", "--classes", 3
    )
    assert [p.name for p in tmp_path.iterdir()] == ["net.caffemodel"]


@pytest.mark.usefixtures("tiny")
def test_a_failed_write_keeps_the_old_checkpoint(write, tmp_path, monkeypatch):
    path, out = write(caffe.fcn_layers(32, CLASSES)), tmp_path / "a.pt"
    convert(path, "fcn32s", classes=CLASSES, out=out)
    before = out.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert(path, "fcn32s", classes=CLASSES, out=out)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "net.caffemodel"]


class Harm:
    """What a hostile pickle holds: loading it as code would run makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["net.caffemodel", "net.pth"])
def test_nothing_in_a_file_is_executed(tmp_path, capsys, name):
    harm = tmp_path / "harm"
    path = tmp_path / name
    for content in (
        pickle.dumps({"features.0.weight": Harm(harm)}, protocol=2),
        pickle.dumps(Harm(harm), protocol=0),
    ):
        path.write_bytes(content)
        refused(capsys, "--from", path, "--model", "fcn8s", "--classes", 3)
    torch.save({"features.0.weight": Harm(harm)}, path)
    refused(capsys, "--from", path, "--model", "fcn8s", "--classes", 3)
    assert not harm.exists()


@pytest.mark.usefixtures("tiny")
def test_a_file_cannot_choose_how_much_memory_a_network_takes(write, capsys):
    """Few bytes that claim a huge network: refused before it is built."""
    layers = caffe.dilated_layers("camvid", CLASSES)
    small = np.ones((2 * CLASSES, CLASSES, 3, 3), np.float32), np.ones(2 * CLASSES, np.float32)
    layers = changed(layers, "ctx_conv1_1", blobs=list(small))
    deep = [
        Layer(f"ctx_conv{i}_1", "Convolution", ("x",), ("x",), {}, list(small))
        for i in range(6, 12)
    ]
    words = ("--model", "dilatednet", "--classes", CLASSES, "--mean", 1, 2, 3)
    message = refused(capsys, "--from", write(layers + deep), *words)
    assert "ctx_conv11_1: expected a weight of shape" in message or "and" in message
    deeper = [
        Layer(f"ctx_conv{i}_1", "Convolution", ("x",), ("x",), {}, list(small))
        for i in range(6, 300)
    ]
    message = refused(capsys, "--from", write(layers + deeper), *words)
    assert "at most 10 levels" in message
    wide = [np.ones((100_000, 1), np.float32), np.ones(100_000, np.float32)]
    layers = changed(caffe.fcn_layers(8, CLASSES), "fc6", blobs=wide)
    message = refused(capsys, "--from", write(layers), "--model", "fcn8s", "--classes", CLASSES)
    assert "fc7: expected a weight of shape (100000, 100000, 1, 1)" in message


@pytest.mark.parametrize("generation", ["current", "v1"])
def test_fuzz(write, generation):
    """Mutated files load whole, or are refused in one line; the model never holds a part."""
    layers = caffe.fcn_layers(32, 1)
    if generation == "v1":
        layers = [layer for layer in layers if layer.type not in ("Crop", "Python")]
    content = caffe.encode(layers, generation, "legacy" if generation == "v1" else "current")
    random = np.random.default_rng(7)
    model = models.fcn32s(1, TINY)
    path = write(layers)
    outcomes = {"loaded": 0, "damaged": 0, "unfit": 0}
    for _ in range(200):
        path.write_bytes(mutated(content, random))
        before = [p.clone() for p in model.parameters()]
        try:
            report = load_caffemodel(model, path)
        except ValueError as error:
            text = str(error)
            outcomes["damaged" if isinstance(error, CaffeModelError) else "unfit"] += 1
            assert all(map(torch.equal, before, model.parameters()))
        else:
            text = ""
            outcomes["loaded"] += 1
            names = {
                layer.name or "a layer without a name" for layer in read_caffemodel(path).layers
            }
            assert {*report.loaded, *report.unused} == names
        assert "\n" not in text
    assert min(outcomes.values()) > 5, outcomes
