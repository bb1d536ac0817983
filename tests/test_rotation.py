"""Generators, retractions and their low-rank forms, against literal float64 formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pion_hf.linalg import precision, rotation, series
from pion_hf.linalg.precision import full_float32, halves_product, split_product
from pion_hf.linalg.rotation import (
    RETRACTIONS,
    Generator,
    Increment,
    cayley,
    dense_flops,
    factored_flops,
    generator,
    root,
    skew,
    solve,
    taylor,
)
from pion_hf.linalg.series import SERIES_ANGLES, Series

EYE = torch.eye


def rotated_by(increment: Increment | Series, x: torch.Tensor, **options) -> torch.Tensor:
    return x + increment.change(x, **options)


def random_skew(n: int, angle: float, *, batch: int = 2, dtype=torch.float64, seed: int = 0) -> torch.Tensor:
    x = skew(torch.randn(batch, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return (x * (angle / torch.linalg.matrix_norm(x, 2, keepdim=True))).to(dtype)


def orthogonality_defect(increment: torch.Tensor) -> float:
    e = increment.double() + EYE(increment.shape[-1], dtype=torch.float64)
    return (e.mT @ e - EYE(e.shape[-1], dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("n", [3, 64, 519])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skew_is_exact(n, dtype):
    x = torch.randn(2, n, n).to(dtype)
    assert torch.equal(skew(x), x - x.mT)
    assert torch.equal(skew(x), -skew(x).mT)


def test_solve_takes_batches():
    a, b = EYE(7) + 0.1 * torch.randn(2, 3, 7, 7), torch.randn(2, 3, 7, 4)
    torch.testing.assert_close(a @ solve(a, b), b)


def test_cayley_is_the_cayley_transform():
    x = random_skew(9, 1.3)
    expected = torch.linalg.solve(EYE(9, dtype=x.dtype) - x / 2, EYE(9, dtype=x.dtype) + x / 2)
    torch.testing.assert_close(cayley(x) + EYE(9, dtype=x.dtype), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("angle", [1e-3, 0.03, 0.3, 1.0, 3.0])
def test_cayley_and_root_are_orthogonal_at_any_angle(angle):
    x = random_skew(12, angle)
    assert orthogonality_defect(cayley(x)) < 1e-13
    # The series is cut for float32: theta^8 is what its last step leaves.
    assert orthogonality_defect(root(x, angle=angle)) < 1e-9 * max(1.0, angle / 0.05)
    x32 = x.float()
    assert orthogonality_defect(cayley(x32)) < 3e-6
    assert orthogonality_defect(root(x32, angle=angle)) < 3e-6


@pytest.mark.parametrize(("angle", "terms"), SERIES_ANGLES)
def test_series_is_orthogonal_to_float32_rounding_up_to_its_angle(angle, terms):
    """The few-rows form, at the largest angle it is used for: a thousand steps may add up to 1e-6."""
    increment = Series(Generator(random_skew(16, angle)), terms)
    e = rotated_by(increment, EYE(16, dtype=torch.float64).expand(2, 16, 16))
    assert (e.mT @ e - EYE(16, dtype=torch.float64)).abs().max() < 1e-9


@pytest.mark.parametrize("angle", [1e-4, 3e-3, 0.02, 0.1, 0.3, 0.49])
@pytest.mark.parametrize("rows", [None, 8])
def test_a_low_precision_tail_leaves_the_rotation_orthogonal(angle, rows):
    low = random_skew(64, angle, dtype=torch.bfloat16)
    identity = EYE(64).expand(2, 64, 64)
    increment = Generator(low.float(), low=low).increment(1.0, retraction="root", rows=rows)
    assert (increment.tail if isinstance(increment, Series) else increment.low) is not None
    e = rotated_by(increment, identity).double()
    # The float32 identity itself is stored to 6e-8: errors of that size are what any float32 rotation makes.
    assert (e.mT @ e - identity.double()).abs().max() < 3e-7


class Products(TorchDispatchMode):
    """Counts the batched products that run under it."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("angle", "powers"), [(1e-3, 2), (0.02, 3), (0.05, 4)])
@pytest.mark.parametrize("waits", [False, True])
def test_every_power_is_multiplied_once(angle, powers, waits, monkeypatch):
    """Not in low precision only to see that this will not do."""
    monkeypatch.setattr(series, "reading_waits", lambda x: waits)
    low, x = random_skew(64, angle, dtype=torch.bfloat16), torch.randn(2, 64, 64)
    increment = Generator(low.float(), low=low).increment(1.0, retraction="root", rows=8)
    with Products() as products:
        increment.change(x)
    assert products.count == (increment.terms if waits else powers)


@pytest.mark.parametrize("side", ["in", "out"])
def test_split_product_is_sixteen_bits_exact(side):
    """What a GPU multiplies in place of float32; bfloat16 alone would be off by 2^-9."""
    x, low = torch.randn(2, 40, 30), torch.randn(2, 30, 50).bfloat16()
    exact = x.double() @ low.double()
    product = split_product(x, low) if side == "in" else split_product(x.mT, low.mT, left=True).mT
    assert product.dtype == torch.float32
    assert 2**-20 < (product - exact).norm() / exact.norm() < 2**-17


@pytest.fixture
def splits(monkeypatch):
    """Float32 products are cut, as on a GPU; how many of them by a generator."""
    calls = []
    for module in (rotation, precision):
        monkeypatch.setattr(module, "splitting_pays", lambda device: True)
    monkeypatch.setattr(rotation, "split_product", lambda *a, **k: calls.append(0) or split_product(*a, **k))
    monkeypatch.setattr(series, "reading_waits", lambda x: True)
    return calls


def test_halves_of_both_factors(splits):
    a, b = torch.randn(2, 40, 30), torch.randn(2, 30, 50)
    exact = a.double() @ b.double()
    assert 2**-20 < (halves_product(a, b) - exact).norm() / exact.norm() < 2**-16


@pytest.mark.parametrize(("angle", "powers"), [(1e-3, 1), (5e-3, 2), (0.05, 3), (0.3, 5)])
@pytest.mark.parametrize("side", ["in", "out"])
def test_split_products_rotate_as_exactly_as_float32_ones(angle, powers, side, splits):
    """To what is random from entry to entry, 2^-17 of what the rotation moves; of the powers that show."""
    low = random_skew(64, angle, dtype=torch.bfloat16)
    x = torch.randn(2, 8, 64) if side == "in" else torch.randn(2, 64, 8)
    generator = Generator(low.float(), low=low)
    moved = generator.moved(x, side=side)
    rotated = rotated_by(generator.increment(1.0, retraction="root", rows=8), x, side=side, first=moved)
    assert len(splits) == powers
    assert gram_error(x, rotated, side) < 3e-7 + 2**-17 * angle


def gram_error(x: torch.Tensor, rotated: torch.Tensor, side: str) -> float:
    """Of what rotations of a side leave as it is."""
    gram, after = ((y @ y.mT if side == "in" else y.mT @ y) for y in (x.double(), rotated.double()))
    return ((after - gram).norm() / gram.norm()).item()


@pytest.mark.parametrize("angle", [1e-3, 0.02, 0.2, 0.9])
@pytest.mark.parametrize("side", ["in", "out"])
def test_many_rows_are_rotated_by_a_matrix_where_products_are_split(angle, side, splits):
    """Formed once; what the size of a step is taken from is rounded, and none of it."""
    low, x = random_skew(48, angle, dtype=torch.bfloat16), torch.randn(2, 48, 48)
    generator = Generator(low.float(), low=low)
    moved = generator.moved(x, side=side)
    increment = generator.increment(0.5, retraction="root", rows=48)
    assert isinstance(increment, Increment)
    expected = root(low.double() * 0.5, angle=0.75 * angle)
    expected = x.double() @ expected if side == "in" else expected.mT @ x.double()
    change = increment.change(x, side=side, first=moved)
    assert not splits
    exact = generator.times(x, side=side)
    assert (moved - exact).norm() < 2**-7 * exact.norm()
    assert (change - expected).norm() < 2**-16 * expected.norm()
    assert gram_error(x, x + change, side) < 3e-7 + 2**-17 * angle
    assert (increment.change(x, side=side, low=True) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("angle", [1e-3, 0.02, 0.2])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_pair_of_lower_precision_rotates_without_being_multiplied(angle, side, cut, request):
    """`[L; R]` stands for `A = R^T L - L^T R`, whose powers act through it as the dense ones do."""
    if cut:
        request.getfixturevalue("splits")
    left, right = (torch.randn(2, 6, 48).bfloat16() for _ in range(2))
    pair = generator(left, right, dense=False, dtype=torch.float32)
    assert pair.factor.dtype == torch.bfloat16
    exact = -skew(left.double().mT @ right.double())
    alpha = angle / torch.linalg.matrix_norm(exact, 2, keepdim=True)
    x = torch.randn(2, 20, 48) if side == "in" else torch.randn(2, 48, 20)
    moved = x.double() @ exact if side == "in" else exact.mT @ x.double()
    torch.testing.assert_close(pair.times(x, side=side).double(), moved, atol=1e-5 * moved.abs().max().item(), rtol=0)
    increment = pair.increment(alpha.float(), retraction="root")
    expected = root(exact * alpha, angle=angle)
    expected = x + (x.double() @ expected if side == "in" else expected.mT @ x.double())
    rotated = rotated_by(increment, x, side=side, first=pair.moved(x, side=side))
    torch.testing.assert_close(rotated.double(), expected, atol=2e-6, rtol=0)
    assert gram_error(x, rotated, side) < 3e-7 + 2**-17 * angle * cut
    carried = increment.change(x, side=side, low=True).double()
    assert (carried - (expected - x)).norm() < 0.03 * (expected - x).norm()


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_a_pair_of_lower_precision_has_all_retractions(retraction):
    """At any angle: where the series does not reach, the small core is decomposed."""
    left, right = (torch.randn(2, 6, 48).bfloat16() for _ in range(2))
    low, high = (
        generator(f(left), f(right), dense=False, dtype=torch.float32) for f in (torch.clone, torch.Tensor.float)
    )
    alpha = 1.2 / high.spectral_norm()
    assert (low.has_powers, high.has_powers) == (True, False)
    x = torch.randn(2, 20, 48)
    found, expected = (rotated_by(a.increment(alpha, retraction=retraction), x) for a in (low, high))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(low.act_norm(x), high.act_norm(x), rtol=1e-5, atol=0)
    torch.testing.assert_close(low.spectral_norm(), high.spectral_norm(), rtol=0.02, atol=0)


@pytest.mark.parametrize("angle", [1e-3, 0.03, 0.06, 0.12, 0.2, 0.3])
def test_few_rows_form_equals_the_matrix(angle):
    x, rows = random_skew(20, angle), torch.randn(2, 5, 20, dtype=torch.float64)
    formed = rows + rows @ root(x, angle=1.5 * angle)
    applied = Generator(x).increment(1.0, retraction="root", rows=5)
    assert applied.terms
    # Fewer terms at small angles: the two differ by what float32 cannot see.
    torch.testing.assert_close(rotated_by(applied, rows), formed, atol=2**-24, rtol=0)


def test_a_generator_of_any_size_is_applied_without_overflow():
    """Directions carry no scale of their own: a step's alpha may be 1e-12 and the generator 1e12."""
    x, rows = random_skew(20, 0.3, dtype=torch.float32), torch.randn(2, 5, 20)
    small = Generator(x).increment(1.0, retraction="root", rows=5)
    large = Generator(x * 1e12).increment(torch.full((2, 1, 1), 1e-12), retraction="root", rows=5)
    assert large.terms > 7
    torch.testing.assert_close(rotated_by(large, rows), rotated_by(small, rows), atol=1e-5, rtol=0)


def test_root_has_the_documented_closed_form():
    x = random_skew(8, 0.08, batch=1)[0]
    square = x @ x
    values, vectors = torch.linalg.eigh(EYE(8, dtype=x.dtype) + square / 4)
    expected = square / 2 + x @ (vectors * values.sqrt()) @ vectors.mT
    torch.testing.assert_close(root(x, angle=0.08), expected, atol=1e-10, rtol=0)


def test_taylor_of_degree_two_grows_singular_values_as_documented():
    theta = 0.2
    plane = torch.tensor([[0.0, -theta], [theta, 0.0]], dtype=torch.float64)
    e = taylor(plane, degree=2) + EYE(2, dtype=torch.float64)
    assert torch.linalg.svdvals(e)[0].item() == pytest.approx(1 + theta**4 / 8, abs=theta**8)


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
def test_taylor_is_the_truncated_exponential(degree):
    x = random_skew(6, 0.7)
    expected = sum(torch.linalg.matrix_power(x, k) / math.factorial(k) for k in range(1, degree + 1))
    torch.testing.assert_close(taylor(x, degree=degree), expected)


@settings(max_examples=40, deadline=None)
@given(
    k=st.integers(1, 6),
    n=st.integers(2, 40),
    m=st.integers(1, 8),
    seed=st.integers(0, 99),
    retraction=st.sampled_from(RETRACTIONS),
    side=st.sampled_from(["in", "out"]),
)
def test_low_rank_rotation_equals_the_dense_one(k, n, m, seed, retraction, side):
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(2, k, n, dtype=torch.float64, generator=draw) / n for _ in range(2))
    rows = torch.randn(2, m, n, dtype=torch.float64, generator=draw)
    factored, dense = generator(left, right, dense=False), generator(left, right, dense=True)
    torch.testing.assert_close(dense.core, -skew(left.mT @ right))
    torch.testing.assert_close(factored.act(rows), dense.act(rows), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(factored.act_norm(rows), dense.act_norm(rows), atol=1e-12, rtol=1e-6)
    # The root of a low-rank generator is taken by Cayley (see Generator.increment): compare like with like.
    exact = "cayley" if retraction == "root" else retraction
    x = rows if side == "in" else rows.mT.contiguous()
    low = rotated_by(factored.increment(0.3, retraction=retraction), x, side=side)
    high = rotated_by(dense.increment(0.3, retraction=exact), x, side=side)
    torch.testing.assert_close(low, high, atol=1e-12, rtol=1e-12)


def test_rotating_from_the_other_side_is_the_transposed_view():
    x, w = random_skew(6, 0.02), torch.randn(2, 6, 4, dtype=torch.float64)
    for rows in (None, 4):
        increment = Generator(x).increment(1.0, retraction="root", rows=rows)
        torch.testing.assert_close(rotated_by(increment, w, side="out"), rotated_by(increment, w.mT.contiguous()).mT)


def test_spectral_norm_estimate():
    for n in (2, 5, 40):
        x = random_skew(n, 0.7, batch=3)
        estimate = Generator(x).spectral_norm()
        assert ((estimate > 0.6) & (estimate <= 0.7 + 1e-12)).all()


def test_flop_counts_choose_the_low_rank_form_for_adapters():
    assert factored_flops(16, 4096, 32) < dense_flops(16, 4096, 32) / 1000
    assert generator(torch.randn(16, 512), torch.randn(16, 512), rows=32).factor is not None
    assert generator(torch.randn(64, 64), torch.randn(64, 64), rows=128).factor is None


@pytest.mark.parametrize(("n", "factored"), [(192, False), (256, True)])
def test_flop_counts_choose_the_pair_where_the_other_side_is_long(n, factored):
    """In lower precision from 3.2 on: of Llama's and Qwen's layers, not of SmolLM2-135M's."""
    left, right = torch.randn(2, 64, n).bfloat16()
    assert (generator(left, right, rows=128, dtype=torch.float32).factor is not None) == factored


def ask_by_word(precision: str) -> None:
    torch.set_float32_matmul_precision({"tf32": "high", "none": "highest"}[precision])


def ask_by_flag(precision: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def ask_everywhere(precision: str) -> None:
    """As transformers' `--tf32 true` does."""
    torch.backends.fp32_precision = precision


def ask_of_products(precision: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = precision


@pytest.mark.parametrize("ask", [ask_by_word, ask_by_flag, ask_everywhere, ask_of_products])
def test_full_float32_puts_the_setting_back(ask):
    product = torch.backends.cuda.matmul
    try:
        ask("tf32")
        with full_float32():
            assert product.fp32_precision == "ieee"
        assert product.fp32_precision == "tf32"
    finally:
        ask("none")
        for place in (torch.backends, product, torch.backends.mkldnn.matmul):
            place.fp32_precision = "none"
    with full_float32():
        pass
    assert torch.get_float32_matmul_precision() == "highest"
