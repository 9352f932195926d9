"""What a result was made with: versions, commit and machine."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("distprune", "torch", "ray", "optuna", "pyarrow")


def environment() -> dict[str, str]:
    """Versions of the installed packages, commit of this checkout, Python and machine."""
    facts = {}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            continue  # core runs with torch alone
    return {**facts, "python": platform.python_version(), "machine": platform.machine(), "commit": _commit()}


def _commit() -> str:
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"  # installed from a wheel; a repository around it would be another one's
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=root, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
