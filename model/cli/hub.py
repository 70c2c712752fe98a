"""What `cna push` and `cna pull` do: circuits and adapters on the Hugging Face Hub."""

from __future__ import annotations

from cna_kernels.errors import InputError
from cna_kernels.files import parents_made

from ..hub.names import HubName, parse_name
from ..hub.share import pull, push
from .console import stdout
from .evaluation import say_to_stderr


def run_push(args):
    name = _name(args.repo)
    if name.file is not None or name.revision is not None:
        raise InputError(args.repo, "expected org/name; --revision names a branch")
    done = push(
        args.paths, name.repo, private=args.private, revision=args.revision, message=args.message,
        say=say_to_stderr(args),
    )  # fmt: skip
    what = ", ".join(args.paths)
    stdout().print(f"pushed {what} to {done.url}, commit {done.commit}", markup=False, soft_wrap=True)


def run_pull(args):
    name = _name(args.repo)
    with parents_made(args.output):
        done = pull(name, args.output, say=say_to_stderr(args))
    what = ", ".join(done.files)
    line = f"wrote {what} to {args.output}, from {name.repo}, commit {done.commit}"
    stdout().print(line, markup=False, soft_wrap=True)


def _name(text: str) -> HubName:
    name = parse_name(text)
    if name is None:
        raise InputError(text, "expected a repository on the Hub, org/name")
    return name
