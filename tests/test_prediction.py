from contextlib import nullcontext

import pytest
import torch

from cpc.context import DIRECTIONS, turn
from cpc.prediction import PredictionHeads, check_offsets, first_disjoint_offset, positive_cells


@pytest.mark.parametrize(("size", "stride", "offset"), [(80, 36, 3), (64, 32, 2), (8, 4, 2), (12, 5, 3), (16, 16, 1)])
def test_the_first_offset_without_shared_pixels(size, stride, offset):
    assert first_disjoint_offset(size, stride) == offset
    assert offset * stride >= size > (offset - 1) * stride


def test_labels_are_the_pseudo_codes():
    """b*H*W + (i+1)*W + place within the image, for every (b, row, col) that has a target."""
    images, rows, cols = 3, 5, 4
    for offset in (1, 2, 4):
        expected = [
            b * rows * cols + offset * cols + row * cols + col
            for b in range(images)
            for row in range(rows - offset)
            for col in range(cols)
        ]
        assert positive_cells(images, rows, cols, offset, "down").tolist() == expected


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_one_hot_latents_say_where_the_target_is(direction, offset):
    """A grid whose latents are their own position: the positive of (row, col) is the cell `offset` ahead."""
    images, rows, cols = 2, 4, 5
    position = torch.eye(images * rows * cols).view(images, rows, cols, -1)
    flat = position.flatten(0, 2)
    behind = turn(position, direction)
    behind = behind[:, : behind.shape[1] - offset].flatten(0, 2)
    positive = flat[positive_cells(images, rows, cols, offset, direction)]
    step = {"down": offset * cols, "up": -offset * cols, "right": offset, "left": -offset}[direction]
    assert torch.equal(positive.argmax(1), behind.argmax(1) + step)


def test_each_offset_has_its_own_head():
    heads = PredictionHeads(4, 3, [1, 2])
    context = torch.rand(2, 5, 4, 4)
    predictions = heads(context)
    assert {offset: found.shape for offset, found in predictions.items()} == {1: (2, 4, 4, 3), 2: (2, 3, 4, 3)}
    assert not torch.equal(heads.heads["1"].weight, heads.heads["2"].weight)
    for offset, found in predictions.items():
        torch.testing.assert_close(found, heads.heads[str(offset)](context[:, :-offset]))


@pytest.mark.parametrize(
    ("offsets", "rows", "cols", "words"),
    [
        ([5], 4, 6, "offset 5 needs at least 6 rows and columns, the grid has 4x6: lower `offsets` or the stride"),
        ([1, 6], 6, 6, "offset 6 needs at least 7"),
        ([0], 6, 6, "offset 0 predicts nothing ahead"),
        ([], 6, 6, "offsets is empty"),
        ([1, 2, 1], 6, 6, r"offsets=\[1, 2, 1\]: pass each once"),
    ],
)
def test_offsets_that_do_not_fit_are_named(offsets, rows, cols, words):
    with pytest.raises(ValueError, match=words):
        check_offsets(offsets, rows, cols)


@pytest.mark.parametrize(
    ("directions", "rows", "cols", "needed"),
    [
        (["down"], 6, 2, None),
        (["up", "down"], 6, 2, None),
        (["right"], 2, 6, None),
        (["down"], 2, 6, "offset 3 needs at least 4 rows, the grid has 2x6: lower `offsets` or the stride"),
        (["left"], 6, 2, "offset 3 needs at least 4 columns, the grid has 6x2"),
        (["down", "left"], 6, 2, "offset 3 needs at least 4 rows and columns, the grid has 6x2"),
    ],
)
def test_an_offset_needs_cells_in_its_directions_alone(directions, rows, cols, needed):
    with nullcontext() if needed is None else pytest.raises(ValueError, match=needed):
        check_offsets([1, 3], rows, cols, directions)


def test_each_offset_has_one_head():
    with pytest.raises(ValueError, match=r"offsets=\[1, 1\]: pass each once"):
        PredictionHeads(4, 3, [1, 1])
