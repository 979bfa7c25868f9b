"""Each method's loss and gradient against its formula, written as loops over images in float64.

A formula stops gradients where the paper does, so the comparison of gradients says which parameters learn, and from
what. The networks have BatchNorm: which images pass one together is part of the method.
"""

import copy
import math

import pytest
import torch
from small_methods import CLASSES, METHODS, TEACHERS, batch_of, build
from torch import nn

from contrastive_core.losses import exponential_contrastive, nt_xent

# ---- the formulas ----


def cosine(a, b):
    return (a @ b) / (a @ a).sqrt() / (b @ b).sqrt()


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def together(method, batch):
    """Both views as one batch."""
    z = method.head(method.encoder(torch.cat(batch.views)))
    return z[: len(z) // 2], z[len(z) // 2 :]


def predictions(method, batch):
    """View by view."""
    z1, z2 = (method.head(method.encoder(view)) for view in batch.views)
    return z1, z2, method.predictor(z1), method.predictor(z2)


def targets(method, batch):
    with torch.no_grad():
        return [method.teacher(view) for view in batch.views]


def nt_xent_by_loops(z1, z2, temperature, memory=()):
    z, n = [*z1, *z2], len(z1)
    losses = []
    for i in range(2 * n):
        others = [k for k in range(2 * n) if k != i]
        candidates = sum((cosine(z[i], z[k]) / temperature).exp() for k in others)
        candidates = candidates + sum((cosine(z[i], m) / temperature).exp() for m in memory)
        losses.append(-((cosine(z[i], z[(i + n) % (2 * n)]) / temperature).exp() / candidates).log())
    return mean(losses)


def simclr(method, batch):
    return nt_xent_by_loops(*together(method, batch), 0.3)


def simclr_v2(method, batch):
    return nt_xent_by_loops(*together(method, batch), 0.3, method.queue.features.clone())


def moco(method, batch):
    """The queries' two groups are the halves of the batch; the keys' are those that the method drew."""
    q = torch.cat([method.head(method.encoder(half)) for half in batch.views[0].chunk(2)])
    with torch.no_grad():
        keys = method._keys(batch.views[1], batch.indices, [len(batch.indices)], 2)
    losses = []
    for i in range(len(q)):
        own = (cosine(q[i], keys[i]) / 0.2).exp()
        others = sum((cosine(q[i], m) / 0.2).exp() for m in method.queue.features)
        losses.append(-(own / (own + others)).log())
    return mean(losses)


def moco_v3(method, batch):
    _, _, q1, q2 = predictions(method, batch)
    k1, k2 = targets(method, batch)
    loss = 0
    for q, k in ((q1, k2), (q2, k1)):
        for i in range(len(q)):
            scores = [(cosine(q[i], other) / 0.4).exp() for other in k]
            loss = loss - 2 * 0.4 * (scores[i] / sum(scores)).log() / len(q)
    return loss


def pirl(method, batch, z=None):
    """L = w L(m, g(tiles)) + (1 - w) L(m, f(x)); in the NCE form a score is exp(m.u / T) over (itself + Z K / N)."""
    image, tiles = batch.views
    v = method.head(method.encoder(image))
    each = method.tile_head(method.encoder(tiles.flatten(0, 1)))
    u = method.join(torch.stack([torch.cat([each[4 * i + t] for t in range(4)]) for i in range(len(image))]))
    bank, size = method.bank.features.clone(), 12
    drawn = method.bank.sample(7, exclude=batch.indices)[0].tolist()
    score = lambda a, row: (a @ bank[row] / (a @ a).sqrt() / 0.5).exp()  # noqa: E731
    if z is None:  # of the first batch: N times the mean exponential score of the tiles with the negatives
        z = size * mean(float(score(one, row)) for one in u.detach() for row in drawn)
    loss = 0
    for weight, queries in ((method.weight, u), (1 - method.weight, v)):
        for query, own in zip(queries, batch.indices.tolist(), strict=True):
            if method.form == "info_nce":
                one = -(score(query, own) / (score(query, own) + sum(score(query, row) for row in drawn))).log()
            else:
                h = lambda row, q=query: score(q, row) / (score(q, row) + z * 7 / size)  # noqa: E731
                one = -h(own).log() - sum((1 - h(row)).log() for row in drawn)
            loss = loss + weight * one / len(queries)
    return loss


def byol(method, batch):
    _, _, p1, p2 = predictions(method, batch)
    t1, t2 = targets(method, batch)
    return mean(distance(p1[i], t2[i]) + distance(p2[i], t1[i]) for i in range(len(p1)))


def distance(a, b):
    """|| a/|a| - b/|b| ||^2"""
    difference = a / (a @ a).sqrt() - b / (b @ b).sqrt()
    return difference @ difference


def simsiam(method, batch):
    z1, z2, p1, p2 = predictions(method, batch)
    s1, s2 = z1.detach(), z2.detach()
    return mean(-cosine(p1[i], s2[i]) / 2 - cosine(p2[i], s1[i]) / 2 for i in range(len(p1)))


def raft(method, batch, sign=-1):
    _, _, p1, p2 = predictions(method, batch)
    t1, t2 = targets(method, batch)
    align = mean(distance(a, b) for a, b in zip(p1, p2, strict=True))
    cross = mean((distance(p1[i], t1[i]) + distance(p2[i], t2[i])) / 2 for i in range(len(p1)))
    return align + sign * cross


def siamese(method, batch):
    z1, z2 = together(method, batch)
    n = len(z1)
    pulled = mean(distance(z1[i], z2[i]) / 2 for i in range(n))
    others = [(i, (i + s) % n) for i in range(n) for s in (1, 2)]
    pushed = mean((1 - distance(z1[i], z2[j]).sqrt()).clamp_min(0) ** 2 / 2 for i, j in others)
    return pulled + pushed


def classifier(method, batch):
    """Cross-entropy with a tenth of the probability spread over all classes; images without a label do not count."""
    logits = method.classifier(method.encoder(batch.views[0]))
    losses = []
    for row, label in zip(logits, batch.labels.tolist(), strict=True):
        if label >= 0:
            log_p = row - row.exp().sum().log()
            wanted = [method.label_smoothing / CLASSES + (1 - method.label_smoothing) * (c == label) for c in range(3)]
            losses.append(-sum(wanted[c] * log_p[c] for c in range(CLASSES)))
    return mean(losses)


def distill(method, batch):
    (images,) = batch.views
    student = method.student.classifier(method.student.encoder(images))
    with torch.no_grad():
        teacher = method.teacher.classifier(method.teacher.encoder(images))
    taught, labelled = [], []
    for mine, theirs, label in zip(student, teacher, batch.labels.tolist(), strict=True):
        p = (theirs / 0.7).exp() / (theirs / 0.7).exp().sum()
        log_p = mine / 0.7 - (mine / 0.7).exp().sum().log()
        taught.append(-sum(p[c] * log_p[c] for c in range(CLASSES)))
        if label >= 0:
            labelled.append(-(mine[label] - mine.exp().sum().log()))
    return 0.6 * mean(taught) + 0.4 * mean(labelled)


FORMULAS = {
    "SimCLR": simclr,
    "SimCLRv2": simclr_v2,
    "MoCo": moco,
    "MoCoV3": moco_v3,
    "PIRL": pirl,
    "PIRL by InfoNCE": pirl,
    "BYOL": byol,
    "SimSiam": simsiam,
    "RAFT": raft,
    "BYOL'": lambda method, batch: raft(method, batch, sign=1),
    "Siamese": siamese,
    "Classifier": classifier,
    "Classifier, frozen": classifier,
    "Distill": distill,
}


def test_every_method_has_a_formula():
    assert set(FORMULAS) == set(METHODS)


def gradients(method, loss):
    loss.backward()
    return {name: parameter.grad for name, parameter in method.named_parameters()}


# MoCo's build with BatchNorm only: what it does without has a test of its own
@pytest.mark.parametrize(
    ("name", "norm"), [(n, norm) for n in METHODS for norm in ("none", "batch") if (n, norm) != ("MoCo", "none")]
)
def test_loss_and_gradient_are_those_of_the_formula(name, norm):
    method, batch = build(name, norm), batch_of(name)
    again = copy.deepcopy(method)
    loss, _ = method(batch)
    expected = FORMULAS[name](again, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    found = gradients(method, loss)
    for parameter, gradient in gradients(again, expected).items():
        if gradient is None:
            assert found[parameter] is None or found[parameter].abs().max() == 0, parameter
        else:
            torch.testing.assert_close(found[parameter], gradient, rtol=1e-8, atol=1e-10, msg=parameter)


LEARNS_NOTHING = {"Classifier, frozen": ("encoder.", "head.")} | dict.fromkeys(TEACHERS, ("teacher.",))


@pytest.mark.parametrize("name", METHODS)
def test_which_parameters_learn(name):
    """Every one but teachers and what is frozen; queues and banks are buffers, and take part in no gradient."""
    method = build(name, "batch")
    learned = gradients(method, method(batch_of(name))[0])
    before_a_norm = ("conv", "layers.0.bias")  # a convolution's bias, which the norm takes away
    for parameter, gradient in learned.items():
        if parameter.startswith(LEARNS_NOTHING.get(name, ("none",))):
            assert gradient is None, parameter
            assert not method.get_parameter(parameter).requires_grad, parameter
        elif not parameter.endswith(before_a_norm):
            assert gradient.abs().max() > 1e-6, parameter
    assert all(not buffer.requires_grad for buffer in method.buffers())


@pytest.mark.parametrize("name", METHODS)
def test_metrics_are_finite_scalars_without_a_graph(name):
    method = build(name, "batch")
    loss, metrics = method(batch_of(name))
    assert loss.shape == ()
    for key, value in metrics.items():
        assert isinstance(value, torch.Tensor), key
        assert value.shape == (), key
        assert value.isfinite(), key
        assert not value.requires_grad, key
    assert 0 <= metrics["accuracy"] <= 1
    if not name.startswith("Distill"):
        assert metrics["feature_std"] > 0


SCORED = {"SimCLR": 15, "SimCLRv2": 29, "MoCo": 15, "MoCoV3": 8, "PIRL by InfoNCE": 8, "Classifier": CLASSES}


@pytest.mark.parametrize("name", SCORED)
def test_chance_is_the_loss_of_scores_that_say_nothing(name):
    """Of networks that give 0 for every image: they score all candidates alike."""
    method, candidates = build(name).requires_grad_(False), SCORED[name]
    for part in ("head", "join", "predictor", "classifier"):
        for parameter in getattr(method, part, nn.Module()).parameters():
            parameter.zero_()
    loss, metrics = method(batch_of(name))
    expected = (4 * 0.4 if name == "MoCoV3" else 1) * math.log(candidates)
    assert float(loss) == pytest.approx(expected)
    assert float(metrics["chance_loss"]) == pytest.approx(expected)
    if name != "Classifier":
        assert metrics["negatives"] == candidates - 1


@pytest.mark.parametrize("name", ["SimCLR", "MoCo", "BYOL", "SimSiam", "RAFT"])
def test_collapse_shows(name):
    """An encoder that sees nothing: both alarms are at 0, and nothing is picked."""
    method = build(name)
    with torch.no_grad():
        next(method.encoder.parameters()).zero_()
    _, metrics = method(batch_of(name))
    assert metrics["feature_std"] < 1e-6
    assert metrics["spread"] < 1e-6


# ---- variants ----


def test_simclr_takes_another_loss():
    method = METHODS["SimCLR"]("none").double()
    decoupled = copy.deepcopy(method)
    decoupled.loss = lambda z1, z2: nt_xent(z1, z2, temperature=0.3, decoupled=True)
    batch = batch_of("SimCLR")
    z1, z2 = together(method, batch)
    z, losses = [*z1, *z2], []
    for i in range(16):
        negatives = sum((cosine(z[i], z[k]) / 0.3).exp() for k in range(16) if k % 8 != i % 8)
        losses.append(negatives.log() - cosine(z[i], z[(i + 8) % 16]) / 0.3)
    torch.testing.assert_close(decoupled(batch)[0], mean(losses), rtol=1e-10, atol=1e-12)


def test_simclr_v2_without_a_memory_is_simclr_with_its_head():
    method = build("SimCLRv2", "batch")
    method.teacher = method.queue = None
    batch = batch_of("SimCLRv2")
    expected = nt_xent_by_loops(*together(copy.deepcopy(method), batch), 0.3)
    loss, metrics = method(batch)
    method.after_step(0.5)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    assert metrics["negatives"] == 14


def test_byol_prime_bounds_byol():
    """||p_1 - z'_2||^2 <= 2 ||p_1 - p_2||^2 + 2 ||p_2 - z'_2||^2: BYOL's sum is at most 4 (align + cross)."""
    pairs = []
    for seed in range(20):
        method, batch = build("BYOL'", "batch", seed=seed), batch_of("BYOL'", seed=seed)
        pairs.append((byol(copy.deepcopy(method), batch), method(batch)[0]))
    known = [(theirs, ours) for theirs, ours in pairs if theirs.isfinite()]  # a zero vector has no direction
    assert len(known) > 10
    assert all(theirs <= 4 * ours for theirs, ours in known)
    assert any(theirs > ours for theirs, ours in known)


def test_siamese_takes_the_exponential_loss():
    method = build("Siamese")
    method.loss = lambda *pairs: exponential_contrastive(*pairs, bound=4.0)
    batch = batch_of("Siamese")
    z1, z2 = (z / z.norm(dim=1, keepdim=True) for z in together(method, batch))
    pulled = mean(2 / 4 * (a - b).abs().sum() ** 2 for a, b in zip(z1, z2, strict=True))
    pairs = [(z1[i], z2[(i + s) % 8]) for i in range(8) for s in (1, 2)]
    pushed = mean(2 * 4 * (-2.77 / 4 * (a - b).abs().sum()).exp() for a, b in pairs)
    torch.testing.assert_close(method(batch)[0], pulled + pushed, rtol=1e-10, atol=1e-12)


def test_pirl_s_normaliser_is_estimated_once():
    method, batches = build("PIRL"), [batch_of("PIRL", seed=seed) for seed in (1, 2)]
    losses = []
    for batch in batches:
        losses.append(method(batch)[0])
        z = float(method.normaliser)
        torch.testing.assert_close(losses[-1], pirl(method, batch, z), rtol=1e-10, atol=1e-12)
    fresh = build("PIRL")
    fresh(batches[1])
    assert float(fresh.normaliser) != z
    torch.testing.assert_close(losses[0], pirl(build("PIRL"), batches[0]), rtol=1e-10, atol=1e-12)
