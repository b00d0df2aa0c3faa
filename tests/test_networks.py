"""Networks as users write them go through the whole command, or are refused in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xcli
from xcli.config import load_config
from xcli.errors import ConfigError, ModelError, XaiError
from xcli.images import find_images
from xcli.overrides import Changes
from xcli.pipeline import Summary, explain_folder

NETWORKS = Path(__file__).with_name("networks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five dark pictures and, in the middle, a white one, in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index in range(6):
        pixels = (
            rng.integers(0, 120, (40, 40, 3), dtype=np.uint8)
            if index != 3
            else np.full((40, 40, 3), 255, np.uint8)
        )
        home = root / str(index % 2)
        home.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(home / f"{index}.png")
    return root


def run(folder: Path, out: Path, network: str, *overrides: str, methods: str = "gradcam,eigencam") -> Summary:
    config = load_config(
        None,
        Changes(inputs=[str(folder)],
        output=str(out),
        methods=methods,
        overrides=[f"model={{source: factory, name: '{NETWORKS}:{network}', weights: none}}", "target=predicted",
                   "output.png=[]", "images.labels=folder", *overrides]),
    )  # fmt: skip
    return explain_folder(config, find_images(config.images.paths, labels="folder"))


def maps(out: Path) -> dict[str, np.ndarray]:
    with xcli.open_run(out) as found:
        return {name: found.heatmap(name) for name in found.names}


def test_a_view_on_a_map_is_run_in_the_layout_it_needs(folder: Path, tmp_path: Path):
    assert run(folder, tmp_path / "run", "views").explanations == 6
    run(folder, tmp_path / "plain", "views", "runtime.channels_last=false")
    for name, expected in maps(tmp_path / "plain").items():
        np.testing.assert_allclose(maps(tmp_path / "run")[name], expected, atol=1e-5 * np.abs(expected).max())


def test_layers_in_parallel_branches_are_explained_together(folder: Path, tmp_path: Path):
    both = [
        "methods=[{name: gradcam, layer: left, as: l}, {name: gradcam, layer: right, as: r}, "
        "{name: hirescam, layer: [left, right], as: both}]"
    ]
    config = load_config(
        None,
        Changes(
            inputs=[str(folder)],
            output=str(tmp_path / "run"),
            overrides=[
                f"model={{source: factory, name: '{NETWORKS}:branches'}}",
                "target=predicted",
                "output.png=[]",
                *both,
            ],
        ),
    )
    explain_folder(config, find_images(config.images.paths))
    found = maps(tmp_path / "run")
    run(folder, tmp_path / "alone", "branches", "methods.0.layer=right", methods="gradcam")
    np.testing.assert_allclose(found["r"], maps(tmp_path / "alone")["gradcam"], atol=1e-6)
    assert np.abs(found["l"]).max() > 0


@pytest.mark.parametrize("network", ["plain", "weight_norm"])
@pytest.mark.parametrize("layer", ["features", "features.2", "norm"])
def test_folding_changes_no_map_whatever_layer_is_named(
    folder: Path, tmp_path: Path, network: str, layer: str
):
    where = [f"methods.{index}.layer={layer}" for index in range(2)]
    run(folder, tmp_path / "folded", network, *where)
    run(folder, tmp_path / "written", network, "runtime.fold=false", *where)
    for name, expected in maps(tmp_path / "written").items():
        np.testing.assert_allclose(
            maps(tmp_path / "folded")[name], expected, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )


def test_activations_that_are_not_finite_are_marked_and_spare_the_others(folder: Path, tmp_path: Path):
    summary = run(folder, tmp_path / "run", "sometimes_infinite")
    assert summary.not_finite == {"gradcam": 1, "eigencam": 1}
    with xcli.open_run(tmp_path / "run") as found:
        white = list(found.images["path"]).index("1/3.png")
        assert found.status("eigencam")[white] == 2
        assert np.isfinite(np.delete(found.heatmap("eigencam"), white, 0)).all()


@pytest.mark.parametrize("wanted", ["{class: 99}", "{class: [0, 3]}"])
def test_a_class_that_the_model_does_not_have_is_refused(folder: Path, tmp_path: Path, wanted: str):
    with pytest.raises(ConfigError, match="3 classes"):
        run(folder, tmp_path / "run", "plain", f"target={wanted}")
    assert not (tmp_path / "run").exists()


def test_right_and_wrong_mean_nothing_to_a_single_logit(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="single logit"):
        run(folder, tmp_path / "run", "one_logit", "images.only=wrong")
    assert run(folder, tmp_path / "run", "one_logit").explanations == 6


def test_a_label_beyond_the_logits_fails_its_image_alone(folder: Path, tmp_path: Path):
    summary = run(folder, tmp_path / "run", "one_logit", "target=label")
    assert (summary.failed, summary.explanations, summary.exit_code) == (3, 3, 3)
    with xcli.open_run(tmp_path / "run") as found:
        assert found.images["error"][-1] == "label '1' is no class of the model"


def test_an_input_size_that_does_not_fit_is_said(folder: Path, tmp_path: Path):
    with pytest.raises(
        ModelError, match=r"cannot run on an input of shape \(1, 3, 24, 24\).*model.preprocess"
    ):
        run(folder, tmp_path / "run", "views", "model.preprocess={resize: [24, 24]}")


def test_gradients_in_float16_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(XaiError, match="bfloat16"):
        run(folder, tmp_path / "run", "plain", "runtime.precision=float16")
    assert run(folder, tmp_path / "run", "plain", "runtime.precision=bfloat16").explanations == 6


def test_graphs_that_do_not_fit_together_are_made_one_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch):
    """Eight images, of which graphs of three fit at once: the maps are those of a machine with enough memory."""
    import networks

    net, _ = networks.plain()
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = xcli.explain(net, images, target=1).map
    held = []

    def count(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            held[:] = [one for one in held if one() is not None]
            held.append(__import__("weakref").ref(output))
            if sum(len(one()) for one in held if one() is not None) > 3:
                raise torch.OutOfMemoryError("out of memory")

    handle = net.head.register_forward_hook(count)
    found = xcli.explain(net, images, target=1, micro_batch=2).map
    handle.remove()
    torch.testing.assert_close(found, expected)


def test_what_a_method_adds_for_each_row_is_stored_also_when_a_part_has_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from xcli import plan
    from xcli.methods.base import Attribution
    from xcli.methods.cam.gradient import GradCAM

    genuine = GradCAM.attribute

    def adding(self: GradCAM, score: object, x: torch.Tensor) -> Attribution:
        maps = genuine(self, score, x)
        return Attribution(maps, {"mass": maps.sum((1, 2))})

    monkeypatch.setattr(GradCAM, "attribute", adding)
    monkeypatch.setattr(plan, "PART_IMAGES", 1)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_text("no picture")
    for file in folder.rglob("*.png"):
        (tmp_path / "in" / f"z{file.name}").write_bytes(file.read_bytes())
    summary = run(tmp_path / "in", tmp_path / "run", "plain", "runtime.batch_size=1", methods="gradcam")
    assert (summary.failed, summary.explanations) == (1, 6)
    with xcli.open_run(tmp_path / "run") as found:
        mass = found.extras("gradcam")["mass"]
        assert mass.shape == (6,)
        assert (mass >= 0).all()


def test_results_below_the_input_are_no_input(folder: Path, tmp_path: Path):
    home = tmp_path / "in"
    home.mkdir()
    for file in folder.rglob("*.png"):
        (home / file.name).write_bytes(file.read_bytes())
    assert run(home, home / "out", "plain", "output.png=[overlay]", methods="gradcam").images == 6
    assert run(home, home / "out2", "plain", methods="gradcam").images == 6
    assert (
        run(home, home / "out", "plain", "output.png=[overlay]", methods="gradcam").status == "already done"
    )


def test_another_config_is_refused_with_the_keys_that_differ(folder: Path, tmp_path: Path):
    run(folder, tmp_path / "run", "plain", methods="gradcam")
    with pytest.raises(ConfigError, match=r"output\.alpha was 0\.5, now 0\.25"):
        run(folder, tmp_path / "run", "plain", "output.alpha=0.25", methods="gradcam")


def test_every_shard_gets_its_share_of_few_images(folder: Path, tmp_path: Path):
    from xcli.pipeline import explain_folder as go

    config = load_config(
        None,
        Changes(
            inputs=[str(folder)],
            output=str(tmp_path / "run"),
            overrides=["output.png=[]", "target=predicted", "runtime.batch_size=1"],
            methods="gradcam",
        ),
    )
    sources = find_images(config.images.paths)
    assert [go(config, sources, shard=(index, 3)).status for index in (1, 2, 3)] == [
        "shard done",
        "shard done",
        "done",
    ]
    with xcli.open_run(tmp_path / "run") as found:
        assert len(found.explanations["image"]) == 6


def test_names_that_do_not_fit_the_logits_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="3 logits, but 2 names"):
        run(folder, tmp_path / "run", "plain", "model.categories=[a, b]")


def test_a_label_that_is_no_class_is_said(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = load_config(
        None, Changes(inputs=[str(folder)], output=str(tmp_path / "run"), methods="gradcam",
        overrides=["output.png=[]", "images.labels=folder", "model.categories=[a, b, '1', d, e, f, g, h, i, j]",
                   "images.only=wrong"]),
    )  # fmt: skip
    explain_folder(config, find_images(config.images.paths, labels="folder"))
    assert "no class" not in caplog.text  # '0' is class 0, '1' a name
    (folder / "zebra").mkdir()
    Image.new("RGB", (40, 40)).save(folder / "zebra" / "z.png")
    explain_folder(config, find_images(config.images.paths, labels="folder"), fresh=True)
    (folder / "zebra" / "z.png").unlink()
    assert "the labels of 1 of 7 images are no class of the model: 'zebra' (1)" in caplog.messages
