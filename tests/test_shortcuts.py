"""Short-cuts: each detector finds the one that was planted, and none where there is none; and what is not a CPC run."""

import json
import math
import shutil
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from contrastive_core.checkpoint import latest_checkpoint
from contrastive_core.losses import cosine_info_nce, info_nce
from contrastive_core.method import Batch
from contrastive_core.randomness import Randomness
from cpc.context import DIRECTIONS, ContextNetwork
from cpc.encoders import resnet_small
from cpc.features import load_encoder
from cpc.method import CPC
from cpc.patches import extract_patches
from cpc.pretrain import pretrain
from cpc.report import page, read_runs
from cpc.shortcut_detectors import (
    GreyPatches,
    InCompany,
    LevelledPatches,
    batch_statistics,
    colour,
    image_mean_accuracy,
    in_training,
    measure,
    overlap,
    patch_batches,
    stripped_accuracy,
    varied,
    whole_image,
    without_strip,
)
from cpc.shortcuts import FILE, chosen, find, main, read_findings, shortcuts
from cpc.trained_cpc import load_cpc
from cpc.views import PatchViews

TINY = ["batch_size=8", "encoder.width=4", "steps=3", "threads=1", "probe_every=0", "save_every=1"]
CONTEXT = ["method.context.width=8", "method.context.layers=1"]
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("as_a_new_process")


class Signed(nn.Module):
    """A patch's numbers and their opposites: after the context's ReLU their difference is the number again."""

    def __init__(self, numbers, dim):
        super().__init__()
        self.numbers, self.dim = numbers, 2 * dim

    def forward(self, patches):
        numbers = self.numbers(patches)
        return torch.cat([numbers, -numbers], 1)


def planted(encoder, head, *, offsets, directions=("down",), **options):
    """CPC whose prediction at the first offset is `head(direction)` times the context cell's numbers, at the rest 0."""
    half = encoder.dim // 2
    method = CPC(
        encoder,
        offsets=offsets,
        directions=directions,
        target_dim=half,
        context=partial(ContextNetwork, width=1, layers=0),
        loss=partial(info_nce, temperature=1.0),
        **options,
    )
    method.requires_grad_(False)
    method.target_projection.weight.copy_(torch.eye(half, 2 * half))
    for direction in directions:
        for place, offset in enumerate(offsets):
            layer = method.heads[direction].heads[str(offset)]
            layer.bias.zero_()
            layer.weight.zero_()
            if place == 0:
                matrix = head(direction)
                layer.weight.copy_(torch.cat([matrix, -matrix], 1))
    return method.eval()


def views(image_size, size, stride, change=None):
    return PatchViews(
        image_size=image_size, patch_size=size, stride=stride, mean=[0.5] * 3, std=[1.0] * 3, patch_augment=change
    )


def noise(count, side, channels=3):
    numbers = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, channels, side, side), dtype=torch.uint8, generator=numbers)


# ---- overlap ----

SIDE, SIZE, STRIDE = 10, 4, 2


def shared_pixels(direction):
    """Context numbers to target numbers, 1 where the two patches have the same pixel of the image."""
    pixels = torch.arange(3.0 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE)
    grid = extract_patches(pixels, SIZE, STRIDE)[0].flatten(2)
    row, col = {"down": (2, 1), "up": (0, 1), "right": (1, 2), "left": (1, 0)}[direction]
    return (grid[row, col][:, None] == grid[1, 1][None, :]).float()


@pytest.fixture(scope="module")
def copying():
    """A method that knows nothing but the pixels that it has seen already."""
    return planted(Signed(nn.Flatten(), 48), shared_pixels, offsets=(1, 2), directions=DIRECTIONS)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_copy_of_shared_pixels_is_found(copying, direction):
    assert shared_pixels(direction).sum() == 3 * 4 * 2
    one = varied(copying, directions=(direction,))
    batches = patch_batches(noise(16, SIDE), 8, views(SIDE, SIZE, STRIDE), CPU)
    found = overlap(one, batches, SIZE, STRIDE)
    first, second, without, without_far = (row["accuracy"] for row in found.rows)
    assert found.found
    assert first > 0.9
    assert second == 0  # all scores tie
    assert without < 0.1
    assert without_far == pytest.approx(first)  # what the method never looked at
    assert [row.get("shared_pixels") for row in found.rows] == [2, 0, None, None]
    assert "offset 1 shares 2 of 4 px" in found.verdict


def test_offsets_that_share_nothing_are_no_overlap(copying):
    batches = patch_batches(noise(8, SIDE), 8, views(SIDE, SIZE, STRIDE), CPU)
    assert overlap(varied(copying, offsets=(2,)), batches, SIZE, STRIDE).found is False
    alone = overlap(varied(copying, offsets=(1,)), batches, SIZE, STRIDE)
    assert alone.found
    assert "pass method.offsets=[2] or more" in alone.verdict


def test_near_pixels_that_nothing_hangs_on_are_not_copied():
    nothing = planted(Signed(nn.Flatten(), 48), lambda _: torch.zeros(48, 48), offsets=(1,))
    batches = patch_batches(noise(16, SIDE), 8, views(SIDE, SIZE, STRIDE), CPU)
    told = overlap(nothing, batches, SIZE, STRIDE)
    assert told.found is None
    assert told.verdict.startswith("cannot be told: ")
    images = noise(16, 1).expand(16, 3, SIDE, SIDE).contiguous()
    mean = Signed(lambda patches: 8 * patches[..., -1, :].mean(2), 3)  # by their last row, which is not shared
    honest = planted(mean, lambda _: torch.eye(3), offsets=(1,))
    told = overlap(honest, patch_batches(images, 8, views(SIDE, SIZE, STRIDE), CPU), SIZE, STRIDE)
    assert told.found is False
    assert "offset 1 shares 2 of 4 px" in told.verdict


def test_a_copy_at_the_first_of_two_offsets_that_share_is_found():
    """At the second, which shares fewer pixels, nothing is known."""
    side, size, stride = 14, 6, 2
    grid = extract_patches(torch.arange(3.0 * side * side).reshape(1, 3, side, side), size, stride)[0].flatten(2)
    shared = (grid[2, 1][:, None] == grid[1, 1][None, :]).float()
    method = planted(Signed(nn.Flatten(), 3 * size**2), lambda _: shared, offsets=(1, 2))
    found = overlap(method, patch_batches(noise(16, side), 8, views(side, size, stride), CPU), size, stride)
    assert found.found
    assert "offset 1 shares 4 of 6 px" in found.verdict
    assert [row["case"] for row in found.rows if "without the shared" in row["case"]] == [
        "offset 1 without the shared px", "offset 2 without the shared px",
    ]  # fmt: skip


def test_a_strip_is_taken_where_the_context_is():
    patches = torch.arange(1.0, 10).reshape(3, 3)
    top, left = without_strip(patches, "down", 1, near=True), without_strip(patches, "right", 1, near=True)
    assert top.tolist() == [[6.5] * 3, [4, 5, 6], [7, 8, 9]]
    assert left[:, 0].tolist() == [5.5] * 3
    torch.testing.assert_close(left[:, 1:], patches[:, 1:])
    for one, other in (("down", "up"), ("right", "left")):
        torch.testing.assert_close(
            without_strip(patches, one, 1, near=False), without_strip(patches, other, 1, near=True)
        )
    for width in (0, 3):
        with pytest.raises(ValueError, match=f"width={width}: pass 1 to 2 of 3 px"):
            without_strip(patches, "down", width, near=True)


def test_whole_targets_give_the_methods_own_score(copying, monkeypatch):
    batches = patch_batches(noise(16, SIDE), 8, views(SIDE, SIZE, STRIDE), CPU)
    monkeypatch.setattr("cpc.shortcut_detectors.without_strip", lambda patches, *_, **__: patches)
    own = stripped_accuracy(copying, batches, 1, 2, near=True)
    assert own == pytest.approx(measure(varied(copying, offsets=(1,)), batches))


# ---- colour, and the image as a whole ----


def tinted(count):
    """Images of one colour each, all of the same luminance: points of a circle about grey."""
    luminance = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    plane = torch.linalg.svd(luminance[None]).Vh[1:]
    angles = torch.arange(count) * (2 * math.pi / count)
    colours = 0.5 + 0.3 * torch.stack([angles.cos(), angles.sin()], 1).double() @ plane
    return (255 * colours).round().to(torch.uint8)[:, :, None, None].expand(count, 3, 12, 12).contiguous()


def by_colour():
    """A method that predicts a patch's mean colour by the context cell's."""
    mean = Signed(lambda patches: patches.mean((2, 3)), 3)
    return planted(mean, lambda _: torch.eye(3), offsets=(1,), negatives="other_images")


def grids(images, change):
    return patch_batches(images, 8, views(12, 4, 4, change), CPU)


def test_what_knows_colour_alone_knows_nothing_in_grey():
    found = colour(by_colour(), tinted(8), grids)
    plain, in_grey, levelled = (row["accuracy"] for row in found.rows)
    assert plain == 1
    assert in_grey < 0.5
    assert levelled < 0.5
    assert found.found
    assert found.verdict.startswith("yes: grey takes")
    assert found.rows[1]["loss"] > found.rows[0]["loss"] + 0.05


def test_grey_images_have_no_colour_to_lose():
    shades = torch.arange(8, dtype=torch.uint8).mul(30)[:, None, None, None].expand(8, 3, 12, 12)
    found = colour(by_colour(), shades.contiguous(), grids)
    plain, in_grey, _ = (row["loss"] for row in found.rows)
    assert in_grey == pytest.approx(plain, rel=1e-5)
    assert found.found is False
    assert "these images have none" in found.verdict


def test_what_has_learned_nothing_cannot_be_told():
    mean = Signed(lambda patches: patches.mean((2, 3)), 3)
    nothing = planted(mean, lambda _: torch.zeros(3, 3), offsets=(1,))
    found = colour(nothing, tinted(8), grids)
    assert found.found is None
    assert found.rows[0]["loss"] == pytest.approx(math.log(8 * 9))
    assert whole_image(nothing, grids(tinted(8), None)).found is None


def test_patches_in_grey_and_levelled():
    patches = torch.rand(2, 3, 3, 3, 5, 5, dtype=torch.float64)
    grey = GreyPatches()(patches, Randomness(0, 0, torch.arange(2)))
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    expected = torch.einsum("b r k c y x, c -> b r k y x", patches, weights)
    for channel in range(3):
        torch.testing.assert_close(grey[:, :, :, channel], expected, rtol=1e-3, atol=1e-3)
    cast = 0.2 * patches + torch.rand(2, 3, 3, 3, 1, 1, dtype=torch.float64)  # another light and contrast
    level = LevelledPatches([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    even = level(patches, None)
    torch.testing.assert_close(level(cast, None), even)
    torch.testing.assert_close(even.mean((0, 1, 2, 4, 5)), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64))
    assert level(torch.zeros(1, 1, 1, 3, 4, 4), None).isfinite().all()


def test_what_knows_the_image_alone_is_found():
    found = whole_image(by_colour(), grids(tinted(8), None))
    accuracy = {row["case"]: row["accuracy"] for row in found.rows}
    assert accuracy["negatives: other_images"] == 1
    assert accuracy["negatives: same_image"] == 0  # all patches of an image are alike
    assert accuracy["negatives: random 8"] > 0.3
    assert found.rows[1]["image_mean_accuracy"] == 1
    assert found.found
    assert [row["chance"] for row in found.rows] == pytest.approx([1 / 72, 1 / 64, 1 / 9, 1 / 9])


def test_what_knows_the_place_is_not(copying):
    found = whole_image(
        varied(copying, offsets=(1,)), patch_batches(noise(16, SIDE), 8, views(SIDE, SIZE, STRIDE), CPU)
    )
    assert found.found is False
    assert found.rows[1]["image_mean_accuracy"] < 0.7


def test_an_images_mean_finds_one_patch_of_its_image():
    targets = torch.randn(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    assert image_mean_accuracy(targets, "same_image", 11) == pytest.approx(1 / 12)
    assert image_mean_accuracy(targets, "all", 11) <= 1 / 12
    apart = targets + 50 * torch.eye(6)[:5, None, None]
    assert image_mean_accuracy(apart, "other_images", 11) == 1


def test_a_slow_loop_gives_the_same_mean_accuracy():
    targets = torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets += torch.randn(4, 1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    flat = targets.reshape(24, 5) - targets.reshape(24, 5).mean(0)
    hits = 0
    for i in range(24):
        image = range(i // 6 * 6, i // 6 * 6 + 6)
        scores = {}
        for j in range(24):
            mean = flat[[k for k in image if k != j]].mean(0)
            scores[j] = float(torch.cosine_similarity(mean, flat[j], dim=0))
        hits += all(scores[i] > scores[j] for j in range(24) if j not in image)
    assert image_mean_accuracy(targets, "other_images", 5) == pytest.approx(hits / 24)


def test_patches_that_have_nothing_in_common_are_not_found_by_their_mean():
    targets = torch.randn(32, 3, 3, 64, generator=torch.Generator().manual_seed(0))
    assert image_mean_accuracy(targets, "other_images", 8) < 0.03  # chance 1 / 280
    assert image_mean_accuracy(targets, "random", 8) == pytest.approx(1 / 9, abs=0.05)


# ---- batch statistics ----


def small(norm, **options):
    torch.manual_seed(0)
    context = partial(ContextNetwork, width=4, layers=1)
    return CPC(resnet_small(4, norm=norm), offsets=[1], context=context, target_dim=8, **options).eval()


@pytest.mark.parametrize(("norm", "found"), [("layer", False), ("channel", False), ("none", False), ("batch", True)])
def test_batch_norm_is_found_and_no_other(norm, found):
    method = small(norm)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    told = batch_statistics(method, patch_batches(noise(8, 16), 8, views(16, 8, 4), CPU))
    assert told.found is found
    evaluated, together, of_image, of_any = (row["loss"] for row in told.rows)
    if found:
        assert told.rows[-1]["latents_moved"] > 0.05
        assert len({round(loss, 5) for loss in (evaluated, together, of_image, of_any)}) == 4
    else:
        assert told.rows[-1]["latents_moved"] < 1e-5
        assert (together, of_image, of_any) == pytest.approx((evaluated,) * 3, rel=1e-6)
    for name, value in method.state_dict().items():  # running statistics, too
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert not any(module.training for module in method.modules())


@pytest.mark.parametrize("group", [1, 7, 24])
def test_a_patch_comes_back_to_its_place(group):
    def doubled(patches):
        return 2 * patches.flatten(1)

    doubled.dim = 27
    patches = torch.rand(24, 3, 3, 3)
    shuffled = InCompany(doubled, group, shuffle=True)
    assert sorted(shuffled.order(24).tolist()) == list(range(24)) != shuffled.order(24).tolist()
    torch.testing.assert_close(shuffled(patches), doubled(patches), rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "couples"), [("layer", False), ("batch", True)])
def test_a_patch_sees_no_other_but_by_batch_statistics(norm, couples):
    encoder = in_training(resnet_small(4, norm=norm).double())
    patches = torch.randn(12, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    company = InCompany(encoder, 4, shuffle=True)
    latent = company(patches)[5].square().sum()
    seen = torch.autograd.grad(latent, patches)[0].abs().amax((1, 2, 3))
    group = next(part for part in company.order(12).split(4) if 5 in part)
    assert seen[5] > 0
    others = [i for i in range(12) if i not in group]
    assert seen[others].max() == 0
    mates = [i for i in group.tolist() if i != 5]
    assert bool((seen[mates] > 0).all()) is couples


def test_the_order_of_a_whole_batch_is_nothing_to_batch_norm():
    encoder, patches = in_training(resnet_small(4, norm="batch").double()), torch.randn(12, 3, 8, 8).double()
    torch.testing.assert_close(InCompany(encoder, 12, shuffle=True)(patches), encoder(patches))


def test_another_way_shares_the_weights_and_leaves_the_method_as_it_was():
    method = small("layer")
    other = varied(method, offsets=(2,), encoder=nn.Identity())
    assert method.offsets == (1,)
    assert isinstance(other.encoder, nn.Identity)
    assert not isinstance(method.encoder, nn.Identity)
    assert other.target_projection is method.target_projection


def test_the_measure_is_the_methods_own_loss():
    method = small("layer", negatives="random", negatives_k=5)
    method.requires_grad_(False)
    (batch,) = patch_batches(noise(6, 16), 6, views(16, 8, 4), CPU)
    loss, metrics = method(batch)
    assert measure(method, [batch]) == pytest.approx(
        (float(loss), math.log(6), float(metrics["accuracy"]), 1 / 6), rel=1e-6
    )
    assert isinstance(batch, Batch)
    assert [len(each.indices) for each in patch_batches(noise(7, 16), 3, views(16, 8, 4), CPU)] == [3, 3]
    assert [len(each.indices) for each in patch_batches(noise(2, 16), 3, views(16, 8, 4), CPU)] == [2]


# ---- a run's folder ----


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Runs of CPC, as it comes and in other ways, and one of SimCLR."""
    import hydra

    from cpc.configs import config_folder

    folder = tmp_path_factory.mktemp("shortcuts")
    other_ways = ["loss=nt_xent", "averaging=0.5", "norm=batch", "method.share_context=true"]
    runs = {
        "cpc": ["method=cpc", *CONTEXT, "method.offsets=[1,2]"],
        "other": ["method=cpc", *CONTEXT, *other_ways, "method.negatives=random", "method.negatives_k=5"],
        "sigmoid": ["method=cpc", *CONTEXT, "loss=sigmoid"],
        "simclr": ["method=simclr"],
    }
    for name, options in runs.items():
        with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
            pretrain(hydra.compose("pretrain", [*options, *TINY, f"run_dir={folder / name}"]))
    return folder


@pytest.mark.parametrize(("name", "weights"), [("cpc", "method"), ("other", "averaged"), ("sigmoid", "method")])
def test_a_whole_method_comes_back(made, name, weights):
    method = load_cpc(made / name)
    kept = load_file(latest_checkpoint(made / name / "checkpoints") / f"{weights}.safetensors")
    assert kept.keys() == method.state_dict().keys()
    for key, value in method.state_dict().items():
        torch.testing.assert_close(value, kept[key], rtol=0, atol=0)
    for key, value in load_encoder(made / name).encoder.state_dict().items():
        torch.testing.assert_close(value, method.encoder.state_dict()[key], rtol=0, atol=0)
    assert not any(p.requires_grad for p in method.parameters())
    assert not method.training
    if name == "other":
        assert (method.negatives, method.negatives_k, set(method.context_of.values())) == ("random", 5, {"shared"})
        assert method.loss.func is cosine_info_nce
        assert method.loss.keywords["temperature"] == 0.1
    fed = json.loads((made / name / "encoder.json").read_text())["input"]
    findings = find(method, noise(8, 28), fed, 4, CPU)
    assert [each.found for each in findings][2] is (name == "other")  # its batch norm
    assert all(math.isfinite(row["loss"]) for each in findings for row in each.rows)


def test_the_tool_and_the_report(made, call_tool, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "cpc", run)
    assert "Is it cheating" not in page(read_runs([run]), None, with_pictures=False)
    call_tool(main, f"run={run}", "images=16", "threads=1", "verbosity=quiet")
    assert capsys.readouterr().out == f"{run / FILE}\n"
    call_tool(main, f"run={run}", "images=20", "threads=1")
    said = capsys.readouterr().out
    record = json.loads((run / FILE).read_text())
    assert (record["images"], record["batch_size"], record["split"]) == (16, 8, "test")
    findings = read_findings(run)
    assert [each.shortcut for each in findings] == ["overlap", "colour", "batch statistics", "whole image"]
    assert findings[2].found is False
    text = page(read_runs([run]), None, with_pictures=False)
    assert "<h2>Is it cheating?</h2>" in text
    for finding in findings:
        assert finding.verdict in said
        assert f"<td>{finding.shortcut}</td>" in text
        assert all(row["case"] in said for row in finding.rows)
    assert f"<td>{findings[0].rows[0]['loss']:.3f}</td>" in text
    assert not list(run.glob("*.partial"))


def test_images_are_loaded_as_large_as_they_are_cut(made, call_tool, capsys, tmp_path):
    """Of a run whose views were enlarged: its card's load_size is less than its image_size."""
    run = tmp_path / "run"
    shutil.copytree(made / "cpc", run)
    card = json.loads((run / "encoder.json").read_text())
    card["input"] |= {"image_size": 32, "load_size": 28}
    (run / "encoder.json").write_text(json.dumps(card))
    call_tool(main, f"run={run}", "images=4", "batch_size=4", "threads=1", "verbosity=quiet")
    assert capsys.readouterr().out == f"{run / FILE}\n"


def test_words_in_the_file_stay_words(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "cpc", run)
    for content, words in (
        ({"shortcuts": [{"shortcut": "a", "found": True, "verdict": "yes: <script>", "rows": []}]}, "&lt;script&gt;"),
        (
            {"shortcuts": [{"shortcut": "a", "found": True, "verdict": "v", "rows": [{"case": "c", "loss": "x"}]}]},
            "words",
        ),
        ({"shortcuts": [{"shortcut": "a"}]}, "is not what tools/shortcuts.py writes"),
        ([], "is not what tools/shortcuts.py writes"),
    ):
        (run / FILE).write_text(json.dumps(content))
        text = page(read_runs([run]), None, with_pictures=False)
        assert words in text
        assert "<td><script>" not in text


def one_line(call_tool, capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        call_tool(main, *arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_mistakes_are_one_line(made, call_tool, capsys, tmp_path):
    def said(*arguments):
        return one_line(call_tool, capsys, *arguments, "threads=1")

    assert "not given: run; pass run=DIR" in said()
    assert f"{tmp_path} holds no run: pass run=DIR" in said(f"run={tmp_path}")
    assert "is no CPC run, its method is SimCLR: pass a run of" in said(f"run={made / 'simclr'}")
    assert "split=validation: pass test or train" in said(f"run={made / 'cpc'}", "split=validation")
    assert "images=1: pass at least 2" in said(f"run={made / 'cpc'}", "images=1")
    assert "batch_size=1: pass at least 2" in said(f"run={made / 'cpc'}", "batch_size=1")
    assert "no.parquet" in said(f"run={made / 'cpc'}", "data=parquet", "data.train=no.parquet")
    assert "images of 20 px, and the run's have 28" in said(f"run={made / 'cpc'}", "load_size=20")
    assert not (made / "cpc" / FILE).exists()

    unfinished = tmp_path / "unfinished"
    shutil.copytree(made / "cpc", unfinished)
    (unfinished / "encoder.json").unlink()
    assert "has not finished: resume=auto with its run_dir goes on" in said(f"run={unfinished}")

    bare = tmp_path / "bare"
    shutil.copytree(made / "cpc", bare)
    shutil.rmtree(bare / "checkpoints")
    assert "no checkpoint in" in said(f"run={bare}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method.loss._target_": "os.system"}, "names a loss that is not ours"),
        ({"method.offsets": ["${oc.env:HOME}"]}, "only numbers, words and lists"),
        ({"method.offsets": [1, 3]}, "is not of the CPC that its config.yaml says"),
        ({"method.negatives": "most"}, "negatives=most: pass one of"),
        ({"data": None}, "pass data=NAME"),
        ({"data._target_": "os.system"}, "which is not ours"),
        ({"batch_size": "many"}, "pass batch_size=N"),
    ],
)
def test_a_config_that_says_otherwise_is_one_line(made, call_tool, capsys, tmp_path, change, words):
    run = tmp_path / "run"
    shutil.copytree(made / "cpc", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in change.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert words in one_line(call_tool, capsys, f"run={run}", "threads=1")


def test_without_held_out_images(made, compose, tmp_path):
    from contrastive_core.data import ImageDataset, Splits

    pixels = noise(4, 28).permute(0, 2, 3, 1).numpy()
    few = ImageDataset(pixels, size=28, labels=[0] * 4)
    with pytest.raises(ValueError, match="there are no held-out images: pass data"):
        chosen(Splits(few, None), "test")
    assert chosen(Splits(few, None), "train") is few
    with pytest.raises(ValueError, match="the test split has 1 images: pass data with at least 2"):
        chosen(Splits(few, few.subset([0])), "test")
    shutil.copytree(made / "cpc", tmp_path / "run")
    written = shortcuts(compose(f"run={tmp_path / 'run'}", "split=train", "images=8", "threads=1", name="shortcuts"))
    assert json.loads(written.read_text())["split"] == "train"
