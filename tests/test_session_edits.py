"""Sessions that are edited: undo, redo, moved and removed prompts, the object table, locks, rules, whole sessions as
files."""

from __future__ import annotations

import json

import numpy as np
import pytest

from samed3d.drawing import OBJECT_COLOURS, colour_of
from samed3d.errors import InputError
from samed3d.inference.session import Session
from samed3d.prompts import Box, Lasso, Mask, ObjectPrompts, Point, Scribble, dump_prompts, load_prompts
from samed3d.volume import write_volume
from tests.brightness_model import BrightnessModel
from tests.clicked_model import ClickedModel
from tests.test_session import ball_volume

INSIDE, OFF = Point((13, 15, 11)), Point((3, 4, 5), positive=False)


@pytest.fixture
def model() -> ClickedModel:
    return ClickedModel()


def clicks(count: int, seed: int = 0) -> list[Point]:
    rng = np.random.default_rng(seed)
    spots = [(int(rng.integers(8, 20)), int(rng.integers(8, 20)), int(rng.integers(6, 18))) for _ in range(count)]
    return [Point(at, positive=n == 0 or bool(rng.integers(0, 2))) for n, at in enumerate(spots)]


def logits(session: Session, *ids: int) -> list[np.ndarray]:
    return [session.logits_of(n) for n in ids]


def test_undo_and_redo_are_unlimited_and_exact(model):
    volume, _ = ball_volume()
    session = Session(volume, model)
    states = []
    for n, click in enumerate(clicks(6)):
        session.add(click, object_id=1 + n % 2) if n > 1 else session.add(Point(click.at), object_id=1 + n)
        states.append({o.id: session.logits_of(o.id) for o in session.objects()})
    masks = [{n: v > 0 for n, v in state.items()} for state in states]
    for state, mask in zip(states[-2::-1], masks[-2::-1], strict=True):
        update = session.undo()
        assert update is not None and {o.id for o in session.objects()} == set(state)
        for n in state:
            np.testing.assert_array_equal(session.logits_of(n), state[n])
            np.testing.assert_array_equal(session.mask_of(n), mask[n])
    assert session.undo() is not None and session.objects() == [] and session.undo() is None and not session.can_undo
    for state in states:
        assert session.redo() is not None
        for n in state:
            np.testing.assert_array_equal(session.logits_of(n), state[n])
    assert session.redo() is None and not session.can_redo
    assert max(abs(v).max() for v in states[-1].values()) > 0


def test_an_update_is_what_changed(model):
    volume, _ = ball_volume()
    session = Session(volume, model)
    before = np.zeros(volume.array.shape, np.uint8)
    calls = [lambda c=c: session.add(c) for c in clicks(4)] + [
        session.undo,
        session.undo,
        session.redo,
        lambda: session.remove(1),
    ]
    for call in calls:
        update = call()
        after = session.mask_of(1)
        outside = after != before
        outside[update.region.slices] = False
        assert not outside.any()
        np.testing.assert_array_equal(update.mask, after[update.region.slices])
        assert update.changed == bool((after != before).any())
        before = after


def test_moving_or_removing_a_prompt_is_as_if_it_had_been_so(model):
    volume, _ = ball_volume()
    given = clicks(4)
    edited, fresh = Session(volume, model), Session(volume, model)
    ids = [edited.add(click).prompt_id for click in given]
    edited.move(ids[1], (12, 16, 10))
    for n, click in enumerate(given):
        fresh.add(Point((12, 16, 10), click.positive) if n == 1 else click)
    np.testing.assert_array_equal(edited.logits_of(1), fresh.logits_of(1))
    assert edited.objects()[0].prompts == fresh.objects()[0].prompts and edited.objects()[0].prompt_ids == ids
    edited.remove(ids[2])
    shorter = Session(volume, model)
    for click in (given[0], Point((12, 16, 10), given[1].positive), given[3]):
        shorter.add(click)
    np.testing.assert_array_equal(edited.logits_of(1), shorter.logits_of(1))
    edited.undo()
    np.testing.assert_array_equal(edited.logits_of(1), fresh.logits_of(1))


def test_what_memory_let_go_is_predicted_again_exactly(model):
    volume, _ = ball_volume()
    kept, lean = Session(volume, model), Session(volume, model)
    lean._prompts.kept_bytes = 1
    given = [*clicks(3), Box((8, 10, 11), (17, 19, 11)), Scribble(((9, 9, 9), (12, 12, 9))), *clicks(2, seed=9)]
    for session in (kept, lean):
        for prompt in given:
            session.add(prompt)
    assert len(lean._prompts._kept) == 1 < len(kept._prompts._kept)
    for _ in range(5):
        kept.undo()
        lean.undo()
        np.testing.assert_array_equal(kept.mask_of(1), lean.mask_of(1))
        np.testing.assert_array_equal(kept.logits_of(1), lean.logits_of(1))


def test_a_removed_first_prompt_may_leave_nothing_positive():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    first, second = session.add(INSIDE).prompt_id, session.add(OFF).prompt_id
    assert session.mask.any()
    session.remove(first)
    assert not session.mask.any() and session.objects()[0].prompt_ids == [second]
    session.remove(second)
    assert session.objects()[0].prompts == []
    session.undo()
    session.undo()
    assert session.mask.any()


def test_the_object_table():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add(INSIDE, object_id=2, name="ball")
    assert session.new_object("other") == 1 and session.current == 1
    assert [(o.id, o.name, o.voxels > 0, o.visible, o.locked) for o in session.objects()] == [
        (1, "other", False, True, False),
        (2, "ball", True, True, False),
    ]
    session.edit_object(2, name="sphere", colour="#FF00aa", visible=False)
    assert (session.objects()[1].name, session.objects()[1].colour, session.objects()[1].visible) == (
        "sphere",
        "#ff00aa",
        False,
    )
    session.undo()
    assert (session.objects()[1].name, session.objects()[1].visible) == ("ball", True)
    session.remove_object(2)
    assert [o.id for o in session.objects()] == [1]
    update = session.undo()
    assert update.object_id == 2 and update.mask.any() and session.mask_of(2).any()
    with pytest.raises(InputError, match=r"object must be one of the session's \(1, 2\), got 9"):
        session.edit_object(9, name="x")
    with pytest.raises(InputError, match="colour must be of the form #rrggbb, got 'red'"):
        session.edit_object(2, colour="red")
    for misuse in (lambda: session.add(None), lambda: session.move(1, None), lambda: session.save(None)):
        with pytest.raises(InputError, match=r"must be (a Point, Box|three numbers|a path, got NoneType)"):
            misuse()
    with pytest.raises(InputError, match="prompt must be one of the session's, got number 77"):
        session.move(77, (1, 2, 3))
    with pytest.raises(InputError, match="object id must be a whole number from 1 to 65535, got 0"):
        session.add(INSIDE, object_id=0)


def test_a_name_given_with_a_prompt_names_or_renames_the_object():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add(INSIDE)
    session.add(INSIDE, name="ball")
    assert session.objects()[0].name == "ball"
    session.undo()
    assert session.objects()[0].name == "object 1"
    session.redo()
    session.add_all([ObjectPrompts(1, "other", [INSIDE]), ObjectPrompts(2, "second", [INSIDE, INSIDE])])
    assert [(o.name, len(o.prompts)) for o in session.objects()] == [("ball", 3), ("second", 2)]


def test_a_new_objects_colour_is_that_of_its_preview():
    volume, _ = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    session.add(Point((1, 1, 1)), object_id=2)
    assert session.objects()[0].colour == OBJECT_COLOURS[1] == colour_of(2)
    assert colour_of(1) == OBJECT_COLOURS[0] == colour_of(1 + len(OBJECT_COLOURS))


def test_a_locked_object_stays_as_it_is_and_on_top():
    volume, mask = ball_volume()
    session = Session(volume, BrightnessModel((32, 32, 32)))
    number = session.add(INSIDE, object_id=3).prompt_id
    session.edit_object(3, locked=True)
    for attempt in (
        lambda: session.add(INSIDE, object_id=3),
        lambda: session.remove(number),
        lambda: session.move(number, (1, 2, 3)),
    ):
        with pytest.raises(InputError, match=r"object 3 \(object 3\) is locked; unlock it first"):
            attempt()
    with pytest.raises(InputError, match="is locked"):
        session.remove_object(3)
    session.add(INSIDE, object_id=1)  # the same voxels, as certain, with a lower id
    assert session.labels[11, 15, 13] == 3 and not (session.labels == 1)[session.mask_of(3) > 0].any()
    session.edit_object(3, locked=False)
    assert session.labels[11, 15, 13] == 1


def test_where_objects_overlap_the_more_certain_one_wins(model):
    volume, _ = ball_volume()
    session = Session(volume, model)
    for n, click in enumerate(clicks(3, seed=4), start=1):
        session.add(Point(click.at), object_id=n)
    stack = np.stack([np.where(v > 0, v, 0) for v in logits(session, 1, 2, 3)])
    np.testing.assert_array_equal(session.labels, np.where(stack.max(0) > 0, stack.argmax(0) + 1, 0))
    assert (np.count_nonzero(stack, axis=0) > 1).any()


def test_other_objects_are_background_if_asked():
    volume, _ = ball_volume()
    model = BrightnessModel((32, 32, 32))
    session = Session(volume, model)
    session.add(INSIDE, object_id=1)
    session.others_are_negative = True
    session.add(Point((16, 15, 11)), object_id=2)
    both = session.mask_of(1) & session.mask_of(2)
    assert both.sum() == 1 and both[11, 15, 16]  # only the voxel that was clicked
    assert 0 in model.seen[-1].point_labels.tolist()[0]
    session.undo()
    session.undo()
    assert not session.others_are_negative
    session.add(Point((16, 15, 11)), object_id=2)
    assert (session.mask_of(1) & session.mask_of(2)).sum() > 100


def test_a_click_off_the_object_never_adds(model):
    volume, _ = ball_volume()
    taken = 0
    for seed in range(3):
        session = Session(volume, model)
        for click in clicks(6, seed):
            before = session.mask_of(1).astype(bool) if session.current else None
            session.add(click)
            if not click.positive:
                assert not (session.mask_of(1).astype(bool) & ~before).any()
                taken += int((before & ~session.mask_of(1).astype(bool)).sum())
    assert taken > 10


def test_prompts_can_wait_for_one_prediction():
    volume, _ = ball_volume()
    model = BrightnessModel((32, 32, 32))
    session = Session(volume, model)
    assert not session.add(INSIDE, predict=False).changed and model.seen == []
    session.add(OFF, predict=False)
    update = session.predict()
    assert update.changed and len(model.seen) == 1 and model.seen[0].point_labels.tolist() == [[1, 0]]
    assert session.predict().object_id == 1 and model.seen[-1].mask_logits is not None
    with pytest.raises(InputError, match="object must be one of the session's"):
        session.predict(5)


def test_a_suggested_click_is_doubtful_near_the_border_and_away_from_clicks(model):
    volume, _ = ball_volume()
    session = Session(volume, model)
    with pytest.raises(InputError, match="has no mask yet"):
        session.suggest_click()
    session.add(INSIDE)
    first = session.suggest_click()
    assert volume.grid.contains_ijk(first.at)
    probability = session.probability()[tuple(int(v) for v in first.at[::-1])]
    assert first.positive == (probability > 0.5)
    session.add(first)
    assert np.linalg.norm(np.subtract(session.suggest_click().at, first.at)) >= 3.9


def test_a_session_file_brings_everything_back(tmp_path, model):
    volume, _ = ball_volume()
    write_volume(tmp_path / "ct.nrrd", volume.array, volume.grid)
    session = Session.open(tmp_path / "ct.nrrd", model)
    for n, click in enumerate(clicks(4)):
        session.add(click, object_id=1, name="ball") if n else session.add(INSIDE, object_id=1, name="ball")
    session.add(Scribble(((10, 15, 11), (16, 15, 11)), radius_vox=1.5), object_id=2, name="line")
    session.edit_object(2, colour="#010203", locked=True)
    session.add(Mask(session.mask_of(1)), object_id=3)
    session.undo()
    session.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["objects"][1]["prompts"][0]["type"] == "scribble"
    again = Session.load(tmp_path / "s.json", model=model)
    assert again.objects() == session.objects()
    for n in (1, 2):
        np.testing.assert_array_equal(again.logits_of(n), session.logits_of(n))
    assert again.redo().object_id == 3
    np.testing.assert_array_equal(again.mask_of(3), session.mask_of(1))
    assert again.add(INSIDE, object_id=9).prompt_id not in [n for o in session.objects() for n in o.prompt_ids]

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "ct.nrrd").rename(moved / "ct.nrrd")
    (tmp_path / "s.json").rename(moved / "s.json")
    assert Session.load(moved / "s.json", model=model).objects() == session.objects()
    other, _ = ball_volume(radius=6.0)
    write_volume(moved / "ct.nrrd", other.array, other.grid)
    with pytest.raises(InputError, match="belongs to another image"):
        Session.load(moved / "s.json", model=model)
    (moved / "ct.nrrd").unlink()
    with pytest.raises(InputError, match="image of the session is not there any more"):
        Session.load(moved / "s.json", model=model)
    (moved / "s.json").write_text("{}")
    with pytest.raises(InputError, match='must be an object with "session": 1'):
        Session.load(moved / "s.json", model=model)


def test_every_kind_of_prompt_survives_a_prompt_file(tmp_path):
    mask = np.zeros((4, 5, 6), bool)
    mask[1:3, 2:4, 3:5] = True
    prompts = [
        Scribble(((1.5, 2, 3), (4, 5, 6)), False, 2.5),
        Lasso(((1, 1, 1), (5, 1, 1), (5, 5, 1))),
        Box((1, 2, 3), (4, 5, 3)),
        Mask(mask),
    ]
    dump_prompts([ObjectPrompts(1, "all", prompts)], tmp_path / "p.json")
    read = load_prompts(tmp_path / "p.json")[0].prompts
    assert read == prompts
    np.testing.assert_array_equal(read[3].mask.full(), mask)
    (tmp_path / "p.json").write_text('{"version": 1, "objects": [{"prompts": [{"type": "mask", "path": "m.nrrd"}]}]}')
    assert load_prompts(tmp_path / "p.json")[0].prompts[0].mask == str(tmp_path / "m.nrrd")


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.int16])
def test_ids_are_of_any_integral_type(tmp_path, model, kind):
    with Session.open(ball_volume()[0], model, journal=tmp_path / "j.jsonl") as session:
        number = session.add(INSIDE, object_id=kind(3)).prompt_id
        session.move(kind(number), Point((12, 15, 11), np.True_))
        session.edit_object(kind(3), name="ball", visible=np.False_)
        session.add_all([ObjectPrompts(kind(4), "b", [INSIDE])])
        session.remove_object(kind(4))
        assert session.mask_of(kind(3)).any() and session.objects()[0].id == 3 and type(session.objects()[0].id) is int
        session.save(tmp_path / "s.json")
        session.remove(kind(number))
    dump_prompts([ObjectPrompts(kind(3), "ball", [Point((1, 2, 3), np.False_), INSIDE])], tmp_path / "p.json")
    assert load_prompts(tmp_path / "p.json")[0].prompts[0].positive is False


@pytest.mark.parametrize("wrong", [True, np.True_, 1.0, np.float32(1), "1", None, 0, -1, 2**16, [1]])
def test_what_is_no_id_is_refused_everywhere(model, wrong):
    session = Session(ball_volume()[0], model)
    session.add(INSIDE)
    before = session.objects()
    calls = [
        lambda: session.add(INSIDE, wrong),
        lambda: ObjectPrompts(wrong),
        lambda: session.edit_object(wrong, name="x"),
    ]
    calls += [lambda: session.mask_of(wrong), lambda: session.remove_object(wrong), lambda: session.logits_of(wrong)]
    if wrong is not None:
        calls += [
            lambda: session.predict(wrong),
            lambda: session.probability(wrong),
            lambda: session.suggest_click(wrong),
        ]
    if wrong != 2**16:
        calls += [
            lambda: session.remove(wrong),
            lambda: session.move(wrong, INSIDE),
            lambda: session.move(wrong, (1, 2, 3)),
        ]
    for call in calls:
        with pytest.raises(InputError, match=r"id must be a whole number from|object 0 has no mask"):
            call()
    assert session.objects() == before


@pytest.mark.parametrize("wrong", ["false", 0, 1, None, 0.0, [False]])
@pytest.mark.parametrize("kind", [Point, Scribble, Lasso])
def test_what_is_not_true_or_false_never_counts_as_positive(kind, wrong):
    at = (1, 2, 3) if kind is Point else [(1, 2, 3), (4, 2, 3), (4, 5, 3)]
    with pytest.raises(InputError, match="positive must be true or false, got"):
        kind(at, wrong)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "\x1b[31mred", "\ud800", "x" * 201, 7, b"x"])
def test_names_that_no_file_can_hold_are_refused(model, name):
    session = Session(ball_volume()[0], model)
    session.add(INSIDE)
    for call in (
        lambda: session.add(INSIDE, 2, name),
        lambda: session.new_object(name),
        lambda: session.edit_object(1, name=name),
        lambda: session.add_all([ObjectPrompts(2, name, [INSIDE])]),
    ):
        with pytest.raises(InputError, match="name must be text of at most 200 characters, none of them control"):
            call()
    assert [o.name for o in session.objects()] == ["object 1"]


def test_two_objects_of_the_same_voxels_are_said(model):
    session = Session(ball_volume()[0], model)
    session.add(INSIDE, 1, "liver")
    assert session.report()["notes"] == []
    session.add(INSIDE, 2, "spleen")
    assert "objects 1 (liver) and 2 (spleen) are exactly the same voxels" in session.report()["notes"][0]
