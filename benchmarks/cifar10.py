"""CIFAR-10, a small encoder, 30 minutes on two cores.

    python benchmarks/cifar10.py --train cifar10-train.parquet --test cifar10-test.parquet --run runs/cifar10

The parquet files hold a column `image` of encoded bytes and a column `label`. Pre-trains with experiment=cifar10_cpc
(unless the run is there already), evaluates the frozen encoder and the same one untrained, and two baselines
that need no encoder on the same 500 labels: ridge regression on an 8x8 thumbnail with a colour histogram, and a small
BatchNorm CNN trained for 40 seconds. Writes benchmarks/results/cifar10.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from record import launch, python, run_measured, write
from torch import Tensor, nn
from torch.nn import functional as F

from contrastive_core.augment import RandomCrop, RandomFlip
from contrastive_core.data import ImageDataset, labels_per_class, parquet, sample_ids
from contrastive_core.evaluate.baselines import ridge_probe, thumbnail_features
from contrastive_core.evaluate.linear import few_label_accuracy
from contrastive_core.randomness import Randomness

PER_CLASS, DRAWS = 50, 5


def small_cnn() -> nn.Sequential:
    """Four convolutions with BatchNorm, 32 px to 4 px: what one writes down without tuning."""
    layers: list[nn.Module] = []
    for inner, outer, pool in ((3, 32, False), (32, 64, True), (64, 128, True), (128, 128, True)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pool else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10))


def cnn_accuracy(images: Tensor, labels: Tensor, test: ImageDataset, seconds: float) -> float:
    """Train on `n 3 32 32` uint8 for so many seconds, with crops and flips; accuracy on the test images."""
    torch.manual_seed(0)
    network = small_cnn().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=5e-2)
    crop, flip = RandomCrop(32, padding=4), RandomFlip()
    began, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - began) / seconds) < 1:
        chosen = torch.randperm(len(labels))[:64]
        randomness = Randomness(0, step, torch.arange(64))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - share)
        batch = flip(crop(images[chosen].float() / 255, randomness), randomness) * 4 - 2
        F.cross_entropy(network(batch), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    assert test.pixels is not None
    with torch.no_grad():
        logits = torch.cat([network.eval()(part.float() / 255 * 4 - 2) for part in test.pixels.split(1000)])
    return (logits.argmax(1) == test.labels).float().mean().item()


def baselines(train: ImageDataset, test: ImageDataset) -> dict[str, list[float]]:
    """Accuracies over the label draws of what needs no pre-training."""
    assert train.pixels is not None
    assert test.pixels is not None
    thumbnails = (thumbnail_features(train.pixels), train.labels, thumbnail_features(test.pixels), test.labels)
    ids = sample_ids(train)
    ridge = few_label_accuracy(*thumbnails, per_class=PER_CLASS, draws=DRAWS, classifier=ridge_probe, ids=ids)
    draws = [labels_per_class(train.labels, PER_CLASS, seed=draw, ids=ids) for draw in range(DRAWS)]
    cnn = [cnn_accuracy(train.pixels[rows], train.labels[rows], test, seconds=40) for rows in draws]
    return {"ridge on thumbnail and colour histogram": ridge, "small CNN, 40 seconds": cnn}


def main() -> None:
    """Pre-train, evaluate, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("overrides", nargs="*", help="further overrides of tools/pretrain_cpc.py")
    arguments = parser.parse_args()
    train_file, test_file, run = (path.resolve() for path in (arguments.train, arguments.test, arguments.run))

    data = ["data=parquet", f"data.train={train_file}"]
    command = ["experiment=cifar10_cpc", *data, f"run_dir={run}", *arguments.overrides]
    if (run / "config.yaml").is_file() and not (run / "encoder.safetensors").is_file():
        raise SystemExit(f"{run} was interrupted, so its seconds are not known: remove it, or pass another --run")
    if not (run / "encoder.safetensors").is_file():
        seconds, peak = run_measured(launch("tools/pretrain_cpc.py", *command), every=5.0)
        (run / "cost.json").write_text(json.dumps({"seconds": round(seconds, 1), "peak_pss_gib": round(peak, 2)}))
    if not (run / "evaluation.json").is_file():
        options = ["untrained=true", f"labels_per_class=[{PER_CLASS}]", f"draws={DRAWS}", "paper_epochs=10"]
        test = [f"run={run}", *data, f"data.test={test_file}", "precision=bf16"]
        run_measured(python("tools/evaluate.py", *test, *options), every=5.0)

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [row["images_per_second"] for row in metrics if "images_per_second" in row]
    results = {
        "pretraining": json.loads((run / "cost.json").read_text())
        | {
            "steps": metrics[-1]["step"],
            "images_per_second_median": statistics.median(rates),
            "loss": [row["loss"] for row in metrics if "loss" in row][-1],
            "chance_loss": metrics[0]["chance_loss"],
        },
        "rows": json.loads((run / "evaluation.json").read_text())["rows"],
        "baselines_500_labels": {
            name: {"accuracy": statistics.mean(values), "spread": statistics.stdev(values), "draws": values}
            for name, values in baselines(*parquet(train_file, test_file, size=32)).items()  # type: ignore[arg-type]
        },
    }
    shown = "python benchmarks/cifar10.py --train cifar10-train.parquet --test cifar10-test.parquet"
    write("cifar10", " ".join([shown, *arguments.overrides]), results)


if __name__ == "__main__":
    main()
