"""Random numbers by counting: pinned, written out in whole numbers, and tried as random numbers are.

Statistical tests draw from fixed seeds, so they pass or fail for good; bounds are some five standard errors.
"""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from xcli import draws

FIELDS, COUNT = 64, 4096
ROOT = torch.full((FIELDS,), 2024)
KINDS = {
    "samples of one seed": draws.sampled(ROOT, torch.arange(FIELDS)),
    "consecutive seeds": torch.arange(FIELDS),
    "seeds of images": torch.tensor([draws.seed_of(0, f"image-{i}", "smoothgrad") for i in range(FIELDS)]),
    "one sample of many seeds": draws.sampled(torch.arange(FIELDS), torch.ones(FIELDS, dtype=torch.long)),
}
SEEDS = torch.tensor([0, 1, -1, 2**31, 2**32, 2**62 + 12345, -(2**63), 2**63 - 1])


def standard(kind: str, how: str) -> Tensor:
    """Fields (FIELDS, COUNT) that should be independent, of mean 0 and variance 1."""
    if how == "normal":
        return draws.normal(KINDS[kind], (COUNT,)).double()
    return (draws.uniform(KINDS[kind], COUNT) - 0.5) * math.sqrt(12)


def assert_uncorrelated(products: Tensor, what: str = "") -> None:
    """Means of products of independent numbers, each scaled to mean 0 and variance 1: neither is one too large, nor are
    all of them together."""
    count = products.numel()
    assert products.abs().max() < stats.norm.isf(1e-4 / count), what
    assert abs(products.square().mean() - 1) < 5 * math.sqrt(2 / count), what


# ---- which numbers ---------------------------------------------------------------------------------------------


def scrambled(word: int) -> int:
    """lowbias32 of unsigned 32-bit numbers."""
    word ^= word >> 16
    word = word * 0x7FEB352D % 2**32
    word ^= word >> 15
    word = word * 0x846CA68B % 2**32
    return word ^ word >> 16


def word_of(seed: int, place: int) -> int:
    """The unsigned word of a seed at a place that counts from 1."""
    counted, high = scrambled(place * 0x9E3779B9 % 2**32), (seed >> 32) % 2**32
    low = scrambled(seed % 2**32 ^ scrambled(high ^ 0x9E3779B9))
    return scrambled(scrambled(counted ^ low) ^ high)


def signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def test_the_first_numbers_of_some_seeds_never_change():
    """Whoever changes these changes every map that noise has a part in."""
    assert draws.words(torch.tensor([0, 1, 2**62 + 12345]), 3).tolist() == [
        [198141621, 1337011860, 666460393],
        [-1962372981, 509041179, -32152565],
        [-476942276, 747869837, -178607561],
    ]
    own = draws.sampled(torch.tensor([0, 0, 1, 2**40]), torch.tensor([0, 1, 0, 3]))
    assert own.tolist() == [
        -2182497246449401493,
        1332680478687864647,
        6354187424102136902,
        1435265651675571909,
    ]
    numbers = draws.normal(torch.tensor([0, 1]), (3,))
    expected = [[1.2251551, -0.1860098, 1.8069685], [0.4241298, -1.0712152, -0.0199643]]
    torch.testing.assert_close(numbers, torch.tensor(expected), rtol=0, atol=1e-6)
    assert draws.seed_of(0, "image-0", "smoothgrad") == 6951345065250731710


@pytest.mark.parametrize("seed", SEEDS.tolist())
def test_words_are_those_of_the_scrambler_in_whole_numbers(seed):
    expected = [signed(word_of(seed, place)) for place in range(1, 12)]
    found = draws.words(torch.tensor([seed]), 11)
    assert found.dtype == torch.int32
    assert found[0].tolist() == expected


def test_uniform_numbers_are_the_words_in_their_order_scaled_to_the_unit_interval():
    found = draws.uniform(SEEDS, 9)
    for seed, own in zip(SEEDS.tolist(), found.tolist(), strict=True):
        words = [signed(word_of(seed, place)) for place in range(1, 10)]
        assert own == [(word + 2**31 + 0.5) / 2**32 for word in words]


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_normal_numbers_are_those_of_box_and_muller_of_a_word_and_the_one_half_a_field_on(count):
    half = (count + 1) // 2
    for seed, own in zip(SEEDS.tolist(), draws.normal(SEEDS, (count,)).tolist(), strict=True):
        words = [signed(word_of(seed, place)) for place in range(1, 2 * half + 1)]
        radius = [math.sqrt(-2 * math.log(abs(word) / 2**31)) for word in words[:half]]
        angle = [2 * math.pi * word / 2**32 for word in words[half:]]
        cosines = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
        sines = [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
        assert own == pytest.approx((cosines + sines)[:count], rel=1e-5, abs=1e-6)


def test_the_seed_of_a_sample_mixes_two_words_of_its_seed_with_the_sample():
    for seed in SEEDS.tolist():
        for sample in (0, 1, 49, 2**31 + 5):
            first, second = word_of(seed, 1), word_of(seed, 2)
            step = sample * 0x9E3779B9 % 2**32
            high = scrambled((scrambled(first ^ step) + second) % 2**32)
            low = scrambled((scrambled(second ^ step) + first) % 2**32)
            found = draws.sampled(torch.tensor([seed]), torch.tensor([sample]))
            assert found.tolist() == [signed(high) * 2**32 + low]


def test_the_scrambler_sends_different_words_to_different_words():
    """It is one to one, so a field never repeats a word, and no two samples of a seed share their own seed."""
    words = draws.words(torch.tensor([5]), 2**18)[0]
    assert len(words.unique()) == 2**18
    own = draws.sampled(torch.tensor([5]).expand(2**18), torch.arange(2**18))
    assert len((own >> 32).unique()) == 2**18


def test_seeds_of_samples_are_distinct_among_many_seeds():
    seed, sample = torch.arange(300).repeat_interleave(500), torch.arange(500).repeat(300)
    own = draws.sampled(seed, sample)
    assert own.dtype == torch.int64
    assert len(own.unique()) == 300 * 500
    assert not torch.isin(own, torch.arange(300)).any()


# ---- of what they are a function -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 31, 64, 147, 1001])
def test_a_field_depends_on_its_own_seed_alone(count):
    for draw in (draws.words, draws.uniform, lambda seed, n: draws.normal(seed, (n,))):
        whole = draw(SEEDS, count)
        assert whole.shape == (len(SEEDS), count)
        assert torch.equal(torch.cat([draw(seed[None], count) for seed in SEEDS]), whole)
        assert torch.equal(draw(SEEDS.flip(0), count).flip(0), whole)
        assert torch.equal(draw(SEEDS.repeat(3), count), whole.repeat(3, 1))
    samples = torch.arange(len(SEEDS))
    own = draws.sampled(SEEDS, samples)
    assert torch.equal(torch.cat([draws.sampled(SEEDS[i : i + 1], samples[i : i + 1]) for i in samples]), own)


def test_numbers_come_again_whatever_torch_has_drawn_and_draw_nothing_from_it():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, state = draws.normal(SEEDS, (3, 5)), torch.get_rng_state()
        torch.rand(7)
        before = torch.get_rng_state()
        assert torch.equal(draws.normal(SEEDS, (3, 5)), first)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.equal(state, before)


def test_seeds_and_samples_handed_over_stay_as_they_were():
    seed, sample = SEEDS.clone(), torch.arange(len(SEEDS))
    draws.sampled(seed, sample)
    draws.words(seed, 5)
    draws.normal(seed, (5,))
    draws.uniform(seed, 5)
    assert torch.equal(seed, SEEDS)
    assert torch.equal(sample, torch.arange(len(SEEDS)))


@pytest.mark.parametrize("draw", [draws.words, draws.uniform])
def test_a_longer_field_begins_as_the_shorter_one(draw):
    assert torch.equal(draw(SEEDS, 50)[:, :20], draw(SEEDS, 20))


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 5, 7), (1, 1, 1), (3, 8, 6)])
def test_a_field_has_the_shape_asked_for_and_an_odd_one_lacks_the_last_of_the_next_even_one(shape):
    found, total = draws.normal(SEEDS, shape), math.prod(shape)
    assert found.shape == (len(SEEDS), *shape)
    assert found.dtype == torch.float32
    assert torch.equal(found.flatten(1), draws.normal(SEEDS, (total,)))
    assert torch.equal(found.flatten(1), draws.normal(SEEDS, (total + total % 2,))[:, :total])


def test_no_seed_gives_no_field():
    none = torch.zeros(0, dtype=torch.long)
    assert draws.normal(none, (3, 4, 5)).shape == (0, 3, 4, 5)
    assert draws.uniform(none, 4).shape == (0, 4)
    assert draws.sampled(none, none).shape == (0,)


def test_seeds_are_hashes_of_all_their_parts_in_order():
    digest = hashlib.sha256(b"0\0photos/cat.png\0smoothgrad").digest()
    assert draws.seed_of(0, "photos/cat.png", "smoothgrad") == int.from_bytes(digest[:8], "big") // 2
    parts = [("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ("a", ""), (1, 2), (12,), ("",), ()]
    seeds = [draws.seed_of(*own) for own in parts]
    assert len(set(seeds)) == len(parts) - 1  # nothing at all is as one empty text
    assert draws.seed_of("") == draws.seed_of()
    assert draws.seed_of(1, "x") == draws.seed_of("1", "x")
    many = torch.tensor([draws.seed_of(0, i) for i in range(400)])  # int64 holds them
    assert many.min() >= 0
    assert many.max() > 2**62


def test_a_file_name_that_is_no_text_has_a_seed():
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    digest = hashlib.sha256(b"caf\xe9.png").digest()
    assert draws.seed_of(name) == int.from_bytes(digest[:8], "big") >> 1


# ---- how random ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_normal_numbers_have_the_moments_and_the_distribution_of_their_name(kind):
    z = draws.normal(KINDS[kind], (COUNT,)).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.square().mean() - 1) < 4 * math.sqrt(2 / n)
    assert abs(z.pow(3).mean()) < 4 * math.sqrt(15 / n)
    assert abs(z.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_uniform_numbers_have_the_moments_and_the_distribution_of_their_name(kind):
    u = draws.uniform(KINDS[kind], COUNT).flatten()
    n = len(u)
    assert u.dtype == torch.float64
    assert abs(u.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / n)
    assert abs((u - 1 / 2).pow(4).mean() - 1 / 80) < 4 * math.sqrt((1 / 2304 - 1 / 6400) / n)
    assert stats.kstest(u.numpy(), "uniform").pvalue > 1e-3


def test_both_halves_of_a_field_and_each_place_of_many_fields_are_normal():
    """One half are cosines, the other sines; a place is the same counter under many seeds."""
    halves = standard("samples of one seed", "normal").unflatten(1, (2, COUNT // 2))
    for half in (0, 1):
        assert stats.kstest(halves[:, half].flatten().numpy(), "norm").pvalue > 1e-3
    places = draws.normal(draws.sampled(torch.full((4000,), 7), torch.arange(4000)), (8,)).double()
    assert min(stats.kstest(place.numpy(), "norm").pvalue for place in places.T) > 1e-3


def test_tails_are_as_heavy_as_they_should_be_and_finite():
    z = draws.normal(draws.sampled(torch.full((20,), 3), torch.arange(20)), (100_000,)).double()
    assert torch.isfinite(z).all()
    assert z.abs().max() < 6.7
    for beyond in (2.0, 3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(beyond) * z.numel()
        assert abs(int((z.abs() > beyond).sum()) - expected) < 4 * math.sqrt(expected), beyond


@pytest.mark.parametrize(
    ("word", "size"), [(0, 6.66), (-1, 6.56), (1, 6.56), (-(2**31), 0.0), (2**31 - 1, 0.0)]
)
def test_no_word_gives_more_than_its_largest_number(word, size, monkeypatch):
    """The extreme words, as the radius and at the angles 0, a quarter and a half of a turn."""
    for angle in (0, 2**30, -(2**31), -(2**30)):
        pair = torch.tensor([[word, angle]], dtype=torch.int32)
        monkeypatch.setattr(draws, "words", lambda _seed, _count, pair=pair: pair.clone())
        found = draws.normal(torch.tensor([0]), (2,))
        assert torch.isfinite(found).all()
        assert float(found.norm()) == pytest.approx(size, abs=0.005)
        assert found.abs().max() < 6.7


@pytest.mark.parametrize("word", [-(2**31), 0, 2**31 - 1])
def test_uniform_numbers_reach_neither_end(word, monkeypatch):
    monkeypatch.setattr(draws, "words", lambda _seed, _count: torch.tensor([[word]], dtype=torch.int32))
    found = draws.uniform(torch.tensor([0]), 1).item()
    assert 0 < found < 1
    assert found == (word + 2**31 + 0.5) / 2**32


@pytest.mark.parametrize("how", ["normal", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_places_do_not_tell_of_each_other(kind, how):
    """At every distance, in the numbers and in their squares; the two of a pair are half a field apart."""
    z = standard(kind, how)
    for what, own in {"values": z, "squares": z.square() - 1}.items():
        own = own / own.square().mean().sqrt()
        spectrum = torch.fft.rfft(own, n=2 * COUNT).abs().square()
        sums = torch.fft.irfft(spectrum, n=2 * COUNT)[:, 1 : COUNT - 64].sum(0)
        pairs = FIELDS * (COUNT - torch.arange(1, COUNT - 64))
        assert_uncorrelated(sums / pairs.sqrt(), what)


@pytest.mark.parametrize("how", ["normal", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_fields_of_different_samples_and_seeds_do_not_tell_of_each_other(kind, how):
    z = standard(kind, how)
    above = torch.ones(FIELDS, FIELDS).triu(1).bool()
    for what, own in {"values": z, "squares": z.square() - 1}.items():
        own = own / own.square().mean().sqrt()
        assert_uncorrelated((own @ own.T)[above] / math.sqrt(COUNT), what)
    shifted = (z[:, 1:] @ z[:, :-1].T)[~torch.eye(FIELDS).bool()] / math.sqrt(COUNT - 1)
    assert_uncorrelated(shifted, "the place before")


def test_no_field_is_another_one_moved():
    """The largest correlation of neighbouring samples and seeds over all shifts, of values of one sign or the other."""
    for kind in KINDS:
        z = draws.normal(KINDS[kind][:8], (COUNT,)).double()
        spectra = torch.fft.rfft(z)
        for first in range(7):
            moved = torch.fft.irfft(spectra[first] * spectra[first + 1].conj(), n=COUNT)
            assert_uncorrelated(moved / math.sqrt(COUNT), kind)


def test_every_bit_of_a_word_is_set_half_of_the_time_and_bits_do_not_tell_of_each_other():
    words = draws.words(KINDS["samples of one seed"], COUNT).flatten().long()
    bits = torch.stack([(words >> bit & 1).double() * 2 - 1 for bit in range(32)])
    assert_uncorrelated(bits.sum(1) / math.sqrt(len(words)))
    assert_uncorrelated((bits @ bits.T)[torch.ones(32, 32).triu(1).bool()] / math.sqrt(len(words)))


def test_one_bit_of_the_sample_or_of_its_place_changes_half_of_the_bits_of_what_follows():
    seed, count = torch.full((512,), 11), torch.arange(512)
    for bit in range(9):
        one, other = (draws.words(draws.sampled(seed, sample), 16) for sample in (count, count ^ 1 << bit))
        changed = sum((one ^ other).long() >> place & 1 for place in range(32)).double()
        assert abs(changed.mean() - 16) < 5 * math.sqrt(32 / 4 / changed.numel())
    near, far = draws.words(KINDS["consecutive seeds"], COUNT).unflatten(1, (-1, 2)).unbind(2)
    changed = sum((near ^ far).long() >> place & 1 for place in range(32)).double()
    assert abs(changed.mean() - 16) < 5 * math.sqrt(32 / 4 / changed.numel())
