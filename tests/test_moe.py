"""The mixture of experts: nothing of a decoder changes, the general answer is bit-equal, the gate learns, wrong experts
are refused."""

import pytest
import torch

from samed3d.cli import main
from samed3d.config import ClickConfig, TrainConfig, load_config
from samed3d.errors import InputError
from samed3d.models import MODELS, create_model, load
from samed3d.models.base import PromptBatch
from samed3d.models.sam_med3d_moe import MixtureOfExperts
from samed3d.models.weights import save_weights
from samed3d.training.loop import train
from samed3d.training.moe import GateStep, assemble, gate_config

FAMILIES = ["samed3d_unet", "sam_med3d_b", "samu", "fast_sam3d"]


def base_and_experts(folder, name="samed3d_unet"):
    """A tiny base on disk and two fine-tunes whose decoders were moved."""
    torch.manual_seed(0)
    model = create_model(name, **MODELS[name].tiny)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    save_weights(model, folder / "base.safetensors", {})
    encoder = tuple(f"{part}." for part in model.encoder_parts)
    for number in (1, 2):
        for key, parameter in model.named_parameters():
            if not key.startswith(encoder):
                parameter.data += 0.05 * torch.randn_like(parameter)
        save_weights(model, folder / f"expert{number}.safetensors", {})
    return str(folder / "base.safetensors"), [str(folder / f"expert{n}.safetensors") for n in (1, 2)]


def crop(model) -> torch.Tensor:
    return torch.randn(2, *model.spec.image_shape, generator=torch.Generator().manual_seed(1))


def clicks() -> PromptBatch:
    return PromptBatch(torch.tensor([[[4.0, 5.0, 6.0]], [[9.0, 3.0, 7.0]]]), torch.ones(2, 1, dtype=torch.int64))


def steer(mixture: MixtureOfExperts, index: int) -> None:
    """Have the gate name one decoder whatever it sees."""
    last = mixture.gate.layers[-1]
    last.weight.data.zero_()
    last.bias.data.copy_(20.0 * torch.nn.functional.one_hot(torch.tensor(index), 1 + len(mixture.names)))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_each_choice_is_that_checkpoint_bit_for_bit(tmp_path, name):
    base, experts = base_and_experts(tmp_path, name)
    mixture = assemble(base, experts)
    for index, path in enumerate([base, *experts]):
        steer(mixture, index)
        alone = load(path)
        expected, got = alone(crop(alone), clicks()), mixture(crop(alone), clicks())
        assert torch.equal(got.logits, expected.logits) and torch.equal(got.lowres_logits, expected.lowres_logits)
        assert torch.equal(got.iou, expected.iou)
    assert not torch.equal(load(base)(crop(alone), clicks()).logits, expected.logits)


@torch.no_grad()
def test_each_sample_gets_its_own_choice(tmp_path):
    base, experts = base_and_experts(tmp_path)
    mixture = assemble(base, experts)
    features = mixture.encode(crop(mixture))
    mixture.choose = lambda *_: torch.tensor([2, 0])
    out = mixture.decode(features, clicks()).logits
    assert torch.equal(out[0], mixture.decode_by(2, features, clicks()).logits[0])
    assert torch.equal(out[1], mixture.decode_by(0, features, clicks()).logits[1])


def test_below_the_threshold_the_general_decoder_answers(tmp_path):
    base, experts = base_and_experts(tmp_path)
    mixture = assemble(base, experts, threshold=0.6)
    logits = torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.0, 3.0], [3.0, 0.0, 0.0]])
    assert mixture.select(logits).tolist() == [0, 2, 0]
    mixture.threshold = 0.3
    assert mixture.select(logits).tolist() == [1, 2, 0]


def test_an_expert_costs_its_own_tensors_only(tmp_path):
    base, experts = base_and_experts(tmp_path)
    general, mixture = load(base), assemble(base, experts)
    encoder = sum(p.numel() for part in general.encoder_parts for p in general.get_submodule(part).parameters())
    total = sum(p.numel() for p in general.parameters())
    gate = sum(p.numel() for p in mixture.gate.parameters())
    assert sum(p.numel() for p in mixture.parameters()) == total + 2 * (total - encoder) + gate
    assert sum(p.numel() for p in mixture.parameters() if p.requires_grad) == gate < 0.5 * total


def test_the_gate_learns_and_nothing_else_changes(tmp_path):
    """One expert paints everything, which is right here; the gate finds out, and no decoder moves."""
    base, experts = base_and_experts(tmp_path)
    mixture = assemble(base, experts)
    mixture.experts[1].get_parameter("out/bias").data += 10.0
    before = {k: v.clone() for k, v in mixture.state_dict().items()}
    step = GateStep(mixture, ClickConfig(interactions=1, box_probability=0.0))
    optimiser = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2)
    image, target = crop(mixture), torch.ones(2, 1, 32, 32, 32, dtype=torch.bool)
    losses = []
    for _ in range(8):
        out = step(image, target, seed=0)
        losses.append(float(out.loss.detach()))
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert step(image, target, seed=0).dice.min() > 0.99
    assert mixture.choose(mixture.encode(image), clicks()).tolist() == [2, 2]
    after = mixture.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if not k.startswith("gate."))
    assert any(not torch.equal(after[k], before[k]) for k in after if k.startswith("gate."))


def test_step_repeats_and_reports_the_chosen_decoders_dice(tmp_path):
    base, experts = base_and_experts(tmp_path)
    mixture = assemble(base, experts)
    steer(mixture, 1)
    target = torch.zeros(2, 1, 32, 32, 32, dtype=torch.bool)
    target[:, :, 8:20, 8:20, 8:20] = True
    step = GateStep(mixture, ClickConfig(interactions=3, box_probability=0.0))
    one, two = step(crop(mixture), target, 5), step(crop(mixture), target, 5)
    assert torch.equal(one.loss, two.loss) and one.dice.shape == (2, 3)
    assert torch.equal(one.dice, two.dice) and ((one.dice >= 0) & (one.dice <= 1)).all()


def test_a_mixture_survives_its_file(tmp_path):
    base, experts = base_and_experts(tmp_path)
    mixture = assemble(base, experts, threshold=0.0)
    save_weights(mixture, tmp_path / "moe.safetensors", {})
    again = load(tmp_path / "moe.safetensors")
    assert isinstance(again, MixtureOfExperts) and again.names == ("expert1", "expert2") and again.threshold == 0.0
    with torch.no_grad():
        assert torch.equal(again(crop(again), clicks()).logits, mixture(crop(again), clicks()).logits)


def test_a_training_through_the_loop(tmp_path):
    base, experts = base_and_experts(tmp_path)
    sizes = ["data.crop=[32,32,32]", "optim.steps=2", "optim.batch=1", "clicks.interactions=1", "run.precision=fp32"]
    config = load_config(TrainConfig, None, [*sizes, f"run.folder={tmp_path / 'run'}"])
    folder = train(gate_config(base, experts, config), quiet=True)
    trained, untrained = load(folder / "model.safetensors"), load(folder / "assembled.safetensors")
    after, before = trained.state_dict(), untrained.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed and all(k.startswith("gate.") for k in changed)
    with pytest.raises(InputError, match=r"run.folder already holds a run"):
        gate_config(base, experts, config)
    assert gate_config(base, experts, config, resume=True).model.weights == str(folder / "assembled.safetensors")


def test_an_expert_that_changed_the_encoder_is_refused(tmp_path):
    base, experts = base_and_experts(tmp_path)
    model = load(experts[0])
    model.stem.weight.data += 1.0
    save_weights(model, tmp_path / "wild.safetensors", {})
    with pytest.raises(
        InputError, match=r"keep the image encoder of .* changed 1 tensors of it; fine-tune with --train decoder"
    ):
        assemble(base, [str(tmp_path / "wild.safetensors")])


def test_an_expert_of_other_crops_is_named(tmp_path, caplog):
    base, experts = base_and_experts(tmp_path)
    expert = load(experts[0])
    grown = create_model("samed3d_unet", **{**MODELS["samed3d_unet"].tiny, "input_shape": (48, 48, 48)})
    grown.load_state_dict(expert.state_dict())
    save_weights(grown, tmp_path / "grown.safetensors", {})
    with caplog.at_level("WARNING", logger="samed3d"):
        mixture = assemble(base, [str(tmp_path / "grown.safetensors")])
    assert mixture.spec.input_shape_zyx == (32, 32, 32)
    assert "was trained on crops of (48, 48, 48)" in caplog.text


def test_wrong_experts_are_refused(tmp_path):
    base, experts = base_and_experts(tmp_path)
    with pytest.raises(InputError, match=r"expert must differ from"):
        assemble(base, [base])
    with pytest.raises(InputError, match=r"--moe needs at least one expert"):
        assemble(base, [])
    with pytest.raises(InputError, match=r"expert must be a checkpoint's name or file, got 'nothing'"):
        assemble(base, ["nothing"])
    with pytest.raises(InputError, match=r"threshold must be from 0 to 1, got 2"):
        assemble(base, experts, threshold=2)
    (tmp_path / "other").mkdir()
    other, _ = base_and_experts(tmp_path / "other", "samu")
    with pytest.raises(InputError, match=r"expert must be a fine-tune of .* got another architecture"):
        assemble(base, [other])


def test_experts_become_a_mixture_by_one_flag(tmp_path, monkeypatch):
    base, _ = base_and_experts(tmp_path)
    called = {}
    monkeypatch.setattr(
        "samed3d.training.moe.gate_config", lambda *given, **more: called.update(given=given, more=more) or given[2]
    )
    monkeypatch.setattr("samed3d.training.loop.train", lambda *_given, **_more: tmp_path)
    changes = ["--set", f"model.weights={base}", "--set", "optim.steps=7"]
    assert main(["train", "--moe", "a.safetensors", "--moe", "b.safetensors", *changes, "-q"]) == 0
    assert called["given"][:2] == (base, ["a.safetensors", "b.safetensors"]) and called["given"][2].optim.steps == 7
    assert main(["train", "--moe", "a.safetensors", "-q"]) == 0 and called["given"][0] == "default"
