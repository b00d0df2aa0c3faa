"""Names of pictures: safe, one for each image; and the threads that write them."""

import threading
import unicodedata
from hashlib import sha256
from itertools import combinations, count
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from xcli.errors import OutputUnwritable
from xcli.pictures import Namer, PictureWriter, picture_path, safe

ROOT = Path("out")
RED = Image.new("RGB", (8, 6), (255, 0, 0))


# names


def names_of(*paths):
    namer = Namer(paths)
    return [namer[path] for path in paths]


def tag(path):
    return "~" + sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@pytest.mark.parametrize(
    "path",
    ["photo.jpg", "a/b/photo.jpg", "a b/ü ß.JPEG", "日本/猫.png", ".hidden.jpg", "x.tmp/a.jpg", "no-ending"],
)
def test_ordinary_names_stay_as_they_are(path):
    assert names_of(path) == [path]


def test_the_ending_is_kept_so_that_two_formats_do_not_meet():
    assert names_of("a.jpg", "a.png") == ["a.jpg", "a.png"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a:b.jpg", "a_b.jpg"),
        ("a\nb\x1b[0m.jpg", "a_b_[0m.jpg"),
        ("a\u202eb.jpg", "a_b.jpg"),
        ("caf\udce9.jpg", "caf_.jpg"),
        ("-rf.jpg", "_-rf.jpg"),
        ("-d/a.jpg", "_-d/a.jpg"),
        ("CON.jpg", "_CON.jpg"),
        ("nul/a.jpg", "_nul/a.jpg"),
        ("lpt1 .x.jpg", "_lpt1 .x.jpg"),
        ("a. /b.jpg", "a/b.jpg"),
        ("b.jpg .", "b.jpg"),
        ("../../etc/passwd", "_/_/etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("a/./b.jpg", "a/b.jpg"),
        ("a.jpg.PNG/b.jpg", "a.jpg_PNG/b.jpg"),
        (".a.png.tmp/b.jpg", ".a_png.tmp/b.jpg"),
    ],
)
def test_a_changed_name_stays_readable_and_is_marked(path, name):
    assert names_of(path) == [name + tag(path)]


def test_long_components_are_cut_between_characters():
    path = "é" * 120 + "/" + "猫" * 80 + ".jpg"  # 240 and 244 bytes
    folder, file = names_of(path)[0].split("/")
    assert folder == "é" * 99
    assert file == "猫" * 63 + tag(path)
    assert len(file.encode()) <= 200


@pytest.mark.parametrize(
    "twins",
    [
        ("a/Photo.jpg", "a/photo.JPG"),
        ("A/photo.jpg", "a/photo.jpg"),
        (unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.jpg")),
        (unicodedata.normalize("NFC", "É.jpg"), unicodedata.normalize("NFD", "é.jpg")),
        ("straße.jpg", "STRASSE.jpg"),
        ("ẞ.jpg", "ß.jpg"),
    ],
)
def test_twins_are_both_marked_and_others_are_not(twins):
    assert names_of(*twins, "b.jpg") == [twins[0] + tag(twins[0]), twins[1] + tag(twins[1]), "b.jpg"]


def test_names_do_not_depend_on_the_order():
    paths = ["a.jpg", "A.jpg", "b?.jpg", "b_.jpg", "c", "c.0", "a.jpg"]
    backwards = Namer(reversed(paths))
    assert [backwards[path] for path in paths] == names_of(*paths)


def test_a_name_that_looks_marked_is_marked():
    twin = "a.jpg"
    imitation = "a.jpg" + tag(twin)
    assert names_of(twin, "A.jpg", imitation) == [
        imitation,
        "A.jpg" + tag("A.jpg"),
        imitation + tag(imitation),
    ]


def test_a_row_of_one_image_never_meets_another_image():
    first, second = names_of("cat", "cat.0")
    assert picture_path(ROOT, "overlay", "m", first, "0") != picture_path(ROOT, "overlay", "m", second)


def test_equal_digits_get_longer_ones():
    stem = "x" * 250  # cut, so only the digits tell them apart
    seen: dict[str, str] = {}
    for number in count():
        path = f"{stem}{number}"
        other = seen.setdefault(tag(path), path)
        if other != path:
            break
    first, second = names_of(other, path)
    assert first != second
    assert max(len(first), len(second)) <= 200


NAMES = st.lists(
    st.one_of(
        st.binary(min_size=1, max_size=12).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
        st.text("aAéÉe\u0301ß.~0/:- ", min_size=1, max_size=8),
        st.sampled_from(["a", "a.0", "A.0", "a.png/b", "..", "con", "x" * 300, "x" * 301]),
    ),
    min_size=1,
    max_size=8,
    unique=True,
)


def on_disk(path):
    """What a file system that ignores case and Unicode form sees."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).upper())


@settings(max_examples=300, deadline=None)
@given(NAMES)
@example(["a", "A", "a.0", "a~0cc175b9"])
def test_pictures_are_safe_and_never_collide(paths):
    namer = Namer(paths)
    pictures = {
        path: [picture_path(ROOT, "panel", "", namer[path], row) for row in (None, "0", "1")]
        for path in paths
    }
    for first, second in combinations(paths, 2):
        assert not {on_disk(str(p)) for p in pictures[first]} & {on_disk(str(p)) for p in pictures[second]}
    files = {on_disk(str(p)) for several in pictures.values() for p in several}
    for several in pictures.values():
        for path in several:
            relative = PurePosixPath(path).relative_to(ROOT / "panels")
            assert not {on_disk(str(parent)) for parent in path.parents} & files
            for part in relative.parts:
                assert not {unicodedata.category(c) for c in part} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
                assert not set(part) & set('<>:"\\|?*')
                assert part not in {".", ".."}
                assert part[0] != "-"
                assert part[-1] not in " ."
                assert len(part.encode()) <= 240


@given(st.text(max_size=30))
def test_making_safe_twice_changes_nothing_more(component):
    name, changed = safe(component)
    assert safe(name) == (name, False)
    assert changed == (name != component)


def test_where_pictures_lie():
    assert picture_path(ROOT, "overlay", "gradcam", "a/b.jpg") == Path("out/overlays/gradcam/a/b.jpg.png")
    assert picture_path(ROOT, "heatmap", "rise-4k", "b.jpg", "281") == Path(
        "out/heatmaps/rise-4k/b.jpg.281.png"
    )
    assert picture_path(ROOT, "panel", "gradcam", "a/b.jpg") == Path("out/panels/a/b.jpg.png")
    assert picture_path(ROOT, "panel", "", "b.jpg", "../x~1") == Path("out/panels/b.jpg.___x_1.png")
    assert picture_path(ROOT, "overlay", "a/b", "c.jpg") == Path(f"out/overlays/a_b{tag('a/b')}/c.jpg.png")


# the writer


def read(path):
    with Image.open(path) as image:
        image.load()
        return image


def tree(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


class Held(Image.Image):
    """A picture whose encoding waits until it is let go; tells when it began."""

    def __init__(self):
        super().__init__()
        self._im, self._size, self._mode = RED._im, RED.size, RED.mode
        self.began, self.let_go = threading.Event(), threading.Event()

    def save(self, *args, **options):
        self.began.set()
        assert self.let_go.wait(10)
        super().save(*args, **options)


def test_pictures_are_written_and_nothing_else(tmp_path):
    with PictureWriter(2) as writer:
        for index in range(20):
            writer.write(tmp_path / f"d{index % 3}" / f"{index}.png", Image.new("RGB", (5, 4), (index, 0, 9)))
    assert tree(tmp_path) == sorted(f"d{index % 3}/{index}.png" for index in range(20))
    assert read(tmp_path / "d1" / "7.png").getpixel((0, 0)) == (7, 0, 9)


def test_flush_returns_when_all_is_in_place(tmp_path):
    with PictureWriter(1) as writer:
        for index in range(5):
            writer.write(tmp_path / f"{index}.png", RED)
        writer.flush()
        assert len(tree(tmp_path)) == 5
        writer.write(tmp_path / "after.png", RED)
    assert len(tree(tmp_path)) == 6


def test_a_palette_picture_stays_one(tmp_path):
    indexed = Image.new("P", (4, 4))
    indexed.putpalette(bytes(range(256)) * 3)
    with PictureWriter() as writer:
        writer.write(tmp_path / "p.png", indexed)
    assert read(tmp_path / "p.png").mode == "P"


def test_write_blocks_while_too_much_waits(tmp_path):
    held, third_is_in = Held(), threading.Event()
    large = Image.new("RGB", (512, 300))  # 0.6 MiB of 1 MiB

    def produce():
        with PictureWriter(1, pending_mib=1) as writer:
            writer.write(tmp_path / "1.png", held)
            writer.write(tmp_path / "2.png", large)
            writer.write(tmp_path / "3.png", large)
            third_is_in.set()

    producer = threading.Thread(target=produce)
    producer.start()
    assert held.began.wait(10)
    assert not third_is_in.wait(0.2)
    held.let_go.set()
    producer.join(10)
    assert third_is_in.is_set()
    assert tree(tmp_path) == ["1.png", "2.png", "3.png"]


def test_what_is_written_makes_room_again(tmp_path):
    held = Held()
    with PictureWriter(1, pending_mib=1) as writer:
        for index in range(4):
            writer.write(tmp_path / f"{index}.png", Image.new("RGB", (512, 300)))
        writer.flush()
        threading.Timer(0.5, held.let_go.set).start()
        writer.write(tmp_path / "held.png", held)
        writer.write(tmp_path / "next.png", RED)
        assert not held.let_go.is_set()  # it did not have to wait for the one before


def test_a_failure_is_told_at_the_next_write(tmp_path):
    (tmp_path / "d").write_text("a file")
    with PictureWriter(1) as writer:
        writer.write(tmp_path / "d" / "1.png", RED)
        next(iter(writer._pending))[0].exception(10)
        with pytest.raises(OutputUnwritable, match=r"1\.png"):
            writer.write(tmp_path / "2.png", RED)
        writer._failure = None
    assert tree(tmp_path) == ["d"]


def test_one_picture_above_the_limit_still_goes_through(tmp_path):
    with PictureWriter(1, pending_mib=1) as writer:
        writer.write(tmp_path / "large.png", Image.new("RGB", (1000, 1000)))
    assert read(tmp_path / "large.png").size == (1000, 1000)


def test_the_same_path_twice_keeps_the_later(tmp_path):
    with PictureWriter(2) as writer:
        for shade in range(30):
            writer.write(tmp_path / "same.png", Image.new("L", (4, 4), shade))
    assert read(tmp_path / "same.png").getpixel((0, 0)) == 29


def test_a_file_in_the_place_of_a_folder_is_reported_at_the_end(tmp_path):
    (tmp_path / "d").write_text("a file")
    with pytest.raises(OutputUnwritable, match=r"d/1\.png"), PictureWriter(1) as writer:
        writer.write(tmp_path / "d" / "1.png", RED)
    assert tree(tmp_path) == ["d"]


def test_after_a_failure_every_call_says_so(tmp_path):
    (tmp_path / "d").write_text("a file")
    writer = PictureWriter(1)
    writer.write(tmp_path / "d" / "1.png", RED)
    for _ in range(2):
        with pytest.raises(OutputUnwritable, match=r"1\.png"):
            writer.flush()
    with pytest.raises(OutputUnwritable, match=r"1\.png"):
        writer.write(tmp_path / "2.png", RED)
    with pytest.raises(OutputUnwritable, match=r"1\.png"):
        writer.__exit__(None, None, None)
    assert tree(tmp_path) == ["d"]


def test_after_a_failure_nothing_that_waits_is_tried(tmp_path):
    (tmp_path / "d").write_text("a file")
    held = Held()
    writer = PictureWriter(1)
    writer.write(tmp_path / "d" / "1.png", held)
    for index in range(2, 300):
        writer.write(tmp_path / f"{index}.png", Image.new("RGB", (200, 200)))
    held.let_go.set()
    with pytest.raises(OutputUnwritable, match=r"1\.png"):
        writer.flush()
    with pytest.raises(OutputUnwritable, match=r"1\.png"):
        writer.__exit__(None, None, None)
    assert len(tree(tmp_path)) < 150


def test_a_failed_rename_leaves_nothing_and_an_old_picture_whole(tmp_path, monkeypatch):
    old = tmp_path / "1.png"
    old.write_bytes(b"old")

    def refuse(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputUnwritable, match="No space left"), PictureWriter(1) as writer:
        writer.write(old, RED)
    assert tree(tmp_path) == ["1.png"]
    assert old.read_bytes() == b"old"


def test_a_picture_is_never_seen_half_written(tmp_path, monkeypatch):
    seen = []
    replace = Path.replace

    def look(self, target):
        seen.append((tree(tmp_path), read(self).size))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    with PictureWriter(1) as writer:
        writer.write(tmp_path / "1.png", RED)
    assert seen == [([".1.png.tmp"], (8, 6))]


def test_a_leftover_of_a_killed_run_is_overwritten(tmp_path):
    (tmp_path / ".1.png.tmp").write_bytes(b"half")
    with PictureWriter(1) as writer:
        writer.write(tmp_path / "1.png", RED)
    assert tree(tmp_path) == ["1.png"]


def test_an_exception_in_the_block_drops_what_waits(tmp_path):
    held = Held()

    def stopped():
        with PictureWriter(1) as writer:
            writer.write(tmp_path / "1.png", held)
            for index in range(2, 50):
                writer.write(tmp_path / f"{index}.png", RED)
            assert held.began.wait(10)
            threading.Timer(0.1, held.let_go.set).start()
            raise RuntimeError("the run stopped")

    with pytest.raises(RuntimeError, match="the run stopped"):
        stopped()
    assert tree(tmp_path) == ["1.png"]  # what was being encoded is finished
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("png")]


def test_a_picture_that_cannot_be_encoded_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(OSError, match="cannot write mode F"), PictureWriter(1) as writer:
        writer.write(tmp_path / "1.png", Image.new("F", (2, 2)))
    assert tree(tmp_path) == []
