"""What a method carries from step to step: teachers, queues and banks through checkpoints, accumulation and caching."""

import copy
import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from small_methods import CLASSES, IMAGES, METHODS, TEACHERS, batch_of, build, views_of
from torch.nn import functional as F

from contrastive_core.checkpoint import latest_checkpoint, load_checkpoint_, save_checkpoint, save_tensors
from contrastive_core.data import ImageDataset, training_batches
from contrastive_core.grad_cache import CachedStep, check_cacheable
from contrastive_core.method import Batch
from contrastive_core.optim import constant
from contrastive_core.training import train_steps

pytestmark = pytest.mark.usefixtures("as_a_new_process")

CACHED = ["SimCLR", "SimCLRv2", "MoCoV3", "Siamese"]
TEACHER_MOVES = [name for name in TEACHERS if name != "Distill"]


def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, 8, 8, 3), dtype=torch.uint8, generator=generator)
    return ImageDataset(pixels.numpy(), size=8, labels=[i % CLASSES for i in range(IMAGES)]).cached()


def noisy(name, images, randomness):
    """A method's views, with noise that depends on the step and on the image's place."""
    noise = randomness.normal("noise", 2, 3, 8, 8).double()
    return views_of(name, images.double() / 128 - 1, noise.transpose(0, 1))


def run(name, method, optimizer, *, start=0, steps=4, accumulate=1):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    batches = training_batches(dataset(), batch_size=8, seed=0, start=start, steps=steps, accumulate=accumulate)
    wrapped, prepared = accelerator.prepare(method, optimizer)
    options = {"seed": 0, "start": start, "steps": steps, "schedule": constant}
    return train_steps(wrapped, prepared, accelerator, batches, partial(noisy, name), **options)


def sgd(method):
    return torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def assert_same_state(one, other, exact=True):
    assert set(one.state_dict()) == set(other.state_dict())
    for name, value in one.state_dict().items():
        if exact:
            assert torch.equal(value, other.state_dict()[name]), name
        elif not name.endswith("history"):  # a fingerprint, of the last bits too
            torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)


# ---- checkpoints ----


@pytest.mark.parametrize("interrupted", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(name, interrupted, tmp_path):
    method = build(name, "batch", torch.float32)
    method_before = copy.deepcopy(method)
    optimizer = sgd(method)
    for result in run(name, method.double(), optimizer):
        if result.step == interrupted:
            save_checkpoint(tmp_path, result.step, {"method": method}, optimizer, {})

    fresh = build(name, "batch", seed=1)
    resumed, resumed_optimizer = fresh, sgd(fresh)
    state = load_checkpoint_(latest_checkpoint(tmp_path), {"method": resumed}, resumed_optimizer)
    assert state["step"] == interrupted
    results = list(run(name, resumed, resumed_optimizer, start=state["step"]))
    assert [result.step for result in results] == list(range(interrupted + 1, 5))
    assert_same_state(method, resumed)
    moved = [k for k, v in method_before.state_dict().items() if not torch.equal(v.double(), method.state_dict()[k])]
    assert any(key.startswith(("encoder", "student.encoder", "classifier")) for key in moved)
    assert {key.split(".")[0] for key in STATE[name]} <= {key.split(".")[0] for key in moved}


STATE = {
    "SimCLR": [],
    "SimCLRv2": ["teacher.0.layers.1.running_mean", "queue.features", "queue.written", "queue.history"],
    "MoCo": ["teacher.0.layers.1.running_mean", "queue.features", "queue.written", "queue.history"],
    "MoCoV3": ["teacher.1.layers.1.norm.running_var"],
    "PIRL": ["bank.features", "bank.written", "bank.history", "normaliser"],
    "PIRL by InfoNCE": ["bank.features", "bank.written", "bank.history"],
    "BYOL": ["teacher.0.layers.0.weight", "teacher.0.layers.1.running_mean", "teacher.1.layers.0.norm.running_var"],
    "SimSiam": [],
    "RAFT": ["teacher.0.layers.0.weight", "teacher.0.layers.1.running_mean"],
    "BYOL'": ["teacher.0.layers.0.weight", "teacher.0.layers.1.running_mean"],
    "Siamese": [],
    "Classifier": [],
    "Classifier, frozen": [],
    "Distill": [],
}


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_in_the_state_dict_and_moves(name):
    method = build(name, "batch")
    before = copy.deepcopy(method.state_dict())
    list(run(name, method, sgd(method), steps=2))
    for key in STATE[name]:
        assert not torch.equal(method.state_dict()[key], before[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_nothing_in_the_state_is_stored_twice(name, tmp_path):
    method = build(name, "batch")
    save_tensors(method.state_dict(), tmp_path / "method.safetensors")  # which refuses tensors that share memory
    places = [tensor.data_ptr() for tensor in method.state_dict().values() if tensor.numel()]
    assert len(set(places)) == len(places)


# ---- the teacher, and what is written, once a step ----


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", TEACHER_MOVES)
def test_the_teacher_moves_once_a_step(name, accumulate):
    method = build(name, "group")
    old = [p.clone() for p in method.teacher.parameters()]
    list(run(name, method, sgd(method), steps=1, accumulate=accumulate))
    model = [*method.encoder.parameters(), *method.head.parameters()]
    for before, now, weight in zip(old, method.teacher.parameters(), model, strict=True):
        torch.testing.assert_close(now, 0.9 * before + 0.1 * weight)
        assert not now.requires_grad


@pytest.mark.parametrize("name", ["BYOL", "MoCoV3"])
def test_step_k_of_n_has_the_momentum_of_k_over_n(name):
    """Counted from 0, as in both papers' code: the first is the base, and the last still moves the teacher."""
    method = build(name, "group")
    model = [*method.encoder.parameters(), *method.head.parameters()]
    old = [p.clone() for p in method.teacher.parameters()]
    momenta = [0.9, 1 - 0.1 * (1 + math.sqrt(0.5)) / 2, 0.95, 1 - 0.1 * (1 - math.sqrt(0.5)) / 2]
    for momentum, _ in zip(momenta, run(name, method, sgd(method)), strict=True):
        for before, now, weight in zip(old, method.teacher.parameters(), model, strict=True):
            torch.testing.assert_close(now, momentum * before + (1 - momentum) * weight)
        old = [p.clone() for p in method.teacher.parameters()]


@pytest.mark.parametrize("name", ["BYOL", "MoCoV3"])
def test_the_momentum_rises_along_a_cosine(name):
    method = build(name)
    for progress, momentum in ((0.0, 0.9), (0.5, 0.95), (1.0, 1.0)):
        old = [p.clone() for p in method.teacher.parameters()]
        method.after_step(progress)
        model = [*method.encoder.parameters(), *method.head.parameters()]
        for before, now, weight in zip(old, method.teacher.parameters(), model, strict=True):
            torch.testing.assert_close(now, momentum * before + (1 - momentum) * weight)


@pytest.mark.parametrize("name", TEACHER_MOVES)
def test_the_teacher_s_batch_norm_has_statistics_of_its_own_batches(name):
    """After a step without a forward of the teacher's: weights follow, statistics stay."""
    method = build(name, "batch")
    statistics = copy.deepcopy(dict(method.teacher.named_buffers()))
    with torch.no_grad():
        for buffer in method.encoder.buffers():
            buffer += 1
    method.after_step(0.3)
    for key, value in method.teacher.named_buffers():
        assert torch.equal(value, statistics[key]), key
    method(batch_of(name))
    moved = [key for key, value in method.teacher.named_buffers() if not torch.equal(value, statistics[key])]
    assert "0.layers.1.running_mean" in moved


ACCUMULATE_EXACTLY = ["MoCo", "BYOL", "SimSiam", "RAFT", "BYOL'", "Classifier", "Classifier, frozen", "Distill"]


@pytest.mark.parametrize("name", ACCUMULATE_EXACTLY)
def test_micro_batches_are_one_batch(name):
    """Where images are compared with no others of their batch: the same weights, teacher, and queue row by row."""
    whole, parts = build(name, "group"), build(name, "group")
    list(run(name, whole, sgd(whole)))
    list(run(name, parts, sgd(parts), accumulate=2))
    assert_same_state(whole, parts, exact=False)


@pytest.mark.parametrize("name", ["SimCLRv2", "PIRL", "PIRL by InfoNCE"])
def test_micro_batches_write_what_one_batch_does(name):
    """One step: afterwards the weights differ, since a micro-batch has negatives of its own."""
    whole, parts = build(name, "group"), build(name, "group")
    list(run(name, whole, sgd(whole), steps=1))
    list(run(name, parts, sgd(parts), steps=1, accumulate=2))
    for one, other in zip(memory(whole).buffers(), memory(parts).buffers(), strict=True):
        if one.is_floating_point():
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert memory(whole).written == memory(parts).written == (16 if name == "SimCLRv2" else 8)


def memory(method):
    return method.bank if hasattr(method, "bank") else method.queue


@pytest.mark.parametrize("name", ["MoCo", "SimCLRv2"])
def test_the_queue_holds_the_teacher_s_keys_in_the_order_of_the_images(name):
    """14 places: MoCo's two batches of 8 go round the end, SimCLRv2's 16 keys of a batch are more than there are."""
    method, batch = build(name), batch_of(name)
    for _ in range(2):
        before = method.queue.keys()
        with torch.no_grad():
            k1, k2 = (F.normalize(method.teacher(view)) for view in batch.views)
        keys = k2 if name == "MoCo" else torch.stack([k1, k2], 1).flatten(0, 1)
        written = int(method.queue.written)
        method(batch)
        assert torch.equal(method.queue.keys(), before)  # read before it is written
        method.after_step(0.1)
        expected = before
        for i, key in enumerate(keys):
            expected[(written + i) % 14] = key
        torch.testing.assert_close(method.queue.keys(), expected)
        assert method.written == []


@pytest.mark.parametrize("name", ["MoCo", "PIRL", "PIRL by InfoNCE", "SimCLRv2"])
def test_a_forward_in_evaluation_mode_writes_nothing(name):
    """A validation between two steps: no image of it becomes a negative, and nothing is kept for the next step."""
    method, left_alone = build(name), build(name)
    method.eval()
    for seed in range(3):
        method(batch_of(name, seed=seed))
    assert method.written == []
    assert_same_state(method, left_alone)
    method.train()
    for each in (method, left_alone):
        each(batch_of(name))
        each.after_step(0.1)
    assert_same_state(method, left_alone)


@pytest.mark.parametrize("size", [3, 8, 14, 40])
def test_queues_smaller_and_larger_than_a_batch(size):
    torch.manual_seed(0)
    method = type(build("MoCo"))(build("MoCo").encoder, queue_size=size, bn_groups=1).double()
    for step in range(6):
        loss, metrics = method(batch_of("MoCo", seed=step))
        loss.backward()
        method.after_step(step / 6)
        assert metrics["negatives"] == size
    assert method.queue.filled == min(size, 48)


# ---- contrasting micro-batches as one batch ----


def parts_of(batch, sizes):
    split = [tensors.split(sizes) for tensors in (*batch.views, batch.indices, batch.labels)]
    return [Batch(tuple(parts[:-2]), *parts[-2:]) for parts in zip(*split, strict=True)]


@pytest.mark.parametrize("sizes", [[4, 4], [2, 5, 1]])
@pytest.mark.parametrize("name", CACHED)
def test_a_cached_step_is_the_whole_batch(name, sizes):
    whole, parts, batch = build(name, "group"), build(name, "group"), batch_of(name)
    loss, metrics = whole(batch)
    loss.backward()
    makers = [partial(lambda part: part, part) for part in parts_of(batch, sizes)]
    passes = CachedStep(parts, makers, Accelerator(cpu=True))
    cached_loss, cached_metrics = passes.forward()
    passes.backward(cached_loss)
    torch.testing.assert_close(cached_loss, loss, rtol=1e-12, atol=1e-12)
    for key, value in metrics.items():
        torch.testing.assert_close(cached_metrics[key], value, rtol=1e-10, atol=1e-10, msg=key)
    for (key, parameter), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), key
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-9, atol=1e-12, msg=key)
    for method in (whole, parts):
        method.after_step(0.5)
    assert_same_state(whole, parts, exact=False)


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(CACHED)))
def test_methods_in_one_piece_cannot_be_cached(name):
    with pytest.raises(ValueError, match="grad_cache needs a method in two halves, represent and contrast; ") as caught:
        check_cacheable(build(name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", CACHED)
def test_methods_in_two_halves_can_be_cached(name):
    check_cacheable(build(name))


# ---- they learn ----


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_few_steps_lower_the_loss(name, seed):
    method, batch = build(name, "batch", seed=seed), batch_of(name, seed=seed)
    optimizer = torch.optim.Adam([p for p in method.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(6):
        loss, _ = method(batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step(step / 6) if name not in MEMORY else method.written.clear()
    assert losses[-1] < losses[0]


MEMORY = {"SimCLRv2", "MoCo", "PIRL", "PIRL by InfoNCE"}
"""Whose negatives change as soon as they are written: here they stay."""
