"""Integrated gradients over a set of pictures instead of one picture without content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from xcli import draws
from xcli.methods.base import Attribution
from xcli.methods.gradient.base import PixelMethod, beside, rounds
from xcli.registry import method
from xcli.score import Score


@method("expected-gradients")
class ExpectedGradients(PixelMethod):
    r"""The difference in score to other pictures, shared among the pixels: what this one has and those have not.

    .. math:: \mathbb{E}_{x' \sim D,\ t \sim U(0, 1)} \big[(x - x') \odot \nabla y\,(x' + t (x - x'))\big]

    with D the pictures of the folder ``baselines``, the mean over ``samples`` pairs (x', t) that belong to the image,
    the run's seed and the sample's number; its rows share them, and memory does not grow with ``samples``. Also known
    as GradientSHAP. ``noise`` adds N(0, noise^2), in units of the normalised input, to x before each sample, as
    SHAP's and captum's code can. Unit: that of the score. The map sums to y(x) less the mean of y over the pictures,
    up to the sampling error, which falls with the square root of ``samples``; ``extras`` have the gap, ``delta``.

    Of a folder of more than 128 pictures so many are taken, spread evenly over its sorted list.

    Source: Erion et al. 2021, arXiv:1906.10670; Lundberg's GradientExplainer. The paper does not fix the number of
    samples. Presets: ``shap`` (200 samples) and ``captum`` (5 samples, colours apart).

    Raises:
        ConfigError: the pictures of ``baselines`` are not there, or of another size than the images.
    """

    cost: ClassVar[str] = (
        "samples forwards + backwards; and a forward for each picture of the folder, once a batch"
    )
    source: ClassVar[str] = "Erion et al. 2021, arXiv:1906.10670"
    presets: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "shap": {"samples": 200},
        "captum": {"samples": 5, "reduce": "none"},
    }
    small: ClassVar[Mapping[str, object]] = {"baselines": "sample_images/photos", "samples": 3}

    baselines: Annotated[
        str, Field(description="folder (or list, glob) of the pictures to compare with; has to be named")
    ] = ""
    samples: Annotated[int, Field(ge=1, description="pairs of a picture and a place on the way to it")] = 100
    noise: Annotated[
        float, Field(ge=0, description="standard deviation of noise on the image", allow_inf_nan=False)
    ] = 0.0

    def draws_from(self) -> tuple[str, ...]:
        return (self.baselines,)

    def attribute(self, score: Score, x: Tensor) -> Attribution:
        pictures, total = beside(self, score, self.baselines, x), x.new_zeros(())
        seeds = score.seeds(torch.arange(len(x)), self.name)
        for part in rounds(score, self.samples):
            end, start, place = self.drawn(x, pictures, seeds[part.image], part.image, part.sample)
            (grads,) = part.score.gradients(start + place[:, None, None, None] * (end - start)).grads
            copy = part.score.image.to(x.device)
            total = total + part.of_rows(grads * (end - start)[copy]).sum(1) / self.samples
        others = score.once(("elsewhere", self.baselines), lambda: score.elsewhere(pictures).mean(0))
        return Attribution(total, {"delta": total.sum((1, 2, 3)) - (score.clean(x) - others)})

    def drawn(
        self, x: Tensor, pictures: Tensor, seeds: Tensor, image: Tensor, sample: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each sample (M,) of the images ``image``, whose seeds are ``seeds``: the image, the picture that it is
        compared with, (M, C, H, W) each, and the place between them, (M,)."""
        own = draws.sampled(seeds, sample)
        which, place = draws.uniform(own, 2).unbind(1)
        end, start = x[image.to(x.device)], pictures[(which * len(pictures)).long().to(x.device)]
        if self.noise:
            end = (
                end
                + draws.normal(draws.sampled(own, torch.ones_like(own)).to(x.device), x.shape[1:]).to(x)
                * self.noise
            )
        return end, start, place.to(x)
