"""The methods' losses on the tensors that they compare, teachers and heads against lightly's.

Conventions: lightly's NTXentLoss and DCLLoss are means over 2n anchors, as ours; BYOL is made of its
NegativeCosineSimilarity, whose sum over both views is (BYOL - 4) / 2; SimSiam's is half that sum. Its memory bank
forgets what goes over its end, where our queue goes on at the start. lightly has no loss for MoCo v3: its NTXentLoss
compares the two views of a side with each other as well.
"""

import copy
from functools import partial

import pytest
import torch
from small_methods import batch_of, build

from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import nt_xent
from contrastive_core.momentum import cosine_momentum

lightly_loss = pytest.importorskip("lightly.loss", reason="pip install lightly: its losses are compared with ours")


def projections(method, batch):
    features = [method.encoder(view) for view in batch.views]
    return [method.head(one) for one in features]


def predictions(method, batch):
    return [method.predictor(z) for z in projections(method, batch)]


def simclr(method, batch):
    return lightly_loss.NTXentLoss(0.3)(*projections(method, batch))


def decoupled(method, batch):
    return lightly_loss.DCLLoss(0.3)(*projections(method, batch))


def simsiam(method, batch):
    cosine = lightly_loss.NegativeCosineSimilarity()
    (z1, z2), (p1, p2) = projections(method, batch), predictions(method, batch)
    return (cosine(p1, z2.detach()) + cosine(p2, z1.detach())) / 2


def byol(method, batch):
    cosine = lightly_loss.NegativeCosineSimilarity()
    p1, p2 = predictions(method, batch)
    t1, t2 = (method.teacher(view) for view in batch.views)
    return 4 + 2 * (cosine(p1, t2) + cosine(p2, t1))


def moco(method, batch):
    loss = lightly_loss.NTXentLoss(0.2, memory_bank_size=(14, 4)).double()
    loss.memory_bank.bank.copy_(method.queue.features)
    (q, _), k = projections(method, batch), method.teacher(batch.views[1])
    return loss(q, k)


def byol_prime(method, batch):
    cosine = lightly_loss.NegativeCosineSimilarity()
    p1, p2 = predictions(method, batch)
    t1, t2 = (method.teacher(view) for view in batch.views)
    return 2 + 2 * cosine(p1, p2) + 2 + cosine(p1, t1) + cosine(p2, t2)


CASES = {"SimCLR": simclr, "SimSiam": simsiam, "BYOL": byol, "MoCo": moco, "BYOL'": byol_prime, "decoupled": decoupled}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_lightly_s(name):
    method = build("SimCLR" if name == "decoupled" else name)
    if name == "decoupled":
        method.loss = partial(nt_xent, temperature=0.3, decoupled=True)
    batch, again = batch_of("SimCLR"), copy.deepcopy(method)
    ours, theirs = method(batch)[0], CASES[name](again, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    ours.backward()
    theirs.backward()
    for p, q in zip(method.parameters(), again.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)


def test_the_queue_is_lightly_s_memory_bank():
    """Rows of a first batch; the second goes round the end, where theirs drops what does not fit."""
    method = build("MoCo")
    theirs = lightly_loss.NTXentLoss(0.2, memory_bank_size=(14, 4)).double()
    theirs.memory_bank.bank.copy_(method.queue.features)
    for seed in range(2):
        batch = batch_of("MoCo", seed=seed)
        theirs(method.head(method.encoder(batch.views[0])), method.teacher(batch.views[1]))
        method(batch)
        method.after_step(0.1)
        same = slice(0, 14) if seed == 0 else slice(8, 14)
        torch.testing.assert_close(method.queue.features[same], theirs.memory_bank.bank.double()[same])
    assert method.queue.written == 16
    assert int(theirs.memory_bank.bank_ptr) == 0


@pytest.mark.parametrize("name", ["MoCo", "BYOL"])
def test_the_teacher_follows_as_lightly_s(name):
    utils = pytest.importorskip("lightly.models.utils")
    method = build(name)
    theirs = copy.deepcopy(method.teacher)
    model = torch.nn.Sequential(method.encoder, method.head)
    utils.update_momentum(model, theirs, 0.9 if name == "MoCo" else cosine_momentum(0.25, 0.9))
    method.after_step(0.25)
    for p, q in zip(method.teacher.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_momentum_s_cosine_is_lightly_s():
    scheduler = pytest.importorskip("lightly.utils.scheduler")
    for step in range(11):
        theirs = scheduler.cosine_schedule(step, 11, 0.996, 1.0)
        assert cosine_momentum(step / 10, 0.996) == pytest.approx(theirs, abs=1e-12)


HEADS = {
    "SimSiamProjectionHead": ((6, 5, 4), {"layers": 3, "hidden": 5, "out": 4, "output_norm": "plain"}),
    "SimSiamPredictionHead": ((6, 5, 4), {"hidden": 5, "out": 4}),
    "MoCoProjectionHead": ((6, 5, 4), {"hidden": 5, "out": 4, "norm": False}),
    "SimCLRProjectionHead": ((6, 5, 4), {"hidden": 5, "out": 4, "output_norm": "norm"}),
    "BYOLProjectionHead": ((6, 5, 4), {"hidden": 5, "out": 4}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_lightly_s(name):
    """With its weights, in the order that both hold them in; BYOL's last bias is one that its paper does not have."""
    heads = pytest.importorskip("lightly.models.modules.heads")
    sizes, options = HEADS[name]
    torch.manual_seed(0)
    theirs, ours = getattr(heads, name)(*sizes), ProjectionHead(6, **options)
    wanted, got = list(theirs.parameters()), list(ours.parameters())
    assert [p.shape for p in got] == [p.shape for p in wanted]
    with torch.no_grad():
        for mine, other in zip(got, wanted, strict=True):
            mine.copy_(other)
    x = torch.randn(9, 6)
    torch.testing.assert_close(ours(x), theirs(x))
