"""No file of the user's is changed by naming it as an output by mistake: it is refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_prep.pipeline import prepare
from samed3d.apps.demo import run_demo
from samed3d.cli import main
from samed3d.errors import InputError
from samed3d.evaluation.run import evaluate
from samed3d.geometry import Grid
from samed3d.inference.batch import run_jobs
from samed3d.inference.session import Session
from samed3d.output import only_writer, write_text
from samed3d.prompts import Point
from samed3d.training.checkpoints import check_new
from samed3d.volume import write_mask, write_volume
from tests.clicked_model import ClickedModel
from tests.corpus_sources import make_source
from tests.nnunet_tree import write_set


@pytest.fixture
def image(tmp_path, rng) -> Path:
    array = rng.normal(0, 0.1, (12, 14, 16)).astype(np.float32)
    array[3:8, 4:10, 5:11] += 1
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "ct.mha"
    write_volume(path, array, Grid(array.shape))
    return path


def clicked(image: Path, **options) -> Session:
    session = Session.open(image, ClickedModel(), **options)
    session.add(Point((8, 7, 5)))
    return session


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its bytes, links with where they point; locks do not count."""
    paths = [p for p in sorted(folder.rglob("*")) if p.name != ".lock"]
    return {
        str(p): os.readlink(p) if p.is_symlink() else p.read_bytes() for p in paths if p.is_symlink() or p.is_file()
    }


# Journals

NOT_JOURNALS = {
    "an image": None,
    "text": b"first line\nsecond line, no newline at its end",
    "bytes without a newline": b"\x00\x01 no newline",
    "a JSON list": b"[1, 2]\n",
    "lines of another program": b'{"event": 1}\n{"event": 2',
    "a journal of another version": b'{"journal":99}\n{"do":"undo"',
    "the beginning of another session's journal": b'{"journal":1,"image":{"path":"other',
    "a long line": b"x" * (2 << 20),
}


@pytest.mark.parametrize("content", NOT_JOURNALS.values(), ids=NOT_JOURNALS)
@pytest.mark.parametrize("linked", [False, True], ids=["file", "link"])
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path, image, content, linked):
    path = tmp_path / "file"
    path.write_bytes(image.read_bytes() if content is None else content)
    if linked:
        (tmp_path / "link").symlink_to(path)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="journal must be one of version 1: .*; give the path of a journal or of no"):
        Session.open(image, ClickedModel(), journal=tmp_path / "link" if linked else path)
    assert contents(tmp_path) == before


def test_a_journal_of_another_image_keeps_its_unfinished_line(tmp_path, image):
    clicked(image, journal=tmp_path / "j").close()
    with (tmp_path / "j").open("ab") as file:
        file.write(b'{"do":"ad')
    other = tmp_path / "other.mha"
    write_volume(other, np.arange(1000.0, dtype=np.float32).reshape(10, 10, 10), Grid((10, 10, 10)))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="journal"):
        Session.open(other, ClickedModel(), journal=tmp_path / "j")
    assert contents(tmp_path) == before
    assert len(Session.open(image, ClickedModel(), journal=tmp_path / "j").objects()) == 1


@pytest.mark.parametrize("kept", [0, 20])
def test_a_journal_whose_first_line_was_not_finished_is_begun_anew(tmp_path, image, kept):
    clicked(image, journal=tmp_path / "j").close()
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:kept])
    clicked(image, journal=tmp_path / "j").close()
    assert (tmp_path / "j").read_bytes() == whole


# Files that a mask is made from

OUTPUTS = {
    "mask": lambda session, path: session.export(path),
    "probability": lambda session, path: session.save_probability(path),
    "save": lambda session, path: session.save(path),
}


@pytest.mark.parametrize("write", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("place", ["itself", "a link to it", "a hard link to it"])
def test_the_image_is_never_replaced_by_its_mask(tmp_path, image, write, place):
    path = image if place == "itself" else image.with_name("name.mha")
    if place != "itself":
        (path.symlink_to if "hard" not in place else path.hardlink_to)(image)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="output must not replace the image it is made from"):
        write(clicked(image), path)
    assert contents(tmp_path) == before


def test_a_dicom_slice_is_never_replaced_by_a_mask(tmp_path, rng):
    pytest.importorskip("highdicom")
    from tests.dicom_trees import image_series

    image_series(tmp_path / "ct", rng.integers(0, 900, (6, 14, 16)).astype(np.int16))
    before = contents(tmp_path)
    session = clicked(tmp_path / "ct")
    with pytest.raises(InputError, match="output must not replace the image it is made from"):
        session.export(sorted((tmp_path / "ct").iterdir())[2])
    assert contents(tmp_path) == before
    session.export(tmp_path / "ct" / "mask.nii.gz")
    session.export(tmp_path / "ct" / "mask.nii.gz")  # a mask of ours in that folder may be replaced


def test_voxels_of_another_header_are_not_replaced(tmp_path):
    mask = np.ones((4, 5, 6), np.uint8)
    (tmp_path / "mask.zraw").write_bytes(b"voxels of some other header")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"cannot write mask\.mhd: its voxels would replace .*mask\.zraw"):
        write_mask(tmp_path / "mask.mhd", mask, Grid(mask.shape))
    assert contents(tmp_path) == before
    for _ in range(2):
        write_mask(tmp_path / "again.mhd", mask, Grid(mask.shape))


# What no file may be put in place of


def test_pipes_and_write_protected_files_are_kept(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="output must be a file, got a device or pipe"):
        write_text(tmp_path / "pipe", "x")
    assert (tmp_path / "pipe").is_fifo()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "kept").chmod(0o444)
    with pytest.raises(InputError, match="output is write-protected: .*kept"):
        write_text(tmp_path / "kept", "x")
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_lock_keeps_what_another_program_wrote(tmp_path):
    (tmp_path / ".lock").write_text("pid 7")
    with only_writer(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "pid 7"


# Folders of results

REFUSED = (
    "output folder holds a .* that was not written by this command|holds no corpus of ours|of another configuration"
)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("parts/thesis.txt", "ten years"),
        ("results.json", "[1]"),
        ("results.json", '{"mine": 1}'),
        ("cases.csv", "a,b"),
        ("prompts.jsonl", "{}"),
        ("report.html", "<p>mine</p>"),
    ],
)
def test_evaluate_keeps_what_it_did_not_write(tmp_path, name, content):
    write_set(tmp_path / "set", {"a": 0})
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=REFUSED):
        evaluate([tmp_path / "set"], ["region_growing"], tmp_path / "out", clicks=(1,), split="all")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"editor.fontSize": 12}', '{"version": 2, "settings": {}}'])
def test_prepare_keeps_settings_of_another_program(tmp_path, content):
    source = make_source(tmp_path / "s", cases=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text(content)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=REFUSED):
        prepare([source], tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "best.safetensors", "config.json", "environment.json"])
def test_training_keeps_what_it_did_not_write(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=REFUSED):
        check_new(tmp_path)


@pytest.mark.parametrize("name", ["ct.nii.gz", "masks.nii.gz", "results.json", "prompts.json", "preview.png"])
def test_the_demo_keeps_what_it_did_not_write(tmp_path, name, monkeypatch):
    monkeypatch.setattr("samed3d.apps.demo.load_promptable", lambda _: ClickedModel())
    (tmp_path / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(InputError, match=REFUSED):
        run_demo(tmp_path, device="cpu")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "content"), [("done.jsonl", "mine\n"), ("done.jsonl", '{"a": 1}\n'), ("report.json", "[]")]
)
def test_a_batch_keeps_what_it_did_not_write(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=REFUSED):
        run_jobs([], tmp_path, ClickedModel(), "clicked", device="cpu")
    assert contents(tmp_path) == before


def test_a_comparison_is_not_written_over_an_image(tmp_path, image, capsys):
    write_set(tmp_path / "set", {"a": 0})
    for name in ("one", "two"):
        evaluate([tmp_path / "set"], ["region_growing"], tmp_path / name, clicks=(1,), split="all")
    before = contents(tmp_path)
    assert main(["evaluate", "compare", str(tmp_path / "one"), str(tmp_path / "two"), "-o", str(image)]) == 2
    assert "output name must end in one of .html" in capsys.readouterr().err
    assert contents(tmp_path) == before
