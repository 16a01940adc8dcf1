"""Multiple-choice questions from a text: which word comes next in its sentence?

    python -m benchmarks.cloze TEXT --output cloze.jsonl [--questions 500] [--seed 0]
    lrpq evaluate DIR --reference MODEL --tasks cloze.jsonl

The context are the words of a sentence up to its last content word; the choices are that word and three others that
end sentences of the same text in the same way: as long (see LENGTHS), capitals alike, drawn as often as they occur, so
that neither length nor rarity gives the answer away. Content words are letters only, at least MIN_LETTERS of them, and
no function words. The set measures what the text asks for, no skill with a name: use it for the difference of two
models, and another text than was calibrated on. Nothing of lrpq is imported.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np

MIN_LETTERS = 4
MIN_CONTEXT_WORDS = 8
WRONG = 3
LENGTHS = (5, 7, 9, 12)  # classes of letters: 4-5, 6-7, 8-9, 10-12, more
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """about above after again also although among because been before being below between both could does doing
        down during each either even ever every from further have having hers herself himself however into itself just
        like many might more most much must myself neither never once only other ours over same several shall should
        since some such than that their theirs them themselves then there these they this those though through thus
        under until upon very well were what when where whether which while whom whose will with within without would
        your yours""",
    )
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"“(]?[A-Z])")


def sentences(text: str) -> list[list[str]]:
    """Words of every sentence; headings (WikiText's begin with =) and sentences with <unk> are left out."""
    paragraphs = (line.strip() for line in text.splitlines())
    found = (s for line in paragraphs if line and not line.startswith("=") for s in SENTENCE_END.split(line))
    return [sentence.split() for sentence in found if "<unk>" not in sentence]


def cut(words: list[str]) -> tuple[str, str] | None:
    """A sentence's context and its last content word; None where there is no such word or too little before it."""
    for position in range(len(words) - 1, MIN_CONTEXT_WORDS - 1, -1):
        word = words[position].rstrip(".,;:!?\"”)'")
        if len(word) >= MIN_LETTERS and word.isalpha() and word.lower() not in FUNCTION_WORDS:
            return " ".join(words[:position]), word
    return None


def alike(word: str) -> tuple[int, bool]:
    """What the choices of a question have in common."""
    return int(np.searchsorted(LENGTHS, len(word))), word[0].isupper()


def build(text: str, *, num_questions: int, seed: int) -> tuple[list[dict[str, object]], int]:
    """The questions, in the text's order, and the number of sentences that make one."""
    cuts = [found for words in sentences(text) if (found := cut(words)) is not None]
    pools: dict[tuple[int, bool], list[str]] = {}
    for _, word in cuts:
        pools.setdefault(alike(word), []).append(word)
    usable = [(context, word) for context, word in cuts if len(set(map(str.lower, pools[alike(word)]))) > WRONG]
    random = np.random.default_rng(seed)
    chosen = sorted(random.permutation(len(usable))[:num_questions].tolist())
    questions: list[dict[str, object]] = []
    for number, (context, word) in enumerate(usable[i] for i in chosen):
        choices = [word]
        pool = pools[alike(word)]
        while len(choices) <= WRONG:
            other = pool[int(random.integers(len(pool)))]
            if other.lower() not in map(str.lower, choices):
                choices.append(other)
        order = random.permutation(len(choices)).tolist()
        label = order.index(0)
        # the space is the context's, so that acc_norm counts the letters of the word
        questions.append({"id": number, "ctx": f"{context} ", "choices": [choices[i] for i in order], "label": label})
    return questions, len(usable)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="plain text, UTF-8")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    questions, available = build(text, num_questions=arguments.questions, seed=arguments.seed)
    if not questions:
        parser.error(f"{arguments.text}: no sentence makes a question; give a longer text of whole sentences")
    with arguments.output.open("w", encoding="utf-8") as file:
        for question in questions:
            file.write(json.dumps(question, ensure_ascii=False) + "\n")
    print(f"{len(questions)} questions of {available} sentences that make one: {arguments.output}")


if __name__ == "__main__":
    main()
