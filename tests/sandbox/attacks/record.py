"""The record of one program of the suite, and the pieces its sources share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

REFUSED = ("ok: refused *", "violation*")
"""The system refused, or ended the program for the attempt."""
ENDED = ("incomplete*", "crash*", "violation*", "killed*")
"""It ended before it had answered."""
UNPAID = ("ok*", "load_error*", "protocol*", "output_limit*", "timeout*", *ENDED)
"""Any end that is the program's own doing: all that matters is that it earns nothing and does no harm."""
Mode = Literal["calls", "stdio", "beside", "sets", "oracle"]
"""calls: `f` is called and the judge compares the replies. stdio: it reads and prints. beside: the tests are a program
in a second sandbox, which loops over `f`. sets: the judge walks the replies (`set`, `sorted`, `sum`). oracle: the
judge compares replies as sets with what a reference gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One program, run with hidden tests that it cannot know (or, if honest, with `f(x) == x * x + 7`).

    Its end is written as one line, `outcome: first reply`, such as `ok: refused EPERM`, `ok: raised OSError` or
    `incomplete`, and must match one of the patterns in `expect` (as in fnmatch).
    """

    name: str
    source: str
    """Defines `f`, or reads stdin. Where it names HOST, a dict of that name with the canaries is put before it."""
    expect: tuple[str, ...]
    tiers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The expected ends in a tier where they differ."""
    mode: Mode = "calls"
    works: tuple[str, ...] = ()
    """Its end where programs are not contained (tier `process`): proof that the attempt is a real one."""
    forges: bool = False
    """It passes a grader that runs the tests in the program's own process: proof as well."""
    is_right: bool = False
    """It computes what it should, and passes."""
    is_for_root: bool = False
    """True: uncontained it could harm the user that runs the tests, so only root tries it there."""
    is_compat: bool = False
    """It may start processes: such a program runs where they are contained, in tier `namespaces`."""
    then: str = ""
    """A program run next on the same worker; `f(1)` must give `clean`."""
    limits: Mapping[str, float] = field(default_factory=dict)


PROBE = """
import errno, os
def attempt(action):
    try:
        result = action()
    except OSError as error:
        return f"refused {errno.errorcode.get(error.errno, error.errno)}"
    except BaseException as error:
        return f"refused {type(error).__name__}"
    return f"WORKED {result!r}"[:2000]
"""


def probe(action: str, before: str = "") -> str:
    """The source of a program that tries one expression and reports the result."""
    return f"{PROBE}{before}\ndef f(x): return attempt(lambda: {action})\n"


def steps(body: str, before: str = "") -> str:
    """The source of a program that tries statements, which may return something, and reports the result."""
    lines = "\n".join(f"    {line}" for line in body.strip("\n").split("\n"))
    return f"{PROBE}{before}\ndef body():\n{lines}\ndef f(x): return attempt(body)\n"
