"""A page about one run or several: `python tools/report.py RUN [RUN ...] --out report.html`.

One HTML file that loads nothing: the course of training on the same axes for all runs, what an export knows of images,
the configuration beside the paper's recipe, and the command to repeat each run. A run may be at work, killed or
collapsed; what its folder does not hold is left out, with the reason.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

import cpc.pretrain  # noqa: F401  # registers what configs/pretrain.yaml is made of
from contrastive_core.checkpoint import replacing
from contrastive_core.data import Splits
from contrastive_core.reading import read_json
from contrastive_core.run_log import read_metrics
from cpc.entry import build, config_search
from cpc.foreign import run_augmentation, run_config, run_data
from cpc.mistakes import USER_ERRORS, told
from cpc.report_charts import Line, heat_maps, line_chart, number, plain_table, share_table
from cpc.report_pictures import PLACED, TOGETHER, as_data, augmented, neighbours, positions, predictions, some
from cpc.run_folder import MAY_CHANGE
from cpc.runs import holds_runs, state_of
from cpc.shortcuts import NUMBERS, read_findings

PAPERS = {
    "CPC": "imagenet_cpc_v2", "SimCLR": "imagenet_simclr", "SimCLRv2": "imagenet_simclr_v2", "MoCo": "imagenet_moco_v2",
    "MoCoV3": "imagenet_moco_v3", "PIRL": "imagenet_pirl", "BYOL": "imagenet_byol", "SimSiam": "imagenet_simsiam",
}  # fmt: skip
"""The recipe that a method's configuration is laid beside, by the method's class."""


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it: rows of metrics.jsonl, configuration, card ({} = not exported), state."""

    folder: Path
    name: str
    rows: list[dict[str, Any]]
    config: dict[str, Any]
    card: dict[str, Any]
    state: str

    @property
    def method(self) -> str:
        """The class of its method."""
        node = self.config.get("method")
        return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, dict) else ""

    def points(self, key: str) -> list[tuple[float, float]]:
        """Step and value of the rows that have one."""
        return [(float(row["step"]), float(row[key])) for row in self.rows if row.get(key) is not None]

    def last(self, key: str) -> float | None:
        """The last row's that has one."""
        points = self.points(key)
        return points[-1][1] if points else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises FileNotFoundError for a folder that holds no run, ValueError for one that cannot be read."""
    runs = []
    for folder in folders:
        written, config = run_config(folder)
        if not config or not (folder / ".lock").is_file():
            raise FileNotFoundError(f"{folder} holds no run: pass a folder with config.yaml and metrics.jsonl")
        if holds_runs(config):
            raise FileNotFoundError(f"{folder} is no run but holds some: pass {folder / 'pretrain'}")
        rows = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
        card = read_json(folder / "encoder.json") if (folder / "encoder.json").is_file() else {}
        names = [other.resolve().name for other in folders]
        own = folder.resolve()
        name = own.name if names.count(own.name) == 1 else f"{own.parent.name}/{own.name}"
        runs.append(Run(folder, name, rows, config, card, state_of(folder)))
    return runs


# ---- the parts of the page ----


def summary(runs: Sequence[Run]) -> Iterator[str]:
    """A row a run, and in plain words what is wrong with one."""
    rows = []
    for run in runs:
        step = int(max((row["step"] for row in run.rows), default=0))
        shown = [run.last(key) for key in ("loss", "chance_loss", "knn")]
        numbers = ["" if value is None else f"{value:.3f}" for value in shown]
        rows.append([run.name, run.state, run.method, f"{step:,} of {run.config.get('steps', 0):,}", *numbers])
    yield plain_table(["run", "state", "method", "steps", "loss", "chance", "kNN accuracy"], rows)
    for run in runs:
        if run.card.get("collapsed"):
            line = f"{run.name} has {run.card['collapsed']}. It gives every image much the same vector: see the spread."
            yield f"<p class=warning>{escape(line)}</p>"
        elif run.state == "killed":
            line = f"{run.name} was stopped before its end: the same command with resume=auto goes on."
            yield f"<p class=warning>{escape(line)}</p>"
        if not run.rows:
            yield f"<p class=note>{escape(run.name)} has no rows in metrics.jsonl yet.</p>"


def course(runs: Sequence[Run]) -> Iterator[str]:
    """Charts over the steps, all runs on the same axes."""
    several = len(runs) > 1

    def lines(key: str, label: str, dashed: bool = False) -> list[Line]:
        return [
            Line(f"{run.name} {label}" if several else label, run.points(key), place, dashed)
            for place, run in enumerate(runs)
        ]

    chance = lines("chance_loss", "chance", dashed=True)
    against = any(line.points for line in chance)  # BYOL and SimSiam have none, and no nats
    title, unit = ("Loss against chance", "nats; chance is the log of the candidates") if against else ("Loss", "")
    yield line_chart(title, unit, [*lines("loss", "loss"), *chance])
    yield line_chart("Positives told from all candidates", "share", lines("accuracy", "accuracy"))
    yield line_chart("kNN among training images", "accuracy", lines("knn", "kNN"))
    yield line_chart("Spread of the projections", "1 = even, 0 = collapsed", lines("spread", "spread"))
    yield line_chart("Effective rank of the projections", "of at most 64", lines("effective_rank", "effective rank"))
    yield line_chart("Features' standard deviation", "1/sqrt(d) = even", lines("feature_std", "standard deviation"))
    yield line_chart("Gradient's norm", "", lines("gradient_norm", "norm"))
    yield line_chart("Learning rate", "", lines("lr", "rate"))
    yield line_chart("Throughput", "images a second", lines("images_per_second", "images a second"))


def by_direction(run: Run) -> str:
    """CPC: how often the right patch is found, by direction and offset, at the last row."""
    last = next((row for row in reversed(run.rows) if any(key.startswith("accuracy/") for key in row)), None)
    if last is None:
        return ""
    found: dict[str, dict[str, float]] = {}
    for key, value in last.items():
        if key.startswith("accuracy/") and value is not None:
            direction, _, offset = key.removeprefix("accuracy/").rpartition("_")
            found.setdefault(direction, {})[f"{offset} ahead"] = value
    title = f"{run.name}: the right patch among {number(last.get('negatives', 0) + 1)}, step {last['step']}"
    return share_table(title, found, "direction")


def cheating(run: Run) -> Iterator[str]:
    """What tools/shortcuts.py found of a run, where it was asked: a line a short-cut, and what it was read off."""
    try:
        findings = read_findings(run.folder)
    except (ValueError, OSError) as error:
        yield f"<p class=note>{escape(run.name)}: {escape(' '.join(str(error).split()))}</p>"
        return
    if not findings:
        return
    lines = [[run.name, each.shortcut, *each.verdict.split(": ", 1)] for each in findings]
    yield plain_table(["run", "short-cut", "taken", ""], lines, [each.found is True for each in findings])
    rows = [
        [each.shortcut, row["case"], *("" if row.get(key) is None else f"{row[key]:.3f}" for key in NUMBERS)]
        for each in findings
        for row in each.rows
    ]
    head = ["short-cut", "case", "loss", "chance", "accuracy", "chance", "image's mean alone"]
    yield f"<details><summary>{escape(run.name)}: the numbers</summary>{plain_table(head, rows)}</details>"


def pictures(run: Run) -> Iterator[str]:
    """What a finished run's encoder knows of images, or why it is not shown."""
    if not run.card:
        yield f"<p class=note>{escape(run.name)}: no encoder is exported yet, so nothing is shown of what it knows.</p>"
        return
    try:
        splits: Splits = build(OmegaConf.create({**run_data(run.folder), "size": run.card["input"]["load_size"]}))
        yield _picture(as_data(lambda file: neighbours(run.folder, splits, file)), f"{run.name}: nearest neighbours")
        if run.method == "CPC":
            offset = int(max(run.config["method"]["offsets"]))
            title = f"{run.name}: what is expected {offset} cells below the blue one; white is what is there"
            if "down" in run.config["method"]["directions"]:
                yield _picture(as_data(lambda file: predictions(run.folder, splits, file, offset=offset)), title)
            yield by_position(run, splits)
            yield from augmentation(run, splits)
    except (*USER_ERRORS, KeyError, RuntimeError) as error:
        reason = escape(" ".join(str(error).split()))
        yield f"<p class=note>{escape(run.name)}: no pictures, since its data or weights cannot be read ({reason}).</p>"


def by_position(run: Run, splits: Splits) -> str:
    """CPC: how often a held-out image's patch is told from the others, by its place on the grid."""
    held_out = splits.train if splits.test is None else splits.test
    images = some(held_out, PLACED)
    offsets = run.config["method"]["offsets"]
    grids = positions(run.folder, images, offsets)
    groups = -(-len(images) // TOGETHER)
    least, most = len(images) // groups, -(-len(images) // groups)
    compared = most if least == most else f"{least} or {most}"
    note = (
        f"Of each direction, by the place of the patch that is predicted: the share of {len(images)} "
        f"{'training' if splits.test is None else 'held-out'} images in which it is told from all patches of "
        f"{compared} of them, the mean over offsets {', '.join(map(str, offsets))}. "
        "Blank: nothing predicts it. Patches that are all alike, such as empty ones, are not told from one another. "
        "Beside a direction, the mean of its cells."
    )
    return heat_maps(f"{run.name}: where on the grid the right patch is found", grids, note)


def augmentation(run: Run, splits: Splits) -> Iterator[str]:
    """CPC: what becomes of a patch, or why it is not shown."""
    try:
        node = run_augmentation(run.folder)
    except ValueError as error:  # the user's own: our page calls nothing that a folder names
        yield f"<p class=note>{escape(run.name)}: no augmented patches ({escape(str(error))}).</p>"
        return
    if node:
        augment = build(OmegaConf.create(node))
        data = as_data(lambda file: augmented(run.folder, augment, splits, file))
        yield _picture(data, f"{run.name}: a patch, and beside it as the run augments it, drawn anew each time")


def _picture(data: str, title: str) -> str:
    return f'<figure><figcaption>{escape(title)}</figcaption><img alt="{escape(title)}" src="{data}"></figure>'


def labels(sweep: Path) -> Iterator[str]:
    """The curve of a label sweep and what is saved.

    Raises FileNotFoundError for a folder without a summary, ValueError for one that is not a sweep's.
    """
    file = sweep / "summary.json"
    if not file.is_file():
        raise FileNotFoundError(f"no summary.json in {sweep}: pass --labels with the folder of tools/sweep_labels.py")
    found = read_json(file, largest=1 << 26)
    try:
        yield from _labels(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not what tools/sweep_labels.py writes: {error!r}") from None


def _labels(found: Any) -> Iterator[str]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in found["accuracies"]:
        curves.setdefault(f"{row['method']}, {row['protocol']}", []).append((float(row["labels"]), row["accuracy"]))
    lines = [Line(name, sorted(points), place) for place, (name, points) in enumerate(curves.items())]
    chart = line_chart("Accuracy against labels", "share", lines, x="labels", logarithmic=True)
    yield f"<div class=charts>{chart}</div>"
    rows = [
        [
            row["method"],
            row["protocol"],
            str(row["labels"]),
            row["against"],
            row["saving"],
            f"{row['low']} to {row['high']}",
        ]
        for row in found["savings"]
    ]
    yield plain_table(["method", "protocol", "labels", "against", "times the labels", "interval"], rows)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and what they say. Example: `flat({"a": {"b": [1]}})` is {"a.b": "[1]"}."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value) if isinstance(value, list | dict) else str(value)
    return found


def papers_recipe(method: str) -> dict[str, str]:
    """The recipe of the method's paper, flat; {} where there is none for it."""
    if method not in PAPERS:
        return {}
    with config_search():
        cfg = hydra.compose("pretrain", [f"experiment={PAPERS[method]}", "data.root=."])
    return flat(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


def configuration(run: Run) -> Iterator[str]:
    """Every key of a run beside the paper's recipe; what differs is marked."""
    own, paper = flat(run.config), papers_recipe(run.method)
    keys = [key for key in own if key.partition(".")[0] not in MAY_CHANGE]
    differs = [bool(paper) and own[key] != paper.get(key, "") for key in keys]
    head = ["key", "this run"] + (["the paper's recipe"] if paper else [])
    rows = [[key, own[key], *([paper.get(key, "")] if paper else [])] for key in keys]
    recipe = f", {sum(differs)} of them other than in experiment={PAPERS[run.method]}" if paper else ""
    told = f"{run.name}: {len(keys)} keys{recipe}"
    yield f"<details><summary>{escape(told)}</summary>{plain_table(head, rows, differs)}</details>"


def to_repeat(run: Run) -> str:
    """The command that trains it again, in a new folder: its whole config.yaml is the configuration."""
    if run.config.get("run"):  # tools/finetune.py takes the encoder from there, and none from a configuration
        return f"# tools/finetune.py, with what {run.folder.name}/config.yaml says"
    tool = "distill" if "teacher" in run.config else "finetune" if "label_seed" in run.config else "pretrain"
    return (
        f"# as {run.folder.name}/config.yaml says; with run_dir=FOLDER resume=auto a run that was killed goes on\n"
        f"python tools/{tool}.py --config-dir={shlex.quote(str(run.folder))} --config-name=config "
        "hydra.run.dir=. hydra.output_subdir=null hydra/job_logging=stdout run_dir=null"
    )


def versions() -> str:
    """Of what the page was made with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "kornia", "accelerate"))
    return f"Python {platform.python_version()}, {packages}"


def page(runs: Sequence[Run], sweep: Path | None, *, with_pictures: bool = True) -> str:
    """The whole file."""
    here = Path(__file__).parent
    tables = "".join(by_direction(run) for run in runs)
    charts = "".join(course(runs))
    parts = [f"<h1>{escape(', '.join(run.name for run in runs))}</h1>", *summary(runs)]
    parts += ["<h2>The course of training</h2>", f"<div class=charts>{charts}</div>"]
    parts += ["<h2>What is predicted</h2>", f"<div class=charts>{tables}</div>"] if tables else []
    cheats = [part for run in runs for part in cheating(run)]
    parts += ["<h2>Is it cheating?</h2>", *cheats] if cheats else []
    if with_pictures:
        parts += [
            "<h2>What the encoder knows</h2>",
            "<div class=pictures>",
            *(p for run in runs for p in pictures(run)),
            "</div>",
        ]
    parts += ["<h2>How many labels that saves</h2>", *labels(sweep)] if sweep is not None else []
    parts += ["<h2>Configuration</h2>", *(part for run in runs for part in configuration(run))]
    parts += ["<h2>Again</h2>", *(f"<pre>{escape(to_repeat(run))}</pre>" for run in runs)]
    parts.append(
        f"<p class=note>{escape(versions())}; seeds {', '.join(str(run.config.get('seed')) for run in runs)}.</p>"
    )
    title = escape(", ".join(run.name for run in runs))
    style, script = ((here / name).read_text() for name in ("report.css", "report.js"))
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{style}</style></head>"
        f"<body>{''.join(parts)}<script>{script}</script></body></html>\n"
    )


EPILOG = """examples:
  python tools/report.py runs/mnist5k-20261127                          # report.html in the run's folder
  python tools/report.py runs/cpc runs/simclr --out both.html           # side by side
  python tools/report.py runs/cpc --labels runs/cpc/labels              # with the label curve of a sweep
  python tools/report.py runs/cpc --no-pictures                         # where the data is not at hand

exit codes: 0 done, 2 a mistake"""


def main() -> None:
    """Write the page; a mistake is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="the file to write; by default report.html in the first run's folder")
    parser.add_argument("--labels", type=Path, metavar="SWEEP", help="the folder of a label sweep, for its curve")
    parser.add_argument("--no-pictures", action="store_true", help="read neither data nor weights")
    asked = parser.parse_args()
    try:
        out = asked.out or asked.runs[0] / "report.html"
        written = page(read_runs(asked.runs), asked.labels, with_pictures=not asked.no_pictures)
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as partial:
            partial.write_text(written)
    except USER_ERRORS as error:
        sys.exit(told(error))
    print(out)


if __name__ == "__main__":
    main()
