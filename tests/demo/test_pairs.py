"""Mining pairs: what is taken, what is left out, and that nothing leaks."""

import dataclasses
from pathlib import Path

import pytest

from moefold.demo.pairs import (
    Pair,
    mine,
    module_fold,
    sample,
    split,
    standard_library,
)
from tests.demo.library import write_library

SOURCE = '''
# a comment
def plain(x):
    """Say what it does in words.

    More that is not asked for.
    """
    # why
    x = x + 1
    return x, x

class Thing:
    """A thing that holds many
    other things."""

    def method(self):
        """Return all the things it holds."""
        inner = 2
        return inner

    async def short(self):
        """Too short."""
        await self
        return 1

def only_docstring():
    """This has nothing below it at all."""

def bare(x):
    y = x
    return y
'''


def mined(tmp_path: Path, source: str, name: str = "mod.py") -> dict[str, Pair]:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    return {pair.name: pair for pair in mine(tmp_path)}


def test_what_is_taken(tmp_path):
    pairs = mined(tmp_path, SOURCE)
    # Left out: three words, no code, no docstring.
    assert list(pairs) == ["mod.plain", "mod.Thing", "mod.Thing.method"]
    plain = pairs["mod.plain"]
    assert plain.module == "mod"
    assert plain.query == "Say what it does in words."
    assert plain.code == "def plain(x):\n    x = x + 1\n    return (x, x)"
    assert pairs["mod.Thing"].query == "A thing that holds many other things."


def test_no_docstring_is_left_in_any_code(tmp_path):
    for pair in mined(tmp_path, SOURCE).values():
        assert '"""' not in pair.code
        assert "Return all" not in pair.code
        assert "#" not in pair.code


def test_what_is_not_the_library_is_left_out(tmp_path):
    wanted = {"json/decoder.py": "json.decoder.plain", "os.py": "os.plain"}
    unwanted = ["test/a.py", "json/tests/b.py", "idlelib/c.py", "site-packages/d/e.py"]
    for name in [*wanted, *unwanted, "config-3.11-x86/f.py"]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SOURCE)
    (tmp_path / "broken.py").write_text("def (:\n")
    names = {pair.name for pair in mine(tmp_path) if pair.name.endswith("plain")}
    assert names == set(wanted.values())
    assert {pair.module for pair in mine(tmp_path)} == {"json", "os"}


def test_a_package_is_named_by_its_folder(tmp_path):
    assert "pack.plain" in mined(tmp_path, SOURCE, "pack/__init__.py")


def pair(module: str, query: str, code: str) -> Pair:
    return Pair(module=module, name=f"{module}.f", query=query, docstring=query.lower(), code=code)


@pytest.fixture
def names() -> tuple[str, str]:
    """A module that fold 0 of 5 holds out, and one that it does not."""
    every = [f"m{i}" for i in range(40)]
    out = next(name for name in every if module_fold(name, 5) == 0)
    return out, next(name for name in every if module_fold(name, 5) != 0)


def test_nothing_leaks(names):
    out, kept = names
    held = pair(out, "Add two to it.", "def f(x):\n    y = x + 2\n    return y")
    clean = pair(kept, "Take two from it.", "def g(x):\n    y = x - 2\n    return y")
    same_words = dataclasses.replace(clean, query="add  TWO to it.")
    same_docstring = dataclasses.replace(clean, query="Other.", docstring=held.docstring)
    # Another name, a decorator and another layout are the same code.
    same_code = pair(
        kept, "Quite another text.", "@deco\ndef other(x):\n    y = x + 2\n    return  y"
    )
    found = split([same_words, same_docstring, same_code, clean, held])
    assert found.train == (clean,)
    assert found.heldout == (held,)


def test_within_a_side_the_first_of_equals_stays(names):
    out, kept = names
    one = pair(kept, "Take two from it.", "def g(x):\n    y = x - 2\n    return y")
    two = dataclasses.replace(one, query="Another text of it.", docstring="another")
    held = pair(out, "Add two to it.", "def f(x):\n    y = x + 2\n    return y")
    assert split([one, two, held]).train == (one,)


def test_a_module_is_on_one_side_only(tmp_path):
    pairs = mine(write_library(tmp_path))
    heldout_everywhere = set()
    for fold in range(5):
        try:
            found = split(pairs, fold=fold)
        except ValueError:  # twelve modules may leave a fold empty
            continue
        train, heldout = ({p.module for p in side} for side in (found.train, found.heldout))
        assert train.isdisjoint(heldout)
        assert heldout_everywhere.isdisjoint(heldout)
        heldout_everywhere |= heldout
    assert heldout_everywhere == {p.module for p in pairs}


def test_the_hash_of_a_name_is_a_promise():
    # sha256("json") = 0a5c...: the residue by hand, so that no version of Python moves a module.
    import hashlib

    number = int(hashlib.sha256(b"json").hexdigest(), 16)
    assert module_fold("json", 5) == number % 5


def test_a_sample_is_part_of_a_larger_one(tmp_path):
    pairs = mine(write_library(tmp_path))
    small, large = sample(pairs, 10), sample(pairs, 30)
    assert len(small) == 10
    assert set(small) < set(large)
    assert list(large) == [p for p in pairs if p in set(large)]
    assert sample(reversed(pairs), 10) == tuple(reversed(small))


def test_the_digest_tells_data_apart(tmp_path):
    found = split(mine(write_library(tmp_path)))
    swapped = dataclasses.replace(found, train=found.heldout, heldout=found.train)
    fewer = dataclasses.replace(found, train=found.train[1:])
    assert len({part.digest() for part in (found, swapped, fewer)}) == 3


def test_the_real_library_has_enough():
    # One package of it; the whole takes seconds.
    pairs = [p for p in mine(standard_library() / "email") if p.query]
    assert len(pairs) > 50
    for found in pairs:
        assert len(found.query.split()) >= 4
        assert found.body


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no Python files under .*; give the folder"):
        mine(tmp_path)
    pairs = mine(write_library(tmp_path))
    with pytest.raises(ValueError, match="fold is 5 of 5"):
        split(pairs, fold=5)
    with pytest.raises(ValueError, match="0 pairs are left to train on and 0 to evaluate on"):
        split([])
