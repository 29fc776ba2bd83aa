"""What preparing a corpus refuses, and that a refusal says why and leaves what is there as it was."""

from __future__ import annotations

import json
import os
import shutil
import sys

import pytest

from data_prep.clean import rules_from
from data_prep.convert import Settings
from data_prep.pipeline import prepare
from samed3d.errors import InputError
from samed3d.output import only_writer
from tests import dataset_trees
from tests.corpus_sources import EVERYTHING, make_source, tree


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    source = make_source(tmp_path / "s", cases=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    with pytest.raises(InputError, match="output folder is not empty and holds no corpus of ours"):
        prepare([source], out, EVERYTHING)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_other_settings_and_newer_versions_are_refused(tmp_path):
    source = make_source(tmp_path / "s", cases=1)
    prepare([source], tmp_path / "out", EVERYTHING)
    before = tree(tmp_path / "out")
    with pytest.raises(
        InputError, match=r"made with other settings \(min_side_mm 0\.0 there, 15\.0 now, min_volume_mm3"
    ):
        prepare(
            [source],
            tmp_path / "out",
            Settings(rules_from("published", ["keep_components=0", "max_background=1", "split_sides=false"])),
        )
    body = json.loads((tmp_path / "out" / "settings.json").read_text())
    (tmp_path / "out" / "settings.json").write_text(json.dumps({**body, "version": 99}))
    with pytest.raises(InputError, match="a corpus of version 99, this is version"):
        prepare([source], tmp_path / "out", EVERYTHING)
    (tmp_path / "out" / "settings.json").write_text(json.dumps(body, indent=1) + "\n")
    assert tree(tmp_path / "out") == before


def test_the_target_cannot_be_inside_a_source_nor_a_source_inside_the_target(tmp_path):
    source = make_source(tmp_path / "s", cases=1)
    with pytest.raises(InputError, match="output must lie outside its sources"):
        prepare([source], source / "corpus", EVERYTHING)
    assert not (source / "corpus").exists()


def test_two_sources_of_one_name_are_refused_and_nothing_is_written(tmp_path):
    make_source(tmp_path / "x" / "liver", cases=1)
    make_source(tmp_path / "y" / "liver", cases=1, first_seed=5)
    with pytest.raises(InputError, match="rename one"):
        prepare([tmp_path / "x" / "liver", tmp_path / "y" / "liver"], tmp_path / "out", EVERYTHING)
    assert not (tmp_path / "out").exists()
    prepare([tmp_path / "x" / "liver"], tmp_path / "out", EVERYTHING)
    with pytest.raises(InputError, match="the corpus has a source called 'liver' already"):
        prepare([tmp_path / "y" / "liver"], tmp_path / "out", EVERYTHING)


def test_two_cases_of_one_id_and_ids_that_are_no_names(tmp_path):
    from data_prep.cases import RawCase
    from data_prep.readers import PlainReader

    class Listing(PlainReader):
        def entries(self, folder):
            for number, name in enumerate(("a", "A", "x/y", ""), start=1):
                yield RawCase(name, "s", "p", "CT", None, "nnunet", (("", f"{number}.nii"),))

    kept, problems = Listing().cases(tmp_path)
    assert [c.first_path for c in kept] == ["1.nii"]
    assert "two cases have the id 'A', the other is 1.nii" in problems[0].reason
    assert all("plain file name" in p.reason for p in problems[1:])


def test_a_full_disk_is_noticed_before_and_during_the_work(tmp_path, monkeypatch):
    source = make_source(tmp_path / "s", cases=2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"the corpus needs about 0\.1 GB, .* has 0\.0 GB free"):
        prepare([source], tmp_path / "out", EVERYTHING)
    assert not (tmp_path / "out").exists(), "nothing is left behind"
    monkeypatch.undo()

    def full(path, array):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("samed3d.data.corpus._write_b2nd", full)
    with pytest.raises(InputError, match="cannot write .*: No space left on device; finished cases are kept"):
        prepare([source], tmp_path / "out", EVERYTHING)


def test_a_second_run_in_the_same_folder_waits_its_turn(tmp_path):
    source = make_source(tmp_path / "s", cases=1)
    with only_writer(tmp_path / "out"), pytest.raises(InputError, match="another run is writing to"):
        prepare([source], tmp_path / "out", EVERYTHING)


class EndsItsProcess:
    """Unpickling it ends the process, as the kernel does when memory runs out."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_worker_that_is_killed_is_explained():
    from data_prep.convert import run_tasks

    with pytest.raises(
        InputError,
        match=r"a worker process was killed, most likely for want of memory \(2 at once\); give fewer --jobs",
    ):
        list(run_tasks([EndsItsProcess(), EndsItsProcess()], jobs=2))


def test_missing_packages_and_unknown_storage_are_said_before_any_work(tmp_path, monkeypatch):
    source = make_source(tmp_path / "s", cases=2)
    with pytest.raises(InputError, match="--storage must be one of b2nd, npz, got 'zip'"):
        prepare([source], tmp_path / "out", Settings(storage="zip"))
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(InputError, match="a .b2nd corpus needs blosc2"):
        prepare([source], tmp_path / "out", EVERYTHING)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(InputError, match="more than one process needs joblib"):
        prepare([source], tmp_path / "out", Settings(EVERYTHING.rules, storage="npz"), jobs=2)
    assert prepare([source], tmp_path / "out", Settings(EVERYTHING.rules, storage="npz"), jobs=1).done == 2


def test_two_structures_of_the_same_voxels_are_a_warning(tmp_path):
    dataset_trees.totalseg(tmp_path / "set")
    for name in ("s0000", "s0001"):
        masks = tmp_path / "set" / name / "segmentations"
        (masks / "spleen.nii.gz").write_bytes((masks / "liver.nii.gz").read_bytes())
    prepare([tmp_path / "set"], tmp_path / "out", EVERYTHING)
    warned = (tmp_path / "out" / "problems.csv").read_text()
    assert warned.count("structures 'liver' and 'spleen' are exactly the same voxels") == 2
