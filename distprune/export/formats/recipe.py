"""The recipe that made the network."""

from pathlib import Path

from distprune.core.config import read_yaml
from distprune.core.recipe import Recipe
from distprune.errors import command
from distprune.export.source import Source, Written
from distprune.export.tables import format

FILE = "recipe.yaml"


@format("recipe", plain=True)
def recipe(source: Source, folder: Path) -> Written:
    """The recipe, as YAML that `distprune run` runs again: to its end, also where the network was stopped before."""
    import yaml

    run, state = source.run, source.run.state
    plain, what, notes = run.recipe.plain(), "Makes this network again", list[str]()
    if state.stage < len(run.plan.stages):
        what = f"Its full training; this network was stopped at report {state.reports}"
        notes.append(f"{what}.")
    text = f"# {what}: {command(f'run {FILE}')}\n"
    (folder / FILE).write_text(text + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    if Recipe.read(read_yaml(folder / FILE)).plain() != plain:
        raise RuntimeError(f"{FILE} reads as another recipe than the trial's.")
    return Written(files=(FILE,), notes=notes, facts={"exact": True})
