"""What a run says of itself, and the page that a model is published with: what it was trained on, how, how good.

Nothing is invented: what the run's folder does not say is said to be unknown. Words from a folder are quoted, cut
short and kept on their line, so that they stay words; of a path only its last part is told.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from contrastive_core.reading import read_json
from cpc.encoder_card import read_card
from cpc.foreign import run_config

PAPERS = {
    "CPC": "1905.09272",
    "SimCLR": "2002.05709",
    "MoCo": "1911.05722",
    "MoCoV3": "2104.02057",
    "BYOL": "2006.07733",
    "SimSiam": "2011.10566",
    "PIRL": "1912.01991",
}
"""arXiv numbers of the methods that have one paper."""

_RECIPE = ("steps", "batch_size", "image_size", "load_size", "precision", "seed", "averaging", "clip")
_LONGEST = 120
_TAIL = 1 << 16  # bytes of the end of metrics.jsonl, whose rows have a few hundred
_MOST_ROWS = 40


def about_run(path: str | Path) -> dict[str, Any]:
    """What a run's folder tells of it: {"data", "recipe", "measured", "last_step"}, each perhaps empty.

    Args: `path`: as `cpc.load_encoder`'s. A folder that `cpc.hub` wrote says it in its card.

    Raises as `cpc.encoder_card.read_card`, and ValueError for a config.yaml or evaluation.json that cannot be read.
    """
    weights, card = read_card(path)
    if isinstance(card.get("about"), dict):
        return dict(card["about"])
    _, config = run_config(path)
    evaluation = weights.with_name("evaluation.json")
    measured = read_json(evaluation) if evaluation.is_file() else {}
    about = {
        "data": _arguments(config.get("data")),
        "recipe": _recipe(config),
        "measured": _rows(measured),
        "last_step": _last_row(weights.with_name("metrics.jsonl")),
    }
    if isinstance(card.get("collapsed"), str) and card["collapsed"]:
        about["collapsed"] = card["collapsed"]
    return about


def _is_word(value: Any) -> bool:
    return isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value))


def _arguments(node: Any) -> dict[str, Any]:
    """The plain arguments of what a configuration builds, with its name, and no path but its last part."""
    if not isinstance(node, dict):
        return {}
    plain = {name: value for name, value in node.items() if isinstance(name, str) and _is_word(value)}
    kept = {name: Path(value).name if isinstance(value, str) else value for name, value in plain.items()}
    target = kept.pop("_target_", None)
    named = {} if target is None else {"name": str(target).rpartition(".")[2]}
    return named | {name: value for name, value in kept.items() if not name.startswith("_")}


def _recipe(config: dict[str, Any]) -> dict[str, Any]:
    recipe = {name: config[name] for name in _RECIPE if _is_word(config.get(name))}
    optimizer = _arguments(config.get("optimizer"))
    if optimizer:
        recipe["optimizer"] = ", ".join(f"{name} {value}" for name, value in optimizer.items())
    return recipe


def _rows(evaluation: Any) -> list[dict[str, Any]]:
    rows = evaluation.get("rows") if isinstance(evaluation, dict) else None
    if not isinstance(rows, list):
        return []
    kept = ("encoder", "mode", "readout", "probe", "labels", "accuracy")
    plain = [{name: row[name] for name in kept if _is_word(row.get(name))} for row in rows if isinstance(row, dict)]
    return [row for row in plain if isinstance(row.get("accuracy"), int | float)][:_MOST_ROWS]


def _last_row(path: Path) -> dict[str, Any]:
    """Step, loss, chance loss and accuracy of the last row with a loss; {} where there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL))
        lines = [line for line in file.read(_TAIL).splitlines() if line.strip()]
    kept = ("step", "loss", "chance_loss", "accuracy")
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the end of a killed run's, the beginning of what was cut off
            continue
        if isinstance(row, dict) and "loss" in row:  # not a probe's, which comes after the last step's
            return {name: row[name] for name in kept if _is_word(row.get(name))}
    return {}


def model_card(
    card: dict[str, Any], about: dict[str, Any], code: str, *, library: str, licence: str | None = None
) -> str:
    """The README.md of a published model, with its front matter.

    Args:
        card: of the encoder (`cpc.encoder_card.read_card`).
        about: `about_run`'s.
        code: Python that loads it, run in the folder where the page is.
        library: what the code needs, e.g. "timm".
        licence: an identifier such as "apache-2.0"; None leaves it open, and says so.

    Example: the page of a run without an evaluation says "Not measured".
    """
    method = str(card.get("method") or "unknown")
    front: dict[str, Any] = {"library_name": library}
    if licence is not None:
        front["license"] = licence
    front["pipeline_tag"] = "image-feature-extraction"
    known = [method.lower(), f"arxiv:{PAPERS[method]}"] if method in PAPERS else []
    front["tags"] = ["self-supervised-learning", "cpc-images", *known]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# An image encoder pre-trained with {_quoted(method)}",
        _what(card),
        f"## Load it\n\n```python\n{code.strip()}\n```",
        "## Trained on\n\n" + (_table(about.get("data")) or "Unknown: the run does not say."),
        "## Recipe\n\n" + (_table(about.get("recipe")) or "Unknown: the run does not say."),
        "## Measured\n\n" + _measured(about),
    ]
    if licence is None:
        parts.append("## Licence\n\nNot stated. Whoever publishes this adds `license:` to the front matter.")
    return "\n\n".join(parts) + "\n"


def _what(card: dict[str, Any]) -> str:
    fed, architecture = card["input"], card["architecture"]
    facts = {"architecture": architecture["name"], **{f"- {k}": v for k, v in architecture["arguments"].items()}}
    facts |= {"features": card.get("dim"), **fed}
    return _table(facts)


def _measured(about: dict[str, Any]) -> str:
    rows, last = about.get("measured"), about.get("last_step")
    said = []
    if isinstance(about.get("collapsed"), str):
        said.append(f"This run has {_quoted(about['collapsed'])}.")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) and rows:
        names = [name for name in ("encoder", "mode", "readout", "probe", "labels", "accuracy") if name in rows[0]]
        head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n"
        said.append(head + "\n".join(f"| {' | '.join(_quoted(row.get(name)) for name in names)} |" for row in rows))
    else:
        said.append("Not measured: the run has no evaluation.json (tools/evaluate.py writes it).")
    if isinstance(last, dict) and last:
        said.append("Pre-training ended with " + ", ".join(f"{_quoted(k)} {_quoted(v)}" for k, v in last.items()) + ".")
    return "\n\n".join(said)


def _table(facts: Any) -> str:
    """A row a fact; "" for none."""
    if not isinstance(facts, dict) or not facts:
        return ""
    rows = [f"| {_quoted(name)} | {_quoted(value)} |" for name, value in facts.items() if value is not None]
    return "| | |\n|---|---|\n" + "\n".join(rows)


def _quoted(value: Any) -> str:
    """A word as one of a line, whatever is in it: neither a table, a link nor HTML comes out."""
    if isinstance(value, float):
        return f"{value:.4g}"
    said = " ".join(str(value).split())[:_LONGEST]
    simple = said.replace("_", "").replace(".", "").replace("-", "").replace(" ", "").replace(",", "")
    if not said or simple.isalnum():
        return said.replace("_", "\\_")
    return "`" + said.replace("`", "'").replace("|", "/") + "`"
