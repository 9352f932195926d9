"""A policy over per-layer budgets, trained with PPO-Lagrangian.

Constrained reinforcement learning (Malik et al. 2021, arXiv:2110.08558): maximise the accuracy after pruning under a cost of at most the
budget. Trials are episodes, so they are few and may end long after they began: a batch is every episode of the latest policies.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distprune.core.allocators.constrained_rl import count
from distprune.core.streams import stream
from distprune.search.episodes import Budgets, keep_of
from distprune.search.lagrangian import Gradient, Multiplier, Pid, advantages, divergence, log_prob, loss

_STALE = 2  # policy versions after which a trajectory is dropped
_EPOCHS = 40  # gradient steps of an update at most; the divergence ends most earlier


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the policy learns."""

    batch: int = 16  # episodes that have to end for an update
    lr: float = 0.01
    value_lr: float = 0.02
    clip: float = 0.2
    divergence: float = 0.03  # KL at 1.5 times which an update stops
    smoothing: float = 0.95  # lambda of the advantages
    spread: float = 1.0  # standard deviation of the first actions, in logits
    warm_up: int = 1  # updates before the multiplier moves
    multiplier: Literal["gradient", "pid"] = "gradient"
    wall: bool = False  # AMC's action wall: no episode exceeds the budget
    learn: bool = True  # False: the untrained policy, a baseline


@dataclass(frozen=True)
class Episode:
    """One pass over the layers, as it is recorded: all that learning from it needs besides its outcome."""

    version: int  # of the policy that acted
    actions: tuple[float, ...]  # logits, before any wall
    log_probs: tuple[float, ...]
    keep: tuple[float, ...]

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> "Episode":
        """From what `asdict` and JSON made of it."""
        return cls(plain["version"], tuple(plain["actions"]), tuple(plain["log_probs"]), tuple(plain["keep"]))


class Actor(nn.Module):
    """Gaussian over the logit of a keep ratio; before it has learned anything, its mean is the uniform budget."""

    def __init__(self, features: int, start: float, spread: float, generator: torch.Generator) -> None:
        super().__init__()
        self.body = network(features, 1, generator)
        self.log_std = nn.Parameter(torch.tensor(math.log(spread), dtype=torch.double))
        self._start = start

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """[n, features] -> mean [n], log of the standard deviation []."""
        return self._start + self.body(states)[:, 0], self.log_std


def network(features: int, out: int, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers of 64, whose outputs start at zero."""

    def linear(before: int, after: int) -> nn.Module:
        layer: nn.Module = nn.utils.skip_init(nn.Linear, before, after, dtype=torch.double)  # type: ignore[no-untyped-call]
        return layer  # no number of torch's global generator went into it

    built = nn.Sequential(linear(features, 64), nn.Tanh(), linear(64, 64), nn.Tanh(), linear(64, out))
    with torch.no_grad():
        for parameter in built.parameters():
            scale = 1 / math.sqrt(parameter.shape[1]) if parameter.dim() > 1 and parameter.shape[0] > out else 0.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.double))
    return built


@dataclass(frozen=True)
class _Told:
    """An episode with its outcome."""

    episode: Episode
    states: list[list[float]]
    costs: list[float]  # of each step, in budgets: they sum to the episode's cost
    reward: float


class Policy:
    """Asked for episodes and told their outcomes; a pure function of its seed and what it was told, in order."""

    def __init__(self, budgets: Budgets, *, seed: int, settings: Settings) -> None:
        self.budgets, self._seed, self._settings = budgets, seed, settings
        generator = stream(seed, "policy")
        self.actor = Actor(budgets.features, budgets.uniform_logit, settings.spread, generator)
        self._critic = network(budgets.features, 2, generator)  # values of reward and of cost
        self._actor_adam = torch.optim.Adam(self.actor.parameters(), lr=settings.lr)
        self._critic_adam = torch.optim.Adam(self._critic.parameters(), lr=settings.value_lr)
        self.multiplier: Multiplier = Pid() if settings.multiplier == "pid" else Gradient()
        self.version = 0
        self._told: list[_Told] = []
        self._fresh = 0  # told since the latest update
        self._rewards: list[float] = []  # of all episodes
        self._measured: list[tuple[float, float]] = []  # (what the function of counts says, what was measured), in budgets

    def ask(self, number: int) -> Episode:
        """Draw episode `number`."""
        return self._roll(stream(self._seed, "episode", number))

    def tell(self, episode: Episode, reward: float, cost: float | None = None) -> None:
        """Learn from an episode; `cost`, as a share of the dense network's, is given where it is measured. A stale one is dropped."""
        if self.version - episode.version > _STALE:
            return
        states, counts, costs, last = [], self.budgets.start(), [], 1.0
        before = 0.0
        for step, (layer, keep) in enumerate(zip(self.budgets.layers, episode.keep, strict=True)):
            states.append(self.budgets.state(step, counts, last))
            counts[layer.name] = count(keep, layer)
            committed = self.budgets.cost(counts) / self.budgets.most
            costs.append(committed - before)
            before, last = committed, keep
        if cost is not None:  # what the function of counts does not know is charged at the end
            self._measured.append((before, cost / self.budgets.most))
            costs[-1] += cost / self.budgets.most - before
        self._rewards.append(reward)
        self._told.append(_Told(episode, states, costs, reward))
        self._fresh += 1
        if self._settings.learn and self._fresh >= self._settings.batch:
            with _one_thread():
                self._update()

    def end(self) -> dict[str, float]:
        """Keep ratios of the policy's mean, shifted in logits as far as the budget allows: never above it."""
        episode = self._roll(None)
        return self.budgets.fit(episode.actions, self.budgets.most * self._correction)

    @property
    def _correction(self) -> float:
        """What share of the budget the function of counts may have, going by the latest measurements: 1 where nothing is measured."""
        rows = self._measured[-4 * self._settings.batch :]
        if not rows:
            return 1.0
        # Least squares of measured = a + b * known, and where that is 1; plain proportion where all rows are alike.
        known, found = (torch.tensor(column, dtype=torch.double) for column in zip(*rows, strict=True))
        spread = (known - known.mean()).square().sum()
        slope = float(((known - known.mean()) * (found - found.mean())).sum() / spread) if float(spread) > 1e-6 else 0.0
        at = float(known.mean()) + (1 - float(found.mean())) / slope if slope > 1e-3 else float(known.mean() / found.mean())
        return min(max(at, self.budgets.least_cost / self.budgets.most), 1 / self.budgets.most)

    @torch.no_grad()
    def _roll(self, generator: torch.Generator | None) -> Episode:
        counts, last = self.budgets.start(), 1.0
        actions, log_probs, keeps = [], [], []
        for step, layer in enumerate(self.budgets.layers):
            state = torch.tensor([self.budgets.state(step, counts, last)], dtype=torch.double)
            mean, log_std = self.actor(state)
            noise = torch.randn(1, generator=generator, dtype=torch.double) if generator is not None else torch.zeros(1)
            action = mean + noise * log_std.exp()
            last = keep_of(float(action))
            if self._settings.wall:
                last = self.budgets.wall(step, counts, last)
            counts[layer.name] = count(last, layer)
            actions.append(float(action))
            log_probs.append(float(log_prob(action, mean, log_std)))
            keeps.append(last)
        return Episode(self.version, tuple(actions), tuple(log_probs), tuple(keeps))

    def _update(self) -> None:
        """One update of multiplier, policy and values, from all episodes that are not stale."""
        batch = self._told[-self._fresh :]
        if self.version >= self._settings.warm_up:
            self.multiplier.step(sum(sum(told.costs) for told in batch) / len(batch))
        self._told = [told for told in self._told if self.version - told.episode.version <= _STALE]
        self._fresh = 0
        self.version += 1
        states = _tensor([told.states for told in self._told])  # [episodes, steps, features]
        actions = _tensor([told.episode.actions for told in self._told])
        old = _tensor([told.episode.log_probs for told in self._told])
        rewards = torch.zeros_like(old)
        rewards[:, -1] = self._scaled([told.reward for told in self._told])
        costs = _tensor([told.costs for told in self._told])
        values = self._critic(states).detach()
        gained = advantages(rewards, values[..., 0], self._settings.smoothing)
        gained = (gained - gained.mean()) / (gained.std() + 1e-8)
        paid = advantages(costs, values[..., 1], self._settings.smoothing)
        paid = paid - paid.mean()  # not divided by its deviation: the multiplier is a price of cost
        self._improve(states.flatten(0, 1), actions.flatten(), old.flatten(), gained.flatten(), paid.flatten())
        returns = torch.stack([part.flip(1).cumsum(1).flip(1) for part in (rewards, costs)], dim=-1)
        for _ in range(_EPOCHS):
            self._critic_adam.zero_grad()
            (self._critic(states) - returns).square().mean().backward()
            self._critic_adam.step()

    def _improve(self, states: Tensor, actions: Tensor, old: Tensor, gained: Tensor, paid: Tensor) -> None:
        with torch.no_grad():
            first, first_log_std = (part.clone() for part in self.actor(states))
        for _ in range(_EPOCHS):
            mean, log_std = self.actor(states)
            if float(divergence(first, first_log_std, mean.detach(), log_std.detach())) > 1.5 * self._settings.divergence:
                break
            ratios = (log_prob(actions, mean, log_std) - old).exp()
            self._actor_adam.zero_grad()
            loss(ratios, gained, paid, self.multiplier.value, self._settings.clip).backward()  # type: ignore[no-untyped-call]
            self._actor_adam.step()

    def _scaled(self, rewards: Sequence[float]) -> Tensor:
        """Rewards in standard deviations of all that were seen: values are learned at a scale that does not depend on the task."""
        seen = _tensor(self._rewards)
        return (_tensor(rewards) - seen.mean()) / (seen.std() + 1e-8)


def _tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums do not depend on the machine's number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
