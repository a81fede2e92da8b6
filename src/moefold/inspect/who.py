"""Who chooses whom, as pieces of a page: loads, typical tokens, co-activation, coloured texts.

A colour never stands alone: each token carries the number of its expert, each bar its share.
"""

from collections.abc import Sequence
from html import escape

from moefold.inspect.choices import Choices, SiteChoices
from moefold.inspect.plots import COLOURS

_LIKE_BERT = "##"  # a word piece that continues the word before it


def who_chooses_whom(choices: Choices, titles: Sequence[str] = ()) -> str:
    """One panel per site, chosen by tabs that work without a script.

    Args:
        choices: what a `Tally` counted.
        titles: what each kept text is, in their order; numbers where there are none.

    Returns:
        HTML for `Page.raw`.
    """
    tabs, rules, panels = [], [], []
    for i, site in enumerate(choices.sites):
        checked = " checked" if i == 0 else ""
        tabs.append(
            f'<input type="radio" name="site" id="site-{i}"{checked}>'
            f'<label for="site-{i}">{escape(short_name(site.site))}</label>'
        )
        rules.append(f"#site-{i}:checked ~ #panel-{i}")
        panels.append(
            f'<section class="panel" id="panel-{i}" aria-label="{escape(site.site)}">'
            f"{_site(site)}{_texts(choices, site, titles)}</section>"
        )
    style = f"<style>{', '.join(rules)} {{ display: block; }}</style>"
    return f'{style}<div class="tabs">{"".join(tabs)}{"".join(panels)}</div>'


def short_name(site: str) -> str:
    """`0.model.encoder.layer.3` as `layer 3`: the last name with a number, if there is one."""
    parts = site.split(".")
    for i in range(len(parts) - 1, 0, -1):
        if parts[i].isdigit() and not parts[i - 1].isdigit():
            return f"{parts[i - 1]} {parts[i]}"
    return site


def _site(site: SiteChoices) -> str:
    """Loads with typical tokens, then co-activation."""
    fair = 1 / len(site.load)
    widest = max(max(site.load), 1.25 * fair)
    lines = "".join(
        f'<div class="expert" style="--hue:{_hue(e)}"><div class="name">expert {e}</div>'
        f'<div class="bar" title="{share:.1%} of the rows">'
        f'<i style="width:{100 * share / widest:.1f}%"></i>'
        f'<span class="fair" style="left:{100 * fair / widest:.1f}%"></span>'
        f'</div><div class="share">{share:.1%}</div>'
        f'<div class="words">{_typical(site, e)}</div></div>'
        for e, share in enumerate(site.load)
    )
    dead = ", ".join(map(str, site.dead)) if site.dead else "none"
    numbers = site.metrics
    return (
        f"<p>{escape(_in_words(numbers))} Experts without any token: {dead}.</p>"
        f'<div class="experts">{lines}</div>'
        f'<p class="note">Bars: share of the rows each expert computes; the dashed line '
        f"is an equal share ({fair:.1%}). Beside them the tokens an expert gets most out of "
        f"proportion (z-score of the log-odds ratio), most typical first.</p>"
        f"{_matrix(site)}"
    )


def _in_words(numbers: dict[str, float]) -> str:
    return (
        f"A token goes to {numbers['experts_per_token']:.2f} experts on average; the busiest "
        f"expert of a batch has {1 + numbers['max_violation']:.2f} times an equal share. The "
        f"router's distribution has {numbers['entropy']:.0%} of the highest possible entropy; "
        f"{numbers['uncovered']:.1%} of the tokens reach no expert, {numbers['dropped']:.1%} of "
        f"what was asked for is dropped."
    )


def _typical(site: SiteChoices, expert: int) -> str:
    words = " ".join(
        f'<span title="z = {z:g}, chosen {count} times">{escape(word)}</span>'
        for word, z, count in site.characteristic[expert]
    )
    return words or "<small>nothing out of proportion</small>"


def _matrix(site: SiteChoices) -> str:
    if site.coactivation is None:
        return "<p>Every token has some of every expert, so there is no co-activation to show.</p>"
    off = [v for i, row in enumerate(site.coactivation) for j, v in enumerate(row) if i != j]
    if not any(off):
        return "<p>No token has two experts, so there is no co-activation to show.</p>"
    head = "".join(f'<th scope="col">{j}</th>' for j in range(len(site.coactivation)))
    rows = "".join(
        f'<tr><th scope="row">expert {i}</th>'
        + "".join(
            '<td class="self">·</td>'
            if i == j
            else f'<td style="--heat:{v / max(off):.2f}">{v:.0%}</td>'
            for j, v in enumerate(row)
        )
        + "</tr>"
        for i, row in enumerate(site.coactivation)
    )
    return (
        f'<h3>Who works together</h3><div class="scroll"><table class="matrix"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="note">Of the tokens of the expert in the row, the share that the expert in the '
        f"column has too.</p>"
    )


def _texts(choices: Choices, site: SiteChoices, titles: Sequence[str]) -> str:
    if not choices.texts:
        return ""
    passages = "".join(
        f'<div class="passage"><small>{escape(titles[i] if i < len(titles) else f"text {i + 1}")}'
        f"</small><p>{_passage(words, choices.chosen[site.site][i])}</p></div>"
        for i, words in enumerate(choices.texts)
    )
    return (
        f'<h3>Token by token</h3><p class="note">Each token in the colour of its heaviest expert, '
        f"whose number it carries; hover for all of them with their weights. Dotted: no expert."
        f"</p>{passages}"
    )


def _passage(words: Sequence[str], chosen: Sequence[Sequence[tuple[int, float]]]) -> str:
    out = []
    for word, experts in zip(words, chosen, strict=True):
        gap = "" if word.startswith(_LIKE_BERT) else " "
        text = escape(word.removeprefix(_LIKE_BERT))
        if not experts:
            out.append(f'{gap}<span class="t none" title="no expert">{text}</span>')
            continue
        all_of_them = ", ".join(f"expert {e}: {weight:.2f}" for e, weight in experts)
        first = experts[0][0]
        out.append(
            f'{gap}<span class="t" style="--hue:{_hue(first)}" title="{all_of_them}">{text}'
            f"<sub>{first}</sub></span>"
        )
    return "".join(out).strip()


def _hue(expert: int) -> str:
    return COLOURS[expert % len(COLOURS)]
