"""A frozen encoder as one graph: ONNX, or a program of torch.export, for any number of images at a time.

The graph is what `cpc.load_encoder` gives: normalisation, the cutting of patches, the encoder, the readout. Not in it:
the resizing of images of another size, since a graph has one. Torch traces our LayerNorm as its own group norm
(`contrastive_core.layer_norm.supported`), so that no operator of ours is left in it; `check_plain_graph` sees to that.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from cpc.frozen_encoder import FrozenEncoder

_EXTRA = 'pip install "cpc-images[export]"'


def exported_program(encoder: FrozenEncoder) -> ExportedProgram:
    """The encoder as torch.export has it: images `b 3 s s` float32 in [0, 1], s its `image_size`, any b from 1.

    Raises ValueError where torch cannot trace it.

    Example: `exported_program(encoder).module()(images)` equals `encoder(images)`.
    """
    side = encoder.image_size
    example = torch.zeros(2, 3, side, side)  # two: torch makes a constant of a batch of one
    encoder(example)  # what is wrong with mode and readout is said in our words
    try:
        with torch.no_grad():
            program = torch.export.export(encoder, (example,), dynamic_shapes={"images": {0: Dim("batch")}})
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(f"torch.export cannot trace {type(encoder.encoder).__name__}: {first}") from error
    check_plain_graph(program)
    return program


def check_plain_graph(program: ExportedProgram) -> None:
    """Raise ValueError for an operator that torch itself does not have: no other machine could run it."""
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    own = sorted(name for name in called if name.startswith("contrastive_core"))
    if own:
        raise ValueError(f"the graph holds {', '.join(own)}, which only this project has: export on a CPU")


def save_program(encoder: FrozenEncoder, path: Path) -> None:
    """Write the encoder as a program of torch.export, a .pt2."""
    with _without_remarks():
        torch.export.save(exported_program(encoder), path)


def load_program(path: Path) -> Callable[[Tensor], Tensor]:
    """A program of `save_program` as a function; no file of anyone else's is meant to come here."""
    return torch.export.load(path).module()


def save_onnx(encoder: FrozenEncoder, path: Path) -> None:
    """Write the encoder as ONNX: input "images" `batch 3 s s`, output "features".

    Above 2 GiB the weights lie in a file beside it. Raises ImportError without onnx and onnxscript.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(f"ONNX is not installed: {_EXTRA}") from None
    program = exported_program(encoder)
    with _without_remarks():
        onnx_program = torch.onnx.export(
            program, input_names=["images"], output_names=["features"], dynamo=True, verbose=False
        )
    if onnx_program is None:  # torch types it so
        raise ValueError("torch.onnx gave no program")
    onnx_program.save(path)


def load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function of tensors, run by onnxruntime on the CPU. Raises ImportError without it."""
    try:
        import onnxruntime
    except ImportError:
        raise ImportError(f"onnxruntime is not installed: {_EXTRA}") from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Within: torch and onnx_ir do not tell of their inner affairs."""
    passes = logging.getLogger("onnx_ir")  # a line for every initializer that two nodes share
    level = passes.level
    passes.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        # torch 2.14, of weights that have a view in the graph, on a CPU too, where nothing is wrong
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        try:
            yield
        finally:
            passes.setLevel(level)
