"""Images in, batches out: data sets (`images`, `sources`) and the order and grouping of their samples (`loading`).

A data set is a list of encoded images and a size; a batch is a pure function of (seed, step). Nothing here
augments or normalises: images stay uint8 until they are on the device.
"""

from contrastive_core.data.images import ImageDataset, Sample, UndecodableImage
from contrastive_core.data.loading import (
    BadImages,
    LoadedBatch,
    TooManyBadImages,
    batch_indices,
    evaluation_batches,
    sample_order,
    training_batches,
)
from contrastive_core.data.sources import Splits, imagefolder, mnist5k, parquet, torchvision_dataset

__all__ = [
    "BadImages",
    "ImageDataset",
    "LoadedBatch",
    "Sample",
    "Splits",
    "TooManyBadImages",
    "UndecodableImage",
    "batch_indices",
    "evaluation_batches",
    "imagefolder",
    "mnist5k",
    "parquet",
    "sample_order",
    "torchvision_dataset",
    "training_batches",
]
