"""Balancing of gradients: weights from Gramians of known solution, and what must hold of all methods."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchjd.aggregation
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_rcnn.balancing import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    GradientBalancer,
    GradNorm,
    NashMTL,
    PCGrad,
    UPGrad,
)
from mtl_rcnn.errors import ConfigError, TrainingError
from mtl_rcnn.modeling.feature_split import FeatureSplit

PARTS = ("a/x", "b/x", "c/x")
METHODS = (PCGrad, MGDA, IMTLG, AlignedMTL, UPGrad, CAGrad, NashMTL)
ALL = dict.fromkeys("abc", True)


def rows(seed: int, tasks: int = 3, length: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tasks, length))


def weights(balancer: GradientBalancer, gradients: np.ndarray, valid: dict[str, bool] = ALL) -> np.ndarray:
    """Of the tasks, from their gradients, which are cut into two levels."""
    values = dict.fromkeys(balancer.parts, 1.0)
    balancer({part: torch.ones(()) for part in balancer.parts}, values, valid)
    given = torch.from_numpy(gradients)
    combined = torch.cat(balancer.combine([[row[:2], row[2:]] for row in given]))
    found = np.array([balancer.scalars()[f"weight/{task}"] for task in balancer.tasks])
    np.testing.assert_allclose(combined.numpy(), found @ gradients, rtol=1e-9, atol=1e-9)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_orthogonal_gradients_of_one_length_are_summed(method: type[GradientBalancer]) -> None:
    found = weights(method(PARTS), 7 * np.eye(3, 5))
    np.testing.assert_allclose(found, 1.4 if method is CAGrad else 1.0, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_neither_order_nor_unit_matters(method: type[GradientBalancer], seed: int) -> None:
    gradients = rows(seed)
    found = weights(method(PARTS), gradients)
    np.testing.assert_allclose(weights(method(PARTS), 1e-5 * gradients), found, rtol=1e-3, atol=1e-3)
    if method is not PCGrad:  # whose random order belongs to places
        turned = weights(method(PARTS), gradients[[2, 0, 1]])
        np.testing.assert_allclose(turned, found[[2, 0, 1]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_an_absent_task_is_left_out(method: type[GradientBalancer]) -> None:
    gradients = rows(1)
    gradients[1] = 0
    found = weights(method(PARTS), gradients, {"a": True, "b": False, "c": True})
    np.testing.assert_allclose(
        found[[0, 2]], weights(method(("a/x", "c/x")), gradients[[0, 2]], {"a": True, "c": True})
    )
    assert found[1] == 1.0
    assert (weights(method(PARTS), gradients, {"a": True, "b": False, "c": False}) == 1).all()
    assert (weights(method(PARTS), np.zeros((3, 5))) == 1).all()


def test_pcgrad_projects_in_the_order_that_is_drawn() -> None:
    gradients, seen = np.array([[1, -0.6, -0.6, 0, 0.1], [-0.6, 1, -0.5, 0, 0], [-0.5, -0.7, 1, 0.2, 0]]), set()

    def project(orders: tuple[tuple[int, ...], ...]) -> np.ndarray:
        total = np.zeros(5)
        for task, order in enumerate(orders):
            own = gradients[task].copy()
            for other in order:
                inner = own @ gradients[other]
                own -= min(inner, 0) / (gradients[other] @ gradients[other]) * gradients[other]
            total += own
        return total

    orders = [list(itertools.permutations([j for j in range(3) if j != i])) for i in range(3)]
    possible = [project(chosen) for chosen in itertools.product(*orders)]
    for seed in range(8):
        found = weights(PCGrad(PARTS, seed=seed), gradients) @ gradients
        assert min(np.abs(found - one).max() for one in possible) < 1e-9
        seen.add(tuple(found.round(6)))
    assert len(seen) > 1
    balancer = PCGrad(PARTS, seed=1)
    first = weights(balancer, gradients)
    assert (weights(balancer, gradients) == first).all()
    later = []
    for _ in range(8):
        balancer.step()
        later.append(weights(balancer, gradients))
    assert any((row != first).any() for row in later)


def test_mgda_of_two_gradients_has_a_closed_form() -> None:
    for seed in range(20):
        a, b = rows(seed, 2)
        share = np.clip((b @ (b - a)) / ((a - b) @ (a - b)), 0, 1)
        found = weights(MGDA(("a/x", "b/x")), np.stack([a, b]), {"a": True, "b": True})
        np.testing.assert_allclose(found, [2 * share, 2 * (1 - share)], atol=5e-3)


def test_imtl_g_has_equal_projections() -> None:
    gradients = rows(2)
    direction = weights(IMTLG(PARTS), gradients) @ gradients
    projections = gradients @ direction / np.linalg.norm(gradients, axis=1)
    np.testing.assert_allclose(projections, projections[0], rtol=1e-6)


def test_nash_mtl_solves_its_equation() -> None:
    for seed in range(20):
        gradients = rows(seed)
        found = weights(NashMTL(PARTS), gradients)
        unit = gradients / np.sqrt((gradients**2).sum(axis=1).mean())
        assert (found > 0).all()
        np.testing.assert_allclose(unit @ unit.T @ found * found, 1, rtol=1e-6)
    parallel = np.outer([1.0, 2.0, 3.0], rows(0)[0])
    assert np.isfinite(weights(NashMTL(PARTS), parallel)).all()


def test_upgrad_conflicts_with_nobody_and_keeps_what_agrees() -> None:
    for seed in range(20):
        gradients = rows(seed)
        direction = weights(UPGrad(PARTS), gradients) @ gradients
        assert (gradients @ direction >= -1e-2 * np.linalg.norm(direction)).all()
    agreeing = np.abs(rows(0))
    np.testing.assert_allclose(weights(UPGrad(PARTS), agreeing), 1, rtol=1e-3)


def test_cagrad_is_the_best_of_its_ball() -> None:
    """No direction of a dense sample of the ball around the mean serves the worst-off task better."""
    gradients, c = rows(5, 3, 3), 0.4
    mean = gradients.mean(axis=0)
    found = weights(CAGrad(PARTS, c=c), gradients) @ gradients / 3
    assert np.linalg.norm(found - mean) <= c * np.linalg.norm(mean) * 1.001
    drawn = np.random.default_rng(0).standard_normal((200_000, 3))
    ball = mean + c * np.linalg.norm(mean) * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    best = (ball @ gradients.T).min(axis=1).max()
    assert (gradients @ found).min() == pytest.approx(best, rel=1e-2)
    np.testing.assert_allclose(weights(CAGrad(PARTS, c=0.0), gradients), 1, rtol=1e-3)


def test_aligned_mtl_makes_components_equally_long() -> None:
    gradients = rows(4)
    found = weights(AlignedMTL(PARTS), gradients) @ gradients
    left, sizes, right = np.linalg.svd(gradients, full_matrices=False)
    np.testing.assert_allclose(found, sizes.min() * np.ones(3) @ left @ right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_follows_its_algorithm(alpha: float) -> None:
    """Against a loop in NumPy; the network's gradients are given, and do not depend on the weights but by them."""
    balancer = GradNorm(PARTS, {"a": 2.0}, alpha=alpha, lr=0.05, start=2)
    fixed, w, first = np.array([2.0, 1, 1]), np.ones(3), []
    m, v = np.zeros(3), np.zeros(3)
    for step in range(12):
        losses, gradients = np.random.default_rng(step).uniform(0.5, 2, 3), rows(step)
        values = dict(zip(PARTS, losses))
        own = {part: torch.tensor(value, requires_grad=True) for part, value in values.items()}
        balancer(own, values, ALL).backward()
        factors = np.array([loss.grad.item() for loss in own.values()])
        np.testing.assert_allclose(factors, fixed * w, rtol=1e-6)
        given = torch.from_numpy(factors[:, None] * gradients)
        combined = torch.cat(balancer.combine([[row[:2], row[2:]] for row in given]))
        np.testing.assert_allclose(combined.numpy(), factors @ gradients, rtol=1e-6)
        balancer.step()
        np.testing.assert_allclose(list(balancer.scalars().values()), w, rtol=1e-6)

        first = [*first, fixed * losses] if step < 2 else first
        if step < 1:
            continue
        norms = w * np.linalg.norm(fixed[:, None] * gradients, axis=1)
        norms /= norms.mean()
        progress = fixed * losses / np.mean(first, axis=0)
        slope = np.sign(norms - (progress / progress.mean()) ** alpha) * norms / w
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        w = w - 0.05 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        w *= 3 / w.sum()


def test_gradnorm_leaves_the_weights_of_absent_and_of_new_tasks_alone() -> None:
    balancer = GradNorm(PARTS, start=2)

    def step(seed: int, *absent: str) -> dict[str, float]:
        valid = {task: task not in absent for task in "abc"}
        values = {part: float(valid[part[0]]) for part in PARTS}
        balancer({part: torch.ones(()) for part in PARTS}, values, valid)
        gradients = torch.from_numpy(rows(seed) * np.array([[valid[task]] for task in "abc"]))
        balancer.combine([[row[:2], row[2:]] for row in gradients])
        balancer.step()
        return {task: number.item() for task, number in zip("abc", balancer.numbers)}

    for seed in range(4):
        found = step(seed, "c")
    assert found["c"] == 1.0
    assert found["a"] != 1.0
    assert step(4)["c"] == 1.0  # its first of two steps
    for seed in range(5, 9):
        found = step(seed)
    assert found["c"] != 1.0
    kept = found["c"]
    assert step(9, "c")["c"] == kept
    assert sum(step(10).values()) == pytest.approx(3)


def test_gradnorm_makes_norms_equal() -> None:
    balancer, gradients = GradNorm(PARTS, alpha=0.0, lr=0.01, start=1), np.diag([1.0, 10, 100]) @ np.eye(3, 5)
    values = dict.fromkeys(PARTS, 1.0)
    for _ in range(1500):
        balancer({part: torch.ones(()) for part in PARTS}, values, ALL)
        w = np.array(list(balancer.weights().values()))
        balancer.combine([[row[:2], row[2:]] for row in torch.from_numpy(w[:, None] * gradients)])
        balancer.step()
    norms = w * [1, 10, 100]
    np.testing.assert_allclose(norms / norms.mean(), 1, atol=0.3)


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_a_gradient_that_is_not_finite_names_its_task_unless_a_loss_scale_will_fall(at: str) -> None:
    gradients = rows(0)
    gradients[1, 3] = np.nan
    balancer = UPGrad(PARTS, at=at)
    balancer({part: torch.ones(()) for part in PARTS}, dict.fromkeys(PARTS, 1.0), ALL)
    given = [[row[:2], row[2:]] for row in torch.from_numpy(gradients)]
    at_parameters = [lambda: torch.from_numpy(gradients.copy())] if at == "parameters" else []
    with pytest.raises(TrainingError, match=f"the gradient of b with respect to the shared {at} is not finite"):
        balancer.combine(given, *at_parameters)
    balancer.overflows = True
    assert not torch.cat(balancer.combine(given, *at_parameters)).isfinite().all()


def test_settings_that_do_not_fit_are_told() -> None:
    with pytest.raises(
        ConfigError, match=r"PCGrad weighs tasks against each other, and the network has only a; choose"
    ):
        PCGrad(("a/x", "a/y"))
    with pytest.raises(ConfigError, match=r"balancing\.alpha=-1: expected a number of at least 0"):
        GradNorm(PARTS, alpha=-1)
    with pytest.raises(ConfigError, match=r"balancing\.start=0: expected a whole number of at least 1"):
        GradNorm(PARTS, start=0)
    with pytest.raises(ConfigError, match=r"balancing\.at=layers: expected features or parameters"):
        PCGrad(PARTS, at="layers")
    with pytest.raises(ConfigError, match=r"balancing\.c=-1: expected a number of at least 0"):
        CAGrad(PARTS, c=-1)


def test_a_split_gives_equal_copies_and_combines_their_gradients() -> None:
    base = {name: torch.randn(2, 3, 4, requires_grad=True) for name in ("p2", "p3")}
    seen: list[list[list[Tensor]]] = []

    def combine(gradients: list[list[Tensor]]) -> list[Tensor]:
        seen.append(gradients)
        return [2 * gradients[0][level] - gradients[1][level] for level in range(2)]

    split = FeatureSplit(("a", "b", "unused"), combine)({name: level * 1 for name, level in base.items()})
    assert list(split) == ["a", "b", "unused"]
    assert all(torch.equal(split[task][name], base[name]) for task in split for name in base)
    (3 * split["a"]["p2"].sum() + split["b"]["p2"].sum() + split["b"]["p3"].square().sum()).backward()
    assert torch.equal(base["p2"].grad, torch.full((2, 3, 4), 5.0))
    torch.testing.assert_close(base["p3"].grad, -2 * base["p3"].detach())
    assert len(seen) == 1
    assert not any(level.any() for level in seen[0][2])


class Trunk(nn.Module):
    """Two levels of features.

    Args:
        cut: first and last + 1 of the layers that activation checkpointing runs again.
        reentrant: of checkpointing.
    """

    def __init__(self, cut: tuple[int, int] | None = None, reentrant: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 3))
        self.cut, self.reentrant = cut, reentrant

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        if self.cut is None:
            values = self.layers(images)
        else:
            start, stop = self.cut
            values = self.layers[:start](images).requires_grad_()
            values = checkpoint(self.layers[start:stop], values, use_reentrant=self.reentrant)
            values = self.layers[stop:](values)
        return {"fine": values, "coarse": nn.functional.avg_pool2d(values, 2)}


class Net:
    """A trunk under three tasks, of which each makes the features what it draws; in part they contradict each other."""

    def __init__(self, **options: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.trunk = Trunk(**options).double().train()
            self.trunk.layers[0].bias.requires_grad_(False)
            self.heads = nn.ModuleDict({task: nn.Conv2d(2, 1, 1).double() for task in "abc"})
            self.images = torch.randn(4, 3, 6, 6).double()
            self.wanted = {task: torch.randn(4, 1, 2, 2).double() for task in "abc"}

    def losses(self, features: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        found = {}
        for task, head in self.heads.items():
            fine, coarse = (head(level) for level in features[task].values())
            found[f"{task}/x"] = (fine - self.wanted[task]).square().mean() + (coarse - 1).abs().mean()
        return found

    def jacobian(self) -> tuple[Tensor, list[nn.Parameter]]:
        """(3, P) task by task, and the parameters of the trunk that learn."""
        learning = [parameter for parameter in self.trunk.parameters() if parameter.requires_grad]
        losses = self.losses(dict.fromkeys("abc", self.trunk(self.images))).values()
        own = [torch.autograd.grad(loss, learning, retain_graph=True) for loss in losses]
        return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in own]), learning

    def backward(self, balancer: GradientBalancer) -> Tensor:
        """(P,) what arrives at the trunk's parameters that learn."""
        trunk = self.trunk if balancer.at == "parameters" else None
        losses = self.losses(FeatureSplit("abc", balancer.combine, trunk)(self.trunk(self.images)))
        balancer(losses, {part: float(loss.detach()) for part, loss in losses.items()}, ALL).backward()
        return torch.cat([p.grad.flatten() for p in self.trunk.parameters() if p.requires_grad])


THEIRS = {
    PCGrad: torchjd.aggregation.PCGrad(),
    UPGrad: torchjd.aggregation.UPGrad(),
    MGDA: torchjd.aggregation.MGDA(),
    AlignedMTL: torchjd.aggregation.AlignedMTL(),
}


@pytest.mark.parametrize("method", THEIRS)
def test_at_the_parameters_the_trunk_gets_what_torchjd_makes_of_the_jacobian(method: type[GradientBalancer]) -> None:
    jacobian, _ = Net().jacobian()
    unit = jacobian.square().sum(dim=1).mean().sqrt()
    assert (jacobian @ jacobian.t()).min() < 0
    possible = []
    for seed in range(30 if method is PCGrad else 1):  # of its orders
        torch.manual_seed(seed)
        possible.append(THEIRS[method](jacobian / unit) * unit * (1 if method is PCGrad else 3))
    net, balancer = Net(), method(PARTS, at="parameters")
    found = net.backward(balancer)
    assert min(float((found - one).abs().max()) for one in possible) < 1e-9
    weights = torch.tensor(list(balancer.scalars().values()), dtype=torch.float64)
    torch.testing.assert_close(found, weights @ jacobian, rtol=1e-9, atol=1e-12)
    assert weights.std() > 1e-3
    plain = Net()
    sum(plain.losses(dict.fromkeys("abc", plain.trunk(plain.images))).values()).backward()
    for parameter, expected in zip(net.heads.parameters(), plain.heads.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-12, atol=1e-15)


def test_gradnorm_at_the_parameters_learns_from_their_norms() -> None:
    norms = Net().jacobian()[0].norm(dim=1)
    balancer = GradNorm(PARTS, at="parameters", alpha=0.0, start=1)
    Net().backward(balancer)
    slopes = torch.stack([number.grad for number in balancer.numbers])
    torch.testing.assert_close(slopes, torch.sign(norms / norms.mean() - 1) * norms / norms.mean())


@pytest.mark.parametrize("cut", [(0, 2), (1, 3), (2, 4)], ids=["first", "middle", "last"])
def test_checkpointing_of_the_trunk_gives_the_same_gradients_or_is_told(cut: tuple[int, int]) -> None:
    for at in ("features", "parameters"):
        expected = Net().backward(UPGrad(PARTS, at=at))
        torch.testing.assert_close(Net(cut=cut).backward(UPGrad(PARTS, at=at)), expected)
    expected = Net().backward(UPGrad(PARTS))
    torch.testing.assert_close(Net(cut=cut, reentrant=True).backward(UPGrad(PARTS)), expected)
    with pytest.raises(ConfigError, match=r"use_reentrant=True \(set it to False\).*; balancing\.at=features"):
        Net(cut=cut, reentrant=True).backward(UPGrad(PARTS, at="parameters"))


@pytest.mark.parametrize("at", ["features", "parameters"])
def test_a_look_ahead_shows_what_the_backward_pass_would_and_leaves_no_gradient(at: str) -> None:
    net, seen, combined = Net(), [], []

    def keep(shown: list[Any], *given: Any) -> list[Tensor]:
        shown.append([*itertools.chain(*given[0]), *(later() for later in given[1:])])
        return given[0][0]

    split = FeatureSplit("abc", partial(keep, combined), net.trunk if at == "parameters" else None)
    with split.looking_ahead(partial(keep, seen)) as look:
        with split.around_trunk():
            features = net.trunk(net.images)
        assert features["fine"].requires_grad == (at == "parameters")
        look(sum(net.losses(split(features)).values()))
    assert all(p.grad is None for p in (*net.trunk.parameters(), *net.heads.parameters()))
    sum(net.losses(split(net.trunk(net.images))).values()).backward()
    assert len(seen) == len(combined) == 1
    assert len(seen[0]) == 6 + (at == "parameters")
    for one, other in zip(seen[0], combined[0], strict=True):
        torch.testing.assert_close(one, other)


def test_a_look_ahead_past_reentrant_checkpointing_of_a_head_is_told() -> None:
    net = Net()
    split = FeatureSplit("abc", lambda gradients: gradients[0])
    with split.looking_ahead(lambda gradients: None) as look:
        features = split(net.trunk(net.images))
        with pytest.raises(ConfigError, match=r"solver\.accumulate=1 needs neither"):
            look(checkpoint(net.heads["a"], features["a"]["fine"], use_reentrant=True).sum())


def test_cagrad_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchjd._mixins.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"CAGrad needs cvxpy and clarabel: pip install 'mtl-rcnn\[cagrad\]'"):
        CAGrad(PARTS)
