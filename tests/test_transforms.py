"""torchio's transforms in a training config, and a corpus as its SubjectsDataset, on real volumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from data_prep.pipeline import prepare
from samed3d.config import DataConfig, TrainConfig, load_config
from samed3d.data.augment import SampleTransforms, corpus_subjects
from samed3d.data.corpus import Corpus
from samed3d.data.sampling import CropDataset
from samed3d.data.semantic import SemanticDataset
from samed3d.errors import InputError
from samed3d.training.loop import train
from tests.corpus_sources import EVERYTHING
from tests.test_training import SMALL

torchio = pytest.importorskip("torchio")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """Three hippocampi."""
    folder, source = tmp_path_factory.mktemp("hippocampi") / "msd_hippocampus", data_dir / "msd_hippocampus"
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
        for file in sorted((source / kind).iterdir())[:3]:
            (folder / kind / file.name).symlink_to(file)
    (folder / "dataset.json").symlink_to(source / "dataset.json")
    return prepare([folder], folder.parent / "corpus", EVERYTHING).folder


def data(corpus: Path, *transforms: dict[str, Any], **changes: Any) -> DataConfig:
    own = {"crop": (24, 24, 24), "synthetic_share": 0.0, "validation_share": 0.0, "augment": "flips"}
    return DataConfig([str(corpus)], transforms=list(transforms), **{**own, **changes})


def test_image_and_mask_move_together_and_only_the_image_changes_its_values(corpus):
    plain, flipped, noisy = (
        CropDataset(data(corpus, *transforms), 4, seed=0)
        for transforms in ([], [{"Flip": {"axes": [0]}}], [{"RandomNoise": {"std": [0.5, 0.5]}}])
    )
    for index in range(4):
        before, after = plain[index], flipped[index]
        # our own mirroring is drawn after the transforms: undo both
        same = [
            axes
            for axes in ([], [1], [2], [3], [1, 2], [1, 3], [2, 3], [1, 2, 3])
            if torch.equal(before["target"].flip(axes), after["target"])
            and torch.allclose(before["image"].flip(axes), after["image"], atol=1e-4)
        ]
        assert same and int(before["target"].sum()) == int(after["target"].sum())
        assert not torch.equal(before["image"], noisy[index]["image"])
    crop = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    image, (mask,) = SampleTransforms([{"Flip": {"axes": ["Left"]}}])(crop, [crop[0] > 11], (1.0, 1.0, 1.0), 0)
    assert torch.equal(image, crop.flip(3)) and torch.equal(mask, crop[0].flip(2) > 11)  # x is left to right


def test_a_transform_is_seeded_by_the_sample_in_any_worker(corpus):
    config = data(corpus, {"RandomAffine": {"degrees": 20}}, {"RandomMotion": {"p": 0.5}}, {"RandomGamma": None})
    state = torch.get_rng_state()
    dataset = CropDataset(config, 4, seed=3)
    here = [dataset[index] for index in range(4)]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    workers = [sample for batch in DataLoader(dataset, 2, num_workers=2) for sample in batch["image"]]
    assert all(torch.equal(one["image"], other) for one, other in zip(here, workers, strict=True))
    later = CropDataset(config, 2, seed=3, start=2)
    assert torch.equal(later[0]["image"], here[2]["image"]) and not torch.equal(here[0]["image"], here[1]["image"])


def test_millimetres_are_those_of_the_crop():
    image = torch.zeros(1, 16, 16, 16)
    image[0, 8, 8, 8] = 1.0
    transforms = SampleTransforms([{"Blur": {"std": 2}}])
    fine, coarse = (transforms(image, [], (mm, mm, mm), 0)[0].max() for mm in (0.5, 4.0))
    assert coarse > 5 * fine


def test_samples_with_all_classes_are_transformed_too(corpus):
    plain, changed = (
        SemanticDataset(data(corpus, *ts), ("anterior", "posterior"), (16, 24, 24), None, 1, 0, 3)
        for ts in ([], [{"RandomElasticDeformation": {"max_displacement": 3}}])
    )
    for index in range(3):
        target = changed[index]["target"]
        assert target.dtype == torch.uint8 and set(target.unique().tolist()) <= {0, 1, 2}
        assert not torch.equal(plain[index]["image"], changed[index]["image"])


def test_a_run_takes_transforms_from_its_config(tmp_path, corpus):
    config = load_config(
        TrainConfig,
        None,
        [
            *(*SMALL, f"data.corpus=[{corpus}]", "data.synthetic_share=0", "data.validation_share=0"),
            "data.transforms=[{RandomMotion: {p: 0.1}}, {RandomFlip: }]",
            *("optim.steps=2", f"run.folder={tmp_path / 'run'}"),
        ],
    )
    assert (train(config, quiet=True) / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"RandomMotoin": {}}, r"torchio has no transform 'RandomMotoin'; did you mean RandomMotion\?"),
        ({"RandomMotion": {"degree": 3}}, r"RandomMotion has no argument 'degree'; did you mean degrees\?"),
        ({"RandomFlip": {"prob": 3}}, r"RandomFlip has no argument 'prob'; did you mean"),
        ({"RandomFlip": {"p": 3}}, r"data.transforms RandomFlip refuses \{'p': 3\}: "),
        ({"RandomFlip": 3}, r"data.transforms RandomFlip must have a mapping of arguments, got 3"),
        ({"RandomFlip": {}, "RandomNoise": {}}, r"data.transforms must be a list of one transform each"),
        ({"SpatialTransform": {}}, r"torchio has no transform 'SpatialTransform'"),
    ],
)
def test_what_torchio_does_not_have_is_refused_in_one_line(corpus, entry, message):
    with pytest.raises(InputError, match=message) as caught:
        CropDataset(data(corpus, entry), 1, seed=0)
    assert "\n" not in str(caught.value)


def test_a_transform_that_changes_the_shape_is_refused(corpus):
    with pytest.raises(
        InputError, match=r"must keep the crop's shape, but Pad changed \(24, 24, 24\) to \(26, 26, 26\)"
    ):
        CropDataset(data(corpus, {"Pad": {"padding": 1}}), 1, seed=0)[0]
    with pytest.raises(InputError, match=r"config key 'data.transforms\[0\]' must be a mapping, got 'RandomFlip'"):
        load_config(TrainConfig, None, ["data.transforms=[RandomFlip]"])


def test_a_corpus_is_a_subjects_dataset(corpus):
    subjects = corpus_subjects(corpus, torchio.CropOrPad((32, 40, 24)))
    assert len(subjects) == 3 and isinstance(subjects, torchio.SubjectsDataset)
    loaded = Corpus(corpus)
    case = loaded.cases[0]
    subject = corpus_subjects(loaded)[0]
    array, labels = np.asarray(loaded.image(case)[:]), np.asarray(loaded.labels(case)[:])
    assert np.array_equal(subject["image"].numpy()[0].transpose(2, 1, 0), array)
    assert np.array_equal(subject["labels"].numpy()[0].transpose(2, 1, 0), labels)
    assert subject["image"].orientation == ("R", "A", "S")
    assert subject["image"].spacing == tuple(reversed(case.spacing_zyx_mm))
    assert subject["case"] == case.id and subject["names"] == {(0, 1): "anterior", (0, 2): "posterior"}
    batch = next(iter(torchio.SubjectsLoader(subjects, batch_size=3, num_workers=0)))
    assert batch["image"]["data"].shape == (3, 1, 32, 40, 24)
    with pytest.raises(InputError, match="no corpus at"):
        corpus_subjects(corpus / "arrays")
