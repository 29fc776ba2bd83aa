"""The corpus on disk: what was written is read, broken ones are named, and the split depends on the subject alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samed3d.data.corpus import CaseRecord, Corpus, LabelRecord, in_validation, write_case, write_index
from samed3d.errors import InputError
from samed3d.geometry import Region


def record(name: str, *, has_image: bool = True) -> CaseRecord:
    labels = [LabelRecord(4, "liver", 12, Region((0, 1, 1), (2, 3, 4)))]
    return CaseRecord(name, "set", "p1", "CT", (3, 4, 5), (2.5, 0.8, 0.8), has_image, labels)


def test_what_is_written_is_read(tmp_path, rng):
    image, labels = rng.integers(-900, 900, (3, 4, 5)).astype(np.int16), rng.integers(0, 5, (3, 4, 5)).astype(np.uint8)
    cases = [record("set.a"), record("set.b", has_image=False)]
    write_case(tmp_path, cases[0], image, labels)
    write_case(tmp_path, cases[1], None, labels)
    write_index(tmp_path, cases, {"set": {"licence": "CC0"}})
    corpus = Corpus(tmp_path)
    assert corpus.cases == cases and corpus.sources == {"set": {"licence": "CC0"}}
    read = corpus.arrays(corpus.cases[0])
    assert np.array_equal(read[0], image) and np.array_equal(read[1], labels) and read[0].dtype == image.dtype
    nothing, same = corpus.arrays(corpus.cases[1])
    assert nothing is None and np.array_equal(same, labels)
    assert corpus.arrays(corpus.cases[0])[0] is read[0], "read once"
    assert not list(tmp_path.rglob("*.part*"))


def test_no_corpus_a_broken_one_and_a_newer_one_are_named(tmp_path):
    with pytest.raises(InputError, match="no corpus at .*corpus.json is missing or broken; make one with samed3d prepare"):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(InputError, match="missing or broken"):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text(json.dumps({"version": 9, "sources": {}, "cases": []}))
    with pytest.raises(InputError, match="corpus version must be 1, got 9"):
        Corpus(tmp_path)


def test_the_split_is_a_fixed_share_of_subjects():
    names = [f"subject{i}" for i in range(2000)]
    chosen = {n for n in names if in_validation(n, 0.2)}
    assert 320 < len(chosen) < 480
    assert {n for n in names if in_validation(n, 0.1)} < chosen, "a smaller share is a part of a larger one"
    assert not any(in_validation(n, 0.0) for n in names)
    other = {n for n in names if in_validation(n, 0.2, seed=1)}
    assert len(chosen & other) < 150
    assert [in_validation(n, 0.5) for n in ("p1", "p2", "p3", "p4")] == [False, True, False, True], "the same on every machine"
