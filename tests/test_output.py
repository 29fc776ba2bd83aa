"""Files are written whole or not at all; locks keep two writers apart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from samed3d.environment import environment, git_revision
from samed3d.errors import InputError
from samed3d.output import (
    check_distinct,
    check_output,
    only_writer,
    replacing,
    replacing_folder,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_earlier_file_and_no_other(tmp_path):
    write_text(tmp_path / "a.txt", "before")
    with pytest.raises(RuntimeError, match="stop"), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert (tmp_path / "a.txt").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_symbolic_link_stays_a_link_and_its_file_is_replaced(tmp_path):
    (tmp_path / "kept").mkdir()
    write_text(tmp_path / "kept" / "real.json", "{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "kept" / "real.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "kept" / "real.json").read_text()) == {"a": 1}


def test_a_link_to_itself_is_no_output(tmp_path):
    (tmp_path / "loop.json").symlink_to("loop.json")
    check_distinct({"--a": tmp_path / "loop.json", "--b": tmp_path / "other.json"})
    with pytest.raises(InputError, match="output must be a file, got a link to itself: .*loop.json"):
        write_json(tmp_path / "loop.json", {})
    assert (tmp_path / "loop.json").is_symlink()


def test_the_temporary_name_keeps_the_suffix_and_the_mode_is_kept(tmp_path):
    write_text(tmp_path / "m.nii.gz", "x")
    (tmp_path / "m.nii.gz").chmod(0o640)
    with replacing(tmp_path / "m.nii.gz") as partial:
        assert partial.name.endswith(".nii.gz")
        partial.write_text("y")
    assert (tmp_path / "m.nii.gz").stat().st_mode & 0o777 == 0o640


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), replacing_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with replacing_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "out" / "a").read_text() == "1"


@pytest.mark.parametrize("name", ["folder", "missing/a.txt"])
def test_an_output_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"got a folder|does not exist"):
        check_output(tmp_path / name)
    with pytest.raises(InputError, match="cannot write|got a folder"):
        write_text(tmp_path / name, "x")


def test_a_suffix_that_is_not_known_is_refused(tmp_path):
    check_output(tmp_path / "A.PNG", suffixes=(".png",))
    with pytest.raises(InputError, match=r"must end in one of \.png"):
        check_output(tmp_path / "a.jpg", suffixes=(".png",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_is_not_writable_is_refused():
    with pytest.raises(InputError, match="output folder is not writable: /proc/"):
        check_output("/proc/self/mask.nii.gz")


def test_two_options_may_not_name_one_file(tmp_path):
    with pytest.raises(InputError, match="-o and --report must be different"):
        check_distinct({"-o": tmp_path / "a", "--report": tmp_path / "." / "a"})
    check_distinct({"-o": tmp_path / "a", "--report": None})


def test_two_writers_of_one_folder_are_kept_apart(tmp_path):
    with only_writer(tmp_path / "run"):
        with pytest.raises(InputError, match="another run is writing"), only_writer(tmp_path / "run"):
            pass
        assert (tmp_path / "run").exists()
    assert not (tmp_path / "run").exists(), "nothing was written, so nothing is left"


def test_the_environment_can_be_written_as_json():
    body = json.loads(json.dumps(environment()))
    assert body["packages"]["torch"] and body["cores"] == os.cpu_count()
    assert body["revision"] == git_revision()


def test_a_name_that_the_file_system_does_not_take_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="cannot write .*too long"):
        check_output(tmp_path / ("n" * 300 + ".json"))
