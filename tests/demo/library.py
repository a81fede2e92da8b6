"""A small folder of Python files that stands for a standard library."""

from pathlib import Path

VERBS = ["count", "sort", "merge", "split", "join", "drop", "find", "read", "wrap", "flip"]
NOUNS = ["rows", "keys", "lines", "words", "pages", "files", "names", "dates", "marks", "units"]


def write_library(root: Path, modules: int = 12, functions: int = 5) -> Path:
    """Write modules `m0`, `m1`, ... of functions whose docstring says what their code does."""
    root.mkdir(parents=True, exist_ok=True)
    for m in range(modules):
        text = []
        for f in range(functions):
            verb, noun = VERBS[(m + f) % 10], NOUNS[(3 * m + f) % 10]
            text.append(
                f"def {verb}_{noun}_{m}({noun}):\n"
                f'    """{verb.title()} all the {noun} of case {m} {f}."""\n'
                f"    {verb} = {noun}.{verb}({m}, {f})\n"
                f"    return {verb}\n"
            )
        (root / f"m{m}.py").write_text("\n\n".join(text))
    return root
