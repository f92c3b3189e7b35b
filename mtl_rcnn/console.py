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


@config.main("train")
def import_weights(cfg: DictConfig) -> None:
    """Makes a checkpoint of weights from elsewhere (`checkpoint.weights` and `checkpoint.graft`)."""
    from mtl_rcnn.engine.distributed import distributed
    from mtl_rcnn.engine.pretrained.convert import import_weights as run

    with distributed("cpu", cfg.cluster.kind) as ranks:
        run(cfg, ranks)


@config.main("evaluate")
def evaluate(cfg: DictConfig) -> None:
    """Scores a checkpoint or results files (`configs/evaluate.yaml`)."""
    from mtl_rcnn.engine.evaluate import evaluate_checkpoint

    evaluate_checkpoint(cfg)


@config.main("export")
def export_model(cfg: DictConfig) -> None:
    """Exports a trained network to TorchScript or ONNX, or its weights alone (`configs/export.yaml`)."""
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


@config.main("check")
def check(cfg: DictConfig) -> None:
    """Reads the whole data of a training run and tries its first steps (`configs/check.yaml`); ends with status 1 if
    it finds any fault."""
    from mtl_rcnn.engine.check import check as run

    if not run(cfg).clean:
        raise SystemExit(1)


@config.main("report")
def report(cfg: DictConfig) -> None:
    """Makes the HTML report of a run (`configs/report.yaml`)."""
    from mtl_rcnn.engine.report import report_run

    report_run(cfg)


@config.main("analyze_tasks")
def analyze_tasks(cfg: DictConfig) -> None:
    """Says which tasks' gradients agree or conflict (`configs/analyze_tasks.yaml`)."""
    from mtl_rcnn.engine.analyze_tasks import analyze_tasks as run

    run(cfg)


@config.main("plan")
def plan(cfg: DictConfig) -> None:
    """Says what a training run will need before it is queued (`configs/plan.yaml`)."""
    from mtl_rcnn.engine.plan import plan as run

    run(cfg)


@config.main("pseudo_label")
def pseudo_label(cfg: DictConfig) -> None:
    """Labels a data set with a trained network (`configs/pseudo_label.yaml`)."""
    from mtl_rcnn.predict.pseudo import pseudo_label as run

    run(cfg)


@config.main("compare")
def compare_tasks(cfg: DictConfig) -> None:
    """Trains networks of one task, of some and of all, and compares them (`configs/compare.yaml`)."""
    from mtl_rcnn.comparison.compare import compare_tasks as run
    from mtl_rcnn.config.compose import Composition

    run(Composition.of_running_job())
