"""`profile=true`: a table of the step's parts that adds up, and a trace that is one."""

import gzip
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from contrastive_core.profiling import PARTS, part, part_table, profiled
from cpc.pretrain import pretrain

TINY = ["batch_size=8", "encoder.width=4", "method.context.width=8", "method.context.layers=1", "probe_every=0"]


@pytest.mark.parametrize(("steps", "watched"), [(6, 2), (1, 1)])
def test_a_run_says_where_its_steps_went(compose, as_a_new_process, tmp_path, steps, watched):
    options = [*TINY, f"steps={steps}", "threads=1", "profile=true", "averaging=0.9"]
    run = pretrain(compose(*options, f"run_dir={tmp_path / 'run'}"))
    table, _, operations = (run / "profile.txt").read_text().partition("\n\n")
    head, *rows = table.split("\n")
    assert head == f"{watched} steps, milliseconds of one"
    shares = {row[:16].strip(): float(row.split()[-1].rstrip("%")) for row in rows}
    assert list(shares) == list(PARTS)
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert max(shares, key=shares.get) in ("forward", "backward")
    assert "aten::convolution" in operations
    events = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "forward" for event in events) == watched
    assert not (run / "trace.json").exists()


def test_the_table_counts_what_was_named():
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        for _ in range(2):
            with part("views"):
                torch.ones(3).sum()
            with part("unnamed"):
                torch.ones(3).sum()
    table = part_table(watch.key_averages(), 2, on_gpu=False)
    assert [line.split()[0] for line in table.split("\n")] == ["2", "views"]
    assert table.endswith("100.0%")


def test_nothing_is_watched_or_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with profiled(None, 3) as watch:
        watch()
    assert not list(tmp_path.iterdir())
