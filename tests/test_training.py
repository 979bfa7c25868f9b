"""The one loop, on methods small enough to check by hand, and CPC on a handful of images."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from contrastive_core import training
from contrastive_core.augment import GaussianNoise
from contrastive_core.data import ImageDataset, LoadedBatch, training_batches
from contrastive_core.method import Batch, Method
from contrastive_core.momentum import ema_update_, polyak_decay
from contrastive_core.optim import constant
from contrastive_core.randomness import Randomness
from contrastive_core.training import make_batch, train_steps
from cpc.context import ContextNetwork
from cpc.encoders import resnet_small
from cpc.method import CPC
from cpc.patch_augment import PatchAugment
from cpc.views import PatchViews

pytestmark = pytest.mark.usefixtures("as_a_new_process")


class Line(Method):
    """loss = mean over images of (weight . view - 1)^2; it remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 1, bias=False)
        nn.init.zeros_(self.encoder.weight)
        self.progress, self.batches, self.bad_step = [], [], None

    def forward(self, batch):
        self.batches.append(batch)
        loss = (self.encoder(batch.views[0]) - 1).square().mean()
        if len(self.batches) == self.bad_step:
            loss = loss / 0
        return loss, {"seen": torch.tensor(float(len(batch.indices)))}

    def after_step(self, progress):
        self.progress.append(progress)


def colours(images, randomness):
    """One view: each image's mean colour, with the first number of its place added to the red."""
    view = images.float().mean((2, 3)) / 255
    view[:, 0] += randomness.uniform("red")
    return (view,)


def dataset(count=8, size=4):
    pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(pixels.numpy(), size=size, labels=[i % 2 for i in range(count)]).cached()


def run(method, *, steps=4, start=0, accumulate=1, optimizer=None, views=colours, data=None, batch_size=4, **options):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    optimizer = optimizer or torch.optim.SGD(method.parameters(), lr=0.1)
    batches = training_batches(
        data or dataset(), batch_size=batch_size, seed=0, start=start, steps=steps, accumulate=accumulate
    )
    prepared, optimizer = accelerator.prepare(method, optimizer)
    options = {"seed": 0, "schedule": constant, **options}
    return train_steps(prepared, optimizer, accelerator, batches, views, start=start, steps=steps, **options)


def test_a_step_by_hand():
    method, loaded = Line(), next(training_batches(dataset(), batch_size=4, seed=0, start=0, steps=1))[0]
    (view,) = colours(loaded.images, Randomness(0, 0, loaded.places))
    (result,) = run(method, steps=1, schedule=lambda progress: 0.5)
    assert result.step == 1
    assert result.metrics["loss"] == 1  # the weight was zero
    assert result.metrics["lr"] == 0.05
    torch.testing.assert_close(method.encoder.weight, 0.05 * 2 * view.mean(0, keepdim=True))


def test_as_many_steps_are_taken_as_asked_for_whatever_batches_there_are():
    accelerator, method = Accelerator(cpu=True), Line()
    prepared = accelerator.prepare(method, torch.optim.SGD(method.parameters(), lr=0.1))

    def taken(batches, steps):
        loaded = training_batches(dataset(), batch_size=4, seed=0, start=0, steps=batches)
        options = {"seed": 0, "start": 0, "steps": steps, "schedule": constant}
        return [result.step for result in train_steps(*prepared, accelerator, loaded, colours, **options)]

    assert taken(6, 4) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="batches ended before step 3 of 4: pass one for each"):
        taken(2, 4)


def test_a_few_steps_lower_the_loss():
    losses = [float(result.metrics["loss"]) for result in run(Line(), steps=20)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(loss == loss for loss in losses)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_give_the_gradient_of_the_whole_batch(accumulate):
    whole, parts = Line(), Line()
    one = list(run(whole, batch_size=8, clip=100.0))
    several = list(run(parts, batch_size=8, accumulate=accumulate, clip=100.0))
    torch.testing.assert_close(parts.encoder.weight, whole.encoder.weight)
    for a, b in zip(one, several, strict=True):
        torch.testing.assert_close(b.metrics["loss"], a.metrics["loss"])
        torch.testing.assert_close(b.metrics["gradient_norm"], a.metrics["gradient_norm"])
    assert several[0].metrics["seen"] == 8 / accumulate
    assert len(parts.batches) == 4 * accumulate
    assert parts.progress == whole.progress == [0.0, 0.25, 0.5, 0.75]  # once an optimizer step


def tiny_cpc():
    torch.manual_seed(0)
    context = partial(ContextNetwork, width=4, layers=1)
    return CPC(resnet_small(4, blocks=(1,)), offsets=[1], directions=["down"], target_dim=4, context=context).double()


def double_patches(images, randomness):
    views = PatchViews(image_size=12, patch_size=4, stride=4, mean=[0.5] * 3, std=[0.25] * 3)
    return (views(images, randomness)[0].double(),)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_with_grad_cache_micro_batches_are_contrasted_as_one(accumulate):
    whole, parts, apart = tiny_cpc(), tiny_cpc(), tiny_cpc()
    options = {"batch_size": 8, "views": double_patches, "data": dataset(size=12), "steps": 3}
    one = list(run(whole, **options))
    several = list(run(parts, accumulate=accumulate, grad_cache=True, **options))
    plain = list(run(apart, accumulate=accumulate, **options))
    for a, b in zip(one, several, strict=True):
        assert set(a.metrics) == set(b.metrics)
        for name, value in a.metrics.items():
            torch.testing.assert_close(b.metrics[name], value, rtol=1e-10, atol=1e-12, msg=name)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert one[0].metrics["negatives"] == 8 * 9 - 1
    assert plain[0].metrics["negatives"] == 8 // accumulate * 9 - 1


@pytest.mark.parametrize("grad_cache", [False, True])
def test_what_the_device_is_waited_for_is_computed_where_somebody_looks(grad_cache, monkeypatch):
    """Every other number of a step is there, and equal, also where nobody does."""
    solved, solve = [], torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda matrix: (solved.append(1), solve(matrix))[1])
    options = {"batch_size": 8, "views": double_patches, "data": dataset(size=12), "steps": 3, "accumulate": 2}
    always = list(run(tiny_cpc(), grad_cache=grad_cache, **options))
    times = len(solved)
    some = list(run(tiny_cpc(), grad_cache=grad_cache, watched=lambda step: step != 2, **options))
    assert len(solved) - times == times * 2 // 3 > 0
    for a, b in zip(always, some, strict=True):
        left_out = {"effective_rank"} if a.step == 2 else set()
        assert set(a.metrics) - set(b.metrics) == left_out
        assert all(torch.equal(value, a.metrics[name]) for name, value in b.metrics.items())


def test_grad_cache_of_a_method_that_compares_nothing_is_an_error():
    with pytest.raises(ValueError, match="Line has a forward of its own: leave grad_cache out"):
        list(run(Line(), grad_cache=True))


def test_the_schedule_reaches_every_groups_own_base_rate():
    method = Line()
    other = nn.Parameter(torch.zeros(1))
    groups = [{"params": method.parameters(), "lr": 0.1}, {"params": [other], "lr": 0.01}]
    optimizer, asked, rates = torch.optim.SGD(groups, lr=1.0), [], []

    def schedule(progress):
        asked.append(progress)
        return 1 - progress

    for _ in run(method, optimizer=optimizer, schedule=schedule):
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert asked == [0.125, 0.375, 0.625, 0.875]
    assert rates == [pytest.approx([0.1 * factor, 0.01 * factor]) for factor in (0.875, 0.625, 0.375, 0.125)]


def test_clipping_bounds_the_whole_gradient():
    method = Line()
    (result,) = run(method, steps=1, clip=0.01)
    assert float(method.encoder.weight.detach().norm()) == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert result.metrics["gradient_norm"] > 0.1  # before it was clipped


@pytest.mark.parametrize(("bad_step", "accumulate", "named"), [(3, 1, 3), (4, 2, 2)])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(bad_step, accumulate, named):
    method = Line()
    method.bad_step = bad_step
    steps = run(method, accumulate=accumulate)
    for _ in range(named - 1):
        next(steps)
    weight = method.encoder.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=f"the loss is inf at step {named}: lower optimizer.lr or set clip"):
        next(steps)
    assert torch.equal(method.encoder.weight, weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_starting_the_next_steps_views_early_changes_nothing_but_when(accumulate, monkeypatch):
    """As on a GPU: views of step 2 are made before the weights of step 1 change, and hold the same numbers."""
    usual, early, order = Line(), Line(), []

    def watched(images, randomness):
        order.append(f"views {len(early.progress)}")
        return colours(images, randomness)

    expected = list(run(usual, accumulate=accumulate, batch_size=8))
    monkeypatch.setattr(training, "starts_ahead", lambda device: True)
    results = list(run(early, accumulate=accumulate, batch_size=8, views=watched))
    assert [result.step for result in results] == [1, 2, 3, 4]
    assert torch.equal(early.encoder.weight, usual.encoder.weight)
    assert [r.metrics["loss"] for r in results] == [r.metrics["loss"] for r in expected]
    # an accumulating step makes its other views when it needs them
    assert (
        order
        == {
            1: ["views 0", "views 0", "views 1", "views 2"],
            2: ["views 0", "views 0", "views 0", "views 1", "views 1", "views 2", "views 2", "views 3"],
        }[accumulate]
    )


def test_a_bad_loss_is_found_though_the_next_views_were_made(monkeypatch):
    monkeypatch.setattr(training, "starts_ahead", lambda device: True)
    method = Line()
    method.bad_step = 2
    steps = run(method)
    next(steps)
    weight = method.encoder.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="the loss is inf at step 2"):
        next(steps)
    assert torch.equal(method.encoder.weight, weight)


def views_of(method):
    return torch.cat([batch.views[0] for batch in method.batches])


def test_a_steps_images_and_augmentations_depend_on_seed_step_and_place_alone():
    whole, parts, late, other = Line(), Line(), Line(), Line()
    list(run(whole))
    list(run(parts, accumulate=2))
    list(run(late, start=2))
    list(run(other, seed=1))
    assert torch.equal(views_of(parts), views_of(whole))  # a step's numbers do not depend on how it is cut
    assert torch.equal(views_of(late), views_of(whole)[8:])  # nor on the steps before
    assert not torch.isclose(views_of(other)[:, 0], views_of(whole)[:, 0]).any()
    assert torch.equal(views_of(other)[:, 1:], views_of(whole)[:, 1:])  # this seed is the augmentations' alone
    assert views_of(whole)[:, 0].unique().numel() == 16


def test_a_batch_says_which_images_it_holds_and_views_need_no_gradient():
    data = dataset()
    data.faults[3] = "image 3: broken"
    results, method = list(run(method := Line(), data=data)), method
    for batch in method.batches:
        assert torch.equal(batch.labels, data.labels[batch.indices])
    assert [fault for result in results for fault in result.faults] == ["image 3: broken"] * 2  # once an epoch

    def with_gradient(images, randomness):
        assert images.dtype == torch.uint8
        return ((images.float() * torch.ones(1, requires_grad=True)).mean((2, 3)),)

    loaded = LoadedBatch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), *[torch.arange(2)] * 3, [])
    batch = make_batch(loaded, with_gradient, Randomness(0, 0, loaded.places), torch.device("cpu"))
    assert isinstance(batch, Batch)
    assert not batch.views[0].requires_grad


def test_after_200_steps_the_averaged_weights_beat_the_initial_ones():
    """CPC on ramps of light: each image's patches can be told from one another and from those of other images."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # operations this small only wait for a second one
    ramp = torch.linspace(0, 1, 12)
    light = (
        torch.rand(16, 1, 1, 3)
        + torch.rand(16, 1, 1, 1) * ramp[:, None, None]
        + torch.rand(16, 1, 1, 1) * ramp[:, None]
    )
    data = ImageDataset((light / 3 * 255).byte().numpy(), size=12).cached()
    views = PatchViews(
        image_size=12,
        patch_size=4,
        stride=4,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        patch_augment=PatchAugment([GaussianNoise(0.05)]),
    )
    context = partial(ContextNetwork, width=8, layers=1)
    method = CPC(resnet_small(4, blocks=(1,)), offsets=[1], directions=["down", "left"], target_dim=8, context=context)
    initial, averaged = copy.deepcopy(method), copy.deepcopy(method).requires_grad_(False)
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    for result in run(method, steps=200, optimizer=optimizer, data=data, views=views, batch_size=8, clip=1.0):
        ema_update_(averaged, method, polyak_decay(result.step - 1))
    assert result.step == 200
    loaded = next(training_batches(data, batch_size=16, seed=9, start=0, steps=1))[0]
    batch = make_batch(loaded, views, Randomness(9, 0, loaded.places), torch.device("cpu"))
    with torch.no_grad():
        before, after = (float(m(batch)[0]) for m in (initial, averaged))
    assert after < before - 0.5


class Dropping(Line):
    """A line that sees its view through dropout, which draws from torch's own generator."""

    def forward(self, batch):
        return super().forward(replace(batch, views=(nn.functional.dropout(batch.views[0]),)))


def test_dropout_after_a_resume_is_what_it_would_have_been():
    whole = Dropping()
    losses = [float(result.metrics["loss"]) for result in run(whole, steps=6)]
    parts = Dropping()
    first = [float(result.metrics["loss"]) for result in run(parts, steps=3)]
    torch.manual_seed(12345)  # another process
    rest = [float(result.metrics["loss"]) for result in run(parts, start=3, steps=6)]
    assert first + rest == losses
    assert torch.equal(parts.encoder.weight, whole.encoder.weight)
    other = [float(result.metrics["loss"]) for result in run(Dropping(), steps=6, seed=1)]
    assert other != losses


def test_a_method_must_say_what_its_loss_is():
    class Silent(Method):
        pass

    with pytest.raises(NotImplementedError, match="Silent must say what its loss is"):
        Silent()(None)
    Silent().after_step(0.5)  # optional
