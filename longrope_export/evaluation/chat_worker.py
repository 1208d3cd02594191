"""Child process that renders one chat template under limits of time and memory; started by `evaluation.chat`.

Reads a JSON request from stdin and writes a JSON answer to stdout: "text" or "error".
"""

from __future__ import annotations

import json
import sys
from typing import Any

# No template writes more about one turn.
LARGEST_TEXT = 1 << 20
_MEMORY = 1 << 30


def main() -> None:
    """Render what stdin asks for; a template's failure is part of the answer."""
    request = json.load(sys.stdin)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit(int(request["seconds"]))
    try:
        answer = {"text": _render(render_jinja_template, request)}
    except MemoryError:
        answer = {"error": "out of memory"}
    except RecursionError:
        answer = {"error": "endless recursion"}
    except Exception as error:  # anything that a stranger's template can raise
        answer = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    json.dump(answer, sys.stdout)


def _render(render: Any, request: dict[str, Any]) -> str:
    rendered, _ = render(
        conversations=[request["messages"]],
        chat_template=request["template"],
        add_generation_prompt=True,
        **request["special_tokens"],
    )
    if len(rendered[0]) > LARGEST_TEXT:
        raise ValueError(f"it writes {len(rendered[0]):,} characters")
    return str(rendered[0])


def _limit(seconds: int) -> None:
    """At most `seconds` more of processor time, and a bounded address space; nothing where there are no limits."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = int(usage.ru_utime + usage.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed + 1))
    if sys.platform == "linux":  # elsewhere the address space is not a measure of memory
        pages = int(open("/proc/self/statm").read().split()[0])  # noqa: PTH123, SIM115
        size = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


if __name__ == "__main__":
    main()
