"""One gradient and what it is multiplied by: against captum and zennit, known gradients, theorems, differences."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from captum.attr import InputXGradient, LayerGradientXActivation, LayerIntegratedGradients
from captum.attr import Saliency as PeerSaliency
from pixels import NETWORKS, TARGETS, case
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made
from zennit.attribution import Gradient

from xcli.errors import ConfigError, ModelError
from xcli.methods.cam.gradient import HiResCAM
from xcli.methods.gradient.plain import InputTimesGradient, LinearApproximation, Saliency
from xcli.registry import build, methods

EXACT = {"rtol": 1e-10, "atol": 1e-13}
PLAIN = (Saliency, InputTimesGradient, LinearApproximation)
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
LAYERS = {
    "shapes-cnn": ("stages", "stages.0"),
    "vgg11": ("features.19", "features.3"),
    "resnet18": ("layer3", "layer2"),
    "densenet121": ("features.transition3.conv", "features.denseblock2"),
    "mobilenet_v3_small": ("features.9.block.0", "features.4"),
    "vit_b_16": ("encoder.layers.encoder_layer_11.ln_1", "encoder.layers.encoder_layer_9"),
}
"""Of each network the default layer and one before it."""


@cache
def setting(name):
    """The network, two images, their score and classes; for the large networks one image."""
    one, count = case(name), 1 if name in ("vgg11", "vit_b_16") else 2
    x, target = one.x[:count], TARGETS[:count]
    return one.net, x, bound(one.net, x, target), torch.tensor(target)


def leaf(x):
    """The pictures as captum wants them."""
    return x.clone().requires_grad_()


def assert_same(ours, expected):
    expected = expected.detach()
    scale = float(expected.abs().max())
    assert scale > 0
    assert_close(ours, expected, rtol=1e-9, atol=1e-11 * scale)


# ---- captum and zennit, on six networks ------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_maps_at_the_pixels_are_those_of_captum_and_zennit(network):
    net, x, score, target = setting(network)
    size = PeerSaliency(net).attribute(leaf(x), target)
    assert_same(build({"name": "saliency", "preset": "captum"}).explain(score, x).map, size)
    product = InputXGradient(net).attribute(leaf(x), target)
    assert_same(build({"name": "input-x-gradient", "preset": "captum"}).explain(score, x).map, product)
    signed = build({"name": "saliency", "preset": "zennit"}).explain(score, x).map
    assert_same(signed, PeerSaliency(net).attribute(leaf(x), target, abs=False))
    _, gradient = Gradient(net)(leaf(x), nn.functional.one_hot(target, 10).to(x))
    assert_same(signed, gradient)
    assert signed.min() < 0 < signed.max()


@pytest.mark.parametrize("network", NETWORKS)
def test_maps_at_a_layer_are_those_of_captum(network):
    """Tokens of a transformer, class token first, are a map of 2x2 patches."""
    net, x, score, target = setting(network)
    default, earlier = LAYERS[network]
    for layer, method in ((default, LinearApproximation()), (earlier, InputTimesGradient(layer=earlier))):
        terms = LayerGradientXActivation(net, net.get_submodule(layer)).attribute(leaf(x), target)
        if network == "vit_b_16":
            assert terms.shape == (1, 5, 768)
            terms = terms[:, 1:].reshape(1, 2, 2, 768).permute(0, 3, 1, 2)
        assert_same(method.attribute(score, x), terms)
    assert [layer.name for layer in LinearApproximation().looks_at(score.layers)] == [default]


def test_the_sum_over_steps_of_captum_at_a_layer_is_another_number():
    """The product with the gradient at the picture is not what the activation adds on its way from a black picture."""
    net, x, score, target = setting("shapes-cnn")
    way = LayerIntegratedGradients(net, net.stages).attribute(x.clone(), target=target, n_steps=16)
    ours = LinearApproximation(layer="stages").attribute(score, x)
    assert (ours - way).abs().max() > 0.01 * ours.abs().max()


# ---- theorems --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["shapes-cnn", "resnet18", "vit_b_16"])
def test_linear_approximation_is_hirescam_without_its_relu(network):
    _, x, score, _ = setting(network)
    signed = LinearApproximation().explain(score, x).map
    assert_close(signed, HiResCAM(relu=False).explain(score, x).map, **EXACT)
    assert signed.min() < 0 < signed.max()


@pytest.mark.parametrize(
    ("kind", "layer"), [(PooledLinear, "features"), (Residual, "last"), (Tokens, "norm1")]
)
def test_hirescam_rectifies_the_linear_approximation_which_is_the_product_at_that_layer(kind, layer):
    net, x = made(kind), images(3, 3, 16, 16)
    score = bound(net, x, **ROWS)
    signed = LinearApproximation(layer=layer).explain(score, x).map
    assert_close(HiResCAM(layer=layer, relu=False).explain(score, x).map, signed, **EXACT)
    assert_close(HiResCAM(layer=layer).explain(score, x).map, signed.relu(), **EXACT)
    assert_close(InputTimesGradient(layer=layer).explain(score, x).map, signed, **EXACT)
    assert signed.min() < 0 < signed.max()


class Linear(nn.Module):
    """A linear network, with an identity in front that has a map."""

    def __init__(self, labels: int = 4, shape: tuple[int, int, int] = (3, 4, 5)) -> None:
        super().__init__()
        self.same = nn.Identity()
        self.head = nn.Linear(shape[0] * shape[1] * shape[2], labels)

    def forward(self, x):
        return self.head(self.same(x).flatten(1))


def test_of_a_linear_network_saliency_is_the_size_of_its_weights_whatever_the_picture():
    net, x = made(Linear), images(3, 3, 4, 5)
    weight = net.head.weight.detach()[ROWS["target"]].view(4, 3, 4, 5)
    score = bound(net, x, **ROWS)
    assert_close(Saliency().explain(score, x).map, weight.abs().amax(1), **EXACT)
    assert_close(Saliency().attribute(score, x), weight.abs(), **EXACT)
    assert_close(Saliency(absolute=False, reduce="none").explain(score, 7 * x).map, weight, **EXACT)
    assert_close(Saliency(layer="same").explain(score, x).map, weight.abs().amax(1), **EXACT)


def test_of_a_linear_network_input_times_gradient_sums_to_the_score_less_its_bias():
    net, x = made(Linear), images(3, 3, 4, 5)
    score = bound(net, x, **ROWS)
    weight = net.head.weight.detach()[ROWS["target"]].view(4, 3, 4, 5)
    found = InputTimesGradient(reduce="none").explain(score, x).map
    assert_close(found, weight * x[ROWS["image"]], **EXACT)
    bias = net.head.bias.detach()[ROWS["target"]]
    assert_close(found.sum((1, 2, 3)), score.clean(x) - bias, **EXACT)


class BiasFree(nn.Module):
    """Piecewise linear through zero: convolutions, ReLU, max and average pooling, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.act = nn.LeakyReLU(0.2)
        self.mean = nn.AvgPool2d(2)
        self.head = nn.Linear(6 * 4, 4, bias=False)

    def forward(self, x):
        early = self.pool(self.first(x).relu())
        late = self.act(self.second(early)) + early
        return self.head(self.mean(late).flatten(1))


@pytest.mark.parametrize("layer", ["input", "first", "pool", "mean"])
def test_of_a_piecewise_linear_network_without_biases_products_sum_to_the_score(layer):
    net, x = made(BiasFree), images(3, 3, 8, 8)
    score = bound(net, x, **ROWS)
    for method in (InputTimesGradient, LinearApproximation):
        found = method(layer=layer).explain(score, x).map
        assert_close(found.sum((1, 2)), score.clean(x), **EXACT)


@pytest.mark.parametrize("layer", ["second", "act"])
def test_beside_a_skip_connection_products_sum_to_what_their_branch_adds(layer):
    net, x = made(BiasFree), images(3, 3, 8, 8)
    score = bound(net, x, **ROWS)
    early = net.pool(net.first(x).relu())
    skipped = net.head(net.mean(early).flatten(1)).detach()[ROWS["image"], ROWS["target"]]
    found = LinearApproximation(layer=layer).explain(score, x).map.sum((1, 2))
    assert_close(found, score.clean(x) - skipped, **EXACT)
    assert skipped.abs().min() > 1e-3


@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_gradients_are_what_small_changes_of_pixels_do(kind):
    net, x = made(kind), images(3, 3, 16, 16)
    score = bound(net, x, **ROWS)
    signed = Saliency(absolute=False).attribute(score, x)
    for place in [(0, 0, 0), (1, 7, 9), (2, 15, 15)]:
        step = torch.zeros_like(x)
        step[(slice(None), *place)] = 1e-5
        slope = (score.clean(x + step) - score.clean(x - step)) / 2e-5
        assert_close(signed[(slice(None), *place)], slope, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("kind", [Residual, Tokens])
def test_input_times_gradient_sums_to_what_more_contrast_does(kind):
    """Its sum is the derivative of the score along the picture itself."""
    net, x = made(kind), images(3, 3, 16, 16)
    score = bound(net, x, **ROWS)
    total = InputTimesGradient().explain(score, x).map.sum((1, 2))
    slope = (score.clean(x * (1 + 1e-5)) - score.clean(x * (1 - 1e-5))) / 2e-5
    assert_close(total, slope, rtol=1e-5, atol=1e-10)


def test_a_pixel_of_the_mean_colour_gets_nothing_from_the_product_however_much_it_counts():
    net, x = made(PooledLinear), images(1, 3, 8, 6)
    x[0, :, 2, 3] = 0
    score = bound(net, x, [1])
    assert (InputTimesGradient().explain(score, x).map[0, 2, 3] == 0).all()
    assert Saliency().explain(score, x).map[0, 2, 3] > 0


# ---- channels become one number --------------------------------------------------------------------------------

GRADIENT = torch.tensor([[[3.0, 1.0]], [[-4.0, 1.0]], [[0.0, -2.0]]], dtype=torch.float64)
"""Two pixels: (3, -4, 0) and (1, 1, -2)."""


def known(x):
    """The score of two pixels whose gradient is ``GRADIENT``."""
    net = Linear(labels=1, shape=(3, 1, 2)).double().eval()
    net.head.weight.data = GRADIENT.reshape(1, 6).clone()
    return bound(net, x, [0])


@pytest.mark.parametrize(
    ("reduce", "signed", "absolute"),
    [
        ("sum", [-1, 0], [7, 4]),
        ("mean", [-1 / 3, 0], [7 / 3, 4 / 3]),
        ("max", [4, 2], [4, 2]),
        ("l2", [5, 6**0.5], [5, 6**0.5]),
        ("none", GRADIENT[:, 0].tolist(), GRADIENT[:, 0].abs().tolist()),
    ],
)
def test_a_known_gradient_is_reduced_to_known_numbers(reduce, signed, absolute):
    x = images(1, 3, 1, 2)
    for expected, how in ((signed, False), (absolute, True)):
        found = Saliency(absolute=how, reduce=reduce).explain(known(x), x).map
        assert_close(found[..., 0, :][0], torch.tensor(expected, dtype=torch.float64), **EXACT)
    ones = torch.ones(1, 3, 1, 2, dtype=torch.float64)
    product = InputTimesGradient(reduce=reduce).explain(known(ones), -ones).map
    minus = -1 if reduce in ("sum", "mean", "none") else 1
    assert_close(
        product[..., 0, :][0], minus * torch.tensor(signed, dtype=torch.float64), rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "saliency"}, [4, 2]),
        ({"name": "saliency", "preset": "captum"}, [[3, 1], [4, 1], [0, 2]]),
        ({"name": "saliency", "preset": "zennit"}, [[3, 1], [-4, 1], [0, -2]]),
        ({"name": "saliency", "preset": "signed"}, [-1, 0]),
        ({"name": "input-x-gradient"}, [-2, 0]),
        ({"name": "input-x-gradient", "preset": "captum"}, [[6, 2], [-8, 2], [0, -4]]),
        ({"name": "input-x-gradient", "preset": "xplique"}, [-2 / 3, 0]),
        ({"name": "linear-approximation", "layer": "same"}, [-2, 0]),
        ({"name": "linear-approximation", "layer": "input"}, [-2, 0]),
    ],
)
def test_defaults_and_presets_on_a_known_gradient_and_a_picture_of_twos(spec, expected):
    twos = torch.full((1, 3, 1, 2), 2.0, dtype=torch.float64)
    found = build(spec).explain(known(twos), twos).map[..., 0, :][0]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_every_preset_of_the_three_is_tried_above():
    tried = {"saliency": {"captum", "zennit", "signed"}, "input-x-gradient": {"captum", "xplique"}}
    for method in PLAIN:
        assert set(methods()[method.name].presets) == tried.get(method.name, set())


def test_at_a_layer_channels_are_reduced_like_colours():
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [1, 4])
    acts = net.features(x).detach()
    grads = net.head.weight.detach()[[1, 4], :, None, None] * (acts > 0) / 12
    assert_close(Saliency(layer="features").explain(score, x).map, grads.abs().amax(1), **EXACT)
    wanted = Saliency(layer="features", absolute=False, reduce="mean")
    assert_close(wanted.explain(score, x).map, grads.mean(1), **EXACT)
    wanted = InputTimesGradient(layer="features", reduce="l2")
    assert_close(wanted.explain(score, x).map, (acts * grads).norm(dim=1), **EXACT)
    found = LinearApproximation(layer="features").explain(score, x, (16, 12)).map
    grown = nn.functional.interpolate((acts * grads).sum(1)[:, None], (16, 12), mode="bilinear")[:, 0]
    assert_close(found, grown, **EXACT)


# ---- the layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLAIN)
def test_layers_are_found_by_name_or_as_the_default_and_pinned_by_name(method):
    layers = bound(made(PooledLinear), images(1, 3, 8, 6), [0]).layers
    auto = method(layer="auto")
    assert auto.looks_at(layers) == (layers.default,)
    assert auto.pinned(layers) == method(layer=layers.default.name)
    assert auto.pinned(layers, ["features.0"]) == method(layer="features.0")
    assert method(layer="feat*s").pinned(layers) == method(layer="features")
    assert method(layer="input").looks_at(layers) == ()
    assert method(layer="input").pinned(layers) == method(layer="input")
    assert method().layer == ("auto" if method is LinearApproximation else "input")


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("featurs", "there is no layer 'featurs'; nearest: features"),
        ("features.*", r"looks at one layer; 'features\.\*' names 3"),
        ("auto:2", "looks at one layer; 'auto:2' names 2"),
        ("x*", r"layer 'x\*' matches no module"),
        ("head", r"layer 'head' has no spatial map: its output has shape \(5,\)"),
    ],
)
def test_what_is_not_one_layer_with_a_map_is_refused(method, layer, message):
    net, x = made(PooledLinear), images(1, 3, 8, 6)
    score, wrong = bound(net, x, [0]), method(layer=layer)
    for attempt in (lambda: wrong.looks_at(score.layers), lambda: wrong.pinned(score.layers)):
        with pytest.raises(ModelError, match=message):
            attempt()
    with pytest.raises(ModelError, match=message):
        wrong.attribute(score, x)


def test_a_layer_that_runs_twice_is_refused_with_others_that_run_once():
    score = bound(made(Residual), images(1, 3, 8, 8), [0])
    with pytest.raises(ModelError, match="'twice' runs 3 times in one forward pass"):
        Saliency(layer="twice").looks_at(score.layers)


@pytest.mark.parametrize("wrong", [{"layer": ""}, {"reduce": "median"}, {"layer": ["a", "b"]}])
def test_options_out_of_range_are_refused(wrong):
    for method in PLAIN:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build({"name": method.name, **wrong})
    with pytest.raises(ConfigError, match="absolute"):
        build({"name": "input-x-gradient", "absolute": True})


# ---- rows and images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("layer", ["input", "features"])
def test_rows_of_one_image_share_a_pass_and_have_their_own_gradient(method, layer):
    net, x, seen = made(PooledLinear), images(4, 3, 8, 6), []
    target, image = [0, 1, 2, 3, 4], [0, 0, 0, 1, 3]
    score = bound(net, x, target, image, micro_batch=2)
    handle = net.register_forward_pre_hook(lambda _module, inputs: seen.append(len(inputs[0])))
    found = method(layer=layer).attribute(score, x)
    handle.remove()
    assert seen == [2, 1]  # nobody asks about the third image
    alone = [
        method(layer=layer).attribute(bound(net, x[i : i + 1], [t]), x[i : i + 1])
        for t, i in zip(target, image, strict=True)
    ]
    assert_close(found, torch.cat(alone), **EXACT)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("layer", ["input", "features"])
def test_an_image_that_is_not_finite_leaves_the_others_alone(method, layer):
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [1, 2, 3], [0, 1, 1])
    expected = method(layer=layer).attribute(score, x)
    x[0, 0, 0, 0] = torch.nan
    found = method(layer=layer).attribute(score, x)
    assert_close(found[1:], expected[1:], **EXACT)
    assert found[0].isnan().any() or method is Saliency  # a gradient need not see the value


# ---- maps that are differentiated ------------------------------------------------------------------------------


class Smooth(nn.Module):
    """Without a kink, so that differences meet derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(nn.functional.softplus(self.second(self.first(x).tanh())).square().mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "layer"), [(Smooth, "input"), (Smooth, "first"), (Tokens, "input"), (Tokens, "norm1")]
)
@pytest.mark.parametrize("at", ["pixels", "weights"])
@pytest.mark.parametrize(
    "method", [*(one() for one in PLAIN), Saliency(absolute=False, reduce="l2")], ids=lambda one: one.name
)
def test_maps_can_be_differentiated_by_pixels_and_weights(method, at, kind, layer):
    net, x = made(kind), images(2, 3, 16, 16).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 1, 2], [0, 0, 1]), create_graph=True)
    method, pattern = replace(method, layer=layer), images(3, 16, 16, seed=9)
    changed = [x] if at == "pixels" else [one for one in net.parameters() if one.ndim > 1]
    steps = [1e-6 * images(*one.shape, seed=5) for one in changed]

    def loss(by):
        for one, step in zip(changed, steps, strict=True):
            one.data += by * step
        found = method.explain(score, x, (16, 16)).map
        for one, step in zip(changed, steps, strict=True):
            one.data -= by * step
        return (found * pattern).sum() * 1e6

    slopes = torch.autograd.grad(loss(0), changed, materialize_grads=True)
    expected = sum((slope * step).sum() for slope, step in zip(slopes, steps, strict=True))
    assert expected.abs() > 1e-3
    assert_close(expected, (loss(1) - loss(-1)).detach() / 2, rtol=1e-6, atol=0)


def test_without_the_wish_for_graphs_maps_carry_none():
    net, x = made(Residual), images(2, 3, 8, 8).requires_grad_()
    for method in PLAIN:
        for layer in ("input", "last"):
            assert not method(layer=layer).explain(bound(net, x, [0, 1]), x).map.requires_grad
    assert all(one.grad is None for one in net.parameters())
    assert x.grad is None
