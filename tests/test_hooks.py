"""What is changed in a model is put back, whatever happens in between."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from toys import PooledLinear, Residual, Tokens, images, made

from xcli.errors import ModelError
from xcli.hooks import Gate, first_tensor, frozen, gathered, recording, swapped, unfused, with_tensor

Two = namedtuple("Two", "first second")


class Own(nn.Module):
    """A network whose ``eval`` does more than set a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.evaluated = nn.Linear(2, 2), 0

    def train(self, mode: bool = True) -> Own:
        self.evaluated += not mode
        return super().train(mode)


def flags(net: nn.Module) -> tuple[list[bool], list[bool]]:
    return [part.training for part in net.modules()], [one.requires_grad for one in net.parameters()]


def hooks(net: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in net.modules())


def mixed() -> nn.Module:
    net = made(Residual).train()
    net.block.eval()
    net.head.requires_grad_(False)
    return net


def test_frozen_sets_every_flag_and_puts_each_back():
    net = mixed()
    before = flags(net)
    assert {True, False} == set(before[0]) == set(before[1])
    with frozen(net) as same:
        assert same is net
        assert not any(flags(net)[0])
        assert not any(flags(net)[1])
    assert flags(net) == before


def test_frozen_puts_back_after_an_exception():
    net = mixed()
    before = flags(net)
    with pytest.raises(KeyError), frozen(net):
        raise KeyError
    assert flags(net) == before


def test_frozen_does_not_call_the_models_own_eval():
    net = Own()
    with frozen(net):
        assert not net.inner.training
    assert net.evaluated == 0


def test_unfused_turns_the_fused_attention_off_and_back():
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), unfused():
        assert not torch.backends.mha.get_fastpath_enabled()
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize("kind", [PooledLinear, Tokens])
def test_recording_changes_no_output_and_leaves_no_hook(kind: type[nn.Module]):
    net, x = made(kind), images(2, 3, 16, 16)
    layer = {"PooledLinear": "features", "Tokens": "attention"}[kind.__name__]
    expected = net(x).detach()
    with torch.no_grad(), recording(net, [layer]) as kept:
        found = net(x)
    assert torch.equal(found, expected)
    assert list(kept) == [layer]
    assert hooks(net) == 0


def test_what_was_recorded_is_safe_from_a_later_relu_in_place():
    net, x = made(PooledLinear), images(2, 3, 8, 8)
    with torch.no_grad(), recording(net, ["features.0"]) as kept:
        net(x)
    assert (kept["features.0"] < 0).any()
    assert torch.equal(kept["features.0"], net.features[0](x))


def test_the_graph_starts_at_the_first_layer_and_no_sooner():
    net, x = made(Residual), images(2, 3, 8, 8).requires_grad_()
    with torch.no_grad(), recording(net, ["block", "last"], leaves=["block", "last"]) as kept:
        out = net(x)
    assert kept["block"].is_leaf
    assert not kept["last"].is_leaf
    first, second = torch.autograd.grad(out.sum(), [kept["block"], kept["last"]])
    assert first.abs().sum() > 0
    assert second.abs().sum() > 0
    with pytest.raises(RuntimeError):
        torch.autograd.grad(out.sum(), x)


def test_recording_leaves_the_grad_mode_and_no_hook_after_an_exception():
    net = made(Residual)
    with pytest.raises(RuntimeError), torch.no_grad(), recording(net, ["stem"], leaves=["stem"]):
        net(images(1, 7, 8, 8))
    assert hooks(net) == 0
    assert torch.is_grad_enabled()


def test_a_layer_that_runs_twice_or_is_not_there_is_refused():
    net, x = made(Residual), images(1, 3, 8, 8)
    with (
        pytest.raises(ModelError, match="'twice' runs more than once"),
        recording(net, ["twice"]),
    ):
        net(x)
    with pytest.raises(AttributeError), recording(net, ["stem", "nothing"]):
        pass
    assert hooks(net) == 0


def test_swapped_answers_and_puts_the_classs_forward_back():
    net = nn.Linear(2, 2)
    with pytest.raises(KeyError), swapped(net, lambda x: x * 3):
        assert torch.equal(net(torch.ones(2)), torch.full((2,), 3.0))
        raise KeyError
    assert "forward" not in vars(net)


def test_swapped_puts_a_forward_of_the_instances_own_back():
    net = nn.Linear(2, 2)

    def own(x: Tensor) -> Tensor:
        return x

    net.forward = own
    with swapped(net, lambda x: x * 3), swapped(net, lambda x: x * 5):
        assert torch.equal(net(torch.ones(2)), torch.full((2,), 5.0))
    assert vars(net)["forward"] is own


@pytest.mark.parametrize("kind", [tuple, list, Two._make])
def test_the_first_tensor_is_replaced_in_its_container(kind: Callable[[list], tuple]):
    output = kind([torch.ones(1), "more"])
    assert torch.equal(first_tensor(output, "layer"), torch.ones(1))
    found = with_tensor(output, torch.zeros(1))
    assert type(found) is type(output)
    assert torch.equal(found[0], torch.zeros(1))
    assert found[1] == "more"
    assert torch.equal(output[0], torch.ones(1))


@pytest.mark.parametrize("output", [{"a": torch.ones(1)}, (), ("text", torch.ones(1)), None], ids=repr)
def test_an_output_without_a_tensor_is_refused(output: object):
    with pytest.raises(ModelError, match="'layer' returns"):
        first_tensor(output, "layer")


class Chain(nn.Module):
    """Three layers in a row, which say what they read; ``between`` two of them something may happen."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.between(layer(x))
        return x


NAMES = ("layers.0", "layers.1", "layers.2")


def test_gathered_hands_what_is_joined_of_all_outputs_on_at_the_last_layer():
    net, x = made(Chain), images(4, 2)
    first = net.layers[0](x)
    second = net.layers[1](first)
    with gathered(net, NAMES, lambda outputs: torch.cat(list(outputs)), Gate()):
        found = net(x)
    assert torch.equal(found, torch.cat([first, second, net.layers[2](second)]))
    assert not hooks(net)
    with gathered(net, NAMES[1:], torch.stack, Gate()):
        assert net(x).shape == (2, 4, 2)


def test_gathered_keeps_outputs_as_they_were_given():
    net, x = made(Chain), images(4, 2)
    wanted = net.layers[0](x)
    net.layers[1].register_forward_pre_hook(lambda _, given: given[0].mul_(0))
    with gathered(net, NAMES[:2], lambda outputs: outputs[0], Gate()):
        net.layers = net.layers[:2]
        assert torch.equal(net(x), wanted)


@pytest.mark.parametrize("between", [lambda x: x + 1, lambda x: x.clone()])
def test_gathered_refuses_layers_that_are_no_chain_and_takes_its_hooks_away(between):
    net = made(lambda: Chain(between))
    with (
        pytest.raises(ModelError, match=r"'layers.1' does not read the output of 'layers.0' as it is"),
        gathered(net, NAMES, torch.stack, Gate()),
    ):
        net(images(4, 2))
    assert not hooks(net)


def test_gathered_takes_its_hooks_away_where_a_name_is_unknown():
    net = made(Chain)
    with pytest.raises(AttributeError), gathered(net, ("layers.0", "nowhere"), torch.stack, Gate()):
        pass
    assert not hooks(net)


def test_a_gate_lets_values_through_and_gradients_once_it_is_open():
    gate, x = Gate(), images(3).requires_grad_()
    y = gate(x)
    assert torch.equal(y, x)
    value = (y * y).sum() + (3 * x).sum()
    (closed,) = torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(closed, torch.full_like(x, 3))
    gate.open = True
    (opened,) = torch.autograd.grad(value, x)
    assert torch.equal(opened, 3 + 2 * x.detach())
