"""Ablations: what their YAML composes to, a small grid to its end and on again, and the figures."""

import csv
import io
import json
import math
from pathlib import Path

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

import cpc.ablate
from contrastive_core.ablation_plots import heatmap_figure, line_figure
from contrastive_core.data import ImageDataset, Splits, mnist5k
from contrastive_core.plots import save_figure
from contrastive_core.run_log import RunLog, read_metrics
from cpc.ablate import (
    Cell,
    Grid,
    ablate,
    arguments,
    cells_of,
    distinct,
    evaluation_splits,
    folder_name,
    main,
    merged_overrides,
    read_grid,
    steps_in,
    time_left,
    values_of,
)
from cpc.configs import config_folder
from cpc.entry import build
from cpc.pretrain import build_method
from cpc.run import plain

# --- the grids that come with the package

NAMES = sorted(file.stem for file in Path(config_folder(), "ablation").glob("*.yaml"))


@pytest.fixture(scope="module")
def composed():
    """`composed("head")`: the grid and, by (row, column), the resolved configuration of the cells that cover it.

    Every row and every column is among them; a cell takes a sixth of a second, all of them a minute.
    """
    known = {}

    def of(name):
        if name not in known:
            with hydra.initialize_config_dir(config_folder(), version_base="1.3"):
                grid = read_grid(hydra.compose("ablate", [f"ablation={name}", "out=x"]))
                known[name] = grid, {(c.row, c.column): cpc.ablate.compose(c, Path("x")) for c in covering(grid)}
        return known[name]

    return of


def covering(grid):
    """The first row, a cell of every further row or column, and the last cell."""
    cells = cells_of(grid)
    rows, columns, kept = set(), set(), []
    for cell in cells:
        if cell.row not in rows or cell.column not in columns or cell is cells[-1]:
            kept.append(cell)
            rows |= {cell.row, cell.column} if grid.symmetric else {cell.row}
            columns.add(cell.column)
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_every_ablation_composes_and_no_two_cells_are_alike(composed, name):
    grid, cells = composed(name)
    different = {json.dumps({**plain(cfg), "run_dir": None}, sort_keys=True) for cfg in cells.values()}
    assert len(different) == len(cells)
    assert len(cells_of(grid)) >= 8
    for cfg in cells.values():
        assert cfg.resume == "auto"
        assert cfg.data._target_ == "contrastive_core.data.mnist5k"
        assert cfg.probe_every == 0
    assert {label for cell in cells for label in cell} == set(grid.rows) | set(grid.columns)


@pytest.mark.parametrize("name", NAMES)
def test_the_corners_of_every_ablation_build(composed, name):
    _, cells = composed(name)
    for cfg in (next(iter(cells.values())), next(reversed(cells.values()))):
        build_method(cfg)


def steps_of(views):
    return [[type(step).__name__ for step in pipeline] for pipeline in views.pipelines]


def test_pairs_are_the_whole_pipeline_of_both_views_or_of_one(composed):
    _, cells = composed("augmentation_pairs")
    assert steps_of(build(cells["crop", "crop"].views)) == [["RandomResizedCrop"]] * 2
    assert steps_of(build(cells["crop", "jitter"].views)) == [["RandomResizedCrop", "ColourJitter"]] * 2
    assert steps_of(build(cells["elastic", "elastic"].views)) == [["CentreFit", "ElasticDeformation"]] * 2
    _, cells = composed("augmentation_pairs_one_branch")
    assert steps_of(build(cells["crop", "blur"].views)) == [["RandomResizedCrop", "GaussianBlur"], ["CentreFit"]]
    grid, _ = composed("augmentation_pairs_photos")
    assert len(cells_of(grid)) == 11 * 12 / 2


def test_equal_epochs_are_equal_numbers_of_images_and_the_rate_goes_with_the_root_of_the_batch(composed):
    _, cells = composed("batch_epochs")
    for (_, epochs), cfg in cells.items():
        assert abs(cfg.steps - int(epochs) * 4000 / cfg.batch_size) <= 0.5
        assert cfg.optimizer.lr == pytest.approx(0.0027 * math.sqrt(cfg.batch_size))
    assert {cfg.batch_size for cfg in cells.values()} == {32, 64, 128, 256}


def test_heads_and_temperatures_are_what_their_labels_say(composed):
    _, cells = composed("head")
    built = {place: build(cfg.method.head)(64) for place, cfg in cells.items()}
    assert all(isinstance(head, torch.nn.Identity) for (row, _), head in built.items() if row == "none")
    layers = {"MLP": 2, "linear": 1}
    for (row, column), head in built.items():
        if row != "none":
            assert (head.dim, len(head.layers)) == (int(column), layers[row])
    _, cells = composed("temperature")
    for (row, temperature), cfg in cells.items():
        loss = cfg.method.loss
        assert loss._target_.endswith("nt_xent" if "cosine" in row else "two_view_info_nce")
        assert loss.temperature == float(temperature)


# --- the grid as data

LABELS = {"rows": {"a": ["seed=1"], "b": []}, "columns": {"a": ["steps=3"], "b": ["steps=4"]}}


def grid(**changes):
    return Grid(**{"title": "a grid", "every": ["steps=1", "seed=0"], **LABELS, **changes})


def test_a_columns_override_wins_over_a_rows_over_the_command_lines_over_the_grids():
    cells = cells_of(grid(), ["seed=7", "steps=8", "clip=1"])
    assert [cell.folder for cell in cells] == ["a/a", "a/b", "b/a", "b/b"]
    assert set(cells[0].overrides) == {"seed=1", "steps=3", "clip=1"}
    assert set(cells[3].overrides) == {"seed=7", "steps=4", "clip=1"}


def test_a_symmetric_grid_runs_its_upper_half_and_some_cells_may_be_left_out():
    assert [cell.folder for cell in cells_of(grid(symmetric=True))] == ["a/a", "a/b", "b/b"]
    assert [cell.folder for cell in cells_of(grid(leave_out={"b": ["a"]}))] == ["a/a", "a/b", "b/b"]


def test_values_are_where_their_cell_is_and_a_symmetric_grid_is_mirrored():
    results = [(Cell("a", "b", [], "a/b"), {"knn": 0.25}), (Cell("b", "b", [], "b/b"), {"knn": 0.5})]
    nan = math.nan
    np.testing.assert_array_equal(values_of(grid(), results, "knn"), [[nan, 0.25], [nan, 0.5]])
    np.testing.assert_array_equal(values_of(grid(symmetric=True), results, "knn"), [[nan, 0.25], [0.25, 0.5]])
    assert np.isnan(values_of(grid(), results, "linear")).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"figure": "pie"}, "figure=pie: pass one of heatmap, lines"),
        ({"rows": {}}, "the rows .* are none"),
        ({"columns": {"t 1": [], "t/1": []}}, "share a folder"),
        ({"symmetric": True, "rows": {"c": []}}, "symmetric, but rows"),
        ({"leave_out": {"c": ["a"]}}, "leave_out names c"),
        ({"leave_out": {"a": ["c"]}}, "leave_out names a"),
    ],
)
def test_a_grid_that_makes_no_sense_is_told(changes, words):
    with pytest.raises(ValueError, match=words):
        cells_of(grid(**changes))


def test_the_later_override_stays_and_a_group_takes_its_keys_along():
    assert merged_overrides(["a=1", "b=2"], ["a=3"]) == ["b=2", "a=3"]
    assert merged_overrides(["+a.b=1", "a.c=1"], ["a=x", "a.c=2"]) == ["a=x", "a.c=2"]
    assert merged_overrides(["ab=1", "encoder.width=1"], ["a=1"]) == ["ab=1", "encoder.width=1", "a=1"]


def test_folder_names_are_fit_for_a_shell():
    assert folder_name("InfoNCE (dot product), t=0.1/2") == "InfoNCE-dot-product-t-0.1-2"
    assert folder_name("../up") == "up"


def test_time_left_goes_by_the_images():
    assert time_left([(100, 60.0)], [100, 200]) == "2 cells left, about 3 min"
    assert time_left([(100, 6.0), (100, 2.0)], [50]) == "1 cell left, about 2 s"
    assert time_left([(1, 3600.0)], [2]) == "1 cell left, about 2.0 h"
    assert time_left([(1, 1.0)], []) == "none left"


def test_what_is_not_the_tools_own_is_for_the_cells():
    given = ["ablation=head", "steps=9", "ablation.figure=lines", "--config-dir", "there", "+a.b='x y'", "-c", "~clip"]
    own = arguments([*given, "encoder=timm", "hydra.verbose=true", "data.root='a\\'"])
    assert own[:-1] == ["--config-dir", "there", "-c", "ablation=head", "ablation.figure=lines", "hydra.verbose=true"]
    (parsed,) = OverridesParser.create().parse_overrides([own[-1]])
    assert parsed.value() == ["steps=9", "+a.b='x y'", "~clip", "encoder=timm", "data.root='a\\'"]
    assert arguments(["out=x"]) == ["out=x"]
    assert arguments(["out=x", "mean=0,0,0"]) == ["out=x", "overrides=['mean=[0,0,0]']"]


def test_resolvers():
    assert distinct("a", "b", "a") == ["a", "b"]

    root = OmegaConf.create({"data": {"_target_": "contrastive_core.data.mnist5k", "size": 28}, "batch_size": 64})
    assert steps_in(5, _root_=root) == 312
    assert steps_in(0.001, _root_=root) == 1


# --- evaluating on other images than those of the test


def test_validation_is_a_fixed_fifth_of_each_class_and_test_images_are_left_alone():
    splits = mnist5k()
    first, again = (evaluation_splits(splits, "validation") for _ in range(2))
    assert (len(first.train), len(first.test)) == (3200, 800)
    assert first.test.labels.bincount().tolist() == [80] * 10
    assert torch.equal(first.test.pixels, again.test.pixels)
    seen = [{image.numpy().tobytes() for image in part.pixels} for part in (first.train, first.test, splits.test)]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]
    assert evaluation_splits(splits, "test").test is splits.test
    with pytest.raises(ValueError, match="evaluate_on=train: pass one of test, validation"):
        evaluation_splits(splits, "train")


def test_data_without_test_images_will_do_for_validation_only():
    pixels = np.zeros((20, 4, 4, 3), dtype=np.uint8)
    splits = Splits(ImageDataset(pixels, size=4, labels=[0, 1] * 10), None)
    assert len(evaluation_splits(splits, "validation").test) == 4
    with pytest.raises(ValueError, match="there are no test images"):
        evaluation_splits(splits, "test")


# --- a grid of 2 x 2 runs of two steps

SMALL = """
title: small
every:
  - method=simclr
  - data=parquet
  - data.train='{train}'
  - data.test='{test}'
  - image_size=16
  - encoder.width=4
  - method.head.out=8
  - batch_size=8
  - steps=2
  - probe_every=0
  - log_every=1
  - threads=1
rows: {{one layer: [method.head.layers=1], two: [method.head.layers=2]}}
columns: {{s 0: [seed=0], s 1: [seed=1]}}
head: true
show: {{before: linear, after: linear_head}}
"""


def write_parquet(path, count):
    """`count` pictures of 16 px, black with a white square whose place is one of four classes."""
    rows = {"image": [], "label": []}
    for i in range(count):
        image = Image.new("RGB", (16, 16))
        image.paste("white", ((i % 4) * 4, i % 7, (i % 4) * 4 + 4, i % 7 + 5))
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        rows["image"].append(encoded.getvalue())
        rows["label"].append(i % 4)
    pq.write_table(pa.table(rows), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with an ablation of one's own, for --config-dir."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "ablation").mkdir()
    files = {name: write_parquet(folder / f"{name}.parquet", count) for name, count in (("train", 40), ("test", 20))}
    (folder / "ablation/small.yaml").write_text(SMALL.format(**files))
    return folder


@pytest.fixture
def start(call_tool):
    """`start(folder, "out=DIR")`: its ablation in this process; returns the exit code."""

    def run(folder, *given):
        try:
            call_tool(main, "ablation=small", "--config-dir", str(folder), *given)
        except SystemExit as stopped:
            return stopped.code
        return 0

    return run


@pytest.mark.usefixtures("as_a_new_process")
def test_a_grid_to_its_end_and_on_again(start, small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    given = [f"out={out}"]

    # the second cell is interrupted after its first step, as by Ctrl-C
    def interrupted(log):
        if "s-1" in str(log._file.name):
            raise KeyboardInterrupt
        log._bar.update()

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "advance", interrupted)
        assert start(small, *given, "save_every=1") == 130
    assert (out / "one-layer/s-0/cell.json").is_file()
    assert (out / "one-layer/s-1/config.yaml").is_file()
    assert not (out / "one-layer/s-1/encoder.safetensors").exists()
    assert [row["row"] for row in json.loads((out / "results.json").read_text())["cells"]] == ["one layer"]
    assert (out / "figure.png").is_file()
    capsys.readouterr()

    # the third fails, and the fourth is run all the same
    def failing(cfg):
        if cfg.method.head.layers == 2 and cfg.seed == 0:
            raise RuntimeError("out of\nmemory")
        return run(cfg)

    run = cpc.ablate.pretrain
    first = (out / "one-layer/s-0/cell.json").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(cpc.ablate, "pretrain", failing)
        assert start(small, *given) == 1
    printed = capsys.readouterr()
    assert "failed: two x s 0: RuntimeError: out of memory" in printed.err.splitlines()
    assert "1 of 4 cells failed: the same command tries them again" in printed.err
    assert [line.rpartition("; ")[2].partition(",")[0] for line in printed.out.splitlines() if " x " in line] == [
        "kept",
        "2 cells left",
        "none left",
    ]
    assert (out / "one-layer/s-0/cell.json").stat().st_mtime_ns == first
    assert [row["step"] for row in read_metrics(out / "one-layer/s-1")] == [1, 2]
    record = json.loads((out / "results.json").read_text())
    assert record["failed"] == {"two x s 0": "RuntimeError: out of memory"}
    assert [(row["row"], row["column"]) for row in record["cells"]] == [
        ("one layer", "s 0"),
        ("one layer", "s 1"),
        ("two", "s 1"),
    ]

    # what failed is tried again, and the rest is kept; so is what was killed between the last files of its training
    for name in ("cell.json", "encoder.json"):
        (out / "one-layer/s-1" / name).unlink()
    assert start(small, *given) == 0
    assert capsys.readouterr().out.count("kept") == 2
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["column"]) for row in rows] == [
        (a, b) for a in ("one layer", "two") for b in ("s 0", "s 1")
    ]
    for row in rows:
        assert all(0 < float(row[name]) <= 1 for name in ("knn", "linear", "knn_head", "linear_head"))
        assert float(row["parameters"]) > 1000
    assert "one layer  s 0" in (out / "results.md").read_text()

    # other images to evaluate on: nothing is trained again
    def refused(cfg):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(cpc.ablate, "pretrain", refused)
        assert start(small, *given, "evaluate_on=validation") == 0
    assert "kept" not in capsys.readouterr().out
    record = json.loads((out / "results.json").read_text())
    assert {row["evaluate_on"] for row in record["cells"]} == {record["evaluate_on"]} == {"validation"}

    # other settings in the same folder are refused cell by cell, and the results stay as they were
    before = (out / "results.json").read_text()
    assert start(small, *given, "steps=3") == 1
    printed = capsys.readouterr()
    assert printed.err.count("was run with other settings of steps: use its own, or a new run_dir") == 4
    assert "written to" not in printed.out
    assert (out / "results.json").read_text() == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["stpes=3", "out=x"], "error: one layer x s 0: Could not override 'stpes'"),
        (["steps=0", "out=x"], "error: one layer x s 0: steps=0: pass at least 1"),
        (["data=imagefolder", "out=x"], "error: one layer x s 0: not given: data.root"),
        (["encoder=typo", "out=x"], "error: one layer x s 0: "),
        (["evaluate_on=train", "out=x"], "error: evaluate_on=train: pass one of test, validation"),
        (["ablation.figure=pie", "out=x"], "error: figure=pie: pass one of heatmap, lines"),
        ([], "error: not given: out; pass out=DIR"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_run(
    start, small, given, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert start(small, *given) == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert len(printed.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_trains_on_labels_cannot_be_validated_by_them(start, small, tmp_path, capsys):
    labels = "title: labels\nrows: {a: [method=supervised]}\ncolumns: {b: [data=parquet, data.train=TRAIN]}\n"
    (tmp_path / "ablation").mkdir()
    text = labels.replace("TRAIN", f"'{small / 'train.parquet'}'")
    (tmp_path / "ablation/small.yaml").write_text(text)
    assert start(tmp_path, f"out={tmp_path / 'out'}", "evaluate_on=validation") == 2
    assert "error: a x b trains on the labels it would be validated by: pass eval" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(compose, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a grid runs in one process"):
        ablate(compose("ablation=head", "out=x", name="ablate"))


@pytest.mark.slow
def test_from_the_command_line(run_tool, small, tmp_path):
    one = ["+ablation.leave_out={one layer: [s 1], two: [s 0, s 1]}", "ablation.head=false", "ablation.show.before=knn"]
    done = run_tool("tools/ablate.py", "ablation=small", "--config-dir", str(small), "out=grid", "steps=1", *one)
    assert done.returncode == 0, done.stderr
    assert "one layer x s 0: linear 0." in done.stdout
    assert "none left" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"grid"}
    assert len(read_metrics(tmp_path / "grid/one-layer/s-0")) == 1  # the command line's steps, not the grid's


# --- the figures


def texts(axes):
    return [text.get_text() for text in axes.texts]


def ticks(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


VALUES = np.array([[0.5, 0.25, math.nan], [1.0, 0.125, 0.75]])


def test_a_heatmap_has_every_number_in_its_cell_and_a_dash_where_there_is_none():
    figure = heatmap_figure(
        {"linear": VALUES}, ["a", "b"], ["x", "y", "z"], title="t", row_name="of rows", column_name="of columns"
    )
    axes = figure.axes[0]
    assert texts(axes) == ["50.0", "25.0", "–", "100.0", "12.5", "75.0"]
    assert (ticks(axes.xaxis), ticks(axes.yaxis)) == (["x", "y", "z"], ["a", "b"])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("of columns", "of rows", "linear (%)")
    assert axes.images[0].norm.vmin == 12.5
    assert axes.images[0].norm.vmax == 100
    first, last = (text.get_position() for text in (axes.texts[0], axes.texts[-1]))
    assert (first, last) == ((0, 0), (2, 1))
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row is at the top"


def test_means_stand_apart_and_are_of_complete_rows_only():
    figure = heatmap_figure({"linear": VALUES}, ["a", "b"], ["x", "y", "z"], row_means=True)
    axes = figure.axes[0]
    assert texts(axes)[-2:] == ["–", "62.5"]
    assert ticks(axes.xaxis)[-1] == "mean"
    assert axes.texts[-1].get_position()[0] > 3


def test_each_panel_has_axes_and_a_scale_of_its_own():
    figure = heatmap_figure({"one": VALUES, "two": VALUES / 2}, ["a", "b"], ["x", "y", "z"])
    grids = [axes for axes in figure.axes if axes.texts]
    assert [axes.get_title() for axes in grids] == ["one (%)", "two (%)"]
    assert [axes.images[0].norm.vmax for axes in grids] == [100, 50]
    figure = line_figure({"one": VALUES, "two": VALUES}, ["a", "b"], ["x", "y", "z"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["one (%)", "two (%)"]


def test_lines_go_over_the_columns_and_are_broken_where_a_number_is_missing():
    figure = line_figure({"linear": VALUES}, ["a", "b"], ["x", "y", "z"], column_name="of columns")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["a", "b"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [50, 25, math.nan])
    assert ticks(axes.xaxis) == ["x", "y", "z"]
    assert axes.get_xlabel() == "of columns"
    assert len({str(line.get_color()) for line in axes.lines}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_lines_over_a_number_carry_their_columns():
    sizes = np.array([[1e3, 1e4, math.nan], [1e4, 1e5, 1e6]])
    (axes,) = line_figure({"linear": VALUES}, ["a", "b"], ["x", "y", "z"], positions=sizes).axes
    assert axes.get_xscale() == "log"
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), [1e4, 1e5, 1e6])
    assert texts(axes) == ["x", "y", "x", "y", "z"]


@pytest.mark.parametrize("draw", [heatmap_figure, line_figure])
@pytest.mark.parametrize("share", [math.nan, 0.5])
def test_nothing_yet_and_no_range_are_drawn_too(draw, share, tmp_path):
    values = np.full((12, 12), share)
    labels = [f"label number {i}" for i in range(12)]
    save_figure(draw({"linear": values, "kNN": values}, labels, labels, title="a title"), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 2000
    sizes = np.full((12, 12), math.nan)
    save_figure(line_figure({"linear": values}, labels, labels, positions=sizes), tmp_path / "figure.png")


@pytest.mark.parametrize("draw", [heatmap_figure, line_figure])
def test_what_does_not_fit_the_labels_is_told(draw):
    with pytest.raises(ValueError, match=r"the panel 'linear' has shape \(2, 3\) for 2 rows and 2 columns"):
        draw({"linear": VALUES}, ["a", "b"], ["x", "y"])
    with pytest.raises(ValueError, match="no panel to draw"):
        draw({}, ["a"], ["x"])


def test_positions_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match="the panel 'positions' has shape"):
        line_figure({"linear": VALUES}, ["a", "b"], ["x", "y", "z"], positions=VALUES[:1])
