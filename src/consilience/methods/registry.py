"""Every merge method by name. A method is one file; listing it here (or as an entry point) makes it appear everywhere.

Third parties add methods through the entry-point group ``consilience.methods``: name -> ``module:attribute`` of a
``Method``.
"""

import importlib
from importlib.metadata import entry_points

from consilience.errors import InputError, nearest
from consilience.methods.signature import Method

ENTRY_POINTS = "consilience.methods"

BUILT_IN: dict[str, str] = {
    "linear": "consilience.methods.linear",
    "task_arithmetic": "consilience.methods.task_arithmetic",
    "ties": "consilience.methods.ties",
    "dare_linear": "consilience.methods.dare_linear",
    "dare_ties": "consilience.methods.dare_ties",
    "breadcrumbs": "consilience.methods.breadcrumbs",
    "breadcrumbs_ties": "consilience.methods.breadcrumbs_ties",
    "della": "consilience.methods.della",
    "della_linear": "consilience.methods.della_linear",
    "sce": "consilience.methods.sce",
    "ram": "consilience.methods.ram",
    "ramplus_tl": "consilience.methods.ramplus_tl",
    "arcee_fusion": "consilience.methods.arcee_fusion",
    "magmax": "consilience.methods.magmax",
    "emr": "consilience.methods.emr",
    "consensus": "consilience.methods.consensus",
    "pcb": "consilience.methods.pcb",
    "nearswap": "consilience.methods.nearswap",
    "tsv_m": "consilience.methods.tsv_m",
    "iso_c": "consilience.methods.iso_c",
    "iso_cts": "consilience.methods.iso_cts",
    "wudi": "consilience.methods.wudi",
    "wudi_v2": "consilience.methods.wudi_v2",
    "swudi_a": "consilience.methods.swudi_a",
    "actmat": "consilience.methods.actmat",
    "tact": "consilience.methods.tact",
    "ace": "consilience.methods.ace",
    "knots": "consilience.methods.knots",
    "core_space": "consilience.methods.core_space",
    "svc": "consilience.methods.svc",
    "regmean": "consilience.methods.regmean",
    "regmean_pp": "consilience.learned.regmean_pp",
    "lot": "consilience.methods.lot",
    "fisher": "consilience.methods.fisher",
    "slerp": "consilience.methods.slerp",
    "nuslerp": "consilience.methods.nuslerp",
    "multislerp": "consilience.methods.multislerp",
    "karcher": "consilience.methods.karcher",
    "model_stock": "consilience.methods.model_stock",
    "passthrough": "consilience.methods.passthrough",
    "coefficients": "consilience.methods.coefficients",
    "expert_merging": "consilience.learned.expert_merging",
    "least_squares": "consilience.learned.least_squares",
    "stability_weights": "consilience.doctor.stability_weights",
    "adamerging": "consilience.learned.adamerging",
    "adamerging_pp": "consilience.learned.adamerging_pp",
    "expert_merging_pp": "consilience.learned.expert_merging_pp",
    "expert_merging_distil": "consilience.learned.expert_merging_distil",
    "glue": "consilience.learned.glue",
    "lorahub": "consilience.learned.lorahub",
}

#: All of mergekit 0.1.5's methods.
MERGEKIT_METHODS = frozenset((
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties",
    "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce", "model_stock", "nearswap", "arcee_fusion", "ram",
    "ramplus_tl", "passthrough",
))  # fmt: skip


def names() -> list[str]:
    """Return the names of all methods, built in first."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=ENTRY_POINTS)} - BUILT_IN.keys())]


def load(name: str) -> Method:
    """Import and return a method.

    Raises:
        InputError: there is no method of that name (the nearest known one is named).
    """
    if name in BUILT_IN:
        return getattr(importlib.import_module(BUILT_IN[name]), name)
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            loaded = point.load()
            if not isinstance(loaded, Method):
                raise InputError(f"method {name!r}: entry point {point.value} is not a consilience Method")
            return loaded
    known = names()
    raise InputError(f"merge_method {name!r} is unknown{nearest(name, known)} (known: {', '.join(known)})")
