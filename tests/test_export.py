"""Exported models answer as ours do: ONNX under onnxruntime, TorchScript, and the way through a Hugging Face folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import samed3d
from samed3d.errors import InputError
from samed3d.geometry import Grid
from samed3d.inference.export import decoder_inputs, export, image_example, save_pretrained
from samed3d.inference.sliding_window import segment_volume
from samed3d.models import MODELS, create_model, list_models, load
from samed3d.models.base import PromptableModel, PromptBatch
from samed3d.models.weights import save_weights
from samed3d.prompts.schema import objects_from_json
from samed3d.volume import write_volume

ROOT = Path(__file__).resolve().parents[1]
QUICK = "sam_med3d_b"
QUICK_SEMANTIC = "sam3d"


def graphs(semantic: bool) -> list:
    """Names of the models of one kind that can be a graph; all but the quickest are slow, as the exporter takes seconds
    for each."""
    names = [
        n
        for n in list_models()
        if isinstance(create_model(n, **MODELS[n].tiny), PromptableModel) != semantic and n != "sam_med3d_moe"
    ]
    return [n if n in (QUICK, QUICK_SEMANTIC) else pytest.param(n, marks=pytest.mark.slow) for n in names]


def on_disk(folder, name: str):
    """A tiny instance with seeded weights, none of them zero, and its file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name, **MODELS[name].tiny).eval()
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model, folder / "model.safetensors", {})
    return model, str(folder / "model.safetensors")


def prompts(model, clicks: int, mask: bool, box: bool) -> PromptBatch:
    generator = torch.Generator().manual_seed(clicks)
    batch = PromptBatch(
        8 * torch.rand(1, clicks, 3, generator=generator), torch.randint(0, 2, (1, clicks), generator=generator)
    )
    if "mask" in model.spec.prompts:
        click = PromptBatch(torch.ones(1, 1, 3), torch.ones(1, 1, dtype=torch.int64))
        shape = model(image_example(model), click).lowres_logits.shape
        batch.mask_logits, batch.mask_valid = torch.randn(shape, generator=generator), torch.tensor([mask])
    if "box" in model.spec.prompts:
        batch.boxes, batch.box_valid = torch.tensor([[[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]]), torch.tensor([box])
    return batch


def tensors(batch: PromptBatch) -> list[torch.Tensor]:
    """In the order of the decoder's inputs."""
    given = [batch.points, batch.point_labels, batch.mask_logits, batch.mask_valid, batch.boxes, batch.box_valid]
    return [t for t in given if t is not None]


def check_onnx(model, folder) -> None:
    """Both graphs on one crop, with one to five clicks, with and without a mask and a box."""
    onnxruntime = pytest.importorskip("onnxruntime")
    encoder, decoder = (onnxruntime.InferenceSession(folder / f"{part}.onnx") for part in ("encoder", "decoder"))
    assert [i.name for i in decoder.get_inputs()] == decoder_inputs(model)
    image = image_example(model)
    features = dict(
        zip([i.name for i in encoder.get_outputs()], encoder.run(None, {"image": image.numpy()}), strict=True)
    )
    for name, value in model.encode(image).items():
        np.testing.assert_allclose(features[f"feature_{name}"], value.numpy(), atol=1e-4, rtol=1e-4)
    for clicks, mask, box in ((1, False, False), (5, True, False), (3, True, True)):
        batch = prompts(model, clicks, mask, box)
        feed = {
            **features,
            **dict(zip(decoder_inputs(model)[len(features) :], (t.numpy() for t in tensors(batch)), strict=True)),
        }
        expected = model(image, batch)
        logits, iou, lowres = decoder.run(None, feed)
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(iou, expected.iou.numpy(), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(lowres, expected.lowres_logits.numpy(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.timeout(900)  # the exporter itself takes a minute or more on a busy machine
@pytest.mark.parametrize("name", graphs(semantic=False))
def test_onnx_answers_as_the_model(tmp_path, name):
    pytest.importorskip("onnxscript")
    model, path = on_disk(tmp_path, name)
    files = export(path, "onnx", tmp_path / "out")
    assert [f.name for f in files] == ["decoder.onnx", "encoder.onnx", "model.json"]
    check_onnx(model, tmp_path / "out")


@torch.no_grad()
@pytest.mark.timeout(900)  # the exporter itself takes a minute or more on a busy machine
def test_onnx_of_the_default_checkpoint(tmp_path):
    pytest.importorskip("onnxscript")
    export("default", "onnx", tmp_path / "out")
    check_onnx(load("default"), tmp_path / "out")


@torch.no_grad()
@pytest.mark.timeout(900)  # the exporter itself takes a minute or more on a busy machine
@pytest.mark.parametrize("name", graphs(semantic=True))
def test_onnx_of_an_automatic_model(tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = on_disk(tmp_path, name)
    export(path, "onnx", tmp_path / "out")
    image = image_example(model)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx").run(None, {"image": image.numpy()})
    np.testing.assert_allclose(logits, model(image).numpy(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["samed3d_unet", "sam_med3d_b", "samu"])
def test_torchscript_answers_as_the_model(tmp_path, name):
    model, path = on_disk(tmp_path, name)
    export(path, "torchscript", tmp_path / "out")
    encoder, decoder = (torch.jit.load(tmp_path / "out" / f"{part}.pt") for part in ("encoder", "decoder"))
    image = image_example(model)
    features = list(encoder(image))
    for clicks, mask, box in ((1, False, False), (5, True, True)):
        batch = prompts(model, clicks, mask, box)
        out = decoder(features, *tensors(batch))
        torch.testing.assert_close(out[0], model(image, batch).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", list_models())
def test_hugging_face_folder_there_and_back(tmp_path, name):
    model, path = on_disk(tmp_path, name)
    export(path, "hf", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    again = samed3d.from_pretrained(tmp_path / "out")
    assert again.spec == model.spec
    image = image_example(model)
    if isinstance(model, PromptableModel):
        batch = prompts(model, 2, True, True)
        assert torch.equal(again(image, batch).logits, model(image, batch).logits)
    else:
        assert torch.equal(again(image), model(image))


def test_the_shipped_checkpoint_is_exported_with_its_card(tmp_path):
    save_pretrained("default", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "samed3d" and head["pipeline_tag"] == "image-segmentation"
    assert head["license"] == "apache-2.0" and len(head["datasets"]) > 20
    (index,) = head["model-index"]
    measured = json.loads((ROOT / "benchmarks/results/default_evaluation.json").read_text())["group"]
    for result in index["results"]:
        dice = measured[result["dataset"]["name"]]["dice"]
        assert [m["value"] for m in result["metrics"]] == [dice[str(n)]["mean"] for n in (1, 3, 5, 10)]
    assert "Needed" not in card
    again = samed3d.from_pretrained(tmp_path / "out")
    for name, tensor in samed3d.load("default").state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_model_in_memory_is_saved_and_read(tmp_path):
    model = create_model(QUICK, **MODELS[QUICK].tiny)
    samed3d.save_pretrained(model, tmp_path / "out")
    assert samed3d.from_pretrained(str(tmp_path / "out")).config == model.config


def test_models_on_hugging_face_are_loaded_by_address(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    _, path = on_disk(tmp_path, QUICK)
    export(path, "hf", tmp_path / "out")
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(tmp_path / "out" / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert samed3d.load("hf://owner/name").spec.name == QUICK
    assert samed3d.from_pretrained("owner/name", revision="v1").spec.name == QUICK
    assert asked == [("owner/name", "model.safetensors", None), ("owner/name", "model.safetensors", "v1")]
    with pytest.raises(InputError, match="must be hf://OWNER/NAME"):
        samed3d.load("hf://name")

    def fail(*_args, **_more):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match=r"hf://owner/name cannot be fetched \(no network\)"):
        samed3d.load("hf://owner/name")


def bundle_given(tmp_path, name) -> tuple[Path, dict]:
    """An exported bundle, an image, and what its inference is given."""
    _, path = on_disk(tmp_path, name)
    export(path, "monai", tmp_path / "bundle")
    image = tmp_path / "image.nii.gz"
    array = np.random.default_rng(0).normal(size=(20, 24, 28)).astype(np.float32)
    write_volume(image, array, Grid(array.shape, (1.5, 1.5, 2.0)))
    given = {"bundle_root": str(tmp_path / "bundle"), "output": str(tmp_path / "mask.nii.gz")}
    if name == QUICK_SEMANTIC:
        return image, given | {"images": [str(image)]}
    prompts = [{"type": "point", "at": [14, 12, 10]}, {"type": "point", "at": [2, 2, 2], "positive": False}]
    body = {"version": 1, "space": "ijk", "objects": [{"id": 1, "prompts": prompts}]}
    return image, given | {"image": str(image), "prompts": body, "device": "cpu"}


@pytest.mark.parametrize("name", [QUICK, QUICK_SEMANTIC])
def test_monai_bundle_holds_what_its_specification_asks(tmp_path, name):
    _, given = bundle_given(tmp_path, name)
    folder = Path(given["bundle_root"])
    metadata = json.loads((folder / "configs/metadata.json").read_text())
    asked = "version monai_version pytorch_version numpy_version required_packages_version task description authors"
    assert not set(asked.split()) - set(metadata)
    shape = metadata["network_data_format"]["inputs"]["image"]
    assert (shape["num_channels"], *shape["spatial_shape"]) == samed3d.load(
        str(tmp_path / "model.safetensors")
    ).spec.image_shape
    settings = json.loads((folder / "configs/inference.json").read_text())
    assert set(given) <= set(settings)  # what a user overrides is there
    weights = torch.load(folder / "models/model.pt", weights_only=True)
    create_model(**settings["architecture"]).load_state_dict(weights)


@pytest.mark.parametrize("name", [QUICK, QUICK_SEMANTIC])
def test_monai_runs_the_bundle(tmp_path, name):
    """MONAI loads the network, and the bundle's inference gives the mask that samed3d gives."""
    bundle = pytest.importorskip("monai.bundle", reason="MONAI is not installed (pip install monai)")
    image, given = bundle_given(tmp_path, name)
    model = samed3d.load(str(tmp_path / "model.safetensors"))
    again = bundle.load("bundle", bundle_dir=tmp_path, workflow_type="inference", device="cpu")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    configs = Path(given["bundle_root"]) / "configs"
    workflow = bundle.ConfigWorkflow(
        config_file=str(configs / "inference.json"),
        meta_file=str(configs / "metadata.json"),
        workflow_type="inference",
        logging_file=False,
        **given,
    )
    workflow.initialize()
    workflow.run()
    found = samed3d.read_volume(given["output"]).array
    if name == QUICK_SEMANTIC:
        expected = segment_volume(samed3d.read_volume(image), model)
    else:
        session = samed3d.Session.open(image, model=model, device="cpu")
        session.add_all(objects_from_json(given["prompts"], "prompts"))
        expected = session.mask
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(found, expected)


def test_model_json_says_what_a_caller_needs(tmp_path):
    _, path = on_disk(tmp_path, QUICK)
    export(path, "torchscript", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "model.json").read_text())
    assert (
        about["model"] == QUICK
        and about["spec"]["input_shape_zyx"] == [16, 16, 16]
        and about["spec"]["spacing_mm"] == 1.5
    )
    assert about["files"]["encoder.pt"] == {"inputs": ["image"], "outputs": ["feature_image"]}


def test_wrong_requests_are_refused(tmp_path):
    _, path = on_disk(tmp_path, QUICK)
    with pytest.raises(InputError, match=r"--format must be one of onnx, torchscript, hf, monai, got 'tflite'"):
        export(path, "tflite", tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"--output must be a new folder"):
        export(path, "hf", tmp_path / "there")
    with pytest.raises(InputError, match=r"no checkpoint or file is called 'nothing'"):
        export("nothing", "hf", tmp_path / "out")
    _, mixture = on_disk(tmp_path, "sam_med3d_moe")
    with pytest.raises(InputError, match=r"mixture of experts .* is no fixed graph"):
        export(mixture, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    _, path = on_disk(tmp_path, QUICK)
    monkeypatch.setattr("samed3d.inference.export.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(path, "torchscript", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]
