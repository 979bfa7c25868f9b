"""Features, nearest neighbours, linear probes and pixel baselines against slow or known answers."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor, nn
from torchvision.models.feature_extraction import DualGraphModule

from contrastive_core.data import BadImages, ImageDataset, TooManyBadImages, labels_per_class, mnist5k, sample_ids
from contrastive_core.encoders import TorchvisionTrunk
from contrastive_core.evaluate import knn, linear
from contrastive_core.evaluate.baselines import (
    logistic_probe,
    pixel_features,
    ridge_probe,
    svm_probe,
    thumbnail_features,
)
from contrastive_core.evaluate.features import extract_features, pool_grid
from contrastive_core.evaluate.knn import knn_accuracy, knn_predictions
from contrastive_core.evaluate.linear import (
    few_label_accuracy,
    folds_of,
    in_row_space,
    linear_probe,
    paper_linear_probe,
    standardise,
)


def arrays(count: int, bad: tuple[int, ...] = ()) -> ImageDataset:
    """Image i has value i everywhere and label i % 3."""
    images: list = [np.full((8, 8, 3), i, np.uint8) for i in range(count)]
    for i in bad:
        images[i] = b""
    return ImageDataset(images, size=8, labels=[i % 3 for i in range(count)])


def blobs(per_class: int, dim: int = 6, classes: int = 3, spread: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around the first axes, `spread` wide."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(per_class)
    return torch.eye(classes, dim)[labels] + spread * torch.randn(len(labels), dim, generator=generator), labels


# --- features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_features_are_those_of_each_image_in_order(batch_size: int, cache: bool) -> None:
    dataset = arrays(10).cached() if cache else arrays(10)
    features, labels = extract_features(lambda images: images.mean((2, 3)), dataset, batch_size=batch_size)
    assert torch.allclose(features, torch.arange(10)[:, None].expand(10, 3) / 255)
    assert torch.equal(labels, torch.arange(10) % 3)


def test_grids_keep_their_shape_and_no_gradient() -> None:
    encoder = nn.Conv2d(3, 5, 4, 4)
    features, _ = extract_features(lambda images: encoder(images).permute(0, 2, 3, 1), arrays(3))
    assert features.shape == (3, 2, 2, 5)
    assert not features.requires_grad
    assert not features.is_inference()


def test_a_module_is_in_eval_mode_meanwhile_and_as_it_was_afterwards() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Dropout(0.5))
    encoder[2].eval()
    features, _ = extract_features(encoder, arrays(4))
    assert torch.allclose(features, torch.arange(4)[:, None].expand(4, 192) / 255 / math.sqrt(1 + 1e-5))
    assert [module.training for module in encoder] == [True, True, False]
    assert int(encoder[1].num_batches_tracked) == 0


def test_a_trunk_of_torchvision_is_on_its_training_graph_again_afterwards() -> None:
    """Its extractor holds a graph for each mode, which only `train` exchanges: a flag put back is not enough."""
    trunk = TorchvisionTrunk("resnet18")
    extractor = next(module for module in trunk.modules() if isinstance(module, DualGraphModule))
    extract_features(trunk, arrays(2))
    assert extractor.training
    assert extractor.graph is extractor.train_graph


def test_autocast_gives_float32_near_the_full_precision() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    exact, _ = extract_features(encoder, arrays(5))
    near, _ = extract_features(encoder, arrays(5), autocast=torch.bfloat16)
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    assert torch.allclose(near, exact, atol=1e-2)


@pytest.mark.parametrize("cache", [False, True])
def test_bad_images_are_left_out_never_replaced(cache: bool, caplog: pytest.LogCaptureFixture) -> None:
    dataset = arrays(10, bad=(0, 5))
    bad_images = BadImages()
    with caplog.at_level(logging.WARNING):
        features, labels = extract_features(
            lambda images: images[:, 0, 0, 0],
            dataset.cached() if cache else dataset,
            batch_size=1,
            bad_images=bad_images,
        )
    assert torch.allclose(features * 255, torch.tensor([1.0, 2, 3, 4, 6, 7, 8, 9]))
    assert labels.tolist() == [1, 2, 0, 1, 0, 1, 2, 0]
    assert (bad_images.bad, bad_images.seen) == (2, 10)
    assert "evaluated on 8 of 10 images" in caplog.text
    with pytest.raises(TooManyBadImages):
        extract_features(lambda images: images, dataset, bad_images=BadImages(0.1, grace=1))


def test_pooling_a_grid_in_closed_form() -> None:
    grid = torch.arange(1.0, 5).view(1, 2, 2, 1)
    assert pool_grid(grid, 1).tolist() == [[2.5]]
    assert pool_grid(grid, 2).tolist() == [[1, 2, 3, 4]]
    latents = torch.randn(3, 4, 6, 5)
    assert torch.allclose(pool_grid(latents, 1), latents.mean((1, 2)), atol=1e-6)
    cells = pool_grid(latents, 2).view(3, 2, 2, 5)
    assert torch.allclose(cells[:, 1, 0], latents[:, 2:, :3].mean((1, 2)), atol=1e-6)
    overlapping = pool_grid(latents[:, :3, :3], 2).view(3, 2, 2, 5)
    assert torch.allclose(overlapping[:, 0, 1], latents[:, :2, 1:3].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(("shape", "cells"), [((2, 3, 4), 1), ((2, 2, 4, 5), 3), ((2, 4, 4, 5), 0)])
def test_grids_that_do_not_fit(shape: tuple[int, ...], cells: int) -> None:
    with pytest.raises(ValueError, match="pass `b rows cols d`"):
        pool_grid(torch.zeros(shape), cells)


# --- nearest neighbours -----------------------------------------------------------------------------------------


def slow_knn(train: Tensor, labels: Tensor, test: Tensor, neighbours: int, temperature: float) -> list[int]:
    """Wu et al. 2018, section 3.4, one pair at a time."""
    predictions = []
    for query in test.double():
        similarity = [float(query @ key / (query.norm() * key.norm())) for key in train.double()]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:neighbours]
        votes = [0.0] * (int(labels.max()) + 1)
        for i in nearest:
            votes[int(labels[i])] += math.exp(similarity[i] / temperature)
        predictions.append(votes.index(max(votes)))
    return predictions


@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
@pytest.mark.parametrize(("neighbours", "temperature"), [(1, 0.1), (5, 0.1), (20, 0.07), (7, 10.0)])
def test_knn_is_the_slow_double_loop(
    neighbours: int, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "LARGEST_TABLE", chunk)
    generator = torch.Generator().manual_seed(neighbours)
    train, test = torch.randn(60, 5, generator=generator), torch.randn(30, 5, generator=generator)
    labels = torch.randint(0, 4, (60,), generator=generator)
    predictions = knn_predictions(train, labels, test, neighbours=neighbours, temperature=temperature)
    assert predictions.tolist() == slow_knn(train, labels, test, neighbours, temperature)


def test_each_is_its_own_nearest() -> None:
    features, labels = blobs(10, spread=0.5)
    assert knn_accuracy(features, labels, 3 * features, labels, neighbours=1) == 1.0
    assert knn_accuracy(features, labels, features, (labels + 1) % 3, neighbours=1) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_knn_in_any_float_type_with_zero_vectors_and_a_sharp_temperature(dtype: torch.dtype) -> None:
    features, labels = blobs(10, spread=0.05)
    features[0] = 0
    accuracy = knn_accuracy(features.to(dtype), labels, features[1:].to(dtype), labels[1:], temperature=0.001)
    assert accuracy == 1.0
    assert knn_predictions(features.to(dtype), labels, torch.zeros(2, 6, dtype=dtype), neighbours=500).shape == (2,)


def test_more_neighbours_than_rows_takes_all() -> None:
    features, labels = blobs(2)
    assert torch.equal(
        knn_predictions(features, labels, features, neighbours=100),
        knn_predictions(features, labels, features, neighbours=6),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": torch.zeros(5)}, "pass n d, n, m d"),
        ({"test_features": torch.zeros(4, 3)}, "pass n d, n, m d"),
        ({"train_features": torch.zeros(6, 2, 3)}, "pass n d, n, m d"),
        ({"train_labels": torch.tensor([0, 1, 2, -1, -1, 0])}, "2 training labels are negative"),
        ({"test_features": torch.full((2, 6), math.nan)}, "NaN or infinity"),
        ({"neighbours": 0}, "neighbours 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
    ],
)
def test_knn_says_what_does_not_fit(change: dict, message: str) -> None:
    features, labels = blobs(2)
    with pytest.raises(ValueError, match=message):
        knn_predictions(**{"train_features": features, "train_labels": labels, "test_features": features, **change})
    with pytest.raises(ValueError, match="pass one each"):
        knn_accuracy(features, labels, features, labels[1:])


# --- linear probes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [linear_probe, logistic_probe, svm_probe, ridge_probe])
def test_separable_classes_are_told_apart(classifier: linear.ProbeFunction) -> None:
    train, test = blobs(20), blobs(30, seed=1)
    probe = classifier(*train, *test)
    assert probe.accuracy == 1.0
    assert torch.equal(probe.predictions, test[1])
    assert probe.predictions.dtype == torch.int64
    assert probe.regularisation > 0


@pytest.mark.parametrize("classifier", [linear_probe, logistic_probe, svm_probe, ridge_probe])
def test_the_test_labels_have_no_influence(classifier: linear.ProbeFunction) -> None:
    train, (test, labels) = blobs(10, spread=0.6), blobs(30, spread=0.6, seed=1)
    one, other = classifier(*train, test, labels), classifier(*train, test, labels.flip(0))
    assert torch.equal(one.predictions, other.predictions)
    assert one.regularisation == other.regularisation
    assert one.accuracy == (one.predictions == labels).double().mean().item()


@pytest.mark.parametrize("classifier", [linear_probe, svm_probe, ridge_probe])
def test_the_settings_are_chosen_without_a_look_at_the_test_rows(classifier: linear.ProbeFunction) -> None:
    train, test = blobs(10, spread=0.6), blobs(30, spread=0.6, seed=1)
    first = classifier(*train, *test)
    alone = [classifier(*train, test[0][i : i + 1], test[1][i : i + 1]) for i in range(5)]
    assert all(probe.regularisation == first.regularisation for probe in alone)
    assert [int(probe.predictions) for probe in alone] == first.predictions[:5].tolist()


def test_only_training_rows_are_ever_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    original = linear._logistic_regression

    def watched(regularisation: float):  # type: ignore[no-untyped-def]
        model = original(regularisation)
        fit = model.fit
        model.fit = lambda x, y: seen.append((x, y)) or fit(x, y)
        return model

    monkeypatch.setattr(linear, "_logistic_regression", watched)
    train, test = blobs(10, spread=0.3), blobs(5, spread=0.3, seed=1)
    linear_probe(*train, *test)
    rows = {row.tobytes() for row in standardise(train[0], test[0])[0]}
    assert len(seen) > 10
    assert all(row.tobytes() in rows for x, _ in seen for row in x)
    assert [len(y) for _, y in seen][-1] == 30
    assert {len(y) for _, y in seen[:-1]} == {24}


def test_the_optimum_is_the_one_of_slow_double_precision() -> None:
    """Gradient of the stated objective at what came out, in float64."""
    train, test = blobs(40, spread=1.0), blobs(10, seed=1)
    x, _ = standardise(train[0], test[0])
    model = linear._logistic_regression(2.0).fit(x, train[1].numpy())
    weight, bias = (
        torch.tensor(part, dtype=torch.float64, requires_grad=True) for part in (model.coef_, model.intercept_)
    )
    logits = torch.from_numpy(x).double() @ weight.T + bias
    loss = nn.functional.cross_entropy(logits, train[1], reduction="sum") + weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 2e-2, "next to a loss of about 90"


@pytest.mark.parametrize(
    ("seed", "rows", "dim", "offset", "noise"), [(21, 20, 16, 1.0, 0.0), (217, 40, 32, 10.0, 1e-3)]
)
def test_a_loss_too_flat_for_float32_is_no_fault(seed: int, rows: int, dim: int, offset: float, noise: float) -> None:
    """Two directions away from 0 are all there is: L-BFGS ended in "ABNORMAL" here, and a sweep's cell with it."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(rows, 2, generator=generator) @ torch.randn(2, dim, generator=generator)
    features = (features + offset + torch.randn(rows, dim, generator=generator) * noise).relu()
    labels = torch.arange(rows) % 10
    assert 0 <= linear_probe(features, labels, features, labels).accuracy <= 1


@pytest.mark.parametrize(("rows", "dim"), [(12, 300), (40, 300), (40, 41), (300, 40)])
def test_fewer_coordinates_give_the_same_probabilities(rows: int, dim: int) -> None:
    """Against scikit-learn on all features, in float64 and to the end of its tolerance."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % 4
    centres = torch.randn(4, dim, generator=generator)
    train, test = (
        standardise(*(centres[labels] * 0.3 + torch.randn(rows, dim, generator=generator) for _ in range(2)))
    )  # fmt: skip
    model = LogisticRegression(C=0.1, max_iter=10_000, tol=1e-10).fit(train.astype(np.float64), labels)
    fewer, fewer_test = in_row_space(train, test)
    assert fewer.shape == (rows, min(rows, dim))
    np.testing.assert_allclose(fewer @ fewer.T, train @ train.T, atol=1e-3 * dim)
    reduced = LogisticRegression(C=0.1, max_iter=10_000, tol=1e-10).fit(fewer.astype(np.float64), labels)
    np.testing.assert_allclose(reduced.predict_proba(fewer_test), model.predict_proba(test), atol=1e-5)
    probe = linear_probe(*(torch.from_numpy(train), labels, torch.from_numpy(test), labels), regularisations=[10.0])
    assert (probe.predictions.numpy() == model.predict(test)).mean() > 0.97


def test_the_row_space_of_one_row() -> None:
    train, test = in_row_space(np.array([[3.0, 4.0]]), np.array([[4.0, -3.0], [6.0, 8.0]]))
    np.testing.assert_allclose(np.abs(train), [[5.0]])
    np.testing.assert_allclose(test / train, [[0.0], [2.0]], atol=1e-12)


def test_one_label_in_each_of_many_classes_is_no_reason_for_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    features = torch.eye(30)
    assert linear_probe(features, torch.arange(30), features, torch.arange(30)).accuracy == 1.0
    assert svm_probe(features, torch.arange(30), features, torch.arange(30)).accuracy == 1.0
    assert not [str(warning.message) for warning in recwarn]


def test_a_kernel_is_as_narrow_as_the_data_want() -> None:
    """Twelve bands of alternating classes, which C = 10 and scikit-learn's width do not tell apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(600, 1, generator=generator)
    y = (x[:, 0] * 12).long() % 2
    fixed = SVC(C=10, gamma="scale").fit(x[:300].numpy(), y[:300].numpy()).score(x[300:].numpy(), y[300:].numpy())
    assert fixed < 0.75
    assert svm_probe(x[:300], y[:300], x[300:], y[300:]).accuracy > 0.9


def test_few_labels_do_not_choose_a_kernel_by_luck() -> None:
    """The best of fifteen by its folds alone was 4 points below C = 10 and scikit-learn's width with 40 digits."""
    digits = mnist5k()
    assert digits.test is not None
    ids = sample_ids(digits.train)
    images = [torch.stack([part[i].image for i in range(500)]) for part in (digits.train, digits.test)]
    x, test_x = (pixel_features(each) for each in images)
    y, test_y = digits.train.labels[:500], digits.test.labels[:500]
    chosen, fixed = [], []
    for seed in range(4):
        few = labels_per_class(y, 4, seed=seed, ids=ids[:500])
        chosen.append(svm_probe(x[few], y[few], test_x, test_y).accuracy)
        model = SVC(C=10, gamma="scale").fit(x[few].numpy(), y[few].numpy())
        fixed.append(model.score(test_x.numpy(), test_y.numpy()))
    assert sum(chosen) / 4 > sum(fixed) / 4 - 0.01


def test_noisy_labels_want_a_strong_regulariser_and_clean_ones_a_weak_one() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 30, generator=generator)
    clean, noise = (x[:, 0] > 0).long(), torch.randint(0, 2, (200,), generator=generator)
    weak, strong = linear_probe(x, clean, x, clean), linear_probe(x, noise, x, noise)
    assert weak.accuracy > 0.95
    assert strong.regularisation > 100 * weak.regularisation


def test_the_probe_is_deterministic_and_leaves_the_generators_alone() -> None:
    train, test = blobs(10, spread=0.6), blobs(30, spread=0.6, seed=1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert linear_probe(*train, *test).accuracy == linear_probe(*train, *test).accuracy
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_labels_need_not_be_consecutive_and_features_may_be_constant() -> None:
    features, labels = blobs(10)
    features[:, 5] = 4.0
    probe = linear_probe(features.half(), 3 * labels + 1, features.half(), 3 * labels + 1)
    assert probe.accuracy == 1.0


def test_one_label_a_class_takes_the_middle_strength() -> None:
    features, labels = blobs(1)
    probe = linear_probe(features, labels, features, labels, regularisations=(1.0, 100.0, 10.0))
    assert probe.regularisation == 10.0
    assert probe.accuracy == 1.0


def test_many_rows_hold_out_one_part() -> None:
    labels = np.arange(6000) % 3
    ((fit, held),) = folds_of(labels, 5, 0)
    assert (len(fit), len(held)) == (4800, 1200)
    assert not set(fit) & set(held)
    assert np.bincount(labels[held]).tolist() == [400] * 3
    ((fit, held),) = folds_of(np.arange(50_000) % 10, 5, 0)
    assert (len(fit), len(held)) == (8000, 2000)
    parts = folds_of(labels[:90], 5, 0)
    assert sorted(np.concatenate([held for _, held in parts])) == list(range(90))


def test_the_only_row_of_a_class_is_in_every_fit_and_keeps_no_other_class_from_choosing():
    labels = np.array([0, 1, 2, 1, 0, 1, 0])
    parts = folds_of(labels, 5, 0)
    assert len(parts) == 3
    for fit, held in parts:
        assert 2 in fit
        assert sorted([*fit, *held]) == list(range(7))
    assert sorted(row for _, held in parts for row in held) == [0, 1, 3, 4, 5, 6]
    assert folds_of(np.array([0, 1, 2, 2, 2]), 5, 0) == []  # one class alone to hold out tells nothing
    assert folds_of(np.array([0, 1, 2]), 5, 0) == []


def test_more_classes_than_a_fifth_of_the_rows_to_choose_by_has_rows():
    """iNaturalist's 8,142 classes with two labels each, and fewer of more."""
    labels = np.arange(8_142).repeat(2)
    ((fit, held),) = folds_of(labels, 5, 0)
    assert sorted(labels[fit]) == sorted(labels[held]) == list(range(8_142))
    ((fit, held),) = folds_of(np.arange(2_500).repeat(10), 5, 0)
    assert len(held) == 5_000
    assert np.bincount(np.arange(2_500).repeat(10)[held]).tolist() == [2] * 2_500


@pytest.mark.parametrize("classifier", [linear_probe, svm_probe, ridge_probe])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": torch.zeros(5)}, "pass n d, n, m d, m"),
        ({"test_y": torch.zeros(5)}, "pass n d, n, m d, m"),
        ({"test_x": torch.zeros(6, 4)}, "pass n d, n, m d, m"),
        ({"train_y": torch.full((6,), 1)}, "two classes or more"),
        ({"train_y": torch.tensor([0, 1, 2, -1, 0, 1])}, "no unlabelled rows"),
        ({"train_x": torch.full((6, 6), math.inf)}, "NaN or infinity"),
    ],
)
def test_probes_say_what_does_not_fit(classifier: linear.ProbeFunction, change: dict, message: str) -> None:
    features, labels = blobs(2)
    rows = {"train_x": features, "train_y": labels, "test_x": features, "test_y": labels, **change}
    with pytest.raises(ValueError, match=message):
        classifier(*rows.values())


def test_a_strength_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="all above 0"):
        linear_probe(*blobs(2), *blobs(2), regularisations=(0.0, 1.0))


def grids(per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    features, labels = blobs(4 * per_class, spread=0.7, seed=seed)
    order = labels.argsort(stable=True)
    return features[order].view(3 * per_class, 2, 2, 6), labels[order].view(-1, 4)[:, 0].contiguous()


def test_the_papers_probe_learns_and_depends_on_its_seed_only() -> None:
    train, test = grids(60), grids(40, seed=1)
    before = torch.get_rng_state()
    probe = paper_linear_probe(*train, *test, epochs=60, batch_size=32)
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.accuracy > 0.8
    torch.manual_seed(5)
    assert torch.equal(paper_linear_probe(*train, *test, epochs=60, batch_size=32).predictions, probe.predictions)
    assert paper_linear_probe(*train, *test, epochs=0).accuracy < 0.7


def test_the_papers_probe_is_blind_to_where_and_to_the_scale_of_a_feature() -> None:
    (train, labels), (test, test_labels) = grids(30), grids(20, seed=1)
    scale = torch.tensor([1.0, 10, 100, 1, 1, 1])
    probe = paper_linear_probe(train, labels, test, test_labels, epochs=5)
    moved = paper_linear_probe(train.flip(1), labels, test.flip(2), test_labels, epochs=5)
    scaled = paper_linear_probe(train * scale, labels, test * scale, test_labels, epochs=5)
    assert abs(moved.accuracy - probe.accuracy) < 0.02
    assert abs(scaled.accuracy - probe.accuracy) < 0.05


def test_the_papers_probe_wants_grids() -> None:
    with pytest.raises(ValueError, match="pass `n rows cols d`"):
        paper_linear_probe(*blobs(2), *blobs(2))


# --- few labels -------------------------------------------------------------------------------------------------


def test_draws_are_those_of_everyone_else() -> None:
    train, test = blobs(20, spread=0.8), blobs(100, spread=0.8, seed=1)
    ids = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
    drawn = few_label_accuracy(*train, *test, per_class=3, draws=4, ids=ids)
    rows = [labels_per_class(train[1], 3, seed=draw, ids=ids) for draw in range(4)]
    assert drawn == [linear_probe(train[0][few], train[1][few], *test).accuracy for few in rows]
    assert few_label_accuracy(*train, *test, per_class=3, draws=2, ids=ids) == drawn[:2]
    assert few_label_accuracy(*train, *test, per_class=3, draws=4) != drawn


@pytest.mark.parametrize("per_class", [0, 4])
def test_too_many_labels_are_refused(per_class: int) -> None:
    with pytest.raises(ValueError, match=f"{per_class} labels a class, the rarest of 2 classes has 3"):
        few_label_accuracy(
            torch.eye(7), torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.eye(7), torch.arange(7), per_class=per_class
        )


def test_more_labels_help_and_all_of_them_leave_nothing_to_draw() -> None:
    train, test = blobs(50, spread=0.8), blobs(100, spread=0.8, seed=1)
    few, more = (np.mean(few_label_accuracy(*train, *test, per_class=n)) for n in (2, 30))
    assert few < more
    everything = few_label_accuracy(*train, *test, per_class=50, draws=2)
    assert everything[0] == everything[1]


def test_any_classifier_can_be_given() -> None:
    train, test = blobs(20), blobs(10, seed=1)
    for classifier in (svm_probe, ridge_probe, logistic_probe):
        assert few_label_accuracy(*train, *test, per_class=5, draws=2, classifier=classifier) == [1.0, 1.0]


# --- baselines --------------------------------------------------------------------------------------------------


def test_pixels_of_grey_images_count_once() -> None:
    images = torch.randint(0, 255, (4, 1, 8, 8), dtype=torch.uint8).expand(4, 3, 8, 8)
    assert torch.equal(pixel_features(images), images[:, 0].flatten(1) / 255)
    coloured = torch.randint(0, 255, (4, 3, 8, 8), dtype=torch.uint8)
    assert pixel_features(coloured).shape == (4, 192)


def test_thumbnails_of_known_images() -> None:
    images = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    images[1] = 255
    images[2, 0, :8] = 255  # upper half red
    features = thumbnail_features(images)
    assert features.shape == (3, 192 + 512)
    assert features[0].nonzero().flatten().tolist() == [192]
    assert features[0, 192] == features[1, -1] == 2
    assert (features[1, :192] == 1).all()
    assert features[2, :192].view(3, 8, 8)[0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert torch.allclose(features[2, [192, 192 + 7 * 64]], torch.tensor([2.0, 2]) * 0.5**0.5)
    assert torch.allclose(features[:, 192:].square().sum(1), torch.tensor(4.0))
    assert thumbnail_features(images, side=2, bins=2).shape == (3, 12 + 8)


def test_nothing_here_needs_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert extract_features(lambda images: images.mean((1, 2, 3)), arrays(2))[0].shape == (2,)
    assert list(tmp_path.iterdir()) == []
