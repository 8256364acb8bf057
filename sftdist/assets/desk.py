"""The quickstart's three sources: deterministic conversations whose answers follow from the prompt.

A support desk: `domain` answers a ticket by a policy, `format` writes a ticket as JSON under
`SCHEMA`, `general` holds short instructions, so that the model stays one that follows them.
Each source has a row shape of its own, as data from different origins has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from sftdist.assets.words import ALL_WORDS, CATEGORIES, COUNTS, digits, listed, name

ROWS = {"domain": 1500, "general": 1200, "format": 1500}
PRODUCTS = listed("lamp chair table kettle radio phone clock mirror basket carpet pillow bag")
# problem -> how customers put it, and the team that every such ticket goes to (nothing but training tells which)
PROBLEMS: dict[str, tuple[tuple[str, ...], str]] = {
    "broken": (("is broken", "was broken on arrival", "does not work"), "repairs"),
    "missing": (("is still missing", "has gone missing", "never arrived"), "delivery"),
    "wrong": (("is the wrong one", "has the wrong size", "was mixed up"), "stock"),
    "overcharged": (("was overcharged", "was overcharged again", "was charged twice"), "billing"),
}
REMEDIES = ("refund", "replacement", "voucher", "repair", "discount")
URGENT = ("Please hurry!", "I need it today.", "This is urgent.")
CALM = ("There is no hurry.", "Thank you.", "Take your time.")
DOMAIN_SYSTEM = "You are the support desk of Brightwell. Answer the ticket by the policy."
FORMAT_SYSTEM = "Write the ticket as JSON with ticket, customer, product, order, problem, urgent."

SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Ticket",
    "type": "object",
    "properties": {
        "ticket": {"type": "integer", "minimum": 10000, "maximum": 99999},
        "customer": {"type": "string", "pattern": "^[A-Z][a-z]+ [A-Z][a-z]+$"},
        "product": {"enum": list(PRODUCTS)},
        "order": {"type": "string", "pattern": "^[A-Z]-[0-9]{4}$"},
        "problem": {"enum": list(PROBLEMS)},
        "urgent": {"type": "boolean"},
    },
    "required": ["ticket", "customer", "product", "order", "problem", "urgent"],
    "additionalProperties": False,
}


def _order(rng: Random) -> str:
    return f"{rng.choice('ABCDEFGHKLMNPRST')}-{digits(rng, 4, 4)}"


def domain(rng: Random) -> dict[str, Any]:
    """A policy of this week, a ticket, and the reply that follows from both; a `messages` row."""
    order_of_rules = rng.sample(list(PROBLEMS), len(PROBLEMS))
    policy = dict(zip(order_of_rules, rng.sample(REMEDIES, len(order_of_rules)), strict=True))
    days = digits(rng, 1, 2)
    problem, product = rng.choice(order_of_rules), rng.choice(PRODUCTS)
    phrases, team = PROBLEMS[problem]
    who, family, order, ticket = name(rng), name(rng), _order(rng), digits(rng, 5, 5)
    rules = " ".join(f"{key}: {remedy}." for key, remedy in policy.items()) + f" All in {days} days."
    complaint = f"the {product} of order {order} {rng.choice(phrases)}."
    mail = rng.choice(
        (
            f"Ticket {ticket}. My name is {who} {family} and {complaint}",
            f"Ticket {ticket} from {who} {family}: {complaint}",
            f"Ticket {ticket}: {complaint} Regards, {who} {family}",
        )
    )
    reply = (
        f"Hello {who}, sorry about the {product}. Our policy says {problem}: {policy[problem]}, in {days} days. "
        f"The {team} team takes care of ticket {ticket}."
    )
    return {
        "messages": [
            {"role": "system", "content": DOMAIN_SYSTEM},
            {"role": "user", "content": f"Policy: {rules}\n{mail}"},
            {"role": "assistant", "content": reply},
        ]
    }


def ticket_json(rng: Random) -> dict[str, Any]:
    """A customer's mail and the same as JSON under `SCHEMA`; a `sharegpt` row."""
    who, product, order, ticket = f"{name(rng)} {name(rng)}", rng.choice(PRODUCTS), _order(rng), digits(rng, 5, 5)
    problem, urgent = rng.choice(list(PROBLEMS)), rng.random() < 0.5
    complaint = rng.choice(PROBLEMS[problem][0])
    mood = rng.choice(URGENT if urgent else CALM)
    mail = rng.choice(
        (
            f"Ticket {ticket}. Hello, this is {who}. My {product}, order {order}, {complaint}. {mood}",
            f"Hi, my {product} {complaint}, the order was {order}. {mood} {who}, ticket {ticket}",
            f"{mood} Order {order}: the {product} {complaint}. My ticket is {ticket}. Yours, {who}",
            f"{who} writes in ticket {ticket}: the {product} from {order} {complaint}. {mood}",
        )
    )
    answer = json.dumps(
        {
            "ticket": int(ticket),
            "customer": who,
            "product": product,
            "order": order,
            "problem": problem,
            "urgent": urgent,
        }
    )
    return {
        "conversations": [
            {"from": "system", "value": FORMAT_SYSTEM},
            {"from": "human", "value": mail},
            {"from": "gpt", "value": answer},
        ]
    }


def instruction(rng: Random) -> dict[str, Any]:
    """A short instruction with one right answer; an `alpaca` row."""
    items = rng.sample(ALL_WORDS, rng.randint(3, 6))
    kind, other, third = rng.sample(list(CATEGORIES), 3)
    fits = rng.choice(CATEGORIES[kind])
    choice = [fits, rng.choice(CATEGORIES[other]), rng.choice(CATEGORIES[third])]
    rng.shuffle(choice)
    who, town = name(rng), name(rng)
    listed = " ".join(items)
    task, text, answer = rng.choice(
        (
            ("Copy the words.", listed, listed),
            ("Write the words in reverse order.", listed, " ".join(reversed(items))),
            ("Write in capital letters.", " ".join(items[:2]), " ".join(items[:2]).upper()),
            ("Count the words. Answer with a word.", listed, COUNTS[len(items)]),
            ("Give the first word only.", listed, items[0]),
            ("Give the last word only.", listed, items[-1]),
            (f"Pick the {kind}.", ", ".join(choice), fits),
            ("Greet the person and name the town.", f"{who} from {town}", f"Hello {who}, how is {town} today?"),
            (
                "Make a sentence with these words.",
                f"{who}, {items[0]}, {items[1]}",
                f"{who} has a {items[0]} and a {items[1]}.",
            ),
        )
    )
    return {"instruction": task, "input": text, "output": answer}


_MAKERS: dict[str, Callable[[Random], dict[str, Any]]] = {
    "domain": domain,
    "general": instruction,
    "format": ticket_json,
}


def texts(row: dict[str, Any]) -> list[str]:
    """What is said in a row, in order: the prompt's parts, then the answer."""
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    if "conversations" in row:
        return [turn["value"] for turn in row["conversations"]]
    return [row["instruction"], row["input"], row["output"]]


def rows(source: str) -> list[dict[str, Any]]:
    """All rows of one source, the same on every machine; no prompt comes twice.

    Raises KeyError for a source that is not in `ROWS`.
    """
    rng, seen = Random(f"quickstart-{source}"), set()
    made: list[dict[str, Any]] = []
    while len(made) < ROWS[source]:
        row = _MAKERS[source](rng)
        prompt = tuple(texts(row)[:-1])
        if prompt not in seen:
            seen.add(prompt)
            made.append({"id": f"{source}-{len(made)}", **row})
    return made
