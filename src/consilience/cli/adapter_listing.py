"""What ``consilience inspect`` prints of an adapter: whose it is, what it changes, and how much."""

import json
import math
from collections import Counter
from typing import Any, cast

from consilience.checkpoints.adapter import Adapter
from consilience.checkpoints.lora_scale import is_mlx


def adapter_facts(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter's base, targets, ranks, alphas, scales, saved modules and variants of scaling.

    Alphas are ``scale * rank`` (``scale * sqrt(rank)`` of rank-stabilised LoRA): what the config or the file calls so,
    its patterns included.
    """
    config, pairs = adapter.config, list(adapter.pairs.values())
    stabilised = bool(config.get("use_rslora"))
    alphas = Counter(round(p.scale * (math.sqrt(p.rank) if stabilised else p.rank), 6) for p in pairs)
    return {
        "format": _format(adapter),
        "base": _base(adapter),
        "revision": config.get("revision"),
        "pairs": len(pairs),
        "targets": dict(sorted(Counter(_kind(p.target) for p in pairs).items())),
        "ranks": dict(sorted(Counter(p.rank for p in pairs).items())),
        "alphas": dict(sorted(alphas.items())),
        "scales": sorted({round(p.scale, 6) for p in pairs}),
        "whole": sorted(adapter.whole),
        "rows": {name: len(tokens.rows) for name, tokens in sorted(adapter.tokens.items())},
        "parameters": sorted({name for one in adapter.parameters for name in one.options}),
        "variants": _variants(adapter),
        "notes": list(adapter.notes),
    }


def _format(adapter: Adapter) -> str:
    if adapter.config:
        return "MLX" if is_mlx(adapter.config) else "PEFT"
    return "diffusers" if "lora_adapter_metadata" in adapter.checkpoint.metadata else "a file of factors"


def _base(adapter: Adapter) -> str | None:
    base = adapter.config.get("model" if is_mlx(adapter.config) else "base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _kind(target: str) -> str:
    """Return the last part of a module's name: what PEFT's ``target_modules`` list."""
    return target.removesuffix(".weight").rpartition(".")[2]


def _variants(adapter: Adapter) -> list[str]:
    """Say what makes the scale or the update another than ``alpha / r * B A`` of one rank."""
    config = adapter.config
    variants = ["rank-stabilised: scale is alpha / sqrt(r)"] if config.get("use_rslora") else []
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = cast("dict[str, Any]", config.get(key) or {})
        if pattern:
            shown = json.dumps(dict(list(pattern.items())[:3]), ensure_ascii=False)
            variants.append(f"{key}: {shown}" + (f" and {len(pattern) - 3} more" if len(pattern) > 3 else ""))
    variants += [key for key in ("fan_in_fan_out", "ensure_weight_tying") if config.get(key)]
    init = config.get("init_lora_weights")
    variants += [f"init_lora_weights: {init}"] if isinstance(init, str) else []
    embeddings = sum(pair.embedding for pair in adapter.pairs.values())
    return variants + ([f"{embeddings} embedding(s) adapted"] if embeddings else [])


def adapter_lines(facts: dict[str, Any]) -> list[str]:
    """Return the facts as lines of text."""
    revision = f"@{facts['revision']}" if facts["revision"] else ""
    lines = [
        f"  adapter: {facts['format']}",
        f"  base: {facts['base'] + revision if facts['base'] else 'not named in its files'}",
    ]
    targets = ", ".join(f"{name} {count}" for name, count in facts["targets"].items())
    lines.append(f"  targets: {facts['pairs']} modules ({targets})" if facts["pairs"] else "  targets: none")
    if facts["pairs"]:
        lines.append(f"  rank: {_counted(facts['ranks'])}")
        alpha = "" if facts["format"] == "MLX" else f"  alpha: {_counted(facts['alphas'])}; "
        lines.append(f"{alpha or '  '}scale: {', '.join(f'{scale:g}' for scale in facts['scales'])}")
    lines.append(f"  saved modules: {', '.join(facts['whole']) or 'none'}")
    if facts["rows"]:
        lines.append(f"  trained rows: {', '.join(f'{count} of {name}' for name, count in facts['rows'].items())}")
    if facts["parameters"]:
        lines.append(f"  parameters that only the base tells apart: {', '.join(facts['parameters'])}")
    lines += [f"  variant: {variant}" for variant in facts["variants"]]
    return lines + [f"  note: {note}" for note in facts["notes"]]


def _counted(counts: dict[Any, int]) -> str:
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    return ", ".join(f"{value:g} ({count} modules)" for value, count in counts.items())
