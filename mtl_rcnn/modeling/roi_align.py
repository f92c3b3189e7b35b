"""RoIAlign whose backward pass uses several cores of a CPU: torchvision's uses one, which took 40 % of a training step
of a small network. Bit for bit torchvision's gradient: images do not share features, so only images go in parallel.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor


class ParallelROIAlign(ROIAlign):
    """Detectron2's `ROIAlign`; on a CPU, in float32 or float64, the gradients of a batch's images run in parallel."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pools features (B, C, H, W) at R boxes (R, 5), image index and XYXY pixels, to (R, C, S, S)."""
        if not _gains(input, rois):
            return super().forward(input, rois)
        height, width = self.output_size
        shape = (self.spatial_scale, height, width, self.sampling_ratio, self.aligned)
        return _RoiAlign.apply(input, rois.to(input.dtype), *shape)


def parallelize(pooler: ROIPooler) -> ROIPooler:
    """Replaces the pooler's RoIAlign on every level."""
    pooler.level_poolers = torch.nn.ModuleList(
        ParallelROIAlign(level.output_size, level.spatial_scale, level.sampling_ratio, level.aligned)
        for level in pooler.level_poolers
    )
    return pooler


def _gains(features: Tensor, rois: Tensor) -> bool:
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return False
    exact = features.dtype in (torch.float32, torch.float64)
    return exact and features.device.type == "cpu" and features.requires_grad and len(features) > 1 and len(rois) > 0


class _RoiAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, rois: Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool
    ) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.pooling = features.shape, (scale, height, width, ratio, aligned)
        return torch.ops.torchvision.roi_align(features, rois, scale, height, width, ratio, aligned)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        (images, channels, rows, columns), (scale, height, width, ratio, aligned) = ctx.shape, ctx.pooling

        def of_image(part: tuple[Tensor, Tensor]) -> Tensor:
            return torch.ops.torchvision._roi_align_backward(
                *part, scale, height, width, 1, channels, rows, columns, ratio, aligned
            )

        parts = []
        for index in range(images):
            chosen = torch.nonzero(rois[:, 0] == index).squeeze(1)
            boxes = rois[chosen]
            boxes[:, 0] = 0
            parts.append((gradient[chosen], boxes))
        threads = torch.get_num_threads()
        maps = list(_pool(threads).map(of_image, parts)) if threads > 1 else [of_image(part) for part in parts]
        return torch.cat(maps), *[None] * 6


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    # A worker that opened a thread team of its own would crowd out the main thread's.
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    barrier = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(barrier.wait)
    barrier.wait()  # now every worker has started
    torch.set_num_threads(threads)  # the limit of threads still to come, which the workers lowered
    return pool
