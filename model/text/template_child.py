"""The child process that renders chat templates: JSON lines in, JSON lines out. Run by chat_template.py only.

First line in: path, template, variables, moment, max_output; one line out. Every further line in: conversations and
variables; a line out for each conversation, up to the first that fails.
"""

import contextlib
import datetime
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
        from jinja2 import nodes
        from jinja2.exceptions import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        answer({"error": describe(error)})
        return
    limit_memory()

    def raise_exception(message):
        raise TemplateError(message)

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's own words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller):
            return caller()

    moment = datetime.datetime.fromisoformat(setup["moment"])
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = moment.strftime
    environment.filters["tojson"] = to_json
    try:
        template = environment.from_string(setup["template"])
    except Exception as error:
        answer({"error": describe(error)})
        return
    answer({})
    for line in sys.stdin:
        message = json.loads(line)
        variables = setup["variables"] | message["variables"]
        for messages in message["conversations"]:
            try:
                text = render(template, messages, variables, setup["max_output"])
            except Exception as error:  # whatever a template does wrong is the template's error
                answer({"error": describe(error)})
                break
            answer({"text": text})


def render(template, messages, variables, max_output):
    size, pieces = 0, []
    names = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
    for piece in template.generate(**(variables | names)):
        size += len(piece)
        if size > max_output:
            raise ValueError(f"output is longer than {max_output} characters")
        pieces.append(piece)
    return "".join(pieces)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON without the escapes for HTML that jinja's own filter puts in."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


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
