"""Weights files: whole or absent, strict, found by name; upstream pickles read without running them."""

import argparse
import hashlib
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.weights import (
    HEADER_KEY,
    find_checkpoint,
    import_upstream,
    list_checkpoints,
    load_state_strict,
    publish,
    read_header,
    read_weights,
    save_weights,
)

NAME = "sam_med3d_b"


def make(**overrides):
    return create_model(NAME, **{**MODELS[NAME].tiny, **overrides})


class Unwanted:
    """Stands for code hidden in a checkpoint."""

    def __reduce__(self):
        return (os.system, ("touch should_not_exist",))


def test_header_says_what_the_file_is(tmp_path):
    model = make()
    save_weights(model, tmp_path / "m.safetensors", {"licence": "Apache-2.0", "metrics": {"dice_5": 0.5}})
    state, header = read_weights(tmp_path / "m.safetensors")
    assert header["model"] == NAME and header["config"]["dim"] == 24 and header["spec"]["spacing_mm"] == 1.5
    assert header["licence"] == "Apache-2.0" and header["metrics"] == {"dice_5": 0.5}
    assert state.keys() == model.state_dict().keys()


def test_what_an_older_file_does_not_say_is_as_the_builder_says(tmp_path):
    path = tmp_path / "old.safetensors"
    save_weights(create_model("samed3d_unet", **MODELS["samed3d_unet"].tiny), path, {})
    header = read_header(path)
    assert header["spec"].pop("bf16") is True
    header["spec"]["source"] = "as the file says"
    save_file(load_file(path), path, metadata={HEADER_KEY: json.dumps(header)})
    spec = load(path).spec
    assert spec.bf16 and spec.source == "as the file says"


def test_file_is_as_readable_as_any_other(tmp_path):
    save_weights(make(), tmp_path / "m.safetensors", {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_metadata_may_not_replace_the_header(tmp_path):
    with pytest.raises(InputError, match="metadata must not use the header's own keys, got model"):
        save_weights(make(), tmp_path / "m.safetensors", {"model": "another"})
    assert not list(tmp_path.iterdir())


def test_half_precision_is_smaller_and_read_as_float32(tmp_path):
    model = make()
    save_weights(model, tmp_path / "full.safetensors", {})
    save_weights(model, tmp_path / "half.safetensors", {}, dtype=torch.float16)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.7 * (tmp_path / "full.safetensors").stat().st_size
    state, _ = read_weights(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "m.safetensors"
    save_weights(make(), target, {})
    before = target.read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("samed3d.models.weights.save_file", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*m\.safetensors: No space left"):
        save_weights(make(), target, {})
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*absent"):
        save_weights(make(), tmp_path / "absent" / "m.safetensors", {})


def test_strict_loading_lists_every_kind_of_problem_and_copies_nothing():
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["mask_decoder.iou_token.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["image_encoder.pos_embed"] = torch.zeros(1, 2, 2, 2, 5)
    with pytest.raises(InputError) as caught:
        load_state_strict(model, state)
    message = str(caught.value)
    assert "missing (1): mask_decoder.iou_token.weight" in message
    assert "unexpected (1): extra.weight" in message
    assert "mis-shaped (1): image_encoder.pos_embed (1, 2, 2, 2, 5) instead of (1, 2, 2, 2, 24)" in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_file_of_another_architecture_is_refused(tmp_path):
    save_weights(make(), tmp_path / "m.safetensors", {})
    state, header = read_weights(tmp_path / "m.safetensors")
    del state["image_encoder.pos_embed"]
    save_file(state, tmp_path / "cut.safetensors", metadata={"samed3d": json.dumps(header)})
    with pytest.raises(
        InputError, match=rf"cut\.safetensors is not a '{NAME}' checkpoint: .*missing \(1\): image_encoder\.pos_embed"
    ):
        load(tmp_path / "cut.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(InputError, match="has no samed3d header"):
        load(tmp_path / "bare.safetensors")
    torch.save(state, tmp_path / "bare.pth")
    with pytest.raises(InputError, match=r"must be a \.safetensors file written by samed3d.*import-weights"):
        load(tmp_path / "bare.pth")


@pytest.mark.parametrize("change", [{"model": None}, {"config": None}, {"version": 99}, {"spec": {"colour": "red"}}])
def test_damaged_header_is_refused(tmp_path, change):
    save_weights(make(), tmp_path / "m.safetensors", {})
    state, header = read_weights(tmp_path / "m.safetensors")
    header = {key: value for key, value in {**header, **change}.items() if value is not None}
    save_file(state, tmp_path / "m.safetensors", metadata={"samed3d": json.dumps(header)})
    with pytest.raises(InputError, match="header"):
        load(tmp_path / "m.safetensors")


def upstream_checkpoint(state) -> dict:
    """What the upstream training script writes."""
    options = argparse.Namespace(task_name="union_train", lr=8e-4, step_size=[120, 180])
    return {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {},
        "losses": [1.0],
        "best_dice": 0.5,
        "args": options,
    }


@pytest.mark.parametrize("layout", ["training", "bare", "module."])
def test_upstream_checkpoint_is_imported(tmp_path, layout):
    expected = make().state_dict()
    state = {("module." if layout == "module." else "") + name: tensor for name, tensor in expected.items()}
    torch.save(upstream_checkpoint(state) if layout == "training" else state, tmp_path / "up.pth")
    got = import_upstream(tmp_path / "up.pth")
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    load_state_strict(make(), got)


def test_import_leaves_no_type_allowed_behind(tmp_path):
    torch.save(upstream_checkpoint(make().state_dict()), tmp_path / "up.pth")
    import_upstream(tmp_path / "up.pth")
    with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
        torch.load(tmp_path / "up.pth", weights_only=True)


def test_pickle_that_holds_anything_else_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**upstream_checkpoint(make().state_dict()), "args": Unwanted()}, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"must hold only tensors and argparse\.Namespace.*bad\.pth.*system"):
        import_upstream(tmp_path / "bad.pth")
    assert not (tmp_path / "should_not_exist").exists()


@pytest.mark.parametrize("body", [{"epoch": 3}, {"model_state_dict": {"a": 1}}, [1, 2], {}])
def test_file_without_a_state_dict_is_refused(tmp_path, body):
    torch.save(body, tmp_path / "none.pth")
    with pytest.raises(InputError, match="must hold a state dict"):
        import_upstream(tmp_path / "none.pth")


def test_damaged_and_missing_upstream_files_are_refused(tmp_path):
    torch.save(make().state_dict(), tmp_path / "up.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "up.pth").read_bytes()[:2000])
    (tmp_path / "text.pth").write_text("not a checkpoint at all")
    for name in ("cut.pth", "text.pth"):
        with pytest.raises(InputError, match=name):
            import_upstream(tmp_path / name)
    with pytest.raises(InputError, match=r"does not exist: .*absent\.pth"):
        import_upstream(tmp_path / "absent.pth")


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A checkpoint folder with one checkpoint called ``mine``."""
    monkeypatch.setenv("SAMED3D_CHECKPOINTS", str(tmp_path))
    path = tmp_path / "mine.safetensors"
    save_weights(make(), path, {})
    entry = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"checkpoints": {"mine": entry}}))
    return path


def test_checkpoint_is_found_by_name_and_by_path(shipped):
    assert find_checkpoint("mine") == shipped
    assert find_checkpoint(shipped) == shipped
    assert find_checkpoint("other") is None
    assert load("mine").spec.name == NAME


def test_changed_or_missing_shipped_file_is_refused(shipped):
    shipped.write_bytes(shipped.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"mine\.safetensors must have sha256"):
        load("mine")
    shipped.unlink()
    with pytest.raises(InputError, match="its file is missing"):
        load("mine")


def test_damaged_manifest_is_refused(shipped):
    (shipped.parent / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="manifest must be JSON with a 'checkpoints' object"):
        load("mine")


def test_unknown_name_gives_nearest_checkpoints_and_models(shipped):
    with pytest.raises(InputError, match=r"no checkpoint or file is called 'min'; nearest names: mine"):
        load("min")
    with pytest.raises(InputError, match=r"nearest names: samed3d_"):
        load("samed3d_smal")


def test_architecture_without_weights_says_how_to_build_it(shipped):
    with pytest.raises(
        InputError,
        match=r"'sam_med3d_h' has no weights here; create_model\('sam_med3d_h'\) builds it with random weights",
    ):
        load("sam_med3d_h")


def test_a_published_checkpoint_is_found_by_name_and_checked(tmp_path, monkeypatch):
    model = make()
    save_weights(model, tmp_path / "run.safetensors", {"step": 3})
    folder = tmp_path / "shelf"
    folder.mkdir()
    path = publish(tmp_path / "run.safetensors", "mine", folder, {"licence": "Apache-2.0"})
    monkeypatch.setenv("SAMED3D_CHECKPOINTS", str(folder))
    assert "mine" in list_checkpoints() and find_checkpoint("mine") == path
    assert path.stat().st_size < 0.7 * (tmp_path / "run.safetensors").stat().st_size
    loaded = load("mine")
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, atol=2e-3, rtol=2e-3)
    entry = json.loads((folder / "manifest.json").read_text())["checkpoints"]["mine"]
    assert entry["licence"] == "Apache-2.0" and entry["parameters"] == sum(
        t.numel() for t in model.state_dict().values()
    )
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(InputError, match="must have sha256"):
        find_checkpoint("mine")


def test_licences_are_those_of_manifest_or_header(tmp_path):
    from samed3d.models.weights import licence_of

    assert licence_of("default") == "Apache-2.0"
    model = create_model(
        "samed3d_tiny", input_shape=(16, 16, 16), patch=8, dim=24, depth=1, heads=2, prompt_dim=32, stem_width=4
    )
    save_weights(model, tmp_path / "a.safetensors", {"licence": "mine"})
    save_weights(model, tmp_path / "b.safetensors", {})
    assert (licence_of(tmp_path / "a.safetensors"), licence_of(tmp_path / "b.safetensors")) == ("mine", "not stated")


def test_the_shipped_checkpoint_says_what_it_is_and_names_no_path_of_a_machine():
    path = find_checkpoint("default")
    assert path is not None and path.stat().st_size <= 16 * 2**20
    header = read_header(path)
    assert header["training"]["data"]["validation_share"] > 0 and header["sources"] and header["licence"]
    assert not set(header["sources"]) & set(header["training"]["data"]["hold_out"])
    assert '"/' not in json.dumps(header)
