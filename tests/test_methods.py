"""What each method promises beside its formula: pairs, groups, shuffles, banks, labels, and errors in one line."""

import copy
import math
from itertools import chain

import pytest
import torch
from small_methods import IMAGES, METHODS, Pixels, batch_of, build
from torch import nn
from torch.nn import functional as F

from contrastive_core.losses import NTXentLoss
from contrastive_core.method import Batch
from contrastive_core.methods.classifier import Classifier, accuracy, label_loss
from contrastive_core.methods.moco import MoCo
from contrastive_core.methods.raft import squared_distance
from contrastive_core.methods.siamese import Siamese
from contrastive_core.methods.two_views import two, two_view_metrics

# ---- two views ----


def test_simclr_can_learn_its_temperature():
    method = METHODS["SimCLR"]("none").double()
    method.loss = NTXentLoss(0.5, learn_temperature=True).double()
    loss, metrics = method(batch_of("SimCLR"))
    loss.backward()
    assert method.loss.temperature.log_temperature.grad.abs() > 0
    assert float(metrics["chance_loss"]) == pytest.approx(math.log(15))


def test_raft_and_byol_prime_differ_by_a_sign():
    raft_method, prime, batch = build("RAFT"), build("BYOL'"), batch_of("RAFT")
    away, metrics = raft_method(batch)
    towards, same = prime(batch)
    assert metrics["align"] == same["align"]
    assert metrics["cross"] > 0
    torch.testing.assert_close(away, metrics["align"] - metrics["cross"])
    torch.testing.assert_close(towards, metrics["align"] + metrics["cross"])


def test_opposite_rows_are_4_apart():
    rows = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(squared_distance(rows, -2 * rows), torch.tensor(4.0, dtype=torch.float64))
    torch.testing.assert_close(squared_distance(rows, 3 * rows), torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("negatives", [1, 7, 50])
def test_siamese_pairs_each_image_with_as_many_others_as_there_are(negatives):
    """All of them where more are asked for: never with itself, and none twice."""
    seen = []

    def loss(z1, z2, same):
        seen.append(len(same) // 8)
        return (z1 @ z2.T).sum()

    method, batch = Siamese(Pixels(), loss=loss, negatives=negatives).double(), batch_of("Siamese")
    assert method(batch)[1]["negatives"] == min(negatives, 7) == seen[1]


def test_siamese_needs_something_to_tell_apart():
    with pytest.raises(ValueError, match="one image has no other to be told from: pass a batch of at least 2"):
        build("Siamese")(batch_of("Siamese", count=1))
    with pytest.raises(ValueError, match="negatives=0: pass at least 1"):
        Siamese(Pixels(), negatives=0)


@pytest.mark.parametrize("name", ["SimCLR", "SimCLRv2", "MoCo", "MoCoV3", "PIRL", "BYOL", "SimSiam", "RAFT", "Siamese"])
def test_another_number_of_views_is_named(name):
    batch = batch_of(name)
    for views in (batch.views[:1], (*batch.views, batch.views[0])):
        with pytest.raises(ValueError, match=f"the batch has {len(views)} views: pass two of every image"):
            build(name)(Batch(views, batch.indices, batch.labels))
    assert two(batch.views) == batch.views


def test_accuracy_of_two_views_is_by_angle():
    z1 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    z2 = torch.tensor([[5.0, 1.0], [-0.1, 0.2], [3.0, 2.0], [0.0, -7.0]])  # the third looks like the first
    metrics = two_view_metrics(z1, z2, torch.ones(4, 3))
    assert metrics["accuracy"] == 0.75
    assert metrics["feature_std"] == 0
    assert metrics["spread"] > 0.5


# ---- MoCo's groups ----


class Recorder(nn.Module):
    """Remembers which images it saw together; the numbers of one image do not depend on the others."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(3, 4), []

    def forward(self, images):
        self.seen.append(images[:, 0, 0, 0].tolist())
        return self.linear(images[:, :, 0, 0])


def numbered(count, step=0):
    """Images that carry their place in their first pixel, query and key alike."""
    images = torch.randn(count, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    images[:, 0, 0, 0] = torch.arange(count)
    return Batch((images, images.clone()), torch.arange(count) + 3, torch.zeros(count))


def recorded(bn_groups, **options):
    torch.manual_seed(0)
    return MoCo(Recorder(), queue_size=9, bn_groups=bn_groups, **options).double()


@pytest.mark.parametrize("groups", [2, 4, 6])
def test_keys_are_in_other_groups_than_queries_and_put_back(groups):
    method, batch = recorded(groups), numbered(12)
    method(batch)
    queries, keys = method.encoder.seen, method.teacher[0].seen
    assert queries == [list(range(i, i + 12 // groups)) for i in range(0, 12, 12 // groups)]
    assert [len(group) for group in keys] == [12 // groups] * groups
    assert sorted([*chain(*keys)]) == list(range(12))
    assert {frozenset(group) for group in keys} != {frozenset(group) for group in queries}
    assert [*chain(*keys)] != list(range(12))
    torch.testing.assert_close(method.written[0], F.normalize(method.teacher(batch.views[1])))


def test_keys_are_shuffled_anew_every_step_and_again_after_a_restart():
    method, orders = recorded(2), []
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(method.state_dict())
        if step == 3:
            method.load_state_dict(state)
        method.teacher[0].seen.clear()
        method(numbered(12))
        orders.append([*chain(*method.teacher[0].seen)])
        method.after_step(0.1)
    assert len({tuple(order) for order in orders[:3]}) == 3
    assert orders[3] == orders[2]


def test_without_batch_norm_groups_make_no_difference():
    one, four, batch = build("MoCo"), build("MoCo"), batch_of("MoCo")
    four.bn_groups = 4
    for _ in range(2):
        losses = [method(batch)[0] for method in (one, four)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
        for method, loss in zip((one, four), losses, strict=True):
            loss.backward()
            method.after_step(0.1)
        torch.testing.assert_close(one.queue.keys(), four.queue.keys(), rtol=1e-12, atol=1e-12)
    for p, q in zip(one.parameters(), four.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)


def test_a_head_s_batch_norm_sees_the_same_groups_as_the_encoder_s():
    method = build("MoCo", "batch")
    method(batch_of("MoCo"))
    for network in (nn.Sequential(method.encoder, method.head), method.teacher):
        counts = [layer.num_batches_tracked for layer in network.modules() if hasattr(layer, "num_batches_tracked")]
        assert counts == [2, 2]


@pytest.mark.parametrize(
    ("bn_groups", "count"),
    [(3, 8), (8, 8), (5, 8), (2, 2)],
    ids=["does not divide", "groups of one", "neither", "one each"],
)
def test_groups_that_do_not_fit_are_named(bn_groups, count):
    method = recorded(bn_groups)
    message = rf"bn_groups={bn_groups} for \[{count}\] images a process: pass a multiple of 1 that splits them evenly"
    with pytest.raises(ValueError, match=message):
        method(numbered(count))


def test_no_group_at_all_is_refused():
    with pytest.raises(ValueError, match="bn_groups=0: pass at least 1, which is right without BatchNorm"):
        recorded(0)


# ---- PIRL ----


def test_pirl_s_negatives_are_never_the_batch_s_own_images():
    method, batch, drawn = build("PIRL"), batch_of("PIRL"), []
    sample = method.bank.sample

    def noted(count, *, exclude):
        drawn.append(sample(count, exclude=exclude))
        return drawn[-1]

    method.bank.sample, method.negatives = noted, 200
    for _ in range(3):
        method(batch)
        method.after_step(0.1)
    for images, _ in drawn:
        assert set(images.tolist()) == set(range(IMAGES)) - set(batch.indices.tolist())
    assert len({tuple(images.tolist()) for images, _ in drawn}) == 3  # others every step


def test_pirl_s_bank_holds_f_of_the_image_and_nothing_else():
    method, batch = build("PIRL"), batch_of("PIRL", count=5)
    before = method.bank.features.clone()
    method(batch)
    assert torch.equal(method.bank.features, before)  # written after the step
    v = method.head(method.encoder(batch.views[0]))
    method.after_step(0.1)
    for image in range(12):
        row = method.bank.features[image]
        if image in batch.indices.tolist():
            seen = v[batch.indices.tolist().index(image)]
            moved = (before[image] + seen / seen.norm()) / 2
            torch.testing.assert_close(row, moved / moved.norm())
        else:
            assert torch.equal(row, before[image])
    method.after_step(0.2)  # nothing is written twice
    assert method.bank.written == 5


def test_pirl_s_tiles_have_an_order():
    method, batch = build("PIRL"), batch_of("PIRL")
    tiles = batch.views[1]
    assert not torch.allclose(method._joined(tiles), method._joined(tiles.flip(1)))
    same = tiles[:, :1].expand_as(tiles)
    torch.testing.assert_close(method._joined(same), method._joined(same.flip(1)))


def test_pirl_s_weight_decides_between_image_and_tiles():
    batch = batch_of("PIRL")
    losses = []
    for weight in (0.0, 0.3, 1.0):
        method = build("PIRL")
        method.weight = weight
        losses.append(method(batch)[0])
    torch.testing.assert_close(losses[1], 0.7 * losses[0] + 0.3 * losses[2])


def test_pirl_names_what_does_not_fit():
    with pytest.raises(ValueError, match="form='infonce': pass one of nce, info_nce"):
        type(build("PIRL"))(Pixels(), images=12, form="infonce")
    batch = batch_of("PIRL")
    with pytest.raises(ValueError, match="tiles have the shape 8 3 3 4 4: pass b 4 c h w"):
        build("PIRL")(Batch((batch.views[0], batch.views[1][:, :3]), batch.indices, batch.labels))


# ---- the classifier and distillation ----


def labelled(labels):
    batch = batch_of("Classifier", count=len(labels))
    return Batch(batch.views, batch.indices, torch.tensor(labels))


def test_images_without_a_label_do_not_count():
    method = build("Classifier")
    some = labelled([0, -1, 2, -1, 1, 1])
    kept = some.labels >= 0
    without = Batch((some.views[0][kept],), some.indices[kept], some.labels[kept])
    torch.testing.assert_close(method(some)[0], method(without)[0])
    torch.testing.assert_close(method(some)[1]["accuracy"], method(without)[1]["accuracy"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_label_at_all_costs_nothing_and_can_go_backward(smoothing):
    method = build("Classifier", "batch")
    method.label_smoothing = smoothing
    loss, metrics = method(labelled([-1] * 4))
    loss.backward()
    assert loss == 0
    assert metrics["accuracy"].isnan()
    assert all(parameter.grad.abs().max() == 0 for parameter in method.parameters())


def test_flat_logits_cost_the_logarithm_of_the_classes():
    assert float(label_loss(torch.zeros(4, 10), torch.arange(4))) == pytest.approx(math.log(10))
    loss, metrics = Classifier(Pixels(), classes=10).double()(labelled([0, 1, 9, 3]))
    assert loss.item() == pytest.approx(math.log(10))
    assert float(metrics["chance_loss"]) == pytest.approx(math.log(10))


def test_accuracy_is_over_the_labelled():
    logits = torch.eye(4)
    assert accuracy(logits, torch.tensor([0, 2, -1, 3])) == pytest.approx(2 / 3)
    assert accuracy(logits, torch.tensor([-1] * 4)).isnan()


def test_half_precision_logits_are_compared_in_float32():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    assert label_loss(logits.half(), labels).dtype == torch.float32
    torch.testing.assert_close(label_loss(logits.half(), labels), label_loss(logits, labels), rtol=1e-3, atol=1e-3)
    assert label_loss(logits.double(), labels).dtype == torch.float64


def test_frozen_keeps_batch_norm_as_it_was():
    method = build("Classifier, frozen", "batch")
    assert method.train().training
    assert method.classifier.training
    assert not any(module.training for module in method.encoder.modules())
    before = copy.deepcopy(method.encoder.state_dict())
    for _ in range(2):
        method(batch_of("Classifier"))[0].backward()
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    thawed = build("Classifier", "batch")
    thawed(batch_of("Classifier"))
    assert not torch.equal(thawed.encoder.layers[1].running_mean, before["layers.1.running_mean"])


@pytest.mark.parametrize(("layer", "width"), [(0, 6), (1, 8), (2, 8), (3, 4), (-1, 4)])
def test_classifier_from_inside_the_head(layer, width):
    source = build("SimCLRv2", "batch")
    method = Classifier(source.encoder, classes=3, head=source.head.upto(layer)).double()
    assert method.classifier.in_features == width
    with torch.no_grad():
        method.classifier.weight.normal_()
    source.eval()
    method.eval()
    images = batch_of("Classifier").views[0]
    z = source.encoder(images)
    for block in source.head.layers[: layer if layer >= 0 else 3]:
        z = block(z)
    torch.testing.assert_close(method.logits(images), z @ method.classifier.weight.T)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="1 classes: pass labelled data of at least 2"):
        Classifier(Pixels(), classes=1)


def test_the_distilling_teacher_stays_in_eval_mode():
    method = build("Distill", "batch")
    for _ in range(2):
        method.train()
        assert method.student.encoder.training
        assert not any(module.training for module in method.teacher.modules())
        before = copy.deepcopy(method.teacher.state_dict())
        method(batch_of("Distill"))
        for name, value in method.teacher.state_dict().items():
            assert torch.equal(value, before[name]), name
    assert method.encoder is method.student.encoder


def test_distilling_without_labels_never_looks_at_them():
    method, batch = build("Distill"), batch_of("Distill")
    method.weight = 1.0
    other = Batch(batch.views, batch.indices, torch.zeros_like(batch.labels))
    assert torch.equal(method(batch)[0], method(other)[0])


def test_a_student_like_its_teacher_is_at_the_minimum():
    """At any temperature: the gradient is that of the teacher's own cross-entropy, zero."""
    method, batch = build("Distill"), batch_of("Distill")
    method.student.load_state_dict(method.teacher.state_dict())
    method.weight = 1.0
    loss, metrics = method(batch)
    assert metrics["agreement"] == 1
    assert all(value.abs().max() < 1e-12 for value in torch.autograd.grad(loss, list(method.student.parameters())))


@pytest.mark.parametrize(("classes", "weight"), [(4, 1.0), (3, 1.5), (3, -0.1)])
def test_a_student_and_a_teacher_that_do_not_fit_are_named(classes, weight):
    student, teacher = Classifier(Pixels(), classes=classes), Classifier(Pixels(), classes=3)
    message = f"a student of {classes} and a teacher of 3 classes, weight={weight}: pass as many, and 0 to 1"
    with pytest.raises(ValueError, match=message):
        type(build("Distill"))(student, teacher, weight=weight)


@pytest.mark.parametrize("name", ["Classifier", "Distill"])
def test_supervised_methods_take_one_view(name):
    batch = batch_of(name)
    with pytest.raises(ValueError, match="the batch has 2 views: pass one of every image"):
        build(name)(Batch(batch.views * 2, batch.indices, batch.labels))
