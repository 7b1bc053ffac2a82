# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from dilseg.data import (
    IGNORE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augmented,
    CenterCrop,
    Compose,
    RandomCrop,
    RandomHorizontalFlip,
    RandomScale,
    RandomVoid,
    ReflectPad,
    Shapes,
    collate,
    image_to_tensor,
    to_tensors,
)

SIZES = [(1, 1), (1, 9), (7, 5), (31, 64)]
RANDOM = [
    RandomScale(0.5, 2.0),
    RandomCrop((20, 33)),
    RandomHorizontalFlip(),
    RandomVoid(0.5, 4),
    Compose([RandomScale(0.5, 2.0), RandomHorizontalFlip(), RandomCrop((24, 24))]),
]
ALL = [*RANDOM, ReflectPad(4), ReflectPad((0, 90, 3, 1)), CenterCrop((16, 40)), Compose([])]


def _rng(seed=0):
    return np.random.default_rng(seed)


def _painted(h, w, seed=0):
    """Blocks of random labels; the image shows each pixel's label as its colour."""
    blocks = _rng(seed).integers(0, 5, (-(-h // 8), -(-w // 8)))
    label = blocks.repeat(8, 0).repeat(8, 1)[:h, :w].astype(np.uint8)
    return np.repeat(label[..., None] * np.uint8(50), 3, axis=2), label


@pytest.mark.parametrize("transform", ALL, ids=repr)
@pytest.mark.parametrize("size", SIZES)
def test_image_and_label_keep_one_size_and_their_types(transform, size):
    image, label = _painted(*size)
    before = image.copy(), label.copy()
    new_image, new_label = transform(image, label, _rng())
    assert new_image.shape == (*new_label.shape, 3)
    assert new_image.dtype == new_label.dtype == np.uint8
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(label, before[1])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_image_and_label_stay_aligned(transform, axis):
    # The label is a pixel's row or column, and so is its colour. Resampling a ramp bilinearly keeps
    # it; the nearest label is off by half a pixel at most, rounding and the border add a little.
    ramp = np.indices((61, 83))[axis].astype(np.uint8)
    for seed in range(10):
        image, label = transform(np.repeat(ramp[..., None], 3, axis=2), ramp, _rng(seed))
        valid = label != IGNORE
        assert valid.any()
        off = np.abs(image[valid].astype(int) - label[valid].astype(int)[:, None])
        assert off.max() <= (1 if "Scale" in repr(transform) else 0)


@pytest.mark.parametrize("transform", RANDOM, ids=repr)
def test_the_generator_alone_decides(transform):
    image, label = _painted(61, 83)
    results = []
    for seed in (1, 1, 2, 3, 4, 5):
        new_image, new_label = transform(image, label, _rng(seed))
        results.append(new_image.tobytes() + new_label.tobytes())
    assert results[0] == results[1]
    assert len(set(results)) > 1


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.7, 2.0])
@pytest.mark.parametrize("size", SIZES)
def test_scale_sizes(factor, size):
    _, label = RandomScale(factor, factor)(*_painted(*size), _rng())
    assert label.shape == tuple(max(1, round(n * factor)) for n in size)


def test_scale_agrees_with_torch():
    image, label = Shapes("val")[0]
    new_image, new_label = RandomScale(0.4, 0.4)(image, label, _rng())
    planes = torch.tensor(image).permute(2, 0, 1)[None].double()
    wanted = torch.nn.functional.interpolate(planes, (38, 38), mode="bilinear", antialias=True)
    assert np.abs(new_image - wanted[0].permute(1, 2, 0).numpy()).max() < 1.5
    nearest = torch.nn.functional.interpolate(
        torch.tensor(label)[None, None], (38, 38), mode="nearest-exact"
    )
    np.testing.assert_array_equal(new_label, nearest[0, 0].numpy())


def test_scale_factors_span_the_range():
    image, label = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    rng = _rng()
    heights = [RandomScale(0.5, 2.0)(image, label, rng)[1].shape[0] for _ in range(60)]
    assert 50 <= min(heights) < 65
    assert 185 < max(heights) <= 200


def test_crop_reaches_every_place_and_fills_what_lies_outside():
    label = np.arange(12, dtype=np.uint8).reshape(3, 4)
    image = np.repeat(label[..., None], 3, axis=2)
    rng = _rng()
    corners = {RandomCrop((2, 2))(image, label, rng)[1][0, 0] for _ in range(100)}
    assert corners == {0, 1, 2, 4, 5, 6}

    places = set()
    for _ in range(100):
        new_image, new_label = RandomCrop((5, 4), fill=(9, 8, 7))(image, label, rng)
        rows = np.flatnonzero((new_label != IGNORE).all(axis=1))
        np.testing.assert_array_equal(new_label[rows], label)
        np.testing.assert_array_equal(new_image[rows], image)
        assert (new_image[new_label == IGNORE] == (9, 8, 7)).all()
        places.add(int(rows[0]))
    assert places == {0, 1, 2}


def test_crop_fill_is_zero_after_normalising():
    image, label = RandomCrop((8, 8))(*_painted(1, 1), _rng())
    tensor, label = to_tensors(image, label)
    assert tensor[:, label == IGNORE].abs().max() < 0.01


def test_center_crop():
    label = np.arange(5, dtype=np.uint8)[None]
    image = np.repeat(label[..., None], 3, axis=2)
    assert CenterCrop((1, 3))(image, label, _rng())[1].tolist() == [[1, 2, 3]]
    padded = CenterCrop((3, 5))(image, label, _rng())[1]
    assert padded.tolist() == [[255] * 5, [0, 1, 2, 3, 4], [255] * 5]


def test_flip():
    image, label = _painted(5, 20)
    flipped = RandomHorizontalFlip(1.0)(image, label, _rng())
    np.testing.assert_array_equal(flipped[0], image[:, ::-1])
    np.testing.assert_array_equal(flipped[1], label[:, ::-1])
    np.testing.assert_array_equal(RandomHorizontalFlip(0.0)(image, label, _rng())[0], image)
    rng = _rng()
    turned = sum(
        (RandomHorizontalFlip(0.3)(image, label, rng)[1] != label).any() for _ in range(300)
    )
    assert 60 < turned < 120


@pytest.mark.parametrize("margins", [(0, 0, 0, 0), (1, 2, 3, 4), (4, 4, 6, 6)])
def test_reflect_pad_agrees_with_numpy_and_torch(margins):
    image, label = Shapes("val", size=(5, 7))[0]
    top, bottom, left, right = margins
    new_image, new_label = ReflectPad(margins)(image, label, _rng())
    area = ((top, bottom), (left, right))
    np.testing.assert_array_equal(new_image, np.pad(image, (*area, (0, 0)), mode="reflect"))
    np.testing.assert_array_equal(new_label, np.pad(label, area, constant_values=IGNORE))
    planes = torch.tensor(image).permute(2, 0, 1).float()
    wanted = torch.nn.functional.pad(planes, (left, right, top, bottom), mode="reflect")
    np.testing.assert_array_equal(new_image, wanted.permute(1, 2, 0).byte().numpy())


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (3, 50)])
def test_reflect_pad_beyond_the_image(size):
    # torch refuses margins as large as the image; numpy repeats the mirror images, as we do.
    image, label = Shapes("val", size=size)[0]
    new_image, new_label = ReflectPad(186)(image, label, _rng())
    np.testing.assert_array_equal(
        new_image, np.pad(image, ((186, 186), (186, 186), (0, 0)), mode="reflect")
    )
    assert (new_label != IGNORE).sum() <= label.size


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomScale(0.0, 1.0), "expected 0 < low <= high, but got low 0.0 and high 1.0"),
        (lambda: RandomScale(2.0, 1.0), "expected 0 < low <= high"),
        (lambda: RandomScale(1.0, float("inf")), "expected 0 < low <= high"),
        (lambda: RandomCrop((0, 5)), r"RandomCrop: expected size .* but got \(0, 5\)"),
        (lambda: CenterCrop((5,)), "CenterCrop: expected size"),
        (lambda: RandomHorizontalFlip(1.5), r"expected p in \[0, 1\], but got 1.5"),
        (lambda: ReflectPad(-1), "expected margin >= 0"),
        (lambda: ReflectPad((1, 2)), "expected margin >= 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_to_tensors_normalises():
    image, label = Shapes("val", size=(9, 11))[0]
    tensor, target = to_tensors(image, label)
    assert tensor.shape == (3, 9, 11)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    wanted = (image / 255.0 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), wanted, atol=1e-5)
    assert target.dtype == torch.uint8
    np.testing.assert_array_equal(target.numpy(), label)
    raw = image_to_tensor(image, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))
    np.testing.assert_allclose(raw.permute(1, 2, 0).numpy(), image, rtol=1e-6)


def test_to_tensors_takes_views():
    image, label = Shapes("val", size=(9, 11))[0]
    flipped, _ = to_tensors(image[:, ::-1], label[:, ::-1])
    assert torch.equal(flipped, to_tensors(image, label)[0].flip(-1))


def test_to_tensors_rejects_what_is_no_sample():
    image, label = Shapes("val", size=(9, 11))[0]
    with pytest.raises(TypeError, match="image: expected dtype uint8"):
        to_tensors(image / 255.0, label)
    with pytest.raises(TypeError, match="label: expected dtype uint8, but got int64"):
        to_tensors(image, label.astype(np.int64))
    with pytest.raises(ValueError, match=r"label: expected shape .*\[9, 11\].* got \[9, 10\]"):
        to_tensors(image, label[:, :10])
    with pytest.raises(ValueError, match=r"image: expected shape \[h, w, 3\]"):
        image_to_tensor(label)


def _augmented(seed=0):
    transform = Compose([RandomScale(0.5, 1.5), RandomHorizontalFlip(), RandomCrop((24, 32))])
    return Augmented(Shapes("train", length=12, size=(40, 30)), transform, seed=seed)


def _same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_augmented_samples_depend_on_seed_epoch_and_index_alone():
    data, again = _augmented(), _augmented()
    first = [data[i] for i in range(12)]
    assert all(_same(again[i], first[i]) for i in reversed(range(12)))
    assert _same(data[-1], first[11])
    assert len(data) == 12
    assert not all(_same(_augmented(seed=1)[i], first[i]) for i in range(12))

    data.set_epoch(3)
    third = [data[i] for i in range(12)]
    assert not any(_same(a, b) for a, b in zip(first, third, strict=True))
    resumed = _augmented()
    resumed.set_epoch(3)
    assert all(_same(resumed[i], third[i]) for i in range(12))
    with pytest.raises(ValueError, match="expected epoch >= 0, but got -1"):
        data.set_epoch(-1)


def test_augmented_without_a_transform_returns_the_stored_sample():
    dataset = Shapes("val", length=2, size=(10, 12))
    image, label = Augmented(dataset)[1]
    wanted = to_tensors(*dataset[1])
    assert _same((image, label), wanted)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_change_nothing(persistent):
    def epochs(data, **options):
        loader = torch.utils.data.DataLoader(data, batch_size=5, collate_fn=collate, **options)
        for epoch in range(3):
            data.set_epoch(epoch)
            yield from ((x.clone(), y.clone()) for x, y in loader)

    alone = list(epochs(_augmented()))
    shared = list(epochs(_augmented(), num_workers=2, persistent_workers=persistent))
    assert len(alone) == len(shared) == 9
    assert all(_same(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_collate_pads_unequal_sizes(n):
    sizes = [(4, 7), (6, 2), (1, 1)][:n]
    batch = [
        (torch.full((3, h, w), 2.0), torch.full((h, w), i, dtype=torch.uint8))
        for i, (h, w) in enumerate(sizes)
    ]
    images, labels = collate(batch)
    h_max, w_max = max(h for h, _ in sizes), max(w for _, w in sizes)
    assert images.shape == (n, 3, h_max, w_max)
    assert labels.shape == (n, h_max, w_max)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.uint8
    for i, (h, w) in enumerate(sizes):
        assert (images[i, :, :h, :w] == 2).all()
        assert images[i].sum() == 2 * 3 * h * w
        assert (labels[i, :h, :w] == i).all()
        assert (labels[i] == IGNORE).sum() == h_max * w_max - h * w


def test_collate_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="at least one sample"):
        collate([])


@pytest.mark.parametrize(
    "transform",
    [
        RandomScale(0.5, 2.0),
        RandomHorizontalFlip(),
        ReflectPad(7),
        RandomCrop((9, 30), [1.0, 2.0, 3.0, 4.0, 5.0]),
        RandomVoid(0.5, 3),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_further_channels_and_label_maps_move_with_the_others(transform, dtype):
    """Each channel and each map as if it were transformed alone."""
    draw = np.random.default_rng(3)
    image = draw.integers(0, 200, (17, 21, 5)).astype(dtype)
    label = draw.integers(0, 4, (17, 21, 2)).astype(np.uint8)
    moved, maps = transform(image, label, np.random.default_rng(5))
    assert (moved.dtype, moved.shape) == (dtype, (*maps.shape[:2], 5))
    fills = getattr(transform, "fill", [None] * 5)
    for channel in range(5):
        alone = transform
        if isinstance(transform, RandomCrop):
            alone = RandomCrop(transform.size, [fills[channel]])
        one, _ = alone(image[..., channel : channel + 1], label[..., 0], np.random.default_rng(5))
        np.testing.assert_array_equal(one[..., 0], moved[..., channel])
    for index in range(2):
        _, one = transform(image, label[..., index], np.random.default_rng(5))
        np.testing.assert_array_equal(one, maps[..., index])
    mean, std = np.arange(5) / 5, np.full(5, 0.5)
    tensor, labels = to_tensors(moved, maps, mean, std)
    np.testing.assert_allclose(
        tensor.numpy(), ((moved / 255 - mean) / std).transpose(2, 0, 1), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(labels.numpy(), maps.transpose(2, 0, 1))
    images, both = collate([(tensor, labels), (tensor[:, :3], labels[:, :3])])
    assert images.shape == (2, *tensor.shape)
    assert both.shape == (2, *labels.shape)
    assert (both[1, :, 3:] == IGNORE).all()


def test_wrong_channels_are_named():
    image, label = np.zeros((4, 4, 4), np.float32), np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="fill: expected a value for each of the 4 channels"):
        RandomCrop((6, 6))(image, label, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"image: expected shape \[h, w, 3\], but got \[4, 4, 4\]"):
        image_to_tensor(image)
    with pytest.raises(TypeError, match="image: expected dtype uint8"):
        image_to_tensor(image[..., :3])


@pytest.mark.parametrize("cell", [1, 8])
def test_sampling_keeps_whole_cells_at_random(cell):
    image, label = _painted(80, 125)
    same, sampled = RandomVoid(0.25, cell)(image, label, _rng())
    assert same is image
    kept = sampled != IGNORE
    np.testing.assert_array_equal(sampled[kept], label[kept])
    cells = kept[::cell, ::cell]
    np.testing.assert_array_equal(kept, cells.repeat(cell, 0).repeat(cell, 1)[:80, :125])
    share, spread = cells.mean(), (0.25 * 0.75 / cells.size) ** 0.5
    assert abs(share - 0.25) < 4 * spread
    assert (RandomVoid(0.25, cell)(image, label, _rng(1))[1] != sampled).any()
    assert (RandomVoid(1.0, cell)(image, label, _rng())[1] == label).all()


@pytest.mark.parametrize(("keep", "cell"), [(0.0, 1), (1.5, 1), (0.5, 0)])
def test_sampling_checks_its_arguments(keep, cell):
    with pytest.raises(ValueError, match=r"expected (keep in|cell >= 1)"):
        RandomVoid(keep, cell)
