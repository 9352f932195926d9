"""Where a search is shown besides its run folder: Ray Tune's own callbacks for TensorBoard, MLflow and Weights & Biases.

An entry makes the callback of a search of the given name. Who calls it is `log.py`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from distprune.core.registry import Choice
from distprune.errors import UserError
from distprune.search.tables import logger

_SECRETS = {"api_key": "WANDB_API_KEY", "tracking_token": "MLFLOW_TRACKING_TOKEN", "password": "MLFLOW_TRACKING_PASSWORD"}
SECRET = re.compile(r"key|token|password|secret", re.IGNORECASE)  # names of what is nobody's to see


@logger("tensorboard", paper="Abadi et al. 2016, arXiv:1605.08695", packages=("tensorboardX",), show="tensorboard --logdir {folder}")
def tensorboard(name: str) -> Any:
    """Event files in the run folder's logs/tensorboard, a folder a trial; the horizontal axis is billed samples."""
    from ray.tune.logger import TBXLoggerCallback

    return TBXLoggerCallback()  # type: ignore[no-untyped-call]


@logger("mlflow", paper="Zaharia et al. 2018, Accelerating the machine learning lifecycle with MLflow", packages=("mlflow",))
def mlflow(name: str, *, tracking_uri: str | None = None, experiment_name: str | None = None, tags: Mapping[str, str] | None = None) -> Any:
    """A run a trial, in the experiment that is called like the search, at `tracking_uri` or where MLFLOW_TRACKING_URI says."""
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    experiment = experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
    return MLflowLoggerCallback(tracking_uri, experiment_name=experiment, tags={**(tags or {}), "distprune.search": name})


@logger("wandb", paper="Biewald 2020, Experiment tracking with Weights and Biases", packages=("wandb",))
def wandb(
    name: str,
    *,
    project: str | None = None,
    group: str | None = None,
    entity: str | None = None,
    mode: Literal["online", "offline", "disabled"] = "online",
    api_key_file: str | None = None,
) -> Any:
    """A run a trial, in the project that is called like the search; the key is WANDB_API_KEY, `wandb login` or in `api_key_file`."""
    from ray.air.integrations.wandb import WandbLoggerCallback

    if mode != "online":
        os.environ["WANDB_MODE"] = mode  # else Ray's callback asks for a key that is not needed
    project = project or os.environ.get("WANDB_PROJECT_NAME") or name
    known: dict[str, Any] = {"entity": entity} if entity else {}
    # A resumed search goes on with the runs of its trials.
    return WandbLoggerCallback(project, group or name, api_key_file, mode=mode, resume="allow", **known)


def read_loggers(value: Any, where: str) -> tuple[Choice, ...]:
    """A list of names or mappings. Raises UserError, which repeats no secret, for one that cannot be used."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        kind = repr(value) if isinstance(value, str) else type(value).__name__
        raise UserError(f"{where} must be a list of loggers, got {kind}. Write log: [tensorboard]; [] is for none.")
    for item in value:
        for key, variable in _SECRETS.items() if isinstance(item, Mapping) else ():
            if key in item:
                raise UserError(
                    f"{where} must hold no secrets, as it is written into search.yaml, got {key}. Take it out, and set {variable}."
                )
    choices = tuple(logger.read(item, where) for item in value)
    names = [choice.name for choice in choices]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{where} must name a logger once, got '{twice[0]}' {names.count(twice[0])} times. Leave the others out.")
    for choice in choices:
        for key, option in choice.options.items():
            if isinstance(option, str) and "://" in option:
                _check_url(option, f"{where} {choice.name}: {key}")
    return choices


def _check_url(text: str, what: str) -> None:
    """Raise UserError, which does not repeat it, for a URL with a secret, or with what cannot be told from one, such as a user."""
    try:
        url = urlsplit(text)
    except ValueError:
        raise UserError(f"{what} must be a URL, got one that cannot be read. Write it as https://HOST:5000.") from None
    if "@" in url.netloc or any(SECRET.search(name) for name, _ in parse_qsl(url.query, keep_blank_values=True)):
        raise UserError(
            f"{what} must hold no password, as it is written into search.yaml. Take it out of the URL, and set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD; or leave it out, and set MLFLOW_TRACKING_URI."
        )


def missing_package(choice: Choice) -> str:
    """The package that a logger needs and that is not installed here; empty if there is none."""
    return next((package for package in choice.entry.facts["packages"] if find_spec(package) is None), "")


def check_loggers(choices: Sequence[Choice]) -> None:
    """Raise UserError for a logger whose package is not installed here."""
    for choice in choices:
        if missing := missing_package(choice):
            needs = f"log: {choice.name} needs the package {missing}, which is not installed."
            raise UserError(f"{needs} Write: pip install {missing}, or leave {choice.name} out.")
