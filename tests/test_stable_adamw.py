"""StableAdamW as users use it: against the printed algorithm, its options, state, schedulers, faults."""

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import swcompile
from swcompile import StableAdamW
from swcompile.optim import device_step

SHAPES = [(6, 5), (7,), (), (0, 3), (130, 33)]
PATHS = ["lists", "tables", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to run; "tables" is the CPU, with the graph lowered and its kernels interpreted."""
    if request.param == "tables":
        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter is off where there is a GPU")
        monkeypatch.setattr(device_step, "runs_on_tables", lambda device: True)
    return "cuda" if request.param == "cuda" else "cpu"


on_every_path = pytest.mark.parametrize("device", PATHS, indirect=True)


def parameters(device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int, *, dtype: torch.dtype | None = None) -> None:
    """Random gradients whose scale changes by orders of magnitude from step to step and tensor to tensor."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        scale = 10 ** (torch.rand((), generator=generator) * 4 - 3)
        grad = torch.randn(param.shape, generator=generator) * scale
        param.grad = None
        param.grad_dtype = dtype or param.dtype
        param.grad = grad.to(param.device, dtype or param.dtype)


class Reference:
    """Algorithm 2 of arXiv 2304.13013 as printed, in float64, a tensor at a time."""

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.1,
        clip_threshold: float | None = 1.0,
        decay_by: str = "clipped_lr",
        max_lr: float | None = None,
        beta2_warmup: float | None = None,
        loss_scale: float = 1.0,
        maximize: bool = False,
        **ignored: Any,
    ):
        self.__dict__ |= {name: value for name, value in locals().items() if name not in ("self", "params")}
        self.max_lr = max_lr or lr
        self.theta = [param.detach().cpu().double() for param in params]
        self.v = [torch.zeros_like(theta) for theta in self.theta]
        self.u = [torch.zeros_like(theta) for theta in self.theta]
        self.t = [0] * len(params)
        self.rms = [math.nan] * len(params)

    def step(self, params: list[nn.Parameter]) -> None:
        for i, param in enumerate(params):
            if param.grad is None or not param.grad.isfinite().all():
                continue
            g = param.grad.cpu().double() / self.loss_scale * (-1 if self.maximize else 1)
            self.t[i] += 1
            t, (beta1, beta2) = self.t[i], self.betas
            beta1 = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t)
            beta2 = beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
            if self.beta2_warmup is not None:
                beta2 = 1 - t**-self.beta2_warmup
            self.v[i] = beta1 * self.v[i] + (1 - beta1) * g
            self.u[i] = beta2 * self.u[i] + (1 - beta2) * g * g
            self.rms[i] = (g * g / self.u[i].clamp(min=self.eps**2)).mean().sqrt().item() if g.numel() else 0.0
            clipped = self.lr / (1 if self.clip_threshold is None else max(1, self.rms[i] / self.clip_threshold))
            decay = {"clipped_lr": clipped, "lr": self.lr, "schedule": self.lr / self.max_lr}[self.decay_by]
            step = clipped * self.v[i] / (self.u[i].sqrt() + self.eps)
            self.theta[i] = self.theta[i] - decay * self.weight_decay * self.theta[i] - step


def relative_errors(params: list[nn.Parameter], theta: list[torch.Tensor]) -> list[float]:
    pairs = [(p.detach().cpu().double(), t) for p, t in zip(params, theta, strict=True) if p.numel()]
    return [((p - t).norm() / t.norm()).item() for p, t in pairs]


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no clipping": {"clip_threshold": None},
    "neither clipping nor skipping": {"clip_threshold": None, "skip_nonfinite": False},
    "threshold": {"clip_threshold": 0.5},
    "decay by the rate before clipping": {"decay_by": "lr"},
    "independent decay": {"decay_by": "schedule", "weight_decay": 1e-3, "max_lr": 2e-2},
    "beta2 warm-up": {"beta2_warmup": 0.8},
    "betas": {"betas": (0.0, 0.9999)},
    "eps": {"eps": 1e-15},
    "loss scale": {"loss_scale": 65536.0},
    "maximize": {"maximize": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_is_the_printed_algorithm(options: dict[str, Any]) -> None:
    check_algorithm(options, "cpu", 200)


@pytest.mark.parametrize("options", [OPTIONS[name] for name in ("default", "neither clipping nor skipping", "beta2 warm-up")])
@pytest.mark.parametrize("device", PATHS[1:], indirect=True)
def test_lowered_it_is_the_printed_algorithm(options: dict[str, Any], device: str) -> None:
    check_algorithm(options, device, 200 if device == "cuda" else 20)


def check_algorithm(options: dict[str, Any], device: str, num_steps: int) -> None:
    params = parameters(device)
    start = [param.detach().cpu().double() for param in params]
    optimizer = StableAdamW(params, **{"lr": 1e-2, "weight_decay": 0.1} | options)
    reference = Reference(params, **options)
    clipped = 0
    for step in range(num_steps):
        give_gradients(params, step)
        for param in params:
            param.grad.mul_(options.get("loss_scale", 1.0))
        optimizer.step()
        reference.step(params)
        clipped += sum(rms > 1 for rms in reference.rms)
        if "skip_nonfinite" not in options:
            actual = optimizer.last_rms().cpu().double()
            torch.testing.assert_close(actual, torch.tensor(reference.rms, dtype=torch.float64), rtol=1e-5, atol=0)
    assert clipped > num_steps // 5  # the scales change enough for clipping to matter
    assert max(relative_errors(params, reference.theta)) < 1e-5
    assert min(relative_errors(params, start)) > 1e-2


def test_it_is_optimi() -> None:
    optimi = pytest.importorskip("optimi", reason="pip install torch-optimi")
    params, others = parameters()[:2], parameters()[:2]
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-6}
    ours, theirs = StableAdamW(params, **options), optimi.StableAdamW(others, triton=False, foreach=False, **options)
    for step in range(100):
        give_gradients(params, step)
        give_gradients(others, step)
        ours.step()
        theirs.step()
    assert max(relative_errors(params, [other.detach().double() for other in others])) < 1e-5


def test_without_clipping_it_is_adamw_to_the_bit() -> None:
    """The same arithmetic with a threshold that is never reached; and torch's AdamW within its rounding."""
    runs = [({"clip_threshold": None}), ({"clip_threshold": 1e9}), ({"clip_threshold": None, "skip_nonfinite": False})]
    results = []
    for options in runs:
        params = parameters()
        optimizer = StableAdamW(params, lr=1e-2, **options)
        for step in range(30):
            give_gradients(params, step)
            optimizer.step()
        results.append(params)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    params = parameters()
    adamw = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-2)
    for step in range(30):
        give_gradients(params, step)
        adamw.step()
    assert max(relative_errors(results[0], [param.detach().double() for param in params])) < 1e-5


@on_every_path
def test_bfloat16_is_float32_training_with_rounded_values(device: str) -> None:
    params, masters = parameters(device, torch.bfloat16), parameters(device)
    for param, master in zip(params, masters, strict=True):
        master.data.copy_(param.data)
    optimizers = [StableAdamW(some, lr=1e-4) for some in (params, masters)]
    for step in range(10):
        give_gradients(params, step)
        for param, master in zip(params, masters, strict=True):
            master.grad = param.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for param, master in zip(params, masters, strict=True):
        remainder = optimizers[0].state[param]["remainder"]
        assert torch.equal(swcompile.kernels.stable_adamw.join_remainder(param.data, remainder), master.data)
        assert optimizers[0].state[param]["exp_avg"].dtype == torch.float32


def test_small_updates_count_with_master_weights_alone() -> None:
    def trained(master_weights: bool) -> float:
        param = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        optimizer = StableAdamW([param], lr=1e-4, weight_decay=0.0, master_weights=master_weights)
        for _ in range(200):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return param[0].item()

    assert trained(master_weights=False) == 1.0
    assert trained(master_weights=True) == pytest.approx(0.98, abs=2**-9)


@on_every_path
def test_a_backward_through_parameters_that_a_step_has_changed_is_an_error(device: str) -> None:
    layer = nn.Linear(4, 3).to(device)
    optimizer = StableAdamW(layer.parameters(), lr=1e-2)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    first, second = layer(x).sum(), layer(x).square().sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@on_every_path
def test_gradients_are_let_go_of_after_the_step(device: str) -> None:
    params = parameters(device)
    optimizer = StableAdamW(params, lr=1e-2)
    give_gradients(params, 0)
    optimizer.step()
    gone = weakref.ref(params[0].grad)
    optimizer.zero_grad(set_to_none=True)
    assert gone() is None


@on_every_path
def test_a_parameter_that_is_laid_out_anew(device: str) -> None:
    params, others = ([nn.Parameter(torch.arange(9.0, device=device).reshape(3, 3))] for _ in range(2))
    ours, plain = (StableAdamW(group, lr=1e-2) for group in (params, others))
    for step in range(2):
        grad = torch.full((3, 3), 1.0 + step, device=device).tril()
        params[0].grad, others[0].grad = grad.clone(), grad.clone()
        ours.step(), plain.step()
        params[0].data = params[0].data.t().contiguous().t()  # elsewhere or not, with other strides
    torch.testing.assert_close(params[0], others[0], rtol=1e-6, atol=0)


@on_every_path
def test_groups_dtypes_and_gradients_that_are_missing(device: str) -> None:
    """float32 and bfloat16 with gradients of both, two groups, some without gradient now and then, one frozen."""
    params = parameters(device) + parameters(device, torch.bfloat16, seed=1)
    frozen = nn.Parameter(torch.ones(3, device=device), requires_grad=False)
    groups = [{"params": [*params[::2], frozen], "lr": 1e-2}, {"params": params[1::2], "weight_decay": 0.5}]
    optimizer = StableAdamW(groups, lr=3e-3)
    order = [*params[::2], *params[1::2]]
    alone = [(copy.deepcopy(param), optimizer.param_groups[0 if i < 5 else 1]) for i, param in enumerate(order)]
    singles = [StableAdamW([p], lr=group["lr"], weight_decay=group["weight_decay"]) for p, group in alone]
    for step in range(6):
        give_gradients(order, step, dtype=torch.float32 if step < 3 else None)
        order[step % 3].grad = None
        for (param, _), member in zip(alone, order, strict=True):
            param.grad = None
            param.grad_dtype = member.grad_dtype
            param.grad = None if member.grad is None else member.grad.clone()
        optimizer.step()
        for single in singles:
            single.step()
    for (param, _), member in zip(alone, order, strict=True):
        assert torch.equal(param, member)
    assert torch.equal(frozen, torch.ones_like(frozen)) and frozen not in optimizer.state
    assert optimizer.state[order[0]]["step"] == 4 and optimizer.state[order[4]]["step"] == 6
    assert not optimizer.skipped_steps().nan_to_num().any()
    frozen.requires_grad_()
    frozen.grad = torch.ones_like(frozen)
    optimizer.step()
    assert (frozen != 1).all() and optimizer.state[frozen]["step"] == 1


@on_every_path
def test_faults_hit_one_tensor_and_one_step(device: str) -> None:
    params, calm = parameters(device), parameters(device)
    optimizer, other = StableAdamW(params, lr=1e-2), StableAdamW(calm, lr=1e-2)
    faults = {(2, 0): math.nan, (5, 4): math.inf, (5, 1): -math.inf, (9, 2): math.nan}
    for step in range(12):
        give_gradients(params, step)
        give_gradients(calm, step)
        for index in range(len(params)):
            if (step, index) in faults:
                params[index].grad.view(-1)[-1] = faults[step, index]
                calm[index].grad = None  # as if that step had not been
        optimizer.step()
        other.step()
    for param, expected in zip(params, calm, strict=True):
        assert torch.equal(param, expected)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[param][name], other.state[expected][name])
    assert optimizer.skipped_steps().tolist() == [1, 1, 1, 0, 1]
    assert optimizer.state[params[0]]["skipped"] == 1


def test_without_skipping_a_fault_spreads() -> None:
    params = parameters()
    optimizer = StableAdamW(params, skip_nonfinite=False, clip_threshold=None)
    give_gradients(params, 0)
    params[0].grad[0, 0] = math.nan
    optimizer.step()
    assert params[0].isnan().any() and not params[1].isnan().any() and optimizer.last_rms().isnan().all()


@on_every_path
def test_grad_scaler(device: str) -> None:
    """GradScaler's scale is divided out in the step, and its verdict skips the step of all tensors."""
    params, plain = parameters(device), parameters(device)
    optimizer, other = StableAdamW(params, lr=1e-2), StableAdamW(plain, lr=1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=100)
    for step in range(6):
        give_gradients(params, step)
        give_gradients(plain, step)
        scaler.scale(torch.ones((), device=device))
        for param in params:
            param.grad.mul_(scaler.get_scale())
        if step == 3:
            params[1].grad[0] = math.inf
        else:
            other.step()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512
    for param, expected in zip(params, plain, strict=True):
        assert torch.equal(param, expected)
    assert optimizer.state[params[0]]["step"] == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "saved", "pickled", "deepcopied"])
def test_resume_is_bitwise(how: str, dtype: torch.dtype) -> None:
    params = parameters(dtype=dtype)
    optimizer = StableAdamW([{"params": params[:2], "lr": 1e-2}, {"params": params[2:]}], lr=3e-3)
    for step in range(4):
        give_gradients(params, step)
        if step == 2:
            params[0].grad[0] = math.nan
        optimizer.step()
    if how in ("state_dict", "saved"):
        others = [nn.Parameter(param.detach().clone()) for param in params]
        resumed = StableAdamW([{"params": others[:2]}, {"params": others[2:]}])
        state = optimizer.state_dict()
        if how == "saved":
            torch.save(state, file := io.BytesIO())
            file.seek(0)
            state = torch.load(file, weights_only=True)
        resumed.load_state_dict(state)
    else:
        resumed = pickle.loads(pickle.dumps(optimizer)) if how == "pickled" else copy.deepcopy(optimizer)
        others = [param for group in resumed.param_groups for param in group["params"]]
    assert all(other is not param for other, param in zip(others, params, strict=True))
    for step in range(4, 8):
        for some, one in ((params, optimizer), (others, resumed)):
            give_gradients(some, step)
            one.step()
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
        assert optimizer.state[param].keys() == resumed.state[other].keys()
        for name, value in optimizer.state[param].items():
            assert torch.equal(value, resumed.state[other][name]) and value.dtype == resumed.state[other][name].dtype
    assert torch.equal(optimizer.skipped_steps(), resumed.skipped_steps())


@pytest.mark.parametrize("device", PATHS[1:], indirect=True)
def test_schedulers_never_recompile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("inductor")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=counter, **options))
    params = parameters(device)
    optimizer = StableAdamW(params, lr=1e-2)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=30)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for step in range(20):
        give_gradients(params, step)
        optimizer.step()
        one_cycle.step() if step < 15 else plateau.step(1.0)
    assert counter.frame_count == 1
    params[0].grad = None
    optimizer.param_groups[0]["weight_decay"] = 0.3
    optimizer.step()
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_a_step_never_waits_for_the_device() -> None:
    params = parameters("cuda")
    optimizer = StableAdamW(params, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=100)
    for step in range(100):
        give_gradients(params, step)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one makes the state
        try:
            optimizer.step()
            scheduler.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step in (0, 50):
            with torch._dynamo.config.patch(error_on_recompile=True):
                optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_in_a_cuda_graph_is_the_step(dtype: torch.dtype) -> None:
    """The optimizer replays a graph of its own from the second step on, a caller's graph holds it whole."""
    results, others = [], []
    for how in ("launched", "replayed", "captured"):
        params = parameters("cuda", dtype)
        optimizer = StableAdamW(params, lr=torch.tensor(1e-2, device="cuda"))
        graph, grads = torch.cuda.CUDAGraph(), [torch.zeros_like(param) for param in params]
        for step in range(9):
            give_gradients(params, step)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.copy_(param.grad) if how == "captured" else param.grad
            optimizer.param_groups[0]["lr"].fill_(0.01 / (step + 1))
            if how == "captured" and step > 2:
                if step == 3:
                    with torch.cuda.graph(graph):
                        optimizer.step()
                graph.replay()
                continue
            if how == "launched" and optimizer._steps:
                optimizer._steps[0].launch.has_run = False  # as in the first step
            optimizer.step()
            if how == "replayed" and step == 5:  # as others do between two steps
                others.append(torch.randn(1000, device="cuda"))
        counts = [optimizer.state[param]["step"].item() for param in params]
        assert counts == [9] * len(params)
        moments = [optimizer.state[param]["exp_avg_sq"] for param in params]
        results.append([*params, *moments, optimizer.last_rms(), optimizer.last_update_norms()])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_is_launched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    end = torch.cuda.CUDAGraph.capture_end

    def fail(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)  # the stream is no longer recorded, as when the driver finds no memory for the graph
        raise RuntimeError("no memory")

    results = []
    for can_record in (True, False):
        if not can_record:
            monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_end", fail)
        params = parameters("cuda")
        optimizer = StableAdamW(params)
        for step in range(5):
            give_gradients(params, step)
            optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))
    assert caplog.text.count("cannot be recorded as a CUDA graph") == 1


@pytest.mark.parametrize("device", PATHS[:2], indirect=True)
def test_gradients_that_are_always_missing_are_checked_once(device: str) -> None:
    params = parameters(device)
    optimizer = StableAdamW(params)
    guards = []
    for step in range(3):
        give_gradients(params, step)
        params[0].grad = params[3].grad = None
        optimizer.step()
        (bucket,) = optimizer._planned()[0].buckets
        guards.append(bucket.guards)
    assert guards[0] is not None and guards[1] is guards[0] and guards[2] is guards[0]


def test_an_optimizer_lets_go_of_its_parameters() -> None:
    params = parameters()
    optimizer = StableAdamW(params)
    give_gradients(params, 0)
    optimizer.step()
    gc.collect()
    gc.disable()
    try:
        known = weakref.ref(params[0])
        del params, optimizer
        assert known() is None
    finally:
        gc.enable()


def test_the_learning_rate_is_obeyed() -> None:
    """By a scheduler, by hand, and as a tensor that is changed in place."""
    for lr in (1e-2, torch.tensor(1e-2)):
        params = parameters()
        optimizer = StableAdamW(params, lr=lr, weight_decay=0.0)
        give_gradients(params, 0)
        before = [param.detach().clone() for param in params]
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.0)
        else:
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
        optimizer.step()
        assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        assert not torch.equal(params[0], before[0])


def test_a_spike_moves_no_further_than_the_learning_rate() -> None:
    def moved(clip_threshold: float | None) -> float:
        param = nn.Parameter(torch.zeros(1000))
        optimizer = StableAdamW([param], lr=1e-2, betas=(0.0, 0.99), weight_decay=0.0, clip_threshold=clip_threshold)
        for scale in [1.0] * 50 + [100.0]:
            before = param.detach().clone()
            param.grad = torch.full((1000,), scale)
            optimizer.step()
        assert optimizer.last_update_norms().item() == pytest.approx((param - before).norm().item(), rel=1e-5)
        return (param - before).abs().max().item()

    assert moved(None) > 5e-2
    assert moved(1.0) == pytest.approx(1e-2)


def test_closure_and_hooks() -> None:
    params = parameters()
    optimizer = StableAdamW(params)
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda *_: calls.append("hook"))

    def closure() -> float:
        assert torch.is_grad_enabled()
        give_gradients(params, 0)
        calls.append("closure")
        return 1.5

    assert optimizer.step(closure) == 1.5 and calls == ["closure", "hook"]
    before = params[0].detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(params[0], before)


def test_a_group_may_be_added_and_parameters_may_move() -> None:
    params = parameters()
    optimizer = StableAdamW(params[:2])
    give_gradients(params, 0)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:], "lr": 1e-2})
    params[0].data = params[0].data.clone()
    before = params[0].detach().clone()
    optimizer.step()
    assert not torch.equal(params[0], before)
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2, 1, 1, 1]
    with pytest.raises(ValueError, match="eps is 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "eps": 0})
    assert len(optimizer.param_groups) == 2


def test_layouts_of_gradients() -> None:
    """A gradient is laid out as it likes."""
    params, others = [nn.Parameter(torch.randn(4, 6).t()) for _ in range(1)], None
    others = [nn.Parameter(params[0].detach().contiguous())]
    grad = torch.randn(6, 4)
    params[0].grad, others[0].grad = grad.clone(), grad.clone()
    for some in (params, others):
        StableAdamW(some).step()
    assert torch.equal(params[0], others[0]) and params[0].stride() == (1, 6)


def test_names_and_norms() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    optimizer = StableAdamW(swcompile.split_decay_groups(model, 0.1))
    assert optimizer.parameter_names() == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.last_rms().isnan().all() and optimizer.last_update_norms().isnan().all()
    model(torch.randn(2, 4)).square().sum().backward()
    model[0].bias.grad = None
    optimizer.step()
    rms = dict(zip(optimizer.parameter_names(), optimizer.last_rms().tolist(), strict=True))
    assert math.isnan(rms["0.bias"]) and rms["1.bias"] == pytest.approx(1.0)
    assert (optimizer.last_update_norms()[[0, 2, 3]] > 0).all() and optimizer.last_update_norms()[1] == 0
    assert StableAdamW(model.parameters()).parameter_names() == ["0.0", "0.1", "0.2", "0.3"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, "lr is -1.0; it takes a number of at least 0"),
    ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it takes two numbers"),
    ({"eps": 0.0}, "eps is 0.0; it takes a number above 0"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"clip_threshold": 0.0}, "clip_threshold is 0.0; it takes a number above 0, or None"),
    ({"loss_scale": math.inf}, "loss_scale is inf; it takes a finite number"),
    ({"beta2_warmup": -0.8}, "beta2_warmup is -0.8"),
    ({"decay_by": "clipped"}, "decay_by is 'clipped'; did you mean 'clipped_lr'"),
    ({"decay_by": "schedule", "lr": 0.0}, "max_lr is 0.0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableAdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("param", "grad", "message"),
    [
        (torch.ones(3, dtype=torch.float16), torch.ones(3, dtype=torch.float16), r"parameter a is torch.float16; .* under torch.autocast"),
        (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), "parameter a is torch.float64"),
        (torch.ones(4, 6)[:, :3], torch.ones(4, 3), r"parameter a has gaps between its elements \(strides \(6, 1\)\)"),
        (torch.ones(3, 2), torch.ones(3, 2).to_sparse(), "the gradient of a is sparse"),
    ],
)
def test_wrong_tensors(param: torch.Tensor, grad: torch.Tensor, message: str) -> None:
    wrong, other = nn.Parameter(param), nn.Parameter(torch.ones(3))
    optimizer = StableAdamW([("b", other), ("a", wrong)])
    wrong.grad, other.grad = grad, torch.ones(3)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(other, torch.ones(3))


def train_a_model(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> list[float]:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    x = torch.randn(4, 6, 32)
    optimizer, losses = optimizer_of(model), []
    for _ in range(30):
        loss = (model(x) - x.roll(1, 0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_trains() -> None:
    losses = train_a_model(lambda model: StableAdamW(swcompile.split_decay_groups(model, 0.1), lr=3e-3))
    assert losses[-1] < 0.7 * losses[0]
