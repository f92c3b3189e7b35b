"""Which tasks' gradients agree or conflict on the shared features of one batch, and what each task costs
(docs/adr/0019).

    with observed(network) as observation:
        sums, logs = network(samples)
    analysis = observation.analyse(sums, reduce_losses(sums, samples, ranks), weights, ranks)
    ...  # the backward pass, as without this
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn.balancing import GradientBalancer
from mtl_rcnn.engine.distributed import Ranks, all_reduce_sum
from mtl_rcnn.engine.losses import ReducedLosses
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.meta_arch import Losses, MultiTaskRCNN
from mtl_rcnn.modeling.slots import Features, LossParts, Task

PREFIX = "analysis/"
"""Of all names in the log."""
TRUNK = "trunk"


@dataclass(frozen=True)
class TaskAnalysis:
    """Of one batch.

    Attributes:
        norms: task -> L2 norm of the gradient of its weighted loss with respect to the shared features, all levels,
            images and ranks together. Tasks without a gradient, such as those that no image is labelled for, are left
            out; all are where some gradient is not finite.
        cosines: (task, later task in slot order) -> cosine of their gradients, in [-1, 1]; of tasks that have a norm.
        finite: whether all gradients are.
        forward_ms: trunk or task -> milliseconds of the forward pass on this rank; see `Observation`.
        backward_ms: task -> milliseconds of the backward pass from its losses to the features and its own weights.
        saved_mib: trunk or task -> MiB that its forward pass keeps for the backward pass, on this rank.
    """

    norms: Mapping[str, float]
    cosines: Mapping[tuple[str, str], float]
    finite: bool
    forward_ms: Mapping[str, float]
    backward_ms: Mapping[str, float]
    saved_mib: Mapping[str, float]

    def scalars(self) -> dict[str, float]:
        """For the log, what is the same when the run is repeated."""
        found = {f"{PREFIX}grad_norm/{task}": value for task, value in self.norms.items()}
        found |= {f"{PREFIX}cosine/{first}/{second}": value for (first, second), value in self.cosines.items()}
        return found | {f"{PREFIX}mib/{part}": value for part, value in self.saved_mib.items()}

    def timings(self) -> dict[str, float]:
        """For the log, what is not."""
        found = {f"{PREFIX}forward_ms/{part}": value for part, value in self.forward_ms.items()}
        return found | {f"{PREFIX}backward_ms/{task}": value for task, value in self.backward_ms.items()}


class Observation:
    """What `observed` sees of a forward pass.

    The pass is cut where the trunk's features are ready, and where a task's losses are, in the order in which the
    network calls its tasks. The trunk's part begins with the images' normalisation; the detector's holds the proposals
    and the drawing of regions, which tasks on boxes share. Memory is that of tensors which autograd keeps, weights
    apart; each counts once, for the part that keeps it first, and the features for the trunk.

    Attributes:
        forward_ms, saved_mib: see `TaskAnalysis`.
    """

    def __init__(self, network: MultiTaskRCNN) -> None:
        self.forward_ms: dict[str, float] = {}
        self.saved_mib: dict[str, float] = {}
        self._network = network
        self._features: dict[str, Features] = {}
        self._kept = _Kept((*network.parameters(), *network.buffers()))
        self._since = _now(network.device)

    def analyse(
        self,
        sums: Losses,
        reduced: ReducedLosses,
        weights: Mapping[str, float],
        ranks: Ranks,
        loss_scale: float = 1.0,
    ) -> TaskAnalysis:
        """Back-propagates each task's losses to the features, and leaves the graph, and all gradients of parameters, to
        the step's own backward pass. Every rank must call this, and once.

        Args:
            sums: of the observed pass.
            reduced: the losses of the step, whose counts divide the sums.
            weights: of each part of the losses.
            ranks: this process among all.
            loss_scale: what losses are multiplied with on the way, lest small gradients become 0 under float16.
        """
        features, self._features = self._features, {}
        backward_ms: dict[str, float] = {}
        gradients: list[list[Tensor]] = []
        for task, levels in features.items():
            # Of the sums: the reduced losses may retain gradients, and are not to retain these.
            parts = [
                total * reduced.scales[name] * (weights[name] * loss_scale)
                for name, (total, _) in sums.items()
                if name.split("/")[0] == task
            ]
            start = _now(self._network.device)
            gradients.append(_gradients(torch.stack(parts).sum(), levels, self._network.parts()[task]))
            backward_ms[task] = 1e3 * (_now(self._network.device) - start)
        gramian = all_reduce_sum(GradientBalancer.gramian(gradients)).cpu() / (ranks.world * loss_scale) ** 2
        finite = bool(gramian.isfinite().all())
        norms, cosines = _geometry(list(features), gramian) if finite else ({}, {})
        return TaskAnalysis(norms, cosines, finite, self.forward_ms, backward_ms, self.saved_mib)

    def hand_out(self, of: Callable[[Features], dict[str, Features]], features: Features) -> dict[str, Features]:
        """In place of the network's own `hand_out`: ends the trunk's part."""
        self._features = of(features)
        for level in features.values():
            self._kept(level)
        self._end(TRUNK)
        return self._features

    def losses(self, task: Task, of: Callable[..., LossParts], *args: Any) -> LossParts:
        """In place of a task's own `losses`: ends the task's part."""
        found = of(*args)
        self._end(task.name)
        return found

    def _end(self, part: str) -> None:
        now = _now(self._network.device)
        self.forward_ms[part] = 1e3 * (now - self._since)
        self.saved_mib[part] = self._kept.take() / 2**20
        self._since = now


@contextmanager
def observed(network: MultiTaskRCNN) -> Iterator[Observation]:
    """Observes one forward pass in training mode. The network computes what it would compute otherwise."""
    tasks = network.tasks()
    observation = Observation(network)
    network.hand_out = partial(observation.hand_out, network.hand_out)
    for task in tasks:
        task.losses = partial(observation.losses, task, task.losses)
    try:
        with torch.autograd.graph.saved_tensors_hooks(observation._kept, lambda tensor: tensor):
            yield observation
    finally:
        del network.hand_out  # the class has its own
        for task in tasks:
            del task.losses
        observation._kept.forget()


def check_analysis(every: int, network: MultiTaskRCNN) -> None:
    """Refuses an analysis during training of what nothing shared learns from.

    Raises:
        ConfigError: the whole trunk is frozen.
    """
    if every and not any(parameter.requires_grad for parameter in network.backbone.parameters()):
        raise ConfigError(
            f"analysis.every={every}: the whole trunk is frozen, so that no gradients of the tasks meet; choose "
            "analysis.every=0, or train a part of the trunk (model.backbone.freeze_at)"
        )


class _Kept:
    """Bytes of tensors that autograd keeps: what it hands a tensor to before it saves it.

    Args:
        others: tensors that do not count.
    """

    def __init__(self, others: Iterable[Tensor]) -> None:
        # Storages are held, lest one that is freed and made anew for another tensor passes for known.
        self._known = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in others)}
        self._bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known[storage.data_ptr()] = storage
            self._bytes += storage.nbytes()
        return tensor

    def take(self) -> int:
        """Bytes since the last call."""
        found, self._bytes = self._bytes, 0
        return found

    def forget(self) -> None:
        """Lets go of all storages."""
        self._known = {}


def _gradients(loss: Tensor, levels: Features, task: nn.Module) -> list[Tensor]:
    """Of a loss, with respect to each level. Those of the task's weights are found with them, since they are a part of
    what its backward pass costs, and thrown away: `grad` adds nothing up and does not call DDP. Zeros where the trunk
    or the task is frozen for now."""
    if not (loss.requires_grad and all(level.requires_grad for level in levels.values())):
        return [torch.zeros_like(level) for level in levels.values()]
    weights = [parameter for parameter in task.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, [*levels.values(), *weights], retain_graph=True, allow_unused=True)
    return [torch.zeros_like(level) if own is None else own for level, own in zip(levels.values(), found)]


def _geometry(tasks: Sequence[str], gramian: Tensor) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
    """Norms and cosines of the T tasks that have a gradient, from (T, T) inner products."""
    products = dict(zip(tasks, gramian.tolist()))
    norms = {task: products[task][place] ** 0.5 for place, task in enumerate(tasks) if products[task][place] > 0}
    cosines = {
        (first, second): max(-1.0, min(1.0, products[first][tasks.index(second)] / (norms[first] * norms[second])))
        for first, second in combinations(norms, 2)
    }
    return norms, cosines


def _now(device: torch.device) -> float:
    """Seconds, when all that was started is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
