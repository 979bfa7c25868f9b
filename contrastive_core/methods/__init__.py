"""CPC's relatives, a file each, to be read beside its paper. All take an encoder and are trained by the one loop."""
