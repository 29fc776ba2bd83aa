"""Drawing from corpora: only the crop's region is read, sources and categories are weighed, damaged cases are passed
over."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from samed3d.config import DataConfig
from samed3d.data import sampling
from samed3d.data.corpus import StoredArray, in_validation
from samed3d.data.sampling import CropDataset, Weighting, split_weight
from samed3d.errors import InputError
from tests.corpus_sources import store_case, store_corpus


def boxes(shape: tuple[int, int, int], values: int = 2) -> np.ndarray:
    """Values 1, 2, ... in equal cuboids along z."""
    labels = np.zeros(shape, np.uint8)
    for value in range(1, values + 1):
        labels[(value - 1) * shape[0] // values + 1 : value * shape[0] // values, 2:-2, 2:-2] = value
    return labels


def make(folder: Path, counts: dict[str, int], shape=(24, 16, 16), values: int = 2) -> Path:
    labels = boxes(shape, values)
    for source, count in counts.items():
        for number in range(count):
            image = np.random.default_rng(number).normal(0, 20, shape).astype(np.int16) + 50 * labels.astype(np.int16)
            store_case(folder, source, f"{source}{number}", image, labels)
    return store_corpus(folder)


def config(*corpora: Path | str, **changes) -> DataConfig:
    return DataConfig(
        **(
            {"corpus": [str(c) for c in corpora], "synthetic_share": 0.0, "crop": (8, 8, 8), "validation_share": 0.0}
            | changes
        )
    )


def drawn(dataset: CropDataset) -> Counter[str]:
    return Counter(str(dataset[i]["case"]).split(".")[0] for i in range(len(dataset)))


def test_only_the_region_of_the_crop_is_read(tmp_path, monkeypatch):
    labels = np.zeros((200, 40, 40), np.uint8)
    labels[150:160, 10:20, 10:20] = 1
    store_case(tmp_path, "s", "a", np.random.default_rng(0).integers(0, 99, labels.shape).astype(np.int16), labels)
    read = []
    original = StoredArray.__getitem__

    def watch(self, index):
        block = original(self, index)
        read.append(block.size)
        return block

    monkeypatch.setattr(StoredArray, "__getitem__", watch)
    dataset = CropDataset(config(store_corpus(tmp_path), fill=(0.5, 1.0)), 5, seed=0)
    for index in range(5):
        dataset[index]
    assert len(read) >= 10 and max(read) <= 36**3 < labels.size / 5


def test_a_label_map_is_read_by_its_crop_as_well(tmp_path, monkeypatch):
    labels = np.zeros((200, 40, 40), np.uint8)
    labels[150:160, 10:20, 10:20] = 3
    store_case(tmp_path, "maps", "a", None, labels)
    store_case(
        tmp_path, "real", "b", np.random.default_rng(0).integers(0, 99, (9, 9, 9)).astype(np.int16), boxes((9, 9, 9), 1)
    )
    monkeypatch.setattr(sampling, "LABELMAP_SHARE", 1.0)
    read = []
    original = StoredArray.__getitem__
    monkeypatch.setattr(
        StoredArray,
        "__getitem__",
        lambda self, index: (read.append(original(self, index).size), original(self, index))[1],
    )
    dataset = CropDataset(
        config(store_corpus(tmp_path), synthetic_share=0.9, fill=(0.5, 1.0), crop=(16, 16, 16)), 8, seed=0
    )
    assert drawn(dataset)["maps"] >= 4
    assert 0 < max(read) <= 36**3


def test_sources_are_drawn_by_the_root_of_their_size(tmp_path):
    dataset = CropDataset(config(make(tmp_path, {"a": 1, "b": 4, "c": 9})), 1, seed=0)
    shares = share_of(dataset, lambda corpus, case, label: case.source)
    assert shares == pytest.approx({"a": 1 / 6, "b": 2 / 6, "c": 3 / 6})
    even = CropDataset(config(tmp_path), 1, seed=0, weighting=Weighting(source=0.0))
    assert share_of(even, lambda corpus, case, label: case.source) == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_categories_and_sizes_are_weighed(tmp_path):
    labels = boxes((30, 16, 16), 3)
    labels[labels == 3] = np.where(np.random.default_rng(0).random(int((labels == 3).sum())) < 0.5, 3, 0)
    for number in range(4):
        image = np.random.default_rng(number).integers(0, 99, labels.shape).astype(np.int16)
        store_case(
            tmp_path, "s", f"p{number}", image, labels if number == 0 else np.where(labels == 1, 1, 0).astype(np.uint8)
        )
    folder = store_corpus(tmp_path)

    def name(corpus, case, label):
        return label.name

    in_proportion = CropDataset(config(folder), 1, seed=0, weighting=Weighting(category=1.0))
    assert share_of(in_proportion, name) == pytest.approx({"s1": 4 / 6, "s2": 1 / 6, "s3": 1 / 6})
    by_root = CropDataset(config(folder), 1, seed=0)
    assert share_of(by_root, name) == pytest.approx({"s1": 2 / 4, "s2": 1 / 4, "s3": 1 / 4})
    alike = CropDataset(config(folder), 1, seed=0, weighting=Weighting(category=0.0))
    assert share_of(alike, name) == pytest.approx(dict.fromkeys(("s1", "s2", "s3"), 1 / 3))


def test_size_prefers_large_or_small_members_of_a_category(tmp_path):
    for number, size in enumerate((4, 12)):
        labels = np.zeros((16, 16, 16), np.uint8)
        labels[2 : 2 + size, 2:10, 2:10] = 1
        store_case(
            tmp_path,
            "s",
            f"p{number}",
            np.random.default_rng(number).integers(0, 99, labels.shape).astype(np.int16),
            labels,
        )
    folder = store_corpus(tmp_path)

    def case_of(corpus, case, label):
        return case.subject

    for power, share in ((1.0, 0.75), (0.0, 0.5), (-1.0, 0.25)):
        dataset = CropDataset(config(folder), 1, seed=0, weighting=Weighting(size=power))
        assert share_of(dataset, case_of)["p1"] == pytest.approx(share)


def share_of(dataset: CropDataset, key) -> dict[str, float]:
    """Chance of each value of ``key(corpus, case, label)``."""
    found: dict[str, float] = {}
    for choice, weight in zip(dataset.real, np.diff(dataset.real_ends, prepend=0.0), strict=True):
        found[key(*choice)] = found.get(key(*choice), 0.0) + float(weight)
    return found


def test_a_list_of_corpora_is_drawn_by_their_weights(tmp_path):
    one, two = make(tmp_path / "one", {"a": 4}), make(tmp_path / "two", {"b": 4})

    def source(corpus, case, label):
        return case.source

    assert share_of(CropDataset(config(one, two), 1, seed=0), source) == pytest.approx({"a": 0.5, "b": 0.5})
    weighed = CropDataset(config(f"{one}=3", two), 200, seed=0)
    assert share_of(weighed, source) == pytest.approx({"a": 0.75, "b": 0.25})
    assert 120 < drawn(weighed)["a"] < 175


def test_weights_of_corpora_are_checked(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert split_weight(str(tmp_path / "a=b")) == (str(tmp_path / "a=b"), 1.0), "a folder's name may hold the sign"
    assert split_weight("x=0.5") == ("x", 0.5) and split_weight("x") == ("x", 1.0)
    for text in ("x=0", "x=-1", "x=much", "x=inf", "x=nan"):
        with pytest.raises(InputError, match=r"data\.corpus weight must be a number above 0, got "):
            split_weight(text)


@pytest.mark.parametrize("damage", [b"", b"rubbish" * 99])
def test_a_damaged_case_is_passed_over_once_and_counted(tmp_path, caplog, damage):
    folder = make(tmp_path, {"a": 5})
    next((folder / "arrays" / "a").glob("a2.image.*")).write_bytes(damage)
    dataset = CropDataset(config(folder), 40, seed=0)
    with caplog.at_level(logging.WARNING):
        names = [dataset[i]["case"] for i in range(40)]
    assert "a.a2" not in names and len(set(names)) == 4
    assert list(dataset.bad) == ["a.a2"] and caplog.text.count("skipping a damaged case: a.a2") == 1
    again = CropDataset(config(folder), 40, seed=0)
    assert [again[i]["case"] for i in reversed(range(40))] == names[::-1], "and no other sample depends on when"


def test_a_damaged_chunk_is_found_when_it_is_read(tmp_path):
    folder = make(tmp_path, {"a": 2})
    path = next((folder / "arrays" / "a").glob("a0.image.*"))
    body = path.read_bytes()
    path.write_bytes(body[: len(body) // 3] + bytes(len(body) // 3) + body[2 * len(body) // 3 :])
    dataset = CropDataset(config(folder), 20, seed=0)
    assert {dataset[i]["case"] for i in range(20)} == {"a.a1"} and "a.a0" in dataset.bad


def test_nothing_but_damaged_cases_ends_in_an_error_that_says_so(tmp_path):
    folder = make(tmp_path, {"a": 2})
    for path in (folder / "arrays" / "a").glob("*.image.*"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"in 20 attempts at sample 0; .*; 2 cases are damaged, the last: a\.a"):
        CropDataset(config(folder), 1, seed=0)[0]


def test_cases_of_a_test_split_and_shared_subjects_are_never_drawn(tmp_path):
    folder = make(tmp_path, {"a": 6})
    lines = (folder / "cases.csv").read_text().splitlines()
    column = lines[0].split(",").index("split")
    rows = [line.split(",") for line in lines[1:]]
    rows[2][column] = "test"
    (folder / "cases.csv").write_text("\n".join([lines[0], *[",".join(r) for r in rows]]) + "\n")
    dataset = CropDataset(config(folder), 1, seed=0)
    assert {case.id for _, case, _ in dataset.real} == {f"a.a{n}" for n in (0, 1, 3, 4, 5)}


def test_structures_of_two_layers_are_read_from_their_own(tmp_path):
    from data_prep.cases import LabelLayer, RawArrays, RawCase, SourceFacts
    from data_prep.convert import Task, store
    from samed3d.geometry import Grid
    from samed3d.volume import Volume
    from tests.corpus_sources import EVERYTHING

    shape = (16, 16, 16)
    organ, tumour = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    organ[1:15, 1:15, 1:15], tumour[4:9, 4:9, 4:9] = 1, 1
    grid = Grid(shape, direction_lps=(-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
    image = Volume((organ * 50 + tumour * 90).astype(np.int16), grid, "x")
    task = Task(RawCase("x", "s", "p", "CT", None, "test"), SourceFacts("s", "test"), EVERYTHING, str(tmp_path), "")
    store(
        task, RawArrays([("CT", image)], grid, [LabelLayer(organ, {1: "liver"}), LabelLayer(tumour, {1: "tumor"})]), []
    )
    dataset = CropDataset(config(store_corpus(tmp_path), fill=(0.9, 0.9), crop=(16, 16, 16)), 1, seed=0)
    for choice in dataset.real:
        crop = dataset._cut(choice, np.random.default_rng(0))
        brightness = float(crop.image[0][crop.target].mean())
        assert brightness > 110 if choice[2].name == "tumor" else brightness < 70


def test_a_subject_is_held_out_by_its_own_name_and_by_its_groups(tmp_path):
    labels = boxes((16, 16, 16))
    names = [f"p{n}" for n in range(40)]
    held = [n for n in names if in_validation(n, 0.3)]
    free = [n for n in names if not in_validation(n, 0.3)]
    image = np.random.default_rng(0).integers(0, 99, labels.shape).astype(np.int16)
    for number, pair in enumerate(((held[0], free[0]), (free[1], held[1]), (free[2], free[3]))):
        for name in pair:  # both show the same image
            store_case(tmp_path, "s", name, image + number, labels)
    dataset = CropDataset(config(store_corpus(tmp_path), validation_share=0.3), 1, seed=0)
    assert {case.subject for _, case, _ in dataset.real} == {free[2], free[3]}
