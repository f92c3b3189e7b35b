"""What an evaluation leaves besides metrics: reasons, tables, and pictures where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.diagnosis import explained
from mtl_rcnn.evaluation.analysis import Analysis, analysis_path, write_analysis
from mtl_rcnn.evaluation.evaluator import Metric, Scored
from mtl_rcnn.evaluation.inference import EvaluationSet
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.visualize.plots import draw_confusion, draw_curves


class Inspection:
    """An `Inspector` that explains metrics of next to nothing, writes each task's analysis, and keeps it.

    Args:
        folder: where the files go.
        cfg, label_space: of the network.
        network: that is evaluated; None if results files are.
        plots: also draw confusions and curves.

    Attributes:
        analyses: (dataset, task) -> analysis.
    """

    def __init__(
        self,
        folder: Path,
        cfg: DictConfig,
        label_space: LabelSpace,
        network: MultiTaskRCNN | None = None,
        plots: bool = False,
    ) -> None:
        self.folder, self.cfg, self.label_space, self.network, self.plots = folder, cfg, label_space, network, plots
        self.analyses: dict[tuple[str, str], Analysis] = {}

    def __call__(self, entry: EvaluationSet, task: str, scored: Scored) -> Mapping[str, Metric]:
        """See `Inspector`."""
        if scored.analysis is not None:
            self.analyses[entry.name, task] = scored.analysis
            write_analysis(self.folder, entry.name, task, scored.analysis)
            if self.plots:
                self._draw(entry.name, task, scored.analysis)
        if self.network is None:
            return scored.metrics
        return explained(scored.metrics, entry.evaluators[task], self.network, self.cfg, self.label_space)

    def _draw(self, dataset: str, task: str, analysis: Analysis) -> None:
        title = f"{task} on {dataset}"
        draw_curves(analysis_path(self.folder, dataset, task, "curves.png"), analysis, title)
        draw_confusion(analysis_path(self.folder, dataset, task, "confusion.png"), analysis, title)
