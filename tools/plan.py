"""What a recipe costs on machines that are not here: `python tools/plan.py experiment=NAME --images-per-second R`."""

from cpc.plan import main

if __name__ == "__main__":
    main()
