"""Attention as elementary operations, and the probabilities it takes its means by.

However a network asks for attention (``nn.MultiheadAttention``, ``F.scaled_dot_product_attention``, or a softmax times
values of its own), what runs inside a block of one of these modes is written out, so that rules and listeners see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from xcli.errors import ModelError
from xcli.operations import Call, Watching


def unfused(call: Call) -> Any:
    """What a fused call of attention answers, from linear maps, matrix products and a softmax.

    In eval mode: nothing is dropped. A row that is masked altogether is not a number.

    Raises:
        ModelError: it adds keys of its own, which no token stands for.
    """
    if adds_keys(call):
        raise ModelError("attention adds keys of its own, which stand for no token")
    args, kwargs = call.arguments
    if call.name == "scaled_dot_product_attention":
        return _scaled_dot_product(*args, **kwargs)
    return _multi_head(*args, **kwargs)


def adds_keys(call: Call) -> bool:
    """Whether attention is also to keys that no token stands for."""
    if call.name == "scaled_dot_product_attention":
        return False
    args, kwargs = call.arguments
    given = {**dict(zip(_ADDED, args[7:10], strict=False)), **kwargs}
    return bool(given.get("add_zero_attn")) or any(
        given.get(name) is not None for name in ("bias_k", "bias_v", "static_k", "static_v")
    )


_ADDED = ("bias_k", "bias_v", "add_zero_attn")


def _axis(call: Call) -> Any:
    args, kwargs = call.arguments
    return args[1] if len(args) > 1 else kwargs.get("dim")


def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    logits = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits + _bias(~later, logits)
    if attn_mask is not None:
        logits = logits + _bias(attn_mask, logits)
    out: Tensor = torch.softmax(logits, -1) @ value
    return out


def _bias(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to the logits: booleans say who takes part."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, -math.inf)


def _multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``F.multi_head_attention_forward``: tokens first, (T, B, E), or (T, E) of one sequence."""
    if alone := query.ndim == 2:
        query, key, value = (t[:, None] for t in (query, key, value))
    if in_proj_weight is not None and not use_separate_proj_weight:
        weights: tuple[Any, ...] = in_proj_weight.chunk(3)
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)

    def heads(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        each: Tensor = F.linear(t, weight, bias).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        return each  # (B, H, T, e)

    q, k, v = (heads(*own) for own in zip((query, key, value), weights, biases, strict=True))
    logits = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
    if attn_mask is not None:
        bias = _bias(~attn_mask if attn_mask.dtype == torch.bool else attn_mask, logits)
        logits = logits + (bias.unflatten(0, (-1, num_heads)) if bias.ndim == 3 else bias)
    if key_padding_mask is not None:
        padding = key_padding_mask
        bias = _bias(~padding if padding.dtype == torch.bool else padding, logits)
        logits = logits + bias[..., None, None, :]
    probabilities = torch.softmax(logits, -1)
    out = F.linear((probabilities @ v).permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    shown = probabilities.mean(1) if average_attn_weights else probabilities
    if alone:
        out, shown = out[:, 0], shown[0]
    return out, shown if need_weights else None


_CASTS = frozenset(("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone"))
"""What probabilities may go through before they take means."""


class Attended(Watching):
    """Shows ``see`` the probabilities (B, H, T, S) of every attention inside the block, as it runs: where the network
    takes means of S values by a softmax of its own making, over the last axis, or by a fused call, which is written
    out, but for one that adds keys of its own.

    Windows that a network attends within come as they are: (B * windows, H, T, S).
    """

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.see = see
        self.softmaxes = WeakIdKeyDictionary()

    def depends(self, leaf: Any) -> bool:
        """Whoever listens need not want gradients."""
        return isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter)

    def forget(self) -> None:
        super().forget()
        self.softmaxes.clear()

    def called(self, call: Call) -> Any:
        if call.kind == "attention" and not adds_keys(call):
            return self.inside(lambda: unfused(call))
        out, first = call.asked(), call.inputs[0]
        if not isinstance(out, Tensor):
            return out
        if call.kind == "softmax" and out.ndim >= 4 and _axis(call) in (-1, out.ndim - 1):
            shown = out
            if out.ndim > 4:  # windows on an axis of their own
                shown = out.flatten(0, -4)
                out = shown.view_as(out)
            self.softmaxes[out] = shown
        elif first in self.softmaxes:
            if call.name in ("matmul", "bmm", "einsum"):
                self.see(self.softmaxes[first])
            elif "dropout" in call.name or call.name in _CASTS:
                self.softmaxes[out] = self.softmaxes[first]
        return out
