"""Training samples: the same for the same index, only of subjects that may be trained on, and never always centred."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samed3d.config import DataConfig
from samed3d.crops import sample_crop
from samed3d.data import sampling
from samed3d.data.augment import augment_intensity, orient
from samed3d.data.corpus import CaseRecord, LabelRecord, in_validation
from samed3d.data.sampling import LARGEST_CROP, MIN_TARGET_VOXELS, CropDataset, object_frame, sample_mask
from samed3d.errors import InputError
from samed3d.geometry import CropFrame, bounding_region
from tests.corpus_sources import store_case, store_corpus

SHAPE = (24, 30, 36)
SPACING = (2.0, 1.0, 1.0)
SUBJECTS = [f"p{i}" for i in range(8)]


def case_of(source: str, subject: str, *, has_image: bool = True) -> tuple[CaseRecord, np.ndarray | None, np.ndarray]:
    """Two cuboids, 1 bright and 2 dark, somewhere in noise."""
    rng = np.random.default_rng([ord(c) for c in source + subject])
    labels = np.zeros(SHAPE, np.uint8)
    for value, start, size in ((1, rng.integers(1, 6, 3), (7, 10, 9)), (2, rng.integers(13, 16, 3), (6, 8, 12))):
        labels[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))] = value
    image = (rng.normal(0, 0.2, SHAPE) + np.choose(labels, [0, 3, -3])).astype(np.float32) if has_image else None
    records = [
        LabelRecord(
            v, f"s{v}", int((labels == v).sum()), bounding_region(labels == v), points=np.argwhere(labels == v)[::7]
        )
        for v in (1, 2)
    ]
    return CaseRecord(f"{source}.{subject}", source, subject, "CT", SHAPE, SPACING, has_image, records), image, labels


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources ``a`` and ``b`` with eight subjects each, and label maps ``m``."""
    folder = tmp_path_factory.mktemp("corpus")
    made = [case_of(s, p) for s in "ab" for p in SUBJECTS] + [case_of("m", p, has_image=False) for p in SUBJECTS]
    for case, image, labels in made:
        store_case(folder, case.source, case.subject, image, labels, SPACING)
    return store_corpus(folder)


def config_of(corpus: Path, **changes) -> DataConfig:
    settings = {
        "corpus": [str(corpus)],
        "synthetic_share": 0.0,
        "crop": (16, 16, 16),
        "fill": (0.4, 0.9),
        "validation_share": 0.3,
    }
    return DataConfig(**(settings | changes))


def same(one: dict, other: dict) -> bool:
    return (
        one["case"] == other["case"]
        and torch.equal(one["image"], other["image"])
        and torch.equal(one["target"], other["target"])
    )


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_sample_depends_on_its_seed_and_index_only(corpus, share):
    config = config_of(corpus, synthetic_share=share)
    dataset = CropDataset(config, 8, seed=3)
    forward = [dataset[i] for i in range(8)]
    torch.manual_seed(99)
    again = CropDataset(config, 8, seed=3)
    assert all(same(again[i], forward[i]) for i in reversed(range(8)))
    late = CropDataset(config, 5, seed=3, start=3)
    assert len(late) == 5 and all(same(late[i], forward[i + 3]) for i in range(5))
    other = CropDataset(config, 8, seed=4)
    assert not any(same(other[i], forward[i]) for i in range(8))
    assert not any(same(forward[i], forward[j]) for i in range(8) for j in range(i))


def test_workers_give_the_same_samples(corpus):
    dataset = CropDataset(config_of(corpus, synthetic_share=0.5), 6, seed=0)
    alone, spread = (list(DataLoader(dataset, 2, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(spread) == 3 and all(same(a, b) for a, b in zip(alone, spread, strict=True))


def test_a_sample_is_what_the_step_takes(corpus):
    sample = CropDataset(config_of(corpus, crop=(16, 24, 8)), 1, seed=0)[0]
    assert sample["image"].shape == (2, 16, 24, 8) and sample["image"].dtype == torch.float32
    assert sample["target"].shape == (1, 16, 24, 8) and sample["target"].dtype == torch.bool
    assert CropDataset(config_of(corpus), 1, seed=0, normalisation="zscore")[0]["image"].shape == (1, 16, 16, 16)


def test_held_out_sources_and_validation_subjects_are_never_drawn(corpus):
    config = config_of(corpus, hold_out=["b"], synthetic_share=0.5, validation_share=0.5)
    held_out = {p for p in SUBJECTS if in_validation(p, 0.5)}
    assert 0 < len(held_out) < len(SUBJECTS), "the split must divide the subjects of this test"
    dataset = CropDataset(config, 1, seed=0)
    reachable = {case.id for _, case, _ in [*dataset.real, *dataset.maps]}
    assert reachable == {f"{s}.{p}" for s in "am" for p in SUBJECTS if p not in held_out}
    many = CropDataset(config, 60, seed=0)
    drawn = Counter(many[i]["case"] for i in range(60))
    assert set(drawn) - {"generated"} <= reachable and len(drawn) > len(reachable) / 2
    assert drawn["generated"] > 0 and any(name.startswith("m.") for name in drawn)


def test_every_crop_holds_its_target_and_more_than_the_target(corpus):
    dataset = CropDataset(config_of(corpus, synthetic_share=0.3, fill=(0.1, 3.0)), 40, seed=1)
    for index in range(40):
        sample = dataset[index]
        assert MIN_TARGET_VOXELS <= int(sample["target"].sum()) and torch.isfinite(sample["image"]).all()


def test_the_target_lies_anywhere_in_the_crop(corpus):
    dataset = CropDataset(config_of(corpus), 60, seed=0)
    offsets = torch.stack([dataset[i]["target"][0].nonzero().float().mean(dim=0) - 7.5 for i in range(60)])
    assert (offsets.std(dim=0) > 1.0).all(), "not always centred"
    assert (offsets.mean(dim=0).abs() < 1.5).all(), "and not always on one side"
    assert (offsets.abs() < 0.5).all(dim=1).float().mean() < 0.2


def test_the_target_shows_the_structure_it_names(corpus):
    """The noise is small, so the crop's rank inside the target is far from that outside, with the right sign
    somewhere."""
    dataset = CropDataset(config_of(corpus), 20, seed=0)
    steps = []
    for index in range(20):
        sample = dataset[index]
        inside = sample["target"][0]
        steps.append(float(sample["image"][0][inside].mean() - sample["image"][0][~inside].mean()))
    assert np.median(np.abs(steps)) > 1.0 and min(steps) < -0.5 and max(steps) > 0.5


def test_the_object_fills_the_drawn_share_of_the_crop():
    case, _, _ = case_of("a", "p0")
    record = case.labels[0]  # 7 x 10 x 9 voxels of 2 x 1 x 1 mm: 14 mm at its longest
    fills = []
    for seed in range(200):
        config = DataConfig(crop=(16, 16, 16), fill=(0.5, 1.0))
        frame = object_frame(case, record, config, np.random.default_rng(seed))
        fills.append([14.0 / (e * s) for e, s in zip(frame.extent_zyx_vox, SPACING, strict=True)])
    middle = np.exp(np.log(fills).mean(axis=1))
    assert 0.5 * math.exp(-0.15) <= np.min(fills) and np.max(fills) <= math.exp(0.15)
    assert middle.min() < 0.6 and middle.max() > 0.9
    assert np.median(middle) == pytest.approx(math.sqrt(0.5), abs=0.06), "log-uniform"


def test_a_crop_is_never_much_larger_than_the_volume():
    case, _, _ = case_of("a", "p0")
    for seed in range(30):
        config = DataConfig(crop=(16, 16, 16), fill=(0.01, 0.02))
        frame = object_frame(case, case.labels[0], config, np.random.default_rng(seed))
        assert (
            max(e * s for e, s in zip(frame.extent_zyx_vox, SPACING, strict=True))
            <= LARGEST_CROP * 48.0 * math.exp(0.15) + 1e-6
        )


def test_the_crop_is_placed_around_the_object():
    case, _, labels = case_of("a", "p0")
    config = DataConfig(crop=(16, 16, 16), fill=(0.5, 0.9))
    for seed in range(40):
        frame = object_frame(case, case.labels[1], config, np.random.default_rng(seed))
        assert sample_mask(labels, [2], frame).sum() >= MIN_TARGET_VOXELS


def test_crops_of_a_long_object_lie_along_all_of_it():
    """An object twice as long as the crop: the middle lies between the object's middle and any of its voxels, far
    beyond the jitter."""
    labels = np.zeros((8, 8, 40), np.uint8)
    labels[3:5, 3:5, 2:38] = 1
    record = LabelRecord(1, "bar", 144, bounding_region(labels), points=np.argwhere(labels))
    case = CaseRecord("s.a", "s", "a", "CT", (8, 8, 40), (1.0, 1.0, 1.0), True, [record])
    config = DataConfig(crop=(16, 16, 16), fill=(2.0, 2.0))
    frames = [object_frame(case, record, config, np.random.default_rng(seed)) for seed in range(60)]
    middles = [f.to_volume((7.5, 7.5, 7.5))[2] for f in frames]
    assert min(middles) < 12 and max(middles) > 27 and abs(np.mean(middles) - 19.5) < 4
    jitter = 0.15 * 18 * math.exp(0.15)
    assert all(abs(f.to_volume((7.5, 7.5, 7.5))[0] - 3.5) < 0.5 + jitter for f in frames)


@pytest.mark.parametrize("seed", range(6))
def test_a_mask_on_a_frame_is_that_of_the_whole_map(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, SHAPE).astype(np.uint8)
    step = tuple(float(s) for s in rng.uniform(0.4, 3.0, 3))
    frame = CropFrame(tuple(float(v) for v in rng.uniform(-6, 20, 3)), step, (8, 9, 7))
    whole, _ = sample_crop(np.isin(labels, [1, 3]), frame)
    sure = (whole - 0.5).abs() > 1e-4  # rounding may fall on either side
    assert torch.equal(sample_mask(labels, [1, 3], frame)[sure], (whole > 0.5)[sure]) and sure.float().mean() > 0.9


def test_a_mask_far_outside_is_empty():
    assert not sample_mask(
        np.ones(SHAPE, np.uint8), [1], CropFrame((500.0, 0.0, 0.0), (1.0, 1.0, 1.0), (4, 4, 4))
    ).any()


def test_voxels_outside_the_volume_are_no_target(tmp_path):
    """A structure that meets the border does not go on beyond it."""
    labels = np.ones((8, 8, 8), np.uint8)
    image = np.random.default_rng(0).normal(0, 1, labels.shape).astype(np.float32)
    store_case(tmp_path, "s", "a", image, labels)
    dataset = CropDataset(
        DataConfig([str(store_corpus(tmp_path))], 0.0, (16, 16, 16), (0.83, 0.9), validation_share=0.0), 20, seed=0
    )
    for index in range(20):
        sample = dataset[index]
        outside = (sample["image"] == 0).all(dim=0)
        assert outside.any() and not sample["target"][0][outside].any()
        assert torch.equal(sample["target"][0], ~outside)


def test_a_target_may_join_several_structures(corpus, monkeypatch):
    """With the chance at one, some targets show both the bright and the dark cuboid."""
    monkeypatch.setattr(sampling, "UNION_PROBABILITY", 1.0)
    seen = []
    draw = sampling.sample_mask
    monkeypatch.setattr(
        sampling,
        "sample_mask",
        lambda labels, values, frame: (seen.append(tuple(values)), draw(labels, values, frame))[1],
    )
    dataset = CropDataset(config_of(corpus), 20, seed=0)
    for index in range(20):
        dataset[index]
    assert set(seen) == {(1,), (2,), (1, 2)}


def test_generated_samples_need_no_corpus():
    dataset = CropDataset(DataConfig(crop=(16, 16, 16)), 6, seed=0)
    for index in range(6):
        sample = dataset[index]
        assert sample["case"] == "generated" and sample["target"].sum() >= MIN_TARGET_VOXELS


def test_nothing_left_to_train_on_is_named(corpus):
    with pytest.raises(
        InputError, match=r"no labelled image is left for training in .*; check data.hold_out, data.validation_share$"
    ):
        CropDataset(config_of(corpus, hold_out=["a", "b"]), 1, seed=0)


def test_a_target_that_is_always_too_small_ends_in_an_error(corpus, monkeypatch):
    monkeypatch.setattr(sampling, "MIN_TARGET_VOXELS", 10**6)
    with pytest.raises(InputError, match=r"no target of 1000000 voxels in 20 attempts at sample 7"):
        CropDataset(config_of(corpus), 5, seed=0, start=5)[2]


# Augmentation


def test_all_volumes_are_turned_alike_and_only_cubes_change_axes(rng):
    cube, box = torch.arange(64).view(4, 4, 4), torch.arange(60).view(3, 4, 5)
    seen = set()
    for _ in range(200):
        one, other = orient([cube, cube * 2], rng)
        assert torch.equal(one * 2, other)
        seen.add(tuple(one.flatten().tolist()))
        turned = orient([box], rng)[0]
        assert any(torch.equal(turned, box.flip([a for a in range(3) if bits >> a & 1])) for bits in range(8))
    assert len(seen) > 20, "flips and orders of axes"


def test_intensities_change_with_the_seed_and_stay_finite():
    image = torch.randn(12, 12, 12, generator=torch.Generator().manual_seed(0)) * 100 - 300
    inside = torch.ones_like(image, dtype=torch.bool)
    kept = image.clone()
    results = [augment_intensity(image, inside, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert torch.equal(image, kept), "the argument is left as it was"
    assert all(r.shape == image.shape and torch.isfinite(r).all() for r in results)
    assert torch.equal(results[3], augment_intensity(image, inside, torch.Generator().manual_seed(3)))
    assert 0 < sum(torch.equal(r, image) for r in results) < 15
    turned = [float(torch.corrcoef(torch.stack([r.flatten(), image.flatten()]))[0, 1]) < 0 for r in results]
    assert 1 <= sum(turned) <= 12, "contrast is inverted now and then"


def test_degenerate_images_pass_through():
    flat = torch.full((6, 6, 6), 7.0)
    for inside in (torch.ones(6, 6, 6, dtype=torch.bool), torch.zeros(6, 6, 6, dtype=torch.bool)):
        assert torch.equal(augment_intensity(flat, inside, torch.Generator().manual_seed(0)), flat)
