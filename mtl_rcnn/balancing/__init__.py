"""Balancing: from the losses of all tasks to one scalar, or from their gradients to one. Weights live here and nowhere
else."""

from mtl_rcnn.balancing.conflicts import IMTLG, MGDA, AlignedMTL, CAGrad, NashMTL, PCGrad, UPGrad
from mtl_rcnn.balancing.dwa import DynamicWeightAverage
from mtl_rcnn.balancing.famo import FAMO
from mtl_rcnn.balancing.geometric_mean import GeometricMean
from mtl_rcnn.balancing.gradient import GradientBalancer
from mtl_rcnn.balancing.gradnorm import GradNorm
from mtl_rcnn.balancing.imtl_l import IMTLL
from mtl_rcnn.balancing.rlw import RandomLossWeighting
from mtl_rcnn.balancing.scalarizer import LearnedScalarizer, Scalarizer
from mtl_rcnn.balancing.uncertainty import UncertaintyWeighting
from mtl_rcnn.balancing.weighted_sum import WeightedSum

__all__ = [
    "FAMO",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "AlignedMTL",
    "CAGrad",
    "DynamicWeightAverage",
    "GeometricMean",
    "GradNorm",
    "GradientBalancer",
    "LearnedScalarizer",
    "NashMTL",
    "PCGrad",
    "RandomLossWeighting",
    "Scalarizer",
    "UPGrad",
    "UncertaintyWeighting",
    "WeightedSum",
]
