"""Number formats: the computed facts against every code that the format has."""

from dataclasses import FrozenInstanceError

import pytest
import torch

from swcompile.kernels.formats import E4M3, E5M2, FORMATS, INT8, NumberFormat


@pytest.mark.parametrize("number_format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_facts_against_all_codes(number_format):
    values = torch.arange(256, dtype=torch.uint8).view(number_format.dtype).double()
    finite = values[values.isfinite()]
    assert number_format.max_value == finite.max() == -finite.min() == torch.finfo(number_format.dtype).max
    assert number_format.min_positive == finite[finite > 0].min()
    assert number_format.has_infinity == bool(values.isinf().any())
    assert not number_format.is_integer


def test_int8_is_symmetric():
    assert INT8.max_value == 127 == torch.iinfo(INT8.dtype).max
    assert INT8.min_positive == 1 and INT8.is_integer and INT8.exponent_bias == 0


def test_known_values():
    assert (E4M3.max_value, E4M3.min_positive, E4M3.exponent_bias) == (448.0, 2.0**-9, 7)
    assert (E5M2.max_value, E5M2.min_positive, E5M2.exponent_bias) == (57344.0, 2.0**-16, 15)
    assert FORMATS == {"int8": INT8, "e4m3": E4M3, "e5m2": E5M2}


def test_a_record_that_contradicts_its_dtype_is_refused():
    with pytest.raises(ValueError, match="e4m2: 7 bits given, but torch.float8_e4m3fn holds 8"):
        NumberFormat(
            name="e4m2", dtype=torch.float8_e4m3fn, exponent_bits=4, mantissa_bits=2, has_infinity=False
        )
    with pytest.raises(FrozenInstanceError):
        INT8.mantissa_bits = 6
