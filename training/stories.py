"""Short stories from a grammar, about an animal or a person that the reader asks for."""

from __future__ import annotations

from random import Random

from training.phrases import Table, expand

HEROES = (
    "fox", "bear", "owl", "cat", "dog", "mouse", "rabbit", "wolf", "hen", "duck", "frog", "horse", "lion", "tiger", "sheep", "goat", "snail",
    "hedgehog", "king", "queen", "princess", "knight", "dragon", "robot", "child", "girl", "boy", "farmer", "sailor", "baker", "witch", "giant",
    "elephant", "penguin", "whale", "bird", "squirrel", "beaver", "turtle", "bee", "crow", "donkey", "ghost", "pirate", "monkey", "snake", "fish",
    "computer", "tree", "star", "spider", "pig", "cow", "prince", "unicorn", "kitten", "puppy", "dinosaur", "teacher", "train",
)  # fmt: skip
ASKS = (
    "{tell|write|read|give|make} me a {|short |little |nice |new |small |funny |bedtime }story about {H}", "{please |}tell {me |us |}a {story|tale|short story} {about|of|with|on} {H}",
    "{can|could|will|would} you {please |}{tell|write|make up|invent} {me |us |}a {|short |little |nice }{story|tale} {about|with|of|on} {H}", "a {|short |little }{story|tale} {about|with|of} {H}",
    "i {want|would like|need|wish for} a {|short |little |nice }{story|tale} {about|with|of} {H}", "do you know a {story|tale} {about|with|of} {H}", "write a {|short |little }{story|tale} {about|with|of} {H}",
    "story about {H}", "{my child|my son|my daughter|the children|my little sister} {wants|want|would like|asks for} a {story|tale|bedtime story} {about|with|of} {H}", "make a {story|tale} where {H} {is the hero|plays a part|appears}",
    "once upon a time there was {H}, go on", "{tell|write} something about {H}", "{now|next|and} a {story|tale} about {H}", "what about a {story|tale} {about|with} {H}", "let me hear a {story|tale} about {H}",
)  # fmt: skip
ASKS_FOR_ANY = (
    "{tell|write|read|give} me a {|short |little |nice |new |bedtime |good }{story|tale}", "a {story|tale}{| please}", "{can|could|will|would} you {please |}tell {me |us |}a {|short |little |nice }{story|tale}", "do you know {a story|any stories|a tale|stories|tales|any tale}",
    "i {want|would like|need|wish for} {a|another|one more} {|short |little }{story|tale}", "{tell|write} {a|another|one more} {story|tale}", "i {am bored|cannot sleep}{,|.} tell me {something|a story}", "story time", "invent a {story|tale}", "{any|some} story will do", "entertain me", "{one more|another} {story|tale}",
)  # fmt: skip
WORDS: Table = {
    "begin": ("Once upon a time there was", "Once there was", "There once lived", "Long ago there was"),
    "kind": ("small", "young", "old", "clever", "kind", "brave", "shy", "hungry", "curious", "quiet", "happy", "lonely"),
    "place": ("in a green forest", "near a river", "on a high hill", "in a little village", "by the sea", "at the edge of a wood", "in an old tower", "under a big oak"),
    "want": ("wanted to see the moon from near", "wished for a good friend", "looked for a warm place", "was looking for a lost key", "wanted to cross the river", "wanted to learn to sing", "had nothing to eat", "dreamed of the sea"),
    "when": ("One day", "One cold morning", "One evening", "On a rainy day"),
    "friend": ("an old owl", "a little mouse", "a tired farmer", "a friendly goat", "a small bird", "a wise turtle", "a merry sailor"),
    "where": ("on the road", "under a tree", "at the bridge", "beside a lake", "in the snow"),
    "trouble": ("who was stuck in the mud", "who had lost the way", "who was cold and alone", "who carried a heavy bag", "who had hurt a foot"),
    "act": ("helped at once", "shared the last piece of bread", "made a small fire", "carried the bag home", "stayed until the morning"),
    "thanks": ("said the friend", "was the answer", "came the reply"),
    "end": (
        "From that day on they were friends.", "And so they walked home together, and both were happy.",
        "In the evening they sat by the fire and laughed.", "And if they have not moved away, they still live there.",
    ),
}  # fmt: skip
STORY = (
    "$begin {A} $kind {H} $place. The {H} $want. $when the {H} met $friend $where, $trouble. The {H} $act. "
    '"{Thank you|You are kind|I will not forget it|Now I will help you}," $thanks. $end'
)


def ask_story(rng: Random) -> tuple[str, str]:
    """A question in lower case without its end mark, and a story of about sixty words."""
    hero = rng.choice(HEROES)
    asked = rng.random() < 0.8
    with_article = _article(hero) + " " + hero if rng.random() < 0.9 else f"the {hero}"
    question = expand(rng.choice(ASKS if asked else ASKS_FOR_ANY).replace("{H}", with_article), rng)
    return question, tell(hero, rng)


def tell(hero: str, rng: Random) -> str:
    told = expand(STORY.replace("{H}", hero).replace("{A}", "@"), rng, WORDS)
    kind = told.split("@ ", 1)[1].split(" ", 1)[0]
    return told.replace("@", _article(kind))


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" or noun.startswith("ug") else "a"
