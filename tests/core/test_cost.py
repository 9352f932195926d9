"""The bill in samples and FLOPs, and plans of equal bill."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toys import BASE, PARADIGMS, finish, ready, recipe

from distprune.core.executor import execute
from distprune.core.masks import prunable
from distprune.core.metrics import flops, layer_flops
from distprune.core.stages import Train
from distprune.errors import UserError


def test_flops_are_those_of_torchs_counter_and_of_attention_too() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = self.conv(x).flatten(2).transpose(1, 2)
            return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))

    model, example = Attends(), torch.ones(1, 1, 6, 6)
    found = layer_flops(model, example, prunable(model))
    # 16 tokens of 8 channels: 2 * 16 * (9 * 8), 2 * 16 * 8 * 24, 2 * 16 * 8 * 8 and 2 * 8 * 3.
    assert found == {
        "conv.weight": 2304,
        "attention.in_proj_weight": 6144,
        "attention.out_proj.weight": 2048,
        "head.weight": 48,
    }
    counter = FlopCounterMode(display=False)
    model.train()
    with counter:
        model(example)
    assert sum(found.values()) + 2 * 2 * 2 * 16 * 16 * 4 == counter.get_total_flops(), "but for products without a weight"


def test_flops_of_the_bill_by_hand() -> None:
    run = ready("at_init", criterion="snip")
    reports = finish(run)
    dense, sparse = sum(run.env.flops.values()), flops(run.env.flops, run.state.masks)
    ledger = run.state.ledger
    assert (ledger.dense, ledger.sparse, ledger.scoring) == (0, 4 * 320, 32)
    assert ledger.flops == 3 * dense * ledger.cost
    assert ledger.sparse_flops == pytest.approx(3 * (dense * ledger.scoring + sparse * ledger.sparse))
    assert (reports[-1].flops, reports[-1].sparse_flops) == (ledger.flops, ledger.sparse_flops)


@pytest.mark.parametrize("paradigm", PARADIGMS)
def test_equal_cost_is_equal_to_the_sample(paradigm: str) -> None:
    run = ready(paradigm, equal_cost=True, train={"length": "30ep"})
    assert run.plan.cost == 30 * 320
    reports = finish(run)
    assert reports[-1].cost == run.state.ledger.cost == 30 * 320, "as run, also where a stage ended early"


def test_the_schedule_ends_where_the_training_does_and_the_rest_goes_to_the_last_one() -> None:
    run = ready({"name": "lth", "share": 0.5}, equal_cost=True, train={"length": "30ep"})
    trains = [stage for stage in run.plan.stages if isinstance(stage, Train)]
    assert len(trains) == 5 and {stage.config.length for stage in trains} == {60} and [stage.until for stage in trains] == [60] * 5
    run = ready({"name": "lth", "share": 0.5}, equal_cost=True, train={"length": "301it"})
    trains = [stage for stage in run.plan.stages if isinstance(stage, Train)]
    assert [stage.until for stage in trains] == [60, 60, 60, 60, 61] and run.plan.cost == 301 * 32


def test_what_does_not_fit_says_so() -> None:
    value = {**BASE, "paradigm": {"name": "lth", "share": 0.1}, "sparsity": 0.9, "allocator": "erk", "equal_cost": True}
    with pytest.raises(UserError, match="equal_cost gives every trial 20 steps in all, and paradigm 'lth' at sparsity 0.9 does not fit"):
        type(recipe()).read({**value, "train": {**BASE["train"], "length": "2ep"}}).plan(10)


def test_what_an_early_end_leaves_is_trained_on_a_schedule_of_its_own_length() -> None:
    run = ready({"name": "early_bird", "every": "2it", "near": 1.0, "until": "50%"}, equal_cost=True, train={"length": "10ep"})
    last = [stage for stage in run.plan.stages if isinstance(stage, Train)][-1]
    horizons = {last.horizon(run.state) for report in execute(run.plan, run.state, run.env) if run.plan.stages[-1] is last and report.lap}
    assert horizons == {run.state.clock} and run.state.clock > last.config.length, "the rate ends where the training does"


def test_equal_cost_needs_a_training_and_says_what_else_is_wrong_as_it_is() -> None:
    with pytest.raises(UserError, match=r"paradigm.begin < paradigm.end <= train.length must hold"):
        ready({"name": "gradual", "begin": "50%", "end": "10%"}, equal_cost=True)


def test_the_bill_is_known_at_every_report() -> None:
    run = ready("gradual", criterion="snip", report_every="7it")
    bills = [(report.cost, report.flops) for report in execute(run.plan, run.state, run.env)]
    assert bills == sorted(bills) and bills[-1][0] == run.plan.cost
