"""Which sites a spec means."""

import difflib
import re
from collections.abc import Sequence

from moefold.surgery.hosts import Site

SPECS = ("every-other", "last:N", "all")


def choose_sites(sites: Sequence[Site], spec: str | tuple[str, ...]) -> list[Site]:
    """The sites that a spec of `UpcycleConfig.sites` means.

    Raises:
        ValueError: there is no site at all, or the spec means none, or it is not a valid one.
    """
    if not sites:
        raise ValueError("the model has no layer whose MLP could become a mixture of experts")
    if not isinstance(spec, str):
        return [_named(sites, name) for name in spec]
    if spec == "all":
        return list(sites)
    if spec == "every-other":
        if len(sites) < 2:
            raise ValueError(
                f"sites 'every-other' starts at the second layer, and {sites[0].name} is the only "
                f"one; use sites='all'"
            )
        return list(sites[1::2])
    if spec.startswith("last:"):
        return list(sites[-_count(spec, len(sites)) :])
    return _matching(sites, spec)


def _named(sites: Sequence[Site], name: str) -> Site:
    for site in sites:
        if site.name == name:
            return site
    names = [site.name for site in sites]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"no site {name!r}; {hint}There are: {', '.join(names)}")


def _count(spec: str, most: int) -> int:
    number = spec.removeprefix("last:")
    if not number.isdecimal() or not 1 <= int(number) <= most:
        raise ValueError(f"sites {spec!r}: N must be a whole number from 1 to {most}, the layers")
    return int(number)


def _matching(sites: Sequence[Site], spec: str) -> list[Site]:
    found = [site for site in sites if matches(spec, site.name)]
    if found:
        return found
    near = difflib.get_close_matches(spec, SPECS, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"sites '{spec}' matches no site; {hint}Use {', '.join(map(repr, SPECS))} or an expression "
        f"that matches some of: {', '.join(site.name for site in sites)}"
    )


def matches(pattern: str, name: str) -> bool:
    """Whether an expression matches a site's whole name, or all of it after some dot.

    Raises:
        ValueError: it is not a regular expression.
    """
    try:
        return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None
    except re.error as error:
        raise ValueError(f"sites '{pattern}' is not a regular expression ({error})") from error
