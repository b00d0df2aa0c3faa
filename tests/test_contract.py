"""Every registered method keeps every promise, on a convolutional network and on a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import contract
import pytest
import torch
from _pytest.mark import ParameterSet

from xcli.demo import nets
from xcli.errors import ModelError
from xcli.hooks import frozen
from xcli.methods.base import Method
from xcli.methods.cam.gradient import GradCAM
from xcli.registry import methods


@cache
def method_of(name: str) -> Method:
    cls = methods()[name]
    return cls(**cls.small)


@pytest.fixture(scope="module", params=contract.NETWORKS)
def network(request):
    net = nets.load(request.param).double().eval()
    net.known_as = request.param
    return net


def test_the_table_is_not_empty():
    assert {"gradcam", "hirescam", "layercam", "eigencam", "random"} <= set(methods())


@pytest.mark.parametrize(("name", "network"), sorted(contract.REFUSED), indirect=["network"])
def test_a_method_refuses_what_it_cannot_compute_and_leaves_the_network_as_found(name, network):
    x = contract.pictures(contract.NETWORKS[network.known_as])
    with frozen(network):
        before = contract.snapshot(network)
        with pytest.raises(ModelError, match=f"{name}: .*; "):
            contract.maps_of(method_of(name), network, x, *contract.ROWS)
        assert contract.snapshot(network) == before


ALONE = (
    contract.has_right_shape_and_is_finite,
    contract.batch_and_micro_batch_do_not_matter,
    contract.the_network_is_left_as_found,
)
SECOND = (contract.has_right_shape_and_is_finite,)
"""In a plain run on the second network: of methods that refuse the first; of those with a way of their own."""
LONG = (contract.order_and_company_do_not_matter, contract.a_recorded_pass_gives_the_same)
"""For the long tests on every network: what breaks them most often breaks another promise, too."""
OWN_WAY = ("gradcam", "xgradcam", "layercam", "eigencam", "scorecam", "fullgrad", "saliency", "attnlrp")


def promises() -> Iterator[ParameterSet]:
    """Every promise of every method on every network. On the second, slower one, most promises are for the long tests:
    what a method makes of another network can hardly differ there, least where it only looks at scores."""
    for name in sorted(methods()):
        for net in contract.NETWORKS:
            alone = any((name, other) in contract.REFUSED for other in contract.NETWORKS)
            for promise in contract.PROMISES:
                plain = promise in (ALONE if alone else SECOND if name in OWN_WAY else ())
                if (name, net) not in contract.REFUSED:
                    plain |= net == "shapes-cnn" and promise not in LONG
                    marks = [] if plain else [pytest.mark.soak]
                    yield pytest.param(name, net, promise, marks=marks, id=f"{name}-{net}-{promise.__name__}")


@pytest.mark.parametrize(("name", "network", "promise"), list(promises()), indirect=["network"])
def test_every_method_keeps_every_promise(name, network, promise):
    x = contract.pictures(contract.NETWORKS[network.known_as])
    if promise is contract.the_network_is_left_as_found:
        promise(method_of(name), network, x)
        network.eval()
        for parameter in network.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        return
    with frozen(network):
        promise(method_of(name), network, x)


# ---- a broken method is seen by the promise it breaks ----------------------------------------------------------


class DependsOnCompany(GradCAM):
    def weighted(self, acts, grads):
        return super().weighted(acts, grads) + acts.mean()


class LeavesAHook(GradCAM):
    def attribute(self, score, x):
        score.module.register_forward_hook(lambda *_: None)
        return super().attribute(score, x)


class ChangesTheMode(GradCAM):
    def attribute(self, score, x):
        score.module.zero_grad()
        return super().attribute(score, x)


class LosesARow(GradCAM):
    def weighted(self, acts, grads):
        return super().weighted(acts, grads)[:-1]


class NotFinite(GradCAM):
    def weighted(self, acts, grads):
        return super().weighted(acts, grads) / 0 * torch.nan


class DrawsGlobally(GradCAM):
    def weighted(self, acts, grads):
        return super().weighted(acts, grads) + torch.rand(acts.shape)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (DependsOnCompany, contract.batch_and_micro_batch_do_not_matter),
        (DependsOnCompany, contract.order_and_company_do_not_matter),
        (DrawsGlobally, contract.order_and_company_do_not_matter),
        (DrawsGlobally, contract.running_out_of_memory_changes_nothing),
        (DrawsGlobally, contract.a_recorded_pass_gives_the_same),
        (LosesARow, contract.has_right_shape_and_is_finite),
        (NotFinite, contract.has_right_shape_and_is_finite),
        (LeavesAHook, contract.the_network_is_left_as_found),
        (ChangesTheMode, contract.the_network_is_left_as_found),
    ],
    ids=lambda value: value.__name__,
)
def test_the_contract_sees_a_broken_method(broken, promise):
    net = nets.load("shapes-cnn").double()
    with pytest.raises(AssertionError):
        if promise is contract.the_network_is_left_as_found:
            promise(broken(), net, contract.pictures((64, 64)))
        else:
            with frozen(net):
                promise(broken(), net, contract.pictures((64, 64)))
