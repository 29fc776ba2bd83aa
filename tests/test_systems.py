"""All systems of the registry side by side: they train, what is frozen stays, and their sizes are the published
ones."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from samed3d.models import MODELS, create_model, list_models
from samed3d.models.base import ModelSpec, PromptableModel, PromptBatch, SemanticModel
from samed3d.models.inventory import count_flops, take_inventory

PUBLISHED = {
    # name: (total parameters or None, trained parameters)
    "sam_med3d_b": (100_509_232, 100_509_232),
    "sam_med3d_b256": (36_186_928, 36_186_928),
    "sam_med3d_l": (322_786_864, 322_786_864),
    "sam_med3d_h": (652_434_992, 652_434_992),
    "samu": (12_034_342, 12_034_342),
    "sam3d": (None, 1_880_258),
    "sam3d_adapter": (None, 25_462_400),
    "sam3d_adapter_auto": (None, 22_298_240),
    "ma_sam_b": (None, 73_728 + 24_818_688 + 5_243_725 + 6_220),
    "ma_sam_h": (None, 147_456 + 91_414_528 + 5_243_725 + 6_220),
}


def tiny(name: str):
    """A tiny instance with seeded weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(name, **MODELS[name].tiny)


def answer(model) -> torch.Tensor:
    """Logits of a seeded crop, with one click where clicks are understood."""
    spec = model.spec
    image = torch.randn(1, *spec.image_shape, generator=torch.Generator().manual_seed(1))
    if isinstance(model, PromptableModel):
        return model(image, PromptBatch(torch.tensor([[[3.0, 4.0, 5.0]]]), torch.tensor([[1]]))).logits
    return model(image)


def on_meta(name: str):
    with torch.device("meta"):
        return create_model(name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    model = on_meta(name)
    total, trained = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert total is None or sum(p.numel() for p in model.parameters()) == total


@pytest.mark.parametrize("name", ["sam_med3d_b", "fast_sam3d", "samed3d_unet", "samu", "sam3d", "sam_med3d_moe"])
def test_the_inventory_adds_up(name):
    with torch.device("meta"):
        model = create_model(name, **MODELS[name].tiny)
    counts = take_inventory(model)
    assert (
        counts.encoder + counts.prompts + counts.decoder == counts.total == sum(p.numel() for p in model.parameters())
    )
    assert counts.encoder > 0 and counts.encode_flops > 0
    assert (counts.decode_flops > 0) == (counts.prompts > 0) == isinstance(model, PromptableModel)
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)  # counting froze nothing


def test_operations_are_those_of_the_fact_sheets():
    """49.6 GFLOP for the student's encoder (published); the teacher's, without the padding of its windows, far below
    its 368.6."""
    assert take_inventory(on_meta("fast_sam3d")).encode_flops / 1e9 == pytest.approx(49.6, abs=0.1)
    assert 95 < take_inventory(on_meta("sam_med3d_b")).encode_flops / 1e9 < 110


def run_all(model) -> tuple[int, int]:
    """Operations of encode and decode with every module run, none remembered."""
    spec = model.spec
    model.requires_grad_(False)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if not isinstance(model, PromptableModel):
            model(torch.empty(1, *spec.image_shape))
            return counter.get_total_flops(), 0
        features = model.encode(torch.empty(1, *spec.image_shape))
        encode = counter.get_total_flops()
        model.decode(features, PromptBatch(torch.empty(1, 1, 3), torch.empty(1, 1, dtype=torch.int64)))
        return encode, counter.get_total_flops() - encode


@pytest.mark.parametrize("name", list_models())
def test_counting_equal_blocks_once_changes_no_count(name):
    with torch.device("meta"):
        model = create_model(name, **MODELS[name].tiny)
    assert count_flops(model) == run_all(model)
    assert not any("forward" in vars(module) for module in model.modules()), "every module has its own forward again"


def test_nor_in_full_size_with_many_slices():
    assert count_flops(on_meta("sam3d")) == run_all(on_meta("sam3d"))


class Repeat(torch.nn.Module):
    """A linear layer applied some times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times, self.layer, self.ran = times, torch.nn.Linear(4, 4), []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ran.append(1)
        for _ in range(self.times):
            x = self.layer(x)
        return x


class Chain(SemanticModel):
    """Blocks of one class and size that differ in a number alone."""

    def __init__(self, *times: int) -> None:
        super().__init__()
        self.spec = ModelSpec("chain", (4, 4, 4), classes=1)
        self.blocks = torch.nn.Sequential(*map(Repeat, times))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.blocks(image)


def test_blocks_that_differ_in_a_number_are_counted_apart():
    once = 2 * 64 * 4
    with torch.device("meta"):
        chain = Chain(1, 3, 1, 3)
    assert count_flops(chain) == (8 * once, 0)


def test_equal_blocks_run_once():
    with torch.device("meta"):
        chain = Chain(2, 2, 2)
    for block in chain.blocks:
        block.ran = ran = chain.blocks[0].ran
    assert count_flops(chain)[0] == 6 * 2 * 64 * 4 and len(ran) == 1


@pytest.mark.parametrize("name", [n for n in list_models() if n != "sam_med3d_moe"])
def test_two_steps_train_what_learns_and_leave_the_rest(name):
    model = tiny(name)
    model.train()
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    optimiser = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        answer(model).square().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in learning if p.grad is not None)
        optimiser.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    frozen = {key for key, value in model.named_parameters() if not value.requires_grad}
    assert changed and not changed & frozen


@torch.no_grad()
@pytest.mark.parametrize("name", list_models())
def test_the_same_seed_gives_the_same_model(name):
    assert torch.equal(answer(tiny(name).eval()), answer(tiny(name).eval()))


def test_every_system_says_where_it_comes_from():
    for name in list_models():
        spec = tiny(name).spec
        assert spec.name == name and spec.source
