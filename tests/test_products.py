"""In which precision products run that may be rounded."""

import pytest
import torch

from pion_hf.linalg import precision
from pion_hf.linalg.precision import product_dtype


@pytest.fixture
def instructions(monkeypatch):
    """Says which instructions for bfloat16 the processor has."""

    def say(*, amx, avx512):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        precision._multiplies_bfloat16.cache_clear()

    yield say
    precision._multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(("amx", "avx512"), [(False, False), (True, False), (False, True), (True, True)])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(amx, avx512, instructions):
    instructions(amx=amx, avx512=avx512)
    found = product_dtype(torch.ones(1), "auto")
    assert found == (torch.bfloat16 if amx or avx512 else torch.float32)


def test_what_was_chosen_is_used_and_double_precision_kept():
    assert product_dtype(torch.ones(1), "bfloat16") == torch.bfloat16
    assert product_dtype(torch.ones(1), "float32") == torch.float32
    assert product_dtype(torch.ones(1, dtype=torch.float64), "bfloat16") == torch.float64


def test_other_devices_are_not_asked():
    assert product_dtype(torch.ones(1, device="meta"), "auto") == torch.float32
