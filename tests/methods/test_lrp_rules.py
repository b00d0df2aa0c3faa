"""Every rule of lrp against the dense matrix of its layer, message by message."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten
from toys import images

import xcli
from xcli.errors import ModelError
from xcli.linear import Linear
from xcli.methods.propagation.lrp import SHARES
from xcli.methods.propagation.rules import Rule, Weighted, by_statistics, joins, stabilised
from xcli.operations import Call

SHAPE = (3, 5, 6)
LOW, HIGH = -4.25, 3.75


def dense(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The matrix (outputs, inputs) of a layer, a column for each input that is one by itself, and its biases."""
    none, count = torch.zeros(1, *shape, dtype=torch.float64), torch.Size(shape).numel()
    bias = layer(none).flatten()
    units = torch.eye(count, dtype=torch.float64).unflatten(1, shape)
    return (layer(units).flatten(1) - bias).T, bias


def divided(messages: Tensor, rest: Tensor, given: Tensor, epsilon: float = 1e-6) -> Tensor:
    """What inputs get of ``given`` (outputs,) by ``messages`` (outputs, inputs), beside the ``rest`` of each output."""
    z = messages.sum(1) + rest
    z = torch.where(z < 0, z - epsilon, z + epsilon)
    z[z == 0] = torch.inf  # with epsilon 0: there is nothing to divide by
    return (messages / z[:, None] * given[:, None]).sum(0)


def by_hand(spec: object, matrix: Tensor, bias: Tensor, x: Tensor, given: Tensor) -> Tensor:
    """The relevance of the inputs ``x`` (inputs,) of one layer from that of its outputs."""
    name, number = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
    plain, none = matrix * x, torch.zeros_like(bias)
    match name:
        case "epsilon":
            return divided(plain, bias, given, 1e-6 if number is None else number)
        case "z+":
            return divided(plain.relu(), bias.relu(), given)
        case "alpha-beta":
            alpha = 2 if number is None else number
            helps = divided(plain.relu(), bias.relu(), given)
            hinders = divided(plain.clamp(max=0), bias.clamp(max=0), given)
            return alpha * helps - (alpha - 1) * hinders
        case "gamma":
            gamma = 0.25 if number is None else number
            z = plain.sum(1) + bias
            up = divided(plain + gamma * plain.relu(), bias + gamma * bias.relu(), given * (z > 0))
            down = divided(
                plain + gamma * plain.clamp(max=0), bias + gamma * bias.clamp(max=0), given * (z < 0)
            )
            return up + down
        case "z-box":
            return divided(plain - matrix.relu() * LOW - matrix.clamp(max=0) * HIGH, none, given)
        case "flat":
            return divided((matrix != 0).double(), none, given)
        case "w2":
            return divided(matrix**2, none, given)
        case "pass":
            return given
    raise AssertionError(name)


LAYERS = {
    "linear": lambda bias: nn.Sequential(nn.Flatten(), nn.Linear(90, 7, bias=bias)),
    "linear on rows": lambda bias: nn.Linear(6, 6, bias=bias),
    "plain": lambda bias: nn.Conv2d(3, 4, 3, bias=bias),
    "shape kept": lambda bias: nn.Conv2d(3, 3, 3, padding=1, bias=bias),
    "stride": lambda bias: nn.Conv2d(3, 4, (3, 2), stride=(2, 3), padding=(1, 0), bias=bias),
    "groups": lambda bias: nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=bias),
    "dilation": lambda bias: nn.Conv2d(3, 4, 2, padding=1, dilation=2, bias=bias),
    "same": lambda bias: nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 2), bias=bias),
    "valid": lambda bias: nn.Conv2d(3, 4, 2, padding="valid", bias=bias),
    "reflect": lambda bias: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=bias),
    "transposed": lambda bias: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1, bias=bias),
    "transposed groups": lambda bias: nn.ConvTranspose2d(3, 6, 2, groups=3, dilation=2, bias=bias),
    "1d": lambda bias: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 4, stride=3, padding=2, bias=bias)),
    "3d": lambda bias: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, (2, 3, 3), bias=bias)),
}
QUICK = ("linear on rows", "stride", "groups", "same", "reflect", "transposed groups")
RULES = ("epsilon", "gamma", "alpha-beta", "z+", "z-box", "flat", "w2")
NUMBERS = ({"epsilon": 0}, {"epsilon": 0.1}, {"gamma": 0.6}, {"alpha-beta": 1.0}, {"alpha-beta": 1.5})
MAPS = {"name": "lrp", "reduce": "none", "box": [LOW, HIGH]}


def toy(kind: str, bias: bool, *before: nn.Module) -> tuple[nn.Sequential, nn.Module, str]:
    """A network of one layer and a head, the layer alone, and its name."""
    with torch.random.fork_rng():
        torch.manual_seed(len(kind) + bias)
        layer = LAYERS[kind](bias).double()
        if kind == "same":  # an uneven one pads one side more
            layer = layer.requires_grad_(False)
        outputs = layer(torch.zeros(1, *SHAPE, dtype=torch.float64)).numel()
        net = nn.Sequential(*before, layer, nn.Flatten(), nn.Linear(outputs, 3)).double().eval()
    name = f"{len(before)}.1" if isinstance(layer, nn.Sequential) else str(len(before))
    return net.requires_grad_(False), layer, name


def padded(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What moves entries about, and the linear map of what it gives."""
    if isinstance(layer, nn.Conv2d) and layer.padding_mode == "reflect":
        inner = nn.Conv2d(3, 4, 3, bias=layer.bias is not None).double().requires_grad_(False)
        inner.load_state_dict(layer.state_dict())
        return nn.ReflectionPad2d(1), inner
    return nn.Identity(), layer


def expected(
    net: nn.Sequential, layer: nn.Module, spec: object, x: Tensor, target: int, head: float
) -> Tensor:
    """The map (C, H, W) of one image."""
    own = x if len(net) == 3 else net[0](x)
    moves, linear = padded(layer)
    inputs = moves(own[None])
    matrix, bias = dense(linear, tuple(inputs.shape[1:]))
    outputs = layer(own[None]).flatten()
    logits = net[-1](outputs)
    start = torch.zeros(3, dtype=torch.float64)
    start[target] = logits[target]
    given = by_hand({"epsilon": head}, net[-1].weight, net[-1].bias, outputs, start)
    got = by_hand(spec, matrix, bias, inputs.flatten(), given)
    back, _ = dense(moves, SHAPE)
    return (back.T @ got).view(SHAPE)


def agrees(kind: str, spec: object, *cases: tuple[bool, tuple[nn.Module, ...]]) -> None:
    x, target = images(2, *SHAPE), [2, 0]
    for bias, before in cases:
        net, layer, name = toy(kind, bias, *before)
        rules = {name: spec, str(len(net) - 1): {"epsilon": 0.3}}
        found = xcli.explain(net, x, {**MAPS, "rules": rules}, target=target, native=True).map
        for one, image, t in zip(found, x, target, strict=True):
            right = expected(net, layer, spec, image, t, 0.3)
            assert right.abs().max() > 0
            assert_close(one, right, rtol=1e-10, atol=1e-12 * float(right.abs().max()))


SIGNED, UNSIGNED = (), (nn.ReLU(),)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.soak) for kind in LAYERS]
)
def test_a_rule_is_its_matrix_formula(kind, spec):
    agrees(kind, spec, (True, SIGNED), (False, SIGNED if spec == "z-box" else UNSIGNED))


@pytest.mark.parametrize("spec", [*RULES[:4], *NUMBERS, "flat", "w2"], ids=str)
def test_with_its_number_with_and_without_bias_on_signed_and_unsigned_inputs(spec):
    agrees("stride", spec, (True, SIGNED), (False, SIGNED), (True, UNSIGNED), (False, UNSIGNED))
    agrees("linear", spec, (False, SIGNED), (True, UNSIGNED))


@pytest.mark.parametrize("kind", ["linear on rows", "shape kept"])
def test_pass_hands_everything_on(kind):
    x = images(2, *SHAPE)
    net, layer, name = toy(kind, True)
    rules = {name: "pass", "2": {"epsilon": 0.3}}
    found = xcli.explain(net, x, {**MAPS, "rules": rules}, target=[1, 1], native=True).map
    for one, image in zip(found, x, strict=True):
        assert_close(one, expected(net, layer, "pass", image, 1, 0.3), rtol=1e-10, atol=1e-12)


def test_zero_counts_as_positive_where_divisions_are_made_safe():
    z = torch.tensor([-2.0, -0.0, 0.0, 3.0], dtype=torch.float64)
    assert_close(stabilised(z, 0.1), z + torch.tensor([-0.1, 0.1, 0.1, 0.1], dtype=torch.float64))
    assert_close(stabilised(z, 0), torch.tensor([-2.0, torch.inf, torch.inf, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("share", ["epsilon", "gamma"])
def test_half_precision_is_brought_up_before_it_divides(share):
    x, weight = images(3, 4).half(), images(5, 4, seed=1).half()
    weight[0] = 0  # the value is nothing, and so is 1e-10 in half precision
    value, sent = x @ weight.T, images(3, 5, seed=2).half()
    step = Weighted(Linear("linear"), Rule(SHARES[share], epsilon=1e-10, gamma=0.25), signed=True)
    (found,) = step.back(sent, value, (x, weight))
    (expected,) = step.back(sent.float(), value.float(), (x.float(), weight.float()))
    assert expected.isfinite().all()
    assert_close(found, expected)


def test_a_batch_norm_has_statistics_of_its_own_or_is_refused():
    x, mean, var = images(2, 3, 4), images(3), images(3, seed=1).abs()
    leaves, spec = tree_flatten(((x, mean, var), {"training": False}))
    _, scale, shift = by_statistics(Call(F.batch_norm, leaves, spec, [0]))
    assert_close(x * scale[:, None] + shift[:, None], F.batch_norm(x, mean, var))
    leaves, spec = tree_flatten(((x, mean, var), {"training": True}))
    with pytest.raises(ModelError, match="a batch norm takes the statistics of the batch"):
        by_statistics(Call(F.batch_norm, leaves, spec, [0]))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("linear", (2, 3), True),
        ("linear", (2, 3, 4), False),
        ("conv2d", (2, 3, 4, 4), True),
        ("conv2d", (3, 4, 4), False),
    ],
)
def test_channels_of_a_batch_norm_are_those_of_the_layer_or_not(name, shape, expected):
    assert joins(torch.zeros(shape), Linear(name)) is expected
