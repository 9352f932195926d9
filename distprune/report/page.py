"""`report.html`: one file that holds all it needs, for a browser on a desk or in a hand."""

import base64
import hashlib
import html
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from distprune.errors import UserError
from distprune.report import headline, sections
from distprune.report.data import Data
from distprune.report.drawn import FONT, PALETTE, Drawn
from distprune.report.figures import FIGURES
from distprune.store import files

EVERY_S = 5.0  # between two pages of a search that runs
_ASSETS = Path(__file__).parent / "assets"


def draw(data: Data) -> list[Drawn]:
    """All figures of a search."""
    return [one(data) for one in FIGURES]


def page(data: Data, drawn: Sequence[Drawn], *, live: bool = False, now: float | None = None) -> str:
    """The whole file. A live one reads itself again every few seconds; `now` is when it was written (seconds of the epoch)."""
    now = time.time() if now is None else now
    head, place, script = ((_ASSETS / f"{name}.js").read_text() for name in ("head", "place", "page"))
    plotly = get_plotlyjs()
    facts = {
        "figures": {one.name: json.loads(one.figure.to_json()) for one in drawn if one.figure is not None},
        "dark": {light: dark for light, dark in PALETTE.values()},
        "live": {"every": EVERY_S, "written": now} if live else None,
    }
    # Nothing but the scripts that are hashed here can run, and nothing can be fetched, whatever names and messages hold.
    hashes = " ".join(map(_hash, (head, place, plotly, script)))
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    title = html.escape(f"{data.name} · distprune")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{title}</title>",
            f"<script>{head}</script>",
            f"<style>{_style()}</style>",
            "</head>",
            "<body>",
            headline.header(data, drawn, now, live=live),
            "<main>",
            headline.cards(data),
            *(sections.figure(data, one) for one in drawn),
            sections.environment(data),
            "</main>",
            sections.footer(data),
            f'<script type="application/json" id="figures">{_json(facts)}</script>',
            f"<script>{place}</script>",
            f"<script>{plotly}</script>",
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def write(data: Data, drawn: Sequence[Drawn], *, live: bool = False) -> Path:
    """Write `report.html` of a run folder, at once, and return where it is. Raises UserError where it cannot be."""
    path = data.folder.report_html
    try:
        files.publish(path, page(data, drawn, live=live).encode(), wait=False)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}. Make room, or copy the run to a folder of your own.") from error
    return path


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(facts: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(facts, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _style() -> str:
    colours = {f"{name}_{theme}": colour for name, pair in PALETTE.items() for theme, colour in zip(("light", "dark"), pair, strict=True)}
    return (_ASSETS / "page.css").read_text() % {**colours, "font": FONT}
