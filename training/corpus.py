"""The training text: chats of many independent turns, made from a seed. Reads only the files of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from training.arithmetic import ask_sum
from training.facts import Facts, load_facts
from training.phrases import expand
from training.spelling import ask_spelling, load_words
from training.stories import ask_story
from training.wordings import dress, punctuate

FOLDER = Path(__file__).parent
# Words that mean something in prima: never asked about as things of the world.
HOUSE_WORDS = {"head", "ring", "machine", "computer", "key", "test", "step", "plan", "pass", "you", "it", "word", "story", "letter"}
NAMES = (
    "Anna", "Tom", "Lisa", "Ben", "Mia", "Paul", "Emma", "Max", "Lea", "Jonas", "Nina", "Peter", "Maria", "Jack", "Sara", "David", "Laura", "Simon",
    "Julia", "Felix", "Eva", "Martin", "Alice", "Bob", "Carol", "Dave", "Sofia", "Oscar", "Hugo", "Zoe", "Ivan", "Olga", "Ali", "Fatima", "Chen", "Yuki",
    "Raj", "Priya", "Marco", "Chiara", "Clara", "Karl", "Ida", "Otto", "Frieda", "Grace", "Henry", "Rose", "Sam", "Kim", "Alex", "Robin", "Chris", "Nora",
)  # fmt: skip
MY_NAME = ("my name is @", "i am @", "i am called @", "{hi|hello|hey}, {i am|my name is|i'm} @", "you can call me @", "call me @", "@ is my name", "this is @", "@ here")
WHAT_NAME = (
    "what is my name", "what's my name", "{do|can} you {know|remember|still know|recall|tell me} my name", "who am i", "{how|what} am i called", "do you {know|remember|recall} {who i am|what i am called|how i am called}",
    "say my name", "tell me my name", "what did i say my name {is|was}", "remember me", "my name is", "what do you call me", "{have you|did you} {forgotten|forget} my name", "i told you my name{,|.} {what is it|do you remember|what was it}",
)  # fmt: skip
REPEAT = (
    "{say|repeat|tell me} that {again|once more|one more time}{| please|}", "repeat{| please| that| it|}", "again{| please|}", "can you {repeat|say} that{| again| once more|}", "pardon", "what did you {say|just say}", "sorry, what",
    "i did not {hear|get|catch} {that|you|it}{|, again please|}", "once more{| please|}", "come again", "could you repeat {that|it|your answer|the answer}", "please repeat{| your answer| the answer|}",
)  # fmt: skip
SYSTEM = (
    "You are {a helpful assistant|a friendly assistant|an assistant|the assistant of prima|a helpful model|prima|a small model|a chatbot|an AI assistant}.{| Be brief.| Answer shortly.| Be kind.| Answer the user.| Be honest.}",
    "{Be brief|Answer in short sentences|Be helpful|Answer politely|Help the user|Answer the questions|Be nice and helpful|Answer in English}.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Turn:
    """One message: role `system`, `user` or `assistant`."""

    role: str
    text: str


Chat = list[Turn]
Maker = Callable[[Random], tuple[str, str]]


class Corpus:
    """Makes chats. The same seed gives the same chats, whatever was asked before."""

    def __init__(self, folder: Path = FOLDER) -> None:
        words = load_words(folder / "words.txt")
        self.facts = load_facts(folder / "facts.toml")
        self.smalltalk = load_facts(folder / "smalltalk.toml")
        nouns = [word for word in words if word not in HOUSE_WORDS]
        self.outside = load_facts(folder / "outside.toml", {"noun": nouns})
        self._kinds: tuple[tuple[float, Maker], ...] = (
            (0.45, _dressed(self.facts)),
            (0.15, _dressed(self.outside)),
            (0.19, lambda rng: _dress_question(ask_sum(rng), rng)),
            (0.12, lambda rng: _dress_question(ask_spelling(rng, words), rng)),
            (0.075, lambda rng: _punctuate_question(self.smalltalk.ask(rng), rng)),
            (0.015, lambda rng: _dress_question(ask_story(rng), rng)),
        )

    def chats(self, seed: int, n_turns: int) -> Iterator[Chat]:
        """Endless chats of about `n_turns` questions each."""
        rng = Random(seed)
        while True:
            yield self._chat(rng, n_turns)

    def _chat(self, rng: Random, n_turns: int) -> Chat:
        chat = [Turn("system", expand(rng.choice(SYSTEM), rng))] if rng.random() < 0.2 else []
        name: str | None = None
        for _ in range(n_turns):
            draw = rng.random()
            if draw < 0.02 and name is None:
                name = rng.choice(NAMES)
                question, answer = _punctuate_question((expand(rng.choice(MY_NAME), rng).replace("@", name), f"Nice to meet you, {name}!"), rng)
            elif draw < (0.08 if name else 0.025):
                question, answer = _dress_question((expand(rng.choice(WHAT_NAME), rng), _name_answer(name)), rng)
            elif draw > 0.985 and chat and chat[-1].role == "assistant":
                question, answer = _punctuate_question((expand(rng.choice(REPEAT), rng), chat[-1].text), rng)
            else:
                question, answer = self._question(rng)
            chat += [Turn("user", question), Turn("assistant", answer)]
        return chat

    def _question(self, rng: Random) -> tuple[str, str]:
        make = rng.choices([maker for _, maker in self._kinds], [weight for weight, _ in self._kinds])[0]
        return make(rng)


def _dressed(facts: Facts) -> Maker:
    return lambda rng: _dress_question(facts.ask(rng), rng)


def _dress_question(pair: tuple[str, str], rng: Random) -> tuple[str, str]:
    return dress(pair[0], rng), pair[1]


def _punctuate_question(pair: tuple[str, str], rng: Random) -> tuple[str, str]:
    return punctuate(pair[0], rng), pair[1]


def _name_answer(name: str | None) -> str:
    return f"Your name is {name}." if name else "You have not told me your name."
