"""Runs side by side: what is paired, what is refused, and what both outputs show."""

import json

import pytest
from saved_results import SETTINGS, make_rows, save_run

from samed3d.cli.compare import compare
from samed3d.errors import InputError
from samed3d.evaluation.compare import compare_runs, comparison_text, write_comparison


def two_runs(tmp_path, second=None, settings=SETTINGS, **results):
    """An older and a newer run of one model; the newer one scores 0.05 more where nothing else is given."""
    rows = make_rows({"ours": (0.3, 0.6, 0.9)})
    newer = make_rows({"ours": (0.3, 0.6, 0.9)}, shift=0.05) if second is None else second
    return [save_run(tmp_path / "old", rows), save_run(tmp_path / "new", newer, settings, **results)]


def test_the_same_model_of_two_runs_is_paired_newer_minus_older(tmp_path):
    found = compare_runs(two_runs(tmp_path))
    assert [e.name for e in found.entries] == ["old: ours", "new: ours"]
    ((_, differences),) = found.differences
    assert [(c.first, c.second, c.what) for c in differences] == [
        ("new: ours", "old: ours", "after 1 click"),
        ("new: ours", "old: ours", "after 3 clicks"),
        ("new: ours", "old: ours", "area under the curve"),
    ]
    assert differences[0].result.difference.mean == pytest.approx(0.05)
    # Eight subjects that all gain: two in 2 ** 8, tripled by Holm for three tests.
    assert differences[0].result.p_wilcoxon == pytest.approx(2 / 2**8)
    assert differences[0].corrected == pytest.approx(6 / 2**8)


def test_a_run_beside_its_copy_shows_no_difference(tmp_path):
    found = compare_runs(two_runs(tmp_path, second=make_rows({"ours": (0.3, 0.6, 0.9)})))
    for c in found.differences[0][1]:
        assert c.result.difference.mean == 0 and c.result.p_wilcoxon == c.result.p_bootstrap == c.corrected == 1
    assert "+0.000" in comparison_text(found)


def test_models_with_other_names_are_paired_with_each_other(tmp_path):
    found = compare_runs(two_runs(tmp_path, second=make_rows({"theirs": (0.1, 0.2, 0.3)})))
    assert [e.name for e in found.entries] == ["ours", "theirs"]
    assert found.differences[0][1][0].result.difference.mean == pytest.approx(-0.2)


def test_the_text_holds_every_number_of_the_table(tmp_path):
    text = comparison_text(compare_runs(two_runs(tmp_path)))
    old, new = (
        next(line for line in text.splitlines() if line.startswith(name)) for name in ("old: ours", "new: ours")
    )
    # Mean over eight subjects of value + 0.01 n is value + 0.035; the last click of the newer run is capped at 1.
    assert old.split()[2:8] == ["8", "8", "0.335", "0.635", "0.935", "0.635"]
    assert old.split()[-4:] == ["500", "ms", "50", "ms"]
    assert new.split()[4:6] == ["0.385", "0.685"]
    assert "+0.050" in text and "0.0078" in text


def test_the_page_opens_alone_and_names_both_runs(tmp_path):
    path = write_comparison(compare_runs(two_runs(tmp_path)), tmp_path / "compare.html")
    text = path.read_text()
    assert "old: ours" in text and "new: ours" in text and "+0.050" in text
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text


@pytest.mark.parametrize(
    ("rows", "settings", "what"),
    [
        (make_rows({"ours": (0.5,)}, protocol="cvpr25"), SETTINGS, "prompt strategies .*samed3d.*cvpr25"),
        (make_rows({"ours": (0.5,)}, policy="uniform"), SETTINGS, "prompt strategies .*centre clicks.*uniform clicks"),
        (None, SETTINGS | {"split": "all"}, "split .*old: val; new: all"),
        (
            None,
            SETTINGS | {"kept_from": {"validation_share": 0.1, "seed": 0, "hold_out": []}},
            "subjects kept from training",
        ),
        (make_rows({"ours": (0.5, 0.5, 0.5)}, case="elsewhere"), SETTINGS, "data .no structure and seed in common"),
    ],
)
def test_runs_that_are_not_alike_are_refused_and_told_apart_when_wanted(tmp_path, rows, settings, what):
    runs = two_runs(tmp_path, rows, settings)
    with pytest.raises(InputError, match=f"do not compare: {what}.*--anyway"):
        compare_runs(runs)
    found = compare_runs(runs, anyway=True)
    assert found.unlike
    assert "Not alike" in comparison_text(found)
    assert "Not alike" in write_comparison(found, tmp_path / "c.html").read_text()


def test_ways_that_differ_are_never_tested_against_each_other(tmp_path):
    found = compare_runs(two_runs(tmp_path, make_rows({"ours": (0.5, 0.6, 0.7)}, protocol="cvpr25")), anyway=True)
    assert found.differences == []
    assert "No paired test" in comparison_text(found)


def test_subjects_that_were_trained_on_are_left_out(tmp_path):
    remembered = make_rows({"ours": (0.9, 0.9, 0.9)}, group="trained on", case="seen", subject="seen")
    runs = [save_run(tmp_path / n, make_rows({"ours": (0.3, 0.6, 0.9)}) + remembered) for n in ("old", "new")]
    assert all(r["group"] == "unseen subject" for e in compare_runs(runs).entries for r in e.rows)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["old"], "at least two results folders, got 1"),
        (["old", "old"], "given once"),
        (["old", "empty"], "must hold cases.csv"),
    ],
)
def test_bad_input_is_one_line(tmp_path, folders, message):
    two_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as error:
        compare_runs([tmp_path / f for f in folders])
    assert "\n" not in str(error.value)


def test_folders_of_one_name_are_told_apart_by_their_path(tmp_path):
    rows = make_rows({"ours": (0.3, 0.6, 0.9)})
    runs = [save_run(tmp_path / n / "eval", rows) for n in ("monday", "friday")]
    assert [e.run for e in compare_runs(runs).entries] == ["monday/eval", "friday/eval"]


def test_the_command_prints_the_table_and_writes_the_page(tmp_path, capsys):
    compare(two_runs(tmp_path), output=tmp_path, anyway=False)
    shown = capsys.readouterr().out
    assert "old: ours" in shown and str(tmp_path / "compare.html") in shown
    assert (tmp_path / "compare.html").is_file()
    with pytest.raises(InputError, match="results folder does not exist"):
        compare([tmp_path / "old", tmp_path / "nowhere"])


def test_a_damaged_run_is_named(tmp_path):
    runs = two_runs(tmp_path)
    (runs[1] / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json is not JSON"):
        compare_runs(runs)
    (runs[1] / "results.json").write_text(json.dumps({}))
    (runs[1] / "cases.csv").write_text("model,click\nours,1\n")
    with pytest.raises(InputError, match="columns case, click and dice"):
        compare_runs(runs)


def test_areas_of_different_lengths_are_never_in_one_column(tmp_path):
    short, long = (0.2, 0.4, 0.6), (0.2, 0.4, 0.6, 1.0, 1.0)
    runs = [
        save_run(tmp_path / name, make_rows({name: curve}, subjects=2)) for name, curve in (("a", short), ("b", long))
    ]
    text = comparison_text(compare_runs(runs))
    head, *lines = next(part for part in text.split("\n\n") if part.startswith("run and model")).splitlines()
    assert "area to 3 clicks" in head and "NSD to 3 clicks" in head
    assert len({tuple(line.split()[-5:-2]) for line in lines}) == 1, "the first three clicks are alike"
