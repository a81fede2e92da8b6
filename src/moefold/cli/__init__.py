"""The command line: `moefold VERB ...`, one module for each verb.

A verb is named by a string and imported when it is called, so that `moefold --help` is quick and a
missing library disables only the verbs that need it. It is a function of the arguments after the
verb that returns an exit status, or None for 0.
"""

import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

VERBS = {
    "bench": ("moefold.cli.bench:main", "time layers and models beside dense ones and peers"),
    "demo": ("moefold.cli.demo:main", "upcycle a real encoder, train it beside its dense twin"),
    "doctor": ("moefold.cli.doctor:main", "what this machine has, and which backends can run"),
    "evaluate": ("moefold.cli.evaluate:main", "what a model is worth as an encoder of texts: mteb"),
    "export": ("moefold.cli.export:main", "write a saved mixture in a form that needs no moefold"),
    "load": ("moefold.cli.load:main", "check a saved mixture and say what it is"),
    "list": ("moefold.cli.listing:main", "routers, backends, hosts, births, losses, one line each"),
    "save": ("moefold.cli.save:main", "make a trainer's checkpoint of a mixture a saved folder"),
    "plan": ("moefold.cli.plan:main", "what surgery would do to a model; nothing is touched"),
    "prefer": ("moefold.cli.prefer:main", "learn to choose as an expert does, from its choices"),
    "reroute": ("moefold.cli.reroute:main", "put another router into a pretrained mixture"),
    "revert": ("moefold.cli.revert:main", "turn a saved mixture back into a dense model"),
    "upcycle": ("moefold.cli.upcycle:main", "turn a dense model into a mixture and save it"),
}
"""Name of every verb, where it is, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        arguments: what stands after `moefold`; `sys.argv` if None.

    Returns:
        Exit status: 0, 2 for bad input or a system that refuses (the reason is on standard error),
        130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] == "--version":
        print(f"moefold {version('moefold')}")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return _fail("", f"unknown verb {verb!r}; {hint}There are: {', '.join(VERBS)}")
    module, _, function = VERBS[verb][0].partition(":")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(
                f"moefold {verb}: {message}", file=sys.stderr
            )
            status = getattr(import_module(module), function)(rest) or 0
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # what it was piped into, `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
        return 0
    except ImportError as error:
        return _fail(verb, f"{error}; install what this verb needs: pip install 'moefold[demo]'")
    except ValueError as error:
        return _fail(verb, str(error))
    except OSError as error:
        what = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        return _fail(verb, what or str(error).partition("\n")[0] or type(error).__name__)
    except KeyboardInterrupt:
        _fail(verb, "interrupted")
        return 130


def _help() -> str:
    lines = [f"  {name:<9} {summary}" for name, (_, summary) in VERBS.items()]
    return "\n".join(
        [
            "usage: moefold VERB ...",
            "",
            "Turn a dense model into a mixture of experts, train it, look inside it.",
            "",
            *lines,
            "",
            "  moefold VERB --help   the settings of a verb, with an example",
            "  moefold --version",
            "",
            "example:",
            "  $ moefold plan minilm",
        ]
    )


def _fail(verb: str, reason: str) -> int:
    who = f"moefold {verb}".strip()
    print(f"{who}: {reason}", file=sys.stderr)
    return 2
