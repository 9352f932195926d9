"""The commands, and that bad input is one line with exit code 2 that loses nothing."""

import functools
import gzip
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from toys import BASE, REPOSITORY

from distprune.cli import main
from distprune.core.data import cifar
from distprune.report.tables import show_result
from distprune.store.folder import RunFolder

DIGITS = yaml.safe_load((REPOSITORY / "configs" / "digits.yaml").read_text())
S3 = "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"  # where nobody answers


def _write(path: Path, value: Any) -> str:
    path.write_text(yaml.safe_dump(value))
    return str(path)


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and error.count("\n") == 1, error
    return error


def _search(tmp_path: Path, capsys: pytest.CaptureFixture[str], **changes: Any) -> str:
    config = _write(tmp_path / "s.yaml", {**DIGITS, "storage": str(tmp_path / "runs"), **changes})
    error = _error(capsys, "search", config)
    assert not (tmp_path / "runs").exists(), "nothing is written before everything is checked"
    return error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limts": {"trials": 3}}, "Unknown key in search: 'limts'. Did you mean 'limits'?"),
        ({"limits": {"trials": 0}}, "search.limits.trials must be above 0, got 0"),
        ({"sampler": "tpee"}, "Unknown sampler 'tpee'. Did you mean 'tpe'?"),
        ({"space": {"paradigm": ["lht"]}}, "Unknown paradigm 'lht'. Did you mean 'lth'?"),
        ({"space": {"sparsty": 0.5}}, "Unknown key in space: 'sparsty'. Did you mean 'sparsity'?"),
        ({"space": {"sparsity": [0.5, 1.0]}}, "space.sparsity must be in [0, 1), got 1.0. To keep 5 % of the weights write 0.95."),
        ({"space": {"sparsity": [0.5, 0.9999]}}, "The largest feasible sparsity is"),
        (
            {"space": {"paradigm": [{"name": "lth", "share": [0.9, 0.1]}]}},
            "with low < high, or three and more values, got [0.9, 0.1]",
        ),
        ({"workers": {"gpus": 64}}, f"workers.gpus must be at most the {torch.cuda.device_count()} GPUs of this machine, got 64"),
        ({"limits": 5}, "search.limits must be a mapping of keys, got 5"),
        ({"seed": -1}, "search.seed must be in [0, 4294967295], got -1"),
        ({"sampler": {"name": "nsga3", "divisions": 0}}, "sampler.divisions must be in [1, 30], got 0"),
        (
            {"scheduler": 3},
            "search.scheduler must be a name or a mapping with 'name' or 'import', got 3. Known: halving, median, none, par",
        ),
        ({"workers": {"gpus": 1.5}}, "search.workers.gpus must be a whole number or a share below 1, got 1.5"),
        ({"name": "../x"}, "search.name must be the name of a new folder, got '../x'"),
        (
            {"recipe": {**DIGITS["recipe"], "paradigm": "lth"}},
            "recipe.paradigm must not be set in a search, got 'lth'. Write it as space.paradigm.",
        ),
        ({"recipe": {**DIGITS["recipe"], "data": {"name": "mnist", "folder": "/nowhere"}}}, "/nowhere"),
        ({"recipe": {**BASE, "model": {"import": "toys:nothing"}}}, "must have trainable weights in one of"),
        ({"recipe": {**DIGITS["recipe"], "model": "vgg_cifar"}}, "model 'vgg_cifar' cannot be built for inputs (1, 8, 8) and 10 classes"),
        ({"report_every": 5}, "search.report_every must be a length with a unit, got 5"),
    ],
)
def test_bad_searches(changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _search(tmp_path, capsys, **changes)


@pytest.mark.parametrize("kind", ["gz", "parquet"])
def test_damaged_data(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "gz":
        for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
            (folder / f"{name}.gz").write_bytes(gzip.compress(b"\0" * 100)[:30])
    else:
        for name in ("train", "test"):
            (folder / f"{name}.parquet").write_bytes(b"PAR1 nonsense PAR1")
    error = _search(tmp_path, capsys, recipe={**DIGITS["recipe"], "data": {"name": "mnist", "folder": str(folder)}})
    assert f"{folder}/" in error


def test_an_existing_run_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "digits"
    run.mkdir(parents=True)
    (run / "search.yaml").write_text("mine")
    config = _write(tmp_path / "s.yaml", {**DIGITS, "storage": str(tmp_path / "runs")})
    error = _error(capsys, "search", config)
    assert f"{run} exists already. Go on with it: distprune resume {run}; or choose another name: --name NAME." in error
    assert (run / "search.yaml").read_text() == "mine"


@pytest.mark.parametrize("command", ["search", "check"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"storage": "{}/file"}, "storage '{}/file' cannot hold the run folder 'digits': not a directory. Write storage: FOLDER"),
        ({"storage": "/proc/x"}, "storage '/proc/x' cannot hold the run folder"),
        ({"storage": "s3://k:s@bucket/runs"}, "search.storage must hold no credentials, as it is written into run folders"),
        ({"storage": S3}, f"storage '{S3}' cannot hold the run 'digits': no store answers there. Check the URL, and that the environment"),
        ({"cache": {"path": S3}}, f"cache.path '{S3}' cannot be used: no store answers there. Give a folder, or write cache: false."),
        ({"name": "x" * 300}, "file name too long"),
        ({"cache": {"path": "{}/file"}}, "cache.path '{}/file' cannot be used: not a directory. Give a folder, or write cache: false."),
        ({"cache": {"path": "/proc/x"}}, "cache.path '/proc/x' cannot be used"),
        ({"cache": {"path": "foo://b/x"}}, "cache.path 'foo://b/x' cannot be used"),
        ({"report_every": "0.001ep"}, "report_every must be at least one step of 17 an epoch, got '0.001ep'. Write '1it'."),
        ({"recovery": "800%"}, "recovery must be at most a training, "),
    ],
    ids=str,
)
def test_places_that_cannot_be_used_are_said_before_ray_starts(
    command: str, changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("distprune.search.runner.Ray.open", lambda self, search: pytest.fail("Ray is started"))
    text = yaml.safe_dump({**DIGITS, "storage": str(tmp_path / "runs"), **changes}).replace("{}", str(tmp_path))
    (tmp_path / "s.yaml").write_text(text)
    assert message.replace("{}", str(tmp_path)) in _error(capsys, command, str(tmp_path / "s.yaml"))
    assert {path.name for path in tmp_path.iterdir()} == {"file", "s.yaml"}


def test_check_leaves_nothing_behind_and_says_what_stands_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {**DIGITS, "storage": str(tmp_path / "a" / "runs"), "cache": {"path": str(tmp_path / "b" / "cache")}, "workers": {"gpus": 64}}
    config = _write(tmp_path / "s.yaml", value)
    assert main(["check", config]) == 0
    output = capsys.readouterr().out
    assert "Not on this machine: workers.gpus must be at most" in output and "exists already" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["s.yaml"]
    (tmp_path / "a" / "runs" / "digits" / "masks").mkdir(parents=True)
    assert main(["check", config]) == 0
    assert f"{tmp_path / 'a' / 'runs' / 'digits'} exists already: a new search wants another name, --name NAME." in capsys.readouterr().out


def test_the_next_limit_does_not_count_repeats_of_finalists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"repeat_of": None, "ended": "finished"}] * 8 + [{"repeat_of": 3, "ended": "finished"}] * 6
    rows = [{**dict.fromkeys(("reason", "cost", "spent", "saved", "violated", "round_of")), **row} for row in rows]
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("runs/x")).create()
    folder.search_yaml.write_text("search: {}\n")
    found: Any = SimpleNamespace(folder=folder, pareto=lambda: [], trials=SimpleNamespace(to_pylist=lambda: rows, __len__=lambda: 14))
    show_result(found)
    assert "resume runs/x --trials 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "nowhere.yaml"], "Cannot read nowhere.yaml: No such file or directory"),
        (["resume", "nowhere"], "nowhere is not a run folder: it has no search.yaml"),
        (["report", "nowhere"], "nowhere is not a run folder"),
        (["export", "nowhere", "--to", "x"], "nowhere is not a run folder"),
        (["list", "criterium"], "Unknown table 'criterium'. Did you mean 'criterion'?"),
        (["serach"], "No such command 'serach'"),
        (["search"], "Missing argument 'config'. See 'distprune search --help'."),
        (["search", "x.yaml", "--trials", "many"], "Invalid value for '--trials': Input should be a valid integer"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in _error(capsys, *arguments)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"paradigm": {"name": "lth", "share": 0}}, [], "share must be in (0, 1], got 0.0"),
        ({"paradigm": {"name": "gradual", "updates": 0}}, [], "paradigm.updates must be at least 1, got 0"),
        ({"regularizer": {"name": "growing_l2", "every": 0}}, [], "regularizer.every must be at least 1, got 0"),
        ({"data": {"import": "toys:recipe"}}, [], "data 'import:toys:recipe' must return a distprune.Dataset, got Recipe"),
        ({"data": {"import": "toys:tensors"}}, [], "data 'import:toys:tensors' cannot be loaded: TypeError"),
        ({"train": {"length": "1ep", "optimizer": {"name": "sgd", "lr": 1e12}}}, [], "loss is not finite at step"),
        ({}, ["--device", "tpu9"], "device must be one that torch can use here, got 'tpu9'"),
    ],
)
def test_bad_recipes(
    changes: dict[str, Any], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = {**BASE, "paradigm": "at_init", "sparsity": 0.5, "allocator": "erk", **changes}
    assert message in _error(capsys, "run", _write(tmp_path / "r.yaml", value), *arguments)


def test_sigterm_ends_a_search_as_ctrl_c_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cleared = []

    def search(config: Path, *, listen: Any, **_: Any) -> None:
        of_it = SimpleNamespace(minimize=[], limits=SimpleNamespace(trials=1))
        setup = SimpleNamespace(search=of_it, space=SimpleNamespace(axes={}), total=1, mean_cost=1)
        listen("running", {"setup": setup, "found": {"ended": 0, "told now": 0}, "folder": RunFolder(tmp_path)})
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it goes on")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not disturb the clearing up
            cleared.append(True)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("distprune.api.search", search)
    assert main(["search", "s.yaml"]) == 143 and cleared
    assert f"Interrupted; nothing is lost. Go on with: distprune resume {tmp_path}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_jobs_take_what_is_for_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--pip", "x.txt"], ["--uv", "x.txt"], ["--no-follow"]):
        assert "give the dashboard, --address http://HEAD:8265" in _error(capsys, "resume", "runs/x", *option)


def test_bad_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("a: [1,\nb: }")
    assert "is not valid YAML" in _error(capsys, "check", str(tmp_path / "a.yaml"))
    (tmp_path / "c.yaml").write_bytes(bytes(range(256)))
    assert "it is not text" in _error(capsys, "check", str(tmp_path / "c.yaml"))
    (tmp_path / "d.yaml").write_text("name: 2020-99-99\n")
    assert "is not valid YAML" in _error(capsys, "check", str(tmp_path / "d.yaml"))
    (tmp_path / "b.yaml").write_text("- 1\n")
    assert "must hold a mapping of keys, got list" in _error(capsys, "check", str(tmp_path / "b.yaml"))


def test_plan_shows_stages_sparsity_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(REPOSITORY / "configs" / "recipe.yaml")]) == 0
    output = capsys.readouterr().out
    assert output.count("Train") == 6 and output.count("SetWeights") == 4
    assert "0.5000" in output and "0.8750" in output and "0.9000" in output and "samples at most" in output


def test_run_trains_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {**BASE, "paradigm": "at_init", "sparsity": 0.5, "allocator": "erk", "model": "mlp"}
    assert main(["run", _write(tmp_path / "r.yaml", value), "--to", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert "100%" in output and "finished: accuracy" in output
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"masks.safetensors", "weights.safetensors", "model.py", "manifest.json"}


def test_list_shows_options_paper_and_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for name in ("magnitude", "per_layer", "growing_l2", "at_init", "resnet_cifar", "fashion_mnist", "nsga2", "pareto_halving"):
        assert f"  {name}" in output
    assert "batches = 1 (searched over [1, 4])" in output and "arXiv:1810.02340" in output and "distprune/core/criteria/snip.py" in output


@pytest.fixture(scope="module")
def read_once() -> Iterator[None]:
    """Large files are read once for all configurations that name them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "read", functools.cache(cifar.read))
        yield


@pytest.mark.usefixtures("read_once")
@pytest.mark.parametrize("config", sorted((REPOSITORY / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    value = yaml.safe_load(config.read_text())
    data = value.get("recipe", value)["data"]
    if isinstance(data, dict) and not Path(data.get("folder", "")).exists():
        pytest.skip(f"needs {data['folder']}")
    assert main(["check", str(config)]) == 0
    assert "It is valid." in capsys.readouterr().out


def test_check_says_what_is_excluded_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(REPOSITORY / "configs" / "digits.yaml")]) == 0
    assert "Excluded: allocator global: allocator 'global' ranks scores" in capsys.readouterr().out
