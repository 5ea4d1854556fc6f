"""Image-text pairs that need no download: glyphs of real fonts, each with its Unicode name.

Matplotlib ships the DejaVu and STIX font families. Each character of each font becomes a small grey image, and
its Unicode name ("LATIN SMALL LETTER A WITH GRAVE") the text: about 54,000 pairs of about 7,300 characters.

Left out are fonts whose labels would be wrong: Computer Modern puts symbols at the code points of letters, STIX
NonUnicode uses private code points, and LastResort draws one placeholder for a whole block of characters.

Two faces are the test set and are never trained on: DejaVu Serif Italic and STIX General Italic. They come from
the two large designs, and both have upright and bold siblings in the training fonts, so the task is to recognise
characters in an unseen face; each character of theirs also occurs in a training font. Fonts share outlines,
mostly of symbols: test glyphs whose image is, pixel for pixel, also a training image are dropped from the test.
Some different characters look the same (Latin A, Greek Alpha, Cyrillic A), so no model can reach 100 %.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT_PATTERNS = ("DejaVu*.ttf", "STIXGeneral*.ttf", "STIXSiz*.ttf")
"""Font files of which the code points are Unicode."""

TEST_FONTS = ("DejaVuSerif-Italic", "STIXGeneralItalic")
"""Font files, without suffix, that are never trained on."""

_FONT_SCALES = (0.6875, 0.5, 0.34375, 0.21875)
"""Font sizes as fractions of the image; a glyph gets the first at which it fits."""

_BASELINE = 0.75
"""Height of the base line, from the top, as a fraction of the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Glyphs:
    """Images of glyphs with the characters they show."""

    images: Tensor
    """uint8 [num_glyphs, image_size, image_size]; 0 is paper, 255 ink."""
    labels: Tensor
    """int64 [num_glyphs]; index into the names of the corpus."""
    fonts: tuple[str, ...]
    """Font files, without suffix, that the glyphs come from."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class GlyphCorpus:
    """Training and test glyphs, and the names of all characters of both."""

    train: Glyphs
    test: Glyphs
    names: tuple[str, ...]

    @property
    def chance(self) -> float:
        """Top-1 accuracy of guessing: one over the number of names."""
        return 1 / len(self.names)


def render_corpus(image_size: int) -> GlyphCorpus:
    """Render all glyphs of all fonts at `image_size` pixels. The same pairs in the same order each time."""
    if image_size < 8:
        raise ValueError(f"image_size: got {image_size}, wanted at least 8 pixels")
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(path for pattern in FONT_PATTERNS for path in folder.glob(pattern))
    images_by_font = {path.stem: _render_font(path, image_size) for path in paths}
    missing = set(TEST_FONTS) - set(images_by_font)
    if missing:
        raise ValueError(f"fonts missing in {folder}: {sorted(missing)}; reinstall matplotlib")

    codes = sorted({code for images in images_by_font.values() for code in images})
    label_of = {code: label for label, code in enumerate(codes)}
    train = [
        (stem, code, image)
        for stem, images in images_by_font.items()
        if stem not in TEST_FONTS
        for code, image in images.items()
    ]
    train_pictures = {(code, _digest(image)) for _, code, image in train}
    test = [
        (stem, code, image)
        for stem in TEST_FONTS
        for code, image in images_by_font[stem].items()
        if (code, _digest(image)) not in train_pictures
    ]
    return GlyphCorpus(
        train=_stack(train, label_of),
        test=_stack(test, label_of),
        names=tuple(unicodedata.name(chr(code)) for code in codes),
    )


def _render_font(path: Path, image_size: int) -> dict[int, np.ndarray]:
    """Image of each named, non-empty character of one font, by code point."""
    fonts = [
        ImageFont.truetype(str(path), round(scale * image_size), layout_engine=ImageFont.Layout.BASIC)
        for scale in _FONT_SCALES
    ]
    images = {}
    for code in sorted(FT2Font(str(path)).get_charmap()):
        if unicodedata.name(chr(code), ""):
            image = _render_character(chr(code), fonts, image_size)
            if image.any():
                images[code] = image
    return images


def _render_character(character: str, fonts: Sequence[ImageFont.FreeTypeFont], image_size: int) -> np.ndarray:
    """One glyph, centred from left to right and standing on the base line, as large as fits."""
    baseline = round(_BASELINE * image_size)
    for font in fonts:
        left, top, right, bottom = font.getbbox(character, anchor="ls")
        if right - left <= image_size and top >= -baseline and bottom <= image_size - baseline:
            break
    canvas = Image.new("L", (image_size, image_size))
    position = ((image_size - left - right) / 2, baseline)
    ImageDraw.Draw(canvas).text(position, character, fill=255, font=font, anchor="ls")
    return np.asarray(canvas)


def _digest(image: np.ndarray) -> bytes:
    """The same for equal images only."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _stack(glyphs: Sequence[tuple[str, int, np.ndarray]], label_of: dict[int, int]) -> Glyphs:
    return Glyphs(
        images=torch.from_numpy(np.stack([image for _, _, image in glyphs])),
        labels=torch.tensor([label_of[code] for _, code, _ in glyphs]),
        fonts=tuple(dict.fromkeys(stem for stem, _, _ in glyphs)),
    )


class NameTokenizer:
    """Unicode names to word tokens and back.

    A token is a word, digit or hyphen with the space before it, if any: "DOTS-12" is "DOTS", "-", "1", "2". The
    words are those of the names given; a word not among them is spelt by letters, so each name can be encoded.
    The end token has the highest id, as in CLIP, which pools the text there.
    """

    _PIECE = re.compile(r" ?(?:[A-Z]+|[0-9]|-)")
    _ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-"

    pad_id = 0
    bos_id = 1

    def __init__(self, names: Sequence[str]) -> None:
        characters = [space + character for space in ("", " ") for character in self._ALPHABET]
        words = sorted({piece for name in names for piece in self._PIECE.findall(name)} - set(characters))
        self._pieces = ["<pad>", "<bos>", *characters, *words, "<eos>"]
        self._id_of = {piece: index for index, piece in enumerate(self._pieces)}
        self.eos_id = len(self._pieces) - 1
        self.vocab_size = len(self._pieces)

    def encode(self, name: str) -> list[int]:
        """Token ids of one name, with the start and end tokens."""
        pieces = self._PIECE.findall(name)
        if "".join(pieces) != name:
            raise ValueError(f"name: got {name!r}, wanted capital letters, digits, hyphens and single spaces")
        ids = [self.bos_id]
        for piece in pieces:
            spelling = [piece] if piece in self._id_of else re.findall(r" ?.", piece)
            ids.extend(self._id_of[part] for part in spelling)
        return [*ids, self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The name that `encode` made these ids of; padding is ignored."""
        special = (self.pad_id, self.bos_id, self.eos_id)
        return "".join(self._pieces[index] for index in ids if index not in special)

    def encode_all(self, names: Sequence[str]) -> Tensor:
        """Token ids of all names, padded on the right: int64 [num_names, longest, rounded up to 8]."""
        rows = [self.encode(name) for name in names]
        length = -(-max(len(row) for row in rows) // 8) * 8
        return torch.tensor([row + [self.pad_id] * (length - len(row)) for row in rows])


def unique_name_batches(labels: Tensor, batch_size: int, *, seed: int) -> Iterator[Tensor]:
    """Endless batches of glyph indices, [batch_size], no two of the same character.

    With two glyphs of one character in a batch, each would be a wrong answer for the other's name. Each epoch
    visits the characters in a new order (the last, incomplete batch is dropped) and picks one glyph of each, so
    a character weighs the same in however many fonts it is. The seed alone decides the batches.
    """
    by_label = labels.argsort(stable=True)
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    characters = counts.nonzero().squeeze(1)
    if not 1 <= batch_size <= len(characters):
        raise ValueError(
            f"batch_size: got {batch_size}, wanted 1 to {len(characters)}, the number of characters: "
            "a batch holds each character at most once"
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = characters[torch.randperm(len(characters), generator=generator)]
        for chosen in order.split(batch_size)[: len(order) // batch_size]:
            pick = torch.rand(batch_size, generator=generator, dtype=torch.float64) * counts[chosen]
            yield by_label[starts[chosen] + pick.long()]
