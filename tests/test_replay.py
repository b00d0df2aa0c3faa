"""Replaying a network's tail where its graph is awkward; the plain cases are in test_score.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import Residual, images, made

from xcli.errors import MemoryExhausted, ModelError
from xcli.execution import Execution
from xcli.prefix import Prefix
from xcli.replay import Replay, entries


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


class Scaled(Table):
    """The same, where the sum is scaled in place by code that runs again."""

    def forward(self, x: Tensor) -> Tensor:
        offset = self.table(torch.eye(self.places, 4, dtype=x.dtype))
        offset *= 2
        return self.head(self.conv(x).relu().mean((2, 3)) + offset.sum(0))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Named(OrderedDict):
    """A mapping whose entries are attributes too, as models of text and pictures return them."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Packed(nn.Module):
    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        return self.pack(x, x.square())


class Containers(nn.Module):
    """Parts that answer with containers, read by name around the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Packed(Pair)
        self.named = Packed(lambda x, y: Named(x=x, y=y))
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        pair, named = self.pair(x), self.named(x)
        late = self.conv(x)
        late = late + pair.second.mean(1, keepdim=True) * named.x.mean(1, keepdim=True)
        return self.head((late - named.y[:, :1]).mean((2, 3)))


class Rectified(nn.Module):
    """The layer's output is rectified in place, or not, by what comes after."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        late = self.conv(self.first(x))
        view = late.flatten(2)
        late = nn.functional.relu(view, inplace=self.inplace)
        return self.head(late.mean(2))


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


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_handed_in_is_copied_only_where_it_would_be_changed(inplace: bool):
    net, x = made(lambda: Rectified(inplace)), images(2, 3, 8, 8)
    replay, index = Replay(net, "conv", x), torch.tensor([1, 0, 1])
    acts = replay.activations()[index]
    before = acts.clone()
    assert (acts < 0).any()
    with torch.no_grad():
        assert_close(replay(acts, index), net(x[index]), atol=1e-12, rtol=1e-10)
    assert torch.equal(acts, before)
    assert replay.overwritten == inplace


def test_a_table_that_is_changed_in_place_is_as_it_was_the_next_time():
    net, x = made(Scaled), images(2, 3, 8, 8)
    replay, index = Replay(net, "conv", x), torch.tensor([1, 0, 1])
    for _ in range(3):
        with torch.no_grad():
            assert_close(replay(replay.activations()[index], index), net(x[index]), atol=1e-12, rtol=1e-10)


def test_containers_keep_their_class():
    net, x = made(Containers), images(2, 3, 8, 8)
    replay, index = Replay(net, "conv", x), torch.tensor([1, 0, 1])
    with torch.no_grad():
        assert_close(replay(replay.activations()[index], index), net(x[index]), atol=1e-12, rtol=1e-10)


def test_only_what_is_read_again_is_kept_for_every_image():
    net, x = made(Dense), images(3, 3, 8, 8)
    kept = {name: Replay(net, name, x).answers for name in ("inner.1", "inner.2")}
    assert [len(one.tensor) for outputs in kept["inner.2"].values() for one in outputs] == [3, 3, 3]
    net = made(Rectified)
    (outputs,) = Replay(net, "conv", x).answers.values()  # of the first convolution
    assert [len(one.tensor) for one in outputs] == [1]


def test_an_image_that_is_not_finite_does_not_stop_the_others():
    net, x = made(Dense), images(3, 3, 8, 8)
    x[1, 0, 0, 0] = torch.nan
    replay, index = Replay(net, "inner.1", x), torch.tensor([2, 1, 0])
    with torch.no_grad():
        found = replay(replay.activations()[index], index)
        assert_close(found, net(x[index]), atol=1e-12, rtol=1e-10, equal_nan=True)
    assert found.isfinite().all(1).tolist() == [True, False, True]


def test_a_prefix_holds_its_layers_outputs_once():
    net, x = made(Residual), images(5, 3, 8, 8)
    prefix = Prefix(net, "block", x, Execution(2), {})
    assert len(prefix.replays) == 3
    held = {replay.activations().untyped_storage().data_ptr() for replay in prefix.replays}
    assert held == {prefix.activations().untyped_storage().data_ptr()}
    image = torch.tensor([4, 0, 3, 3, 1])
    with torch.no_grad():
        assert_close(prefix(prefix.activations()[image], image), net(x[image]), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_entries_keep_their_memory_layout(layout: torch.memory_format):
    acts, index = images(3, 4, 5, 6).contiguous(memory_format=layout), torch.tensor([2, 2, 0, 1])
    found = entries(acts, index)
    assert torch.equal(found, acts[index])
    assert found.is_contiguous(memory_format=layout)
    assert not found._is_view()


class Keeping(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


class Stash(nn.Module):
    """An early layer leaves its output on the side, where a later one picks it up."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.layer, self.head = Keeping(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        late = self.layer(self.early(x).relu())
        return self.head((late + self.early.kept).mean((2, 3)))


class Parcel:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Wrap(nn.Module):
    def forward(self, x: Tensor) -> Parcel:
        return Parcel(x * 2)


class Wrapped(nn.Module):
    """A part hands on an object that nobody can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap, self.layer, self.head = Wrap(), nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parcel = self.wrap(x)
        late = self.layer(x)
        return self.head((late * parcel.tensor.mean(1, keepdim=True)).mean((2, 3)))


@pytest.mark.parametrize("kind", [Stash, Wrapped])
@pytest.mark.parametrize("count", [1, 3])
def test_what_cannot_be_kept_an_image_is_refused_from_one_image_on(kind: type[nn.Module], count: int):
    net = made(kind)
    with pytest.raises(ModelError, match="do not keep images apart"):
        Replay(net, "layer", images(count, 3, 6, 6))
    assert hooks(net) == 0


def test_equal_images_prove_nothing_and_are_not_needed():
    x = images(1, 3, 6, 6).expand(3, -1, -1, -1).contiguous()
    with pytest.raises(ModelError, match="do not keep images apart"):
        Replay(made(Stash), "layer", x)


def test_a_memory_that_holds_one_image_is_said_and_nothing_is_noted():
    net, tails = made(Residual), {}

    def limited(_net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    with net.register_forward_pre_hook(limited), pytest.raises(MemoryExhausted, match="room for two inputs"):
        Prefix(net, "block", images(3, 3, 8, 8), Execution(), tails)
    assert not tails


def test_the_network_is_studied_once_a_layer():
    net, x, tails, ran = made(Residual), images(3, 3, 8, 8), {}, []
    with net.register_forward_pre_hook(lambda _net, inputs: ran.append(len(inputs[0]))):
        first = Prefix(net, "block", x, Execution(2), tails)
        assert ran == [1, 2, 2, 2, 2, 1]  # one, two, these kept, these replayed; then the batch
        Prefix(net, "block", x, Execution(2), tails)
        assert ran[6:] == [2, 1]
    image = torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        assert_close(first(first.activations()[image], image), net(x[image]), atol=1e-12, rtol=1e-10)
