"""transpose: of an int8 matrix, with its rows padded to a multiple of 16."""

import pytest
import torch

from swcompile.kernels.transpose import (
    CANDIDATES,
    TRANSPOSE,
    launcher,
    transpose,
    transpose_reference,
    transpose_triton,
    transpose_work,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernel runs in Triton's interpreter on the latter
IMPLEMENTATIONS = [transpose_reference, transpose_triton]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(DEVICE)


@pytest.mark.parametrize("function", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (83, 132), (150, 7), (0, 16), (3, 0)])
def test_the_transpose_and_zeros(function, shape):
    q = codes(*shape)
    out = function(q)
    num_rows, num_columns = shape
    assert out.dtype == torch.int8 and out.is_contiguous() and out.shape == (num_columns, -(-num_rows // 16) * 16)
    assert torch.equal(out[:, :num_rows], q.t()) and not out[:, num_rows:].any()


@pytest.mark.parametrize("view", [lambda q: q[::2], lambda q: q[:, ::3], lambda q: q[:50].t(), lambda q: q[:1].expand(40, -1)])
def test_any_strides(view):
    q = view(codes(210, 90))
    assert torch.equal(transpose_triton(q), transpose_reference(q))


def launch_config(config, q: torch.Tensor) -> torch.Tensor:
    out = torch.full((q.shape[1], -(-len(q) // 16) * 16), -1, dtype=torch.int8, device=q.device)
    launcher(config, q)(q, out)
    return out


@pytest.mark.parametrize("config", CANDIDATES)
def test_every_configuration(config):
    q = codes(300, 150)
    assert torch.equal(launch_config(config, q), transpose_reference(q))


@pytest.mark.gpu
def test_many_sizes_on_a_gpu():
    for run in range(100):  # Triton has miscompiled transposed 1-byte stores in some configurations (triton#11111)
        torch.manual_seed(run)
        num_rows, num_columns = (int(size) for size in torch.randint(1, 700, (2,)))
        if run % 2:
            num_rows, num_columns = num_rows * 32, num_columns * 16
        q = codes(num_rows, num_columns, seed=run)
        assert torch.equal(launch_config(CANDIDATES[run % len(CANDIDATES)], q), transpose_reference(q))


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_elements():
    q = codes(1024, 4096)
    out = transpose(q.repeat(513, 1))
    for start in (0, 1024 * 256, 1024 * 512):
        assert torch.equal(out[:, start : start + 1024], q.t())


def test_user_errors():
    with pytest.raises(ValueError, match="float32, but must be int8"):
        transpose(torch.ones(2, 2))
    with pytest.raises(ValueError, match="3 dimensions.*must have 2"):
        transpose(torch.ones(2, 2, 2, dtype=torch.int8))


@pytest.mark.parametrize("num_rows", [20, 32])
def test_opcheck(num_rows):
    torch.library.opcheck(TRANSPOSE, (codes(num_rows, 8),))


def test_work():
    assert transpose_work(27, 5) == (0, (27 + 32) * 5)
