"""Balancing: from the losses of all tasks to one scalar. Weights live here and nowhere else."""

from mtl_rcnn.balancing.scalarizer import Scalarizer
from mtl_rcnn.balancing.weighted_sum import WeightedSum

__all__ = ["Scalarizer", "WeightedSum"]
