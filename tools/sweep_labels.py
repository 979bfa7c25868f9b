"""How many labels pre-training saves: `python tools/sweep_labels.py runs=[DIR] labels=[20,40,100] out=DIR`."""

from cpc.sweep_labels import main

if __name__ == "__main__":
    main()
