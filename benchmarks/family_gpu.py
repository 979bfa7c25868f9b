"""SimCLR with a ResNet-18 on CIFAR-10 within ten minutes of one GPU: how fast, and how good.

    PYTHONPATH=. python benchmarks/family_gpu.py --train cifar10-train.parquet --test cifar10-test.parquet --out F.json

torch, torchvision, accelerate, einops, pyarrow and scikit-learn are all it needs. First the way: images a second of a
step as it stands, in channels_last, in bf16 as well, and with the encoder compiled on top, and of the views alone. Then
the fastest of them trains for as many epochs as fit `--seconds`, and is read by kNN and a linear probe with all labels.
The recipe is that of experiment=cifar10_simclr but for SGD and a temperature of 0.2, which suit a short run. Every
part is written as it ends, and one that is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from contrastive_core.augment.views import Views, simclr
from contrastive_core.data import ImageDataset, Splits, parquet, training_batches
from contrastive_core.encoders import TorchvisionTrunk
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.knn import knn_accuracy
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.heads import ProjectionHead
from contrastive_core.losses import nt_xent
from contrastive_core.methods.simclr import SimCLR
from contrastive_core.optim import linear_scaling, parameter_groups, warmup_cosine
from contrastive_core.randomness import Randomness
from contrastive_core.training import train_steps

SIZE, MEAN, STD = 32, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
WAY = {
    "as it stands": {"layout": torch.contiguous_format, "bf16": False, "compiled": False},
    "channels_last": {"layout": torch.channels_last, "bf16": False, "compiled": False},
    "channels_last, bf16": {"layout": torch.channels_last, "bf16": True, "compiled": False},
    "channels_last, bf16, compiled": {"layout": torch.channels_last, "bf16": True, "compiled": True},
}


class Compiled(nn.Module):
    """An encoder whose forward is compiled; its weights keep their names."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim
        self._run = torch.compile(encoder)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self._run(images)
        return features


def views() -> Views:
    """SimCLR's for CIFAR-10."""
    return Views([simclr(SIZE, strength=0.5, blur=0.0)] * 2, mean=MEAN, std=STD, image_size=SIZE)


def trainer(
    dataset: ImageDataset, batch: int, steps: int, *, layout: torch.memory_format, bf16: bool, compiled: bool
) -> tuple[SimCLR, Iterator[Any]]:
    """The method and its steps."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not torch.cuda.is_available())
    encoder: nn.Module = TorchvisionTrunk("resnet18", small_stem=True)
    method = SimCLR(
        Compiled(encoder) if compiled else encoder,
        head=partial(ProjectionHead, output_norm="norm"),
        loss=partial(nt_xent, temperature=0.2),
    ).to(memory_format=layout)
    optimizer = torch.optim.SGD(
        parameter_groups(method), lr=linear_scaling(0.06, batch), momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    prepared, prepared_optimizer = accelerator.prepare(method, optimizer)
    batches = training_batches(dataset, batch_size=batch, seed=0, start=0, steps=steps)
    schedule = partial(warmup_cosine, warmup=0.05)
    return method, train_steps(
        prepared, prepared_optimizer, accelerator, batches, views(), seed=0, start=0, steps=steps, schedule=schedule
    )


def wait() -> None:
    """For what the device still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def images_per_second(dataset: ImageDataset, batch: int, timed: int, **options: Any) -> float:
    """Of whole steps, `timed` of them after a fifth as many."""
    _, steps = trainer(dataset, batch, 10 * timed, **options)
    for _ in range(max(2, timed // 5)):
        next(steps)
    wait()
    began = time.perf_counter()
    for _ in range(timed):
        next(steps)
    wait()
    return timed * batch / (time.perf_counter() - began)


def views_per_second(dataset: ImageDataset, batch: int, timed: int) -> float:
    """Images a second of the views alone, both of each, on the device."""
    make, device = views(), "cuda" if torch.cuda.is_available() else "cpu"
    assert dataset.pixels is not None
    images = dataset.pixels[:batch].to(device)
    for step in range(timed + 2):
        if step == 2:
            wait()
            began = time.perf_counter()
        make(images, Randomness(0, step, torch.arange(batch)))
    wait()
    return timed * batch / (time.perf_counter() - began)


def train(splits: Splits, batch: int, seconds: float, rate: float, **options: Any) -> dict[str, Any]:
    """As many whole epochs as fit, and what its encoder is worth."""
    epoch = len(splits.train) // batch
    epochs = max(1, int(seconds * rate / (epoch * batch)))
    began = time.perf_counter()
    method, steps = trainer(splits.train, batch, epochs * epoch, **options)
    losses = [result.metrics["loss"] for result in steps]
    wait()
    took = time.perf_counter() - began
    encoder = Normalised(method.encoder).eval()
    device = next(encoder.parameters()).device
    assert splits.test is not None
    features = [extract_features(encoder, part, batch_size=500, device=device) for part in (splits.train, splits.test)]
    return {
        "epochs": epochs,
        "seconds": took,
        "seconds_an_epoch": took / epochs,
        "loss": torch.stack(losses[-epoch:]).mean().item(),
        "kNN": float(knn_accuracy(*features[0], *features[1])),
        "linear": linear_probe(*features[0], *features[1]).accuracy,
    }


class Normalised(nn.Module):
    """Images in [0, 1] as the encoder was trained on."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        features: Tensor = self.encoder(((images - mean) / std).contiguous(memory_format=torch.channels_last))
        return features


def measure(part: str, done: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """One part, in a process of its own: accelerate's precision is fixed for as long as a process lives."""
    splits = parquet(arguments.train, arguments.test, size=SIZE)
    if arguments.images is not None:
        few = torch.arange(arguments.images)
        assert splits.test is not None
        splits = Splits(splits.train.subset(few), splits.test.subset(few))
    if part == "views alone":
        return views_per_second(splits.train, arguments.batch, arguments.timed)
    if part in WAY:
        return images_per_second(splits.train, arguments.batch, arguments.timed, **WAY[part])
    fastest = max((name for name in WAY if name in done), key=lambda name: done[name])
    return {"way": fastest, **train(splits, arguments.batch, arguments.seconds, done[fastest], **WAY[fastest])}


def main() -> None:
    """Measure what is missing; every part is on disk before the next begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=420, help="of training")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--timed", type=int, default=40, help="steps of each part of the way")
    parser.add_argument("--images", type=int, default=None, help="fewer training and test images, to try it out")
    parser.add_argument("--part", action="append", help="only these parts; without it all")
    parser.add_argument("--here", action="store_true", help="in this process, which is for one part")
    arguments = parser.parse_args()
    out: Path = arguments.out
    for part in arguments.part or ["views alone", *WAY, "run"]:
        done: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
        if part in done:
            continue
        if not arguments.here:
            options = ["--out", str(out), "--train", str(arguments.train), "--test", str(arguments.test)]
            options += [f"--{name}={getattr(arguments, name)}" for name in ("seconds", "batch", "timed")]
            options += [] if arguments.images is None else [f"--images={arguments.images}"]
            subprocess.run([sys.executable, __file__, *options, "--part", part, "--here"], check=True)
            continue
        done |= {"card": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"}
        done |= {"torch": torch.__version__, "batch": arguments.batch, part: measure(part, done, arguments)}
        out.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{part}: {done[part]}", flush=True)


if __name__ == "__main__":
    main()
