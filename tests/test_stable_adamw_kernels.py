"""The multi-tensor kernels of StableAdamW against their references."""

import math

import pytest
import torch

from swcompile.kernels import stable_adamw as module
from swcompile.kernels.stable_adamw import (
    SECOND_MOMENT_RATIOS,
    SECOND_MOMENT_RATIOS_OF_TABLE,
    STABLE_ADAMW_UPDATE,
    join_remainder,
    second_moment_ratios,
    second_moment_ratios_reference,
    second_moment_ratios_triton,
    split_remainder,
    stable_adamw_update_,
    stable_adamw_update_reference,
    stable_adamw_update_triton,
)
from swcompile.kernels.tensor_table import CHUNK, make_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3,), (40, 50), (), (0, 4), (CHUNK + 7,), (2, CHUNK), (1,), (1024,)]
DTYPES = [
    (torch.float32, torch.float32, False),
    (torch.float32, torch.bfloat16, False),
    (torch.float32, torch.float16, False),
    (torch.bfloat16, torch.bfloat16, True),
    (torch.bfloat16, torch.float32, True),
    (torch.bfloat16, torch.bfloat16, False),
]
Lists = list[list[torch.Tensor]]


def random_lists(param: torch.dtype, grad: torch.dtype, has_remainder: bool, shapes=SHAPES) -> Lists:
    """Parameters, gradients, first and second moments, remainders."""
    torch.manual_seed(0)
    lists = [
        [torch.randn(shape, device=DEVICE).to(param) for shape in shapes],
        [(torch.randn(shape, device=DEVICE) * 3).to(grad) for shape in shapes],
        [torch.randn(shape, device=DEVICE) for shape in shapes],
        [torch.rand(shape, device=DEVICE) for shape in shapes],
    ]
    remainders = [torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, device=DEVICE) for shape in shapes]
    return [*lists, remainders if has_remainder else []]


def random_numbers(count: int, num_tensors: int = len(SHAPES)) -> list[torch.Tensor]:
    return [torch.rand(num_tensors, device=DEVICE) * 0.2 for _ in range(count)]


def copied(lists: Lists) -> Lists:
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def assert_equal(actual: Lists, expected: Lists, *, cuts: bool = False) -> None:
    """Bit for bit; but Triton's interpreter casts to bfloat16 by cutting bits off (`cuts`): to the next value there."""
    for one, other in zip(actual, expected, strict=True):
        for a, e in zip(one, other, strict=True):
            if cuts and a.dtype == torch.bfloat16:
                assert ((a.view(torch.int16) - e.view(torch.int16)).abs() <= 1).all()
            else:
                assert torch.equal(a, e)


@pytest.mark.parametrize(("param", "grad", "has_remainder"), DTYPES)
def test_update_equals_reference(param, grad, has_remainder):
    start = random_lists(param, grad, has_remainder)
    takes = torch.tensor([True] * (len(SHAPES) - 1) + [False], device=DEVICE)
    numbers = random_numbers(6)
    expected, actual = copied(start), copied(start)
    changes = stable_adamw_update_triton(takes, *numbers, *actual)
    expected_changes = stable_adamw_update_reference(takes, *numbers, *expected)
    assert_equal(actual, expected, cuts=DEVICE == "cpu" and not has_remainder)
    torch.testing.assert_close(changes, expected_changes, rtol=1e-6, atol=0)
    for index in (0, 2, 3):  # what is not taken is left alone; all else moved
        assert torch.equal(actual[index][-1], start[index][-1])
        assert not torch.equal(actual[index][0], start[index][0])
    assert changes[-1] == 0 and changes[3] == 0 and (changes[:3] > 0).all()


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16])
def test_ratios_equal_reference(grad):
    _, grads, _, squares, _ = random_lists(torch.float32, grad, False)
    grads[0] = grads[0].new_empty(0)  # no gradient
    numbers = random_numbers(3)
    actual = second_moment_ratios_triton(*numbers, grads, squares)
    torch.testing.assert_close(actual, second_moment_ratios_reference(*numbers, grads, squares), rtol=1e-6, atol=0)
    assert actual.dtype == torch.float64 and actual[0] == 0 and actual[3] == 0 and (actual[4:] > 0).all()
    assert torch.equal(actual, second_moment_ratios_triton(*numbers, grads, squares))


@pytest.mark.parametrize("function", [second_moment_ratios_reference, second_moment_ratios_triton])
def test_ratio_by_hand(function):
    # u becomes 4 + 0.5 (9 - 4) = 6.5 and 0 + 0.5 (0 - 0) = 0, of which eps² = 0.25 takes the place
    ones = torch.ones(1, device=DEVICE)
    grad, square = torch.tensor([6.0, 0.0], device=DEVICE), torch.tensor([4.0, 0.0], device=DEVICE)
    assert function(ones / 2, ones / 2, ones / 2, [grad], [square]).item() == pytest.approx(9 / 6.5)


@pytest.mark.parametrize("function", [second_moment_ratios_reference, second_moment_ratios_triton])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_ratio_of_what_is_not_finite(function, value):
    grads = [torch.ones(2000, device=DEVICE), torch.ones(2000, device=DEVICE)]
    grads[0][1500] = value
    numbers = [torch.full((2,), 0.5, device=DEVICE), torch.ones(2, device=DEVICE), torch.full((2,), 1e-6, device=DEVICE)]
    ratios = function(*numbers, grads, [torch.ones(2000, device=DEVICE)] * 2)
    assert not ratios[0].isfinite() and ratios[1] == 2000


def test_remainder_holds_every_float32():
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    bits[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x7F7FFFFF])  # two ties, below one, the largest
    x = bits.view(torch.float32)
    x = x[x.isfinite()]
    p, remainder = split_remainder(x)
    assert torch.equal(join_remainder(p, remainder).view(torch.int32), x.view(torch.int32))
    nearest = x.to(torch.bfloat16)
    ties = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(p[~ties].view(torch.int16), nearest[~ties].view(torch.int16))


@pytest.mark.parametrize("order", [(1, 0), (0, 1)])
def test_layout_and_alignment(order):
    """A transposed parameter, and tensors that begin in the middle of an allocation."""
    shapes = [(30, 40)]
    lists = random_lists(torch.float32, torch.float32, False, shapes)
    shifted = [[torch.empty(1201, device=DEVICE)[1:].view(30, 40).copy_(t) for t in tensors] for tensors in lists]
    laid_out = [[t.permute(order).contiguous().permute(order) for t in tensors] for tensors in lists]
    takes, numbers = torch.ones(1, dtype=torch.bool, device=DEVICE), random_numbers(6, 1)
    for other in (shifted, laid_out):
        expected = copied(lists)
        stable_adamw_update_reference(takes, *numbers, *expected)
        stable_adamw_update_triton(takes, *numbers, *other)
        assert_equal(other, expected)


def test_wrong_layouts():
    x = torch.randn(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match=r"strides \(1, 4\) does not lie in memory as one of shape \(4, 6\)"):
        make_table([x], [[torch.randn(6, 4, device=DEVICE).t()]], x.device)
    with pytest.raises(ValueError, match="without gaps"):
        make_table([x[:, :3]], [[x[:, :3]]], x.device)
    with pytest.raises(ValueError, match="one dtype, got torch.bfloat16, torch.float32"):
        second_moment_ratios_triton(*random_numbers(3, 2), [x, x.bfloat16()], [x, x])


@pytest.mark.skipif(DEVICE == "cuda", reason="about the CPU")
def test_tables_are_for_gpus(monkeypatch):
    monkeypatch.setattr(module, "INTERPRETED", False)
    x = torch.ones(3)
    table = make_table([x], [[], [x], [], [x], []], x.device)
    with pytest.raises(RuntimeError, match="use the op that takes lists"):
        SECOND_MOMENT_RATIOS_OF_TABLE(*random_numbers(3, 1), *table, torch.float32, True)


def test_ops():
    lists = random_lists(torch.float32, torch.float32, False, [(3,), (5, 2)])
    numbers = random_numbers(6, 2)
    torch.library.opcheck(SECOND_MOMENT_RATIOS, (*numbers[:3], lists[1], lists[3]))
    takes = torch.ones(2, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(STABLE_ADAMW_UPDATE, (takes, *numbers, *lists), test_utils=("test_schema", "test_faketensor"))
    before = second_moment_ratios(*numbers[:3], lists[1], lists[3])
    assert stable_adamw_update_(takes, *numbers, *lists).shape == (2,)
    assert not torch.equal(before, second_moment_ratios(*numbers[:3], lists[1], lists[3]))


def test_work():
    # 28 bytes an element in float32; 2 + 2 + 4 + 4 of state twice, and 2 of gradient, in bfloat16
    assert module.stable_adamw_update_work(10, 4, 4).bytes == 280
    assert module.stable_adamw_update_work(10, 2, 2, has_remainder=True).bytes == 10 * (24 + 2)
    assert module.second_moment_ratios_work(10, 4) == (80, 80)


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
def test_more_than_2_to_31_elements():
    size = 2**31 + 10
    lists = [[torch.ones(size, dtype=dtype, device="cuda")] for dtype in (torch.bfloat16, torch.bfloat16)]
    lists += [[torch.zeros(size, device="cuda")] for _ in range(2)]
    ones = torch.ones(1, device="cuda")
    assert second_moment_ratios_triton(ones, ones, ones * 1e-6, lists[1], lists[3]).item() == size
    stable_adamw_update_triton(ones.bool(), ones, ones * 0, ones, ones, ones, ones * 0, *lists, [])
    assert lists[0][0][-1] == 0 and lists[0][0][2**31 - 1] == 0 and lists[3][0][-1] == 1
