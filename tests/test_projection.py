"""Projections: nearest points by another route, their tangent cones, and what is refused at construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bilevel
from bilevel.projection import Ball, Box, JointProjection, Projection, Simplex, tangent_by_difference

F64 = torch.float64


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=F64)


class HalfSpace(Projection):
    """sum(x) <= 1, with the tangent cone that is taken by a difference."""

    def __call__(self, x: Tensor) -> Tensor:
        return x - (x.sum() - 1).clamp(min=0) / x.numel()


class Budget(JointProjection):
    """Tensors of one total sum at most 1."""

    def project(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        total, size = sum((x.sum() for x in tensors), torch.zeros(())), sum(x.numel() for x in tensors)
        return [x - ((total - 1).clamp(min=0) / size).to(x.dtype) for x in tensors]


SETS: dict[str, Projection] = {
    "box": Box(-1.0, torch.tensor([0.5, 1.0, 1.5, 2.0])),
    "half a box": Box(lower=0.0),
    "simplex": Simplex(),
    "larger simplex": Simplex(dim=0, radius=2.5),
    "ball": Ball(1.5),
    "ball elsewhere": Ball(0.5, torch.tensor([1.0, 0.0, -1.0, 2.0])),
    "half-space": HalfSpace(),
}
every_set = pytest.mark.parametrize("project", SETS.values(), ids=SETS.keys())
# No point of the grid is nearly, but not quite, at a bound: there a difference sees the bound, and the cone does not.
grid = st.lists(st.integers(-40, 40), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=F64) / 10)
points = st.lists(st.floats(-4, 4), min_size=4, max_size=4).map(lambda x: torch.tensor(x, dtype=F64))


@every_set
@settings(deadline=None, max_examples=60)
@given(x=points, y=points)
def test_the_nearest_point_of_a_convex_set(project: Projection, x: Tensor, y: Tensor) -> None:
    p, q = project(x), project(y)
    torch.testing.assert_close(project(p), p, rtol=1e-12, atol=1e-12)  # idempotent
    assert (p - q).norm() <= (x - y).norm() + 1e-12  # non-expansive
    assert (x - p) @ (q - p) <= 1e-12  # nearest: no point of the set lies beyond p


@every_set
@settings(deadline=None, max_examples=60)
@given(x=grid, u=points)
def test_the_tangent_cone_is_the_derivative_of_the_projection(project: Projection, x: Tensor, u: Tensor) -> None:
    p = project(x)
    e = 1e-7
    found, expected = project.tangent(p, u), (project(p + e * u) - p) / e
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * (1 + u.norm().item() ** 2))
    torch.testing.assert_close(project.tangent(p, found), found, rtol=0, atol=1e-6)
    assert (u - found) @ found <= 1e-6 * (1 + u.norm() ** 2)  # Moreau: what is cut off is orthogonal to what is left


def test_a_box_by_its_entries() -> None:
    box = Box(vector(0, 0, 0, 0), 1.0)
    x = vector(-0.5, 0.0, 0.5, 2.0).requires_grad_()
    assert box(x).tolist() == [0.0, 0.0, 0.5, 1.0]
    assert torch.autograd.grad(box(x).sum(), x)[0].tolist() == [0.0, 1.0, 1.0, 0.0]
    assert box.tangent(vector(0.0, 0.0, 0.5, 1.0), vector(-1, 1, -1, 1)).tolist() == [0.0, 1.0, -1.0, 0.0]
    assert box(torch.tensor([2.0, -1.0, 0.0, 0.0], dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_simplex_by_bisection() -> None:
    draw = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(5, 4, 6, generator=draw, dtype=F64)
    for dim in (0, 1, -1):
        low, high = x.amin(dim, keepdim=True) - 1, x.amax(dim, keepdim=True)
        for _ in range(80):  # sum(relu(x - t)) = 2 has one root
            middle = (low + high) / 2
            above = torch.relu(x - middle).sum(dim, keepdim=True) > 2
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        torch.testing.assert_close(Simplex(dim, 2.0)(x), torch.relu(x - high), rtol=0, atol=1e-12)


def test_the_derivative_of_a_simplex_is_that_of_its_support() -> None:
    x = vector(1.0, 0.5, -3.0)  # (0.75, 0.25, 0), and I - 11'/2 on the first two
    jacobian = torch.autograd.functional.jacobian(Simplex(), x)
    assert jacobian.tolist() == [[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    # At a corner, where the point is projected on itself, the derivative is symmetric as well.
    corner = torch.autograd.functional.jacobian(Simplex(), vector(1.0, 0.0))
    assert corner.tolist() == corner.T.tolist()


def test_the_derivative_of_a_ball_is_the_tangent_plane_shrunk() -> None:
    x = vector(6.0, 8.0)  # r/|x| (I - nn'), r = 5, n = (0.6, 0.8)
    jacobian = torch.autograd.functional.jacobian(Ball(5.0), x)
    torch.testing.assert_close(jacobian, 0.5 * (torch.eye(2, dtype=F64) - torch.outer(x, x) / 100))
    assert torch.autograd.functional.jacobian(Ball(5.0), vector(0.0, 0.0)).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_a_difference_gives_free_entries_exactly() -> None:
    x, u = [torch.tensor([0.3, 1.0])], [torch.tensor([0.7, 0.2])]
    (found,) = tangent_by_difference(lambda points: [points[0].clamp(0, 1)], x, u)
    assert found[0].item() == u[0][0].item()
    assert found[1].item() == 0.0


def test_nan_stays_nan() -> None:
    for project in SETS.values():
        assert project(vector(float("nan"), 0, 0, 0)).isnan().any()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no bound": (lambda: Box(), ValueError, "needs a bound"),
    "exchanged": (lambda: Box(1.0, 0.0), ValueError, "above upper"),
    "nan": (lambda: Box(float("nan")), ValueError, "NaN"),
    "text": (lambda: Box("0"), TypeError, "number or a floating-point tensor"),  # type: ignore[arg-type]
    "radius": (lambda: Ball(0.0), ValueError, "greater than 0"),
    "center": (lambda: Ball(1.0, float("inf")), ValueError, "finite"),
    "sum": (lambda: Simplex(radius=-1.0), ValueError, "greater than 0"),
    "dim": (lambda: Simplex(dim=0.5), TypeError, "integer"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_numbers_that_mean_nothing_are_refused(case: str) -> None:
    build, kind, text = BAD[case]
    with pytest.raises(kind, match=text):
        build()


def bound_to(projection: Any, start: float = 0.5, side: str = "lower") -> Any:
    """A method on a network of two layers, whose level has the projection."""
    network, alpha = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)), nn.Linear(2, 1)
    for x in (*network.parameters(), *alpha.parameters()):
        x.data.fill_(start)
    return bilevel.BOME(
        lambda: network(torch.ones(1, 2)).square().sum(),
        lambda: (network(torch.ones(1, 2)) - alpha(torch.ones(1, 2))).square().sum(),
        upper=alpha,
        lower=network,
        upper_optimizer=torch.optim.SGD(alpha.parameters(), lr=0.1),
        lower_optimizer=torch.optim.SGD(network.parameters(), lr=5.0),
        barrier=bilevel.barrier.GradientNorm(0.5),
        **{f"{side}_projection": projection(network) if callable(projection) and start == 0.25 else projection},
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "text": ("box", "must be a projection"),
    "a class": (Box, "must be a projection"),
    "outside": (Box(0.0, 0.25), r"0.weight lies outside of it, by 0.25"),
    "not idempotent": (lambda x: x / 2 + 0.25, "moves what it has projected already"),
    "the sphere": (lambda x: x / x.norm() * (0.5 * x.numel() ** 0.5), "moves points between these"),
    "rescaled": (lambda x: x / x.sum().abs().clamp(min=0.5 * x.numel()) * 0.5 * x.numel(), "nearest point of a convex"),
    "shape": (lambda x: x[:1], "returned"),
    "dtype": (lambda x: x.double(), "returned"),
    "a number": (lambda x: 1.0, "returned float"),
    "nan": (lambda x: x * float("nan"), "NaN or infinity"),
    "no variable": ({"2.weight": Box(0, 1)}, "'2.weight': ...|2.weight.* is no variable of the lower level; these are"),
    "another tensor": ({torch.zeros(3): Box(0, 1)}, "is no variable of the lower level"),
    "a key of another kind": ({3: Box(0, 1)}, "must name variables"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_projection_of_these_variables_is_refused(case: str) -> None:
    projection, text = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=text) as error:
        bound_to(projection)
    assert str(error.value).startswith("BOME(lower_projection=")


def test_two_projections_of_one_variable_are_refused() -> None:
    with pytest.raises(ValueError, match=r"gives 0.weight more than one"):
        bound_to(lambda network: {network: Box(0, 1), "0.weight": Box(0, 1)}, 0.25)


FACES: dict[str, Callable[[nn.Sequential], Any]] = {
    "all": lambda network: Box(0, 1),
    "a function": lambda network: lambda x: x.clamp(0, 1),
    "by name": lambda network: {"1.weight": Box(0, 1)},
    "by variable": lambda network: {network[1].weight: Box(0, 1)},
    "by module": lambda network: {network[1]: lambda x: x.clamp(0, 1)},
    "by a tuple": lambda network: {(network[1], "0.weight"): Box(0, 1)},
}


@pytest.mark.parametrize("face", FACES)
def test_who_is_bounded_stays_inside_and_who_is_not_does_not(face: str) -> None:
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    alpha = torch.full((), 3.0, requires_grad=True)
    for x in network.parameters():
        x.data.fill_(0.25)
    optimizer = bilevel.Unrolled(
        lambda: network(torch.ones(1, 2)).square().sum(),
        lambda: (network(torch.ones(1, 2)) - 3 * alpha).square().sum(),
        upper=alpha,
        lower=network,
        upper_optimizer=torch.optim.SGD([alpha], lr=0.1),
        lower_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
        lower_projection=FACES[face](network),
    )
    optimizer.step()
    first, second = (bool(((x >= 0) & (x <= 1)).all()) for x in network.parameters())
    assert second
    assert first == (face in {"all", "a function", "by a tuple"})


class Grouped(JointProjection):
    project = Budget().project


def test_a_joint_projection_keeps_a_budget_over_tensors() -> None:
    a, b = torch.tensor([0.2, 0.2], dtype=F64, requires_grad=True), torch.tensor(0.1, dtype=F64, requires_grad=True)
    w = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = bilevel.Unrolled(
        lambda: (w - 9) ** 2,
        lambda: (w - a.sum() - 2 * b) ** 2,
        upper=[a, b],
        lower=w,
        upper_optimizer=torch.optim.SGD([a, b], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.4),
        upper_projection=Grouped(),
    )
    for _ in range(300):
        optimizer.step()
    assert (a.sum() + b).item() == pytest.approx(1.0)
    # w = sum(a) + 2b = 9 under sum(a) + b = 1: b = 8, and the two a's, whose gradients are the same, share -7.
    torch.testing.assert_close(torch.cat([a, b[None]]), vector(-3.5, -3.5, 8.0), rtol=1e-6, atol=0)


def test_variables_that_are_unfrozen_later_are_bound_as_well() -> None:
    w = [torch.full((), 0.5, requires_grad=True) for _ in range(2)]
    w[1].requires_grad_(False)
    a = torch.zeros((), requires_grad=True)
    optimizer = bilevel.Unrolled(
        lambda: (w[0] - 9) ** 2,
        lambda: (w[0] - 9) ** 2 + (w[1] - 9) ** 2 + a**2,
        upper=a,
        lower=[("first", w[0]), ("second", w[1])],
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD(w, lr=0.4),
        lower_projection=Box(0, 1),
    )
    optimizer.step()
    assert [x.item() for x in w] == [1.0, 0.5]
    w[1].requires_grad_(True)
    optimizer.step()
    assert [x.item() for x in w] == [1.0, 1.0]
    w[1].requires_grad_(False)
    optimizer.step()
    w[1].data.fill_(2.0)
    w[1].requires_grad_(True)
    with pytest.raises(ValueError, match="second lies outside of it, by 1"):
        optimizer.step()


def test_a_projection_is_fixed_at_construction() -> None:
    optimizer = bound_to(Box(0, 1))
    assert isinstance(optimizer.lower_projection, Box)
    assert optimizer.upper_projection is None
    with pytest.raises(AttributeError, match="fixed at construction"):
        optimizer.lower_projection = None


def test_a_detached_projection_is_refused_where_the_derivative_goes_through_it() -> None:
    w, a = (torch.full((2,), 0.5, requires_grad=True) for _ in range(2))
    optimizer = bilevel.Unrolled(
        lambda: w.square().sum(),
        lambda: (w - a).square().sum(),
        upper=a,
        lower=w,
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w], lr=0.4),
        lower_projection=lambda x: x.detach().clamp(0, 1),
    )
    with pytest.raises(bilevel.ClosureError, match=r"Unrolled\(lower_projection=\.\.\.\).*has no graph"):
        optimizer.step()


def test_a_variable_that_no_loss_uses_stands_still_to_the_last_bit() -> None:
    """Projected on its set once more, a simplex would be off by rounding."""
    w, a = torch.full((2,), 0.5, requires_grad=True), torch.zeros(2, requires_grad=True)
    unused = torch.tensor([0.1, 0.2, 0.7 + 1e-7], requires_grad=True)
    before = unused.detach().clone()
    optimizer = bilevel.Unrolled(
        lambda: w.square().sum(),
        lambda: (w - a).square().sum(),
        upper=a,
        lower=[w, unused],
        upper_optimizer=torch.optim.SGD([a], lr=0.1),
        lower_optimizer=torch.optim.SGD([w, unused], lr=0.4),
        lower_projection=Simplex(),
    )
    optimizer.step()
    assert torch.equal(unused, before)
    assert w.sum().item() == pytest.approx(1.0)
