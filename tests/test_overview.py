"""What people see of a corpus: the printed tables and the page with pictures."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.overview import kind_of_reason, summarise, write_page
from samed3d.cli import main
from samed3d.data.corpus import Corpus
from tests.corpus_sources import make_source, store_case, store_corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cases with image, the same image in another source, and a label map."""
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:18, 12:18, 3:17] = 1
    image = (np.random.default_rng(0).integers(0, 40, labels.shape) + 100 * labels).astype(np.int16)
    store_case(tmp_path, "one", "p1", image, labels)
    store_case(tmp_path, "one", "p2", image + 1, labels)
    store_case(tmp_path, "two", "q", image, labels)
    store_case(tmp_path, "maps<b>", "m", None, labels)
    return store_corpus(tmp_path)


def table(folder: Path, title: str) -> dict[str, tuple[str, ...]]:
    section = next(s for s in summarise(Corpus(folder)) if s.title.startswith(title))
    return {row[0]: tuple(row[1:]) for row in section.rows}


def test_the_tables_count_volumes_masks_and_sources(folder):
    totals = table(folder, "corpus")
    assert totals["volumes"] == ("3",) and totals["label maps without image"] == ("1",) and totals["masks"] == ("4",)
    assert totals["sources"] == ("3",) and totals["duplicate images"] == ("1",) and totals["subjects"] == ("4",)
    assert table(folder, "source")["one"][:3] == ("2", "2", "0")
    assert table(folder, "same image twice") == {"two.q": ("one.p1",)}
    assert table(folder, "anatomy") == {"other": ("1", "4", "4")}


def test_dropped_masks_are_counted_by_the_rule_they_failed(tmp_path):
    make_source(tmp_path / "s", cases=2)
    assert main(["prepare", str(tmp_path / "s"), "-o", str(tmp_path / "out"), "-j", "1", "-q"]) == 0
    assert table(tmp_path / "out", "dropped") == {"side in mm under 15": ("4",)}
    assert table(tmp_path / "out", "corpus")["masks"] == ("0",)
    assert write_page(Corpus(tmp_path / "out"), tmp_path / "out" / "o.html") == 0, "an empty corpus has a page too"


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("812.5 mm3, under 1000", "volume in mm3 under 1000"),
        ("side of 9 mm, under 15", "side in mm under 15"),
        ("12 voxels, under 30", "fewer voxels than 30"),
        ("background is 99.70 % of the case, over 99", "background in % over 99"),
        ("value 7 has no name in the source", "value without a name in its source"),
    ],
)
def test_reasons_fall_into_kinds(reason, kind):
    assert kind_of_reason(reason) == kind


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int) for text in found]


def test_the_page_shows_every_category_from_different_sources(folder):
    assert write_page(Corpus(folder), folder / "overview.html", examples=2) == 1
    page = (folder / "overview.html").read_text()
    assert page.count('<div class="category">') == 1 and "4 masks" in page and "<b>s1</b>" in page
    shown = re.findall(r'title="([^:"]+)\.', page)
    assert len(set(shown)) == 2, "two examples, two sources"
    assert "maps<b>" not in page and "maps&lt;b&gt;" in page, "names from files are text, never markup"
    strip = pictures(page)[0]
    assert strip.shape == (150, 300, 3)
    orange = strip[..., 0] - strip[..., 2] > 60
    assert 100 < orange.sum() < 6000, "the mask's contour"


def test_front_is_up_and_the_patients_right_is_on_the_left(tmp_path):
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:15, 12:18, 12:18] = 1  # front (y) and right (x)
    image = np.zeros(labels.shape, np.int16)
    image[:, 15:, :] = 100  # bright in front
    image[0, 0, 0] = 1
    store_case(tmp_path, "s", "a", image, labels)
    corpus = Corpus(store_corpus(tmp_path))
    write_page(corpus, tmp_path / "o.html", examples=1)
    axial = pictures((tmp_path / "o.html").read_text())[0][:, :150].sum(axis=2)
    assert axial[:50].mean() > 2 * axial[-50:].mean()


def test_a_damaged_image_becomes_a_note_not_an_end(folder):
    for path in (folder / "arrays").rglob("*.b2nd"):
        path.write_bytes(b"")
    assert write_page(Corpus(folder), folder / "overview.html") == 1
    assert "array is missing or damaged" in (folder / "overview.html").read_text()


def test_info_prints_the_tables_and_writes_the_page(folder, capsys):
    assert main(["prepare", "info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("volumes", "masks", "anatomy", "licence", "overview.html"))
    assert (folder / "overview.html").stat().st_size > 2000
    (folder / "overview.html").unlink()
    assert main(["prepare", "info", str(folder), "--examples", "0", "-q"]) == 0
    assert capsys.readouterr().out == "" and not (folder / "overview.html").exists()


def test_info_of_no_corpus_is_one_line(tmp_path, capsys):
    assert main(["prepare", "info", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("samed3d: error: no corpus at")
