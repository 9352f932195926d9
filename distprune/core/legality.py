"""Which choices make sense together (section 1.4 of the framework: Wang et al. 2022, arXiv:2103.06460).

Rules over names are checked when a recipe is read, rules over stages when its plan is made; so a user's own paradigm is held to them too.
Each rule blames the later of the axes that it is about, in the order paradigm, granularity, criterion, allocator, regularizer, sparsity: a
search that chooses in this order never has to take a choice back.
"""

from typing import TYPE_CHECKING

from distprune.core.edits.fuse import Fuse
from distprune.core.plan import Plan, Stage
from distprune.core.registry import PARAMS, Choice
from distprune.core.stages import Prune, SetWeights, Train
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.recipe import Recipe


def violations(recipe: "Recipe") -> dict[str, str]:
    """Why a recipe makes no sense: field to blame -> one line; empty if it does."""
    facts = recipe.paradigm.entry.facts
    uses = facts["uses"]
    found = _penalty(recipe) | _measured(recipe.sparsity_of) | ({} if "sparsity" in uses else _prunes_nothing(recipe))
    if "sparsity" not in uses:
        return found
    name = recipe.paradigm.name
    if not recipe.sparsity:
        found["sparsity"] = (
            f"paradigm '{name}' needs a sparsity above 0, got 0. To keep 5 % of the weights write sparsity: 0.95, or use paradigm 'dense'."
        )
    if (legal := facts["granularities"]) and recipe.granularity.name not in legal:
        found["granularity"] = (
            f"paradigm '{name}' works on granularity {' or '.join(legal)}, got '{recipe.granularity.name}'. "
            f"Write granularity: {legal[0]}, or choose another paradigm."
        )
    if recipe.sparsity_of != PARAMS:
        found |= _other_cost(recipe)
    if "criterion" in uses:
        found |= mismatches(recipe.criterion, recipe.allocator, recipe.granularity, recipe.sparsity)
        found |= _at_init(recipe) if facts["mask"] == "init" else {}
    elif "allocator" in uses:
        found |= _allocator(recipe.allocator, recipe.granularity) | _sparsity(recipe.granularity, recipe.sparsity)
        if recipe.allocator.entry.facts["needs_scores"] and not facts["scores"]:
            found["allocator"] = (
                f"allocator '{recipe.allocator.name}' ranks scores, and paradigm '{name}' sets the counts of its layers before it has any. "
                "Choose uniform, erk, power, smart_ratio or per_layer."
            )
    return found


def _measured(sparsity_of: Choice) -> dict[str, str]:
    if not sparsity_of.entry.facts["measured"]:
        return {}
    return {
        "sparsity_of": f"sparsity_of must be a function of the masks, and '{sparsity_of.name}' is measured: masks would depend on noise, "
        "and a resumed run would not have the same bits. Write sparsity_of: flops; in a search it can be minimized or have a budget."
    }


def _other_cost(recipe: "Recipe") -> dict[str, str]:
    """Of a sparsity that is not of the weights."""
    name, granularity = recipe.sparsity_of.name, recipe.granularity
    if recipe.paradigm.entry.facts["moves"]:
        return {"granularity": _moves(recipe.paradigm.name, name)}
    if fixed_sparsity(granularity) is not None:
        return {
            "granularity": f"granularity '{granularity.name}' keeps a pattern of each layer's weights, so its sparsity is of these, got "
            f"sparsity_of '{name}'. Write sparsity_of: params, or granularity: weight."
        }
    return {}


def _moves(paradigm: str, cost: str) -> str:
    return (
        f"paradigm '{paradigm}' moves weights between layers while their number stays, which does not hold a budget of '{cost}'. "
        "Write sparsity_of: params, or take set or rigl."
    )


def mismatches(criterion: Choice, allocator: Choice, granularity: Choice, sparsity: float) -> dict[str, str]:
    """Why these do not go together, whatever the paradigm: field to blame -> one line."""
    found = _allocator(allocator, granularity) | _sparsity(granularity, sparsity)
    for name in {"batches", "probes"} & criterion.entry.options.keys():
        if criterion.option(name) < 1:
            found["criterion"] = f"criterion.{name} must be at least 1, got {criterion.option(name)}. Write {name}: 1."
    if criterion.entry.facts["of_units"] and not granularity.entry.facts["channels"]:
        found["criterion"] = (
            f"criterion '{criterion.name}' scores whole channels, so granularity must be filter or channel, got '{granularity.name}'. "
            "Write granularity: filter, or take taylor or magnitude."
        )
    return found


def check_plan(plan: Plan, name: str, sparsity_of: Choice = PARAMS) -> Plan:
    """Return `plan` if its stages make sense in their order. Raises UserError otherwise."""
    written: set[str] = set()
    trained, regrown, finished, fused = False, False, True, False
    for stage in plan.stages:
        if isinstance(stage, Fuse):
            written, fused = set(), True
        elif fused:
            _check_fused(stage, written, name)
        if stage.writes:
            written.add(stage.writes)
        if stage.reads and stage.reads not in written:
            raise UserError(
                f"paradigm '{name}' rewinds to '{stage.reads}' before there is such a snapshot: weights can only come from a step that was "
                "trained already. Put Snapshot and the training that leads to it first."
            )
        if isinstance(stage, Train):
            trained |= stage.train == "weights"
            regrown |= any(hook.regrows for hook in stage.hooks)
            if sparsity_of != PARAMS and any(hook.moves for hook in stage.hooks):
                raise UserError(_moves(name, sparsity_of.name))
            finished |= stage.train == "weights"
        elif isinstance(stage, Prune):
            if regrown:
                raise UserError(
                    f"paradigm '{name}' prunes after masks were regrown: dynamic masks belong to one training, not to rounds of pruning. "
                    "End the plan with it."
                )
            if not trained and stage.criterion.entry.facts["converged"]:
                raise UserError(converged(stage.criterion.name, name))
        elif isinstance(stage, SetWeights):
            if stage.policy == "compensate" and not trained:
                raise UserError(
                    f"paradigm '{name}' compensates untrained weights: least squares keeps what a trained layer computes. Train first."
                )
            finished &= stage.policy not in ("reinit", "shuffle", "draw")
    if not finished:
        raise UserError(
            f"paradigm '{name}' ends with weights that were drawn or shuffled anew, which destroys what was selected. Train after it."
        )
    _check_untrained(plan, name)
    return plan


def _check_fused(stage: Stage, written: set[str], name: str) -> None:
    """After a fusion there are other layers: older weights do not fit them, and budgets are of the network as it was built."""
    if (stage.reads and stage.reads not in written) or (isinstance(stage, SetWeights) and stage.policy == "reinit"):
        raise UserError(
            f"paradigm '{name}' rewinds across a fusion, to weights of layers that are gone. Take the Snapshot after Fuse, or fuse last."
        )
    if isinstance(stage, Prune) or (isinstance(stage, Train) and any(hasattr(hook, "sparsity") for hook in stage.hooks)):
        raise UserError(
            f"paradigm '{name}' prunes after a fusion, and its budget is of the network as it was built. Prune first, or do not fuse."
        )


def converged(criterion: str, paradigm: str) -> str:
    """The line for a criterion of second order on an untrained network."""
    return (
        f"criterion '{criterion}' expands the loss around a minimum, and paradigm '{paradigm}' prunes an untrained network. "
        "Choose snip, grasp, synflow or taylor, or prune after training."
    )


def _check_untrained(plan: Plan, name: str) -> None:
    """Selection without any training needs scores that know the data, or are learned; random ones are the control."""
    if any(isinstance(stage, Train) for stage in plan.stages):
        return
    for stage in plan.stages:
        if isinstance(stage, Prune) and not stage.criterion.entry.facts["passes"] and stage.criterion.name != "random":
            raise UserError(
                f"paradigm '{name}' trains nothing, so its criterion must look at data, got '{stage.criterion.name}'. "
                "Take snip or grasp, random as a control, or learned scores: supermask or edge_popup."
            )


def _penalty(recipe: "Recipe") -> dict[str, str]:
    facts, penalty = recipe.paradigm.entry.facts, recipe.regularizer
    if not facts["trains"] and penalty.name != "none":
        return {
            "regularizer": f"regularizer '{penalty.name}' draws weights, and paradigm '{recipe.paradigm.name}' leaves them frozen. "
            "Write regularizer: none."
        }
    if facts["grows"] and penalty.entry.facts["grows"]:
        return {
            "regularizer": f"regularizer '{penalty.name}' grows a penalty on all weights, on top of the one that paradigm "
            f"'{recipe.paradigm.name}' grows on those it removes. Choose none, l2 or l1."
        }
    return {}


def _prunes_nothing(recipe: "Recipe") -> dict[str, str]:
    if not recipe.sparsity:
        return {}
    return {
        "sparsity": f"paradigm '{recipe.paradigm.name}' prunes nothing, so sparsity must be 0, got {recipe.sparsity}. "
        "Leave it out or choose another paradigm."
    }


def _at_init(recipe: "Recipe") -> dict[str, str]:
    if recipe.criterion.entry.facts["converged"]:
        return {"criterion": converged(recipe.criterion.name, recipe.paradigm.name)}
    if recipe.criterion.name == "magnitude" and recipe.allocator.name == "global":
        return {
            "allocator": "allocator 'global' ranks magnitudes of untrained weights, which are the scales of the layers' initialization. "
            "Choose lamp, which normalises within layers, or uniform, erk, power, smart_ratio or per_layer."
        }
    return {}


def _allocator(allocator: Choice, granularity: Choice) -> dict[str, str]:
    due = granularity.entry.facts["allocator"]
    if due is None or allocator.name == due:
        return {}
    return {
        "allocator": f"granularity '{granularity.name}' decides itself what each layer keeps, so allocator must be {due}, "
        f"got '{allocator.name}'. Write allocator: {due}."
    }


def _sparsity(granularity: Choice, sparsity: float) -> dict[str, str]:
    due = fixed_sparsity(granularity)
    if due is None or abs(sparsity - due) < 1e-6:
        return {}
    return {
        "sparsity": f"granularity '{granularity.name}' allows one sparsity only, {due:.6g} with {granularity.plain()}, got {sparsity}. "
        f"Write sparsity: {due:.6g}, or other n and m."
    }


def fixed_sparsity(granularity: Choice) -> float | None:
    """The one sparsity that a granularity allows, or None."""
    of = granularity.entry.facts["sparsity"]
    return None if of is None else float(of(granularity))
