"""Statistics over noisy copies: against captum and zennit with the same noise, closed forms, plain loops; rounds."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import cache

import pytest
import torch
from captum.attr import NoiseTunnel
from captum.attr import Saliency as PeerSaliency
from pixels import NETWORKS, TARGETS, case
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made
from zennit.attribution import SmoothGrad as PeerSmoothGrad

from xcli import draws
from xcli.errors import ConfigError, ModelError
from xcli.methods.gradient.base import rounds
from xcli.methods.gradient.noise import Running, SmoothGrad, SquareGrad, VarGrad
from xcli.methods.gradient.plain import Saliency
from xcli.registry import build

EXACT = {"rtol": 1e-9, "atol": 1e-13}
STATISTICS = (SmoothGrad, SquareGrad, VarGrad)
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
PEERS = {"smoothgrad": "smoothgrad", "squaregrad": "smoothgrad_sq", "vargrad": "vargrad"}


@cache
def setting(name):
    """The network, two images, their score and classes; for the large networks one image."""
    one, count = case(name), 1 if name in ("vgg11", "vit_b_16") else 2
    x, target = one.x[:count], TARGETS[:count]
    return one.net, x, bound(one.net, x, target), torch.tensor(target)


def with_copies(method, score, x) -> tuple[Tensor, Tensor]:
    """The raw map, and the copies (B, M, C, H, W) of which it is, as the network got them, all at once."""
    seen = []
    handle = score.module.register_forward_pre_hook(lambda _module, given: seen.append(given[0].detach()))
    try:
        found = method.attribute(score, x).map
    finally:
        handle.remove()
    (copies,) = seen
    return found, copies.clone().unflatten(0, (len(x), method.samples))


def gradients(net, copies, target, image) -> Tensor:
    """The gradient of each row at each of its image's copies, one by one: (N, M, C, H, W)."""

    def gradient(pixels, label):
        pixels = pixels.clone().requires_grad_()
        return torch.autograd.grad(net(pixels[None])[0, label], pixels)[0]

    rows = zip(target, image, strict=True)
    return torch.stack([torch.stack([gradient(one, t) for one in copies[i]]) for t, i in rows])


def statistic(name, grads) -> Tensor:
    """The definition, of samples along the second axis."""
    mean = sum(grads.unbind(1)) / grads.shape[1]
    match name:
        case "smoothgrad":
            return mean
        case "squaregrad":
            return sum(one**2 for one in grads.unbind(1)) / grads.shape[1]
        case "vargrad":
            return sum((one - mean) ** 2 for one in grads.unbind(1)) / grads.shape[1]
    raise AssertionError(name)


def assert_same(ours, expected, rtol=1e-9):
    scale = float(expected.abs().max())
    assert scale > 0
    assert_close(ours, expected, rtol=rtol, atol=rtol * 1e-2 * scale)


# ---- captum and zennit with the same noise, on six networks ----------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", PEERS)
def test_maps_by_the_preset_of_captum_are_those_of_captum_with_the_same_noise(name, network, monkeypatch):
    net, x, score, target = setting(network)
    method = build({"name": name, "preset": "captum", "samples": 2})
    assert (method.noise, method.relative) == (1.0, False)
    ours, copies = with_copies(method, score, x)
    noise = (copies - x[:, None]).flatten(0, 1)
    monkeypatch.setattr(torch, "normal", lambda mean, deviation: mean + deviation * noise)
    expected = NoiseTunnel(PeerSaliency(net)).attribute(
        x.clone(), nt_type=PEERS[name], nt_samples=2, stdevs=1.0, target=target, abs=False
    )
    assert_same(
        ours, expected, 1e-7 if name == "vargrad" else 1e-9
    )  # theirs is a small difference of squares
    assert noise.std() > 0.9


@pytest.mark.parametrize("network", NETWORKS)
def test_smoothgrad_is_that_of_zennit_less_the_sample_without_noise(network, monkeypatch):
    """zennit's last sample is the picture itself: of its M + 1 samples M are ours."""
    net, x, score, target = setting(network)
    method = build({"name": "smoothgrad", "preset": "zennit", "samples": 2})
    ours, copies = with_copies(method, score, x)
    share = 0.1 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))[:, None, None, None]
    noise = iter([(one - x) / share for one in copies.unbind(1)])
    monkeypatch.setattr(torch, "randn_like", lambda _pixels: next(noise))
    one_hot = nn.functional.one_hot(target, 10).to(x)
    _, theirs = PeerSmoothGrad(net, noise_level=0.1, n_iter=3)(x.clone(), one_hot)
    still = Saliency(absolute=False).attribute(score, x)
    assert_same(ours, (3 * theirs - still) / 2, 1e-8)
    assert (ours - theirs).abs().max() > 1e-2 * ours.abs().max()


def test_presets_have_the_numbers_of_the_packages():
    smooth = {one: build({"name": "smoothgrad", "preset": one}) for one in ("xplique", "captum", "zennit")}
    settings = {one: (m.samples, m.noise, m.relative, m.reduce) for one, m in smooth.items()}
    assert settings == {
        "xplique": (50, 0.2, False, "mean"),
        "captum": (5, 1.0, False, "none"),
        "zennit": (20, 0.1, True, "none"),
    }
    for name in ("squaregrad", "vargrad"):
        for one in ("xplique", "captum"):
            made_so = build({"name": name, "preset": one})
            assert (made_so.samples, made_so.noise, made_so.relative, made_so.reduce) == settings[one]
    paper = SmoothGrad()
    assert (paper.samples, paper.noise, paper.relative, paper.reduce) == (50, 0.15, True, "max")
    assert all(one.inner == Saliency(absolute=False) for one in (paper, *smooth.values()))
    assert [build({"name": "vargrad", "preset": one}).unbiased for one in ("captum", "xplique")] == [
        False,
        True,
    ]


@pytest.mark.parametrize("name", PEERS)
def test_by_the_preset_of_xplique_the_colours_of_its_formulas_are_averaged(name):
    """Its variance is the sum of squared differences over M - 1; noise is 0.2 in units of the input."""
    net, x = made(Residual), images(3, 3, 6, 5)
    method = build({"name": name, "preset": "xplique", "samples": 4})
    score = bound(net, x, **ROWS)
    _, copies = with_copies(method, score, x)
    grads = gradients(net, copies, **ROWS)
    expected = {
        "smoothgrad": grads.mean(1),
        "squaregrad": grads.square().mean(1),
        "vargrad": (grads - grads.mean(1, keepdim=True)).square().sum(1) / (4 - 1),
    }[name]
    assert_close(method.explain(score, x).map, expected.mean(1), **EXACT)
    many, copies = with_copies(replace(method, samples=20), score, x)
    assert abs((copies - x[:, None]).std() - 0.2) < 0.01
    assert many.shape == (4, 3, 6, 5)


# ---- what is known beforehand ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Scores x'Ax / 2 + b'x of the pixels x, with a symmetric matrix A and a vector b a class."""

    def __init__(self, labels: int = 2, size: int = 12) -> None:
        super().__init__()
        half = torch.randn(labels, size, size)
        self.matrix = nn.Parameter(half + half.mT)
        self.slope = nn.Parameter(torch.randn(labels, size))

    def forward(self, x):
        x = x.flatten(1)
        return torch.einsum("ni,lij,nj->nl", x, self.matrix, x) / 2 + x @ self.slope.T


class Linear(Quadratic):
    def forward(self, x):
        return x.flatten(1) @ self.slope.T


@pytest.mark.parametrize("noise", [0.0, 0.3, 50.0])
def test_of_a_linear_score_smoothgrad_is_its_weights_and_vargrad_is_zero(noise):
    net, x = made(Linear), images(3, 3, 2, 2)
    score = bound(net, x, [0, 1, 1], [0, 1, 2])
    weight = net.slope.detach()[[0, 1, 1]].view(3, 3, 2, 2)
    found = [method(noise=noise, samples=7).attribute(score, x).map for method in STATISTICS]
    for ours, expected in zip(found, (weight, weight**2, 0 * weight), strict=True):
        assert_close(ours, expected, **EXACT)
    assert_close(SmoothGrad(noise=noise, samples=7).explain(score, x).map, weight.abs().amax(1), **EXACT)


def test_of_a_quadratic_score_smoothgrad_is_the_gradient_at_the_mean_of_the_copies():
    net, x = made(Quadratic), images(2, 3, 2, 2)
    score = bound(net, x, [0, 1])
    found, copies = with_copies(SmoothGrad(samples=9), score, x)
    middle = copies.mean(1).flatten(1)
    expected = torch.einsum("nij,nj->ni", net.matrix, middle) + net.slope
    assert_close(found.flatten(1), expected.detach(), **EXACT)


def test_of_a_quadratic_score_the_limits_are_known_and_met_up_to_the_error_of_sampling():
    """Gradients are A (x + e) + b: their mean is the gradient, their variance s^2 times the squares of a row of A."""
    net, x, s, many = made(Quadratic), images(2, 3, 2, 2), 0.7, 4000
    score = bound(net, x, [0, 1], micro_batch=1000)
    options = {"noise": s, "relative": False, "samples": many}
    smooth, square, var = [one(**options).attribute(score, x).map.flatten(1) for one in STATISTICS]
    gradient = (torch.einsum("nij,nj->ni", net.matrix, x.flatten(1)) + net.slope).detach()
    variance = s**2 * net.matrix.detach().square().sum(2)
    assert ((smooth - gradient).abs() < 4.5 * (variance / many).sqrt()).all()
    assert ((var / variance - 1).abs() < 4.5 * (2 / many) ** 0.5).all()
    spread = (2 * variance**2 + 4 * gradient**2 * variance) / many  # of a squared normal number
    assert ((square - gradient**2 - variance).abs() < 4.5 * spread.sqrt()).all()
    errors = (smooth - gradient) / (variance / many).sqrt()
    assert errors.square().mean() > 0.2  # there is noise


@pytest.mark.parametrize(("kind", "shape"), [(Residual, (6, 5)), (Tokens, (16, 16))])
def test_squaregrad_is_smoothgrad_squared_plus_vargrad_as_they_share_their_noise(kind, shape):
    net, x = made(kind), images(3, 3, *shape)
    score = bound(net, x, **ROWS)
    smooth, square, var = [one(samples=5).attribute(score, x).map for one in STATISTICS]
    assert_close(square, smooth**2 + var, **EXACT)
    assert (var > 0).all()


@pytest.mark.parametrize("method", STATISTICS)
def test_without_noise_every_copy_is_the_picture(method):
    net, x = made(Residual), images(3, 3, 6, 5)
    score = bound(net, x, **ROWS)
    still = Saliency(absolute=False).attribute(score, x)
    expected = {"smoothgrad": still, "squaregrad": still**2, "vargrad": 0 * still}[method.name]
    for options in ({"noise": 0}, {"noise": 0, "relative": False}):
        assert_close(method(samples=3, **options).attribute(score, x).map, expected, **EXACT)


def test_of_one_sample_there_is_no_variance():
    net, x = made(Residual), images(3, 3, 6, 5)
    for unbiased in (False, True):
        found = VarGrad(samples=1, unbiased=unbiased).attribute(bound(net, x, **ROWS), x).map
        assert (found == 0).all()
    two = [VarGrad(samples=2, unbiased=one).attribute(bound(net, x, **ROWS), x).map for one in (False, True)]
    assert_close(two[1], 2 * two[0], **EXACT)


# ---- statistics as copies come ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STATISTICS)
def test_statistics_are_those_of_two_passes_whatever_the_micro_batch(method):
    net, x = made(Residual), images(3, 3, 6, 5)
    method = method(samples=7)
    _, copies = with_copies(method, bound(net, x, **ROWS), x)
    expected = statistic(method.name, gradients(net, copies, **ROWS))
    for micro_batch in (1, 3, 5, 64):
        score = bound(net, x, **ROWS, micro_batch=micro_batch)
        assert_close(method.attribute(score, x).map, expected, **EXACT)


@pytest.mark.parametrize("parts", [(1,) * 12, (12,), (5, 7), (1, 11), (11, 1), (4, 3, 5)])
def test_running_statistics_do_not_depend_on_how_samples_are_cut(parts):
    maps, running = images(2, 12, 3, 4), Running()
    for part in maps.split(parts, 1):
        running = running.with_samples(part)
    assert running.count == 12
    assert_close(running.mean, maps.mean(1), **EXACT)
    assert_close(running.squares / 12, maps.var(1, correction=0), **EXACT)


@pytest.mark.parametrize("micro_batch", [1, 4, 64])
def test_a_large_mean_does_not_drown_the_variance(micro_batch):
    """Of gradients about 1e8 that vary by 1, squares differ by less than their last digit."""
    net, x = made(Quadratic), images(1, 3, 2, 2)
    method, score = VarGrad(samples=12, relative=False), bound(net, x, [0], micro_batch=micro_batch)
    expected = method.attribute(score, x).map
    net.slope.data += 1e8
    assert_close(method.attribute(score, x).map, expected, rtol=1e-6, atol=0)
    grads = gradients(net, with_copies(method, bound(net, x, [0]), x)[1], [0], [0])
    naive = grads.square().mean(1) - grads.mean(1).square()
    assert (naive / expected - 1).abs().max() > 0.1


# ---- noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STATISTICS)
def test_noise_is_a_function_of_seed_key_and_sample(method):
    net, x = made(PooledLinear), images(3, 3, 7, 5)
    method, score = method(samples=3, noise=0.4, relative=False), replace(bound(net, x, **ROWS), seed=5)
    noise = with_copies(method, score, x)[1] - x[:, None]
    for image in range(3):
        seed = torch.tensor([draws.seed_of(5, f"image-{image}", "noise")])
        for sample in range(3):
            field = draws.normal(draws.sampled(seed, torch.tensor([sample])), (3, 7, 5))[0]
            assert_close(noise[image, sample], 0.4 * field.double(), rtol=1e-12, atol=1e-14)
    flat = noise.flatten(0, 1).flatten(1)
    assert (torch.cdist(flat, flat) + 2 * torch.eye(9) > 1).all()


def test_noise_does_not_depend_on_company_order_precision_or_how_many_copies_follow():
    net, x = made(PooledLinear), images(3, 3, 7, 5)
    method, score = SmoothGrad(samples=2), bound(net, x, **ROWS)
    _, copies = with_copies(method, score, x)
    assert torch.equal(with_copies(SmoothGrad(samples=9), score, x)[1][:, :2], copies)
    assert torch.equal(with_copies(replace(method, base="input-x-gradient"), score, x)[1], copies)
    alone = replace(bound(net, x[2:], [4]), keys=["image-2"])
    assert torch.equal(with_copies(method, alone, x[2:])[1][0], copies[2])
    turned = replace(bound(net, x.flip(0), [0, 1, 2]), keys=["image-2", "image-1", "image-0"])
    assert torch.equal(with_copies(method, turned, x.flip(0))[1].flip(0), copies)
    other_name = replace(alone, keys=["image-7"])
    assert (with_copies(method, other_name, x[2:])[1][0] - copies[2]).abs().max() > 0.1
    other_seed = replace(score, seed=1)
    assert (with_copies(method, other_seed, x)[1] - copies).abs().amax((2, 3, 4)).min() > 0.1
    single = made(PooledLinear).float()
    found, low = with_copies(method, bound(single, x.float(), **ROWS), x.float())
    assert found.dtype == low.dtype == torch.float32
    assert_close(low.double(), copies, rtol=1e-5, atol=1e-6)


def test_relative_noise_is_a_share_of_the_range_of_each_image():
    net, x = made(PooledLinear), images(3, 3, 7, 5)
    x[1] = 7 * x[1] + 100
    x[2] = 0.25
    score = bound(net, x, **ROWS)
    plain = with_copies(SmoothGrad(samples=2, noise=1.0, relative=False), score, x)[1] - x[:, None]
    share = with_copies(SmoothGrad(samples=2, noise=0.15), score, x)[1] - x[:, None]
    for image in range(3):
        span = float(x[image].max() - x[image].min())
        assert_close(share[image], plain[image] * 0.15 * span, rtol=1e-9, atol=1e-12)
    assert (share[2] == 0).all()  # a picture of one colour has no range
    assert share[1].std() > 4 * share[0].std()


@pytest.mark.parametrize("method", STATISTICS)
def test_rows_of_one_image_share_its_copies_and_their_passes(method):
    net, x, seen = made(Residual), images(4, 3, 6, 5), []
    target, image = [0, 1, 2, 3, 1], [0, 0, 0, 1, 3]
    score, method = bound(net, x, target, image), method(samples=4)
    handle = net.register_forward_pre_hook(lambda _module, given: seen.append(len(given[0])))
    found = method.attribute(score, x).map
    handle.remove()
    assert sum(seen) == 3 * 4  # nobody asks about the third image
    whole = bound(net, x, [0, 0, 0, 0])
    _, copies = with_copies(method, whole, x)
    assert_close(found, statistic(method.name, gradients(net, copies, target, image)), **EXACT)


# ---- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batch", "passes"), [(1, [1] * 15), (2, [2, 1] * 5), (7, [6, 6, 3]), (64, [15])]
)
def test_no_more_than_a_micro_batch_runs_at_once(micro_batch, passes):
    net, x, seen = made(Residual), images(3, 3, 6, 5), []
    score = bound(net, x, **ROWS, micro_batch=micro_batch)
    handle = net.register_forward_pre_hook(lambda _module, given: seen.append(len(given[0])))
    SmoothGrad(samples=5).attribute(score, x)
    handle.remove()
    assert seen == passes


@pytest.mark.parametrize("method", STATISTICS)
def test_what_is_held_does_not_grow_with_the_copies_that_have_been(method):
    net, x, held = made(Residual), images(2, 3, 13, 11), []
    score = bound(net, x, [0, 1, 2], [0, 0, 1], micro_batch=2)

    def count(_module, _given):
        held.append(
            sum(one.numel() for one in gc.get_objects() if type(one) is Tensor and one.shape[-2:] == (13, 11))
            if len(held) in (2, 9)
            else 0
        )

    handle = net.register_forward_pre_hook(count)
    method(samples=10).attribute(score, x)
    handle.remove()
    assert len(held) == 10
    assert held[9] == held[2] > 0


# ---- around other methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base",
    [
        "saliency",
        "input-x-gradient",
        {"name": "linear-approximation", "layer": "block"},
        {"name": "integrated-gradients", "steps": 4},
        "guided-backprop",
        "deconvnet",
    ],
)
@pytest.mark.parametrize("method", STATISTICS)
def test_the_statistic_is_of_the_maps_of_the_base_at_each_copy(method, base):
    net, x = made(Residual), images(3, 3, 6, 5)
    own = {"name": "saliency", "absolute": False} if base == "saliency" else base  # signed here, see below
    method, inner = method(samples=3, base=base), build(own)
    _, copies = with_copies(method.__class__(samples=3), bound(net, x, **ROWS), x)
    maps = []
    for sample in range(3):
        found = inner.attribute(bound(net, copies[:, sample], **ROWS), copies[:, sample])
        maps.append(found if isinstance(found, Tensor) else found.map)
    expected = statistic(method.name, torch.stack(maps, 1))
    for micro_batch in (2, 64):
        found = method.attribute(bound(net, x, **ROWS, micro_batch=micro_batch), x)
        assert_close(found.map, expected, **EXACT)


@pytest.mark.parametrize("method", STATISTICS)
def test_saliency_as_a_base_is_the_signed_gradient_unless_it_says_otherwise(method):
    net, x = made(Residual), images(3, 3, 6, 5)
    score = bound(net, x, **ROWS)
    signed = method(samples=3).attribute(score, x).map
    for base in ("saliency", {"name": "saliency", "preset": "zennit"}):
        assert torch.equal(method(samples=3, base=base).attribute(score, x).map, signed)
    sizes = method(samples=3, base={"name": "saliency", "absolute": True})
    assert sizes.inner.absolute
    if method is not SquareGrad:
        assert (sizes.attribute(score, x).map - signed).abs().max() > 1e-3 * signed.abs().max()


def test_what_the_base_draws_is_drawn_anew_for_each_copy():
    """With no noise, copies differ in the baseline of the base alone; a statistic within a statistic is independent."""
    net, x = made(Residual), images(2, 3, 6, 5)
    score = bound(net, x, [0, 1])
    base = {"name": "integrated-gradients", "steps": 2, "substrate": "gaussian"}
    assert (VarGrad(samples=4, noise=0, base=base).attribute(score, x).map > 0).any()
    keys = [score.renamed(torch.tensor([0, n])).keys[1] for n in range(3)]
    assert len({*keys, score.keys[1]}) == 4
    assert score.renamed(torch.tensor([5, 1])).keys[1] == keys[1]


@pytest.mark.parametrize("method", STATISTICS)
@pytest.mark.parametrize("micro_batch", [2, 64])
def test_extras_of_the_base_are_averaged(method, micro_batch):
    net, x = made(Residual), images(3, 3, 6, 5)
    base = {"name": "integrated-gradients", "steps": 2}
    method = method(samples=3, base=base)
    _, copies = with_copies(method.__class__(samples=3), bound(net, x, **ROWS), x)
    deltas = [
        build(base).attribute(bound(net, copies[:, sample], **ROWS), copies[:, sample]).extras["delta"]
        for sample in range(3)
    ]
    found = method.explain(bound(net, x, **ROWS, micro_batch=micro_batch), x).extras
    assert list(found) == ["delta"]
    assert_close(found["delta"], sum(deltas) / 3, **EXACT)
    assert found["delta"].abs().min() > 1e-8
    assert method.__class__(samples=2).attribute(bound(net, x, **ROWS), x).extras == {}


@pytest.mark.parametrize("method", STATISTICS)
def test_the_layer_of_the_base_is_looked_at_and_pinned_by_name(method):
    score = bound(made(PooledLinear), images(2, 3, 8, 6), [0, 1])
    default = score.layers.default
    auto = method(base={"name": "saliency", "layer": "auto"}, samples=2)
    assert auto.looks_at(score.layers) == (default,)
    pinned = auto.pinned(score.layers)
    assert pinned.base == {"name": "saliency", "preset": "paper", "absolute": False, "layer": default.name}
    assert pinned.pinned(score.layers) == pinned
    assert (pinned.samples, pinned.inner.layer) == (2, default.name)
    assert auto.pinned(score.layers, ["features"]).inner.layer == "features"
    assert method().looks_at(score.layers) == ()
    assert method().pinned(score.layers) == method()
    found = auto.attribute(score, images(2, 3, 8, 6)).map
    assert found.shape == (2, *default.shape)
    with pytest.raises(ModelError, match="there is no layer 'featurs'"):
        method(base={"name": "saliency", "layer": "featurs"}).looks_at(score.layers)
    with pytest.raises(ModelError, match="its rule is for ReLU, and this network has no ReLU"):
        method(base="guided-backprop").pinned(bound(made(Quadratic), images(1, 3, 2, 2), [0]).layers)


def test_needs_scale_and_folders_are_those_of_the_base(monkeypatch):
    for base in ("saliency", "guided-backprop", "integrated-gradients"):
        assert SmoothGrad(base=base).needs == build(base).needs - {"pixels"}  # never at the picture itself
    assert SmoothGrad().scale == "logit"
    monkeypatch.setattr(Saliency, "scale", "probability")
    assert SmoothGrad().scale == "probability"
    assert "rectifiers" in VarGrad(base="guided-backprop").needs
    expected = {"name": "expected-gradients", "baselines": "photos"}
    assert VarGrad(base=expected).draws_from() == build(expected).draws_from() == ("photos",)
    assert VarGrad().draws_from() == ()


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "samples: Input should be greater than or equal to 1"),
        ({"samples": 2.5}, "samples: Input should be a valid integer"),
        ({"noise": -0.1}, "noise: Input should be greater than or equal to 0"),
        ({"noise": float("inf")}, "noise: Input should be a finite number"),
        ({"noise": float("nan")}, "noise: Input should be a finite number"),
        (
            {"base": "smoothgrad"},
            "smoothgrad is itself such a statistic; one over the other needs the product",
        ),
        ({"base": {"name": "vargrad"}}, "vargrad is itself such a statistic"),
        ({"base": "gradcam"}, "base: expected one of .*saliency.*; got 'gradcam'"),
        ({"base": "salienzy"}, "got 'salienzy'; did you mean 'saliency'"),
        ({"base": {"name": "saliency", "reduce": "sum"}}, "saliency takes reduce from the method around it"),
        ({"base": {"name": "saliency", "absolut": True}}, "did you mean 'absolute'"),
        ({"base": {"name": "saliency", "layer": ""}}, "base: String should have at least 1 character"),
    ],
)
def test_options_out_of_range_and_nested_statistics_are_refused(name, wrong, message):
    with pytest.raises(ConfigError, match=f"^{name}: .*{message}"):
        build({"name": name, **wrong})


def test_only_vargrad_can_be_unbiased():
    with pytest.raises(ConfigError, match="smoothgrad has no option 'unbiased'"):
        build({"name": "smoothgrad", "unbiased": True})
    assert build({"name": "vargrad", "unbiased": True}).unbiased


# ---- numbers that are none -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", STATISTICS)
@pytest.mark.parametrize(
    "base", ["saliency", "input-x-gradient", {"name": "integrated-gradients", "steps": 2}]
)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_an_image_that_is_not_finite_leaves_the_others_alone(method, base, number):
    net, x = made(Residual), images(3, 3, 6, 5)
    method = method(samples=3, base=base)
    expected = method.attribute(bound(net, x, **ROWS, micro_batch=4), x)
    x[0, 1, 2, 3] = number
    found = method.attribute(bound(net, x, **ROWS, micro_batch=4), x)
    assert_close(found.map[2:], expected.map[2:], **EXACT)
    assert found.map[:2].isnan().flatten(1).any(1).all()
    for name, values in expected.extras.items():
        assert_close(found.extras[name][2:], values[2:], **EXACT)


# ---- maps that are differentiated ------------------------------------------------------------------------------


class Smooth(nn.Module):
    """Without a kink, so that differences meet derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 5, 3, stride=2, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(nn.functional.softplus(self.second(self.first(x).tanh())).square().mean((2, 3)))


@pytest.mark.parametrize("kind", [Smooth, Tokens])
@pytest.mark.parametrize("at", ["pixels", "weights"])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("method", STATISTICS)
def test_maps_can_be_differentiated_by_pixels_and_weights(method, relative, at, kind):
    """The deviation of relative noise depends on the picture too."""
    net, x = made(kind), images(2, 3, 16, 16).requires_grad_()
    score = replace(bound(net, x.detach(), [0, 1, 2], [0, 0, 1], micro_batch=4), create_graph=True)
    method, pattern = method(samples=3, relative=relative, reduce="sum"), images(3, 16, 16, seed=9)
    changed = [x] if at == "pixels" else [one for one in net.parameters() if one.ndim > 1]
    steps = [1e-6 * images(*one.shape, seed=5) for one in changed]
    size = method.explain(score, x).map.detach().abs().mean()

    def loss(by):
        for one, step in zip(changed, steps, strict=True):
            one.data += by * step
        found = method.explain(score, x).map
        for one, step in zip(changed, steps, strict=True):
            one.data -= by * step
        return (found * pattern).sum() / size * 1e6

    slopes = torch.autograd.grad(loss(0), changed, materialize_grads=True)
    expected = sum((slope * step).sum() for slope, step in zip(slopes, steps, strict=True))
    assert expected.abs() > 1e-3
    assert_close(expected, (loss(1) - loss(-1)).detach() / 2, rtol=1e-5, atol=0)


def test_without_the_wish_for_graphs_maps_carry_none():
    net, x = made(Residual), images(2, 3, 6, 5).requires_grad_()
    for method in STATISTICS:
        assert not method(samples=2).explain(bound(net, x, [0, 1]), x).map.requires_grad
    assert all(one.grad is None for one in [x, *net.parameters()])


# ---- rounds ----------------------------------------------------------------------------------------------------

SOME = {"target": [4, 2, 3, 1], "image": [0, 0, 2, 3]}
"""Rows about three of four images."""


def some(micro_batch):
    return bound(made(PooledLinear), images(4, 3, 4, 4), **SOME, micro_batch=micro_batch)


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 6, 7, 9, 64])
@pytest.mark.parametrize("total", [1, 2, 7])
def test_rounds_make_every_copy_of_every_image_with_a_row_once(micro_batch, total):
    parts = list(rounds(some(micro_batch), total))
    made_so = [(int(i), int(s)) for part in parts for i, s in zip(part.image, part.sample, strict=True)]
    assert sorted(made_so) == [(i, s) for i in (0, 2, 3) for s in range(total)]
    at_once = max(1, micro_batch // 3)
    assert [part.count for part in parts] == [
        min(at_once, total - first) for first in range(0, total, at_once)
    ]
    for part in parts:
        assert len(part.image) == 3 * part.count <= max(3, micro_batch)
        assert (part.image.diff() >= 0).all()
        first = int(part.sample[0])
        assert part.sample.tolist() == list(range(first, first + part.count)) * 3


@pytest.mark.parametrize("micro_batch", [1, 7, 64])
def test_what_rows_of_copies_get_comes_back_in_the_order_of_the_rows_and_of_the_samples(micro_batch):
    """Each row of a round is told apart by its class, its image's key and its sample."""
    score = some(micro_batch)
    known = []
    for part in rounds(score, 5):
        copy = part.score.image
        keys = torch.tensor([int(part.score.keys[i].removeprefix("image-")) for i in copy])
        assert torch.equal(keys, part.image[copy])
        labels = torch.stack([part.score.rows.target, keys, part.sample[copy]], 1)
        assert len(labels) == 4 * part.count
        known.append(part.of_rows(labels))
    expected = [[[t, i, s] for s in range(5)] for t, i in zip(*SOME.values(), strict=True)]
    assert torch.cat(known, 1).tolist() == expected


def test_rounds_become_smaller_when_the_micro_batch_does_and_there_are_none_without_rows():
    score, counts = some(12), []
    for part in rounds(score, 9):
        counts.append((int(part.sample[0]), part.count))
        score.execution.micro_batch = 6
    assert counts == [(0, 4), (4, 2), (6, 2), (8, 1)]
    nobody = bound(made(PooledLinear), images(2, 3, 4, 4), [], [])
    assert list(rounds(nobody, 5)) == []
    assert list(rounds(score, 0)) == []


def test_the_score_of_a_round_is_that_of_its_copies():
    score, pixels = some(64), images(4, 3, 4, 4)
    (part,) = rounds(score, 3)
    noisy = pixels[part.image] + 0.1 * part.sample.view(-1, 1, 1, 1)
    found = part.of_rows(part.score.clean(noisy))
    with torch.no_grad():
        expected = torch.stack([score.module(pixels + 0.1 * sample) for sample in range(3)], 2)
    assert_close(found, expected[SOME["image"], SOME["target"]], **EXACT)
