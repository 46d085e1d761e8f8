"""Groups of tensors as vectors: the axioms with None as zero, the accumulation of products, the exchange bit
for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bilevel import vectors
from bilevel.vectors import (
    Tensors,
    add_scaled,
    all_finite,
    dot,
    dots,
    exchange,
    squared_norm,
    subtract,
    without_aliasing,
)

oracle = settings(derandomize=True, database=None, deadline=None, max_examples=80)

SHAPES: tuple[tuple[int, ...], ...] = ((2, 3), (), (0,), (4,), (1, 1, 2))


@st.composite
def triples(draw: st.DrawFn) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Three vectors of one space with small integer entries, so that float64 computes exactly; any part may be None."""
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=0, max_size=4))

    def vector() -> list[Tensor | None]:
        parts: list[Tensor | None] = []
        for shape in shapes:
            size = math.prod(shape)
            entries = draw(st.none() | st.lists(st.integers(-9, 9), min_size=size, max_size=size))
            parts.append(None if entries is None else torch.tensor(entries, dtype=torch.float64).reshape(shape))
        return parts

    return vector(), vector(), vector()


scalars = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])


def same(a: Tensors, b: Tensors) -> bool:
    """Equal as elements of the space: None counts as zero."""
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            present = y if x is None else x
            if present is not None and bool((present != 0).any()):
                return False
        elif x.shape != y.shape or not torch.equal(x, y):
            return False
    return True


def snapshot(a: Tensors) -> list[Tensor | None]:
    return [None if x is None else x.clone() for x in a]


def bits(x: Tensor) -> Tensor:
    """The bits, as integers: NaN equals itself here, and -0.0 differs from 0.0."""
    kinds = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return x.detach().contiguous().view(kinds[x.element_size()]).clone()


# --- a vector space with an inner product -----------------------------------------------------------------------------


@oracle
@given(triples(), scalars, scalars)
def test_vector_space_axioms(
    abc: tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]], s: float, t: float
) -> None:
    a, b, c = abc
    zero: list[Tensor | None] = [None] * len(a)
    assert same(add_scaled(a, 1.0, b), add_scaled(b, 1.0, a))
    assert same(add_scaled(add_scaled(a, 1.0, b), 1.0, c), add_scaled(a, 1.0, add_scaled(b, 1.0, c)))
    assert same(add_scaled(a, s, zero), a)
    assert same(add_scaled(zero, 1.0, a), a)
    assert same(subtract(a, a), zero)
    assert same(subtract(a, b), add_scaled(a, -1.0, b))
    assert same(add_scaled(add_scaled(a, s, b), t, b), add_scaled(a, s + t, b))
    assert same(add_scaled(zero, s, add_scaled(a, t, b)), add_scaled(add_scaled(zero, s, a), s * t, b))


@oracle
@given(triples(), scalars)
def test_inner_product_axioms(
    abc: tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]], s: float
) -> None:
    a, b, c = abc
    by_hand = sum(float((x * y).sum()) for x, y in zip(a, b, strict=True) if x is not None and y is not None)
    assert dot(a, b).item() == by_hand
    assert dot(a, b).item() == dot(b, a).item()
    assert dot(add_scaled(a, s, b), c).item() == dot(a, c).item() + s * dot(b, c).item()
    assert squared_norm(a).item() == dot(a, a).item() >= 0
    assert (squared_norm(a).item() == 0) == same(a, [None] * len(a))


@oracle
@given(triples(), scalars)
def test_none_marks_where_a_sum_has_no_term_at_all(
    abc: tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]], s: float
) -> None:
    """An unused variable keeps .grad None up to the optimizer, and only an unused one does."""
    a, b, _ = abc
    unused = [x is None and y is None for x, y in zip(a, b, strict=True)]
    assert [x is None for x in add_scaled(a, s, b)] == unused
    assert [x is None for x in subtract(a, b)] == unused


@oracle
@given(triples(), scalars)
def test_operands_are_left_alone(
    abc: tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]], s: float
) -> None:
    a, b, _ = abc
    kept_a, kept_b = snapshot(a), snapshot(b)
    add_scaled(a, s, b)
    subtract(a, b)
    dot(a, b)
    for now, before in zip([*a, *b], [*kept_a, *kept_b], strict=True):
        assert (now is None and before is None) or torch.equal(now, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", [dot, subtract, lambda a, b: add_scaled(a, 1.0, b)])
def test_vectors_of_different_spaces_are_refused(operation: Any) -> None:
    one, two = [torch.ones(2)], [torch.ones(2), torch.ones(2)]
    for a, b in ((one, two), (two, one)):
        with pytest.raises(ValueError, match=r"variables|shorter|longer"):
            operation(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [None, torch.float64, torch.float32])
def test_a_tensor_scale_keeps_dtype_and_shape(dtype: torch.dtype, scale_dtype: torch.dtype | None) -> None:
    """The multiplier is float64; a variable, also one of no dimension, stays what it is."""
    scale = 0.5 if scale_dtype is None else torch.tensor(0.5, dtype=scale_dtype)
    shapes = [(), (1,), (2, 2), (0,)]
    a: list[Tensor | None] = [torch.full(shape, 3.0, dtype=dtype) for shape in shapes]
    b: list[Tensor | None] = [torch.full(shape, 4.0, dtype=dtype) for shape in shapes]
    absent: list[Tensor | None] = [None] * len(shapes)
    for first, expected in ((a, 5.0), (absent, 2.0)):
        for shape, x in zip(shapes, add_scaled(first, scale, b), strict=True):
            assert x is not None
            assert x.dtype == dtype
            assert x.shape == shape
            assert torch.equal(x, torch.full(shape, expected, dtype=dtype))


def test_several_dtypes_in_one_vector() -> None:
    kinds = [torch.float64, torch.bfloat16, torch.float32, torch.float32]
    a: list[Tensor | None] = [torch.full((3,), 1.0 + i, dtype=kind) for i, kind in enumerate(kinds)]
    found = add_scaled(a, torch.tensor(2.0, dtype=torch.float64), a)
    assert [x.dtype for x in found if x is not None] == kinds
    assert [x[0].item() for x in found if x is not None] == [3.0, 6.0, 9.0, 12.0]


# --- how products are accumulated -------------------------------------------------------------------------------------


def test_products_of_float32_do_not_overflow_or_underflow() -> None:
    large, small = torch.full((5,), 1e30), torch.full((5,), 1e-30)
    # 5 * 1e60 and 5 * 1e-60: outside float32 on both sides; the float32 values differ from 1e+-30 by 1e-8 relative at
    # most
    assert squared_norm([large]).item() == pytest.approx(5e60, rel=1e-6)
    assert squared_norm([small]).item() == pytest.approx(5e-60, rel=1e-6, abs=0.0)
    assert squared_norm([large]).item() == 5 * float(large[0]) ** 2
    assert squared_norm([large]).dtype == torch.float64


def test_products_of_float32_lose_no_digits() -> None:
    """Cancellation: 1e8 * 1 + 1 * 1 - 1e8 * 1 = 1, where float32 would answer 0."""
    values, ones = torch.tensor([1e8, 1.0, -1e8]), torch.ones(3)
    assert dot([values], [ones]).item() == 1.0
    assert dot([values[:1], values[1:2], values[2:]], [ones[:1], ones[1:2], ones[2:]]).item() == 1.0


def test_products_of_bfloat16_are_exact() -> None:
    """bf16 has 8 bits: a product needs 16, a sum of 1000 of them 26. Float64 holds them all."""
    x = (1 + torch.arange(1000) / 128).to(torch.bfloat16)
    exact = sum(v * v for v in x.tolist())
    assert squared_norm([x]).item() == exact
    assert dot([x], [x.float()]).item() == exact  # two dtypes in one pair
    y = torch.tensor([2.0**-30], dtype=torch.float64)
    assert dot([x, y], [x, torch.ones(1)]).item() == exact + 2.0**-30  # two dtypes in one vector


@pytest.mark.parametrize("parts", [1, 3])
def test_products_pair_elements_by_position_not_by_memory(parts: int) -> None:
    x = torch.arange(48, dtype=torch.float32).reshape(2, 3, 2, 4)
    y = (x * 7) % 11
    expected = float((x * y).sum()) * parts
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        lambda t: torch.stack([t, t + 100], -1)[..., 0],
    ]
    for left in layouts:
        for right in layouts:
            assert dot([left(x)] * parts, [right(y)] * parts).item() == expected


def test_an_expanded_gradient_counts_every_element() -> None:
    """The gradient of a sum is one number seen many times, with stride 0."""
    ones = torch.ones(1).expand(6)
    assert squared_norm([ones]).item() == 6.0
    assert dot([ones, ones], [torch.arange(6.0), torch.arange(6.0)]).item() == 30.0


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([], []),
        ([None], [None]),
        ([torch.ones(2)], [None]),
        ([None, torch.ones(2)], [torch.ones(3), None]),
        ([torch.ones(0)], [torch.ones(0)]),
    ],
)
def test_an_empty_product_is_a_float64_zero(a: Tensors, b: Tensors) -> None:
    found = dot(a, b)
    assert found.item() == 0.0
    assert found.shape == ()
    assert found.dtype == torch.float64


def test_products_have_no_graph() -> None:
    x = torch.ones(3, requires_grad=True)
    assert not dot([x, x * 2], [x, x]).requires_grad
    assert not squared_norm([x]).requires_grad


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 100])
def test_chunks_lose_and_repeat_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes around the chunk, none of the temporaries larger than it, whatever the order of the tensors."""
    monkeypatch.setattr(vectors, "CHUNK", chunk)
    sizes: list[int] = []
    kernel = torch.dot

    def recorded(x: Tensor, y: Tensor) -> Tensor:
        sizes.append(x.numel())
        return kernel(x, y)

    monkeypatch.setattr(torch, "dot", recorded)
    for shapes in ([(3,), (1,), (), (2, 2), (0,), (3, 3), (1,)], [(3, 3), (0,), (), (4,)], [(2,), (2,), (2,)]):
        numbers = iter(range(1, 1000))
        a = [torch.tensor([float(next(numbers)) for _ in range(math.prod(s))]).reshape(s) for s in shapes]
        b = [x % 5 - 1 for x in a]
        sizes.clear()
        assert dot(a, b).item() == sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
        assert max(sizes) <= chunk
        assert sum(sizes) == sum(x.numel() for x in a)
        if chunk == 100:
            assert len(sizes) == 1  # small tensors share one kernel

        first, second = [x.clone() for x in a], [y.clone() for y in b]
        exchange(first, second)
        assert same(first, b)
        assert same(second, a)


def test_without_aliasing_separates_what_autograd_shares() -> None:
    """One gradient for two variables that are added, an expanded one for a sum, a slice of a larger one: in-place
    clipping must be able to scale each of them once.
    """
    shared, buffer = torch.tensor([1.0, 2.0, 3.0]), torch.arange(6.0)
    expanded = torch.tensor(5.0).expand(3)
    alone, turned = torch.tensor([7.0, 8.0]), torch.arange(6.0).reshape(2, 3).t()
    vector = [shared, None, shared, shared[:2], expanded, alone, buffer[2:4], turned, torch.tensor(9.0), torch.zeros(0)]
    before = snapshot(vector)
    found = without_aliasing(vector)
    assert same(found, before)
    assert [x is None for x in found] == [x is None for x in vector]
    # What is alone in its memory is not copied: the first owner, and dense tensors of any layout.
    assert all(found[i] is vector[i] for i in (0, 5, 7, 8))
    for x in found:
        if x is not None:
            x.mul_(10.0)
    assert same(found, add_scaled([None] * len(vector), 10.0, before))
    assert buffer.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


# --- all_finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_finite_sees_every_entry(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    good = [
        torch.full((2, 3), largest, dtype=dtype),
        torch.full((), -largest, dtype=dtype),
        torch.zeros(3, dtype=dtype),
    ]
    verdict = all_finite([None, *good, torch.zeros(0, dtype=dtype)])
    # At the top of the range: a sum of squares would overflow and cry wolf.
    assert verdict is not None
    assert verdict.shape == ()
    assert verdict.dtype == torch.bool
    assert verdict.item() is True
    for place, part in enumerate(good):
        for entry in range(part.numel()):
            for bad in (math.nan, math.inf, -math.inf):
                spoiled = [x.clone() for x in good]
                spoiled[place].view(-1)[entry] = bad
                found = all_finite([None, *spoiled])
                assert found is not None
                assert found.item() is False, (place, entry, bad)


def test_all_finite_over_several_dtypes() -> None:
    """No cast on the way: 1e300 is finite in float64, and float32's largest number is not in bfloat16's way."""
    vector = [torch.tensor([1e300], dtype=torch.float64), torch.tensor(3e38), torch.ones(2, dtype=torch.bfloat16)]
    for order in (vector, vector[::-1]):
        assert bool(all_finite(order))
        assert not bool(all_finite([*order, torch.tensor(math.nan, dtype=torch.bfloat16)]))


def test_all_finite_of_nothing_is_none() -> None:
    assert all_finite([]) is None
    assert all_finite([None, None]) is None
    assert all_finite([torch.zeros(0), None]) is None


# --- exchange ---------------------------------------------------------------------------------------------------------


def payloads(dtype: torch.dtype) -> Tensor:
    """Every kind of float: NaNs that carry a message, infinities, both zeros, a subnormal, a plain number."""
    words = {
        torch.float64: [
            0x7FF8DEADBEEF0001,
            -0x0007FFFFFFFFFFFF,
            0x7FF0000000000000,
            -(2**63),
            0,
            1,
            0x3FF8000000000000,
        ],
        torch.float32: [0x7FC0BEEF, -0x003FFFFF, 0x7F800000, -(2**31), 0, 1, 0x3FC00000],
        torch.bfloat16: [0x7FC7, -0x003F, 0x7F80, -(2**15), 0, 1, 0x3FC0],
    }
    integer = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    return torch.tensor(words[dtype], dtype=integer).view(dtype)


def group(offset: int) -> list[Tensor]:
    """Parameters of several dtypes, shapes and layouts, with every kind of float in them."""
    parts = [payloads(kind).roll(offset) for kind in (torch.float64, torch.float32, torch.bfloat16)]
    matrix = torch.stack([payloads(torch.float64).roll(offset + 1), payloads(torch.float64).roll(offset + 2)])
    image = torch.arange(24, dtype=torch.float32).reshape(1, 2, 3, 4) + offset
    return [*parts, matrix, torch.tensor(-0.0 if offset else 5.0), image, torch.zeros(0)]


@pytest.mark.parametrize("chunk", [1, 8, 20, 1 << 20])
def test_exchange_is_an_involution_bit_for_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "CHUNK", chunk)
    a = [torch.nn.Parameter(x) for x in group(0)]
    b = group(3)
    # The parameters lie in memory in another order than what is exchanged into them.
    a[3].data = a[3].data.t().contiguous().t()
    a[5].data = a[5].data.to(memory_format=torch.channels_last)
    before_a, before_b = [bits(x) for x in a], [bits(x) for x in b]
    addresses = [x.data_ptr() for x in (*a, *b)]
    strides = [x.stride() for x in (*a, *b)]
    versions = [x._version for x in (*a, *b)]

    exchange(a, b)
    assert all(map(torch.equal, map(bits, a), before_b))
    assert all(map(torch.equal, map(bits, b), before_a))
    assert any(not torch.equal(x, y) for x, y in zip(before_a, before_b, strict=True))

    exchange(a, b)
    assert all(map(torch.equal, map(bits, a), before_a))
    assert all(map(torch.equal, map(bits, b), before_b))

    # In place, unseen by autograd: graphs of the caller's over these parameters stay usable.
    assert [x.data_ptr() for x in (*a, *b)] == addresses
    assert [x.stride() for x in (*a, *b)] == strides
    assert [x._version for x in (*a, *b)] == versions
    assert all(x.requires_grad and x.is_leaf for x in a)


def test_exchange_leaves_a_graph_of_the_callers_usable() -> None:
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    value = (w**2).sum()  # saves w
    other = [torch.tensor([7.0, 7.0])]
    exchange([w], other)
    exchange([w], other)
    value.backward()
    assert w.grad is not None
    assert w.grad.tolist() == [4.0, 6.0]


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_several_inner_products_are_those_taken_one_by_one(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(vectors, "CHUNK", chunk)
    a: list[Tensor | None] = [torch.randn(2, 4), None, torch.randn(1), torch.randn(5)]
    b: list[Tensor | None] = [torch.randn(2, 4), None, torch.randn(1), torch.randn(5)]
    gap: list[Tensor | None] = [None, torch.randn(3), torch.randn(1), None]
    nothing: list[Tensor | None] = [None] * 4
    for others in ([a], [b, a], [a, b, a], [b, gap], [gap, a], [nothing, b], [nothing]):
        assert [x.item() for x in dots(a, *others)] == [dot(a, other).item() for other in others]
    assert [x.item() for x in vectors.Vector(a).dots(b, a)] == [dot(a, b).item(), squared_norm(a).item()]


def test_a_vector_is_widened_once_for_several_inner_products(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, read = [torch.randn(4), torch.randn(4)], [torch.randn(4), torch.randn(4)], []
    flattened = vectors._flattened

    def watched(group: list[Tensor]) -> Any:
        read.append(len(group))
        return flattened(group)

    monkeypatch.setattr(vectors, "_flattened", watched)
    dots(a, b, a)
    assert read == [2, 2]


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_values_put_into_variables_come_out_again_bit_for_bit(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(vectors, "CHUNK", chunk)
    variables = [torch.tensor([-0.0, math.nan, 1e-45]).requires_grad_(), torch.randn(2, 3).t().requires_grad_()]
    values = [torch.randn(3), torch.randn(3, 2)]
    before, versions = [x.detach().clone() for x in variables], [x._version for x in variables]
    expected, places = [x.clone() for x in values], [x.data_ptr() for x in variables]
    take_out = vectors.place(variables, values)
    assert all(torch.equal(x, y) for x, y in zip(variables, expected, strict=True))
    take_out()
    assert all(x.detach().numpy().tobytes() == y.numpy().tobytes() for x, y in zip(variables, before, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(values, expected, strict=True))
    assert [x._version for x in variables] == versions
    assert [x.data_ptr() for x in variables] == places
