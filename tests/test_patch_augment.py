"""CPC v2's patch augmentation: every patch on its own, the paper's list, and numbers that depend on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from einops import rearrange
from scipy import stats
from torch import Tensor, nn

from contrastive_core.augment import (
    AUTOAUGMENT,
    SIXTEEN,
    AutoAugmentPrimitives,
    ChannelDrop,
    ElasticDeformation,
    HistogramRemap,
    InceptionColour,
    Parts,
    RandomGrey,
)
from contrastive_core.randomness import Randomness
from cpc.patch_augment import PatchAugment, patch_augment_digits, patch_augment_v1, patch_augment_v2
from cpc.show_patches import main, open_image

EVERYTHING = {
    "primitives": 2,
    "elastic": 0.2,
    "histogram": 0.2,
    "colour": 0.8,
    "grey": 0.25,
    "channel_drop": 1.0,
    "jitter": 0.9,
    "noise": 0.1,
}
NOTHING = dict.fromkeys(EVERYTHING, 0) | {"jitter": 1.0}


def equal_patches(b: int = 2, side: int = 6, size: int = 12) -> Tensor:
    """A grid in which every patch is the same picture."""
    picture = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    return picture.expand(b, side, side, 3, size, size)


def randomness(b: int, step: int = 0) -> Randomness:
    return Randomness(0, step, torch.arange(b))


class Recorder(Parts):
    """Keeps every number that a step draws, by stream."""

    def __init__(self, whole: Randomness, count: int) -> None:
        super().__init__(whole, count, name="patches")
        self.drawn: dict[str, Tensor] = {}

    def uniform(self, stream: str, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        self.drawn[stream] = super().uniform(stream, *shape, low=low, high=high)
        return self.drawn[stream]

    def integers(self, stream: str, high: int, *shape: int) -> Tensor:
        self.drawn[stream] = super().integers(stream, high, *shape)
        return self.drawn[stream]


def record(augment: PatchAugment, b: int, side: int) -> dict[str, Tensor]:
    """What the augmentation draws, by stream, `(b side side) *shape`."""
    recorder = Recorder(randomness(b), side * side)
    images = rearrange(equal_patches(b, side), "b rows cols c ph pw -> (b rows cols) c ph pw")
    for step in augment.steps:
        images = step(images, recorder)
    return recorder.drawn


def test_the_recorder_records_what_patch_augment_uses() -> None:
    augment, patches = patch_augment_v2(**EVERYTHING), equal_patches()
    recorder = Recorder(randomness(2), 36)
    images = patches.flatten(0, 2)
    for step in augment.steps:
        images = step(images, recorder)
    assert torch.equal(images.view_as(patches), augment(patches, randomness(2)))


def test_every_continuous_number_differs_from_patch_to_patch() -> None:
    drawn = record(patch_augment_v2(**EVERYTHING, channel_drop_fill="noise"), b=2, side=6)
    assert set(drawn) >= {
        "primitives/numbers",
        "elastic/chosen",
        "elastic/field",
        "elastic/shear",
        "histogram/slopes",
        "inception/level",
        "inception/order",
        "grey/chosen",
        "channel_drop/rank",
        "channel_drop/key",
        "jitter/corner",
        "noise/std",
        "noise/key",
    }
    continuous = [values for stream, values in drawn.items() if stream != "primitives/operation"]
    for values in continuous:
        for column in values.reshape(72, -1).T:
            assert len(column.unique()) == 72


def test_no_two_streams_share_numbers() -> None:
    drawn = record(patch_augment_v2(**EVERYTHING), b=2, side=6)
    raw = {stream: Parts(randomness(2), 36, "patches").uniform(stream) for stream in drawn}
    assert len(torch.stack(list(raw.values())).unique()) == 72 * len(drawn)


@pytest.mark.parametrize("operations", [AUTOAUGMENT, SIXTEEN, ("Rotate", "Invert", "Color")])
def test_each_operation_has_its_share_and_the_two_draws_are_independent(operations: Sequence[str]) -> None:
    drawn = record(patch_augment_v2(**{**NOTHING, "primitives": 2}, operations=operations), b=100, side=6)
    first, second = drawn["primitives/operation"].unbind(1)
    count = len(operations)
    for draw in (first, second):
        for share in torch.bincount(draw, minlength=count).tolist():
            assert stats.binomtest(share, 3600, 1 / count).pvalue > 1e-4
    table = torch.bincount(first * count + second, minlength=count * count).view(count, count)
    assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3
    # nor does a patch's draw depend on its neighbour's
    grid = first.view(100, 6, 6)
    pairs = torch.bincount((grid[:, :, :-1] * count + grid[:, :, 1:]).flatten(), minlength=count * count)
    assert stats.chi2_contingency(pairs.view(count, count).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(
    ("step", "probability"),
    [
        (ElasticDeformation(0.2, 0.1, of_side=True), 0.2),
        (HistogramRemap(0.2), 0.2),
        (InceptionColour(0.8), 0.8),
        (RandomGrey(0.25), 0.25),
        (ChannelDrop(0.5), 0.5),
    ],
)
def test_each_step_changes_its_share_of_the_patches(step: nn.Module, probability: float) -> None:
    patches = equal_patches(80)
    changed = (PatchAugment([step])(patches, randomness(80)) != patches).flatten(3).any(3)
    assert stats.binomtest(int(changed.sum()), changed.numel(), probability).pvalue > 1e-3
    # on its own: as often as chance has it do two neighbours share their fate
    both = int((changed[:, :, 1:] & changed[:, :, :-1]).sum())
    assert stats.binomtest(both, 80 * 30, probability**2).pvalue > 1e-3


def test_equal_patches_come_out_different() -> None:
    augmented = patch_augment_v2(**EVERYTHING)(equal_patches(1), randomness(1)).flatten(0, 2).flatten(1)
    assert not (torch.cdist(augmented, augmented) + torch.eye(36) < 1e-3).any()


@pytest.mark.parametrize("recipe", [patch_augment_v1, patch_augment_v2, patch_augment_digits])
@pytest.mark.parametrize("size", [5, 12, 17])
def test_recipes_keep_shape_and_range(recipe: Callable[[], PatchAugment], size: int) -> None:
    patches = torch.rand(3, 2, 4, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = patches.clone()
    augmented = recipe()(patches, randomness(3))
    assert augmented.shape == patches.shape
    assert augmented.dtype == torch.float32
    assert augmented.min() >= 0
    assert augmented.max() <= 1 + 1e-6
    assert torch.equal(patches, before)


@pytest.mark.parametrize("operations", [AUTOAUGMENT, SIXTEEN])
def test_the_device_is_neither_left_nor_waited_for(operations: Sequence[str]) -> None:
    patches = torch.empty(8, 6, 6, 3, 12, 12, device="meta")  # refuses tensors from the CPU, and has no values
    augmented = patch_augment_v2(**EVERYTHING, operations=operations)(patches, randomness(8))
    assert augmented.is_meta
    assert augmented.shape == patches.shape


def test_digits_take_one_channel_and_stay_dark_where_they_are() -> None:
    dark = torch.zeros(4, 3, 3, 1, 8, 8)
    assert not patch_augment_digits(noise=0.0, primitives=2)(dark, randomness(4)).any()


@pytest.mark.parametrize(
    "augment",
    [patch_augment_v2(**EVERYTHING, channel_drop_fill="noise"), patch_augment_v1(), patch_augment_digits(primitives=1)],
    ids=["v2", "v1", "digits"],
)
def test_an_image_alone_is_the_same_as_in_a_batch(augment: PatchAugment) -> None:
    patches = torch.rand(6, 3, 4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    whole = augment(patches, randomness(6))
    for place in range(6):
        assert torch.equal(
            augment(patches[place : place + 1], Randomness(0, 0, torch.tensor([place])))[0], whole[place]
        )
    shuffled = torch.tensor([4, 0, 5, 2])
    assert torch.equal(augment(patches[shuffled], Randomness(0, 0, shuffled)), whole[shuffled])


@pytest.mark.parametrize("off", EVERYTHING)
def test_switching_one_step_off_leaves_the_other_numbers(off: str) -> None:
    everything = record(patch_augment_v2(**EVERYTHING), b=2, side=3)
    less = record(patch_augment_v2(**{**EVERYTHING, off: NOTHING[off]}), b=2, side=3)
    assert 0 < len(less) < len(everything)
    for stream, numbers in less.items():
        assert torch.equal(numbers, everything[stream])


@pytest.mark.parametrize("on", EVERYTHING)
def test_a_step_switched_off_is_not_there(on: str) -> None:
    assert len(patch_augment_v2(**NOTHING).steps) == 0
    assert len(patch_augment_v2(**{**NOTHING, on: EVERYTHING[on]}).steps) == 1


def test_nothing_is_the_identity() -> None:
    patches = equal_patches()
    assert torch.equal(patch_augment_v2(**NOTHING)(patches, randomness(2)), patches)


def test_v2_is_the_papers_list_in_its_order() -> None:
    steps = list(patch_augment_v2().steps)
    expected = [AutoAugmentPrimitives, ElasticDeformation, HistogramRemap, InceptionColour, RandomGrey, ChannelDrop]
    assert [type(step) for step in steps] == expected
    assert [step.probability for step in steps[1:]] == [0.2, 0.2, 0.8, 0.25, 1.0]
    assert steps[0].draws == 2
    assert steps[0].operations == tuple(name for name in SIXTEEN if name != "SamplePairing")


def test_v1_is_jitter_on_grey_images() -> None:
    patches = equal_patches(4, size=64)
    augmented = patch_augment_v1()(patches, randomness(4))
    assert torch.equal(augmented[:, :, :, 0], augmented[:, :, :, 2])
    window = augmented[..., 2:62, 2:62]
    windows = RandomGrey(1.0)(patches[0, 0, :1], randomness(1)).unfold(2, 60, 1).unfold(3, 60, 1)[0, 0]  # 5 5 60 60
    matches = (window[:, :, :, 0, None, None] == windows).flatten(5).all(5)  # b rows cols 5 5
    assert torch.equal(matches.sum((3, 4)), torch.ones(4, 6, 6, dtype=torch.int64))
    assert (matches.sum((0, 1, 2)) > 0).all(), "every one of the 25 places is used"
    assert [type(step) for step in patch_augment_v1(1.0, 0.0, 1.0).steps] == [ChannelDrop]
    assert len(patch_augment_v1(1.0, 0.0).steps) == 0


def test_samplepairings_partner_is_of_another_image() -> None:
    """Image i is lit in channel i only: what is mixed in shows in another channel."""
    patches = torch.eye(3).view(3, 1, 1, 3, 1, 1).expand(3, 4, 4, 3, 6, 6)
    mixed = PatchAugment([AutoAugmentPrimitives(1, ["SamplePairing"])])(patches, randomness(3))
    weight = mixed[..., 0, 0]  # image rows cols channel
    for image in range(3):
        own = weight[image, ..., image]
        assert ((own > 0.6) & (own < 1)).all()
        assert ((weight[image] > 0).sum(-1) == 2).all()  # itself and one other
        others = weight[image].flatten(0, 1).sum(0) > 0
        assert others.all(), "both other images serve as partners"


def test_samplepairing_is_off_by_default_and_needs_a_second_image() -> None:
    patch_augment_v2()(equal_patches(1), randomness(1))
    with pytest.raises(ValueError, match="SamplePairing needs a second image in the batch"):
        patch_augment_v2(operations=SIXTEEN)(equal_patches(1), randomness(1))


@pytest.mark.parametrize("shape", [(3, 12, 12), (36, 3, 12, 12), (2, 36, 3, 12, 12)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected patches b rows cols c ph pw, got shape \("):
        patch_augment_v2()(torch.zeros(shape), randomness(2))


def test_the_randomness_must_be_for_these_images() -> None:
    with pytest.raises(ValueError, match="the randomness is for 108 images, got 72"):
        patch_augment_v2()(equal_patches(2), randomness(3))


def test_two_steps_of_a_kind_need_two_streams() -> None:
    with pytest.raises(ValueError, match="two steps draw from the stream 'grey'"):
        PatchAugment([RandomGrey(0.5), RandomGrey(0.5)])
    PatchAugment([RandomGrey(0.5), RandomGrey(0.5, stream="grey again")])


# --- the picture


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    out = tmp_path / "new" / "patches.png"
    main(["--image-size", "96", "--size", "32", "--stride", "16", "--out", str(out)])
    assert capsys.readouterr().out == f"wrote {out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 400
    again, other = tmp_path / "again.png", tmp_path / "other.png"
    for file, seed in ((again, "0"), (other, "1")):
        main(["--image-size", "96", "--size", "32", "--stride", "16", "--seed", seed, "--out", str(file)])
    assert out.read_bytes() == again.read_bytes()
    assert out.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.jpg"], "no file nowhere.jpg"),
        (["--image", "."], "can't be read as an image"),
        (["--image-size", "2000"], "the image is 640x427 px, --image-size is 2000: lower it"),
        (["--image-size", "50"], "an image of 50 px is smaller than one patch of 80 px"),
        (["--image-size", "259"], "259 px leave 35 px unused"),
        (["--size", "0"], "must both be at least 1 px"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "patches.png"
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--out", str(out)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_the_picture_is_read_as_training_reads_it(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from contrastive_core.data.images import decode_square

    grey = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(grey).save(tmp_path / "16bit.png")
    Image.fromarray((grey >> 8).astype(np.uint8)).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (64, 64)).save(tmp_path / "clear.png")
    for file in sorted(tmp_path.iterdir()):
        seen = torch.from_numpy(np.array(open_image(file))).permute(2, 0, 1)
        torch.testing.assert_close(seen, decode_square(file.read_bytes(), 64), msg=file.name)


def test_a_broken_png_is_one_line(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "broken.png"
    Image.effect_noise((400, 400), 99).save(file)
    before, _, after = file.read_bytes().rpartition(b"IDAT")  # the last of several
    file.write_bytes(before + b"\x00\x01\x02\x03" + after)
    with pytest.raises(ValueError, match=r"broken\.png can't be read as an image"):
        open_image(file)
