"""The ambient metric against its defining least-squares problem, and steps on a long side against a generator's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pion_hf.linalg.ambient import ambient_generator, ambient_tangent, has_long_side, is_well_conditioned
from pion_hf.linalg.rotation import skew
from pion_hf.linalg.spectrum import numerical_zero, singular_basis, singular_values, spectral_drift
from pion_hf.optim import Pion
from tests.test_spectrum import SHAPES, draw

LONG_SHAPES = [(6, 14), (8, 12), (2, 5), (1, 4)]


def dense(generator):
    """The n x n matrix of a `Generator`."""
    n = generator.core.shape[-1] if generator.factor is None else generator.factor.shape[-1]
    return generator.act(torch.eye(n, dtype=generator.core.dtype).expand(*generator.core.shape[:-2], n, n))


@pytest.mark.parametrize("shape", SHAPES)
def test_ambient_generator_solves_its_equation(shape):
    w, d = draw(2, *shape), draw(2, *shape, seed=1)
    for x, g in ((w, d), (w.mT, d.mT)):
        right = x.shape[-2] >= x.shape[-1] if shape[0] != shape[1] else x is w
        a = dense(ambient_generator(x, g, singular_basis(w), right=right))
        torch.testing.assert_close(a, -a.mT, atol=1e-12, rtol=0)
        c = x.mT @ x
        torch.testing.assert_close(c @ a + a @ c, -skew(x.mT @ g), atol=1e-10, rtol=1e-8)


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6))
def test_ambient_generator_is_the_nearest_rotation(shape, seed):
    """No other skew matrix comes nearer to -D."""
    w, d, other = draw(1, *shape, seed=seed), draw(1, *shape, seed=seed + 1), draw(1, shape[1], shape[1], seed=seed + 2)
    a = dense(ambient_generator(w, d, singular_basis(w), right=shape[0] >= shape[1]))
    best = (w @ a + d).norm()
    for size in (1e-3, 1e-1):
        assert (w @ (a + size * skew(other)) + d).norm() >= best - 1e-9


def test_hold_leaves_the_leading_directions_alone():
    for shape in ((12, 8), (8, 12), (10, 10)):
        w, d = draw(1, *shape), draw(1, *shape, seed=1)
        vh = torch.linalg.svd(w[0], full_matrices=False)[2]
        a = dense(ambient_generator(w, d, singular_basis(w), right=shape[0] >= shape[1], hold=0.25))[0]
        held = int(0.25 * min(shape))
        assert held == 2
        assert (vh[:held] @ a).abs().max() < 1e-10 * a.abs().max()
        assert (vh[held:] @ a).abs().max() > 0.01 * a.abs().max()


def test_zero_singular_values_do_not_rotate_among_themselves():
    for shape in ((10, 8), (8, 10)):
        w = draw(10, 3)[: shape[0]] @ draw(3, shape[1], seed=2)
        d = draw(1, *shape, seed=1)
        basis = singular_basis(w[None])
        assert numerical_zero(basis.values).sum() == min(shape) - 3
        a = dense(ambient_generator(w[None], d, basis, right=shape[0] >= shape[1]))
        assert torch.isfinite(a).all()
        vh = torch.linalg.svd(w)[2]
        assert (vh[3:] @ a[0] @ vh[3:].mT).abs().max() < 1e-9 * a.abs().max()


def tangent_of(w, d, tall, **options):
    """Of a wide `w`, given as its transpose if `tall`."""
    given_as = (w.mT.contiguous(), d.mT.contiguous()) if tall else (w, d)
    return ambient_tangent(*given_as, singular_basis(w), tall=tall, **options)


def wide(x, tall):
    return x.mT if tall else x


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("shape", LONG_SHAPES)
@pytest.mark.parametrize("options", [{}, {"hold": 0.3}, {"tolerance": 0.4}, {"hold": 0.3, "tolerance": 0.4}])
def test_a_tangent_is_what_the_generator_does(shape, tall, options):
    w, d, momentum = (draw(2, *shape, seed=seed) for seed in range(3))
    a = dense(ambient_generator(w, d, singular_basis(w), right=False, **options))
    tangent = tangent_of(w, d, tall, **options)
    torch.testing.assert_close(wide(tangent.change(), tall), w @ a, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(dense(tangent.generator()), a, atol=1e-12, rtol=1e-10)
    carried = tangent.carry(wide(momentum, tall), 0.3)
    torch.testing.assert_close(wide(carried, tall), 0.3 * momentum @ a, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("shape", LONG_SHAPES[:3])
@pytest.mark.parametrize("angle", [1e-3, 0.05, 0.5])
def test_retract_is_the_polar_factor_of_what_turned(shape, tall, angle):
    w, d = draw(2, *shape), draw(2, *shape, seed=1)
    tangent = tangent_of(w, d, tall)
    a = dense(tangent.generator())
    alpha = angle / torch.linalg.matrix_norm(a, ord=2, keepdim=True)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    left, _, right = torch.linalg.svd(vh + alpha * vh @ a, full_matrices=False)
    moved = w + wide(tangent.retract(wide(w, tall), tangent.change(), alpha), tall)
    torch.testing.assert_close(moved, u * s.unsqueeze(-2) @ left @ right, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(moved @ moved.mT, w @ w.mT, atol=1e-12, rtol=1e-10)


def test_each_of_a_batch_moves_as_it_does_alone():
    w, d = draw(3, 6, 14) * torch.tensor([1.0, 1e-3, 1e3]).double().view(3, 1, 1), draw(3, 6, 14, seed=1)

    def moved(w, d, sizes):
        tangent = tangent_of(w, d, False)
        change = tangent.change()
        alpha = sizes * torch.linalg.matrix_norm(w, keepdim=True) / torch.linalg.matrix_norm(change, keepdim=True)
        return w + tangent.retract(w, change, alpha)

    sizes = torch.tensor([0.01, 0.1, 0.0]).double().view(3, 1, 1)
    together = moved(w, d, sizes)
    for i in range(3):
        alone = moved(*(x[i : i + 1] for x in (w, d, sizes)))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-9, atol=0)
    assert torch.equal(together[2], w[2])


def test_a_step_without_a_way_back_is_not_taken():
    w, d = draw(1, 6, 14), draw(1, 6, 14, seed=1)
    tangent = tangent_of(w, d, False)
    a = dense(tangent.generator())
    assert tangent.retract(w, tangent.change(), 3.0 / torch.linalg.matrix_norm(a, ord=2).item()) is None


def test_what_counts_as_a_long_side():
    assert has_long_side((2, 6, 9), "in")
    assert not has_long_side((2, 6, 9), "out")
    assert has_long_side((9, 6), "out")
    assert not has_long_side((8, 6), "out")
    deficient = draw(2, 6, 14)
    assert is_well_conditioned(singular_basis(deficient))
    deficient[1, 0] = deficient[1, 1]
    assert not is_well_conditioned(singular_basis(deficient))


@pytest.mark.parametrize("tall", [False, True])
def test_rounded_products_leave_the_spectrum(tall):
    """A basis in half precision lets large singular directions leak into small ones: 1e-5 here after 300 steps."""
    u, v = (torch.linalg.qr(draw(n, 48, seed=n)).Q for n in (48, 120))
    w = start = ((u * torch.logspace(0, -1.7, 48)) @ v.mT).float().unsqueeze(0)
    basis, lasting = singular_basis(w), draw(48, 120, seed=1).float()
    for step in range(300):
        d = lasting + draw(48, 120, seed=step).float()
        given_as = (x.mT.contiguous() if tall else x for x in (w, d.unsqueeze(0)))
        tangent = ambient_tangent(*given_as, basis, tall=tall, dtype=torch.bfloat16)
        change = tangent.change()
        w = w + wide(tangent.retract(wide(w, tall), change, 4e-3 * w.norm() / change.norm()), tall)
    assert spectral_drift(singular_values(start), singular_values(w)).item() < 1e-6
    assert (w - start).norm() > 0.2 * start.norm()


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_concentrated_direction_leaves_the_spectrum(side):
    """All of a step's rounding on one small singular value: random directions would hide an error of 1e-5."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 48)).Q for n in (48, 120))
    w = (u * torch.logspace(0, -1.3, 48)) @ v.mT
    spike = torch.outer(u[:, -1] + 0.3 * u[:, 0], v[:, 0] + torch.randn(120) / 40)
    w, spike = (w, spike) if side == "in" else (w.mT.contiguous(), spike.mT.contiguous())
    p = nn.Parameter(w.clone())
    optimizer = Pion([p], lr=2e-2, direction="gradient", side=side, generator_dtype="bfloat16")
    for _ in range(30):
        p.grad = spike.clone()
        optimizer.step()
    assert spectral_drift(singular_values(w), singular_values(p.detach())) < 1e-6
    assert (p - w).norm() > 0.02 * w.norm()


class LongestSquare(TorchDispatchMode):
    """The largest `n` of an `(..., n, n)` tensor that is made under it."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.ndim > 1:
                self.size = max(self.size, min(x.shape[-2:]))
        return out


@pytest.mark.parametrize("shape", [(10, 40), (40, 10)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_forms_nothing_of_the_size_of_a_long_side(shape, dtype):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    optimizer = Pion([p], lr=1e-2, generator_dtype=dtype)
    optimizer.observers.clear()  # the check after the first step forms a generator
    before = p.detach().clone()
    with LongestSquare() as longest:
        for _ in range(4):
            p.grad = torch.randn(shape)
            optimizer.step()
    assert longest.size == 10
    assert not torch.equal(before, p)


def test_a_deficient_long_matrix_keeps_its_rank():
    torch.manual_seed(0)
    w = torch.randn(8, 3) @ torch.randn(3, 20)
    p = nn.Parameter(w.clone())
    optimizer = Pion([p], lr=1e-2)
    for _ in range(50):
        p.grad = torch.randn(8, 20)
        optimizer.step()
    assert spectral_drift(singular_values(w), singular_values(p.detach())) < 1e-6
    assert (p - w).norm() > 0.01 * w.norm()
