"""Noise: a pure function of key and position, the same bits from both implementations, and honest statistics.

Everything replayed later depends on these bits, so the format itself is pinned by hashes: a change of the noise must be a
decision, never an accident.
"""

import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_zo import noise

KEY = noise.stream_key(42, 7, 1, "direction", "model.layers.0.self_attn.q_proj.weight")
WORD = st.integers(0, 2**64 - 1)
FACTOR = st.floats(-1e3, 1e3)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(INTEGER[x.dtype])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((bits(a) == bits(b)).all())


def weights(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def any_finite(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Tensors of random bits: both zeros, subnormals and the largest numbers included, infinities and NaNs not."""
    generator = torch.Generator().manual_seed(seed)
    width = 8 * dtype.itemsize
    raw = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (n,), generator=generator).to(INTEGER[dtype])
    x = raw.view(dtype)
    usual = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    return torch.where(torch.isfinite(x) & (torch.arange(n) % 3 == 0), x, usual)


def by_torch(theta: torch.Tensor, keys, factors, kind="gaussian", decay=1.0, rounding_key=None) -> torch.Tensor:
    out = torch.empty_like(theta)
    noise._displace_torch(out, theta, keys, factors, kind, decay, rounding_key)
    return out


def by_numba(theta: torch.Tensor, keys, factors, kind="gaussian", decay=1.0, rounding_key=None) -> torch.Tensor:
    out = torch.empty_like(theta)
    noise._displace_numba(out, theta, keys, factors, kind, decay, rounding_key)
    return out


# ---- the format ----------------------------------------------------------------------------------------------------


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_format_of_keys():
    assert KEY == 10726050278874986738
    assert noise.stream_key(0, 0, 0, "direction", "w") != noise.stream_key(0, 0, 0, "directio", "nw")
    # the separator keeps purpose and name apart
    assert noise.stream_key(0, 0, 0, "a", "bc") != noise.stream_key(0, 0, 0, "ab", "c")


def test_format_of_table():
    assert sha256(noise.normal_table()) == "cf2349117ae90c48b0a4bc4e7b30b20df20af216639be137d91d8491da46080a"


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("gaussian", "fabe34b8c01e9e68fa74ad7dc9e4c222e3c6d17559da47b99ded64042630720b"),
        ("rademacher", "186d44d38a2f150ff1554aab6b6ef312c3df6cbd61ce9e36b647ac91ecb49ee7"),
    ],
)
def test_format_of_directions(kind, digest):
    assert sha256(noise.sample(KEY, (1000,), kind=kind).numpy()) == digest
    assert sha256(by_torch(torch.zeros(1000), [KEY], [1.0], kind).numpy()) == digest


def test_format_of_uniforms():
    assert sha256(noise.uniform(KEY, 1000).numpy()) == "90ed3196b123b4fc2310b1a28cad8cf298cb309914492ef4a8f1eddeeb32ebb2"


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        (torch.bfloat16, "4dedf69fb7fcf8b216d8c0b39526adf6dc7e92a6dee0b0dc478db8f1b7dff834"),
        (torch.float16, "e634218fd5fc8b35b5ee171629658cc10bfea26f85694d415e6243335a1bcde9"),
    ],
)
def test_format_of_stochastic_rounding(dtype, digest):
    values = torch.arange(-500, 500, dtype=torch.float32) * (3 / 512) + 0.001
    assert sha256(bits(noise.round_stochastically(values, KEY, torch.empty(1000, dtype=dtype))).numpy()) == digest


def test_words_are_splitmix64():
    """The published generator, state += GOLDEN and then the finaliser, started at key - GOLDEN."""
    mask, state, outputs = 2**64 - 1, (KEY - noise.GOLDEN) % 2**64, []
    for _ in range(50):
        state = (state + 0x9E3779B97F4A7C15) & mask
        x = state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(x ^ (x >> 31))
    assert [x % 2**64 for x in noise._torch_words(KEY, 0, 50, torch.device("cpu")).tolist()] == outputs
    # four 16-bit fields a word, the lowest first
    table, z = noise.normal_table(), noise.sample(KEY, (200,))
    assert [table[(w >> shift) & 0xFFFF] for w in outputs for shift in (0, 16, 32, 48)] == z.tolist()
    signs = noise.sample(KEY, (3200,), kind="rademacher")
    assert [1.0 - 2.0 * ((w >> shift) & 1) for w in outputs for shift in range(64)] == signs.tolist()


# ---- two implementations, one result -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kind=st.sampled_from(["gaussian", "rademacher"]),
    terms=st.lists(st.tuples(WORD, FACTOR), max_size=4),
    decay=st.one_of(st.just(1.0), st.floats(0.5, 1.5)),
    rounding_key=st.one_of(st.none(), WORD),
    seed=st.integers(0, 2**31),
)
def test_numba_equals_torch(n, dtype, kind, terms, decay, rounding_key, seed):
    keys, factors = [k for k, _ in terms], [a for _, a in terms]
    theta = any_finite(n, dtype, seed)
    arguments = (theta, keys, factors, kind, decay, rounding_key)
    assert same_bits(by_numba(*arguments), by_torch(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_numba_equals_torch_in_parallel(dtype, kind):
    """Above the size where the kernel starts threads, with a ragged last block, for any number of threads."""
    theta = weights((150_001,), dtype)
    expected = by_torch(theta, [KEY, 5], [0.3, -0.1], kind, 0.99, 77)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same_bits(by_numba(theta, [KEY, 5], [0.3, -0.1], kind, 0.99, 77), expected)


def test_torch_keeps_its_threads():
    """In a process of its own: Numba's threads start once."""
    program = (
        "import torch; from hf_zo import noise; torch.set_num_threads(2);"
        f"noise.sample({KEY}, (200_001,)); noise.energy({KEY}, 200_001); print(torch.get_num_threads())"
    )
    environ = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2"]


def test_the_fast_implementation_is_the_one_in_use(monkeypatch):
    called = []
    monkeypatch.setattr(noise, "_displace_torch", lambda *args: called.append("torch"))
    monkeypatch.setattr(noise, "_displace_numba", lambda *args: called.append("numba"))
    for dtype in DTYPES:
        x = weights((10, 10), dtype)
        noise.displace(x, x, [1], [1.0])
    x = weights((10, 10), torch.float32).t()
    noise.displace(x, x, [1], [1.0])
    assert called == ["numba", "torch", "numba", "torch", "torch"]


def test_without_numba_the_bits_are_the_same(monkeypatch):
    theta = weights((70, 70), torch.bfloat16)
    fast = noise.displace(torch.empty_like(theta), theta, [KEY], [1e-3], rounding_key=3)
    monkeypatch.setattr(noise, "_kernel", lambda: None)
    assert same_bits(noise.displace(torch.empty_like(theta), theta, [KEY], [1e-3], rounding_key=3), fast)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rounding_key", [None, 9])
def test_any_chunking_gives_the_same_bits(dtype, kind, rounding_key, monkeypatch):
    theta = weights((333,), dtype)
    expected = by_torch(theta, [KEY, 5], [0.3, -0.1], kind, 0.99, rounding_key)
    for chunk in (1, 3, 7, 64, 100, 332, 333, 334):
        monkeypatch.setattr(noise, "_CHUNK", chunk)
        assert same_bits(by_torch(theta, [KEY, 5], [0.3, -0.1], kind, 0.99, rounding_key), expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_any_chunking_rounds_the_same(dtype, monkeypatch):
    values = weights((9, 37), torch.float32)
    expected = noise.round_stochastically(values, KEY, torch.empty(9, 37, dtype=dtype))
    for chunk in (1, 5, 64, 332, 333):
        monkeypatch.setattr(noise, "_CHUNK", chunk)
        assert same_bits(noise.round_stochastically(values, KEY, torch.empty(9, 37, dtype=dtype)), expected)


def test_a_longer_stream_begins_with_the_shorter_one():
    for kind in ("gaussian", "rademacher"):
        long = noise.sample(KEY, (100_003,), kind=kind)
        for n in (1, 2, 63, 65, 4095, 4097, 99_999):
            assert same_bits(noise.sample(KEY, (n,), kind=kind), long[:n])
    assert (noise.uniform(KEY, 1000)[:17] == noise.uniform(KEY, 17)).all()


@pytest.mark.parametrize("n", [1, 5, 4096, 4097, 200_001])
def test_energy_is_the_squared_norm_whatever_the_threads(n, monkeypatch):
    z = noise.sample(KEY, (n,)).double()
    by_numba = noise.energy(KEY, n)
    assert float(by_numba) == pytest.approx(float((z**2).sum()), abs=5 * math.sqrt(n) * 2.0**-16)
    torch.set_num_threads(2)
    assert torch.equal(noise.energy(KEY, n), by_numba)
    monkeypatch.setattr(noise, "_kernel", lambda: None)
    assert torch.equal(noise.energy(KEY, n), by_numba)
    assert float(noise.energy(KEY, n, kind="rademacher")) == n


@pytest.mark.parametrize("kernel", ["numba", "torch"])
def test_energy_of_pieces_adds_up_to_that_of_the_whole(kernel, monkeypatch):
    if kernel == "torch":
        monkeypatch.setattr(noise, "_kernel", lambda: None)
    whole = noise.energy(KEY, 100_003)
    for blocks, threads in ((3, 1), (35, 1), (35, 2)):  # 35: large enough for threads
        torch.set_num_threads(threads)
        monkeypatch.setattr(noise, "_WHOLE", blocks * 1024)  # of noise_numba, _BLOCK
        assert torch.equal(noise.energy(KEY, 100_003), whole)


def test_energy_of_more_numbers_than_add_up_in_64_bits(monkeypatch):
    """Each number counts about 2^32 units, so that 2^31 of them at once would be too many."""
    monkeypatch.setattr(noise, "_energy", lambda key, start, end, device: torch.tensor((end - start) << 32))
    assert float(noise.energy(KEY, (5 << 30) + 3)) == (5 << 30) + 3


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_matrix_has_a_low_rank_displacement(shape, dtype):
    theta = torch.empty(shape, dtype=dtype)
    terms = [(0.1, torch.ones(shape[0], 2), torch.ones(2, shape[1]))]
    assert noise.displace_low_rank(torch.empty_like(theta), theta, terms, decay=0.9).shape == shape
    assert noise.product(torch.ones(shape[0], 0), torch.ones(0, shape[1])).shape == shape


def test_c_order_of_any_shape():
    flat = noise.sample(KEY, (24,))
    assert same_bits(noise.sample(KEY, (2, 3, 4)), flat.view(2, 3, 4))
    assert same_bits(noise.sample(KEY, ()), flat[:1].view(()))
    assert noise.sample(KEY, (0, 5)).shape == (0, 5)


# ---- layouts -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced columns": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding_key", [None, 9])
def test_layout_does_not_matter(layout, dtype, rounding_key):
    plain = weights((33, 65), dtype)
    strange = LAYOUTS[layout](plain)
    assert not strange.is_contiguous()
    expected = noise.displace(torch.empty_like(plain), plain, [KEY], [0.1], decay=0.9, rounding_key=rounding_key)

    into_plain = noise.displace(torch.empty_like(plain), strange, [KEY], [0.1], decay=0.9, rounding_key=rounding_key)
    into_strange = LAYOUTS[layout](torch.zeros_like(plain))
    noise.displace(into_strange, plain, [KEY], [0.1], decay=0.9, rounding_key=rounding_key)
    noise.displace(strange, strange, [KEY], [0.1], decay=0.9, rounding_key=rounding_key)
    for result in (into_plain, into_strange, strange):
        assert same_bits(result, expected)


def test_neighbours_of_a_slice_are_left_alone():
    whole = weights((33, 65), torch.float32)
    before, part = whole.clone(), whole[:, 10:20]
    noise.displace(part, part, [KEY], [0.1])
    assert not torch.equal(whole[:, 10:20], before[:, 10:20])
    assert torch.equal(whole[:, :10], before[:, :10])
    assert torch.equal(whole[:, 20:], before[:, 20:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", NARROW)
def test_layout_does_not_matter_for_rounding(layout, dtype):
    values = weights((33, 65), torch.float32)
    expected = noise.round_stochastically(values, KEY, torch.empty(33, 65, dtype=dtype))
    assert same_bits(noise.round_stochastically(LAYOUTS[layout](values), KEY, torch.empty(33, 65, dtype=dtype)), expected)
    out = LAYOUTS[layout](torch.zeros(33, 65, dtype=dtype))
    assert same_bits(noise.round_stochastically(values, KEY, out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rounding_key", [None, 9])
def test_in_place_equals_out_of_place(dtype, kind, rounding_key):
    theta = weights((5000,), dtype)
    clean = theta.clone()
    out = noise.displace(torch.empty_like(theta), theta, [KEY, 2], [0.1, 3.0], kind=kind, decay=0.9, rounding_key=rounding_key)
    assert same_bits(theta, clean)
    returned = noise.displace(theta, theta, [KEY, 2], [0.1, 3.0], kind=kind, decay=0.9, rounding_key=rounding_key)
    assert returned is theta
    assert same_bits(theta, out)


# ---- arithmetic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_displace_is_the_dense_formula_rounded_once(dtype, kind):
    theta = weights((40_001,), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    value = theta.to(wide) * 0.99
    for key, a in ((KEY, 0.1), (2, -0.03), (3, 1e-3)):
        value = value + noise.sample(key, (40_001,), kind=kind).to(wide) * a
    result = noise.displace(torch.empty_like(theta), theta, [KEY, 2, 3], [0.1, -0.03, 1e-3], kind=kind, decay=0.99)
    assert same_bits(result, value.to(dtype))  # torch's own cast rounds to nearest, ties to even


@pytest.mark.parametrize("implementation", [by_numba, by_torch])
def test_ties_go_to_even(implementation):
    ulp = 2.0**-7  # of bf16 in [1, 2)
    theta = torch.tensor([1.0, 1 + ulp, 1 + 2 * ulp, 1 + 3 * ulp], dtype=torch.bfloat16).repeat(64)
    up = noise.sample(KEY, (256,), kind="rademacher") > 0
    half = implementation(theta, [KEY], [ulp / 2], "rademacher").float().view(64, 4)
    expected_up = torch.tensor([1.0, 1 + 2 * ulp, 1 + 2 * ulp, 1 + 4 * ulp]).expand(64, 4)
    # below 1 the spacing halves, so 1 - ulp/2 is a bf16 number
    expected_down = torch.tensor([1 - ulp / 2, 1.0, 1 + 2 * ulp, 1 + 2 * ulp]).expand(64, 4)
    assert torch.equal(half, torch.where(up.view(64, 4), expected_up, expected_down))


def test_fp64_accumulates_in_fp64():
    theta = torch.ones(1000, dtype=torch.float64)
    moved = noise.displace(torch.empty_like(theta), theta, [KEY], [1e-12])
    assert torch.equal(moved, 1.0 + noise.sample(KEY, (1000,)).double() * 1e-12)
    assert not torch.equal(moved, theta)


def test_rounding_key_is_ignored_for_wide_tensors():
    for dtype in (torch.float32, torch.float64):
        theta = weights((1000,), dtype)
        results = [noise.displace(torch.empty_like(theta), theta, [KEY], [0.1], rounding_key=k) for k in (None, 1, 2)]
        assert same_bits(results[0], results[1])
        assert same_bits(results[0], results[2])


def test_no_terms_leave_the_weights():
    for dtype in DTYPES:
        theta = weights((1000,), dtype)
        assert same_bits(noise.displace(torch.empty_like(theta), theta, [], []), theta)


def test_keys_and_coefficients_must_match():
    theta = weights((10, 10), torch.float64)
    with pytest.raises(ValueError, match="zip"):
        noise.displace(theta, theta, [1, 2], [1.0])


def test_rademacher_is_signs():
    signs = noise.sample(KEY, (100_000,), kind="rademacher")
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 5 / math.sqrt(100_000)


# ---- statistics ----------------------------------------------------------------------------------------------------


def test_table_moments():
    table = noise.normal_table()
    assert table.dtype == np.float32
    assert table.size == 65_536
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()
    wide = table.astype(np.float64)
    assert abs((wide**2).mean() - 1) < 1e-7
    assert abs((wide**4).mean() - 2.999) < 0.001
    assert abs((wide**6).mean() - 15.05) < 0.01
    assert 4.46 < wide.max() < 4.47


@pytest.mark.parametrize(("kind", "kurtosis", "sixth"), [("gaussian", 2.998, 15.0), ("rademacher", 1.0, 1.0)])
def test_moments_of_draws(kind, kurtosis, sixth):
    n = 5_000_000
    z = noise.sample(KEY, (n,), kind=kind).double()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs((z**2).mean() - 1) <= 5 * math.sqrt((kurtosis - 1) / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(sixth / n)
    for lag in (1, 2, 3, 4, 64):  # within and across words
        assert abs((z[:-lag] * z[lag:]).mean()) < 5 / math.sqrt(n)


def test_uniforms_are_uniform():
    n = 1_000_000
    u = noise.uniform(KEY, n).numpy()
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(n)
    assert np.unique(u).size == n


def test_streams_are_independent():
    """Seed, step, index, purpose and name each give a stream of their own, also when they differ by one."""
    n = 500_000
    identities = [
        (0, 0, 0, "direction", "w"),
        (1, 0, 0, "direction", "w"),
        (0, 1, 0, "direction", "w"),
        (0, 0, 1, "direction", "w"),
        (0, 0, 0, "rounding", "w"),
        (0, 0, 0, "direction", "w2"),
        (-1, 0, 0, "direction", "w"),
        (0, 2**62, 0, "direction", "w"),
    ]
    for kind in ("gaussian", "rademacher"):
        z = torch.stack([noise.sample(noise.stream_key(*identity), (n,), kind=kind) for identity in identities]).double()
        correlation = (z @ z.T / n).fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(n)


def test_neighbouring_keys_are_independent():
    """Raw keys are hashes, but even keys that differ in one bit must not share noise."""
    n = 500_000
    z = torch.stack([noise.sample(key, (n,)) for key in (KEY, KEY + 1, KEY ^ (1 << 63), KEY ^ (1 << 20))]).double()
    assert (z @ z.T / n).fill_diagonal_(0).abs().max() < 5 / math.sqrt(n)


# ---- stochastic rounding -------------------------------------------------------------------------------------------


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of the two 16-bit numbers around each value."""
    exponent = torch.floor(torch.log2(values.double().abs()))
    if dtype == torch.float16:
        return 2.0 ** (exponent.clamp_min(-14) - 10)
    return 2.0 ** (exponent - 7)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("scale", [1.0, 0.02, 3e-5, 1e-6])  # the last two are subnormal in fp16
def test_stochastic_rounding_is_unbiased(dtype, scale):
    keys, values = 2000, weights((400,), torch.float32, seed=3) * 50 * scale
    gap = spacing(values, dtype)
    up = (values.double().abs() / gap) % 1
    total = torch.zeros(400, dtype=torch.float64)
    for key in range(keys):
        rounded = noise.round_stochastically(
            values, noise.stream_key(0, key, 0, "rounding", "w"), torch.empty(400, dtype=dtype)
        )
        assert ((rounded.double() - values.double()).abs() < gap).all()  # one of the two neighbours
        total += rounded.double()
    deviation = total / keys - values.double()
    error = gap * torch.sqrt(up * (1 - up) / keys)
    # 16 random bits resolve a chance to 2^-16, the 13 that matter in fp16 to 2^-13
    assert (deviation.abs() <= 5 * error + gap * 2.0**-13).all()
    assert abs(deviation.sum()) < 5 * torch.sqrt((error**2).sum()) + (gap * 2.0**-13).sum()


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_of_the_grid_stay(dtype):
    """Every finite 16-bit number, under half a million different random fields."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    for key in range(8):
        rounded = noise.round_stochastically(every.float(), key, torch.empty_like(every))
        assert same_bits(rounded, every)


def test_subnormal_numbers_of_fp16_stay_under_every_random_field():
    """All 1,023 subnormals of each sign meet a million fields: adding the field must not round up to the next number."""
    subnormals = torch.cat([torch.arange(1024), -torch.arange(1, 1024)]).float() * 2.0**-24
    values = subnormals.repeat(500)
    rounded = noise.round_stochastically(values, KEY, torch.empty(values.numel(), dtype=torch.float16))
    assert torch.equal(rounded.float(), values)


def test_rounding_keeps_infinities_and_nans():
    values = torch.tensor([math.inf, -math.inf, math.nan]).repeat(1000)
    for dtype in NARROW:
        rounded = noise.round_stochastically(values, KEY, torch.empty(3000, dtype=dtype)).float()
        assert torch.equal(rounded[:2], values[:2])
        assert torch.equal(rounded.isinf(), values.isinf())
        assert torch.equal(rounded.isnan(), values.isnan())


def test_rounding_to_fp32_is_refused():
    with pytest.raises(TypeError, match="float32"):
        noise.round_stochastically(torch.ones(3), 1, torch.ones(3))


@pytest.mark.parametrize("dtype", NARROW)
def test_displace_rounds_like_round_stochastically(dtype):
    theta = weights((10_001,), dtype)
    value = theta.float() * 0.99 + noise.sample(KEY, (10_001,)) * 1e-5
    expected = noise.round_stochastically(value, 7, torch.empty_like(theta))
    result = noise.displace(torch.empty_like(theta), theta, [KEY], [1e-5], decay=0.99, rounding_key=7)
    assert same_bits(result, expected)
    assert not same_bits(result, value.to(dtype))
