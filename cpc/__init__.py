"""CPC v2: patch-based contrastive predictive coding of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpc.features import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    # read on first use: `import cpc` alone should not load torchvision
    if name == "load_encoder":
        from cpc.features import load_encoder

        return load_encoder
    raise AttributeError(f"module 'cpc' has no attribute {name!r}")
