"""The examples run as they are and find what they say; a newcomer gets from a folder of images to masks with one short file."""

import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from toys import REPOSITORY

import distprune as dp
from distprune.cli import main
from distprune.core.masks import prunable
from distprune.store.reports import read

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In a folder of the test's own, and back; modules are looked for as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What an example prints."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_prune_my_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run("prune_my_model.py", capsys)
    rows = re.findall(r"(\w+).* accuracy (\S+) +(\S+) weights", text)
    found = {name: (float(accuracy), int(kept.replace(",", ""))) for name, accuracy, kept in rows}
    total = 64 * 256 + 256 * 128 + 128 * 10
    assert found["dense"][1] == total and found["pruned"][1] == found["fine"][1] == round(0.03 * total), "none came back in two epochs"
    assert found["dense"][0] > 0.9 and found["fine"][0] > found["pruned"][0] + 0.1 and found["fine"][0] > 0.85
    assert dp.Masks.load(here / "masks.safetensors").kept == found["fine"][1]
    [sizes] = re.findall(r"([\d,]+) parameters become ([\d,]+)", text)
    before, after = (int(size.replace(",", "")) for size in sizes)
    assert before == total + 256 + 128 + 10 and after < 0.55 * before


def test_the_ten_lines_are_ten() -> None:
    text = (EXAMPLES / "prune_my_model.py").read_text()
    part = text.split("# --- the ten lines")[1].split("# ------")[0]
    lines = [line for line in part.splitlines()[1:] if line.strip() and not line.startswith("#")]
    assert 5 <= len(lines) <= 10 and any("dp.prune" in line for line in lines)


def test_masks_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run("masks_elsewhere.py", capsys)
    kept = round(0.1 * (64 * 32 + 32 * 10))
    assert f"{kept} weights kept, sparsity 0.8999" in text
    assert f"a network of my own: {kept} weights kept" in text
    assert f"elsewhere: {kept} of {64 * 32 + 32 * 10} weights kept, distprune imported: False" in text
    assert "the export holds masks, weights" in text
    assert "refused: FOLDER/out/weights.safetensors is not the file that was exported" in text
    assert not list(here.iterdir())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_search_my_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run("search_my_data.py", capsys)
    [(trials, front)] = re.findall(r"(\d+) trials, (\d+) of them on the front", text)
    rows = re.findall(r"trial (\d+): +([\d.]+)% of the weights, validation ([\d.]+), test ([\d.]+)", text)
    assert int(trials) >= 8 and len(rows) == int(front) >= 1
    assert all(float(test) > 0.5 for *_, test in rows), "ten classes"
    assert re.search(r"the best with at most 30 %: trial \d+, \w+, Masks\(2 layers, kept", text) and "taken along to" in text
    assert not list(here.iterdir())


def photos(folder: Path) -> None:
    """Three classes of pictures of 40x30 that a small network can tell apart: by where they are bright."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("cats", "dogs", "owls")):
        (folder / name).mkdir(parents=True)
        for number in range(40):
            pixels = draw.integers(0, 120, (30, 40, 3), np.uint8)
            pixels[10 * label : 10 * label + 10] += 130
            Image.fromarray(pixels).save(folder / name / f"{number}.jpg", quality=90)


def curves(folder: Path, trial: int) -> list[int]:
    """The steps at which TensorBoard has the objective of a trial."""
    from tensorboardX.proto.event_pb2 import Event

    found: list[int] = []
    for path in sorted((folder / "logs" / "tensorboard" / str(trial)).glob("events.out.tfevents.*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = Event.FromString(data[position + 12 : position + 12 + length])
            found += [event.step for value in event.summary.value if value.tag == "ray/tune/objective"]
            position += length + 16
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_from_own_network_and_own_photos_to_masks_with_one_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("mine.py", "photos.yaml"):
        shutil.copy(EXAMPLES / "photos" / name, here)
    text = Path("photos.yaml").read_text() + "log: [tensorboard]\n"
    Path("photos.yaml").write_text(text)
    assert len(text.strip().splitlines()) <= 15
    recipe = yaml.safe_load(text)["recipe"]
    assert recipe["model"] == {"import": "mine:network"} and recipe["data"]["name"] == "image_folder"
    photos(Path("photos"))

    def command(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    assert command("check", "photos.yaml").strip().endswith("It is valid.") and not Path("runs").exists()
    assert "Pareto front of" in command("search", "photos.yaml", "--trials", "4")
    assert "exported to" in command("export", "runs/photos", "--to", "out")

    masks = dp.Masks.load("out/masks.safetensors")
    module: dict[str, Any] = {}
    exec(Path("mine.py").read_text(), module)
    network = masks.apply_(module["network"]((3, 32, 32), 3))
    assert sum(int(weight.count_nonzero()) for weight in prunable(network).values()) == masks.kept <= 0.21 * masks.total
    assert dp.Result("runs/photos").best().row["test"] > 0.6, "three classes that are easy to tell apart"
    rows = sorted((row["trial"], row["index"], row["cost"]) for row in read("runs/photos/reports.arrows").to_pylist())
    for trial in {trial for trial, _, _ in rows}:
        assert curves(Path("runs/photos"), trial) == [int(cost) for number, _, cost in rows if number == trial]
