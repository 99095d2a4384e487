"""The program that runs one model's chat template, in a process of its own that `template_process.py` starts and ends.

Lines of JSON: the template comes first, then each request on standard input gets an answer on standard output.

    {"text": template}
    {"values": {...}}   ->   {"rendered": text} | {"refused": why} | {"failed": why} | {"over": what}

The process imports nothing from ropewalk, so that it starts in 50 ms and holds nothing worth stealing; a template sees
jinja2's immutable sandbox and the values of the request.
"""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

SHOWN_CHARACTERS = 500  # of a template's refusal or error
OUTPUT, MEMORY = "output", "memory"


class Refusal(Exception):
    """Raised by `raise_exception` in a template."""


class TooMuchOutput(Exception):
    """More text than is allowed."""


class GenerationBlock(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, which marks the assistant's text for training: passed through."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for: that of transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def main(max_output: int, max_memory: int, max_seconds: float) -> None:
    """Answer requests until standard input ends. Limits: characters of output and CPU seconds for each request, and
    bytes of memory beyond those in use now."""
    _bound_memory(max_memory)
    _send({"ready": True})
    text = json.loads(sys.stdin.buffer.readline() or '{"text": ""}')["text"]
    template = None
    for line in sys.stdin.buffer:
        _bound_cpu_time(max_seconds)
        try:
            template = template or template_environment().from_string(text)  # evaluates constants, so it can hang
            answer = {"rendered": _rendered(template, json.loads(line)["values"], max_output)}
        except Refusal as error:
            answer = {"refused": _shown(error)}
        except TooMuchOutput:
            answer = {"over": OUTPUT}
        except MemoryError:
            answer = {"over": MEMORY}
        except Exception as error:  # a template is a program: it can fail in any way
            answer = {"failed": f"{type(error).__name__}: {_shown(error)}"}
        _send(answer)


def _rendered(template: jinja2.Template, values: dict[str, Any], max_output: int) -> str:
    pieces, size = [], 0
    for piece in template.generate(**values):
        size += len(piece)
        if size > max_output:
            raise TooMuchOutput
        pieces.append(piece)
    return "".join(pieces)


def _bound_memory(max_memory: int) -> None:
    """On Linux only: other systems do not enforce a limit on memory, so there the limit on time has to do."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        return
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = taken + max_memory if most == resource.RLIM_INFINITY else min(taken + max_memory, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _bound_cpu_time(max_seconds: float) -> None:
    """The parent kills this process when it takes too long; this is for when the parent itself has gone."""
    try:
        import resource
    except ImportError:
        return
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    limit = math.ceil(time.process_time() + max_seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))


def _send(answer: dict[str, Any]) -> None:
    """Write one line of UTF-8, including unpaired surrogates, which messages may contain."""
    line = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def _shown(error: Exception) -> str:
    """The message of an error. It may be long, and making it may fail (a number with too many digits)."""
    try:
        return str(error)[:SHOWN_CHARACTERS]
    except Exception:
        return "without a message"


def _raise_exception(message: str) -> None:
    raise Refusal(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which templates do not want."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
