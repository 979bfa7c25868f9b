"""SimCLRv2 in one command: `accelerate launch tools/simclr_v2.py fraction=0.1 out=DIR [overrides]`.

Pre-train without labels, fine-tune with a few, distil with all images (Chen et al. 2020b): three runs, each of its own
tool's configuration in a folder of its own under `out`, and `summary.json` with what each is worth on the test images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from accelerate import Accelerator
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from contrastive_core.data import BadImages, ImageDataset, Splits
from contrastive_core.evaluate.features import extract_features
from contrastive_core.evaluate.linear import linear_probe
from contrastive_core.plots import format_table
from cpc.distill import check_asked, distill
from cpc.entry import build, check_complete, command, start_accelerator
from cpc.features import load_encoder
from cpc.finetune import (
    OF_THE_RUN,
    WHICH_LABELS,
    check_which_labels,
    chosen_labels,
    finetune,
    fitting_batch,
    labelled_test,
    let_classifier_decay_,
)
from cpc.mirroring import crop_and_flip
from cpc.pretrain import build_method, pretrain
from cpc.run import as_written, check_numbers
from cpc.run_folder import check_folder, claimed, may_change

TOOLS = ("pretrain", "finetune", "distill")
SHARED = ("seed", "precision", "device", "workers", "threads", "timeout")
OF_THE_PROCESS = ("precision", "device", "threads", "timeout")
"""What accelerate fixes for as long as a process lives, and so for all steps."""


@dataclass
class SimCLRv2Schema:
    """Types of the top-level keys of configs/simclr_v2.yaml."""

    out: str
    fraction: float | None
    labels: int | None
    labels_per_class: int | None
    label_list: str | None
    label_seed: int
    supervised: bool
    seed: int
    precision: str
    device: str | None
    workers: int
    threads: int | None
    timeout: float
    encoder: Any
    data: Any
    pretrain: Any = field(default_factory=dict)
    finetune: Any = field(default_factory=dict)
    distill: Any = field(default_factory=dict)


class Step(NamedTuple):
    """A run: its name, what runs it, its configuration, and the file that it writes last."""

    name: str
    job: Callable[[DictConfig], Path]
    cfg: DictConfig
    last_file: str


# ---- the configurations of the steps ----


def flattened(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values. Example: {"a": {"b": 1}, "c": 2} gives ("a.b", 1), ("c", 2)."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def as_override(name: str, value: Any) -> str:
    """A key and its value as hydra reads them. Example: ("run_dir", "a b") gives "run_dir='a b'"."""
    return f"{name}={_in_hydras_grammar(value)}"


def _in_hydras_grammar(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_hydras_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_in_hydras_grammar, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    if re.fullmatch(r"[A-Za-z_/.][\w/.-]*", value) and value.lower() not in ("null", "true", "false"):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def step_config(cfg: DictConfig, tool: str, own: dict[str, Any]) -> DictConfig:
    """The configuration of one tool: what the steps share, then its `own`, then what the command line says of it."""
    given = {name: cfg[name] for name in SHARED} | own | dict(flattened(as_written(cfg[tool])))
    composed = hydra.compose(tool, [as_override(name, value) for name, value in given.items()])
    if tool != "pretrain":
        let_classifier_decay_(composed, given)
    return composed


def group_of(cfg: DictConfig, tool: str, name: str, composed: Any) -> Any:
    """A step's data or encoder: all steps' own with what `tool.name.key=...` says, or `composed` for `tool.name=OTHER`.

    References stay unresolved: they are to other keys of the step's configuration.
    """
    given = cfg[tool].get(name, {})
    return composed if isinstance(given, str) else OmegaConf.to_container(OmegaConf.merge(cfg[name], given))


def labels_of_student(cfg: DictConfig) -> dict[str, Any]:
    """Which labels distillation looks at: those of fine-tuning, unless it is given others or looks at none."""
    seed = {"label_seed": cfg.label_seed}
    if cfg.distill.get("weight", 1.0) >= 1 or set(WHICH_LABELS) & set(cfg.distill):
        return seed
    return {name: cfg[name] for name in WHICH_LABELS} | seed


def steps_of(cfg: DictConfig, choices: Mapping[str, str]) -> list[Step]:
    """The runs in order, composed. Those after the first take what images are fed as, and whole images, from it."""
    out, groups = Path(cfg.out), {name: choices[name] for name in ("data", "encoder")}
    which = {name: cfg[name] for name in (*WHICH_LABELS, "label_seed")}

    def place(name: str) -> dict[str, Any]:
        return {"run_dir": str(out / name), "resume": "auto"}

    first = step_config(cfg, "pretrain", {"method": "simclr_v2", **groups, **place("pretrain")})
    for name in groups:
        first[name] = group_of(cfg, "pretrain", name, first[name])
    data = {"data": groups["data"]}

    from_first = {"run": str(out / "pretrain"), "head_layer": 1, **which, **data, **place("finetune")}
    second = step_config(cfg, "finetune", from_first)
    temperature = 1.0 if "encoder" in cfg.distill else 0.1
    from_second = {"teacher": str(out / "finetune"), "temperature": temperature, **labels_of_student(cfg)}
    third = step_config(cfg, "distill", {**from_second, **data, **place("distill")})
    steps = [
        Step("pretrain", pretrain, first, "encoder.json"),
        Step("finetune", finetune, second, "test.json"),
        Step("distill", distill, third, "test.json"),
    ]
    if cfg.supervised:
        scratch = step_config(cfg, "finetune", from_first)
        scratch.run, scratch.head_layer, scratch.frozen = None, 0, False
        scratch.encoder, scratch.run_dir = first.encoder, str(out / "supervised")
        for name in ("load_size", "image_size", "mean", "std", "norm"):
            scratch[name] = first[name]
        for name, value in crop_and_flip(as_written(first)).items():  # as fine-tuning takes them from pre-training
            if scratch.augmentation.get(name) is None:
                scratch.augmentation[name] = value
        steps.append(Step("supervised", finetune, scratch, "test.json"))
    for step in steps[1:]:
        tool = "distill" if step.job is distill else "finetune"
        step.cfg.data = group_of(cfg, tool, "data", step.cfg.data)
    return steps


def undecided_keys(out: Path) -> Callable[[str], bool]:
    """Whether a key of a folder's command may still be another: nothing that has begun there depends on it."""
    begun = {name for name in (*TOOLS, "supervised") if (out / name / "config.yaml").is_file()}
    made_with = {"pretrain": {*TOOLS, "supervised"}, "finetune": {*TOOLS[1:], "supervised"}, "distill": {"distill"}}
    open_keys = {"supervised", *(tool for tool in TOOLS if not begun & made_with[tool])}
    if begun <= {"pretrain"}:
        open_keys |= {*WHICH_LABELS, "label_seed"}

    def may_differ(key: str) -> bool:
        return not begun or key.partition(".")[0] in open_keys or may_change(key)

    return may_differ


# ---- what came out ----


def probe_pretrained(cfg: DictConfig, few: ImageDataset, test: ImageDataset, accelerator: Accelerator) -> float:
    """Accuracy of a linear probe on the frozen encoder, whole images, with the few labels."""
    encoder = load_encoder(Path(cfg.out) / "pretrain", mode="image").to(accelerator.device)
    options = {"batch_size": encoder.batch_size, "device": accelerator.device, "workers": cfg.workers}
    with accelerator.autocast():
        features = [extract_features(encoder, part, bad_images=BadImages(0.01), **options) for part in (few, test)]
    return linear_probe(*features[0], *features[1]).accuracy


def tested(run: Path) -> float:
    """The accuracy that a run of tools/finetune.py or tools/distill.py has written down for itself."""
    return float(json.loads((run / "test.json").read_text())["rows"][0]["accuracy"])


def summarise(cfg: DictConfig, few: ImageDataset, test: ImageDataset, accelerator: Accelerator) -> dict[str, Any]:
    """What `summary.json` says. Every process makes it: none may wait for another's probe longer than NCCL lets it."""
    out = Path(cfg.out)
    accuracies = {
        "pretrained, linear probe": probe_pretrained(cfg, few, test, accelerator),
        "fine-tuned": tested(out / "finetune"),
        "distilled": tested(out / "distill"),
    }
    if cfg.supervised:
        accuracies["from scratch"] = tested(out / "supervised")
    which = {name: cfg[name] for name in WHICH_LABELS if cfg[name] is not None}
    return {**which, "label_seed": cfg.label_seed, "train_labels": len(few), "test_images": len(test), **accuracies}


def simclr_v2(cfg: DictConfig) -> Path:
    """All steps that have not finished, then the summary; returns its path. Every process calls it."""
    if OmegaConf.is_missing(cfg, "out"):
        raise ValueError("not given: out; pass out=DIR, a new folder or that of a summary to go on with")
    check_which_labels(cfg)
    for tool in TOOLS:
        for name in set(cfg[tool]) & set(OF_THE_PROCESS):
            raise ValueError(f"{tool}.{name} is one for all steps: pass {name}={cfg[tool][name]}")
        if cfg[tool].get("experiment"):  # which would lose its data and its encoder to those of all steps
            raise ValueError(f"{tool}.experiment is a whole recipe: run tools/{tool}.py experiment=NAME by itself")
    if cfg.finetune.get("protocol"):
        raise ValueError("finetune.protocol is none of SimCLRv2's: run tools/finetune.py protocol=NAME by itself")
    steps = steps_of(cfg, HydraConfig.get().runtime.choices)
    first = steps[0].cfg
    check_complete(first)
    check_numbers(first)
    build_method(first)
    # whatever is wrong with later steps is best said before hours of pre-training
    second = steps[1].cfg.copy()
    for name in OF_THE_RUN:
        second[name] = first[name]
    check_complete(second)
    for step in steps[1:]:
        check_numbers(step.cfg)
    check_asked(steps[len(TOOLS) - 1].cfg)
    splits: Splits = build(second.data)
    split = chosen_labels(cfg, splits.train)
    few = splits.train.subset(split.indices)
    test = labelled_test(splits, splits.train.classes)
    fitting_batch(second, len(few))

    accelerator = start_accelerator(
        precision=cfg.precision, device=cfg.device, threads=cfg.threads, timeout=cfg.timeout
    )
    out, asked = Path(cfg.out), as_written(cfg)
    del asked["out"]  # however the folder is called from where one stands
    may_differ = undecided_keys(out)
    check_folder(out, asked, resume=True, may_differ=may_differ)  # another command's folder is refused
    with claimed(out, asked, accelerator, resume=True, saved=[], may_differ=may_differ):
        for step in steps:
            if not (out / step.name / step.last_file).is_file():
                step.job(step.cfg)
            accelerator.wait_for_everyone()
        summary = {"label_split": split.digest, **summarise(cfg, few, test, accelerator)}
        if accelerator.is_main_process:
            (out / "summary.partial").write_text(json.dumps(summary, indent=1) + "\n")
            (out / "summary.partial").rename(out / "summary.json")
            print(format_table([summary]))
            print(f"written to {out / 'summary.json'}")
        accelerator.wait_for_everyone()
    return out / "summary.json"


main = command("simclr_v2", simclr_v2, schema=SimCLRv2Schema)

# what a step is to do otherwise is any key of its own configuration, which refuses what it does not know
_OPEN = OmegaConf.structured(SimCLRv2Schema)
for _tool in TOOLS:
    OmegaConf.set_struct(_OPEN[_tool], False)
ConfigStore.instance().store("simclr_schema", _OPEN)

if __name__ == "__main__":
    main()
