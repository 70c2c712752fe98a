"""Fetching from the Hugging Face Hub into the user's cache, by huggingface_hub: which files, and what its errors mean.

Tokens, the cache, the address of the Hub and the offline mode are huggingface_hub's own matter (``HF_TOKEN``,
``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``). Files that may hold code (.py, .bin, pickles) are never asked for.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from cna_kernels.errors import InputError

from ..checkpoint.safetensors_file import INDEX, SINGLE, index_files
from ..packages import missing
from ..text.chat_template import FOLDER
from ..text.tokenizer_files import OTHERS
from .names import HubName

# What a checkpoint has besides weights: settings, and the files of a tokenizer, of which some are not JSON.
SETTINGS = ("*.json", "*.jinja", "vocab.txt", "merges.txt", *OTHERS)
_NETWORK = ("httpx", "httpx2", "requests")  # whose errors huggingface_hub lets through, by its version
_PART = re.compile(r"(.*-)\d{5}(-of-\d{5}\.gguf)")  # of a split GGUF file


def fetch_model(name: HubName) -> Path:
    """Fetch a model. Return its directory in the cache, or its GGUF file.

    Of a directory come the weights in safetensors that :func:`open_checkpoint` reads, and SETTINGS.

    Raises:
        InputError: naming the repository and what to do, where it cannot be fetched or holds no such weights.
    """
    if name.file is not None:
        return _gguf(name)
    folder = snapshot(name, SETTINGS, top=True)
    pinned = HubName(name.repo, None, folder.name)
    templates = f"{FOLDER}/*.jinja"
    snapshot(pinned, (SINGLE, templates))
    if (folder / SINGLE).exists():
        return folder
    if not (folder / INDEX).exists():
        raise InputError(name, f"holds neither {SINGLE} nor {INDEX}{_instead(pinned)}")
    shards = index_files(folder / INDEX)
    snapshot(pinned, (*map(escape, shards), templates))
    for shard in shards:
        if not (folder / shard).exists():
            raise InputError(name, f"lacks {shard}, which its {INDEX} names, at commit {folder.name}")
    return folder


def _gguf(name: HubName) -> Path:
    """Fetch a GGUF file, with the other parts of a split one; ``name.file`` may be the quantisation alone: Q4_K_M."""
    file = str(name.file)
    if file.endswith(".gguf"):
        split = _PART.fullmatch(file)
        folder = snapshot(name, [escape(file) if split is None else f"{escape(split[1])}?????{escape(split[2])}"])
        found = [file] if (folder / file).exists() else []
    elif re.fullmatch(r"\w+", file):
        spellings = dict.fromkeys((file, file.upper(), file.lower()))
        folder = snapshot(name, [f"*[-._]{each}{end}.gguf" for each in spellings for end in ("", "-?????-of-?????")])
        ending = re.compile(rf".*[-._]{file}(-\d{{5}}-of-\d{{5}})?\.gguf", re.IGNORECASE)
        found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.gguf") if ending.fullmatch(p.name))
    else:
        raise InputError(name, "expected a .gguf file or a quantisation, such as Q4_K_M, behind the colon")
    whole = [path for path in found if not _PART.fullmatch(path) or "-00001-of-" in path]
    if not found:
        raise InputError(name, f"holds no such GGUF file{_instead(HubName(name.repo, None, folder.name))}")
    if len(whole) != 1 and not file.endswith(".gguf"):
        raise InputError(name, f"fits several files, name one: {', '.join(whole or found)}")
    return folder / (whole or found)[0]


def fetch_circuit(name: HubName) -> Path:
    """Fetch a circuit file. Return its place in the cache. Raises InputError for a file of another kind."""
    if not str(name.file).endswith(".json"):
        raise InputError(name, "expected a circuit's file behind the colon, whose name ends in .json")
    return fetch_file(name)


def fetch_file(name: HubName) -> Path:
    """Fetch one file of a repository, of whatever kind. Return its place in the cache."""
    require_hub(name)
    from huggingface_hub import hf_hub_download

    with errors_of(name):
        return Path(hf_hub_download(name.repo, str(name.file), revision=name.revision))


def snapshot(name: HubName, patterns: Iterable[str], *, top: bool = False) -> Path:
    """Fetch the files of a repository that match one of the patterns. Return the directory of the snapshot, whose name
    is the commit.

    Args:
        top: leave out what lies in folders of the repository.
    """
    require_hub(name)
    from huggingface_hub import snapshot_download

    which: dict[str, Any] = dict(allow_patterns=list(patterns), ignore_patterns=["*/*"] if top else None)
    with errors_of(name):
        return Path(snapshot_download(name.repo, revision=name.revision, **which))


def require_hub(name: HubName) -> None:
    """Raise InputError unless huggingface_hub is installed."""
    if reason := missing("huggingface_hub"):
        raise InputError(name, f"is no path here; names on the Hugging Face Hub need huggingface_hub, {reason}")


@contextmanager
def errors_of(name: HubName, *, kind: str = "model", writing: bool = False) -> Iterator[None]:
    """Make every error of huggingface_hub one line that names what was asked for, and what to do.

    Args:
        writing: the repository is being written to.
    """
    from huggingface_hub import constants, errors

    try:
        with _quiet():
            yield
    except InputError:
        raise
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name.repo}"
        what = f"is gated: ask for access on {page}, then log in (hf auth login, or HF_TOKEN)"
        raise InputError(name, what) from None
    except errors.RepositoryNotFoundError:
        what = f"no such path here, and no such {kind} on {constants.ENDPOINT}; a private one takes a login"
        what = f"{constants.ENDPOINT} does not let it be written: log in with the right to it" if writing else what
        raise InputError(name, f"{what} (hf auth login, or HF_TOKEN)") from None
    except errors.RevisionNotFoundError:
        raise InputError(name, f"{name.repo} has no branch, tag or commit {name.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:  # what is behind it may be an answer
        cause = error.__cause__
        what = _what(cause) if isinstance(cause, errors.HfHubHTTPError) else _unreachable(error)
        raise InputError(name, what) from None
    except errors.EntryNotFoundError:
        at = "" if name.revision is None else f" at {name.revision}"
        raise InputError(name, f"{name.repo} has no file {name.file!r}{at}") from None
    except Exception as error:  # of the network, of the disk, and of other versions of huggingface_hub
        raise InputError(name, _what(error)) from None


def _what(error: Exception) -> str:
    """What an error says, and what to do."""
    from huggingface_hub import constants

    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    if full:
        return f"the disk of the cache {constants.HF_HUB_CACHE} is full; free space, or set HF_HOME to another disk"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{constants.ENDPOINT} refuses it ({status}): log in (hf auth login, or HF_TOKEN) with the right to it"
    if status is not None:
        return f"{constants.ENDPOINT} answers {status}: try again later ({text})"
    if isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in _NETWORK:
        return _unreachable(error)
    return f"cannot be fetched: {text}"


def _unreachable(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        what = f"no such path here, and the cache {constants.HF_HUB_CACHE} does not hold it whole"
        return f"{what}: HF_HUB_OFFLINE is set; fetch it once without"
    cause = error.__cause__ or error
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    return f"{constants.ENDPOINT} cannot be reached, and the cache does not hold it whole; try again online ({reason})"


def _instead(name: HubName) -> str:
    """What a repository without the wanted weights holds, as far as the Hub says so."""
    from huggingface_hub import HfApi

    try:
        files = sorted(HfApi().list_repo_files(name.repo, revision=name.revision))
    except Exception:  # offline: the error is the one about the weights
        return ""
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        shown = ", ".join(ggufs[:6]) + (", ..." if len(ggufs) > 6 else "")
        return f"; it has {shown}: name one as {name.repo}:{ggufs[0]}"
    others = [file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if others:
        return f"; it has {others[0]}, which may hold code and is not read: save it as safetensors first"
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub without warnings in its log, unless HF_HUB_VERBOSITY asks for them; and without progress bars
    where stderr is no terminal, but perhaps a log of lines."""
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars, before = not are_progress_bars_disabled() and not sys.stderr.isatty(), logging.get_verbosity()
    if bars:
        disable_progress_bars()
    if "HF_HUB_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            enable_progress_bars()
