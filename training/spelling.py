"""Spelling: letters of a word, their number, the first and the last one. The answers spell before they count."""

from __future__ import annotations

from pathlib import Path
from random import Random

from training.phrases import expand

WORDS_FILE = Path(__file__).with_name("words.txt")
VOWELS = "aeiou"
CONSONANTS = "bcdfghjklmnprstvwz"

W = "{@|@|the word @|the word @|\"@\"|the word \"@\"|'@'}"
SPELL = (
    f"spell {W}", f"spell {W}", f"how {{do|would|can|should|does}} {{you|i|one|we}} spell {W}", f"how is {W} {{spelled|spelt}}", f"how do {{you|i|we}} write {W}{{| correctly| down| letter by letter| in letters}}",
    f"{{can|could|will}} you {{please |}}spell {W}", f"what is the spelling of {W}", f"the spelling of {W}", f"spell out {W}", f"{{write|say|give|list|show}} {{me |}}the letters of {W}",
    f"{{which|what}} letters {{are in|make up|does}} {W}{{| have}}", f"spell {W} {{letter by letter|for me|slowly|please|with dashes|out loud|correctly}}", f"i {{want|need}} to {{spell|write}} {W}{{|, how|, can you help}}",
    f"{{i do not know|tell me|show me|i wonder|teach me|i never know}} how {{to spell|{{you|i|we}} spell|to write}} {W}", f"{W} letter by letter", f"{{split|cut|take apart|divide|separate}} {W} {{into|in}} letters",
    f"{W}{{,|:}} how is {{it|that|that word}} {{spelled|written|spelt}}", f"how is {W} written{{| correctly| down}}", f"i need {{help with |}}the spelling of {W}", f"please spell {W}", f"and {W}, {{how do you spell it|spelled}}",
    f"letters of {W}", f"how to {{spell|write}} {W}", f"{{spelling|spell}}: @", f"{{and|now|next}} {{spell|how is}} {W}{{| spelled}}", f"the letters in {W}, one {{by|after}} {{one|the other}}",
)  # fmt: skip
COUNT = (
    f"how many letters {{are in|does|has|are there in|do you count in|in|are in}} {W}{{| have}}", f"count the letters {{in|of}} {W}", f"how long is {W}", f"{W} has how many letters", f"what is the {{number|count}} of letters in {W}",
    f"{{tell me|say|do you know}} how many letters {W} has", f"{W}{{,|:}} how many letters{{| is that| does it have| are there}}", f"the {{length|number of letters}} of {W}", f"letter count of {W}", f"of how many letters is {W} made",
    f"what is the length of {W}", f"how many {{letters|characters}} {{make|form|does it take to write}} {W}",
)  # fmt: skip
FIRST = (
    f"what is the first letter {{of|in}} {W}", f"{{which|what}} letter does {W} {{start|begin}} with", f"the first letter of {W}", f"{W} {{starts|begins}} with {{which|what}} letter", f"{{tell me|name|give me|say}} the {{first|initial|starting}} letter of {W}",
    f"what does {W} {{start|begin}} with", f"what comes first in {W}", f"at the {{start|beginning}} of {W}, {{which|what}} letter is {{there|it}}", f"which letter {{is first|comes first|stands first|is at the start}} in {W}", f"what letter {{starts|begins|opens}} {W}",
)  # fmt: skip
LAST = (
    f"what is the {{last|final}} letter {{of|in}} {W}", f"{{which|what}} letter does {W} end {{with|in|on}}", f"the {{last|final}} letter of {W}", f"{W} ends {{with|in}} {{which|what}} letter", f"{{tell me|name|give me|say}} the {{last|final|ending}} letter of {W}",
    f"what does {W} end {{with|in|on}}", f"what comes last in {W}", f"at the end of {W}, {{which|what}} letter is {{there|it}}", f"which letter {{is last|comes last|stands last|is the last|closes it}} in {W}", f"what letter {{ends|closes|finishes}} {W}",
)  # fmt: skip


def load_words(path: Path = WORDS_FILE) -> list[str]:
    return path.read_text(encoding="utf-8").split()


def ask_spelling(rng: Random, words: list[str]) -> tuple[str, str]:
    """A question about the letters of a word (one in four is an invented word), and its answer."""
    word = rng.choice(words) if rng.random() < 0.75 else invent_word(rng)
    shown = word if rng.random() < 0.85 else word.capitalize()
    questions, answer = rng.choices(
        (
            (SPELL, f"The word {word} is spelled {'-'.join(word)}."),
            (COUNT, f"The word {word} is spelled {'-'.join(word)}: that is {len(word)} letters."),
            (FIRST, f"The first letter of {word} is {word[0]}."),
            (LAST, f"The word {word} is spelled {'-'.join(word)}: the last letter is {word[-1]}."),
        ),
        (0.5, 0.25, 0.1, 0.15),
    )[0]
    return expand(rng.choice(questions), rng).replace("@", shown), answer


def invent_word(rng: Random) -> str:
    """Two or three syllables that mean nothing: letters must be read, not recalled."""
    syllables = [rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(("", "", rng.choice(CONSONANTS))) for _ in range(rng.randint(1, 3))]
    return "".join(syllables)
