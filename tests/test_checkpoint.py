"""Checkpoints: bit for bit, whole or not at all, and no code in them."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from contrastive_core import checkpoint
from contrastive_core.checkpoint import export_encoder, latest_checkpoint, load_checkpoint_, save_checkpoint


def network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    return net.to(memory_format=torch.channels_last)


def adam(net, **options):
    return torch.optim.Adam(net.parameters(), **{"lr": 1e-2, "betas": (0.8, 0.99), **options})


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        images = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(step))
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [adam, lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
                                  lambda net: torch.optim.SGD(net.parameters(), 0.1)])  # fmt: skip
def test_going_on_from_a_checkpoint_is_not_having_stopped(tmp_path, make):
    torch.manual_seed(0)
    net = network()
    optimizer = make(net)
    train(net, optimizer, 3)
    save_checkpoint(tmp_path, 3, {"net": net}, optimizer, {"threads": 2})
    train(net, optimizer, 3, start=3)

    again = network()
    optimizer_again = make(again)
    state = load_checkpoint_(latest_checkpoint(tmp_path), {"net": again}, optimizer_again)
    assert state == {"step": 3, "threads": 2}
    train(again, optimizer_again, 3, start=3)
    assert_equal_states(net.state_dict(), again.state_dict())
    for key, entry in optimizer.state_dict()["state"].items():
        assert_equal_states(entry, optimizer_again.state_dict()["state"][key])


def test_the_optimizers_state_comes_back_in_the_layout_of_its_parameters(tmp_path):
    net = network()
    optimizer = adam(net)
    train(net, optimizer, 1)
    save_checkpoint(tmp_path, 1, {"net": net}, optimizer, {})
    again = network()
    optimizer_again = adam(again)
    load_checkpoint_(latest_checkpoint(tmp_path), {"net": again}, optimizer_again)
    for before, after in zip(net.parameters(), again.parameters(), strict=True):
        assert after.stride() == before.stride()
        for name in ("exp_avg", "exp_avg_sq"):
            assert optimizer_again.state[after][name].stride() == optimizer.state[before][name].stride()


def test_hyper_parameters_come_from_the_configuration(tmp_path):
    net = network()
    optimizer = adam(net)
    train(net, optimizer, 1)
    optimizer.param_groups[0]["lr"] = 0.5  # wherever the schedule was
    save_checkpoint(tmp_path, 1, {"net": net}, optimizer, {})
    resumed = adam(net, lr=3e-3, betas=(0.9, 0.95))
    load_checkpoint_(latest_checkpoint(tmp_path), {"net": net}, resumed)
    assert resumed.param_groups[0]["lr"] == 3e-3
    assert resumed.param_groups[0]["betas"] == (0.9, 0.95)
    assert resumed.state[next(net.parameters())]["step"] == 1


def test_the_last_ones_are_kept(tmp_path):
    net = network()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, {"net": net}, adam(net), {}, keep=2)
    assert [folder.name for folder in sorted(tmp_path.iterdir())] == ["step_00000010", "step_00000011"]
    assert latest_checkpoint(tmp_path).name == "step_00000011"
    assert latest_checkpoint(tmp_path / "none") is None


def test_an_interrupted_save_is_ignored_and_overwritten(tmp_path, monkeypatch):
    net = network()
    save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})

    def interrupted(tensors):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "optimizer_tensors", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, {"net": net}, adam(net), {})
    (left_over,) = tmp_path.glob(".*.partial")
    (left_over / "garbage").write_text("of a run that was killed")
    assert latest_checkpoint(tmp_path).name == "step_00000001"

    written = save_checkpoint(tmp_path, 2, {"net": net}, adam(net), {})
    assert latest_checkpoint(tmp_path) == written
    assert not list(tmp_path.glob(".*"))
    assert not (written / "garbage").exists()
    save_checkpoint(tmp_path, 2, {"net": net}, adam(net), {})  # saved again, after a resume


def test_there_is_no_code_in_a_checkpoint(tmp_path, monkeypatch):
    net = network()
    optimizer = adam(net)
    train(net, optimizer, 1)
    written = save_checkpoint(tmp_path, 1, {"net": net}, optimizer, {"note": "text"})
    assert sorted(file.name for file in written.iterdir()) == ["net.safetensors", "optimizer.safetensors", "state.json"]
    with safe_open(written / "net.safetensors", "pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    load_checkpoint_(written, {"net": network()}, adam(net))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    net = network()
    written = save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_checkpoint_(written, {"net": nn.Sequential(nn.Conv2d(3, 9, 3))}, adam(net))


def test_an_export_is_the_weights_and_the_card(tmp_path):
    net = network()
    weights = export_encoder(tmp_path, net, {"dim": 4})
    assert weights == tmp_path / "encoder.safetensors"
    assert json.loads((tmp_path / "encoder.json").read_text()) == {"dim": 4}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["encoder.json", "encoder.safetensors"]
    with safe_open(weights, "pt") as file:
        assert_equal_states({name: file.get_tensor(name) for name in file.keys()}, net.state_dict())  # noqa: SIM118
    tied = SimpleNamespace(state_dict=lambda: {"a": net[0].weight, "b": net[0].weight})
    export_encoder(tmp_path, tied, {})  # safetensors itself refuses tensors that share memory
