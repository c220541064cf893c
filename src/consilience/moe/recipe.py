"""What a mixture of experts is built from, as data. A mergekit-moe file is a valid recipe."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from consilience.errors import InputError, nearest
from consilience.recipe.schema import Closed, DtypeName, Name, PathText, explain

#: What routers are made of; see ``gates``. The first six are mergekit's.
GATE_MODES = (
    "hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random", "mlp_input", "mlp_input_last",
)  # fmt: skip
RANDOM = ("random", "uniform_random")


def _text(prompt: str) -> str:
    if not prompt.strip():
        raise ValueError("must not be empty; write some text")
    return prompt


Prompts = list[Annotated[str, AfterValidator(_text)]]


class MoeExpert(Closed):
    """One expert: a model whose MLPs it has, and prompts that are (and are not) to be routed to it."""

    source_model: PathText
    name: Name | None = None
    positive_prompts: Prompts | None = None
    negative_prompts: Prompts | None = None
    noise_scale: float | None = None
    residual_scale: float | None = Field(default=None, allow_inf_nan=False)


class MoeRecipe(Closed):
    """A mixture: the base, from which all but MLPs comes, the experts, and what their routers are made of."""

    base_model: PathText
    experts: list[MoeExpert] = Field(min_length=1, max_length=1000)
    gate_mode: str = "hidden"
    dtype: DtypeName = None
    experts_per_token: int = Field(default=2, ge=1)
    shared_experts: list[MoeExpert] = Field(default_factory=list[MoeExpert], max_length=100)
    architecture: str | None = Field(default=None, min_length=1)
    seed: int = Field(default=0, ge=0)


def is_moe(value: Any) -> bool:
    """Whether plain values are a mixture's recipe rather than a merge's."""
    return isinstance(value, dict) and "experts" in value and not {"merge_method", "method", "models"} & value.keys()


def parse_moe_recipe(value: dict[str, Any], where: str) -> MoeRecipe:
    """Validate a recipe given as plain values.

    Raises:
        InputError: names the first key that is wrong, and the nearest known one.
    """
    given = {key: item for key, item in value.items() if not (key == "shared_experts" and item is None)}
    try:
        recipe = MoeRecipe.model_validate(given)
    except ValidationError as error:
        parts = {"": MoeRecipe, "experts": MoeExpert, "shared_experts": MoeExpert}
        raise explain(error, where, parts) from None
    _check_gates(recipe, where)
    return recipe


def _check_gates(recipe: MoeRecipe, where: str) -> None:
    """Refuse what routers cannot be made of."""
    mode = recipe.gate_mode
    if mode not in GATE_MODES:
        hint = nearest(mode, GATE_MODES) or f"; use one of {', '.join(GATE_MODES)}"
        raise InputError(f"{where}: gate_mode {mode!r} is unknown{hint}")
    if recipe.experts_per_token > len(recipe.experts):
        raise InputError(
            f"{where}: experts_per_token: {recipe.experts_per_token} of {len(recipe.experts)} experts; name more "
            "experts, or lower it"
        )
    for key, experts in (("experts", recipe.experts), ("shared_experts", recipe.shared_experts)):
        for number, expert in enumerate(experts):
            place = f"{where}: {key}.{number}"
            if expert.noise_scale:
                raise InputError(f"{place}.noise_scale: noise is not added to experts in this version; leave it out")
            if expert.negative_prompts and not expert.positive_prompts:
                raise InputError(f"{place}: negative_prompts without positive_prompts; add some")
            if mode not in RANDOM and not expert.positive_prompts and key == "experts":
                raise InputError(
                    f"{place}: positive_prompts are missing, of which gate_mode {mode!r} makes its router; add some, "
                    "or use gate_mode: random"
                )
    prompts = [(tuple(one.positive_prompts or ()), tuple(one.negative_prompts or ())) for one in recipe.experts]
    if mode not in RANDOM and len(prompts) > 1 and len(set(prompts)) == 1:
        raise InputError(
            f"{where}: all experts have the same prompts, so that no router could tell them apart; give each prompts "
            "of what it is for"
        )


def plain_recipe(recipe: MoeRecipe, names: list[str]) -> dict[str, Any]:
    """Return a recipe as plain values, with every expert's name and the seed written out."""
    value: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    value |= {"gate_mode": recipe.gate_mode, "experts_per_token": recipe.experts_per_token, "seed": recipe.seed}
    for entry, name in zip([*value["experts"], *value.get("shared_experts", [])], names, strict=True):
        entry["name"] = name
    return value
