"""Studies: what takes long, run as cells whose results are committed one by one (``python -m studies.cells``)."""

#: Dotted names of the ``Study`` values that ``python -m studies.cells`` runs, in this order.
STUDIES: tuple[str, ...] = (
    "studies.language_merge.STUDY",
    "studies.expert_merging.STUDY",
    "studies.answers.STUDY",
    "studies.glue_vision.STUDY",
    "studies.glue_language.STUDY",
    "studies.routing.STUDY",
    "studies.doctor.STUDY",
    "studies.unlike_nets.STUDY",
)
