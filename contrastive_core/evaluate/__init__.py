"""How good the features of a frozen encoder are: nearest neighbours, linear probes, few labels, pixel baselines."""
