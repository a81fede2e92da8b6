"""Books to read, books to be judged on, and the tokens they are made of.

Held-out books are by authors of whom no book is read. Every training book gives its first part, so
that all authors are in; each held-out book gives as many sequences, evenly spread over it.

    train     [sequences, length]          all training books, one after the other
    heldout   {book: [sequences, length]}
"""

import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt16
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from studies.files import digest, write_json
from studies.language_model.settings import Settings

TRAIN, HELDOUT = "books_train_60.txt.xz", "books_heldout.txt.xz"
END = "<|endoftext|>"
"""Between two books; token 0, and padding where something pads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Book:
    """A book without its head."""

    title: str
    author: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Data:
    """What a model is trained and judged on.

    Attributes:
        train: sequences in the order of the books.
        heldout: sequences by title.
        tokenizer: path of its file.
    """

    train: UInt16[np.ndarray, "sequences length"]
    heldout: dict[str, UInt16[np.ndarray, "chunks length"]]
    tokenizer: Path

    def order(self, seed: int) -> UInt16[np.ndarray, "sequences length"]:
        """The training sequences as a seed shuffles them, whatever the router."""
        return self.train[np.random.default_rng(seed).permutation(len(self.train))]


def read_books(path: Path) -> list[Book]:
    """The books of a file, in which each begins with title, author, year and a rule."""
    with lzma.open(path, "rt", encoding="utf-8", newline=None) as file:
        whole = file.read()
    books = []
    for part in ("\n" + whole).split("\n# Title: ")[1:]:
        head, _, text = part.partition("\n-------")
        author = next(line for line in head.splitlines() if line.startswith("## Author: "))
        books.append(
            Book(
                title=head.splitlines()[0].strip(),
                author=author.removeprefix("## Author: ").strip(),
                text=text.lstrip("-").strip(),
            )
        )
    return books


def prepare(source: Path, folder: Path, settings: Settings) -> Data:
    """The data of a study, made once and kept in its folder.

    Raises:
        ValueError: the texts are not there.
    """
    missing = [name for name in (TRAIN, HELDOUT) if not (source / name).exists()]
    if missing:
        raise ValueError(f"{source} has no {' and no '.join(missing)}; give --data its folder")
    done = folder / "data.json"
    tokenizer, train, heldout = (
        folder / name for name in ("tokenizer.json", "train.npy", "heldout.npz")
    )
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        read, kept = read_books(source / TRAIN), read_books(source / HELDOUT)
        texts = [book.text[: int(len(book.text) * settings.share)] for book in read]
        bpe = train_tokenizer(texts, settings.vocabulary)
        sequences = cut(bpe, texts, settings.length)
        chunks = {
            book.title: spread(cut(bpe, [book.text], settings.length), settings.chunks_per_book)
            for book in kept
        }
        bpe.save(str(tokenizer))
        np.save(train, sequences)
        np.savez(heldout, **chunks)  # pyright: ignore[reportArgumentType]
        write_json(done, _describe(read, kept, texts, sequences, chunks, bpe))
    with np.load(heldout) as arrays:
        return Data(train=np.load(train), heldout=dict(arrays), tokenizer=tokenizer)


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE: no text is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def cut(
    tokenizer: Tokenizer, texts: list[str], length: int
) -> UInt16[np.ndarray, "sequences length"]:
    """Sequences of a length; texts follow each other with a mark between, the rest is dropped."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [0, *encoding.ids]
    whole = len(ids) // length * length
    return np.array(ids[:whole], dtype=np.uint16).reshape(-1, length)


def spread(
    sequences: UInt16[np.ndarray, "sequences length"], count: int
) -> UInt16[np.ndarray, "chunks length"]:
    """So many of the sequences, evenly spread; all where there are fewer."""
    count = min(count, len(sequences))
    return sequences[np.linspace(0, len(sequences) - 1, count).round().astype(int)]


def _describe(
    read: list[Book],
    kept: list[Book],
    texts: list[str],
    sequences: np.ndarray,
    chunks: dict[str, np.ndarray],
    tokenizer: Tokenizer,
) -> dict[str, object]:
    both = {book.author for book in read} & {book.author for book in kept}
    tokens = [row.tolist() for rows in chunks.values() for row in rows]
    size = sum(len(text.encode()) for text in tokenizer.decode_batch(tokens))
    return {
        "training_books": len(read),
        "training_characters": sum(map(len, texts)),
        "training_tokens": int(sequences.size),
        "heldout_books": {title: len(rows) for title, rows in chunks.items()},
        "heldout_tokens": sum(rows.size for rows in chunks.values()),
        "heldout_bytes_per_token": size / sum(map(len, tokens)),
        "authors_in_both": sorted(both),
        "tokenizer": digest(tokenizer.to_str()),
    }
