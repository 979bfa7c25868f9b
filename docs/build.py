"""`make docs`: the pages of docs/ and an API reference from the docstrings, as a site of plain files in build/docs.

Nothing is fetched, here or by the pages: open build/docs/index.html. A link to a module leads to its reference, one to
any other file of the checkout to a copy of it.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path, PurePosixPath

CHECKOUT = Path(__file__).resolve().parents[1]
PACKAGES = ("contrastive_core", "cpc")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/notes.md")
"""Beside all of docs/."""
EXTRAS = {"tables": None, "fenced-code-blocks": None, "header-ids": None, "code-friendly": None, "cuddled-lists": None}

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; margin: 0; color: #1c1c1c; display: flex; }
nav { min-width: 14em; padding: 1.2em; background: #f4f4f2; min-height: 100vh; box-sizing: border-box; }
nav a { display: block; padding: .12em 0; } nav b { display: block; margin-top: .9em; }
main { max-width: 56em; padding: 1.2em 2.2em; min-width: 0; }
a { color: #14508c; text-decoration: none; } a:hover { text-decoration: underline; }
pre { background: #f4f4f2; padding: .8em; overflow-x: auto; } code { font-size: 90%; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
td, th { border: 1px solid #ccc; padding: .3em .6em; text-align: left; vertical-align: top; } img { max-width: 100%; }
@media (max-width: 50em) { body { display: block; } nav { min-height: 0; } }
"""


def pages() -> list[str]:
    """The Markdown files and notebooks that become pages, by their paths in the checkout."""
    found = sorted((CHECKOUT / "docs").rglob("*.md")) + sorted((CHECKOUT / "docs").rglob("*.ipynb"))
    return [name for name in PAGES if (CHECKOUT / name).is_file()] + [
        path.relative_to(CHECKOUT).as_posix() for path in found
    ]


def site_path(name: str) -> str:
    """Where a file of the checkout lies in the site. Example: `site_path("docs/losses.md") == "docs/losses.html"`."""
    path = PurePosixPath(name)
    if name == "README.md":
        return "index.html"
    if path.suffix in (".md", ".ipynb"):
        return path.with_suffix(".html").as_posix()
    if path.suffix == ".py" and path.parts[0] in PACKAGES:
        module = path.parent if path.name == "__init__.py" else path.with_suffix("")
        return f"api/{module.as_posix()}.html"
    if path.suffix == ".png":
        return name
    return f"files/{name}.html"


def link(target: str, page: str) -> str:
    """Where a link of `page` leads to in the site; links to other sites, and within the page, stay as they are.

    Raises ValueError for one to a file that is not there.
    """
    if re.match(r"[a-z]+:|#|//", target):
        return target
    path, _, anchor = target.partition("#")
    name = os.path.normpath((CHECKOUT / page).parent / path)
    relative = os.path.relpath(name, CHECKOUT)
    if not os.path.exists(name) or relative.startswith(".."):
        raise ValueError(f"{page}: {target} is not in the checkout")
    here = os.path.dirname(site_path(page))
    return os.path.relpath(site_path(Path(relative).as_posix()), here or ".") + (f"#{anchor}" if anchor else "")


def notebook_text(file: Path) -> str:
    """A notebook as Markdown: its texts, and its code in fences."""
    cells = json.loads(file.read_text())["cells"]
    texts = (("".join(cell["source"]), cell["cell_type"]) for cell in cells)
    return "\n\n".join(f"```python\n{text}\n```" if kind == "code" else text for text, kind in texts)


def page_html(name: str, body: str, title: str) -> str:
    """A page with the site's menu."""
    here = os.path.dirname(site_path(name)) or "."

    def entry(target: str, label: str) -> str:
        return f'<a href="{os.path.relpath(target, here)}">{html.escape(label)}</a>'

    written = [page for page in pages() if page.startswith("docs/")]
    plain = [entry(site_path(page), Path(page).stem) for page in written if "tutorials/" not in page]
    tutorials = [entry(site_path(page), Path(page).stem) for page in written if "tutorials/" in page]
    menu = [entry("index.html", "cpc-images"), *plain, "<b>tutorials</b>", *tutorials, "<b>reference</b>"]
    menu += [entry(f"api/{package}.html", package) for package in PACKAGES]
    menu += ["<b>project</b>", *(entry(site_path(page), page) for page in PAGES if page != "README.md")]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><nav>{''.join(menu)}</nav>\n<main>{body}</main></body></html>\n"
    )


def write_page(name: str, out: Path) -> set[str]:
    """Write one page; returns the files of the checkout that it links to and that are no pages."""
    import markdown2

    file = CHECKOUT / name
    text = notebook_text(file) if file.suffix == ".ipynb" else file.read_text()
    body = str(markdown2.markdown(text, extras=EXTRAS))
    linked: set[str] = set()

    def moved(found: re.Match[str]) -> str:
        target = html.unescape(found[2])
        new = link(target, name)
        if not re.match(r"[a-z]+:|#|//", target):
            path = os.path.normpath(file.parent / target.partition("#")[0])
            linked.add(Path(os.path.relpath(path, CHECKOUT)).as_posix())
        return f'{found[1]}="{html.escape(new)}"'

    body = re.sub(r'\b(href|src)="([^"]*)"', moved, body)
    title = re.search(r"<h1[^>]*>(.*?)</h1>", body, flags=re.DOTALL)
    written = out / site_path(name)
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(page_html(name, body, re.sub("<.*?>", "", title[1]) if title else name))
    return linked


def write_file(name: str, out: Path) -> None:
    """A copy of a file that a page links to, or a list of what a folder holds."""
    source, target = CHECKOUT / name, out / site_path(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".png":
        shutil.copyfile(source, target)
        return
    if source.is_dir():
        shown = "\n".join(sorted(path.name for path in source.iterdir() if not path.name.startswith(("_", "."))))
    else:
        shown = source.read_text(errors="replace")[:200_000]
    target.write_text(page_html(name, f"<h1>{html.escape(name)}</h1><pre>{html.escape(shown)}</pre>", name))


def write_reference(out: Path) -> None:
    """The API reference, by pdoc. Whatever it cannot import, or resolve, is an error."""
    import pdoc
    import pdoc.render

    import cpc

    vars(cpc)["load_encoder"] = cpc.load_encoder  # which is read on first use, and pdoc looks for a module instead
    pdoc.render.configure(docformat="google", search=True, show_source=True, footer_text="cpc-images")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # of generated constructors, whose names pdoc does not see: it prints them as they are written
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        pdoc.pdoc(*PACKAGES, output_directory=out / "api")


def build(out: Path) -> int:
    """Write the site anew; returns the number of its own pages."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_reference(out)
    names = pages()
    linked = {name for page in names for name in write_page(page, out)}
    for name in sorted(linked):
        if not (out / site_path(name)).exists():
            write_file(name, out)
    return len(names)


def main() -> int:
    """The command; what is missing is told in one line."""
    sys.path.insert(0, str(CHECKOUT))
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "build" / "docs"
    try:
        count = build(out)
    except ModuleNotFoundError as error:
        print(f'error: {error}: pip install "cpc-images[docs]"', file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} pages and the reference: {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
