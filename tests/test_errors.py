"""Bad input: each row is refused with an error of the right kind, which says what is wrong, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bilevel
from bilevel import barrier
from methods_table import CASES, Problem, Record

Bad = tuple[Callable[[Problem], Any], type[BaseException], str]


def built(method: str = "bome", **changes: Any) -> Callable[[Problem], Any]:
    return lambda problem: problem.optimizer(CASES[method], **changes)


def built_of(change: Callable[[Problem], dict[str, Any]]) -> Callable[[Problem], Any]:
    """Build with arguments that are made of the problem's own parts."""
    return lambda problem: problem.optimizer(CASES["bome"], **change(problem))


def stepped(change: Callable[[Problem], dict[str, Any]] = lambda problem: {}, method: str = "bome") -> Any:
    """Build and take a step; what is made of ``change`` is the loss under test."""
    return lambda problem: problem.optimizer(CASES[method], **change(problem)).step(*problem.batches())


def sgd(*parameters: Tensor, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(parameters), **{"lr": 0.1, **options})


def returning(side: str, change: Callable[[Tensor], Any]) -> Any:
    """A step in which one loss returns ``change`` of what it should."""

    def arguments(problem: Problem) -> dict[str, Any]:
        original = getattr(problem, f"{side}_loss")
        return {f"{side}_loss": lambda batch: change(original(batch)[0])}

    return stepped(arguments)


def strangers() -> list[Tensor]:
    return [torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)]


CONSTRUCTION: dict[str, Bad] = {
    "a loss value instead of a function": (
        built(upper_loss=torch.ones(())), TypeError, r"BOME\(upper_loss=Tensor\): must be callable"),
    "no lower loss": (built(lower_loss=None), TypeError, r"BOME\(lower_loss=NoneType\): must be callable"),
    "a mapping as a level": (
        built_of(lambda p: {"upper": dict(p.corrector.named_parameters())}), TypeError,
        r"BOME\(upper=dict\): must be an nn\.Module, a Parameter, or an iterable"),
    "a string as a level": (built(lower="classifier"), TypeError, r"BOME\(lower=str\): must be"),
    "a number as a level": (built(lower=3), TypeError, r"BOME\(lower=int\): must be"),
    "a number among the variables": (
        built_of(lambda p: {"upper": [p.corrector, 3]}), TypeError, "item 1 is a int, expected"),
    "an empty level": (built(upper=[]), ValueError, "holds no variable.*generator"),
    "a used-up generator": (
        built_of(lambda p: {"upper": iter([])}), ValueError, "holds no variable.*generator"),
    "a module without parameters": (
        built(upper=nn.ReLU()), ValueError, r"BOME\(upper=ReLU\): holds no tensor with requires_grad"),
    "a level all frozen": (
        built_of(lambda p: {"upper": p.teacher}), ValueError, "requires_grad. Is everything frozen"),
    "a computed tensor": (
        built_of(lambda p: {"upper": [2 * p.corrector.out.weight]}), ValueError, "computed from other tensors"),
    "a lazy module": (
        built_of(lambda p: {"upper": nn.LazyLinear(2)}), ValueError, "lazy parameter without a shape"),
    "complex variables": (
        lambda p: p.optimizer(CASES["bome"], **of_one(torch.ones(2, dtype=torch.complex64, requires_grad=True))),
        TypeError, "dense and real floating point"),
    "a variable of both levels": (
        built_of(lambda p: {
            "upper": [p.corrector, p.classifier.head],
            "upper_optimizer": sgd(*p.corrector.parameters(), *p.classifier.head.parameters())}),
        ValueError, r"BOME\(lower=head\.weight, head\.bias\): is .*upper= as well"),
    "one optimizer for both levels": (
        built_of(lambda p: {
            k: sgd(*p.corrector.parameters(), *p.classifier.parameters())
            for k in ("upper_optimizer", "lower_optimizer")}),
        ValueError, r"upper_optimizer=SGD\): holds 6 trainable tensors outside upper="),
    "optimizers exchanged": (
        built_of(lambda p: {"upper_optimizer": p.lower_optimizer, "lower_optimizer": p.upper_optimizer}),
        ValueError, "is not moved by upper_optimizer"),
    "a variable that no optimizer moves": (
        built_of(lambda p: {"upper_optimizer": sgd(p.corrector.mix.weight)}), ValueError,
        r"BOME\(upper=mix\.bias, norm\.weight, norm\.bias and 2 more\): is not moved by upper_optimizer"),
    "an optimizer of something else too": (
        built_of(lambda p: {"upper_optimizer": sgd(*p.corrector.parameters(), *strangers())}), ValueError,
        r"upper_optimizer=SGD\): holds 2 trainable tensors outside upper= \(first shape \(2, 2\)\)"),
    "a class instead of an optimizer": (
        built(upper_optimizer=torch.optim.SGD), TypeError,
        r"upper_optimizer=type\): must be a torch\.optim\.Optimizer"),
    "a scheduler instead of an optimizer": (
        built_of(lambda p: {"lower_optimizer": torch.optim.lr_scheduler.StepLR(sgd(torch.ones(1)), 1)}),
        TypeError, r"lower_optimizer=StepLR\): must be a torch\.optim\.Optimizer"),
    "an optimizer that needs a closure": (
        built_of(lambda p: {"lower_optimizer": torch.optim.LBFGS(p.classifier.parameters())}), TypeError,
        r"lower_optimizer=LBFGS\): needs a closure"),
    "an optimizer that walks uphill": (
        built_of(lambda p: {"upper_optimizer": sgd(*p.corrector.parameters(), maximize=True)}), ValueError,
        "maximize=True"),
    "a process group that is none": (
        built(process_group="nccl"), TypeError, r"BOME\(process_group=str\): must be a group of torch.distributed"),
    "other= without modules": (
        built_of(lambda p: {"other": [p.teacher, torch.ones(1)]}), TypeError, r"BOME\(other=Tensor\): must be modules"),
    "other=None": (built(other=None), TypeError, r"BOME\(other=NoneType\): must be"),
    "an unknown policy": (built(on_nonfinite="warn"), ValueError, r"on_nonfinite='warn'\): must be one of 'raise', "),
    "an unknown buffer policy": (built(upper_buffers="twice"), ValueError, "upper_buffers='twice'.*'once', 'every'"),
    "a buffer policy of another type": (built(lower_buffers=None), ValueError, r"lower_buffers=None\): must be one of"),
    "no inner steps": (built(inner_steps=0), ValueError, r"BOME\(inner_steps=0\): must be at least 1"),
    "a fraction of a step": (built(inner_steps=1.0), TypeError, r"inner_steps=1\.0\): must be an integer"),
    "a flag for a count": (built(inner_steps=True), TypeError, r"inner_steps=True\): must be an integer"),
    "a negative rate": (built(inner_lr=-0.1), ValueError, r"inner_lr=-0\.1\): must be finite and greater than 0"),
    "a rate of zero": (built(inner_lr=0.0), ValueError, "greater than 0"),
    "a rate as a tensor": (built(inner_lr=torch.tensor(0.1)), TypeError, "must be a Python number"),
    "a rate that is not a number": (built(inner_lr=float("nan")), ValueError, "must be finite"),
    "a number for a barrier": (
        built(barrier=0.5), TypeError, r"BOME\(barrier=0\.5\): must be a barrier function, such as"),
    "the class of a barrier": (built(barrier=barrier.Value), TypeError, "must be a barrier function, such as"),
    "a negative delta": (lambda p: barrier.GradientNorm(-1.0), ValueError, r"GradientNorm\(delta=-1\.0\): must be"),
    "an infinite delta": (lambda p: barrier.Value(float("inf")), ValueError, r"Value\(delta=inf\): must be finite"),
    "a delta in words": (lambda p: barrier.Aligned("1"), TypeError, r"Aligned\(delta=1\): must be a Python number"),
    "a negative delta of EBOMLC": (built("ebomlc", delta=-0.1), ValueError, r"EBOMLC\(delta=-0\.1\): must be"),
    "a negative damping": (built("ebomlc", xi=-0.5), ValueError, r"EBOMLC\(xi=-0\.5\): must be"),
    "a damping as a tensor": (built("ebomlc", xi=torch.ones(())), TypeError, "Convert tensors with float"),
    "inner steps of EBOMLC": (built("ebomlc", inner_steps=2), TypeError, "inner_steps"),
    "a barrier of EBOMLC": (built("ebomlc", barrier=barrier.Value(0.1)), TypeError, "barrier"),
    "an unknown reading": (built(value_gradient="total"), ValueError, "value_gradient='total'.*'value_function'"),
    "an unknown start": (built(step_from="middle"), ValueError, "step_from='middle'.*'current', 'lookahead'"),
    "an unknown inner step": (built(inner_step="adam"), ValueError, "inner_step='adam'.*'gradient', 'optimizer'"),
    "an unknown route": (built(product="hessian"), ValueError, "product='hessian'.*'auto', 'forward'"),
    "a negative eps": (built(eps=-1e-8), ValueError, r"eps=-1e-08\): must be"),
    "a cutoff that is not a number": (built(cutoff=float("nan")), ValueError, r"cutoff=nan\): must be"),
    "a negative limit": (built(multiplier_max=-1.0), ValueError, r"multiplier_max=-1\.0\): must be"),
    "a preview of an optimizer without one": (
        built_of(lambda p: {
            "inner_step": "optimizer", "lower_optimizer": torch.optim.RMSprop(p.classifier.parameters())}),
        ValueError, r"lower_optimizer=RMSprop\): cannot be .* as a function.*SGD, Adam, AdamW"),
    "an option that does not exist": (built(learning_rate=0.1), TypeError, "learning_rate"),
    "an abstract class": (
        lambda p: bilevel.BilevelOptimizer(p.upper_loss, p.lower_loss), TypeError, "abstract"),
}  # fmt: skip


def of_one(variable: Tensor) -> dict[str, Any]:
    return {"upper": variable, "upper_optimizer": sgd(variable)}


def reading_only(side: str) -> Callable[[Problem], dict[str, Any]]:
    """A lower loss that reads the variables of one level alone."""
    if side == "lower":
        return lambda p: {"lower_loss": lambda batch: p.classifier(batch[0]).square().mean()}
    return lambda p: {"lower_loss": lambda batch: p.corrector.out.weight.square().mean()}


def detached_target(problem: Problem) -> dict[str, Any]:
    def loss(batch: Any) -> Tensor:
        features = problem.classifier.features(batch[0])
        target = problem.corrector(features, batch[1]).detach()
        return nn.functional.cross_entropy(problem.classifier.head(features), target)

    return {"lower_loss": loss}


def held_target(problem: Problem) -> dict[str, Any]:
    def loss(batch: Any) -> Tensor:
        features = problem.classifier.features(batch[0])
        target = bilevel.hold(problem.corrector(features, batch[1]))
        return nn.functional.cross_entropy(problem.classifier.head(features), target)

    return {"lower_loss": loss}


def without_grad(problem: Problem) -> dict[str, Any]:
    return {"upper_loss": torch.no_grad()(problem.upper_loss)}


def sparse(problem: Problem) -> dict[str, Any]:
    table = nn.Embedding.from_pretrained(torch.ones(4, 3), freeze=False, sparse=True)
    return {
        "lower": table,
        "lower_optimizer": sgd(*table.parameters()),
        "upper_loss": lambda batch: table(torch.tensor([0])).square().mean(),
        "lower_loss": lambda batch: (table(torch.tensor([1])) * problem.corrector.out.bias).sum(),
    }


def with_shape(shape: str) -> Callable[[Tensor], Any]:
    return {"(1,)": lambda x: x.reshape(1), "(2, 3)": lambda x: x.expand(2, 3)}[shape]


LOSSES: dict[str, Bad] = {
    "a float": (
        returning("upper", lambda x: float(x.detach())), bilevel.ClosureError,
        r"upper_loss returned a float, expected a scalar tensor, or .*without \.item\(\)"),
    "None": (returning("lower", lambda x: None), bilevel.ClosureError, "lower_loss returned a NoneType"),
    "a vector of one": (
        returning("upper", with_shape("(1,)")), bilevel.ClosureError,
        r"upper_loss returned shape \(1,\).*Reduce it with \.mean\(\)"),
    "a loss for each sample": (
        returning("lower", with_shape("(2, 3)")), bilevel.ClosureError, r"lower_loss returned shape \(2, 3\)"),
    "a tuple of three": (
        returning("lower", lambda x: (x, 1, 2)), bilevel.ClosureError, "lower_loss returned a tuple"),
    "the aux first": (
        returning("lower", lambda x: ({"accuracy": 1}, x)), bilevel.ClosureError, "lower_loss returned a dict"),
    "a list": (returning("lower", lambda x: [x]), bilevel.ClosureError, "lower_loss returned a list"),
    "an integer tensor": (
        returning("lower", lambda x: x.detach().long()), bilevel.ClosureError, r"dtype torch\.int64.*\.float\(\)"),
    "a complex tensor": (
        returning("lower", lambda x: x.to(torch.complex64)), bilevel.ClosureError, r"dtype torch\.complex64"),
    "no graph": (
        returning("upper", Tensor.detach), bilevel.ClosureError, "upper_loss returned a scalar without a graph"),
    "no graph, by no_grad": (
        stepped(without_grad), bilevel.ClosureError, r"upper_loss returned a scalar without a graph.*no_grad"),
    "another device": (
        returning("lower", lambda x: x.to("meta")), bilevel.ClosureError,
        "lower_loss returned a tensor on meta, expected.*variables are on cpu. Move the batch"),
    "G without alpha": (
        stepped(reading_only("lower")), bilevel.ClosureError, "lower_loss does not depend on any upper variable"),
    "G without w": (
        stepped(reading_only("upper")), bilevel.ClosureError, "lower_loss does not depend on any lower variable"),
    "a detached target": (
        stepped(detached_target), bilevel.ClosureError, "lower_loss does not depend on any upper.*was detached"),
    "a held target": (stepped(held_target), bilevel.ClosureError, "lower_loss does not depend on any upper variable"),
    "F without w": (
        stepped(lambda p: {"upper_loss": lambda batch: p.corrector.out.weight.square().mean()}), bilevel.ClosureError,
        "upper_loss does not depend on any lower variable"),
    "F of another copy of the model": (
        stepped(lambda p: {"upper_loss": Problem().upper_loss}), bilevel.ClosureError,
        "upper_loss does not depend on any lower variable.*another copy of the model"),
    "sparse gradients": (stepped(sparse), bilevel.ClosureError, r"layout torch\.sparse_coo.*sparse=False"),
    "a computed tensor kept": (
        stepped(lambda p: {"upper_loss": kept_weight(p)}), bilevel.ClosureError,
        r"upper_loss reads lower variable head\.weight through a tensor that was computed outside the call"),
    "a loss without a parameter": (stepped(lambda p: {"upper_loss": lambda: torch.ones(())}), TypeError, "argument"),
}  # fmt: skip


def kept_weight(problem: Problem) -> Callable[[Any], Tensor]:
    weight = problem.classifier.head.weight * 1
    return lambda batch: (problem.classifier.features(batch[0]) @ weight.T).square().mean()


def batches(*args: Any, **kwargs: Any) -> Callable[[Problem], Any]:
    return lambda problem: problem.optimizer(CASES["bome-3"]).step(*args, **kwargs)


BATCHES: dict[str, Bad] = {
    "two lower batches for three steps": (
        batches(0, 1, 2), TypeError,
        r"BOME\.step: got 2 lower batches, expected 1 lower batch for all inner steps or exactly 3, one each"),
    "four lower batches for three steps": (batches(0, 1, 2, 3, 4), TypeError, r"got 4 lower batches.*inner_steps=3"),
    "two lower batches for one step": (
        lambda p: p.optimizer(CASES["bome"]).directions(0, 1, 2), TypeError, "got 2 lower batches, expected 1 lower"),
    "two lower batches for EBOMLC": (
        lambda p: p.optimizer(CASES["ebomlc"]).step(0, 1, 2), TypeError, r"EBOMLC\.step: got 2 lower batches"),
    "the upper batch twice": (batches(0, upper=1), TypeError, r"got upper= and 1 positional batch"),
    "the lower batch twice": (batches(0, 1, lower=2), TypeError, r"got lower= and 1 positional lower batch"),
    "an unknown keyword": (batches(0, batch=1), TypeError, "batch"),
}  # fmt: skip


def changed_directions(change: Callable[[bilevel.Directions], Any]) -> Callable[[Problem], Any]:
    def call(problem: Problem) -> Any:
        optimizer = problem.optimizer(CASES["bome"])
        return optimizer.apply(change(optimizer.directions(*problem.batches())))

    return call


def with_upper(directions: bilevel.Directions, **tensors: Tensor) -> bilevel.Directions:
    return replace(directions, upper={**directions.upper, **tensors})


def under_inference_mode(problem: Problem) -> Any:
    optimizer = problem.optimizer(CASES["bome"])
    some = problem.batches()
    with torch.inference_mode():
        return optimizer.step(*some)


USE: dict[str, Bad] = {
    "directions of another name": (
        changed_directions(lambda d: with_upper(d, stranger=torch.ones(1))), ValueError,
        r"BOME\.apply\(directions=stranger\): names no upper variable"),
    "something else than directions": (
        lambda p: p.optimizer(CASES["bome"]).apply({"out.bias": torch.ones(3)}), TypeError,
        r"BOME\.apply\(directions=dict\): must be what directions"),
    "directions of another shape": (
        changed_directions(lambda d: with_upper(d, **{"out.bias": torch.ones(7)})), ValueError,
        r"directions=out\.bias\): has shape.*\(7,\)"),
    "directions of another dtype": (
        changed_directions(lambda d: with_upper(d, **{"out.bias": torch.ones(3, dtype=torch.float64)})), ValueError,
        r"directions=out\.bias\): has shape.*float64"),
    "levels exchanged": (
        changed_directions(lambda d: replace(d, upper=d.lower, lower=d.upper)), ValueError, "names no upper variable"),
    "the mean of nothing": (lambda p: bilevel.Directions.mean([]), ValueError, "needs at least one"),
    "the mean of inner starts": (
        lambda p: bilevel.Directions.mean([p.optimizer(CASES["bome-inner"]).directions(*p.batches())]), ValueError,
        "lower steps start from different points"),
    "the mean of strangers": (
        lambda p: bilevel.Directions.mean(
            [d := p.optimizer(CASES["bome"]).directions(*p.batches()), replace(d, upper={})]),
        ValueError, "the names differ"),
    "a step under inference mode": (under_inference_mode, RuntimeError, r"inference_mode\(\). Leave that context"),
}  # fmt: skip

TABLE: dict[str, Bad] = {
    f"{group}: {name}": row
    for group, rows in (("construction", CONSTRUCTION), ("loss", LOSSES), ("batches", BATCHES), ("use", USE))
    for name, row in rows.items()
}


@pytest.mark.parametrize(("call", "kind", "pattern"), TABLE.values(), ids=TABLE.keys())
def test_bad_input_is_refused_and_changes_nothing(
    call: Callable[[Problem], Any], kind: type[BaseException], pattern: str
) -> None:
    problem = Problem().lived_in()
    before = Record(problem)
    with pytest.raises(kind, match=pattern) as caught:
        call(problem)
    assert caught.type is kind  # not a subclass that torch or Python raised for its own reason
    assert Record(problem).differences(before) == []


def test_the_table_is_as_long_as_promised() -> None:
    assert len(TABLE) >= 30


@pytest.mark.parametrize("name", [n for n, row in TABLE.items() if row[1] in (ValueError, bilevel.ClosureError)])
def test_messages_are_sentences_of_moderate_length(name: str) -> None:
    call, kind, _ = TABLE[name]
    with pytest.raises(kind) as caught:
        call(Problem().lived_in())
    text = str(caught.value)
    assert text.endswith((".", "?"))
    assert "\n" not in text
    assert len(text) < 400
    assert "object at 0x" not in text


def test_an_uninitialised_level_may_be_used_once_it_has_a_shape() -> None:
    with torch.random.fork_rng(devices=[]):
        lazy = nn.LazyLinear(2)
        lazy(torch.ones(1, 3))
    problem = Problem()
    problem.optimizer(CASES["bome"], upper=lazy, upper_optimizer=sgd(*lazy.parameters()))


# --- variables that change between steps --------------------------------------------------------------------------


def test_an_unfrozen_variable_in_its_optimizer_is_picked_up() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    before = problem.classifier.stem.weight.clone()
    problem.classifier.stem.requires_grad_(True)
    assert list(optimizer.directions(*problem.batches()).lower)[:2] == ["stem.weight", "stem.bias"]
    optimizer.step(*problem.batches())
    assert not torch.equal(problem.classifier.stem.weight, before)


def test_a_variable_frozen_later_stands_still() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())  # it has momentum now
    problem.classifier.head.requires_grad_(False)
    before = problem.classifier.head.weight.clone()
    assert "head.weight" not in optimizer.directions(*problem.batches()).lower
    optimizer.step(*problem.batches())
    assert torch.equal(problem.classifier.head.weight, before)
    assert problem.classifier.head.weight.grad is None


def without_the_stem(problem: Problem) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in problem.classifier.parameters() if p.requires_grad], lr=0.1)


def test_an_unfrozen_variable_that_no_optimizer_moves_is_refused_until_it_is_added() -> None:
    problem = Problem()
    problem.lower_optimizer = without_the_stem(problem)
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    problem.classifier.stem.requires_grad_(True)
    for _ in range(2):  # refused again, not forgotten
        before = Record(problem)
        with pytest.raises(ValueError, match=r"lower=stem\.weight, stem\.bias\): is not moved by lower_optimizer"):
            optimizer.step(*problem.batches())
        assert Record(problem).differences(before) == []
    problem.lower_optimizer.add_param_group({"params": list(problem.classifier.stem.parameters()), "lr": 0.5})
    before_step = problem.classifier.stem.weight.clone()
    stem = optimizer.directions(*problem.batches()).lower["stem.weight"]
    assert stem.any()
    optimizer.step(*problem.batches())
    assert not torch.equal(problem.classifier.stem.weight, before_step)


def test_a_tensor_added_to_an_optimizer_but_to_no_level_is_refused() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    problem.upper_optimizer.add_param_group({"params": [torch.ones(2, 7, requires_grad=True)]})
    for _ in range(2):
        with pytest.raises(ValueError, match=r"upper_optimizer=Adam\): holds 1 trainable tensors? outside.*\(2, 7\)"):
            optimizer.step(*problem.batches())


def test_a_tensor_outside_the_level_may_be_in_the_optimizer_as_long_as_it_is_frozen() -> None:
    problem = Problem()
    stranger = torch.ones(2, 7)
    problem.upper_optimizer.add_param_group({"params": [stranger]})
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    stranger.requires_grad_(True)
    with pytest.raises(ValueError, match=r"upper_optimizer=Adam\): holds 1 trainable.*\(2, 7\)"):
        optimizer.step(*problem.batches())


def test_a_variable_that_joins_both_levels_is_refused_each_time() -> None:
    problem = Problem()
    shared = nn.Linear(3, 3).requires_grad_(False)
    problem.classifier.shared = problem.corrector.shared = shared
    problem.lower_optimizer = sgd(*problem.classifier.parameters())
    problem.upper_optimizer = sgd(*problem.corrector.parameters())
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    shared.requires_grad_(True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"shared\.bias\): is .*upper= as well"):
            optimizer.step(*problem.batches())


def test_a_change_that_comes_with_a_refused_one_is_not_forgotten() -> None:
    # The upper level changes while the lower one is refused. Once that is undone, the new upper variable is checked.
    problem = Problem()
    problem.lower_optimizer = without_the_stem(problem)
    problem.corrector.mix.weight.requires_grad_(False)
    doubled: list[Tensor] = []

    def lower_loss(batch: Any) -> Tensor:
        x, label = batch
        features = problem.classifier.features(x)
        weight = doubled[0] if doubled else problem.corrector.mix.weight
        mixed = nn.functional.linear(torch.cat([features, label], 1), weight, problem.corrector.mix.bias)
        target = problem.corrector.out(problem.corrector.norm(mixed)).softmax(1)
        return nn.functional.cross_entropy(problem.classifier.head(features), target)

    optimizer = problem.optimizer(CASES["bome"], lower_loss=lower_loss)
    for _ in range(3):
        optimizer.step(*problem.batches())
    problem.corrector.mix.weight.requires_grad_(True)
    problem.classifier.stem.requires_grad_(True)
    with pytest.raises(ValueError, match="is not moved by lower_optimizer"):
        optimizer.step(*problem.batches())
    problem.classifier.stem.requires_grad_(False)
    doubled.append(2 * problem.corrector.mix.weight)
    with pytest.raises(bilevel.ClosureError, match=r"upper variable mix\.weight through"):
        optimizer.step(*problem.batches())


def test_directions_of_an_older_set_of_variables_are_refused() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    directions = optimizer.directions(*problem.batches())
    problem.classifier.head.requires_grad_(False)
    before = Record(problem)
    with pytest.raises(ValueError, match=r"directions=head\.weight\): names no lower variable"):
        optimizer.apply(directions)
    assert Record(problem).differences(before) == []


def test_a_replaced_layer_is_refused() -> None:
    problem = Problem()
    optimizer = problem.optimizer(CASES["bome"])
    optimizer.step(*problem.batches())
    problem.classifier.head = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"head\.weight, head\.bias\): is not moved by lower_optimizer"):
        optimizer.step(*problem.batches())
