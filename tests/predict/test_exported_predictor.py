"""An exported network predicts as its checkpoint does, under the certificate's tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import images, restored
from omegaconf import OmegaConf
from tiny import available_tasks

from mtl_rcnn.engine.restore import Restored
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.export.export import preprocessing
from mtl_rcnn.export.torchscript import export_torchscript
from mtl_rcnn.predict import Predictor
from mtl_rcnn.predict.network import checkpoint_network

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["trace", "script"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Restored, Path]:
    """A network that is sure of itself on noise and not on plain images, and its exported folder."""
    folder = tmp_path_factory.mktemp("export")
    network = restored(folder, available_tasks(), "data.test_augment.resize.short_edge_length=44")
    prepared = [checkpoint_network(network).prepare(image)["image"] for image in images()]
    detector = network.model.roi_heads.detector
    detector.score_thresh = 0.0

    def best(image: torch.Tensor) -> float:
        return float(network.model.predict([{"image": image}])[0]["scores"].max())

    plain = max(best(torch.full_like(prepared[0], value)) for value in (114, 0))
    assert all(best(image) > plain for image in prepared), "choose another seed"
    detector.score_thresh = plain + 1e-4
    origin = {"config": OmegaConf.to_container(network.cfg, resolve=True)}
    rule = preprocessing(network.cfg)
    for name, tasks in (("exported", None), ("boxes", ["detection"])):
        given = (network.model, network.label_space, prepared, folder / name, rule, origin, 1)
        export_torchscript(*given, method=request.param, tasks=tasks)
    return network, folder / "exported"


def test_it_predicts_as_its_checkpoint(exported: tuple[Restored, Path]) -> None:
    network, folder = exported
    # Not resized: torchvision does that a little otherwise than Pillow.
    same = [image for image in (image[:44, :44].copy() for image in images()) if image.shape == (44, 44, 3)]
    assert len(same) >= 2
    for source in (folder, folder / "model.ts"):
        for mine, reference in zip(Predictor(source)(same), Predictor(network)(same), strict=True):
            assert set(mine.outputs) == set(reference.outputs)
            assert len(mine) == len(reference) > 0
            torch.testing.assert_close(mine.boxes, reference.boxes, atol=1e-3, rtol=0)
            assert mine.class_names == reference.class_names


def test_outputs_of_other_tasks_are_dropped(exported: tuple[Restored, Path]) -> None:
    predictor = Predictor(exported[1], tasks=["detection"], batch_size=2)
    for result in predictor(images()):
        assert set(result.outputs) == {"boxes", "scores", "classes"}
    assert list(predictor.targets) == ["detection"]
    with pytest.raises(ConfigError, match="no task 'depths'"):
        Predictor(exported[1], tasks=["depths"])


def test_a_file_of_some_tasks_has_just_these(exported: tuple[Restored, Path]) -> None:
    boxes = exported[1].with_name("boxes")
    predictor = Predictor(boxes)
    assert list(predictor.targets) == ["detection"]
    assert set(predictor.one(images()[0]).outputs) == {"boxes", "scores", "classes"}


def test_there_is_no_test_time_augmentation(exported: tuple[Restored, Path]) -> None:
    with pytest.raises(ConfigError, match="no test-time augmentation; give the checkpoint"):
        Predictor(exported[1], tta={"flip": True})


def test_a_model_without_its_manifest_is_refused(exported: tuple[Restored, Path], tmp_path: Path) -> None:
    (tmp_path / "model.ts").write_bytes((exported[1] / "model.ts").read_bytes())
    with pytest.raises(ConfigError, match=r"model\.ts with manifest\.json beside it"):
        Predictor(tmp_path)
