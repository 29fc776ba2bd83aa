"""Preparing a corpus: what arrives in it, what happens when it is killed, and that one bad file stops nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_prep.clean import rules_from
from data_prep.convert import Settings, compact_image, content_hash
from data_prep.manifest import draw_splits
from data_prep.pipeline import prepare
from samed3d.cli import main
from samed3d.data.corpus import Corpus, in_validation
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.volume import write_volume
from tests.corpus_sources import EVERYTHING, SHAPE, case_arrays, make_source, tree, write_case

ROOT = Path(__file__).resolve().parents[1]


def test_a_source_becomes_a_corpus_with_every_voxel(tmp_path):
    source = make_source(tmp_path / "abdomen")
    result = prepare([source], tmp_path / "out", EVERYTHING)
    assert (result.done, result.found, result.failed) == (3, 0, [])
    corpus = Corpus(tmp_path / "out")
    assert [c.id for c in corpus.cases] == ["abdomen.case0", "abdomen.case1", "abdomen.case2"]
    assert corpus.sources["abdomen"]["licence"] == "CC0"
    for number, case in enumerate(corpus.cases):
        image, labels = case_arrays(number)
        # ITK's default axes run to the left and the back: canonical turns both.
        assert np.array_equal(corpus.image(case)[:], image[:, ::-1, ::-1])
        assert np.array_equal(corpus.labels(case)[:], labels[:, ::-1, ::-1])
        assert [(r.name, r.category, r.voxels) for r in case.labels] == [
            ("liver", "liver", int((labels == 1).sum())),
            ("kidney", "kidney", int((labels == 2).sum())),
        ]


@pytest.mark.parametrize(
    "licences, head", [(["CC0", "CC0"], "cc0"), (["CC0", "CC-BY-4.0"], "other"), (["", ""], "other")]
)
def test_the_data_set_card_states_contents_licences_and_checksums(tmp_path, licences, head):
    folders = [
        make_source(tmp_path / name, cases=n, licence=licence, attribution="A. Author | B.\nAuthor")
        for name, n, licence in zip(("one", "two"), (1, 2), licences, strict=True)
    ]
    result = prepare(folders, tmp_path / "out", EVERYTHING)
    card = (result.folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == head
    assert "2 sources, 3 volumes (3 with an image), 6 masks" in card
    row = next(line for line in card.splitlines() if line.startswith("| two"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["two", "2", "2", "4"] and cells[6] == (licences[1] or "not stated")
    assert cells[8] == "A. Author / B. Author" and sum(map(int, cells[4].split(" / "))) == 2
    for line in card.split("```")[1].split("\n")[1:-1]:
        digest, name = line.split()
        assert digest == hashlib.sha256((result.folder / name).read_bytes()).hexdigest()


def test_the_published_rules_are_the_default_and_every_drop_has_a_reason(tmp_path):
    source = make_source(tmp_path / "small", cases=1)
    result = prepare([source], tmp_path / "out")
    assert (result.counts["masks"], result.counts["masks_dropped"]) == (0, 2)
    table = Corpus(tmp_path / "out").label_table
    assert table["reason"].tolist() == ["side of 9 mm, under 15", "side of 8 mm, under 15"]
    assert Corpus(tmp_path / "out").cases == [], "nothing to draw from"
    assert not list((tmp_path / "out" / "arrays").rglob("*.b2nd")), "nothing is stored for it"


def test_axes_and_handedness_of_the_file_do_not_matter(tmp_path):
    image, labels = case_arrays(0)
    turned = Grid((SHAPE[2], SHAPE[0], SHAPE[1]), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0, 0, 1, 1, 0, 0, 0, 1, 0))
    make_source(tmp_path / "a" / "plain", cases=0)
    make_source(tmp_path / "b" / "turned", cases=0)
    write_case(tmp_path / "a" / "plain", "x", image, labels)
    write_case(
        tmp_path / "b" / "turned",
        "x",
        np.transpose(image, (2, 0, 1)).copy(),
        np.transpose(labels, (2, 0, 1)).copy(),
        turned,
    )
    result = prepare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", EVERYTHING)
    corpus = Corpus(result.folder)
    first, second = corpus.cases
    assert np.array_equal(corpus.image(first)[:], corpus.image(second)[:])
    assert corpus.case_table["duplicate_of"].tolist() == ["", "plain.x"], "the same image in two sources is found"
    assert {c.split_group for c in corpus.cases} == {"x"} and first.split == second.split


def test_channels_share_one_label_map(tmp_path):
    source = make_source(tmp_path / "brain", cases=0, channel_names={"0": "T1", "1": "FLAIR"})
    image, labels = case_arrays(0)
    write_case(source, "x", image, labels)
    shutil.copy(source / "imagesTr" / "x_0000.nii.gz", source / "imagesTr" / "x_0001.nii.gz")
    corpus = Corpus(prepare([source], tmp_path / "out", EVERYTHING).folder)
    assert [(c.id, c.modality, len(c.labels)) for c in corpus.cases] == [
        ("brain.x_0000", "T1", 2),
        ("brain.x_0001", "FLAIR", 2),
    ]
    assert len(list((tmp_path / "out" / "arrays").rglob("*.labels.b2nd"))) == 1
    assert len(corpus.label_table) == 2, "masks are counted once"


def test_spacing_and_max_side_resample(tmp_path):
    source = make_source(tmp_path / "s", cases=1)
    lenient = rules_from("lenient", [])
    coarse = Corpus(prepare([source], tmp_path / "mm", Settings(lenient, spacing_mm=2.0)).folder)
    assert (coarse.cases[0].shape_zyx, coarse.cases[0].spacing_zyx_mm) == ((10, 12, 14), (2.0, 2.0, 2.0))
    small = Corpus(prepare([source], tmp_path / "side", Settings(lenient, max_side=16, storage="npz")).folder)
    assert small.cases[0].shape_zyx == (10, 12, 14) and small.storage == "npz"
    image, labels = (a[:, ::-1, ::-1] for a in case_arrays(0))
    block = coarse.labels(coarse.cases[0])[:]
    assert set(np.unique(block)) == {0, 1, 2}
    assert abs((block == 1).sum() * 8 / (labels == 1).sum() - 1) < 0.2
    inside = image.astype(float)[3:5, 12, 14].mean()
    assert abs(float(coarse.image(coarse.cases[0])[2, 6, 7]) - inside) < 40, "an image is averaged, not shifted"


def test_a_test_split_of_the_source_and_shared_images_hold():
    def record(source, subject, split=None, content="", case=None):
        images = [{"channel": "", "content_hash": content or f"{source}{subject}{case}"}]
        return {
            "source": source,
            "subject": subject,
            "split": split,
            "case": f"{source}/{case or subject}",
            "images": images,
        }

    records = [
        record("a", "p1", "test"),
        record("a", "p1", case="again"),
        record("b", "q", content="same"),
        record("c", "p9", content="same"),
    ]
    records += [record("d", "t", "test", content="leak"), record("e", "u", content="leak"), record("f", "p1")]
    groups, splits = draw_splits(records, 0.5)
    assert splits["a/p1"] == splits["a/again"] == "test", "a subject is never on two sides"
    assert splits["d/t"] == splits["e/u"] == "test", "nor is an image"
    assert groups["q"] == groups["p9"] == "p9|q" and splits["b/q"] == splits["c/p9"]
    assert splits["f/p1"] == ("val" if in_validation("p1", 0.5) else "train"), (
        "another source's p1 may be another person"
    )


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samed3d", "prepare", *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    source = make_source(tmp_path / "s", cases=30)
    whole = tmp_path / "whole"
    assert main(["prepare", str(source), "-o", str(whole), "--rules", "lenient", "-j", "1", "-q"]) == 0
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "samed3d",
        "prepare",
        str(source),
        "-o",
        str(out),
        "--rules",
        "lenient",
        "-j",
        "1",
        "-q",
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 30
    while len(list(out.glob("records/s/case*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("records/s/case*.json")}
    assert 3 <= len(finished) < 30 and not (out / "corpus.json").exists()
    (out / "arrays" / "s" / ".part-123-case9.image.b2nd").write_bytes(b"half")  # what a kill within a write leaves
    result = prepare([source], out, EVERYTHING)
    assert (result.done, result.found) == (30 - len(finished), len(finished))
    assert {p: p.stat().st_mtime_ns for p in finished} == finished, "finished work is not done again"
    assert tree(out) == tree(whole)


def test_processes_give_the_same_bytes_as_one(tmp_path):
    source = make_source(tmp_path / "s", cases=4)
    for name, jobs in (("one", 1), ("two", 2)):
        prepare([source], tmp_path / name, EVERYTHING, jobs=jobs)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_dask_cluster_of_two_workers_gives_the_same_bytes(tmp_path):
    distributed = pytest.importorskip("distributed")
    source = make_source(tmp_path / "s", cases=4)
    (source / "imagesTr" / "case3_0000.nii.gz").write_bytes(b"broken")
    prepare([source], tmp_path / "one", EVERYTHING)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask")
    ) as cluster:
        result = prepare([source], tmp_path / "two", EVERYTHING, cluster=cluster.scheduler_address)
        assert len(cluster.workers) == 2
    assert result.done == 3 and len(result.failed) == 1
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_cluster_that_is_not_there_is_said(tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("data_prep.convert._CONNECT_SECONDS", "200ms")
    with pytest.raises(InputError, match=r"--cluster cannot be reached: tcp://127\.0\.0\.1:9"):
        prepare([make_source(tmp_path / "s", cases=1)], tmp_path / "out", EVERYTHING, cluster="tcp://127.0.0.1:9")


def test_one_bad_file_is_reported_and_the_rest_is_done(tmp_path):
    source = make_source(tmp_path / "s", cases=5)
    image, labels = case_arrays(0)
    whole = gzip.compress((source / "imagesTr" / "case1_0000.nii.gz").read_bytes())
    (source / "imagesTr" / "case1_0000.nii.gz").write_bytes(whole[:200])
    write_volume(source / "labelsTr" / "case2.nii.gz", labels[:-1], Grid((SHAPE[0] - 1, *SHAPE[1:])))
    write_case(source, "case3", image, np.zeros_like(labels))
    (source / "labelsTr" / "case4.nii.gz").unlink()
    before = tree(source)
    done = run_cli(source, "-o", tmp_path / "out", "--rules", "lenient", "-j", "1")
    assert done.returncode == 2 and "1 cases prepared, 0 were there, 4 inputs refused" in done.stdout
    refused = [line for line in done.stderr.splitlines() if "refused" in line]
    assert len(refused) == 4 and all("Traceback" not in line for line in refused)
    reasons = {row["path"].split("/")[-1]: row["reason"] for row in rows(tmp_path / "out" / "problems.csv")}
    assert len(reasons) == 4 and any("shape" in r or "share one grid" in r for r in reasons.values())
    assert [c.id for c in Corpus(tmp_path / "out").cases] == ["s.case0"]
    assert tree(source) == before, "sources are only read"
    write_case(source, "case3", image, labels)
    assert run_cli(source, "-o", tmp_path / "out", "--rules", "lenient", "-j", "1", "-q").stdout == ""
    assert [c.id for c in Corpus(tmp_path / "out").cases] == ["s.case0", "s.case3"], (
        "what is mended is done on the next run"
    )


def rows(path: Path) -> list[dict[str, str]]:
    import csv

    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_changed_file_is_done_again_and_a_removed_case_leaves(tmp_path):
    source = make_source(tmp_path / "s", cases=3)
    prepare([source], tmp_path / "out", EVERYTHING)
    image, labels = case_arrays(77)
    write_case(source, "case1", image, labels)
    for sub, name in (("imagesTr", "case2_0000.nii.gz"), ("labelsTr", "case2.nii.gz")):
        (source / sub / name).unlink()
    result = prepare([source], tmp_path / "out", EVERYTHING)
    corpus = Corpus(tmp_path / "out")
    assert (result.done, result.found) == (1, 1) and [c.id for c in corpus.cases] == ["s.case0", "s.case1"]
    assert np.array_equal(corpus.image(corpus.cases[1])[:], image[:, ::-1, ::-1])
    about = json.loads((source / "dataset.json").read_text())
    (source / "dataset.json").write_text(json.dumps({**about, "labels": {"background": 0, "spleen": 1, "kidney": 2}}))
    assert prepare([source], tmp_path / "out", EVERYTHING).done == 2, "other names, other labels"
    assert set(Corpus(tmp_path / "out").label_table["name"].tolist()) == {"spleen", "kidney"}


def test_sources_can_be_added_one_by_one_or_all_at_once(tmp_path):
    first, second = (
        make_source(tmp_path / "in" / "a", cases=2),
        make_source(tmp_path / "in" / "b", cases=2, first_seed=10),
    )
    (first / "imagesTr" / "case0_0000.nii.gz").write_bytes(b"broken")
    prepare([first], tmp_path / "steps", EVERYTHING)
    result = prepare([second], tmp_path / "steps", EVERYTHING)
    assert result.failed == [] and result.counts["problems"] == 1, "problems of an earlier run stay on record"
    prepare([tmp_path / "in"], tmp_path / "once", EVERYTHING)
    assert tree(tmp_path / "steps") == tree(tmp_path / "once")


def test_nothing_outside_the_target_is_written(tmp_path):
    (tmp_path / "cwd").mkdir()
    source = make_source(tmp_path / "s", cases=2)
    before = {p for p in tmp_path.rglob("*")}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(tmp_path / "cwd"),
        "HOME": str(tmp_path / "cwd"),
    }
    command = [sys.executable, "-m", "samed3d", "prepare", str(source), "-o", str(tmp_path / "out"), "-q", "-j", "2"]
    subprocess.run(command, cwd=tmp_path / "cwd", check=True, env=environment)
    new = {p for p in tmp_path.rglob("*")} - before
    assert new and all(p.is_relative_to(tmp_path / "out") for p in new)


def test_integers_in_float_files_are_stored_as_integers():
    array = np.arange(8.0, dtype=np.float32).reshape(2, 2, 2)
    assert compact_image(array).dtype == np.uint8 and compact_image(array * 1000 - 5).dtype == np.int16
    assert compact_image(array + 0.5).dtype == np.float32 and compact_image(array * 1e6).dtype == np.int32
    assert compact_image(array * 1e12).dtype == np.float32
    assert (
        content_hash(compact_image(array))
        == content_hash(array.astype(np.int16))
        != content_hash(array.astype(np.int16) + 1)
    )


def test_an_unforeseen_fault_in_one_case_is_a_reason_too(tmp_path, monkeypatch):
    source = make_source(tmp_path / "s", cases=2)

    def load(self, case, **more):
        if case.id == "case0":
            raise KeyError("surprise")
        return original(self, case, **more)

    from data_prep.readers import READERS

    original = type(READERS["nnunet"]).load
    monkeypatch.setattr(type(READERS["nnunet"]), "load", load)
    result = prepare([source], tmp_path / "out", EVERYTHING)
    assert result.done == 1 and result.failed[0].reason == "cannot be prepared (KeyError: 'surprise')"


@pytest.mark.slow
def test_all_shared_data_become_one_corpus(data_dir, tmp_path):
    assert main(["prepare", str(data_dir), "-o", str(tmp_path / "out"), "--rules", "lenient", "-q"]) == 0
    corpus = Corpus(tmp_path / "out")
    assert len(corpus.sources) >= 35 and corpus.about["counts"]["cases"] >= 400
    assert {"CT", "MR"} <= {m[:2] for m in corpus.case_table["modality"].tolist()}


def test_sources_without_a_clear_licence_can_be_left_out(tmp_path, caplog):
    make_source(tmp_path / "in" / "free", cases=1)
    make_source(tmp_path / "in" / "quiet", cases=1, first_seed=5, licence="")
    result = prepare([tmp_path / "in"], tmp_path / "out", EVERYTHING, licensed_only=True)
    assert set(Corpus(result.folder).sources) == {"free"} and "left out quiet: its licence is not stated" in caplog.text
    with pytest.raises(InputError, match="no source is left: none states a clear licence"):
        prepare([tmp_path / "in" / "quiet"], tmp_path / "none", EVERYTHING, licensed_only=True)
    assert not (tmp_path / "none").exists()
