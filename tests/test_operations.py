"""What a network computes, however it spells it; what rules see, change and let go of."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from pixels import case
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, images, made

from xcli.errors import ModelError
from xcli.layers import survey
from xcli.operations import Call, Census, Operation, Rules, Step, name_of, plainly, ruled


def picture(*shape: int) -> Tensor:
    """What depends on the picture, and may be changed in place."""
    return images(*(shape or (2, 4, 6, 6))).requires_grad_().clone()


def seen(run) -> list[tuple[str, str]]:
    """Name and kind of each operation of ``run`` on a picture."""
    x = picture()
    with Census() as census:
        run(x)
    assert {operation.module for operation in census.seen} <= {""}
    return [(operation.name, operation.kind) for operation in census.seen]


C, W = torch.tensor(2.0).double(), nn.Parameter(torch.randn(6, 6).double())
Q = torch.ops.aten

SPELLINGS = {
    ("relu", "activation"): [
        F.relu,
        torch.relu,
        torch.relu_,
        Tensor.relu,
        Tensor.relu_,
        nn.ReLU(),
        nn.ReLU(inplace=True),
        Q.relu.default,
        Q.relu_.default,
        lambda x: F.relu(x, True),
    ],
    ("relu6", "activation"): [F.relu6],
    ("hardtanh", "activation"): [nn.ReLU6(), nn.Hardtanh()],
    ("clamp", "activation"): [
        lambda x: x.clamp(min=0),
        lambda x: torch.clamp(x, 0, 1),
        lambda x: x.clamp_(max=3),
    ],
    ("add", "sum"): [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x + C,
        lambda x: x + x,
        lambda x: torch.add(x, x),
        lambda x: x.add_(1),
        lambda x: x.__iadd__(2),
        lambda x: Q.add.Tensor(x, x),
    ],
    ("sub", "sum"): [
        lambda x: x - 1,
        lambda x: torch.sub(x, C),
        lambda x: torch.subtract(x, 1),
        lambda x: x.sub_(2),
    ],
    ("sub", "difference"): [
        lambda x: x - x,
        lambda x: torch.sub(x, x),
        lambda x: x.subtract(x),
        lambda x: C - x,
    ],
    ("rsub", "difference"): [lambda x: 1 - x, lambda x: torch.rsub(x, 1)],
    ("mul", "scaling"): [lambda x: x * 2, lambda x: C * x, lambda x: x * W, lambda x: x.mul_(3)],
    ("mul", "product"): [lambda x: x * x, lambda x: x.mul(x)],
    ("div", "scaling"): [lambda x: x / 2, lambda x: x / C, lambda x: torch.div(x, C), lambda x: x.div_(3)],
    ("div", "other"): [
        lambda x: x / x,
        lambda x: torch.div(C, x),
        lambda x: torch.div(x, 2, rounding_mode="floor"),
        lambda x: x / x.sum(1, keepdim=True),
    ],
    ("rdiv", "other"): [lambda x: 2 / x],
    ("reciprocal", "other"): [torch.reciprocal],
    ("pow", "other"): [lambda x: x**2],
    ("neg", "scaling"): [lambda x: -x, torch.neg],
    ("positive", "rearrangement"): [lambda x: +x],
    ("matmul", "product"): [lambda x: x @ x, lambda x: torch.matmul(x, x)],
    ("matmul", "average"): [lambda x: x @ W, lambda x: W @ x, lambda x: torch.matmul(x, W.T)],
    ("einsum", "average"): [lambda x: torch.einsum("nchw,wk->nchk", x, W)],
    ("einsum", "product"): [lambda x: torch.einsum("nchw,nchw->nc", x, x)],
    ("conv2d", "weighted"): [
        nn.Conv2d(4, 2, 3).double(),
        lambda x: F.conv2d(x, torch.ones(2, 4, 1, 1).double()),
        lambda x: Q.conv2d.default(x, torch.ones(2, 4, 1, 1).double()),
    ],
    ("conv2d", "product"): [lambda x: F.conv2d(x, x)],
    ("linear", "weighted"): [nn.Linear(6, 3).double(), lambda x: F.linear(x, W)],
    ("batch_norm", "batch-norm"): [nn.BatchNorm2d(4).double().eval()],
    ("mean", "average"): [lambda x: x.mean((2, 3)), torch.mean],
    ("sum", "average"): [lambda x: x.sum(1), torch.sum],
    ("adaptive_avg_pool2d", "average"): [nn.AdaptiveAvgPool2d(1), lambda x: F.adaptive_avg_pool2d(x, 2)],
    ("avg_pool2d", "average"): [nn.AvgPool2d(2), lambda x: F.avg_pool2d(x, 2)],
    ("max_pool2d", "maximum"): [nn.MaxPool2d(2), lambda x: torch.max_pool2d(x, 2)],
    ("amax", "maximum"): [lambda x: x.amax(1)],
    ("max", "maximum"): [lambda x: x.max(1).values],
    ("maximum", "maximum"): [lambda x: torch.maximum(x, x)],
    ("layer_norm", "normalisation"): [nn.LayerNorm(6).double(), lambda x: F.layer_norm(x, (6,))],
    ("group_norm", "normalisation"): [nn.GroupNorm(2, 4).double()],
    ("softmax", "softmax"): [nn.Softmax(1), lambda x: x.softmax(1), lambda x: torch.softmax(x, 1)],
    ("scaled_dot_product_attention", "attention"): [lambda x: F.scaled_dot_product_attention(x, x, x)],
    ("cat", "rearrangement"): [lambda x: torch.cat([x, x])],
    ("getitem", "rearrangement"): [lambda x: x[:, 0], lambda x: x[..., None], lambda x: x[:, [1, 0]]],
    ("view", "rearrangement"): [lambda x: x.view(-1), lambda x: x.view(2, -1)],
    ("flatten", "rearrangement"): [nn.Flatten(), lambda x: x.flatten(1), lambda x: torch.flatten(x, 1)],
    ("T", "rearrangement"): [lambda x: x.T],
    ("unbind", "rearrangement"): [lambda x: list(x), lambda x: torch.unbind(x)],
    ("dropout", "rearrangement"): [nn.Dropout().eval(), lambda x: F.dropout(x, training=False)],
    ("pad", "rearrangement"): [lambda x: F.pad(x, (1, 1)), nn.ZeroPad2d(1), nn.ReflectionPad2d(1)],
    ("sort", "other"): [lambda x: x.sort()],
    ("dropout", "other"): [lambda x: F.dropout(x, 0.1), lambda x: torch.dropout(x, 0.1, True)],
    ("clamp", "other"): [lambda x: torch.clamp(x, min=x / 2), lambda x: torch.clamp(C, max=x)],
    ("prelu", "other"): [lambda x: F.prelu(x, x[0, 0, 0, :1])],
    ("add", "difference"): [lambda x: torch.add(x, x, alpha=-1), lambda x: torch.add(C, x, alpha=-2)],
    ("interpolate", "difference"): [lambda x: F.interpolate(x, scale_factor=2, mode="bicubic")],
    ("interpolate", "average"): [lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")],
    ("linear", "product"): [lambda x: F.linear(x, x[0, 0])],
    ("linear", "average"): [lambda x: F.linear(torch.ones(2, 6).double(), x[0, 0])],
    ("linear", "other"): [lambda x: F.linear(x, torch.ones(6, 6).double(), x[0, 0, 0])],
    ("batch_norm", "normalisation"): [
        nn.BatchNorm2d(4).double(),
        nn.BatchNorm2d(4, track_running_stats=False).double().eval(),
        lambda x: F.batch_norm(x, None, None, training=True),
    ],
}


@pytest.mark.filterwarnings("ignore:The use of `x.T`:UserWarning")
@pytest.mark.parametrize(("name", "kind"), SPELLINGS, ids=[f"{name} {kind}" for name, kind in SPELLINGS])
def test_an_operation_is_the_same_however_it_is_spelled(name, kind):
    for run in SPELLINGS[name, kind]:
        assert (name, kind) in seen(run)
        assert len(seen(run)) <= 2


def test_what_asks_about_a_tensor_is_no_operation():
    assert seen(
        lambda x: (x.shape, x.dtype, x.detach() + 1, x > 0, x.argmax(1), float(x.mean().detach()))
    ) == [("mean", "average")]
    assert seen(lambda x: (W * 2) @ W) == []  # weights made of weights


def test_weights_made_of_weights_are_no_inputs():
    raw = nn.Parameter(torch.randn(3, 6).double())
    assert seen(lambda x: F.linear(x, raw / raw.norm())) == [("linear", "weighted")]
    assert seen(lambda x: x * (raw.sum() * 2)) == [("mul", "scaling")]


def test_names_of_functions():
    assert name_of(torch.ops.aten.relu_.default) == "relu"
    assert name_of(torch.ops.aten._softmax.default) == "softmax"
    assert name_of(Tensor.__iadd__) == name_of(torch.add) == name_of(Tensor.__radd__) == "add"
    assert name_of(Tensor.__rsub__) == "rsub"
    assert name_of(Tensor.T.__get__) == "T"


# ---- the survey ------------------------------------------------------------------------------------------------


def test_the_survey_lists_what_a_network_does_where():
    found = survey(*_with(case("resnet18")))
    kinds = {operation.kind for operation in found.operations}
    assert kinds == {"weighted", "batch-norm", "activation", "maximum", "sum", "average", "rearrangement"}
    count = {kind: sum(n for op, n in found.operations.items() if op.kind == kind) for kind in kinds}
    assert (count["weighted"], count["batch-norm"], count["activation"], count["sum"]) == (21, 20, 17, 8)
    assert Operation("add", "sum", "layer1.0") in found.operations
    assert found.operations[Operation("relu", "activation", "layer1.0.relu")] == 2
    assert Operation("conv2d", "weighted", "layer2.0.downsample.0") in found.operations
    assert Operation("flatten", "rearrangement", "") in found.operations
    ran = [operation.module for operation in found.operations if operation.module]
    assert ran[:4] == ["conv1", "bn1", "relu", "maxpool"]


def _with(one) -> tuple[nn.Module, Tensor]:
    return one.net, one.x[:1]


def test_the_survey_names_what_few_rules_are_for():
    found = survey(*_with(case("mobilenet_v3_small"))).operations
    assert Operation("mul", "product", "features.1.block.1") in found
    found = survey(made(Tokens), images(1, 3, 16, 16)).operations
    assert Operation("multi_head_attention_forward", "attention", "attention") in found
    assert Operation("layer_norm", "normalisation", "norm1") in found


def test_toys_are_read_too():
    names = {(op.name, op.module) for op in survey(made(Residual), images(1, 3, 8, 8)).operations}
    assert {
        ("add", ""),
        ("mul", ""),
        ("sigmoid", ""),
        ("conv2d", "twice"),
        ("batch_norm", "block.2"),
    } <= names
    assert str(Operation("mul", "product", "a.b")) == "module 'a.b' calls mul"
    assert str(Operation("mul", "product", "")) == "the network itself calls mul"


# ---- rules -----------------------------------------------------------------------------------------------------


class Doubled(Step):
    """Sends back twice what arrives."""

    def run(self, *tensors: Tensor) -> Tensor:
        return tensors[0].relu()

    def back(self, sent: Tensor, value: Tensor | None, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (2 * sent,)


class Doubling(Rules):
    def __init__(self, **how: bool) -> None:
        kinds = ("sum", "scaling", "rearrangement", "average", "weighted", "product")
        super().__init__({**dict.fromkeys(kinds, plainly), "activation": self.doubled}, **how)
        self.calls: list[Call] = []

    def doubled(self, call: Call) -> Tensor:
        with torch.no_grad():
            value = call.run(*call.inputs)
        return ruled(self, Doubled(), value, *call.inputs)


def test_a_rule_replaces_the_derivative_and_not_the_value():
    x = images(2, 3).requires_grad_()
    with Doubling():
        out = F.relu(x) * 3
    assert_close(out, x.relu() * 3)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(grad, torch.full_like(x, 6.0))


def test_what_is_without_a_rule_is_refused_by_name():
    with pytest.raises(ModelError, match=r"no rule for softmax \(softmax\)"), Doubling():
        picture().softmax(1)
    with Doubling():  # questions need none
        assert (picture() > 0).shape == (2, 4, 6, 6)


def spelled(x: Tensor, how: str) -> Tensor:
    """Twice the rectified picture, plus one."""
    match how:
        case "new":
            return F.relu(x) * 2 + 1
        case "the name stays":
            x = x.clone()
            x.relu_()
            x.mul_(2)
            x += 1
            return x
        case "flags":
            x = x.clone()
            F.relu(x, inplace=True)
            F.dropout(x, 0.5, False, True)
            x.mul_(2).add_(1)
            return x
        case "two names":
            x = x.clone()
            y = x
            y.relu_()
            return x * 2 + 1
        case "operators":
            x = torch.relu_(x.clone())
            x *= 2
            x += 1
            return x
        case "an entry":
            x, y = x.relu(), x.new_empty(x.shape)
            y[:, 1:] = x[:, 1:] * 2
            y[:, :1] = 2 * x[:, :1]
            y += 1
            return y
        case "aten":
            return Q.add_.Tensor(Q.mul.Tensor(Q.relu_.default(Q.clone.default(x)), 2), 1)
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how", ["new", "the name stays", "flags", "two names", "operators", "an entry", "aten"]
)
def test_changes_in_place_are_made_anew_and_take_the_place_of_the_old(how):
    x = images(2, 3).requires_grad_()
    with Doubling():
        out = spelled(x, how)
        out = out * 1
    assert_close(out, x.relu() * 2 + 1)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(grad, torch.full_like(x, 4.0))


def test_a_view_of_what_was_changed_in_place_is_refused():
    def of_the_base(x):
        v = x.view(-1)
        x.relu_()
        return v * 2

    def of_the_view(x):
        x[:, 0].relu_()
        return x * 2

    def view_and_base(x):
        return x[:, 0].relu_() * 2  # the base is not asked for again

    for run in (of_the_base, of_the_view):
        with (
            pytest.raises(ModelError, match="changes a tensor in place and hands a view.*mul; change a copy"),
            Doubling(),
        ):
            run(picture())
    x = picture()
    with Doubling():
        out = view_and_base(x)
    assert_close(out, x[:, 0].relu() * 2)


def test_one_tensor_may_come_twice():
    class Squares(Rules):
        def product(self, call: Call) -> Tensor:
            with torch.no_grad():
                value = call.run(*call.inputs)
            return ruled(self, Itself(call), value, *call.inputs)

    class Itself(Step):
        def __init__(self, call: Call) -> None:
            self.call = call

        def run(self, *tensors: Tensor) -> Tensor:
            return self.call.run(*tensors)

        def back(self, sent, value, tensors):
            raise AssertionError("the derivative of run is asked for")

    x = images(3).requires_grad_()
    rules = Squares({}, twice=True)
    rules.table = {"product": rules.product, "activation": plainly}
    with rules:
        y = x.tanh()
        out = y * (y * y)
    rules.over = True
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert_close(grad, 3 * x.tanh() ** 2 * (1 - x.tanh() ** 2))


# ---- nothing is left behind ------------------------------------------------------------------------------------


class Keeping(Doubling):
    """Notes a weak reference to every tensor that comes by."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[weakref.ref] = []

    def called(self, call: Call):
        out = super().called(call)
        self.kept += [weakref.ref(tensor) for tensor in (*call.inputs, out) if isinstance(tensor, Tensor)]
        return out


@pytest.mark.parametrize("fails", [False, True])
def test_no_tensor_outlives_the_block(fails):
    rules = Keeping()
    x = images(2, 3, 8, 8).requires_grad_()
    net = made(PooledLinear)

    def run() -> None:
        with rules:
            out = net(x)
            if fails:
                out.softmax(1)
        torch.autograd.grad(out.sum(), x)

    if fails:
        with pytest.raises(ModelError) as caught:
            run()
        del caught
    else:
        run()
    gc.collect()
    assert len(rules.kept) > 10
    alive = [ref() for ref in rules.kept if ref() is not None]
    assert all(tensor is x for tensor in alive)
    assert not any(map(len, (rules.weights, rules.current, rules.old)))
    assert F.relu(x).grad_fn.name().startswith("Relu")  # the mode is off


def test_a_step_keeps_what_it_reads_and_no_more():
    x = images(2, 3, 8, 8).requires_grad_()
    net = nn.Conv2d(3, 4, 3).double().requires_grad_(False)
    with Doubling() as rules:
        before = net(x)
        after = F.relu(before)
        gone = weakref.ref(before)
        del before
        rules.forget()
        assert gone() is None
    assert after.grad_fn.saved_tensors == ()


def test_the_census_leaves_a_network_as_it_was():
    net = nn.Sequential(PooledLinear(), nn.ReLU())
    before = {name: (id(value), value.requires_grad) for name, value in net.named_parameters()}
    survey(net, torch.randn(1, 3, 8, 8))
    assert {name: (id(value), value.requires_grad) for name, value in net.named_parameters()} == before
    assert net.training
    assert not any(part._forward_hooks for part in net.modules())
