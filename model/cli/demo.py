"""What `cna demo` does."""

from __future__ import annotations

from ..demo.checkpoint import SMOLLM2, demo_checkpoint
from ..packages import require
from .console import stdout


def run_demo(args):
    if args.bundled:
        demo_checkpoint()
        require("tokenizers", "jinja2", "rich", "matplotlib")
        from ..demo.bundled import tell as tell_bundled

        tell_bundled(args.out or "demo-bundled-out", stdout())
        return
    demo_checkpoint(SMOLLM2)
    require("tokenizers", "jinja2", "rich", "matplotlib", "gguf")
    from ..demo.story import tell

    tell(args.out or "demo-out", stdout())
