"""Losses on several processes against one on the joint batch, and what must not hang."""

import math
import warnings
from functools import partial

import pytest
import torch
from processes import in_a_group
from torch import distributed as dist
from torch.nn import functional as F

from contrastive_core import check, losses
from contrastive_core.gather import all_gather, first_row, mean_weight, row_counts
from contrastive_core.losses import info_nce, nt_xent, siglip, sup_con, symmetric_info_nce, uniformity
from contrastive_core.method import Batch
from contrastive_core.metrics import count_negatives
from cpc.context import ContextNetwork
from cpc.method import CPC

COUNTS = {"equal": [3, 3], "unequal": [2, 5], "one has none": [0, 4]}


LABELS = [torch.tensor([0, 1, 0]), torch.tensor([1, 2, 1])]


def rows(counts, rank=None, seed=0):
    """`n d` of the joint batch, or of one process."""
    everyone = torch.randn(sum(counts), 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return everyone if rank is None else everyone.split(counts)[rank]


def error_of(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def losses_by_row(counts, rank=None):
    a, b = (rows(counts, rank, seed) for seed in (0, 1))
    gather = rank is not None
    index = torch.arange(len(a))
    return {
        "info_nce": info_nce(a, b, index, reduction="none", gather=gather),
        "info_nce, ring": info_nce(a, b, index, reduction="none", gather="ring" if gather else False),
        "nt_xent": nt_xent(a, b, reduction="none", gather=gather),
        "siglip": siglip(a, b, index, reduction="none", gather=gather),
        "sup_con": sup_con(a, torch.cat(LABELS) if rank is None else LABELS[rank], reduction="none", gather=gather),
    }


def gradient_of_joint(loss, counts, rank=None):
    """dL/d(map), averaged over processes as DDP does; of the mean."""
    weight = torch.eye(4, dtype=torch.float64).requires_grad_()
    a, b = (rows(counts, rank, seed) @ weight for seed in (0, 1))
    value = loss(a, b, gather=None if rank is not None else False)
    (gradient,) = torch.autograd.grad(value, weight)
    value = value.detach()
    if rank is not None:
        for tensor in (value, gradient):
            dist.all_reduce(tensor)
            tensor /= 2
    return value, gradient


def by_index(a, b, gather):
    return info_nce(a, b, torch.arange(len(a)), gather=gather)


def in_a_ring(a, b, gather):
    return info_nce(a, b, torch.arange(len(a)), gather="ring" if gather is None else gather)


def by_sigmoid(a, b, gather):
    return siglip(a, b, torch.arange(len(a)), temperature=0.5, bias=-1.0, gather=gather)


MEANS = {
    "info_nce": by_index,
    "info_nce, ring": in_a_ring,
    "nt_xent": nt_xent,
    "symmetric_info_nce": symmetric_info_nce,
    "siglip": by_sigmoid,
}


def candidates():
    """How many negatives a query has in each method's use of the losses."""
    z, cells, index = torch.randn(3, 4), torch.randn(12, 4), torch.arange(3)  # CPC: three predictions, twelve cells
    return {
        "CPC": count_negatives(info_nce, z, cells, index),
        "CPC, ring": count_negatives(info_nce, z, cells, index, gather="ring"),
        "SimCLR": count_negatives(nt_xent, z, z),
        "MoCo": count_negatives(info_nce, z, None, z, shared_keys=torch.randn(16, 4)),
        "PIRL": count_negatives(info_nce, z, None, z, shared_keys=torch.randn(32, 4)),
        "local only": count_negatives(info_nce, z, cells, index, gather=False),
    }


def masked_positive(rank, mask_of, gather):
    allowed = torch.ones(4, 4, dtype=torch.bool)
    allowed[2, 2] = rank == 0
    return info_nce(Z, Z, torch.arange(4), mask=mask_of(allowed), gather=gather)


Z = torch.ones(4, 3)
WHOLE_GRIDS, NO_GRIDS = torch.zeros(2, 3, 3, 6, 1, 1), torch.zeros(0, 3, 3, 6, 1, 1)

MISFITS = {  # what is wrong on rank 1 alone: neither process may wait for the other
    "positive": lambda rank: info_nce(Z, Z, torch.arange(4 - rank)),
    "mask": lambda rank: masked_positive(rank, lambda mask: mask, None),
    "mask, ring": lambda rank: masked_positive(rank, lambda mask: mask, "ring"),
    "mask function, ring": lambda rank: masked_positive(rank, lambda mask: lambda r, c: mask[r, c], "ring"),
    "no keys": lambda rank: info_nce(Z, None, Z, shared_keys=None if rank else Z),
    "gather": lambda rank: info_nce(Z, Z, torch.arange(4), gather="rings" if rank else "ring"),
    "views": lambda rank: nt_xent(Z, torch.tensor(1.0) if rank else Z),
    "float64": lambda rank: nt_xent(Z, Z.double() if rank else Z),
    "slopes": lambda rank: info_nce(Z, Z.clone().requires_grad_(rank == 0), torch.arange(4)),
    "CPC": lambda rank: tiny_cpc()(Batch((NO_GRIDS if rank else WHOLE_GRIDS,), torch.arange(0), torch.arange(0))),
}


def tiny_cpc():
    class Pixels(torch.nn.Module):
        dim = 6

        def forward(self, patches):
            return patches.flatten(1)

    return CPC(Pixels(), offsets=[1], target_dim=4, context=partial(ContextNetwork, width=5, layers=1))


def gather_that_puts_back_its_own_rows(tensor, counts):
    """As many libraries do: a row gets no gradient from the queries of other processes."""
    shards = list(all_gather(tensor.detach(), counts).split(counts))
    shards[dist.get_rank()] = tensor
    return torch.cat(shards)


def one_process(rank):
    warnings.simplefilter("error", FutureWarning)
    result = {"rows": losses_by_row([3, 3], rank), "candidates": candidates()}
    for name, counts in COUNTS.items():
        result[name] = {loss: gradient_of_joint(function, counts, rank) for loss, function in MEANS.items()}
        mine = rows(counts, rank).clone().requires_grad_()
        gathered = all_gather(mine)
        (gathered * (1 + rank)).sum().backward()
        agreed = row_counts(len(mine))
        result[f"{name}, gathered"] = gathered.detach(), mine.grad, agreed, first_row(agreed), mean_weight(agreed)
    z = torch.randn(4, 3 + rank)
    result["errors"] = {
        "another d": error_of(info_nce, z, z, torch.arange(4)),
        "another d, nt_xent": error_of(nt_xent, z, z),
        "sum": error_of(nt_xent, z[:, :3], z[:, :3], reduction="sum"),
        "nobody has any": error_of(info_nce, z[:0, :3], z[:, :3], torch.arange(0)),
        "counts": error_of(all_gather, z, [4, 3] if rank else [3, 4]),
        "ring": error_of(uniformity, z, gather="ring"),
    }
    leaf = torch.randn(4, 3, requires_grad=True)
    slope = partial(torch.autograd.grad, inputs=leaf, create_graph=True)
    result["second"] = [
        error_of(slope, info_nce(leaf, leaf, torch.arange(4), gather="ring")),
        error_of(slope, all_gather(leaf).sum()),
    ]
    result["misfits"] = {name: error_of(call, rank) for name, call in MISFITS.items()}
    if rank == 0:  # alone: none of these may wait for the other process
        result["alone"] = [float(loss(z, z, gather=False)) for loss in (by_index, nt_xent, symmetric_info_nce)]
        result["expected alone"] = float(F.cross_entropy(z @ z.T, torch.arange(4)))
    dist.barrier()
    # the check itself has to be able to fail
    losses.all_gather = gather_that_puts_back_its_own_rows
    result["check of a partial gradient"] = check.check([3, 3], torch.float64)
    losses.all_gather = all_gather
    return result


@pytest.fixture(scope="module")
def two_processes():
    return in_a_group(2, one_process)


@pytest.mark.parametrize("loss", ["info_nce", "info_nce, ring", "nt_xent", "siglip", "sup_con"])
def test_rows_are_those_of_the_joint_batch(two_processes, loss):
    joint = losses_by_row([3, 3])[loss]
    ours = [result["rows"][loss] for result in two_processes]
    if loss == "nt_xent":  # the first views of all processes, then the second ones
        joint = torch.cat([joint[:3], joint[6:9], joint[3:6], joint[9:]])
    torch.testing.assert_close(torch.cat(ours), joint, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("counts", list(COUNTS))
@pytest.mark.parametrize("loss", list(MEANS))
def test_means_and_gradients_averaged_are_those_of_the_joint_batch(two_processes, counts, loss):
    value, gradient = gradient_of_joint(MEANS[loss], COUNTS[counts])
    for result in two_processes:
        torch.testing.assert_close(result[counts][loss][0], value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result[counts][loss][1], gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("counts", list(COUNTS))
def test_rows_are_gathered_in_rank_order_whatever_their_number(two_processes, counts):
    expected, numbers = rows(COUNTS[counts]), COUNTS[counts]
    for rank, result in enumerate(two_processes):
        gathered, gradient, agreed, first, weight = result[f"{counts}, gathered"]
        assert torch.equal(gathered, expected)
        assert torch.equal(gradient, torch.full_like(gradient, 3.0))  # 1 from rank 0 and 2 from rank 1
        assert gradient.shape == (numbers[rank], 4)
        assert (agreed, first) == (numbers, sum(numbers[:rank]))
        assert weight == pytest.approx(2 * numbers[rank] / sum(numbers))


NEGATIVES = {
    "CPC": (11, 23),
    "CPC, ring": (11, 23),
    "SimCLR": (4, 10),
    "MoCo": (16, 16),
    "PIRL": (32, 32),
    "local only": (11, 11),
}


@pytest.mark.parametrize(("use", "numbers"), NEGATIVES.items())
def test_how_many_negatives_a_query_has_on_one_and_two_processes(two_processes, use, numbers):
    assert set(candidates()[use].tolist()) == {numbers[0]}
    for result in two_processes:
        assert set(result["candidates"][use].tolist()) == {numbers[1]}


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another d", "ValueError: processes pass vectors of d = [3, 4]: pass the same on all of them"),
        ("another d, nt_xent", "ValueError: processes pass vectors of d = [3, 4]: pass the same on all of them"),
        ("sum", 'ValueError: reduction="sum" means nothing under DDP\'s average'),
        ("nobody has any", "ValueError: queries are empty: pass at least one"),
        ("ring", "ValueError: gather='ring': pass None, True or False"),
    ],
)
def test_what_does_not_fit_is_an_error_on_every_process(two_processes, case, words):
    for result in two_processes:
        assert result["errors"][case].startswith(words)


@pytest.mark.parametrize(
    ("misfit", "words"),
    [
        ("positive", "positive has shape (3,) and dtype torch.int64: pass one integer index"),
        ("mask", "the mask leaves out the positive of query 2"),
        ("mask, ring", "the mask leaves out the positive of query 2"),
        ("mask function, ring", "the mask leaves out the positive of query 2"),
        ("no keys", "keys=None: pass shared_keys"),
        ("gather", "gather='rings': pass None, True or False, or \"ring\""),
        ("views", "the views have shapes (4, 3) and (): pass n d twice"),
    ],
)
def test_what_does_not_fit_on_one_process_keeps_none_waiting(two_processes, misfit, words):
    first, second = (result["misfits"][misfit] for result in two_processes)
    assert first == "ValueError: process 1 passed what does not fit: see its own error"
    assert second.startswith(f"ValueError: {words}")


@pytest.mark.parametrize(
    ("misfit", "words"),
    [
        ("float64", "processes pass float64 = [0, 1]: pass the same on all of them"),
        ("slopes", "processes pass keys that need a gradient = [1, 0]: pass the same on all of them"),
        ("CPC", "processes hold [18, 0] patches: give every process at least one image"),
    ],
)
def test_what_differs_between_processes_keeps_none_waiting(two_processes, misfit, words):
    assert [result["misfits"][misfit] for result in two_processes] == [f"ValueError: {words}"] * 2


def test_second_derivatives_across_processes_are_refused(two_processes):
    for result in two_processes:
        ring, gathered = result["second"]
        assert ring.startswith("NotImplementedError: no graph of the gradient is kept")
        assert gathered.startswith("NotImplementedError: gathered rows have no second derivatives")


def test_wrong_counts_are_named(two_processes):
    assert "process 1 of 2 holds 4 rows: pass row_counts(n)" in two_processes[1]["errors"]["counts"]


def test_without_gathering_one_process_waits_for_nobody(two_processes):
    assert two_processes[0]["alone"][0] == pytest.approx(two_processes[0]["expected alone"], rel=1e-5)
    assert all(math.isfinite(value) for value in two_processes[0]["alone"])


def test_the_check_finds_a_partial_gradient(two_processes):
    by_name = {row.loss: row for row in two_processes[0]["check of a partial gradient"]}
    for name in ("info_nce (CPC)", "nt_xent", "siglip"):
        assert by_name[name].loss_ratio == pytest.approx(1)  # which is why nobody notices
        assert by_name[name].error > 0.1
    assert by_name["nt_xent, ring"].error < 1e-12  # gathers nothing
    assert "off" in check.table([by_name["nt_xent"]], "float64")
    assert "off" not in check.table([by_name["nt_xent, ring"]], "float64")


def assert_right(rows, processes, dtype):
    assert len(rows) == 2 * sum(len(ways) for _, ways in check.CASES.values())
    assert {len(row.counts) for row in rows} == {processes}
    assert len({tuple(row.counts) for row in rows}) == 2  # equal and unequal
    assert max(row.error for row in rows) < check.TOLERANCE[dtype]
    assert max(abs(row.loss_ratio - 1) for row in rows) < 1e-5


def test_every_loss_passes_the_check():
    assert_right(check.check_here(2, "float64"), 2, "float64")


def checked(rank):
    return check._all_counts(torch.float32)


def test_every_loss_passes_the_check_on_four_processes():
    for rows in in_a_group(4, checked):
        assert_right(rows, 4, "float32")


def test_the_command_under_a_launcher(launch_tool):
    run = launch_tool("-m", "contrastive_core.check", "--dtype", "float64", processes=2)
    assert run.returncode == 0, run.stderr
    assert "34 of 34 within 1e-12 on 2 processes, float64" in run.stdout
    assert run.stdout.count("nt_xent, ring") == 2  # once for each numbers of images, by one process


def test_one_process_is_nothing_to_compare(run_tool):
    run = run_tool("-m", "contrastive_core.check", "--processes", "1")
    assert run.returncode == 2
    assert "--processes 1: pass at least 2" in run.stderr
