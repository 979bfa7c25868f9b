"""The curve of accuracy against labels: its lines and arrows lie where the numbers are."""

from __future__ import annotations

import itertools
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from contrastive_core.evaluate.label_saving import Saving
from contrastive_core.label_plots import Curve, SavingArrow, label_figure
from contrastive_core.plots import BLUE, MUTED, RUST, save_figure

SCRATCH = Curve("best from scratch", {10: [0.2, 0.4], 100: [0.5], 1000: [0.7, 0.7]}, baseline=True)
FROZEN = Curve("CPC, linear", {100: [0.7], 10: [0.5, 0.5]})
TUNED = Curve("CPC, finetune", {10: [0.6]})


def axes_of(*curves: Curve, arrows: Any = ()) -> Axes:
    (axes,) = label_figure(curves, arrows).axes
    return axes


def arrows_of(axes: Axes) -> list[tuple[float, float, float, float]]:
    """Of each arrow where it starts and ends: labels and percent."""
    heads = [text for text in axes.texts if text.arrow_patch is not None and not text.get_text()]
    return [(*text.xyann, *text.xy) for text in heads]


def places_of(axes: Axes) -> list[Bbox]:
    """Where what arrows say lies, without the lines that tie it to them."""
    words = [text for text in axes.texts if text.get_text()]
    for text in words:
        text.get_window_extent()  # puts it where it belongs
    return [Text.get_window_extent(text) for text in words]


def said(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts if text.get_text()]


def test_a_line_a_curve_in_percent_by_rising_labels():
    axes = axes_of(SCRATCH, FROZEN, TUNED)
    assert axes.get_xscale() == "log"
    assert [line.get_label() for line in axes.lines] == [SCRATCH.name, FROZEN.name, TUNED.name]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[10, 100, 1000], [10, 100], [10]]
    heights = [line.get_ydata().tolist() for line in axes.lines]
    assert heights == [pytest.approx(expected) for expected in ([30, 50, 70], [50, 70], [60])]
    assert [line.get_linestyle() for line in axes.lines] == ["--", "-", "-"]
    assert [line.get_color() for line in axes.lines] == [MUTED, BLUE, RUST]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [SCRATCH.name, FROZEN.name, TUNED.name]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("labels", "test accuracy (%)")
    (other,) = label_figure([SCRATCH], measure="mean accuracy of the classes").axes
    assert other.get_ylabel() == "mean accuracy of the classes (%)"


def test_the_ticks_are_the_numbers_of_labels_and_no_others():
    axes = axes_of(Curve("a", {10: [0.1], 40: [0.2]}), Curve("b", {40: [0.3], 2500: [0.4]}))
    assert axes.get_xticks().tolist() == [10, 40, 2500]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "40", "2,500"]
    assert axes.get_xticks(minor=True).tolist() == []


def test_the_band_is_one_deviation_and_a_single_choice_has_none():
    (band,) = axes_of(SCRATCH).collections
    corners = band.get_paths()[0].vertices
    heights = {count: corners[corners[:, 0] == count, 1] for count in SCRATCH.points}
    deviation = 100 * 0.2 / 2**0.5
    low, high = ({count: end(of_one) for count, of_one in heights.items()} for end in (np.min, np.max))
    assert low == pytest.approx({10: 30 - deviation, 100: 50, 1000: 70})
    assert high == pytest.approx({10: 30 + deviation, 100: 50, 1000: 70})


def test_an_arrow_runs_to_as_many_times_the_labels_at_the_same_height():
    axes = axes_of(
        SCRATCH,
        FROZEN,
        TUNED,
        arrows=[SavingArrow(10, 0.5, Saving(10.0, 10.0), 1), SavingArrow(10, 0.6, Saving(31.6, 31.6), 2)],
    )
    starts_and_ends = arrows_of(axes)
    assert starts_and_ends == [pytest.approx((10, 50, 100, 50)), pytest.approx((10, 60, 316, 60))]
    assert said(axes) == ["10.0x", "31.6x"]
    words = [text for text in axes.texts if text.get_text()]
    assert [text.xy for text in words] == [pytest.approx((1000**0.5, 50)), pytest.approx((3160**0.5, 60))]
    assert [text.get_color() for text in words] == [BLUE, RUST], "the colour of its curve"
    heads = [text.arrow_patch for text in axes.texts if text.arrow_patch is not None]
    assert len({head.get_edgecolor() for head in heads}) == 2


@pytest.mark.parametrize(
    ("saving", "drawn"),
    [
        (Saving(2.5, 2.5), ["2.5x"]),
        (Saving(1.1, 1.1), ["1.1x"]),
        (Saving(1.04, 1.04), []),
        (Saving(0.5, 0.5), []),
        (Saving(0.0, 0.4), []),
        (Saving(0.0, 4.0), []),
        (Saving(inf, 0.4), []),
        (Saving(inf, 1.0), []),
        (Saving(inf, 10.0), ["> 10.0x"]),
        (Saving(inf, 1000.0), ["> 1000x"]),
    ],
)
def test_only_savings_above_1_are_drawn_and_censored_ones_as_far_as_known(saving, drawn):
    axes = axes_of(SCRATCH, FROZEN, arrows=[SavingArrow(10, 0.5, saving, 1)])
    assert said(axes) == drawn
    ends = [round(end) for *_, end, _ in arrows_of(axes)]
    assert ends == [round(10 * float(one.strip("> x"))) for one in drawn]


def test_arrows_that_are_not_sure_are_dotted_and_the_legend_says_so():
    sure, unsure = (SavingArrow(10, 0.5, Saving(10.0, 10.0), 1, sure=sure) for sure in (True, False))
    undrawn = SavingArrow(10, 0.5, Saving(0.5, 0.5), 1, sure=False)
    for arrows, styles in (([sure, undrawn], ["-"]), ([sure, unsure], ["-", ":"])):
        axes = axes_of(SCRATCH, FROZEN, arrows=arrows)
        heads = [text.arrow_patch for text in axes.texts if text.arrow_patch is not None]
        assert [head.get_linestyle() for head in heads] == styles
        words = [text.get_text() for text in axes.get_legend().get_texts()][2:]
        assert words == ["dotted: not sure"] * (":" in styles)


def test_no_saving_covers_another_or_an_arrow():
    near = [SavingArrow(10, height, Saving(10.0, 10.0), curve) for height, curve in ((0.5, 1), (0.505, 2), (0.52, 1))]
    axes = axes_of(SCRATCH, FROZEN, TUNED, arrows=near)
    places = places_of(axes)
    ends = [[(10, 100 * arrow.accuracy), (100, 100 * arrow.accuracy)] for arrow in near]
    taken = [Bbox(axes.transData.transform(both)) for both in ends]
    for place in places:
        assert not any(place.overlaps(other) for other in taken)
        taken.append(place)


def test_a_line_is_pale_where_others_were_measured_and_it_was_not():
    """At 10 and 1,000 alone: a break in the line, and a pale one over it; not beyond its own ends."""
    skips = Curve("skips", {10: [0.1], 1000: [0.3]})
    whole, broken, pale, short = axes_of(SCRATCH, skips, FROZEN).lines
    assert np.isfinite(whole.get_ydata()).all()
    assert np.isfinite(short.get_ydata()).all()
    assert np.isnan(broken.get_ydata()).tolist() == [False, True, False]
    assert (list(pale.get_xdata()), list(pale.get_ydata())) == ([10, 1000], pytest.approx([10, 30]))
    assert pale.get_alpha() < 0.5 < (broken.get_alpha() or 1)
    assert pale.get_color() == broken.get_color()


def test_what_many_short_arrows_say_lies_apart():
    """Five arms within three points, on an axis of two decades."""
    wide = Curve("far", {10: [0.2], 1000: [0.9]})
    short = [SavingArrow(10, 0.5 + place / 150, Saving(1.9, 1.9), place) for place in range(5)]
    axes = axes_of(wide, *(Curve(f"arm {place}", {10: [0.5 + place / 150]}) for place in range(4)), arrows=short)
    places = places_of(axes)
    assert len(places) == 5
    led = [text.arrow_patch is not None for text in axes.texts if text.get_text()]
    assert any(led), "one that lies far from its arrow is tied to it"
    assert not all(led)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_a_saving_that_finds_no_room_is_said_all_the_same():
    axes = axes_of(SCRATCH, FROZEN, arrows=40 * [SavingArrow(10, 0.5, Saving(10.0, 10.0), 1)])
    assert said(axes) == 40 * ["10.0x"]


def test_more_curves_than_colours():
    axes = axes_of(*(Curve(f"arm {place}", {10: [place / 20]}) for place in range(14)))
    colours = [line.get_color() for line in axes.lines]
    assert len(set(colours[:6])) == 6
    assert colours[6:12] == colours[:6]


@pytest.mark.parametrize("curves", [[], [Curve("a", {})], [Curve("a", {}), Curve("b", {}, baseline=True)]])
def test_curves_without_a_point_are_refused(curves):
    with pytest.raises(ValueError, match=f"^{len(curves)} curves without a point: pass accuracies by number of labels"):
        label_figure(curves)
    assert len(axes_of(*curves, SCRATCH).lines) == len(curves) + 1, "one with points is enough"


def test_the_picture_shows_them(tmp_path: Path):
    figure = label_figure([SCRATCH, FROZEN], [SavingArrow(10, 0.5, Saving(10.0, 10.0), 1)])
    save_figure(figure, tmp_path / "new" / "curve.png")
    with Image.open(tmp_path / "new" / "curve.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (720, 460)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for colour in (BLUE, MUTED):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(-1) < 24).sum() > 200
