"""What learns and what stays, and the files of adapters."""

from __future__ import annotations

import json

import pytest
import torch

from samed3d.config import ClickConfig, LossConfig, ModelConfig
from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptableModel
from samed3d.models.weights import amend_header, read_header, read_weights, save_weights, tensors_sha256
from samed3d.nn.adapters import adapter_names, merge_adapters
from samed3d.training.start import choose_trainable, describe, encoder_parameters
from samed3d.training.step import InteractiveStep

NAME = "samed3d_unet"
PROMPTABLE = ("samed3d_unet", "samed3d_tiny", "sam_med3d_b")
ALL_PROMPTABLE = sorted(
    name for name, entry in MODELS.items() if isinstance(entry.build(**entry.tiny), PromptableModel)
)


def tiny(name: str = NAME) -> PromptableModel:
    torch.manual_seed(0)
    return create_model(name, **MODELS[name].tiny)


def channels(model: PromptableModel) -> int:
    return 2 if model.spec.normalisation == "zscore_rank" else 1


def train_a_little(model: PromptableModel, steps: int = 2) -> None:
    """Steps of AdamW with a strong decay: what it may touch, it changes."""
    shape = model.spec.input_shape_zyx
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(1, channels(model), *shape, generator=generator)
    target = torch.zeros(1, 1, *shape, dtype=torch.bool)
    target[..., : shape[2] // 2] = True
    step = InteractiveStep(model, ClickConfig(interactions=2, box_probability=0), LossConfig())
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    for number in range(steps):
        step(image, target, number).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_weights(tiny(), path, {})
    return path


def adapted(base, kind="lora", trained=True) -> PromptableModel:
    model = load(base)
    choose_trainable(model, ModelConfig(weights=str(base), train="adapters", adapter=kind, rank=2))
    if trained:
        train_a_little(model.train())
    return model


@pytest.mark.parametrize("name", ALL_PROMPTABLE)
def test_encoder_parts_hold_exactly_what_encode_uses(name):
    model = tiny(name)
    learns = {n for n, p in model.named_parameters() if p.requires_grad}  # some are born with frozen parts
    features = model.requires_grad_(True).encode(torch.randn(1, channels(model), *model.spec.input_shape_zyx))
    sum(f.float().square().sum() for f in features.values()).backward()
    used = {n for n, p in model.named_parameters() if p.grad is not None}
    assert encoder_parameters(model) & learns <= used <= encoder_parameters(model) and used


@pytest.mark.parametrize("name", PROMPTABLE)
@pytest.mark.parametrize(("train", "adapter"), [("decoder", "none"), ("adapters", "lora"), ("adapters", "fact")])
def test_frozen_stays_frozen_bit_for_bit_and_the_rest_learns(name, train, adapter):
    model = tiny(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    choose_trainable(model, ModelConfig(name=name, weights="base", train=train, adapter=adapter, rank=2))
    image = torch.randn(1, channels(model), *model.spec.input_shape_zyx)
    adapters = set(adapter_names(model))
    started = {n: p.detach().clone() for n, p in model.named_parameters() if n in adapters}
    with torch.no_grad():
        encoded = model.eval().encode(image)
    train_a_little(model.train())
    after = dict(model.named_parameters())
    frozen = encoder_parameters(tiny(name))
    assert all(torch.equal(after[n], before[n]) for n in frozen)
    assert sum(not torch.equal(after[n], before[n]) for n in set(before) - frozen) > 5
    assert sum(not torch.equal(after[n], started[n]) for n in adapters) > len(adapters) // 2 or not adapters
    with torch.no_grad():
        same = all(torch.equal(v, model.eval().encode(image)[k]) for k, v in encoded.items())
    assert same == (train == "decoder")


def test_all_learns_everything_and_leaves_what_a_model_froze_itself():
    model = tiny()
    model.stem.requires_grad_(False)
    choose_trainable(model, ModelConfig())
    assert not model.stem.weight.requires_grad and model.out.weight.requires_grad
    assert model.adaptation is None


def test_the_log_says_how_much_learns(base):
    model = adapted(base, trained=False)
    total = sum(p.numel() for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = sum(dict(model.named_parameters())[n].numel() for n in adapter_names(model))
    assert describe(model) == f"{count:,} of {total:,} parameters learn, {own:,} of them adapters"


@pytest.mark.parametrize("kind", ["lora", "fact"])
def test_an_adapter_file_is_only_what_was_trained_and_loads_to_the_same_model(base, tmp_path, kind):
    model = adapted(base, kind)
    path = tmp_path / "adapter.safetensors"
    save_weights(model, path, {})
    state, header = read_weights(path)
    assert header["adapter"] == {
        "kind": kind,
        "rank": 2,
        "base": str(base),
        "base_sha256": tensors_sha256(read_weights(base)[0]),
    }
    assert set(state) & encoder_parameters(tiny()) == set() and set(adapter_names(model)) < set(state)
    again = load(path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    assert not again.training and again.adaptation == model.adaptation


def test_a_loaded_adapter_is_written_as_an_adapter_again(base, tmp_path):
    save_weights(adapted(base), tmp_path / "a.safetensors", {})
    save_weights(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", {})
    one, two = (read_weights(tmp_path / f"{n}.safetensors")[0] for n in "ab")
    assert one.keys() == two.keys() and all(torch.equal(v, two[k]) for k, v in one.items())


def test_an_adapter_refuses_another_base(base, tmp_path):
    save_weights(adapted(base), tmp_path / "a.safetensors", {})
    other = tiny()
    with torch.no_grad():
        other.stem.weight[0, 0, 0, 0, 0] += 1e-6
    save_weights(other, base, {})
    with pytest.raises(InputError, match=r"a\.safetensors was trained on weights with tensors .*base\.safetensors has"):
        load(tmp_path / "a.safetensors")


def test_the_base_may_move_together_with_its_adapter(base, tmp_path):
    model = adapted(base)
    away = tmp_path / "away"
    away.mkdir()
    save_weights(model, away / "a.safetensors", {})
    base.rename(away / "base.safetensors")
    assert torch.equal(load(away / "a.safetensors").stem.weight, model.stem.weight)
    (away / "base.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"is an adapter of '.*base\.safetensors', which is not there; put that file beside it"
    ):
        load(away / "a.safetensors")


def test_an_adapter_of_an_adapter_is_refused_with_the_remedy(base, tmp_path):
    first = tmp_path / "a.safetensors"
    save_weights(adapted(base), first, {})
    save_weights(adapted(base), tmp_path / "b.safetensors", {})
    base.unlink()
    first.rename(base)
    with pytest.raises(InputError, match="is an adapter itself; merge that one into its base first"):
        load(tmp_path / "b.safetensors")


def test_an_incomplete_adapter_file_is_refused(base, tmp_path):
    model = adapted(base)
    missing = adapter_names(model)[0]
    dict(model.named_parameters())[missing].requires_grad_(False)
    save_weights(model, tmp_path / "a.safetensors", {})
    with pytest.raises(InputError, match=rf"missing \(1\): {missing}"):
        load(tmp_path / "a.safetensors")


def test_a_merged_model_is_a_whole_one(base, tmp_path):
    model = adapted(base)
    image = torch.randn(1, 2, 32, 32, 32)
    with torch.no_grad():
        expected = model.eval().encode(image)
        merge_adapters(model)
        model.adaptation = None
        save_weights(model, tmp_path / "whole.safetensors", {})
        base.unlink()
        got = load(tmp_path / "whole.safetensors").encode(image)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=1e-4, rtol=1e-4)


def test_the_hash_of_tensors_does_not_depend_on_storage_but_on_every_value():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2)}
    same = {"b": torch.zeros(2, 2, dtype=torch.float16), "a": torch.tensor([1.0, 2.0], dtype=torch.float16)}
    assert tensors_sha256(state) == tensors_sha256(same)
    assert (
        len(
            {
                tensors_sha256(s)
                for s in (state, {**state, "a": torch.tensor([2.0, 1.0])}, {**state, "b": torch.zeros(4)})
            }
        )
        == 3
    )


def test_facts_are_added_to_a_header_and_nothing_else_changes(base):
    before = read_weights(base)
    amend_header(base, {"metrics": {"dice_5": 0.5}})
    state, header = read_weights(base)
    assert header == {**before[1], "metrics": {"dice_5": 0.5}}
    assert all(torch.equal(v, before[0][k]) for k, v in state.items())
    with pytest.raises(InputError, match="facts must not use the header's own keys, got model"):
        amend_header(base, {"model": "x"})
    assert json.dumps(read_header(base)) == json.dumps(header)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ModelConfig(adapter="lora"), "model.adapter needs model.train adapters, got 'lora' with train 'all'"),
        (ModelConfig(train="adapters", weights="x"), "model.adapter must be lora or fact when model.train is adapters"),
        (
            ModelConfig(train="adapters", adapter="lora"),
            "model.weights must name the trained model that adapters are put on",
        ),
        (ModelConfig(train="adapters", adapter="lora", weights="x", rank=0), "model.rank must be 1 or more, got 0"),
    ],
)
def test_keys_that_contradict_each_other_are_refused_before_anything_changes(config, said):
    model = tiny()
    with pytest.raises(InputError, match=said):
        choose_trainable(model, config)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_image_encoder_cannot_be_frozen():
    with pytest.raises(InputError, match="Linear has no image encoder that could be frozen; use model.train all"):
        choose_trainable(torch.nn.Linear(2, 2), ModelConfig(train="decoder"))
