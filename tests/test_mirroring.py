"""How often labelled images are mirrored, by what runs say."""

import os

import pytest
import yaml

from cpc.mirroring import labelled_flip

MIRRORS = {"pipelines": [{"flip": None}]}
TABLE = "contrastive_core.data.parquet"
SHARDS = "contrastive_core.data.webdataset"


@pytest.fixture
def run_on(tmp_path):
    """`run_on(data, augmentation)`: the folder of a run that says so."""

    def folder(data, **augmentation):
        made = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        made.mkdir()
        (made / "config.yaml").write_text(yaml.safe_dump({"data": data, "augmentation": augmentation}))
        return str(made)

    return folder


@pytest.mark.parametrize(
    ("theirs", "mine", "told"),
    [
        ({"train": "a.parquet"}, {"train": "a.parquet"}, False),
        ({"train": "a.parquet"}, {"train": "b.parquet"}, True),
        ({"train": "a.parquet", "size": 32}, {"train": "a.parquet", "test": "b.parquet", "size": 64}, False),
        ({"_target_": SHARDS, "train": "a"}, {"_target_": SHARDS, "train": "a", "index": "i"}, False),
        ({"train": "a"}, {"_target_": SHARDS, "train": "a"}, True),
    ],
)  # fmt: skip
def test_of_images_that_a_run_was_trained_on_nothing_is_guessed(run_on, caplog, theirs, mine, told):
    run = run_on({"_target_": TABLE, **theirs}, flip=0.25)
    assert labelled_flip({"_target_": TABLE, **mine}, [run], MIRRORS) == 0.25
    said = f"{run} does not say that it was trained on these images, which are mirrored with a probability of 0.25: "
    assert (said in caplog.text) == told


def test_a_path_is_the_same_from_everywhere(run_on, tmp_path, monkeypatch, caplog):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    run = run_on({"_target_": TABLE, "train": "a.parquet"}, flip=0.5)
    assert labelled_flip({"_target_": TABLE, "train": str(tmp_path / "a.parquet")}, [run], MIRRORS) == 0.5
    assert labelled_flip({"_target_": TABLE, "train": os.path.join("..", tmp_path.name, "a.parquet")}, [run], {}) == 0.5
    assert not caplog.text


def test_the_least_that_runs_say_counts_and_several_are_no_one(run_on, caplog):
    data = {"_target_": TABLE, "train": "other.parquet"}
    runs = [run_on({"_target_": TABLE, "train": "a.parquet"}, flip=flip) for flip in (0.5, 0.0, None)]
    assert labelled_flip(data, runs, MIRRORS) == 0.0
    assert (
        "no run says that it was trained on these images, which are not mirrored: pass augmentation.flip=0.5"
        in caplog.text
    )
    assert labelled_flip(data, runs[2:], MIRRORS) is None
    assert "mirrored with a probability of 0.5: pass augmentation.flip=0 where left and right differ" in caplog.text


def test_views_that_cannot_mirror_and_other_processes_say_nothing(run_on, caplog, monkeypatch):
    data = {"_target_": TABLE, "train": "other.parquet"}
    run = run_on({"_target_": TABLE, "train": "a.parquet"}, flip=0.5)
    assert labelled_flip(data, [run], {"pipelines": [{"size": 28}]}) == 0.5
    monkeypatch.setenv("RANK", "1")
    assert labelled_flip(data, [run], MIRRORS) == 0.5
    assert not caplog.text


def test_digits_are_never_mirrored(run_on, caplog):
    run = run_on({"_target_": TABLE, "train": "a.parquet"}, flip=0.5)
    assert labelled_flip({"_target_": "contrastive_core.data.mnist5k"}, [run], MIRRORS) == 0
    assert not caplog.text
