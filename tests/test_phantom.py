"""The phantom is a patient: every organ there, whole, of a plausible size and on its proper side, with exact and
repeatable labels."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from samed3d.data.phantom import anatomical_phantom, organ_names

COARSE = {"shape_zyx": (48, 80, 88), "spacing_xyz_mm": (4.4, 4.4, 8.0)}

PLAUSIBLE_ML = {
    "right lung": (1500, 3500),
    "left lung": (1500, 3500),
    "heart": (350, 900),
    "liver": (900, 1900),
    "gallbladder": (12, 70),
    "stomach": (120, 450),
    "spleen": (80, 300),
    "right kidney": (80, 260),
    "left kidney": (80, 260),
    "spine": (450, 1100),
    "aorta": (80, 260),
}
PLAUSIBLE_HU = {
    "right lung": (-860, -700),
    "liver": (80, 120),
    "spleen": (90, 130),
    "left kidney": (120, 185),
    "spine": (200, 550),
    "aorta": (130, 240),
    "gallbladder": (-15, 45),
}


def patient(seed: int, **settings):
    return anatomical_phantom(np.random.default_rng(seed), **{**COARSE, **settings})


@pytest.fixture(scope="module")
def patients():
    return [patient(seed) for seed in range(3)]


def centroid_ras(labels, grid, number):
    z, y, x = (float(np.mean(v)) for v in np.nonzero(labels == number))
    return grid.ijk_to_ras_mm((x, y, z))


def test_same_seed_same_patient(patients) -> None:
    image, labels, grid, names = patient(0)
    assert np.array_equal(image, patients[0][0]) and np.array_equal(labels, patients[0][1])
    assert grid == patients[0][2] and names == patients[0][3]
    assert not np.array_equal(image, patients[1][0])


def test_types_and_grid(patients) -> None:
    image, labels, grid, _ = patients[0]
    assert image.dtype == np.int16 and labels.dtype == np.uint8
    assert image.shape == labels.shape == grid.shape_zyx == COARSE["shape_zyx"]
    assert grid.spacing_xyz_mm == COARSE["spacing_xyz_mm"]
    assert all(abs(v) > 1 for v in grid.origin_lps_mm)
    assert image.min() >= -1024 and image.max() < 2000


def test_every_organ_is_there_in_one_piece_of_plausible_size(patients) -> None:
    for _, labels, grid, names in patients:
        assert names == organ_names() and set(names.values()) == set(PLAUSIBLE_ML)
        voxel_ml = float(np.prod(grid.spacing_xyz_mm)) / 1000
        for number, name in names.items():
            mask = labels == number
            assert ndimage.label(mask)[1] == 1, name
            low, high = PLAUSIBLE_ML[name]
            assert low < mask.sum() * voxel_ml < high, name
        assert set(np.unique(labels)) == {0, *names}


def test_hounsfield_units_are_those_of_the_organ(patients) -> None:
    for image, labels, _, names in patients:
        for number, name in names.items():
            if name in PLAUSIBLE_HU:
                low, high = PLAUSIBLE_HU[name]
                assert low < image[labels == number].mean() < high, name


def test_organs_lie_on_their_side(patients) -> None:
    for _, labels, grid, names in patients:
        at = {name: centroid_ras(labels, grid, number) for number, name in names.items()}
        assert at["liver"][0] > at["spleen"][0] + 100, "RAS x grows to the patient's right, where the liver is"
        assert at["right lung"][0] > at["heart"][0] > at["left lung"][0]
        assert at["right kidney"][0] > at["aorta"][0] > at["left kidney"][0]
        assert at["spine"][1] < at["aorta"][1] < at["stomach"][1], "RAS y grows to the front"
        assert at["right lung"][2] > at["liver"][2] > at["right kidney"][2], "RAS z grows to the head"


def test_oblique_grid_is_a_rotation_and_the_straight_one_is_not_turned(patients) -> None:
    turned = np.reshape(patients[0][2].direction_lps, (3, 3))
    assert np.allclose(turned @ turned.T, np.eye(3), atol=1e-12) and np.linalg.det(turned) == pytest.approx(1)
    assert np.degrees(np.arccos(np.diag(turned))).max() > 1.5
    straight = patient(0, oblique=False)[2]
    assert straight.direction_lps == (1, 0, 0, 0, 1, 0, 0, 0, 1)


def test_patient_keeps_its_size_on_another_grid() -> None:
    volumes = []
    for shape, spacing in (((48, 80, 88), (4.4, 4.4, 8.0)), ((60, 88, 100), (4.0, 4.0, 6.0))):
        _, labels, grid, names = anatomical_phantom(np.random.default_rng(4), shape_zyx=shape, spacing_xyz_mm=spacing)
        number = next(n for n, name in names.items() if name == "liver")
        volumes.append((labels == number).sum() * float(np.prod(grid.spacing_xyz_mm)))
    assert volumes[0] == pytest.approx(volumes[1], rel=0.4)


def test_small_field_of_view_names_only_what_it_shows() -> None:
    _, labels, _, names = anatomical_phantom(
        np.random.default_rng(0), shape_zyx=(8, 60, 60), spacing_xyz_mm=(4.0, 4.0, 4.0)
    )
    assert set(np.unique(labels)) == {0, *names}
    assert "heart" not in names.values()
