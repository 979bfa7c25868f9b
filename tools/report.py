"""A page about one run or several: `python tools/report.py RUN [RUN ...] --out report.html`."""

from cpc.report import main

if __name__ == "__main__":
    main()
