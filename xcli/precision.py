"""Numbers of a lower precision, brought up before anything is computed with them."""

from __future__ import annotations

import torch
from torch import Tensor


def full(tensor: Tensor) -> Tensor:
    """At least float32: half-precision activations are brought up before a method computes with them."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
