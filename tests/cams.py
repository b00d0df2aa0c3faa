"""Networks of every kind with the layer that a CAM looks at, and the raw maps of two packages, for tests of CAMs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torchvision
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from toys import bound, images

from xcli.demo import nets
from xcli.score import Score

Reshape = Callable[[Tensor], Tensor]
TARGETS = [1, 7, 3]
"""The class explained of each of the three images."""


@dataclass(frozen=True, eq=False)
class Case:
    """A seeded network in float64, three images, a layer, and how a package is told to read it as a map."""

    name: str
    net: nn.Module
    x: Tensor
    layer: str
    reshape: Reshape | None = None
    others: tuple[str, ...] = ()
    """More layers of the same reshape, shallower, for fusion."""

    @property
    def score(self) -> Score:
        return bound(self.net, self.x, TARGETS)

    def modules(self, *layers: str) -> list[nn.Module]:
        return [self.net.get_submodule(layer) for layer in layers or (self.layer,)]


def tokens_to_map(grid: tuple[int, int]) -> Reshape:
    return lambda t: t[:, 1:].reshape(len(t), *grid, -1).permute(0, 3, 1, 2)


def nhwc_to_map(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


CASES = (
    "shapes-cnn",
    "shapes-vit",
    "resnet18",
    "vgg11_bn",
    "densenet121",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
)
CONVOLUTIONAL = ("shapes-cnn", "resnet18", "vgg11_bn", "densenet121", "convnext_tiny")
"""Those whose layer yields (N, K, h, w)."""


@cache
def case(name: str) -> Case:
    """The case ``name``; built once, so leave its network as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _case(name)


def _case(name: str) -> Case:
    def ready(net: nn.Module, size: tuple[int, int], *rest: Any) -> Case:
        return Case(name, net.double().eval(), images(3, 3, *size), *rest)

    match name:
        case "shapes-cnn":
            return ready(nets.load(name), (64, 48), "stages", None, ("stages.0",))
        case "shapes-vit":
            net = nets.load(name)
            last = len(net.blocks) - 1
            reshape = tokens_to_map(net.grid)
            return ready(net, (128, 128), f"blocks.{last}.norm1", reshape, (f"blocks.{last - 1}.norm1",))
        case "resnet18":
            return ready(torchvision.models.resnet18(), (64, 96), "layer4", None, ("layer3", "layer2"))
        case "vgg11_bn":  # no 7x7 pooling of a 2x2 map, and a small head
            net = torchvision.models.vgg11_bn(num_classes=10)
            net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 10)
            return ready(net, (64, 96), "features.27", None, ("features.20",))
        case "densenet121":
            return ready(
                torchvision.models.densenet121(),
                (64, 64),
                "features.denseblock4",
                None,
                ("features.denseblock3",),
            )
        case "convnext_tiny":
            return ready(torchvision.models.convnext_tiny(), (64, 64), "features.7", None, ("features.5",))
        case "vit_b_16":
            net = torchvision.models.vit_b_16(image_size=64)
            nn.init.normal_(net.heads.head.weight)
            layers = [f"encoder.layers.encoder_layer_{i}.ln_1" for i in (11, 10)]
            return ready(net, (64, 64), layers[0], tokens_to_map((4, 4)), (layers[1],))
        case "swin_t":
            return ready(
                torchvision.models.swin_t(),
                (64, 64),
                "features.7.1.norm2",
                nhwc_to_map,
                ("features.5.5.norm2",),
            )
    raise AssertionError(name)


NARROW = ("resnet", "vgg", "densenet", "convnext", "vit", "swin")


@cache
def narrow(name: str) -> Case:
    """The same families with at most 32 channels, for methods that run the network once a channel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _narrow(name)


def _narrow(name: str) -> Case:
    from torchvision.models import convnext, densenet, resnet, swin_transformer, vgg, vision_transformer

    def ready(net: nn.Module, layer: str, reshape: Reshape | None = None, size: int = 64) -> Case:
        return Case(name, net.double().eval(), images(3, 3, size, size), layer, reshape)

    match name:
        case "resnet":
            net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)
            net.inplanes = 64
            net.layer2 = net._make_layer(resnet.BasicBlock, 32, 1, stride=2)
            net.layer3, net.layer4, net.fc = (
                nn.Identity(),
                net._make_layer(resnet.BasicBlock, 24, 1),
                nn.Linear(24, 10),
            )
            return ready(net, "layer4")
        case "vgg":
            features = vgg.make_layers([8, "M", 16, "M", 32, "M"], batch_norm=True)
            net = vgg.VGG(features, num_classes=10)
            net.avgpool, net.classifier = (
                nn.AdaptiveAvgPool2d(2),
                nn.Sequential(nn.Linear(128, 20), nn.ReLU(True), nn.Linear(20, 10)),
            )
            return ready(net, "features.10")
        case "densenet":
            net = densenet.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=16, num_classes=10)
            return ready(net, "features.denseblock2")
        case "convnext":
            setting = [convnext.CNBlockConfig(16, 24, 1), convnext.CNBlockConfig(24, None, 1)]
            return ready(convnext.ConvNeXt(setting, layer_scale=1.0, num_classes=10), "features.3")
        case "vit":
            net = vision_transformer.VisionTransformer(
                image_size=64,
                patch_size=16,
                num_layers=2,
                num_heads=2,
                hidden_dim=24,
                mlp_dim=48,
                num_classes=10,
            )
            nn.init.normal_(net.heads.head.weight)
            return ready(net, "encoder.layers.encoder_layer_1.ln_1", tokens_to_map((4, 4)))
        case "swin":
            net = swin_transformer.SwinTransformer(
                patch_size=[4, 4],
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 4],
                window_size=[4, 4],
                num_classes=10,
            )
            return ready(net, "features.3.0.norm2", nhwc_to_map)
    raise AssertionError(name)


def grad_cam_map(
    peer: Any, case: Case, layers: Sequence[str] = (), eigen_smooth: bool = False, **options: Any
) -> Tensor:
    """grad-cam's raw map (N, h, w) of one layer, before it rectifies, scales and resizes."""
    targets = [ClassifierOutputTarget(target) for target in TARGETS]
    modules = case.modules(*layers)
    with peer(case.net, modules, reshape_transform=case.reshape, **options) as cam:
        cam(case.x, targets)
        kept = cam.activations_and_grads
        acts = kept.activations[0].detach().numpy()
        grads = kept.gradients[0].detach().numpy() if kept.gradients else None
        found = cam.get_cam_image(case.x, modules[0], targets, acts, grads, eigen_smooth)
    return torch.from_numpy(np.asarray(found))


def torch_cam_map(peer: Any, case: Case, **options: Any) -> Tensor:
    """torch-cam's map (N, h, w) of one layer, neither rectified nor normalised: of a map below zero nothing else is
    left to compare."""
    with peer(
        case.net, case.layer, input_shape=tuple(case.x.shape[1:]), reshape_transform=case.reshape, **options
    ) as cam:
        getattr(cam, "base_cam", cam)._relu = False
        outputs = case.net(case.x.clone().requires_grad_())
        (found,) = cam(TARGETS, outputs, normalized=False)
    return found.detach()
