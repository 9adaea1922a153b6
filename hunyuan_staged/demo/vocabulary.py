"""Which words of a prompt the demo checkpoint was never taught."""

import re

from hunyuan_staged.demo import scenes

MAX_CHARACTERS = 4  # on a card, as scenes.draw_scene writes them
SHOWN = 8  # words that a warning names
_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')
_WORD = re.compile(r"[^\W_]+")


def known_words() -> frozenset[str]:
    """Every word that `scenes.describe` may use, in lower case."""
    sentences = [*scenes.COLORS, *scenes.BACKGROUNDS, *scenes.SHAPES, *(f"{shape}s" for shape in scenes.SHAPES)]
    for patterns in (scenes._FIRST, scenes._MORE, scenes._UNSEEN):
        sentences += [re.sub(r"{\w+}", " ", pattern) for kind in patterns.values() for pattern in kind]
    for verbs in (scenes._VERBS, scenes._MORE_VERBS):
        sentences += [verb for wordings in verbs.values() for verb in wordings]
    sentences += [*scenes._PLURAL.values(), "two one plain two-tone an and a"]
    return frozenset(word for sentence in sentences for word in _WORD.findall(sentence.lower()))


def unknown(prompt: str) -> str | None:
    """What the demo checkpoint does not know of a prompt, in a phrase; None where it knows all of it."""
    if not prompt.strip():
        return "an empty prompt"
    known = known_words()
    words = dict.fromkeys(word for word in _WORD.findall(_QUOTED.sub(" ", prompt)) if word.lower() not in known)
    texts = ["".join(groups) for groups in _QUOTED.findall(prompt)]
    odd = [f'"{text}" on a card' for text in texts if not re.fullmatch(f"[A-Z0-9]{{1,{MAX_CHARACTERS}}}", text)]
    found = [*words, *odd]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more if found else None
