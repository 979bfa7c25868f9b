"""Images in, batches out: data sets (`images`, `sources`, `shards`, `hub`) and the order of their samples (`loading`).

A data set is a list of encoded images and a size; a batch is a pure function of (seed, step). Images stay uint8 until
they are on the device, unless the loader's workers are to augment them (`worker_views`, which loads torchvision and is
imported from its own module). `fractions` chooses the few labels of many, `identity` says who an image is.
"""

from contrastive_core.data.fractions import (
    LISTED,
    LabelAmount,
    LabelList,
    label_fraction,
    labels_listed,
    labels_per_class,
    names_listed,
    only_labelled,
)
from contrastive_core.data.hub import huggingface
from contrastive_core.data.identity import LabelSplit, content_ids, dataset_digest, sample_ids, split_digest
from contrastive_core.data.images import ImageDataset, Sample, UndecodableImage
from contrastive_core.data.loading import (
    BadImages,
    LoadedBatch,
    TooManyBadImages,
    batch_indices,
    check_shares,
    decodable,
    decodable_rows,
    evaluation_batches,
    sample_order,
    training_batches,
)
from contrastive_core.data.shards import webdataset
from contrastive_core.data.sources import Splits, imagefolder, mnist5k, parquet, torchvision_dataset

__all__ = [
    "LISTED",
    "BadImages",
    "ImageDataset",
    "LabelAmount",
    "LabelList",
    "LabelSplit",
    "LoadedBatch",
    "Sample",
    "Splits",
    "TooManyBadImages",
    "UndecodableImage",
    "batch_indices",
    "check_shares",
    "content_ids",
    "dataset_digest",
    "decodable",
    "decodable_rows",
    "evaluation_batches",
    "huggingface",
    "imagefolder",
    "label_fraction",
    "labels_listed",
    "labels_per_class",
    "mnist5k",
    "names_listed",
    "only_labelled",
    "parquet",
    "sample_ids",
    "sample_order",
    "split_digest",
    "torchvision_dataset",
    "training_batches",
    "webdataset",
]
