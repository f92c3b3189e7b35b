"""What changes in Detectron2 0.5, and why: every edit of the source release stands in this table.

An edit replaces `old` by `new` everywhere in one file, and `old` must occur there exactly `count` times. Paths are
those inside the installed package. `compiled_stub.py` is added as `detectron2/_C.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import BuildError


@dataclass(frozen=True)
class Substitution:
    """`old` -> `new` in the file `path`, where `old` occurs `count` times; `reason` goes into the change notice."""

    path: str
    old: str
    new: str
    count: int
    reason: str


REQUIRED: tuple[Substitution, ...] = (
    Substitution(
        "detectron2/data/transforms/transform.py",
        "interp=Image.LINEAR",
        "interp=Image.BILINEAR",
        count=1,
        reason="Pillow 10 removed the alias LINEAR",
    ),
    Substitution(
        "detectron2/data/build.py",
        "dtype=np.int",
        "dtype=int",
        count=2,
        reason="NumPy 1.24 removed np.int; every training loader with annotations uses it",
    ),
    Substitution(
        "detectron2/data/datasets/pascal_voc.py",
        "dtype=np.str)",
        "dtype=str)",
        count=1,
        reason="NumPy 1.24 removed np.str",
    ),
    Substitution(
        "detectron2/evaluation/sem_seg_evaluation.py",
        "dtype=np.int)",
        "dtype=int)",
        count=2,
        reason="NumPy 1.24 removed np.int",
    ),
    Substitution(
        "detectron2/evaluation/sem_seg_evaluation.py",
        "np.float)",
        "float)",
        count=5,
        reason="NumPy 1.24 removed np.float",
    ),
    Substitution(
        "detectron2/model_zoo/model_zoo.py",
        "import pkg_resources\n",
        "import importlib.resources\n",
        count=1,
        reason="setuptools no longer provides pkg_resources",
    ),
    Substitution(
        "detectron2/model_zoo/model_zoo.py",
        """pkg_resources.resource_filename(
        "detectron2.model_zoo", os.path.join("configs", config_path)
    )""",
        """str(
        importlib.resources.files("detectron2.model_zoo").joinpath("configs", config_path)
    )""",
        count=1,
        reason="setuptools no longer provides pkg_resources",
    ),
    Substitution(
        "detectron2/data/common.py",
        "sample(self._fallback_candidates, k=1)",
        "sample(tuple(self._fallback_candidates), k=1)",
        count=1,
        reason="Python 3.11 no longer samples from a set",
    ),
    Substitution(
        "detectron2/engine/hooks.py",
        "torch.optim.lr_scheduler._LRScheduler",
        "torch.optim.lr_scheduler.LRScheduler",
        count=2,
        reason="PyTorch 2 schedulers no longer derive from _LRScheduler: their state was silently not saved",
    ),
    Substitution(
        "detectron2/export/__init__.py",
        "from .api import *\n",
        """try:
    from .api import *
except ImportError:
    pass  # the Caffe2 export needs Caffe2 and what Caffe2 needs
""",
        count=1,
        reason="PyTorch no longer contains Caffe2; TracingAdapter and scripting do not need it",
    ),
    Substitution(
        "detectron2/evaluation/coco_evaluation.py",
        "from detectron2.evaluation.fast_eval_api import COCOeval_opt\n",
        "from pycocotools.cocoeval import COCOeval as COCOeval_opt\n",
        count=1,
        reason="the C++ COCO evaluation is not compiled; the evaluation of pycocotools takes its place",
    ),
)

DEPRECATIONS: tuple[Substitution, ...] = (
    Substitution(
        "detectron2/modeling/anchor_generator.py",
        "torch.meshgrid(shifts_y, shifts_x)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        count=1,
        reason="torch.meshgrid warns without indexing; this is the order that it had",
    ),
    Substitution(
        "detectron2/projects/panoptic_deeplab/post_processing.py",
        "torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n",
        'torch.arange(width, dtype=offsets.dtype, device=offsets.device),\n        indexing="ij",\n',
        count=1,
        reason="torch.meshgrid warns without indexing; this is the order that it had",
    ),
    Substitution(
        "detectron2/engine/train_loop.py",
        "from torch.cuda.amp import GradScaler",
        "from torch.amp import GradScaler",
        count=1,
        reason="torch.cuda.amp is deprecated",
    ),
    Substitution(
        "detectron2/engine/train_loop.py",
        "from torch.cuda.amp import autocast",
        "from torch.amp import autocast",
        count=1,
        reason="torch.cuda.amp is deprecated",
    ),
    Substitution(
        "detectron2/engine/train_loop.py",
        "with autocast():",
        'with autocast("cuda"):',
        count=1,
        reason="torch.amp.autocast names its device",
    ),
    Substitution(
        "detectron2/utils/comm.py",
        """    storage = torch.ByteStorage.from_buffer(buffer)
    tensor = torch.ByteTensor(storage).to(device=device)
""",
        "    tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8).to(device=device)\n",
        count=1,
        reason="torch.ByteStorage is deprecated",
    ),
    Substitution(
        "detectron2/layers/mask_ops.py",
        "np.array(mask, copy=False)",
        "np.asarray(mask)",
        count=1,
        reason="NumPy 2 refuses copy=False where a copy is needed",
    ),
    *(
        Substitution(path, "np.bool)", "bool)", count, reason="np.bool is missing in NumPy 1.24 to 1.26")
        for path, count in {
            "detectron2/evaluation/pascal_voc_evaluation.py": 2,
            "detectron2/structures/masks.py": 2,
            "detectron2/utils/video_visualizer.py": 1,
            "detectron2/utils/visualizer.py": 3,
        }.items()
    ),
)

SUBSTITUTIONS = REQUIRED + DEPRECATIONS


def substitute(files: dict[str, bytes], substitutions: tuple[Substitution, ...] = SUBSTITUTIONS) -> None:
    """Apply `substitutions` to `files` (path -> content), in place.

    Raises:
        BuildError: a file is missing, or a text occurs another number of times than the table says.
    """
    for edit in substitutions:
        if edit.path not in files:
            raise BuildError(f"the source release has no {edit.path}, which substitutions.py changes")
        text = files[edit.path].decode("utf-8")
        found = text.count(edit.old)
        if found != edit.count:
            raise BuildError(
                f"{edit.path} contains {edit.old!r} {found} times, expected {edit.count}: "
                "substitutions.py was written for another source release"
            )
        files[edit.path] = text.replace(edit.old, edit.new).encode("utf-8")
