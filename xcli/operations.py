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

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from xcli.errors import ModelError

Kind = Literal[
    "rearrangement",
    "weighted",
    "batch-norm",
    "average",
    "sum",
    "difference",
    "scaling",
    "product",
    "maximum",
    "activation",
    "normalisation",
    "softmax",
    "attention",
    "other",
]
"""Operations that every rule treats alike: entries moved about; a convolution or linear layer; batch norm by its
running statistics; another linear map without weights; a sum; one thing less another; a multiple by constants; a
product of two things that depend on the input; entries picked by their size; a function of one entry; a norm by the
input's own statistics."""

_NAMES: dict[Kind, str] = {
    "rearrangement": """
        T alias alpha_dropout as_strided_copy broadcast_to bfloat16 cat channel_shuffle chunk clone concat concatenate
        contiguous cpu cuda detach_copy double dropout dropout1d dropout2d dropout3d expand expand_as
        feature_alpha_dropout flatten flip float fliplr flipud getitem half hsplit hstack index_select lift_fresh mH mT
        moveaxis movedim narrow native_channel_shuffle native_dropout pad constant_pad_nd permute pixel_shuffle
        pixel_unshuffle positive repeat repeat_interleave reshape reshape_as roll rot90 select slice split
        split_with_sizes squeeze stack swapaxes swapdims t take_along_dim tensor_split tile to transpose type type_as
        unbind unflatten unfold unsqueeze view view_as vsplit vstack""",
    "weighted": "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear",
    "batch-norm": "batch_norm",
    "average": """
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d interpolate mean
        sum upsample upsample_bilinear2d upsample_nearest2d""",
    "sum": "add sub",
    "difference": "rsub",
    "scaling": "div mul neg multiply divide true_divide negative",
    "product": "matmul bmm mm einsum",
    "maximum": """
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax max max_pool1d max_pool2d max_pool3d maximum
        max_pool2d_with_indices""",
    "activation": """
        celu clamp clamp_max clamp_min elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish
        prelu relu relu6 rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink threshold""",
    "normalisation": "group_norm instance_norm layer_norm local_response_norm normalize rms_norm",
    "softmax": "log_softmax softmax softmin",
    "attention": "multi_head_attention_forward scaled_dot_product_attention",
}
_KINDS: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}

_SPELLED = {
    **{f"{side}{name}": name for side in "ir" for name in ("add", "mul", "matmul")},
    **{"isub": "sub", "idiv": "div", "itruediv": "div", "truediv": "div"},
}
"""Operators by the function that they stand for; ``rsub`` keeps its name."""


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

    @property
    def kind(self) -> Kind:
        kind = _KINDS.get(self.name, "other")
        if len(self.places) > 1:
            return "difference" if self.name == "sub" else "product" if kind == "scaling" else kind
        if kind == "product":  # of constants with the one input
            return "average"
        return "other" if self._divides_by_input() else kind

    def _divides_by_input(self) -> bool:
        return self.name in ("div", "divide", "true_divide", "rdiv") and self.places[:1] != [0]

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return args, kwargs

    @property
    def overwrites(self) -> Tensor | None:
        """The tensor that the network wants changed in place, if it does."""
        args, kwargs = self.arguments
        if not (args and isinstance(args[0], Tensor)):
            return None
        named = getattr(self.func, "__name__", "").split(".")[0]
        if named.startswith("__i") or (named.endswith("_") and not named.startswith("__")):
            return args[0]
        flag = _INPLACE.get(self.name)
        wanted = kwargs.get("inplace", args[flag] if flag is not None and len(args) > flag else False)
        return args[0] if wanted is True else None

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
        if self.overwrites is not None:
            args = (args[0].clone(), *args[1:])
        return self.func(*args, **kwargs)


_INPLACE = {
    **dict.fromkeys(("relu", "relu6", "selu", "silu", "mish", "hardsigmoid", "hardswish"), 1),
    **dict.fromkeys(("elu", "celu", "leaky_relu"), 2),
    **dict.fromkeys(("hardtanh", "threshold", "dropout", "dropout1d", "dropout2d", "dropout3d"), 3),
    "rrelu": 4,
}
"""Where ``inplace`` stands among the arguments of ``torch.nn.functional``."""


def name_of(func: Any) -> str:
    """``relu`` of ``F.relu``, ``torch.relu_``, ``Tensor.relu``, ``torch.ops.aten.relu.default``; ``T`` of ``x.T``."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", ""))
    name = name.split(".")[0].strip("_")
    return _SPELLED.get(name, name)


def _flowing(out: Any) -> Iterator[Tensor]:
    """The tensors in ``out`` that something can be sent back from."""
    return (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.requires_grad)


class Watching(TorchFunctionMode):
    """Tells calls that the picture flows through, which ``called`` answers, from all others."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = WeakIdKeyDictionary()  # made of parameters alone
        self.current = WeakIdKeyDictionary()  # what a tensor that was to be changed in place has become

    def __exit__(self, *caught: Any) -> None:
        super().__exit__(*caught)  # type: ignore[no-untyped-call]
        self.forget()

    def forget(self) -> None:
        """Let go of all tensors: what took the place of a tensor may hold on to that one through its graph."""
        self.weights.clear()
        self.current.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        if len(self.current):
            leaves = [self.current.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        call = Call(func, leaves, spec, [place for place, leaf in enumerate(leaves) if self.depends(leaf)])
        if call.places:
            return self.called(call)
        out = call.asked()
        for tensor in _flowing(out):
            self.weights[tensor] = True
        return out

    def depends(self, leaf: Any) -> bool:
        """Whether an argument depends on the picture."""
        if not isinstance(leaf, Tensor) or not leaf.requires_grad or isinstance(leaf, nn.Parameter):
            return False
        return leaf not in self.weights

    def called(self, call: Call) -> Any:
        """What the call answers."""
        raise NotImplementedError

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
        ModelError: an operation comes by that the table has nothing for.
    """

    def __init__(self, table: Mapping[Kind, Handler], *, twice: bool = False) -> None:
        super().__init__()
        self.table, self.twice, self.over = table, twice, False

    def called(self, call: Call) -> Any:
        handler = self.table.get(call.kind)
        if handler is None:
            out = call.asked()
            if any(True for _ in _flowing(out)):
                raise ModelError(f"there is no rule for {call.name} ({call.kind}), which the network calls")
            return out  # asked for a shape, a comparison, ...
        out, changed = handler(call), call.overwrites
        if changed is not None:
            self.current[changed] = out
        return out


def plainly(call: Call) -> Any:
    """The call with its own derivative."""
    return call.run(*call.inputs)


class Step:
    """A function of tensors and what it sends back to them in place of its derivative.

    ``keeps_value`` and ``keeps_tensors`` say what ``back`` reads; the rest is not kept.
    """

    keeps_value, keeps_tensors = False, False

    def run(self, *tensors: Tensor) -> Tensor:
        """The value at ``tensors``."""
        raise NotImplementedError

    def back(self, sent: Tensor, value: Tensor | None, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """What each of ``tensors`` gets of ``sent``, which arrives at ``value``; those at the end may be left out."""
        raise NotImplementedError


def ruled(rules: Rules, step: Step, value: Tensor, *tensors: Tensor) -> Tensor:
    """``value``, which is that of ``step`` at ``tensors``, with the backward pass of ``step``."""
    made: Tensor = _Ruled.apply(rules, step, value.detach(), *tensors)
    return made


class _Ruled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rules: Rules, step: Step, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.rules, ctx.step, ctx.count = rules, step, len(tensors)
        own, out = tensors if step.keeps_tensors or rules.twice else (), value.view_as(value)
        ctx.save_for_backward(*own, *((out,) if step.keeps_value else ()))  # unlike ``value``, it depends on them
        return out

    @staticmethod
    def backward(ctx: Any, *sent: Tensor) -> tuple[Tensor | None, ...]:
        saved, step = ctx.saved_tensors, ctx.step
        value = saved[-1] if step.keeps_value else None
        tensors = saved[: ctx.count] if step.keeps_tensors or ctx.rules.twice else ()
        over = ctx.rules.over
        back = _derivative(step.run, tensors, sent[0]) if over else tuple(step.back(sent[0], value, tensors))
        return (None, None, None, *back, *(None for _ in range(ctx.count - len(back))))


def _derivative(
    run: Callable[..., Tensor], tensors: Sequence[Tensor], sent: Tensor
) -> tuple[Tensor | None, ...]:
    """``sent`` times the derivative of ``run`` at each of ``tensors`` that asks for it."""
    with torch.enable_grad():
        asking = [one for one in tensors if one.requires_grad]
        grads = iter(torch.autograd.grad(run(*tensors), asking, sent, create_graph=True, allow_unused=True))
    return tuple(next(grads) if one.requires_grad else None for one in tensors)
