"""Networks of every kind for tests of pixel methods, and copies of them that captum and zennit can work on."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cache

import torch
import torchvision
from torch import Tensor, nn
from toys import bound, images

from xcli.demo import nets
from xcli.score import Score

NETWORKS = ("shapes-cnn", "vgg11", "resnet18", "densenet121", "mobilenet_v3_small", "vit_b_16")
RECTIFIED = NETWORKS[:-1]
"""Those with ReLU."""
SIDE = 32
"""Of the images of torchvision's networks: small, as many tests run these in float64."""
TARGETS = [1, 7, 3]
"""The class explained of each of the three images."""


@dataclass(frozen=True, eq=False)
class Case:
    """A seeded network in float64 and eval mode, its weights frozen, and three images (3, 3, H, W)."""

    name: str
    net: nn.Module
    x: Tensor

    @property
    def score(self) -> Score:
        return bound(self.net, self.x, TARGETS)

    @property
    def peer(self) -> nn.Module:
        """A copy in which no activation module is shared or works in place, for packages that need it."""
        return unshared(deepcopy(self.net))


@cache
def case(name: str) -> Case:
    """The case ``name``; built once, so leave its network as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = _network(name).double().eval().requires_grad_(False)
        for part in net.modules():  # batch norms of a network that has seen data
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.bias.data.normal_(0, 0.1)
    return Case(name, net, images(3, 3, *((64, 48) if name == "shapes-cnn" else (SIDE, SIDE))))


def _network(name: str) -> nn.Module:
    match name:
        case "shapes-cnn":
            return nets.load(name)
        case "vgg11":  # no 7x7 pooling of a single cell, and a small head
            net = torchvision.models.vgg11(num_classes=10)
            net.avgpool = nn.AdaptiveAvgPool2d(1)
            net.classifier = nn.Sequential(nn.Linear(512, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))
            return net
        case "vit_b_16":
            net = torchvision.models.vit_b_16(image_size=SIDE, num_classes=10)
            nn.init.normal_(net.heads.head.weight)
            return net
        case _:
            return torchvision.models.get_model(name, num_classes=10)


def unshared(net: nn.Module) -> nn.Module:
    """``net`` changed so that each call of a ReLU is a module of its own, and none works in place.

    torchvision's residual blocks call one ReLU twice; DenseNet calls the last one as a function.
    """
    for part in list(net.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.ReLU())
            elif hasattr(child, "inplace"):
                child.inplace = False
    for part in net.modules():
        if isinstance(part, torchvision.models.resnet.BasicBlock):
            part.second = nn.ReLU()
            part.forward = _basic_block.__get__(part)
        if isinstance(part, torchvision.models.DenseNet):
            part.last = nn.ReLU()
            part.forward = _densenet.__get__(part)
    return net


def _basic_block(self, x: Tensor) -> Tensor:
    out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
    return self.second(out + (x if self.downsample is None else self.downsample(x)))


def _densenet(self, x: Tensor) -> Tensor:
    return self.classifier(self.last(self.features(x)).mean((2, 3)))
