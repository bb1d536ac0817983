"""In which precision products run that may be rounded."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from pion_hf.linalg import products
from pion_hf.linalg.products import bfloat16_speedup, gram_matrix, product_dtype


@pytest.mark.parametrize("speedup", [0.05, 0.9, 1.5, 3.0])
def test_auto_is_bfloat16_where_the_processor_is_faster_in_it(speedup, monkeypatch):
    monkeypatch.setattr(products, "bfloat16_speedup", lambda: speedup)
    found = product_dtype(torch.ones(1), "auto")
    assert found == (torch.bfloat16 if speedup > 1 else torch.float32)


def test_a_processor_whose_units_are_hidden_is_found_to_be_slow():
    command = "from pion_hf.linalg.products import bfloat16_speedup; print(bfloat16_speedup())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5


@pytest.fixture
def measured_anew():
    bfloat16_speedup.cache_clear()
    yield
    bfloat16_speedup.cache_clear()


@pytest.mark.usefixtures("measured_anew")
def test_the_measurement_is_of_the_processor_wherever_it_is_made(monkeypatch):
    dtypes = []
    product = torch.mm

    def seen(x, y):
        result = product(x, y)
        dtypes.append((x.device.type, result.dtype))
        return result

    monkeypatch.setattr(torch, "mm", seen)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        found = bfloat16_speedup()
    assert found == bfloat16_speedup() > 0
    assert set(dtypes) == {("cpu", torch.float32), ("cpu", torch.bfloat16)}
    assert len(dtypes) <= 16  # once


@pytest.mark.usefixtures("measured_anew")
def test_the_first_product_and_a_busy_machine_decide_nothing(monkeypatch):
    """A first product makes its kernel; processes of one machine find the same, or a resumed run is another one."""
    clock, made = [0.0], set()

    def product(x, y):
        clock[0] += (1.0 if x.dtype == torch.float32 else 0.5) if x.dtype in made else 20.0 / x.itemsize
        made.add(x.dtype)

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(products.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(products.time, "perf_counter", itertools.count(step=10).__next__)
    assert bfloat16_speedup() == 2


def test_what_was_chosen_is_used_and_double_precision_kept():
    assert product_dtype(torch.ones(1), "bfloat16") == torch.bfloat16
    assert product_dtype(torch.ones(1), "float32") == torch.float32
    assert product_dtype(torch.ones(1, dtype=torch.float64), "bfloat16") == torch.float64


def test_other_devices_are_not_asked():
    assert product_dtype(torch.ones(1, device="meta"), "auto") == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(512, 40), (515, 700), (2, 514, 512), (0, 600, 8), (3, 20, 50)])
def test_the_gram_matrix_is_what_the_product_is(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    found, expected = gram_matrix(x), x.double() @ x.double().mT
    assert found.dtype == dtype
    assert (found - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()


def test_the_gram_matrix_of_one_in_a_batch_is_its_own_to_the_bit():
    x = torch.randn(3, 520, 530, generator=torch.Generator().manual_seed(0))
    together = gram_matrix(x)
    assert all(torch.equal(together[i], gram_matrix(x[i])) for i in range(3))
    assert torch.equal(gram_matrix(x[1].mT.contiguous().mT), together[1])


def test_the_gram_matrix_of_a_large_matrix_is_one_operation_to_a_compiler():
    x = torch.randn(2, 520, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.compile(gram_matrix, fullgraph=True, backend="aot_eager")(x), gram_matrix(x))
