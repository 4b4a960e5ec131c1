"""What people do to a question: greetings before it, thanks behind it, other words, slips of the keyboard."""

from __future__ import annotations

from random import Random

from training.phrases import expand

OPENERS = (
    "{hi|hello|hey|hey there|hello there|good morning|good day|dear model|hey prima|hi prima|hello prima}{,|!|.} ", "{please|tell me|say}{,|:|} ",
    "{ok|okay|well|so|now|and|but|then|sorry|excuse me|right|good|great|fine|hm|hmm|um|ah|oh|alright|thanks|cool|sure|perfect|nice}{,|.|} ",
    "{one more thing|next question|quick question|another question|a question|one question|a stupid question maybe|just asking|i wonder|i was wondering|something else|by the way|btw|to begin with|first|for a start|second|next|finally|also}{,|:|.} ",
    "{i am new here|i am a beginner|i am not an expert|i read the readme|i am curious|i am confused|i am stuck|i have no idea|i need help|maybe you know|you may know this|can you help me|could you help|help me out|sorry to bother you}{,|.|:} ",
)  # fmt: skip
CLOSERS = (
    " please", ", please", " for me", " thanks", ", thanks", ", thank you", " then", " again", " now", " exactly", " actually", ", do you know",
    ", can you tell me", " here", " in prima", " with prima", ", in short", " really", " anyway", " {mate|friend|buddy}", ", i forgot", ", i wonder",
    " today", " by the way", ", if i may ask", " in the end", ", {any idea|any hint|any hints|any advice}", ", in a few words", ", quickly", " at all",
    ", just curious", ". thanks in advance", ". please be brief", ". i am new to this", ". i need to know",
)  # fmt: skip
# Exchanged now and then in any question, so that no single word decides.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "what is": ("what's", "whats", "what would be", "what exactly is"),
    "how do i": ("how can i", "how could i", "how would i", "how might i", "how should i", "how am i to", "how does one"),
    "which": ("what",),
    "do i need": ("must i have", "do i have to have", "is it necessary to have", "should i have"),
    "i want to": ("i wanna", "i'd like to", "i would love to", "id like to", "i intend to"),
    "tell me": ("let me know", "please tell me", "can you tell me", "would you tell me"),
    "explain": ("clarify", "shed light on", "make clear"),
    "command": ("cmd", "call", "subcommand", "instruction"),
    "can i": ("could i", "may i", "am i able to"),
    "show": ("present", "reveal", "give"),
    "computer": ("machine", "PC"),
    "do not": ("don't", "dont"),
    "i am": ("i'm", "im"),
    "i have": ("i've got", "i got", "ive got", "i own"),
    "mean": ("stand for", "signify"),
    "happens": ("occurs", "goes on"),
    "does": ("would", "will"),
    "you": ("u", "ya"),
    "please": ("pls", "plz", "kindly"),
    "about": ("regarding", "on", "concerning"),
    "start": ("launch", "run", "begin"),
}
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def dress(question: str, rng: Random) -> str:
    """A wording of `question` as a person may type it."""
    text = _exchange(question, rng)
    if rng.random() < 0.28:
        text = expand(rng.choice(OPENERS), rng) + text
    if rng.random() < 0.16:
        text += expand(rng.choice(CLOSERS), rng)
    if rng.random() < 0.10:
        text = _slip(text, rng)
    return _finish(text, rng)


def punctuate(question: str, rng: Random) -> str:
    """Only the capital letter and the end mark vary."""
    return _finish(question, rng)


def _exchange(text: str, rng: Random) -> str:
    for word, others in SYNONYMS.items():
        if rng.random() < 0.18 and f" {word} " in f" {text} ":
            text = f" {text} ".replace(f" {word} ", f" {rng.choice(others)} ", 1).strip()
    return text


def _slip(text: str, rng: Random) -> str:
    at = rng.randrange(len(text))
    if not text[at].isalpha():
        return text
    swapped = text[:at] + text[at + 1 : at + 2] + text[at] + text[at + 2 :]
    return rng.choice(
        (text[:at] + text[at + 1 :], text[:at] + rng.choice(ALPHABET) + text[at + 1 :], swapped, text[:at] + text[at] + text[at:])
    )


def _finish(text: str, rng: Random) -> str:
    style = rng.random()
    if style < 0.55:
        return _capital(text) + rng.choices(("?", ".", "!", ""), (0.80, 0.10, 0.04, 0.06))[0]
    if style < 0.80:
        return text + rng.choices(("", "?"), (0.6, 0.4))[0]
    return _capital(text) if style < 0.9 else text.lower() + rng.choice(("?", "", " ?", "??", "..."))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:].replace(" i ", " I ").replace(" i'", " I'").replace("openai", "OpenAI").replace(" llm", " LLM")
