"""Which tensors a level moves, what they are called, and which group of the torch optimizer moves each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from inspect import Parameter as Argument
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .errors import message
from .shards import is_shard, part_of
from .vectors import Vector
from .wrappers import inside, refuse_optimizer, sharder_of, torch_optimizer

Variable = nn.Module | Tensor | tuple[str, Tensor]
Variables = Variable | Iterable[Variable]


class Level:
    """One level's variables: every tensor with ``requires_grad`` among what the user passed, in a fixed order.

    Names are those of ``named_parameters`` for a single module; in an iterable, item ``i`` is prefixed with ``i.`` (a
    module) or called ``i`` (a bare tensor), and ``(name, tensor)`` pairs keep their names.
    """

    def __init__(
        self,
        owner: str,
        side: str,
        variables: Variables,
        optimizer: torch.optim.Optimizer,
        *,
        may_maximize: bool = False,
        may_shard: bool = False,
    ) -> None:
        self.owner = owner
        self._may_shard = may_shard
        self._may_maximize = may_maximize
        self.side = side
        self.optimizer, self._wrapper = torch_optimizer(owner, f"{side}_optimizer", optimizer)
        self._sources = self._read(variables)
        self.modules = tuple(module for _, module in self._sources if isinstance(module, nn.Module))
        _check_optimizer(owner, f"{side}_optimizer", self.optimizer)
        self.has_bare_tensors = any(isinstance(source, Tensor) for _, source in self._sources)
        self.names: tuple[str, ...] = ()
        self.tensors: tuple[Tensor, ...] = ()
        self.sharded = False
        self.refresh()

    def refresh(self) -> bool:
        """Collect the variables anew; return whether the set changed, and refuse a set its optimizer does not move."""
        found = [(name, tensor) for name, tensor in self._candidates() if tensor.requires_grad]
        names = tuple(name for name, _ in found)
        tensors = tuple(tensor for _, tensor in found)
        held = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        self.check_direction()
        marks = (tuple(map(id, tensors)), tuple((id(t), t.requires_grad) for t in held))
        if marks == getattr(self, "_marks", None):
            return False
        self._check(names, tensors, held)
        self.names, self.tensors, self._marks = names, tensors, marks
        self._shards = tuple(map(is_shard, tensors))
        self.sharded = any(self._shards)  # whether other processes have the rest of some variables
        return True

    def move(self) -> None:
        """Step the torch optimizer: through its wrapper, if that must know."""
        (self._wrapper or self.optimizer).step()

    def trainable(self) -> list[str]:
        """Name the variables as they stand now, also if they changed since the last step."""
        return [name for name, tensor in self._candidates() if tensor.requires_grad]

    def groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter group of each variable, as it stands now (schedulers change it)."""
        of = {id(tensor): group for group in self.optimizer.param_groups for tensor in group["params"]}
        return [of[id(tensor)] for tensor in self.tensors]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What of each variable is here, in the variable's memory: the variables themselves, if they are whole."""
        return tuple(map(part_of, self.tensors)) if self.sharded else self.tensors

    def vector(self, tensors: Iterable[Tensor | None]) -> Vector:
        """Return a vector of this level from one tensor or nothing for the part of each variable."""
        found = Vector(tensors, self.names)
        return found.sharded(self._shards) if self.sharded else found

    def argument(self, value: object, advice: str) -> str:
        """Phrase an error about this level's argument."""
        return message(self.owner, self.side, value, advice)

    def _read(self, variables: Variables) -> list[tuple[str, nn.Module | Tensor]]:
        if isinstance(variables, nn.Module):
            return [("", inside(variables))]
        if isinstance(variables, Tensor):
            return [("0", variables)]
        if isinstance(variables, (str, bytes, dict)) or not isinstance(variables, Iterable):
            advice = "must be an nn.Module, a Parameter, or an iterable of them. Pass the module itself."
            raise TypeError(self.argument(type(variables).__name__, advice))
        sources: list[tuple[str, nn.Module | Tensor]] = []
        for index, item in enumerate(variables):
            if isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str):
                name, value = item
            else:
                name, value = f"{index}", item
            if not isinstance(value, (nn.Module, Tensor)):
                advice = f"item {index} is a {type(value).__name__}, expected an nn.Module or a Parameter."
                raise TypeError(self.argument("[...]", advice))
            sources.append((name, inside(value) if isinstance(value, nn.Module) else value))
        if not sources:
            advice = (
                "holds no variable. A generator such as module.parameters() is empty once it was used; pass the module."
            )
            raise ValueError(self.argument("[]", advice))
        return sources

    def _candidates(self) -> Iterable[tuple[str, Tensor]]:
        seen: set[int] = set()
        for name, source in self._sources:
            if isinstance(source, Tensor):
                members: Iterable[tuple[str, Tensor]] = [(name, source)]
            else:
                members = source.named_parameters(prefix=name)
            for full, tensor in members:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield full, tensor

    def _check(self, names: tuple[str, ...], tensors: tuple[Tensor, ...], held: list[Tensor]) -> None:
        for module in self.modules:
            for part in module.modules():
                sharder = sharder_of(part)
                if sharder is not None and not (self._may_shard and sharder == "FSDPModule"):
                    advice = (
                        "shards its parameters over processes, of which only BOME and EBOMLC know, and of fully_shard "
                        "alone. Pass a plain module, whole on every process."
                    )
                    raise TypeError(self.argument(sharder, advice))
        if not tensors:
            advice = "holds no tensor with requires_grad. Is everything frozen? Unfreeze what this level moves."
            raise ValueError(self.argument(", ".join(name or type(s).__name__ for name, s in self._sources), advice))
        twice = [name for name, times in Counter(names).items() if times > 1]
        if twice:
            advice = "names more than one variable. Pass the modules, or give each (name, parameter) pair its own name."
            raise ValueError(self.argument(_listed(twice), advice))
        for name, tensor in zip(names, tensors, strict=True):
            if isinstance(tensor, nn.parameter.UninitializedParameter):
                advice = (
                    "is a lazy parameter without a shape. Run the module once on a batch before building the optimizer."
                )
                raise ValueError(self.argument(name, advice))
            if is_shard(tensor) and not any(sharder_of(part) for module in self.modules for part in module.modules()):
                advice = (
                    "is a DTensor, a share of a parameter, outside of a module of fully_shard. Pass that module, or "
                    "plain tensors that are whole everywhere."
                )
                raise TypeError(self.argument(name, advice))
            if not tensor.is_leaf:
                advice = (
                    "is computed from other tensors, so no optimizer can move it. Pass the leaf it was computed from."
                )
                raise ValueError(self.argument(name, advice))
            if not tensor.is_floating_point() or tensor.layout != torch.strided:
                advice = (
                    f"is {tensor.dtype}, {tensor.layout}; variables must be dense and real floating point. Cast it."
                )
                raise TypeError(self.argument(name, advice))
        moved = {id(tensor) for tensor in held}
        missing = [name for name, tensor in zip(names, tensors, strict=True) if id(tensor) not in moved]
        if missing:
            advice = (
                f"is not moved by {self.side}_optimizer. Unfrozen later, or left out of the optimizer? "
                f"Add it with {self.side}_optimizer.add_param_group, or freeze it with requires_grad_(False)."
            )
            raise ValueError(self.argument(_listed(missing), advice))
        own = {id(tensor) for tensor in tensors}
        strangers = [tuple(tensor.shape) for tensor in held if tensor.requires_grad and id(tensor) not in own]
        if strangers:
            advice = (
                f"holds {len(strangers)} trainable tensors outside {self.side}= (first shape {strangers[0]}); they "
                f"would never get a direction. Name their module in {self.side}=, or give them another optimizer."
            )
            raise ValueError(message(self.owner, f"{self.side}_optimizer", type(self.optimizer).__name__, advice))

    def check_direction(self) -> None:
        """Refuse ``maximize=True``, which may also be set, or loaded, after construction."""
        if not self._may_maximize and any(group.get("maximize") for group in self.optimizer.param_groups):
            advice = "has maximize=True, which would walk against the descent directions. Negate the loss instead."
            raise ValueError(message(self.owner, f"{self.side}_optimizer", type(self.optimizer).__name__, advice))


def check_disjoint(upper: Level, lower: Level) -> None:
    """Refuse a tensor that both levels would move."""
    names = {id(tensor): name for name, tensor in zip(upper.names, upper.tensors, strict=True)}
    shared = [name for name, tensor in zip(lower.names, lower.tensors, strict=True) if id(tensor) in names]
    if shared:
        advice = "is in upper= as well. A tensor belongs to one level. Split the module, or freeze the shared part."
        raise ValueError(lower.argument(_listed(shared), advice))


def _check_optimizer(owner: str, argument: str, optimizer: object) -> None:
    refuse_optimizer(owner, argument, optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        advice = "must be a torch.optim.Optimizer that you built, such as torch.optim.SGD(module.parameters(), lr=0.1)."
        raise TypeError(message(owner, argument, type(optimizer).__name__, advice))
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Argument.empty:
        advice = (
            "needs a closure, called at points of its own choice. Use an optimizer that steps from .grad, such as Adam."
        )
        raise TypeError(message(owner, argument, type(optimizer).__name__, advice))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
