"""`accelerate launch tools/simclr_v2.py fraction=0.1 out=DIR [overrides]`: SimCLRv2 whole (configs/simclr_v2.yaml)."""

from cpc.simclr_v2 import main

if __name__ == "__main__":
    main()
