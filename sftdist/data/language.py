"""Which language a text is in, by the model that py3langid carries (Lui and Baldwin 2012, https://aclanthology.org/P12-3005).

Takes about 0.1 ms a text, and a second once for the model.
"""

from __future__ import annotations

import re
from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# Whoever changes what is answered here, or takes another release of the model, lets the versions of contracts and of
# the lint grow.
SURE = 0.8  # below it the model guesses: code, formulas, names
LOOKED_AT = 400  # characters
LETTERS = 20  # fewer say nothing
NO_LANGUAGE = "zxx"
PART_OF = {"nn": "no", "wuu": "zh", "yue": "zh", "arz": "ar", "ary": "ar", "uzs": "uz"}  # told as the larger one
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def language_of(text: str) -> str | None:
    """The ISO 639 code of a text's language, or None where the model is not sure. Fenced code is not looked at."""
    text = (_CODE.sub("", text) if "```" in text else text)[:LOOKED_AT]
    if sum(map(str.isalpha, text[: 4 * LETTERS])) < LETTERS:
        return None
    code, confidence = _identifier().classify(text)
    return None if confidence < SURE or code == NO_LANGUAGE else PART_OF.get(code, code)


def languages() -> frozenset[str]:
    """All codes that `language_of` can give."""
    return frozenset(PART_OF.get(code, code) for code in _identifier().labels) - {NO_LANGUAGE}


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
