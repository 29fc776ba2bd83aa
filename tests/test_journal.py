"""The journal: nothing acknowledged is lost, whenever the process dies, and what cannot be used is said in one line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.session import Session
from samed3d.prompts import Mask, Point
from samed3d.volume import read_volume, write_volume
from tests.clicked_model import ClickedModel
from tests.journal_process import edit

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "ct.nrrd"
    z, y, x = np.indices((20, 22, 24))
    ball = (z - 9) ** 2 + (y - 10) ** 2 + (x - 11) ** 2 < 25
    noise = np.random.default_rng(0).normal(0, 0.1, ball.shape)
    write_volume(path, (ball + noise).astype(np.float32), Grid(ball.shape, (1.0, 1.0, 1.5)))
    return path


def state(session: Session) -> tuple:
    return [(o.id, o.name, o.prompt_ids, o.prompts) for o in session.objects()], session.can_redo


def assert_same(one: Session, other: Session) -> None:
    assert state(one) == state(other)
    for entry in one.objects():
        np.testing.assert_array_equal(one.logits_of(entry.id), other.logits_of(entry.id))


def started(image: Path, journal: Path, seed: int) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.journal_process", str(image), str(journal), str(seed)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)


def kill_and_open(process: subprocess.Popen, image: Path, journal: Path, seed: int) -> int:
    """Kill an editing process after a random time; compare what the journal brings back with the same edits done
    here."""
    assert process.stdout is not None
    first = process.stdout.readline()  # the first edit is acknowledged: from now on anything may happen
    time.sleep(float(np.random.default_rng(seed).uniform(0.0, 0.25)))
    process.send_signal(signal.SIGKILL)
    acknowledged = sum(line.endswith(b"\n") for line in [first, *process.stdout.read().splitlines(keepends=True)])
    assert process.wait() == -signal.SIGKILL
    found = Session.open(image, ClickedModel(), journal=journal)
    expected, rng = Session.open(image, ClickedModel()), np.random.default_rng(seed)
    # The edit after the last acknowledged one may have reached the disk before the kill, or not.
    for number in range(acknowledged + 1):
        if number == acknowledged and state(found) == state(expected):
            break
        try:
            edit(expected, rng)
        except InputError:
            pass
    assert_same(found, expected)
    found.close()
    return acknowledged


def test_what_was_acknowledged_survives_a_kill(image, tmp_path):
    files = [tmp_path / f"{seed}.jsonl" for seed in range(3)]
    processes = [started(image, file, seed) for seed, file in enumerate(files)]
    assert (
        sum(kill_and_open(p, image, file, seed) for seed, (p, file) in enumerate(zip(processes, files, strict=True)))
        > 3
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_was_acknowledged_survives_fifty_kills(image, tmp_path):
    total = 0
    for seed in range(100, 150):
        journal = tmp_path / f"{seed}.jsonl"
        total += kill_and_open(started(image, journal, seed), image, journal, seed)
    assert total > 500


def test_every_length_of_a_torn_journal_can_be_opened(image, tmp_path):
    """A crash may leave any part of the last line."""
    journal = tmp_path / "j.jsonl"
    with Session.open(image, ClickedModel(), journal=journal) as session:
        session.add(Point((11, 10, 9)))
        session.add(Point((3, 3, 3), positive=False))
    content = journal.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(content)):
        journal.write_bytes(content[:end])
        with Session.open(image, ClickedModel(), journal=journal) as session:
            assert len(session.objects()[0].prompts) == 1
        assert journal.read_bytes() == content[:last]
    for end in (0, 1, 20):
        journal.write_bytes(content[:end])
        with Session.open(image, ClickedModel(), journal=journal) as session:
            assert session.objects() == []


def test_a_session_goes_on_where_it_was_and_so_does_its_journal(image, tmp_path):
    journal = tmp_path / "j.jsonl"
    whole = Session.open(image, ClickedModel())
    for turn in range(4):
        with Session.open(image, ClickedModel(), journal=journal) as session:
            if turn:
                assert_same(session, whole)
            for subject, generator in ((session, np.random.default_rng(turn)), (whole, np.random.default_rng(turn))):
                subject.add(Point((11, 10, 9)), object_id=turn + 1)
                for _ in range(4):
                    try:
                        edit(subject, generator)
                    except InputError:
                        pass
            session.add(Mask(np.ones((20, 22, 24))), object_id=9)
            whole.add(session.objects()[-1].prompts[-1], object_id=9)
    assert [o.id for o in whole.objects()][-1] == 9


def test_what_was_undone_is_not_predicted_again_at_opening(image, tmp_path):
    journal = tmp_path / "j.jsonl"
    with Session.open(image, ClickedModel(), journal=journal) as session:
        for n in range(6):
            session.add(Point((11, 10, 4 + n)))
        for _ in range(5):
            session.undo()
        expected = session.logits_of(1)
        session.redo()
        redone = session.logits_of(1)
        session.undo()
    model = ClickedModel()
    with Session.open(image, model, journal=journal) as session:
        np.testing.assert_array_equal(session.logits_of(1), expected)
        decoded = model.decoded
        session.redo()
        assert model.decoded > decoded
        np.testing.assert_array_equal(session.logits_of(1), redone)


def test_a_refused_edit_is_not_in_the_journal(image, tmp_path):
    journal = tmp_path / "j.jsonl"
    with Session.open(image, ClickedModel(), journal=journal) as session:
        with pytest.raises(InputError, match="point must lie inside"):
            session.add(Point((99, 0, 0)))
        session.add(Point((11, 10, 9)))
    assert [json.loads(line).get("do") for line in journal.read_text().splitlines()] == [None, "add"]


def test_a_full_disk_leaves_session_and_journal_as_they_were(image, tmp_path, monkeypatch):
    journal = tmp_path / "j.jsonl"
    with Session.open(image, ClickedModel(), journal=journal) as session:
        session.add(Point((11, 10, 9)))
        before, content = state(session), journal.read_bytes()

        def full(_descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                session.add(Point((12, 10, 9)))
        assert state(session) == before and journal.read_bytes() == content
        session.add(Point((13, 10, 9)))
    with Session.open(image, ClickedModel(), journal=journal) as session:
        assert [p.at for p in session.objects()[0].prompts] == [(11, 10, 9), (13, 10, 9)]


def test_journals_that_cannot_be_used(image, tmp_path, caplog):
    journal = tmp_path / "j.jsonl"
    with Session.open(image, ClickedModel(), journal=journal) as session:
        session.add(Point((11, 10, 9)))
        with pytest.raises(InputError, match="journal is in use by another session"):
            Session.open(image, ClickedModel(), journal=journal)
    content = journal.read_text()
    volume = read_volume(image)
    volume.array[0, 0, 0] += 1
    with pytest.raises(InputError, match="belongs to another image"):
        Session.open(volume, ClickedModel(), journal=journal)
    other = ClickedModel()
    other.spec = type(other.spec)("other", (16, 16, 16))
    Session.open(image, other, journal=journal).close()  # the same weights under another name
    other.scale.fill_(2.0)
    with pytest.raises(InputError, match="was made with model 'clicked', got 'other'"):
        Session.open(image, other, journal=journal)
    trained = ClickedModel()
    trained.scale.fill_(1.5)
    Session.open(image, trained, journal=journal).close()
    assert "the weights of model clicked are not those of journal" in caplog.text
    journal.write_text(content.replace('"do":"add"', '"do":"dance"'))
    with pytest.raises(InputError, match="line 2: not an edit of a session"):
        Session.open(image, ClickedModel(), journal=journal)
    journal.write_text(content.replace('"do":"add"', '"do" "add"'))
    with pytest.raises(InputError, match="journal is damaged in line 2"):
        Session.open(image, ClickedModel(), journal=journal)
    journal.write_text("[]\n")
    with pytest.raises(InputError, match="journal must be one of version 1"):
        Session.open(image, ClickedModel(), journal=journal)
    with pytest.raises(InputError, match="journal cannot be opened: .*No such file"):
        Session.open(image, ClickedModel(), journal=tmp_path / "no" / "j.jsonl")


JOURNAL_OF_0_1_0 = """\
{"journal":1,"image":{"source":"ct.nrrd","sha256":"4d677fdbb71eacd362745673330c7228d1bc6afdabc6f6909dd97f9c67f0b9a2","size_ijk":[14,13,12],"spacing_mm":[1.0,1.0,1.5]},"model":{"name":"clicked","weights":"0765ff4c25d7519c"}}
{"do":"add","object":1,"id":1,"prompt":{"space":"ijk","type":"point","at":[7.0,6.0,6.0],"positive":true},"name":"ball"}
{"do":"add","object":1,"id":2,"prompt":{"space":"ijk","type":"scribble","path":[[6.0,6.0,6.0],[8.0,6.0,6.0]],"positive":true,"radius_vox":0.5},"look":false}
{"do":"look","object":1}
{"do":"add","object":1,"id":3,"prompt":{"space":"ijk","type":"point","at":[2.0,2.0,2.0],"positive":false}}
{"do":"move","id":1,"prompt":{"space":"ijk","type":"point","at":[7.0,7.0,6.0],"positive":true}}
{"do":"remove","id":3}
{"do":"object","object":2,"name":"second"}
{"do":"rule","others_are_negative":true}
{"do":"add","object":2,"id":4,"prompt":{"space":"ijk","type":"lasso","outline":[[2.0,2.0,3.0],[5.0,2.0,3.0],[5.0,5.0,3.0]],"positive":true}}
{"do":"object","object":2,"colour":"#010203","visible":false,"locked":true}
{"do":"add","object":3,"id":5,"prompt":{"space":"ijk","type":"mask","size":[14,13,12],"start":[1,1,1],"stop":[3,3,3],"bits":"eAH7DwABAAEA"}}
{"do":"add","object":4,"id":6,"prompt":{"space":"ijk","type":"box","min":[5.0,4.0,6.0],"max":[9.0,8.0,6.0]}}
{"do":"drop","object":4}
{"do":"undo"}
{"do":"undo"}
{"do":"redo"}
"""


def test_a_journal_of_an_earlier_version_gives_the_same_session_and_edits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    z, y, x = np.indices((12, 13, 14))
    ball = (z - 6) ** 2 + (y - 6) ** 2 + (x - 7) ** 2 < 12
    write_volume(Path("ct.nrrd"), (ball * 100).astype(np.int16), Grid(ball.shape, (1.0, 1.0, 1.5)))
    Path("old.jsonl").write_text(JOURNAL_OF_0_1_0)
    with Session.open("ct.nrrd", ClickedModel(), journal="old.jsonl") as session:
        found = [(o.name, [type(p).__name__ for p in o.prompts], o.prompt_ids) for o in session.objects()]
        assert found == [("ball", ["Point", "Scribble"], [1, 2]), ("second", ["Lasso"], [4])] + [
            ("object 3", ["Mask"], [5]),
            ("object 4", ["Box"], [6]),
        ]
        second = session.objects()[1]
        assert (second.colour, second.visible, second.locked) == ("#010203", False, True)
        assert session.others_are_negative and session.can_redo and session.mask_of(1).any()
        session.save("s.json")
    assert Path("old.jsonl").read_text() == JOURNAL_OF_0_1_0
    edits = [json.loads(line) for line in JOURNAL_OF_0_1_0.splitlines()[1:]]
    assert json.loads(Path("s.json").read_text())["edits"] == [*edits[:-3], {"do": "undo"}]


CLICKED = {"do": "add", "object": 1, "id": 1, "prompt": {"type": "point", "at": [11, 10, 9]}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": {**CLICKED["prompt"], "postive": False}}, "'postive'; did you mean positive"),
        ({"lok": False}, "an edit 'add' has no key 'lok'; did you mean look"),
        ({"nmae": "liver"}, "no key 'nmae'; did you mean name"),
        ({"object": "1"}, "object id must be a whole number from 1 to 65535, got '1'"),
        ({"object": 1.0}, "object id must be a whole number from 1 to 65535, got 1.0"),
        ({"object": True}, "object id must be a whole number from 1 to 65535, got True"),
        ({"id": "1"}, "prompt id must be a whole number"),
        ({"look": "no"}, "predict must be true or false, got 'no'"),
        ({"name": "a\nb"}, "name must be text"),
        ({"do": "object", "locked": "no"}, "locked must be true or false, got 'no'"),
        ({"do": "rule", "others_are_negative": 0}, "others_are_negative must be true or false, got 0"),
    ],
)
@pytest.mark.parametrize("kind", ["journal", "session"])
def test_a_typo_in_a_journal_or_session_is_refused(image, tmp_path, change, message, kind):
    path = tmp_path / f"{kind}.json"
    edit = {key: value for key, value in {**CLICKED, **change}.items() if change.get("do") is None or key in change}
    edit |= {"object": 1} if change.get("do") == "object" else {}
    with Session.open(image, ClickedModel(), **({"journal": path} if kind == "journal" else {})) as session:
        if kind == "session":
            session.save(path)
    if kind == "journal":
        path.write_text(path.read_text() + json.dumps(edit) + "\n")
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), "edits": [edit]}))
    before = path.read_bytes()
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        if kind == "journal":
            Session.open(image, ClickedModel(), journal=path)
        else:
            Session.load(path, model=ClickedModel())
    assert path.name in str(caught.value) and "\n" not in str(caught.value) and path.read_bytes() == before


@pytest.mark.parametrize(("part", "key"), [(None, "edit"), ("image", "modalty"), ("model", "nam")])
def test_a_typo_in_the_head_of_a_session_is_refused(image, tmp_path, part, key):
    with Session.open(image, ClickedModel()) as session:
        session.save(tmp_path / "s.json")
    body = json.loads((tmp_path / "s.json").read_text())
    (body if part is None else body[part])[key] = "CT"
    (tmp_path / "s.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=f"has no key '{key}'; did you mean"):
        Session.load(tmp_path / "s.json", model=ClickedModel())
