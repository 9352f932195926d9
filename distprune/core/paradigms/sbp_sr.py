"""Robust pruning at initialization: sensitivity-based pruning of a stable ResNet on the edge of chaos."""

from typing import Annotated, Literal

from distprune.core import registry
from distprune.core.edits.branches import Branches, Fold, ScaleBranches
from distprune.core.initialization import Activation, sigma_w
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import SetWeights, Snapshot
from distprune.errors import UserError


@paradigm(
    "sbp_sr",
    paper="Hayou et al. 2021, arXiv:2002.08797",
    uses=("sparsity", "allocator", "granularity"),
    branch="sparse training, static, pre-selected",
    mask="init",
    values="init",
    after="training",
    scores=True,
)
def sbp_sr(
    recipe: Recipe,
    *,
    scores: Annotated[Literal["snip", "grasp"], Choices()] = "snip",
    batches: Annotated[int, Range(1, 4)] = 1,
    branches: Branches = "auto",
    init: Annotated[Literal["edge_of_chaos", "model"], Choices()] = "edge_of_chaos",
    activation: Activation = "relu",
    sigma_b: float = 0.0,
    rescale: Annotated[Literal["none", "weights", "signals"], Choices()] = "none",
) -> Plan:
    """Scale the L residual branches by L^(-1/2), draw weights on the edge of chaos, prune by SNIP's or GraSP's scores, train so.

    Formula:
        y = x + L^(-1/2) F(x),   w ~ N(0, sigma_w^2 / fan_in) with sigma_w^2 E[phi'(sqrt(q) z)^2] = 1  (ReLU: 2)
        m = top(|w dL/dw|)
        rescale: weights    w <- w sqrt(sigma_w^2 / (fan_in mean((m w)^2)))  in each layer

    The scale is folded into weights at the end. `branches` are found by torch.fx, or named by shell patterns over their last modules.
    `rescale` is for networks without batch norm, where `activation` and, for tanh, `sigma_b` say which edge: after pruning, `weights` is
    the paper's factor a layer, from weights alone; `signals` is measured on a batch, and holds where the paper's lets a ReLU network
    explode. The paper's allocator is global.
    """
    if batches < 1:
        raise UserError(f"paradigm.batches must be at least 1, got {batches}. Write 1.")
    sigma = sigma_w(activation, sigma_b)
    stages: list[Stage] = [ScaleBranches(branches=branches)]
    if init == "edge_of_chaos":
        stages.append(SetWeights(policy="draw", sigma_w=sigma, sigma_b=sigma_b))
    if rescale == "signals":
        stages.append(Snapshot(tag="unpruned"))
    stages.append(recipe.prune(recipe.sparsity, criterion=registry.criterion.choose(scores, batches=batches)))
    if rescale == "weights":
        stages.append(SetWeights(policy="rescale", sigma_w=sigma))
    if rescale == "signals":
        stages.append(SetWeights(policy="rescale", tag="unpruned", batches=1, batch_size=recipe.train.batch_size))
    stages.append(recipe.training(until=recipe.train.length))
    return Plan([*stages, *([] if branches == "none" else [Fold()])])
