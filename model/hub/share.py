"""Circuits and adapters to the Hub, and from it: `cna push` and `cna pull`."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cna_kernels.circuit import Circuit
from cna_kernels.circuit_file import REPOSITORY
from cna_kernels.errors import InputError
from cna_kernels.files import FilePath, check_writable, new_directory, read_text, write_bytes

from ..checkpoint.lora import CARD, CONFIG, WEIGHTS
from .card import TAG, card
from .contents import Adapter, card_of, is_circuit, read_adapters, read_circuits
from .fetch import errors_of, fetch_circuit, fetch_file, require_hub, snapshot
from .names import HubName, cached_name

Say = Callable[[str], None]


class Pushed(NamedTuple):
    """What came of a push: the repository's page, and the commit."""

    url: str
    commit: str


def push(
    paths: Sequence[FilePath],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    say: Say = print,
) -> Pushed:
    """Put circuit files, or the directory of one LoRA adapter, into a repository on the Hub, with a model card.

    The repository is made unless it exists. Circuits that it holds already stay, and have their place in the card.

    Args:
        paths: circuit files, or one directory.
        repo: ``org/name``.
        private: make a private repository. One that exists and is public is refused.
        revision: the branch; made unless it exists. None: the default branch.
        message: of the commit.
        say: is told what a user should know, a line each.

    Raises:
        InputError: naming the file that is not shared as it is, or the repository and what to do.
    """
    name = HubName(repo, None, revision)
    require_hub(name)
    directories = [path for path in paths if os.path.isdir(path)]
    if directories and len(paths) > 1:
        raise InputError(directories[0], "is a directory: an adapter has a repository of its own, push it alone")
    circuits: dict[str, Circuit] = {} if directories else read_circuits(paths)
    files = _adapter_files(Path(directories[0])) if directories else {}
    for file, circuit in circuits.items():
        files[file] = circuit.to_json().encode()
        if (circuit.chat or {}).get("system"):
            say(f"{file} holds the system message of its chats, which is shared with it")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with errors_of(name, writing=True):
        url = api.create_repo(repo, private=True if private else None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise InputError(repo, "exists and is public: nothing was pushed; make it private on the Hub first")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        before = api.repo_info(repo, revision=revision)
        there = api.list_repo_files(repo, revision=before.sha)
    pinned = HubName(repo, None, before.sha)
    if any(path.rpartition("/")[2] == CONFIG for path in there) != bool(directories) and _holds_anything(there):
        what = "holds an adapter" if not directories else "holds other files than an adapter's"
        raise InputError(repo, f"{what}: nothing was pushed; circuits and adapters have repositories of their own")
    stale = [path for path in there if path.endswith((CONFIG, WEIGHTS)) and path not in files]
    if stale:
        raise InputError(repo, f"holds another adapter's {', '.join(stale)}: nothing was pushed; remove it first")
    if CARD in there and f"\n- {TAG}\n" not in read_text(fetch_file(HubName(repo, CARD, before.sha)), limit=1 << 24):
        files.pop(CARD, None)
        say(f"{CARD} of {repo} was not written by cna push: it stays as it is")
    elif circuits:
        files[CARD] = card({**_circuits_there(pinned, there, circuits), **circuits}, repo, revision).encode()
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    default = f"Add {', '.join(circuits)}" if circuits else "Add a LoRA adapter"
    with errors_of(name, writing=True):
        done = api.create_commit(
            repo, operations, commit_message=message or default, revision=revision, parent_commit=before.sha
        )
    return Pushed(str(url), done.oid)


def _holds_anything(there: Sequence[str]) -> bool:
    return any(path not in (".gitattributes", CARD) for path in there)


def _circuits_there(name: HubName, there: Sequence[str], new: dict[str, Circuit]) -> dict[str, Circuit]:
    """The circuits that a repository holds besides the new ones; JSON files that are none are left alone."""
    names = [path for path in there if path.endswith(".json") and "/" not in path and path not in new]
    places = [fetch_file(HubName(name.repo, path, name.revision)) for path in names]
    return {place.name: Circuit.load(place) for place in places if is_circuit(place)}


def _adapter_files(directory: Path) -> dict[str, bytes]:
    """The files of an adapter, as they go into a repository."""
    adapters = read_adapters(directory)
    if not adapters:
        raise InputError(directory, f"holds no {CONFIG}: expected an adapter of cna export --to lora")
    files: dict[str, bytes] = {}
    for adapter in adapters:
        place = directory / adapter.folder
        if "/" not in adapter.base_model or not REPOSITORY.fullmatch(adapter.base_model):
            what = f"names {adapter.base_model!r}, which is no repository; cna export --base-model org/name names one"
            raise InputError(f"{place / CONFIG}: base_model_name_or_path", what)
        files[f"{adapter.folder}{CONFIG}"] = (place / CONFIG).read_bytes()
        files[f"{adapter.folder}{WEIGHTS}"] = (place / WEIGHTS).read_bytes()
        files[f"{adapter.folder}{CARD}"] = card_of(directory, adapter).encode()
    files.setdefault(CARD, files[f"{adapters[0].folder}{CARD}"])
    return files


class Pulled(NamedTuple):
    """What a pull wrote: the files, and the commit that they are from."""

    files: tuple[str, ...]
    commit: str


def pull(name: HubName, out: FilePath, *, say: Say = print) -> Pulled:
    """Fetch the circuits, or the adapter, of a repository, check them, write them to ``out``; take nothing else.

    Args:
        name: the repository, or one circuit of it.
        out: a directory to make; or, where there is one circuit, a file to make, whose name ends in .json.
        say: is told what was left out, a line each.

    Raises:
        InputError: ``out`` is there already; the repository cannot be fetched, or holds neither; or a file is not as
            the project writes it.
    """
    if os.path.lexists(out):
        raise InputError(out, "is there already")
    check_writable(out)
    if name.file is not None:
        place = fetch_circuit(name)
        Circuit.load(place)
        cached = cached_name(place)
        files, commit = {Path(name.file).name: place}, "unknown" if cached is None else str(cached.revision)
    else:
        folder = snapshot(name, ("*.json", CARD, WEIGHTS), top=True)
        parts = [f"{part}/{file}" for part in ("[1-9]", "[1-9][0-9]") for file in (CONFIG, WEIGHTS, CARD)]
        snapshot(HubName(name.repo, None, folder.name), parts)
        files, commit = _wanted(name, folder, say), folder.name
    _write(files, Path(out))
    return Pulled(tuple(files), commit)


def _wanted(name: HubName, folder: Path, say: Say) -> dict[str, Path]:
    """The files of a snapshot that are circuits, or an adapter's, all of them checked."""
    adapters: list[Adapter] = read_adapters(folder)
    if adapters:
        files = (f"{adapter.folder}{file}" for adapter in adapters for file in (CONFIG, WEIGHTS, CARD))
        return {file: folder / file for file in files if (folder / file).exists()}
    jsons = sorted(folder.glob("*.json"))
    found = {path.name: path for path in jsons if is_circuit(path)}
    for path in found.values():
        Circuit.load(path)
    if not found:
        raise InputError(name, "holds no circuit and no adapter of cna export")
    others = [path.name for path in jsons if path.name not in found]
    if others:
        say(f"left out, as no circuits: {', '.join(others)}")
    return found


def _write(files: dict[str, Path], out: Path) -> None:
    """Write the files to a directory, or the only one to a file: whole or not at all."""
    if re.search(r"\.json$", out.name):
        if len(files) != 1:
            raise InputError(out, f"expected a directory to make: there are {len(files)} files, {', '.join(files)}")
        write_bytes(out, next(iter(files.values())).read_bytes())
        return
    with new_directory(out) as partial:
        for file, place in files.items():
            (partial / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(place, partial / file)
