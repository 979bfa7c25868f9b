"""A run's encoder for other programs: `python tools/export.py run=DIR format=onnx out=DIR`."""

from cpc.export import main

if __name__ == "__main__":
    main()
