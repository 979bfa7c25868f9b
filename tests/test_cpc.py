"""CPC's loss against the paper, and what must not change it."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from contrastive_core.losses import SigmoidLoss, cosine_info_nce, info_nce
from contrastive_core.method import Batch
from cpc.context import DIRECTIONS, ContextNetwork, turn
from cpc.encoders import resnet_small
from cpc.method import CPC

torch.manual_seed(0)


class Pixels(nn.Module):
    """An encoder that gives the patch's own pixels, so that a test can hand CPC any latents."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, patches):
        return patches.flatten(1)


def method(dim=6, offsets=(1,), directions=DIRECTIONS, target_dim=5, **options):
    context = partial(ContextNetwork, width=7, layers=2)
    return CPC(
        Pixels(dim), offsets=offsets, directions=directions, target_dim=target_dim, context=context, **options
    ).double()


def batch_of(latents):
    """`b rows cols d` as a patch grid of d 'channels' of one pixel."""
    count = torch.zeros(len(latents), dtype=torch.long)
    return Batch((latents[..., None, None],), count, count)


def pseudo_code(cpc, latents, direction, offset, scale=0.1):
    """The appendix, for one direction and one offset, a prediction and a candidate at a time.

    emb_scale is 0.1; the label of (b, r, c) is b*H*W + (i+1)*W + r*W + c with i + 1 = offset.
    """
    grid = turn(latents, direction)
    images, height, width, _ = grid.shape
    context = cpc.contexts[cpc.context_of[direction]](grid)
    head = cpc.heads[direction].heads[str(offset)]
    targets = [cpc.target_projection(grid[b, r, c]) for b in range(images) for r in range(height) for c in range(width)]
    total, count = 0.0, 0
    for b in range(images):
        for r in range(height - offset):
            for c in range(width):
                prediction = head(context[b, r, c]) * scale
                logits = [float(prediction @ target) for target in targets]
                label = b * height * width + offset * width + r * width + c
                total -= logits[label] - math.log(sum(math.exp(logit) for logit in logits))
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("images", "rows", "cols", "offsets"),
    [(1, 3, 3, (1,)), (2, 3, 4, (2,)), (3, 4, 3, (1, 2)), (2, 4, 5, (1, 3)), (1, 5, 5, (3, 4))],
)
def test_the_loss_is_the_pseudo_codes(images, rows, cols, offsets):
    cpc = method(offsets=offsets)
    latents = torch.randn(images, rows, cols, 6, dtype=torch.float64) * 3
    with torch.no_grad():
        expected = [pseudo_code(cpc, latents, direction, k) for direction in DIRECTIONS for k in offsets]
        loss, metrics = cpc(batch_of(latents))
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-12)
    assert float(metrics["chance_loss"]) == pytest.approx(math.log(images * rows * cols))


@pytest.mark.parametrize(("loss", "right"), [
    (partial(info_nce, temperature=1.0), 0), (partial(cosine_info_nce, temperature=0.1), 1), (SigmoidLoss(), 1),
    (SigmoidLoss(normalised=False), 0),
])  # fmt: skip
def test_the_accuracy_is_by_the_losss_own_score(loss, right):
    """The target points where the prediction does; another is longer, and has the larger dot product."""
    cpc = method(dim=2, target_dim=2, directions=["down"], loss=loss)
    representations = {"targets": torch.tensor([[[[10.0, 20.0]], [[1.0, 0.0]]]]), "mean": torch.ones(1, 2)}
    representations["down_1"] = torch.tensor([[[[1.0, 0.0]]]])
    assert cpc.float().contrast(representations)[1]["accuracy"] == right


def test_identical_latents_are_at_chance():
    cpc = method(offsets=(1, 2))
    latents = torch.ones(3, 4, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        loss, metrics = cpc(batch_of(latents))
    assert float(loss) == pytest.approx(math.log(3 * 16), abs=1e-9)
    assert metrics["accuracy"] == 0


@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (2, 3, 5, 6)], ids=["square", "wide"])
def test_each_direction_and_offset_has_an_accuracy_of_its_own(shape):
    """Counted a prediction at a time, where all are looked at."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        cpc, latents = method(offsets=(1, 2)), torch.randn(shape, dtype=torch.float64)
        _, metrics = cpc(batch_of(latents))
        targets = cpc.target_projection(latents)
        expected = {}
        for direction in DIRECTIONS:
            context = cpc.contexts[direction](turn(latents, direction))
            for offset, predictions in cpc.heads[direction](context).items():
                own = turn(targets, direction)[:, offset:].flatten(0, 2)
                hits = [
                    int((prediction @ target) >= (targets.flatten(0, 2) @ prediction).max() - 1e-9)
                    for prediction, target in zip(predictions.flatten(0, 2), own, strict=True)
                ]
                expected[f"accuracy/{direction}_{offset}"] = sum(hits) / len(hits)
    assert len(set(expected.values())) > 3
    assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)


def tie(cpc, one, other):
    cpc.contexts[other].load_state_dict(cpc.contexts[one].state_dict())
    cpc.heads[other].load_state_dict(cpc.heads[one].state_dict())


@pytest.mark.parametrize("direction", ["up", "right", "left"])
def test_with_tied_weights_a_direction_is_down_on_the_turned_grid(direction):
    both = method(offsets=(1, 2), directions=["down", direction])
    tie(both, "down", direction)
    latents = torch.randn(2, 5, 7, 6, dtype=torch.float64)

    def loss_of(which, grid):
        both.directions = (which,)
        return float(both(batch_of(grid))[0].detach())

    assert loss_of(direction, latents) == pytest.approx(loss_of("down", turn(latents, direction)), rel=1e-12)
    assert loss_of(direction, latents) != pytest.approx(loss_of("down", latents), rel=1e-6)


def test_permuting_the_images_changes_nothing():
    cpc = method(offsets=(1, 2))
    latents = torch.randn(4, 4, 4, 6, dtype=torch.float64)
    loss = cpc(batch_of(latents))[0]
    permuted = cpc(batch_of(latents[torch.tensor([2, 0, 3, 1])]))[0]
    torch.testing.assert_close(loss, permuted)


def test_only_what_lies_behind_and_the_candidates_get_a_gradient():
    """Through the context, with the candidates held fixed, the cells ahead of the last prediction get none."""
    cpc = method(offsets=(2,), directions=["down"])
    latents = torch.randn(2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    cpc.target_projection.requires_grad_(False).weight.zero_()
    cpc.target_projection.forward = lambda grid: grid.detach()[..., :5]
    (gradient,) = torch.autograd.grad(cpc(batch_of(latents))[0], latents)
    assert gradient[:, :3].ne(0).any()
    assert gradient[:, 3:].eq(0).all()


def test_targets_carry_a_gradient():
    cpc = method()
    for parameter in cpc.contexts.parameters():
        parameter.requires_grad_(False)
    cpc(batch_of(torch.randn(2, 3, 3, 6, dtype=torch.float64)))[0].backward()
    assert cpc.target_projection.weight.grad.ne(0).any()
    assert cpc.target_projection.bias is None


def test_directions_and_offsets_have_their_own_weights():
    cpc = method(offsets=(1, 2))
    assert set(cpc.contexts) == set(DIRECTIONS)
    assert {len(heads.heads) for heads in cpc.heads.values()} == {2}
    shared = method(offsets=(1,), share_context=True)
    assert list(shared.contexts) == ["shared"]
    storages = [tensor.data_ptr() for tensor in shared.state_dict().values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses shared tensors


def test_metrics_name_every_direction_and_offset():
    _, metrics = method(offsets=(1, 2))(batch_of(torch.randn(2, 3, 3, 6, dtype=torch.float64)))
    named = {f"accuracy/{direction}_{offset}" for direction in DIRECTIONS for offset in (1, 2)}
    watched = {"accuracy", "chance_loss", "feature_std", "spread", "effective_rank", "negatives", "ranks"}
    assert named | watched == set(metrics)
    assert (metrics["negatives"], metrics["ranks"]) == (2 * 3 * 3 - 1, 1)
    assert not any(value.requires_grad for value in metrics.values())


def test_another_loss_plugs_in():
    cpc = method(loss=partial(info_nce, temperature=1.0))
    latents = torch.randn(2, 3, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        expected = [pseudo_code(cpc, latents, direction, 1, scale=1.0) for direction in DIRECTIONS]
    assert float(cpc(batch_of(latents))[0].detach()) == pytest.approx(sum(expected) / 4, rel=1e-12)


def test_a_grid_may_be_as_narrow_as_nothing_is_predicted_across_it():
    """Down a grid of 6x2 the offset 3 is a legal one; across it, it is not."""
    latents = torch.randn(2, 6, 2, 6, dtype=torch.float64)
    cpc = method(offsets=(3,), directions=["down"])
    with torch.no_grad():
        expected = pseudo_code(cpc, latents, "down", 3)
    assert float(cpc(batch_of(latents))[0].detach()) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="offset 3 needs at least 4 rows and columns, the grid has 6x2"):
        method(offsets=(3,), directions=["down", "right"])(batch_of(latents))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"offsets": (1, 1)}, r"offsets=\[1, 1\]: pass each once"),
        ({"directions": ["down", "down"]}, r"directions=\['down', 'down'\]: pass one or more of .*, each once"),
    ],
)
def test_what_is_given_twice_is_named(given, words):
    with pytest.raises(ValueError, match=words):
        method(**given)


def test_a_loss_that_would_gather_by_itself_is_refused():
    with pytest.raises(ValueError, match="the loss has gather='ring', and CPC gathers targets itself: leave it out"):
        method(loss=partial(info_nce, gather="ring"))
    method(loss=partial(info_nce, gather=False))


@pytest.mark.parametrize(
    ("options", "ranks"), [({}, 2), ({"gather": False}, 1), ({"negatives": "same_image"}, 1)], ids=str
)
def test_ranks_are_the_processes_that_negatives_come_from(options, ranks, monkeypatch):
    """As on the first of two processes that hold as many patches: the other's are a copy of its own."""
    monkeypatch.setattr("cpc.method.row_counts", lambda rows: [rows, rows])
    monkeypatch.setattr("cpc.method.all_gather", lambda rows, counts=None: torch.cat([rows, rows]))
    _, metrics = method(**options)(batch_of(torch.randn(2, 3, 3, 6, dtype=torch.float64)))
    assert metrics["ranks"] == ranks


def test_an_offset_beyond_the_grid_is_named():
    with pytest.raises(ValueError, match="offset 3 needs at least 4 rows and columns, the grid has 3x5"):
        method(offsets=(3,))(batch_of(torch.zeros(1, 3, 5, 6, dtype=torch.float64)))


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    # temperature 1: at the paper's 10 so small a net may leap back to chance, and which step it leaps at is rounding's
    loss_at_1 = partial(info_nce, temperature=1.0)
    cpc = CPC(resnet_small(8), offsets=(1,), context=partial(ContextNetwork, width=16, layers=1), loss=loss_at_1)
    ramp = torch.linspace(0, 1, 16)
    images = torch.rand(8, 3, 1, 1) + ramp[:, None] * torch.rand(8, 1, 1, 1) + ramp * torch.rand(8, 1, 1, 1)
    patches = images.unfold(2, 8, 4).unfold(3, 8, 4).permute(0, 2, 3, 1, 4, 5)
    indices = torch.arange(8)
    optimizer = torch.optim.Adam(cpc.parameters(), 2e-3)
    losses = []
    for _ in range(60):
        loss, metrics = cpc(Batch((patches,), indices, indices))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(float(metrics["chance_loss"]), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
