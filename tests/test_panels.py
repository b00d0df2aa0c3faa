"""Panels: their size, what is where, and that the text is there and inside."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from xcli.panels import CELL, COLUMNS, PanelRow, cell_size, panel, shortened
from xcli.render import colour_table

TABLE = colour_table("jet")
WHITE = 255


def drawn(size=(64, 64), targets=1, methods=1, label="cat", facts="p=0.98  logit 12.3", title="a/cat.jpg"):
    names = [f"method-{index}" for index in range(methods)]
    overlays = [Image.new("RGB", size, (0, 10 * index + 10, 200)) for index in range(methods)]
    rows = [PanelRow(label, facts, overlays) for _ in range(targets)]
    return panel(Image.new("RGB", size, (250, 0, 0)), rows, names, TABLE, title)


def pixels(image):
    return np.asarray(image).astype(int)


def blocks(image, colour):
    """Number of pixels of exactly this colour."""
    return int((pixels(image) == colour).all(-1).sum())


@pytest.mark.parametrize("size", [(64, 64), (16, 64), (224, 224), (600, 400)])
@pytest.mark.parametrize("targets", [1, 5])
@pytest.mark.parametrize("methods", [1, 8])
def test_every_cell_is_there_in_full(size, targets, methods):
    image = drawn(size, targets, methods)
    width, height = cell_size(size)
    count = Counter({colour: number for number, colour in image.getcolors(image.width * image.height)})
    assert count[250, 0, 0] == targets * width * height
    for index in range(methods):
        assert count[0, 10 * index + 10, 200] == targets * width * height
    assert image.width >= (methods + 1) * width
    assert image.height < targets * (height + 40) + 110
    whole = np.asarray(image)
    edge = np.concatenate([whole[[0, -1]].reshape(-1), whole[:, [0, -1]].reshape(-1)])
    assert (edge == WHITE).all()  # nothing is cut by the border


@pytest.mark.parametrize(
    ("size", "cell"),
    [((64, 64), (256, 256)), ((100, 50), (200, 100)), ((224, 224), (224, 224)), ((512, 256), (256, 128))],
)
def test_small_pictures_grow_by_whole_factors_and_large_ones_shrink(size, cell):
    assert cell_size(size) == cell
    assert max(cell_size((5000, 3))) == CELL
    assert min(cell_size((5000, 3))) == 1


def test_enlarged_pixels_stay_sharp():
    board = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 200).astype(np.uint8)).convert("RGB")
    cell = pixels(panel(board, [PanelRow("", "", [board])], ["a"], TABLE))[-100:-60, 40:100]
    assert set(cell.flatten().tolist()) == {0, 200}


def test_the_text_is_drawn():
    plain = pixels(drawn(label="", facts="", title="t"))
    for change in ({"label": "cat"}, {"facts": "p=0.98"}, {"title": "other"}):
        text = pixels(drawn(**{"label": "", "facts": "", "title": "t"} | change))
        assert (text != plain).any(-1).sum() > 20
        assert text[text != plain].min() < 140  # dark on white


def test_no_title_saves_its_line():
    assert drawn(title="").height < drawn(title="t").height


def test_text_never_leaves_its_place():
    long = "a very long class name " * 20
    image = drawn(label=long, title=long)
    assert image.size == drawn().size
    right_of_cells = pixels(image)[:, -14:]
    assert (right_of_cells == WHITE).all()


def test_the_numbers_are_kept_where_the_name_is_shortened():
    with_numbers, without = (pixels(drawn(label="name " * 50, facts=facts)) for facts in ("logit 12.3", ""))
    changed = np.flatnonzero((with_numbers != without).any((0, 2)))
    assert changed.max() < drawn().width - 16
    assert changed.max() > drawn().width // 2


def test_shortened_lines_end_in_an_ellipsis_and_fit():
    assert shortened("short", 200) == "short"
    cut = shortened("integrated-gradients-of-300-steps", 100)
    assert cut.endswith("…")
    assert shortened(cut, 100) == cut  # it fits
    assert "integrated-gradients-of-300-steps".startswith(cut[:-1])
    assert len(cut) > 8
    assert shortened("anything", 0) == "…"
    assert shortened("a\nb\udcff\x1b", 200) == "a?b??"


def test_a_failed_method_leaves_an_empty_cell():
    picture = Image.new("RGB", (224, 224), (250, 0, 0))
    image = panel(picture, [PanelRow("cat", "", [None, picture])], ["a", "b"], TABLE)
    assert blocks(image, (250, 0, 0)) == 2 * 224 * 224
    assert blocks(image, (0xEE, 0xEE, 0xEE)) > 0.9 * 224 * 224


def test_the_colour_bar_runs_from_high_to_low():
    image = drawn((224, 224), label="", facts="")
    column = pixels(image)[:, image.width - 16 - 36 - 6]
    bar = column[(column != WHITE).any(-1)]
    assert len(bar) == 224
    assert bar[0].tolist() == TABLE[255].tolist()
    assert bar[-1].tolist() == TABLE[0].tolist()


def test_a_row_with_too_few_overlays_is_refused():
    with pytest.raises(ValueError, match="2 methods, but 0 overlays for 'cat'"):
        panel(Image.new("RGB", (8, 8)), [PanelRow("cat", "", [])], ["a", "b"], TABLE)


def test_many_methods_are_spread_over_several_lines():
    methods = [f"method-{i}" for i in range(COLUMNS + 2)]
    colours = [(i, 0, 255 - i) for i in range(len(methods))]
    cells = [Image.new("RGB", (32, 32), colour) for colour in colours]
    made = panel(Image.new("RGB", (32, 32)), [PanelRow("cat", "p=1", cells)], methods, TABLE)
    few = panel(Image.new("RGB", (32, 32)), [PanelRow("cat", "p=1", cells[:5])], methods[:5], TABLE)
    assert made.size == (few.width, 2 * few.height)
    assert set(colours) <= {colour for _, colour in made.getcolors(1 << 20)}
