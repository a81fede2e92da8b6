"""The registry: every message, laziness, and plug-ins through entry points."""

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

import moefold.registry
from moefold.registry import Registry


class Animal:
    """What the test registry holds: instances and subclasses of this."""


class Cat(Animal):
    pass


class Brick:
    pass


@pytest.fixture
def animals() -> Registry:
    return Registry("animal", Animal)


def plug_in(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Make the entry-point group ``moefold.animal`` contain exactly `points`."""
    found = EntryPoints(EntryPoint(name, value, "moefold.animal") for name, value in points.items())
    monkeypatch.setattr(
        moefold.registry, "entry_points", lambda *, group: found.select(group=group)
    )


def test_a_class_an_instance_and_a_decorated_class_come_back_as_themselves(animals):
    rex = Animal()
    assert animals.register("cat", Cat, summary="purrs") is Cat
    animals.register("rex", rex, summary="barks")

    @animals.register("tiger", summary="a larger cat")
    class Tiger(Cat):
        pass

    assert animals.get("cat") is Cat
    assert animals.get("rex") is rex
    assert animals.get("tiger") is Tiger


def test_names_and_summaries_keep_the_order_of_registration(animals):
    animals.register("zebra", Animal, summary="striped")
    animals.register("ant", Animal, summary="small")
    assert animals.names() == ("zebra", "ant")
    assert list(animals.describe().items()) == [("zebra", "striped"), ("ant", "small")]


def test_a_string_is_imported_once_and_only_when_asked_for(animals, tmp_path, monkeypatch):
    (tmp_path / "lazy_zoo.py").write_text(
        "from tests.test_registry import Animal\nclass Okapi(Animal): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    # The base must be the very class that the imported module will see.
    registry = Registry("animal", __import__("tests.test_registry", fromlist=["Animal"]).Animal)
    registry.register("okapi", "lazy_zoo:Okapi", summary="shy")
    assert registry.names() == ("okapi",)
    assert registry.describe() == {"okapi": "shy"}
    assert "lazy_zoo" not in sys.modules

    okapi = registry.get("okapi")
    monkeypatch.delitem(sys.modules, "lazy_zoo")  # a second import would make a second class
    assert okapi.__name__ == "Okapi"
    assert registry.get("okapi") is okapi


def test_an_unknown_name_gets_the_nearest_and_all(animals):
    animals.register("token-choice", Animal, summary="")
    animals.register("expert-choice", Animal, summary="")
    with pytest.raises(
        ValueError,
        match=r"^unknown animal 'tokn-choice'; did you mean 'token-choice'\? "
        r"Registered: expert-choice, token-choice$",
    ):
        animals.get("tokn-choice")
    with pytest.raises(
        ValueError, match=r"^unknown animal 'qqq'; Registered: expert-choice, token-choice$"
    ):
        animals.get("qqq")


def test_an_empty_registry_says_so(animals):
    with pytest.raises(ValueError, match=r"^unknown animal 'cat'; Registered: none yet$"):
        animals.get("cat")


def test_a_name_is_given_once(animals):
    animals.register("cat", Cat, summary="purrs")
    with pytest.raises(
        ValueError,
        match=r"animal 'cat' is already registered as .*Cat.* \(purrs\); .* another name than cat$",
    ):
        animals.register("cat", Animal, summary="other")
    assert animals.get("cat") is Cat


@pytest.mark.parametrize("target", [Brick, Brick(), 3], ids=["class", "instance", "number"])
def test_a_member_has_the_type_of_its_registry(animals, target):
    with pytest.raises(
        ValueError,
        match=rf"animal 'brick' is .* of type {type(target).__name__}; "
        r"it must be an instance or a subclass of Animal",
    ):
        animals.register("brick", target, summary="")
    assert animals.names() == ()


def test_the_type_of_a_lazy_member_is_checked_when_it_arrives(animals):
    animals.register("pi", "math:pi", summary="")
    with pytest.raises(ValueError, match=r"animal 'pi' is 3\.14\d* of type float; it must be"):
        animals.get("pi")


def test_without_a_base_anything_may_be_a_member():
    anything: Registry = Registry("thing")
    anything.register("pi", "math:pi", summary="")
    assert anything.get("pi") == pytest.approx(3.14159265358979)  # any other attribute is not pi


@pytest.mark.parametrize("target", ["math", "math:", ":pi", ""])
def test_a_string_that_is_no_address_is_refused(animals, target):
    with pytest.raises(
        ValueError, match=rf"animal 'pi' has target {target!r}; write it as 'module:attribute'"
    ):
        animals.register("pi", target, summary="")


def test_a_lazy_member_that_is_not_there_names_the_registration(animals):
    animals.register("tau", "math:taau", summary="")
    with pytest.raises(
        ValueError,
        match=r"animal 'tau' is registered as 'math:taau', but module 'math' has no 'taau'",
    ):
        animals.get("tau")


def test_a_missing_library_says_who_needed_it(animals):
    animals.register("yeti", "no_such_library.zoo:Yeti", summary="")
    with pytest.raises(ModuleNotFoundError, match="no_such_library") as caught:
        animals.get("yeti")
    assert caught.value.__notes__ == ["needed by animal 'yeti' (no_such_library.zoo:Yeti)"]


def test_a_frozen_registry_refuses(animals):
    animals.register("cat", Cat, summary="purrs")
    animals.freeze()
    with pytest.raises(
        ValueError,
        match=r"cannot register animal 'dog': the registry is frozen; .*group 'moefold\.animal'",
    ):
        animals.register("dog", Animal, summary="barks")
    assert animals.names() == ("cat",)
    assert animals.get("cat") is Cat


def test_a_plug_in_is_a_member_that_nobody_imported(monkeypatch):
    plug_in(monkeypatch, fraction="fractions:Fraction")
    numbers: Registry = Registry("animal")
    numbers.register("pi", "math:pi", summary="round")
    assert numbers.names() == ("pi", "fraction")
    assert numbers.describe()["fraction"] == "added by a package"
    assert numbers.get("fraction").__name__ == "Fraction"


def test_a_plug_in_is_found_by_get_alone(monkeypatch):
    plug_in(monkeypatch, fraction="fractions:Fraction")
    assert Registry("animal").get("fraction").__name__ == "Fraction"


def test_a_plug_in_may_not_take_the_name_of_another_member(monkeypatch):
    plug_in(monkeypatch, pi="cmath:pi")
    numbers: Registry = Registry("animal")
    numbers.register("pi", "math:pi", summary="round")
    with pytest.raises(
        ValueError, match=r"animal 'pi' is already registered as 'math:pi' \(round\)"
    ):
        numbers.names()


def test_a_known_name_needs_no_search_for_plug_ins(monkeypatch, animals):
    def search(*, group: str) -> EntryPoints:
        raise AssertionError(f"searched {group}")

    monkeypatch.setattr(moefold.registry, "entry_points", search)
    animals.register("cat", Cat, summary="purrs")
    assert animals.get("cat") is Cat  # a search here would be traced by torch.compile
    with pytest.raises(AssertionError, match=r"searched moefold\.animal"):
        animals.names()
