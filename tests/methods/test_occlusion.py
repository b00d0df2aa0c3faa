"""Occlusion and feature ablation against captum, literal loops, and linear models whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation as CaptumAblation
from captum.attr import Occlusion as Captum
from PIL import Image
from skimage.segmentation import slic
from torch.testing import assert_close
from toys import Residual, Tokens, Weighted, bound, images, made

import xcli
from xcli.baselines import Removal
from xcli.errors import ConfigError
from xcli.methods.perturbation.occlusion import FeatureAblation, Occlusion
from xcli.registry import build

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROWS = {"target": [1, 3, 0, 2], "image": [0, 0, 1, 2]}
"""Rows about images 0, 0, 1 and 2."""
SUBSTRATES = ("constant", "mean", "minimum", "blur", "uniform", "gaussian", "negative", "imputation")


def three(height=9, width=7):
    return images(3, 3, height, width)


def starts(length, side, stride, border):
    """Where patches begin along one side."""
    found = [0]
    while found[-1] + side < length:
        found.append(found[-1] + stride)
    return found if border == "clipped" else [at for at in found if at + side <= length]


def literal(net, x, target, image, side, stride, removed, overlaps="mean", border="clipped"):
    """Patch by patch, one pass each; ``removed(x, mask, image)`` takes pixels out of one picture (1, C, H, W)."""
    maps = []
    for own, index in zip(target, image):
        one = x[index : index + 1]
        total, count = torch.zeros(2, *x.shape[2:], dtype=x.dtype)
        for top in starts(x.shape[2], side, stride, border):
            for left in starts(x.shape[3], side, stride, border):
                mask = torch.zeros(x.shape[2:], dtype=torch.bool)
                mask[top : top + side, left : left + side] = True
                with torch.no_grad():
                    lost = net(one)[0, own] - net(removed(one, mask, index))[0, own]
                total += mask * lost
                count += mask
        maps.append(total / count.clamp_min(1) if overlaps == "mean" else total)
    return torch.stack(maps)


def to(value):
    return lambda one, mask, _image: torch.where(mask, value, one)


def captum_map(net, x, target, patch, stride, value=0.0):
    """In float64 to the end: captum itself divides by the overlaps in float32."""
    shape, strides = (3, patch, patch), (3, stride, stride)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        found = Captum(net).attribute(x, shape, strides, baselines=value, target=target)
    assert torch.equal(found, found[:, :1].expand(x.shape))
    return found[:, 0]


def sized(net, method, score, x):
    """What the method gives, and how many inputs the network met."""
    seen = []
    handle = net.register_forward_pre_hook(lambda _net, given: seen.append(len(given[0])))
    found = method.attribute(score, x)
    handle.remove()
    return found, sum(seen)


# ---- occlusion: other implementations -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, -1.3])
@pytest.mark.parametrize(
    ("size", "patch", "stride"),
    [
        ((9, 7), 3, 3),  # the last column is clipped
        ((9, 7), 3, 2),
        ((8, 11), 4, 3),
        ((10, 6), 5, 1),
        ((7, 9), 2, 2),
        ((6, 8), 1, 1),
        ((5, 12), 5, 5),
    ],
)
def test_maps_equal_captum_at_every_patch_and_stride(size, patch, stride, value):
    net, x = made(Residual), three(*size)
    found = Occlusion(patch=patch, stride=stride, value=value).attribute(bound(net, x, [1, 0, 3]), x).map
    assert_close(found, captum_map(net, x, [1, 0, 3], patch, stride, value), **EXACT)
    assert found.abs().max() > 1e-3


def test_the_captum_preset_on_a_logit_is_captum():
    net, x = made(Tokens), three(16, 16)
    method = build({"name": "occlusion", "preset": "captum"})
    score = bound(net, x, [1, 0, 3])
    assert_close(method.attribute(score, x).map, captum_map(net, x, [1, 0, 3], 3, 3), **EXACT)
    assert method.scale == "probability"
    softmax = torch.nn.Sequential(net, torch.nn.Softmax(1))
    expected = captum_map(softmax, x, [1, 0, 3], 3, 3)
    assert_close(method.attribute(score.scaled("probability"), x).map, expected, **EXACT)


@pytest.mark.parametrize("size", [(9, 9), (10, 8), (11, 7)])
@pytest.mark.parametrize(("patch", "stride"), [(3, 3), (4, 2), (2, 3)])
def test_the_xplique_preset_sums_over_whole_patches_only(size, patch, stride):
    """By the formulas of its anchors."""
    net, x, margin = made(Residual), three(*size), torch.ones(size, dtype=torch.bool)
    method = build({"name": "occlusion", "preset": "xplique", "patch": patch, "stride": stride})
    found, total = method.attribute(bound(net, x, **ROWS), x), torch.zeros(4, *size, dtype=torch.float64)
    anchors = [[step * stride for step in range(math.ceil((length - patch + 1) / stride))] for length in size]
    for top in anchors[0]:
        for left in anchors[1]:
            mask = torch.zeros(size, dtype=torch.float64)
            mask[top : top + patch, left : left + patch] = 1
            margin &= mask == 0
            with torch.no_grad():
                lost = (net(x) - net(x * (1 - mask)))[ROWS["image"], ROWS["target"]]
            total += lost[:, None, None] * mask
    assert_close(found.map, total, **EXACT)
    assert (found.map[:, margin] == 0).all()
    assert found.extras["forwards"].tolist() == [len(anchors[0]) * len(anchors[1])] * 4
    assert build({"name": "occlusion", "preset": "xplique"}) == Occlusion(
        patch=3, stride=3, overlaps="sum", border="inside"
    )


# ---- occlusion: the formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("border", ["clipped", "inside"])
@pytest.mark.parametrize("overlaps", ["mean", "sum"])
@pytest.mark.parametrize(("patch", "stride"), [(4, 3), (2, 3), (3, 1)])
def test_all_rows_get_the_loss_of_every_patch_on_its_pixels(patch, stride, overlaps, border):
    net, x = made(Residual), three()
    method = Occlusion(patch=patch, stride=stride, overlaps=overlaps, border=border)
    found = method.attribute(bound(net, x, **ROWS), x).map
    given = {"overlaps": overlaps, "border": border}
    assert_close(found, literal(net, x, **ROWS, side=patch, stride=stride, removed=to(0.0), **given), **EXACT)


@pytest.mark.parametrize("substrate", SUBSTRATES)
def test_what_covered_pixels_show_is_the_substrate(substrate):
    net, x = made(Residual), three()
    score, given = (
        bound(net, x, **ROWS),
        {"substrate": substrate, "value": 0.7, "kernel": 5, "sigma": 1.5},
    )
    removal = Removal(**given)

    def removed(one, mask, image):
        if substrate == "mean":
            return torch.where(mask, one.mean((2, 3), keepdim=True), one)
        if substrate == "minimum":
            return torch.where(mask, one.min(), one)
        if substrate == "negative":
            return torch.where(mask, -one, one)
        if substrate == "imputation":  # which depends on what is removed with it
            return removal.remover(score, x)(torch.tensor([image]), mask[None])
        return torch.where(mask, removal.whole(score, x)[image], one)

    found = Occlusion(patch=3, stride=2, **given).attribute(score, x).map
    expected = literal(net, x, **ROWS, side=3, stride=2, removed=removed)
    assert_close(found, expected, rtol=1e-9, atol=1e-11)
    plain = Occlusion(patch=3, stride=2).attribute(score, x).map
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize("size", [(8, 12), (9, 7)])
@pytest.mark.parametrize("value", [0.0, 0.4])
def test_a_linear_model_gets_the_exact_sum_of_its_terms_patch_by_patch(size, value):
    x, weight = three(*size), images(2, *size, seed=5)
    score = bound(Weighted(weight), x, [0, 1, 1, 0], [0, 0, 1, 2])
    found = Occlusion(patch=4, stride=4, value=value).attribute(score, x).map
    terms = (weight[[0, 1, 1, 0]][:, None] * (x[[0, 0, 1, 2]] - value)).sum(1)
    for top in range(0, size[0], 4):
        for left in range(0, size[1], 4):
            patch = (slice(None), slice(top, top + 4), slice(left, left + 4))
            assert_close(
                found[patch], terms[patch].sum((1, 2))[:, None, None].expand(found[patch].shape), **EXACT
            )


def test_a_single_pixel_that_counts_is_found():
    weight = torch.zeros(1, 12, 10, dtype=torch.float64)
    weight[0, 7, 3] = 1
    x = torch.ones(1, 3, 12, 10, dtype=torch.float64)
    found = Occlusion(patch=3, stride=1).attribute(bound(Weighted(weight), x, [0]), x).map[0]
    assert (found > 0).nonzero().T.aminmax(dim=1).min.tolist() == [5, 1]
    assert (found > 0).nonzero().T.aminmax(dim=1).max.tolist() == [9, 5]
    assert (found == found.max()).nonzero().tolist() == [[7, 3]]


# ---- occlusion: sizes and passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options", "patch", "stride"),
    [
        ((28, 21), {}, 3, 1),
        ((32, 40), {}, 5, 2),  # 32 / 7 is 4.57
        ((30, 45), {}, 4, 2),
        ((4, 5), {}, 1, 1),
        ((3, 3), {}, 1, 1),
        ((28, 28), {"patch": 9}, 9, 4),
        ((28, 28), {"stride": 3}, 4, 3),
    ],
)
def test_sizes_left_open_are_a_seventh_of_the_shorter_side_and_half_of_that(size, options, patch, stride):
    net, x = Weighted(images(1, *size, seed=2)), images(1, 1, *size)
    score = bound(net, x, [0])
    found, wanted = (
        Occlusion(**one).attribute(score, x) for one in (options, {"patch": patch, "stride": stride})
    )
    assert torch.equal(found.map, wanted.map)
    assert torch.equal(found.extras["forwards"], wanted.extras["forwards"])


def test_the_passes_are_the_patches_and_one_of_each_image():
    net, x = made(Residual), three(9, 7)
    score = bound(net, x, **ROWS)
    for options, patches in (
        ({"patch": 3, "stride": 2}, 4 * 3),
        ({"patch": 3, "stride": 3, "border": "inside"}, 3 * 2),
        ({"patch": 4, "stride": 3}, 3 * 2),
        ({"patch": 20, "stride": 3}, 1),
    ):
        found, inputs = sized(net, Occlusion(**options), bound(net, x, **ROWS), x)
        assert found.extras["forwards"].tolist() == [patches] * 4
        assert inputs == 3 * patches + 3
    with torch.no_grad():
        whole = (net(x) - net(torch.zeros_like(x)))[ROWS["image"], ROWS["target"]]
    assert_close(found.map, whole[:, None, None].expand(4, 9, 7), **EXACT)
    size = 13 * 13  # as `cost` says
    down = len(starts(224, 32, 16, "clipped"))
    assert down**2 == size == Occlusion().covers(224, 32, 16).shape[0] ** 2
    assert f"{size} at 224 x 224" in Occlusion.cost
    assert score.image.tolist() == ROWS["image"]


def test_more_rows_of_an_image_need_no_further_pass():
    net, x = made(Residual), three()
    one = sized(net, Occlusion(patch=3), bound(net, x, [0, 1, 2]), x)[1]
    all_rows = bound(net, x, list(range(4)) * 3, [0] * 4 + [1] * 4 + [2] * 4)
    assert sized(net, Occlusion(patch=3), all_rows, x)[1] == one


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patch": 0}, "patch: Input should be greater than or equal to 1"),
        ({"stride": 0}, "stride: Input should be greater than or equal to 1"),
        ({"patch": 2.5}, "patch: Input should be a valid integer"),
        ({"overlaps": "max"}, "overlaps: Input should be 'mean' or 'sum'"),
        ({"border": "padded"}, "border: Input should be 'clipped' or 'inside'"),
        ({"substrate": "black"}, "substrate: Input should be"),
        ({"size": 3}, "occlusion has no option 'size'"),
    ],
)
def test_options_out_of_range_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build({"name": "occlusion", **wrong})


# ---- feature ablation ---------------------------------------------------------------------------------------------


def ablated_by_captum(net, x, target, labels, value=0.0):
    """Image by image, as their features differ in number."""
    return torch.cat(
        [
            CaptumAblation(net).attribute(
                x[i : i + 1], target=target[i], feature_mask=labels[i][None, None], baselines=value
            )[:, 0]
            for i in range(len(x))
        ]
    )


def blocks(height, width, cells):
    """The cell of each pixel, written as a loop."""
    down, right = ([int((i + 0.5) * cells / side) for i in range(side)] for side in (height, width))
    rows = [[r * cells + c for c in right] for r in down]
    return torch.tensor(rows)


def superpixels(x):
    found = []
    for one in x:
        shown = ((one - one.min()) / (one.max() - one.min())).permute(1, 2, 0).numpy()
        found.append(torch.from_numpy(slic(shown, n_segments=9, compactness=10.0, start_label=0)))
    return torch.stack(found)


def smooth():
    """Pictures that superpixels can be made of, a different number of each."""
    return torch.nn.functional.interpolate(images(3, 3, 5, 4), (20, 18), mode="bicubic")


@pytest.mark.parametrize("value", [0.0, 0.8])
@pytest.mark.parametrize("kind", ["grid", "slic", "file", "given one", "given all"])
def test_maps_equal_captum_with_the_same_features(kind, value, tmp_path):
    net, x = made(Residual), smooth()
    score = bound(net, x, [1, 0, 3])
    spots = torch.randint(0, 6, (3, 20, 18), generator=torch.Generator().manual_seed(3))
    match kind:
        case "grid":
            spec, labels = "grid:4", blocks(20, 18, 4).expand(3, -1, -1)
        case "slic":
            spec, labels = "slic:9", superpixels(x)
            assert len({int(one.max()) for one in labels}) > 1
        case "file":
            Image.fromarray(spots[0].numpy().astype(np.uint8) * 40).save(tmp_path / "parts.png")
            spec, labels = str(tmp_path / "parts.png"), spots[:1].expand(3, -1, -1)
        case "given one":
            spec, labels = "given:parts", spots[:1].expand(3, -1, -1)
            score = replace(score, pictures={"parts": 7 * spots[:1, None]})
        case _:
            spec, labels = "given:parts", spots
            score = replace(score, pictures={"parts": spots[:, None]})
    method = build({"name": "feature-ablation", "segments": spec, "value": value})
    found = method.attribute(score, x)
    assert_close(found.map, ablated_by_captum(net, x, [1, 0, 3], labels, value), **EXACT)
    assert found.extras["forwards"].tolist() == [len(one.unique()) for one in labels]


def test_all_rows_have_the_features_of_their_image_and_a_feature_runs_once():
    net, x = made(Residual), smooth()
    labels = superpixels(x)
    found, inputs = sized(net, FeatureAblation(segments="slic:9"), bound(net, x, **ROWS), x)
    counts = [len(labels[image].unique()) for image in ROWS["image"]]
    assert found.extras["forwards"].tolist() == counts
    assert inputs == sum(counts[1:]) + 3
    for target in range(4):
        rows = [row for row, own in enumerate(ROWS["target"]) if own == target]
        expected = ablated_by_captum(net, x, [target] * 3, labels)
        assert_close(found.map[rows], expected[[ROWS["image"][row] for row in rows]], **EXACT)


@pytest.mark.parametrize("substrate", SUBSTRATES[1:])
def test_what_stands_for_a_feature_is_the_substrate(substrate):
    net, x = made(Residual), three()
    score, removal = bound(net, x, **ROWS), Removal(substrate=substrate)
    found = FeatureAblation(segments="grid:3", substrate=substrate).attribute(score, x).map
    labels, remover = blocks(9, 7, 3), removal.remover(score, x)
    for feature in range(9):
        mask = labels == feature
        with torch.no_grad():
            lost = net(x) - net(remover(torch.arange(3), mask.expand(3, -1, -1)))
        expected = lost[ROWS["image"], ROWS["target"]][:, None].expand(4, int(mask.sum()))
        assert_close(found[:, mask], expected, rtol=1e-9, atol=1e-11)


def test_a_linear_model_gets_the_sum_of_its_terms_feature_by_feature():
    x, weight = three(), images(1, 9, 7, seed=5)
    labels = torch.randint(0, 5, (3, 1, 9, 7), generator=torch.Generator().manual_seed(3))
    score = replace(bound(Weighted(weight), x, [0, 0, 0]), pictures={"parts": labels})
    found = FeatureAblation(segments="given:parts", value=0.3).attribute(score, x).map
    terms = (weight * (x - 0.3)).sum(1)
    for image in range(3):
        for feature in range(5):
            mask = labels[image, 0] == feature
            assert_close(
                found[image][mask], terms[image][mask].sum().expand(int(mask.sum())), rtol=1e-9, atol=1e-11
            )


def test_a_grid_is_occlusion_by_disjoint_patches():
    net, x = made(Residual), three(12, 12)
    score = bound(net, x, **ROWS)
    found = FeatureAblation(segments="grid:3").attribute(score, x).map
    assert_close(found, Occlusion(patch=4, stride=4).attribute(score, x).map, **EXACT)


def test_label_maps_are_handed_over_in_python():
    net, x = made(Residual), three()
    labels = torch.randint(0, 5, (3, 1, 9, 7), generator=torch.Generator().manual_seed(3))
    spec = {"name": "feature-ablation", "segments": "given:parts"}
    found = xcli.explain(net, x, spec, target=1, pictures={"parts": labels})
    assert_close(found.map, ablated_by_captum(net, x, [1, 1, 1], labels[:, 0]), **EXACT)
    with pytest.raises(ConfigError, match=r"pass pictures=\{'parts': \.\.\.\}"):
        xcli.explain(net, x, spec, target=1)
