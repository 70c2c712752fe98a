"""`make docs`: the API reference and these documents as HTML in build/docs, to be read without a network.

pdoc turns docstrings into pages. What this adds: which modules are shown; names in roles made whole, so that they
become links (:class:`Scale` is ``cna_kernels.Scale``); pages for README.md, docs/*.md and csrc/cna.h.
"""

import re
import shutil
import sys
import typing
from pathlib import Path
from types import ModuleType

import pdoc.doc
import pdoc.render

ROOT = Path(__file__).resolve().parent.parent
CORE = "ops scale reference sums select circuit steering engine backends errors vllm.client"
MODEL = "language_model prompts.files discovery.settings generate checkpoint.export checkpoint.lora"
MODEL += " evaluation.suite evaluation.evaluate evaluation.reproduce evaluation.metrics evaluation.directions"
MODULES = ["cna_kernels", "cna_kernels.model"]
MODULES += [f"cna_kernels.{name}" for name in CORE.split()] + [f"cna_kernels.model.{name}" for name in MODEL.split()]
DOCUMENTS = {name: f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")}
DOCUMENTS |= {f"docs.{path.stem}": path for path in sorted(ROOT.glob("docs/*.md"))}


def path_of(name: str) -> str:
    """Where the page of that name is written, and linked to."""
    return f"{name.replace('.', '/')}.html"


def read_module(name: str) -> pdoc.doc.Module:
    """A module as pdoc sees it, with two things that it does not see by itself."""
    page = pdoc.doc.Module.from_name(name)
    for public in getattr(page.obj, "__all__", ()):
        setattr(page.obj, public, getattr(page.obj, public))  # names that load on first use
    for kind in page.classes:
        if issubclass(kind.obj, tuple):  # the types in a NamedTuple's signature are text
            kind.obj.__new__.__annotations__ = typing.get_type_hints(kind.obj)
    return page


def document(name: str, text: str) -> pdoc.doc.Module:
    """A page of Markdown, in the form of a module that is nothing but its docstring."""
    text = re.sub(r"\]\(([\w./]+)\.md(#[\w-]+)?\)", r"](\1.html\2)", text)  # links between files of the checkout
    module = ModuleType(name, text)
    module.__docformat__ = "markdown"
    return pdoc.doc.Module(module)


def make_whole(doc: pdoc.doc.Doc, names: dict[str, str]):
    """Give the names in the roles of a docstring, and of those of its members, their modules."""
    doc.docstring = re.sub(r":(func|class):`(\w+)`", lambda m: f":{m[1]}:`{names.get(m[2], m[2])}`", doc.docstring)
    for member in doc.members.values() if isinstance(doc, pdoc.doc.Namespace) else ():
        make_whole(member, names)


def contents(documents: dict[str, pdoc.doc.Module], modules: dict[str, pdoc.doc.Module]) -> pdoc.doc.Module:
    """The first page: all others, with the first line of each."""
    first = {name: page.docstring.split("\n")[0].lstrip("# ") for name, page in (documents | modules).items()}
    lines = ["# Documents", "", *(f"- [{first[name]}]({path_of(name)})" for name in documents)]
    lines += ["", "# Modules", "", *(f"- [`{name}`]({path_of(name)}): {first[name]}" for name in modules)]
    return document("index", "\n".join(lines))


def build(out: Path):
    modules = {name: read_module(name) for name in MODULES}
    names = {member: f"{name}.{member}" for name, page in reversed(modules.items()) for member in page.members}
    for page in modules.values():
        make_whole(page, names)
    documents = {name: document(name, (ROOT / path).read_text(encoding="utf-8")) for name, path in DOCUMENTS.items()}
    documents["csrc.cna_h"] = document("csrc.cna_h", f"# csrc/cna.h\n\n```c\n{(ROOT / 'csrc/cna.h').read_text()}```\n")
    pages = documents | modules
    pdoc.render.configure(docformat="google", show_source=False)
    for name, page in (pages | {"index": contents(documents, modules)}).items():
        (target := out / path_of(name)).parent.mkdir(parents=True, exist_ok=True)
        target.write_text(pdoc.render.html_module(page, pages), encoding="utf-8")
    for picture in ROOT.glob("docs/*.png"):
        shutil.copy(picture, out / "docs")
    (out / "search.js").write_text(pdoc.render.search_index(pages), encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "docs")
