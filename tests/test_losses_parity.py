"""The same numbers as other libraries', values and gradients, and the factors between conventions.

NT-Xent here is the mean over all 2n anchors, as in lightly, solo-learn, VISSL and pytorch-metric-learning on one
process (on W processes pytorch-metric-learning's DistributedLossWrapper gives W times that). google-research/simclr
adds the means over the first and over the second views: twice ours. moco-v3 multiplies InfoNCE by 2T.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from contrastive_core.losses import info_nce, negative_cosine, normalize, nt_xent, sup_con

TEMPERATURES = [0.5, 0.1, 0.07]


@pytest.fixture
def lightly_loss():
    return pytest.importorskip("lightly.loss", reason="pip install lightly: its losses are compared with ours")


@pytest.fixture
def metric_losses():
    reason = "pip install pytorch-metric-learning: its losses are compared with ours"
    return pytest.importorskip("pytorch_metric_learning.losses", reason=reason)


@pytest.fixture
def info_nce_package():
    return pytest.importorskip("info_nce", reason="pip install info-nce-pytorch: its loss is compared with ours")


def draw(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def assert_same(ours, theirs, tensors):
    """Values, and the gradient of every tensor."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    weights = torch.linspace(1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    pairs = (torch.autograd.grad((value * weights).sum(), tensors) for value in (ours, theirs))
    for found, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# ---- lightly ----


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_is_lightly_s(lightly_loss, temperature):
    a, b = draw((6, 8), (6, 8))
    assert_same(nt_xent(a, b, temperature=temperature), lightly_loss.NTXentLoss(temperature)(a, b), (a, b))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_decoupled_nt_xent_is_lightly_s_dcl(lightly_loss, temperature):
    """DCLLoss without its optional weights; both leave the positive out of the sum, and average over 2n anchors."""
    a, b = draw((6, 8), (6, 8))
    ours = nt_xent(a, b, temperature=temperature, decoupled=True)
    assert_same(ours, lightly_loss.DCLLoss(temperature)(a, b), (a, b))


def test_own_keys_with_a_queue_are_lightly_s_memory_bank(lightly_loss):
    """MoCo. The bank's columns are the negatives, read before this batch enters it."""
    a, b = draw((6, 8), (6, 8))
    theirs = lightly_loss.NTXentLoss(0.2, memory_bank_size=(16, 8)).double()
    bank = theirs.memory_bank.bank.detach().clone()
    queue = (bank if bank.shape[1] == 8 else bank.T).double()
    ours = info_nce(normalize(a), None, normalize(b), shared_keys=queue, temperature=0.2)
    assert_same(ours, theirs(a, b), (a, b))


def test_negative_cosine_is_lightly_s(lightly_loss):
    a, b = draw((6, 8), (6, 8))
    assert_same(negative_cosine(a, b), lightly_loss.NegativeCosineSimilarity()(a, b), (a, b))


# ---- pytorch-metric-learning ----


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_nt_xent_is_pytorch_metric_learning_s(metric_losses, temperature):
    a, b = draw((6, 8), (6, 8))
    theirs = metric_losses.SelfSupervisedLoss(metric_losses.NTXentLoss(temperature))(a, b)
    assert_same(nt_xent(a, b, temperature=temperature), theirs, (a, b))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_sup_con_is_pytorch_metric_learning_s(metric_losses, temperature):
    """Also with an anchor without a positive (class 3): theirs leaves out losses of 0 from the mean."""
    (views,) = draw((10, 8))
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1, 3])
    theirs = metric_losses.SupConLoss(temperature)(views, labels)
    assert_same(sup_con(views, labels, temperature=temperature), theirs, (views,))


# ---- info-nce-pytorch: normalises, so ours is given unit vectors ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_is_info_nce_pytorch_s_within_the_batch(info_nce_package, reduction):
    queries, keys = draw((6, 8), (6, 8))
    ours = info_nce(normalize(queries), normalize(keys), torch.arange(6), temperature=0.1, reduction=reduction)
    assert_same(ours, info_nce_package.InfoNCE(reduction=reduction)(queries, keys), (queries, keys))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_own_keys_with_shared_keys_are_its_unpaired_negatives(info_nce_package, reduction):
    tensors = draw((6, 8), (6, 8), (9, 8))
    queries, own, negatives = (normalize(rows) for rows in tensors)
    ours = info_nce(queries, None, own, shared_keys=negatives, temperature=0.1, reduction=reduction)
    assert_same(ours, info_nce_package.InfoNCE(reduction=reduction)(*tensors), tensors)


def test_own_keys_with_a_mask_are_its_paired_negatives(info_nce_package):
    """Each query's negatives are its own rows of the keys."""
    tensors = draw((6, 8), (6, 8), (6, 4, 8))
    queries, own = (normalize(rows) for rows in tensors[:2])
    mask = torch.eye(6, dtype=torch.bool).repeat_interleave(4, 1)
    ours = info_nce(queries, normalize(tensors[2].flatten(0, 1)), own, mask=mask, temperature=0.1)
    assert_same(ours, info_nce_package.InfoNCE(negative_mode="paired")(*tensors), tensors)


# ---- published code, written again here as it is there ----


def test_google_research_simclr_is_twice_nt_xent():
    """add_contrastive_loss of objective.py: a mean over the first views' anchors plus one over the second views'."""
    a, b = draw((6, 8), (6, 8))
    first, second, temperature = F.normalize(a), F.normalize(b), 0.1
    itself = 1e9 * torch.eye(6, dtype=torch.float64)
    labels = torch.arange(6)
    theirs = sum(
        F.cross_entropy(torch.cat([x @ y.T, x @ x.T - itself], 1) / temperature, labels)
        for x, y in ((first, second), (second, first))
    )
    assert_same(2 * nt_xent(a, b, temperature=temperature), theirs, (a, b))


def test_moco_v3_is_2t_times_info_nce():
    """contrastive_loss of moco/builder.py, whose keys have no gradient."""
    queries, keys = draw((6, 8), (6, 8))
    temperature = 0.2
    logits = F.normalize(queries) @ F.normalize(keys.detach()).T / temperature
    theirs = F.cross_entropy(logits, torch.arange(6)) * (2 * temperature)
    ours = info_nce(normalize(queries), normalize(keys.detach()), torch.arange(6), temperature=temperature)
    assert_same(2 * temperature * ours, theirs, (queries,))
