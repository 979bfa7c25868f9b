"""One table of all runs in a folder: `python tools/runs.py runs --sort knn`."""

from cpc.runs import main

if __name__ == "__main__":
    main()
