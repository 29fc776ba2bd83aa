"""The corpus on disk: what was written is read, by crops; broken ones are named; the split depends on the subject
alone."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from samed3d.data.corpus import (
    BLOCK,
    CHUNK,
    LABEL_COLUMNS,
    POINTS,
    Corpus,
    Table,
    in_validation,
    open_array,
    write_array,
)
from samed3d.errors import InputError
from samed3d.geometry import bounding_region
from tests.corpus_sources import store_case, store_corpus

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("suffix", [".b2nd", ".npz"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
def test_an_array_comes_back_whole_and_by_crops(tmp_path, rng, suffix, dtype):
    array = rng.integers(0, 99, (CHUNK + 7, CHUNK // 2, CHUNK * 2 + 1)).astype(dtype)[:, ::-1].transpose(2, 0, 1)
    write_array(tmp_path / f"a{suffix}", array)
    stored = open_array(tmp_path / f"a{suffix}")
    assert stored.shape == array.shape and stored.dtype == array.dtype
    assert np.array_equal(stored[:], array)
    crop = (slice(60, 70), slice(0, 9), slice(3, 4))
    assert np.array_equal(stored[crop], array[crop])
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"], "no temporary file is left"


def test_the_same_array_gives_the_same_bytes(tmp_path, rng):
    array = rng.integers(0, 99, (3, 70, 70, 70)).astype(np.uint8)
    for name in "ab":
        write_array(tmp_path / f"{name}.b2nd", array)
    assert (tmp_path / "a.b2nd").read_bytes() == (tmp_path / "b.b2nd").read_bytes()


def test_a_crop_decompresses_only_the_blocks_under_it(tmp_path, rng):
    """Everything outside the crop's own blocks is destroyed in the file, and the crop still comes back."""
    blosc2 = pytest.importorskip("blosc2")
    array = rng.integers(0, 2**15, (2 * CHUNK, CHUNK, CHUNK)).astype(np.int16)
    write_array(tmp_path / "a.b2nd", array)
    stored = blosc2.open(str(tmp_path / "a.b2nd"), mode="r")
    assert stored.chunks == (CHUNK,) * 3 and stored.blocks == (BLOCK,) * 3
    body = bytearray((tmp_path / "a.b2nd").read_bytes())
    second = stored.schunk.get_chunk(1)
    at = bytes(body).index(bytes(second)[64:256]) + len(second) // 4
    body[at : at + len(second) // 2] = bytes(len(second) // 2)
    (tmp_path / "a.b2nd").write_bytes(bytes(body))
    damaged = open_array(tmp_path / "a.b2nd")
    assert np.array_equal(damaged[0:CHUNK], array[:CHUNK])
    try:
        assert not np.array_equal(damaged[CHUNK:], array[CHUNK:]), "the damage is real"
    except RuntimeError:
        pass


@pytest.mark.parametrize(
    ("suffix", "body"), [(".b2nd", b"no frame"), (".npz", b"no zip"), (".b2nd", None), (".npz", None)]
)
def test_a_damaged_or_missing_array_is_named(tmp_path, suffix, body):
    if body is not None:
        (tmp_path / f"a{suffix}").write_bytes(body)
    with pytest.raises(InputError, match=r"array is missing or damaged: .*a\.(b2nd|npz)"):
        open_array(tmp_path / f"a{suffix}")


@pytest.fixture
def corpus(tmp_path, rng) -> Corpus:
    labels = np.zeros((30, 20, 10), np.uint8)
    labels[2:9, 3:17, 1:9] = 1
    labels[12:28, 3:17, 1:9] = 4
    for number in range(4):
        store_case(
            tmp_path, "set", f"p{number}", rng.integers(0, 9, labels.shape).astype(np.int16), labels, (3.0, 2.0, 1.0)
        )
    store_case(tmp_path, "maps", "m", None, labels)
    return Corpus(store_corpus(tmp_path))


def test_cases_say_what_is_in_them(corpus):
    assert [(c.id, c.has_image, c.subject, c.shape_zyx) for c in corpus.cases][:2] == [
        ("maps.m", False, "m", (30, 20, 10)),
        ("set.p0", True, "p0", (30, 20, 10)),
    ]
    case = corpus.cases[1]
    assert case.spacing_zyx_mm == (3.0, 2.0, 1.0) and [r.value for r in case.labels] == [1, 4]
    labels = corpus.labels(case)[:]
    for record in case.labels:
        assert record.voxels == int((labels == record.value).sum()) and record.region == bounding_region(
            labels == record.value
        )
        assert record.points.shape == (POINTS, 3) and (labels[tuple(record.points.T.astype(int))] == record.value).all()
    assert corpus.label_table.columns.keys() == set(LABEL_COLUMNS)
    assert corpus.label_table.numbers("mm3").max() == 16 * 14 * 8 * 6.0


def test_a_table_filters_by_value_and_by_list(corpus):
    table = corpus.label_table
    assert len(table) == 10 and len(table.where(source="set")) == 8
    assert len(table.where(source=["set", "maps"], value="4")) == 5
    assert set(table.where(source="set", value="1")["case"].tolist()) == {f"set/p{n}" for n in range(4)}
    assert len(table.where(source="none")) == 0 and len(table.where(source="none")["case"]) == 0


def test_a_broken_table_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1\n")
    with pytest.raises(InputError, match=r"table is missing or broken: .*t\.csv"):
        Table.read(tmp_path / "t.csv").where(a="1", b="2")
    with pytest.raises(InputError, match="table is missing or broken"):
        Table.read(tmp_path / "none.csv")


def test_no_corpus_a_broken_one_and_other_versions_are_named(tmp_path):
    with pytest.raises(
        InputError, match=r"no corpus at .*corpus\.json is missing or broken; make one with samed3d prepare"
    ):
        Corpus(tmp_path)
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(InputError, match="no corpus at"):
        Corpus(tmp_path)
    for version, remedy in ((9, "update samed3d"), (1, "prepare it again"), (None, "prepare it again")):
        (tmp_path / "corpus.json").write_text(json.dumps({"version": version}))
        with pytest.raises(InputError, match=f"corpus version must be 2, got {version}: .*; {remedy}"):
            Corpus(tmp_path)


def test_overlapping_structures_lie_in_layers(tmp_path):
    from data_prep.cases import LabelLayer, RawArrays, RawCase, SourceFacts
    from data_prep.convert import Task, store
    from samed3d.geometry import Grid
    from tests.corpus_sources import EVERYTHING

    organ, tumour = np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8)
    organ[1:7], tumour[2:5, 2:6, 2:6] = 1, 1
    grid = Grid((8, 8, 8), direction_lps=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    task = Task(RawCase("x", "s", "p", "CT", None, "test"), SourceFacts("s", "test"), EVERYTHING, str(tmp_path), "")
    store(task, RawArrays([], grid, [LabelLayer(organ, {1: "liver"}), LabelLayer(tumour, {1: "tumor"})]), [])
    corpus = Corpus(store_corpus(tmp_path))
    case = corpus.cases[0]
    assert {(r.name, r.layer): r.voxels for r in case.labels} == {("liver", 0): 384, ("tumor", 1): 48}
    assert np.array_equal(corpus.labels(case, 0)[2:4], organ[2:4]) and np.array_equal(corpus.labels(case, 1)[:], tumour)
    assert corpus.labels(case, 1)[3].shape == (8, 8)


def test_a_corpus_travels_to_workers_and_keeps_few_arrays_open(corpus, monkeypatch):
    cases = [c for c in corpus.cases if c.has_image]
    before = corpus.image(cases[0])[:]
    there = pickle.loads(pickle.dumps(corpus))
    assert np.array_equal(there.image(cases[0])[:], before)
    monkeypatch.setattr("samed3d.data.corpus._HELD_BYTES", 2 * 4096)
    for case in cases:
        corpus.image(case)
    assert len(corpus._open) == 2


def test_an_npz_corpus_is_read_where_there_is_only_torch(tmp_path, rng):
    from data_prep.convert import Settings
    from data_prep.pipeline import prepare
    from tests.corpus_sources import EVERYTHING, make_source

    source = make_source(tmp_path / "s", cases=4)
    prepare([source], tmp_path / "out", Settings(EVERYTHING.rules, storage="npz"))
    shutil.rmtree(source)
    code = f"""
import sys
BLOCKED = set("blosc2 zarr SimpleITK scipy edt cc3d typer rich yaml PIL joblib distributed nibabel pydicom".split())
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from samed3d.config import DataConfig
from samed3d.data.sampling import CropDataset
data = CropDataset(DataConfig([{str(tmp_path / "out")!r}], 0.0, (16, 16, 16), validation_share=0.0), 3, seed=0)
print([data[i]["case"] for i in range(3)])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("s.case") == 3, done.stderr


def test_a_missing_blosc2_says_what_to_install(tmp_path, monkeypatch):
    write_array(tmp_path / "a.b2nd", np.zeros((4, 4, 4), np.uint8))
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(
        InputError,
        match=r"a \.b2nd corpus needs blosc2: pip install blosc2, or prepare with --storage npz",
    ):
        open_array(tmp_path / "a.b2nd")


def test_the_split_depends_on_the_subject_its_seed_and_the_share_alone():
    subjects = [f"s{n}" for n in range(2000)]
    chosen = {s for s in subjects if in_validation(s, 0.1)}
    assert 140 < len(chosen) < 260
    assert chosen <= {s for s in subjects if in_validation(s, 0.2)}, (
        "a larger share keeps the subjects that the smaller one held out"
    )
    assert chosen != {s for s in subjects if in_validation(s, 0.1, seed=1)}
    assert not any(in_validation(s, 0.0) for s in subjects) and all(in_validation(s, 1.0) for s in subjects)
