"""What benchmarks/label_efficiency.py keeps of a sweep's cells, and goes on with."""

import importlib.util
import json
import lzma
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from label_cells import TRUTH
from label_cells import cell as known_cell

import cpc.label_curves
from contrastive_core.evaluate.label_saving import filled_in, saving_interval
from cpc.label_curves import BEST, SCRATCH
from cpc.label_report import saving_row

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("label_efficiency", BENCHMARKS / "label_efficiency.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "label_efficiency", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    module.RESULTS.mkdir()
    return module


def test_recorded_cells_are_right_where_they_were(benchmark, tmp_path):
    truth = torch.tensor([0, 1, 2, 1, 0, 2, 2, 1, 0, 1, 1])
    cells = {
        "scratch-0/cnn/labels=3-seed0.json": {"accuracy": 0.5, "predictions": [0, 1, 2, 2, 1, 0, 2, 1, 0, 0, 1]},
        "CPC-0/linear/labels=3-seed0.json": {"accuracy": 1.0, "predictions": truth.tolist()},
    }
    for place, cell in cells.items():
        (tmp_path / "swept" / place).parent.mkdir(parents=True)
        (tmp_path / "swept" / place).write_text(json.dumps(cell))
    benchmark.pack_cells("digits", tmp_path / "swept", truth)

    benchmark.unpack_cells("digits", tmp_path / "scratch", truth, only="scratch-")
    assert [str(file.relative_to(tmp_path / "scratch")) for file in (tmp_path / "scratch").rglob("*.json")] == [
        "scratch-0/cnn/labels=3-seed0.json"
    ]
    benchmark.unpack_cells("digits", tmp_path / "all", truth, only="")
    for place, cell in cells.items():
        read = json.loads((tmp_path / "all" / place).read_text())
        assert read["accuracy"] == cell["accuracy"]
        right = torch.tensor(read["predictions"]) == truth
        assert torch.equal(right, torch.tensor(cell["predictions"]) == truth)


def test_a_cell_that_is_there_stays_as_it_is(benchmark, tmp_path):
    truth, place = torch.tensor([0, 1]), "scratch-0/cnn/labels=2-seed0.json"
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(json.dumps({"predictions": [1, 1]}))
    benchmark.pack_cells("digits", tmp_path, truth)
    benchmark.unpack_cells("digits", tmp_path, truth, only="")
    assert json.loads((tmp_path / place).read_text()) == {"predictions": [1, 1]}


def test_nothing_recorded_is_nothing_to_unpack(benchmark, tmp_path):
    benchmark.unpack_cells("digits", tmp_path / "cells", torch.tensor([0]), only="")
    assert not (tmp_path / "cells").exists()


def test_the_part_of_a_grid_that_wants_no_run(benchmark):
    part = ["labels=[20,40]", "scratch=[cnn]", "protocols=[linear]", "random=[linear]"]
    assert benchmark.from_scratch(part) == ["labels=[20,40]", "scratch=[cnn]", "protocols=[]", "random=[]"]
    assert benchmark.from_scratch(["labels=[20]", "scratch=[]", "protocols=[linear]", "random=[]"]) == []


def test_runs_that_were_recorded_stay_where_a_command_knows_the_first_alone(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "write", lambda name, command, results, folder: written.append(results))
    written: list[dict] = []
    for suffix in ("csv", "png"):
        (tmp_path / f"label_efficiency.{suffix}").touch()
    (benchmark.RESULTS / "digits.json").write_text(json.dumps({"runs": {"CPC": ["cpc-0", "cpc-1"], "BYOL": ["byol"]}}))
    summary = {"runs": {"CPC": ["runs/label-digits/card/cpc-0"], "SimCLR": ["runs/a"]}, "splits": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    for goes_on in (True, False):
        benchmark.record("digits", "command", tmp_path, {}, goes_on, torch.tensor([0]))
    assert written[0]["runs"] == {"CPC": ["cpc-0", "cpc-1"], "BYOL": ["byol"], "SimCLR": ["a"]}
    assert written[1]["runs"] == {"CPC": ["cpc-0"], "SimCLR": ["a"]}


def test_first_runs_alone_save_what_no_other_run_has_a_part_in(benchmark, tmp_path):
    """The first run with 10 labels is as good as from scratch with 20, the second with 40; a single run is no first."""
    curve = {10: 10, 20: 20, 40: 32}
    results = [known_cell(SCRATCH, "cnn", labels, right) for labels, right in curve.items()]
    results += [known_cell("CPC", "linear", 10, curve[20]), known_cell("CPC", "linear", 10, curve[40], repeat=1)]
    for result in [*results, known_cell("SimCLR", "linear", 10, curve[20])]:
        file = tmp_path / f"{result.method}-{result.repeat}" / result.protocol / f"{result.amount}-seed0.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        written = vars(result) | {"predictions": result.predictions.tolist(), "shared": {}, "asked": {}}
        file.write_text(json.dumps(written))
    (row,) = benchmark.savings_of_first_runs(tmp_path, TRUTH)
    assert (row["method"], row["labels"], row["saving"], row["runs"]) == ("CPC", 10, "2.0", 1)


@pytest.mark.parametrize("name", ["digits", "cifar10", "caltech101"])
def test_recorded_results_are_of_the_recorded_cells(name):
    """Each number of labels, method and protocol of the table has as many cells as it says."""
    results = BENCHMARKS / "label_efficiency"
    table = results / f"{name}.json"
    packed = json.loads(lzma.decompress((results / f"{name}-cells.json.xz").read_bytes()))
    for row in json.loads(table.read_text())["accuracies"]:
        cells = [
            cell
            for cell in packed.values()
            if (cell["method"], cell["protocol"], cell["labels"]) == (row["method"], row["protocol"], row["labels"])
        ]
        runs, draws = (sorted({cell[name] for cell in cells}) for name in ("repeat", "seed"))
        accuracies = torch.full((len(runs), len(draws), 1), torch.nan, dtype=torch.float64)
        for cell in cells:
            accuracies[runs.index(cell["repeat"]), draws.index(cell["seed"])] = cell["accuracy"]
        assert len(cells) == row["cells"]
        assert filled_in(accuracies).mean().item() == pytest.approx(row["accuracy"])


@pytest.mark.parametrize("name", ["digits", "cifar10", "caltech101"])
def test_recorded_savings_are_of_the_recorded_cells(benchmark, tmp_path, monkeypatch, name):
    """Their points; their intervals take minutes. What was right is all that they are made of, whatever the classes."""
    monkeypatch.setattr(cpc.label_curves, "saving_interval", partial(saving_interval, resamples=1))
    recorded = BENCHMARKS / "label_efficiency"
    table = json.loads((recorded / f"{name}.json").read_text())
    benchmark.RESULTS = recorded
    any_class = torch.zeros(table["test_images"], dtype=torch.int64)
    benchmark.unpack_cells(name, tmp_path, any_class, only="")
    results = cpc.label_curves.read_results(sorted(tmp_path.glob("*/*/*.json")))

    def points(rows):
        return {
            (row["method"], row["protocol"], row["labels"]): row["saving"] for row in rows if row["against"] == BEST
        }

    savings = cpc.label_curves.savings_of(cpc.label_curves.curves_of(results), any_class)
    assert points(table["savings"]) == points(map(saving_row, savings))
    first = points(benchmark.savings_of_first_runs(tmp_path, any_class))
    assert points(table["savings_of_first_runs"]) == first != {}


def listed(part, key):
    """A list of a part's, `key=[a,b]`; [] where it has none."""
    return next((given.partition("=[")[2].rstrip("]").split(",") for given in part if given.startswith(f"{key}=[")), [])


@pytest.mark.parametrize("name", ["digits", "cifar10", "caltech101"])
def test_the_command_makes_every_recorded_cell(benchmark, name):
    """Else who runs it has another curve from scratch than the one that is shown, and another saving."""
    amounts = {"labels": "labels", "labels_per_class": "labels_per_class", "fraction": "fractions"}
    asked = {
        (first, protocol, f"{amount}={number}")
        for part in benchmark.STUDIES[name].parts
        for first, protocols in (("scratch", "scratch"), ("random", "random"), ("run", "protocols"))
        for protocol in listed(part, protocols)
        for amount, key in amounts.items()
        for number in listed(part, key)
    }
    packed = json.loads(lzma.decompress((BENCHMARKS / "label_efficiency" / f"{name}-cells.json.xz").read_bytes()))
    recorded = {
        (method if (method := cell["method"]) in ("scratch", "random") else "run", cell["protocol"], cell["amount"])
        for cell in packed.values()
    }
    assert recorded <= asked, recorded - asked
