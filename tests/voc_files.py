"""A folder as PASCAL VOC publishes it, as small as it can be."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{sides[0]}</xmin><ymin>{sides[1]}</ymin><xmax>{sides[2]}</xmax><ymax>{sides[3]}</ymax></bndbox></object>"""


def annotation(*things):
    """VOC's XML; each thing is a name, its four sides, and whether it is difficult."""
    inside = "".join(
        OBJECT.format(name=name, sides=sides, difficult=int(difficult)) for name, sides, difficult in things
    )
    return f"<annotation><filename>a.jpg</filename>{inside}</annotation>"


def write_voc(root: Path) -> Path:
    """Two images of 20x10 pixels, a list each."""
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True)
    for name, listed in (("000001", "trainval"), ("000002", "test")):
        (root / f"ImageSets/Main/{listed}.txt").write_text(f"{name}\n")
        Image.new("RGB", (20, 10), "red").save(root / f"JPEGImages/{name}.jpg")
        thing = ("dog", (1, 2, 20, 10), False), ("person", (3, 3, 5, 5), True)
        (root / f"Annotations/{name}.xml").write_text(annotation(*thing))
    return root
