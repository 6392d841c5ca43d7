"""CLIP's tokenizer against open_clip's, and the closed vocabulary."""
# ruff: noqa: RUF001 (odd characters are what is tested)

import random
import sys

import pytest
import torch

from evaclip.data import WordTokenizer, clip_tokenizer, get_tokenizer, tokenizer

CAPTIONS = [
    "",
    "   ",
    "a photo of a dog",
    "A Photo  of\ta\nDOG.",
    "it's we'll they're I'M don't 'quoted'",
    "3.14 + 2 = 5,14; $100% #tag @user http://a.b/c?d=e&f=g",
    "café naïve Straße ΣΊΣΥΦΟΣ ÅNGSTRÖM",
    "cafe\u0301 a\u030angstro\u0308m e\u0323\u0301",  # combining accents
    "日本語の写真 한국어 हिन्दी עברית العربية ไทย",
    "🐶 👨\u200d👩\u200d👧 🇫🇷 👍🏽 a dog 🐕",
    "“curly” ‘quotes’ it’s ‛odd‟ dash – — …",
    "ﬁsh aﬀair oﬃce ﬅ Ǆ ĳ ŉ",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３ ｶﾀｶﾅ",
    "bread &amp; butter &lt;3 &quot;hi&quot; &#39;x&#39; &nbsp;&copy 2020",
    "it&rsquo;s &amp;amp; &amp;lt;b&amp;gt; &#8220;x&#8221; 100 &deg;C &notanentity;",
    "<b>it&rsquo;s</b> &amp;ldquo;",
    "it&rsquo;s plain\n<b>it&rsquo;s markup</b>\nit&rsquo;s after",
    "control\x00 \x07bell \x1f\x7f bom\ufeff zero\u200bwidth soft\u00adhyphen \ufffd",
    "line\r\nbreak\u2028separator\u00a0nbsp\u3000wide",
    "\x93smart\x94 it\x92s \x85 bytes",
    "x² ½ № ™ ① Ⅷ",
    "<start_of_text> a <end_of_text> b",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "a long caption that goes on and on; " * 30,
    "🐶" * 60,
]


@pytest.fixture(scope="module")
def theirs():
    open_clip = pytest.importorskip("open_clip")
    return open_clip.get_tokenizer("ViT-B-32")


def test_ids_are_open_clips(theirs):
    ours = clip_tokenizer()(CAPTIONS)
    assert ours.dtype == torch.int64 and ours.shape == (len(CAPTIONS), 77)
    for caption, a, b in zip(CAPTIONS, ours, theirs(CAPTIONS), strict=True):
        assert torch.equal(a, b), caption


@pytest.mark.parametrize("context", [3, 16, 128])
def test_ids_are_open_clips_at_other_lengths(theirs, context):
    assert torch.equal(clip_tokenizer(context)(CAPTIONS), theirs(CAPTIONS, context_length=context))


def test_ids_are_open_clips_for_random_mixtures(theirs):
    draw = random.Random(0)
    pieces = [piece for caption in CAPTIONS[2:18] for piece in caption.split(" ")] + ["\n", "<br/>", "&amp;"]
    pieces.remove("ﬅ")  # its long s behind an apostrophe is a contraction to open_clip alone
    # Foreign letters stay apart: glued at random, ftfy takes some for damaged text.
    glue = [[" ", "  "], ["", " "]]
    texts = ["".join(p + draw.choice(glue[p.isascii()]) for p in draw.choices(pieces, k=12)) for _ in range(1500)]
    ours = clip_tokenizer()(texts)
    for text, a, b in zip(texts, ours, theirs(texts), strict=True):
        assert torch.equal(a, b), repr(text)


def test_every_assigned_character_is_cleaned_as_open_clip_does():
    clean = pytest.importorskip("open_clip.tokenizer")._clean_lower
    codes = [*range(1, 0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x10500)]  # all but ideographs and syllables
    texts = [f"a{chr(c)}b {chr(c)}" for c in codes]
    assert [t for t in texts if tokenizer._clean(t) != clean(t)] == []


def test_text_that_was_damaged_on_its_way_is_mended_as_open_clip_does(theirs):
    damaged = "cafÃ©"
    assert torch.equal(clip_tokenizer()(damaged), clip_tokenizer()("café"))
    assert torch.equal(clip_tokenizer()(damaged), theirs([damaged]))


def test_one_caption_is_a_batch_of_one_and_no_caption_a_batch_of_none():
    encode = clip_tokenizer()
    assert torch.equal(encode("a dog"), encode(["a dog"]))
    assert encode("a dog")[0, :5].tolist() == [49406, 320, 1929, 49407, 0]
    assert encode([]).shape == (0, 77)


def test_a_long_caption_is_cut_and_keeps_its_end():
    ids = clip_tokenizer(8)("a photo of a very large dog in a park")
    assert ids.shape == (1, 8) and ids[0, -1] == 49407 and ids[0].argmax() == 7


def test_words_get_ids_between_start_and_end():
    encode = WordTokenizer(["red", "green", "blue"], context=5)
    assert encode(["red blue", "green", ""]).tolist() == [[1, 2, 4, 5, 0], [1, 3, 5, 0, 0], [1, 5, 0, 0, 0]]
    assert encode.vocabulary_size == 6
    assert encode(["red blue", "green", ""]).argmax(1).tolist() == [3, 2, 1]  # the end token
    assert encode([]).shape == (0, 5)


def test_a_spec_names_a_tokenizer():
    assert get_tokenizer("clip").context == 77
    assert get_tokenizer("words:zero one", 4)("one").tolist() == [[1, 3, 4, 0]]
    with pytest.raises(ValueError, match=r"get_tokenizer\('bert'\): give \"clip\""):
        get_tokenizer("bert")


def test_an_unknown_word_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"'sevven' in the caption 'one sevven'.*nearest is 'seven'"):
        get_tokenizer("words:one seven two", 5)("one sevven")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: WordTokenizer(["a", "b"], 4)("a b a"), "has 3 words, but a context of 4 holds 2"),
        (lambda: WordTokenizer(["a", "a"], 4), "2 words; one or more, all different"),
        (lambda: WordTokenizer([], 4), "0 words"),
        (lambda: WordTokenizer(["a b"], 4), "'a b' is not one word"),
        (lambda: WordTokenizer(["a"], 2), "context is 2"),
        (lambda: clip_tokenizer(2), "context is 2"),
    ],
)
def test_errors_say_what_was_given_and_what_is_allowed(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("encode", [clip_tokenizer(), WordTokenizer(["a"], 3)], ids=["clip", "words"])
def test_a_caption_that_is_no_string_is_an_error(encode):
    with pytest.raises(TypeError, match="a caption is a int"):
        encode([3])


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    tokenizer._byte_pairs.cache_clear()
    monkeypatch.setitem(sys.modules, "instant_clip_tokenizer", None)
    with pytest.raises(ImportError, match="needs instant-clip-tokenizer: pip install"):
        clip_tokenizer()
