"""The child process that renders chat templates: JSON lines in, JSON lines out. Run by chat_template.py only.

First line in: path, template, variables, max_output. Every further line: conversations. Each line in gets one line out.
"""

import contextlib
import json
import os
import sys
import threading
import time

MEMORY = 1 << 30  # bytes of address space


def main():
    die_with_parent()
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]  # where the parent finds jinja2
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        answer({"error": describe(error)})
        return
    limit_memory()

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = to_json
    if "strftime_now is defined" not in setup["template"]:
        # A template that asks falls back to a fixed date, so that a circuit does not depend on the day it was found.
        environment.globals["strftime_now"] = strftime_now
    try:
        template = environment.from_string(setup["template"])
    except (TemplateError, RecursionError, MemoryError, ValueError, SyntaxError) as error:
        answer({"error": describe(error)})
        return
    answer({})
    for line in sys.stdin:
        try:
            conversations = json.loads(line)["conversations"]
            texts = [render(template, messages, setup) for messages in conversations]
        except Exception as error:  # whatever a template does wrong is the template's error
            answer({"error": describe(error)})
        else:
            answer({"texts": texts})


def render(template, messages, setup):
    size, pieces = 0, []
    names = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
    for piece in template.generate(**(setup["variables"] | names)):
        size += len(piece)
        if size > setup["max_output"]:
            raise ValueError(f"output is longer than {setup['max_output']} characters")
        pieces.append(piece)
    return "".join(pieces)


def to_json(value, indent=None):
    return json.dumps(value, ensure_ascii=False, indent=indent)


def strftime_now(form):
    import datetime

    return datetime.datetime.now().strftime(form)


def describe(error):
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def answer(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def limit_memory():
    # Windows has no such limit, and macOS may refuse it; the parent's time limit holds in any case.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def die_with_parent():
    """End this process when the parent ends, even in the middle of a template's endless loop.

    Linux's PR_SET_PDEATHSIG would do so, but when the parent's thread ends, which may be before the parent process.
    """
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
