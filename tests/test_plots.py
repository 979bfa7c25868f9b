"""Each picture is a PNG of a sensible size that says what was put in, and a table is exact."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive_core.plots import format_table, plot_confusion, plot_loss, plot_retrieval


def opened(path: Path) -> np.ndarray:
    """The picture's pixels `h w 3`, after a look at its size in bytes and pixels."""
    assert 2_000 < path.stat().st_size < 100_000
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert 200 < picture.width < 1400
        return np.asarray(picture.convert("RGB")).astype(int)


def count(pixels: np.ndarray, colour: str, within: int = 24) -> int:
    """Pixels of about this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - wanted).max(-1) < within).sum())


BLUE, RUST, GREEN, RED = "#2166ac", "#b2521b", "#1a9850", "#d73027"


def rows(steps: int) -> list[dict[str, float]]:
    return [{"step": i, "loss": 7 - i / steps, "chance_loss": 7.0} for i in range(1, steps + 1)]


@pytest.mark.parametrize("steps", [1, 30, 3000])
def test_loss(tmp_path: Path, steps: int) -> None:
    plot_loss(rows(steps), tmp_path / "new" / "loss.png")
    pixels = opened(tmp_path / "new" / "loss.png")
    assert count(pixels, BLUE) > 20
    assert count(pixels, RUST) == 0


def test_loss_with_a_probe_and_gaps(tmp_path: Path) -> None:
    lines = [*rows(50), {"step": 0, "knn": 0.3}, {"step": 50, "knn": 0.9}, {"step": 51, "loss": math.nan, "knn": None}]
    plot_loss(lines, tmp_path / "loss.png")
    pixels = opened(tmp_path / "loss.png")
    assert count(pixels, RUST) > 100
    assert pixels.shape[1] > 900, "a second panel"


@pytest.mark.parametrize(("last", "side"), [(0.9, 1), (0.5, -1)])
def test_the_probes_last_number_stands_off_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last, side
) -> None:
    """Above where the line comes from below, below where it falls."""
    offsets = []
    monkeypatch.setattr("matplotlib.axes.Axes.annotate", lambda self, text, at, offset, **_: offsets.append(offset))
    plot_loss([*rows(50), {"step": 25, "knn": 0.7}, {"step": 50, "knn": last}], tmp_path / "loss.png")
    assert [offset[1] * side > 0 for offset in offsets] == [True]


def test_no_loss_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="none of the 1 rows has a finite `loss`"):
        plot_loss([{"step": 1}], tmp_path / "loss.png")


@pytest.mark.parametrize("classes", [2, 10, 60])
def test_confusion(tmp_path: Path, classes: int) -> None:
    labels = torch.arange(classes).repeat(5)
    plot_confusion(labels, labels, tmp_path / "all right.png", [f"a long class name {i}" for i in range(classes)])
    plot_confusion(labels, (labels + 1) % classes, tmp_path / "all wrong.png")
    right, wrong = opened(tmp_path / "all right.png"), opened(tmp_path / "all wrong.png")
    assert count(right, "#08306b") > 500
    assert count(wrong, "#08306b") > 500


def test_confusion_says_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass n and n"):
        plot_confusion(torch.zeros(3), torch.zeros(4), tmp_path / "x.png")
    with pytest.raises(ValueError, match="1 class names for classes up to 1"):
        plot_confusion(torch.tensor([0, 1]), torch.tensor([0, 1]), tmp_path / "x.png", ["one"])
    assert not (tmp_path / "x.png").exists()


def test_retrieval_frames_by_class(tmp_path: Path) -> None:
    queries = torch.full((3, 3, 8, 8), 128, dtype=torch.uint8)
    neighbours = torch.full((3, 4, 3, 8, 8), 128, dtype=torch.uint8)
    labels = torch.arange(3)
    colours = {}
    for name, shift in {"right": 0, "wrong": 1}.items():
        path = tmp_path / f"{name}.png"
        others = ((labels + shift) % 3)[:, None].expand(3, 4)
        plot_retrieval(queries, neighbours, path, query_labels=labels, neighbour_labels=others, class_names="abc")
        colours[name] = [count(opened(path), colour) > 500 for colour in (GREEN, RED)]
    assert colours == {"right": [True, False], "wrong": [False, True]}
    plot_retrieval(queries, neighbours, tmp_path / "plain.png")
    assert [count(opened(tmp_path / "plain.png"), colour) for colour in (GREEN, RED)] == [0, 0]


def test_photographs_stay_small(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (8, 8, 3, 4, 4), dtype=torch.uint8).repeat_interleave(8, 3).repeat_interleave(8, 4)
    plot_retrieval(images[:, 0], images[:, 1:], tmp_path / "photographs.png")
    opened(tmp_path / "photographs.png")


def test_retrieval_says_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass n 3 h w, n k 3 h w"):
        plot_retrieval(torch.zeros(2, 3, 8, 8), torch.zeros(3, 2, 3, 8, 8), tmp_path / "x.png")


def test_a_table_is_exact() -> None:
    table = format_table(
        [{"probe": "kNN", "accuracy": 0.5, "labels": 4000}, {"probe": "linear, 2x2", "spread": 0.01234}]
    )
    assert table.splitlines() == [
        "probe        accuracy  labels  spread",
        "-----------  --------  ------  ------",
        "kNN             0.500    4000       -",
        "linear, 2x2         -       -   0.012",
    ]


def test_matplotlib_is_loaded_only_to_draw() -> None:
    code = "import sys, contrastive_core.plots as p; p.format_table([{'a': 1}]); print('matplotlib' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert result.stdout.strip() == "False"
