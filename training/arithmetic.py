"""Small sums: both numbers below 100 for plus and minus, up to 12 for times."""

from __future__ import annotations

import re
from random import Random

from training.phrases import expand

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
THINGS = (
    "apples", "pears", "books", "coins", "eggs", "balls", "cookies", "stones", "pens", "cats", "dogs", "chairs", "cups", "plums", "stamps",
    "marbles", "nuts", "candles", "flowers", "sheep", "hens", "boats", "toys", "cards", "sweets", "potatoes", "keys", "birds", "fish",
)  # fmt: skip
PEOPLE = ("Anna", "Tom", "my brother", "Lisa", "a friend", "my mother", "Ben", "my uncle", "Mia", "a neighbour", "my teacher", "Paul", "Emma")
ASKS = (
    "what is @", "what's @", "how much is @", "@", "@ =", "@ = ?", "calculate @", "compute @", "@ is", "what does @ {make|give|equal}", "tell me @",
    "{can|could|will} you {calculate|compute|do|solve|tell me|add up} @", "{please |}solve @", "what do you get for @", "how much does @ make",
    "i need {to know |the result of |}@", "@ equals", "and @", "and what is @", "now @", "give me {the result of |}@", "work on this: @",
    "a sum for you: @", "do you know what @ is", "what is the {result|answer|value} of @", "{quick|easy|simple} {maths|sum|calculation}: @", "evaluate @",
    "what about @", "how about @", "{figure out|find} @", "@ gives", "what comes out of @", "result of @", "help me with @",
)  # fmt: skip
PLUS = ("A + B", "A+B", "A plus B", "A and B {added|together|added together}", "A added to B", "the sum of A and B", "A + B", "A plus B")
MINUS = ("A - B", "A-B", "A minus B", "A take away B", "B subtracted from A", "A less B", "the difference {of|between} A and B", "A - B", "B from A")
TIMES = ("A * B", "A*B", "A times B", "A x B", "A multiplied by B", "the product of A and B", "A times B", "A * B")
ORDERS = {
    "+": ("add A and B", "add B to A", "{sum|count} A and B together", "put A and B together", "what is A if {i|you} add B", "if {i|you} add A and B, what {is it|do i get|comes out}", "A, then B more, how many is that"),
    "-": ("subtract B from A", "take B from A", "deduct B from A", "remove B from A", "what is A if {i|you} {take away|subtract} B", "what {remains|is left} {of|from} A {minus|after taking|without} B", "how much is left when B is taken from A", "from A take B", "if i take B from A, what {is left|remains|do i get}"),
    "*": ("multiply A {by|with|and} B", "what is A if {i|you} multiply it by B", "A groups of B, how many", "if {i|you} multiply A by B, what {is it|do i get}"),
}  # fmt: skip
STORIES = {
    "+": (
        "{i have|there are} A THINGS{,| and} {i get|i buy|PERSON gives me|i find|PERSON brings|then i get} B {more|others|more THINGS}{.|,} how many {do i have|are there|THINGS do i have|are they}{| now| in all| together| altogether}",
        "PERSON has A THINGS and {gets|buys|finds|is given|takes} B more{.|,} how many {is that|are there|THINGS are there|has PERSON}{| now| in all| then}",
        "A THINGS are in {a box|a bag|the garden|a basket} and B {more come|are added|are put in}{.|,} how many {are there|are in it|THINGS are there}{| now|}",
        "there {were|are} A THINGS, then B more {came|come}{.|,} how many {are there|THINGS are there} {now|then|in the end}",
    ),
    "-": (
        "{i have|i had|there are} A THINGS{,| and} {i lose|i eat|i give away|PERSON takes|i sell|i gave PERSON|i gave away} B{| of them}{.|,} how many {are left|remain|do i have left|do i still have|are there|are still there}{| now|}",
        "PERSON has A THINGS and {loses|sells|gives away|eats|drops} B{.|,} how many {are left|remain|THINGS are left|does PERSON still have|are there now}",
        "{there are|there were} A THINGS {in a bag|on a table|in a box|in the garden|in a tree|in a field} and B {are taken|go|disappear|went away|are removed|left|are gone}{.|,} how many {are left|remain|THINGS remain|are still there|are there now}",
        "of A THINGS B are {gone|lost|sold|broken}{.|,} how many {are left|remain}",
    ),
    "*": (
        "{there are|i have} A {boxes|bags|baskets|shelves} with B THINGS {each|in each}{.|,} how many THINGS {are there|is that|do i have}{| in all|}",
        "PERSON buys A bags of B THINGS{.|,} how many THINGS is that",
    ),
}  # fmt: skip


def ask_sum(rng: Random) -> tuple[str, str]:
    """A question in lower case without its end mark, and the answer as an equation."""
    sign = rng.choices("+-*", (0.42, 0.36, 0.22))[0]
    a, b = _numbers(sign, rng)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    return _question(sign, a, b, rng), f"{a} {sign.replace('*', 'x')} {b} = {result}."


def _numbers(sign: str, rng: Random) -> tuple[int, int]:
    if sign == "*":
        return rng.randint(0 if rng.random() < 0.1 else 1, 12), rng.randint(1, 12)
    limit = rng.choice((10, 20, 20, 50, 99))
    a, b = rng.randint(0, limit), rng.randint(0, limit if rng.random() < 0.6 else min(limit, 12))
    return (max(a, b), min(a, b)) if sign == "-" else (a, b)


def _question(sign: str, a: int, b: int, rng: Random) -> str:
    kind = rng.random()
    if kind < 0.62:
        inside = expand(rng.choice({"+": PLUS, "-": MINUS, "*": TIMES}[sign]), rng)
        pattern = expand(rng.choice(ASKS), rng).replace("@", inside)
    elif kind < 0.78:
        pattern = expand(rng.choice(ORDERS[sign]), rng)
    else:
        pattern = expand(rng.choice(STORIES[sign]), rng)
        pattern = pattern.replace("THINGS", rng.choice(THINGS)).replace("PERSON", rng.choice(PEOPLE))
    as_words = rng.random() < 0.12
    written = {"A": _written(a, as_words), "B": _written(b, as_words)}
    return re.sub(r"\b[AB]\b", lambda found: written[found.group()], pattern)


def _written(number: int, as_words: bool) -> str:
    return NUMBER_WORDS[number] if as_words and number < len(NUMBER_WORDS) else str(number)
