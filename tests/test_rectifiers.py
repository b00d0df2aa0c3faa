"""Rectifiers under another backward pass, element by element, however they are called; and activations counted."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from pixels import case
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from toys import PooledLinear, Residual, Tokens, images, made

from xcli.layers import survey
from xcli.methods.gradient.rectified import DeconvNet, GuidedBackprop
from xcli.rectifiers import ACTIVATIONS, RECTIFIERS, Activations, Rectified
from xcli.sources import ModelSpec, exported

RULES = {"deconvnet": DeconvNet().rule, "guided-backprop": GuidedBackprop().rule}
ATEN = torch.ops.aten

RELU = {
    "nn.ReLU()": nn.ReLU(),
    "nn.ReLU(True)": nn.ReLU(True),
    "F.relu(x)": F.relu,
    "aten.relu.default(self=x)": lambda x: ATEN.relu.default(self=x),
    "F.relu(input=x)": lambda x: F.relu(input=x),
    "F.relu(x, inplace=True)": lambda x: F.relu(x, inplace=True),
    "F.relu(x, True)": lambda x: F.relu(x, True),
    "F.relu(inplace=True, input=x)": lambda x: F.relu(inplace=True, input=x),
    "F.relu_(x)": F.relu_,
    "torch.relu(x)": torch.relu,
    "torch.relu(input=x)": lambda x: torch.relu(input=x),
    "torch.relu_(x)": torch.relu_,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "aten.relu.default(x)": ATEN.relu.default,
    "aten.relu_.default(x)": ATEN.relu_.default,
    "aten.relu(x)": ATEN.relu,
}
RELU6 = {
    "nn.ReLU6()": (nn.ReLU6(), 6.0),
    "nn.ReLU6(True)": (nn.ReLU6(True), 6.0),
    "F.relu6(x)": (F.relu6, 6.0),
    "aten.hardtanh.default(x, 0)": (lambda x: ATEN.hardtanh.default(x, 0.0), 1.0),
    "F.relu6(x, True)": (lambda x: F.relu6(x, True), 6.0),
    "F.relu6(input=x, inplace=True)": (lambda x: F.relu6(input=x, inplace=True), 6.0),
    "nn.Hardtanh(0, 6)": (nn.Hardtanh(0, 6), 6.0),
    "nn.Hardtanh(0, 2.5, True)": (nn.Hardtanh(0, 2.5, True), 2.5),
    "F.hardtanh(x, 0, 6)": (lambda x: F.hardtanh(x, 0, 6), 6.0),
    "F.hardtanh(x, 0)": (lambda x: F.hardtanh(x, 0), 1.0),
    "F.hardtanh(x, 0, 6, True)": (lambda x: F.hardtanh(x, 0, 6, True), 6.0),
    "F.hardtanh(x, max_val=2.5, min_val=0)": (lambda x: F.hardtanh(x, max_val=2.5, min_val=0.0), 2.5),
    "F.hardtanh(x, 0, inplace=True)": (lambda x: F.hardtanh(x, 0, inplace=True), 1.0),
    "F.hardtanh_(x, 0, 6)": (lambda x: F.hardtanh_(x, 0, 6), 6.0),
    "aten.relu6.default(x)": (ATEN.relu6.default, 6.0),
    "aten.relu6_.default(x)": (ATEN.relu6_.default, 6.0),
    "aten.hardtanh.default(x, 0, 6)": (lambda x: ATEN.hardtanh.default(x, 0.0, 6.0), 6.0),
    "aten.hardtanh_.default(x, 0, 6)": (lambda x: ATEN.hardtanh_.default(x, 0.0, 6.0), 6.0),
}
FORMS = {
    **{form: ("relu", call, float("inf")) for form, call in RELU.items()},
    **{form: ("relu6", call, top) for form, (call, top) in RELU6.items()},
}
IN_PLACE = {form: call for form, (_, call, _) in FORMS.items() if "_" in form.split("(")[0] or "True" in form}

OTHERS = {
    "hardtanh": [nn.Hardtanh(), nn.Hardtanh(-0.5, 2, True), F.hardtanh_],
    "leaky_relu": [nn.LeakyReLU(), nn.LeakyReLU(0.3, True), F.leaky_relu_],
    "rrelu": [nn.RReLU().eval()],
    "prelu": [lambda x: F.prelu(x, x.new_full((1,), 0.2))],
    "threshold": [
        lambda x: torch.threshold(x, 0.1, 0.0),
        nn.Threshold(0.1, 0),
        lambda x: F.threshold(x, 0.1, 0.0, True),
    ],
    "elu": [nn.ELU(), nn.ELU(inplace=True), F.elu_],
    "selu": [nn.SELU(), nn.SELU(True), torch.selu],
    "celu": [nn.CELU(), nn.CELU(inplace=True), torch.celu_],
    "gelu": [nn.GELU(), nn.GELU("tanh"), ATEN.gelu.default],
    "silu": [nn.SiLU(), nn.SiLU(True), ATEN.silu_.default],
    "mish": [nn.Mish(), nn.Mish(True)],
    "hardswish": [nn.Hardswish(), nn.Hardswish(True)],
    "softplus": [nn.Softplus(), lambda x: F.softplus(x, 2.0)],
}


def grid():
    """Inputs by gradients, (11, 5) each: below, at and above zero and both ends, by every sign."""
    z = torch.tensor([-7.0, -1, -0.0, 0, 1e-300, 0.5, 1, 2.5, 5.999, 6, 20], dtype=torch.float64)
    g = torch.tensor([-2.0, -1e-9, 0, 0.3, 5], dtype=torch.float64)
    return z[:, None].expand(11, 5).clone(), g.expand(11, 5).clone()


def by_rule(rule, z, g, top):
    """The rules of the two papers, a number at a time."""
    found = torch.zeros_like(g)
    for place in range(z.numel()):
        own, grad = float(z.flatten()[place]), float(g.flatten()[place])
        if grad > 0 and (rule == "deconvnet" or 0 < own < top):
            found.view(-1)[place] = grad
    return found


def backward(call, z, g, mode=None):
    """What ``call`` answers to a tensor that is no leaf, and the gradient at that tensor."""
    leaf = z.clone().requires_grad_()
    if mode is None:
        out = call(leaf * 1)
    else:
        with mode:
            out = call(leaf * 1)
    return out, torch.autograd.grad(out, leaf, g)[0]


# ---- every way to call one -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", RULES)
def test_the_gradient_is_that_of_the_rule(rule, form):
    _, call, top = FORMS[form]
    z, g = grid()
    out, found = backward(call, z, g, RULES[rule]())
    assert_close(found, by_rule(rule, z, g, top), rtol=0, atol=0)
    assert_close(out, call(z.clone()), rtol=0, atol=0)
    plain = backward(call, z, g)[1]
    assert (found != plain).any()  # the form has a gradient of its own, which the rule replaces


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("graph", [False, True])
def test_values_and_what_changes_in_place_stay_what_they_are(form, graph):
    _, call, _ = FORMS[form]
    z = torch.cat([grid()[0].flatten(), torch.tensor([torch.inf, -torch.inf, torch.nan]).double()])
    plain = z.clone()
    expected = call(plain)
    for rule in RULES.values():
        given = z.clone().requires_grad_(graph) * 1
        with rule():
            found = call(given)
        assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert_close(given, plain, rtol=0, atol=0, equal_nan=True)
        assert (found is given) == (expected is plain) == (form in IN_PLACE)
        assert found.requires_grad == graph


def test_the_table_has_forms_that_work_in_place_and_forms_that_do_not():
    assert 5 <= len([form for form in RELU if form in IN_PLACE]) < len(RELU)
    assert 5 <= len([form for form in RELU6 if form in IN_PLACE]) < len(RELU6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_number_formats_keep_theirs(dtype):
    z, g = (values.to(dtype) for values in grid())
    for rule in RULES:
        for form in ("F.relu(x)", "F.relu6(x)"):
            _, call, top = FORMS[form]
            out, found = backward(call, z, g, RULES[rule]())
            assert out.dtype == found.dtype == dtype
            assert_close(found, by_rule(rule, z, g, top), rtol=0, atol=0)


def test_the_memory_layout_stays_what_it_is():
    z = images(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for call in (F.relu, F.relu6):
        out, grad = backward(call, z, torch.ones_like(z), RULES["guided-backprop"]())
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert grad.is_contiguous(memory_format=torch.channels_last)


VIEWS = {
    "columns": lambda x: x[:, 1:4],
    "one row": lambda x: x[3],
    "every other row": lambda x: x[::2],
    "transposed": lambda x: x.T,
    "flat": lambda x: x.view(-1),
    "a view of a view": lambda x: x[2:9].view(-1)[3:20],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rule", RULES)
def test_a_view_changed_in_place_changes_its_base_and_the_base_s_gradient(rule, view):
    z, g = grid()
    seen = VIEWS[view](torch.arange(55).view(11, 5)).flatten()
    for form, call in IN_PLACE.items():
        top = FORMS[form][2]

        def through(x, call=call):
            call(VIEWS[view](x))  # for its effect
            return x

        out, found = backward(through, z, g, RULES[rule]())
        assert_close(out, through(z.clone()), rtol=0, atol=0)
        expected = g.clone().flatten()
        expected[seen] = by_rule(rule, z, g, top).flatten()[seen]
        assert_close(found, expected.view_as(g), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_view_taken_before_its_base_changes_in_place_follows(rule):
    z, g = grid()

    def through(x):
        early = x[2:]
        x.relu_()
        return early

    out, found = backward(through, z, g[2:], RULES[rule]())
    assert_close(out, z[2:].relu(), rtol=0, atol=0)
    assert_close(found[2:], by_rule(rule, z, g, float("inf"))[2:], rtol=0, atol=0)
    assert (found[:2] == 0).all()


@pytest.mark.parametrize("module", [nn.ReLU(True), nn.ReLU6(True)], ids=["ReLU", "ReLU6"])
@pytest.mark.parametrize("rule", RULES)
def test_a_module_called_for_its_effect_is_ruled(rule, module):
    z, g = grid()

    def through(x):
        module(x)
        return x

    top = 6.0 if isinstance(module, nn.ReLU6) else float("inf")
    found = backward(through, z, g, RULES[rule]())[1]
    assert_close(found, by_rule(rule, z, g, top), rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_each_call_of_a_shared_module_is_ruled_by_its_own_input(rule):
    z, g = grid()
    shared, w = nn.ReLU(), torch.tensor([-1.5, 2, 0.5, -1, 3], dtype=torch.float64)
    found = backward(lambda x: shared(shared(x) * w - 1) + x, z, g, RULES[rule]())[1]
    inf = float("inf")
    inner = by_rule(rule, z.relu() * w - 1, g, inf) * w
    assert_close(found, by_rule(rule, z, inner, inf) + g, rtol=0, atol=0)


@pytest.mark.parametrize("call", [F.relu, torch.relu_, F.relu6, nn.ReLU6(True)])
def test_guided_backpropagation_works_through_checkpoints(call):
    """They run the forward pass again in the backward pass, where no mode is in force any more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6).double().requires_grad_(False) for _ in range(4)]
    x, g = images(6, 6), images(6, 6, seed=1)

    def block(t):
        for layer in layers:
            t = call(layer(t))
        return t

    expected = backward(block, x, g, GuidedBackprop().rule())[1]
    found = backward(lambda t: checkpoint(block, t, use_reentrant=False), x, g, GuidedBackprop().rule())[1]
    assert expected.abs().max() > 0
    assert_close(found, expected, rtol=0, atol=0)


class Written(nn.Module):
    """Rectifiers of every kind in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.capped = nn.ReLU(True), nn.ReLU6(True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.second(self.relu(self.first(x)))
        x = self.second(F.relu6(2 * x + 1))
        self.capped(x)
        x = self.second(x) + 0.1
        x[:, 1:3].relu_()
        x = F.hardtanh(torch.relu(x - 0.02) + F.gelu(x), 0.0, 0.5)
        return self.head(self.relu(self.second(x)).mean((2, 3)))


COUNTED = {"relu": 4, "relu6": 3, "gelu": 1}


@pytest.fixture(scope="module")
def program():
    """``Written`` as PyTorch exports it."""
    batch = torch.export.Dim("batch", max=1 << 20)  # PyTorch 2.6 wants an end
    return torch.export.export(
        made(Written), (images(2, 3, 7, 6),), dynamic_shapes=({0: batch},), strict=False
    )


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_is_ruled_like_the_network(program, tmp_path, decomposed):
    net, x, g = made(Written), images(3, 3, 7, 6), images(3, 3, seed=1)
    program = program.run_decompositions() if decomposed else program
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = exported(ModelSpec("exported", str(tmp_path / "net.pt2"))).module
    assert survey(loaded, x).activations == survey(net, x).activations == COUNTED
    plain = backward(net, x, g)[1]
    for rule in RULES.values():
        out, expected = backward(net, x, g, rule())
        assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
        found = backward(loaded, x, g, rule())
        assert_close(found[0], out, rtol=1e-12, atol=1e-14)
        assert_close(found[1], expected, rtol=1e-10, atol=1e-14)


# ---- the rules as functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["F.relu(x)", "torch.relu_(x)", "F.relu6(x)", "nn.ReLU6(True)"])
@pytest.mark.parametrize("rule", RULES)
def test_the_backward_pass_can_be_differentiated(rule, form):
    """By the gradient that comes in, and by what it comes from: against central differences."""
    call = FORMS[form][1]
    z, g = images(5, 6) * 4, images(5, 6, seed=1)

    def ruled(x, w):
        with RULES[rule]():
            return call(x * w)

    inputs = (z.requires_grad_(), (images(5, 6, seed=2) + 3).requires_grad_())
    assert torch.autograd.gradgradcheck(ruled, inputs, g.requires_grad_())


def test_the_output_is_kept_and_no_copy_of_it():
    x = images(4, 4).requires_grad_()
    for call in (F.relu, lambda t: F.relu(t, inplace=True)):
        with GuidedBackprop().rule():
            out = call(x * 1)
        (kept,) = out.grad_fn.saved_tensors
        assert kept.data_ptr() == out.data_ptr()


def test_a_rule_sees_the_gradient_the_output_and_where_it_saturates():
    seen = []

    def noted(grad, out, top):
        seen.append((grad, out, top))
        return 3 * grad

    z, g = grid()
    for call, top in ((F.relu, float("inf")), (F.relu6, 6.0), (lambda x: F.hardtanh(x, 0, 2.5), 2.5)):
        out, found = backward(call, z, g, Rectified(noted))
        assert_close(found, 3 * g, rtol=0, atol=0)
        grad, own, limit = seen.pop()
        assert_close(grad, g, rtol=0, atol=0)
        assert_close(own, out.detach(), rtol=0, atol=0)
        assert limit == top


# ---- what is left alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_keep_value_and_gradient(name):
    z, g = images(5, 6) * 2, images(5, 6, seed=1)
    for call in OTHERS[name]:
        for rule in RULES.values():
            for ours, plain in zip(backward(call, z, g, rule()), backward(call, z, g), strict=True):
                assert_close(ours, plain, rtol=0, atol=0)


def ruled(call=F.relu):
    """Whether a rectifier called now has another backward pass than PyTorch's."""
    with torch.enable_grad():
        found = backward(call, torch.tensor([-1.0, 1.0]), torch.tensor([1.0, -1.0]))[1]
    return found.tolist() != [0.0, -1.0]


def test_nothing_is_left_behind():
    for rule in RULES.values():
        with rule():
            assert ruled()
        assert not ruled()
        assert not ruled(nn.ReLU(True))
        assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_nothing_is_left_behind_after_an_exception(place):
    class Stop(Exception):
        pass

    def stops(*_):
        raise Stop

    z, g = grid()

    def through(x):
        assert ruled()
        out = F.relu(x)
        if place == "backward":
            out.register_hook(stops)
            return torch.autograd.grad(out, x, g)
        return stops()

    for rule in RULES.values():
        with pytest.raises(Stop):
            backward(through, z, g, rule())
        assert not ruled()
        assert not torch.overrides._get_current_function_mode_stack()


def test_the_rule_belongs_to_the_forward_pass():
    z, g = grid()
    leaf = z.clone().requires_grad_()
    before = F.relu(leaf)
    with DeconvNet().rule():
        inside = F.relu(leaf)
        found = torch.autograd.grad(before, leaf, g)[0]
    assert_close(found, g * (z > 0), rtol=0, atol=0)
    assert_close(torch.autograd.grad(inside, leaf, g)[0], g.relu(), rtol=0, atol=0)


def test_a_rule_does_not_reach_another_thread():
    seen = []
    with DeconvNet().rule():
        beside = threading.Thread(target=lambda: seen.append(ruled()))
        beside.start()
        beside.join()
        assert ruled()
    assert seen == [False]


def test_the_innermost_rule_counts():
    z, g = grid()
    with DeconvNet().rule():
        out, inner = backward(F.relu, z, g, GuidedBackprop().rule())
        _, outer = backward(F.relu, z, g)
    assert_close(out, z.relu(), rtol=0, atol=0)
    assert_close(inner, by_rule("guided-backprop", z, g, float("inf")), rtol=0, atol=0)
    assert_close(outer, by_rule("deconvnet", z, g, float("inf")), rtol=0, atol=0)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("rule", RULES)
def test_without_gradients_only_the_value_counts(rule, without):
    z, _ = grid()
    for _, call, _ in FORMS.values():
        with without(), RULES[rule]():
            given = z.clone()
            found = call(given)
            view = z.clone()
            call(view[2:].view(-1)[5:])
        assert not found.requires_grad
        expected, base = z.clone(), z.clone()
        assert_close(found, call(expected), rtol=0, atol=0)
        call(base[2:].view(-1)[5:])
        assert_close(given, expected, rtol=0, atol=0)
        assert_close(view, base, rtol=0, atol=0)


def test_a_part_without_gradients_leaves_the_rest_ruled():
    z, g = grid()

    def through(x):
        with torch.no_grad():
            gate = F.relu(x)
        return F.relu(x) * (1 + gate)

    found = backward(through, z, g, DeconvNet().rule())[1]
    assert_close(found, (g * (1 + z.relu())).relu(), rtol=0, atol=0)


# ---- counting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_each_call_of_a_rectifier_is_counted_once(form):
    name, call, _ = FORMS[form]
    z, g = grid()
    with Activations() as alone:
        backward(call, z, g)
    with GuidedBackprop().rule(), Activations() as inside:
        backward(call, z, g)
    with Activations() as around:
        backward(call, z, g, GuidedBackprop().rule())
    assert alone.seen == inside.seen == {name: 1}
    assert around.seen.total() == 1  # of what the rule runs in its place


def test_every_other_activation_is_counted_once():
    assert set(OTHERS) == ACTIVATIONS - set(RECTIFIERS)
    for name, calls in OTHERS.items():
        for call in calls:
            with Activations() as found:
                call(images(5, 6))
            assert found.seen == {name: 1}


def test_what_is_no_activation_is_not_counted():
    with Activations() as found:
        F.conv2d(images(1, 3, 5, 5), images(2, 3, 3, 3)).tanh().sigmoid().softmax(1).clamp(0, 6).mean()
    assert found.seen == {}


@contextmanager
def called(net, *kinds):
    """How often modules of these kinds run inside the block, by name in lower case."""
    count: Counter[str] = Counter()
    handles = [
        part.register_forward_hook(lambda one, *_: count.update([type(one).__name__.lower()]))
        for part in net.modules()
        if isinstance(part, kinds)
    ]
    yield count
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("name", "functional"),
    [("shapes-cnn", 0), ("resnet18", 0), ("densenet121", 1), ("mobilenet_v3_small", 0)],
)
def test_the_survey_counts_what_hooks_on_modules_count_and_the_functions(name, functional):
    one = case(name)
    with called(one.net, nn.ReLU, nn.Hardswish) as expected, torch.no_grad():
        one.net(one.x[:1])
    expected["relu"] += functional  # the last one of a DenseNet
    assert one.score.layers.activations == expected
    assert sum(expected.values()) > 10


@pytest.mark.parametrize(
    ("kind", "expected"), [(PooledLinear, {"relu": 2}), (Residual, {"relu": 1}), (Tokens, {"gelu": 1})]
)
def test_the_survey_counts_activations_by_name_and_leaves_nothing_behind(kind, expected):
    net, x = made(kind), images(2, 3, 16, 16)
    assert survey(net, x).activations == expected
    assert survey(net.train(), x[:1]).activations == expected
    assert not torch.overrides._get_current_function_mode_stack()
    shared = nn.Sequential(nn.Flatten(), *([nn.ReLU()] * 3), nn.Linear(768, 2)).double()
    assert survey(shared, x).activations == {"relu": 3}


def test_counting_ends_with_an_exception():
    with pytest.raises(ValueError, match="stop"), Activations() as found:
        F.relu(images(2))
        raise ValueError("stop")
    F.relu(images(2))
    assert found.seen == {"relu": 1}


class Clipped(nn.Module):
    """PyTorch leaves the upper end of 1, the default of a hard tanh, out of an exported program."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.clip = nn.Conv2d(3, 4, 3), nn.Hardtanh(0, 1)

    def forward(self, x):
        return self.clip(5 * self.conv(x)).mean((2, 3))


def test_an_exported_hard_tanh_saturates_where_it_did(tmp_path):
    net, x, g = made(Clipped), images(3, 3, 7, 6), images(3, 4, seed=1)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    torch.export.save(program, tmp_path / "net.pt2")
    loaded = exported(ModelSpec("exported", str(tmp_path / "net.pt2"))).module
    assert survey(loaded, x).activations == {"relu6": 1}
    for rule in RULES.values():
        for found, expected in zip(backward(loaded, x, g, rule()), backward(net, x, g, rule()), strict=True):
            assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("call", [F.relu6, nn.ReLU6(True), lambda x: F.hardtanh(x, 0, 6)])
def test_what_a_relu6_gives_can_be_changed_in_place(rule, call):
    """As PyTorch's own, which keep their input: ``x * F.relu6(x + 3).div_(6)`` is a hard swish."""
    z, g = grid()
    found = backward(lambda x: call(x + 3).div_(6), z, g, RULES[rule]())[1]
    assert_close(found, by_rule(rule, z + 3, g / 6, 6.0), rtol=0, atol=0)


@pytest.mark.parametrize("call", [F.relu, torch.relu_, F.relu6, nn.ReLU6(True)])
@pytest.mark.parametrize("count", [3, 6])
def test_rules_work_through_checkpoints(call, count):
    """They run the forward pass again in the backward pass, where no mode is in force any more."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(6, 6).double().requires_grad_(False) for _ in range(4)]
    x, g = images(count, 6), images(count, 6, seed=1)

    def block(t):
        for layer in layers:
            t = call(layer(t))
        return t

    expected = backward(block, x, g, DeconvNet().rule())[1]
    found = backward(lambda t: checkpoint(block, t, use_reentrant=False), x, g, DeconvNet().rule())[1]
    assert expected.abs().max() > 0
    assert_close(found, expected, rtol=0, atol=0)
