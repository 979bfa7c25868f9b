"""What a sweep's cells are held against and what they save, on cells whose every prediction is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
import torch
from label_cells import TRUTH, UNEVEN, cell, found, scratch, uneven_cells

from cpc.label_curves import (
    BEST,
    SAME,
    SCRATCH,
    ArmCurve,
    CellResult,
    ScratchCurve,
    balanced,
    curves_of,
    needed_choices,
    savings_of,
    scratch_curves,
)

# ---- which curve from scratch ----


def protocols(curve: ScratchCurve) -> dict[int, str]:
    return {labels: point.protocol for labels, point in curve.points.items()}


def test_the_best_from_scratch_is_the_best_at_each_number_of_labels():
    results = [
        cell(SCRATCH, "cnn", 10, 12),
        cell(SCRATCH, "patches", 10, 8),
        cell(SCRATCH, "image", 10, 9),
        cell(SCRATCH, "cnn", 40, 20),
        cell(SCRATCH, "patches", 40, 24),
        cell(SCRATCH, "image", 40, 22),
        cell(SCRATCH, "patches", 160, 26),
        cell(SCRATCH, "cnn", 160, 30),
        cell("CPC", "linear", 10, 40),
        cell("random", "linear", 40, 40),
    ]
    for order in (results, results[::-1]):
        curves = scratch_curves(curves_of(order))
        assert {name: protocols(curve) for name, curve in curves.items()} == {
            BEST: {10: "cnn", 40: "patches", 160: "cnn"},
            SAME: {10: "image", 40: "patches", 160: "patches"},
        }
        assert [list(curve.points) for curve in curves.values()] == [[10, 40, 160]] * 2, "by rising labels"
        assert curves[BEST].points[10].curve.accuracies(10) == [12 / 40]
        assert curves[BEST].points[10].measured.keys() == {"cnn", "image", "patches"}


def test_the_best_is_so_in_the_mean_over_draws():
    lucky = [cell(SCRATCH, "cnn", 10, right, seed=seed) for seed, right in enumerate([36, 4])]
    steady = [cell(SCRATCH, "patches", 10, 22, seed=seed) for seed in (0, 1)]
    assert protocols(scratch_curves(curves_of(lucky + steady))[BEST]) == {10: "patches"}


def test_without_a_network_of_the_same_kind_there_is_one_curve():
    assert list(scratch_curves(curves_of([cell(SCRATCH, "svm", 10, 8), cell("CPC", "linear", 10, 9)]))) == [BEST]
    assert scratch_curves(curves_of([cell("CPC", "patches", 10, 9)])) == {}


# ---- savings ----


def test_a_saving_that_is_known_and_sure():
    """Right with 10 labels on exactly the images on which scratch is with 40: 4.0, whatever images are drawn."""
    row = found([*scratch(*range(5)), *(cell("CPC", "linear", 10, 20, seed=seed) for seed in range(5))])[10]
    assert row == {
        "method": "CPC",
        "protocol": "linear",
        "labels": 10,
        "against": BEST,
        "saving": "4.0",
        "low": "4.0",
        "high": "4.0",
        "saves": True,
        "draws": 5,
        "scratch_draws": 5,
        "runs": 1,
    }


@pytest.mark.parametrize(
    ("labels", "right", "saving", "saves"),
    [
        (10, 40, "> 16.0", True),
        (40, 40, "> 4.0", True),
        (160, 40, "> 1.0", True),
        (10, 32, "16.0", True),
        (40, 20, "1.0", False),
        (160, 20, "0.25", False),
        (10, 0, "< 1.0", False),
        (40, 0, "< 0.25", False),
    ],
)
def test_savings_within_and_beyond_the_curve(labels, right, saving, saves):
    arm = [cell("CPC", "linear", labels, right, seed=seed) for seed in range(5)]
    row = found([*scratch(*range(5)), *arm])[labels]
    assert (row["saving"], row["low"], row["high"], row["saves"]) == (saving, saving, saving, saves)


def test_what_may_be_luck_is_not_said_to_save():
    """Right on 9 images where scratch is right on 8 others: 1.1, and less than 1 where other images are drawn."""
    row = found([*scratch(), cell("CPC", "linear", 10, range(30, 39))])[10]
    assert (row["saving"], row["low"], row["saves"]) == ("1.1", "< 1.0", False)


def test_both_curves_are_compared_with():
    """Against the best a saving of 4, and of 16 against the same network, which needs 160 labels for as much."""
    same = [cell(SCRATCH, "image", labels, right) for labels, right in {10: 4, 40: 12, 160: 20}.items()]
    results = [*scratch(), *same, cell("CPC", "linear", 10, 20)]
    assert [found(results, against)[10]["saving"] for against in (BEST, SAME)] == ["4.0", "16.0"]


def test_every_arm_that_is_not_from_scratch_has_its_rows():
    results = [*scratch(), cell("CPC", "svm", 40, 20), cell("CPC", "svm", 10, 20), cell("random", "linear", 10, 8)]
    rows = savings_of(curves_of(results), TRUTH)
    assert [(row.method, row.protocol, row.labels, str(row.interval.saving)) for row in rows] == [
        ("CPC", "svm", 10, "4.0"),
        ("CPC", "svm", 40, "1.0"),
        ("random", "linear", 10, "1.0"),
    ]


def test_draws_are_paired_by_their_seed():
    """Each draw as right with 10 labels as scratch with 40 of the same draw: sure of 4.0, in whatever order they came.

    Were draw 5 held against draw 2, the interval would be wide.
    """
    results = []
    for seed, fewer in {2: 0, 5: 7}.items():
        results += [cell(SCRATCH, "cnn", 10, 9 - fewer, seed=seed), cell(SCRATCH, "cnn", 160, 36, seed=seed)]
        results += [cell(SCRATCH, "cnn", 40, 24 - fewer, seed=seed), cell("CPC", "knn", 10, 24 - fewer, seed=seed)]
    for order in (results, results[::-1], results[4:] + results[:4]):
        row = found(order)[10]
        assert [row[name] for name in ("saving", "low", "high", "draws")] == ["4.0", "4.0", "4.0", 2]


def test_runs_and_draws_are_counted_and_averaged_over():
    """Two runs of two draws, right on 14 and on 26 of 40: in the mean on 20, as scratch with 40."""
    runs = [
        cell("CPC", "linear", 10, right, seed=seed, repeat=repeat)
        for repeat, right in enumerate([14, 26])
        for seed in (0, 1)
    ]
    row = found([*scratch(0, 1), *runs])[10]
    assert (row["saving"], row["runs"], row["draws"]) == ("4.0", 2, 2)
    assert float(row["low"]) < 3 < 5 < float(row["high"]), "runs that differ"
    assert ArmCurve.of(runs).accuracies(10) == pytest.approx([0.5, 0.5])
    right = ArmCurve.of(runs[::-1]).right(10, [1, 0], TRUTH)
    assert right.shape == (2, 2, 40)
    assert right.dtype == torch.float64
    assert right.sum(2).tolist() == [[14, 14], [26, 26]]


def several(*cells: tuple[int, int, int], draws: int = 2) -> list[CellResult]:
    """CPC's linear probe with 10 labels, of so many draws: repeat, seed, how many are right."""
    return [cell("CPC", "linear", 10, right, seed=seed, repeat=repeat, draws=draws) for repeat, seed, right in cells]


def test_a_missing_cell_costs_nothing_but_itself():
    """Of two runs and two choices any one: it is filled in as its run is in the other choice, and none is left out."""
    runs = [(0, 0, 20), (0, 1, 20), (1, 0, 20), (1, 1, 20)]
    whole = found([*scratch(0, 1), *several(*runs)])[10]
    assert [whole[name] for name in ("saving", "low", "high", "saves", "draws", "runs")] == ["4.0"] * 3 + [False, 2, 2]
    for gone in range(4):
        assert found([*scratch(0, 1), *several(*runs[:gone], *runs[gone + 1 :])])[10] == whole
    assert found(several(*runs)) == {}
    right = ArmCurve.of(several(*runs[:3])).right(10, [0, 1], TRUTH)
    assert right.sum(2)[0].tolist() == [20, 20]
    assert right.isnan().any(2).tolist() == [[False, False], [False, True]]


def test_a_second_runs_first_cell_counts_in_every_choice_and_a_double_changes_nothing():
    """Three choices of run 0, right on 14, 20 and 26; of run 1 the first alone, the same or another."""
    one_run = [(0, 0, 14), (0, 1, 20), (0, 2, 26)]
    alone = found([*scratch(0, 1, 2), *several(*one_run, draws=3)])[10]
    double = found([*scratch(0, 1, 2), *several(*one_run, (1, 0, 14), draws=3)])[10]
    for row, runs in ((alone, 1), (double, 2)):
        assert [row[name] for name in ("saving", "saves", "draws", "runs")] == ["4.0", False, 3, runs]
    for end in ("low", "high"):  # of other random numbers
        assert float(double[end]) == pytest.approx(float(alone[end]), rel=0.1)
    more = found([*scratch(0, 1, 2), *several(*one_run, (1, 0, 16), draws=3)])[10]
    assert (more["saving"], more["draws"]) == (f"{4 * 4 ** (1 / 12):.1f}", 3), (
        "it is two images better: in the mean of both runs one more"
    )


def test_runs_without_a_choice_in_common_have_their_row():
    row = found([*scratch(0, 1), *several((0, 0, 20), (1, 1, 20))])[10]
    assert [row[name] for name in ("saving", "draws", "runs")] == ["4.0", 2, 2]


@pytest.mark.parametrize("thin", ["arm", "scratch", "neither"])
def test_fewer_than_five_choices_of_several_are_never_said_to_save(thin):
    """What saves has five in common with what it is held against."""
    draws = {name: range(4 if name == thin else 5) for name in ("arm", "scratch")}
    results = [cell("CPC", "linear", 10, 20, seed=seed, draws=5) for seed in draws["arm"]]
    curve = {10: 8, 40: 20, 160: 32}
    results += [
        cell(SCRATCH, "cnn", labels, right, seed=seed, draws=5)
        for labels, right in curve.items()
        for seed in draws["scratch"]
    ]
    row = found(results)[10]
    assert (row["low"], row["saves"]) == ("4.0", thin == "neither")
    assert (row["draws"], row["scratch_draws"]) == (len(draws["arm"]), len(draws["scratch"]))
    assert not found([*scratch(0, 1), *(cell("CPC", "linear", 10, 20, seed=seed, draws=2) for seed in (0, 1))])[10][
        "saves"
    ]


@pytest.mark.parametrize(("labels", "saves"), [(2000, True), (1996, False)])
def test_a_single_choice_stands_for_all_where_it_is_of_many_labels(labels, saves):
    """Below, draws=1 would make one lucky choice of few labels a certain saving."""
    curve = {500: 8, labels: 20, 8000: 32}
    several = [cell(SCRATCH, "cnn", 500, curve[500], seed=seed, draws=5) for seed in range(5)]
    single = [cell(SCRATCH, "cnn", count, curve[count]) for count in (labels, 8000)]
    row = found([*several, *single, cell("CPC", "linear", labels, 32)])[labels]
    assert (row["low"], row["saves"]) == ("4.0", saves)
    assert (row["draws"], row["scratch_draws"]) == (1, 1)

    # of an arm with five choices, which is held against a point with that one
    arm = [cell("CPC", "linear", 500, 20, seed=seed, draws=5) for seed in range(5)]
    row = found([*several, *single, *arm])[500]
    assert (row["draws"], row["scratch_draws"], row["saves"]) == (5, 1, saves)


@pytest.mark.parametrize(("labels", "classes", "needed"), [(2000, 100, 1), (2000, 101, 5), (2020, 101, 1), (40, 2, 5)])
def test_many_labels_are_many_of_each_class_and_in_all(labels, classes, needed):
    assert needed_choices(curves_of([cell("CPC", "linear", labels, 32)]), classes) == {labels: needed}


def test_five_choices_are_in_common_or_they_are_not_five():
    results = [cell("CPC", "linear", 10, 20, seed=seed, draws=6) for seed in range(1, 6)]
    assert not found([*scratch(*range(5)), *results])[10]["saves"]
    assert found([*scratch(*range(6)), *results])[10]["saves"]


def test_one_choice_far_up_the_curve_takes_no_saving_back():
    """CPC is as good with 10 labels as the CNN with 20: of 160, where there is one choice of five, nothing is read."""
    fewer = [each for each in scratch(*range(5)) if each.labels < 160 or each.seed == 0]
    for right, saves, draws in ((14, True, 5), (24, False, 1)):
        arm = [cell("CPC", "linear", 10, right, seed=seed, draws=5) for seed in range(5)]
        row = found([*arm, *fewer])[10]
        assert (row["saves"], row["scratch_draws"]) == (saves, draws)


def test_a_curve_of_one_choice_is_thin_where_another_arm_has_more():
    """From scratch with draws=1, what is pre-trained with the usual five: a number of labels has as many for all."""
    results = [cell("CPC", "linear", 10, 20, seed=seed, draws=5) for seed in range(5)]
    assert found([*results, *scratch(*range(5))])[10]["saves"]
    assert not found([*results, *scratch()])[10]["saves"]


EASY = {0: 0, 1: 1, 2: 9, 3: 10, 4: 10}
"""How many more are right, by the choice of labels."""


def of_easy_choices(protocol: str, right: int, seeds: Iterable[int], method: str = SCRATCH) -> list[CellResult]:
    return [cell(method, protocol, 40, right + EASY[seed], seed=seed, draws=5) for seed in seeds]


def test_the_easy_choices_that_scratch_lacks_are_no_saving():
    """An arm against its own predictions: 1.0, and not what the hard choices alone would give."""
    ends = [
        cell(SCRATCH, "cnn", labels, right, seed=seed, draws=5)
        for labels, right in {10: 5, 160: 40}.items()
        for seed in range(5)
    ]
    arm = of_easy_choices("finetune", 20, range(5), method="CPC")
    whole = found([*ends, *arm, *of_easy_choices("cnn", 20, range(5))])[40]
    assert [whole[name] for name in ("saving", "low", "high", "saves")] == ["1.0", "1.0", "1.0", False]
    hard = of_easy_choices("cnn", 20, (0, 1))
    alone = found([*ends, *arm, *hard])[40]
    assert (float(alone["saving"]) > 1.2, alone["saves"]) == (True, False), "nothing tells how easy the others are"
    worse = of_easy_choices("svm", 14, range(5))
    beside = found([*ends, *arm, *hard, *worse])[40]
    assert (beside["saving"], beside["saves"]) == ("1.0", False), "the SVM does"


def test_what_shares_no_choice_with_the_best_does_not_stand_for_it():
    """A dead shard: the CNN has even choices and the weak one odd ones; CPC, worse than the CNN, has all."""
    results = [
        cell(SCRATCH, protocol, labels, right, seed=seed, draws=10)
        for protocol, rights, first in (("cnn", (20, 28, 36), 0), ("svm", (8, 10, 12), 1))
        for labels, right in zip((10, 40, 160), rights, strict=True)
        for seed in range(first, 10, 2)
    ]
    arm = [cell("CPC", "linear", 10, 18, seed=seed, draws=10) for seed in range(10)]
    row = found([*results, *arm])[10]
    assert (row["saving"], row["saves"]) == ("< 1.0", False)


def test_what_saves_nothing_is_seldom_said_to():
    """A saving of 1 in truth, choices of labels that differ: 2.5 % would be right, and five choices give some more."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(200, dtype=torch.int64)
    said = 0
    for _ in range(100):
        right = (100 + 8 * torch.randn(2, 5, generator=generator)).round().int().tolist()
        results = [
            cell(SCRATCH, "cnn", n, at, seed=s, draws=5, truth=truth)
            for n, at in ((10, 40), (160, 180))
            for s in range(5)
        ]
        results += [cell(SCRATCH, "cnn", 40, right[0][s], seed=s, draws=5, truth=truth) for s in range(5)]
        results += [cell("CPC", "linear", 40, right[1][s], seed=s, draws=5, truth=truth) for s in range(5)]
        said += found(results, truth=truth)[40]["saves"]
    assert 1 <= said <= 12


def test_the_same_labels_by_two_names_are_not_one_of_them_in_silence():
    twin = dataclasses.replace(cell("CPC", "linear", 10, 20), amount="fraction=0.01")
    with pytest.raises(ValueError, match=r"CPC linear is there for labels=10 and fraction=0.01, the same labels: remo"):
        curves_of([cell("CPC", "linear", 10, 8), twin])


def test_one_draw_of_many_labels_stands_for_all_draws_of_few():
    """From 160 labels on there is one draw from scratch: draws of 10 labels that are as good as it save 16."""
    one_above = [one for one in scratch(0, 1, 2) if one.labels < 160] + [cell(SCRATCH, "cnn", 160, 32, draws=1)]
    few = [cell("CPC", "linear", 10, 32, seed=seed, draws=3) for seed in (0, 1, 2)]
    many = cell("CPC", "linear", 160, 32)
    rows = found([*one_above, *few, many])
    assert [rows[10][name] for name in ("saving", "low", "high", "draws")] == ["16.0", "16.0", "16.0", 3]
    assert [rows[160][name] for name in ("saving", "low", "high", "draws")] == ["1.0", "1.0", "1.0", 1]


def test_of_many_draws_from_scratch_those_of_the_arm_are_taken():
    """Draw 1 from scratch is twice as good, and the pre-trained arm has draw 0 alone."""
    lucky = [cell(SCRATCH, "cnn", labels, 40, seed=1) for labels in (10, 40, 160)]
    assert found([*scratch(0), *lucky, cell("CPC", "linear", 10, 20)])[10]["saving"] == "4.0"


# ---- the mean over classes ----


@pytest.mark.parametrize("counts", [(10, 10), (30, 5, 1), (7, 0, 21), (1, 99)])
def test_balanced_weights_make_the_mean_over_images_that_over_classes(counts):
    truth = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    weights = balanced(truth)
    assert weights.mean().item() == pytest.approx(1)
    right = torch.rand(6, len(truth), generator=torch.Generator().manual_seed(0)) < 0.6
    of_class = torch.stack([right[:, truth == label].double().mean(1) for label in truth.unique()])
    torch.testing.assert_close((right * weights).mean(1), of_class.mean(0))


def test_classes_of_one_size_have_weights_of_1():
    assert balanced(TRUTH).tolist() == [1.0] * 40
    assert balanced(torch.tensor([0, 0, 0, 1])).tolist() == pytest.approx([2 / 3] * 3 + [2.0])


def test_savings_by_the_mean_over_classes():
    """Right on 20 of 40 is as many as scratch with 40 labels; on 14 / 30 and 6 / 10 of the classes, more."""
    plain, weighted = (found(uneven_cells(), truth=UNEVEN, **options)[10] for options in ({}, {"per_class": True}))
    assert plain["saving"] == "4.0"
    share = ((14 / 30 + 6 / 10) / 2 - 0.5) / 0.3
    assert float(weighted["saving"]) == pytest.approx(4 * 4**share, abs=0.05) != 4


# ---- a grid that is half done ----


def test_a_point_that_lacks_a_draw_costs_no_row_a_draw():
    """Draw 1 is the hard one, for both; from scratch it is missing at 40 labels, and later everywhere."""
    hard = {0: 0, 1: 6, 2: 0}
    pretrained = [cell("CPC", "linear", 10, 20 - fewer, seed=seed) for seed, fewer in hard.items()]
    results = [
        cell(SCRATCH, "cnn", labels, right - fewer, seed=seed)
        for seed, fewer in hard.items()
        for labels, right in {10: 8, 40: 20, 160: 32}.items()
    ]
    row = found([*results, *pretrained])[10]
    assert [row[name] for name in ("saving", "low", "high", "draws")] == ["4.0", "4.0", "4.0", 3]
    row = found([*(each for each in results if (each.labels, each.seed) != (40, 1)), *pretrained])[10]
    assert row["draws"] == 3
    assert 3 < float(row["saving"]) < 4, "18 of 40 in the mean of three draws, where two from scratch have 20"
    row = found([*(each for each in results if each.seed != 1), *pretrained[1:2]])[10]
    assert (row["saving"], row["draws"]) == ("2.0", 1), "without one in common the mean of the others stands for all"


def test_what_leads_at_few_labels_and_is_not_measured_at_many_ends_the_curve():
    """Logistic regression alone at 160, below the network at 40 or above it: neither says what the network would do."""
    pretrained = cell("CPC", "linear", 10, 28)
    network = [one for one in scratch() if one.labels < 160]
    assert found([*network, pretrained])[10]["saving"] == "> 4.0"
    for right in (16, 24):
        weak = [cell(SCRATCH, "logistic", labels, of) for labels, of in {10: 4, 40: 8, 160: right}.items()]
        results = [*network, *weak, pretrained]
        best = scratch_curves(curves_of(results))[BEST]
        assert protocols(best) == {10: "cnn", 40: "cnn"}
        assert best.left_out == {160: ("logistic",)}
        assert found(results)[10]["saving"] == "> 4.0"
    later = cell(SCRATCH, "cnn", 640, 36)  # the network again
    assert protocols(scratch_curves(curves_of([*results, later]))[BEST]) == {10: "cnn", 40: "cnn", 640: "cnn"}


def test_what_is_measured_alone_at_the_fewest_labels_does_not_lead():
    """The CNN's cell at 10 labels failed, or was never asked for: the curve begins at 40, and no saving grows."""
    network = scratch(*range(5))
    pretrained = [
        cell("CPC", "linear", labels, right, seed=seed)
        for labels, right in {10: 14, 40: 18}.items()
        for seed in range(5)
    ]
    weak = [
        cell(SCRATCH, "logistic", labels, right, seed=seed)
        for labels, right in {10: 6, 40: 8, 160: 16}.items()
        for seed in range(5)
    ]
    failed = [one for one in network if one.labels > 10]
    for of_weak in (weak, [one for one in weak if one.labels == 10]):
        best = scratch_curves(curves_of([*failed, *of_weak]))[BEST]
        assert protocols(best) == {40: "cnn", 160: "cnn"}
        assert best.left_out == {10: ("logistic",)}
        whole, less = (found([*cells, *of_weak, *pretrained]) for cells in (network, failed))
        assert [(row["saving"], row["saves"]) for row in whole.values()] == [("2.0", True), ("0.79", False)]
        assert [(row["saving"], row["saves"]) for row in less.values()] == [("< 4.0", False), ("< 1.0", False)]


def test_a_protocol_that_cannot_be_told_from_the_best_continues_its_curve():
    """At 40 labels patches are ahead by less than a standard error, or by more; at 160 there is the CNN alone."""
    network = [one for one in scratch(0, 1, 2) if one.labels > 10]
    near = [cell(SCRATCH, "patches", 40, right, seed=seed) for seed, right in enumerate([18, 26, 20])]
    ahead = [cell(SCRATCH, "patches", 40, right, seed=seed) for seed, right in enumerate([23, 24, 25])]
    assert protocols(scratch_curves(curves_of(network + near))[BEST]) == {40: "patches", 160: "cnn"}
    assert protocols(scratch_curves(curves_of(network + ahead))[BEST]) == {40: "patches"}


def test_a_failed_cell_does_not_cost_the_best_its_place():
    """The CNN lacks a draw at 160 labels, logistic regression none: against the CNN's others the saving stays 6.3."""
    curve = scratch(*range(5))
    weak = [cell(SCRATCH, "logistic", labels, 4, seed=seed) for labels in (10, 40, 160) for seed in range(5)]
    pretrained = [cell("CPC", "linear", 10, 24, seed=seed) for seed in range(5)]
    whole = found([*curve, *weak, *pretrained])[10]
    failed = [one for one in curve if (one.labels, one.seed) != (160, 3)]
    assert found([*failed, *weak, *pretrained])[10] == whole | {"scratch_draws": 4, "saves": False}
    assert (whole["saving"], whole["scratch_draws"]) == ("6.3", 5)


def test_a_lucky_draw_is_held_against_the_same_draw_of_others():
    """Draw 1 is easy. A network that has that one alone is worse there, whatever its mean."""
    network = [cell(SCRATCH, "cnn", 40, right, seed=seed) for seed, right in enumerate([10, 38])]
    lucky = cell(SCRATCH, "image", 40, 34, seed=1)
    assert protocols(scratch_curves(curves_of([*network, lucky]))[BEST]) == {40: "cnn"}


def test_the_same_network_is_held_against_methods_that_have_it():
    same = [cell(SCRATCH, "image", labels, right) for labels, right in {10: 4, 40: 12, 160: 20}.items()]
    results = [*same, cell("CPC", "linear", 10, 20), cell("SimCLR", "linear", 10, 20)]
    for others, methods in ((), ["CPC", "SimCLR"]), (["SimCLR"], ["CPC"]):
        rows = savings_of(curves_of(results), TRUTH, other_networks=others)
        assert [row.method for row in rows if row.against == SAME] == methods
        assert [row.method for row in rows if row.against == BEST] == ["CPC", "SimCLR"]


def test_what_is_beyond_the_curve_from_scratch_is_not_said_to_save():
    beyond = found([*scratch(0), cell("CPC", "linear", 1000, 40)])[1000]
    assert (beyond["saving"], beyond["saves"]) == ("> 0.16", False)


def test_the_best_by_class_is_what_classes_are_compared_with():
    """A protocol that says the larger class to everything is the best by images, and not by classes."""
    truth = torch.repeat_interleave(torch.arange(2), torch.tensor([30, 10]))
    results = []
    for labels, share in {10: 0, 40: 1}.items():
        results.append(cell(SCRATCH, "svm", labels, range(30), truth=truth))
        results.append(cell(SCRATCH, "cnn", labels, [*range(18 + share), *range(30, 36 + share)], truth=truth))
    results.append(cell("CPC", "linear", 10, [*range(18), *range(30, 36)], truth=truth))
    curves = curves_of(results)
    assert protocols(scratch_curves(curves)[BEST]) == {10: "svm", 40: "svm"}
    assert protocols(scratch_curves(curves, "class_accuracy")[BEST]) == {10: "cnn", 40: "cnn"}
    (row,) = [row for row in savings_of(curves, truth, per_class=True) if row.against == BEST]
    assert str(row.interval.saving) == "1.0"


def test_one_planned_draw_of_a_better_network_is_not_hidden_by_many_of_a_worse():
    pixels = [cell(SCRATCH, "svm", 40, 20, seed=seed, draws=3) for seed in (0, 1, 2)]
    network = cell(SCRATCH, "cnn", 40, 36, draws=1)
    assert protocols(scratch_curves(curves_of([*pixels, network]))[BEST]) == {40: "cnn"}
    unfinished = cell(SCRATCH, "image", 40, 40, draws=3)
    assert protocols(scratch_curves(curves_of([*pixels, network, unfinished]))[BEST]) == {40: "image"}
