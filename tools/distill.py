"""`accelerate launch tools/distill.py teacher=DIR [overrides]`: a student of a tuned run (configs/distill.yaml)."""

from cpc.distill import main

if __name__ == "__main__":
    main()
