"""(docstring, code) pairs mined from the Python standard library that is installed here.

Real text that every machine with Python has: a function or class whose docstring says what it does
is a question and its answer. The question is the first paragraph of the docstring, the answer the
code with all docstrings and comments taken out. Whole top-level modules are held out, so that the
evaluation asks about code by other hands, in other words, on other subjects than training saw.

Leakage is excluded by construction: a module is on one side only, chosen by the hash of its name;
a pair whose docstring or whose code also occurs, after normalisation, on the held-out side is
dropped from training. Near copies that differ in a word remain.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests describe other code, and the rest is applications or not the standard library at all.
EXCLUDED = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages", "__phello__"}
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_HEADERS = ("def ", "async def ", "class ")
_LEAST_WORDS = 4  # shorter docstrings ("Return self.") ask for nothing in particular
_MOST_WORDS = 40  # a longer first paragraph is cut; most have about ten words
_LEAST_LINES = 3  # of code, the header included


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A docstring and the code it describes.

    Attributes:
        module: top-level module or package, such as `"json"`.
        name: where it is defined, such as `"json.decoder.JSONDecoder.decode"`.
        query: first paragraph of the docstring on one line.
        docstring: all of it, normalised, for comparing.
        code: the definition without docstrings and comments.
    """

    module: str
    name: str
    query: str
    docstring: str
    code: str

    @property
    def body(self) -> str:
        """The code below its header: the same work under another name is the same code."""
        lines = self.code.split("\n")
        header = next(i for i, line in enumerate(lines) if line.startswith(_HEADERS))
        return "\n".join(lines[header + 1 :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Pairs to train on and pairs to evaluate on, from different modules."""

    train: tuple[Pair, ...]
    heldout: tuple[Pair, ...]

    def digest(self) -> str:
        """A hash of every text on both sides, to tell two data sets apart."""
        sha = hashlib.sha256()
        for side in (self.train, self.heldout):
            sha.update(b"\0side\0")
            for pair in side:
                sha.update(f"{pair.query}\0{pair.code}\0".encode())
        return sha.hexdigest()


def standard_library() -> Path:
    """The folder of the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def mine(root: Path, *, advance: Callable[[int, int], None] | None = None) -> list[Pair]:
    """All pairs under a folder of Python files, in the order of paths and lines.

    Args:
        root: a folder laid out like the standard library.
        advance: called after every file with the files done and their number.

    Raises:
        ValueError: if the folder holds no Python files (an installation without sources).
    """
    files = sorted(_python_files(root))
    if not files:
        raise ValueError(
            f"no Python files under {root}; give the folder of a standard library with sources"
        )
    pairs: list[Pair] = []
    for done, file in enumerate(files, 1):
        pairs.extend(_pairs_of_file(file, root))
        if advance is not None:
            advance(done, len(files))
    return pairs


def split(pairs: Iterable[Pair], *, fold: int = 0, folds: int = 5) -> Split:
    """Hold out whole modules and drop everything that would leak.

    A module is held out if the sha256 of its name, as a number, leaves the remainder `fold` when
    divided by `folds`: the same modules on every machine, whatever else is installed.

    Args:
        pairs: what `mine` found.
        fold: which part to hold out. Settings were chosen on fold 1, results are reported on 0.
        folds: how many parts there are.

    Raises:
        ValueError: if `fold` is not one of `0 .. folds - 1`, or a side comes out empty.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise ValueError(f"fold is {fold} of {folds}; give at least 2 folds and 0 <= fold < folds")
    sides: dict[bool, list[Pair]] = {True: [], False: []}
    for pair in pairs:
        sides[module_fold(pair.module, folds) == fold].append(pair)
    heldout = list(_distinct(sides[True], seen=set()))
    seen = {key for pair in heldout for key in _keys(pair)}
    train = list(_distinct(sides[False], seen=seen))
    if not train or not heldout:
        raise ValueError(
            f"{len(train)} pairs are left to train on and {len(heldout)} to evaluate on; both must "
            "be positive: mine a larger folder"
        )
    return Split(train=tuple(train), heldout=tuple(heldout))


def module_fold(module: str, folds: int) -> int:
    """The part a module belongs to, from the hash of its name."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()) % folds


def sample(pairs: Iterable[Pair], size: int) -> tuple[Pair, ...]:
    """At most `size` pairs, the same ones on every machine, in their order.

    Those whose name and code hash lowest are taken, so that a smaller sample is part of a larger.
    """
    pairs = tuple(pairs)
    keys = {pair: hashlib.sha256(f"{pair.name}\0{pair.code}".encode()).digest() for pair in pairs}
    kept = set(sorted(pairs, key=keys.__getitem__)[:size])
    return tuple(pair for pair in pairs if pair in kept)


def _python_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        folders = parts[:-1]
        if any(part in EXCLUDED or part.startswith("config-") for part in folders):
            continue
        yield path


def _pairs_of_file(file: Path, root: Path) -> Iterator[Pair]:
    relative = file.relative_to(root).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    if not parts:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of the escapes in this file
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # a template, or source of another Python
        return
    found = [
        (qualified, node, docstring)
        for qualified, node in _definitions(tree, ".".join(parts))
        if (docstring := ast.get_docstring(node))
        and len(_first_paragraph(docstring)) >= _LEAST_WORDS
    ]
    _remove_docstrings(tree)
    for qualified, node, docstring in found:
        code = ast.unparse(node)
        if code.count("\n") + 1 >= _LEAST_LINES:
            yield Pair(
                module=parts[0],
                name=qualified,
                query=" ".join(_first_paragraph(docstring)[:_MOST_WORDS]),
                docstring=_normal(docstring),
                code=code,
            )


def _definitions(
    node: ast.AST, prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _DEFINITIONS):
            qualified = f"{prefix}.{child.name}"
            yield qualified, child
            yield from _definitions(child, qualified)
        else:
            yield from _definitions(child, prefix)


def _remove_docstrings(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        if isinstance(node, _DEFINITIONS) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]


def _first_paragraph(docstring: str) -> list[str]:
    words: list[str] = []
    for line in docstring.strip().splitlines():
        if not line.strip():
            break
        words.extend(line.split())
    return words


def _distinct(pairs: Iterable[Pair], seen: set[tuple[str, str]]) -> Iterator[Pair]:
    for pair in pairs:
        keys = _keys(pair)
        if seen.isdisjoint(keys):
            seen.update(keys)
            yield pair


def _keys(pair: Pair) -> set[tuple[str, str]]:
    return {
        ("query", _normal(pair.query)),
        ("docstring", pair.docstring),
        ("code", _normal(pair.body)),
    }


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
