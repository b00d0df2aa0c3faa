"""Networks that go wrong on bright pictures, or run out of memory: named by configs as ``FILE.py:callable``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xcli.demo import nets


class Odd(nn.Module):
    """The demo network; of pictures a little brighter than grey, what ``how`` says is wrong.

    Args:
        how: ``nan``: all scores are, ``one nan``, ``one infinite``: one is, ``gradients`` NaN, ``scaled``: scores by
            ``by``; ``no``.
    """

    def __init__(self, how: str, by: float) -> None:
        super().__init__()
        self.net, self.how, self.by = nets.load("shapes-cnn"), how, by

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        odd = (x.mean((1, 2, 3)) > 0.08)[:, None]
        if self.how == "nan":
            return torch.where(odd, torch.nan, logits)
        if self.how in ("one nan", "one infinite"):
            value = torch.nan if self.how == "one nan" else torch.inf
            return torch.where(odd & (torch.arange(logits.shape[1]) == 3), value, logits)
        if self.how == "gradients":
            return logits + Backwards.apply(logits, odd)
        return torch.where(odd, logits * self.by, logits) if self.how == "scaled" else logits


class Backwards(torch.autograd.Function):
    """Nothing, whose gradient is NaN where ``odd``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, odd: Tensor) -> Tensor:
        ctx.save_for_backward(odd)
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (odd,) = ctx.saved_tensors
        return torch.where(odd, torch.nan, torch.zeros_like(grad)), None


def odd(how: str = "no", by: float = 1.0) -> nn.Module:
    return Odd(how, by)


GPU = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 512.00 MiB is "
    "free. Including non-PyTorch memory, this process has 7.40 GiB memory in use."
)


class Large(nn.Module):
    """The demo network, for which memory has room for ``most`` pictures at once, and for none that is ``white``.

    Args:
        says: ``gpu`` as PyTorch says it there, ``cpu``: really too much is asked for, ``backward``: only then.
    """

    def __init__(self, most: int, white: bool, says: str) -> None:
        super().__init__()
        self.net, self.most, self.white, self.says = nets.load("shapes-cnn"), most, white, says

    def forward(self, x: Tensor) -> Tensor:
        lit = self.white and bool((x.flatten(1).amin(1) > 1.9).any())
        if len(x) <= self.most and not lit:
            return self.net(x)
        if self.says == "backward":
            return self.net(x) + Fails.apply(x).mean((1, 2, 3))[:, None]
        refuse(self.says)
        return self.net(x)


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        refuse("gpu")


def refuse(says: str) -> None:
    if says == "cpu":
        torch.empty(2**52)
    raise torch.OutOfMemoryError(GPU)


def large(most: int = 10**6, white: bool = False, says: str = "gpu") -> nn.Module:
    return Large(most, white, says)
