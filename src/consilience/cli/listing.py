"""What ``consilience methods`` and ``consilience inspect`` print."""

from collections import Counter
from pathlib import Path
from typing import Any, cast

from consilience.checkpoints.json_files import read_object
from consilience.checkpoints.packed import packing
from consilience.cli.adapter_listing import adapter_facts, adapter_lines
from consilience.errors import InputError, printable
from consilience.methods.registry import load, names


def method_facts() -> list[dict[str, Any]]:
    """Return one object per method: name, summary, data, base, parameters, source."""
    facts: list[dict[str, Any]] = []
    for name in names():
        method = load(name)
        parameters = {
            p.name: {"default": p.default, "per_expert": p.per_expert, "kind": p.kind, "help": p.help}
            | ({"choices": list(p.choices)} if p.choices else {})
            for p in method.parameters.values()
        }
        facts.append(
            {
                "name": name,
                "summary": method.summary,
                "data": method.data,
                "base": method.base,
                "parameters": parameters,
                "source": method.source,
            }
        )
    return facts


def method_lines() -> list[str]:
    """Return the table of methods as text."""
    lines: list[str] = []
    for fact in method_facts():
        lines.append(f"{fact['name']}  (data: {fact['data']}; base: {fact['base']})")
        lines.append(f"    {fact['summary']}")
        width = max(map(len, fact["parameters"]), default=0)
        for name, parameter in fact["parameters"].items():
            scope = "per expert" if parameter["per_expert"] else "shared"
            default = parameter["default"]
            shown = ",".join(default) if isinstance(default, tuple) else str(default)
            lines.append(f"    {name:<{width}} {shown:<8} {scope:<10}  {parameter['help']}")
        lines += [f"    {fact['source']}", ""]
    return lines[:-1]


def inspect_facts(path: str, tensors: bool, fingerprint: bool) -> dict[str, Any]:
    """Return what headers say about a model or adapter (and, if asked, its weights' fingerprint), or coefficients."""
    from consilience.coefficients import is_coefficients
    from consilience.experts.model import open_model

    if is_coefficients(path):
        return _coefficients(path, tensors, fingerprint)
    model = open_model("model", path)
    parts = [p for p in (model.checkpoint, model.adapter.checkpoint if model.adapter else None) if p is not None]
    infos = [info for part in parts for info in part.tensors.values()]
    facts: dict[str, Any] = {
        "path": path,
        "kind": "adapter" if model.checkpoint is None else "model+adapter" if model.adapter else "model",
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
        "dtypes": dict(Counter(info.dtype.name for info in infos)),
        "files": [{"file": Path(file).name, "bytes": size} for file, size, _ in model.identity()],
    }
    if model.adapter is not None:
        facts["adapter"] = adapter_facts(model.adapter)
    packed = packing(model.checkpoint)
    if packed.weights:
        facts["quantised"] = {"weights": len(packed.weights), "format": packed.formats}
    config = model.checkpoint.config if model.checkpoint else None
    if config:
        from consilience.experts.ties import says_tied

        facts["architectures"] = config.get("architectures")
        facts["tied_embeddings"] = says_tied(config)
    folder = model.folder
    if folder is not None and (folder / "consilience" / "lineage.json").is_file():
        facts["lineage"] = _lineage(folder / "consilience" / "lineage.json")
    if folder is not None and (folder / "consilience" / "coefficients.json").is_file():
        found = _coefficients(str(folder / "consilience"), False, False)
        facts["coefficients"] = {key: found[key] for key in ("experts", "groups", "coefficients", "learned")}
    if fingerprint:
        from consilience.engine.lineage import checkpoint_fingerprints, model_fingerprint

        facts["fingerprint"] = model_fingerprint({k: v for p in parts for k, v in checkpoint_fingerprints(p).items()})
    if tensors:
        facts["tensor_list"] = [{"name": i.name, "dtype": i.dtype.name, "shape": list(i.shape)} for i in infos]
    model.close()
    return facts


def _coefficients(path: str, values: bool, fingerprint: bool) -> dict[str, Any]:
    from consilience.coefficients import load_coefficients
    from consilience.coefficients.listing import coefficient_facts

    if fingerprint:
        raise InputError(f"--fingerprint: {path} holds coefficients, not weights; name a model")
    return coefficient_facts(path, load_coefficients(path), values=values)


def plot_coefficients(path: str, file: Path) -> None:
    """Draw the coefficients at ``path`` into the PNG file ``file``.

    Raises:
        InputError: there are no coefficients at ``path``, or no PNG file can be written to ``file``.
    """
    from consilience.coefficients import is_coefficients, load_coefficients
    from consilience.coefficients.picture import picture

    if not is_coefficients(path):
        inner = Path(path) / "consilience"
        hint = f"; name {inner}" if is_coefficients(inner) else ""
        raise InputError(f"--plot: {path} is not a coefficients file{hint}")
    if file.suffix.lower() != ".png":
        raise InputError(f"--plot {file}: pictures are PNG files; name one that ends in .png")
    if not file.parent.is_dir():
        raise InputError(f"--plot {file}: there is no folder {file.parent}; make it first")
    picture(load_coefficients(path), file)


def _lineage(path: Path) -> dict[str, Any]:
    document = read_object(path)
    output, models = document.get("output"), document.get("models")
    if not isinstance(output, dict) or not isinstance(models, list):
        raise InputError(f"{path}: has no output or models; restore it, or remove it")
    references = [cast(dict[str, Any], m).get("reference") for m in cast(list[Any], models) if isinstance(m, dict)]
    facts = {key: document.get(key) for key in ("method", "seed", "created")}
    return facts | {"fingerprint": cast(dict[str, Any], output).get("fingerprint"), "models": references}


def inspect_lines(facts: dict[str, Any]) -> list[str]:
    """Return the facts as text."""
    if facts["kind"] == "coefficients":
        from consilience.coefficients.listing import coefficient_lines

        return [printable(line) for line in coefficient_lines(facts)]
    lines = [
        f"{facts['path']}: {facts['kind']}",
        f"  {facts['tensors']} tensors, {facts['parameters']:,} parameters, {facts['bytes'] / 1e6:.1f} MB, "
        + ", ".join(f"{count} {name}" for name, count in facts["dtypes"].items()),
    ]
    lines += adapter_lines(facts["adapter"]) if "adapter" in facts else []
    for key in ("architectures", "tied_embeddings", "quantised", "lineage", "coefficients", "fingerprint"):
        if facts.get(key) is not None:
            lines.append(f"  {key.replace('_', ' ')}: {_text(facts[key])}")
    lines += [f"  file {entry['file']}  {entry['bytes'] / 1e6:.1f} MB" for entry in facts["files"]]
    lines += [
        f"  {t['name']}  {'x'.join(map(str, t['shape'])) or 'scalar'}  {t['dtype']}"
        for t in facts.get("tensor_list", [])
    ]
    return [printable(line) for line in lines]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{k} {_text(v)}" for k, v in cast(dict[str, Any], value).items())
    if isinstance(value, list):
        return ", ".join(map(str, cast(list[Any], value)))
    return str(value)
