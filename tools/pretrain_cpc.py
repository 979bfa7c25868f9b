"""`accelerate launch tools/pretrain_cpc.py [overrides]`: pre-train a CPC encoder (configs/pretrain_cpc.yaml)."""

from cpc.pretrain import main

if __name__ == "__main__":
    main()
