"""Every tutorial is run as it stands, block by block, in a folder with a few of the bundled digits as photographs.

Only lengths are others: what is `steps=10000` on the page is `steps=2` here.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, run_command

FOLDER = CHECKOUT / "docs" / "tutorials"
SHORTER = {
    "steps=100000 ": "steps=100000 threads=1 encoder.width=4 method.context.layers=1 ",  # is to be interrupted
    "steps=10000": "steps=2 batch_size=4 probe_every=0 threads=1",
    "steps=200": "steps=2 probe_every=0 threads=1",
    "steps=40": "steps=2 probe_every=0 threads=1",
    "labels=20,40,100": "labels=20,40 threads=1",
    "few=1": "draws=1",
    " batch_size=32": " batch_size=8",
    "modes=[patches]": "modes=[patches] threads=1",
}
RUNNER = """import re, subprocess, sys
names = {"__name__": "__main__"}
for number, (kind, text) in enumerate(BLOCKS):
    print(f"-- block {number}, {kind}", flush=True)
    if kind == "python":
        exec(compile(text, f"block {number}", "exec"), names)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)
"""


def blocks(text: str) -> list[tuple[str, str]]:
    """The code blocks that are marked bash or python, in order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def shortened(code: str) -> str:
    """Each length replaced once, the longest first: `steps=100000` begins with `steps=10000`."""
    longest = sorted(SHORTER, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest)), lambda found: SHORTER[found[0]], code)


def write_photos(folder: Path) -> None:
    """Four test and twelve training images of each digit."""
    from PIL import Image

    from contrastive_core.data import mnist5k

    for part, dataset, count in (("train", mnist5k().train, 12), ("test", mnist5k().test, 4)):
        seen = dict.fromkeys(range(10), 0)
        for place, label in enumerate(dataset.labels.tolist()):
            if seen[label] < count:
                seen[label] += 1
                (folder / part / str(label)).mkdir(parents=True, exist_ok=True)
                pixels = dataset[place].image.permute(1, 2, 0).numpy()
                Image.fromarray(pixels).save(folder / part / str(label) / f"{place}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


def execute(code: list[tuple[str, str]], folder: Path, timeout: float = 280) -> str:
    """Run a page's blocks in one process, which has one namespace for Python; returns what was printed."""
    (folder / "tools").symlink_to(CHECKOUT / "tools")
    script = folder / "run_blocks.py"
    script.write_text(f"BLOCKS = {[(kind, shortened(text)) for kind, text in code]!r}\n{RUNNER}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = run_command([sys.executable, str(script)], folder, env={"PATH": path}, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


PAGES = sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "transcript")
FAST = ("only_the_losses", "coming_from")


def test_the_tutorials_are_there():
    assert set(PAGES) >= {*FAST, "own_folder", "label_curve", "own_pieces", "laptop_to_cluster"}


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_says_first_what_there_is_at_the_end_and_how_long_it_takes(page):
    first = (FOLDER / f"{page}.md").read_text().split("\n\n")[1]
    assert first.startswith("At the end")
    assert re.search(r"seconds|minutes?|hours", first)


@pytest.mark.parametrize("page", FAST)
@pytest.mark.filterwarnings("ignore")  # of the other libraries, at import
def test_a_tutorial_of_the_losses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tutorial"}
    code = blocks((FOLDER / f"{page}.md").read_text())
    assert len(code) >= 3
    for kind, text in code:
        assert kind == "python"
        exec(compile(text, page, "exec"), names)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in PAGES if page not in FAST])
def test_a_tutorial_with_commands(page, photos, tmp_path):
    (tmp_path / "photos").symlink_to(photos)
    said = execute(blocks((FOLDER / f"{page}.md").read_text()), tmp_path, timeout=580)
    if page == "laptop_to_cluster":
        assert "left with 143" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_notebook(tmp_path):
    notebook = json.loads((FOLDER / "first_steps.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 4
    assert not any(cell["outputs"] for cell in code)
    execute([("python", "".join(cell["source"])) for cell in code], tmp_path)
