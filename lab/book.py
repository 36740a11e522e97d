"""Build the book: each chapter of docs/book/ as a notebook and as a page of HTML, all cells run.

    python -m lab.book                       # everything into out/book, a few minutes
    python -m lab.book 2-inversion           # these chapters alone
    cp out/book/*.png docs/book/             # after a change, the figures beside the chapters

A chapter is Markdown whose ```python blocks are its cells. jupytext reads it, a Jupyter kernel runs
it in --out, where its figures land, and nbconvert writes the page, with the pictures inside.
"""

import argparse
import re
from pathlib import Path

from system.files import ROOT, UserError, write
from system.program import Parser, reported

BOOK = ROOT / "docs" / "book"
CHAPTERS = ["README", *sorted(file.stem for file in BOOK.glob("[0-9]-*.md"))]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("lab.book", __doc__)
    add = parser.add_argument
    add("chapters", nargs="*", metavar="CHAPTER", help="file names without .md (default: all)")
    add("--out", type=Path, default=Path("out/book"), metavar="FOLDER",
        help="of notebooks, pages and figures")  # fmt: skip
    args = parser.parse_args(argv)
    if unknown := set(args.chapters) - set(CHAPTERS):
        parser.error(f"there is no chapter {min(unknown)}; they are: {', '.join(CHAPTERS)}.")
    return args


if __name__ == "__main__":
    parse()  # answers --help and wrong flags before the imports below, which take seconds

import os
import time

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
QUIET = "--IPKernelApp.log_level=ERROR"
STYLE = """<style>
.jp-RenderedMarkdown pre { margin: 0.8em 0 1em 1.5em !important }
.jp-RenderedMarkdown .highlight { background: none }
</style>"""


def run(chapter: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook of a chapter, its cells run in the folder. Raises UserError where one fails."""
    notebook = jupytext.read(chapter, fmt="md")
    notebook.metadata["kernelspec"] = KERNEL
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources=where, extra_arguments=[QUIET]
    )
    try:
        client.execute(env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
    except CellExecutionError as error:
        raise UserError(
            f"{chapter}: a cell raises {error.ename} ({error.evalue}); mend it, and build "
            f"{chapter.stem} again."
        ) from error
    return notebook


def page(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """A notebook as HTML, with the pictures of the folder inside and links to the other pages.

    Its scripts are left out: they would come from the network, and nothing here needs them."""
    title = notebook.cells[0].source.partition("\n")[0].strip("# ")
    where = {"metadata": {"path": str(folder), "name": title}}
    text, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook, resources=where)
    text = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
    text = text.replace("</head>", f"{STYLE}</head>", 1)
    return re.sub(rf'href="({"|".join(CHAPTERS)})\.md', r'href="\1.html', text)


def main(argv: list[str] | None = None):
    args = parse(argv)
    with reported("lab.book"):
        args.out.mkdir(parents=True, exist_ok=True)
        for name in args.chapters or CHAPTERS:
            start = time.monotonic()
            notebook = run(BOOK / f"{name}.md", args.out.resolve())
            write(args.out / f"{name}.ipynb", nbformat.writes(notebook))
            write(args.out / f"{name}.html", page(notebook, args.out.resolve()))
            print(f"{args.out / name}.html took {time.monotonic() - start:.0f} s.", flush=True)


if __name__ == "__main__":
    main()
