"""Functional priors and posteriors: does the distance fall, and does signal-to-noise prune better than magnitude?

    python benchmarks/priors.py            # all parts; goes on from benchmarks/priors.json if there is one
    python benchmarks/priors.py pruning    # one of them: matching, pruning, regression

`matching`: distance by iteration and coefficients of the layers. `pruning`: masks of the same chain by two rules, and by magnitude of the
network that it started from, as they are and fine-tuned. `regression`: GPi-G against N(0, 1) on scaled weights, on scikit-learn's diabetes.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from distprune.core.hooks.functional_prior import untrained
from distprune.core.hooks.hook import slot
from distprune.core.hooks.posterior import Posterior
from distprune.core.optimizers.sghmc import SGHMC
from distprune.core.priors.families import Family, family, layers_of
from distprune.core.priors.gaussian_process import GaussianProcess
from distprune.core.priors.wasserstein import Matching, mixed
from distprune.core.recipe import Recipe
from distprune.core.run import Run, prepare
from distprune.core.stages import Train
from distprune.environment import environment

FILE = Path(__file__).with_suffix(".json")
CPU = torch.device("cpu")
Rows = list[dict[str, Any]]

# Pruning

SPARSITIES = (0.75, 0.9, 0.95, 0.98)
# What the chain samples: temperature 1 and strength 1 are Bayes' rule, 0.1 and 0.1 the same prior with ten times the data.
CHAINS: dict[str, tuple[Any, dict[str, float]]] = {
    "weight decay 5e-4, temperature 0.1": ("none", {"rate": 5e-3, "temperature": 0.1}),
    "GPi-G, temperature 1": ({"name": "functional_prior", "strength": 1.0}, {"rate": 1e-2, "temperature": 1.0}),
    "GPi-G, temperature 0.1": ({"name": "functional_prior", "strength": 0.1}, {"rate": 1e-2, "temperature": 0.1}),
}
RECIPE: dict[str, Any] = {
    "model": {"name": "mlp", "hidden": [100, 100]},
    "data": {"name": "mnist", "folder": "data/mnist", "limit": 6000},
    "paradigm": {"name": "posterior", "burn": "100%", "sample": "200%", "samples": 50, "tune": "25%"},
    "sparsity": 0.95,
    "train": {"length": "5ep", "batch_size": 64, "optimizer": {"name": "sgd", "lr": 0.05}},
}


def _run(stage: Train, run: Run) -> None:
    """A stage but for its end."""
    stage.enter(run.state, run.env)
    for _ in stage.run(run.state, run.env):
        pass


def pruning(chain_name: str, seed: int) -> Iterator[dict[str, Any]]:
    """Test accuracy of masks by signal-to-noise and by magnitude, both of one chain, and by magnitude of the trained network."""
    regularizer, options = CHAINS[chain_name]
    recipe = {**RECIPE, "regularizer": regularizer, "paradigm": {**RECIPE["paradigm"], **options}, "seed": seed}
    run = prepare(Recipe.read(recipe), report_every="100ep")
    train, chain, tune = run.plan.stages
    assert isinstance(train, Train) and isinstance(chain, Train) and isinstance(tune, Train)
    _run(train, run)
    trained = copy.deepcopy(run.state)
    yield {"rule": "unpruned, trained", "sparsity": 0.0, "accuracy": _accuracy(run)}
    _run(chain, run)
    sampled = copy.deepcopy(run.state)
    hook = next(hook for hook in chain.hooks if isinstance(hook, Posterior))
    name = slot(chain.hooks.index(hook), hook)
    hook_at = {
        **{("signal to noise", sparsity): replace(hook, by="signal_to_noise", sparsity=sparsity) for sparsity in SPARSITIES},
        **{("magnitude of the mean", sparsity): replace(hook, by="magnitude", sparsity=sparsity) for sparsity in (0.0, *SPARSITIES)},
    }
    for (rule, sparsity), at in hook_at.items():
        state = copy.deepcopy(sampled)
        at.end(state.slots.pop(name), state, run.env)
        yield from _measured(rule if sparsity else "unpruned, mean", sparsity, replace(run, state=state), tune)
    for sparsity in SPARSITIES:
        state = copy.deepcopy(trained)
        scores = {name: weight.detach().abs() for name, weight in state.weights.items()}
        state.set_masks(state.units(hook.granularity, run.env.task.example).choose(scores, sparsity, hook.allocator, None))
        yield from _measured("magnitude of the trained", sparsity, replace(run, state=state), tune)


def _measured(rule: str, sparsity: float, run: Run, tune: Train) -> Iterator[dict[str, Any]]:
    row = {"rule": rule, "sparsity": sparsity, "accuracy": _accuracy(run)}
    if sparsity:
        _run(tune, run)
        row["tuned"] = _accuracy(run)
    yield row


def _accuracy(run: Run) -> float:
    return run.env.task.metrics(run.state.model, "test")["accuracy"]


# Matching


def matching(seed: int) -> Iterator[dict[str, Any]]:
    """Distance by iteration on diabetes, and the coefficients of LeNet-5 on digits, at the sizes that a search has by default."""
    inputs, _ = _diabetes()
    network = _network(inputs.shape[1])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name in ("gpi_g", "gpi_h", "gpi_nf"):
            prior = family(name, layers_of(network), CPU)  # type: ignore[arg-type]
            began = time.perf_counter()
            distances = MATCHING.match(prior, GaussianProcess(), network, lambda: mixed(inputs, 50), seed=seed)
            yield {"rule": name, "distances": [round(value, 4) for value in distances], "wall_s": round(time.perf_counter() - began, 1)}
    recipe = {"model": {"name": "lenet5", "width": 0.5}, "data": "digits", "paradigm": "dense", "seed": seed}
    for lengthscale in (0.5, 1.0, 2.0):
        run = prepare(Recipe.read({**recipe, "regularizer": {"name": "functional_prior", "lengthscale": lengthscale}}))
        began = time.perf_counter()
        run.recipe.regularizer().start({}, run.state, run.env)
        (coefficients,) = run.state.penalties.values()
        yield {
            "rule": f"digits, lengthscale {lengthscale:g}",
            "coefficients": {name: round(value, 5) for name, value in coefficients.items()},
            "wall_s": round(time.perf_counter() - began, 1),
        }


# Regression

MATCHING = Matching(iterations=40, functions=64, critic_steps=30, hidden=50, one_sided=True)
NOISE = 0.5  # variance of standardised targets that inputs do not explain: linear regression leaves about half
CHAINS_EACH, STEPS, BURN, EVERY = 4, 2000, 800, 40


def _diabetes() -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised inputs [442, 10] and targets [442]."""
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    rows = torch.cat([torch.from_numpy(inputs), torch.from_numpy(targets)[:, None]], 1).float()
    rows = (rows - rows.mean(0)) / rows.std(0)
    return rows[:, :-1], rows[:, -1]


def _network(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 50), nn.Tanh(), nn.Linear(50, 1))


def regression(seed: int) -> Iterator[dict[str, Any]]:
    """RMSE and negative log-likelihood, in standardised units, on the tenth of the data that the seed leaves out."""
    inputs, targets = _diabetes()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    held, seen = order[: len(order) // 10], order[len(order) // 10 :]
    network = untrained(_network(inputs.shape[1]))
    layers = layers_of(_network(inputs.shape[1]))
    for name in ("fixed", "gpi_g"):
        prior = family(name, layers, CPU)  # type: ignore[arg-type]
        if name != "fixed":
            MATCHING.match(prior, GaussianProcess(), network, lambda: mixed(inputs[seen], 50), seed=seed)
        predictions = _posterior(network, prior, inputs[seen], targets[seen], inputs[held], seed)  # [samples, n]
        error = (predictions.mean(0) - targets[held]).square().mean().sqrt()
        density = torch.distributions.Normal(predictions, NOISE**0.5).log_prob(targets[held])
        nll = -(density.logsumexp(0) - math.log(len(predictions))).mean()
        yield {"rule": {"fixed": "FG", "gpi_g": "GPi-G"}[name], "rmse": float(error), "nll": float(nll)}


def _posterior(
    network: nn.Module, prior: Family, inputs: torch.Tensor, targets: torch.Tensor, held: torch.Tensor, seed: int
) -> torch.Tensor:
    """Predictions [samples, n] at `held` of chains that start at draws from the prior."""
    n = len(inputs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parameters = {name: nn.Parameter(value.detach()) for name, value in prior.draw(CHAINS_EACH).items()}
        weights = prior.penalties()
        precisions = {name: weights[name] if name in weights else _bias_precision(prior, name) for name in parameters}
        optimizer = SGHMC(parameters.values(), scale=n, lr=0.01, friction=0.01, burn=BURN, weight_decay=0.0)
        forward = vmap(lambda drawn, rows: functional_call(network, drawn, (rows,))[:, 0], in_dims=(0, None))
        kept = []
        for step in range(STEPS):
            rows = torch.randint(n, (32,))
            errors = (forward(parameters, inputs[rows]) - targets[rows]).square().mean(1) / (2 * NOISE)  # [chains]
            energy = sum(precisions[name] * value.square().sum() for name, value in parameters.items()) / (2 * n)
            optimizer.zero_grad()
            (errors.sum() + energy).backward()
            optimizer.step()
            if step >= BURN and step % EVERY == 0:
                with torch.no_grad():
                    kept.append(forward(parameters, held))
    return torch.cat(kept)


def _bias_precision(prior: Family, name: str) -> float:
    index = next(index for index, layer in enumerate(prior.layers) if layer.bias == name)
    (rho,) = prior.parameters or [torch.full((len(prior.layers), 2), math.log(math.e - 1))]
    return float(nn.functional.softplus(rho[index, 1].detach())) ** -2


# All parts

PARTS: dict[str, tuple[list[str], int, Callable[[str, int], Iterator[dict[str, Any]]]]] = {  # settings, seeds, what measures one
    "matching": (["default"], 3, lambda setting, seed: matching(seed)),
    "pruning": (list(CHAINS), 5, pruning),
    "regression": (["diabetes"], 10, lambda setting, seed: regression(seed)),
}


def table(part: str, rows: Rows) -> str:
    """Markdown: mean and standard deviation over seeds."""
    rules = list(dict.fromkeys((row["setting"], row["rule"]) for row in rows))
    if part == "pruning":
        head = ["setting", "rule", *(f"{at:.0%}" for at in SPARSITIES), *(f"{at:.0%}, tuned" for at in SPARSITIES)]
        keys: list[tuple[float | None, str]] = [(at, key) for key in ("accuracy", "tuned") for at in SPARSITIES]
    elif part == "regression":
        head, keys = ["setting", "rule", "RMSE", "NLL"], [(None, "rmse"), (None, "nll")]
    else:
        head, keys = ["setting", "rule", "first 3", "last 10"], []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for setting, rule in rules:
        own = [row for row in rows if (row["setting"], row["rule"]) == (setting, rule)]
        if part == "matching":
            curves = [row["distances"] for row in own if "distances" in row]
            if not curves:
                continue
            cells = [_cell([statistics.mean(curve[:3]) for curve in curves]), _cell([statistics.mean(curve[-10:]) for curve in curves])]
        elif part == "pruning" and rule.startswith("unpruned"):
            cells = [_cell([row["accuracy"] for row in own], 100)] + [""] * (len(keys) - 1)
        else:
            scale = 100 if part == "pruning" else 1
            cells = [_cell([row[key] for row in own if at in (None, row.get("sparsity"))], scale) for at, key in keys]
        lines.append(f"| {setting} | {rule} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], scale: float = 1) -> str:
    digits = 1 if scale == 100 else 3
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    rows: Rows = found["rows"]
    for part in options.parts or PARTS:
        settings, seeds, measure = PARTS[part]
        for setting in settings:
            for seed in range(seeds):
                if any((row["part"], row["setting"], row["seed"]) == (part, setting, seed) for row in rows):
                    continue
                rows += [{"part": part, "setting": setting, "seed": seed, **row} for row in measure(setting, seed)]
                facts = {"hardware": "2 shared CPU cores, one thread", "environment": environment()}
                FILE.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
                print(f"{part}, {setting}, seed {seed}", flush=True)
        print(table(part, [row for row in rows if row["part"] == part]), flush=True)


if __name__ == "__main__":
    main()
