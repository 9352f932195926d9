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
    """The recipe, as YAML that `distprune run` runs again."""
    import yaml

    plain = source.run.recipe.plain()
    text = f"# Makes this network again: {command(f'run {FILE}')}\n"
    (folder / FILE).write_text(text + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    if Recipe.read(read_yaml(folder / FILE)).plain() != plain:
        raise RuntimeError(f"{FILE} reads as another recipe than the trial's.")
    return Written(files=(FILE,), facts={"exact": True})
