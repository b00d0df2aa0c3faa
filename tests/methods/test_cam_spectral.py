"""CAMs from principal components: against grad-cam and scikit-learn, and the sign, the degenerate and the known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import cams
import pytest
import torch
from pytorch_grad_cam import EigenCAM as PeerEigenCAM
from pytorch_grad_cam import EigenGradCAM as PeerEigenGradCAM
from pytorch_grad_cam import kpca_cam
from pytorch_grad_cam.seg_eigen_cam import SegEigenCAM as PeerSegEigenCAM
from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection
from sklearn.decomposition import KernelPCA
from torch import nn
from torch.testing import assert_close
from toys import PooledLinear, bound, images, made

from xcli.execution import Execution
from xcli.forward import Forward
from xcli.methods.cam.gradient import HiResCAM
from xcli.methods.cam.spectra import first_component, first_kernel_component, kernel_of, projected, signed
from xcli.methods.cam.spectral import KPCACAM, EigenCAM, EigenGradCAM, SegEigenCAM
from xcli.registry import build

PEERS = {EigenCAM: PeerEigenCAM, EigenGradCAM: PeerEigenGradCAM, SegEigenCAM: PeerSegEigenCAM}
PeerKernel = kpca_cam.KPCA_CAM
KERNELS = {"sigmoid": "sigmoid", "rbf": "rbf", "polynomial": "poly", "cosine": "cosine", "linear": "linear"}
BOTH = pytest.mark.parametrize("channels", [3, 40])
"""More places than channels, and fewer: the two Gram matrices."""


def assert_same(ours, theirs):
    assert float(theirs.abs().max()) > 0
    assert_close(ours, theirs.to(ours), rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def turned(maps, like):
    """Maps, each with the sign in which it agrees with the other."""
    return maps * (maps * like).sum((1, 2), keepdim=True).sign()


def plain(channels, centre=True):
    """u_1 s_1 of a plain decomposition, turned so that its largest absolute value is positive."""
    rows = channels.flatten(2).transpose(1, 2)
    rows = rows - rows.mean(1, keepdim=True) if centre else rows
    left, power, _ = torch.linalg.svd(rows, full_matrices=False)
    maps = left[:, :, 0] * power[:, :1]
    maps = maps * maps.gather(1, maps.abs().argmax(1, keepdim=True)).sign()
    return maps.view(len(channels), *channels.shape[2:])


# ---- other packages ------------------------------------------------------------------------------------------------


@cache
def seen(name):
    """A case, its score with one recorded pass, and the activations and gradients that grad-cam hands its methods."""
    case = cams.case(name)
    net, layer = case.net, case.layer
    with PeerEigenGradCAM(net, case.modules(), case.reshape) as peer:
        peer(case.x, [cams.ClassifierOutputTarget(target) for target in cams.TARGETS])
        kept = peer.activations_and_grads
        acts, grads = kept.activations[0].detach().numpy(), kept.gradients[0].detach().numpy()
    forward = Forward(net, case.x, [layer], Execution(8), leaves=[layer])
    return case, replace(case.score, forward=forward), acts, grads


def peer_map(peer, name, **options):
    """What grad-cam makes of these, before it rectifies, scales and resizes."""
    case, _, acts, grads = seen(name)
    with peer(case.net, case.modules(), **options) as cam:
        return torch.from_numpy(cam.get_cam_image(None, None, None, acts, grads, False))


@pytest.mark.parametrize("name", cams.CASES)
def test_components_equal_grad_cam_up_to_the_sign(name):
    case, score, *_ = seen(name)
    for method, kind in PEERS.items():
        peer, ours = peer_map(kind, name), method(layer=case.layer).attribute(score, case.x)
        assert_same(ours, peer if method is SegEigenCAM else turned(peer, ours))
        assert (ours.amax((1, 2)) >= -ours.amin((1, 2))).all()
        rectified = build({"name": method.name, "preset": "grad-cam", "layer": case.layer})
        assert_close(rectified.attribute(score, case.x), ours.clamp_min(0))


@pytest.mark.parametrize("name", cams.CASES)
def test_kernel_components_equal_grad_cam(name):
    case, score, *_ = seen(name)
    assert_same(KPCACAM(layer=case.layer).attribute(score, case.x), peer_map(PeerKernel, name))
    for kernel, theirs in KERNELS.items():
        ours = KPCACAM(layer=case.layer, kernel=kernel).attribute(score, case.x)
        assert_same(ours, peer_map(PeerKernel, name, kernel=theirs))


def test_gamma_and_degree_are_those_of_scikit_learn():
    case, score, *_ = seen("shapes-cnn")
    (acts,) = score.activations(case.x, score.layers.find(case.layer))
    for kernel in ("sigmoid", "rbf", "polynomial"):
        ours = KPCACAM(layer=case.layer, kernel=kernel, gamma=0.2, degree=2)
        peer = KernelPCA(1, kernel=KERNELS[kernel], gamma=0.2, degree=2)
        found = ours.attribute(score, case.x)
        for own, image in zip(found, acts, strict=True):
            rows = image.flatten(1).T
            expected = peer.fit_transform((rows - rows.mean(0)).numpy())[:, 0]
            assert_close(own.flatten(), torch.from_numpy(expected), rtol=1e-6, atol=1e-9)


def test_two_layers_with_the_preset_of_grad_cam_fuse_as_it_does():
    case = cams.case("resnet18")
    layers = (case.layer, *case.others[:1])
    with PeerSegEigenCAM(case.net, case.modules(*layers)) as peer:
        expected = torch.from_numpy(peer(case.x, [cams.ClassifierOutputTarget(t) for t in cams.TARGETS]))
    ours = build({"name": "seg-eigencam", "preset": "grad-cam", "layer": list(layers)})
    found = ours.attribute(case.score, case.x)
    low, high = found.amin((1, 2), keepdim=True), found.amax((1, 2), keepdim=True)
    assert_close((found - low) / (high - low), expected.double(), rtol=0, atol=2e-6)  # it scales once more


# ---- the sign ------------------------------------------------------------------------------------------------------


def bright_square(seed, channels=6):
    """One image, a square in which every channel is higher than elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.rand(1, channels, 4, 5, generator=generator, dtype=torch.float64)
    acts[:, :, 1:3, 1:3] += 2
    return acts


@pytest.mark.parametrize("sign", ["peak", "channels"])
def test_the_order_of_the_channels_turns_maps_of_grad_cam_around_but_not_ours(sign):
    missed = []
    for seed in range(6):
        acts, generator = bright_square(seed), torch.Generator().manual_seed(0)
        ours = first_component(acts, sign)
        assert ours[0, 1:3, 1:3].min() > 1 > 0 > ours[0, 0].max()
        peers = []
        for _ in range(20):
            order = torch.randperm(6, generator=generator)
            assert_close(first_component(acts[:, order], sign), ours)
            peers.append(torch.from_numpy(get_2d_projection(acts[:, order].numpy())).double())
            assert_same(turned(peers[-1], ours), ours)
        missed.append(sum(float(peer.clamp_min(0)[0, 1:3, 1:3].max()) == 0 for peer in peers))
    assert any(0 < count < 20 for count in missed)  # rectified, its maps miss the square in some orders


@BOTH
def test_a_component_of_channels_and_of_their_negatives_is_the_same_by_the_peak_and_turned_by_the_channels(
    channels,
):
    acts = images(2, channels, 4, 3)
    assert_close(first_component(-acts), first_component(acts))
    assert_close(first_component(-acts, "channels"), -first_component(acts, "channels"))


@BOTH
def test_where_peak_and_trough_are_as_high_the_channels_decide(channels):
    """Two cells: the centred map is (a, -a) whatever the channels are."""
    acts = torch.tensor([[1.0, 3.0], [5.0, 2.0]], dtype=torch.float64)[:, None, None]  # (2, 1, 1, 2)
    acts = acts * (1 + torch.rand(1, channels, 1, 1, generator=torch.Generator().manual_seed(1)))
    for found in (
        first_component(acts),
        first_component(acts.flip(1)),
        first_kernel_component(acts, "rbf", None, 3),
    ):
        assert found[0, 0, 0] < 0 < found[0, 0, 1]
        assert found[1, 0, 1] < 0 < found[1, 0, 0]
    maps, sums = torch.tensor([[1.0, -1.0, 0.0]]), torch.tensor([[0.0, 1.0, 5.0]])
    assert_close(signed(maps, sums, "peak"), -maps)
    assert_close(signed(maps * torch.tensor([1.1, 1, 1]), sums, "peak"), maps * torch.tensor([1.1, 1, 1]))


# ---- answers known beforehand --------------------------------------------------------------------------------------


@BOTH
def test_the_component_of_a_rank_one_map_is_its_pattern(channels):
    """A_k = v_k * p has one component: the centred pattern times the length of v."""
    pattern, weights = images(1, 1, 4, 5), images(1, channels, 1, 1, seed=1)
    centred = pattern - pattern.mean()
    expected = (centred * weights.norm())[0]
    expected = expected if expected.max() >= -expected.min() else -expected
    assert_close(first_component(pattern * weights), expected)
    assert_close(first_component(-pattern * weights), expected)
    assert_close(first_component(pattern.abs() * weights, centre=False), pattern[0].abs() * weights.norm())


@BOTH
@pytest.mark.parametrize("centre", [True, False])
def test_a_component_equals_a_plain_singular_value_decomposition(channels, centre):
    acts = images(3, channels, 4, 3) + 0.5
    assert_close(first_component(acts, centre=centre), plain(acts, centre))


def test_uncentred_is_the_printed_formula_and_mostly_the_mean():
    case, score, *_ = seen("shapes-cnn")
    (acts,) = score.activations(case.x, score.layers.find(case.layer))
    printed = build({"name": "eigencam", "preset": "uncentred", "layer": case.layer})
    found = printed.attribute(score, case.x)
    assert_close(found, plain(acts, centre=False))
    assert (found >= 0).all()  # of activations that are not negative, nor is the first component
    assert (EigenCAM(layer=case.layer).attribute(score, case.x).amin((1, 2)) < 0).all()


@BOTH
def test_the_linear_kernel_gives_eigencam(channels):
    acts = images(3, channels, 4, 3) + 0.5
    for sign in ("peak", "channels"):
        assert_close(
            first_kernel_component(acts, "linear", None, 3, sign),
            first_component(acts, sign),
            atol=1e-9,
            rtol=0,
        )


@pytest.mark.parametrize(
    ("kernel", "literal"),
    {
        "linear": lambda x, y: x @ y,
        "polynomial": lambda x, y: (0.3 * (x @ y) + 1) ** 4,
        "sigmoid": lambda x, y: torch.tanh(0.3 * (x @ y) + 1),
        "rbf": lambda x, y: torch.exp(-0.3 * (x - y).square().sum()),
        "cosine": lambda x, y: x @ y / (x.norm() * y.norm()),
    }.items(),
)
def test_kernels_as_they_are_written(kernel, literal):
    rows = images(2, 5, 3)
    expected = torch.stack(
        [torch.stack([literal(x, y) for x in one for y in one]).view(5, 5) for one in rows]
    )
    assert_close(kernel_of(rows, kernel, 0.3, 4, torch.zeros(2, 1, dtype=torch.float64)), expected)


def test_of_a_kernel_that_is_not_positive_the_algebraically_largest_eigenvalue_is_taken():
    acts = images(1, 3, 4, 2) * 3
    rows = acts[0].flatten(1).T - acts[0].flatten(1).T.mean(0)
    middle = torch.eye(8, dtype=torch.float64) - 1 / 8
    powers, vectors = torch.linalg.eigh(middle @ (rows @ rows.T + 1).tanh() @ middle)
    assert -powers[0] > 0.05 * powers[-1] > 0  # not positive
    expected = (vectors[:, -1] * powers[-1].sqrt()).view(1, 4, 2)
    found = first_kernel_component(acts, "sigmoid", 1.0, 3)
    assert_close(found, turned(expected, found))
    below = -torch.diag(torch.tensor([0.0, 1.0, 9.0], dtype=torch.float64))[None]
    assert (projected(below) == 0).all()  # the largest is 0, not the longest
    assert (projected(below - torch.eye(3)) == 0).all()
    assert_close(projected(-below).abs(), torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64))


def test_eigengradcam_is_hirescam_with_eigen_smooth_and_not_rectified():
    net, x = made(PooledLinear), images(3, 3, 8, 6)
    score = bound(net, x, [0, 4, 1])
    smooth = HiResCAM(layer="relu", eigen_smooth=True, relu=False).attribute(score, x)
    assert_close(EigenGradCAM(layer="relu").attribute(score, x), smooth)


def test_gradients_weigh_the_channels_before_the_decomposition():
    """The gradient of a pooled linear net is its weight over the number of places, whatever the place."""
    net, x = made(PooledLinear), images(2, 3, 8, 6)
    score = bound(net, x, [0, 1, 2, 2], [0, 0, 0, 1])
    acts = net.relu(net.features(x)).detach()[[0, 0, 0, 1]]
    grads = net.head.weight.detach()[[0, 1, 2, 2], :, None, None] / (acts.shape[2] * acts.shape[3])
    assert_close(EigenGradCAM(layer="relu").attribute(score, x), plain(grads * acts))
    found = SegEigenCAM(layer="relu").attribute(score, x)
    assert_close(found, plain(grads.abs() * acts))
    assert (found[0] - found[1]).abs().max() > 1e-3
    without = [kind(layer="relu").attribute(score, x) for kind in (EigenCAM, KPCACAM)]
    for maps in without:  # no class in it
        assert_close(maps[[0, 0, 0, 3]], maps)


# ---- what can go wrong ---------------------------------------------------------------------------------------------

KINDS = {"svd": first_component, **{k: lambda a, k=k: first_kernel_component(a, k, None, 3) for k in KERNELS}}
EVERY = pytest.mark.parametrize("kind", KINDS)


@EVERY
@BOTH
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])
def test_a_layer_that_says_the_same_everywhere_has_a_map_of_zeros(channels, value, kind):
    """0.1 has no exact mean: what is left of it is rounding, and no map."""
    acts = torch.full((2, channels, 3, 5), value, dtype=torch.float64)
    acts[:, 1:] *= 3
    acts[1] = images(channels, 3, 5)
    found = KINDS[kind](acts)
    assert (found[0] == 0).all()
    assert found[1].abs().max() > 0.1


@pytest.mark.parametrize("side", range(2, 12))
def test_a_kernel_of_equal_places_has_a_map_of_zeros(side):
    """Of tanh(1), which has no exact mean either."""
    assert (first_kernel_component(torch.full((1, 4, side, 7), 3.0), "sigmoid", None, 3) == 0).all()


def test_a_place_that_is_at_the_mean_but_for_rounding_points_nowhere():
    acts = images(1, 3, 1, 9)
    acts = torch.cat([acts, -acts, torch.zeros_like(acts)], 2)
    found = first_kernel_component(acts + 0.1, "cosine", None, 3)
    assert_close(found, first_kernel_component(acts, "cosine", None, 3), rtol=0, atol=1e-9)
    assert found[0, 2].abs().max() < 1e-9 < 0.1 < found.abs().max()


@EVERY
@BOTH
def test_an_image_that_is_not_finite_leaves_the_others_alone(channels, kind):
    acts = images(4, channels, 4, 3)
    spoilt = acts.clone()
    spoilt[1, 0, 2, 1], spoilt[2, 1] = torch.nan, torch.inf
    found = KINDS[kind](spoilt)
    assert found[[1, 2]].isnan().all()
    assert_close(found[[0, 3]], KINDS[kind](acts[[0, 3]]))


@EVERY
def test_dead_channels_change_nothing(kind):
    acts = images(2, 4, 3, 3).abs()
    dead = torch.cat([acts, torch.zeros(2, 4, 3, 3)], 1)
    gamma = 0.25
    if kind == "svd":
        assert_close(first_component(dead), first_component(acts))
    else:
        assert_close(
            first_kernel_component(dead, kind, gamma, 3), first_kernel_component(acts, kind, gamma, 3)
        )


@pytest.mark.parametrize("shape", [(70, 5, 7, 6), (70, 60, 4, 3)])
def test_a_large_batch_equals_its_images(shape):
    acts = images(*shape)
    assert_close(first_component(acts), torch.cat([first_component(one[None]) for one in acts]))


@BOTH
def test_float32_loses_only_what_its_activations_have_lost(channels):
    """A second value close to the first, and a mean a thousand times the rest."""
    acts = (images(4, channels, 4, 3) + 1000).float()
    exact = plain(acts.double())
    found = first_component(acts)
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


# ---- derivatives ---------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("channels", [3, 14])
def test_the_derivative_of_a_component_is_that_of_finite_differences(channels, kind):
    acts = images(2, channels, 3, 4) + 0.5
    assert torch.autograd.gradcheck(KINDS[kind], (acts.requires_grad_(),), fast_mode=True)


def test_the_derivative_holds_where_a_negative_eigenvalue_is_longer():
    matrix = images(2, 5, 5) - 4 * torch.eye(5)
    powers = torch.linalg.eigvalsh(matrix + matrix.mT + 4 * torch.eye(5))
    assert (powers[:, -1] > 0.1).all()
    assert (-powers[:, 0] > 1.5 * powers[:, -1]).all()

    def squared(half):
        return projected(half + half.mT + 4 * torch.eye(5)).square()

    assert torch.autograd.gradcheck(squared, (matrix.requires_grad_(),))


@EVERY
@pytest.mark.parametrize("channels", [5, 20])
def test_dead_channels_and_constant_layers_have_finite_derivatives(channels, kind):
    """The other eigenvalues are equal there, and the derivative of a plain decomposition is NaN."""
    acts = images(3, channels, 3, 4).abs()
    acts[:2, 2:], acts[1] = 0, 0
    acts.requires_grad_()
    (grad,) = torch.autograd.grad(KINDS[kind](acts).pow(3).sum(), acts)
    assert grad.isfinite().all()
    assert (grad[[0, 2]].abs().amax((1, 2, 3)) > 0).all()
    assert (grad[1] == 0).all()


class Curved(nn.Module):
    """A layer, then a product of means: gradients there depend on the activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Softplus())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.layer(x).square().mean((2, 3)).tanh())


@pytest.mark.parametrize("kind", [EigenCAM, KPCACAM, EigenGradCAM, SegEigenCAM])
def test_maps_can_be_differentiated_by_the_images_through_activations_and_gradients(kind):
    net, x, step = made(Curved), images(2, 3, 6, 5), 1e-5 * images(2, 3, 6, 5, seed=1)
    score = replace(bound(net, x, [0, 2]), create_graph=True)
    pixels = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kind(layer="layer").attribute(score, pixels).square().sum(), pixels)
    up, down = (kind(layer="layer").attribute(score, x + way * step).square().sum() for way in (1, -1))
    assert_close((grad * step).sum(), (up - down).detach() / 2, rtol=1e-6, atol=0)
