"""Prints how many held-out questions a file answers, through torch: `python -m tests.builtin.measure [FILE]`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from tests.builtin.rewordings import load_cases, score
from training.answer import Answerer
from training.train import GGUF_FILE


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else GGUF_FILE
    cases = load_cases()
    chats = [[(message["role"], message["content"]) for message in case.messages] for case in cases]
    answers = iter(Answerer(path).answer_all(chats))
    result = score(cases, lambda _messages: next(answers))
    asked, wrong = Counter(case.kind for case in cases), Counter(case.kind for case, _ in result.wrong)
    for case, answer in result.wrong:
        print(f"{case.kind}: {case.ask}\n    {answer}")
    for kind, n_asked in asked.items():
        print(f"{kind}: {n_asked - wrong[kind]} of {n_asked}")
    print(f"{result.n_right} of {result.n_asked} right: {result.share:.1%}")


if __name__ == "__main__":
    main()
