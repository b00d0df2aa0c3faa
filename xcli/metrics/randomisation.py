"""Whether maps depend on what the network has learnt, and on the class: maps of other weights, of another class.

A copy of the network is drawn anew, layer by layer, from numbers that depend on the seed of the run and on the layer's
name alone: batches, rows, devices and the number of steps never change it. The network itself is left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import reduce
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from xcli.methods.base import Need
from xcli.metrics.base import Direction, Explain, Measured, Metric
from xcli.metrics.similarity import Alike, Scaling, similarity
from xcli.registry import metric, options
from xcli.score import Score

Presets = Mapping[str, Mapping[str, object]]
Blocks = list[list[str]]
Order = Annotated[
    Literal["top-down", "bottom-up", "independent"],
    Field(description="from the output down, from the input up, or each block of layers alone"),
]


@options
class Redrawn(Metric):
    """A metric that asks the method about a copy of the network with other weights.

    ``weights: initial`` lets each layer draw what it starts training with (``reset_parameters``); what no layer
    resets, such as class tokens and embeddings, keeps its values in a random order, as does everything with
    ``weights: shuffled``. ``statistics`` changes the running moments of batch norm as well.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"structure"})

    weights: Annotated[
        Literal["initial", "shuffled", "uniform"],
        Field(
            description="drawn as before training, the trained ones in random order, or uniform from 0 to 1"
        ),
    ] = "initial"
    statistics: Annotated[bool, Field(description="whether batch norm loses its running statistics too")] = (
        False
    )

    def redrawn(self, score: Score, module: nn.Module) -> nn.Module:
        """A copy of ``module`` in which every layer has weights of its own new draw; made once a batch."""
        key = (module, "redrawn", self.weights, self.statistics)
        return score.once(key, lambda: self.drawn_anew(score, module))

    def drawn_anew(self, score: Score, module: nn.Module) -> nn.Module:
        """The copy that ``redrawn`` keeps."""
        copy = deepcopy(module)
        for name, part in copy.named_modules():
            kept, seed = own(part, self.statistics), seed_of(score.seed, name)
            fresh = initial(part, seed) if kept and self.weights == "initial" else {}
            draw = torch.Generator().manual_seed(seed)
            for key, old in kept.items():
                new = fresh.get(key)
                if new is None or (isinstance(old, nn.Parameter) and torch.equal(new, old.cpu())):
                    new = drawn(old, draw, uniform=self.weights == "uniform")
                old.data.copy_(new)
        return copy


def seed_of(seed: int, layer: str) -> int:
    """What a layer draws from: a number of the run's seed and its name."""
    digest = hashlib.sha256(f"{seed}\0parameter-randomisation\0{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def own(part: nn.Module, statistics: bool = True) -> dict[str, Tensor]:
    """The parameters of a module itself, not of those within it; with the running statistics, where asked."""
    found: dict[str, Tensor] = dict(part.named_parameters(recurse=False))
    if statistics:
        found |= {name: t for name, t in part.named_buffers(recurse=False) if name.startswith("running_")}
    return found


def initial(part: nn.Module, seed: int) -> dict[str, Tensor]:
    """``own`` of the module as it starts training, drawn on the CPU; empty where it has no such start."""
    fresh = deepcopy(part).cpu()
    reset = getattr(fresh, "reset_parameters", None) or getattr(fresh, "_reset_parameters", None)
    if reset is None:
        return {}
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        reset()
    return own(fresh)


def drawn(old: Tensor, generator: torch.Generator, *, uniform: bool) -> Tensor:
    """New values in the shape of the old ones: from 0 to 1, or the old ones in a random order."""
    if uniform:
        return torch.rand(old.shape, generator=generator)
    place = torch.randperm(old.numel(), generator=generator).to(old.device)
    return old.detach().flatten()[place].view(old.shape)


@options
class Randomisation(Redrawn):
    """How much of a map is left while the network forgets.

    A layer is a module with parameters of its own; those of a module that is never called by itself belong to the one
    around it, and one that contains others comes before the first of them. Layers are in the order in which they run
    and are taken in ``steps`` blocks, one after the other: from the output down, from the input up, or each block alone
    with all others as trained. The curve has the similarity after each block over the share of layers that have had
    their turn; the value is its mean. Steps at which the map of the changed network is flat or not finite have no
    similarity and are left out; NaN where none is left, and where the original map is flat or not finite.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (-1.0, 1.0)

    similarity: Alike = "spearman"
    scaling: Scaling = "unit"
    absolute: Annotated[bool, Field(description="whether absolute values of maps are compared")] = False
    order: Order = "top-down"
    steps: Annotated[int | None, Field(description="blocks of layers; null: one a layer", ge=1)] = 16
    until: Annotated[float, Field(description="share of the layers that have a turn", gt=0, le=1)] = 1.0

    def compared(
        self, score: Score, inputs: Iterable[Tensor], original: Tensor, method: Explain, module: nn.Module
    ) -> Measured:
        """Maps (N, H, W) of the network as it is against those of the changed ones, averaged over the inputs."""
        source, work = self.redrawn(score, module), deepcopy(module)
        blocks, share = self.blocks(layers_of(score, module))
        sums, count = [torch.zeros_like(original) for _ in blocks], 0
        for x in inputs:
            networks = self.networks(module, source, work, blocks)
            for step, net in enumerate(networks):
                sums[step] = sums[step] + method(score.using(net), x)
            count += 1
        empty = original.new_zeros(len(original), 0)
        curve = torch.cat([empty, *(self.alike(original, total / count)[:, None] for total in sums)], 1)
        return Measured(curve.nanmean(1), curve, original.new_tensor(share))

    def blocks(self, layers: Blocks) -> tuple[Blocks, list[float]]:
        """The modules that change at each step, and the share of layers that have changed by then."""
        ordered = layers if self.order == "bottom-up" else layers[::-1]
        last = min(len(layers), max(1, int(len(layers) * self.until)))
        steps = last if self.steps is None else min(self.steps, last)
        ends = [k * last // steps for k in range(steps + 1)] if steps else [0]
        blocks = [[name for layer in ordered[first:end] for name in layer] for first, end in pairwise(ends)]
        return blocks, [end / len(layers) for end in ends[1:]]

    def networks(
        self, module: nn.Module, source: nn.Module, work: nn.Module, blocks: Blocks
    ) -> Iterator[nn.Module]:
        """``work`` with the blocks of ``source``: one more each time, or each alone among those of ``module``."""
        lend(module, work, [name for name, _ in module.named_modules()])
        for block in blocks:
            lend(source, work, block)
            yield work
            if self.order == "independent":
                lend(module, work, block)

    def alike(self, original: Tensor, other: Tensor) -> Tensor:
        """The similarity of the maps (N, H, W), (N,)."""
        if self.absolute:
            original, other = original.abs(), other.abs()
        return similarity(original, other, self.similarity, self.scaling)


def layers_of(score: Score, module: nn.Module) -> Blocks:
    """The layers in the order in which they run, each as the names of the modules whose parameters it has."""
    place = {name: index for index, name in enumerate(score.layers.order)}
    found: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        if own(part, statistics=False):
            around = name
            while around and around not in place:
                around = around.rpartition(".")[0]
            found.setdefault(around, []).append(name)

    def begins(layer: str) -> tuple[int, int]:
        inner = f"{layer}." if layer else ""
        return min((i for name, i in place.items() if f"{name}.".startswith(inner)), default=-1), len(layer)

    return [found[layer] for layer in sorted(found, key=begins)]


def lend(source: nn.Module, to: nn.Module, names: Iterable[str]) -> None:
    """Copy the parameters and running statistics of the modules called so."""
    for name in names:
        kept, given = own(to.get_submodule(name)), own(source.get_submodule(name))
        for key, tensor in kept.items():
            tensor.data.copy_(given[key])


@metric("parameter-randomisation")
class ParameterRandomisation(Randomisation):
    r"""How alike the maps of the trained network and of one with randomised layers are; alike maps show no learning.

    .. math:: \frac{1}{S} \sum_{s=1}^S \rho\big(e(f, x), e(f_s, x)\big)

    with f_s the network f with s of S blocks of layers redrawn. Unit: that of ``similarity``; lower is better, 1 is a
    method that ignores the weights. Source: Adebayo et al. 2018, arXiv:1810.03292. Departs: the paper shows the curve,
    its mean is ours, as in Quantus; ``steps`` bounds the cost, as a ResNet-50 has 107 layers. SSIM and HOG compare maps
    from 0 to 1, as in the authors' code. Presets: ``quantus``, every layer, absolute values, batch norm forgets its
    statistics; ``xplique``, the last quarter of the layers at once, weights and statistics uniform from 0 to 1.
    """

    source: ClassVar[str] = "Adebayo et al. 2018, arXiv:1810.03292"
    cost: ClassVar[str] = "an explanation a step; two copies of the network"
    presets: ClassVar[Presets] = {
        "quantus": {"absolute": True, "statistics": True, "steps": None},
        "xplique": {"weights": "uniform", "statistics": True, "steps": 1, "until": 0.25},
    }
    small: ClassVar[Mapping[str, object]] = {"steps": 3}

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain, module: nn.Module) -> Measured:
        return self.compared(score, [x], map, method, module)


@metric("smooth-mprt")
class SmoothMPRT(Randomisation):
    r"""How alike maps stay under parameter randomisation once the noise of gradients is averaged out of them.

    .. math:: \bar e(f, x) = \frac{1}{N} \sum_i e(f, x + \eta_i), \quad
        \eta_i \sim \mathcal{N}\big(0, (\text{noise} \cdot (\max x - \min x))^2\big)

    compared for the trained and the randomised networks as in ``parameter-randomisation``, from the input up. Every
    network sees the same noisy images. Unit: that of ``similarity``; lower is better. Source: Hedström et al. 2024,
    arXiv:2401.06465. Departs: as ``parameter-randomisation`` does. Preset ``quantus``, the authors' code: as there, and
    one of the samples is the image itself.
    """

    source: ClassVar[str] = "Hedström et al. 2024, arXiv:2401.06465"
    cost: ClassVar[str] = "samples * (steps + 1) explanations; two copies of the network"
    presets: ClassVar[Presets] = {
        "quantus": {"absolute": True, "statistics": True, "steps": None, "clean": True}
    }
    small: ClassVar[Mapping[str, object]] = {"steps": 2, "samples": 2}

    order: Order = "bottom-up"
    samples: Annotated[int, Field(description="noisy images that a map is averaged over", ge=1)] = 50
    noise: Annotated[float, Field(description="deviation of the noise, in ranges of the image", ge=0)] = 0.1
    clean: Annotated[bool, Field(description="whether one of the samples is the image itself")] = False

    def measure(self, x: Tensor, score: Score, method: Explain, module: nn.Module) -> Measured:
        original = reduce(torch.add, (method(score, one) for one in self.inputs(score, x))) / self.samples
        return self.compared(score, self.inputs(score, x), original, method, module)

    def inputs(self, score: Score, x: Tensor) -> Iterator[Tensor]:
        """The noisy images (B, C, H, W), one after the other, the same every time."""
        for sample in range(self.samples - self.clean):
            yield noisy(score, x, self.noise, sample)
        if self.clean:
            yield x


def noisy(score: Score, x: Tensor, noise: float, sample: int) -> Tensor:
    """The images (B, C, H, W) with Gaussian noise of their own; images without rows stay as they are."""
    added, span = torch.zeros(x.shape), x.amax((1, 2, 3), keepdim=True) - x.amin((1, 2, 3), keepdim=True)
    for row, image in enumerate(score.image.tolist()):
        if row == 0 or image != score.image[row - 1]:
            added[image] = torch.randn(x.shape[1:], generator=score.generator(row, f"smooth-mprt {sample}"))
    return x + noise * span * added.to(x)


@metric("efficient-mprt")
class EfficientMPRT(Redrawn):
    r"""How much more complex the map becomes when all weights are randomised: the map of a network that knows nothing.

    .. math:: \frac{H(e(\tilde f, x)) - H(e(f, x))}{H(e(f, x))}

    with H the entropy of the histogram of a map between its lowest and highest value. No unit; higher is better. NaN
    where the original map is flat. Source: Hedström et al. 2024, arXiv:2401.06465. Preset ``quantus``, the authors'
    code: batch norm forgets its statistics.
    """

    direction: ClassVar[Direction] = "higher"
    bounds: ClassVar[tuple[float | None, float | None]] = (-1.0, None)
    cost: ClassVar[str] = "one explanation; a copy of the network"
    source: ClassVar[str] = "Hedström et al. 2024, arXiv:2401.06465"
    presets: ClassVar[Presets] = {"quantus": {"statistics": True}}

    bins: Annotated[int, Field(description="bins of the histogram", ge=2)] = 100

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain, module: nn.Module) -> Measured:
        other = method(score.using(self.redrawn(score, module)), x)
        before, after = histogram_entropy(map, self.bins), histogram_entropy(other, self.bins)
        return Measured(torch.where(before > 0, (after - before) / before, torch.nan))


def histogram_entropy(maps: Tensor, bins: int) -> Tensor:
    """Entropy (N,) of the values of maps (N, H, W) in bins of equal width; 0 for a flat map, NaN if not finite."""
    rows = maps.flatten(1)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    inner = torch.arange(1, bins, device=rows.device, dtype=rows.dtype) / bins
    index = torch.searchsorted((low + (high - low) * inner).contiguous(), rows.contiguous(), right=True)
    index = torch.where(low < high, index, 0)
    share = rows.new_zeros(len(rows), bins).scatter_add_(1, index, torch.ones_like(rows)) / rows.shape[1]
    return torch.where(rows.isfinite().all(1), -torch.xlogy(share, share).sum(1), torch.nan)


@metric("random-logit")
class RandomLogit(Metric):
    r"""How alike the maps of the class and of another one are, drawn at random; alike maps do not explain the class.

    .. math:: \mathrm{SSIM}\big(e(f_c, x), e(f_{c'}, x)\big), \quad c' \neq c \text{ uniformly}

    Unit: that of ``similarity``; lower is better. NaN where one of the maps is flat or not finite, and where the
    network has one logit. Source: Sixt et al. 2020, arXiv:1912.09818. Departs: their code cuts maps at percentiles,
    uses a window of 5 and the better of the two signs of a map. Presets: ``xplique``, raw maps; ``quantus``, maps
    divided by their largest size and compared in raster order.
    """

    direction: ClassVar[Direction] = "lower"
    bounds: ClassVar[tuple[float | None, float | None]] = (-1.0, 1.0)
    cost: ClassVar[str] = "one explanation"
    source: ClassVar[str] = "Sixt et al. 2020, arXiv:1912.09818"
    presets: ClassVar[Presets] = {
        "xplique": {"scaling": "none"},
        "quantus": {"similarity": "ssim-flat", "scaling": "max"},
    }

    similarity: Alike = "ssim"
    scaling: Scaling = "unit"

    def measure(self, map: Tensor, x: Tensor, score: Score, method: Explain) -> Measured:
        target = score.rows.columns()["target"]
        count = score.logits(x).shape[1]
        if count < 2:
            return Measured(map.new_full((len(map),), torch.nan))
        other = [another(score, row, own, count) for row, own in enumerate(target.tolist())]
        found = method(score.retarget(target.new_tensor(other)), x)
        return Measured(similarity(map, found, self.similarity, self.scaling))


def another(score: Score, row: int, target: int, count: int) -> int:
    """A class other than ``target``, the same for this row in every batch."""
    generator = score.generator(row, f"random-logit {target}")
    other = int(torch.randint(count - 1, (), generator=generator))
    return other + (other >= target)
