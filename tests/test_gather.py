"""All-gather with gradients, and CPC on two processes against the joint batch on one."""

import warnings
from functools import partial

import pytest
import torch
from processes import in_a_group
from torch import nn

from contrastive_core.gather import all_gather, first_row, world
from contrastive_core.method import Batch
from cpc.context import ContextNetwork
from cpc.method import CPC


class Pixels(nn.Module):
    dim = 6

    def forward(self, patches):
        return patches.flatten(1)


def cpc():
    torch.manual_seed(0)
    context = partial(ContextNetwork, width=5, layers=1)
    return CPC(Pixels(), offsets=[1, 2], target_dim=4, context=context).double()


def grids(count):
    return torch.randn(count, 3, 3, 6, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(images):
    method = cpc()
    images = images.clone().requires_grad_()
    loss, metrics = method(Batch((images,), torch.arange(len(images)), torch.arange(len(images))))
    loss.backward()
    return loss.detach(), [p.grad for p in method.parameters()], images.grad, metrics


def one_process(rank):
    warnings.simplefilter("error", FutureWarning)
    rows = torch.arange(6.0, dtype=torch.float64).add(10 * rank).view(2, 3).T.requires_grad_()  # not contiguous
    gathered = all_gather(rows)
    # this process weighs the gathered rows by 1 + rank, so that a row's gradient is the sum over both
    (gathered * (1 + rank) * torch.arange(6.0, dtype=torch.float64)[:, None]).sum().backward()
    loss, gradients, image_gradient, metrics = loss_and_gradients(grids(4)[2 * rank : 2 * rank + 2])
    return {
        "world": world(),
        "first_row": first_row([3, 3]),
        "gathered": gathered.detach(),
        "gradient": rows.grad.contiguous(),
        "loss": loss,
        "gradients": gradients,
        "image_gradient": image_gradient,
        "chance_loss": metrics["chance_loss"],
    }


@pytest.fixture(scope="module")
def two_processes():
    return in_a_group(2, one_process)


def test_alone_rows_are_returned_as_they_are():
    rows = torch.rand(3, 2)
    assert all_gather(rows) is rows
    assert world() == (0, 1)
    assert first_row([7]) == 0


def test_gathered_rows_are_in_rank_order_with_the_sum_of_all_gradients(two_processes):
    expected = torch.cat([torch.arange(6.0).add(10 * rank).view(2, 3).T for rank in range(2)]).double()
    for rank, result in enumerate(two_processes):
        assert result["world"] == (rank, 2)
        assert result["first_row"] == 3 * rank
        assert torch.equal(result["gathered"], expected)
        place = torch.arange(3.0, dtype=torch.float64)[:, None] + 3 * rank
        assert torch.equal(result["gradient"], (place * 3).expand(3, 2))


def test_cpc_on_two_processes_is_the_joint_batch_on_one(two_processes):
    loss, gradients, image_gradient, metrics = loss_and_gradients(grids(4))
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
    close(sum(result["loss"] for result in two_processes) / 2, loss)
    for i, joint in enumerate(gradients):
        close(sum(result["gradients"][i] for result in two_processes) / 2, joint)
    close(torch.cat([result["image_gradient"] for result in two_processes]) / 2, image_gradient)
    for result in two_processes:  # a mean over other rows: the last bit may differ
        close(result["chance_loss"], metrics["chance_loss"])
