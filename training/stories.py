"""Short stories from the grammar of `stories.toml`, about an animal or a person that the reader asks for."""

from __future__ import annotations

from random import Random

from training.phrases import expand
from training.tables import phrases, read_table


class Stories:
    """Asks for stories and tells them."""

    def __init__(self) -> None:
        self.table = read_table("stories.toml")

    def ask(self, rng: Random) -> tuple[str, str]:
        """A question in lower case without its end mark, and a story of about sixty words."""
        hero = rng.choice(phrases(self.table, "heroes"))
        asks = phrases(self.table, "asks" if rng.random() < 0.8 else "asks_for_any")
        named = f"{_article(hero)} {hero}" if rng.random() < 0.9 else f"the {hero}"
        return expand(rng.choice(asks).replace("HERO", named), rng), self.tell(hero, rng)

    def tell(self, hero: str, rng: Random) -> str:
        told = expand(self.table["story"].replace("HERO", hero), rng, self.table["phrases"])
        described = told.split("ARTICLE ", 1)[1]
        return told.replace("ARTICLE", _article(described))


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeio" else "a"
