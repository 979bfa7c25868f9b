"""`python tools/shortcuts.py run=DIR [overrides]`: which short-cuts a CPC run takes (configs/shortcuts.yaml)."""

from cpc.shortcuts import main

if __name__ == "__main__":
    main()
