"""The contrastive core: losses, augmentations, memory, evaluation and the one training loop.

It knows tensors and images and never imports `cpc`, its first client. Each module is imported where it is
used, so that `from contrastive_core.losses import info_nce` loads nothing but torch and einops.
"""
