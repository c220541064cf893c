"""Record what mergekit 0.1.5 makes of the recipes in tests/mergekit/recipes, for tests/mergekit/test_recipes.py.

Run it by hand in an environment of its own that holds mergekit==0.1.5 (no test imports mergekit):

    PYTHONPATH=tests/mergekit python tests/mergekit/data/make_recipe_answers.py

Every recipe goes through mergekit-yaml (or mergekit-multi, where it has several documents) with ``dtype`` float32. Of
every tensor its shape's size, its norm and two random projections are stored; of random methods nothing is.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from named_models import fingerprint, names_in, write
from safetensors import safe_open

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
OUT = HERE / "recipe_answers.npz"
#: What draws random numbers.
RANDOM = (
    "dare_ties-three", "dare_ties-gradients", "dare_linear-two", "della-two", "della_linear-card",
)  # fmt: skip


def in_float32(recipe: str) -> str:
    """Return a recipe's text with float32 as its dtype."""
    return re.sub(r"^out_dtype: .*\n", "", re.sub(r"^dtype: .*$", "dtype: float32", recipe, flags=re.M), flags=re.M)


def main() -> None:
    """Write the file."""
    from click.testing import CliRunner  # pyright: ignore
    from mergekit.scripts.multimerge import main as multi  # pyright: ignore
    from mergekit.scripts.run_yaml import main as single  # pyright: ignore

    wanted = sys.argv[1:]
    found = dict(np.load(OUT)) if wanted and OUT.exists() else {}
    for path in sorted(RECIPES.glob("*.yml")):
        if path.stem in RANDOM or (wanted and path.stem not in wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            text = in_float32(path.read_text(encoding="utf-8"))
            for name in names_in(text):
                write(Path(folder), name)
            Path("recipe.yml").write_text(text, encoding="utf-8")
            options = [
                "--lora-merge-cache",
                f"{folder}/cache",
                "--quiet",
                "--no-write-model-card",
            ]  # a card asks the hub
            stages = ["--intermediate-dir", "stages", "--out-path", "out"]
            staged = "\n---\n" in text
            result = CliRunner().invoke(
                multi if staged else single, ["recipe.yml", *(stages if staged else ["out"]), *options]
            )
            if result.exit_code:
                print(f"{path.stem}: {result.exception!r} {result.output[-300:]}")  # noqa: T201
                continue
            prints: dict[str, list[float]] = {}
            for file in Path("out").glob("*.safetensors"):
                with safe_open(file, "np") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - no mapping
                        value = tensors.get_tensor(name)
                        prints[name] = [value.size, *fingerprint(name, value)]
            found[path.stem] = np.array(list(prints.values()))
            found[f"{path.stem}|names"] = np.array("\n".join(prints))
            print(path.stem, len(prints))  # noqa: T201
            os.chdir("/")
    np.savez_compressed(OUT, **found)


if __name__ == "__main__":
    main()
