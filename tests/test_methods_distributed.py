"""Two processes do what one does with their joint batches: loss, gradients, weights, teachers, queues and banks.

Images are dealt out as a run deals them out, the wrapper is DDP as a run sets it up, and BatchNorm is that of the joint
batch, but for MoCo, which counts its groups over all processes.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from processes import in_a_group
from small_methods import CLASSES, IMAGES, METHODS, batch_of, build, views_of
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_core.batch_norm import globalize_batch_norm
from contrastive_core.data import ImageDataset, training_batches
from contrastive_core.gather import world
from contrastive_core.method import Batch
from contrastive_core.methods.moco import MoCo
from contrastive_core.randomness import Randomness
from contrastive_core.sharding import shard_, whole

STEPS = 2
MEMORIES = ["SimCLRv2", "MoCo", "PIRL", "BYOL"]
RUNS = [(name, "batch", 1, False) for name in METHODS] + [(name, "group", 2, False) for name in MEMORIES]
RUNS += [(name, "batch", 1, True) for name in METHODS] + [("SimCLRv2", "group", 2, True)]
IDS = [f"{name}, {norm}, accumulate={accumulate}{', split' * split}" for name, norm, accumulate, split in RUNS]


def dataset():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (IMAGES, 8, 8, 3), dtype=torch.uint8, generator=generator)
    # classes 0 to 2 and -1, which the shares of a batch hold unequally often
    return ImageDataset(pixels.numpy(), size=8, labels=[i * i % (CLASSES + 1) - 1 for i in range(IMAGES)]).cached()


def micro_batches(name, step, accumulate):
    rank, size = world()
    batches = training_batches(
        dataset(), batch_size=8, seed=0, start=step, steps=step + 1, rank=rank, world=size, accumulate=accumulate
    )
    for loaded in next(batches):
        noise = Randomness(0, step, loaded.places).normal("noise", 2, 3, 8, 8).double().transpose(0, 1)
        views = views_of(name, loaded.images.double() / 128 - 1, noise)
        yield Batch(views, loaded.indices, loaded.labels)


def method_of(name, norm):
    """MoCo: four groups, plain BatchNorm. A queue that fits neither a batch nor the keys of two steps."""
    method = build(name, norm)
    if name == "MoCo":
        method.bn_groups = 4 if norm == "batch" else 1
        return method
    return globalize_batch_norm(method)


def train(name, norm, accumulate, split):
    """The losses of the micro-batches, the first step's gradients, and the state in the end."""
    method = method_of(name, norm)
    wrapped = method
    if world()[1] > 1 and split:
        shard_(method, torch.device("cpu"))
    elif world()[1] > 1:
        wrapped = DistributedDataParallel(method, broadcast_buffers=False)
    learned = {key: p for key, p in method.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(learned.values(), lr=0.1, momentum=0.9)
    losses, gradients = [], {}
    for step in range(STEPS):
        for batch in micro_batches(name, step, accumulate):
            loss, _ = wrapped(batch)
            (loss / accumulate).backward()
            losses.append(joint_mean(loss.detach()))
        gradients = gradients or {key: whole(p.grad).clone() for key, p in learned.items()}
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step / STEPS)
    return {"losses": losses, "gradients": gradients, "state": whole_state(method)}


def whole_state(method):
    return {key: whole(value) for key, value in method.state_dict().items()}


def joint_mean(value):
    if world()[1] > 1:
        dist.all_reduce(value)
        value /= world()[1]
    return float(value)


def groups_that_do_not_fit(rank):
    images = torch.randn(2 + 2 * rank, 3, 8, 8, dtype=torch.float64)
    indices, labels = torch.arange(len(images)), torch.zeros(len(images))
    return {
        "an odd number": lambda: moco(3)(batch_of("MoCo", 4)),
        "too many": lambda: moco(8)(batch_of("MoCo", 4)),
        "unequal shares": lambda: moco(2)(Batch((images, images), indices, labels)),
        "joined": lambda: globalize_batch_norm(moco(4))(batch_of("MoCo", 4)),
    }


def moco(groups):
    method = build("MoCo", "batch")
    method.bn_groups = groups
    return method


def no_label_on_the_second(rank):
    method = DistributedDataParallel(build("Classifier"))
    batch = batch_of("Classifier", 8)
    mine = slice(4 * rank, 4 * rank + 4)
    labels = torch.cat([torch.tensor([0, 1, 2, 1]), torch.full((4,), -1)])
    loss, _ = method(Batch((batch.views[0][mine],), batch.indices[mine], labels[mine]))
    loss.backward()
    gradients = {key: p.grad.clone() for key, p in method.module.named_parameters()}
    return joint_mean(loss.detach()), gradients


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def one_process(rank):
    warnings.simplefilter("ignore", FutureWarning)  # accelerate's and DDP's own
    results = {identity: train(*chosen) for identity, chosen in zip(IDS, RUNS, strict=True)}
    results["messages"] = {what: message(call) for what, call in groups_that_do_not_fit(rank).items()}
    results["no label on the second"] = no_label_on_the_second(rank)
    return results


@pytest.fixture(scope="module")
def two_processes():
    return in_a_group(2, one_process)


def not_joined(name, norm, key):
    """MoCo's running statistics are of a process's own groups; a fingerprint is of the last bits too."""
    own = name == "MoCo" and norm == "batch" and ("running" in key or "num_batches" in key)
    return own or key.endswith("history")


@pytest.mark.parametrize(("identity", "chosen"), list(zip(IDS, RUNS, strict=True)), ids=IDS)
def test_two_processes_do_what_one_does(two_processes, identity, chosen):
    alone = train(*chosen)
    close = {"rtol": 1e-8, "atol": 1e-10}
    for result in (ours[identity] for ours in two_processes):
        torch.testing.assert_close(result["losses"], alone["losses"], **close)
        for what in ("gradients", "state"):
            assert set(result[what]) == set(alone[what])
            for key, value in alone[what].items():
                if not not_joined(*chosen[:2], key):
                    torch.testing.assert_close(result[what][key], value, **close, msg=lambda m, k=key: f"{k}: {m}")
    for key, value in two_processes[0][identity]["state"].items():  # bit for bit among themselves
        if not not_joined(*chosen[:2], key):
            assert torch.equal(value, two_processes[1][identity]["state"][key]), key


def test_one_process_of_the_same_groups_learns_otherwise_with_others():
    """So that the test above means something: four groups are not two."""
    four, two = method_of("MoCo", "batch"), method_of("MoCo", "batch")
    two.bn_groups = 2
    batch = batch_of("MoCo")
    assert (four(batch)[0] - two(batch)[0]).abs() > 1e-3


def test_a_process_without_labels_takes_part(two_processes):
    method, batch = build("Classifier"), batch_of("Classifier", 8)
    labels = torch.cat([torch.tensor([0, 1, 2, 1]), torch.full((4,), -1)])
    loss, _ = method(Batch(batch.views, batch.indices, labels))
    loss.backward()
    for found, gradients in (ours["no label on the second"] for ours in two_processes):
        assert found == pytest.approx(loss.item())
        for key, parameter in method.named_parameters():
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-9, atol=1e-12)


def test_groups_that_do_not_fit_are_named_on_all_processes(two_processes):
    for messages in (ours["messages"] for ours in two_processes):
        wanted = "images a process: pass a multiple of 2 that splits them evenly into groups of at least 2"
        assert messages["an odd number"].startswith(f"bn_groups=3 for [4, 4] {wanted}")
        assert messages["too many"].startswith(f"bn_groups=8 for [4, 4] {wanted}")
        assert messages["unequal shares"].startswith(f"bn_groups=2 for [2, 4] {wanted}")
        assert messages["joined"] == "GlobalBatchNorm joins the bn_groups=4 of all processes: leave it out"
        assert not any("\n" in text for text in messages.values())


def test_moco_s_plain_batch_norm_is_what_was_tested():
    assert isinstance(method_of("MoCo", "batch"), MoCo)
    kinds = {type(layer) for layer in method_of("MoCo", "batch").modules()}
    assert nn.BatchNorm2d in kinds
