"""A penalty that comes from a prior over functions: each layer's L2 coefficient is what a matched prior over its weights says."""

import copy
import hashlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from distprune.core.hooks.hook import Hook, Memory
from distprune.core.keys import digest
from distprune.core.options import Choices, LogRange
from distprune.core.priors.families import Family, Hierarchical, Name, family, layers_of
from distprune.core.priors.gaussian_process import GaussianProcess
from distprune.core.priors.wasserstein import Matching, functions_of, mixed
from distprune.core.registry import regularizer
from distprune.core.streams import global_stream
from distprune.errors import UserError

if TYPE_CHECKING:
    from distprune.core.executor import Env
    from distprune.core.plan import Plan
    from distprune.core.state import State
    from distprune.core.task import Task

_BOX = 1024  # training inputs that the box of uniform measurement points is made of
_Rows = dict[str, dict[str, float]]  # "l2", and for a hierarchical prior "shape" and "rate" -> weight name -> value
_MATCHED: dict[str, _Rows] = {}  # a worker runs many trials of one network under the same process


@dataclass(frozen=True, kw_only=True)
class FunctionalPrior(Hook):
    """Matches once, when the first trajectory begins, and adds coefficient * w to the gradients.

    The coefficient is strength fan_in E[1 / sigma^2] / N with N training samples: at strength 1 it is the prior N(0, sigma^2 / fan_in) of a
    mean loss. It grows from 0 over the first `ramp` steps. With `gibbs` above 0 the variances of a hierarchical prior are drawn anew every
    so many steps, given the weights (section 4.2 of the paper).
    """

    family: Name
    process: GaussianProcess
    matching: Matching
    points: int
    ramp: int
    gibbs: int
    strength: float

    def start(self, memory: Memory, state: "State", env: "Env") -> None:
        memory["steps"] = 0
        key = self._key(state)
        if f"{key}/l2" not in state.penalties:
            for row, values in self._matched(state.model, env).items():
                state.penalties[f"{key}/{row}"] = dict(values)
            # Not part of the bill, which is of what a trial trains and scores: it is a matter of network and inputs alone.
            state.ledger.observing += self.matching.iterations * self.matching.functions * self.points
        for name, value in state.penalties[f"{key}/l2"].items():
            memory[name] = value

    @torch.no_grad()
    def grad(self, memory: Memory, state: "State", env: "Env") -> None:
        if self.gibbs and memory["steps"] % self.gibbs == 0:
            self._redraw(memory, state, env)
        share = self.strength * (min(1.0, memory["steps"] / self.ramp) if self.ramp else 1.0)
        memory["steps"] += 1
        rows = [(weight.grad, weight.detach(), share * memory[name]) for name, weight in state.weights.items() if weight.grad is not None]
        if rows:
            gradients, weights, coefficients = map(list, zip(*rows, strict=True))
            torch._foreach_add_(gradients, torch._foreach_mul(weights, coefficients))

    def _redraw(self, memory: Memory, state: "State", env: "Env") -> None:
        """1 / sigma^2 ~ Gamma(shape + n / 2, rate + sum of scaled w^2 / 2) for each layer."""
        key, fan_in = self._key(state), {layer.weight: layer.fan_in for layer in layers_of(state.model)}
        with global_stream(env.seed, "gibbs", state.lap, state.clock):
            for name, weight in state.weights.items():
                shape = state.penalties[f"{key}/shape"][name] + state.masks.counts[name] / 2
                rate = state.penalties[f"{key}/rate"][name] + fan_in[name] * float(weight.double().square().sum()) / 2
                precision = torch.distributions.Gamma(torch.tensor(shape), torch.tensor(rate)).sample()
                memory[name] = fan_in[name] * float(precision) / env.task.steps_per_epoch(1)

    def _key(self, state: "State") -> str:
        """Where the coefficients stand in the state; a network whose structure was edited has others."""
        return f"functional_prior/{digest(self, {name: tuple(weight.shape) for name, weight in state.weights.items()})[:16]}"

    def _matched(self, model: nn.Module, env: "Env") -> _Rows:
        network = untrained(model)
        with global_stream(env.seed, "functional prior"):
            prior = family(self.family, layers_of(model), env.device)
        points = partial(measurement_points, env.task, self.points)
        key = self._content(network, prior, points, env)
        if key not in _MATCHED:
            self.matching.match(prior, self.process, network, points, seed=env.seed)
            with global_stream(env.seed, "functional prior", -1):
                rows = {"l2": {name: value / env.task.steps_per_epoch(1) for name, value in prior.penalties().items()}}
            if isinstance(prior, Hierarchical):
                pairs = {layer.weight: prior.shape_and_rate(index) for index, layer in enumerate(prior.layers)}
                rows |= {row: {name: pair[index] for name, pair in pairs.items()} for index, row in enumerate(("shape", "rate"))}
            _MATCHED[key] = rows
        return _MATCHED[key]

    def check(self, model: nn.Module, env: "Env") -> None:
        """Raise UserError for a network that the family is not for, or of which no functions can be drawn."""
        with global_stream(env.seed, "functional prior"), torch.no_grad():
            prior = family(self.family, layers_of(model), env.device)
            functions_of(untrained(model), prior, measurement_points(env.task, 2), 2)

    def _content(self, network: nn.Module, prior: Family, points: Any, env: "Env") -> str:
        """What the result depends on, functions of the network among it: classes of one name may compute different things."""
        with global_stream(env.seed, "functional prior", 0), torch.no_grad():
            inputs = points()
            values = functions_of(network, prior, inputs, 2)
        seen = hashlib.sha256(inputs.cpu().numpy().tobytes() + values.cpu().numpy().tobytes()).hexdigest()
        return digest(self, seen, str(network), env.seed, env.task.steps_per_epoch(1), torch.get_num_threads(), str(env.device))


def check_priors(plan: "Plan", state: "State", env: "Env") -> None:
    """Try the priors of a plan on its network, before anything is trained."""
    for hook in {hook for stage in plan.stages for hook in getattr(stage, "hooks", ()) if isinstance(hook, FunctionalPrior)}:
        hook.check(state.model, env)


def untrained(model: nn.Module) -> nn.Module:
    """A frozen copy in evaluation mode, whose normalisations are as a network is built with: they learn, and the prior is from before."""
    network = copy.deepcopy(model).eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
    return network.requires_grad_(False)


def measurement_points(task: "Task", n: int) -> Tensor:
    """[n, ...] where functions are compared: training images, or for other inputs 70 % of them with 30 % uniform in the box they fill."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    tabular = task.shape[1:] == (1, 1)
    batch = task.draw(generator, _BOX if tabular else n)
    inputs: Tensor = batch if isinstance(batch, Tensor) else batch[0]
    return mixed(inputs, n) if tabular else inputs


@regularizer("functional_prior", paper="Tran et al. 2022, arXiv:2011.12829: the matching, as L2 coefficients of the layers")
def functional_prior(
    *,
    family: Name = "gpi_g",
    lengthscale: Annotated[float, Choices(0.5, 1.0, 2.0)] = 1.0,
    strength: Annotated[float, LogRange(1e-3, 1e-1)] = 1e-2,
    amplitude: float = 1.0,
    spread: float = 0.0,
    ard: bool = False,
    ramp: int = 0,
    gibbs: int = 0,
    iterations: int = 20,
    functions: int = 16,
    points: int = 16,
    critic_steps: int = 20,
    hidden: int = 64,
) -> Hook:
    """L2 with a coefficient for each layer from a prior over weights whose functions are like those of a Gaussian process.

    Formula:
        L(w) + sum over layers l of c_l / 2 * ||w_l||^2,   c_l = strength fan_in_l E[1 / sigma_l^2] / N
        sigma = argmin W1(f under N(0, sigma_l^2 / fan_in_l), f of the Gaussian process),   N the training samples

    The process has two numbers for all layers: `amplitude`, its standard deviation, and `lengthscale` in units of the root of twice the
    number of inputs; `spread` makes it hierarchical. `strength` 1 is Bayes' rule; less is a colder posterior, as with more weights than
    samples the single likeliest network has weights near zero. The paper's sizes are iterations 200, functions 128, points 100,
    critic_steps 200, hidden 200; the defaults take seconds.
    """
    sizes = {"iterations": iterations, "functions": functions, "points": points, "critic_steps": critic_steps, "hidden": hidden}
    for name, value in {**sizes, "lengthscale": lengthscale, "amplitude": amplitude, "strength": strength}.items():
        if value <= 0:
            raise UserError(f"regularizer.{name} must be above 0, got {value}. Leave it out for the default.")
    if min(ramp, gibbs, spread) < 0:
        raise UserError(f"regularizer.ramp, gibbs and spread must be at least 0, got {ramp}, {gibbs} and {spread}. Leave them out.")
    if gibbs and family not in ("gpi_h", "fixed_h"):
        raise UserError(f"regularizer.gibbs draws the variances of a hierarchical prior, got family '{family}'. Write family: gpi_h.")
    process = GaussianProcess(lengthscale=lengthscale, amplitude=amplitude, spread=spread, ard=ard)
    fixed = family.startswith("fixed")
    matching = Matching(
        iterations=0 if fixed else iterations, functions=functions, critic_steps=critic_steps, hidden=hidden, one_sided=True
    )
    return FunctionalPrior(family=family, process=process, matching=matching, points=points, ramp=ramp, gibbs=gibbs, strength=strength)
