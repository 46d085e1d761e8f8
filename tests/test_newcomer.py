"""What people bring on their first day: losses, levels, optimizers and habits of all kinds, none of them ours."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, softplus
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

import bilevel
from methods_table import CASES, Case, Problem, assert_same, every_case

simple = pytest.mark.parametrize("method", [bilevel.BOME, bilevel.EBOMLC], ids=["bome", "ebomlc"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- problems that newcomers bring --------------------------------------------------------------------------------


def test_bare_tensors_find_the_answer() -> None:
    # G's minimum is w = alpha, F's minimum on it is alpha = 3.
    alpha, w = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = bilevel.BOME(
        lambda: (w - 3).square().sum(),
        lambda: (w - alpha).square().sum(),
        upper=alpha,
        lower=w,
        upper_optimizer=SGD([alpha], lr=0.1),
        lower_optimizer=SGD([w], lr=0.1),
        inner_steps=5,
    )
    for _ in range(150):
        optimizer.step()
    torch.testing.assert_close(alpha.detach(), torch.full((2,), 3.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(w.detach(), torch.full((2,), 3.0), atol=1e-3, rtol=0)


def regression() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twenty features, three of which matter; few training samples, more for validation."""
    truth = torch.zeros(20)
    truth[:3] = torch.tensor([3.0, -2.0, 1.5])
    x_train, x_val = torch.randn(25, 20), torch.randn(200, 20)
    return x_train, x_train @ truth + torch.randn(25), x_val, x_val @ truth + torch.randn(200)


def test_l2_strength_of_each_feature() -> None:
    x_train, y_train, x_val, y_val = regression()
    model = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(model.weight)
    log_strength = nn.Parameter(torch.full((20,), -2.0))

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return mse_loss(model(x)[:, 0], y)

    def lower_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return upper_loss(batch) + (log_strength.exp() * model.weight[0].square()).sum()

    plain = x_train.pinverse() @ y_train
    optimizer = bilevel.BOME(
        upper_loss,
        lower_loss,
        upper=log_strength,
        lower=model,
        upper_optimizer=Adam([log_strength], lr=0.05),
        lower_optimizer=SGD(model.parameters(), lr=0.05),
        inner_steps=10,
    )
    for _ in range(150):
        optimizer.step((x_val, y_val), (x_train, y_train))
    strength = log_strength.detach().exp()
    # Features that do not matter are held back more strongly, and the fit is better than that without any strength.
    assert strength[:3].max() < strength[3:].median()
    assert upper_loss((x_val, y_val)) < 0.7 * mse_loss(x_val @ plain, y_val)


@simple
def test_a_weight_for_each_sample(method: type[bilevel.BilevelOptimizer]) -> None:
    # Half of the training labels are flipped; the trusted set says which. Sample numbers come with the batch.
    centre = torch.tensor([2.0, 0.0])
    label = torch.randint(2, (80,))
    x = torch.randn(80, 2) + torch.where(label[:, None] == 1, centre, -centre)
    wrong = torch.arange(80) % 2 == 0
    given = torch.where(wrong & (torch.arange(80) % 4 == 0), 1 - label, label)
    flipped = given != label
    clean_label = torch.randint(2, (40,))
    clean = torch.randn(40, 2) + torch.where(clean_label[:, None] == 1, centre, -centre)
    model, weights = nn.Linear(2, 2), nn.Parameter(torch.zeros(80))

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    def lower_loss(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x, y, index = batch
        return (weights[index].sigmoid() * cross_entropy(model(x), y, reduction="none")).mean()

    optimizer = method(
        upper_loss,
        lower_loss,
        upper=weights,
        lower=model,
        upper_optimizer=Adam([weights], lr=0.05),
        lower_optimizer=SGD(model.parameters(), lr=0.3),
    )
    start = weights.detach().clone()
    for _ in range(100):
        index = torch.randperm(80)[:40]
        optimizer.step((clean, clean_label), (x[index], given[index], index))
    learned = weights.detach() - start
    assert learned[flipped].mean() < learned[~flipped].mean()
    assert learned.any()


def test_a_corrector_network() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["ebomlc"])
    before = {name: p.detach().clone() for name, p in problem.parameters().items()}
    first = optimizer.step(*problem.batches()).as_dict()
    for _ in range(20):
        last = optimizer.step(*problem.batches()).as_dict()
    moved = [name for name, p in problem.parameters().items() if not torch.equal(p, before[name])]
    assert set(moved) == {name for name, p in problem.parameters().items() if p.requires_grad}
    assert first.keys() == last.keys()
    assert all(math.isfinite(value) for value in last.values())


@pytest.mark.parametrize("form", ["modules", "parameters", "named", "generator", "set of tensors", "mixed"])
def test_every_form_of_a_level_gives_the_same_step(form: str) -> None:
    body, head, upper = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(3, 2)
    start = [p.detach().clone() for m in (body, head, upper) for p in m.parameters()]
    x = torch.randn(5, 3)

    def run(lower: Any) -> list[Tensor]:
        for p, value in zip([*body.parameters(), *head.parameters(), *upper.parameters()], start, strict=True):
            p.data.copy_(value)
        optimizer = bilevel.BOME(
            lambda x: head(body(x).tanh()).square().mean(),
            lambda x: cross_entropy(head(body(x).tanh()), upper(x).softmax(1)),
            upper=upper,
            lower=lower,
            upper_optimizer=SGD(upper.parameters(), lr=0.1),
            lower_optimizer=SGD([*body.parameters(), *head.parameters()], lr=0.1),
        )
        optimizer.step(x, x)
        return [p.detach().clone() for m in (body, head, upper) for p in m.parameters()]

    forms: dict[str, Any] = {
        "modules": [body, head],
        "parameters": [*body.parameters(), *head.parameters()],
        "named": [(f"body.{n}", p) for n, p in body.named_parameters()] + [("head", head)],
        "generator": (p for m in (body, head) for p in m.parameters()),
        "set of tensors": {*body.parameters(), *head.parameters()},
        "mixed": (body, head.weight, ("b", head.bias)),
    }
    expected = run(nn.ModuleList([body, head]))
    for found, wanted in zip(run(forms[form]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # a set has an order of its own


def test_names_of_the_directions() -> None:
    body, head, upper = nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.Parameter(torch.ones(2))
    bare = torch.ones((), requires_grad=True)
    optimizer = bilevel.BOME(
        lambda x: head(body(x)).square().mean() * bare,
        lambda x: (head(body(x)) * upper).square().mean() * bare,
        upper=upper,
        lower=[body, ("named", head), bare],
        upper_optimizer=SGD([upper], lr=0.1),
        lower_optimizer=SGD([*body.parameters(), *head.parameters(), bare], lr=0.1),
    )
    directions = optimizer.directions(torch.ones(4, 3), torch.ones(4, 3))
    assert list(directions.lower) == ["0.weight", "0.bias", "named.weight", "2"]
    assert list(directions.upper) == ["0"]


def test_two_variables_under_one_name_are_refused() -> None:
    problem, other = Problem(), nn.Linear(8, 3)
    twice = [*problem.classifier.head.named_parameters(), *other.named_parameters()]
    with pytest.raises(ValueError, match=r"BOME\(lower=weight, bias\): names more than one variable"):
        problem.optimizer(CASES["bome"], lower=twice)


# --- optimizers, schedulers, hooks --------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda ps: SGD(ps, lr=0.05),
    "momentum": lambda ps: SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "foreach": lambda ps: SGD(ps, lr=0.05, momentum=0.9, foreach=True),
    "for loop": lambda ps: Adam(ps, lr=0.01, foreach=False),
    "fused": lambda ps: Adam(ps, lr=0.01, fused=True),
    "adamw": lambda ps: AdamW(ps, lr=0.01, weight_decay=0.1, amsgrad=True),
    "tensor rate": lambda ps: Adam(ps, lr=torch.tensor(0.01)),
    "rmsprop": lambda ps: RMSprop(ps, lr=0.01, centered=True),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_torch_optimizer_takes_the_steps(make: Any) -> None:
    problem, twin = Problem(), Problem()
    for p in (problem, twin):
        p.lower_optimizer, p.upper_optimizer = make(p.classifier.parameters()), make(p.corrector.parameters())
    optimizer = problem.optimizer(CASES["ebomlc"])
    for _ in range(3):
        batches = problem.batches()
        torch.manual_seed(1)
        directions = optimizer.directions(*batches)
        torch.manual_seed(1)
        optimizer.step(*batches)
        # The same, as a user would without this library.
        for torch_optimizer, module, named in (
            (twin.upper_optimizer, twin.corrector, directions.upper),
            (twin.lower_optimizer, twin.classifier, directions.lower),
        ):
            torch_optimizer.zero_grad()
            for name, direction in named.items():
                module.get_parameter(name).grad = direction.clone()
            torch_optimizer.step()
        assert_same(problem.parameters(), twin.parameters())


@every_case
def test_schedulers_change_the_steps(case: Case) -> None:
    problem = Problem()
    optimizer = problem.optimizer(case)
    schedulers = [  # the lower one warms up from a rate of 0
        CosineAnnealingLR(problem.upper_optimizer, 5),
        LambdaLR(problem.lower_optimizer, lambda t: min(1.0, t / 3)),
    ]
    for _ in range(4):
        before = problem.classifier.head.weight.detach().clone()
        optimizer.step(*problem.batches())
        rate = problem.lower_optimizer.param_groups[0]["lr"]
        from_outer = case.options.get("step_from") != "lookahead" and "inner_lr" not in case.options
        if rate == 0 and from_outer:
            assert torch.equal(problem.classifier.head.weight, before)
        for each in schedulers:
            each.step()  # torch warns if a step of the optimizer was not noticed


def test_the_inner_rate_follows_the_scheduler() -> None:
    # q of one plain inner step on a linear G is rate * |grad G|^2, exactly.
    alpha, w = torch.ones((), requires_grad=True), torch.ones((), dtype=torch.float64, requires_grad=True)
    lower_optimizer = SGD([w], lr=0.5)
    optimizer = bilevel.BOME(
        lambda: w * w,
        lambda: 3 * w * alpha.double(),
        upper=alpha,
        lower=w,
        upper_optimizer=SGD([alpha], lr=0.0),
        lower_optimizer=lower_optimizer,
    )
    decay = LambdaLR(lower_optimizer, lambda t: 0.1**t)
    for rate in (0.5, 0.05, 0.005):
        assert optimizer.step().constraint.item() == pytest.approx(9 * rate, rel=1e-12)
        decay.step()


def test_a_plateau_scheduler_takes_the_stats() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    scheduler = ReduceLROnPlateau(problem.lower_optimizer, patience=0)
    for _ in range(3):
        stats = optimizer.step(*problem.batches())
        scheduler.step(stats.as_dict()["upper_loss"])


@every_case
def test_parameter_groups_have_their_own_rates(case: Case) -> None:
    problem = Problem()
    classifier = problem.classifier
    head = [classifier.head.weight, classifier.head.bias]
    rest = [p for p in classifier.parameters() if p.requires_grad and not any(p is h for h in head)]
    problem.lower_optimizer = SGD([{"params": rest, "lr": 0.1}, {"params": head, "lr": 0.0}])
    start = [p.detach().clone() for p in head]
    moving = classifier.hidden.weight.detach().clone()
    options: dict[str, Any] = {"inner_lr": None} if case.method is bilevel.BOME else {}
    optimizer = problem.optimizer(case, **options)
    directions = optimizer.directions(*problem.batches())
    assert not case.gives_lower or directions.lower["head.weight"].any()
    if directions.start is not None:
        assert torch.equal(directions.start["head.weight"], start[0])  # the inner step has the group's rate too
        assert not torch.equal(directions.start["hidden.weight"], moving)
    optimizer.step(*problem.batches())
    assert torch.equal(head[0], start[0])
    assert not torch.equal(classifier.hidden.weight, moving)


def test_projection_by_a_hook_after_the_step() -> None:
    problem = Problem()

    def project(*_: Any) -> None:
        with torch.no_grad():
            for p in problem.corrector.parameters():
                p.clamp_(-0.1, 0.1)

    problem.upper_optimizer.register_step_post_hook(project)
    optimizer = problem.optimizer(CASES["bome"])
    for _ in range(3):
        optimizer.step(*problem.batches())
    assert max(float(p.detach().abs().max()) for p in problem.corrector.parameters()) <= 0.1 + 1e-7


@pytest.mark.filterwarnings("ignore:.*hook of the lower optimizer (changed|moved):UserWarning")  # right here
@every_case
def test_clipping_by_a_hook_before_the_step(case: Case) -> None:
    problem = Problem()
    problem.lower_optimizer = SGD(problem.classifier.parameters(), lr=1.0)
    problem.lower_optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(problem.classifier.parameters(), 1e-2) and None
    )
    optimizer = problem.optimizer(case)
    batches = problem.batches()
    torch.manual_seed(1)
    start = optimizer.directions(*batches).start or dict(problem.classifier.named_parameters())
    start = {name: p.detach().clone() for name, p in start.items() if not name.startswith("stem")}
    torch.manual_seed(1)
    optimizer.step(*batches)
    moved = [problem.classifier.get_parameter(name).detach() - value for name, value in start.items()]
    steps = max(case.real_steps, 1)
    assert 0.5e-2 * steps < nn.utils.get_total_norm(moved) < 1.001e-2 * steps


@pytest.mark.filterwarnings("ignore:.*hook of the lower optimizer (changed|moved):UserWarning")  # right here
@pytest.mark.parametrize("scale", [torch.ones(()), torch.ones(3)], ids=["expanded", "shared"])
def test_clipping_works_on_gradients_that_autograd_shares_or_expands(scale: Tensor) -> None:
    # Only F uses a and b, through their sum: autograd then gives both the same tensor, without a barrier to add to it.
    w, alpha = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    lower_optimizer = SGD([w, a, b], lr=1.0)
    lower_optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_value_([a, b], 0.25))
    lower_optimizer.register_step_pre_hook(lambda *_: [p.grad.mul_(0.5) for p in (a, b)] and None)
    optimizer = bilevel.BOME(
        lambda: w.square().sum() + ((a + b) * scale).sum(),
        lambda: (w - alpha).square().sum(),
        upper=alpha,
        lower=[w, a, b],
        upper_optimizer=SGD([alpha], lr=0.1),
        lower_optimizer=lower_optimizer,
    )
    directions = optimizer.directions()
    assert directions.lower["1"].data_ptr() != directions.lower["2"].data_ptr()
    optimizer.step()
    assert torch.equal(a.detach(), torch.full((3,), -0.125))
    assert torch.equal(b.detach(), torch.full((3,), -0.125))


def test_weight_decay_of_the_optimizer_is_not_in_the_directions() -> None:
    decayed, plain = Problem(), Problem()
    decayed.lower_optimizer = SGD(decayed.classifier.parameters(), lr=0.1, weight_decay=0.5)
    plain.lower_optimizer = SGD(plain.classifier.parameters(), lr=0.1)
    batches = decayed.batches()
    torch.manual_seed(1)
    found = decayed.optimizer(CASES["bome"]).directions(*batches)
    torch.manual_seed(1)
    expected = plain.optimizer(CASES["bome"]).directions(*batches)
    assert_same(found.lower, expected.lower)
    before = decayed.classifier.head.weight.detach().clone()
    torch.manual_seed(1)
    decayed.optimizer(CASES["bome"]).step(*batches)
    torch.testing.assert_close(
        decayed.classifier.head.weight.detach(), before - 0.1 * (expected.lower["head.weight"] + 0.5 * before)
    )


# --- what does not take part --------------------------------------------------------------------------------------


@every_case
def test_frozen_layers_with_stale_gradients_stand_still(case: Case) -> None:
    problem = Problem().lived_in()
    stem = problem.classifier.stem
    assert stem.weight.grad is not None  # left over, and held by an optimizer with momentum and weight decay
    before = [p.detach().clone() for p in stem.parameters()]
    optimizer = problem.optimizer(case)
    for _ in range(2):
        optimizer.step(*problem.batches())
    assert_same([p.detach() for p in stem.parameters()], before)
    assert not any(p.requires_grad for p in stem.parameters())


@every_case
def test_variables_that_no_loss_uses_stand_still(case: Case) -> None:
    problem = Problem().lived_in()
    problem.classifier.unused = nn.Linear(2, 2)
    problem.corrector.unused = nn.Linear(2, 2)
    problem.lower_optimizer.add_param_group({"params": list(problem.classifier.unused.parameters())})
    problem.upper_optimizer.add_param_group({"params": list(problem.corrector.unused.parameters())})
    unused = [*problem.classifier.unused.parameters(), *problem.corrector.unused.parameters()]
    before = [p.detach().clone() for p in unused]
    for p in unused:
        p.grad = torch.ones_like(p)  # stale
    optimizer = problem.optimizer(case)
    batches = problem.batches()
    directions = optimizer.directions(*batches)
    assert not any("unused" in name for name in (*directions.upper, *directions.lower))
    for _ in range(2):
        optimizer.step(*batches)
    assert all(p.grad is None for p in unused)
    assert_same([p.detach() for p in unused], before)  # no weight decay, no momentum


@simple
def test_a_variable_that_one_loss_uses_moves(method: type[bilevel.BilevelOptimizer]) -> None:
    body, clean_head, noisy_head, upper = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(3, 2)
    x = torch.randn(5, 3)
    model = nn.ModuleList([body, clean_head, noisy_head])
    options: dict[str, Any] = {"delta": 20.0}
    if method is bilevel.BOME:
        options = {"barrier": bilevel.barrier.GradientNorm(20.0)}
    optimizer = method(
        lambda x: clean_head(body(x)).square().mean(),
        lambda x: cross_entropy(noisy_head(body(x)), upper(x).softmax(1)),
        upper=upper,
        lower=model,
        upper_optimizer=SGD(upper.parameters(), lr=0.1),
        lower_optimizer=SGD(model.parameters(), lr=0.1),
        **options,
    )
    before = [p.detach().clone() for p in model.parameters()]
    (clean_gradient,) = torch.autograd.grad(clean_head(body(x)).square().mean(), [clean_head.weight])
    assert torch.equal(optimizer.directions(x, x).lower["1.weight"], clean_gradient)
    optimizer.step(x, x)
    assert not any(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


def test_an_upper_loss_that_does_not_see_the_upper_variables() -> None:
    problem = Problem()

    def upper_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(problem.classifier(batch[0]), batch[1])

    strong = bilevel.barrier.GradientNorm(20.0)
    optimizer = problem.optimizer(CASES["bome"], upper_loss=upper_loss, barrier=strong)
    before = problem.corrector.out.weight.detach().clone()
    stats = optimizer.step(*problem.batches())
    assert stats.active
    assert not torch.equal(problem.corrector.out.weight, before)


def test_warm_up_steps_of_the_users_own_between_steps() -> None:
    problem, twin = Problem(), Problem()
    optimizer, other = problem.optimizer(CASES["bome"]), twin.optimizer(CASES["bome"])

    def warm_up(p: Problem, batch: Any) -> None:
        p.lower_optimizer.zero_grad()
        loss, _ = p.lower_loss(batch)
        loss.backward()  # leaves .grad in both levels
        p.lower_optimizer.step()

    for index in range(3):
        batches = problem.batches()
        torch.manual_seed(index)
        warm_up(problem, batches[1])
        optimizer.step(*batches)
        torch.manual_seed(index)
        warm_up(twin, batches[1])
        for p in twin.parameters().values():
            p.grad = None  # whatever warming up left behind does not count
        other.step(*batches)
        assert_same(problem.parameters(), twin.parameters())
    assert int(problem.classifier.norm.num_batches_tracked) == 6


# --- everyday use -------------------------------------------------------------------------------------------------


def test_directions_of_several_tasks_are_averaged() -> None:
    problem, twin = Problem(torch.float64), Problem(torch.float64)
    optimizer = problem.optimizer(CASES["bome"])
    tasks = [optimizer.directions(*problem.batches()) for _ in range(3)]
    mean = bilevel.Directions.mean(tasks)
    for name in mean.lower:
        torch.testing.assert_close(mean.lower[name], sum(t.lower[name] for t in tasks) / 3)
    losses = [float(t.stats.upper_loss) for t in tasks]
    assert float(mean.stats.upper_loss) == pytest.approx(sum(losses) / 3)
    optimizer.apply(mean)
    assert not torch.equal(problem.classifier.head.weight, twin.classifier.head.weight)


def test_stats_as_numbers() -> None:
    problem = Problem()
    numbers = problem.optimizer(CASES["bome"]).step(*problem.batches()).as_dict()
    assert all(type(value) is float for value in numbers.values())
    assert numbers["upper_moved"] == 1.0
    assert numbers["skipped"] == 0.0
    assert {"upper_loss", "lower_loss", "multiplier", "active", "constraint", "gradient_norm"} <= numbers.keys()
    assert numbers["lower_aux/call"] == 0.0
    assert "lower_aux/logits" not in numbers


def test_stats_cannot_be_changed() -> None:
    problem = Problem()
    stats = problem.optimizer(CASES["bome"]).step(*problem.batches())
    with pytest.raises(AttributeError):
        stats.upper_moved = False


def test_a_loss_may_be_a_method_a_module_or_a_partial() -> None:
    model, strength = nn.Linear(3, 1), nn.Parameter(torch.zeros(()))

    class Ridge(nn.Module):
        def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            x, y = batch
            return mse_loss(model(x), y) + softplus(strength) * model.weight.square().sum()

    class Task:
        def validate(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            return mse_loss(model(batch[0]), batch[1])

    optimizer = bilevel.BOME(
        Task().validate,
        Ridge(),
        upper=strength,
        lower=model,
        upper_optimizer=Adam([strength], lr=0.1),
        lower_optimizer=SGD(model.parameters(), lr=0.1),
        barrier=bilevel.barrier.GradientNorm(20.0),
    )
    batch = torch.randn(8, 3), torch.randn(8, 1)
    optimizer.step(batch, batch)
    assert strength.detach() != 0


def test_modules_may_change_their_dtype_between_steps() -> None:
    problem = Problem()
    problem.lower_optimizer = SGD(problem.classifier.parameters(), lr=0.1)
    problem.upper_optimizer = SGD(problem.corrector.parameters(), lr=0.1)
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    for module in problem.modules.values():
        module.double()
    problem.dtype = torch.float64
    optimizer.step(*problem.batches())
    assert {p.dtype for p in problem.parameters().values()} == {torch.float64}


def test_two_optimizers_over_one_model_do_not_disturb_each_other() -> None:
    problem, alone = Problem(), Problem()
    bome, other = problem.optimizer(CASES["bome"]), problem.optimizer(CASES["ebomlc"])
    single = alone.optimizer(CASES["bome"])
    for index in range(2):
        batches = problem.batches()
        torch.manual_seed(index)
        other.directions(*batches)
        bome.step(*batches)
        torch.manual_seed(index)
        single.step(*batches)
    assert_same(problem.parameters(), alone.parameters())


def test_steps_in_a_thread() -> None:
    import threading

    problem, twin = Problem(), Problem()
    optimizer, other = problem.optimizer(CASES["bome"]), twin.optimizer(CASES["bome"])
    batches = problem.batches()
    torch.manual_seed(0)
    thread = threading.Thread(target=lambda: [optimizer.step(*batches) for _ in range(3)])
    thread.start()
    thread.join()
    torch.manual_seed(0)
    for _ in range(3):
        other.step(*batches)
    assert_same(problem.parameters(), twin.parameters())
