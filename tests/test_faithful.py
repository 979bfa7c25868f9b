"""docs/paper.md says what the composed recipe is: every `key=value` of its tables is looked up."""

from __future__ import annotations

import inspect
import re

import pytest
import yaml
from conftest import CHECKOUT
from omegaconf import OmegaConf

from cpc.patch_augment import patch_augment_v2

PAGE = (CHECKOUT / "docs" / "paper.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
POINTS = [row for row in ROWS if len(row) == 5 and row[0] != "point"]
ELSEWHERE = ("paper_epochs", "protocols", "mode")
"""Keys of other tools."""
CLAIMS = [
    (key, value)
    for row in POINTS
    for key, value in re.findall(r"`([\w.]+)=([^`]+)`", row[3])
    if key.partition("=")[0] not in ELSEWHERE
]


@pytest.fixture(scope="module")
def recipe():
    import hydra

    import cpc.pretrain  # noqa: F401  # registers the schema
    from cpc.configs import config_folder

    with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
        cfg = hydra.compose("pretrain_cpc", ["experiment=imagenet_cpc_v2", "data.root=none"])
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


def read(value: str) -> object:
    """As YAML has it, whose numbers need a point: 4e-4 is written 4.0e-4 there."""
    return yaml.safe_load(re.sub(r"\b(\d+)e-", r"\1.0e-", value))


@pytest.mark.parametrize(("key", "value"), CLAIMS)
def test_what_the_page_says_is_what_is_composed(key, value, recipe):
    function, _, argument = key.partition(".")
    if function == "patch_augment_v2":
        given = {k: v for k, v in recipe.views.patch_augment.items() if k != "_target_"}
        found = given.get(argument, inspect.signature(patch_augment_v2).parameters[argument].default)
    else:
        found = OmegaConf.select(recipe, key, throw_on_missing=True)
        found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
    assert found == read(value)


def test_the_page_covers_the_recipe():
    keys = {key for key, _ in CLAIMS}
    assert {"patch.size", "patch.stride", "method.offsets", "optimizer.lr", "batch_size", "clip", "averaging"} <= keys
    assert {f"patch_augment_v2.{name}" for name in ("primitives", "elastic", "histogram", "colour", "grey")} <= keys
    assert len(POINTS) >= 35


@pytest.mark.parametrize("row", POINTS, ids=lambda row: row[0])
def test_each_point_has_a_word_for_how_sure_it_is_and_files_that_exist(row):
    words = re.findall(r"paper|quoted|derived|believed|unknown", row[2])
    assert words
    for name, target in re.findall(r"\[(.*?)\]\((.*?)\)", row[4]):
        assert (CHECKOUT / "docs" / target).resolve().is_file()
        assert target.endswith(name)
