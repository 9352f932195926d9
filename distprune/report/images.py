"""Each figure of a page as a PNG, and its numbers as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from distprune.errors import UserError
from distprune.report.drawn import Drawn
from distprune.store import files

WIDTH, SCALE = 900, 2  # pixels, and how many of the image each is


def check_target(to: str | Path) -> None:
    """Raise UserError if `to` is there already and not an empty folder."""
    target = Path(to)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--to must be a new or empty folder, {target} exists already. Choose another.")


def write(drawn: Sequence[Drawn], to: str | Path) -> list[str]:
    """Write `NAME.csv` of every figure that has numbers and `NAME.png` of every one that is drawn; returns lines that say what was written.

    Images take kaleido and a Chrome or Chromium; where one of them is missing, the line says so and the tables are written all the same.
    """
    check_target(to)
    target = Path(to)
    target.mkdir(parents=True, exist_ok=True)
    tables = [one for one in drawn if one.rows]
    for one in tables:
        files.publish(target / f"{one.name}.csv", _csv(one).encode())
    lines = [f"{len(tables)} tables: {target}/*.csv"]
    charts = [one for one in drawn if one.figure is not None]
    if charts:
        missing = _images(charts, target)
        lines.append(f"No images: {missing}" if missing else f"{len(charts)} images: {target}/*.png")
    return lines


def _csv(one: Drawn) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(one.columns)
    writer.writerows(one.rows)
    return text.getvalue()


def _images(charts: Sequence[Drawn], target: Path) -> str:
    """Write the images; returns what is missing for it, empty if nothing is."""
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError:
        return 'they take kaleido. Install it: pip install "distprune[images]"'
    specs = [
        {
            "fig": one.figure,
            "path": target / f"{one.name}.png",
            "opts": {"format": "png", "width": WIDTH, "height": one.figure.layout.height or 400, "scale": SCALE},
        }
        for one in charts
        if one.figure is not None
    ]

    try:
        kaleido.write_fig_from_object_sync(specs, cancel_on_error=True, kopts={"mathjax": False})  # else it fetches a script from the net
    except ChromeNotFoundError:
        return "kaleido found no Chrome or Chromium. Install one, or name it in BROWSER_PATH."
    except Exception as error:  # the browser is another program: what goes wrong with it must not cost the tables
        return f"the browser of kaleido failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})."
    return ""
