"""Text to token ids in which no control token occurs: "</s>" in a text is four characters, whatever the tokenizer.

Libraries do half of it. `split_special_tokens` of transformers keeps special tokens from being cut out of a text first,
but the model behind it still knows them: a Unigram, WordLevel or WordPiece vocabulary holds "</s>" as a piece like any
other. So the fast tokenizers get a twin in which every control token has a name that no text contains; the ids stay.
The twin gives what sentencepiece gives, where control pieces are never matched. Tokenizers written in Python have no
such twin: there a text in which a control token was found is cut inside its name.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return {id: name} of the tokens that a program inserts and no text contains; the unknown token is one."""
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    return added | {token_id: str(token) for token_id, token in named if token_id is not None and str(token)}


def reads_names(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a tokenizer by itself, without `TextEncoder`, gives a control token for the name of one."""
    control = control_tokens(tokenizer)
    found = _ids(tokenizer, [f"a {name} a" for name in control.values()])  # some strip the spaces of a text
    return any(token_id in ids for token_id, ids in zip(control, found, strict=True))


def separates_at_unknown(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a character that is not in the vocabulary gives the token that separates documents."""
    private_use = "\U000f1234"  # in no vocabulary but those of bytes
    return tokenizer.unk_token_id == tokenizer.eos_token_id in _ids(tokenizer, [f"a {private_use}"])[0]


class TextEncoder:
    """Encode texts with a tokenizer: no special tokens added, none read out of a text.

    The unknown token alone may come out of a text, where a character is not in the vocabulary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._control, self._name = control_tokens(tokenizer), tokenizer.name_or_path
        self._unknown = tokenizer.unk_token_id
        # An unknown token that also separates documents would end one at every unknown character.
        self._forbidden = set(self._control)
        if self._unknown not in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            self._forbidden.discard(self._unknown)
        self._tokenizer = copy.copy(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if twin := None if backend is None else _without_control_tokens(backend, self._control):
            self._tokenizer._tokenizer = twin
        names = "|".join(re.escape(name) for name in sorted(self._control.values(), key=len, reverse=True))
        self._names = None if twin or not names else re.compile(names)  # the twin does not know them

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text. ValueError, quoting it, for a text that still gives a control token."""
        found = self._ids(texts)
        for number, (text, ids) in enumerate(zip(texts, found, strict=True)):
            if self._names is not None and self._names.search(text) and not set(self._control).isdisjoint(ids):
                found[number] = ids = self._in_parts(text, self._names)
            if not self._forbidden.isdisjoint(ids):
                raise ValueError(self._problem(text, next(token for token in ids if token in self._forbidden)))
        return found

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return _ids(self._tokenizer, texts)

    def _in_parts(self, text: str, names: re.Pattern[str]) -> list[int]:
        """Return the token ids of a text, cut behind the first character of each name in it: no part holds a name."""
        cuts = [0, *(match.start() + 1 for match in names.finditer(text)), len(text)]
        parts = [text[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False) if start < stop]
        return [token for ids in self._ids(parts) for token in ids]

    def _problem(self, text: str, token_id: int) -> str:
        quoted = repr(text if len(text) <= 80 else f"{text[:80]}…")
        if token_id == self._unknown:
            return (
                f"data.tokenizer: {self._name!r} has {self._control[token_id]!r} for unknown characters and to "
                f"separate documents, and the text that begins with {quoted} has unknown characters; give it an "
                f"unk_token of its own, or use a tokenizer of bytes"
            )
        return (
            f"data.tokenizer: {self._name!r} makes the control token {self._control[token_id]!r} out of the text "
            f"that begins with {quoted}; use another tokenizer, or remove it from the text"
        )


_encoders: WeakKeyDictionary[PreTrainedTokenizerBase, TextEncoder] = WeakKeyDictionary()


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> TextEncoder:
    """Return the encoder of a tokenizer: made once, kept as long as the tokenizer."""
    if tokenizer not in _encoders:
        _encoders[tokenizer] = TextEncoder(tokenizer)
    return _encoders[tokenizer]


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]


def _without_control_tokens(backend: Tokenizer, control: dict[int, str]) -> Tokenizer | None:
    """Return a copy of `backend` that has the same ids and does not know the names in `control`.

    None where there can be none: a part of it is written in Python.
    """
    from tokenizers import Tokenizer

    try:
        state = json.loads(backend.to_str())
    except Exception:  # the library raises nothing more exact
        return None
    # U+10FFFF is no character. Names differ by the id, so that a vocabulary keeps one entry for each.
    renamed = {name: f"\U0010ffff{token_id}\U0010ffff" for token_id, name in control.items()}
    state["added_tokens"] = [
        token | ({"content": renamed[token["content"]], "normalized": False} if token["content"] in renamed else {})
        for token in state["added_tokens"]
    ]
    state["truncation"] = state["padding"] = state["post_processor"] = None
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(piece, piece): token_id for piece, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            pair
            for pair in map(_pair, model["merges"])
            if renamed.keys().isdisjoint((*pair, pair[0] + pair[1].removeprefix(prefix)))
        ]
    twin = Tokenizer.from_str(json.dumps(state))
    kept = all(twin.token_to_id(token["content"]) == token["id"] for token in state["added_tokens"])
    return twin if kept else None


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge
