"""Layers: the default layer of every torchvision classifier, of timm's token models, and of toys that know better."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision import models
from torchvision.transforms._presets import ImageClassification

from xcli.demo import nets
from xcli.errors import ModelError
from xcli.grids import Grid, infer_grid
from xcli.hooks import recording
from xcli.layers import survey


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------- every torchvision net

EXPECTED = {
    "alexnet": "features",
    "convnext_": "features",
    "densenet": "features",
    "efficientnet_": "features",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "maxvit_t": "blocks.3",
    "mnasnet": "layers",
    "mobilenet_": "features",
    "regnet_": "trunk_output",
    "resnet": "layer4",
    "resnext": "layer4",
    "wide_resnet": "layer4",
    "shufflenet_": "conv5",
    "squeezenet": "features",
    "swin_": "norm",
    "vgg": "features",
    "vit_b_": "encoder.layers.encoder_layer_11.ln_1",
    "vit_l_": "encoder.layers.encoder_layer_23.ln_1",
    "vit_h_": "encoder.layers.encoder_layer_31.ln_1",
}
QUICK = {
    *(
        "alexnet",
        "convnext_tiny",
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "mnasnet0_5",
        "mobilenet_v2",
    ),
    *("mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "shufflenet_v2_x0_5"),
    *("squeezenet1_1", "swin_t", "vgg11", "vit_b_32"),
}
"""One or two of most families; the others are soaked."""


def classifiers() -> list[str]:
    defaults = {
        name: getattr(models.get_model_weights(name), "DEFAULT", None)
        for name in models.list_models()
        if not name.startswith("quantized")
    }
    return [
        n for n, d in defaults.items() if d is not None and isinstance(d.transforms(), ImageClassification)
    ]


@pytest.fixture(scope="module")
def pool() -> Tensor:
    """Random numbers for the largest parameter of all (VGG's first linear layer)."""
    return (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.05).repeat(98)


def built(name: str, pool: Tensor) -> tuple[nn.Module, int]:
    """The builder's network without its costly initialisation: all parameters look into one pool of numbers."""
    size = 224 if name == "maxvit_t" else 112 if name == "vit_h_14" else 128
    options = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": True, "init_weights": False}
    idle = {part: mock.DEFAULT for part in dir(nn.init) if part.endswith("_") and not part.startswith("_")}
    with mock.patch.multiple(nn.init, **idle):
        net = models.get_model(name, weights=None, **options)
    with torch.no_grad():
        for key, value in [*net.named_parameters(), *net.named_buffers()]:
            if not value.is_floating_point():
                value.zero_()
            elif key.endswith("running_var") or (value.dim() == 1 and key.endswith("weight")):
                value.fill_(1)
            else:
                value.data = pool[: value.numel()].view(value.shape)
    return net.eval(), size


def test_torchvision_has_80_classifiers_and_the_table_names_a_layer_for_each():
    names = classifiers()
    assert len(names) == 80
    assert all(sum(name.startswith(family) for family in EXPECTED) == 1 for name in names)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in classifiers()]
)
def test_default_layer_of_torchvision_classifiers(name, pool):
    net, size = built(name, pool)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    layer = survey(net, x).default
    assert layer.name == next(layer for family, layer in EXPECTED.items() if name.startswith(family))
    with recording(net, [layer.name], leaves=[layer.name]) as kept, torch.no_grad():
        logits = net(x)
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((logits * noise).sum(), kept[layer.name])
    cells = (layer.maps(gradient) != 0).any(1)  # (1, h, w)
    assert cells.numel() > 1
    assert cells.float().mean() >= 0.5


def test_an_untrained_vit_has_a_default_although_its_head_is_zero():
    net = models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    assert not net.heads.head.weight.any()
    layer = survey(net, torch.randn(1, 3, 32, 32)).default
    assert (layer.name, layer.grid) == ("encoder.layers.encoder_layer_1.ln_1", Grid("tokens", 4, 4, 1))


# ------------------------------------------------------------------------------------------------------------- timm

SMALL = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
TIMM = {
    "class token": ({"img_size": 64}, "blocks.1.norm1", Grid("tokens", 4, 4, 1)),
    "registers": ({"img_size": 64, "reg_tokens": 4}, "blocks.1.norm1", Grid("tokens", 4, 4, 5)),
    "wide": ({"img_size": (64, 160), "reg_tokens": 4}, "blocks.1.norm1", Grid("tokens", 4, 10, 5)),
    "pooled": ({"img_size": 64, "global_pool": "avg", "class_token": False}, "blocks", Grid("tokens", 4, 4)),
    "attention pool": (
        {"img_size": 64, "global_pool": "map", "class_token": False},
        "norm",
        Grid("tokens", 4, 4),
    ),
    "normalised queries": ({"img_size": 128, "qk_norm": True}, "blocks.1.norm1", Grid("tokens", 8, 8, 1)),
    "tokens as many as channels of a head": (
        {"img_size": 128, "qk_norm": True, "embed_dim": 128, "num_heads": 2},
        "blocks.1.norm1",
        Grid("tokens", 8, 8, 1),
    ),
}


@pytest.mark.parametrize("case", TIMM)
def test_default_layer_of_timm_transformers(case):
    from timm.models import vision_transformer as transformer

    options, name, grid = TIMM[case]
    size = options["img_size"]
    size = (size, size) if isinstance(size, int) else size
    layer = survey(transformer.VisionTransformer(**{**SMALL, **options}), torch.randn(2, 3, *size)).default
    assert (layer.name, layer.grid) == (name, grid)


BUILDERS = {
    "vit_small_patch14_reg4_dinov2": (
        (70, 56),
        {"img_size": (70, 56)},
        "blocks.11.norm1",
        Grid("tokens", 5, 4, 5),
    ),
    "deit_tiny_distilled_patch16_224": (
        (64, 64),
        {"img_size": 64},
        "blocks.11.norm1",
        Grid("tokens", 4, 4, 2),
    ),
    "swin_tiny_patch4_window7_224": (
        (64, 128),
        {"img_size": (64, 128), "window_size": 4},
        "norm",
        Grid("NHWC", 2, 4),
    ),
    "convnext_atto": ((96, 64), {}, "stages", Grid("NCHW", 3, 2)),
    "mvitv2_tiny": ((224, 224), {}, "norm", Grid("tokens", 7, 7)),
    "mobilevit_xxs": ((128, 128), {}, "final_conv", Grid("NCHW", 4, 4)),
    "pvt_v2_b0": ((128, 96), {}, "stages", Grid("NCHW", 4, 3)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_default_layer_of_timm_builders(name):
    import timm

    size, options, expected, grid = BUILDERS[name]
    layer = survey(timm.create_model(name, num_classes=5, **options), torch.randn(1, 3, *size)).default
    assert (layer.name, layer.grid) == (expected, grid)


# ------------------------------------------------------------------------------------------------ demo models, toys


@pytest.mark.parametrize(
    ("name", "expected", "grid"),
    [
        ("shapes-cnn", "stages", Grid("NCHW", 16, 16)),
        ("shapes-vit", "blocks.3.norm1", Grid("tokens", 8, 8, 1)),
    ],
)
def test_default_layer_of_the_demo_models(name, expected, grid):
    layer = survey(nets.load(name), torch.randn(1, 3, *nets.SIZE)).default
    assert (layer.name, layer.grid) == (expected, grid)


class Attention(nn.Module):
    """Separate queries, keys and values of the tokens' own width; the answer comes in a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        weights = self.softmax(self.query(x)[:, None] @ self.key(x)[:, None].mT)  # (N, 1, T, T)
        return (weights @ self.value(x)[:, None])[:, 0], None


class ObjectModel(nn.Module):
    """Blocks that return tuples, a result that is an object: as Hugging Face models do."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.before = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        tokens = self.patches(pixel_values).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = tokens + self.attention(self.before(tokens))[0]
        return SimpleNamespace(logits=self.classifier(tokens[:, 0]), hidden_states=(tokens,), loss=None)


class Functional(nn.Module):
    """Pooling and head are functions of the wrapper's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(True), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(True)
        )
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5  # some networks normalise their input in place
        return nn.functional.linear(self.backbone(x).mean((2, 3)), self.weight)


class GeM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-6).pow(self.power).mean((2, 3), keepdim=True).pow(1 / self.power)


def convolutions(*widths: int) -> nn.Sequential:
    pairs = pairwise(widths)
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU(inplace=True)) for a, b in pairs))


def named(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


FLAT, LINEAR = nn.Flatten(), nn.Linear(8, 5)
TOYS = {
    "functional pool and head": (Functional(), (20, 12), "backbone", Grid("NCHW", 5, 3)),
    "generalised mean": (
        named(stem=convolutions(3, 6, 8), pool=GeM(), flat=FLAT, head=LINEAR),
        (24, 36),
        "stem",
        Grid("NCHW", 6, 9),
    ),
    "dropout, average pooling and a permutation change nothing": (
        named(
            stem=convolutions(3, 6, 8),
            drop=nn.Dropout2d(),
            pool=nn.AvgPool2d(2),
            move=nn.Unflatten(1, (8, 1)),
            flat=nn.Flatten(),
            head=nn.Linear(8 * 9, 5),
        ),
        (24, 24),
        "stem",
        Grid("NCHW", 6, 6),
    ),
    "max pooling is a layer": (
        named(stem=convolutions(3, 8), top=nn.MaxPool2d(2), flat=FLAT, head=nn.Linear(8 * 36, 5)),
        (24, 24),
        "top",
        Grid("NCHW", 6, 6),
    ),
    "class maps are not a layer": (
        named(stem=convolutions(3, 8), head=nn.Conv2d(8, 5, 1), pool=nn.AdaptiveAvgPool2d(1), flat=FLAT),
        (16, 16),
        "stem",
        Grid("NCHW", 8, 8),
    ),
    "objects": (ObjectModel(), (16, 24), "before", Grid("tokens", 4, 6, 1)),
}


@pytest.mark.parametrize("case", TOYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_default_layer_of_toys(case, batch):
    net, size, name, grid = TOYS[case]
    layer = survey(net, torch.randn(batch, 3, *size)).default
    assert (layer.name, layer.grid) == (name, grid)


def test_the_head_is_the_one_that_yields_the_named_output():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = convolutions(3, 6), convolutions(6, 8)
            self.main, self.aux = nn.Linear(8, 5), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            early = self.early(x)
            return {"main": self.main(self.late(early).mean((2, 3))), "aux": self.aux(early.mean((2, 3)))}

    net, x = TwoHeads(), torch.randn(1, 3, 16, 16)
    assert survey(net, x, "main").default.name == "late"
    assert survey(net, x, "aux").default.name == "early"


def test_a_module_that_runs_twice_is_no_default():
    relu = nn.ReLU(inplace=True)
    net = named(
        first=nn.Conv2d(3, 4, 3), a=relu, second=nn.Conv2d(4, 4, 3), b=relu, pool=Mean(), head=nn.Linear(4, 5)
    )
    layers = survey(net, torch.randn(1, 3, 12, 12))
    assert layers.default.name == "second"
    with pytest.raises(ModelError, match="'a' runs 2 times"):
        layers.find("b")


def test_patches_that_no_class_token_reads_are_not_explained():
    net = ObjectModel()
    rows = {row.name: row for row in survey(net, torch.randn(1, 3, 16, 16)).rows}
    assert rows["attention"].grid == Grid("tokens", 4, 4, 1)  # a map by its shape
    assert rows["attention.softmax"].grid is None  # 17 x 17 attention weights are none
    assert rows["before"].default


def test_a_network_without_maps_has_no_default_layer():
    layers = survey(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), torch.randn(1, 3, 4, 4))
    with pytest.raises(ModelError, match="name one with `layer:`"):
        _ = layers.default
    with pytest.raises(ModelError, match=r"'1' has no spatial map: its output has shape \(5,\)"):
        layers.find("1")[0].maps(torch.zeros(1, 5))


def test_a_backbone_that_cuts_the_gradient_has_no_default_layer():
    class Cut(Functional):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                maps = self.backbone(x)
            return nn.functional.linear(maps.mean((2, 3)), self.weight)

    layers = survey(Cut(), torch.randn(1, 3, 8, 8))
    assert layers.find("backbone")[0].grid == Grid("NCHW", 2, 2)
    with pytest.raises(ModelError, match="name one"):
        _ = layers.default


# ------------------------------------------------------------------------------------------------- nothing is left over


def state(net: nn.Module) -> list[object]:
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in net.modules()]
    grads = [(p.requires_grad, p.grad, p._version) for p in net.parameters()]
    return [flags, grads, [b.tolist() for b in net.buffers()]]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_network_and_the_input_are_left_as_found(context):
    net = named(stem=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), head=nn.Linear(4 * 36, 5))
    net.stem.weight.requires_grad_(False)
    net.norm.eval()
    before = state(net)
    with context():
        x = torch.randn(1, 3, 8, 8)
        assert survey(net, x).default.name == "norm"
    assert not x.requires_grad
    assert state(net) == before


def test_the_network_is_left_as_found_when_it_fails():
    net = named(stem=nn.Conv2d(3, 4, 3), head=nn.Linear(7, 5))
    before = state(net)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        survey(net, torch.randn(1, 3, 8, 8))
    assert state(net) == before


def test_frozen_parameters_do_not_matter():
    net = TOYS["generalised mean"][0]
    frozen = net.requires_grad_(False)
    assert survey(frozen, torch.randn(1, 3, 24, 24)).default.name == "stem"


def test_fused_attention_is_surveyed_module_by_module():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = named(
        patches=nn.Conv2d(3, 8, 4, 4), flat=nn.Flatten(2), move=Transpose(), encoder=layer, head=Mean()
    )
    rows = {row.name: row for row in survey(net.eval(), torch.randn(1, 3, 16, 16)).rows}
    assert rows["encoder.norm1"].calls == 1


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


@pytest.mark.filterwarnings("ignore")  # deprecated in newer versions
def test_scripts_take_no_hooks():
    with pytest.raises(ModelError, match="TorchScript"):
        survey(torch.jit.script(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 8, 8))


# -------------------------------------------------------------------------------------------------- layers by name


@pytest.fixture(scope="module")
def layers():
    net = models.resnet18(num_classes=4)
    net.bag = nn.ModuleList([net.layer2])  # a second name of a layer, in a list that never runs
    return survey(net, torch.randn(1, 3, 64, 64))


def names(found) -> list[str]:
    return [layer.name for layer in found]


def test_layers_by_name(layers):
    assert names(layers.find("auto")) == ["layer4"]
    assert names(layers.find("layer2.0.conv1")) == ["layer2.0.conv1"]
    assert names(layers.find(["layer2", "auto", "layer2"])) == ["layer2", "layer4"]
    assert names(layers.find("bag.0")) == ["layer2"]
    assert layers.find("layer2")[0].shape == (128, 8, 8)


def test_wildcards_give_layers_with_a_map_in_the_order_they_run(layers):
    assert names(layers.find("layer?")) == ["layer1", "layer2", "layer3", "layer4"]
    assert names(layers.find("layer1.*.bn?")) == [
        "layer1.0.bn1",
        "layer1.0.bn2",
        "layer1.1.bn1",
        "layer1.1.bn2",
    ]
    assert "layer1.0.relu" not in names(layers.find("*"))  # it runs twice
    assert "fc" not in names(layers.find("*"))


SEVERAL = {
    "resnet18": ("layer2", "layer3", "layer4"),
    "resnet50": ("layer2", "layer3", "layer4"),  # the first convolution of layer4 is as fine as layer3
    "vgg11": ("features.14", "features.19", "features"),  # the container's own output is coarse
    "densenet121": ("features.denseblock2", "features.denseblock3", "features"),
    "mobilenet_v2": ("features.6", "features.13", "features"),
    "googlenet": ("inception3b", "inception4e", "inception5b"),
    "inception_v3": ("Mixed_5d", "Mixed_6e", "Mixed_7c"),
    "swin_t": ("features.3", "features.5", "norm"),
    "vit_b_32": tuple(f"encoder.layers.encoder_layer_{i}.ln_1" for i in (9, 10, 11)),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_auto_3_ends_in_the_default_layer_after_those_of_finer_grids_or_earlier_blocks(name, pool):
    net, size = built(name, pool)
    found = survey(net, torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)))
    assert tuple(names(found.find("auto:3"))) == SEVERAL[name]
    for count in (1, 2, 3):
        assert names(found.find(f"auto:{count}")) == list(SEVERAL[name][-count:])
    assert names(found.find(["auto:2", "auto"])) == list(SEVERAL[name][-2:])
    cells = [row.cells for row in map(found._named, names(found.find("auto:9")))]
    assert "vit" in name or all(finer >= 2 * coarser for finer, coarser in pairwise(cells))
    assert len(cells) > 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shapes-cnn", ["stem", "stages.0", "stages"]),
        ("shapes-vit", ["blocks.1.norm1", "blocks.2.norm1", "blocks.3.norm1"]),  # not its convolutional stem
    ],
)
def test_auto_3_of_the_demo_models(name, expected):
    assert names(survey(nets.load(name), torch.randn(1, 3, *nets.SIZE)).find("auto:3")) == expected


def test_auto_3_gives_what_there_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1), Mean())
    layers = survey(nn.Sequential(OrderedDict(body=net, head=nn.Linear(4, 2))), torch.randn(1, 3, 16, 16))
    assert names(layers.find("auto:3")) == ["body.1", "body.2"]
    same = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), Mean(), nn.Linear(4, 2))
    assert names(survey(same, torch.randn(1, 3, 8, 8)).find("auto:2")) == ["1", "2"]
    for wrong in ("auto:0", "auto:-1", "auto:x", "auto:"):
        with pytest.raises(ModelError, match=f"no layer '{wrong}'"):
            layers.find(wrong)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layer44", "no layer 'layer44'; nearest: layer4.*xai layers"),
        ("layer1.0.conv", "nearest: layer1.0.conv"),
        ("layer1.0.relu", "runs 2 times in one forward pass.*such as layer1.0, layer1"),
        ("bag", "does not run"),
        ("head*", "'head\\*' matches no module"),
        ("f[c]", "matches 1 modules, none with a spatial map"),
        ([], "no layer is named"),
    ],
)
def test_wrong_names_say_what_to_do(layers, spec, message):
    with pytest.raises(ModelError, match=message):
        layers.find(spec)


def test_rows_are_a_tree_in_the_order_of_definition(layers):
    rows = layers.rows
    assert [row.name for row in rows[:6]] == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer1.0"]
    assert [row.depth for row in rows[:6]] == [0, 0, 0, 0, 0, 1]
    assert [row.name for row in rows if row.default] == ["layer4"]
    assert rows[0].kind == "Conv2d"
    assert rows[0].shape == (64, 32, 32)


# ------------------------------------------------------------------------------------------------------------ grids


@given(st.sampled_from(["NCHW", "NHWC", "tokens"]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 5))
def test_maps_and_raw_outputs_are_each_others_inverse(layout, h, w, prefix):
    grid = Grid(layout, h, w, prefix if layout == "tokens" else 0)
    shape = {"NCHW": (2, 3, h, w), "NHWC": (2, h, w, 3), "tokens": (2, grid.prefix + h * w, 3)}[layout]
    raw = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    maps = grid.maps(raw)
    assert maps.shape == (2, 3, h, w)
    assert torch.equal(grid.tokens(maps, raw), raw)
    assert_close(
        grid.tokens(maps + 1, raw)[:, : grid.prefix] if grid.prefix else raw, raw[:, : grid.prefix or None]
    )


def test_tokens_run_row_by_row():
    grid = Grid("tokens", 2, 3, 1)
    assert grid.maps(torch.arange(7.0).view(1, 7, 1))[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_an_output_of_another_size_is_not_on_the_grid():
    with pytest.raises(ModelError, match="not on the grid 2x3 tokens after 1"):
        Grid("tokens", 2, 3, 1).maps(torch.zeros(1, 8, 4))


@given(st.integers(2, 14), st.integers(2, 14), st.sampled_from([14, 16, 32]), st.integers(0, 16))
def test_tokens_lie_on_the_patch_grid_seen_before(h, w, patch, prefix):
    size = (h * patch, w * patch)
    prefix = min(prefix, h * w)
    assert infer_grid((prefix + h * w, 8), size, [(h, w)]) == Grid("tokens", h, w, prefix)


@given(st.integers(32, 600), st.integers(32, 600), st.integers(1, 5), st.integers(65, 512))
def test_padded_strides_give_maps_whatever_the_input_size(H, W, halvings, channels):
    h, w = (-(-side // 2**halvings) for side in (H, W))
    if h * w == 1:
        return
    assert infer_grid((channels * 10, h, w), (H, W)) == Grid("NCHW", h, w)


@pytest.mark.parametrize(
    ("shape", "size", "grid"),
    [
        ((768, 7, 7), (224, 224), Grid("NCHW", 7, 7)),
        ((7, 7, 768), (224, 224), Grid("NHWC", 7, 7)),
        ((7, 7, 8), (224, 224), Grid("NHWC", 7, 7)),
        ((7, 7, 7), (224, 224), Grid("NCHW", 7, 7)),
        ((2048, 6, 2), (256, 128), Grid("NCHW", 6, 2)),  # inception's unpadded convolutions
        ((4, 8, 96), (128, 256), Grid("NHWC", 4, 8)),
        ((96, 1, 1), (224, 224), None),
        ((1, 1, 96), (224, 224), None),
        ((1000,), (224, 224), None),
        ((197, 768), (224, 224), Grid("tokens", 14, 14, 1)),
        ((201, 384), (224, 224), Grid("tokens", 14, 14, 5)),
        ((784, 192), (224, 224), Grid("tokens", 28, 28)),
        ((51, 192), (224, 224), Grid("tokens", 7, 7, 2)),
        ((3, 64, 65), (224, 224), Grid("NCHW", 64, 65)),
    ],
)
def test_grids_from_shapes(shape, size, grid):
    assert infer_grid(shape, size) == grid


def test_attention_weights_of_known_tokens_are_no_map():
    assert infer_grid((3, 65, 65), (128, 128), [(8, 8)], {65}) is None
    assert infer_grid((3, 65, 64), (128, 128), [(8, 8)], {65}) is None
