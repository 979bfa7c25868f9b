"""A run's encoder for other programs: `python tools/export.py run=DIR format=FORMAT out=DIR`.

    torchvision, timm   model.safetensors, which the library's own model loads; images come normalised
    onnx                model.onnx, the whole frozen encoder as a graph; images come in [0, 1]
    torch_export        model.pt2, the same as a program of torch.export
    hub                 encoder.safetensors and encoder.json, for `cpc.hub.PretrainedEncoder` and `cpc.load_encoder`

Beside each lies README.md with the code that loads it, and beside all but the last export.json. Before anything is kept
the file is read back by the program that it is for, and its features are compared with ours.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from contrastive_core.checkpoint import save_tensors
from cpc.encoder_card import known_architecture, read_card
from cpc.entry import command
from cpc.features import load_encoder, read_encoder
from cpc.frozen_encoder import MODES, READOUTS, FrozenEncoder
from cpc.graphs import load_onnx, load_program, save_onnx, save_program
from cpc.model_card import about_run, model_card
from cpc.plain_trunks import LIBRARIES, loaded, plain_state, plain_trunk
from cpc.run_folder import check_no_file
from cpc.views import normalise

FORMATS = (*LIBRARIES, "onnx", "torch_export", "hub")

LARGEST_DIFFERENCE = 1e-4
"""Of exported features from ours, by the largest of ours: ten times what was ever measured."""

Features = Callable[[Tensor], Tensor]


@dataclass
class ExportSchema:
    """Types of the top-level keys of configs/export.yaml."""

    run: str
    format: str
    out: str
    mode: str | None
    readout: str
    licence: str | None


@dataclass(frozen=True)
class Exported:
    """What was written: the file, who reads it, the code that does, what it takes, and how far from ours it is."""

    file: str
    library: str
    code: str
    takes: dict[str, Any]
    difference: float


def check_asked(cfg: DictConfig) -> None:
    """Raise ValueError that names the first key whose value cannot be meant."""
    missing = [name for name in ("run", "format", "out") if OmegaConf.is_missing(cfg, name)]
    if missing:
        raise ValueError(f"not given: {', '.join(missing)}; pass run=DIR format={'|'.join(FORMATS)} out=DIR")
    if cfg.format not in FORMATS:
        meant = difflib.get_close_matches(cfg.format, FORMATS, n=1)
        asked = f"; did you mean {meant[0]!r}?" if meant else ""
        raise ValueError(f"format={cfg.format} is not one of {', '.join(FORMATS)}{asked}")
    if cfg.readout not in READOUTS or cfg.mode not in (None, *MODES):
        raise ValueError(f"mode={cfg.mode} readout={cfg.readout}: pass one of {MODES} and one of {READOUTS}")
    if cfg.format not in ("onnx", "torch_export") and (cfg.readout != "mean" or cfg.mode):
        raise ValueError(f"format={cfg.format} has no mode and readout of its own: leave mode= and readout= out")
    check_no_file(Path(cfg.out), "out")
    if Path(cfg.out).is_dir() and any(Path(cfg.out).iterdir()):
        raise ValueError(f"out={cfg.out} holds files: pass a new folder")


def difference(theirs: Features, ours: Features, side: int) -> float:
    """The largest difference of features by the largest feature of ours, on 5 random images of `side` px, and on 1.

    Raises ValueError where the shapes differ, or it is above `LARGEST_DIFFERENCE`.

    Example: of a function from itself it is 0.
    """
    images = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    with torch.no_grad():
        for batch in (images, images[:1]):
            expected, found = ours(batch), theirs(batch)
            if expected.shape != found.shape:
                raise ValueError(
                    f"its features have shape {tuple(found.shape)} there and {tuple(expected.shape)} here: pass "
                    f"format=hub, onnx or torch_export"
                )
            here = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
            if not here <= LARGEST_DIFFERENCE:  # what is not a number, too
                raise ValueError(f"its features differ from ours by {here:.2g}: pass format=hub, onnx or torch_export")
            worst = max(worst, here)
    return worst


def export_trunk(run: str | Path, library: str, out: Path) -> Exported:
    """Write a plain state dict for torchvision's or timm's own model, strictly loaded there and compared.

    Raises ValueError for a trunk that the library does not have.
    """
    encoder, card = read_encoder(run)
    trunk = plain_trunk(encoder, known_architecture(card["architecture"])[1], library)
    state = plain_state(encoder)
    ours = load_encoder(run, mode="image")
    theirs = loaded(trunk, state)
    found = difference(lambda images: theirs(normalise(images, ours.mean, ours.std)), ours, ours.image_size)
    save_tensors(state, out / "model.safetensors")
    load = 'from safetensors.torch import load_file\n\nmodel.load_state_dict(load_file("model.safetensors"))'
    mean, std = list(ours.mean), list(ours.std)
    side = ours.image_size
    fed = f"# features = model.eval()((images - mean) / std), of images b 3 {side} {side} in [0, 1]"
    means = f"mean, std = (torch.tensor(each).view(3, 1, 1) for each in ({mean}, {std}))"
    takes = {"images": f"b 3 {side} {side}, normalised", "mean": mean, "std": std}
    return Exported("model.safetensors", library, f"{trunk.code()}\n{load}\n{means}\n{fed}", takes, found)


_ONNX_CODE = """
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
# features = session.run(None, {{"images": images}})[0], of float32 images b 3 {side} {side} in [0, 1]
"""
_PROGRAM_CODE = """
import torch

encoder = torch.export.load("model.pt2").module()
# features = encoder(images), of float32 images b 3 {side} {side} in [0, 1]
"""


def export_graph(encoder: FrozenEncoder, kind: str, out: Path) -> Exported:
    """Write the whole frozen encoder as ONNX (`kind` "onnx") or a program of torch.export, read back and compared."""
    if kind == "onnx":
        file, library, code, save, load = "model.onnx", "onnx", _ONNX_CODE, save_onnx, load_onnx
    else:
        file, library, code, save, load = "model.pt2", "pytorch", _PROGRAM_CODE, save_program, load_program
    save(encoder, out / file)
    found = difference(load(out / file), encoder, encoder.image_size)
    side = encoder.image_size
    takes = {"images": f"b 3 {side} {side} in [0, 1]", "mode": encoder.mode, "readout": encoder.readout}
    return Exported(file, library, code.format(side=side), takes, found)


def export_hub(run: str | Path, out: Path, licence: str | None) -> float:
    """Write what `PretrainedEncoder.from_pretrained` reads, README.md included; returns the difference from ours."""
    from cpc.hub import PretrainedEncoder

    PretrainedEncoder.from_run(run).save_pretrained(out, model_card_kwargs={"licence": licence})
    ours = load_encoder(run)
    return difference(PretrainedEncoder.from_pretrained(out), ours, ours.image_size)


def export_run(
    run: str | Path, kind: str, out: Path, *, mode: str | None = None, readout: str = "mean", licence: str | None = None
) -> float:
    """Write a run's encoder in one of `FORMATS` into a new folder; returns the largest difference from ours.

    Args:
        run: as `cpc.load_encoder`'s path.
        kind: of `FORMATS`.
        out: the folder; it appears when everything in it is written and compared.
        mode, readout: of a graph, as `cpc.load_encoder`'s.
        licence: as `cpc.model_card.model_card`'s.

    Raises ValueError, which says why, for a run whose trunk does not fit the format, and `cpc.load_encoder`'s errors.
    """
    _, card = read_card(run)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        partial = Path(folder) / "export"
        partial.mkdir()
        if kind == "hub":
            found = export_hub(run, partial, licence)
        else:
            if kind in LIBRARIES:
                exported = export_trunk(run, kind, partial)
            else:
                exported = export_graph(load_encoder(run, mode=mode, readout=readout), kind, partial)
            found = exported.difference
            described = {"format": kind, "file": exported.file, **exported.takes, "largest_difference": found}
            (partial / "export.json").write_text(json.dumps(described, indent=1) + "\n")
            page = model_card(card, about_run(run), exported.code, library=exported.library, licence=licence)
            (partial / "README.md").write_text(page)
        if out.is_dir():  # empty, as the command has seen
            out.rmdir()
        partial.rename(out)
    return found


def export(cfg: DictConfig) -> Path:
    """Export one run as the command line says; returns the folder."""
    check_asked(cfg)
    out = Path(cfg.out)
    found = export_run(cfg.run, cfg.format, out, mode=cfg.mode, readout=cfg.readout, licence=cfg.licence)
    print(f"written to {out}; features differ from ours by at most {found:.1e} of the largest")
    return out


main = command("export", export, schema=ExportSchema)

if __name__ == "__main__":
    main()
