"""Births on the command line: which one, its settings, and what is wrong with them."""

import json

import pytest

from moefold import Copies, DropUpcycle, FromFineTunes, Split, VirtualGroups
from moefold.cli.options import Surgery
from moefold.surgery.births import AbstractBirth


@pytest.mark.parametrize(
    ("birth", "settings", "made"),
    [
        ("copies", (), Copies()),
        ("copies", ("copy_noise_std=0.1",), Copies(copy_noise_std=0.1)),
        (
            "drop-upcycle",
            ("fraction=0.25", "indices=per-matrix"),
            DropUpcycle(fraction=0.25, indices="per-matrix"),
        ),
        ("split", ("scale=false", "method = clustered"), Split(scale=False, method="clustered")),
        (
            "virtual-groups",
            ("granularity=4", "scaling=2.5"),
            VirtualGroups(granularity=4, scaling=2.5),
        ),
        ("virtual-groups", ("router-start=zero",), VirtualGroups(router_start="zero")),
        ("fine-tunes", ("models=a, b", "rest=base"), FromFineTunes(models=("a", "b"), rest="base")),
    ],
    ids=str,
)
def test_the_birth_of_the_flags(birth: str, settings: tuple[str, ...], made: AbstractBirth):
    assert Surgery(birth=birth, birth_set=settings).config().birth == made


def test_prompts_come_from_a_file(tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps([["rain", "snow"], [[5, 6]]]))
    given = ("models=a,b", "router=hidden", f"prompts=@{tmp_path / 'prompts.json'}")
    birth = Surgery(birth="fine-tunes", birth_set=given, router_std=0.5).config().birth
    prompts = (("rain", "snow"), ((5, 6),))
    assert birth == FromFineTunes(
        models=("a", "b"), router="hidden", prompts=prompts, router_std=0.5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"birth": "drop"}, "unknown birth 'drop'; "),
        (
            {"birth_set": ("fraction",)},
            "--birth-set 'fraction': write name=value, as in --birth-set",
        ),
        (
            {"birth": "drop-upcycle", "birth_set": ("share=0.5",)},
            r"DropUpcycle has no setting \['share'\]; it has router_std, router_start, fraction",
        ),
        ({"birth": "split", "copy_noise_std": 0.1}, r"Split has no setting \['copy_noise_std'\]"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        Surgery(**settings).config()


def test_a_file_that_is_no_json(tmp_path):
    (tmp_path / "prompts.txt").write_text("rain")
    asked = Surgery(birth="fine-tunes", birth_set=(f"prompts=@{tmp_path / 'prompts.txt'}",))
    with pytest.raises(ValueError, match=r"prompts.txt is no JSON file \("):
        asked.config()
