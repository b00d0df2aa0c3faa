"""Replaying a network's tail where its graph is awkward; the plain cases are in test_score.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import Residual, images, made

from xcli.errors import ModelError
from xcli.replay import Replay


class Dense(nn.Module):
    """Every layer sees what all before it gave, concatenated by functional code in a parent."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(8, 2, 1)])
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.first(x)]
        for part in self.inner:
            seen.append(part(torch.cat(seen, 1)).relu_())
        return self.head(torch.cat(seen, 1).mean((2, 3)))


class Table(nn.Module):
    """A learned table of three places is added up, whatever the batch."""

    def __init__(self, places: int = 3) -> None:
        super().__init__()
        self.table = nn.Linear(4, 6)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        codes = torch.eye(self.places, 4, dtype=x.dtype)
        offset = self.table(codes).sum(0)
        return self.head(self.conv(x).relu().mean((2, 3)) + offset)


def hooks(net: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules())


def whole(net: nn.Module, layer: str, acts: Tensor, x: Tensor) -> Tensor:
    """The network on ``x`` with the output of ``layer`` replaced, the slow way."""
    with torch.no_grad(), net.get_submodule(layer).register_forward_hook(lambda *_: acts.clone()):
        return net(x)


@pytest.mark.parametrize("layer", ["first", "inner.0", "inner.1", "inner.2"])
@pytest.mark.parametrize("image", [[0], [2, 0, 2, 1, 1]])
def test_every_layer_of_a_concatenating_network_can_be_replayed(layer: str, image: list[int]):
    net, x = made(Dense), images(3, 3, 8, 8)
    replay, index = Replay(net, layer, x), torch.tensor(image)
    acts = replay.activations()[index] * torch.linspace(0.5, 2, len(image), dtype=x.dtype).view(-1, 1, 1, 1)
    with torch.no_grad():
        assert_close(replay(acts, index), whole(net, layer, acts, x[index]), atol=1e-12, rtol=1e-10)


def test_a_replay_leaves_its_memory_as_it_was():
    net, x = made(Dense), images(3, 3, 8, 8)
    replay, index = Replay(net, "inner.1", x), torch.tensor([1, 2])
    acts = replay.activations()[index]
    with torch.no_grad():
        first = replay(acts, index)
        assert torch.equal(replay(acts, index), first)
    assert_close(first, net(x[index]), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_table_with_as_many_rows_as_there_are_images_is_no_batch(count: int):
    net, x = made(Table), images(count, 3, 8, 8)
    replay, index = Replay(net, "conv", x), torch.zeros(5, dtype=torch.long)
    acts = replay.activations()[index]
    with torch.no_grad():
        assert_close(replay(acts, index), net(x[index]), atol=1e-12, rtol=1e-10)


def test_the_network_is_put_back_after_an_exception():
    net, x = made(Residual), images(2, 3, 8, 8)
    before = [sorted(vars(part)) for part in net.modules()]
    with pytest.raises(RuntimeError):
        Replay(net, "block", images(2, 5, 8, 8))
    assert hooks(net) == 0
    replay = Replay(net, "block", x)
    with pytest.raises(RuntimeError), torch.no_grad():
        replay(torch.zeros(2, 99, 8, 8, dtype=x.dtype), torch.tensor([0, 1]))
    assert hooks(net) == 0
    assert [sorted(vars(part)) for part in net.modules()] == before


def test_a_layer_that_does_not_run_is_refused():
    net = made(Residual)
    net.spare = nn.Linear(2, 2).double()
    with pytest.raises(ModelError, match="'spare' does not run"):
        Replay(net, "spare", images(1, 3, 8, 8))
