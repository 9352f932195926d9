"""Sparse selection: masks learned over frozen weights. Weights, biases and batch norm's scales are not trained, before or after.

The scores have an optimizer of their own, SGD with these paradigms' `rate`: of the recipe's training they take length, batch size and
decay, but neither its optimizer nor its regularizer, which are about weights that move.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from distprune.core import registry
from distprune.core.hooks.selection import Biprop, EdgePopup, Selection, Supermask
from distprune.core.lengths import Length
from distprune.core.options import Choices, LogRange
from distprune.core.plan import Plan
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.stages import Train
from distprune.errors import UserError

FACTS: dict[str, Any] = {
    "uses": ("sparsity", "allocator"),
    "branch": "sparse selection",
    "mask": "learned scores",
    "values": "init",
    "after": "nothing",
    "granularities": ("weight",),
    "trains": False,
}


def _select(recipe: Recipe, hook: Selection, *, rate: float, weight_decay: float) -> Plan:
    if not rate > 0:
        raise UserError(f"paradigm.rate must be above 0, got {rate}. Leave it out for the paper's.")
    optimizer = registry.optimizer.choose("sgd", lr=rate, momentum=0.9, weight_decay=weight_decay, nesterov=False)
    config = replace(recipe.train, optimizer=optimizer)
    return Plan([Train(config=config, until=recipe.train.length, hooks=(hook,), train="scores")])


@paradigm("supermask", paper="Zhou et al. 2019, arXiv:1905.01067, section 5", scores=True, **FACTS)
def supermask(
    recipe: Recipe,
    *,
    rate: Annotated[float, LogRange(10.0, 1000.0)] = 100.0,
    weights: Annotated[Literal["init", "signed"], Choices()] = "signed",
    rescale: bool = True,
    start: Annotated[Literal["half", "target"], Choices()] = "half",
    end: Annotated[Length, Choices("50%", "75%")] = "75%",
) -> Plan:
    """Learn the probability of every weight to be kept, drawing a mask at each step; the likeliest of the budget are the result.

    Formula:
        P(m = 1) = sigmoid(s),   w_eff = m * w n / sum m      (without rescale m * w; w is frozen)
        ds = dL/dm * sigmoid'(s)                             straight-through
        m* = top(s)

    The paper has no budget. `start: half` is its start, where every weight is kept with probability 1/2; from there the expected density
    follows the cubic schedule and is the budget's from `end` on. `start: target` holds it there from the first step.
    """
    length = recipe.train.length
    if not 0 < end <= length:
        raise UserError(f"paradigm.end must be in the training of {length} steps, got step {end}. Write '75%'.")
    hook = Supermask(
        sparsity=recipe.sparsity,
        allocator=recipe.allocator,
        signed=weights == "signed",
        rescale=rescale,
        first=start,
        end_at=end if start == "half" else 0,  # what does not matter is no part of the key
    )
    return _select(recipe, hook, rate=rate, weight_decay=0.0)


@paradigm("edge_popup", paper="Ramanujan et al. 2020, arXiv:1911.13299", **FACTS)
def edge_popup(
    recipe: Recipe,
    *,
    rate: Annotated[float, LogRange(0.03, 1.0)] = 0.1,
    weights: Annotated[Literal["init", "kaiming", "signed"], Choices()] = "signed",
    scaled: Annotated[bool, Choices()] = True,
    weight_decay: float = 1e-4,
) -> Plan:
    """Learn a score for every weight and keep, in each layer, those of the largest |score|; the paper's allocator is uniform.

    Formula:
        m = top(|s|) in each layer,   w_eff = m * w      (w is frozen)
        ds = dL/dw_eff * w * sign(s)                     straight-through

    `scaled` divides the frozen weights by the root of their layer's density, the paper's scaled Kaiming. `weight_decay` is on the scores.
    """
    hook = EdgePopup(sparsity=recipe.sparsity, allocator=recipe.allocator, weights=weights, scaled=scaled)
    return _select(recipe, hook, rate=rate, weight_decay=weight_decay)


@paradigm("biprop", paper="Diffenderfer & Kailkhura 2021, arXiv:2103.09377", **FACTS)
def biprop(
    recipe: Recipe,
    *,
    rate: Annotated[float, LogRange(0.03, 1.0)] = 0.1,
    weights: Annotated[Literal["init", "kaiming"], Choices()] = "kaiming",
    scaled: Annotated[bool, Choices()] = True,
    weight_decay: float = 1e-4,
) -> Plan:
    """Edge-popup with binary weights: in each layer one gain, the mean |w| of what is kept, and the signs of the init.

    Formula:
        w_eff = alpha sign(w) * m,   alpha = sum(|w| m) / sum m  in each layer      (w is frozen)
        ds = dL/dw_eff * w * sign(s)     straight-through
    """
    hook = Biprop(sparsity=recipe.sparsity, allocator=recipe.allocator, weights=weights, scaled=scaled)
    return _select(recipe, hook, rate=rate, weight_decay=weight_decay)
