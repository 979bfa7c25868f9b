"""Checkpoints: bit for bit, whole or not at all, and no code in them."""

import errno
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from contrastive_core import checkpoint
from contrastive_core.checkpoint import (
    export_encoder,
    latest_checkpoint,
    load_checkpoint_,
    replacing,
    save_checkpoint,
)
from contrastive_core.losses import SigmoidLoss
from contrastive_core.optim import Together


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


def together(net):
    return Together([torch.optim.SGD(net[-1].parameters(), 0.1, momentum=0.9), torch.optim.Adam(net[:-1].parameters())])


@pytest.mark.parametrize("make", [adam, lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
                                  lambda net: torch.optim.SGD(net.parameters(), 0.1), together])  # fmt: skip
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


@pytest.mark.parametrize("make", [adam, lambda net: torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)])
def test_learned_numbers_go_on_from_a_checkpoint_that_has_them_as_scalars(tmp_path, make):
    """And so has what the optimizer keeps of them."""
    torch.manual_seed(0)
    rows = torch.randn(6, 4)

    def train(loss, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(rows, rows).backward()
            optimizer.step()

    loss = SigmoidLoss()
    optimizer = make(loss)
    train(loss, optimizer, 3)
    saved = save_checkpoint(tmp_path, 3, {"loss": loss}, optimizer, {})
    for name in ("loss", "optimizer"):
        tensors = load_file(saved / f"{name}.safetensors")
        save_file({key: value.reshape(()) for key, value in tensors.items()}, saved / f"{name}.safetensors")
    train(loss, optimizer, 3)

    again = SigmoidLoss()
    optimizer_again = make(again)
    load_checkpoint_(saved, {"loss": again}, optimizer_again)
    train(again, optimizer_again, 3)
    assert_equal_states(loss.state_dict(), again.state_dict())
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


def torn(file):
    file.write_bytes(file.read_bytes()[:-1])


def flipped(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a file is cut short": (lambda at: torn(at / "net.safetensors"), "net.safetensors not as written"),
    "a bit has turned": (lambda at: flipped(at / "optimizer.safetensors"), "optimizer.safetensors not as written"),
    "other words": (lambda at: (at / "state.json").write_text('{"step": 3}'), "state.json not as written"),
    "a file is missing": (lambda at: (at / "state.json").unlink(), "state.json not as written"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "No such file"),
    "an empty manifest": (
        lambda at: (at / "manifest.json").write_text(""),
        "read: Expecting value",
    ),
    "no text": (lambda at: (at / "manifest.json").write_bytes(b"\xff\xfe"), "read: 'utf-8'"),
    "another JSON": (lambda at: (at / "manifest.json").write_text("[]"), "manifest.json is no manifest"),
    "nothing in it": (lambda at: [file.unlink() for file in at.iterdir()], "No such file"),
    "a file in its place": (lambda at: (shutil.rmtree(at), at.write_text("")), "Not a directory"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_one_is_skipped_with_a_warning_for_the_one_before(tmp_path, caplog, name):
    net = network()
    first, second = (save_checkpoint(tmp_path, step, {"net": net}, adam(net), {}) for step in (1, 2))
    assert latest_checkpoint(tmp_path) == second
    assert not caplog.records
    harm, said = DAMAGES[name]
    harm(second)
    assert latest_checkpoint(tmp_path) == first
    (record,) = caplog.records
    assert "step_00000002 is damaged (" in record.getMessage()
    assert said in record.getMessage()
    assert record.getMessage().endswith("going on from the one before")

    harm(first)
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged: move the folder away to start anew"):
        latest_checkpoint(tmp_path)


def test_what_others_leave_there_is_no_damage_and_no_checkpoint(tmp_path):
    net = network()
    written = [save_checkpoint(tmp_path, step, {"net": net}, adam(net), {}) for step in (1, 2)]
    for folder in (tmp_path, *written):
        (folder / ".DS_Store").write_text("")
    shutil.copytree(written[1], tmp_path / "step_00000002_best")
    assert latest_checkpoint(tmp_path) == written[1]
    save_checkpoint(tmp_path, 3, {"net": net}, adam(net), {})
    assert {path.name for path in tmp_path.glob("step*")} == {"step_00000002", "step_00000002_best", "step_00000003"}


def test_one_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """What a passing error of a network's disk says too: to go on from the one before would remove this one."""
    net = network()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"net": net}, adam(net), {})

    def refused(checkpoint):
        raise PermissionError(errno.EACCES, "Permission denied", str(checkpoint))

    monkeypatch.setattr(checkpoint, "_contents", refused)
    with pytest.raises(PermissionError, match=r"Permission denied: .*step_00000002"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize(("file", "content", "said"), [
    ("state.json", b"[1]", "is damaged (state.json tells no step)"),
    ("state.json", b"{}", "is damaged (state.json tells no step)"),
    ("net.safetensors", save({"0.weight": torch.ones(2)}), "is of another run's making: Error(s) in load"),
    ("optimizer.safetensors", save({"999.exp_avg": torch.ones(2)}), "is of another run's making: list index out of"),
    ("optimizer.safetensors", save({"x": torch.ones(2)}), "is of another run's making: "),
])  # fmt: skip
def test_a_whole_checkpoint_of_another_make_is_one_line(tmp_path, file, content, said):
    """Its manifest may be right: it comes from anyone."""
    net = network()
    written = save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})
    (written / file).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_checkpoint_(written, {"net": net}, adam(net))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = network()
    written = save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})
    name, parameter = list(net.named_parameters())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] = float("nan")
    with pytest.raises(FloatingPointError, match=rf"{name} has become infinite or no number by step 2: lower optim"):
        save_checkpoint(tmp_path, 2, {"net": net}, adam(net), {}, keep=1)
    assert list(tmp_path.iterdir()) == [written]


def test_files_have_the_permissions_of_the_users_others(tmp_path):
    (tmp_path / "own").write_text("")
    net = network()
    files = [*save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {}).iterdir(), export_encoder(tmp_path, net, {})]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "own").stat().st_mode}


def test_what_lies_beyond_a_new_one_goes_and_does_not_count_as_kept(tmp_path):
    """A damaged one was skipped: if it counted, keep=1 would remove the only whole one."""
    net = network()
    save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})
    torn(save_checkpoint(tmp_path, 9, {"net": net}, adam(net), {}) / "net.safetensors")
    written = save_checkpoint(tmp_path, 5, {"net": net}, adam(net), {}, keep=1)
    assert list(tmp_path.iterdir()) == [written]


def test_a_file_in_a_checkpoints_place_is_no_obstacle(tmp_path):
    net = network()
    for name in ("step_00000001", "step_00000009", ".step_00000002.partial"):
        (tmp_path / name).write_text("")
    written = save_checkpoint(tmp_path, 5, {"net": net}, adam(net), {}, keep=1)
    assert list(tmp_path.iterdir()) == [written]


@pytest.mark.parametrize("when", ["tensors", "words"])
def test_on_a_full_disk_the_last_one_stays_and_nothing_else(tmp_path, monkeypatch, when):
    net = network()
    written = save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})
    fault = {
        "tensors": ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        "words": ("_contents", OSError(errno.ENOSPC, "No space left on device")),
    }
    name, error = fault[when]

    def full(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, full)
        with pytest.raises(OSError, match="No space left on device"):
            save_checkpoint(tmp_path, 2, {"net": net}, adam(net), {})
    assert list(tmp_path.iterdir()) == [written]
    assert latest_checkpoint(tmp_path) == written


def test_half_a_file_never_takes_the_place_of_one(tmp_path):
    file = tmp_path / "words"
    with replacing(file) as partial:
        partial.write_text("old")

    def interrupted():
        with replacing(file) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "old"


def test_there_is_no_code_in_a_checkpoint(tmp_path, monkeypatch):
    net = network()
    optimizer = adam(net)
    train(net, optimizer, 1)
    written = save_checkpoint(tmp_path, 1, {"net": net}, optimizer, {"note": "text"})
    names = ["manifest.json", "net.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(file.name for file in written.iterdir()) == names
    with safe_open(written / "net.safetensors", "pt") as file:
        assert set(file.keys()) == set(net.state_dict())
    monkeypatch.setattr("pickle.Unpickler", None)
    monkeypatch.setattr(torch, "load", None)
    load_checkpoint_(written, {"net": network()}, adam(net))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    net = network()
    written = save_checkpoint(tmp_path, 1, {"net": net}, adam(net), {})
    with pytest.raises(ValueError, match=r"is of another run.s making: .*size mismatch"):
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
