"""How programs call a LoRA's tensors: which module one is of, and which part of its update.

- PEFT: ``base_model.model.X.lora_A.weight``, ``.lora_B.weight``, ``.lora_embedding_A``; with the adapter's name inside.
- diffusers: ``unet.X.lora_A.weight``; before PEFT ``X.lora.down.weight``, ``X.lora_linear_layer.down.weight``,
  ``X.processor.to_q_lora.down.weight``.
- kohya, LyCORIS, ComfyUI: ``lora_unet_X.lora_down.weight``, ``.lora_up.weight``, ``.alpha``, dots of X as ``_`` or as
  they are.
- MLX: ``X.lora_a`` [in, r], ``X.lora_b`` [r, out].
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PEFT = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.(?!weight$|bias$)(?P<adapter>[^.]+))?(\.weight)?"
)
_DOWN_UP = re.compile(r"(?P<module>.+)\.lora(_linear_layer)?[._](?P<side>down|up)\.weight")
_PROCESSOR = re.compile(r"(?P<parent>.+?)(\.processor)?\.(?P<layer>\w+)_lora\.(?P<side>down|up)\.weight")
_MLX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[ab])")
#: What an attention processor's factors are called after, where the layer's own name is another.
_LAYERS = {"to_out": "to_out.0"}
_TEXT_LAYERS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
#: Anything that looks like a factor of a LoRA, however its module is called.
_LIKE = re.compile(r"lora\w*?[._](down|up|[ABab])\b|\.lora_embedding_[AB]")
#: Kinds of update that are not ``scale * B @ A``, by what their tensors are called.
_OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector\b"),
    "LoHa": re.compile(r"\.hada_[wt]\d"),
    "LoKr": re.compile(r"\.lokr_[wt]\d"),
    "LoCon with a middle factor": re.compile(r"\.lora_mid\b"),
    "OFT": re.compile(r"\.oft_(blocks|diag|[rR])\b"),
    "(IA)^3": re.compile(r"^(lora|lycoris)_\w+\.on_input$"),
    "LyCORIS' whole differences": re.compile(r"^(lora|lycoris)_\w+\.(diff|diff_b|w_norm|b_norm)$"),
}
#: What one of these is in every name that the patterns above match.
_HINT = re.compile(r"lora|lycoris|dora_scale|hada_|lokr_|oft_")


@dataclass(frozen=True, slots=True)
class FactorName:
    """The module that a tensor updates and the tensor's part, A, B or alpha.

    ``swapped``: A is stored [in, r] and B [r, out], so that each can stand for the other with the update turned.
    ``adapter`` is the adapter's name, where the tensor's has it inside.
    """

    module: str
    part: str
    embedding: bool = False
    swapped: bool = False
    adapter: str | None = None


def factor_name(name: str) -> FactorName | None:
    """Return what a tensor's name says, or None if it is no part of a LoRA update."""
    if match := _PEFT.fullmatch(name):
        embedding = bool(match["embedding"])
        return FactorName(match["module"], match["side"], embedding=embedding, adapter=match["adapter"])
    if match := _DOWN_UP.fullmatch(name):
        return FactorName(match["module"], _part(match["side"]))
    if match := _PROCESSOR.fullmatch(name):
        layers = _TEXT_LAYERS if match["parent"].endswith("self_attn") else _LAYERS
        layer = layers.get(match["layer"], match["layer"])
        return FactorName(f"{match['parent']}.{layer}", _part(match["side"]))
    if match := _MLX.fullmatch(name):
        return FactorName(match["module"], "B" if match["side"] == "a" else "A", swapped=True)
    if name.endswith(".alpha"):
        return FactorName(name.removesuffix(".alpha"), "alpha")
    return None


def _part(side: str) -> str:
    return "A" if side == "down" else "B"


def other_kind(name: str) -> str | None:
    """Return the kind of update a tensor is of, if it is an adapter's but not a LoRA's."""
    return next((kind for kind, pattern in _OTHER_KINDS.items() if pattern.search(name)), None)


def hints_at_factors(text: str) -> bool:
    """Whether a text with the names of tensors may hold that of a factor: quick, and never a false no."""
    return _HINT.search(text) is not None


def first_factor(names: Iterable[str]) -> str | None:
    """Return the first tensor that is part of an adapter's update and means nothing by itself."""
    names = list(names)
    if not hints_at_factors("\n".join(names)):
        return None
    return next((name for name in names if _LIKE.search(name) or other_kind(name) is not None), None)


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors are an adapter and no model: factors alone, or beside what PEFT saves whole."""
    names = list(names)
    if first_factor(names) is None:
        return False
    rest = [n for n in names if not _LIKE.search(n) and other_kind(n) is None and not n.endswith(".alpha")]
    return all(name.startswith("base_model.model.") and not name.endswith(".base_layer.weight") for name in rest)
