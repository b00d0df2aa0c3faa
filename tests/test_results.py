"""Reading a run back."""

import sys
import types

import h5py
import numpy as np
import pytest
from store_driver import part, run

from xcli import results
from xcli.errors import InputError
from xcli.results import open_run
from xcli.soundness import sources_of


def test_reading_a_run(tmp_path):
    run(tmp_path, 11)
    whole = part(slice(0, 11)).columns
    for path in (tmp_path, str(tmp_path / "results.h5")):
        with open_run(path) as found:
            assert found.names == ("gradcam", "rise")
            assert found.categories == ("cat", "dög")
            assert found.config.startswith("methods")
            assert found.attrs["seed"] == 7
            assert found.images["path"][1] == "dir/001.png"
            np.testing.assert_array_equal(found.explanations["image"], whole["explanations/image"])
            np.testing.assert_array_equal(found.status("gradcam"), whole["status/gradcam"])
            np.testing.assert_array_equal(found.extras("rise")["delta"], whole["extras/rise/delta"])
            assert found.extras("gradcam") == found.metrics("rise") == {}
            assert found.heatmap_attrs("gradcam")["layer"] == "conv5"


@pytest.mark.parametrize(
    "rows", [None, 3, -1, slice(2, 9, 3), [5, 1, 1, -2], np.array([7, 0]), [], np.arange(13) % 3 == 0]
)
def test_heatmaps_of_chosen_rows(tmp_path, rows):
    run(tmp_path, 11)
    maps = part(slice(0, 11)).columns["heatmaps/rise"]
    assert len(maps) == 13
    chosen = slice(None) if rows is None else np.asarray(rows, dtype=int) if isinstance(rows, list) else rows
    with open_run(tmp_path) as found:
        np.testing.assert_array_equal(found.heatmap("rise", rows), maps[chosen])


def test_the_parts_of_maps_are_listed_once(tmp_path, monkeypatch):
    """A list of thousands takes longer than reading a few maps does, and an evaluation reads a few at a time."""
    run(tmp_path, 11, layout="parts")
    listed = []
    with open_run(tmp_path) as found:
        monkeypatch.setattr(results, "sources_of", lambda maps: listed.append(maps.name) or sources_of(maps))
        for row in range(3):
            found.heatmap("rise", row)
            found.heatmap("gradcam", row)
    assert listed == ["/heatmaps/rise", "/heatmaps/gradcam"]


def test_reading_errors_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        open_run(tmp_path)
    run(tmp_path, 11, limit=1)
    with pytest.raises(InputError, match="xai merge"):
        open_run(tmp_path)
    run(tmp_path, 11)
    with open_run(tmp_path) as found:
        with pytest.raises(InputError, match="it has gradcam, rise"):
            found.heatmap("gradcan")
        with pytest.raises(InputError, match="no status of rise"):
            found.status("rise")
    (tmp_path / "other.h5").write_bytes(b"no")
    with pytest.raises(InputError, match="as HDF5"):
        open_run(tmp_path / "other.h5")
    with h5py.File(tmp_path / "foreign.h5", "w"):
        pass
    with pytest.raises(InputError, match="not a xcli/1"):
        open_run(tmp_path / "foreign.h5")


def test_xarray_gets_dimensions_that_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "xarray", types.SimpleNamespace(Dataset=lambda data, attrs: (data, attrs))
    )
    run(tmp_path, 11)
    with open_run(tmp_path) as found:
        data, attrs = found.to_xarray()
    assert attrs["schema"] == "xcli/1"
    assert data["gradcam"][0] == ("explanation", "y", "x")
    assert data["rise"][0] == ("explanation", "channel", "y_rise", "x_rise")
    assert data["images/label"][0] == ("image",)
    assert all(len(dims) == values.ndim for dims, values in data.values())


def test_xarray_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    run(tmp_path, 3)
    with open_run(tmp_path) as found, pytest.raises(ImportError, match="pip install"):
        found.to_xarray()


def test_real_xarray(tmp_path):
    run(tmp_path, 3)
    with open_run(tmp_path) as found:
        assert found.to_xarray(["gradcam"])["gradcam"].sizes["explanation"] == len(
            found.explanations["image"]
        )
