"""`python tools/detect.py run=DIR boxes=NAME [overrides]`: detection with a run's encoder (configs/detect.yaml)."""

from cpc.detect import main

if __name__ == "__main__":
    main()
