"""Layer fusion: a deeper network is trained first, and gives a shallower one its start."""

from typing import Annotated, Literal

from distprune.core.edits.fuse import Fuse
from distprune.core.lengths import Length
from distprune.core.options import Choices
from distprune.core.paradigms.after_training import tuning
from distprune.core.plan import Plan, Stage
from distprune.core.recipe import Recipe
from distprune.core.registry import paradigm
from distprune.errors import UserError


@paradigm(
    "fusion",
    paper="Ghods et al. 2020, arXiv:2001.10509",
    uses=(),
    branch="after training",
    mask="none",
    values="fused",
    after="fine-tuning",
)
def fusion(
    recipe: Recipe,
    *,
    layers: Annotated[int, Choices(1, 2)] = 1,
    deep: Annotated[Length, Choices("50%", "100%")] = "100%",
    tune: Annotated[Length, Choices("25%", "50%", "100%")] = "50%",
    pick: str = "smallest",
    form: Annotated[Literal["data", "per_channel", "gaussian", "random"], Choices("data")] = "data",
    batches: int = 16,
    ridge: float = 1e-4,
    kernel: int = 0,
) -> Plan:
    """Train for `deep`, then `layers` times replace two layers by their best affine map and retrain for `tune`: depth pruning.

    Formula:
        y = W2 a1 + b2,  a0 what enters the first layer, a1 what enters the second
        W = W2 Cov(a1, a0) (Cov(a0) + ridge v I)^-1,   v the mean variance of a0
        b = W2 E[a1] + b2 - W E[a0]

    `pick` is the pair that loses least, the `last` one, or one by name as in 'conv3+fc'; `form` is how its map is made (`Fuse`). Retraining
    takes the last part of the learning-rate schedule that is as long. The paper retrains for as long as it trained: `tune: 100%`.
    """
    length = recipe.train.length
    for name, least in (("layers", layers), ("batches", batches)):
        if least < 1:
            raise UserError(f"paradigm.{name} must be at least 1, got {least}. Leave it out, or take paradigm 'dense'.")
    if ridge <= 0:
        raise UserError(f"paradigm.ridge must be above 0, got {ridge}: inputs that never vary have no inverse. Write 1e-4.")
    if kernel < 0:
        raise UserError(f"paradigm.kernel must be at least 0, got {kernel}. Write 3 for a narrow kernel, 0 for all that two layers see.")
    if not 0 < deep <= length:
        raise UserError(f"paradigm.deep must be in the training of {length} steps, got step {deep}. Write '100%'.")
    fuse = Fuse(batches=batches, batch_size=recipe.train.batch_size, pick=pick, form=form, ridge=ridge, kernel=kernel)
    stages: list[Stage] = [recipe.training(until=deep)]
    for _ in range(layers):
        stages += [fuse, tuning(recipe, tune)]
    return Plan(stages)
