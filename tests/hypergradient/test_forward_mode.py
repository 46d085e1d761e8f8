"""Which operations of the lower loss have which products: the compatibility table, each entry asserted.

Two kinds of products exist. ``EMLC``, ``MLC`` and one-step ``Unrolled`` need the upper one alone (``G_aw v``), by
forward mode through the lower model; ``Unrolled`` with more steps, ``Implicit`` and BOME's unrolled reading need the
mixed one (with ``G_ww v``), by double backward. Where forward mode has no rule, double backward serves, after one
warning that names the operation; where neither has one, an error names the first-order way. Forward mode for mixed
products, which differentiates the backward of each operation as well, can be asked for. Torch 2.11 and 2.13 on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import bilevel

SAMPLES, CLASSES = 6, 3
CLASS = torch.arange(SAMPLES) % CLASSES
FORWARD, REVERSE, NONE = "forward", "reverse", "none"


Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One entry of the table.

    Attributes:
        make: The layer under test, or a loss between outputs and targets.
        data: Its input.
        upper: Which route serves the mixed product: forward, reverse (after a warning), or none (an error).
        mixed: Which routes serve the Hessian product: forward and reverse, reverse alone, or none.
        names: What the warning or the error names.
        graph: Whether ``Unrolled(differentiate="graph")`` works.
        dtype: Type of the numbers.
        tolerance: Relative distance from the products by differences.
    """

    make: Callable[[], nn.Module | Loss]
    data: Callable[[], Tensor]
    upper: str = FORWARD
    mixed: str = FORWARD
    names: str = ""
    graph: bool = True
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-8


def vectors() -> Tensor:
    return torch.randn(SAMPLES, 5)


def sequences() -> Tensor:
    return torch.randn(SAMPLES, 3, 8)


def images() -> Tensor:
    return torch.randn(SAMPLES, 2, 5, 5)


def tokens() -> Tensor:
    return torch.arange(2 * SAMPLES).reshape(SAMPLES, 2) % 7


class First(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


class Called(nn.Module):
    """A function of the outputs of a linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


class Attention(nn.Module):
    """The fused attention function itself, which has neither rule on its fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.body, x, use_reentrant=False)
        return out


class Square(torch.autograd.Function):
    """A custom function without ``jvp``, differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]  # type: ignore[no-any-return]


class SquareOnce(torch.autograd.Function):
    """The same, differentiable once: for its second derivative torch would answer 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]  # type: ignore[no-any-return]


def after_linear(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(5, 6), *layers)


def after_conv(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(2, 4, 2), *layers)


def encoder(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **options)


def lstm() -> nn.Module:
    return First(nn.LSTM(8, 4, batch_first=True))


NEITHER = {"upper": NONE, "mixed": NONE, "graph": False}
FALLS_BACK = {"upper": REVERSE, "mixed": REVERSE}

TABLE: dict[str, Row] = {
    # Forward mode throughout.
    "Linear, Tanh": Row(after_linear(nn.Tanh()), vectors),
    "ReLU, in place": Row(after_linear(nn.ReLU(inplace=True)), vectors),
    "LeakyReLU": Row(after_linear(nn.LeakyReLU()), vectors),
    "PReLU": Row(after_linear(nn.PReLU()), vectors),
    "GELU": Row(after_linear(nn.GELU()), vectors),
    "GELU, tanh": Row(after_linear(nn.GELU(approximate="tanh")), vectors),
    "ELU": Row(after_linear(nn.ELU()), vectors),
    "Softplus": Row(after_linear(nn.Softplus()), vectors),
    "Sigmoid": Row(after_linear(nn.Sigmoid()), vectors),
    "Hardtanh": Row(after_linear(nn.Hardtanh()), vectors),
    "Hardswish": Row(after_linear(nn.Hardswish()), vectors),
    "GLU": Row(after_linear(nn.GLU()), vectors),
    "Dropout": Row(after_linear(nn.Dropout(0.4)), vectors),
    "LayerNorm": Row(after_linear(nn.LayerNorm(6)), vectors),
    "RMSNorm": Row(after_linear(nn.RMSNorm(6)), vectors),
    "BatchNorm in training mode": Row(after_linear(nn.BatchNorm1d(6)), vectors),
    "BatchNorm in evaluation mode": Row(after_linear(nn.BatchNorm1d(6).eval()), vectors),
    "Conv2d, BatchNorm2d": Row(after_conv(nn.BatchNorm2d(4), nn.ReLU()), images),
    "InstanceNorm": Row(after_conv(nn.InstanceNorm2d(4, affine=True)), images),
    "MaxPool": Row(after_conv(nn.MaxPool2d(2)), images),
    "AvgPool": Row(after_conv(nn.AvgPool2d(2)), images),
    "ConvTranspose": Row(lambda: nn.ConvTranspose2d(2, 4, 2), images),
    "Upsample, bilinear": Row(after_conv(nn.Upsample(scale_factor=2, mode="bilinear")), images),
    "Embedding": Row(lambda: nn.Embedding(7, 4), tokens),
    "RNN": Row(lambda: First(nn.RNN(8, 4, batch_first=True)), sequences),
    "GRU": Row(lambda: First(nn.GRU(8, 4, batch_first=True)), sequences),
    "GRU in float32": Row(
        lambda: First(nn.GRU(8, 4, batch_first=True)), sequences, dtype=torch.float32, tolerance=2e-2
    ),
    "LSTM in float64": Row(lstm, sequences),
    "scaled_dot_product_attention": Row(Attention, sequences),
    "attention in float32": Row(Attention, sequences, dtype=torch.float32, tolerance=2e-2),
    "TransformerEncoderLayer without dropout": Row(encoder(dropout=0.0), sequences),
    "TransformerEncoderLayer with dropout": Row(encoder(dropout=0.3), sequences),
    "TransformerEncoderLayer, GELU, norm first": Row(
        encoder(dropout=0.1, activation="gelu", norm_first=True), sequences
    ),
    "TransformerEncoderLayer in evaluation mode": Row(lambda: encoder(dropout=0.3)().eval(), sequences),
    "TransformerEncoderLayer in float32": Row(encoder(dropout=0.3), sequences, dtype=torch.float32, tolerance=2e-2),
    # Losses, of outputs and targets that both carry a gradient.
    "cross_entropy, smoothed": Row(
        lambda: lambda out, y: functional.cross_entropy(out, y.softmax(1), label_smoothing=0.1), vectors
    ),
    "cross_entropy of weighted samples": Row(
        lambda: lambda out, y: (functional.cross_entropy(out, CLASS, reduction="none") * y[:, 0].sigmoid()).mean(),
        vectors,
    ),
    "kl_div": Row(
        lambda: lambda out, y: functional.kl_div(out.log_softmax(1), y.softmax(1), reduction="batchmean"), vectors
    ),
    "binary_cross_entropy_with_logits": Row(
        lambda: lambda out, y: functional.binary_cross_entropy_with_logits(out, y.sigmoid()), vectors
    ),
    "smooth_l1_loss": Row(lambda: functional.smooth_l1_loss, vectors),
    "squares": Row(lambda: lambda out, y: (out - y).square().mean(), vectors),
    "mse_loss": Row(lambda: functional.mse_loss, vectors, mixed=REVERSE, names="mse_loss, most likely: write (a - b)"),
    "huber_loss": Row(lambda: functional.huber_loss, vectors, mixed=REVERSE, names="huber_loss_backward"),
    # Forward mode of the operation, but not of its backward.
    "SiLU": Row(after_linear(nn.SiLU()), vectors, mixed=REVERSE, names="silu_backward"),
    "Mish": Row(after_linear(nn.Mish()), vectors, mixed=REVERSE, names="mish_backward"),
    "GroupNorm": Row(after_linear(nn.GroupNorm(2, 6)), vectors, mixed=REVERSE, names="native_group_norm_backward"),
    "checkpointing": Row(Checkpointed, vectors, mixed=REVERSE, names="checkpoint", graph=False),
    "Hardsigmoid": Row(after_linear(nn.Hardsigmoid()), vectors, mixed=NONE, names="hardsigmoid", graph=False),
    # Double backward alone.
    "LSTM in float32": Row(
        lstm, sequences, **FALLS_BACK, names="mkldnn_rnn_layer", dtype=torch.float32, tolerance=2e-2
    ),
    "a function without jvp": Row(lambda: Called(Square.apply), vectors, **FALLS_BACK, names="jvp"),
    # The singular vectors follow w in a difference, and count as constants in a derivative.
    "spectral norm in training mode": Row(
        lambda: spectral_norm(nn.Linear(5, 6)), vectors, **FALLS_BACK, names="div_out", tolerance=1e-3
    ),
    # Neither: first-order methods, or products by differences.
    "EmbeddingBag": Row(lambda: nn.EmbeddingBag(7, 4), tokens, **NEITHER, names="embedding_bag"),
    "EmbeddingBag, sum": Row(lambda: nn.EmbeddingBag(7, 4, mode="sum"), tokens, **NEITHER, names="embedding_bag"),
    "cdist": Row(
        lambda: Called(lambda h: torch.cdist(h, bilevel.hold(h.flip(0).detach()) + 1)),
        vectors,
        **NEITHER,
        names="cdist",
    ),
    "weight norm": Row(lambda: weight_norm(nn.Linear(5, 6)), vectors, **NEITHER, names="weight_norm"),
    "a function that is once_differentiable": Row(
        lambda: Called(SquareOnce.apply), vectors, **NEITHER, names="once_differentiable"
    ),
}
every_row = pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())


def corrected(out: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(out, target.softmax(1))


def build(row: Row, method: Any, **options: Any) -> Any:
    """Label correction: the layer under test and a linear head below, the targets of given labels above."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = row.make()
        layer = made.to(row.dtype) if isinstance(made, nn.Module) else nn.Linear(5, 6).to(row.dtype)
        criterion = corrected if isinstance(made, nn.Module) else made
        x = row.data()
        x = x.to(row.dtype) if x.is_floating_point() else x
        with torch.no_grad():
            width = layer(x).flatten(1).shape[1]
        head, corrector = nn.Linear(width, CLASSES).to(row.dtype), nn.Linear(CLASSES, CLASSES).to(row.dtype)
        lower = nn.ModuleList([layer, head])
        label = torch.eye(CLASSES, dtype=row.dtype)[CLASS]

    def lower_loss() -> Tensor:
        return criterion(head(torch.tanh(layer(x).flatten(1))), corrector(label))

    def upper_loss() -> Tensor:
        return cross_entropy(head(torch.tanh(layer(x).flatten(1))), label)

    return method(
        upper_loss,
        lower_loss,
        upper=corrector,
        lower=lower,
        upper_optimizer=torch.optim.SGD(corrector.parameters(), lr=0.1),
        lower_optimizer=torch.optim.SGD(lower.parameters(), lr=0.1),
        **options,
    )


def answer(optimizer: Any) -> Tensor:
    torch.manual_seed(1)  # the dropout masks
    return torch.cat([d.reshape(-1) for d in optimizer.directions().upper.values()])


def heard(optimizer: Any) -> tuple[Tensor, list[str]]:
    """The answer, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = answer(optimizer)
    return found, [str(w.message) for w in caught]


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "upper": (bilevel.EMLC, {}),
    "mixed": (bilevel.Unrolled, {"inner_steps": 2, "differentiate": "adjoint"}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@every_row
def test_the_route_of_the_table_is_taken_and_right(row: Row, kind: str) -> None:
    """The answer is that of central differences of plain gradients; a fallback says so in one warning."""
    method, options = KINDS[kind]
    route = getattr(row, kind)
    optimizer = build(row, method, **options)
    if route == NONE:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with pytest.raises(bilevel.ClosureError) as caught:
                answer(optimizer)
        text = str(caught.value)
        assert text.startswith("lower_loss has no double backward: ")
        assert row.names in text
        assert text.endswith('Use product="difference", or a first-order method such as BOME or FiniteDifference.')
        return
    expected = answer(build(row, method, product="difference", verify="never", **options))
    found, messages = heard(optimizer)
    assert (found - expected).norm() < row.tolerance * expected.norm()
    assert expected.norm() > 1e-4
    if row.upper == FORWARD:  # Unrolled takes a mixed product too, for its first step
        assert messages == []
    else:
        assert len(messages) == 1
        assert messages[0].startswith("lower_loss has no forward-mode product: ")
        assert row.names in messages[0]
        assert messages[0].endswith(". Falling back to double backward for this optimizer.")
        again, messages = heard(optimizer)
        assert messages == []
        assert torch.equal(again, found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert optimizer.directions().stats.product == (REVERSE if kind == "mixed" else route)


@every_kind
@every_row
def test_forward_mode_may_be_asked_for(row: Row, kind: str) -> None:
    """Without a rule, ``product="forward"`` fails, and names the operation and the way out."""
    method, options = KINDS[kind]
    if getattr(row, kind) == FORWARD:
        expected = answer(build(row, method, product="difference", verify="never", **options))
        found, messages = heard(build(row, method, product="forward", **options))
        assert messages == []
        assert (found - expected).norm() < row.tolerance * expected.norm()
        return
    with pytest.raises(bilevel.ClosureError) as caught:
        answer(build(row, method, product="forward", **options))
    text = str(caught.value)
    assert text.startswith("lower_loss has no forward-mode product: ")
    assert {"once_differentiable": "jvp"}.get(row.names, row.names) in text
    assert text.endswith("or a first-order method such as BOME or FiniteDifference.")


@every_row
def test_the_kept_graph(row: Row) -> None:
    """``differentiate="graph"`` differentiates twice: it works where double backward does, and refuses the rest."""
    optimizer = build(row, bilevel.Unrolled, inner_steps=2, differentiate="graph")
    if row.graph:
        differences = build(
            row, bilevel.Unrolled, inner_steps=2, differentiate="adjoint", product="difference", verify="never"
        )
        expected = answer(differences)
        found, messages = heard(optimizer)
        assert messages == []
        assert (found - expected).norm() < row.tolerance * expected.norm()
        return
    with pytest.raises(bilevel.ClosureError) as caught:
        answer(optimizer)
    text = str(caught.value)
    assert row.names in text
    assert 'differentiate="adjoint"' in text
    assert ("first-order method such as BOME" in text) == (row.mixed == NONE)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (bilevel.BOME, {"barrier": bilevel.barrier.GradientNorm(100.0)}),  # so strong that alpha feels it
        (bilevel.EBOMLC, {"delta": 100.0}),
        (bilevel.FiniteDifference, {}),
        (bilevel.SAMA, {}),
    ],
    ids=["BOME", "EBOMLC", "FiniteDifference", "SAMA"],
)
@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if NONE in (row.upper, row.mixed)])
def test_first_order_methods_need_no_rule(name: str, method: Any, options: dict[str, Any]) -> None:
    """What the errors advise."""
    found, messages = heard(build(TABLE[name], method, **options))
    assert messages == []
    assert found.isfinite().all()
    assert found.norm() > 0


def test_one_warning_where_both_kinds_of_products_are_taken() -> None:
    """``Unrolled(2)`` needs both; its mixed product alone starts with forward mode."""
    optimizer = build(TABLE["LSTM in float32"], bilevel.Unrolled, inner_steps=2, differentiate="adjoint")
    _, messages = heard(optimizer)
    assert len(messages) == 1
    assert optimizer._evaluator.verification.choices == {"mixed product, auto": REVERSE}


def test_the_users_settings_of_attention_stand_again() -> None:
    """Products choose the plain kernels for their own duration."""
    for chosen in (True, False):
        torch.backends.mha.set_fastpath_enabled(chosen)
        try:
            answer(build(TABLE["TransformerEncoderLayer in evaluation mode"], bilevel.EMLC))
            assert torch.backends.mha.get_fastpath_enabled() is chosen
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize("options", [{}, {"differentiate": "graph"}], ids=["adjoint", "graph"])
@pytest.mark.parametrize("side", ["upper_loss", "lower_loss"])
def test_an_error_of_the_loss_itself_is_not_taken_for_a_missing_rule(side: str, options: dict[str, Any]) -> None:
    """Whatever its words are; it arrives as it was raised."""

    def loss(*batch: Any) -> Tensor:
        raise NotImplementedError("this double backward is not implemented")

    row = TABLE["Linear, Tanh"]
    optimizer = build(row, bilevel.Unrolled, inner_steps=2, **options)
    getattr(optimizer._evaluator, side)._function = loss
    with pytest.raises(NotImplementedError, match=r"^this double backward is not implemented$"):
        optimizer.directions()
