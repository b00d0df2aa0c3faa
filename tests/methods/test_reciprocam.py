"""Recipro-CAM against whole passes with a hook, a closed form, and its Gaussian written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toys import PooledLinear, Residual, Tokens, bound, images, made

from xcli.errors import ModelError
from xcli.methods.perturbation.reciprocam import ReciproCAM, cell_masks
from xcli.score import Score

IMAGE, TARGET = [0, 0, 1, 2], [2, 0, 1, 2]
WINDOW = [[1 / 16, 1 / 8, 1 / 16], [1 / 8, 1 / 4, 1 / 8], [1 / 16, 1 / 8, 1 / 16]]


def explained(net: nn.Module, x: Tensor, **options: object) -> Tensor:
    """In logits, raw on the layer's grid."""
    return ReciproCAM(**options).attribute(bound(net, x, TARGET, IMAGE), x)


def around(h: int, w: int, row: int, column: int, gaussian: bool) -> Tensor:
    """What one cell lets through, (h, w), by a loop."""
    mask = torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            down, right = i - row, j - column
            if gaussian and abs(down) <= 1 and abs(right) <= 1:
                mask[i, j] = WINDOW[down + 1][right + 1]
            elif not gaussian and (down, right) == (0, 0):
                mask[i, j] = 1
    return mask


def literal(net: nn.Module, x: Tensor, layer: str, h: int, w: int, gaussian: bool) -> Tensor:
    """One pass of the whole network for each row and cell."""
    found = torch.zeros(len(IMAGE), h, w, dtype=torch.float64)
    for number, (image, target) in enumerate(zip(IMAGE, TARGET, strict=True)):
        for row in range(h):
            for column in range(w):
                mask = around(h, w, row, column, gaussian)

                def hide(_module: nn.Module, _inputs: object, out: Tensor, mask: Tensor = mask) -> Tensor:
                    if out.ndim == 4:
                        return out * mask
                    return torch.cat([out[:, :1], out[:, 1:] * mask.flatten()[:, None]], 1)

                handle = net.get_submodule(layer).register_forward_hook(hide)
                with torch.no_grad():
                    found[number, row, column] = net(x[image][None])[0, target]
                handle.remove()
    return found


@pytest.mark.parametrize("gaussian", [False, True])
@pytest.mark.parametrize(
    ("kind", "layer", "size"), [(PooledLinear, "relu", (10, 14)), (Residual, "last", (6, 8))]
)
def test_a_map_is_the_score_of_each_cell_let_through_alone(kind, layer, size, gaussian):
    net, x = made(kind), images(3, 3, *size)
    found = explained(net, x, layer=layer, gaussian=gaussian, relu=False)
    assert_close(found, literal(net, x, layer, *found.shape[1:], gaussian), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gaussian", [None, False, True])
def test_on_tokens_the_class_token_stays_and_the_gaussian_is_the_default(gaussian):
    net, x = made(Tokens), images(3, 3, 16, 16)
    found = explained(net, x, layer="norm1", gaussian=gaussian, relu=False)
    assert_close(found, literal(net, x, "norm1", 4, 4, gaussian is not False), rtol=1e-10, atol=1e-12)


def test_with_pooling_and_one_linear_layer_it_is_the_class_activation_map_and_the_bias():
    net, x = made(PooledLinear), images(3, 3, 10, 14)
    found = explained(net, x, layer="relu", relu=False)
    with torch.no_grad():
        acts = net.relu(net.features(x))[IMAGE]
        cam = torch.einsum("nk,nkhw->nhw", net.head.weight[TARGET], acts) / acts[0, 0].numel()
    assert_close(found, cam + net.head.bias.detach()[TARGET][:, None, None], rtol=1e-10, atol=1e-12)


def test_the_gaussian_lets_a_quarter_of_the_cell_through_and_all_cells_together_everything():
    masks = cell_masks(5, 4, gaussian=True)
    assert masks[2 * 4 + 1, 0, 2, 1] == 0.25
    assert_close(masks[2 * 4 + 1, 0, 1:4, 0:3], torch.tensor(WINDOW))
    assert_close(masks.sum(0)[0, 1:-1, 1:-1], torch.ones(3, 2))
    assert torch.equal(cell_masks(2, 3, gaussian=False), torch.eye(6).view(6, 1, 2, 3))


def test_it_explains_the_probability_unless_told_otherwise():
    assert ReciproCAM.scale == "probability"
    net, x = made(PooledLinear), images(3, 3, 10, 14)
    score = bound(net, x, TARGET, IMAGE).scaled("probability")
    found = ReciproCAM(layer="relu").attribute(score, x)
    assert bool((found > 0).all())
    assert bool((found < 1).all())


def test_what_comes_before_the_layer_runs_once_an_image():
    net, x = made(PooledLinear), images(3, 3, 10, 14)
    seen: list[int] = []
    score = bound(net, x, TARGET, IMAGE)
    ReciproCAM(layer="relu").attribute(score, x)  # what the network has taught once is kept
    net.features[0].register_forward_hook(lambda _module, inputs, _out: seen.append(len(inputs[0])))
    ReciproCAM(layer="relu").attribute(score, x)
    assert sum(seen) == 3


def test_its_maps_cannot_be_trained_through():
    net, x = made(PooledLinear), images(3, 3, 10, 14)
    score = bound(net, x, TARGET, IMAGE)
    kept = Score(net, score.rows, score.layers, keys=score.keys, create_graph=True)
    with pytest.raises(ModelError, match="cannot be trained through"):
        ReciproCAM(layer="relu").attribute(kept, x)
