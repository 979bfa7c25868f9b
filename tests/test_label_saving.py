"""The label saving against curves whose answer is known, and its interval against what must hold of any bootstrap."""

from __future__ import annotations

import math

import pytest
import torch

from contrastive_core.evaluate.label_saving import (
    Saving,
    filled_in,
    label_saving,
    labels_needed,
    rising,
    saving_interval,
)

LABELS = [10, 100, 1000]
CURVE = [0.2, 0.4, 0.6]


@pytest.mark.parametrize(
    ("target", "needed"),
    [
        (0.2, 10),
        (0.3, math.sqrt(10) * 10),
        (0.4, 100),
        (0.5, math.sqrt(10) * 100),
        (0.6, 1000),
        (0.61, math.inf),
        (0.19, 0.0),
    ],
)
def test_a_straight_curve_over_log_labels(target, needed):
    assert labels_needed(LABELS, CURVE, target) == pytest.approx(needed)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ([0.1, 0.5, 0.3], [0.1, 0.4, 0.4]),
        ([0.6, 0.3, 0.0], [0.3, 0.3, 0.3]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ([0.5], [0.5]),
    ],
)
def test_a_curve_is_made_to_rise(accuracies, expected):
    assert rising(accuracies) == pytest.approx(expected)


def test_of_points_that_fall_those_of_more_draws_say_more():
    """Made to rise with equal weights they are 0.4, with more weight of the first 0.46, which lies before it."""
    assert rising([0.5, 0.3], [4, 1]) == pytest.approx([0.46, 0.46])
    curve = [10, 100, 1000, 10_000], [0.2, 0.5, 0.3, 0.8]
    assert labels_needed(*curve, 0.45, [1, 4, 1, 1]) == pytest.approx(10 ** (1 + 0.25 / 0.26))
    assert labels_needed(*curve, 0.45) == 100
    first = torch.arange(100)
    scratch = {count: (first < 100 * share).expand(4, -1).float() for count, share in zip(*curve, strict=True)}
    scratch[1000] = scratch[1000].clone().index_fill_(0, torch.arange(1, 4), math.nan)
    found = saving_interval(10, (first < 45).expand(1, 4, -1), scratch, resamples=10)
    assert found.saving.value == pytest.approx(10 ** (0.25 / 0.26))


@pytest.mark.parametrize(("accuracies", "target", "needed"), [
    ([0.6, 0.8, 0.78], 0.798, 400), ([0.6, 0.8, 0.78], 0.8, 400), ([0.6, 0.8, 0.78], 0.801, math.inf),
    ([0.5, 0.45, 0.9], 0.49, 0.0), ([0.5, 0.45, 0.9], 0.5, 100), ([0.5, 0.45, 0.4], 0.5, 100),
    ([0.5, 0.45, 0.4], 0.45, 0.0),
])  # fmt: skip
def test_what_was_measured_at_a_point_is_not_beyond_it(accuracies, target, needed):
    """A curve that falls at its end: worse than its peak with as many labels is no saving."""
    assert labels_needed([100, 400, 4000], accuracies, target) == pytest.approx(needed)


def test_worse_than_the_peak_of_a_curve_that_falls_is_no_sure_saving():
    """On 1,000 images 0.798 with 400 labels, from scratch 0.80 with as many and 0.78 with ten times as many."""

    def right(share):
        return (torch.arange(1000) < 1000 * share)[None].float()

    found = saving_interval(400, right(0.798)[None], {100: right(0.6), 400: right(0.8), 4000: right(0.78)})
    assert str(found.saving) == "1.0"
    assert not str(found.high).startswith("> 10")


def test_a_plateau_is_reached_at_its_beginning():
    assert labels_needed([10, 100, 1000], [0.2, 0.4, 0.4], 0.4) == 100
    # a dip is levelled out: 0.5 and 0.3 are 0.4 both
    assert labels_needed([10, 100, 1000, 10_000], [0.2, 0.5, 0.3, 0.8], 0.4) == pytest.approx(100)


@pytest.mark.parametrize(
    ("count", "accuracy", "saving", "said"),
    [
        (25, 0.4, Saving(4.0, 4.0), "4.0"),
        (100, 0.4, Saving(1.0, 1.0), "1.0"),
        (200, 0.4, Saving(0.5, 0.5), "0.5"),
        (25, 0.9, Saving(math.inf, 40.0), "> 40.0"),
        (25, 0.1, Saving(0.0, 0.4), "< 0.4"),
        (1, 0.9, Saving(math.inf, 1000.0), "> 1000"),
        (1000, 0.1, Saving(0.0, 0.01), "< 0.01"),
        (100.2, 0.4, Saving(100 / 100.2, 100 / 100.2), "0.99"),
        (99.9, 0.4, Saving(100 / 99.9, 100 / 99.9), "1.01"),
        (97.8, 0.4, Saving(100 / 97.8, 100 / 97.8), "1.02"),
        (102.3, 0.4, Saving(100 / 102.3, 100 / 102.3), "0.98"),
    ],
)
def test_savings_and_how_they_are_said(count, accuracy, saving, said):
    assert label_saving(count, accuracy, LABELS, CURVE) == pytest.approx(saving)
    assert str(saving) == said


@pytest.mark.parametrize("labels", [[], [10, 10], [100, 10], [0, 10], [10]])
def test_points_that_do_not_fit_are_refused(labels):
    with pytest.raises(ValueError, match="pass rising label counts"):
        labels_needed(labels, [0.1, 0.2], 0.1)


def right(share: float, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def test_an_arm_against_itself_saves_nothing_and_is_sure_of_it():
    """Paired: whatever images and draws are drawn, both arms are right on the same ones."""
    scratch = {number: right(share, 5, 400, seed=number) for number, share in zip(LABELS, CURVE, strict=True)}
    for number in LABELS:  # at the ends as well, where a last digit more would be beyond the curve
        found = saving_interval(number, scratch[number][None], scratch, resamples=200)
        assert [one.value for one in found] == pytest.approx([1, 1, 1])


def test_the_point_lies_inside_and_other_seeds_agree():
    scratch = {number: right(share, 5, 500, seed=number) for number, share in zip(LABELS, CURVE, strict=True)}
    pretrained = right(0.5, 3, 5, 500, seed=7)
    saving, low, high = saving_interval(100, pretrained, scratch, resamples=500)
    assert low.value < saving.value < high.value
    assert saving.value == pytest.approx(math.sqrt(10), rel=0.2)
    many, again = (saving_interval(100, pretrained, scratch, seed=seed) for seed in (1, 2))
    assert (many.low.value, many.high.value) == pytest.approx((again.low.value, again.high.value), rel=0.15)
    assert saving_interval(100, pretrained, scratch, resamples=500) == (saving, low, high)


def test_the_interval_covers_as_often_as_it_says():
    """One level of chance at a time, where the truth is known: images alone, 60 repetitions of a level of 0.8."""
    covered = 0
    for seed in range(60):
        scratch = {n: right(s, 1, 200, seed=1000 * seed + n) for n, s in zip(LABELS, CURVE, strict=True)}
        found = saving_interval(100, right(0.5, 1, 1, 200, seed=seed), scratch, resamples=60, level=0.8)
        covered += found.low.value <= math.sqrt(10) <= found.high.value
    assert 38 <= covered <= 58  # binomial: 48, three deviations of 3


def test_runs_that_differ_widen_the_interval():
    scratch = {number: right(share, 5, 500, seed=number) for number, share in zip(LABELS, CURVE, strict=True)}
    alike = right(0.5, 1, 5, 500, seed=3).expand(3, -1, -1)
    unlike = torch.stack([right(share, 5, 500, seed=3) for share in (0.42, 0.5, 0.58)])
    widths = []
    for pretrained in (alike, unlike):
        found = saving_interval(100, pretrained, scratch, resamples=300)
        widths.append(math.log(found.high.value / found.low.value))
    assert widths[1] > 1.5 * widths[0]


def test_draws_that_differ_widen_the_interval_unless_both_arms_have_them():
    """Of easy and hard draws the mean is uncertain; what is as easy for both is not."""
    shares = torch.tensor([-0.15, -0.1, 0.0, 0.1, 0.15])

    def varied(share: float, seed: int) -> torch.Tensor:
        return torch.cat([right(share + float(more), 1, 2000, seed=seed + draw) for draw, more in enumerate(shares)])

    steady = {number: right(share, 5, 2000, seed=number) for number, share in zip(LABELS, CURVE, strict=True)}
    moving = {number: varied(share, number) for number, share in zip(LABELS, CURVE, strict=True)}
    cases = {
        "none": (right(0.5, 1, 5, 2000, seed=3), steady),
        "one arm": (varied(0.5, 30)[None], steady),
        "both": (varied(0.5, 30)[None], moving),
    }
    widths = {}
    for name, (pretrained, scratch) in cases.items():
        found = saving_interval(100, pretrained, scratch, resamples=400)
        widths[name] = math.log(found.high.value / found.low.value)
    assert widths["one arm"] > 2 * widths["none"]
    assert widths["both"] < 0.7 * widths["one arm"]


def test_a_draw_that_is_not_there_is_no_draw_of_that_point():
    """NaN at one point: its mean is that of the others, of a single one in every resample. Here all are alike."""
    scratch = {number: right(share, 3, 400, seed=number).double() for number, share in zip(LABELS, CURVE, strict=True)}
    alike = {number: there[:1].expand(3, -1).clone() for number, there in scratch.items()}
    pretrained = right(0.5, 1, 3, 400, seed=3)
    whole = saving_interval(100, pretrained, alike, resamples=100)
    for gone in ([1], [0, 2], [1, 2]):
        lacking = {number: there.clone() for number, there in alike.items()}
        lacking[LABELS[1]][gone] = math.nan
        found = saving_interval(100, pretrained, lacking, resamples=100)
        for one, other in zip(found, whole, strict=True):
            assert one.value == pytest.approx(other.value)
    lacking[LABELS[1]][:] = math.nan
    with pytest.raises(ValueError, match=f"^scratch has no draw at {LABELS[1]} labels: leave that number out$"):
        saving_interval(100, pretrained, lacking)


def test_a_lucky_run_does_not_stand_for_those_that_were_measured_less():
    """Two of five draws of the other two: without filling in the first weighs 73 %, and what it saves is 2.2."""
    scratch = {number: right(share, 5, 1000, seed=number) for number, share in ((20, 0.8), (40, 0.86), (80, 0.92))}
    runs = torch.stack([right(share, 5, 1000, seed=7 + i).double() for i, share in enumerate((0.88, 0.79, 0.78))])
    whole = saving_interval(20, runs, scratch, resamples=400)
    lacking = runs.clone()
    lacking[1:, 2:] = math.nan
    found = saving_interval(20, lacking, scratch, resamples=400)
    alone = saving_interval(20, runs[:1], scratch, resamples=400)
    assert found.saving.value == pytest.approx(whole.saving.value, abs=0.2)
    assert found.low.value < 1 < alone.low.value
    assert found.high.value == pytest.approx(whole.high.value, abs=0.4)


def test_a_missing_cell_differs_as_its_run_does_elsewhere():
    known = torch.tensor([[0.9, 0.8, 0.7], [math.nan] * 3, [0.5, math.nan, math.nan]], dtype=torch.float64)
    known[1, 1] = 0.6
    expected = torch.tensor([[0.9, 0.8, 0.7], [0.7, 0.6, 0.5], [0.5, 0.4, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(filled_in(known[..., None])[..., 0], expected)


def test_where_no_draw_is_shared_a_missing_cell_is_the_other_runs():
    """NaN for a run and a draw. Both runs are alike here, so nothing changes."""
    scratch = {number: right(share, 3, 400, seed=number) for number, share in zip(LABELS, CURVE, strict=True)}
    alike = right(0.5, 1, 3, 400, seed=3).double().expand(2, -1, -1)
    whole = saving_interval(100, alike, scratch, resamples=100)
    for gone in ([(0, 1)], [(1, 0), (1, 2)], [(0, 0), (1, 1), (0, 2)]):
        lacking = alike.clone()
        for run, draw in gone:
            lacking[run, draw] = math.nan
        found = saving_interval(100, lacking, scratch, resamples=100)
        assert [one.value for one in found] == pytest.approx([one.value for one in whole])
    lacking[:, 1] = math.nan
    with pytest.raises(ValueError, match=r"^pretrained has a draw that no run has: leave that draw out"):
        saving_interval(100, lacking, scratch)


def test_what_is_beyond_the_curve_is_censored_and_not_left_out():
    scratch = {number: right(share, 5, 300, seed=number) for number, share in zip(LABELS, CURVE, strict=True)}
    saving, low, high = saving_interval(10, torch.ones(1, 5, 300, dtype=torch.bool), scratch, resamples=50)
    assert [str(one) for one in (saving, low, high)] == ["> 100"] * 3
    none = saving_interval(10, torch.zeros(1, 5, 300, dtype=torch.bool), scratch, resamples=50)
    assert [str(one) for one in none] == ["< 1.0"] * 3
    # at the edge some resamples are beyond and some are not: the lower end is a number, the upper is not
    edge = saving_interval(10, scratch[1000][None], scratch, resamples=200)
    near = right(0.6, 1, 5, 300, seed=99)
    mixed = saving_interval(10, near, scratch, resamples=200)
    assert edge.saving == pytest.approx(Saving(100.0, 100.0))
    assert math.isfinite(mixed.low.value)
    assert mixed.high.value == math.inf


@pytest.mark.parametrize(
    ("pretrained", "scratch"),
    [
        ((5, 300), {10: (5, 300)}),
        ((1, 5, 300), {10: (4, 300)}),
        ((1, 5, 300), {10: (5, 299)}),
        ((1, 5, 300), {}),
        ((0, 5, 300), {10: (5, 300)}),
        ((1, 5, 300), {10: (5, 300), 20: (5,)}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(pretrained, scratch):
    tables = {number: torch.zeros(shape, dtype=torch.bool) for number, shape in scratch.items()}
    with pytest.raises(ValueError, match="pass `runs draws images`"):
        saving_interval(10, torch.zeros(pretrained, dtype=torch.bool), tables)


@pytest.mark.parametrize("wrong", [{"count": 0}, {"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_numbers_that_cannot_be_are_refused(wrong):
    some = torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="pass at least 1, 1, and between 0 and 1"):
        saving_interval(**({"count": 10, "pretrained": some, "scratch": {10: some[0]}} | wrong))
