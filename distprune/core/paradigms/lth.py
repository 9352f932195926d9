"""Lottery tickets."""

from typing import Annotated, Literal

from distprune.core.lengths import Length
from distprune.core.options import Choices, Range
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.core.schedules import rounds
from distprune.core.stages import SetWeights, Snapshot
from distprune.errors import UserError


@paradigm(
    "lth",
    paper="Frankle & Carbin 2019, arXiv:1803.03635; late rewinding arXiv:1903.01611; learning-rate rewinding arXiv:2003.02389; "
    "signs: Zhou et al. 2019, arXiv:1905.01067",
    branch="sparse training, static, post-selected",
    mask="trained",
    values="rewound",
    after="training",
)
def lth(
    recipe: Recipe,
    *,
    share: Annotated[float, Range(0.2, 0.8)] = 0.2,
    rewind_to: Annotated[Length, Choices("0%", "5%", "10%")] = "0%",
    weights: Annotated[Literal["rewind", "inherit", "sign", "reinit"], Choices()] = "rewind",
) -> Plan:
    """Train, remove a share of what is left, rewind, repeat until the target; the last round is clipped to it.

    Formula:
        density after round i = max((1 - share)^i, 1 - sparsity)
        m_i = m_(i-1) * top(score(w_i(K)))
        w_(i+1) = train(m_i * w(rewind_to), rewind_to..K)

    `weights: inherit` rewinds the learning rate only; `sign` goes back to the signs alone, with one size for all weights of a layer;
    `reinit` draws them anew and trains from the start: the control that a ticket has to beat.
    """
    length = recipe.train.length
    if rewind_to >= length:
        raise UserError(f"paradigm.rewind_to must be before the end of training at step {length}, got step {rewind_to}. Write '5%'.")
    policies: dict[str, list[Stage]] = {
        "rewind": [SetWeights(policy="rewind", tag="rewind")],
        "inherit": [],
        "sign": [SetWeights(policy="sign", tag="rewind")],
        "reinit": [SetWeights(policy="reinit")],
    }
    since = 0 if weights == "reinit" else rewind_to
    stages = [recipe.training(until=rewind_to), Snapshot(tag="rewind"), recipe.training(until=length)]
    for sparsity in rounds(recipe.sparsity, share=share):
        stages += [recipe.prune(sparsity), *policies[weights], recipe.training(since=since, until=length)]
    return Plan(stages)
