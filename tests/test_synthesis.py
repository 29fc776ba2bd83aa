"""Generated volumes: reproducible from their generator alone, varied, and not separable by one threshold."""

from __future__ import annotations

import pytest
import torch

from samed3d.data.random_shapes import KINDS, MAX_STRUCTURES, noise_field, random_labels
from samed3d.data.synthesis import deform_labels, render, synthetic_case
from samed3d.errors import InputError

SHAPE = (20, 28, 24)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_labels_are_numbered_without_gaps(kind: str | None) -> None:
    for seed in range(6):
        labels, n = random_labels(SHAPE, seeded(seed), kind=kind)
        assert labels.shape == SHAPE and labels.dtype == torch.int16
        assert 2 <= n <= MAX_STRUCTURES
        assert set(labels.unique().tolist()) | {0} == set(range(n + 1))


def test_same_seed_same_case_whatever_the_global_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = synthetic_case(SHAPE, seeded(5))
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    torch.manual_seed(2)
    second = synthetic_case(SHAPE, seeded(5))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[1], synthetic_case(SHAPE, seeded(6))[1])


def test_images_are_finite_and_never_constant() -> None:
    for seed in range(25):
        image, labels = synthetic_case(SHAPE, seeded(seed))
        assert image.shape == labels.shape == SHAPE and image.dtype == torch.float32
        assert torch.isfinite(image).all()
        assert image.std() > 1e-3


def test_structures_differ_in_contrast_sign_and_size() -> None:
    signs, shares = [], []
    for seed in range(40):
        image, labels = synthetic_case(SHAPE, seeded(seed))
        mask = labels == 1
        signs.append(bool(image[mask].mean() > image[~mask].mean()))
        shares.append(float(mask.float().mean()))
    assert 8 <= sum(signs) <= 32
    assert min(shares) < 0.02 and max(shares) > 0.3


def test_one_threshold_rarely_finds_a_structure() -> None:
    """Best Dice over all thresholds of either sign; a model must look at borders, not at values."""
    best = []
    for seed in range(20):
        image, labels = synthetic_case(SHAPE, seeded(seed))
        mask = (labels == 1).flatten()
        order = image.flatten().argsort()
        hits = mask[order].cumsum(0)
        below = torch.arange(1, hits.numel() + 1)
        dice_below = 2 * hits / (below + hits[-1])
        dice_above = 2 * (hits[-1] - hits) / (hits.numel() - below + hits[-1])
        best.append(float(torch.maximum(dice_below, dice_above).max()))
    assert sum(b > 0.9 for b in best) < 10


def test_structures_are_visible() -> None:
    """Most often the step across a structure's border is greater than the step between neighbours inside it."""
    seen = 0
    for seed in range(30):
        image, labels = synthetic_case((32, 32, 32), seeded(seed))
        step = (image[..., 2:] - image[..., :-2]).abs()
        border = labels[..., 2:] != labels[..., :-2]
        seen += bool(step[border].mean() > 1.2 * step[~border].mean())
    assert seen >= 20


def test_given_labels_are_only_rendered_unless_asked() -> None:
    given = torch.zeros(SHAPE, dtype=torch.int64)
    given[5:15, 5:20, 5:12] = 7
    image, labels = synthetic_case(SHAPE, seeded(0), given)
    assert torch.equal(labels.long(), given) and image.shape == SHAPE
    _, bent = synthetic_case(SHAPE, seeded(0), given, deform=True)
    assert not torch.equal(bent.long(), given)
    assert set(bent.unique().tolist()) == {0, 7}
    assert 0.3 < float((bent == 7).sum() / (given == 7).sum()) < 3


def test_deformation_without_strength_only_flips() -> None:
    labels, _ = random_labels(SHAPE, seeded(3))
    bent = deform_labels(labels, seeded(4), strength=0.0)
    flips = [[a for a in range(3) if bits >> a & 1] for bits in range(8)]
    assert sum(torch.equal(bent, labels.flip(axes)) for axes in flips) == 1


def test_render_reads_empty_and_sparse_label_maps() -> None:
    empty = torch.zeros(SHAPE, dtype=torch.uint8)
    assert torch.isfinite(render(empty, seeded(0))).all()
    sparse = empty.clone()
    sparse[2:9] = 200
    assert render(sparse, seeded(0)).shape == SHAPE


@pytest.mark.parametrize("cells", [1.0, 4.5, 12.0, (2.0, 9.0, 3.0)])
def test_noise_has_unit_variance_everywhere(cells: float | tuple[float, float, float]) -> None:
    field = noise_field(600, (9, 10, 11), cells, seeded(0))
    assert field.shape == (600, 9, 10, 11)
    assert torch.allclose(field.var(0), torch.ones(9, 10, 11), atol=0.35)
    assert abs(float(field.mean())) < 0.1


def test_fewer_waves_are_smoother() -> None:
    rough, smooth = (noise_field(8, (32, 32, 32), cells, seeded(0)).diff(dim=3).std() for cells in (14.0, 2.0))
    assert smooth < rough / 3


def test_bad_arguments_are_named() -> None:
    with pytest.raises(InputError, match="kind must be one of cells, blobs"):
        random_labels(SHAPE, seeded(0), kind="cubes")
    with pytest.raises(InputError, match="at least 8 voxels"):
        random_labels((4, 32, 32), seeded(0))
