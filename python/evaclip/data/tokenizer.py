"""From captions to token ids: CLIP's byte-pair vocabulary, or a closed list of whole words."""

import html
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache

import torch
from torch import Tensor

from evaclip.data.common import extra


class ClipTokenizer:
    """CLIP's byte-pair encoding: start, the caption's tokens, end, and zeros up to `context`.

    The ids are open_clip's: text mended by ftfy, HTML entities resolved twice, white space collapsed, lower case; a
    caption that is too long is cut and keeps the end token. Characters newer than a package's Unicode tables may be
    split differently.

    Source: Radford et al., arXiv 2103.00020; the vocabulary comes with instant-clip-tokenizer.
    """

    start, end, vocabulary_size = 49406, 49407, 49408

    def __init__(self, context: int = 77):
        if context < 3:
            raise ValueError(f"ClipTokenizer: context is {context}; start, one token and end need at least 3")
        self.context = context

    def __call__(self, captions: str | list[str]) -> Tensor:
        """Token ids (n, context) int64 of one caption or several."""
        captions = _several("ClipTokenizer", captions)
        if not captions:
            return torch.zeros(0, self.context, dtype=torch.long)
        ids = _byte_pairs().tokenize_batch([_clean(c) for c in captions], context_length=self.context)
        return torch.from_numpy(ids.astype("int64"))


class WordTokenizer:
    """Whole words of a small closed vocabulary: 0 pads, 1 starts, then the words, and the last id ends.

    The end token has the greatest id, so that an argmax over the ids finds it, as in CLIP.

    Args:
        words: the vocabulary, in the order of its ids from 2.
        context: ids per caption, start and end included.

    Raises:
        ValueError: no words, a word twice, a word with white space in it, or a context below 3.
    """

    start = 1

    def __init__(self, words: Iterable[str], context: int):
        self.words, self.context = tuple(words), context
        self._ids = {word: i for i, word in enumerate(self.words, start=2)}
        for word in self.words:
            if word.split() != [word]:
                raise ValueError(f"WordTokenizer: {word!r} is not one word; split the vocabulary at white space")
        if len(self._ids) != len(self.words) or not self.words:
            raise ValueError(f"WordTokenizer: {len(self.words)} words; one or more, all different, are needed")
        if context < 3:
            raise ValueError(f"WordTokenizer: context is {context}; start, one word and end need at least 3")
        self.end = len(self.words) + 2
        self.vocabulary_size = self.end + 1

    def __call__(self, captions: str | list[str]) -> Tensor:
        """Token ids (n, context) int64 of one caption or several.

        Raises:
            ValueError: a word is not in the vocabulary (it and the nearest one are named), or there are too many.
        """
        captions = _several("WordTokenizer", captions)
        rows = []
        for caption in captions:
            try:
                ids = [self._ids[word] for word in caption.split()]
            except KeyError as error:
                word = error.args[0]
                nearest = get_close_matches(word, self.words, n=1, cutoff=0)[0]
                raise ValueError(
                    f"WordTokenizer: {word!r} in the caption {caption!r} is not in the vocabulary of "
                    f"{len(self.words)} words; the nearest is {nearest!r}"
                ) from None
            if len(ids) > self.context - 2:
                raise ValueError(
                    f"WordTokenizer: the caption {caption!r} has {len(ids)} words, but a context of {self.context} "
                    f"holds {self.context - 2} between start and end"
                )
            rows.append([self.start, *ids, self.end] + [0] * (self.context - 2 - len(ids)))
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self.context)


def clip_tokenizer(context: int = 77) -> ClipTokenizer:
    """CLIP's tokenizer: a callable from captions to ids (n, context); see `ClipTokenizer`.

    Raises:
        ImportError: instant-clip-tokenizer is not installed.
    """
    _byte_pairs()
    return ClipTokenizer(context)


def get_tokenizer(spec: str, context: int = 77) -> ClipTokenizer | WordTokenizer:
    """The tokenizer a recipe or a checkpoint names: "clip", or "words:" and the words, separated by spaces.

    Raises:
        ValueError: the name is neither.
    """
    if spec == "clip":
        return clip_tokenizer(context)
    if spec.startswith("words:"):
        return WordTokenizer(spec.removeprefix("words:").split(), context)
    raise ValueError(f'get_tokenizer({spec!r}): give "clip", or "words:" and the words, separated by spaces')


@cache
def _byte_pairs():
    return extra("instant_clip_tokenizer", "instant-clip-tokenizer", "CLIP's tokenizer").Tokenizer()


def _several(tokenizer: str, captions: str | list[str]) -> list[str]:
    captions = [captions] if isinstance(captions, str) else list(captions)
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"{tokenizer}: a caption is a {type(caption).__name__}; give strings")
    return captions


def _clean(text: str) -> str:
    if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy leaves the rest as it is, slowly
        text = extra("ftfy", "ftfy", "CLIP's tokenizer").fix_text(text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()
