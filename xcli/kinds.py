"""PyTorch's functions by what they do, whichever way they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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
running statistics; another linear map without weights; a sum; one in which some count with a minus; a multiple by
constants; a product of two things that depend on the input; entries picked by their size; a function of one entry; a
norm by the input's own statistics."""

_NAMES: dict[Kind, str] = {
    "rearrangement": """
        T alias alpha_dropout as_strided_copy broadcast_to bfloat16 cat channel_shuffle chunk clone concat concatenate
        contiguous cpu cuda detach_copy double dropout dropout1d dropout2d dropout3d expand expand_as
        feature_alpha_dropout flatten flip float fliplr flipud getitem half hsplit hstack index_select lift_fresh mH mT
        moveaxis movedim narrow native_channel_shuffle native_dropout pad constant_pad_nd permute pixel_shuffle
        pixel_unshuffle positive repeat repeat_interleave reshape reshape_as roll rot90 select setitem slice split
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
        adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices""",
    "activation": """
        celu clamp clamp_max clamp_min elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish
        prelu relu relu6 rrelu selu sigmoid silu softplus softshrink softsign tanh tanhshrink threshold""",
    "normalisation": "group_norm instance_norm layer_norm local_response_norm normalize rms_norm",
    "softmax": "log_softmax softmax softmin",
    "attention": "multi_head_attention_forward scaled_dot_product_attention",
}
KINDS: dict[str, Kind] = {name: kind for kind, names in _NAMES.items() for name in names.split()}

_SPELLED = {
    **{f"{side}{name}": name for side in "ir" for name in ("add", "mul", "matmul")},
    **{"isub": "sub", "subtract": "sub", "idiv": "div", "itruediv": "div", "truediv": "div"},
}
"""Operators by the function that they stand for; ``rsub`` keeps its name."""


def name_of(func: Any) -> str:
    """``relu`` of ``F.relu``, ``torch.relu_``, ``Tensor.relu``, ``torch.ops.aten.relu.default``; ``T`` of ``x.T``."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", ""))
    name = name.split(".")[0].strip("_")
    return _SPELLED.get(name, name)


def kind_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], depending: Sequence[bool]) -> Kind:
    """What a call of a function is, by its name and by which of its arguments depend on the picture.

    Args:
        depending: for each of ``args``, then for the values of ``kwargs``, whether something in it does.
    """
    kind, named = KINDS.get(name, "other"), dict(zip(kwargs, depending[len(args) :], strict=True))

    def depends(place: int, key: str) -> bool:
        return depending[place] if place < len(args) else named.get(key, False)

    def value(place: int, key: str, default: Any) -> Any:
        return args[place] if place < len(args) else kwargs.get(key, default)

    count, first = sum(depending), depends(0, "input") or depends(0, "self")
    match kind:
        case "weighted":
            if depends(2, "bias"):
                return "other"
            return kind if not depends(1, "weight") else "product" if first else "average"
        case "scaling":
            if name in _DIVISIONS:
                return kind if first and count == 1 and value(2, "rounding_mode", None) is None else "other"
            return "product" if count > 1 else kind
        case "sum" | "difference":
            minus = name == "sub" or (name == "add" and _below_zero(value(2, "alpha", 1)))
            return "difference" if name == "rsub" or (minus and (count > 1 or not first)) else "sum"
        case "product":  # of constants with the one input
            return "average" if count == 1 else kind
        case "average":
            return "difference" if value(3, "mode", "") == "bicubic" else kind
        case "activation" | "normalisation":
            return kind if first and count == 1 else "other"
        case "batch-norm":
            by_batch = value(5, "training", False)
            return "other" if count > 1 or not first else "normalisation" if by_batch else kind
        case "rearrangement":
            trained = value(2, "training", value(2, "train", name in _DROPPING))
            return "other" if "dropout" in name and trained else kind
    return kind


_DIVISIONS = frozenset(("div", "divide", "true_divide", "rdiv"))
_DROPPING = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d"))
"""Those of ``torch.nn.functional`` that drop unless they are told that nothing is trained."""


def _below_zero(number: Any) -> bool:
    return isinstance(number, int | float) and number < 0
