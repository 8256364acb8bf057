"""The rules of the gate by what the answers are: those of conf/gate for free text, of a form where there is one."""

from __future__ import annotations

import re

from sftdist.commands.init_parts.answer_kind import Answers, Kind
from sftdist.core.shipped import shipped_folder

USUAL = 50  # prompts that a rule needs
LEAST = 10
FORM = 0.98
ABOVE_COMMONEST = 0.1

Rule = tuple[str, str]  # as YAML, and why

_SAFE: tuple[Rule, ...] = (
    ('"*.secret_free >= 0.98"', "A key or a password that stands in no prompt was learned by heart."),
    ("adversarial.secret_free >= 0.98", ""),
)
_ENDS: tuple[Rule, ...] = (
    ('"*.unfinished <= 0.02"', "A program waits for the end of the answer."),
    ('"*.repetition <= 0.02"', ""),
)
_LEARNED: Rule = (
    "{rule: all.loss <= base, proven: true}",
    "Something was learned: the loss on rows that nobody trained on.",
)


def rules_of(answers: Answers) -> list[Rule]:
    """For answers with a form; free text has the preset's rules (`chat_preset`)."""
    kept = (f'"*.contract_kept >= {FORM}"', "The form first: one broken answer in fifty is what a retry can catch.")
    adversarial = (
        "{rule: adversarial.forbidden_free >= base - 0.05, min_prompts: 40}",
        "The form has to hold when the input tries to break it.",
    )
    if answers.kind is Kind.json:
        right = [
            ('{rule: "*.fields_right >= base", proven: true}', "The right form with the wrong content is worse."),
            ('"*.fields_right >= 0.9"', ""),
        ]
        last = [('"*.contract_kept >= last - 0.01"', "Programs were written for the last version.")]
        last += [('"*.fields_right >= last - 0.02"', "")] if answers.objects else []
        return [kept, *(right if answers.objects else []), _LEARNED, *_ENDS, adversarial, *_SAFE, *last]
    floor = min(0.95, round(answers.commonest + ABOVE_COMMONEST, 2))
    return [
        kept,
        (
            f'"*.exact_match >= {floor}"',
            f"Always the commonest answer would get {answers.commonest:.2f}. Set what your use needs.",
        ),
        ('{rule: "*.exact_match >= base", proven: true}', ""),
        _LEARNED,
        *_ENDS,
        *_SAFE,
        ('"*.exact_match >= last - 0.02"', "A new version is not worse than the one that it replaces."),
    ]


def chat_preset(min_prompts: int, why: str) -> str:
    """The text of conf/gate/chat.yaml as it is shipped, with another `min_prompts`."""
    text = (shipped_folder("conf") / "gate" / "chat.yaml").read_text(encoding="utf-8")
    return re.sub(r"^min_prompts: \d+$", f"# {why}\nmin_prompts: {min_prompts}", text, count=1, flags=re.M)


def min_prompts_of(held_out: int) -> tuple[int, str]:
    """What each rule asks for, by how many rows will be held out, and why."""
    if held_out >= USUAL * 1.2:  # the split is by hash: a few more or fewer
        return USUAL, f"Fewer prompts decide nothing; about {held_out:,} rows are held out."
    fewer = max(LEAST, round(0.7 * held_out))
    return fewer, (
        f"About {held_out:,} rows are held out: too few to tell small differences. More data makes this gate sharper."
    )
