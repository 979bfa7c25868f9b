"""The documentation is true: docstrings' examples give what they say; the site builds, and asks nobody for anything."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from conftest import CHECKOUT, run_command

# ---- examples in docstrings ----

EXAMPLE = re.compile(
    r"`([^`]+)` is (-?\d+(?:\.\d+)?(?![\d.]*\s*(?:%|px|times|GiB))|\[[\[\]\d., -]*\]|`[^`]+`|True\b|False\b)"
)
EQUATION = re.compile(r"`([^`]+ == [^`]+)`")


def documented() -> list[tuple[str, str, dict[str, Any]]]:
    """Name, docstring and module of all that is public in both packages, methods of classes too."""
    found = []
    for package in ("contrastive_core", "cpc"):
        for entry in pkgutil.walk_packages([str(CHECKOUT / package)], f"{package}."):
            if "triton" in entry.name:
                continue  # kernels: nothing to call without a GPU
            module = importlib.import_module(entry.name)
            for name, thing in vars(module).items():
                if name.startswith("_") or getattr(thing, "__module__", None) != entry.name:
                    continue
                members = [thing, *vars(thing).values()] if inspect.isclass(thing) else [thing]
                for member in members:
                    text = getattr(member, "__doc__", None)
                    if isinstance(text, str) and "Example" in text:
                        found.append((f"{entry.name}.{name}", text, vars(module)))
    return found


def examples() -> list[tuple[str, str, str | None, dict[str, Any]]]:
    """Name, expression, the value it is said to have (None: the expression is itself the claim), and its module."""
    found = []
    for name, text, module in documented():
        after = " ".join(text.partition("Example")[2].split())
        found += [(name, equation, None, module) for equation in EQUATION.findall(after)]
        found += [(name, expression, value.strip("`"), module) for expression, value in EXAMPLE.findall(after)]
    return found


def _numbers(value: Any) -> Any:
    return value.detach().tolist() if isinstance(value, torch.Tensor) else value


def _equal(value: Any, said: Any) -> bool:
    value = list(value) if isinstance(value, tuple) else value
    said = list(said) if isinstance(said, tuple) else said
    if isinstance(said, list) and isinstance(value, list):
        return len(value) == len(said) and all(map(_equal, value, said))
    if isinstance(said, float | int) and isinstance(value, float | int):
        return math.isclose(value, said, rel_tol=1e-4, abs_tol=1e-6)
    return bool(value == said)


IN_WORDS = ("dim", "queue.keys()", "bank.rows(last)", "Both((Length(300, 10, 2000), Length(100, 5, 1000)), 1.0)")
IN_WORDS += ("CPCFeatures(run).transform(np.zeros((2, 28, 28, 3), np.uint8)).shape == (2, d)",)
"""These go on with a sentence, or with what a reader has made before; tests of their own hold them."""


def readers_things() -> dict[str, Any]:
    """What examples take for granted."""
    from contrastive_core.losses import nt_xent
    from contrastive_core.randomness import Randomness

    given = {"torch": torch, "nn": torch.nn, "math": math, "nt_xent": nt_xent, "tensor": torch.arange(3.0)}
    randomness = Randomness(0, 0, torch.arange(1))
    return given | {"images": torch.rand(1, 3, 8, 8), "randomness": randomness, "seed": 0, "epoch": 0}


EXAMPLES = [row for row in examples() if row[1] not in IN_WORDS]
LARGE = ("simclr_resnet(", "PatchResNet(", "resnet161(", "TimmTrunk(")
"""Networks of up to hundreds of millions of weights: seconds, and gigabytes."""


def test_most_examples_are_read():
    assert len(EXAMPLES) >= 50


@pytest.mark.parametrize(
    ("expression", "said", "module"),
    [pytest.param(*row[1:], marks=[pytest.mark.slow] * row[1].startswith(LARGE)) for row in EXAMPLES],
    ids=[f"{name}-{place}" for place, (name, *_) in enumerate(EXAMPLES)],
)
def test_an_example_gives_what_it_says(expression, said, module):
    torch.manual_seed(0)
    names = {**readers_things(), **module}
    value = _numbers(eval(expression, names))
    assert value if said is None else _equal(value, _numbers(eval(said, names)))


# ---- the site ----


class Links(HTMLParser):
    """What a page points to, what it would load, and its anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.loaded += [values[name] for name in ("src", "srcset", "data", "poster") if name in values]
        if tag == "link":
            self.loaded.append(values.get("href", ""))
        self.anchors |= {values[name] for name in ("id", "name") if name in values}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    done = run_command([sys.executable, str(CHECKOUT / "docs" / "build.py"), str(folder)], folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, Links]:
    found = {}
    for file in site.rglob("*.html"):
        found[file.resolve()] = Links()
        found[file.resolve()].feed(file.read_text())
    return found


@pytest.mark.slow
def test_every_link_within_the_site_leads_somewhere(site, read):
    broken = []
    for page, links in read.items():
        for link in links.links + links.loaded:
            if re.match(r"[a-z]+:", link) or not link:
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or not target.is_relative_to(site.resolve()):
                broken.append(f"{page.relative_to(site.resolve())}: {link}")
            elif anchor and target in read and "api" not in target.parts and anchor not in read[target].anchors:
                broken.append(f"{page.relative_to(site.resolve())}: no anchor {link}")
    assert not broken


@pytest.mark.slow
def test_no_page_asks_the_network_for_anything(site, read):
    asked = [
        f"{page}: {link}" for page, links in read.items() for link in links.loaded if re.match("(https?:)?//", link)
    ]
    assert not asked
    for file in [*site.rglob("*.html"), *site.rglob("*.js")]:
        scripts = " ".join(re.findall(r"<(?:script|style)[^>]*>(.*?)</(?:script|style)>", file.read_text(), re.DOTALL))
        text = file.read_text() if file.suffix == ".js" else scripts
        assert not re.search(r"@import|url\(['\"]?(https?:)?//|(fetch|open|import)\(['\"`](https?:)?//", text), file


@pytest.mark.slow
def test_the_reference_has_every_public_function(site):
    text = (site / "api" / "contrastive_core" / "losses.html").read_text()
    for name in ("info_nce", "nt_xent", "InfoNCELoss", "sup_con", "siglip", "distillation"):
        assert f'id="{name}"' in text
    assert 'id="load_encoder"' in (site / "api" / "cpc.html").read_text()


def test_a_link_to_a_file_that_is_not_there_is_told():
    done = subprocess.run(
        [sys.executable, "-c", "import build; build.link('none.md', 'docs/losses.md')"],
        cwd=CHECKOUT / "docs", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "docs/losses.md: none.md is not in the checkout" in done.stderr


def test_help_of_a_benchmark_starts_nothing():
    """Each reads its command line, so that --help, or a mistyped option, does not begin hours of work."""
    scripts = [path for path in (CHECKOUT / "benchmarks").glob("*.py") if "__main__" in path.read_text()]
    assert len(scripts) > 10
    for script in scripts:
        assert re.search(r"^    takes_no_arguments\(__doc__\)|\.parse_args\(", script.read_text(), re.M), script.name
