"""The contract of every criterion, and its formula by hand."""

import copy

import pytest
import torch
from torch import nn
from toys import ready

from distprune.core import registry
from distprune.core.masks import Masks
from distprune.core.prune import prune
from distprune.core.registry import Choice
from distprune.core.scoring import Probe, choose_masks, scoring_samples
from distprune.errors import UserError

CRITERIA = [registry.criterion.choose(name) for name in registry.criterion.names()]
each = pytest.mark.parametrize("criterion", CRITERIA, ids=lambda choice: choice.name)


def _masks(criterion: Choice, *, sparsity: float = 0.8, start: Masks | None = None) -> tuple[Masks, nn.Module]:
    run = ready()
    masks = choose_masks(
        run.state.model,
        run.env.task,
        start or run.state.masks,
        sparsity=sparsity,
        criterion=criterion,
        allocator=registry.allocator.choose("erk"),
        steps=criterion.entry.facts["steps"],
    )
    return masks, run.state.model


@each
def test_scoring_changes_nothing(criterion: Choice) -> None:
    run = ready()
    model = run.state.model
    model.train()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before, grads = copy.deepcopy(model.state_dict()), [p.grad if p.grad is None else p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    choose_masks(model, run.env.task, run.state.masks, sparsity=0.8, criterion=criterion, allocator=registry.allocator.choose("erk"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g)) for p, g in zip(model.parameters(), grads, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), generator), "dropout in the scratch copy drew from the global generator"
    assert all(module.training for module in model.modules())


@each
def test_same_seed_same_masks_exact_count_and_nested(criterion: Choice) -> None:
    first, _ = _masks(criterion)
    again, _ = _masks(criterion)
    assert first.equal(again) and first.kept == round(0.2 * first.total)
    deeper, _ = _masks(criterion, sparsity=0.95, start=first)
    assert deeper.nested_in(first)


@each
def test_bill_is_what_is_drawn(criterion: Choice) -> None:
    run = ready()
    drawn = []
    task = run.env.task
    original = task.draw
    task.draw = lambda generator, size: drawn.append(size) or original(generator, size)  # type: ignore[method-assign,func-returns-value]
    choose_masks(run.state.model, task, run.state.masks, sparsity=0.5, criterion=criterion, allocator=registry.allocator.choose("erk"))
    passes = criterion.entry.facts["passes"]
    assert scoring_samples(criterion, 1, 128) == passes * sum(drawn)


def _linear() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -4.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 2.0]]))
    return model, [(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0]]))]


def _probe(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Probe:
    from distprune.core.masks import prunable
    from distprune.core.tasks.given import GivenBatches

    task = GivenBatches(batches, lambda outputs, targets: (outputs - targets).sum())
    return Probe(model, task, Masks.ones(prunable(model)), seed=0, draw=(), batch_size=1)


def test_magnitude_by_hand() -> None:
    scores = registry.criterion.choose("magnitude")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 2], [3, 4]]


def test_snip_by_hand() -> None:
    # y = 1 * (w00 + w01) + 2 * (w10 + w11), so dy/dw = [[1, 1], [2, 2]] and the hidden units are 3 and -1.
    scores = registry.criterion.choose("snip")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 2], [6, 8]]
    assert scores["1.weight"].tolist() == [[3, 2]]


def test_synflow_by_hand() -> None:
    # Absolute weights: hidden 3 and 7, output 3 + 14 = 17; each layer's flow sums to it.
    scores = registry.criterion.choose("synflow")(_probe(*_linear()))
    assert scores["0.weight"].tolist() == [[1, 2], [6, 8]]
    assert scores["1.weight"].tolist() == [[3, 14]]


def test_grasp_is_w_times_hessian_times_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double()
    batch = (torch.randn(4, 3, dtype=torch.double), torch.randint(2, (4,)))
    from distprune.core.masks import prunable
    from distprune.core.tasks.given import GivenBatches

    task = GivenBatches([batch], nn.functional.cross_entropy)
    probe = Probe(model, task, Masks.ones(prunable(model)), seed=0, draw=(), batch_size=4)
    got = registry.criterion.choose("grasp")(probe)["weight"]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(batch[0] @ flat.view(2, 3).T / 200, batch[1])

    flat = model.weight.detach().flatten()
    gradient = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    torch.testing.assert_close(got.flatten(), flat * (hessian @ gradient))


def test_prune_leaves_the_model_and_needs_batches_only_where_data_is_looked_at() -> None:
    model, batches = _linear()
    masks = prune(model, criterion="magnitude", sparsity=0.5)
    assert masks.kept == 3 and model[0].weight[0, 0] == 1
    masks.apply_(model)
    assert model[0].weight.flatten().count_nonzero() + model[1].weight.count_nonzero() == 3
    with pytest.raises(UserError, match=r"runs the network: pass batches="):
        prune(model, criterion="snip", sparsity=0.5)
    assert prune(model, criterion={"name": "snip", "batches": 1}, sparsity=0.5, batches=batches, loss=lambda o, t: (o - t).sum()).kept == 3
    with pytest.raises(UserError, match="Unknown criterion 'magnitud'. Did you mean 'magnitude'?"):
        prune(model, criterion="magnitud", sparsity=0.5)


def test_a_criterion_that_returns_the_wrong_shape_is_named() -> None:
    run = ready()
    wrong = Choice("criterion", "import:wrong_criterion:scores")
    import sys
    import types

    module = types.ModuleType("wrong_criterion")
    module.scores = lambda probe: {name: value.flatten() for name, value in probe.values.items()}
    sys.modules["wrong_criterion"] = module
    with pytest.raises(UserError, match=r"must return one score a weight: '0.weight' has shape \(6, 1, 3, 3\), its scores \(54,\)"):
        choose_masks(
            run.state.model, run.env.task, run.state.masks, sparsity=0.5, criterion=wrong, allocator=registry.allocator.choose("erk")
        )
