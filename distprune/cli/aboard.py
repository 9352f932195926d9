"""Runs on the head, in front of what a job runs: `submit` and `resume` send this file along, so that it is never of another version.

It looks whether distprune is there, and the one that the job was made for; it keeps what was sent beside the run folder, for later jobs
that go on with the search from anywhere; and it passes on the exit code.
"""

import json
import os
import platform
import shutil
import sys

SCRIPT, FACTS = "distprune_job.py", "distprune_job.json"
_SHOWN = ("distprune", "torch", "ray", "python")


def main(arguments: list[str]) -> int:
    """Run a distprune command on the head."""
    with open(FACTS) as file:
        facts = json.load(file)
    theirs = {"distprune": "unknown", **facts["versions"]}
    try:
        from distprune.cli import main as run
        from distprune.environment import environment
    except ImportError as error:
        return _refuse(
            f"{sys.executable} on {platform.node()} has no distprune that can be imported ({error}). On every node: "
            f"pip install 'distprune[cluster]=={theirs['distprune']}'."
        )
    ours = {"distprune": "unknown", **environment()}
    print("head:     ", _line(ours))
    print("submitted:", _line(theirs), flush=True)
    if _minor(ours["distprune"]) != _minor(theirs["distprune"]):
        return _refuse(
            f"the head has distprune {ours['distprune']}, and the job is from {theirs['distprune']}. Install the same, on every node: "
            f"pip install 'distprune[cluster]=={theirs['distprune']}'; or submit it with {ours['distprune']}."
        )
    if keep := facts["keep"]:
        _keep(os.path.expanduser(keep), new=arguments[0] == "search", sent=facts["sent"])
    return run(arguments)


def _line(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _keep(folder: str, *, new: bool, sent: bool) -> None:
    """Put what was sent into `folder`. A search that goes on is run from there: it may have been sent from elsewhere."""
    run = os.path.join(os.path.dirname(os.path.dirname(folder)), os.path.basename(folder))
    if new and os.path.exists(os.path.join(run, "search.yaml")):
        return  # another search has this name, and this one is about to be refused
    try:
        if sent:
            shutil.copytree(".", folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    except OSError as error:
        print(f"Nothing is kept in {folder} ({error}): to go on with this search, send its modules again.", flush=True)
        return
    if not new and os.path.isdir(folder):
        os.chdir(folder)


def _refuse(why: str) -> int:
    print(f"Error: {why}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
