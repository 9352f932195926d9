"""Masks, prunable weights, FLOPs and layer collapse."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import distprune as dp
from distprune.core.masks import Masks, prunable
from distprune.core.metrics import collapsed, flops, layer_flops
from distprune.core.names import paired, unwrapped
from distprune.errors import UserError


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))


def _masks(model: nn.Module) -> Masks:
    return dp.prune(model, sparsity=0.5)


def test_prunable_are_trainable_weights_of_known_modules() -> None:
    model = _net()
    assert list(prunable(model)) == ["0.weight", "4.weight"]
    assert list(prunable(model, exclude=["4.*"])) == ["0.weight"] and list(prunable(model, include=["4.*"])) == ["4.weight"]
    model[0].weight.requires_grad_(False)
    assert list(prunable(model)) == ["4.weight"]


def test_tied_weights_are_masked_once_under_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert list(prunable(model)) == ["0.weight"]


def test_nothing_to_prune_is_said() -> None:
    with pytest.raises(UserError, match="BatchNorm1d must have trainable weights in one of Linear, .* got none"):
        prunable(nn.BatchNorm1d(3))
    with pytest.raises(UserError, match=r"exclude \['\*'\] leave no weight to prune"):
        prunable(_net(), exclude=["*"])


def test_round_trip_and_metadata(tmp_path: Path) -> None:
    masks = _masks(_net())
    masks.save(tmp_path / "m.safetensors", note="hello")
    assert Masks.load(tmp_path / "m.safetensors").equal(masks)
    from safetensors import safe_open

    with safe_open(str(tmp_path / "m.safetensors"), framework="pt") as file:
        assert file.metadata()["note"] == '"hello"' and set(file.keys()) == {"0.weight", "4.weight"}


def test_files_that_are_not_masks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="is not a readable safetensors file of masks"):
        Masks.load(tmp_path / "x")
    save_file({"a": torch.ones(2)}, str(tmp_path / "y"))
    with pytest.raises(UserError, match="masks must be bool tensors, 'a' is torch.float32"):
        Masks.load(tmp_path / "y")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"Cannot read masks from {path}: "):
            Masks.load(path)


def test_a_damaged_file_of_masks_is_refused(tmp_path: Path) -> None:
    """Any weight that is kept or removed against the header's counts, any byte that is no bool, any tensor too many."""
    path, raw = tmp_path / "m.safetensors", b""
    masks = Masks({"a": torch.tensor([True, False, True]), "b": torch.zeros(2, 2, dtype=torch.bool)})
    raw = masks.save(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for place in range(start, len(raw)):
        for value in {0, 1, 2} - {raw[place]}:
            path.write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
            with pytest.raises(UserError, match=r"is damaged: mask '[ab]' does not keep the [02] weights of its header"):
                Masks.load(path)
    save_file({"a": masks["a"], "b": masks["b"]}, str(path), metadata={"layers": '{"a": 2}'})
    with pytest.raises(UserError, match="it holds 'b', of which its header knows nothing"):
        Masks.load(path)
    save_file({"a": masks["a"]}, str(path))
    assert Masks.load(path).counts == {"a": 2}, "without a header, whoever wrote it is believed"


class Wrapped(nn.Module):
    """A wrapper that adds a part of its own to names, and calls what is in it."""

    def __init__(self, part: str, inner: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.add_module(part, inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.part)(x)


def _compiled_inside(model: nn.Sequential) -> nn.Module:
    model[4] = torch.compile(model[4])
    return nn.DataParallel(model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        torch.compile,
        lambda model: nn.DataParallel(torch.compile(model)),
        torch.optim.swa_utils.AveragedModel,
        _compiled_inside,
        lambda model: Wrapped("_fsdp_wrapped_module", nn.Sequential(*model[:4], Wrapped("_checkpoint_wrapped_module", model[4]))),
    ],
)
def test_apply_finds_weights_behind_wrappers_at_any_level(wrap: object) -> None:
    """The one-liner sets the same weights to zero behind any wrapper, and masks made behind it fit the network without it."""
    model = _net()
    masks, bare = _masks(model), copy.deepcopy(model)
    wrapped = wrap(model)  # type: ignore[operator]
    owned = [value for name, value in wrapped.named_parameters() if name.endswith("weight") and value.dim() > 1]
    before = [value.detach().clone() for value in owned]
    assert masks.apply_(wrapped) is wrapped
    assert len(owned) == 2
    for value, old, mask in zip(owned, before, masks.values(), strict=True):
        assert torch.equal(value, old * mask) and bool((value != old).any())
    made = dp.prune(wrapped, sparsity=0.5)
    assert made.match(bare).pairs == dict(zip(made, ["0.weight", "4.weight"], strict=True)) and not made.match(bare).unmasked


def test_channels_are_taken_out_behind_wrappers_too() -> None:
    model, inputs = _net().eval(), torch.randn(2, 1, 4, 4)
    masks = dp.prune(model, sparsity=0.5, granularity="filter", batches=[(inputs, torch.zeros(2, dtype=torch.long))])
    small = dp.shrink(nn.DataParallel(model), masks, inputs[:1])
    assert small.module[0].weight.shape == (1, 1, 3, 3)
    torch.testing.assert_close(small(inputs), masks.apply_(model)(inputs))


def test_a_network_may_have_modules_that_are_called_like_wrappers() -> None:
    """Names that are equal without such parts are told apart by the number of parts; where that cannot be done, none is guessed."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.module = nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 2)})

    masks = Masks({"a.weight": torch.eye(2).bool(), "module.a.weight": ~torch.eye(2).bool()})
    assert masks.match(Own()).pairs == {"a.weight": "a.weight", "module.a.weight": "module.a.weight"}
    assert masks.match(nn.DataParallel(Own())).pairs == {"a.weight": "module.a.weight", "module.a.weight": "module.module.a.weight"}
    one = Masks({"_orig_mod.a.weight": torch.eye(2).bool()})
    with pytest.raises(UserError, match="At least one of 1 masks must have its weight in Own, none has."):
        one.apply_(Own())
    assert paired([], ["a"]) == {} and unwrapped("module._orig_mod.modules.module_a.weight") == "modules.module_a.weight"


def test_a_tied_weight_is_masked_under_any_of_its_names() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    masks = Masks({"2.weight": torch.eye(4).bool()})
    assert masks.match(model).unmasked == ()
    masks.apply_(model)
    assert torch.equal(model[0].weight != 0, torch.eye(4).bool())


def _whole(*names: str) -> Masks:
    shapes = {"0.weight": (2, 1, 3, 3), "4.weight": (3, 32)}
    return Masks({name: torch.zeros(shapes.get(name, (3, 32)), dtype=torch.bool) for name in names})


def test_apply_says_what_does_not_match_and_changes_nothing() -> None:
    model = _net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="no weight 'head.weight' for its mask. Nearest: '4.weight'. Prunable weights without a mask: '0.w"):
        _whole("4.weight", "head.weight").apply_(model)
    with pytest.raises(UserError, match=r"Mask '4.weight' must be shaped like its weight \(3, 32\), got \(2,\)"):
        Masks({"0.weight": _whole("0.weight")["0.weight"], "4.weight": torch.ones(2, dtype=torch.bool)}).apply_(model)
    with pytest.raises(UserError, match="1 more masks have no weight of their name and shape: 'b'"):
        _whole("0.weight", "a", "b").apply_(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_matches_can_be_applied_alone_and_the_rest_is_said() -> None:
    model = _net()
    first = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="1 of 2 masks are applied. The model has no weight 'x.weight' for its mask. Nearest: '4.weight'"):
        _whole("4.weight", "x.weight").apply_(model, strict=False)
    assert not model[4].weight.any() and torch.equal(model[0].weight, first)
    match = _whole("4.weight", "x.weight").match(model)
    assert match.pairs == {"4.weight": "4.weight"} and list(match.unfit) == ["x.weight"] and match.unmasked == ("0.weight",)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("names", [(), ("features.0.weight",), ("classifier.weight", "stem.weight")])
def test_no_match_at_all_is_always_an_error(names: tuple[str, ...], strict: bool) -> None:
    """A mask that silently prunes nothing is the worst of outcomes."""
    with pytest.raises(UserError, match=f"At least one of {len(names)} masks must have its weight in Sequential, none has"):
        _whole(*names).apply_(_net(), strict=strict)


def test_flops_by_hand() -> None:
    model = _net()
    dense = layer_flops(model, torch.zeros(1, 1, 4, 4), prunable(model))
    assert dense == {"0.weight": 2 * 16 * 2 * 9, "4.weight": 2 * 32 * 3}
    masks = Masks({"0.weight": torch.zeros(2, 1, 3, 3, dtype=torch.bool), "4.weight": torch.ones(3, 32, dtype=torch.bool)})
    assert flops(dense, masks) == 192
    alone = nn.Linear(3, 2)
    assert layer_flops(alone, torch.zeros(1, 3), prunable(alone)) == {"weight": 12}


def test_layer_collapse_is_about_paths_not_about_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    first = torch.tensor([[True, True], [False, False]])
    broken = Masks({"0.weight": first, "2.weight": torch.tensor([[False, True]])})
    whole = Masks({"0.weight": first, "2.weight": torch.tensor([[True, False]])})
    assert collapsed(model, broken, torch.ones(1, 2)) == ["0.weight", "2.weight"]
    assert collapsed(model, whole, torch.ones(1, 2)) == []


def test_scales_and_root_mean_square_norms_pass_the_signal_on() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner, self.head = nn.RMSNorm(3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.full((3,), 1e-6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x + self.scale * self.inner(self.norm(x)))

    model = Scaled()
    assert collapsed(model, Masks.ones(prunable(model)), torch.ones(1, 3)) == []


def test_what_is_not_finite_is_removed_too() -> None:
    """A product with zero would keep it."""
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[float("inf"), float("nan"), 2.0]])
    Masks({"weight": torch.tensor([[False, False, True]])}).apply_(model)
    assert model.weight.tolist() == [[0, 0, 2]]


def test_a_state_is_no_network_and_lazy_weights_have_no_shape() -> None:
    masks = Masks({"weight": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(UserError, match=r"Masks are for a torch.nn.Module, got OrderedDict. For a state: model.load_state_dict"):
        masks.apply_(nn.Linear(3, 2).state_dict())  # type: ignore[arg-type]
    lazy = nn.LazyLinear(2)
    for call in (lambda: masks.apply_(lazy), lambda: dp.prune(lazy, sparsity=0.5)):
        with pytest.raises(UserError, match=r"'weight' has none before the first pass. Run the network once: model\(inputs\)."):
            call()
    lazy(torch.zeros(1, 3))
    assert dp.prune(lazy, sparsity=0.5).kept == 3


@pytest.mark.parametrize("name", ["nodir/m.safetensors", "nodir/m.parquet", "m.pt", "m"])
def test_masks_are_written_to_an_existing_folder_under_an_ending_that_says_what_they_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nodir is none. Make it first" if "/" in name else r"m(.pt)?. Write m.safetensors."):
        _masks(_net()).save(tmp_path / name)
    assert not list(tmp_path.iterdir())
