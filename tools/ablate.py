"""`python tools/ablate.py ablation=NAME out=DIR [overrides for every cell]`: a grid of runs (configs/ablate.yaml)."""

from cpc.ablate import main

if __name__ == "__main__":
    main()
