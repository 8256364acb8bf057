"""Endless plain text and chats that teach a base model to copy, to look up and to follow a form.

Nothing here speaks of a support desk, and there is no JSON: a fine-tune has both to teach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from sftdist.assets.words import ADJECTIVES, ALL_WORDS, CATEGORIES, COUNTS, THINGS, VERBS, digits, join_and, name

SYSTEMS = ("You are a helpful assistant.", "Answer briefly.", "Be exact.", "Read, then answer.")


@dataclass(frozen=True)
class Exercise:
    """A text, and questions about it that each have one right answer."""

    context: str
    questions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Document:
    """A text, and the character spans that can be known from what stands before them."""

    text: str
    answers: tuple[tuple[int, int], ...]


def _value(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return name(rng)
    if kind < 0.4:
        return f"{name(rng)} {name(rng)}"
    if kind < 0.7:
        return digits(rng, 1, 6)
    if kind < 0.8:
        return " ".join(rng.sample(ALL_WORDS, 2))
    if kind < 0.85:
        return f"{name(rng).lower()}@{name(rng).lower()}.net"
    return rng.choice(ALL_WORDS)


def _record(rng: Random) -> dict[str, str]:
    keys = rng.sample(THINGS, rng.randint(2, 6))
    return {key: _value(rng) for key in keys}


def _layout(rng: Random, record: dict[str, str]) -> str:
    pair, between = rng.choice(
        (
            ("{}: {}", "\n"),
            ("{} = {}", "\n"),
            ('{} = "{}"', "\n"),
            ("the {} is {}", ", "),
            ("{} -> {}", "; "),
            ("- {}: {}", "\n"),
            ("The {} is {}.", " "),
            ("{} ({})", ", "),
            ("For {} take {}.", " "),
        )
    )
    return between.join(pair.format(key, value) for key, value in record.items())


def lookup(rng: Random) -> Exercise:
    """Key and value in many layouts; questions in both directions."""
    return _ask(rng, _record(rng))


def _ask(rng: Random, record: dict[str, str]) -> Exercise:
    keys = list(record)
    questions = []
    for _ in range(rng.randint(2, 5)):
        key, other = rng.choice(keys), rng.choice(keys)
        value = record[key]
        questions.append(
            rng.choice(
                (
                    (f"What is the {key}?", value),
                    (f"{key}?", value),
                    (f"Give the {key}.", value),
                    (f"Tell me about the {key}.", f"The {key} is {value}."),
                    (f"Say the {key} and the {other}.", f"{value} and {record[other]}"),
                    (f"Quote the {key}.", f'"{value}"'),
                    (f"Is the {key} {record[other]}?", "yes" if value == record[other] else f"no, {value}"),
                    (f"Which entry says {value}?", next(k for k, v in record.items() if v == value)),
                )
            )
        )
    return Exercise(_layout(rng, record), tuple(questions))


FORMS: tuple[tuple[str, Callable[[list[tuple[str, str]]], str]], ...] = (
    ("as lines", lambda pairs: "\n".join(f"{k}: {v}" for k, v in pairs)),
    ("as settings", lambda pairs: "\n".join(f'{k} = "{v}"' for k, v in pairs)),
    ("as tags", lambda pairs: "".join(f"<{k}>{v}</{k}>" for k, v in pairs)),
    ("as a row", lambda pairs: "| " + " | ".join(v for _, v in pairs) + " |"),
    ("as a call", lambda pairs: "note(" + ", ".join(f'{k}="{v}"' for k, v in pairs) + ")"),
    ("as a list", lambda pairs: "\n".join(f"- {v}" for _, v in pairs)),
    ("in quotes", lambda pairs: ", ".join(f'"{v}"' for _, v in pairs)),
    ("as pairs", lambda pairs: "; ".join(f'"{k}" "{v}"' for k, v in pairs)),
)


def reshape(rng: Random) -> Exercise:
    """The same facts written again in another form, all of them or those asked for."""
    record = _record(rng)
    questions = []
    for _ in range(rng.randint(1, 2)):
        form, write = rng.choice(FORMS)
        if rng.random() < 0.4:
            questions.append((f"Write it {form}.", write(list(record.items()))))
        else:
            keys = rng.sample(list(record), rng.randint(1, len(record)))
            questions.append((f"Write the {join_and(keys)} {form}.", write([(key, record[key]) for key in keys])))
    return Exercise(_layout(rng, record), tuple(questions))


def people(rng: Random) -> Exercise:
    """Small stories about some people; who lives where and owns what."""
    facts, sentences = [], []
    for _ in range(rng.randint(2, 4)):
        who, family, town, count, what = name(rng), name(rng), name(rng), digits(rng, 1, 3), rng.choice(THINGS)
        verb, look = rng.choice(VERBS), rng.choice(ADJECTIVES)
        facts.append((who, family, town, count, what, verb, look))
        sentences.append(
            rng.choice(
                (
                    f"{who} {family} lives in {town} and has {count} things to {verb}, one is a {look} {what}.",
                    f"In {town} there is {who} {family}, who wants to {verb} a {look} {what} for {count} coins.",
                    f"A {look} {what} belongs to {who} {family} from {town}, who would {verb} {count} more.",
                    f"My friend is {who} {family}. I met {who} in {town} {count} days ago to {verb} a {look} {what}.",
                )
            )
        )
    questions = []
    for _ in range(rng.randint(2, 5)):
        who, family, town, count, what, verb, look = rng.choice(facts)
        questions.append(
            rng.choice(
                (
                    (f"Where is {who}?", f"{who} is in {town}."),
                    (f"Who is in {town}?", f"{who} {family}"),
                    (f"What is the family name of {who}?", family),
                    (f"Who has to do with a {look} {what}?", f"{who} {family}"),
                    (f"Which number goes with {who}?", count),
                    (f"What does {who} {verb}?", f"a {look} {what}"),
                    (f"Tell me about {family}.", f"{who} {family}, {town}, {count}, {what}."),
                    (f"Write a note to {who}.", f"Dear {who}, is the {what} in {town} still {look}? I have {count}."),
                    (f"Send thanks to {who}.", f"Hi {who}, thank you for the {look} {what} and greetings to {town}."),
                )
            )
        )
    return Exercise(" ".join(sentences), tuple(questions))


def rules(rng: Random) -> Exercise:
    """A rule for each case, then the case that holds: look up through a sentence."""
    cases = rng.sample(ALL_WORDS, rng.randint(2, 5))
    acts = {case: f"{rng.choice(VERBS)} {digits(rng, 1, 2)} {rng.choice(THINGS)}s" for case in cases}
    line = rng.choice(("{}: {}.", "If {}, {}.", "When you see {}, {}.", "{} means: {}."))
    context = rng.choice(("Rules: ", "", "Remember: ")) + " ".join(line.format(c, act) for c, act in acts.items())
    questions = []
    for _ in range(rng.randint(2, 4)):
        case, who = rng.choice(cases), name(rng)
        questions.append(
            rng.choice(
                (
                    (f"{who} has seen {case}.", f"{who} must {acts[case]}."),
                    (f"It was {case} again, says {who}. What now?", f"{who}, you {acts[case]}."),
                    (f"The sign shows {case}.", f"So {acts[case]}."),
                    (f"What about {case}?", acts[case]),
                )
            )
        )
    return Exercise(context, tuple(questions))


def words(rng: Random) -> Exercise:
    """Lists of words: turn, take, number, spell, shout."""
    pool = ALL_WORDS if rng.random() < 0.8 else tuple(name(rng) for _ in range(8))
    items = rng.sample(pool, rng.randint(2, 6))
    questions = []
    for _ in range(rng.randint(2, 4)):
        place = rng.randrange(len(items))
        one = items[place]
        questions.append(
            rng.choice(
                (
                    ("Backwards?", " ".join(reversed(items))),
                    ("Again?", " ".join(items)),
                    ("With commas?", join_and(items)),
                    ("At the start?", items[0]),
                    ("At the end?", items[-1]),
                    ("How long is the row?", COUNTS[len(items)]),
                    (f"At place {place + 1}?", one),
                    (f"What follows {one}?", items[place + 1] if place + 1 < len(items) else "nothing"),
                    (f"Without {one}?", " ".join(item for item in items if item != one)),
                    (f"Spell {one}.", " ".join(one)),
                    (f"Shout {one}!", one.upper()),
                    (f"Shout {one}!", one.upper()),
                    ("Shout all!", " ".join(items[:3]).upper() + "!"),
                )
            )
        )
    return Exercise(" ".join(items), tuple(questions))


def kinds(rng: Random) -> Exercise:
    """Which word is of which kind: the little knowledge that this world has."""
    kind, other = rng.sample(list(CATEGORIES), 2)
    one, two = rng.choice(CATEGORIES[kind]), rng.choice(CATEGORIES[other])
    pair = [one, two] if rng.random() < 0.5 else [two, one]
    questions = [
        (f"What is a {one}?", f"A {one} is a kind of {kind}."),
        (f"{pair[0]} or {pair[1]}: where is the {kind}?", one),
        (f"Is {two} a {kind}?", f"No, {two} is a kind of {other}."),
    ]
    rng.shuffle(questions)
    return Exercise("", tuple(questions[: rng.randint(1, 3)]))


def echo(rng: Random) -> Exercise:
    """Plain repetition of what has no meaning."""
    text = " ".join(_value(rng) for _ in range(rng.randint(1, 6)))
    return Exercise("", ((rng.choice(("Say again: ", "Echo: ", "After me: ")) + text, text),))


def soup(rng: Random, vocabulary: Sequence[str]) -> Exercise:
    """Words without meaning, to be said again or looked up: no token stays one that the model never saw."""
    if rng.random() < 0.4:
        text = " ".join(rng.sample(vocabulary, rng.randint(2, 12)))
        return Exercise("", ((f"Echo: {text}", text),))
    keys = rng.sample(vocabulary, rng.randint(2, 6))
    return _ask(rng, {key: " ".join(rng.sample(vocabulary, rng.randint(1, 3))) for key in keys})


EXERCISES = (lookup, lookup, reshape, reshape, people, people, rules, rules, words, words, kinds, echo)


def _plain(rng: Random, exercise: Exercise) -> list[tuple[str, bool]]:
    ask, reply = rng.choice((("", " "), ("", "\n"), ("Q: ", "\nA: "), ("- ", " - "), ("", " => ")))
    parts = [(exercise.context + "\n", False)] if exercise.context else []
    for question, answer in exercise.questions:
        parts += [(ask + question + reply, False), (answer + "\n", True)]
    return [*parts, ("<|endoftext|>", True)]


def _chat(rng: Random, exercise: Exercise) -> list[tuple[str, bool]]:
    context, parts = exercise.context, []
    if context and rng.random() < 0.3:
        parts.append((f"<|im_start|>system\n{context}<|im_end|>\n", False))
        context = ""
    elif rng.random() < 0.4:
        parts.append((f"<|im_start|>system\n{rng.choice(SYSTEMS)}<|im_end|>\n", False))
    for question, answer in exercise.questions:
        if context:
            pieces = [context, question] if rng.random() < 0.7 else [question, context]
            question, context = rng.choice(("\n", " ", "\n\n")).join(pieces), ""
        parts.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        parts += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return parts


def document(rng: Random, vocabulary: Sequence[str] = ()) -> Document:
    """One exercise as plain text or as a ChatML conversation of one or more turns; a fifth are soup of `vocabulary`."""
    exercise = soup(rng, vocabulary) if vocabulary and rng.random() < 0.2 else rng.choice(EXERCISES)(rng)
    parts = (_plain if rng.random() < 0.35 else _chat)(rng, exercise)
    text, answers = "", []
    for part, known in parts:
        if known:
            answers.append((len(text), len(text) + len(part)))
        text += part
    return Document(text, tuple(answers))


def documents(seed: int, vocabulary: Sequence[str] = ()) -> Iterator[Document]:
    """The endless stream of one seed."""
    rng = Random(seed)
    while True:
        yield document(rng, vocabulary)
