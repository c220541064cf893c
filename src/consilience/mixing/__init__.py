"""GLUE: experts of one architecture mixed for a target, in memory; baselines, fine-tuning and what a step costs."""

from consilience.coefficients.spectrum import Spectrum
from consilience.mixing.bank import Blends, ExpertBank, StateDict
from consilience.mixing.batchnorm import recalibrate
from consilience.mixing.cost import Cost, measure_cost
from consilience.mixing.fine_tune import Evaluation, FineTuned, evaluate, fine_tune
from consilience.mixing.mix import Mixture, Search, mix, mix_bank
from consilience.mixing.problem import Counts, TargetLoss
from consilience.mixing.student import Student
from consilience.mixing.target import LossOf, Measure, RemoteScore, ScoreOf, Target

__all__ = [
    "Blends",
    "Cost",
    "Counts",
    "Evaluation",
    "ExpertBank",
    "FineTuned",
    "LossOf",
    "Measure",
    "Mixture",
    "RemoteScore",
    "ScoreOf",
    "Search",
    "Spectrum",
    "StateDict",
    "Student",
    "Target",
    "TargetLoss",
    "evaluate",
    "fine_tune",
    "measure_cost",
    "mix",
    "mix_bank",
    "recalibrate",
]
