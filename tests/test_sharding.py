"""Parameters split over two processes: the same steps, whole checkpoints, half the memory."""

from __future__ import annotations

import shutil
import warnings
from functools import partial

import pytest
import torch
from processes import in_a_group, on_processes
from safetensors.torch import load_file
from tiny_runs import tool_run
from torch import distributed as dist
from torch import nn

from contrastive_core.checkpoint import load_checkpoint_, optimizer_tensors, save_checkpoint, take_part
from contrastive_core.losses import InfoNCELoss, NTXentLoss, SigmoidLoss
from contrastive_core.momentum import ema_update_
from contrastive_core.optim import LARS, parameter_groups
from contrastive_core.run_log import read_metrics
from contrastive_core.sharding import blocks_of, copy_whole_, shard_, split_like, whole
from cpc.encoders import PatchResNet

CPU = torch.device("cpu")
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=0.01),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "lars simclr": partial(LARS, lr=0.3, weight_decay=1e-3),
    "lars moco_v3": partial(LARS, lr=0.3, weight_decay=1e-3, convention="moco_v3"),
}


def encoder(recompute=False):
    torch.manual_seed(0)
    built = PatchResNet([2, 1], [4, 8], bottlenecks=None, stem="small", stem_width=4, stem_stride=2).double()
    built.recompute = recompute
    return built


def images(step):
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def steps(module, optimizer, images_of, start=0):
    """Two, each a mean over all processes' images, clipped; returns the norms."""
    norms = []
    for step in range(start, start + 2):
        module(images_of(step)).square().mean().backward()
        norms.append(float(whole(nn.utils.clip_grad_norm_(module.parameters(), 0.05))))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def started(name, split, recompute=False):
    module = encoder(recompute)
    if split:
        shard_(module, CPU)
    return module, OPTIMIZERS[name](parameter_groups(module))


LEARNED = {
    "info_nce": lambda: InfoNCELoss(0.5, learn_temperature=True),
    "nt_xent": lambda: NTXentLoss(0.5, learn_temperature=True),
    "nt_xent at its bound": lambda: NTXentLoss(0.011, learn_temperature=True),
    "sigmoid": SigmoidLoss,
}


class Learner(nn.Module):
    """Both views `n 2 5` through one layer, and a loss with learned numbers of its own."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.loss = nn.Linear(5, 4), loss

    def forward(self, views):
        z1, z2 = self.layer(views).unbind(1)
        pairs = [torch.arange(len(z1))] if isinstance(self.loss, InfoNCELoss) else []
        return self.loss(z1, z2, *pairs)


def learned(name, own, split):
    """The state after each of eight steps; positives win at first, and T falls, then are anyone, and it rises."""
    module = Learner(LEARNED[name]()).double()
    if split:
        shard_(module, CPU)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    states = []
    for step in range(8):
        rows = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        views = torch.stack([rows, rows.roll(step // 4, 0)], 1)
        module(views[own]).backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append({key: whole(value).clone() for key, value in module.state_dict().items()})
    return states


def tensors_of(module, optimizer):
    named = {**module.state_dict(), **optimizer_tensors(optimizer)}
    return {name: whole(tensor).clone() for name, tensor in named.items()}


def one_process(rank, folder):
    warnings.simplefilter("ignore", FutureWarning)
    found = {}
    for name in OPTIMIZERS:
        module, optimizer = started(name, split=True)
        averaged = encoder()
        shard_(averaged, CPU)
        norms = steps(module, optimizer, lambda step: images(step)[2 * rank : 2 * rank + 2])
        ema_update_(averaged, module, 0.9)
        found[name] = norms, tensors_of(module, optimizer), tensors_of(averaged, optimizer)
        modules = {"net": module}
        if rank == 0:
            save_checkpoint(folder / name, 2, modules, optimizer, {})
        else:
            take_part(modules, optimizer)
        dist.barrier()
        module, optimizer = started(name, split=True)
        load_checkpoint_(folder / name / "step_00000002", {"net": module}, optimizer)
        norms = steps(module, optimizer, lambda step: images(step)[2 * rank : 2 * rank + 2], start=2)
        found[f"{name} resumed"] = norms, tensors_of(module, optimizer)
    for name in LEARNED:
        found[name] = learned(name, slice(4 * rank, 4 * rank + 4), split=True)
    learner = Learner(SigmoidLoss())
    shard_(learner, CPU)
    found["a number"] = whole(split_like(torch.tensor(2.0), learner.loss.bias))
    again, optimizer = started("adam", split=True, recompute=True)
    found["recomputed"] = steps(again, optimizer, lambda step: images(step)[2 * rank : 2 * rank + 2])
    found["own"] = sum(p.to_local().numel() for p in again.parameters())
    shown = encoder()
    copy_whole_(shown, again)
    found["shown"] = shown.state_dict(), {key: whole(value) for key, value in again.state_dict().items()}
    weight = next(again.parameters())
    found["there and back"] = whole(weight), whole(split_like(whole(weight).detach(), weight))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharding")


@pytest.fixture(scope="module")
def processes(folder):
    return in_a_group(2, one_process, folder)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_one_process(folder, processes, name):
    module, optimizer = started(name, split=False)
    averaged = encoder()
    norms = steps(module, optimizer, images)
    ema_update_(averaged, module, 0.9)
    expected = norms, tensors_of(module, optimizer), tensors_of(averaged, optimizer)
    for own in processes:
        torch.testing.assert_close(own[name], expected, rtol=1e-9, atol=1e-12)

    # its checkpoint is whole: it goes on in one process, as it does in two
    module, optimizer = started(name, split=False)
    load_checkpoint_(folder / name / "step_00000002", {"net": module}, optimizer)
    expected = steps(module, optimizer, images, start=2), tensors_of(module, optimizer)
    for own in processes:
        torch.testing.assert_close(own[f"{name} resumed"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LEARNED)
def test_what_a_loss_learns_is_that_of_one_process(processes, name):
    """Its bound included: kept in a gathered copy alone, what is held would fall on, and be long in rising again."""
    alone = learned(name, slice(None), split=False)
    for own in processes:
        torch.testing.assert_close(own[name], alone, rtol=1e-9, atol=1e-12)
    temperatures = [float(state["loss.temperature.log_temperature"].exp()) for state in alone]
    if name == "nt_xent at its bound":
        assert min(temperatures) < 0.01 < temperatures[-1]


def test_each_process_holds_about_half(processes):
    everything = sum(parameter.numel() for parameter in encoder().parameters())
    held = [own["own"] for own in processes]
    assert sum(held) == everything
    assert max(held) <= 0.52 * everything


def test_recomputed_blocks_are_put_together_again(processes):
    norms = steps(*started("adam", split=False), images)
    assert [own["recomputed"] for own in processes] == [pytest.approx(norms)] * 2


def test_what_is_shown_is_whole(processes):
    for own in processes:
        torch.testing.assert_close(*own["shown"], rtol=0, atol=0)
        assert torch.equal(*own["there and back"])


def test_a_learned_number_that_was_saved_as_a_scalar_is_split(processes):
    assert [own["a number"].tolist() for own in processes] == [[2.0], [2.0]]


def test_what_is_not_split_stays_as_it_is():
    tensor = torch.ones(3)
    assert whole(tensor) is tensor
    assert split_like(tensor, torch.zeros(3)) is tensor


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))

    def forward(self, x):
        return self.inner(x)


def test_blocks_are_the_outermost_in_a_list():
    first, second, empty = Block(), Block(), nn.Sequential(nn.ReLU())
    first.inner.append(Block())
    stages = nn.ModuleList([nn.Sequential(first, nn.ReLU()), second, empty])
    module = nn.ModuleDict({"stages": stages, "alone": Block()})
    assert list(blocks_of(module)) == [first, second]
    stack = nn.Sequential(Block(), Block())
    assert len(list(blocks_of(stack))) == 2
    assert not list(blocks_of(torch.fx.symbolic_trace(stack)))  # which has them, but calls their layers


TINY = ["steps=4", "batch_size=8", "encoder.width=4", "method.context.width=8", "method.context.layers=1", "threads=1"]
TINY += ["log_every=1", "device=cpu", "averaging=0.5", "probe_every=2", "probe_images=50", "save_every=2", "clip=0.5"]


def test_a_split_run_is_the_run(as_a_new_process, compose, tmp_path):
    """Probes, averaged weights, checkpoints and the export; and one process goes on where two were."""
    from cpc.pretrain import pretrain

    split = tmp_path / "split"
    on_processes(2, tool_run, "pretrain_cpc", *TINY, "shard=true", f"run_dir={split}")
    alone = pretrain(compose(*TINY, f"run_dir={tmp_path / 'alone'}"))

    def assert_the_same():
        for file in ("encoder.safetensors", "checkpoints/step_00000004/averaged.safetensors"):
            ours, theirs = (load_file(folder / file) for folder in (split, alone))
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        ours, theirs = (read_metrics(folder) for folder in (split, alone))
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for name, within in (("loss", 1e-4), ("gradient_norm", 1e-3), ("knn", 0.11)):
            ours_of, theirs_of = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
            assert ours_of == pytest.approx(theirs_of, abs=within)

    assert_the_same()
    shutil.rmtree(split / "checkpoints/step_00000004")
    (split / "encoder.json").unlink()
    pretrain(compose(*TINY, f"run_dir={split}", "resume=auto"))
    assert_the_same()
