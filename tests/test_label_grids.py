"""A label map is placed by its header, whatever order its voxels are stored in, and is never mirrored."""

from __future__ import annotations

import gzip
import itertools
from dataclasses import replace

import numpy as np
import pytest

from data_prep.readers import find_sources, load_case
from samed3d.data.exposure import TrainingHistory
from samed3d.errors import InputError
from samed3d.evaluation.cases import find_cases
from samed3d.geometry import as_triple
from samed3d.inference.model_prompts import read_mask_file
from samed3d.prompts import Mask, PackedMask
from samed3d.volume import Volume, write_mask, write_volume
from samed3d.volume.label_maps import read_label_on
from samed3d.volume.writing import Segment, write_seg_nrrd
from tests.nnunet_tree import RAS, scene, stored_as, write_set

ORDERS = list(itertools.product(itertools.permutations(range(3)), itertools.product((False, True), repeat=3)))


@pytest.mark.parametrize("mismatch", ["refuse", "repair", "resample"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_a_label_in_any_storage_order_is_placed_by_position(tmp_path, suffix, mismatch):
    _, labels = scene(0)
    for axes, flips in ORDERS:
        write_mask(tmp_path / f"label{suffix}", *stored_as(labels, axes, flips))
        placed = read_label_on(tmp_path / f"label{suffix}", RAS, "image", mismatch=mismatch)
        np.testing.assert_array_equal(placed, labels, err_msg=f"{axes} {flips}")


def test_every_reader_of_labels_places_them_alike(tmp_path):
    image, labels = scene(0)
    folder = write_set(tmp_path / "set", {"a": 0}, labels={"background": 0, "bright": 1, "dark": 2, "speck": 3})
    flipped = folder / "labelsTr" / "a.nii.gz"
    write_mask(flipped, *stored_as(labels, (2, 0, 1), (True, False, True)))
    [(reader, _)] = find_sources([folder])
    [case] = reader.cases(folder)[0]
    for repair in (False, True):
        np.testing.assert_array_equal(load_case(case, repair_geometry=repair).layers[0].array, labels)
    [found] = find_cases([folder], TrainingHistory(), "all").cases
    np.testing.assert_array_equal(found.loaded().labels, labels)
    prior = read_mask_file(Mask(str(flipped)), Volume(image, RAS, "image"))
    np.testing.assert_array_equal(prior.mask.full(), labels > 0)


def shifted(grid, mm):
    return replace(grid, origin_lps_mm=as_triple(np.add(grid.origin_lps_mm, mm)))


@pytest.mark.parametrize(("axes", "flips"), [o for o in ORDERS if o[0] == (0, 1, 2)])
def test_a_repair_never_mirrors_a_label(tmp_path, axes, flips):
    _, labels = scene(0)
    array, grid = stored_as(labels, axes, flips)
    write_mask(tmp_path / "label.nii.gz", array, shifted(grid, (3.0, 0.0, 0.0)))
    with pytest.raises(InputError, match="image and label must share one grid"):
        read_label_on(tmp_path / "label.nii.gz", RAS, "image")
    repaired = read_label_on(tmp_path / "label.nii.gz", RAS, "image", mismatch="repair")
    expected = labels if not any(flips) else np.roll(labels, -3, axis=2)  # +3 mm LPS is 3 voxels to the right
    np.testing.assert_array_equal(repaired, expected)


def test_a_channel_with_other_axes_is_not_repaired(tmp_path):
    image, _ = scene(0)
    folder = write_set(tmp_path / "set", {"a": 0}, channels=2, channel_names={"0": "T1", "1": "T2"})
    array, grid = stored_as(image, (0, 1, 2), (False, False, True))
    write_volume(folder / "imagesTr" / "a_0001.nii.gz", array, grid)
    [(reader, _)] = find_sources([folder])
    with pytest.raises(InputError, match=r"channels must share one grid: .*; resample it$"):
        load_case(reader.cases(folder)[0][0], repair_geometry=True)


def segmentation(folder, *, overlap: bool, shared_value: bool):
    """``images/a.nii.gz`` and ``labels/a.seg.nrrd`` with a vessel in an organ, or beside it; and both masks."""
    image, _ = scene(0)
    organ, vessel = np.zeros((2, *RAS.shape_zyx), bool)
    organ[4:12, 5:15, 6:20] = True
    vessel[(slice(6, 9) if overlap else slice(13, 16)), 8:11, 8:18] = True
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    write_volume(folder / "images" / "a.nii.gz", image, RAS)
    segments = [
        Segment(n, name, "#ff0000", PackedMask.of(mask))
        for n, (name, mask) in enumerate({"organ": organ, "vessel": vessel}.items(), start=1)
    ]
    path = folder / "labels" / "a.seg.nrrd"
    write_seg_nrrd(path, segments, RAS)
    if shared_value and overlap:  # as Slicer numbers segments: from 1 in each layer
        lines, _, packed = path.read_bytes().partition(b"\n\n")
        voxels = np.minimum(np.frombuffer(gzip.decompress(packed), np.uint8), 1)
        lines = lines.replace(b"Segment1_LabelValue:=2", b"Segment1_LabelValue:=1")
        path.write_bytes(lines + b"\n\n" + gzip.compress(voxels.tobytes()))
    return path, organ, vessel


@pytest.mark.parametrize("shared_value", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_segmentation_of_slicer_is_a_label_with_its_names(tmp_path, overlap, shared_value):
    path, organ, vessel = segmentation(tmp_path / "set", overlap=overlap, shared_value=shared_value)
    [(reader, folder)] = find_sources([tmp_path / "set"])
    [case] = reader.cases(folder)[0]
    layers = load_case(case).layers
    found = {name: layer.array == value for layer in layers for value, name in layer.names.items()}
    assert set(found) == {"organ", "vessel"} and len(layers) == 1 + overlap
    np.testing.assert_array_equal(found["organ"], organ)
    np.testing.assert_array_equal(found["vessel"], vessel)
    prior = read_mask_file(Mask(str(path)), Volume(scene(0)[0], RAS, "image"))
    np.testing.assert_array_equal(prior.mask.full(), organ | vessel)
    [evaluated] = find_cases([tmp_path], TrainingHistory(), "all").cases
    assert evaluated.names == {1: "organ", 2: "vessel"}
    if overlap:
        with pytest.raises(
            InputError, match="structures must not overlap in one label map, .*a.seg.nrrd; samed3d prepare"
        ):
            evaluated.loaded()
    else:
        np.testing.assert_array_equal(evaluated.loaded().labels, organ + 2 * vessel)
