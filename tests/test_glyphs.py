"""The glyph data of the examples: real, plentiful, split by font, with names that can be encoded."""

import sys
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from glyphs import TEST_FONTS, GlyphCorpus, NameTokenizer, render_corpus, unique_name_batches


@pytest.fixture(scope="module")
def corpus() -> GlyphCorpus:
    return render_corpus(16)


def test_corpus_has_tens_of_thousands_of_pairs(corpus: GlyphCorpus) -> None:
    # Bounds leave room for other releases of Matplotlib and for what coarse pixels make equal.
    assert len(corpus.train) > 45_000
    assert len(corpus.test) > 2_500
    assert 6_000 < len(corpus.names) < 10_000
    assert corpus.chance == 1 / len(corpus.names)
    for glyphs in (corpus.train, corpus.test):
        assert glyphs.images.shape == (len(glyphs), 16, 16)
        assert glyphs.images.dtype == torch.uint8


def test_no_image_is_empty(corpus: GlyphCorpus) -> None:
    for glyphs in (corpus.train, corpus.test):
        assert (glyphs.images.amax(dim=(1, 2)) > 0).all()


def test_names_are_distinct_unicode_names(corpus: GlyphCorpus) -> None:
    assert len(set(corpus.names)) == len(corpus.names)
    characters = [unicodedata.lookup(name) for name in corpus.names]
    assert characters == sorted(characters)
    assert {"A", "ß", "Ω", "∑"} <= set(characters)


def test_held_out_fonts_are_not_trained_on(corpus: GlyphCorpus) -> None:
    assert set(corpus.test.fonts) == set(TEST_FONTS)
    assert not set(corpus.train.fonts) & set(TEST_FONTS)
    assert not [font for font in corpus.train.fonts if font.startswith(("LastResort", "cm", "STIXNonUni"))]


def test_held_out_characters_are_trained_on_in_other_pictures(corpus: GlyphCorpus) -> None:
    assert torch.isin(corpus.test.labels, corpus.train.labels).all()
    pictures = [
        {(label, image.numpy().tobytes()) for label, image in zip(g.labels.tolist(), g.images, strict=True)}
        for g in (corpus.train, corpus.test)
    ]
    assert not pictures[0] & pictures[1]


def test_glyph_shows_its_character_upright_on_the_base_line(corpus: GlyphCorpus) -> None:
    """A full stop has its ink below the middle, an apostrophe above it; a vertical line is taller than wide."""
    assert _ink_rows(corpus, "FULL STOP").float().mean() > 8
    assert _ink_rows(corpus, "APOSTROPHE").float().mean() < 8
    assert len(_ink_rows(corpus, "VERTICAL LINE")) > 8


def _ink_rows(corpus: GlyphCorpus, name: str) -> torch.Tensor:
    first = (corpus.train.labels == corpus.names.index(name)).nonzero()[0].item()
    return corpus.train.images[first].amax(dim=1).nonzero().squeeze(1)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(ValueError, match="image_size: got 4"):
        render_corpus(4)


def test_names_round_trip_through_the_tokenizer(corpus: GlyphCorpus) -> None:
    tokenizer = NameTokenizer(corpus.names)
    token_ids = tokenizer.encode_all(corpus.names)
    assert token_ids.shape[1] % 8 == 0
    assert token_ids.max() == tokenizer.eos_id == tokenizer.vocab_size - 1
    assert [tokenizer.decode(row) for row in token_ids.tolist()] == list(corpus.names)
    # One start at the front and one end after the last word, nothing but padding after it.
    assert (token_ids[:, 0] == tokenizer.bos_id).all()
    ends = token_ids == tokenizer.eos_id
    assert (ends.sum(dim=1) == 1).all()
    after_end = ends.cumsum(dim=1).bool() & ~ends
    assert (token_ids[after_end] == tokenizer.pad_id).all()


def test_unknown_words_are_spelt() -> None:
    tokenizer = NameTokenizer(["GREEK SMALL LETTER OMEGA", "DOTS-12"])
    known, unknown = tokenizer.encode("GREEK LETTER OMEGA"), tokenizer.encode("GREEK LETTER ALPHA-3")
    assert len(known) == 2 + 3
    assert len(unknown) == 2 + 2 + len("ALPHA-3")
    assert tokenizer.decode(unknown) == "GREEK LETTER ALPHA-3"
    with pytest.raises(ValueError, match="got 'lower case'"):
        tokenizer.encode("lower case")


def test_batches_have_unique_names_and_follow_from_the_seed(corpus: GlyphCorpus) -> None:
    labels = corpus.train.labels
    batches = [list(islice(unique_name_batches(labels, 256, seed=seed), 40)) for seed in (1, 1, 2)]
    for batch in batches[0]:
        assert batch.shape == (256,)
        assert labels[batch].unique().numel() == 256
    assert torch.equal(torch.stack(batches[0]), torch.stack(batches[1]))
    assert not torch.equal(torch.stack(batches[0]), torch.stack(batches[2]))


def test_an_epoch_visits_each_character_once_and_all_its_glyphs_in_time() -> None:
    labels = torch.tensor([3, 0, 3, 1, 0, 3])
    batches = unique_name_batches(labels, 3, seed=0)
    seen = torch.stack([next(batches) for _ in range(50)])
    assert (labels[seen].sort(dim=1).values == torch.tensor([0, 1, 3])).all()
    assert sorted(seen.unique().tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("batch_size", [0, 4])
def test_impossible_batch_sizes_are_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: got {batch_size}, wanted 1 to 3"):
        next(unique_name_batches(torch.tensor([3, 0, 3, 1]), batch_size, seed=0))
