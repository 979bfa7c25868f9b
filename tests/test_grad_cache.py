"""The cached step against one ordinary step on the whole batch: every parameter, dropout, fp16, two processes."""

import logging
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from processes import in_a_group
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_core.gather import world
from contrastive_core.grad_cache import CachedStep, average_gradients_, batch_norms, check_cacheable
from contrastive_core.losses import NTXentLoss, normalize
from contrastive_core.method import Batch, Method
from cpc.context import ContextNetwork
from cpc.method import CPC

pytestmark = pytest.mark.usefixtures("as_a_new_process")


class Siamese(Method):
    """SimCLR as short as can be, with a learned temperature and whatever layer is under test in its middle."""

    def __init__(self, middle=None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), middle or nn.Identity(), nn.Tanh(), nn.Linear(8, 4))
        self.loss = NTXentLoss(0.3, learn_temperature=True)

    def represent(self, batch):
        first, second = batch.views
        return {"z1": self.encoder(first), "z2": self.encoder(second)}

    def contrast(self, representations):
        z1, z2 = representations["z1"], representations["z2"]
        return self.loss(z1, z2), {"cosine": (normalize(z1) * normalize(z2)).sum(1).mean().detach()}


def images(count, dtype=torch.float64):
    return torch.randn(2, count, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def batch_of(views):
    return Batch(tuple(views), torch.arange(len(views[0])), torch.zeros(len(views[0])))


def siamese(dtype=torch.float64, middle=None):
    torch.manual_seed(0)
    return Siamese(middle).to(dtype)


def cached_gradients(method, batches, accelerator=None):
    accelerator = accelerator or Accelerator(cpu=True)
    passes = CachedStep(method, [partial(lambda b: b, b) for b in batches], accelerator)
    loss, metrics = passes.forward()
    passes.backward(loss)
    return loss.detach(), metrics, {name: p.grad for name, p in method.named_parameters()}


def ordinary_gradients(method, batch):
    loss, metrics = method(batch)
    loss.backward()
    return loss.detach(), metrics, {name: p.grad for name, p in method.named_parameters()}


def assert_same(cached, ordinary, **tolerance):
    tolerance = {"rtol": 1e-12, "atol": 1e-14, **tolerance}
    torch.testing.assert_close(cached[0], ordinary[0], **tolerance)
    assert set(cached[1]) == set(ordinary[1])
    for name, gradient in ordinary[2].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(cached[2][name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("sizes", [[8], [4, 4], [2, 2, 2, 2], [3, 5], [1, 6, 1]])
def test_every_parameter_gets_the_gradient_of_the_whole_batch(sizes):
    views = images(8)
    parts = [batch_of(part) for part in views.split(sizes, dim=1)]
    cached, ordinary = cached_gradients(siamese(), parts), ordinary_gradients(siamese(), batch_of(views))
    assert "loss.temperature.log_temperature" in ordinary[2]
    assert_same(cached, ordinary)
    torch.testing.assert_close(cached[1]["cosine"], ordinary[1]["cosine"])


def test_plain_accumulation_gives_another_gradient():
    """So that the tests above mean something."""
    method, views = siamese(), images(8)
    for part in views.split(4, dim=1):
        (method(batch_of(part))[0] / 2).backward()
    whole = ordinary_gradients(siamese(), batch_of(views))[2]["encoder.0.weight"]
    assert (method.encoder[0].weight.grad - whole).norm() > 0.05 * whole.norm()


def cpc():
    torch.manual_seed(0)

    class Pixels(nn.Module):
        dim = 6

        def forward(self, patches):
            return patches.flatten(1)

    return CPC(Pixels(), offsets=[1, 2], target_dim=4, context=partial(ContextNetwork, width=5, layers=1)).double()


def test_cpc_is_cut_at_predictions_and_targets():
    grids = torch.randn(6, 3, 3, 6, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parts = [batch_of([part]) for part in grids.split([2, 3, 1])]
    cached, ordinary = cached_gradients(cpc(), parts), ordinary_gradients(cpc(), batch_of([grids]))
    assert_same(cached, ordinary)
    for name, value in ordinary[1].items():
        torch.testing.assert_close(cached[1][name], value)


def test_gradients_are_added_to_what_is_there():
    method, views = siamese(), images(4)
    once = cached_gradients(siamese(), [batch_of(views)])[2]
    for _ in range(2):
        twice = cached_gradients(method, [batch_of(views)])[2]
    torch.testing.assert_close(twice["encoder.0.weight"], 2 * once["encoder.0.weight"])


def test_dropout_and_views_are_drawn_alike_in_both_passes():
    """The gradient is that of the loss whose masks the first pass drew; nothing is drawn twice from the generator."""
    views, drawn = images(6), []

    def make(part):
        noisy = [view + 0.1 * torch.randn(view.shape, dtype=view.dtype) for view in part]
        drawn.append(torch.stack(noisy))
        return batch_of(noisy)

    method = siamese(middle=nn.Dropout(0.5))
    torch.manual_seed(7)
    passes = CachedStep(method, [partial(make, part) for part in views.split(2, dim=1)], Accelerator(cpu=True))
    loss, _ = passes.forward()
    after_first = torch.get_rng_state()
    passes.backward(loss)
    assert torch.equal(torch.get_rng_state(), after_first)
    assert all(torch.equal(first, second) for first, second in zip(drawn[:3], drawn[3:], strict=True))

    again = siamese(middle=nn.Dropout(0.5))
    torch.manual_seed(7)
    parts = [again.represent(make(part)) for part in views.split(2, dim=1)]
    expected, _ = again.contrast({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(method.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_frozen_parameters_and_stopped_representations_stay_without_gradient():
    class Stopped(Siamese):
        def represent(self, batch):
            representations = super().represent(batch)
            return {**representations, "z2": representations["z2"].detach()}

    torch.manual_seed(0)
    method = Stopped().double()
    method.encoder[0].bias.requires_grad_(False)
    gradients = cached_gradients(method, [batch_of(part) for part in images(6).split(3, dim=1)])[2]
    assert gradients["encoder.0.bias"] is None
    torch.manual_seed(0)
    ordinary = ordinary_gradients(Stopped().double(), batch_of(images(6)))[2]
    torch.testing.assert_close(gradients["encoder.0.weight"], ordinary["encoder.0.weight"])


def test_batch_norm_is_named_and_its_statistics_move_once(caplog):
    method = siamese(middle=nn.BatchNorm1d(8))
    assert batch_norms(method) == ["encoder.1"]
    with caplog.at_level(logging.WARNING):
        check_cacheable(method)
    assert "BatchNorm layers (encoder.1, ...) see a micro-batch at a time" in caplog.text
    plain = siamese(middle=nn.BatchNorm1d(8))
    parts = [batch_of(part) for part in images(8).split(4, dim=1)]
    cached_gradients(method, parts)
    for part in parts:
        plain.represent(part)
    torch.testing.assert_close(method.encoder[1].running_mean, plain.encoder[1].running_mean)
    assert method.encoder[1].num_batches_tracked == plain.encoder[1].num_batches_tracked == 4


def test_without_batch_norm_nothing_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        check_cacheable(siamese(middle=nn.LayerNorm(8)))
    assert not caplog.text


def test_a_method_without_two_halves_is_named():
    class Whole(Method):
        def forward(self, batch):
            return torch.zeros(()), {}

    with pytest.raises(ValueError, match="in two halves, represent and contrast; Whole has a forward of its own"):
        check_cacheable(Whole())


def test_a_method_that_adds_to_its_halves_is_refused():
    class Regularised(Siamese):
        def forward(self, batch):
            loss, metrics = super().forward(batch)
            return loss + self.encoder[0].weight.square().sum(), metrics

    with pytest.raises(ValueError, match="Regularised has a forward of its own: leave grad_cache out"):
        check_cacheable(Regularised())


def test_representations_that_are_not_one_an_image_are_named():
    class Stacked(Siamese):
        def represent(self, batch):
            return {"z": torch.cat([self.encoder(view) for view in batch.views])}

    with pytest.raises(ValueError, match="z has 6 rows for 3 images: represent must give one row an image"):
        cached_gradients(Stacked().double(), [batch_of(images(3))])


@contextmanager
def half_precision(accelerator, scale):
    """An accelerator as on a GPU with precision=fp16, which accelerate does not offer on a CPU; torch does."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    accelerator.autocast = partial(torch.autocast, "cpu", torch.float16)
    yield accelerator
    accelerator.scaler = None


def test_fp16_scales_once():
    views = images(8, torch.float32)
    with half_precision(Accelerator(cpu=True), scale=1024.0) as accelerator:
        parts = [batch_of(part) for part in views.split(2, dim=1)]
        cached = cached_gradients(siamese(torch.float32), parts, accelerator)
        whole = siamese(torch.float32)
        with accelerator.autocast():
            loss, _ = whole(batch_of(views))
        accelerator.scaler.scale(loss).backward()
    torch.testing.assert_close(cached[0], loss.detach(), rtol=1e-4, atol=1e-5)
    for name, p in whole.named_parameters():
        difference = (cached[2][name] - p.grad).norm() / p.grad.norm()
        assert difference < 5e-3, name  # fp16's rounding, in another order
    exact = ordinary_gradients(siamese(), batch_of(images(8)))[2]["encoder.0.weight"]
    assert float(cached[2]["encoder.0.weight"].norm() / exact.norm()) == pytest.approx(1024, rel=0.01)


def one_process(rank):
    warnings.simplefilter("ignore", FutureWarning)
    mine = {"equal": slice(4 * rank, 4 * rank + 4), "unequal": slice(0, 5) if rank == 0 else slice(5, 8)}
    results = {}
    exchanges = []
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        exchanges.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    for name, chosen in mine.items():
        method = siamese()
        wrapped = DistributedDataParallel(method)  # its hooks are on the parameters
        accelerator = Accelerator(cpu=True)
        parts = [batch_of(part) for part in images(8)[:, chosen].split(2, dim=1)]
        exchanges.clear()
        dist.all_reduce = counted
        with wrapped.no_sync():
            results[name] = cached_gradients(method, parts, accelerator)
        dist.all_reduce = all_reduce
        results[f"{name}, exchanged"] = list(exchanges)
        del wrapped
    method = siamese(torch.float32)
    with half_precision(Accelerator(cpu=True), scale=1024.0) as accelerator:
        parts = [batch_of(part) for part in images(8, torch.float32)[:, mine["equal"]].split(2, dim=1)]
        results["fp16"] = cached_gradients(method, parts, accelerator)
    return world(), results


@pytest.fixture(scope="module")
def two_processes():
    loaded = in_a_group(2, one_process)
    assert [place for place, _ in loaded] == [(0, 2), (1, 2)]
    return [results for _, results in loaded]


@pytest.mark.parametrize("shares", ["equal", "unequal"])
def test_two_processes_get_the_gradient_of_the_joint_batch(two_processes, shares):
    ordinary = ordinary_gradients(siamese(), batch_of(images(8)))
    mean_loss = sum(results[shares][0] for results in two_processes) / 2
    torch.testing.assert_close(mean_loss, ordinary[0], rtol=1e-12, atol=1e-14)
    for results in two_processes:
        _, metrics, gradients = results[shares]
        assert_same((ordinary[0], metrics, gradients), ordinary)


def test_two_processes_exchange_the_weights_gradients_once(two_processes):
    weights = sum(p.numel() for p in siamese().parameters())
    for results in two_processes:
        assert results["equal, exchanged"] == [weights]  # representations' gradients go by all-to-all


def test_two_processes_in_fp16(two_processes):
    exact = ordinary_gradients(siamese(), batch_of(images(8)))[2]
    for results in two_processes:
        for name, gradient in results["fp16"][2].items():
            difference = (gradient.double() / 1024 - exact[name]).norm() / exact[name].norm()
            assert difference < 5e-3, name


def test_alone_there_is_nothing_to_average():
    method = siamese()
    cached_gradients(method, [batch_of(images(4))])
    before = method.encoder[0].weight.grad.clone()
    average_gradients_(method)
    assert torch.equal(method.encoder[0].weight.grad, before)
