"""Many images from a list: every line is checked first, a stopped run is resumed, and one bad image does not stop the
others."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samed3d.cli import main
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.batch import read_jobs, run_jobs
from samed3d.prompts import ObjectPrompts, Point, dump_prompts
from samed3d.volume import read_volume, write_volume
from tests.clicked_model import ClickedModel
from tests.test_cli import place, segment  # noqa: F401

SHAPE = (10, 12, 14)


@pytest.fixture
def images(tmp_path, rng):
    """Three images, a prompt file and a list that uses both ways to prompt."""
    for n in range(3):
        write_volume(tmp_path / f"case{n}.nii.gz", rng.normal(size=SHAPE).astype(np.float32), Grid(SHAPE))
    objects = [ObjectPrompts(2, "a", [Point((5, 5, 5))]), ObjectPrompts(4, "b", [Point((9, 9, 3))])]
    dump_prompts(objects, tmp_path / "p.json")
    lines = [
        "image,prompts,point,negative_point,output",
        'case0.nii.gz,,"5,5,5;6,6,6","1,1,1",',
        "case1.nii.gz,p.json,,,",
        "case2.nii.gz,p.json,,,sub/x.mha",
    ]
    (tmp_path / "list.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def run(folder, told=None, format=None):
    model = ClickedModel()
    jobs = read_jobs(folder / "list.csv", folder / "out", format)
    return run_jobs(jobs, folder / "out", model, "clicked", "cpu", format, told), model


def test_every_line_becomes_a_mask(images):
    report, _ = run(images)
    assert (report["done"], report["kept"], report["failed"]) == (3, 0, 0)
    assert sorted(p.name for p in (images / "out").rglob("*")) == [
        "case0.nii.gz",
        "case1.nii.gz",
        "done.jsonl",
        "report.json",
        "sub",
        "x.mha",
    ]
    labels = read_volume(images / "out" / "case1.nii.gz").array
    assert labels[5, 5, 5] == 2 and labels[3, 9, 9] == 4
    clicked = read_volume(images / "out" / "case0.nii.gz").array
    assert clicked[5, 5, 5] == clicked[6, 6, 6] == 1 and clicked[1, 1, 1] == 0
    assert json.loads((images / "out" / "report.json").read_text()) == report
    assert [[o["name"] for o in row["objects"]] for row in report["images"]] == [["object"], ["a", "b"], ["a", "b"]]


def test_a_run_that_stopped_goes_on(images):
    def stop(job, row):
        if job.line == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, stop)
    before = {p: p.stat().st_mtime_ns for p in (images / "out").glob("*.nii.gz")}
    assert len(before) == 2
    report, model = run(images)
    assert (report["done"], report["kept"]) == (1, 2) and model.decoded > 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert run(images)[1].decoded == 0


@pytest.mark.parametrize("change", ["prompts", "image", "mask", "torn"])
def test_what_changed_is_done_again(images, rng, change):
    run(images)
    if change == "prompts":
        (images / "list.csv").write_text((images / "list.csv").read_text().replace("6,6,6", "7,6,6"))
    elif change == "image":
        write_volume(images / "case0.nii.gz", rng.normal(size=SHAPE).astype(np.float32), Grid(SHAPE))
    elif change == "mask":
        (images / "out" / "case0.nii.gz").unlink()
    else:
        done = images / "out" / "done.jsonl"
        lines = done.read_text().splitlines(keepends=True)
        done.write_text("".join([*lines[1:], lines[0][:50]]))
    report, _ = run(images)
    assert [row["status"] for row in report["images"]] == ["done", "kept", "kept"]


def test_one_bad_image_does_not_stop_the_others(images):
    (images / "case1.nii.gz").write_bytes(b"nothing")
    report, _ = run(images)
    assert [row["status"] for row in report["images"]] == ["done", "failed", "done"]
    assert "case1.nii.gz" in report["images"][1]["error"] and not (images / "out" / "case1.nii.gz").exists()


def test_another_format(images):
    (images / "list.csv").write_text("image,prompts\ncase0.nii.gz,p.json\n")
    run(images, format="seg.nrrd")
    assert (
        read_volume(images / "out" / "case0.seg.nrrd", channel=1).array[3, 9, 9] == 4
    )  # it overlaps the first, so it has its own layer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "batch list must have a header and a line per image, got none"),
        ("image,prompt\ncase0.nii.gz,p.json", r"no column 'prompt'; did you mean prompts\?"),
        ("image,prompts\nnone.nii.gz,p.json", r"line 2: image does not exist: .*none\.nii\.gz"),
        ("image,prompts\ncase0.nii.gz,p.json\n,p.json", r"line 3: image does not exist: \(empty\)"),
        ("image,prompts\ncase0.nii.gz,q.json", "line 2: prompt file cannot be read"),
        ("image,point\ncase0.nii.gz,5", "line 2: point needs 3 numbers"),
        ("image,negative_point\ncase0.nii.gz,\"5,5,5\"", "line 2: object 1 .* needs a positive point or a box, got 1 negative only"),
        ("image,prompts,point\ncase0.nii.gz,p.json,\"1,1,1\"", "line 2: a line has prompts in a file or in columns, got both"),
        ("image,prompts\ncase0.nii.gz,p.json\ncase0.nii.gz,p.json", "line 3: output must differ from line 2's"),
        ("image,prompts,output\ncase0.nii.gz,p.json,../x.nii.gz", "line 2: output must be a name inside the output folder"),
        ("image,point\ncase0.nii.gz,5,5,5", "line 2: a line must have at most 2 fields, got 4; put quotes around commas"),
        ("image,prompts\n\ncase0.nii.gz,p.json\n\ncase1.nii.gz,q.json", "line 5: prompt file cannot be read"),
        ("image,promts\ncase0.nii.gz,p.json", r"no column 'promts'; did you mean prompts\?"),
        ("Image,prompts\ncase0.nii.gz,p.json", r"no column 'Image'; did you mean image\?"),
        ("image,prompts,prompts\ncase0.nii.gz,p.json,p.json", "column 'prompts' is there twice"),
        ("image,,prompts\ncase0.nii.gz,,p.json", "no column ''"),
        ("prompts\np.json", "batch list must have a column 'image'"),
        ("image;point\ncase0.nii.gz;5,5,5;6,6,6", "line 2: a line must have at most 2 fields, got 3"),
        ("image,prompts\n\"case0.nii.gz,p.json", "line 2: image does not exist|batch list cannot be read"),
        ("image,prompts\ncase0.nii.gz,p\0.json", "line 2: prompt file is not JSON: .*null"),
        ("image,prompts\ncase\0.nii.gz,p.json", "line 2: image does not exist"),
        ("image,prompts,output\ncase0.nii.gz,p.json,x\0.nii.gz", "line 2: cannot write"),
        (f"image,prompts,output\ncase0.nii.gz,p.json,{'x' * 250}.nii.gz", "line 2: cannot write .*: File name too long"),
        ("image,prompts,output\ncase0.nii.gz,p.json,x.png", "line 2: output name must end in one of"),
        ("image,prompts,channel\ncase0.nii.gz,p.json,red", "line 2: channel must be a whole number, got 'red'"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_used(images, text, message):
    (images / "list.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_jobs(images / "list.csv", images / "out")
    with pytest.raises(InputError, match="must not be an image of the list"):
        (images / "list.csv").write_text("image,prompts\ncase0.nii.gz,p.json")
        read_jobs(images / "list.csv", images)


@pytest.mark.parametrize(
    "text",
    [
        'image,point,output\ncase0.nii.gz,"5,5,5;6,6,6",m.mha',
        '\ufeffimage,point,output\r\ncase0.nii.gz,"5,5,5;6,6,6",m.mha\r\n',
        ' image , point , output \n  case0.nii.gz , "5, 5, 5 ; 6,6,6" ,  m.mha ',
        "image\tpoint\toutput\ncase0.nii.gz\t5,5,5;6,6,6\tm.mha",
        'image;point;output\ncase0.nii.gz;"5,5,5;6,6,6";m.mha',
        'output,image,point,box\n\nm.mha,case0.nii.gz,"5,5,5;6,6,6"\n',
    ],
    ids=["plain", "mark", "spaces", "tabs", "semicolons", "short"],
)
def test_lists_as_programs_write_them(images, text):
    (images / "list.csv").write_text(text, encoding="utf-8", newline="")
    (job,) = read_jobs(images / "list.csv", images / "out")
    assert job.image == images / "case0.nii.gz" and job.output == images / "out" / "m.mha"
    assert [p.at for p in job.objects[0].prompts] == [(5, 5, 5), (6, 6, 6)]


def test_from_the_command_line(images, place, capsys):  # noqa: F811
    options = ["--model", str(place / "tiny.safetensors"), "--device", "cpu"]
    batch = ["segment", "--batch", str(images / "list.csv"), "-o", str(images / "out"), *options]
    assert main(batch) == 0
    assert "3 segmented, 0 failed" in capsys.readouterr().out
    assert main([*batch, "-q"]) == 0 and capsys.readouterr().out == ""
    (images / "case1.nii.gz").write_bytes(b"nothing")
    assert main(batch) == 2
    said = capsys.readouterr()
    assert "0 segmented, 2 kept from before, 1 failed" in said.out and "1 of 3 images failed, line 3 first" in said.err
    for more in (["x.nii.gz"], ["--point", "1,1,1"], ["--report", "r.json"]):
        assert main([*batch, *more]) == 2
        assert "--batch takes images and prompts from its list" in capsys.readouterr().err
    assert main(["segment", "--point", "1,1,1", "-o", str(images / "m.nii.gz")]) == 2
    assert "segment needs an image" in capsys.readouterr().err


def test_strokes_masks_formats_and_sessions_from_the_command_line(place, tmp_path, capsys):  # noqa: F811
    first = str(tmp_path / "first.nii.gz")
    assert (
        main(segment(place, "--scribble", "7,8,7;11,8,7", "-o", first, "--session", str(tmp_path / "s.json"))) == 0
    ), capsys.readouterr().err
    assert read_volume(first).array[7, 8, 7:12].all()
    more = ["--mask", first, "--negative-scribble", "7,8,7;9,8,7", "-o", str(tmp_path / "second.seg.nrrd")]
    assert main(segment(place, *more)) == 0, capsys.readouterr().err
    assert not read_volume(tmp_path / "second.seg.nrrd").array[7, 8, 7:10].any()
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["objects"][0]["prompts"][0]["path"] == [[7, 8, 7], [11, 8, 7]]
    assert main(segment(place, "--point", "9,8,7", "-o", str(tmp_path / "m.nii.gz"), "--format", "rtstruct")) == 2
    assert "output name must end in one of .dcm" in capsys.readouterr().err
    assert main(segment(place, "--point", "9,8,7", "-o", str(tmp_path / "m.dcm"))) == 2
    assert "DICOM can be written for an image that was read from a DICOM folder only" in capsys.readouterr().err


def test_dicom_in_dicom_seg_out(place, tmp_path, rng, capsys):  # noqa: F811
    highdicom = pytest.importorskip("highdicom", reason="writing DICOM needs highdicom")
    from tests.dicom_trees import image_series

    image_series(tmp_path / "ct", rng.integers(0, 100, SHAPE).astype(np.int16))
    command = ["segment", str(tmp_path / "ct"), "--model", str(place / "tiny.safetensors"), "--scribble", "3,5,4;9,5,4"]
    assert main([*command, "-o", str(tmp_path / "seg.dcm")]) == 0, capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "m.nrrd")]) == 0
    mask = read_volume(tmp_path / "m.nrrd").array
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert mask.any() and int(seg.pixel_array.sum()) == int(mask.sum())
