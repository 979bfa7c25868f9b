"""The transformer of scikit-learn: our features, and scikit-learn's habits."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from einops import rearrange
from export_runs import images, write_cpc_run
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_is_fitted

import cpc
from contrastive_core.data.images import UndecodableImage
from contrastive_core.evaluate.features import pool_grid
from cpc.sklearn_features import CPCFeatures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_cpc_run(tmp_path_factory.mktemp("cpc") / "run")


def pixels(count=7, size=16):
    return np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)


def as_tensor(array):
    return rearrange(torch.from_numpy(array), "b h w c -> b c h w").float() / 255


def relative(found, expected):
    return float(np.abs(found - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


@pytest.mark.parametrize(("readout", "columns"), [("mean", 8), ("2x2", 32), ("grid", 72), ("context", 360)])
def test_the_features_are_ours(run, readout, columns):
    encode = cpc.load_encoder(run, readout="grid" if readout == "2x2" else readout)
    expected = encode(as_tensor(pixels()))
    expected = pool_grid(expected, 2) if readout == "2x2" else rearrange(expected, "b ... -> b (...)")
    transformer = CPCFeatures(run, readout=readout, batch_size=3)
    found = transformer.fit_transform(pixels())
    assert found.shape == (7, columns)
    assert found.dtype == np.float32
    assert relative(found, expected) < 1e-5
    names = transformer.get_feature_names_out()
    assert (len(names), names[0], names[-1]) == (columns, "cpcfeatures0", f"cpcfeatures{columns - 1}")


def test_every_kind_of_images_is_taken(run, tmp_path):
    expected = cpc.load_encoder(run)(as_tensor(pixels()))
    pictures = [Image.fromarray(array) for array in pixels()]
    paths = [tmp_path / f"{place}.png" for place in range(7)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    transformer = CPCFeatures(run, batch_size=4)
    floats = as_tensor(pixels()).numpy()
    for kind in (
        floats,
        floats.astype(np.float64),
        pictures,
        paths,
        list(map(str, paths)),
        np.array(paths, dtype=object),
    ):
        assert relative(transformer.transform(kind), expected) < 1e-5
    assert relative(transformer.transform(np.array([str(path) for path in paths])), expected) < 1e-5
    assert relative(transformer.transform(pictures[:3] + paths[3:]), expected) < 1e-5


def test_files_of_any_size_and_mode(run, tmp_path):
    Image.fromarray(pixels(1, 40)[0]).crop((0, 0, 40, 25)).convert("L").save(tmp_path / "grey.png")
    Image.new("RGBA", (90, 30)).save(tmp_path / "clear.png")
    turned = Image.new("RGB", (32, 16), "red")
    turned.getexif()[0x0112] = 6
    files = [tmp_path / "grey.png", tmp_path / "clear.png"]
    assert CPCFeatures(run).transform([*files, turned]).shape == (3, 8)
    white = CPCFeatures(run).transform(np.full((1, 16, 16, 3), 255, np.uint8))
    assert relative(CPCFeatures(run).transform([tmp_path / "clear.png"]), white) < 1e-5
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(UndecodableImage, match=r"broken\.png: cannot identify"):
        CPCFeatures(run).transform([tmp_path / "broken.png"])
    with pytest.raises(UndecodableImage, match=r"typo\.png: "):
        CPCFeatures(run).transform([tmp_path / "typo.png"])


def test_in_a_pipeline(run):
    images_, labels = pixels(24), np.arange(24) % 2
    images_[labels == 1, ..., 0] //= 4
    probe = make_pipeline(CPCFeatures(run, readout="2x2"), StandardScaler(), LogisticRegression(max_iter=1000))
    assert probe.fit(images_, labels).score(images_, labels) == 1
    again = pickle.loads(pickle.dumps(probe))
    assert np.array_equal(again.predict_proba(images_), probe.predict_proba(images_))
    scores = cross_val_score(probe, [Image.fromarray(each) for each in images_], labels, cv=3)
    assert scores.shape == (3,)
    assert scores.mean() > 0.8


def test_scikit_learns_habits(run):
    transformer = CPCFeatures(run, readout="grid", batch_size=5)
    given = {"path": run, "readout": "grid", "mode": None, "batch_size": 5, "device": "cpu"}
    assert transformer.get_params() == given
    assert clone(transformer).get_params() == given
    assert vars(transformer) == given, "the constructor stores what it is given and nothing else"
    check_is_fitted(transformer)
    assert transformer.fit(pixels(), np.zeros(7)) is transformer
    assert "_read" not in vars(clone(transformer))
    assert len(pickle.dumps(transformer)) < 1000
    assert f"path={run!r}"[:20] in repr(transformer).replace("\n", "")[:60]
    before = transformer.transform(pixels())
    assert before.shape == (7, 72)
    assert transformer.set_params(readout="mean").transform(pixels()).shape == (7, 8)
    assert relative(transformer.set_params(readout="grid", batch_size=2).transform(pixels()), before) < 1e-5
    framed = CPCFeatures(run).set_output(transform="pandas").transform(pixels())
    assert list(framed.columns) == [f"cpcfeatures{place}" for place in range(8)]
    with pytest.raises(NotFittedError):
        make_pipeline(CPCFeatures(run), LogisticRegression()).predict(pixels())


def test_the_whole_image(run):
    expected = cpc.load_encoder(run, mode="image")(images(3, 16))
    assert relative(CPCFeatures(run, mode="image").transform(images(3, 16).numpy()), expected) < 1e-5


@pytest.mark.parametrize(
    ("wrong", "came"),
    [
        (np.zeros((2, 3, 16, 16), np.uint8), r"an array \(2, 3, 16, 16\) of uint8"),
        (np.zeros((2, 16, 16, 3), np.float32), r"an array \(2, 16, 16, 3\) of float32"),
        (np.zeros((16, 16, 3), np.uint8), r"an array \(16, 16, 3\) of uint8"),
        (np.zeros((2, 8)), r"an array \(2, 8\) of float64"),
        (np.zeros((2, 3, 4, 4), np.int64), r"an array \(2, 3, 4, 4\) of int64"),
        (np.full((2, 3, 4, 4), 200.0), "floats from 200 to 200"),
        (np.full((2, 3, 4, 4), np.nan), "floats from nan to nan"),
        (np.zeros((0, 16, 16, 3), np.uint8), "no image"),
        ([], "no image"),
        ([b"x"], "a list with a bytes"),
        ("photo.png", "a str"),
        (3, "a int"),
    ],
)
def test_what_are_no_images_is_named(run, wrong, came):
    for method in ("fit", "transform"):
        with pytest.raises(ValueError, match=f"images are {came}: pass an array n h w 3 of uint8"):
            getattr(CPCFeatures(run), method)(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"readout": "max"}, "readout='max': pass one of"),
        ({"readout": "2x3"}, "readout='2x3': pass one of"),
        ({"readout": "4x4"}, "4 x 4 cells: pass"),
        ({"batch_size": 0}, "batch_size=0: pass at least 1"),
        ({"batch_size": 2.5}, r"batch_size=2\.5: pass at least 1"),
        ({"mode": "pixels"}, "mode='pixels'"),
    ],
)
def test_wrong_parameters_are_named_when_used(run, wrong, said):
    transformer = CPCFeatures(run, **wrong)
    with pytest.raises(ValueError, match=said):
        transformer.transform(pixels())
    with pytest.raises(FileNotFoundError, match="no typo in"):
        CPCFeatures(run / "typo").fit(pixels())
