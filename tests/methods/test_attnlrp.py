"""AttnLRP against relevance carried from layer to layer by the paper's propositions, written out in einsum."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pixels import case
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck
from torch.testing import assert_close
from toys import Residual, Tokens, bound, images, made
from zennit.rules import Gamma

import xcli
from xcli.demo import nets
from xcli.errors import ModelError
from xcli.layers import survey
from xcli.methods.propagation.lrp import LRP
from xcli.methods.transformer.attnlrp import AttnLRP

X = images(2, 3, 16, 16)
TARGET = [1, 3]


# --- the propositions, one at a time ------------------------------------------------------------------------------


def through_linear(x: Tensor, weight: Tensor, relevance: Tensor, out: Tensor) -> Tensor:
    """LRP-0: R_i = sum_j x_i W_ji R_j / z_j."""
    return torch.einsum("...i,ji,...j->...i", x, weight, relevance / out)


def through_product(a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Proposition 3.3: of O = A B, each factor gets half of what its entries add to O."""
    share = relevance / (2 * (a @ b))
    return (
        torch.einsum("...ij,...jk,...ik->...ij", a, b, share),
        torch.einsum("...ij,...jk,...ik->...jk", a, b, share),
    )


def through_softmax(x: Tensor, relevance: Tensor) -> Tensor:
    """Proposition 3.1: R_i = x_i (R_i - s_i sum_j R_j)."""
    return x * (relevance - x.softmax(-1) * relevance.sum(-1, keepdim=True))


def through_norm(x: Tensor, norm: nn.LayerNorm, relevance: Tensor) -> Tensor:
    """Proposition 3.4: the division passes relevance on; taking off the mean, scale and shift are linear."""
    deviation = (x.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    size = x.shape[-1]
    linear = torch.diag(norm.weight) @ (torch.eye(size) - torch.full((size, size), 1 / size)).double()
    return through_linear(x, linear, relevance, norm(x) * deviation)


def literal(net: Tokens, x: Tensor, target: list[int], cp: bool = False) -> Tensor:
    """Relevance of the pixels (B, 3, H, W), every entry carried back by hand."""
    place, attention = net.place, net.attention
    patches = net.patches(x)
    tokens = torch.cat([net.token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    first = tokens + place
    seen = net.norm1(first)
    count, width, heads = first.shape[1], first.shape[2], attention.num_heads

    def split(t: Tensor) -> Tensor:
        return t.reshape(len(x), count, heads, -1).transpose(1, 2)

    def joined(t: Tensor) -> Tensor:
        return t.transpose(1, 2).reshape(len(x), count, width)

    qkv = F.linear(seen, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (split(t) for t in qkv.chunk(3, -1))
    scaled = q / math.sqrt(width // heads)
    logits = scaled @ k.transpose(-2, -1)
    probabilities = logits.softmax(-1)
    mixed = joined(probabilities @ v)
    added = attention.out_proj(mixed)
    second = first + added
    hidden = net.mlp[0](net.norm2(second))
    active = F.gelu(hidden)
    third = second + net.mlp[2](active)
    out = net.head(third[:, 0])
    assert_close(out, net(x))

    start = torch.zeros_like(out)
    start[range(len(x)), target] = out[range(len(x)), target]
    r_third = torch.zeros_like(third)
    r_third[:, 0] = through_linear(third[:, 0], net.head.weight, start, out)
    r_second, r_mlp = (t * r_third / third for t in (second, net.mlp[2](active)))
    r_active = through_linear(active, net.mlp[2].weight, r_mlp, net.mlp[2](active))
    r_normed = through_linear(net.norm2(second), net.mlp[0].weight, r_active, hidden)  # GELU passes it on
    r_second = r_second + through_norm(second, net.norm2, r_normed)
    r_first, r_added = (t * r_second / second for t in (first, added))
    r_mixed = split(through_linear(mixed, attention.out_proj.weight, r_added, added))
    if cp:
        r_v = torch.einsum("...ij,...jk,...ik->...jk", probabilities, v, r_mixed / (probabilities @ v))
        r_q, r_k = torch.zeros_like(q), torch.zeros_like(k)
    else:
        r_p, r_v = through_product(probabilities, v, r_mixed)
        r_q, r_k = through_product(scaled, k.transpose(-2, -1), through_softmax(logits, r_p))
        r_k = r_k.transpose(-2, -1)
    r_qkv = torch.cat([joined(t) for t in (r_q, r_k, r_v)], -1)
    r_first = r_first + through_norm(
        first, net.norm1, through_linear(seen, attention.in_proj_weight, r_qkv, qkv)
    )
    r_tokens = tokens * r_first / first
    r_patches = r_tokens[:, 1:].transpose(1, 2).reshape(patches.shape)
    return x * F.conv_transpose2d(r_patches / patches, net.patches.weight, stride=4)


@pytest.mark.parametrize("attention", ["attnlrp", "cp"])
def test_it_is_relevance_carried_by_the_propositions(attention):
    net = made(Tokens)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(1.5).add_(0.1 if "norm" in name else 0.0)
        expected = literal(net, X, TARGET, attention == "cp")
    found = xcli.explain(
        net, X, {"name": "attnlrp", "attention": attention, "reduce": "none"}, target=TARGET, native=True
    )
    assert_close(found.map, expected, rtol=1e-7, atol=1e-9)


def test_relevance_of_a_layer_is_that_of_the_pixels_behind_it_but_for_the_bias():
    net = made(Tokens)
    nn.init.zeros_(net.patches.bias)
    at = xcli.explain(net, X, {"name": "attnlrp", "layer": "patches"}, target=TARGET, native=True)
    pixels = xcli.explain(net, X, "attnlrp", target=TARGET, native=True)
    assert at.map.shape == (2, 4, 4)
    assert_close(F.avg_pool2d(pixels.map[:, None], 4)[:, 0] * 16, at.map, rtol=1e-9, atol=1e-12)


# --- LXT's form of it, in which the gradient of a few modules is another, on whole networks -----------------------


class Sent(torch.autograd.Function):
    """A tensor whose gradient is multiplied by another one."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: Tensor | float, value: Tensor) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, *sent: Tensor) -> tuple[Tensor | None, ...]:
        return sent[0] * ctx.factor, None, None


def half(x: Tensor) -> Tensor:
    return Sent.apply(x, 0.5, x)


def held_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt().detach()
    return centred / deviation * norm.weight + norm.bias


def block(
    x: Tensor, norms: tuple[nn.LayerNorm, ...], attention: nn.MultiheadAttention, mlp: nn.Module
) -> Tensor:
    """A pre-norm block of any of these networks."""
    heads = attention.num_heads
    qkv = F.linear(held_norm(norms[0], x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in qkv.chunk(3, -1))
    probabilities = half(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
    x = x + attention.out_proj(half(probabilities @ v).transpose(1, 2).flatten(2))
    first, last = (part for part in mlp if isinstance(part, nn.Linear))
    hidden = first(held_norm(norms[1], x))
    active = F.gelu(hidden).detach()
    return x + last(Sent.apply(hidden, active / (hidden.detach() + 1e-10), active))


def shapes_vit(net: nn.Module, x: Tensor) -> Tensor:
    tokens = net.patches(net.stem(x)).flatten(2).transpose(1, 2)
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1) + net.positions
    for one in net.blocks:
        tokens = block(tokens, (one.norm1, one.norm2), one.attention, one.mlp)
    return net.head(held_norm(net.norm, tokens)[:, 0])


def vit_b_16(net: nn.Module, x: Tensor) -> Tensor:
    tokens = net._process_input(x)
    tokens = torch.cat([net.class_token.expand(len(x), -1, -1), tokens], 1) + net.encoder.pos_embedding
    for one in net.encoder.layers:
        tokens = block(tokens, (one.ln_1, one.ln_2), one.self_attention, one.mlp)
    return net.heads(held_norm(net.encoder.ln, tokens)[:, 0])


def networks(name: str) -> tuple[nn.Module, Tensor]:
    if name == "shapes-vit":
        return nets.load(name).double(), images(2, 3, 128, 128)
    one = case(name)
    return one.net, one.x[:2]


@pytest.mark.parametrize(
    ("name", "form"),
    [("shapes-vit", shapes_vit), pytest.param("vit_b_16", vit_b_16, marks=pytest.mark.soak)],
    ids=["shapes-vit", "vit_b_16"],
)
def test_it_equals_lxts_form(name, form):
    net, x = networks(name)
    at = x.clone().requires_grad_()
    out = form(net, at)
    assert_close(out, net(x), rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(out[[0, 1], TARGET].sum(), at)
    expected = (at * gradient).detach()
    found = xcli.explain(net, x, {"name": "attnlrp", "reduce": "none"}, target=TARGET, native=True)
    # LXT adds its 1e-10 without the sign of what it is added to
    assert_close(found.map, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


# --- what it is where there is nothing to change ------------------------------------------------------------------


def test_on_rectifiers_alone_it_is_input_times_gradient():
    net = nets.load("shapes-cnn").double()
    x = images(2, 3, 48, 64)
    found, plain = (
        xcli.explain(net, x, name, target=TARGET, native=True).map for name in ("attnlrp", "input-x-gradient")
    )
    assert_close(found, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.25])
def test_on_rectifiers_alone_it_is_lrp_per_unit_of_activation(gamma):
    net = nets.load("shapes-cnn").double()
    x = images(2, 3, 48, 64)
    rule = {"gamma": gamma} if gamma else {"epsilon": 0}
    expected = xcli.explain(
        net, x, {"name": "lrp", "rules": {"convolution": rule, "linear": rule}}, target=TARGET, native=True
    ).map
    found = xcli.explain(
        net,
        x,
        {"name": "attnlrp", "gamma_convolution": gamma, "gamma_linear": gamma},
        target=TARGET,
        native=True,
    ).map
    # lrp keeps every division safe by 1e-6
    assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_gamma_of_a_linear_layer_equals_zennits():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 12), nn.GELU(), nn.Linear(12, 4)).double()
    x = images(2, 3, 4, 4)
    with torch.no_grad():
        hidden = net[1](x.flatten(1))
        active, out = F.gelu(hidden), net(x)
    relevance = torch.zeros_like(out)
    relevance[range(2), TARGET] = out[range(2), TARGET]
    for layer, given in ((net[3], active), (net[1], x.flatten(1))):
        hooks = Gamma(gamma=0.3, stabilizer=1e-6).register(layer)
        at = given.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(layer(at), at, relevance)
        hooks.remove()
    found = xcli.explain(
        net, x, {"name": "attnlrp", "gamma_linear": 0.3, "reduce": "none"}, target=TARGET, native=True
    )
    assert_close(found.map, relevance.view_as(x), rtol=1e-6, atol=1e-9)


# --- however a network asks for attention ---------------------------------------------------------------------


class Written(nn.Module):
    """The attention of ``Tokens`` by another spelling, with the same weights."""

    def __init__(self, net: Tokens, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def attend(self, x: Tensor) -> Tensor:
        own = self.net.attention
        q, k, v = (
            t.unflatten(-1, (own.num_heads, -1)).transpose(1, 2)
            for t in F.linear(x, own.in_proj_weight, own.in_proj_bias).chunk(3, -1)
        )
        if self.how == "sdpa":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.how == "einsum":
            logits = torch.einsum("bhie,bhje->bhij", q, k) * q.shape[-1] ** -0.5
            mixed = torch.einsum("bhij,bhje->bhie", F.dropout(logits.softmax(-1), 0.1, False), v)
        else:
            logits = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            mixed = torch.matmul(nn.functional.softmax(logits, dim=-1), v)
        return own.out_proj(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        net = self.net
        tokens = net.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([net.token.expand(len(x), -1, -1), tokens], 1) + net.place
        tokens = tokens + self.attend(net.norm1(tokens))
        tokens = tokens + net.mlp(net.norm2(tokens))
        return net.head(tokens[:, 0])


@pytest.mark.parametrize("how", ["sdpa", "einsum", "matmul"])
@pytest.mark.parametrize("preset", ["paper", "lxt-vit"])
def test_every_spelling_of_attention_gives_the_same(how, preset):
    net = made(Tokens)
    spec = {"name": "attnlrp", "preset": preset}
    expected = xcli.explain(net, X, spec, target=TARGET, native=True).map
    found = xcli.explain(Written(net, how).double(), X, spec, target=TARGET, native=True).map
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["swin_t", "vit_b_32", "convnext_tiny", "mobilenet_v3_small"])
@pytest.mark.soak
def test_torchvisions_families_sum_to_the_score_but_for_what_constants_take(name):
    """With constants set to zero, nothing takes a share but what the propositions leave to the softmax's bias."""
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).double().eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if key.endswith("bias") or "position" in key or "pos_embed" in key or "class_token" in key:
                parameter.zero_()
            elif "head" in key:  # torchvision's vision transformers start with zeros there
                parameter.normal_(0, 0.1)
    x = images(1, 3, 224 if name == "vit_b_32" else 64, 224 if name == "vit_b_32" else 64)
    found = xcli.explain(net, x, {"name": "attnlrp", "attention": "cp"}, target=[3], native=True)
    if name != "mobilenet_v3_small":  # its hard sigmoid gives 1/2 for nothing
        assert_close(found.extras["conservation"], torch.ones(1).double(), rtol=1e-5, atol=0)
    assert found.map.isfinite().all()


class Normed(nn.Module):
    """A norm between two linear layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.norm, self.head = nn.Conv2d(3, 8, 2, bias=False), norm, nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        t = self.before(x)
        if isinstance(self.norm, nn.GroupNorm):
            return self.head(self.norm(t).mean((2, 3)))
        return self.head(self.norm(t.flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)], ids=lambda n: type(n).__name__
)
def test_a_norm_is_a_division_by_a_constant(norm):
    torch.manual_seed(0)
    net = Normed(norm).double()
    nn.init.normal_(norm.weight)
    x = images(2, 3, 4, 4)
    at = x.clone().requires_grad_()
    t = net.before(at)
    if isinstance(norm, nn.GroupNorm):
        grouped = t.unflatten(1, (2, 4))
        deviation = (grouped.var((2, 3, 4), correction=0, keepdim=True) + norm.eps).sqrt().detach()
        normed = ((grouped - grouped.mean((2, 3, 4), keepdim=True)) / deviation).flatten(1, 2)
        out = net.head((normed * norm.weight[:, None, None]).mean((2, 3)))
    else:
        t = t.flatten(2).transpose(1, 2)
        centred = t - t.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else t
        epsilon = torch.finfo(t.dtype).eps if norm.eps is None else norm.eps
        deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt().detach()
        out = net.head((centred / deviation * norm.weight).mean(1))
    assert_close(out, net(x), atol=1e-9, rtol=1e-9)
    (gradient,) = torch.autograd.grad(out[[0, 1], TARGET].sum(), at)
    found = xcli.explain(net, x, {"name": "attnlrp", "reduce": "none"}, target=TARGET, native=True)
    assert_close(found.map, (at * gradient).detach(), rtol=1e-9, atol=1e-11)
    assert_close(found.extras["conservation"], torch.ones(2).double(), rtol=1e-9, atol=0)


# --- rows, graphs, refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_several_rows_an_image(micro_batch):
    net = made(Tokens)
    method = AttnLRP()
    found = method.attribute(bound(net, X, [0, 2, 3], [0, 0, 1], micro_batch), X).map
    alone = [
        method.attribute(bound(net, X[i : i + 1], [t]), X[i : i + 1]).map for i, t in ((0, 0), (0, 2), (1, 3))
    ]
    assert_close(found, torch.cat(alone), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "method", [AttnLRP(), AttnLRP(attention="cp", gamma_linear=0.2, gamma_convolution=0.1)]
)
def test_maps_can_be_differentiated(method):
    net = made(Tokens).requires_grad_(False)
    score = replace(bound(net, X[:1], [1]), create_graph=True)

    def maps(x: Tensor) -> Tensor:
        return method.attribute(replace(score, memo={}, scales={}), x).map

    assert gradcheck(maps, X[:1].clone().requires_grad_(), eps=1e-6, atol=1e-4, fast_mode=True)


def test_what_has_no_rule_is_refused_by_name():
    class Cumulated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(2).mean((2, 3))

    with pytest.raises(
        ModelError, match="attnlrp: the network itself calls cumsum, .*; integrated-gradients"
    ):
        AttnLRP().looks_at(survey(Cumulated(), X))
    with pytest.raises(ModelError, match="attnlrp: module '0' calls local_response_norm"):
        AttnLRP().looks_at(
            survey(nn.Sequential(nn.LocalResponseNorm(2), nn.Flatten(), nn.Linear(768, 2)).double(), X)
        )
    with pytest.raises(ModelError, match="lrp: .*attnlrp has rules for attention"):
        LRP().looks_at(survey(made(Tokens), X))


def test_products_of_all_kinds_share():
    """Every operation of the toy is bilinear or passes relevance on: constants apart, the map is the score."""
    net = made(Residual)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    found = xcli.explain(net, images(2, 3, 8, 8), "attnlrp", target=[0, 1], native=True)
    assert_close(found.extras["conservation"], torch.ones(2).double(), rtol=1e-6, atol=0)


# --- half precision, statistics of the batch, and which softmax is held ------------------------------------------


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Tanh])
def test_activations_of_nothing_are_no_division_by_nothing_in_half_precision(act):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), act(), nn.Linear(6, 4)).eval()
    nn.init.zeros_(net[1].weight[0].data)
    nn.init.zeros_(net[1].bias[:1].data)
    x = images(2, 3, 4, 4).float()
    whole, half = (AttnLRP().attribute(bound(deepcopy(net).to(t), x.to(t), TARGET), x.to(t)) for t in HALVES)
    assert half.map.isfinite().all()
    assert_close(half.map.float(), whole.map, rtol=0, atol=0.02 * float(whole.map.abs().max()))


HALVES = (torch.float32, torch.float16)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.GroupNorm(2, 8)], ids=lambda n: type(n).__name__
)
def test_the_statistics_of_norms_do_not_overflow_in_half_precision(norm):
    torch.manual_seed(0)
    net, x = Normed(norm).eval(), 400 * images(2, 3, 4, 4).float()
    whole, half = (AttnLRP().attribute(bound(deepcopy(net).to(t), x.to(t), TARGET), x.to(t)) for t in HALVES)
    assert_close(half.map.float(), whole.map, rtol=0, atol=0.02 * float(whole.map.abs().max()))


@pytest.mark.parametrize("gamma", [0.0, 0.25])
@pytest.mark.parametrize("behind", [nn.Identity(), nn.ReLU()], ids=["a layer", "an activation"])
def test_a_batch_norm_by_statistics_of_the_batch_is_refused(gamma, behind):
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), behind, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    net = net.double().eval()
    with pytest.raises(ModelError, match="attnlrp: .*statistics of the batch"):
        AttnLRP(gamma_convolution=gamma).attribute(bound(net, X, TARGET), X)


class Ends(nn.Module):
    """A network whose logits, or channels, go through a softmax of their own."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "channels":
            return self.net(4 * (4 * x).softmax(1))
        return torch.log_softmax(self.net(x), -1) if self.how == "log_softmax" else self.net(x).softmax(-1)


@pytest.mark.parametrize("how", ["log_softmax", "softmax", "channels"])
def test_cp_holds_no_softmax_that_takes_no_means(how):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 4, stride=4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    net, small = net.double(), {"name": "attnlrp", "reduce": "none"}
    found, expected = (
        xcli.explain(Ends(net, how), X, {**small, "attention": of}, target=TARGET, native=True).map
        for of in ("cp", "attnlrp")
    )
    assert expected.abs().max() > 1e-6
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Turned(nn.Module):
    """Probabilities that take means in some way: cast, dropped out, turned, cut, or the other way round."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(3, 6, 4, stride=4, bias=False) for _ in range(3))
        self.head, self.how = nn.Linear(6, 4, bias=False), how

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        p = (q @ k.transpose(1, 2)).softmax(-1)
        match self.how:
            case "plain":
                mixed = p @ v
            case "dropout":
                mixed = torch.bmm(F.dropout(p, 0.1, False).clone(), v)
            case "cast":
                mixed = torch.matmul(p.to(v.dtype).type_as(v), v)
            case "heads":
                mixed = (p.view(len(x), 1, 16, 16) @ v[:, None])[:, 0]
            case "turned":
                mixed = torch.bmm(v.transpose(1, 2), p.permute(0, 2, 1)).transpose(1, 2)
            case "einsum":
                mixed = torch.einsum("nte,nst->nse", v, p)
            case _:
                mixed = p.detach() @ v
        return self.head(mixed.mean(1))


@pytest.mark.parametrize("how", ["plain", "dropout", "cast", "heads", "turned", "einsum"])
def test_cp_sends_relevance_through_values_alone(how):
    torch.manual_seed(0)
    net = Turned(how).double()
    held = deepcopy(net)
    held.how = "held"
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(held(x)[[0, 1], TARGET].sum(), x)
    spec = {"name": "attnlrp", "attention": "cp", "reduce": "none"}
    found = xcli.explain(net, X, spec, target=TARGET, native=True).map
    assert_close(found, (X * gradient).detach(), rtol=1e-9, atol=1e-12)


def test_maps_depend_on_probabilities_that_are_held():
    torch.manual_seed(0)
    net, x, w = Turned("plain").double().requires_grad_(False), X[:1], images(1, 16, 16, seed=4)

    def loss(x: Tensor, graph: bool = False) -> Tensor:
        spec = {"name": "attnlrp", "attention": "cp"}
        return (xcli.explain(net, x, spec, target=1, native=True, create_graph=graph).map * w).sum()

    asking = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(asking, True), asking)
    move = images(*x.shape, seed=5)
    expected = (loss(x + 1e-6 * move) - loss(x - 1e-6 * move)) / 2e-6
    assert_close((found * move).sum(), expected, rtol=1e-5, atol=0)


def test_a_norm_that_only_the_run_shows_is_refused_then():
    class Late(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x if x.sum() > 0 else F.local_response_norm(x, 2)).mean((2, 3))

    with pytest.raises(ModelError, match="attnlrp: there is no rule for local_response_norm; use integrated"):
        AttnLRP().attribute(bound(Late(), X.abs(), [1, 2]), -X.abs())
