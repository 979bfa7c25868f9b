"""GlobalBatchNorm: torch's on one process, and on two and three processes torch's on the joint batch."""

import copy
import inspect
import re

import pytest
import torch
from processes import in_a_group
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm as OnCuda
from torch.nn.parallel import DistributedDataParallel

from contrastive_core.batch_norm import GlobalBatchNorm, _Normalise, globalize_batch_norm, joint_moments
from contrastive_core.gather import mean_weight, row_counts

CHANNELS = 4
COUNTS = {
    2: {"equal": [3, 3], "unequal": [2, 5], "one has none": [4, 0]},
    3: {"equal": [2, 2, 2], "unequal": [0, 1, 5]},
}
SHAPES = {"b c": (), "b c l": (5,), "b c h w": (3, 2)}
LAYERS = {
    "as it comes": {},
    "momentum=None": {"momentum": None},
    "affine=False": {"affine": False},
    "no running statistics": {"track_running_stats": False},
    "eps, momentum": {"eps": 0.1, "momentum": 0.7},
}
STEPS = 3


def rows(count, shape=(), seed=0, dtype=torch.float64):
    values = torch.randn(count, CHANNELS, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * 3 + 1).to(dtype)


def torch_s(shape, **options):
    kind = nn.BatchNorm2d if len(shape) == 2 else nn.BatchNorm1d
    layer = kind(CHANNELS, dtype=torch.float64, **options)
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 2, CHANNELS))
            layer.bias.copy_(torch.linspace(-1, 1, CHANNELS))
    return layer


def train(layer, counts, shape, rank=None, scale=1.0):
    """Three batches through the layer; the outputs, the inputs' gradients and those of the parameters.

    The loss is the sum of the rows' losses, which is what gradients that are summed over processes belong to.
    """
    outputs, slopes = [], []
    for seed in range(STEPS):
        everyone, weights = (rows(sum(counts), shape, 10 * seed + i) for i in range(2))
        own, own_weights = ((t if rank is None else t.split(counts)[rank]) for t in (everyone, weights))
        inputs = own.clone().requires_grad_()
        output = layer(inputs)
        (scale * (output * own_weights + output.pow(3)).sum()).backward()
        outputs.append(output.detach())
        slopes.append(inputs.grad)
    gradients = [p.grad for p in layer.parameters()]
    return outputs, slopes, gradients, {name: value.clone() for name, value in layer.state_dict().items()}


def network():
    torch.manual_seed(0)
    norms = nn.BatchNorm2d(CHANNELS), nn.BatchNorm1d(3, affine=False)
    head = nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * 4, 3), norms[1], nn.Tanh())
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 2), norms[0], nn.ReLU(), head).double()


def mean_loss(network, counts, rank=None):
    """The mean over the joint batch, of which each process has its share: dL/d(parameters), as DDP averages them."""
    images, weights = rows(sum(counts), (3, 3)), rows(sum(counts), (), 1)[:, :3]
    if rank is not None:
        images, weights = images.split(counts)[rank], weights.split(counts)[rank]
    by_row = (network(images) * weights).sum(1)
    loss = by_row.mean() if rank is None else by_row.sum() / max(len(by_row), 1) * mean_weight(row_counts(len(by_row)))
    loss.backward()
    return [p.grad for p in network.parameters()]


def under_ddp(counts, rank):
    bare = globalize_batch_norm(network())
    wrapped = DistributedDataParallel(bare)
    mean_loss(wrapped, counts, rank)
    gradients = [p.grad.clone() for p in bare.parameters()]
    dist.barrier()
    return gradients, {name: value.clone() for name, value in bare.state_dict().items()}


def offset_rows(rank, offset):
    """Means of 10,000 in float32, of which the processes hold a different one each."""
    return rows(1000, seed=rank, dtype=torch.float32) * 0.03 + offset + rank


def second_derivative():
    inputs = rows(3).requires_grad_()
    output = GlobalBatchNorm(CHANNELS, dtype=torch.float64)(inputs).pow(3).sum()
    try:
        torch.autograd.grad(output, inputs, create_graph=True)
    except NotImplementedError as error:
        return str(error)
    return "no error"


def in_eval_mode(rank):
    """Only one process calls: it must not wait for the others."""
    results = []
    for options in ({}, {"track_running_stats": False}):
        layer = globalize_batch_norm(torch_s((), **options)).eval()
        results.append(layer(rows(5)).detach() if rank == 0 else None)
    return results


def half_precision(rank, size):
    mine = rows(2 * size, seed=3).chunk(size)[rank].to(torch.bfloat16).requires_grad_()
    layer = GlobalBatchNorm(CHANNELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(mine)
    output.float().pow(3).sum().backward()
    return output.detach(), mine.grad, layer.weight.grad, layer.running_var


def too_few(rank):
    try:
        GlobalBatchNorm(CHANNELS)(torch.zeros(int(rank == 0), CHANNELS))
    except ValueError as error:
        return str(error)
    return "no error"


def result_of(rank, size):
    result = {}
    for case, counts in COUNTS[size].items():
        for axes, shape in SHAPES.items():
            for name, options in LAYERS.items():
                layer = globalize_batch_norm(torch_s(shape, **options))
                result[case, axes, name] = train(layer, counts, shape, rank)
        result[case, "ddp"] = under_ddp(counts, rank)
    result["offset"] = GlobalBatchNorm(CHANNELS)(offset_rows(rank, 1e4)).detach()
    result["second"] = second_derivative()
    result["eval"] = in_eval_mode(rank)
    result["half"] = half_precision(rank, size)
    result["too few"] = too_few(rank)
    one_row_each = GlobalBatchNorm(1, eps=0)
    result["one row each"] = one_row_each(torch.tensor([[2.0 * rank]])).item(), one_row_each.running_var.item()
    channels_last = rows(2, (3, 2)).to(memory_format=torch.channels_last)
    output = GlobalBatchNorm(CHANNELS, dtype=torch.float64)(channels_last)
    result["channels last"] = output.is_contiguous(memory_format=torch.channels_last)
    return result


@pytest.fixture(scope="module")
def results():
    """What each of two, and of three processes found."""
    return {size: in_a_group(size, result_of, size) for size in COUNTS}


SETTINGS = [(size, case) for size, cases in COUNTS.items() for case in cases]
exactly = {"rtol": 1e-10, "atol": 1e-11}


@pytest.mark.parametrize(("size", "case"), SETTINGS)
@pytest.mark.parametrize("axes", list(SHAPES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_several_processes_are_one_with_the_joint_batch(results, size, case, axes, name):
    counts = COUNTS[size][case]
    outputs, slopes, gradients, state = train(torch_s(SHAPES[axes], **LAYERS[name]), counts, SHAPES[axes])
    ours = [result[case, axes, name] for result in results[size]]
    for step in range(STEPS):
        torch.testing.assert_close(torch.cat([one[0][step] for one in ours]), outputs[step], **exactly)
        torch.testing.assert_close(torch.cat([one[1][step] for one in ours]), slopes[step], **exactly)
    for i, gradient in enumerate(gradients):  # each process's own part: DDP's part is to bring them together
        torch.testing.assert_close(sum(one[2][i] for one in ours), gradient, **exactly)
    for one in ours:
        assert list(one[3]) == list(state)
        for key, value in state.items():
            torch.testing.assert_close(one[3][key], value, **exactly)
            assert torch.equal(one[3][key], ours[0][3][key]), "all processes hold the same bits"


@pytest.mark.parametrize(("size", "case"), SETTINGS)
def test_a_network_under_ddp_has_the_joint_batch_s_gradient(results, size, case):
    alone = network()
    expected = mean_loss(alone, COUNTS[size][case])
    for result in results[size]:
        gradients, state = result[case, "ddp"]
        torch.testing.assert_close(gradients, expected, **exactly)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(state[name], value, **exactly)


@pytest.mark.parametrize("size", list(COUNTS))
def test_a_small_variance_beside_a_large_mean(results, size):
    """Squares of 10,000 leave float32 no digit of a variance of 0.01; their deviations do."""
    joint = torch.cat([offset_rows(rank, 1e4) - rank for rank in range(size)]).double()
    assert (joint.float().square().mean(0) - joint.float().mean(0).square() - joint.var(0)).abs().max() > 0.1
    rank_by_rank = torch.cat([offset_rows(rank, 1e4) for rank in range(size)]).double()
    expected = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)(rank_by_rank).detach()
    ours = torch.cat([result["offset"] for result in results[size]])
    # float32 holds a mean of 10,000 to within 0.0005, about a thousandth of the deviation
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("size", list(COUNTS))
def test_half_precision_in_and_out_with_statistics_in_float32(results, size):
    inputs = rows(2 * size, seed=3).to(torch.bfloat16).double().requires_grad_()
    layer = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)
    output = layer(inputs)
    # the loss sees the output as bf16 holds it
    output.backward(3 * output.detach().to(torch.bfloat16).double().square())
    for rank, result in enumerate(results[size]):
        ours, slope, _, variance = result["half"]
        assert ours.dtype == slope.dtype == torch.bfloat16
        assert variance.dtype == torch.float32
        torch.testing.assert_close(variance.double(), layer.running_var, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.double(), output.detach().chunk(size)[rank], rtol=0.005, atol=1e-3)
        torch.testing.assert_close(slope.double(), inputs.grad.chunk(size)[rank], rtol=0.03, atol=0.03)
    total = sum(result["half"][2] for result in results[size])
    torch.testing.assert_close(total.double(), layer.weight.grad, rtol=0.02, atol=0.02)


def test_one_row_on_each_process_is_enough(results):
    assert [result["one row each"] for result in results[2]] == [(-1.0, pytest.approx(1.1)), (1.0, pytest.approx(1.1))]


def test_one_value_in_all_is_an_error_on_every_process(results):
    message = "a channel has 1 values in the batch of all processes: pass at least 2"
    assert [result["too few"] for result in results[2]] == [message] * 2


def test_eval_mode_asks_nobody(results):
    for size in COUNTS:
        for options, ours in zip(({}, {"track_running_stats": False}), results[size][0]["eval"], strict=True):
            torch.testing.assert_close(ours, torch_s((), **options).eval()(rows(5)).detach(), **exactly)


def test_second_derivatives_across_processes_are_refused(results):
    for result in results[2]:
        assert result["second"].startswith("joint statistics have no second derivatives")


def test_channels_last_stays(results):
    assert all(result["channels last"] for result in results[2])


# ---- one process ----


@pytest.mark.parametrize("axes", list(SHAPES))
@pytest.mark.parametrize("name", list(LAYERS))
def test_one_process_is_torch_s_own(axes, name):
    layer = torch_s(SHAPES[axes], **LAYERS[name])
    ours = globalize_batch_norm(copy.deepcopy(layer))
    found, expected = (train(one, [6], SHAPES[axes]) for one in (ours, layer))
    for a, b in zip(found[:3], expected[:3], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a, b, strict=True))
    assert {key: value.tolist() for key, value in found[3].items()} == {
        key: value.tolist() for key, value in expected[3].items()
    }


@pytest.mark.parametrize("axes", list(SHAPES))
@pytest.mark.parametrize("affine", [True, False])
def test_our_own_function_has_the_gradient_of_what_it_computes(axes, affine):
    """torch's is what one process calls, so ours is called by name."""

    def normalised(x, *parameters):
        mean, variance, total = joint_moments(x)
        weight, bias = parameters or (None, None)
        return _Normalise.apply(x, weight, bias, mean, (variance + 1e-5).rsqrt(), total)

    layer = torch_s(SHAPES[axes], affine=affine)
    inputs = rows(3, SHAPES[axes]).requires_grad_()
    assert torch.autograd.gradcheck(normalised, (inputs, *layer.parameters()))
    torch.testing.assert_close(normalised(inputs, *layer.parameters()), layer(inputs), **exactly)


def test_moments_of_one_process():
    x = rows(7, (3, 2))
    mean, variance, total = joint_moments(x)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.var((0, 2, 3), correction=0))
    assert total == 42
    assert joint_moments(x.to(torch.float16))[0].dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (3,)])
def test_an_input_without_channels_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"the input has shape {shape}: pass b c")):
        GlobalBatchNorm(3)(torch.zeros(shape))


# ---- conversion ----


def test_conversion_keeps_everything_and_the_layers_are_found():
    from contrastive_core.grad_cache import batch_norms  # accelerate takes a while, and each process imports this file

    before = nn.Sequential(
        nn.BatchNorm1d(2, eps=0.1, momentum=None),
        nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Conv2d(3, 3, 1)),
        nn.BatchNorm3d(4, track_running_stats=False).eval(),
        nn.LayerNorm(5),
    )
    before[0].weight.requires_grad_(False)
    state, described = copy.deepcopy(before.state_dict()), repr(before)
    parameters, modes = list(before.parameters()), [layer.training for layer in before.modules()]
    after = globalize_batch_norm(before)
    assert after is before
    assert batch_norms(after) == ["0", "1.0", "2"]
    assert all(type(after.get_submodule(name)) is GlobalBatchNorm for name in batch_norms(after))
    assert repr(after) == re.sub(r"BatchNorm\dd", "GlobalBatchNorm", described)  # num_features, eps, momentum, ...
    assert list(after.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in after.state_dict().items())
    assert all(p is q for p, q in zip(after.parameters(), parameters, strict=True))
    assert [layer.training for layer in after.modules()] == modes
    assert not after[0].weight.requires_grad
    assert repr(globalize_batch_norm(after)) == repr(after)  # once more changes nothing


def test_a_batch_norm_itself_and_one_in_two_places_are_converted():
    shared = nn.BatchNorm1d(2)
    twice = globalize_batch_norm(nn.ModuleDict({"a": shared, "b": shared}))
    assert twice["a"] is twice["b"] is shared
    assert isinstance(globalize_batch_norm(nn.BatchNorm2d(2)), GlobalBatchNorm)


def test_a_subclass_that_may_do_more_is_refused_and_nothing_is_changed():
    class WithReLU(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    module = nn.Sequential(nn.BatchNorm2d(2), WithReLU(2))
    with pytest.raises(ValueError, match=re.escape("1 is a WithReLU, whose own forward would be lost: build it with")):
        globalize_batch_norm(module)
    assert type(module[0]) is nn.BatchNorm2d


# ---- CUDA ----


class OfOneProcess:
    """Stands in for torch's function where there is no GPU, with the arguments that its forward has."""

    names = inspect.signature(OnCuda.forward).parameters.keys() - {"self"}

    @staticmethod
    def apply(input, weight, bias, running_mean, running_var, eps, momentum, process_group, world_size):
        assert input.dtype == (torch.bfloat16 if len(input) else torch.float32)
        return F.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)


@pytest.mark.parametrize("name", list(LAYERS))
def test_torch_s_function_gets_what_it_asks_for(monkeypatch, name):
    assert inspect.signature(OfOneProcess.apply).parameters.keys() == OfOneProcess.names
    monkeypatch.setattr("contrastive_core.batch_norm._OnCuda", OfOneProcess)
    layer = torch_s((), **LAYERS[name]).float()
    ours = globalize_batch_norm(copy.deepcopy(layer))
    for seed in range(STEPS):
        inputs = rows(5, seed=seed, dtype=torch.bfloat16)
        assert torch.equal(ours._on_cuda(inputs), layer(inputs))
    for key, value in layer.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    assert ours.eval()._on_cuda(rows(0, dtype=torch.bfloat16)).dtype == torch.bfloat16  # sent as float32


class OfAnEmptyPart(torch.autograd.Function):
    """Stands in for torch's function of an empty batch, which leaves no gradients behind."""

    @staticmethod
    def forward(ctx, input, weight, bias, *_):
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx, _):
        return (None,) * 9


def test_on_cuda_an_empty_part_has_gradients_of_zero(monkeypatch):
    monkeypatch.setattr("contrastive_core.batch_norm._OnCuda", OfAnEmptyPart)
    layer = GlobalBatchNorm(CHANNELS)
    upstream = torch.ones((), requires_grad=True)
    output = layer._on_cuda(torch.zeros(0, CHANNELS, 3, 2) * upstream)
    output.sum().backward()
    assert output.shape == (0, CHANNELS, 3, 2)
    assert [float(p.grad.abs().sum()) for p in (upstream, layer.weight, layer.bias)] == [0, 0, 0]


def on_one_gpu(rank):
    """Two processes share it over gloo (NCCL wants one each): torch's function, called as on several GPUs."""
    found = {}
    for case, counts in COUNTS[2].items():
        layer = globalize_batch_norm(torch_s((3, 2))).cuda()
        mine = rows(sum(counts), (3, 2)).split(counts)[rank].cuda().requires_grad_()
        output = layer(mine)
        output.pow(3).sum().backward()
        outputs, slopes = output.detach().cpu(), mine.grad.cpu()
        gradients = [torch.zeros(CHANNELS) if p.grad is None else p.grad.cpu() for p in layer.parameters()]
        half = GlobalBatchNorm(CHANNELS).cuda()(mine.detach().bfloat16())
        state = {name: value.cpu() for name, value in layer.state_dict().items()}
        found[case] = outputs, slopes, gradients, state, half.cpu()
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_too_several_processes_are_one():
    found = in_a_group(2, on_one_gpu)
    for case, counts in COUNTS[2].items():
        layer, inputs = torch_s((3, 2)), rows(sum(counts), (3, 2)).requires_grad_()
        output = layer(inputs)
        output.pow(3).sum().backward()
        ours = [one[case] for one in found]
        torch.testing.assert_close(torch.cat([one[0] for one in ours]), output.detach(), rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(torch.cat([one[1] for one in ours]), inputs.grad, rtol=1e-7, atol=1e-7)
        for i, p in enumerate(layer.parameters()):
            torch.testing.assert_close(sum(one[2][i] for one in ours), p.grad, rtol=1e-7, atol=1e-7)
        for one in ours:
            assert one[4].dtype == torch.bfloat16
            for name, value in layer.state_dict().items():
                torch.testing.assert_close(one[3][name], value, rtol=1e-7, atol=1e-7)
