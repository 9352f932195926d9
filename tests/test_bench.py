"""`distprune bench`: what it measures, on a clock of the tests' own, and what it says of it; then the command on a real export."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import BASE

import distprune as dp
from distprune.cli import main
from distprune.core.masks import Masks
from distprune.errors import UserError
from distprune.export import bench as benching
from distprune.report.bench import bench_table

NOW = [0.0]


class Timed(nn.Module):
    """A linear layer from 8 numbers that takes a time by the clock of the tests: `fixed` and `each` for every input."""

    def __init__(self, out: int, fixed: float, each: float) -> None:
        super().__init__()
        self.inner, self.fixed, self.each = nn.Linear(8, out, bias=False), fixed, each

    def forward(self, inputs: Tensor) -> Tensor:
        NOW[0] += self.fixed + self.each * len(inputs)
        return self.inner(inputs)


@dataclass
class Stub:
    """As an `Export` shows itself."""

    made: dict[str, Any]
    masks: Masks
    formats: dict[str, Any] = field(default_factory=dict)
    path: Path = Path("out")

    @property
    def networks(self) -> tuple[str, ...]:
        return tuple(self.made)

    @property
    def manifest(self) -> dict[str, Any]:
        return {"formats": self.formats}

    def network(self, name: str, *, device: str) -> Callable[[Tensor], Tensor]:
        assert device == "cpu"
        if isinstance(self.made[name], str):
            raise UserError(self.made[name])
        return self.made[name]

    def masked(self) -> nn.Module:
        return self.made["dense"]

    def inputs(self, count: int) -> Tensor:
        return torch.ones(count, 8)


def _mask(kept: int) -> Masks:
    """Of a layer of 16 units with 8 inputs each: the first `kept` units."""
    mask = torch.zeros(16, 8, dtype=torch.bool)
    mask[:kept] = True
    return Masks({"inner.weight": mask})


def _bench(stub: Stub, **options: Any) -> benching.Bench:
    return benching.bench(stub, **{"batches": (1, 8), "clock": lambda: NOW[0], **options})  # type: ignore[arg-type]


def _channels(fixed: float = 0.0) -> Stub:
    """A quarter of the units left: slim takes a quarter of the time for each input, besides what a call costs."""
    dense, masked, slim = Timed(16, fixed, 4.0), Timed(16, fixed, 4.0), Timed(4, fixed, 1.0)

    def opaque(inputs: Tensor) -> Tensor:
        NOW[0] += fixed + len(inputs)
        return inputs

    return Stub({"dense": dense, "masked": masked, "slim": slim, "onnx": opaque}, _mask(4), {"onnx": {"of": "slim"}})


def test_shares_of_the_dense_networks_time_and_flops() -> None:
    found = _bench(_channels(fixed=4.0))
    assert [(timing.batch, timing.network) for timing in found.timings] == [
        (b, n) for b in (1, 8) for n in ("dense", "masked", "slim", "onnx")
    ]
    for timing in found.timings:
        each = {"dense": 4.0, "masked": 4.0, "slim": 1.0, "onnx": 1.0}[timing.network]
        seconds, dense = 4.0 + each * timing.batch, 4.0 + 4.0 * timing.batch
        assert timing.ms == pytest.approx(1e3 * seconds) and timing.share == pytest.approx(seconds / dense)
        assert timing.low == timing.share == timing.high and not timing.restless
        assert timing.flops == {4.0: 1.0, 1.0: 0.25}[each], "onnx has those of the network that it holds"
        assert timing.speedup == pytest.approx(dense / seconds)
        assert timing.kept_promise == pytest.approx(dense / seconds / 4 if each == 1 else 1.0)
    assert found.density == 0.25 and found.kept_flops == 0.25 and found.threads == torch.get_num_threads()
    assert json.loads(json.dumps(found.plain()))["timings"][2]["network"] == "slim"


def test_it_says_that_a_mask_alone_brings_no_speed_and_what_would() -> None:
    whole = _channels()
    lines = _bench(whole).lines()
    assert lines[0] == (
        "The mask brings no speed: it keeps 25.0% of the weights (25.0% of the FLOPs), and masked takes of dense's time 1.00 at batch 1, "
        "1.00 at batch 8, as zeros are multiplied like other numbers."
    )
    assert "At batch 8 slim is 4.00 times as fast as dense with 1/4.00 of its FLOPs: 1.00 of what these promise." in lines
    assert not any("What would help" in line for line in lines) and any(line.startswith("onnx runs in onnxruntime:") for line in lines)
    scattered = replace(whole, made={**whole.made, "slim": Timed(16, 0.0, 4.0)})
    lines = _bench(scattered).lines()
    assert "At batch 1 slim is the dense network: the masks empty no channel that could be taken out." in lines
    assert any(line.startswith("What would help: masks of whole channels (granularity: filter), exported as slim; or") for line in lines)
    without = replace(whole, made={name: whole.made[name] for name in ("dense", "masked")})
    assert any(line.startswith("What would help") for line in _bench(without).lines())
    unpruned = replace(without, masks=_mask(16))
    assert not any("mask" in line for line in _bench(unpruned).lines() if not line.startswith("Not measured"))


def test_it_says_where_fixed_costs_eat_the_gain() -> None:
    lines = _bench(_channels(fixed=1000.0)).lines()
    assert "At batch 1 slim is 1.00 times as fast as dense with 1/4.00 of its FLOPs: no speed. The fixed cost of each call" in "\n".join(
        lines
    )


def test_a_mask_that_is_faster_all_the_same_is_not_said_to_be_slow() -> None:
    whole = _channels()
    lines = _bench(replace(whole, made={**whole.made, "masked": Timed(16, 0.0, 3.0)})).lines()
    assert lines[0].startswith("The mask keeps 25.0% of the weights") and "0.75 at batch 1" in lines[0] and "It skips nothing" in lines[0]


def test_a_restless_machine_is_named() -> None:
    whole = _channels()
    passes = iter(range(10**6))

    def restless(inputs: Tensor) -> Tensor:
        NOW[0] += 1.0 + next(passes) % 4
        return inputs

    found = _bench(replace(whole, made={**whole.made, "slim": restless}))
    assert "Quartiles far apart: slim at batch 1, slim at batch 8. Something else ran: measure again on a quiet machine." in found.lines()
    assert [timing.network for timing in found.timings if timing.restless] == ["slim", "slim"]
    assert all(timing.flops is None for timing in found.of("slim")), "it has no layer"


def test_forms_that_cannot_run_here_are_left_out_with_the_reason() -> None:
    whole = _channels()
    found = _bench(replace(whole, made={**whole.made, "2:4": "Packed 2:4 layers run on GPUs."}))
    assert found.left_out["2:4"] == "Packed 2:4 layers run on GPUs." and not found.of("2:4")
    assert found.left_out["pt2"] == "This export does not hold it." and "Not measured: 2:4. Packed 2:4 layers run on GPUs." in found.lines()
    with pytest.raises(UserError, match="no weights"):
        _bench(replace(whole, made={**whole.made, "masked": "no weights"}))


def test_half_precision_is_compared_with_half_precision() -> None:
    """2:4 computes in half: its gain is over the dense network in half, not over that in full."""
    whole = _channels()
    stub = replace(whole, made={**whole.made, "2:4": Timed(16, 0.0, 1.5)})
    stub.build = lambda edited: Timed(16, 0.0, 2.0)  # type: ignore[attr-defined]
    found = _bench(stub)
    assert [timing.share for timing in found.of("dense half")] == [0.5, 0.5]
    assert "At batch 8 2:4, in half precision, takes 0.75 of the dense network's time in half." in found.lines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": ()}, "batch must be different sizes of at least 1, got none"),
        ({"batches": (0, 1)}, "batch must be different sizes of at least 1, got 0, 1"),
        ({"batches": (8, 8)}, "batch must be different sizes of at least 1, got 8, 8"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"rounds": 3}, "rounds must be at least 4, as quartiles are read from them, got 3"),
        ({"device": "tpu9"}, "device must be one that torch can use here, got 'tpu9'"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _bench(_channels(), **options)


def test_threads_are_set_while_it_measures_and_then_as_before() -> None:
    seen = []
    whole = _channels()

    def network(inputs: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return inputs

    assert _bench(replace(whole, made={**whole.made, "onnx": network}), threads=2).threads == 2
    assert set(seen) == {2} and torch.get_num_threads() == 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    recipe = {**BASE, "model": {"name": "lenet5", "width": 0.5}, "paradigm": "at_init", "granularity": "filter", "sparsity": 0.7}
    outcome = dp.run({**recipe, "allocator": "uniform", "train": {**BASE["train"], "length": "4it"}})
    return outcome.export(tmp_path_factory.mktemp("bench") / "out", formats=["slim"])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "BLOCK_S", 1e-4)


def test_the_command_on_a_real_export(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: None) -> None:
    to = tmp_path / "numbers.json"
    assert main(["bench", str(exported), "--batch", "1,4", "--threads", "1", "--rounds", "5", "--to", str(to)]) == 0
    output, numbers = capsys.readouterr().out, json.loads(to.read_text())
    assert numbers["rounds"] == 5 and numbers["threads"] == 1 and numbers["versions"]["torch"] and numbers["hardware"]
    rows = numbers["timings"]
    assert [(row["batch"], row["network"]) for row in rows] == [(b, n) for b in (1, 4) for n in ("dense", "masked", "slim")]
    for row in rows:
        assert row["ms"] > 0 and 0 < row["low"] <= row["share"] <= row["high"]
        assert row["flops"] == (1.0 if row["network"] in ("dense", "masked") else rows[2]["flops"])
        assert re.search(rf"{row['batch']} . {row['network']} ", output), "each row is in the table"
    assert 0.2 < rows[2]["flops"] < 0.6 and numbers["kept_flops"] == pytest.approx(rows[2]["flops"], abs=0.02)
    assert "zeros are multiplied like other numbers" in output and "Not measured: onnx. This export does not hold it." in output
    said = " ".join(output.split())  # a title is wrapped to the width of its table, and the folder's name may be long
    assert "1 thread: medians and quartiles of 5 rounds in turn" in said and "batch 4: dense" in said
    assert all(line in output.replace("\n", " ") for line in numbers["lines"])


def test_it_is_the_python_function_too(exported: Path, quick: None) -> None:
    heard: list[str] = []
    found = dp.bench(exported, batches=[2], rounds=4, listen=lambda event, facts: heard.append(event))
    assert heard == ["loading"] * 3 + ["round"] * 4 + ["measured"]
    assert bench_table(found).row_count == 3 and found.plain()["threads"] == 1


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["bench", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("Error: ") and output.err.count("\n") == 1 and not output.out, output
    return output.err


def test_mistakes_are_one_line(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken.json").write_text("mine")
    assert "is not an export" in _error(capsys, str(tmp_path))
    assert "--batch must be whole numbers with commas between, got '1;64'" in _error(capsys, str(exported), "--batch", "1;64")
    assert "batch must be different sizes" in _error(capsys, str(exported), "--batch", "0")
    assert "taken.json exists already" in _error(capsys, str(exported), "--to", str(tmp_path / "taken.json"))
    assert "device must be one that torch can use here, got 'gpu'" in _error(capsys, str(exported), "--device", "gpu")
    assert (tmp_path / "taken.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_damaged_export_is_not_measured(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(exported, tmp_path / "copy")
    raw = bytearray((copy / "slim.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "slim.safetensors").write_bytes(raw)
    assert "slim.safetensors is not the file that was exported" in _error(capsys, str(copy))
