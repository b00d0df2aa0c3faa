"""The file of a part: compression that any HDF5 reader undoes, and columns that fit together."""

import zlib

import h5py
import numpy as np
import pytest
from store_driver import opened, part, record

from xcli.store import Input, Part, encode, encoded, open_store


def smooth(rows, size, seed=0):
    coarse = np.random.default_rng(seed).normal(size=(rows, size // 8, size // 8))
    return np.kron(coarse, np.ones((8, 8))).cumsum(1).cumsum(2)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", ">f4"])
@pytest.mark.parametrize("kind", ["noise", "relu", "smooth", "zeros", "nan", "ramp"])
def test_an_encoded_map_is_a_shuffled_zlib_stream(kind, dtype):
    rng = np.random.default_rng(0)
    values = {
        "noise": rng.normal(size=(64, 64)) * 40,
        "relu": np.maximum(rng.normal(size=(64, 64)), 0) * 40,
        "smooth": smooth(1, 64)[0] % 100,
        "zeros": np.zeros((64, 64)),
        "nan": np.full((64, 64), 0 if dtype == "u1" else np.nan),
        "ramp": np.linspace(0, 100, 64 * 64).reshape(64, 64),
    }[kind]
    row = np.abs(values).astype(dtype)
    plain = zlib.decompress(encode(row))
    unshuffled = np.frombuffer(plain, np.uint8).reshape(row.itemsize, -1).T.tobytes()
    assert unshuffled == row.tobytes()


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 2), (2, 3, 33, 31), (1, 224, 224)])
def test_encoded_maps_read_as_plain_hdf5(tmp_path, shape):
    maps = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    twisted = np.moveaxis(np.moveaxis(maps, 1, -1).copy(), -1, 1)  # not contiguous
    items = [Input(f"{i}", f"/{i}", 1, 1, None) for i in range(shape[0])]
    with open_store(tmp_path, record(), items) as store:
        for number, rows in store.todo():
            columns = {"explanations/image": np.arange(rows.start, rows.stop), "heatmaps/raw": twisted[rows]}
            store.commit(number, Part({**columns, "heatmaps/ready": encoded(twisted[rows])}))
        store.merge()
    with h5py.File(tmp_path / "results.h5") as file:
        np.testing.assert_array_equal(file["heatmaps/raw"][...], maps)
        np.testing.assert_array_equal(file["heatmaps/ready"][...], maps)


def upsampled(rows, size, cells=16):
    """Maps like those of a CAM: random cells, interpolated."""
    coarse = np.random.default_rng(0).normal(size=(rows, cells, cells))
    at = np.linspace(0, cells - 1, size)
    weights = np.array([np.interp(at, np.arange(cells), unit) for unit in np.eye(cells)])  # (cells, size)
    return np.einsum("nij,ia,jb->nab", coarse, weights, weights).astype(np.float32)


@pytest.mark.parametrize("floor", [-np.inf, 0])
def test_maps_shrink_about_as_much_as_with_plain_gzip(tmp_path, floor):
    maps = np.maximum(upsampled(4, 128), floor)
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        plain = file.create_dataset(
            "a", data=maps, chunks=(1, 128, 128), compression="gzip", compression_opts=1, shuffle=True
        )
        assert sum(map(len, encoded(maps).chunks)) < 1.15 * plain.id.get_storage_size()
    assert len(encode(np.zeros((224, 224), np.float32))) < 1000


def test_a_part_must_fit(tmp_path):
    good = part(slice(4, 8)).columns
    with opened(tmp_path, shard=(2, 2)) as store:
        for number, columns, words in [
            (0, good, "another shard"),
            (1, part(slice(0, 4)).columns, "leaves the rows"),
            (1, {**good, "images/label": np.zeros(3)}, "images/label has 3 rows, expected 4"),
            (1, {**good, "status/gradcam": np.zeros(1)}, "status/gradcam has 1 rows"),
            (1, {**good, "images/path": ["a"] * 4}, "added by the store"),
            (
                1,
                {key: value for key, value in good.items() if key != "explanations/image"},
                "needs explanations/image",
            ),
        ]:
            with pytest.raises(ValueError, match=words):
                store.commit(number, Part(columns))
        with pytest.raises(ValueError, match="not there"):
            store.commit(1, Part(good, {"heatmaps/none": {"a": 1}}))
        assert not (tmp_path / "parts").exists() or not list((tmp_path / "parts").iterdir())
