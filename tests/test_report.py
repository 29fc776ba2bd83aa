"""The report: a page that parses, needs nothing else, and shows the numbers that can be computed by hand."""

import base64
import io
import os
import re
import xml.etree.ElementTree as ET
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from saved_results import SETTINGS, make_rows, save_prompts, save_run

from samed3d.cli import main
from samed3d.drawing import NEGATIVE, POSITIVE, PREDICTION, TRUTH
from samed3d.errors import InputError
from samed3d.evaluation.pictures import case_pictures, case_png, worst_and_typical
from samed3d.evaluation.report import write_report
from samed3d.evaluation.results import read_run, size_class, size_order
from samed3d.evaluation.statistics import Compared, Estimate, PairedDifference, differences, headline
from samed3d.evaluation.tables import curve_chart, difference_chart
from samed3d.geometry import Grid
from samed3d.prompts import Box, Point
from samed3d.volume import Volume, write_volume

DATA = Path(os.environ.get("SAMED3D_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
VOID = {"meta", "img", "br"}


class Balance(HTMLParser):
    """Keeps the open tags, the ids, the links and all text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.addresses, self.text = [], set(), [], [], []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values["id"]} if "id" in values else set()
        self.links += [values["href"]] if "href" in values else []
        self.addresses += [v for k, v in attrs if k in ("src", "href", "data", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """An SVG mark closes itself."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path: Path) -> tuple[str, Balance]:
    text = path.read_text(encoding="utf-8")
    page = Balance()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


def report(tmp_path, rows, settings=SETTINGS, **results) -> tuple[str, Balance]:
    return parsed(write_report(save_run(tmp_path / "run", rows, settings, **results), picture_seconds=0))


@pytest.fixture(scope="module")
def two_models(tmp_path_factory) -> tuple[str, Balance]:
    """The page of the rows that ``make_rows`` makes."""
    return report(tmp_path_factory.mktemp("report"), make_rows())


def test_the_page_parses_and_needs_no_other_file(two_models):
    text, page = two_models
    assert all(a.startswith(("#", "data:")) for a in page.addresses)
    assert {link[1:] for link in page.links if link.startswith("#")} <= page.ids
    assert "<script" not in text and "@import" not in text and all(a[0] == "#" for a in re.findall(r"url\((.)", text))
    assert text.count("prefers-color-scheme: dark") == 1 and "@media print" in text


def test_it_names_every_model_the_command_and_the_revision(two_models):
    shown = " ".join(two_models[1].text)
    for word in ("ours", "theirs", "samed3d evaluate DATA -o out", "abc123", "threads", "unseen subject"):
        assert word in shown


def test_every_mean_of_the_curves_is_on_the_page(two_models):
    text, page = two_models
    shown = " ".join(page.text)
    # Subject n scores value + n / 100: over eight subjects value + 0.035, over the four of dataset a value + 0.03, of b
    # value + 0.04.
    for name, values in {"ours": (0.335, 0.635, 0.935), "theirs": (0.235, 0.435, 0.635)}.items():
        cells = r".*?".join(rf"{value:.3f} \[" for value in values)
        assert re.search(rf"{name}\s+8\s+8\s+{cells}", shown)
    for name, first in (("a", "0.330"), ("b", "0.340"), ("CT", "0.330"), ("MR", "0.340")):
        assert re.search(rf" {name}\s+ours\s+4\s+4\s+{first} ", shown)
        assert f'aria-label="{name} (4)"' in text


def test_every_drawing_is_xml_in_colours_of_the_page(two_models):
    text, _ = two_models
    drawings = re.findall(r"<svg class=\"chart\".*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) == 2 + 2 + 2 + 3 + 2  # all twice, datasets, modalities, sizes, differences and times
    for drawing in drawings:
        ET.fromstring(drawing)
        assert "var(--s0)" in drawing and "var(--faint)" in drawing


def test_names_from_outside_are_escaped(tmp_path):
    text, _ = report(tmp_path, make_rows({"<b>x</b> & co": (0.3, 0.6, 0.9)}, source="<script>alert(1)</script>"))
    assert "<script>alert" not in text and "<b>x</b>" not in text
    assert "&lt;b&gt;x&lt;/b&gt; &amp; co" in text


def test_models_that_do_not_differ_are_called_so(tmp_path):
    text, _ = report(tmp_path, make_rows({"one": (0.3, 0.6, 0.9), "two": (0.3, 0.6, 0.9)}))
    line = next(row for row in re.findall(r"<tr>.*?</tr>", text) if "after 3 clicks" in row)
    assert re.findall(r"<td[^>]*>([^<]*)", line)[3:7] == ["+0.000", "1", "1", "1"]
    assert "0 / 8 / 0" in line


def test_a_difference_has_its_sign_and_its_p(tmp_path):
    found = differences(make_rows(), ["ours", "theirs"])
    assert [c.what for c in found] == ["after 1 click", "after 3 clicks", "area under the curve"]
    assert found[1].result.difference.mean == pytest.approx(0.3)
    assert found[1].result.p_wilcoxon == pytest.approx(2 / 2**8)
    assert found[1].corrected == pytest.approx(6 / 2**8)


def test_many_models_are_compared_with_the_first_only():
    rows = make_rows({name: (0.1 * n, 0.2 * n) for n, name in enumerate("abcde", start=1)})
    assert {c.first for c in differences(rows, list("abcde"))} == {"a"}
    assert len(differences(rows, list("abcde"))) == 4 * 3


def test_the_headline_of_rows_known_by_hand():
    found = headline(make_rows({"ours": (0.3, 0.85, 0.84)}, subjects=1))
    h = {name: estimate.mean for name, estimate in found.items()}
    assert h["area"] == pytest.approx((0.3 + 0.85) / 4 + (0.85 + 0.84) / 4)
    # 0.90 is never reached: one more than were given
    assert [h[f"clicks to {q}"] for q in (0.8, 0.85, 0.9)] == [2, 2, 4]
    assert [h[f"failures at {q}"] for q in (0.8, 0.85, 0.9)] == [0, 0, 1]
    assert h["lowered"] == 0 and h["obeyed"] == 1  # a fall by exactly 0.01 is no fall by more
    assert (h["first"], h["later"]) == (0.5, 0.05)


def test_trained_on_subjects_are_apart_and_said(tmp_path):
    remembered = make_rows({"ours": (0.99, 0.99, 0.99)}, group="trained on", case="seen", subject="seen", source="s")
    text, page = report(tmp_path, make_rows() + remembered)
    shown = " ".join(page.text)
    assert "24 of 72 rows are of subjects that the checkpoints were trained on" in shown
    assert re.search(r"ours\s+8\s+8\s+0.335 .*? 0.635 .*? 0.935 \[", shown)  # the curve is of the others alone
    assert "s (1)" not in text
    only = report(tmp_path / "only", make_rows(group="trained on"))[0]
    assert "not how accurate" in only


def test_ways_of_clicking_are_kept_apart(tmp_path):
    text, page = report(tmp_path, make_rows() + make_rows(policy="uniform", shift=-0.1))
    shown = " ".join(page.text)
    assert "samed3d, centre clicks" in shown and "samed3d, uniform clicks" in shown
    assert "0.335<small>" in text and "0.235<small>" in text and "0.285<small>" not in text


def test_a_protocol_is_shown_with_its_bias_and_its_own_figures(tmp_path):
    rows = make_rows({"ours": (0.2, 0.3, 0.6, 0.9)}, protocol="cvpr25", policy="own")
    for row in rows:
        row["click"] -= 1  # a box first
    own = {"model": "ours", "protocol": "cvpr25", "policy": "own", "prompt": "click", "group": "unseen subject"}
    lines = [
        own | {"score": "DSC_AUC", "value": 2.125, "interval": [2.0, 2.25]},
        own | {"score": "area", "value": 0.77, "interval": None},
    ]
    about = {"cvpr25": {"title": "box then clicks", "flattering": "the crop knows the truth"}}
    text, page = report(tmp_path, rows, protocols=about, scores=lines)
    shown = " ".join(page.text)
    assert "box then clicks" in shown and "These scores are optimistically biased: the crop knows the truth." in shown
    assert "2.125<small>[2.000, 2.250]</small>" in text and "0.770" not in text
    # The area is that of the three clicks, without the box: trapezoids of 0.335, 0.635 and 0.935.
    assert headline(rows)["area"].mean == pytest.approx(0.635)
    assert "first prompt" in shown and "own clicks" not in shown


def test_models_measured_on_other_numbers_of_structures_are_pointed_out(tmp_path):
    _, page = report(
        tmp_path, make_rows({"ours": (0.3, 0.6, 0.9)}) + make_rows({"theirs": (0.2, 0.4, 0.6)}, subjects=5)
    )
    assert "not measured on the same number" in " ".join(page.text)


def test_an_older_table_with_few_columns_is_read(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "cases.csv").write_text("model,case,click,dice\nm,c1,1,0.25\nm,c1,2,0.75\nm,c2,1,0.5\nm,c2,2,0.5\n")
    text, page = parsed(write_report(folder, picture_seconds=0))
    assert "0.375" in text
    shown = " ".join(page.text)
    assert "size not stated" in shown and "The command was not recorded" in shown and "No times were recorded" in shown
    assert "nan" not in unescape(re.sub(r"<style>.*?</style>", "", text)).lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must hold cases.csv"),
        ("", "must have rows"),
        ("model,case,click,dice\nm,c,one,0.5\n", "is not a table of results"),
    ],
)
def test_a_folder_without_results_is_refused_in_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "cases.csv").write_text(content)
    with pytest.raises(InputError, match=message) as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_sizes_are_named_and_sorted():
    names = [size_class({"volume_ml": v}) for v in (0.05, 0.5, 5.0, 50.0, 500.0)]
    assert names == ["under 0.1 ml", "0.1 to 1 ml", "1 to 10 ml", "10 to 100 ml", "100 ml and more"]
    assert sorted(reversed(names), key=size_order) == names
    voxels = [size_class({"voxels": v}) for v in (10, 1000, 2_000_000)]
    assert voxels == ["under 1,000 voxels", "1,000 to 10,000 voxels", "1,000,000 voxels and more"]
    assert sorted(reversed(voxels), key=size_order) == voxels


def test_a_chart_places_its_marks_by_their_values():
    curves = {"m": {1: Estimate(0.0, 0.0, 0.1, 2, 2), 3: Estimate(1.0, 0.9, 1.0, 2, 2)}}
    root = ET.fromstring(curve_chart(curves, ["m"], "t"))
    marks = [e for e in root.iter("use") if "var(--s0)" in e.get("style") and "opacity" not in e.get("style")]
    (x1, y1), (x3, y3), *_ = [(float(e.get("x")), float(e.get("y"))) for e in marks]
    assert x1 < x3 and y1 > y3  # pixels count from above
    ticks = [float(e.get("y")) for e in root.iter("use") if "var(--faint)" in e.get("style")]
    assert (y1, y3) == (max(ticks), min(ticks))  # Dice 0 and 1 are the ends of the axis


def test_a_line_of_unknown_values_leaves_a_chart_whole():
    nan = float("nan")
    unknown, alone = Estimate(nan, nan, nan, 0, 0, 1), Estimate(0.5, nan, nan, 1, 1)
    ET.fromstring(curve_chart({"m$1$": {0: unknown, 1: alone}}, ["m$1$"], "t"))
    assert curve_chart({"m": {0: unknown}}, ["m"], "t") == ""
    same = PairedDifference(Estimate(0.0, nan, nan, 1, 1), nan, nan, 0, 1, 0)
    ET.fromstring(difference_chart([Compared("a", "b", "after 1 click", same, nan)]))


def test_without_its_packages_a_report_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("samed3d.pages.find_spec", lambda name: None)
    folder = save_run(tmp_path / "run", make_rows())
    told = "a report needs jinja2 and matplotlib; install with: pip install 'samed3d[evaluate]'"
    with pytest.raises(InputError, match=re.escape(told)):
        write_report(folder)
    assert main(["evaluate", str(DATA), "--quick", "-o", str(tmp_path / "new")]) == 2
    assert "give --no-report" in capsys.readouterr().err and not (tmp_path / "new").exists()


# Pictures


def test_the_worst_and_the_typical_are_chosen_by_the_last_click():
    rows = make_rows({"ours": (0.5, 0.5, 0.1)}, subjects=30)
    worst, typical = worst_and_typical(rows, 4)
    assert [c[0]["case"] for c in worst] == ["case0", "case1", "case2", "case3"]
    assert {c[0]["case"] for c in typical} == {"case14", "case15", "case13", "case16"}
    few_worst, few_typical = worst_and_typical(make_rows({"ours": (0.5, 0.5, 0.1)}, subjects=5), 10)
    assert (len(few_worst), len(few_typical)) == (3, 2)  # not all of a few are the worst
    seeds = make_rows({"ours": (0.5, 0.4, 0.3)}, subjects=1) + make_rows({"ours": (0.5, 0.4, 0.2)}, subjects=1, seed=1)
    assert [c[0]["seed"] for c in worst_and_typical(seeds, 4)[0]] == [1]  # a structure once, with its worst seed


def ball(shape=(12, 30, 30)) -> tuple[Volume, np.ndarray]:
    z, y, x = np.ogrid[: shape[0], : shape[1], : shape[2]]
    truth = (3 * (z - 6)) ** 2 + (y - 15) ** 2 + (x - 12) ** 2 <= 49
    image = np.where(truth, 100, 20).astype(np.int16) + np.random.default_rng(0).integers(0, 9, shape).astype(np.int16)
    return Volume(image, Grid(shape, (1.0, 1.0, 3.0), (0.0, 0.0, 0.0)), "ball"), truth


def count_like(png: bytes, colour: str) -> int:
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    return int((np.abs(pixels - ImageColor.getrgb(colour)).sum(axis=2) < 60).sum())


def test_a_picture_shows_label_prediction_and_prompts():
    volume, truth = ball()
    other = np.roll(truth, 6, axis=2)
    alone = case_png(volume, truth, np.zeros_like(truth), [])
    both = case_png(volume, truth, other, [])
    assert count_like(alone, TRUTH) > 100 and count_like(alone, PREDICTION) == 0
    assert count_like(both, TRUTH) > 100 and count_like(both, PREDICTION) > 100
    clicked = case_png(volume, truth, other, [Point((12, 15, 6)), Point((25, 15, 6), positive=False)])
    boxed = case_png(volume, truth, other, [Box((5, 8, 4), (19, 22, 8))])
    assert count_like(boxed, POSITIVE) > count_like(clicked, POSITIVE) > 20 > count_like(both, POSITIVE)
    assert count_like(clicked, NEGATIVE) > 10 > count_like(both, NEGATIVE)
    assert Image.open(io.BytesIO(clicked)).size == Image.open(io.BytesIO(alone)).size


def save_ball_run(tmp_path, model="region_growing", protocol="samed3d", dice=(0.3, 0.6)):
    volume, truth = ball()
    tmp_path.mkdir(exist_ok=True)
    write_volume(tmp_path / "image.nii.gz", volume.array, volume.grid)
    write_volume(tmp_path / "label.nii.gz", truth.astype(np.uint8), volume.grid)
    rows = make_rows({model: dice}, subjects=1, protocol=protocol)
    folder = save_run(tmp_path / "run", rows)
    about = {k: rows[0][k] for k in ("model", "protocol", "source", "case", "label", "seed", "policy", "prompt")}
    turns = [{"click": 1, "prompts": [{"type": "point", "at": [12, 15, 6], "positive": True}]}]
    line = about | {
        "image": str(tmp_path / "image.nii.gz"),
        "labels_file": str(tmp_path / "label.nii.gz"),
        "turns": turns,
    }
    save_prompts(folder, [line])
    return folder, line


def test_a_case_is_made_again_from_its_prompts_and_a_difference_is_told(tmp_path):
    folder, _ = save_ball_run(tmp_path)
    text, page = parsed(write_report(folder, picture_seconds=60))
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 1
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]))).width > 700
    shown = " ".join(page.text)
    assert "0.30 \u2192 0.60" in shown and "liver <left>" in shown
    assert "Not made again exactly" in shown  # the saved scores were made up


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda folder, line: Path(line["image"]).unlink(), "the file is not there any more"),
        (lambda folder, line: (folder / "prompts.jsonl").unlink(), "no prompts.jsonl"),
        (lambda folder, line: save_prompts(folder, [line | {"label": 9}]), "prompts.jsonl has no line for it"),
        (lambda folder, line: save_prompts(folder, [line | {"turns": []}]), "no prompt was given"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(tmp_path, change, told):
    folder, line = save_ball_run(tmp_path)
    change(folder, line)
    text, page = parsed(write_report(folder, picture_seconds=60))
    assert told in " ".join(page.text) and "data:image/png" not in text


def test_pictures_stop_when_their_time_is_up_and_for_protocols_with_their_own_crop(tmp_path):
    folder, _ = save_ball_run(tmp_path)
    assert case_pictures(read_run(folder), -1.0).left_out == {"the time for pictures was up": 1}
    folder, _ = save_ball_run(tmp_path / "other", protocol="cvpr25")
    assert "protocol cvpr25" in case_pictures(read_run(folder), 60).intro


@pytest.mark.skipif(not (DATA / "prostate_trus_deepreg").is_dir(), reason="needs the shared data: set SAMED3D_DATA")
def test_a_real_case_is_drawn(tmp_path):
    image = min((DATA / "prostate_trus_deepreg" / "imagesTr").glob("*.nii.gz"))
    label = DATA / "prostate_trus_deepreg" / "labelsTr" / (image.name.removesuffix("_0000.nii.gz") + ".nii.gz")
    rows = make_rows({"region_growing": (0.3,)}, subjects=1)
    folder = save_run(tmp_path / "run", rows)
    about = {k: rows[0][k] for k in ("model", "protocol", "source", "case", "label", "seed", "policy", "prompt")}
    turns = [{"click": 1, "prompts": [{"type": "point", "at": [22, 29, 20], "positive": True}]}]
    save_prompts(folder, [about | {"image": str(image), "labels_file": str(label), "turns": turns}])
    assert [len(figures) for _, figures in case_pictures(read_run(folder), 60).lists] == [1, 0]
