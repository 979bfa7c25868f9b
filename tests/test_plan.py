"""What a recipe is said to cost: against closed forms, a measurement on a GPU, and what two processes really send."""

import json
from pathlib import Path

import pytest
import torch

from cpc.plan import Machine, described, main, need
from cpc.pretrain import build_method

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
PAPER = ["experiment=imagenet_cpc_v2", "data.root=x"]


def test_operations_of_a_known_network(compose):
    """An encoder of one 1x1 block on 8 px patches: every product is counted by hand."""
    cfg = compose("encoder.width=4", "encoder.blocks=[1]", "encoder.stem_stride=1", "method.context.layers=0")
    cells, pixels = 36, 64
    encoder = cells * pixels * (3 * 4 * 9 + 2 * 4 * 4 * 9)
    heads = 4 * 3 * 4 * 6 * 4 * 64  # of 2, 3 and 4 rows ahead, in one product of the cells that have one 2 rows ahead
    targets = cells * 4 * 64
    assert need(cfg).operations == 3 * 2 * (encoder + heads + targets)


def test_memory_is_that_of_the_parts(compose):
    """Adam in fp32: weights, gradients and two moments; an average is another copy."""
    cfg = compose("encoder.width=4", "encoder.blocks=[1]")
    method, _ = build_method(cfg)
    learning = sum(p.numel() for p in method.parameters())
    plain, averaged = need(cfg), need(compose("encoder.width=4", "encoder.blocks=[1]", "averaging=0.9"))
    assert plain.parameters == learning
    steps = 4 * len(list(method.parameters()))  # of Adam, a float for each parameter
    together = 4 * sum(head.weight.numel() for heads in method.heads.values() for head in heads.heads.values())
    assert plain.fixed == 4 * 4 * learning + steps + together
    assert averaged.fixed - plain.fixed == 4 * learning
    assert plain.kept == averaged.kept > 0


@pytest.mark.parametrize(("images", "within"), [(16, 0.05), (64, 0.01)])
def test_memory_of_the_papers_step_is_what_a_gpu_measured(compose, images, within):
    measured = json.loads((RESULTS / "cpc_gpu.json").read_text())[f"resnet161 {images}"]
    planned = need(compose(*PAPER, "averaging=null")).bytes_of(images) / 2**30
    assert planned == pytest.approx(measured["peak_gib"], rel=within)


def test_recomputing_blocks_trades_operations_for_memory(compose):
    plain, twice = need(compose(*PAPER)), need(compose(*PAPER, "recompute=true"))
    assert twice.operations == pytest.approx(4 / 3 * plain.operations)
    assert twice.kept < plain.kept / 2
    assert (twice.fixed, twice.parameters) == (pytest.approx(plain.fixed, rel=0.1), plain.parameters)


def test_bytes_on_the_wire(compose):
    """A ring of four: gradients go round twice less a quarter; rows reach three others, their gradients come back."""
    needed = need(compose())
    assert needed.gathered == 36 * 64 * 4
    assert needed.wire(images=8, devices=4) == 2 * 3 / 4 * 4 * needed.parameters + (3 + 3) * 8 * needed.gathered
    assert needed.wire(images=8, devices=1) == 0
    assert need(compose("method.gather=false")).gathered == 0


def test_split_weights_take_less_memory_and_more_wire(compose):
    """Weights go round before the forward and before the backward pass, gradients once: three halves of the bytes."""
    plain, split = need(compose("method.gather=false")), need(compose("method.gather=false", "shard=true"))
    assert split.wire(images=8, devices=4) == 1.5 * plain.wire(images=8, devices=4)
    assert split.bytes_of(8) == plain.bytes_of(8)
    assert split.bytes_of(0, devices=4) == plain.fixed / 4 + split.at_once
    assert 0 < split.at_once < 4 * split.parameters
    by_turns = need(compose("method.gather=false", "shard=true", "accumulate=4"))  # with each micro-batch
    assert by_turns.wire(images=8, devices=4) == 4 * split.wire(images=8, devices=4)


def test_grad_cache_takes_a_second_forward_pass(compose):
    plain, cached = need(compose()), need(compose("grad_cache=true", "accumulate=2"))
    assert cached.operations == 4 / 3 * plain.operations


def test_simclr_sends_both_projections(compose):
    needed = need(compose("method=simclr", name="pretrain"))
    assert needed.gathered == 2 * 128 * 4
    assert needed.operations > 0


def test_hours_and_price(compose):
    cfg = compose("steps=3600", "batch_size=64")
    lines = dict(described(cfg, need(cfg), Machine(devices=2, memory=80, link=1e9, rate=32, price=3)))
    assert lines["hours"] == "1.0 to 1.0 for 3600 steps of 64 images"
    assert lines["price"] == "6 to 6"
    assert "does not fit" not in lines
    small = dict(described(cfg, need(cfg), Machine(devices=2, memory=0.02, link=1e9, rate=32, price=0)))
    assert small["does not fit"] == "pass accumulate=N, recompute=true, shard=true, fewer images or more devices"
    assert "price" not in small
    most = int(small["images of a device at a time"].split()[1])
    assert need(cfg).bytes_of(most) <= 0.02 * 2**30 < need(cfg).bytes_of(most + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=cpc", "stpes=3"], "error: Could not override 'stpes'"),
        (["experiment=imagenet_cpc_v2"], "error: not given: data.root"),
        (
            ["method=cpc", "batch_size=30", "--devices", "4"],
            "error: batch_size=30 does not split evenly over 4 devices",
        ),
        (["method=cpc", "--link", "0"], "error: --devices, --images-per-second, --memory and --link must be above 0"),
        (["method=byol"], "error: BYOL does not come in two halves: plan CPC or SimCLR"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, call_tool, capsys):
    with pytest.raises(SystemExit) as stopped:
        call_tool(main, *arguments, "--images-per-second", "10")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(message)


def test_precision_is_the_planned_machines_and_not_this_ones(call_tool, capsys, monkeypatch):
    monkeypatch.setattr("cpc.fast_precision.fast_bf16", lambda cpuinfo: [])  # a CPU without bf16
    said = {}
    for given in ("left open", "bf16", "no"):
        precision = [] if given == "left open" else [f"precision={given}"]
        call_tool(main, "experiment=cifar10_cpc", "data.train=x", *precision, "--images-per-second", "10")
        said[given] = capsys.readouterr().out
    assert said["left open"] == said["bf16"] != said["no"]


def test_from_the_command_line(call_tool, capsys):
    call_tool(main, *PAPER, "--devices", "8", "--images-per-second", "199.6")
    printed = capsys.readouterr().out
    assert "353.5 M" in printed
    assert "64; 78 fit 80 GiB" in printed
    assert not torch.cuda.is_initialized()
