import pytest
import torch
from torch import nn

from cpc.context import DIRECTIONS, ContextNetwork, Contexts, turn, turn_back


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 7, 5, 1), (3, 1, 4, 2)])
def test_every_turn_has_its_inverse(direction, shape):
    grid = torch.rand(shape)
    assert torch.equal(turn_back(turn(grid, direction), direction), grid)


def test_what_each_direction_reads_first_and_last():
    grid = torch.arange(6).view(1, 2, 3)  # 0 1 2 over 3 4 5
    assert turn(grid, "down").tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert turn(grid, "up").tolist() == [[[3, 4, 5], [0, 1, 2]]]
    assert turn(grid, "right").tolist() == [[[0, 3], [1, 4], [2, 5]]]
    assert turn(grid, "left").tolist() == [[[2, 5], [1, 4], [0, 3]]]


def test_an_unknown_direction_is_named():
    with pytest.raises(ValueError, match="'north' is not one of down, up, right, left"):
        turn(torch.zeros(1, 2, 2), "north")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_gradient_to_every_cell_ahead_is_exactly_zero(direction):
    """Every context cell against every latent cell, on a grid that is not square."""
    torch.manual_seed(0)
    network = ContextNetwork(16, width=16, layers=2).double()
    latents = torch.randn(1, 5, 7, 16, dtype=torch.float64, requires_grad=True)
    context = turn_back(network(turn(latents, direction)), direction)
    ahead = {
        "down": lambda r, c, row, col: row > r,
        "up": lambda r, c, row, col: row < r,
        "right": lambda r, c, row, col: col > c,
        "left": lambda r, c, row, col: col < c,
    }[direction]
    own_line_is_seen = 0
    for r in range(5):
        for c in range(7):
            (gradient,) = torch.autograd.grad(context[0, r, c].sum(), latents, retain_graph=True)
            for row in range(5):
                for col in range(7):
                    reached = bool(gradient[0, row, col].ne(0).any())
                    if ahead(r, c, row, col):
                        assert not reached
                    own_line_is_seen += reached and (row, col) == (r, c)
    assert own_line_is_seen == 35  # the own cell is always part of its context


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_receptive_field_is_as_stated(layers):
    torch.manual_seed(0)
    network = ContextNetwork(16, width=16, layers=layers).double()
    latents = torch.randn(1, 9, 9, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(latents)[0, 6, 4].sum(), latents)
    seen = gradient[0].ne(0).any(-1).nonzero()
    assert seen[:, 0].min() == 6 - layers
    assert seen[:, 0].max() == 6
    assert (seen[:, 1].min(), seen[:, 1].max()) == (4 - layers, 4 + layers)


def test_the_block_is_the_pseudo_codes():
    """Against a slow loop over cells, written from the appendix: 1x1, ReLU, 1x3, 2x1 with one row on top, ReLU, 1x1."""
    network = ContextNetwork(3, width=5, layers=1).double()
    block = network.blocks[0]
    latents = torch.randn(1, 3, 4, 3, dtype=torch.float64)

    def cell(grid, row, col):
        inside = 0 <= row < grid.shape[0] and 0 <= col < grid.shape[1]
        return grid[row, col] if inside else torch.zeros(grid.shape[2], dtype=grid.dtype)

    def convolve(grid, layer, cells):
        out = torch.empty(*grid.shape[:2], layer.out_channels, dtype=grid.dtype)
        kernels = layer.weight.flatten(2)
        for row in range(grid.shape[0]):
            for col in range(grid.shape[1]):
                taps = [kernels[:, :, i] @ cell(grid, row + dr, col + dc) for i, (dr, dc) in enumerate(cells)]
                out[row, col] = torch.stack(taps).sum(0) + layer.bias
        return out

    with torch.no_grad():
        hidden = convolve(latents[0], block.shrink, [(0, 0)]).relu()
        hidden = convolve(hidden, block.across, [(0, -1), (0, 0), (0, 1)])
        hidden = convolve(hidden, block.down, [(-1, 0), (0, 0)]).relu()
        expected = (latents[0] + convolve(hidden, block.grow, [(0, 0)])).relu()
        torch.testing.assert_close(network(latents)[0], expected)


def contexts(dim=3, shared=False):
    torch.manual_seed(0)
    names = ["shared"] if shared else list(DIRECTIONS)
    networks = nn.ModuleDict({name: ContextNetwork(dim, 4, 2) for name in names})
    return Contexts(networks, {direction: "shared" if shared else direction for direction in DIRECTIONS})


@pytest.mark.parametrize("shared", [False, True])
def test_contexts_stand_beside_their_own_cell(shared):
    """Every direction's part of a cell depends on what that direction has read, and on nothing ahead of it."""
    module, latents = contexts(shared=shared), torch.randn(2, 4, 5, 3)
    out = module(latents)
    assert out.shape == (2, 4, 5, module.dim) == (2, 4, 5, 15)
    assert torch.equal(out[..., :3], latents)
    for place, (direction, ahead) in enumerate(
        [("down", (3, 2)), ("up", (0, 2)), ("right", (1, 4)), ("left", (1, 0))], start=1
    ):
        changed = latents.clone()
        changed[:, ahead[0], ahead[1]] += 10
        part = slice(3 * place, 3 * place + 3)
        before = {"down": (2, 2), "up": (1, 2), "right": (1, 3), "left": (1, 1)}[direction]
        after = module(changed)
        assert torch.equal(after[:, before[0], before[1], part], out[:, before[0], before[1], part]), direction
        assert not torch.allclose(after[:, ahead[0], ahead[1], part], out[:, ahead[0], ahead[1], part]), direction


@pytest.mark.parametrize(
    ("widths", "context_of"),
    [({}, {}), ({"a": 3, "b": 4}, {"down": "a"}), ({"a": 3}, {"down": "b"}), ({"a": 3}, {"sideways": "a"})],
)
def test_contexts_that_do_not_fit_are_named(widths, context_of):
    networks = nn.ModuleDict({name: ContextNetwork(dim, 4, 1) for name, dim in widths.items()})
    with pytest.raises(ValueError, match="pass one width, and for each of down, up, right, left"):
        Contexts(networks, context_of)
