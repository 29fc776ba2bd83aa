"""Generated corpora: exact masks, the same for the same seed, stored like real ones."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.cases import RawCase
from data_prep.pipeline import prepare
from data_prep.synthetic import SyntheticReader
from samed3d.cli import main
from samed3d.data.corpus import Corpus
from samed3d.data.synthesis import GENERATED_KINDS, generated_case
from samed3d.errors import InputError
from tests.corpus_sources import EVERYTHING, make_source, tree

SMALL = [kind for kind in GENERATED_KINDS if kind not in ("phantom", "labelmaps")]


@pytest.mark.parametrize("kind", SMALL)
def test_every_kind_shows_its_labels_and_depends_on_its_seed_alone(kind):
    image, labels, grid, names = generated_case(kind, [1, 2], (24, 26, 28))
    assert image.dtype == np.int16 and image.shape == labels.shape == grid.shape_zyx == (24, 26, 28)
    assert set(np.unique(labels)) - {0} == set(names) and image.std() > 1
    again = generated_case(kind, [1, 2], (24, 26, 28))
    assert np.array_equal(image, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(image, generated_case(kind, [1, 3], (24, 26, 28))[0])


def test_a_label_map_is_painted_with_its_own_values():
    given = np.zeros((20, 20, 20), np.uint8)
    given[4:12, 4:12, 4:12] = 5
    image, labels, _, names = generated_case("labelmaps", [0], (20, 20, 20), given)
    assert set(np.unique(labels)) == {0, 5} and names == {} and not np.array_equal(labels, given)
    assert abs(float(image[labels == 5].mean() - image[labels == 0].mean())) > 0


@pytest.mark.parametrize(
    ("kind", "given"), [("cubes", None), ("labelmaps", None), ("cells", np.zeros((8, 8, 8), np.uint8))]
)
def test_unknown_kinds_and_stray_label_maps_are_named(kind, given):
    with pytest.raises(
        InputError, match="--kind must be one of|a label map is needed for kind labelmaps and for no other"
    ):
        generated_case(kind, [0], (16, 16, 16), given)


def test_a_larger_count_adds_cases_and_changes_none(tmp_path):
    few = prepare([], tmp_path / "few", EVERYTHING, generated=SyntheticReader("shapes", 2, 7, 24))
    prepare([], tmp_path / "more", EVERYTHING, generated=SyntheticReader("shapes", 2, 7, 24))
    assert tree(tmp_path / "few") == tree(tmp_path / "more")
    grown = prepare([], tmp_path / "more", EVERYTHING, generated=SyntheticReader("shapes", 4, 7, 24))
    assert (few.done, grown.done, grown.found) == (2, 2, 2)
    one, other = Corpus(tmp_path / "few"), Corpus(tmp_path / "more")
    for first, second in zip(one.cases, other.cases[:2], strict=True):
        assert first.id == second.id and np.array_equal(one.image(first)[:], other.image(second)[:])
    assert "duplicate_of" in other.case_table.columns and other.about["counts"]["duplicate_images"] == 0


def test_painted_label_maps_keep_names_subjects_and_spacing(tmp_path):
    source = make_source(tmp_path / "maps", cases=3)
    reader = SyntheticReader("labelmaps", 5, 0, 16, [source])
    corpus = Corpus(prepare([], tmp_path / "out", EVERYTHING, generated=reader).folder)
    assert {c.subject for c in corpus.cases} <= {"case0", "case1", "case2"} and len(corpus.cases) == 5
    assert corpus.cases[0].shape_zyx == (10, 12, 14) and corpus.cases[0].spacing_zyx_mm == (2.0, 2.0, 2.0)
    assert {r.name for c in corpus.cases for r in c.labels} == {"liver", "kidney"}


def test_the_command_line_makes_and_mixes(tmp_path, capsys):
    source = make_source(tmp_path / "real", cases=2)
    arguments = ["prepare", "synthetic", str(source), "-o", str(tmp_path / "out"), "--rules", "lenient", "-j", "1"]
    assert main([*arguments, "--count", "2", "--size", "24", "--kind", "cells", "--seed", "3"]) == 0
    assert "4 cases prepared" in capsys.readouterr().out
    assert {c.source for c in Corpus(tmp_path / "out").cases} == {"real", "synthetic_cells_3"}
    assert main(["prepare", "synthetic", "-o", str(tmp_path / "no"), "--kind", "cubes"]) == 2
    assert "--kind must be one of phantom, shapes," in capsys.readouterr().err
    assert main(["prepare", "synthetic", "-o", str(tmp_path / "no"), "--kind", "labelmaps"]) == 2
    assert "--label-maps must be given with --kind labelmaps" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_phantom_has_named_organs():
    case = RawCase(
        "x", "s", "p", "generated", None, "synthetic", extra={"kind": "phantom", "seed": "0 0", "size": "64"}
    )
    raw = SyntheticReader().load(case)
    assert {"liver", "left kidney"} <= set(raw.layers[0].names.values()) and raw.grid.shape_zyx == raw.layers[
        0
    ].array.shape
