"""GLUE: experts mixed for a target, in memory; baselines, fine-tuning, what a step costs; networks that differ."""

from consilience.coefficients.spectrum import Spectrum
from consilience.mixing.bank import Blends, ExpertBank, StateDict
from consilience.mixing.batchnorm import recalibrate
from consilience.mixing.cost import Cost, measure_cost
from consilience.mixing.distill import Distillation, Distilled, answers_of, distill, learn_weights, mixture
from consilience.mixing.fine_tune import Evaluation, FineTuned, evaluate, fine_tune
from consilience.mixing.matching import AlignedModel, AlignmentReport, Line
from consilience.mixing.mix import Mixture, Search, mix, mix_bank
from consilience.mixing.normalisation import Normalisation, fold, fold_all, pad_input, read_normalisation
from consilience.mixing.problem import Counts, TargetLoss
from consilience.mixing.repair import repair
from consilience.mixing.shared_parts import graft, mix_shared, shared_parts
from consilience.mixing.student import Student
from consilience.mixing.symmetry import symmetry_of_axes
from consilience.mixing.symmetry_trace import symmetry_of_module
from consilience.mixing.target import LossOf, Measure, RemoteScore, ScoreOf, Target

__all__ = [
    "AlignedModel",
    "AlignmentReport",
    "Blends",
    "Cost",
    "Counts",
    "Distillation",
    "Distilled",
    "Evaluation",
    "ExpertBank",
    "FineTuned",
    "Line",
    "LossOf",
    "Measure",
    "Mixture",
    "Normalisation",
    "RemoteScore",
    "ScoreOf",
    "Search",
    "Spectrum",
    "StateDict",
    "Student",
    "Target",
    "TargetLoss",
    "answers_of",
    "distill",
    "evaluate",
    "fine_tune",
    "fold",
    "fold_all",
    "graft",
    "learn_weights",
    "measure_cost",
    "mix",
    "mix_bank",
    "mix_shared",
    "mixture",
    "pad_input",
    "read_normalisation",
    "recalibrate",
    "repair",
    "shared_parts",
    "symmetry_of_axes",
    "symmetry_of_module",
]
