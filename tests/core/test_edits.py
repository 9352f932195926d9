"""Edits: changes of structure are recorded, replayed on load, and leave nothing of what vanished."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import finish, network, ready, same, tensors

from distprune.core.edits import structure
from distprune.core.executor import execute
from distprune.core.masks import Masks
from distprune.core.registry import WEIGHT
from distprune.core.state import State
from distprune.errors import UserError

# The toy network's convolution and first linear layer become one linear layer of the same outputs.
FUSED: structure.Edit = {
    "kind": "replace",
    "modules": {"0": [["Flatten"], ["Linear", 64, 32]], **{str(i): [["Identity"]] for i in range(1, 7)}},
}
SAME: structure.Edit = {"kind": "replace", "modules": {"6": [["Linear", 96, 32]], "7": [["Identity"]]}}  # shaped like what it replaces


def _state(**patterns: Any) -> State:
    return State.new(lambda: network((1, 8, 8), 10), seed=0, device=torch.device("cpu"), **patterns)


def _example() -> torch.Tensor:
    return torch.zeros(1, 1, 8, 8)


def test_what_vanishes_takes_what_belonged_to_it_along() -> None:
    state = _state()
    generator = torch.Generator().manual_seed(0)
    state.set_masks(Masks({name: torch.rand(weight.shape, generator=generator) < 0.5 for name, weight in state.weights.items()}))
    state.memory, state.slots = {"6.weight": {"momentum": torch.ones(32, 96)}}, {"0.Hook": {"z": torch.ones(3)}}
    state.snapshots = {"early": state.values()}
    state.penalties = {"prior": {"0.weight": 0.1, "6.weight": 0.2, "8.weight": 0.3}}
    state.bill("training", 10, _example)
    kept, flops, last = state.masks.kept, state.ledger.flops, state.masks["8.weight"]
    state.edit(FUSED)
    assert list(state.weights) == ["0.1.weight", "8.weight"] == list(state.masks)
    assert state.weights["0.1.weight"] is state.model[0][1].weight and state.masks["0.1.weight"].all()
    assert torch.equal(state.masks["8.weight"], last), "other layers keep their masks"
    assert not state.memory and not state.slots and not state.snapshots
    assert state.penalties == {"prior": {"8.weight": 0.3}}
    # 54 + 3072 + 320 weights when it was built; 2048 and what the last layer keeps now.
    assert state.total == 3446 != state.masks.total and state.sparsity == 1 - (2048 + int(last.sum())) / 3446 != 1 - kept / 3446
    state.bill("training", 10, _example)
    assert state.ledger.flops - flops == 3 * 10 * 2 * (2048 + 320), "the smaller network is billed"
    assert state.units(WEIGHT, _example).total == 2368


def test_a_larger_network_has_a_negative_sparsity() -> None:
    state = _state()
    state.edit({"kind": "replace", "modules": {"6": [["Linear", 96, 100]], "8": [["Linear", 100, 10]]}})
    assert state.sparsity == 1 - (54 + 9600 + 1000) / 3446 < 0


def test_new_weights_are_kept_though_the_old_ones_of_this_name_and_shape_were_not() -> None:
    state = _state()
    state.set_masks(Masks({name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in state.weights.items()}))
    state.penalties = {"prior": {"6.weight": 0.2}}
    state.edit(SAME)
    assert state.masks["6.weight"].all() and not state.masks["8.weight"].any() and state.penalties == {"prior": {}}
    assert not state.is_dense and state.weights["6.weight"].any()


def test_what_is_not_prunable_stays_so() -> None:
    state = _state(exclude=("8.*",))
    state.edit(FUSED)
    assert list(state.weights) == ["0.1.weight"] and state.total == 54 + 3072


def test_edits_are_replayed_in_order_and_bit_for_bit(tmp_path: Path) -> None:
    state = _state()
    state.edit(FUSED)
    state.edit({"kind": "replace", "modules": {"0.1": [["Linear", 64, 10, False]], "7": [["Identity"]], "8": [["Identity"]]}, "why": "x"})
    state.set_masks(Masks({"0.1.weight": torch.rand(10, 64) < 0.5}))
    state.penalties, state.snapshots = {"prior": {"0.1.weight": 0.5}}, {"after": state.values()}
    state.save(tmp_path / "state", note=1)
    again, before = _state(), torch.get_rng_state()
    assert again.load(tmp_path / "state") == {"note": 1}
    assert torch.equal(torch.get_rng_state(), before), "layers are drawn to be overwritten, from nobody's generator"
    assert again.edits == state.edits and json.loads(json.dumps(again.edits)) == again.edits and str(again.model) == str(state.model)
    for name, value in state.values().items():
        assert torch.equal(again.values()[name], value)
    assert again.masks.equal(state.masks) and (again.total, again.sparsity) == (state.total, state.sparsity)
    assert again.penalties == state.penalties and again.weights["0.1.weight"] is again.model[0][1].weight
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again.model.eval()(x), state.model.eval()(x))


def test_a_file_that_does_not_fit_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    state = _state()
    state.edit(FUSED)
    state.save(tmp_path / "state")
    with pytest.raises(UserError, match="it was edited, and states are loaded into networks as they are built"):
        state.load(tmp_path / "state")
    other = State.new(lambda: network((1, 8, 8), 10, hidden=16), seed=0, device=torch.device("cpu"))
    values, text = other.values(), str(other.model)
    with pytest.raises(UserError, match="not a readable state of this network: it holds another network"):
        other.load(tmp_path / "state")
    assert str(other.model) == text and not other.edits and all(torch.equal(value, values[name]) for name, value in other.values().items())
    plain = _state()
    plain.save(tmp_path / "plain")
    fresh = _state()
    fresh.load(tmp_path / "plain")
    assert not fresh.edits and str(fresh.model) == str(plain.model)


def test_source_makes_the_same_structure_with_torch_alone() -> None:
    convolution: structure.Edit = {
        "kind": "replace",
        "modules": {"0": [["Conv2d", 1, 6, [3, 5], [1, 1], [1, 2], [1, 1], 1, False]], "1": [["Identity"]]},
    }
    edited, rebuilt = network((1, 8, 8), 10), network((1, 8, 8), 10)
    for edit in (convolution, FUSED):
        structure.apply(edited.eval(), edit)
        for line in structure.source(edit):
            exec(line, {"torch": torch, "network": rebuilt})
    assert str(rebuilt) == str(edited) and not edited[0].training
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == {n: v.shape for n, v in edited.state_dict().items()}
    assert structure.created(convolution) == {"0.weight"} and structure.created(FUSED) == {"0.1.weight"}


def test_new_layers_have_the_type_of_the_others() -> None:
    model = network((1, 8, 8), 10).double()
    structure.apply(model, FUSED)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_scale_is_not_folded_into_a_layer_that_took_the_place_of_the_scaled_one() -> None:
    state = _state()
    x = torch.randn(4, 1, 8, 8)
    plain = copy.deepcopy(state.model).eval()
    state.edit({"kind": "scale", "modules": ["6", "8"], "factor": 0.5})
    assert torch.allclose(state.model.eval()(x), 0.5 * plain[8](0.5 * plain[:8](x)), atol=1e-6)
    state.edit(FUSED)
    fused, last = state.model[0][1].weight.clone(), state.model[8].weight.clone()
    outputs = state.model.eval()(x)
    state.fold()
    assert torch.equal(state.model[0][1].weight, fused) and torch.equal(state.model[8].weight, 0.5 * last)
    assert torch.allclose(state.model(x), outputs, atol=1e-6) and [edit["kind"] for edit in state.edits] == ["replace"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_fused_run_goes_on_from_every_report(optimizer: str, tmp_path: Path) -> None:
    def start() -> Any:
        changes: dict[str, Any] = {"train": {"optimizer": optimizer, "length": "2ep"}, "report_every": "7it", "regularizer": "growing_l2"}
        return ready({"name": "fusion", "layers": 2, "batches": 2, "tune": "100%"}, 0.0, **changes)

    whole = start()
    reports = []
    for report in execute(whole.plan, whole.state, whole.env):
        reports.append(report)
        whole.state.save(tmp_path / str(report.index))
    assert len({report.sparsity for report in reports}) == 3 and len(whole.state.edits) == 2
    for index in range(len(reports)):
        again = start()
        again.state.load(tmp_path / str(index))
        assert finish(again) == reports[index + 1 :]
        assert same(tensors(again), tensors(whole)) and again.state.ledger == whole.state.ledger and again.state.edits == whole.state.edits
