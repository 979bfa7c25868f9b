"""The queue against a deque, the bank against a list, and both on two processes against one."""

import copy
import re
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_a_group
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from contrastive_core.losses import info_nce
from contrastive_core.memory import FeatureQueue, MemoryBank

SIZE, IMAGES, DIM = 5, 6, 3


def rows(count, seed=0, dim=DIM):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def ascending(first, last):
    return torch.arange(float(first), float(last) + 1)[:, None]


def negatives(shared_keys):
    """How many negatives each of two queries is compared with, by the loss itself: each adds exp(0)."""
    zeros = torch.zeros(2, shared_keys.shape[1])
    return info_nce(zeros, None, zeros, shared_keys=shared_keys, decoupled=True, reduction="none").exp().tolist()


def unit(row):
    norm = sum(x * x for x in row) ** 0.5
    return [x / norm for x in row] if norm else row


def slow_update(bank, momentum, indices, features):
    """The bank as a list of lists, an image at a time; the last of an image's features counts."""
    before = [list(row) for row in bank]
    for image, feature in zip(indices, features, strict=True):
        bank[image] = unit([momentum * m + (1 - momentum) * f for m, f in zip(before[image], feature, strict=True)])


# ---- both ----


@pytest.mark.parametrize("memory", [FeatureQueue, MemoryBank])
def test_the_start_is_unit_vectors_that_depend_on_nothing_else(memory):
    before = torch.get_rng_state()
    first = memory(50, 4).features
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(memory(50, 4).features, first)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(50))
    assert first.mean(0).abs().max() < 0.3


@pytest.mark.parametrize("memory", [FeatureQueue, MemoryBank])
@pytest.mark.parametrize(("size", "dim"), [(0, 4), (4, 0), (-1, 4)])
def test_sizes_below_one_are_refused(memory, size, dim):
    with pytest.raises(ValueError, match=f"{size} rows of {dim} numbers: pass at least 1 of each"):
        memory(size, dim)


BAD_FEATURES = {
    "no batch axis": torch.zeros(DIM),
    "too many axes": torch.zeros(2, 1, DIM),
    "another dimension": torch.zeros(2, DIM + 1),
    "transposed": torch.zeros(DIM, 2),
    "integers": torch.zeros(2, DIM, dtype=torch.int64),
    "a number": torch.tensor(0.0),
}


@pytest.mark.parametrize("features", BAD_FEATURES.values(), ids=BAD_FEATURES.keys())
def test_features_that_do_not_fit_are_named(features):
    message = f"shape {tuple(features.shape)} and dtype {features.dtype}: pass floats n d with d = 3"
    queue, bank = FeatureQueue(SIZE, DIM), MemoryBank(IMAGES, DIM)
    with pytest.raises(ValueError, match=re.escape(message)):
        queue.append_(features)
    with pytest.raises(ValueError, match=re.escape(message)):
        bank.update_(torch.arange(2), features)
    assert queue.filled == bank.written == 0


def test_an_unknown_gather_is_refused():
    with pytest.raises(ValueError, match="gather='ring': pass None, True or False"):
        FeatureQueue(SIZE, DIM).append_(rows(1), gather="ring")


def test_the_loss_counts_every_row_as_a_negative():
    assert negatives(FeatureQueue(SIZE, DIM).keys()) == pytest.approx([SIZE] * 2)
    assert negatives(MemoryBank(IMAGES, DIM).sample(32)[1]) == pytest.approx([32] * 2)


# ---- the queue ----


@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 20), max_size=6))
def test_queue_is_a_deque(size, batches):
    queue = FeatureQueue(size, 2)
    oracle, written = deque(queue.keys().tolist(), maxlen=size), 0
    for seed, count in enumerate(batches):
        features = rows(count, seed, dim=2)
        queue.append_(features)
        oracle.extend(features.tolist())
        written += count
        oldest_first = queue.keys().roll(-(written % size), 0)
        assert oldest_first.tolist() == list(oracle)
        assert queue.filled == min(written, size)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([ascending(1, 3)], [1, 2, 3]),
        ([ascending(1, 4)], [4, 2, 3]),  # larger than the queue
        ([ascending(1, 8)], [7, 8, 6]),
        ([ascending(1, 2), ascending(3, 4)], [4, 2, 3]),  # around the end
        ([ascending(1, 2), ascending(3, 2), ascending(3, 7)], [7, 5, 6]),  # an empty batch
    ],
)
def test_queue_by_hand(batches, expected):
    queue = FeatureQueue(3, 1)
    for batch in batches:
        queue.append_(batch)
    assert queue.keys().flatten().tolist() == expected


def test_the_filled_rows_are_those_written():
    queue = FeatureQueue(SIZE, DIM)
    assert queue.filled == 0
    queue.append_(rows(2))
    assert queue.filled == 2
    assert torch.equal(queue.keys()[: queue.filled], rows(2))


def test_a_graph_that_uses_the_keys_is_not_disturbed_by_later_writes():
    queue, queries = FeatureQueue(SIZE, DIM), rows(4).requires_grad_()
    expected = queue.features.clone().sum(0).expand(4, DIM)
    scores = queries @ queue.keys().T
    queue.append_(rows(7, 1))
    scores.sum().backward()
    torch.testing.assert_close(queries.grad, expected)

    keys = queue.keys()
    assert not keys.requires_grad
    keys.zero_()  # a copy: the queue does not notice
    assert queue.features.abs().min() > 0


def test_queue_takes_any_float_and_cuts_the_graph():
    queue = FeatureQueue(SIZE, DIM)
    features = rows(2).requires_grad_()
    queue.append_(features * 1)
    assert not queue.features.requires_grad
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        queue.append_(rows(2).to(dtype))
        newest = [(int(queue.written) - 2 + i) % SIZE for i in range(2)]
        assert queue.keys().dtype == torch.float32
        assert torch.equal(queue.keys()[newest], rows(2).to(dtype).float())
    queue.half().append_(rows(2))
    assert queue.keys().dtype == torch.float16
    assert queue.filled == SIZE


def test_queue_continues_from_its_state():
    queue, resumed = FeatureQueue(SIZE, DIM), FeatureQueue(SIZE, DIM)
    queue.append_(rows(7))
    resumed.load_state_dict(queue.state_dict())
    for one in (queue, resumed):
        one.append_(rows(4, 1))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


# ---- the bank ----

batches_of_images = st.lists(st.lists(st.integers(0, IMAGES - 1), max_size=8), max_size=5)


@given(momentum=st.sampled_from([0.0, 0.5, 0.9, 1.0]), batches=batches_of_images)
def test_bank_is_a_list_of_moving_averages(momentum, batches):
    bank = MemoryBank(IMAGES, DIM, momentum).double()
    oracle = bank.features.tolist()
    for seed, indices in enumerate(batches):
        features = rows(len(indices), seed).double()
        bank.update_(torch.tensor(indices, dtype=torch.int64), features)
        slow_update(oracle, momentum, indices, features.tolist())
    expected = torch.tensor(oracle, dtype=torch.float64)
    torch.testing.assert_close(bank.rows(torch.arange(IMAGES)), expected, rtol=1e-12, atol=1e-12)


def test_bank_by_hand_with_an_image_that_occurs_twice():
    bank = MemoryBank(2, 2)
    bank.features.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    bank.update_(torch.tensor([0, 0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    # halfway from [1, 0] to the last, [0, 1]
    torch.testing.assert_close(bank.rows(torch.tensor([1, 0])), torch.tensor([[0.0, 1.0], [0.5**0.5, 0.5**0.5]]))


def test_bank_stays_finite_at_zero():
    bank = MemoryBank(3, DIM)
    start = bank.rows(torch.arange(3))
    bank.update_(torch.tensor([0, 1]), torch.stack([-start[0], torch.zeros(DIM)]))
    torch.testing.assert_close(bank.rows(torch.arange(2)), torch.stack([torch.zeros(DIM), start[1]]))
    bank.update_(torch.tensor([0]), torch.tensor([[0.0, 2.0, 0.0]]))
    assert bank.rows(torch.tensor([0])).tolist() == [[0, 1, 0]]


def test_bank_takes_any_float_and_cuts_the_graph():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        bank = MemoryBank(IMAGES, DIM, momentum=0)
        bank.update_(torch.tensor([2]), torch.tensor([[0.0, 4.0, 3.0]], dtype=dtype, requires_grad=True))
        assert not bank.features.requires_grad
        torch.testing.assert_close(bank.rows(torch.tensor([2])), torch.tensor([[0.0, 0.8, 0.6]]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 6]), "index 6 is outside the bank of 6 images: pass 0 to 5"),
        (torch.tensor([-1, 0]), "index -1 is outside the bank of 6 images: pass 0 to 5"),
        (torch.tensor([[0, 1]]), "indices have shape (1, 2) and dtype torch.int64: pass "),
        (torch.tensor(0), "indices have shape () and dtype torch.int64: pass "),
        (torch.tensor([0, 1], dtype=torch.int32), "indices have shape (2,) and dtype torch.int32: pass "),
        (torch.tensor([True, False]), "indices have shape (2,) and dtype torch.bool: pass "),
    ],
)
def test_indices_that_do_not_fit_are_named(indices, message):
    bank = MemoryBank(IMAGES, DIM)
    for use in (lambda: bank.update_(indices, rows(2)), lambda: bank.rows(indices)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()
    with pytest.raises(ValueError, match=re.escape(message)):
        bank.sample(4, exclude=indices)


def test_indices_and_features_must_be_as_many():
    with pytest.raises(ValueError, match=re.escape("shape (3,) and dtype torch.int64: pass 2 int64, one for each row")):
        MemoryBank(IMAGES, DIM).update_(torch.arange(3), rows(2))


def test_momentum_is_a_share():
    with pytest.raises(ValueError, match=re.escape("momentum=1.5: pass a number from 0")):
        MemoryBank(IMAGES, DIM, momentum=1.5)


def test_what_the_bank_gives_is_a_copy():
    bank, queries = MemoryBank(IMAGES, DIM), rows(4).requires_grad_()
    indices, sampled = bank.sample(9)
    expected = (sampled.sum(0) + bank.rows(torch.arange(2)).sum(0)).expand(4, DIM).clone()
    assert torch.equal(bank.rows(indices), sampled)
    scores = (queries @ sampled.T).sum() + (queries @ bank.rows(torch.arange(2)).T).sum()
    bank.update_(torch.arange(IMAGES), rows(IMAGES, 1))
    scores.backward()
    torch.testing.assert_close(queries.grad, expected)


def test_bank_continues_from_its_state():
    bank, resumed = MemoryBank(IMAGES, DIM), MemoryBank(IMAGES, DIM)
    bank.update_(torch.tensor([1, 4]), rows(2))
    resumed.load_state_dict(bank.state_dict())
    for one in (bank, resumed):
        one.update_(torch.tensor([4, 0]), rows(2, 1))
    for name, value in bank.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert torch.equal(bank.sample(20)[0], resumed.sample(20)[0])


def test_samples_are_uniform_and_new_after_each_update():
    bank = MemoryBank(IMAGES, DIM)
    first, state = bank.sample(60_000)[0], torch.get_rng_state()
    assert torch.equal(bank.sample(60_000)[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.bincount(minlength=IMAGES).sub(10_000).abs().max() < 500  # five standard deviations
    bank.update_(torch.tensor([0]), rows(1))
    second = bank.sample(60_000)[0]
    assert (first == second).float().mean().item() == pytest.approx(1 / IMAGES, abs=0.01)


@given(excluded=st.lists(st.integers(0, IMAGES - 1), max_size=8).filter(lambda found: len(set(found)) < IMAGES))
def test_excluded_images_are_never_drawn_and_all_others_alike(excluded):
    exclude = torch.tensor(excluded, dtype=torch.int64)
    counts = MemoryBank(IMAGES, DIM).sample(6_000, exclude=exclude)[0].bincount(minlength=IMAGES)
    left = [image for image in range(IMAGES) if image not in excluded]
    assert counts[exclude].sum() == 0
    assert (counts[left] - 6_000 / len(left)).abs().max() < 200


def test_excluding_every_image_is_refused():
    with pytest.raises(ValueError, match="all 6 images are excluded"):
        MemoryBank(IMAGES, DIM).sample(4, exclude=torch.arange(IMAGES))


# ---- two processes ----

# images of each process, step by step: none, fewer, more than the queue holds; twice on one process, or on both
STEPS = [([0, 1], [1]), ([], [2, 3, 2]), ([0, 0, 5, 1, 2, 3, 4], [0, 5]), ([3], [])]


def share(step, rank):
    """This process's images and features of a step; `rank=None`: those of the joint batch."""
    images = [torch.tensor(own, dtype=torch.int64) for own in STEPS[step]]
    joint = rows(len(images[0]) + len(images[1]), seed=10 + step)
    if rank is None:
        return torch.cat(images), joint
    return images[rank], joint.split([len(own) for own in images])[rank]


def trained(rank):
    queue, bank = FeatureQueue(SIZE, DIM), MemoryBank(IMAGES, DIM)
    for step in range(len(STEPS)):
        indices, features = share(step, rank)
        queue.append_(features)
        bank.update_(indices, features)
    return queue, bank


def state(memory):
    return copy.deepcopy(memory.state_dict())


def message(use):
    try:
        use()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class WithQueue(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.queue = nn.Linear(DIM, DIM), FeatureQueue(SIZE, DIM)

    def forward(self, features):
        queries = self.head(features)
        return info_nce(queries, None, queries.detach(), shared_keys=self.queue.keys())


def under_ddp(rank):
    """Two forwards before the backwards: each broadcasts the queue from rank 0, over what the first graph has read."""
    model = WithQueue()
    wrapped = DistributedDataParallel(model)
    losses = []
    for seed in range(2):
        losses.append(wrapped(rows(4, seed)))
        model.queue.append_(rows(2 + rank, seed))
    sum(losses).backward()
    dist.barrier()
    return state(model.queue)


def one_process(rank):
    queue, bank = trained(rank)
    sampled, keys = bank.sample(32)
    result = {
        "queue": state(queue),
        "bank": state(bank),
        "sampled": sampled,
        "excluding": bank.sample(32, exclude=torch.tensor([rank, 2]))[0],
        "negatives": [negatives(queue.keys()), negatives(keys)],
        "ddp": under_ddp(rank),
        "misfit": message(lambda: queue.append_(rows(2, dim=DIM + rank))),
        "outside": message(lambda: bank.update_(torch.tensor([IMAGES - rank]), rows(1))),
    }
    queue.append_(rows(2), gather=False)  # the same on both: no harm
    queue.append_(rows(2))
    queue.append_(rows(2, seed=rank), gather=False)
    bank.update_(torch.tensor([rank]), rows(1), gather=False)
    result["queues differ"] = message(lambda: queue.append_(rows(2)))
    result["banks differ"] = message(lambda: bank.update_(torch.tensor([0]), rows(1)))
    result["sizes differ"] = message(lambda: FeatureQueue(SIZE + rank, DIM).append_(rows(1)))
    return result


@pytest.fixture(scope="module")
def two_processes():
    return in_a_group(2, one_process)


def test_two_processes_hold_what_one_would_of_the_joint_batches(two_processes):
    queue, bank = trained(None)
    for result in two_processes:
        for name, value in queue.state_dict().items():
            assert torch.equal(result["queue"][name], value), name
        for name, value in bank.state_dict().items():
            assert torch.equal(result["bank"][name], value), name
        assert torch.equal(result["sampled"], bank.sample(32)[0])
        excluding = bank.sample(32, exclude=torch.arange(3))[0]  # what either process excludes
        assert torch.equal(result["excluding"], excluding)


def test_two_processes_compare_with_as_many_negatives_as_one(two_processes):
    for result in two_processes:
        assert result["negatives"] == [pytest.approx([SIZE] * 2), pytest.approx([32] * 2)]


def test_the_buffers_that_ddp_sends_around_change_nothing(two_processes):
    expected = FeatureQueue(SIZE, DIM)
    for seed in range(2):
        expected.append_(torch.cat([rows(2, seed), rows(3, seed)]))
    for result in two_processes:
        for name, value in expected.state_dict().items():
            assert torch.equal(result["ddp"][name], value), name


def test_what_does_not_fit_on_one_process_raises_on_both(two_processes):
    first, second = two_processes
    assert first["misfit"] == "ValueError: process 1 passed what does not fit: see its own error"
    assert second["misfit"].startswith("ValueError: features have shape (2, 4)")
    assert first["outside"] == "ValueError: index 6 is outside the bank of 6 images: pass 0 to 5"
    assert second["outside"] == "ValueError: process 0 passed what does not fit: see its own error"


def test_processes_that_hold_different_rows_raise(two_processes):
    for result in two_processes:
        for name in ("queues differ", "banks differ", "sizes differ"):
            assert result[name].startswith("RuntimeError: processes 0 and 1 hold different rows: load the same"), name
