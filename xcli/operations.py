"""What a network computes, operation by operation, however it calls them, and rules that give some another backward.

Every method that sends something other than the gradient back through a network (relevance, multipliers, excitation)
has to reach ``nn.Conv2d`` and ``F.conv2d``, a module that is used twice, ``x += y``, ``torch.ops.aten`` calls of an
exported program and attention inside ``nn.MultiheadAttention`` alike. What was weighed:

* module hooks see neither functions nor operators, so a residual sum or ``F.relu`` is out of their sight, and they
  cannot tell the calls of a shared module apart; what sees modules alone needs the network rewritten first;
* ``torch.fx`` sees everything, once it has traced the network, which many do not allow (control flow, ``*args``);
* a ``TorchDispatchMode`` sees everything too, but below autograd, where the graph can no longer be another one;
* a wrapper class for each type of layer is a second network to keep true to the first.

PyTorch asks a ``TorchFunctionMode`` before it runs any function of its own, above autograd: one mode, ``Rules``, asks a
table what to do, and the same mode, listening (``Census``), says before a run what a network consists of, so that what
has no rule is refused by name. Out of its sight are functions compiled by ``torch.jit.script`` and custom kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from xcli.errors import ModelError
from xcli.kinds import Kind as Kind
from xcli.kinds import kind_of
from xcli.kinds import name_of as name_of


@dataclass(frozen=True)
class Operation:
    """One kind of call that a network makes: which function, of what kind, in which of its modules."""

    name: str
    kind: Kind
    module: str

    def __str__(self) -> str:
        where = f"module {self.module!r}" if self.module else "the network itself"
        return f"{where} calls {self.name}"


class Call:
    """A call of one of PyTorch's functions on ``inputs``, the tensors among its arguments that depend on the picture.

    ``run`` is the same function of those alone, whatever else it was given held. A function that writes into its first
    argument is run as one that does not; ``overwrites`` says so.
    """

    def __init__(self, func: Any, leaves: list[Any], spec: Any, places: Sequence[int]) -> None:
        self.name, self.func, self.leaves, self.spec, self.places = name_of(func), func, leaves, spec, places

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[place] for place in self.places)

    @cached_property
    def kind(self) -> Kind:
        args, kwargs = self.arguments
        places, depending, start = set(self.places), [], 0
        for argument in (*args, *kwargs.values()):
            end = start + tree_flatten(argument)[1].num_leaves
            depending.append(not places.isdisjoint(range(start, end)))
            start = end
        return kind_of(self.name, args, kwargs, depending)

    @cached_property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    @cached_property
    def overwrites(self) -> Tensor | None:
        """The tensor that the network wants changed in place, if it does."""
        args, kwargs = self.arguments
        first = args[0] if args else kwargs.get("input")
        if not isinstance(first, Tensor):
            return None
        named = getattr(self.func, "__name__", "").split(".")[0]
        if named.startswith("__i") or named == "__setitem__" or (named.endswith("_") and named[:2] != "__"):
            return first
        flag = _INPLACE.get(self.name)
        wanted = kwargs.get("inplace", args[flag] if flag is not None and len(args) > flag else False)
        return first if wanted is True else None

    def asked(self) -> Any:
        """What the call answers, written in place where the network wants that."""
        args, kwargs = self.arguments
        return self.func(*args, **kwargs)

    def run(self, *inputs: Tensor) -> Any:
        """The function at ``inputs``, which stand in for those of the call; nothing is changed in place."""
        leaves = list(self.leaves)
        for place, value in zip(self.places, inputs, strict=True):
            leaves[place] = value
        args, kwargs = tree_unflatten(leaves, self.spec)
        if self.overwrites is not None and args:
            args = (args[0].clone(), *args[1:])
        elif self.overwrites is not None:
            kwargs = {**kwargs, "input": kwargs["input"].clone()}
        out = self.func(*args, **kwargs)
        return args[0] if self.name == "setitem" else out


_INPLACE = {
    **dict.fromkeys(("relu", "relu6", "selu", "silu", "mish", "hardsigmoid", "hardswish"), 1),
    **dict.fromkeys(("elu", "celu", "leaky_relu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    "rrelu": 4,
}
"""Where ``inplace`` stands among the arguments of ``torch.nn.functional``."""


def _flowing(out: Any) -> Iterator[Tensor]:
    """The tensors in ``out`` that something can be sent back from."""
    return (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad)


class Watching(TorchFunctionMode, ABC):
    """Tells calls that the picture flows through, which ``called`` answers, from all others."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = WeakIdKeyDictionary()  # made of parameters alone
        self.current = WeakIdKeyDictionary()  # what a tensor that was to be changed in place has become

    def __enter__(self) -> Self:
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *caught: Any) -> None:
        TorchFunctionMode.__exit__(self, *caught)
        self.forget()

    def forget(self) -> None:
        """Let go of all tensors: what took the place of a tensor may hold on to that one through its graph."""
        self.weights.clear()
        self.current.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        if len(self.current):
            leaves = [self.latest(leaf) for leaf in leaves]
        call = Call(func, leaves, spec, [place for place, leaf in enumerate(leaves) if self.depends(leaf)])
        return self.called(call) if call.places else self.aside(call)

    def latest(self, leaf: Any) -> Any:
        """What an argument has become, where it is a tensor that was to be changed in place."""
        while isinstance(leaf, Tensor) and leaf in self.current:
            leaf = self.current[leaf]
        return leaf

    def depends(self, leaf: Any) -> bool:
        """Whether an argument depends on the picture."""
        if not isinstance(leaf, Tensor) or not leaf.requires_grad or isinstance(leaf, nn.Parameter):
            return False
        return leaf not in self.weights

    @abstractmethod
    def called(self, call: Call) -> Any:
        """What the call answers."""

    def aside(self, call: Call) -> Any:
        """What a call answers through which nothing is sent back."""
        learned = any(True for _ in _flowing(call.leaves))  # else it begins to ask, as the output of a layer
        out = call.asked()
        for tensor in _flowing(out) if learned else ():
            self.weights[tensor] = True
        return out

    def inside(self, run: Callable[[], Any]) -> Any:
        """``run()`` inside the block, for a call that is made of others."""
        TorchFunctionMode.__enter__(self)
        try:
            return run()
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)


class Census(Watching):
    """Counts the operations that run inside the block; ``module`` names the module that is running."""

    def __init__(self, module: Callable[[], str] = lambda: "") -> None:
        super().__init__()
        self.module, self.seen = module, Counter[Operation]()

    def called(self, call: Call) -> Any:
        out = call.asked()
        if any(True for _ in _flowing(out)):
            self.seen[Operation(call.name, call.kind, self.module())] += 1
        return out


Handler = Callable[[Call], Any]
"""What a rule makes of a call: the value of the call, with the backward pass of the rule."""


class Rules(Watching):
    """Lets ``table`` answer for the operations that run inside the block, by their kind.

    Values stay what they are. What a network changes in place is made anew, and takes the place of the old tensor
    wherever that one turns up again. With ``twice``, the maps are to be differentiated in their turn: once ``over`` is
    set, backward passes through what ran in the block follow the derivative, as a loss over maps depends on the values
    behind them.

    Raises:
        ModelError: an operation comes by that the table has nothing for, or a view of what was changed in place.
    """

    def __init__(self, table: Mapping[Kind, Handler], *, twice: bool = False) -> None:
        super().__init__()
        self.table, self.twice, self.over = table, twice, False
        self.old: dict[int, StorageWeakRef] = {}  # what tensors that were to be changed in place lie in

    def forget(self) -> None:
        super().forget()
        self.old.clear()

    def called(self, call: Call) -> Any:
        handler = self.table.get(call.kind)
        if handler is None:
            out = call.asked()
            if any(True for _ in _flowing(out)):
                raise ModelError(f"there is no rule for {call.name} ({call.kind}), which the network calls")
            return out  # asked for a shape, a comparison, ...
        self.refuse_old(call)
        out, changed = handler(call), call.overwrites
        if changed is not None:
            self.current[changed], storage = out, changed.untyped_storage()
            self.old[storage._cdata] = StorageWeakRef(storage)
        return out

    def aside(self, call: Call) -> Any:
        out = super().aside(call)
        if self.old and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.refuse_old(call)
        return out

    def refuse_old(self, call: Call) -> None:
        """Refuse a view of what was to be changed in place, as that has become another tensor."""
        given = (leaf for leaf in call.leaves if isinstance(leaf, Tensor)) if self.old else ()
        if any(one.untyped_storage()._cdata in self.old for one in given):
            raise ModelError(
                f"the network changes a tensor in place and hands a view of it (or its base) to {call.name}; "
                "change a copy"
            )

    def settled(self, outputs: Any) -> Any:
        """The outputs of what ran in the block, before it ends: what was to be changed in place is what it became."""
        return tree_map(self.latest, outputs) if len(self.current) else outputs


def plainly(call: Call) -> Any:
    """The call with its own derivative."""
    return call.run(*call.inputs)


class Step(ABC):
    """A function of tensors and what it sends back to them in place of its derivative.

    ``keeps_value`` and ``keeps_tensors`` say what ``back`` reads, of the tensors those from ``reads_from`` on; the rest
    is not kept.
    """

    keeps_value, keeps_tensors, reads_from = False, False, 0

    @abstractmethod
    def run(self, *tensors: Tensor) -> Tensor:
        """The value at ``tensors``."""

    @abstractmethod
    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """What each of ``tensors`` gets of ``sent``, which arrives at ``value``; those at the end may be left out."""


def ruled(rules: Rules, step: Step, value: Tensor, *tensors: Tensor) -> Tensor:
    """``value``, which is that of ``step`` at ``tensors``, with the backward pass of ``step``."""
    made: Tensor = _Ruled.apply(rules, step, value.detach(), *tensors)
    return made


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rules: Rules, step: Step, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.rules, ctx.step, ctx.count = rules, step, len(tensors)
        read = tensors[step.reads_from :] if step.keeps_tensors else ()
        own, out = tensors if rules.twice else read, value.view_as(value)
        ctx.save_for_backward(*own, *((out,) if step.keeps_value else ()))  # not ``value``: it has no history
        return out

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor | None, ...]:
        saved, step, twice = ctx.saved_tensors, ctx.step, ctx.rules.twice
        tensors, value = (saved[:-1], saved[-1]) if step.keeps_value else (saved, None)
        read = tensors[step.reads_from :] if twice else tensors
        over = ctx.rules.over
        back = _derivative(step.run, tensors, sent[0]) if over else tuple(step.back(sent[0], value, read))
        return (None, None, None, *back, *(None for _ in range(ctx.count - len(back))))


def _derivative(
    run: Callable[..., Tensor], tensors: Sequence[Tensor], sent: Tensor
) -> tuple[Tensor | None, ...]:
    """``sent`` times the derivative of ``run`` at each of ``tensors`` that asks for it."""
    with torch.enable_grad():
        at = apart(tensors)
        asking = [one for one in at if one.requires_grad]
        grads = iter(torch.autograd.grad(run(*at), asking, sent, create_graph=True, allow_unused=True))
    return tuple(next(grads) if one.requires_grad else None for one in at)


def apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors by names of their own: one may come twice, or be what another was computed from."""
    return [one.view_as(one) for one in tensors]
