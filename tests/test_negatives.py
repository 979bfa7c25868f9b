"""The choices of negatives: against a dense matrix of scores in float64, on one process and on two."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from functools import partial
from itertools import combinations

import pytest
import torch
from processes import in_a_group
from torch import distributed as dist
from torch import nn

from contrastive_core.grad_cache import CachedStep, average_gradients_
from contrastive_core.losses import InfoNCELoss, SigmoidLoss, cosine_info_nce, info_nce
from contrastive_core.method import Batch
from contrastive_core.metrics import contrast_accuracy
from contrastive_core.randomness import Randomness, words
from cpc.context import ContextNetwork
from cpc.method import CPC
from cpc.negatives import (
    as_mask,
    at_random,
    count_negatives,
    first_of_their_kind,
    of_other_images,
    query_keys,
)
from cpc.prediction import positive_cells

IMAGES, SIDE = 4, 3
CELLS = SIDE * SIDE
CHOICES = {
    "all": ({}, IMAGES * CELLS),
    "other_images": ({}, (IMAGES - 1) * CELLS + 1),
    "same_image": ({}, CELLS),
    "random": ({"negatives_k": 5}, 6),
    "random, most": ({"negatives_k": 30}, 31),
}


class Pixels(nn.Module):
    dim = 6

    def forward(self, patches):
        return patches.flatten(1)


def cpc(choice="all", **options):
    torch.manual_seed(0)
    context = partial(ContextNetwork, width=5, layers=1)
    named = {"negatives": choice.partition(",")[0], **CHOICES[choice][0], **options}
    return CPC(Pixels(), offsets=[1, 2], target_dim=4, context=context, **named).double()


def batch(mine=slice(None), step=3, images=IMAGES):
    numbers = torch.Generator().manual_seed(1)
    grids = 2 * torch.randn(images, SIDE, SIDE, 6, 1, 1, dtype=torch.float64, generator=numbers)
    places = torch.arange(images)[mine]
    return Batch((grids[mine].requires_grad_(),), places, places, Randomness(7, step, places))


def drawn_by_hand(key, own, count, m):
    """The first `count` different numbers below m that are not `own`; of more than half, those that are left out."""
    wanted = m - 1 - count if 2 * count > m - 1 else count
    met: list[int] = []
    i = 0
    while len(met) < wanted:
        draw = (int(words(key[None], i, 1)) & (2**62 - 1)) % (m - 1)
        draw += draw >= own
        met += [draw] if draw not in met else []
        i += 1
    return met if wanted == count else [j for j in range(m) if j not in met and j != own]


def dense_mask(method, positive, randomness, what):
    """Which of the m targets each query is compared with, a pair at a time."""
    m = IMAGES * CELLS
    mask = torch.zeros(len(positive), m, dtype=torch.bool)
    keys = query_keys(randomness.integers("negatives", 1 << 62), len(positive), what)
    for i, own in enumerate(positive.tolist()):
        chosen = {
            "all": lambda own: range(m),
            "other_images": lambda own: [j for j in range(m) if j // CELLS != own // CELLS],
            "same_image": lambda own: [j for j in range(m) if j // CELLS == own // CELLS],
            "random": lambda own, i=i: drawn_by_hand(keys[i], own, method.negatives_k, m),
        }[method.negatives](own)
        mask[i, list(chosen)] = True
        mask[i, own] = True
    return mask


def dense_loss(method, whole):
    """Cross-entropy of the whole matrix of scores, with -inf for what is not compared; and the contrast accuracy."""
    representations = method.represent(whole)
    targets = representations["targets"].flatten(0, 2)
    losses, hits = [], []
    for direction in method.directions:
        for offset in method.offsets:
            predictions = representations[f"{direction}_{offset}"].flatten(0, 2)
            positive = positive_cells(IMAGES, SIDE, SIDE, offset, direction)
            mask = dense_mask(method, positive, whole.randomness, f"{direction}_{offset}")
            scores = (predictions @ targets.T / 10).masked_fill(~mask, -math.inf)
            losses.append(nn.functional.cross_entropy(scores, positive))
            hits.append((scores.argmax(1) == positive).double().mean())
    return torch.stack(losses).mean(), torch.stack(hits).mean()


def gradients_of(loss, method, grids):
    return torch.autograd.grad(loss, [*method.parameters(), grids])


close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("choice", list(CHOICES))
def test_loss_gradients_accuracy_and_chance_are_those_of_the_dense_matrix(choice):
    method, whole = cpc(choice), batch()
    expected, accuracy = dense_loss(method, whole)
    loss, metrics = method(whole)
    close(loss, expected)
    for ours, theirs in zip(
        gradients_of(loss, method, whole.views[0]), gradients_of(expected, method, whole.views[0]), strict=True
    ):
        close(ours, theirs)
    assert float(metrics["accuracy"]) == pytest.approx(float(accuracy))
    assert float(metrics["chance_loss"]) == pytest.approx(math.log(CHOICES[choice][1]), rel=1e-12)
    assert metrics["negatives"] == CHOICES[choice][1] - 1


def test_the_choices_are_different_losses():
    losses = {choice: cpc(choice)(batch())[0].item() for choice in CHOICES}
    assert len({round(loss, 6) for loss in losses.values()}) == len(CHOICES)
    every = IMAGES * CELLS - 1
    method = cpc("random", negatives_k=every)
    close(method(batch())[0], cpc()(batch())[0])  # all that there are


# --- two processes


def one_process(rank):
    warnings.simplefilter("error", FutureWarning)
    result = {}
    for share, counts in {"equal": [2, 2], "unequal": [1, 3]}.items():
        for choice in CHOICES:
            method = cpc(choice)
            mine = batch(slice(0, counts[0]) if rank == 0 else slice(counts[0], None))
            loss, metrics = method(mine)
            loss.backward()
            average_gradients_(method)
            dist.all_reduce(mean := loss.detach() / 2)
            result[share, choice] = mean, {k: p.grad for k, p in method.named_parameters()}, metrics, mine.views[0].grad
    result["cached"] = cached(rank)
    result["own alone"] = error_of(lambda: cpc("other_images", gather=False)(batch(slice(rank, 2 * rank + 1))))
    result["too many"] = error_of(lambda: cpc("random", negatives_k=36)(batch(slice(2 * rank, 2 * rank + 2))))
    return result


def error_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def cached(rank):
    """The gradient of a step in two micro-batches that are contrasted as one: places 0 and 2 here, or 1 and 3."""
    from accelerate import Accelerator

    method = cpc("random")
    makers = [lambda a=a: batch(slice(2 * a + rank, 2 * a + rank + 1)) for a in range(2)]
    passes = CachedStep(method, makers, Accelerator(cpu=True))
    passes.backward(passes.forward()[0])
    return {key: p.grad for key, p in method.named_parameters()}


@pytest.fixture(scope="module")
def two_processes():
    return in_a_group(2, one_process)


@pytest.mark.parametrize("share", ["equal", "unequal"])
@pytest.mark.parametrize("choice", list(CHOICES))
def test_two_processes_do_what_the_dense_matrix_of_the_joint_batch_does(two_processes, choice, share):
    method, whole = cpc(choice), batch()
    expected, _ = dense_loss(method, whole)
    *gradients, of_images = gradients_of(expected, method, whole.views[0])
    for ours in two_processes:
        loss, learned, metrics, _ = ours[share, choice]
        close(loss, expected.detach())
        for (name, _), gradient in zip(method.named_parameters(), gradients, strict=True):
            close(learned[name], gradient)
        assert float(metrics["chance_loss"]) == pytest.approx(math.log(CHOICES[choice][1]), rel=1e-12)
        assert metrics["negatives"] == CHOICES[choice][1] - 1
    close(torch.cat([ours[share, choice][3] for ours in two_processes]) / 2, of_images)


def test_joined_micro_batches_on_two_processes_draw_what_one_process_draws(two_processes):
    """Places 0, 2 stand on the first process and 1, 3 on the second: another order, the same draws."""
    method, whole = cpc("random"), batch()
    expected, _ = dense_loss(method, whole)
    *gradients, _ = gradients_of(expected, method, whole.views[0])
    for ours in two_processes:
        for (name, _), gradient in zip(method.named_parameters(), gradients, strict=True):
            close(ours["cached"][name], gradient)


def test_a_choice_that_does_not_fit_is_told_on_all_processes(two_processes):
    for ours in two_processes:
        assert "1 image is contrasted: pass at least 2, or all" in ours["own alone"]
        assert "beside the positive there are 35 patches (4 images of 9): pass at most 35" in ours["too many"]


# --- what is drawn


def draws(count, m, queries=2000):
    keys = Randomness(0, 0, torch.arange(queries)).integers("x", 1 << 62)
    positive = torch.arange(queries) % m
    return positive, at_random(positive, keys, count, torch.arange(m))(torch.arange(queries))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_as_many_as_asked_for_and_the_own_one_beside_them(count):
    positive, mask = draws(count, 9)
    assert (mask.sum(1) == count + 1).all()
    assert mask.gather(1, positive[:, None]).all()


def test_every_set_is_as_likely():
    """Of 5 targets beside the own one, the 10 pairs and the 10 triples: 20,000 queries, within 5 standard errors."""
    for count in (2, 3):
        positive, mask = draws(count, 6, 20_000)
        found = Counter()
        for own, row in zip(positive.tolist(), mask.tolist(), strict=True):
            found[tuple((j - own) % 6 for j in range(6) if row[j] and j != own)] += 1
        seen = Counter(tuple(sorted(names)) for names in found.elements())
        assert set(seen) == set(combinations(range(1, 6), count))
        error = math.sqrt(20_000 * 0.1 * 0.9)
        assert all(abs(times - 2000) < 5 * error for times in seen.values())


def test_the_draws_are_the_steps_the_images_the_directions_and_the_offsets():
    def mask(step=0, place=0, what="down_1"):
        image = Randomness(0, step, torch.tensor([place])).integers("negatives", 1 << 62)
        positive = torch.zeros(6, dtype=torch.int64)
        return at_random(positive, query_keys(image, 6, what), 8, torch.arange(30))(torch.arange(6))

    assert torch.equal(mask(), mask())
    first = mask()
    assert not torch.equal(first[0], first[1])
    for other in (mask(step=1), mask(place=1), mask(what="up_1"), mask(what="down_2")):
        assert not torch.equal(first, other)


def test_blocks_of_a_mask_are_blocks_of_the_whole():
    positive, whole = draws(4, 9, 50)
    keys = Randomness(0, 0, torch.arange(50)).integers("x", 1 << 62)
    mask = as_mask(at_random(positive, keys, 4, torch.arange(9)), torch.device("cpu"))
    assert torch.equal(mask(slice(7, 20), slice(2, 5)), whole[7:20, 2:5])


def test_first_of_their_kind():
    assert first_of_their_kind(torch.tensor([[3, 1, 3], [2, 2, 2]])).tolist() == [
        [True, True, False],
        [True, False, False],
    ]


def test_accuracy_among_those_that_are_compared():
    """The other image's target scores higher: right among the own image's only."""
    queries, keys = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0], [2.0, 0.0], [0.0, 0.0]])
    positive = torch.tensor([0])
    assert contrast_accuracy(queries, keys, positive) == 0
    assert (
        contrast_accuracy(queries, keys, positive, compared=lambda rows: torch.tensor([[True, True, False, False]]))
        == 1
    )
    assert contrast_accuracy(queries, keys, positive, compared=of_other_images(positive, 2, 4)) == 0


# --- choices that do not fit


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negatives": "other"}, "negatives=other: pass one of all, other_images, same_image, random"),
        (
            {"negatives": "random"},
            "negatives=random negatives_k=None: pass negatives_k=N, at least 1 a prediction",
        ),
        (
            {"negatives": "random", "negatives_k": 0},
            "negatives=random negatives_k=0: pass negatives_k=N, at least 1 a prediction",
        ),
        ({"negatives": "all", "negatives_k": 4}, "negatives=all negatives_k=4: leave negatives_k out"),
        (
            {"negatives": "same_image", "loss": SigmoidLoss()},
            "negatives=same_image: SigmoidLoss takes no mask; pass negatives=all, or loss=info_nce",
        ),
    ],
)
def test_a_choice_that_there_is_not_is_one_line(options, said):
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        CPC(Pixels(), offsets=[1], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "loss", [partial(info_nce, decoupled=True), partial(cosine_info_nce, temperature=0.5), InfoNCELoss()]
)
def test_other_losses_take_the_choices(loss):
    for choice in CHOICES:
        value, metrics = cpc(choice, loss=loss)(batch())
        value.backward()
        expected = CHOICES[choice][1] - getattr(loss, "keywords", {}).get("decoupled", False)
        assert float(metrics["chance_loss"]) == pytest.approx(math.log(expected))


def test_random_negatives_want_the_steps_numbers():
    whole = batch()
    with pytest.raises(ValueError, match=r"negatives=random draws by the step: pass Batch\(..., Randomness\("):
        cpc("random")(Batch(whole.views, whole.indices, whole.labels))


def test_how_many():
    assert [count_negatives(choice, 3, 2, 9) for choice in ("all", "other_images", "same_image", "random")] == [
        17,
        9,
        8,
        3,
    ]
    with pytest.raises(ValueError, match="there are 17 patches"):
        count_negatives("random", 18, 2, 9)


# --- as a run


SMALL = ["encoder.width=4", "method.context.layers=1", "method.context.width=4", "probe_every=0", "batch_size=4",
         "threads=1", "log_every=1", "steps=4", "method.negatives=random", "method.negatives_k=20"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("as_a_new_process")
def test_a_run_with_random_negatives_resumes_exactly(compose, tmp_path, interrupted_at):
    from cpc.pretrain import pretrain

    whole = pretrain(compose(*SMALL, f"run_dir={tmp_path / 'whole'}"))
    with interrupted_at(2):
        pretrain(compose(*SMALL, "save_every=2", f"run_dir={tmp_path / 'cut'}"))
    cut = pretrain(compose(*SMALL, "save_every=2", "resume=auto", f"run_dir={tmp_path / 'cut'}"))
    for name in ("encoder.safetensors", "context.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()


def test_a_configuration_asks_for_them(compose):
    from cpc.pretrain import build_method  # hydra and more, for which the two processes need not wait

    method, _ = build_method(compose("method.negatives=random", "method.negatives_k=20"))
    assert (method.negatives, method.negatives_k) == ("random", 20)
    assert build_method(compose())[0].negatives == "all"
