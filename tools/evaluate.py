"""`python tools/evaluate.py run=DIR [overrides]`: evaluate a run's frozen encoder (configs/evaluate.yaml)."""

from cpc.evaluate import main

if __name__ == "__main__":
    main()
