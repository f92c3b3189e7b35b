"""Forward and backward of RoIAlign on a CPU: torchvision's, whose gradient takes one thread, against this project's.

    OMP_NUM_THREADS=4 python benchmarks/roi_align.py

Prints medians in milliseconds and their ratio for the sizes of `experiment=shapes` and of a 256-channel pyramid.
"""

from __future__ import annotations

import torch
from detectron2.layers import ROIAlign
from torch.utils.benchmark import Timer

from mtl_rcnn.modeling.roi_align import ParallelROIAlign

CASES = {  # name: images, channels, height, width, boxes per image, side of the output
    "shapes, boxes": (8, 64, 32, 48, 48, 7),
    "shapes, masks": (8, 64, 32, 48, 24, 14),
    "256 channels, boxes": (4, 256, 64, 88, 64, 7),
    "256 channels, keypoints": (4, 256, 64, 88, 16, 14),
}


def main() -> None:
    """Prints one row per case."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'case':<26}{'torchvision':>12}{'here':>8}{'ratio':>8}")
    for name, case in CASES.items():
        theirs, ours = (median_ms(pooler, *case) for pooler in (ROIAlign, ParallelROIAlign))
        print(f"{name:<26}{theirs:>12.1f}{ours:>8.1f}{theirs / ours:>8.2f}")


def median_ms(
    pooler: type[ROIAlign], images: int, channels: int, height: int, width: int, boxes: int, side: int
) -> float:
    """Median time of one forward and backward pass on random boxes of a quarter of the map's side."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(images, channels, height, width, generator=generator, requires_grad=True)
    corners = torch.rand(images * boxes, 2, generator=generator) * torch.tensor([width, height]) * 3
    size = torch.tensor([width, height]) * torch.rand(images * boxes, 2, generator=generator) * 2 + 8
    index = torch.arange(images).repeat_interleave(boxes)[:, None].float()
    rois = torch.cat([index, corners, corners + size], dim=1)
    pool = pooler((side, side), 0.25, 2, True)
    variables = {"pool": pool, "features": features, "rois": rois}
    timer = Timer("pool(features, rois).sum().backward()", globals=variables, num_threads=torch.get_num_threads())
    timer.timeit(3)
    return timer.blocked_autorange(min_run_time=2).median * 1e3


if __name__ == "__main__":
    main()
