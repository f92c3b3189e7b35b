"""The command line tools: `tools/*.py` in a clone, `mtl-rcnn-*` where the package is installed.

Each reads the configuration of its name. Heavy imports come after composition: a typo is told without waiting for
torch.
"""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn import config


@config.main("train")
def train(cfg: DictConfig) -> None:
    """Trains, evaluates and checkpoints one run, or goes on with it (`configs/train.yaml`)."""
    from mtl_rcnn.engine.train import train as run

    run(cfg)


@config.main("evaluate")
def evaluate(cfg: DictConfig) -> None:
    """Scores a checkpoint or results files (`configs/evaluate.yaml`)."""
    from mtl_rcnn.engine.evaluate import evaluate_checkpoint

    evaluate_checkpoint(cfg)


@config.main("export")
def export_model(cfg: DictConfig) -> None:
    """Exports a trained network to TorchScript (`configs/export.yaml`)."""
    from mtl_rcnn.export.export import export_checkpoint

    export_checkpoint(cfg)


@config.main("predict")
def predict(cfg: DictConfig) -> None:
    """Runs a network on images and videos (`configs/predict.yaml`)."""
    from mtl_rcnn.predict.run import predict_images

    predict_images(cfg)


@config.main("visualize_data")
def visualize_data(cfg: DictConfig) -> None:
    """Draws what the loader feeds (`configs/visualize_data.yaml`)."""
    from mtl_rcnn.engine.gallery import visualize_data as draw

    draw(cfg)
