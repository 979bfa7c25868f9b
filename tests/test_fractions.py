"""Label fractions lie inside one another, hold every class, and share the pixels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contrastive_core.data import (
    ImageDataset,
    LabelAmount,
    label_fraction,
    labels_listed,
    labels_per_class,
    names_listed,
    only_labelled,
    sample_ids,
    split_digest,
)
from contrastive_core.data.shards import TarImages


def random_labels(count=600, classes=5, seed=0):
    """Unequal classes, a fifth of the images unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1.0, classes + 2)
    return torch.multinomial(weights, count, replacement=True, generator=generator) - 1


def per_class(labels, chosen):
    return labels[chosen].bincount().tolist()


def test_by_hand():
    labels = torch.tensor([0, 0, 1, 1, -1])
    assert label_fraction(labels, 1.0).tolist() == labels_per_class(labels, 2).tolist() == [0, 1, 2, 3]
    assert per_class(labels, label_fraction(labels, 0.5)) == [1, 1]


@given(first=st.floats(0.02, 1), second=st.floats(0.02, 1), seed=st.integers(0, 99))
def test_a_smaller_fraction_lies_inside_a_larger_one(first, second, seed):
    labels = random_labels()
    small, large = (label_fraction(labels, fraction, seed=seed) for fraction in sorted((first, second)))
    assert set(small.tolist()) <= set(large.tolist())


def test_counts_are_nested_too_and_the_order_is_one():
    labels = torch.arange(5).repeat(40)
    choices = [labels_per_class(labels, count) for count in (1, 2, 5, 20, 40)]
    for count, chosen in zip((1, 2, 5, 20, 40), choices, strict=True):
        assert per_class(labels, chosen) == [count] * 5
        assert torch.equal(chosen, label_fraction(labels, count / 40))
        assert torch.equal(chosen, chosen.sort().values)
    for small, large in itertools.pairwise(choices):
        assert set(small.tolist()) < set(large.tolist())


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.37, 0.999, 1.0])
def test_each_class_keeps_its_share_rounded_and_at_least_one(fraction):
    labels = random_labels()
    found = per_class(labels, label_fraction(labels, fraction))
    assert found == [max(1, round(fraction * int((labels == label).sum()))) for label in range(5)]
    assert (labels[label_fraction(labels, fraction)] >= 0).all()


def test_a_class_of_one_is_there_at_every_fraction():
    labels = torch.tensor([0] * 99 + [7])
    assert 99 in label_fraction(labels, 0.02).tolist()


def test_all_labelled_images_at_one():
    labels = random_labels()
    assert torch.equal(label_fraction(labels, 1.0, seed=3), (labels >= 0).nonzero().flatten())


def test_seeds_differ_and_every_image_is_as_likely():
    labels = torch.arange(2).repeat(10)
    times = torch.zeros(20)
    for seed in range(1000):
        times[label_fraction(labels, 0.3, seed=seed)] += 1
    assert (times - 300).abs().max() < 4 * (1000 * 0.3 * 0.7) ** 0.5  # four standard deviations


def test_an_image_keeps_its_place_when_others_lose_their_labels():
    labels = random_labels()
    before = labels_per_class(labels, 10)
    fewer = labels.clone()
    fewer[~torch.isin(torch.arange(len(labels)), before) & (torch.arange(len(labels)) % 3 > 0)] = -1
    assert torch.equal(labels_per_class(fewer, 10), before)
    renamed = torch.where(labels >= 0, 4 - labels, labels)
    assert torch.equal(labels_per_class(renamed, 10), before)


def test_a_share_is_of_what_there_was_before_some_lost_their_labels():
    """A tenth of 100 images is 10, also where 85 are left; all of them are those that are left."""
    before = torch.arange(2).repeat(100)
    after = before.clone()
    after[:30] = -1
    chosen = label_fraction(after, 0.1, of=before)
    assert len(chosen) == 20
    assert set(label_fraction(after, 0.1).tolist()) < set(chosen.tolist()), "of 85: the same, less one or two"
    assert torch.equal(label_fraction(after, 1.0, of=before), (after >= 0).nonzero().flatten())


def test_torchs_generator_has_no_part_in_it():
    labels, before = random_labels(), torch.get_rng_state()
    first = label_fraction(labels, 0.1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(label_fraction(labels, 0.1), first)


def test_the_choice_is_the_one_it_was():
    """A curve that is drawn again after an upgrade has the same points."""
    assert labels_per_class(torch.arange(2).repeat(8), 2).tolist() == FIRST


FIRST = [3, 6, 8, 13]


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 1, 0], 0.0, r"fraction 0.0: pass a share of the labelled images above 0 and at most 1"),
        ([0, 1, 0], -0.1, "fraction -0.1"),
        ([0, 1, 0], 1.1, "fraction 1.1"),
        ([0, 1, 0], 10, "fraction 10"),
        ([0, 1, 0], float("nan"), "fraction nan"),
        ([-1, -1], 0.5, "none of 2 images has a label"),
        (
            [0] * 50 + [1] * 50,
            0.01,
            r"0.01 of 100 labelled images is less than one for each of 2 .*0.02, or labels_per",
        ),
        ([[0, 1]], 0.5, r"int64 of shape \(1, 2\)"),
        ([0.0, 1.0], 0.5, "float32"),
    ],
)
def test_fractions_that_cannot_be_had(labels, fraction, message):
    with pytest.raises(ValueError, match=message):
        label_fraction(torch.tensor(labels), fraction)


@pytest.mark.parametrize(("classes", "labelled"), [(2, 100), (29, 100), (7, 1000), (3, 7), (11, 12)])
def test_the_fraction_that_an_error_names_can_be_had(classes, labelled):
    labels = torch.arange(labelled) % classes
    with pytest.raises(ValueError, match="pass at least") as error:
        label_fraction(labels, 0.9 * classes / labelled)
    named = float(str(error.value).split("pass at least ")[1].split(",")[0])
    assert len(label_fraction(labels, named).unique()) >= classes


@pytest.mark.parametrize("count", [0, -1, 4])
def test_counts_that_cannot_be_had(count):
    with pytest.raises(ValueError, match=f"{count} labels a class, the rarest of 2 classes has 3: pass 1 to 3"):
        labels_per_class(torch.tensor([0, 0, 0, 1, 1, 1, 1, -1]), count)


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        (LabelAmount("labels", 40), "labels=40"),
        (LabelAmount("labels", 40.0), "labels=40"),
        (LabelAmount("labels_per_class", 3), "labels_per_class=3"),
        (LabelAmount("fraction", 0.01), "fraction=0.01"),
        (LabelAmount("fraction", 1), "fraction=1"),
    ],
)
def test_amounts_and_how_they_are_said(amount, said):
    assert str(amount) == said


def test_an_amount_of_each_kind_by_hand():
    labels = torch.tensor([0, 0, 1, 1, -1])
    assert LabelAmount("labels", 4).choose(labels).tolist() == [0, 1, 2, 3]
    assert per_class(labels, LabelAmount("labels", 2).choose(labels)) == [1, 1]
    assert per_class(labels, LabelAmount("labels_per_class", 2).choose(labels)) == [2, 2]
    assert per_class(labels, LabelAmount("fraction", 0.5).choose(labels)) == [1, 1]


def test_amounts_of_all_kinds_lie_inside_one_another():
    """One order for all kinds, whatever the seed and the identities: the same images come first."""
    labels, ids = torch.arange(5).repeat(40), torch.randint(1 << 62, (200,), generator=torch.Generator().manual_seed(3))
    ladder = [
        LabelAmount("labels_per_class", 1),
        LabelAmount("labels", 10),
        LabelAmount("fraction", 0.1),
        LabelAmount("labels_per_class", 7),
        LabelAmount("labels", 50.0),
        LabelAmount("fraction", 1.0),
    ]
    seen = set()
    for options in ({}, {"seed": 4}, {"seed": 4, "ids": ids}):
        choices = [set(amount.choose(labels, **options).tolist()) for amount in ladder]
        assert [len(choice) for choice in choices] == [5, 10, 20, 35, 50, 200]
        assert all(small < large for small, large in itertools.pairwise(choices))
        seen.add(frozenset(choices[1]))
    assert len(seen) == 3, "seed and identities both matter"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("labels", 7, "labels=7 for 2 classes: pass a multiple, 6 or 8"),
        ("labels", 1, "labels=1 for 2 classes: pass a multiple, 2 or 4"),
        ("labels", 0, "labels=0 for 2 classes: pass a multiple, 2 or 4"),
        ("labels", -2, "labels=-2 for 2 classes: pass a multiple, 2 or 4"),
        ("labels", 2.5, "labels=2.5: pass fraction=F, or whole numbers as labels=N or labels_per_class=N"),
        ("labels_per_class", 0.5, "labels_per_class=0.5: pass fraction=F, or whole numbers"),
        ("share", 0.5, "share=0.5: pass fraction=F, or whole numbers"),
        ("labels", 8, "4 labels a class, the rarest of 2 classes has 3: pass 1 to 3"),
        ("labels_per_class", 4, "4 labels a class, the rarest of 2 classes has 3: pass 1 to 3"),
        ("labels_per_class", 0, "0 labels a class, the rarest of 2 classes has 3: pass 1 to 3"),
        ("fraction", 1.5, r"fraction 1\.5: pass a share of the labelled images above 0 and at most 1"),
    ],
)
def test_amounts_that_cannot_be_had(kind, value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LabelAmount(kind, value).choose(torch.tensor([0, 0, 0, 1, 1, 1, 1, -1]))


@pytest.mark.parametrize("amount", [LabelAmount("labels", 2), LabelAmount("fraction", 0.5)])
def test_no_amount_can_be_had_of_no_labels(amount):
    with pytest.raises(ValueError, match="none of 2 images has a label"):
        amount.choose(torch.tensor([-1, -1]))


def dataset(bad=()):
    pixels = torch.arange(12, dtype=torch.uint8)[:, None, None].expand(12, 4, 4).numpy()
    source = [b"no image" if i in bad else image for i, image in enumerate(pixels)]
    return ImageDataset(source, size=4, labels=[0, 1, -1] * 4, class_names=["cat", "dog"])


@pytest.mark.parametrize("cache", [False, True])
def test_only_the_chosen_labels_are_left(cache):
    whole = dataset(bad=(3,)).cached() if cache else dataset(bad=(3,))
    chosen = torch.tensor([3, 4, 10])
    few = only_labelled(whole, chosen)
    assert few.labels.tolist() == [-1, -1, -1, 0, 1, -1, -1, -1, -1, -1, 1, -1]
    assert whole.labels.tolist() == [0, 1, -1] * 4, "the labels of the other are its own"
    assert few.class_names == ("cat", "dog")
    for i in range(12):
        one, other = whole[i], few[i]
        assert torch.equal(one.image, other.image)
        assert (one.index, one.fault) == (other.index, other.fault)
        assert other.label == (one.label if one.index in chosen else -1)
    assert few[3].index == 4
    assert few.source is whole.source
    if cache:
        assert few.pixels.data_ptr() == whole.pixels.data_ptr()
        assert few.faults == whole.faults
        assert torch.equal(few.stand_ins(torch.arange(12)), whole.stand_ins(torch.arange(12)))


def test_a_fraction_of_a_data_set():
    whole = dataset().cached()
    assert torch.equal(only_labelled(whole, label_fraction(whole.labels, 1.0)).labels, whole.labels)
    half = only_labelled(whole, label_fraction(whole.labels, 0.5))
    assert half.labels[half.labels >= 0].bincount().tolist() == [2, 2]
    assert only_labelled(whole, torch.tensor([], dtype=torch.int64)).labels.max() == -1


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 12], "run from 0 to 12 for 12 images: pass 0 to 11"),
        ([-1], "run from -1"),
        ([0, 2, 5], "2 of the indices have no label, the first is 2"),
    ],
)
def test_labels_that_are_not_there_cannot_be_kept(indices, message):
    with pytest.raises(ValueError, match=message):
        only_labelled(dataset(), torch.tensor(indices))


# ---- who an image is, and lists that others have made ----


def encoded(count=12):
    return [bytes([index]) * 9 for index in range(count)]


def test_an_identity_goes_with_the_content_not_with_the_place():
    source = encoded()
    ids = sample_ids(ImageDataset(source, size=4))
    assert len(ids.unique()) == 12
    assert torch.equal(sample_ids(ImageDataset(source[::-1], size=4)), ids.flip(0))
    pixels = torch.arange(48, dtype=torch.uint8).view(3, 4, 4).numpy()
    one, other = (sample_ids(ImageDataset(given, size=4)) for given in (pixels, [pixels[0], pixels[1], pixels[2]]))
    assert torch.equal(one, other)


def test_a_files_identity_is_its_name_and_folder():
    here, there = (
        sample_ids(ImageDataset([Path(root, name) for name in ("cat/1.png", "dog/1.png")], size=4))
        for root in ("/a", "b/c")
    )
    assert torch.equal(here, there)
    assert here[0] != here[1]


def test_a_shuffled_copy_gives_the_same_split():
    source, labels = encoded(40), [index % 4 for index in range(40)]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    first = ImageDataset(source, size=4, labels=labels)
    second = ImageDataset([source[i] for i in order], size=4, labels=[labels[i] for i in order])
    digests = []
    for dataset in (first, second):
        ids = sample_ids(dataset)
        chosen = labels_per_class(dataset.labels, 3, seed=5, ids=ids)
        digests.append(split_digest(ids, dataset.labels, chosen))
        assert split_digest(ids, dataset.labels, chosen.flip(0)) == digests[-1]
        assert split_digest(ids, dataset.labels, chosen[1:]) != digests[-1]
        wrong = dataset.labels.clone()
        wrong[chosen[0]] += 1
        assert split_digest(ids, wrong, chosen) != digests[-1]
    assert digests == ["fdfa71b42f1b"] * 2, "stable over processes, machines and Python versions"


def test_nesting_holds_by_identity_too():
    labels, ids = random_labels(), torch.randint(1 << 62, (600,), generator=torch.Generator().manual_seed(3))
    choices = [set(label_fraction(labels, share, seed=2, ids=ids).tolist()) for share in (0.02, 0.05, 0.2, 1.0)]
    assert all(small < large for small, large in itertools.pairwise(choices))
    assert choices[0] != set(label_fraction(labels, 0.02, seed=2).tolist())


def listed(tmp_path, text, labels=(0, 1, 0, -1)):
    (tmp_path / "list.txt").write_text(text)
    paths = [Path("/data") / name for name in ("a/1.JPEG", "b/2.JPEG", "a/3.JPEG", "a/4.JPEG")]
    dataset = ImageDataset(paths, size=4, labels=list(labels), class_names=["a", "b"])
    return labels_listed(dataset, tmp_path / "list.txt")


@pytest.mark.parametrize("text", ["3.JPEG\n1.JPEG\n", "\n a/1.JPEG\r\n\nelsewhere/3.JPEG"])
def test_a_list_of_file_names(text, tmp_path):
    assert listed(tmp_path, text).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no name: pass a list of this data set's file names"),
        ("1.JPEG\n5.JPEG", "0 labelled images are called 5.JPEG"),
        ("4.JPEG", "0 labelled images are called 4.JPEG"),
        ("1.JPEG\n1.JPEG", "1.JPEG stands there 2 times"),
        ("1.JPEG\nb/1.JPEG", "1.JPEG stands there 2 times"),
        ("1", "0 labelled images are called 1:"),
    ],
)
def test_lists_of_other_names_are_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, text)


def test_lists_as_other_systems_write_them(tmp_path):
    file = tmp_path / "list.txt"
    for content in (b"\xef\xbb\xbf3.JPEG\r\n1.JPEG", b"3.JPEG\n\x0c1.JPEG\n"):
        file.write_bytes(content)
        assert names_listed(file) == ["3.JPEG", "1.JPEG"]
    file.write_bytes(b"caf\xe9.JPEG")
    with pytest.raises(ValueError, match=r"list\.txt is no text in UTF-8: pass a list of this data set's file names"):
        names_listed(file)


def test_images_in_tar_shards_are_known_by_their_keys(tmp_path):
    """Whose names end at the first dot (the webdataset package)."""
    keys = np.array(["n01/n01_1", "n01_2", "n02/n02_1"])
    source = TarImages(["a.tar"], np.zeros(3, int), np.zeros(3, int), np.ones(3, int), keys)
    dataset = ImageDataset(source, size=4, labels=[0, 0, 1])
    file = tmp_path / "list.txt"
    file.write_text("n02_1.JPEG\nn01/n01_2.JPEG\n")
    assert labels_listed(dataset, file).tolist() == [1, 2]
    file.write_text("n02_1.JPEG\nn02_1.png\n")
    with pytest.raises(ValueError, match="n02_1 stands there twice"):
        labels_listed(dataset, file)


def test_a_name_that_two_images_have_and_a_missing_list(tmp_path):
    paths = ImageDataset([Path("a/1.png"), Path("b/1.png")], size=4, labels=[0, 1])
    (tmp_path / "list.txt").write_text("1.png\n")
    with pytest.raises(ValueError, match=r"2 labelled images are called 1\.png"):
        labels_listed(paths, tmp_path / "list.txt")
    with pytest.raises(FileNotFoundError, match="pass a list of image file names"):
        labels_listed(paths, tmp_path / "none.txt")
