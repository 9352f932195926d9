"""Real removal: attributes, ties, and attention with fewer heads."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import distprune as dp
from distprune.core.edits.resize import FewerHeads
from distprune.core.edits.shrink import shrink
from distprune.core.granularity.coupling import Group, Part, _heads, coupled
from distprune.core.masks import prunable
from distprune.errors import UserError


def _kept(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.bool)


def _two_layers() -> tuple[nn.Module, Group]:
    """Three units between two linear layers."""
    index = torch.arange(3)[:, None]
    parts = (Part("0.weight", 0, index, "produces"), Part("0.bias", 0, index, "carries"), Part("2.weight", 1, index, "consumes"))
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), Group("0.weight", parts)


def test_slices_by_hand() -> None:
    model, group = _two_layers()
    small = shrink(model, [group], {"0.weight": _kept(1, 0, 1)})
    assert torch.equal(small[0].weight, model[0].weight[[0, 2]])
    assert torch.equal(small[0].bias, model[0].bias[[0, 2]])
    assert torch.equal(small[2].weight, model[2].weight[:, [0, 2]])
    assert torch.equal(small[2].bias, model[2].bias)
    assert small[2].bias is not model[2].bias
    assert (small[0].out_features, small[2].in_features) == (2, 2)
    assert (model[0].out_features, model[0].weight.shape) == (3, (3, 2)), "the model itself stays"
    assert shrink(model, [group], {})[0].weight.shape == (3, 2), "no entry, nothing removed"


def test_at_least_one_unit_stays() -> None:
    model, group = _two_layers()
    with pytest.raises(UserError, match=r"At least one unit of group '0\.weight' must be kept, got none of 3\. Keep its best unit\."):
        shrink(model, [group], {"0.weight": _kept(0, 0, 0)})


def test_dtype_mode_gradient_flags_and_ties_stay() -> None:
    model, group = _two_layers()
    model[0].bias.requires_grad_(False)
    model = nn.ModuleDict({"a": model, "b": nn.Sequential(model[0], nn.ReLU(), nn.Linear(3, 2))}).bfloat16()
    model["b"][2].weight = model["a"][2].weight
    model["a"].eval()
    parts = tuple(Part(f"a.{part.name}", part.dim, part.index, part.role) for part in group.parts)
    small = shrink(model, [Group("a.0.weight", parts)], {"a.0.weight": _kept(0, 1, 1)})
    assert small["a"][0] is small["b"][0], "a shared module"
    assert small["a"][2].weight is small["b"][2].weight, "a tied weight"
    assert small["b"][2].in_features == 2
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv3d(4, 4, 1, groups=4),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 8, 3, groups=2),
        nn.BatchNorm2d(4),
        nn.BatchNorm1d(4, affine=False),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(4),
    ],
    ids=str,
)
def test_a_layer_of_half_the_channels_is_as_one_built_so(layer: nn.Module) -> None:
    blocks = max(getattr(layer, "groups", 1), getattr(layer, "num_groups", 1))
    parts = []
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.dim() > 1 and blocks == 1:  # both sides of a plain convolution
            parts.append(Part(name, 1, torch.arange(tensor.shape[1])[:, None].view(2, -1), "consumes"))
        if tensor.dim() > 0:
            parts.append(Part(name, 0, torch.arange(tensor.shape[0]).view(2, -1), "carries"))
    small = shrink(layer, [Group("x", tuple(parts))], {"x": _kept(0, 1)})
    numbers = ("in_channels", "out_channels", "groups", "num_features", "num_channels", "num_groups", "num_parameters")
    halved = {name for name in numbers if name not in ("groups", "num_groups") or blocks > 1}
    for name in numbers:
        if hasattr(layer, name):
            assert getattr(small, name) == getattr(layer, name) // (2 if name in halved else 1), name
    rank = {"1d": 3, "2d": 4, "3d": 5}.get(type(layer).__name__[-2:], 3)
    channels = next(
        getattr(small, name) for name in ("in_channels", "num_features", "num_channels", "num_parameters") if hasattr(small, name)
    )
    small.eval()(torch.randn(1, channels, *[5] * (rank - 2)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_fewer_heads_compute_what_torch_does_with_the_others_at_zero(batch_first: bool, bias: bool, apart: bool) -> None:
    torch.manual_seed(0)
    sizes = {"kdim": 6, "vdim": 10} if apart else {}
    whole = nn.MultiheadAttention(12, 4, bias=bias, batch_first=batch_first, **sizes).double().eval()
    for parameter in whole.parameters():
        nn.init.normal_(parameter)
    (group,) = _heads(whole)
    kept = _kept(1, 0, 1, 1)
    small = shrink(whole, [group], {group.name: kept})
    assert isinstance(small, FewerHeads)
    assert small.num_heads == 3
    assert group.name in prunable(small)
    masked = copy.deepcopy(whole)
    with torch.no_grad():
        for part in group.parts:
            if part.role != "carries":
                masked.get_parameter(part.name).index_fill_(part.dim, part.index[~kept].flatten(), 0)

    n, length, source = 2, 5, 7
    shapes = [(n, length, 12), (n, source, 6 if apart else 12), (n, source, 10 if apart else 12)]
    x = [torch.randn(shape, dtype=torch.double).transpose(0, 0 if batch_first else 1) for shape in shapes]
    causal = torch.ones(length, source, dtype=torch.bool).triu(1)
    padding = torch.zeros(n, source, dtype=torch.bool)
    padding[0, -2:] = True
    for masks in (
        {},
        {"attn_mask": causal},
        {"attn_mask": torch.randn(length, source).double(), "key_padding_mask": padding.double().mul(-3)},
        {"attn_mask": causal, "key_padding_mask": padding},
    ):
        for need in (True, False):
            out, weights = small(*x, need_weights=need, **masks)
            torch.testing.assert_close(out, masked(*x, need_weights=need, **masks)[0])
            assert (weights is not None) == need
        each = masked(*x, average_attn_weights=False, **masks)[1]
        torch.testing.assert_close(small(*x, average_attn_weights=False, **masks)[1], each[:, kept])
        torch.testing.assert_close(small(*x, **masks)[1], each[:, kept].mean(1))
    one = [t.select(0 if batch_first else 1, 0) for t in x]  # one sample, without a batch
    torch.testing.assert_close(small(*one, attn_mask=causal)[0], masked(*one, attn_mask=causal)[0])
    per_head = torch.randn(n * 4, length, source).double()
    fewer = per_head.view(n, 4, length, source)[:, kept].flatten(0, 1)
    torch.testing.assert_close(small(*x, attn_mask=fewer)[0], masked(*x, attn_mask=per_head)[0])


def test_a_shrunk_encoder_keeps_working_and_can_be_shrunk_again() -> None:
    torch.manual_seed(0)
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, dropout=0.0), 2)
    model, x = nn.Sequential(nn.Linear(8, 16), stack, nn.Linear(16, 5)), torch.randn(2, 6, 8)
    groups = coupled(model, x)
    small = shrink(model, groups, {group.name: torch.arange(group.units) % 2 == 0 for group in groups})
    trained = small.train()(x)  # torch's own path
    with torch.no_grad():  # and where it would take the fused one
        torch.testing.assert_close(small.eval()(x), trained)
        padding = torch.zeros(2, 6, dtype=torch.bool)
        padding[0, 4:] = True
        assert small[1](small[0](x), src_key_padding_mask=padding).shape == (2, 6, 16)
    smaller_groups = coupled(small, x)
    assert [group.units for group in smaller_groups] == [group.units // 2 for group in groups]
    smaller = shrink(small, smaller_groups, {group.name: torch.arange(group.units) == 0 for group in smaller_groups})
    assert [module.num_heads for module in smaller.modules() if isinstance(module, FewerHeads)] == [1, 1]
    assert torch.equal(pickle.loads(pickle.dumps(smaller))(x), smaller(x))
    smaller[1].layers[0].self_attn._reset_parameters()


@pytest.mark.parametrize("frozen", [("0.weight",), ("0.weight", "0.bias", "2.weight", "2.bias")])
def test_frozen_weights_are_taken_out_like_others_and_stay_frozen(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4)
    masks = dp.prune(model, granularity="filter", sparsity=0.5, batches=[(inputs, torch.zeros(3, dtype=torch.long))])
    due = dp.shrink(model, masks, inputs[:1])
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    small = dp.shrink(model, masks, inputs[:1])
    assert small[0].weight.shape[0] < 6 and torch.equal(small(inputs), due(inputs))
    assert {name for name, parameter in small.named_parameters() if not parameter.requires_grad} == set(frozen)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(frozen)
