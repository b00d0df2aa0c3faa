"""Transformers small enough to know, each with attention asked for in another way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

TARGETS, IMAGES = [1, 3, 2, 0], [0, 0, 1, 2]
"""The class and the image of each row: two rows about the first of three images."""


class Heads(nn.Module):
    """Queries, keys and values of an encoder as Hugging Face writes it, ``eager`` or by the fused call; eager
    attention is noted in ``kept``."""

    def __init__(self, width: int, heads: int, eager: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout, self.heads, self.eager = nn.Dropout(0.1), heads, eager
        self.kept: list[Tensor] = []

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        q, k, v = (
            part(hidden_states).view(*hidden_states.shape[:2], self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if self.eager:
            scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
            shown = nn.functional.softmax(scores, dim=-1, dtype=scores.dtype).to(q.dtype)
            self.kept.append(shown)
            out = torch.matmul(self.dropout(shown), v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)
            shown = q
        out = out.transpose(1, 2).contiguous().flatten(2)
        return (out, shown) if output_attentions else (out,)


class Attends(nn.Module):
    def __init__(self, width: int, heads: int, eager: bool) -> None:
        super().__init__()
        self.attention, self.output = Heads(width, heads, eager), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        found = self.attention(hidden_states)
        return (self.output(found[0]), *found[1:])


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, eager: bool) -> None:
        super().__init__()
        self.attention = Attends(width, heads, eager)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        found = self.attention(self.before(hidden_states))
        hidden_states = found[0] + hidden_states
        return (self.mlp(self.after(hidden_states)) + hidden_states, *found[1:])


class Encoder(nn.Module):
    def __init__(self, depth: int, width: int, heads: int, eager: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(width, heads, eager) for _ in range(depth))

    def forward(self, hidden_states: Tensor) -> dict[str, Tensor]:
        for part in self.layer:
            hidden_states = part(hidden_states)[0]
        return {"last_hidden_state": hidden_states}


class Faced(nn.Module):
    """A vision transformer as Hugging Face nests it, for 4x4 patches; ``pooled``: no class token, patches averaged."""

    def __init__(
        self, eager: bool = True, depth: int = 3, pooled: bool = False, grid: tuple[int, int] = (3, 4)
    ) -> None:
        super().__init__()
        width, self.pooled = 8, pooled
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 0 if pooled else 1, width))
        self.place = nn.Parameter(torch.randn(1, grid[0] * grid[1] + (not pooled), width))
        self.encoder = Encoder(depth, width, 2, eager)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.place
        tokens = self.norm(self.encoder(tokens)["last_hidden_state"])
        return {"logits": self.head(tokens.mean(1) if self.pooled else tokens[:, 0])}

    def attention(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and the attention (B, H, T, T) of each layer, with their graph."""
        kept = [part.attention.attention.kept for part in self.encoder.layer]
        for own in kept:
            own.clear()
        logits = self(x.clone().requires_grad_())["logits"]
        return logits, [own.pop() for own in kept]


class Finder(nn.Module):
    """The class token asks for bright patches, and the answer is how bright what it found is; one patch is bright."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, bias=False, batch_first=True)
            weight = torch.zeros(9, 3)
            weight[0, 1], weight[3, 0], weight[6, 0] = 2.0, 1.0, 1.0  # of the class; of brightness, twice
            out = torch.zeros(3, 3)
            out[2, 0] = 1.0
            self.attention.in_proj_weight.data, self.attention.out_proj.weight.data = weight, out

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.AvgPool2d(4)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(depth)))
        self.head = nn.Linear(3, 2, bias=False)
        self.head.weight.data = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])

    def forward(self, x: Tensor) -> Tensor:
        bright = self.patches(x.mean(1, keepdim=True)).flatten(2).transpose(1, 2)  # (B, T, 1)
        tokens = torch.cat([bright, torch.zeros_like(bright), torch.zeros_like(bright)], 2)
        first = torch.tensor([0.0, 1.0, 0.0]).to(x).expand(len(x), 1, 3)
        return self.head(self.blocks(torch.cat([first, tokens], 1))[:, 0])


def torchvision_vit(image: int = 32, depth: int = 3) -> nn.Module:
    """A small one, its head not at zero."""
    net = torchvision.models.VisionTransformer(image, 8, depth, 2, 16, 32, num_classes=5)
    nn.init.normal_(net.heads.head.weight)
    return net


def shaken(net: nn.Module, seed: int = 0) -> nn.Module:
    """``net`` in float64 and eval mode, frozen, its weights moved so that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    net = net.double().eval().requires_grad_(False)
    for weight in net.parameters():
        weight += 0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return net
