"""The public API: names, docstrings, annotations; what a type checker sees of it; the reference of `make docs`."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cna_kernels", "cna_kernels.model")
SHAPE = re.compile(r"`\[(any|[A-Z1-9])")
ANY_SHAPE = ("check_tensor",)  # functions of tensors of whatever shape


def run(*command, **environment):
    command = [str(part) for part in command]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)


def public_names(package):
    return [(package, name) for name in import_module(package).__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def docs():
    """docs/build.py as a module."""
    pytest.importorskip("pdoc")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def members(kind):
    """The functions that a class defines itself and callers use: methods, properties, its constructor."""
    for name, member in vars(kind).items():
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        public = not name.startswith("_") or name in ("__init__", "__call__")
        if public and inspect.isfunction(member) and member.__module__ == kind.__module__:
            yield f"{kind.__qualname__}.{name}", member


def faults(where, function):
    """What is missing of a function's docstring and annotations."""
    found = []
    text, signature = function.__doc__ or "", inspect.signature(function)
    named = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    found += [f"{where}: {p.name} has no annotation" for p in named if p.annotation is p.empty]
    if signature.return_annotation is signature.empty:
        found.append(f"{where}: no annotation of what it returns")
    if where.endswith(".__init__"):
        return found  # its arguments are described with the class
    if not text:
        found.append(f"{where}: no docstring")
    kinds = [*(str(p.annotation) for p in named), str(signature.return_annotation)]
    if any("Tensor" in kind for kind in kinds) and function.__name__ not in ANY_SHAPE and not SHAPE.search(text):
        found.append(f"{where}: has tensors and its docstring no shape")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_resolve_and_are_documented(package):
    for _, name in public_names(package):
        assert inspect.getdoc(getattr(import_module(package), name)), f"{package}.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = import_module(package).nonsense


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_see_the_names_that_resolve(package):
    module = import_module(package)
    (block,) = (node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {(alias.asname, node.module) for node in block.body for alias in node.names}
    assert seen == set(module._HOME.items())


def test_everything_in_the_reference_is_annotated_and_described(docs):
    found = []
    for module in map(import_module, docs.MODULES):
        public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in public:
            thing = getattr(module, name)
            if not hasattr(module, "__all__") and getattr(thing, "__module__", "") != module.__name__:
                continue  # imported
            if inspect.isfunction(thing):
                found += faults(f"{module.__name__}.{name}", thing)
            elif inspect.isclass(thing):
                found += [] if thing.__doc__ else [f"{module.__name__}.{name}: no docstring"]
                for qualified, function in members(thing):
                    found += faults(f"{module.__name__}.{qualified}", function)
    assert not found, "\n".join(found)


GOOD = """
import torch
from cna_kernels import Circuit, attach, gated_mlp
from cna_kernels.model import load
engine = attach(torch.nn.Linear(1, 1), max_rows=8)
with engine.collect(torch.ones(2, 2)) as sums:
    pass
circuit: Circuit = engine.select(sums, top_k=4)
answers: str | list[str] = load("checkpoint").generate("prompt", circuit=circuit, multiplier=0.5)
y: torch.Tensor = gated_mlp(torch.ones(1, 2), torch.ones(6, 2), torch.ones(2, 3))
"""
# line of code: the checker's message about it
BAD = {
    "from cna_kernels import Circuit, attach, gated_mlp, nonsense": 'has no attribute "nonsense"',
    "from cna_kernels.model import load": None,
    'engine = attach("model")': 'Argument 1 to "attach" has incompatible type "str"',
    'engine.set([3], "a")': 'Argument 2 to "set" of "Engine" has incompatible type "str"',
    "gated_mlp(1, 2, 3)": 'Argument 1 to "gated_mlp" has incompatible type "int"',
    "Circuit.load(3)": 'Argument 1 to "load" of "Circuit" has incompatible type "int"',
    "load(3)": 'Argument 1 to "load" has incompatible type "int"',
}


@pytest.mark.exhaustive
def test_a_type_checker_finds_wrong_arguments(tmp_path):
    """mypy on the installed package, whose types it reads only if the package has a py.typed."""
    pytest.importorskip("mypy")
    installed = tmp_path / "installed"
    done = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "build_py", "-d", installed)
    assert done.returncode == 0 and (installed / "cna_kernels" / "py.typed").exists(), done.stderr
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text("\n".join(BAD) + "\n")
    flags = ["--config-file", os.devnull, "--cache-dir", ROOT / "build" / "mypy", "--follow-imports", "silent"]
    programs = tmp_path / "good.py", tmp_path / "bad.py"
    done = run(sys.executable, "-m", "mypy", *flags, *programs, PYTHONPATH=str(installed))
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.findall(r"^(.*\.py):(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    assert {Path(path).name for path, _, _ in found} == {"bad.py"}, done.stdout
    for number, (line, what) in enumerate(BAD.items(), 1):
        said = [message for _, place, message in found if int(place) == number]
        assert any(what in message for message in said) if what else not said, f"{line}: {said}"


class Page(HTMLParser):
    """The ids and links of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        elif tag != "a":
            self.loaded += [attributes[name] for name in ("src", "href") if name in attributes]


@pytest.fixture(scope="module")
def pages(docs, tmp_path_factory):
    """Path -> Page of all files that `make docs` writes; and the folder. Building must print nothing."""
    out = tmp_path_factory.mktemp("docs")
    done = run(sys.executable, "-W", "default", ROOT / "docs" / "build.py", out)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return {path: Page(path) for path in out.rglob("*.html")}, out


@pytest.mark.exhaustive
def test_reference_has_every_public_name(pages):
    found, out = pages
    for package in PACKAGES:
        page = found[out / f"{package.replace('.', '/')}.html"]
        assert {name for _, name in public_names(package)} <= page.ids
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert documents == {path.stem for path in found if path.parent.name == "docs"}
    header = (out / "csrc" / "cna_h.html").read_text()
    assert all(name in header for name in re.findall(r"\bcna_\w+(?=\()", (ROOT / "csrc" / "cna.h").read_text()))


@pytest.mark.exhaustive
def test_links_of_the_reference_resolve(pages):
    found, _ = pages
    for path, page in found.items():
        assert not [place for place in page.loaded if "//" in place and not place.startswith("data:")]
        for link in page.links:
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target in found, f"{path.name}: {link}"
            assert not anchor or anchor in found[target].ids, f"{path.name}: {link}"


@pytest.mark.exhaustive
def test_roles_and_whole_names_became_links(pages):
    found, out = pages
    names = {f"{package}.{name}" for package in PACKAGES for _, name in public_names(package)}
    for path in found:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r":(func|class|meth):", text), path.name
        if path.parent != out / "docs" and path.name != "README.html":
            unlinked = re.findall(r"<code>(cna_kernels[\w.]*)(?:\(\))?</code>", text)
            assert not names & set(unlinked), path.name
