# SPDX-License-Identifier: Apache-2.0
"""The released networks by name: sizes, geometry, classes and input of each."""

import pytest
import torch

from dilseg import models
from dilseg.data import DATASETS, dataset_classes
from dilseg.models import PUBLISHED, published
from dilseg.models.backbones import output_size

VGG_TRUNK = 134_260_544  # conv1_1 to fc7; 4096 channels are scored


def fcn_parameters(classes: int, skips: tuple[int, ...] = (), trunk: int = VGG_TRUNK) -> int:
    return trunk + sum((width + 1) * classes for width in (4096, *skips))


POOL4, POOL3 = 512, 256
FCN = {  # name: (stride, crop, receptive field, parameters)
    "fcn32s-heavy-pascal": (32, 19, 404, fcn_parameters(21)),
    "fcn16s-heavy-pascal": (16, 27, 404, fcn_parameters(21, (POOL4,))),
    "fcn8s-heavy-pascal": (8, 31, 404, fcn_parameters(21, (POOL4, POOL3))),
    "fcn8s-atonce-pascal": (8, 31, 404, fcn_parameters(21, (POOL4, POOL3))),
    "fcn-alexnet-pascal": (32, 18, 355, 56_954_261),
    "fcn-googlenet-pascal": (32, 16, 715, 5_973_552 + 1025 * 21),
    "nyud-fcn32s-color-heavy": (32, 19, 404, fcn_parameters(40)),
    "nyud-fcn32s-hha-heavy": (32, 19, 404, fcn_parameters(40)),
    "nyud-fcn32s-color-d": (32, 19, 404, fcn_parameters(40) + 64 * 9),
    "nyud-fcn32s-color-hha-heavy": (32, 19, 404, 2 * fcn_parameters(40)),
    "siftflow-fcn32s-heavy": (32, 19, 404, fcn_parameters(36)),
    "siftflow-fcn16s-heavy": (16, 27, 404, fcn_parameters(36, (POOL4,))),
    "siftflow-fcn8s-heavy": (8, 31, 404, fcn_parameters(36, (POOL4, POOL3))),
    "pascalcontext-fcn32s-heavy": (32, 19, 404, fcn_parameters(60)),
    "pascalcontext-fcn16s-heavy": (16, 27, 404, fcn_parameters(60, (POOL4,))),
    "pascalcontext-fcn8s-heavy": (8, 31, 404, fcn_parameters(60, (POOL4, POOL3))),
}


def basic(classes: int, layers: int) -> int:
    """Parameters of a Basic context module: 3x3 layers that keep the classes, and one of 1x1."""
    return (layers - 1) * (9 * classes * classes + classes) + classes * classes + classes


DILATED = {  # name: (cells, context's parameters, receptive field in cells, input, output)
    "dilation8_pascal_voc": (67, 6_803_139, (900, 900), (66, 66)),
    "dilation8_camvid": (67, basic(11, 8), (900, 1100), (66, 91)),
    "dilation7_kitti": (35, basic(11, 7), (852, 1640), (60, 159)),
    "dilation10_cityscapes": (259, basic(19, 10), (1396, 1396), (128, 128)),
}


def build(name):
    with torch.device("meta"):
        return published(name)


def test_every_released_network_is_here():
    assert set(PUBLISHED) == {*FCN, *DILATED}
    assert {name for name, entry in PUBLISHED.items() if not entry.released} == {
        "fcn-googlenet-pascal",
        "nyud-fcn32s-color-d",
    }


@pytest.mark.parametrize("name", FCN)
def test_fcn(name):
    stride, crop, receptive_field, parameters = FCN[name]
    net = build(name)
    assert (net.output_stride, net.crop, net.receptive_field) == (stride, crop, receptive_field)
    assert sum(p.numel() for p in net.parameters()) == parameters
    offsets = {32: {}, 16: {"score_pool4": 5}, 8: {"score_pool4": 5, "score_pool3": 9}}[stride]
    assert getattr(net, "skip_offsets", {}) == offsets
    images = torch.empty(1, net.in_channels, 50, 63, device="meta")
    assert net(images).shape == (1, net.num_classes, 50, 63)


@pytest.mark.parametrize("name", DILATED)
def test_dilatednet(name):
    cells, parameters, size, expected = DILATED[name]
    net = build(name)
    assert net.margin == 186
    assert net.front_end.receptive_field == 380
    assert net.context.receptive_field == cells
    assert sum(p.numel() for p in net.context.parameters()) == parameters
    trunk = net.front_end.layers
    assert tuple(output_size(trunk, side) for side in size) == expected
    scores = torch.empty(1, net.num_classes, *expected, device="meta")
    assert net.context(scores).shape == scores.shape
    assert sum(p.numel() for p in net.front_end.parameters()) == fcn_parameters(net.num_classes)


def test_the_forms_of_the_dilatednets():
    voc, city = build("dilation8_pascal_voc"), build("dilation10_cityscapes")
    assert [conv.padding[0] for conv in voc.context.children()] == [33] + [0] * 7
    assert [conv.dilation[0] for conv in city.context.children()] == [
        1, 1, 2, 4, 8, 16, 32, 64, 1, 1,
    ]  # fmt: skip
    assert all(conv.padding == conv.dilation for conv in list(city.context.children())[:-1])
    # Upsampling in the net: a deconvolution of kernel 16, stride 8, padding 4.
    assert (city.border, voc.border) == ("zero", "clamp")


@pytest.mark.parametrize("name", PUBLISHED)
def test_classes_and_input_are_those_of_the_data(name):
    entry, net = PUBLISHED[name], build(name)
    assert entry.data in DATASETS
    assert len(dataset_classes(entry.data)[0]) == entry.num_classes == net.num_classes
    assert len(net.normalization.mean) == net.in_channels
    assert net.normalization == entry.normalization


def test_input_conventions():
    """What the authors' data layers subtract, in the order of this package's channels."""

    def means(name):
        return [round(255 * value, 3) for value in build(name).normalization.mean]

    assert means("fcn8s-heavy-pascal") == [122.679, 116.669, 104.007]
    assert means("nyud-fcn32s-hha-heavy") == [132.431, 94.076, 118.477]
    assert means("nyud-fcn32s-color-d") == [92.318, 97.203, 116.19, 7.844]
    assert means("nyud-fcn32s-color-hha-heavy") == [
        92.318, 97.203, 116.19, 132.431, 94.076, 118.477,
    ]  # fmt: skip
    assert means("dilation10_cityscapes") == [73.16, 82.91, 72.39]


def test_options_take_precedence():
    net = published("siftflow-fcn16s-heavy", backbone="demo", dropout=0.1)
    assert net.backbone.name == "demo"
    assert net.heads == {"sem": 33, "geo": 3}
    assert net.dropout.p == 0.1
    with pytest.raises(ValueError, match=r"one of fcn32s-heavy-pascal, .*but got 'fcn4s'"):
        models.published("fcn4s")
