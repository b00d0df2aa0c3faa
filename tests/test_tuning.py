"""Faster, with the same numbers, and put back afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import images, made

import xcli
from xcli.demo import nets
from xcli.methods.cam.gradient import GradCAM
from xcli.tuning import channels_last, exact, folded, keep_freed_memory


def shuffled(net: nn.Module) -> nn.Module:
    """``net`` with batch norms that do something."""
    draw = torch.Generator().manual_seed(5)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean):
                if tensor is not None:
                    tensor.data.copy_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))
            part.running_var.copy_(
                torch.rand(part.running_var.shape, generator=draw, dtype=tensor.dtype) + 0.3
            )
    return net.eval()


class Pair(nn.Module):
    """Convolution, norm, head; ``how`` runs them."""

    def __init__(self, how: Callable[[Pair, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.how(self, x).relu().mean((2, 3)))


def pair(how: Callable[[Pair, Tensor], Tensor]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shuffled(Pair(how))


X = images(2, 3, 16, 16).float()


def objects(net: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(part)) for name, part in net.named_modules()] + [
        (n, id(p)) for n, p in net.named_parameters()
    ]


@pytest.fixture
def cnn() -> nn.Module:
    return shuffled(nets.load("shapes-cnn"))


def test_folding_changes_no_output_and_puts_every_module_back(cnn: nn.Module):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    norms = sum(isinstance(part, nn.BatchNorm2d) for part in cnn.modules())
    before = objects(cnn)
    with torch.no_grad():
        expected = cnn(x)
        with folded(cnn, x[:1]) as count:
            found = cnn(x)
            assert not any(isinstance(part, nn.BatchNorm2d) for part in cnn.modules())
        again = cnn(x)
    assert count == norms == 14
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.equal(found, expected)  # else nothing was folded
    assert torch.equal(again, expected)
    assert objects(cnn) == before


@pytest.mark.parametrize(
    "layer", ["stages", "stages.2.1.bn2", "stages.2.1.conv2", "stages.1.0.shortcut.0", "stem.0"]
)
def test_folding_changes_no_map(cnn: nn.Module, layer: str):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    method = GradCAM(layer=layer, relu=False)
    expected = xcli.explain(cnn, x, method).map
    with folded(cnn, x[:1], [layer]) as count:
        assert count in (13, 14)
        found = xcli.explain(cnn, x, method).map
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_convolution_that_is_explained_keeps_its_output(cnn: nn.Module):
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = cnn.get_submodule("stages.2.1.conv2")
    with folded(cnn, x, ["stages.2.1.conv2"]) as count:
        assert count == 13
        assert cnn.get_submodule("stages.2.1.conv2") is kept
        assert isinstance(cnn.get_submodule("stages.2.1.bn2"), nn.BatchNorm2d)


def test_folding_puts_every_module_back_after_an_exception(cnn: nn.Module):
    before = objects(cnn)
    with pytest.raises(KeyError), folded(cnn, torch.zeros(1, 3, 64, 64)):
        raise KeyError
    assert objects(cnn) == before


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(lambda net, x: net.norm(y := net.conv(x)) + y, id="its output is used twice"),
        pytest.param(lambda net, x: net.norm(net.norm(net.conv(x))), id="the norm runs twice"),
        pytest.param(
            lambda net, x: net.norm(net.conv(x)) + net.conv(x.flip(3)), id="the convolution runs twice"
        ),
        pytest.param(
            lambda net, x: net.norm(net.conv(x)) + net.norm(net.again(net.conv(x))), id="both run twice"
        ),
        pytest.param(lambda net, x: net.norm(net.conv(x).relu()), id="something in between"),
        pytest.param(lambda net, x: net.norm(net.conv(x) * 1), id="arithmetic in between"),
        pytest.param(lambda net, x: net.again(net.norm(x.repeat(1, 2, 1, 1))), id="norm first"),
    ],
)
def test_what_cannot_be_folded_is_left_alone(how: Callable[[Pair, Tensor], Tensor]):
    net = pair(how)
    with torch.no_grad():
        expected = net(X)
        with folded(net, X[:1]) as count:
            assert count == 0
            assert isinstance(net.norm, nn.BatchNorm2d)
            assert torch.equal(net(X), expected)
        assert torch.equal(net(X), expected)


def test_what_can_be_folded_is_folded_beside_what_cannot():
    net = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), norm := nn.BatchNorm2d(6), norm
    )
    net = shuffled(net)
    with torch.no_grad():
        expected = net(X)
        with folded(net, X[:1]) as count:
            found = net(X)
            assert net[3] is net[4] is norm
    assert count == 1
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_plain_pair_is_folded():
    """So that the test above can tell."""
    with folded(pair(lambda net, x: net.norm(net.conv(x))), X[:1]) as count:
        assert count == 1


def test_a_norm_without_statistics_of_its_own_is_left_alone():
    net = pair(lambda net, x: net.norm(net.conv(x)))
    net.norm = nn.BatchNorm2d(6, track_running_stats=False).eval()
    with folded(net, X[:1]) as count:
        assert count == 0


def test_folding_and_layout_in_double_precision_are_exact_to_rounding():
    net = made(lambda: Pair(lambda net, x: net.norm(net.conv(x))))
    x = X.double()
    with torch.no_grad():
        expected = net(x)
        with channels_last(net), folded(net, x[:1]) as count:
            found = net(x.contiguous(memory_format=torch.channels_last))
    assert count == 1
    assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_channels_last_changes_the_layout_and_puts_it_back(cnn: nn.Module):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = [(id(p), p.data_ptr(), p.stride()) for p in cnn.parameters()]
    with torch.no_grad():
        expected = cnn(x)
        with pytest.raises(KeyError), channels_last(cnn):
            wide = cnn.get_submodule("stages.2.1.conv2").weight
            assert wide.is_contiguous(memory_format=torch.channels_last)
            assert not wide.is_contiguous()
            found = cnn(x.contiguous(memory_format=torch.channels_last))
            assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            raise KeyError
        assert torch.equal(cnn(x), expected)
    assert [(id(p), p.data_ptr(), p.stride()) for p in cnn.parameters()] == before


def test_exact_sets_three_flags_and_puts_them_back():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    started = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic)
    try:
        for wanted in (True, False):
            matmul.allow_tf32 = cudnn.allow_tf32 = wanted
            cudnn.deterministic = not wanted
            with pytest.raises(KeyError), exact():
                assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic) == (False, False, True)
                raise KeyError
            assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic) == (wanted, wanted, not wanted)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = started


def test_keeping_freed_memory_says_whether_it_can(monkeypatch: pytest.MonkeyPatch):
    script = "from xcli.tuning import keep_freed_memory as keep; print(keep() is True or keep() is False)"
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.strip() == "True"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
