"""Every model of the registry keeps the contract: finite gradients, answers to its prompts, survives a file."""

import pytest
import torch

from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, list_models, load, load_promptable
from samed3d.models.base import MaskOutput, PromptableModel, PromptBatch, SemanticModel
from samed3d.models.weights import save_weights

PROMPTABLE = [n for n in list_models() if isinstance(create_model(n, **MODELS[n].tiny), PromptableModel)]
BOXED = [n for n in PROMPTABLE if "box" in create_model(n, **MODELS[n].tiny).spec.prompts]
OUR_VITS = ["samed3d_tiny", "samed3d_small", "samed3d_base"]
TINY = {name: create_model(name, **MODELS[name].tiny) for name in list_models()}
PROMPTABLE = [name for name, model in TINY.items() if not isinstance(model, SemanticModel)]
BOXED = [name for name in PROMPTABLE if "box" in TINY[name].spec.prompts]


def make(name: str, **overrides) -> PromptableModel:
    """A tiny instance with seeded weights; the released zero-initialised tables are filled so that they matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(name, **{**MODELS[name].tiny, **overrides})
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():  # a frozen tensor is its file's
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def crops(model: PromptableModel, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, *model.spec.image_shape, generator=torch.Generator().manual_seed(1))


def click(positive: bool, at: tuple[float, float, float] = (4.0, 5.0, 6.0), batch: int = 2) -> PromptBatch:
    return PromptBatch(torch.tensor([[at]]).expand(batch, -1, -1), torch.full((batch, 1), int(positive)))


def two_steps(model: PromptableModel) -> tuple[MaskOutput, MaskOutput]:
    """A click loop: clicks without a mask, then clicks, the earlier mask and, where understood, boxes."""
    features = model.encode(crops(model))
    points = torch.tensor([[[3.0, 4.0, 5.0], [9.0, 8.0, 7.0]], [[6.0, 4.0, 2.0], [1.0, 2.0, 3.0]]])
    first = model.decode(features, PromptBatch(points, torch.tensor([[1, 0], [1, -1]])))
    prompts = PromptBatch(points, torch.tensor([[1, 0], [0, 1]]), mask_logits=first.lowres_logits)
    if "box" in model.spec.prompts:
        prompts.boxes = torch.tensor([[[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]]).expand(2, -1, -1)
        prompts.box_valid = torch.tensor([True, False])
    return first, model.decode(features, prompts)


@pytest.mark.parametrize(
    ("name", "millions"), [("samed3d_tiny", (3, 6)), ("samed3d_small", (10, 15)), ("samed3d_base", (90, 100))]
)
def test_sizes_of_ours(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    assert millions[0] <= sum(p.numel() for p in model.parameters()) / 1e6 <= millions[1]


@pytest.mark.parametrize("name", PROMPTABLE)
def test_shapes_and_finite_gradients(name):
    model = make(name)
    for out in (outs := two_steps(model)):
        assert out.logits.shape == (2, 1, *model.spec.input_shape_zyx)
        assert out.iou.shape == (2, 1)
        assert out.lowres_logits.shape[:2] == (2, 1)
    if name == "sam_med3d_moe":
        return  # its decoders are frozen; tests/test_moe.py trains its gate
    sum(out.logits.square().mean() + out.iou.square().mean() for out in outs).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", OUR_VITS)
def test_every_parameter_of_ours_is_trained_by_two_steps(name):
    model = make(name)
    sum(out.logits.square().mean() + out.iou.square().mean() for out in two_steps(model)).backward()
    # A key bias adds the same to all logits of a query, so the softmax ignores it and its gradient is zero up to
    # rounding.
    idle = [
        n for n, p in model.named_parameters() if not n.endswith("k_proj.bias") and (p.grad is None or not p.grad.any())
    ]
    assert not idle


@pytest.mark.parametrize("name", PROMPTABLE)
@torch.no_grad()
def test_prompts_change_the_mask(name):
    model = make(name).eval()
    features = model.encode(crops(model))
    base = model.decode(features, click(True)).logits
    assert not torch.allclose(base, model.decode(features, click(False)).logits, atol=1e-6)
    assert not torch.allclose(base, model.decode(features, click(True, at=(12.0, 9.0, 3.0))).logits, atol=1e-6)
    if "mask" not in model.spec.prompts:
        return
    if "mask" not in model.spec.prompts:
        return
    with_mask = click(True)
    with_mask.mask_logits = torch.randn(
        model.decode(features, click(True)).lowres_logits.shape, generator=torch.Generator().manual_seed(2)
    )
    assert not torch.allclose(base, model.decode(features, with_mask).logits, atol=1e-6)


@pytest.mark.parametrize("name", BOXED)
@torch.no_grad()
def test_box_changes_the_mask_of_its_sample_only(name):
    model = make(name).eval()
    features = model.encode(crops(model))
    prompts = click(True)
    base = model.decode(features, prompts).logits
    prompts.boxes = torch.tensor([[[1.0, 2.0, 3.0], [9.0, 8.0, 7.0]]]).expand(2, -1, -1)
    prompts.box_valid = torch.tensor([True, False])
    boxed = model.decode(features, prompts).logits
    assert not torch.allclose(base[0], boxed[0], atol=1e-6)
    torch.testing.assert_close(base[1], boxed[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", BOXED)
@torch.no_grad()
def test_padding_points_change_nothing(name):
    model = make(name).eval()
    features = model.encode(crops(model))
    padded = PromptBatch(
        torch.tensor([[[4.0, 5.0, 6.0], [0.0, 0.0, 0.0]]]).expand(2, -1, -1), torch.tensor([[1, -1]]).expand(2, -1)
    )
    expected = model.decode(features, click(True)).logits
    torch.testing.assert_close(model.decode(features, padded).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", OUR_VITS)
@torch.no_grad()
def test_ours_take_crops_that_are_not_cubes(name):
    model = make(name, input_shape=(16, 24, 8)).eval()
    out = model(crops(model), click(True))
    assert out.logits.shape == (2, 1, 16, 24, 8) and model.spec.input_shape_zyx == (16, 24, 8)
    assert (out.iou >= 0).all() and (out.iou <= 1).all()


@pytest.mark.parametrize("name", OUR_VITS)
@torch.no_grad()
def test_refinement_sees_single_voxels(name):
    model = make(name).eval()
    image = crops(model, batch=1)
    changed = image.clone()
    changed[0, 0, 7, 7, 7] += 3.0
    features, other = model.encode(image), model.encode(changed)
    other["image"], other["skip"] = features["image"], features["skip"]
    difference = (
        model.decode(features, click(True, batch=1)).logits - model.decode(other, click(True, batch=1)).logits
    ).abs()[0, 0]
    assert difference[7, 7, 7] > 1e-6
    assert not torch.allclose(difference[6, 6, 6], difference[7, 7, 7], atol=1e-7)  # eight voxels of a cell differ


@pytest.mark.parametrize("name", PROMPTABLE)
@torch.no_grad()
def test_save_and_load_give_the_same_mask(name, tmp_path):
    model = make(name).eval()
    save_weights(model, tmp_path / "model.safetensors", {"licence": "Apache-2.0"})
    again = load(tmp_path / "model.safetensors")
    assert not again.training and again.spec == model.spec
    torch.testing.assert_close(again(crops(model), click(True)).logits, model(crops(model), click(True)).logits)


def test_unknown_model_gives_nearest_names():
    with pytest.raises(InputError, match=r"unknown model 'sam_med3d_x'; nearest: sam_med3d_"):
        create_model("sam_med3d_x")


def test_load_promptable_refuses_a_semantic_model(tmp_path):
    for name in ("sam3d", "samed3d_unet"):
        save_weights(create_model(name, **MODELS[name].tiny), tmp_path / f"{name}.safetensors", {})
    assert isinstance(load(tmp_path / "sam3d.safetensors"), SemanticModel)
    with pytest.raises(
        InputError,
        match=r"model must take prompts, got '.*sam3d.safetensors', a 'sam3d', which segments all classes without",
    ):
        load_promptable(tmp_path / "sam3d.safetensors")
    assert isinstance(load_promptable(tmp_path / "samed3d_unet.safetensors"), PromptableModel)


def test_unknown_override_is_refused():
    with pytest.raises(InputError, match=r"'samed3d_tiny' cannot be built with \{'widht': 3\}: .*widht"):
        create_model("samed3d_tiny", widht=3)


@pytest.mark.parametrize("patch", [2, 12])
def test_patch_that_a_stem_cannot_reach_is_refused(patch):
    with pytest.raises(InputError, match=rf"patch must be a power of two of at least 4, got {patch}"):
        create_model("samed3d_tiny", patch=patch)
