"""Loggers hear every report of every trial once, whatever becomes of the driver, and can neither fail a search nor see a secret."""

import importlib
import itertools
import json
import queue
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from searches import curve, reports, resume, search, start

from distprune.cli import main
from distprune.errors import UserError
from distprune.search import driver, log
from distprune.search.config import Search
from distprune.search.finale import close_tables
from distprune.search.recorded import Recorded
from distprune.search.simulate import Simulator
from distprune.search.trial import Job
from distprune.store.folder import RunFolder

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
HERE = Path(__file__).parent


class Recorder:
    """A callback of Ray's that writes down what it is told."""

    calls: ClassVar[list[tuple[Any, ...]]] = []
    fails_at: ClassVar[int | None] = None

    def setup(self) -> None:
        self.calls.append(("setup",))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any) -> None:
        self.calls.append(("start", trial.number, dict(trial.config), dict(trial.evaluated_params), str(trial)))

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any]) -> None:
        if len(self.calls) == Recorder.fails_at:
            raise ConnectionError("https://me:hunter2@example/?a=b&password=hunter2&c is not there, the key sesame-open is of no use")
        self.calls.append(("result", trial.number, result))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any) -> None:
        self.calls.append(("end", trial.number, "complete"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any) -> None:
        self.calls.append(("end", trial.number, "error"))

    def on_experiment_end(self, trials: list[Any]) -> None:
        self.calls.append(("over",))


def recorder(name: str) -> Recorder:
    """A logger of a user's own."""
    return Recorder()


OWN = {"import": f"{Path(__file__).stem}:recorder"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "finalize", close_tables)  # made-up trials leave no networks
    monkeypatch.syspath_prepend(str(HERE))
    module = importlib.import_module(Path(__file__).stem)  # as the search imports it
    monkeypatch.setattr(module.Recorder, "calls", [])
    monkeypatch.setattr(module.Recorder, "fails_at", None)
    monkeypatch.setattr(sys.modules[__name__], "Recorder", module.Recorder)


def results(calls: list[tuple[Any, ...]]) -> Counter[tuple[int, int]]:
    return Counter((call[1], call[2]["training_iteration"] - 1) for call in calls if call[0] == "result")


def recorded(folder: RunFolder) -> Counter[tuple[int, int]]:
    return Counter((row["trial"], row["index"]) for rows in reports(folder).values() for row in rows)


def test_each_report_of_each_trial_is_heard_once_between_its_start_and_its_end(tmp_path: Path) -> None:
    folder = start(search(tmp_path, log=[OWN]))
    calls = Recorder.calls
    assert results(calls) == recorded(folder) and calls[0] == ("setup",) and calls[-1] == ("over",)
    for number, rows in reports(folder).items():
        mine = [call for call in calls if len(call) > 1 and call[1] == number]
        assert [call[0] for call in mine] == ["start", *["result"] * len(rows), "end"] and mine[-1][2] == "complete"
        _, _, recipe, proposed, name = mine[0]
        assert name == f"s-{number}" and recipe["paradigm"] and proposed["paradigm"]
        for call, row in zip(mine[1:-1], rows, strict=True):
            assert call[2] | {"objective": row["objective"], "cost": row["cost"], "sparsity": row["sparsity"]} == call[2]
            assert call[2]["timesteps_total"] == row["cost"] and ("score" in call[2]) == (row["score"] is not None)


def test_a_trial_that_failed_ends_so(tmp_path: Path) -> None:
    def explodes(job: Job) -> Iterator[dict[str, Any]]:
        *rows, last = curve(job)
        yield from rows[:2]
        yield {**last, "index": 2, "ended": "nan", "objective": None, "score": None}

    start(search(tmp_path, trials=1, log=[OWN]), using=explodes)
    assert [call[0] for call in Recorder.calls] == ["setup", "start", *["result"] * 3, "end", "over"]
    assert Recorder.calls[-2][2] == "error" and "objective" not in Recorder.calls[-3][2]


class Killed(BaseException):
    pass


def _dying(at: int) -> Any:
    """Curves whose driver dies of report number `at` among all that are made, once."""
    made = itertools.count(1)

    def using(job: Job) -> Iterator[dict[str, Any]]:
        for row in curve(job):
            if next(made) == at:
                raise Killed
            yield row

    return using


def test_a_driver_that_dies_leaves_nothing_unheard(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(search(tmp_path, log=[OWN]), using=_dying(11))
    before = results(Recorder.calls)
    assert 0 < before.total() < 11
    folder = resume(tmp_path / "s")
    assert results(Recorder.calls) == recorded(folder), "each of them once"
    again = len(Recorder.calls)
    assert resume(tmp_path / "s").path == folder.path and [call[0] for call in Recorder.calls[again:]] == ["setup", "over"]


def test_what_was_heard_and_not_noted_is_heard_again(tmp_path: Path) -> None:
    """As after a kill between the two; a torn note is as good as none."""
    folder = start(search(tmp_path, trials=2, log=[OWN]))
    notes = folder.path / "logs" / "recorder" / "told.jsonl"
    lines = notes.read_bytes().split(b"\n")
    kept = [line for line in lines if b'"trial": 1' not in line]
    notes.write_bytes(b"\n".join(kept) + b'\n{"trial": 1, "logged": 3}\n{"trial": 1, "logg')
    del Recorder.calls[:]
    resume(folder.path)
    assert results(Recorder.calls) == {(1, index): 1 for index in range(3, len(reports(folder)[1]))}
    assert [call[0] for call in Recorder.calls].count("end") == 1
    ids = [json.loads(line)["id"] for line in notes.read_bytes().split(b"\n") if b'"id"' in line]
    assert len(ids) == 1, "a search that goes on is the same one to its loggers"


def test_a_logger_that_fails_is_one_line_and_told_the_rest_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sesame-open")
    events: list[tuple[str, dict[str, Any]]] = []
    Recorder.fails_at = 5
    folder = driver.start(search(tmp_path, log=[OWN]), engine=Simulator(curve, workers=2), listen=lambda *event: events.append(event))
    [message] = [facts["message"] for event, facts in events if event == "logger"]
    assert "has failed: ConnectionError" in message and "The search goes on without it" in message
    assert f"distprune resume {folder.path}" in message and "\n" not in message
    assert "hunter2" not in message and "sesame" not in message
    plain = start(search(tmp_path / "plain"))
    assert reports(folder) == reports(plain), "the search is as it would be without a logger"
    Recorder.fails_at = None
    resume(folder.path)
    assert results(Recorder.calls) == recorded(folder)


def test_a_logger_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, events = threading.Event(), []
    monkeypatch.setattr(Recorder, "on_trial_result", lambda self, **facts: release.wait())
    monkeypatch.setattr(log, "WAIT_S", 0.05)
    try:
        driver.start(search(tmp_path, log=[OWN]), engine=Simulator(curve, workers=2), listen=lambda *event: events.append(event))
    finally:
        release.set()
    [message] = [facts["message"] for event, facts in events if event == "logger"]
    assert "entries behind after 0.05 s" in message and "resume" in message


def test_trials_that_wait_at_rungs_and_go_on_end_once(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=9, scheduler={"name": "pareto_halving", "reduction": 2}, log=[OWN]), workers=3)
    ends = Counter(call[1] for call in Recorder.calls if call[0] == "end")
    assert ends == dict.fromkeys(reports(folder), 1) and results(Recorder.calls) == recorded(folder)


# TensorBoard, for real.


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all event files of a trial, read by the format: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = Event.FromString(data[position + 12 : position + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value if value.HasField("simple_value")]
            position += length + 16
    return found


def test_tensorboard_has_the_curves_of_all_trials_also_after_a_resume(tmp_path: Path) -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    value = search(tmp_path, log=["tensorboard"], trials=3)
    folder = driver.start(value, engine=Simulator(curve, workers=2), listen=lambda *event: events.append(event))
    logs = folder.path / "logs" / "tensorboard"
    assert ("logger", {"message": f"log tensorboard: tensorboard --logdir {logs}"}) in events
    resume(folder.path, trials=5)
    found = reports(folder)
    assert sorted(path.name for path in logs.iterdir() if path.is_dir()) == [str(number) for number in sorted(found)]
    for number, rows in found.items():
        curves = [(step, value) for tag, step, value in scalars(logs / str(number)) if tag == "ray/tune/objective"]
        expected = [(int(row["cost"]), row["objective"]) for row in rows]
        assert [step for step, _ in curves] == [step for step, _ in expected]
        assert [value for _, value in curves] == pytest.approx([value for _, value in expected], rel=1e-6)
        content = b"".join(path.read_bytes() for path in (logs / str(number)).iterdir())
        assert b"_hparams_/experiment" in content and b"paradigm" in content


# MLflow, for real, in a database of its own.


def test_mlflow_has_one_run_a_trial_also_after_a_driver_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    uri, curves = f"sqlite:///{tmp_path}/mlflow.db", _dying(9)

    def dies(job: Job) -> Iterator[dict[str, Any]]:
        for row in curves(job):
            yield {**row, "ended": "nan"} if row["final"] and job.number == 2 else row

    logger = {"name": "mlflow", "tracking_uri": uri, "tags": {"team": "pruning"}}
    with pytest.raises(Killed):
        start(search(tmp_path / "runs", trials=4, log=[logger]), using=dies)
    folder = resume(tmp_path / "runs" / "s", using=dies)
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("s").experiment_id])
    found = reports(folder)
    assert sorted(run.info.run_name for run in runs) == [f"s-{number}" for number in found], "a trial that went on is one run"
    for run in runs:
        number = int(run.info.run_name.removeprefix("s-"))
        history = client.get_metric_history(run.info.run_id, "objective")
        assert [(point.step, point.value) for point in history] == [(row["cost"], row["objective"]) for row in found[number]]
        assert run.data.params["sparsity"] and run.data.tags["team"] == "pruning" and run.data.tags["distprune.search"] == "s"
        assert run.info.status == ("FAILED" if number == 2 else "FINISHED")


def test_wandb_has_one_run_a_trial_under_an_id_that_outlives_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to what Ray's callback gives to the actor of each trial, which alone talks to W&B and needs a Ray that runs."""
    pytest.importorskip("wandb")
    from ray.air.integrations.wandb import WandbLoggerCallback

    monkeypatch.setenv("WANDB_MODE", "offline")
    begun: list[dict[str, Any]] = []
    queues: dict[str, queue.Queue[Any]] = {}

    def begin(self: Any, trial: Any, exclude_results: list[str], **options: Any) -> None:
        begun.append(options)
        self._trial_logging_actors[trial] = None
        self._trial_queues[trial] = queues.setdefault(options["id"], queue.Queue())

    monkeypatch.setattr(WandbLoggerCallback, "_start_logging_actor", begin)
    monkeypatch.setattr(WandbLoggerCallback, "_cleanup_logging_actors", lambda self, **options: None)
    with pytest.raises(Killed):
        start(search(tmp_path, trials=3, log=[{"name": "wandb", "mode": "offline", "entity": "us"}]), using=_dying(9))
    folder = resume(tmp_path / "s")
    assert {(facts["project"], facts["group"], facts["entity"], facts["mode"], facts["resume"]) for facts in begun} == {
        ("s", "s", "us", "offline", "allow")
    }
    names = {facts["id"]: facts["name"] for facts in begun}
    assert sorted(names.values()) == [f"s-{number}" for number in reports(folder)], "one id a trial, under both drivers"
    for key, name in names.items():
        told = [content for kind, content in queues[key].queue if kind.name == "RESULT"]
        assert [facts["objective"] for facts in told] == [row["objective"] for row in reports(folder)[int(name.removeprefix("s-"))]]
    notes = folder.path / "logs" / "wandb" / "told.jsonl"
    notes.write_bytes(notes.read_bytes().replace(b"flushed", b"died"))  # the actors of both drivers may have died with them
    begun.clear()
    resume(folder.path)
    assert {facts["id"]: facts["name"] for facts in begun} == names
    for key, name in names.items():
        told = [content for kind, content in queues[key].queue if kind.name == "RESULT"]
        assert len(told) == 2 * len(reports(folder)[int(name.removeprefix("s-"))]), "all again: W&B takes each step once"


def test_a_resume_begins_few_processes_of_wandb_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of trials that ended long ago, which it tells again: W&B takes its time for each."""
    pytest.importorskip("wandb")
    from ray.air.integrations.wandb import WandbLoggerCallback

    most = 0

    def begin(self: Any, trial: Any, exclude_results: list[str], **options: Any) -> None:
        nonlocal most
        self._trial_logging_actors[trial] = None
        self._trial_queues[trial] = queue.Queue()
        most = max(most, len(self._trial_queues))

    def clean(self: Any, timeout: int = 0, kill_on_timeout: bool = False) -> None:
        for trial in (
            [trial for trial, told in self._trial_queues.items() if told.queue and told.queue[-1][0].name == "END"] if timeout else ()
        ):
            del self._trial_queues[trial], self._trial_logging_actors[trial]

    monkeypatch.setattr(WandbLoggerCallback, "_start_logging_actor", begin)
    monkeypatch.setattr(WandbLoggerCallback, "_cleanup_logging_actors", clean)
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = start(search(tmp_path, trials=30, log=[{"name": "wandb", "mode": "offline"}]), workers=4)
    notes = folder.path / "logs" / "wandb" / "told.jsonl"
    notes.write_bytes(notes.read_bytes().replace(b"flushed", b"died"))
    most = 0
    resume(folder.path)
    assert len(reports(folder)) > 20 and 1 < most <= 10


def test_keys_are_such_as_mlflow_takes(tmp_path: Path) -> None:
    allocator = {"name": "per_layer", "shares": {"*": 0.5, "[68]*": 0.25}}
    space = {"paradigm": ["at_init"], "criterion": ["magnitude"], "allocator": [allocator]}
    start(search(tmp_path, trials=2, space=space, log=[OWN]))
    recipes = [call[2] for call in Recorder.calls if call[0] == "start"]
    assert recipes and all(found["allocator"]["shares"] == {"_2a_": 0.5, "_5b_68_5d__2a_": 0.25} for found in recipes)


# What is refused.


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("tensorboard", ["search.log must be a list of loggers", "'tensorboard'", "Write log: [tensorboard]"]),
        ({"name": "mlflow", "x": "hush-hush"}, ["search.log must be a list of loggers", "got dict"]),
        (["tensorbord"], ["Unknown logger 'tensorbord'. Did you mean 'tensorboard'?"]),
        (["tensorboard", "tensorboard"], ["search.log must name a logger once", "2 times"]),
        ([{"name": "mlflow", "uri": "x"}], ["Unknown option of search.log mlflow: 'uri'", "tracking_uri"]),
        ([{"name": "wandb", "api_key": "hush-hush"}], ["must hold no secrets", "got api_key", "set WANDB_API_KEY"]),
        ([{"name": "mlflow", "tracking_token": "hush-hush"}], ["must hold no secrets", "set MLFLOW_TRACKING_TOKEN"]),
        ([{"name": "mlflow", "tracking_uri": "https://me:hush-hush@host/"}], ["must hold no password", "MLFLOW_TRACKING_PASSWORD"]),
        (
            [{"name": "mlflow", "tracking_uri": "postgresql://host/db?user=me&password=hush-hush"}],
            ["must hold no password", "set MLFLOW_TRACKING_URI"],
        ),
        ([{"name": "mlflow", "tracking_uri": "https://host/?api_Key=hush-hush"}], ["must hold no password"]),
        ([{"name": "mlflow", "tracking_uri": "https://hush-hush@host"}], ["must hold no password"]),
        ([{"name": "mlflow", "tracking_uri": "http://[::1"}], ["search.log mlflow: tracking_uri must be a URL"]),
        ([{"name": "mlflow", "tracking_uri": "http://me:hush-hush@[x]/"}], ["must be a URL"]),
        ([{"name": "wandb", "mode": "silent"}], ["'silent'", "disabled, offline, online"]),
    ],
)
def test_what_is_refused_repeats_no_secret(tmp_path: Path, value: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        search(tmp_path, log=value)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words) and "hush" not in text, text


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_missing_package_is_named_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setattr("distprune.search.loggers.find_spec", lambda wanted: None if wanted == package else object())
    with pytest.raises(UserError, match=f"log: {name} needs the package {package}, .* Write: pip install {package}"):
        start(search(tmp_path / "runs", log=[name]))
    assert not (tmp_path / "runs").exists()


def test_a_package_that_is_missing_where_a_search_goes_on_leaves_the_logger_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = start(search(tmp_path, trials=2, log=[OWN, "tensorboard"]))
    written = yaml.safe_load(folder.search_yaml.read_text())["search"]["log"]
    monkeypatch.setattr("distprune.search.loggers.find_spec", lambda wanted: None)
    events: list[tuple[str, dict[str, Any]]] = []
    engine = Simulator(curve, workers=2)
    driver.resume(folder.path, limits={"trials": 4}, engine=engine, listen=lambda *event: events.append(event))
    [message] = [facts["message"] for event, facts in events if event == "logger"]
    assert "log tensorboard is left out, as tensorboardX is not installed here" in message and "resume" in message and "\n" not in message
    assert results(Recorder.calls) == recorded(folder), "the other one hears on"
    assert yaml.safe_load(folder.search_yaml.read_text())["search"]["log"] == written, "it is told the rest where it can be"


def test_those_who_do_not_log_need_no_logger_of_the_users_own(tmp_path: Path) -> None:
    folder = start(search(tmp_path, trials=12, scheduler="none"))
    facts = yaml.safe_load(folder.search_yaml.read_text())
    facts["search"]["log"] = [{"import": "module_that_is_gone:logger"}]
    folder.search_yaml.write_text(yaml.safe_dump(facts))
    with pytest.raises(UserError, match="cannot import 'module_that_is_gone'"):
        resume(folder.path)
    assert Search.of_run(facts["search"]) == search(tmp_path, trials=12, scheduler="none")
    assert Recorded(folder.path).trials == 12
    assert start(search(tmp_path, name="next", trials=2, sampler="tpe", learn_from=[str(folder.path)])).learned.exists()


def test_check_says_that_a_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("distprune.search.loggers.find_spec", lambda wanted: None)
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(search(tmp_path / "runs", log=["tensorboard"]).plain()))
    assert main(["check", str(path)]) == 0
    assert "Not on this machine: log: tensorboard needs the package tensorboardX" in capsys.readouterr().out


def test_loggers_come_back_from_search_yaml(tmp_path: Path) -> None:
    value = search(tmp_path, log=["tensorboard", {"name": "mlflow", "tracking_uri": "http://127.0.0.1:5000", "tags": {"team": "a"}}])
    assert Search.read(yaml.safe_load(yaml.safe_dump(value.plain()))) == value
    assert value.plain()["log"][0] == "tensorboard" and search(tmp_path).plain()["log"] == []
