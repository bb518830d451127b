"""A harder world than the demo's: who employs and who teaches whom.

Every person has two passages, one about work and one about lessons. In each, the person is once the subject and once
the object of the same verb, so only word order decides the answer ("Ado employs Bek. Cor employs Ado."). Answers are
surnames. The two sides have different surnames, so no answer of the test side was seen in training.
"""

from __future__ import annotations

import random

from genpoe_plugin.data.passages import Passage
from genpoe_plugin.data.questions import Question, RetrievedPassage
from genpoe_plugin.demo import lexicon
from genpoe_plugin.demo.world import Side, side_of

RELATIONS = {
    "work": ("{subject} employs {object}.", "Whom does {name} employ?", "Who employs {name}?"),
    "lessons": ("{subject} teaches {object}.", "Whom does {name} teach?", "Who teaches {name}?"),
}


def surnames(side: Side) -> list[str]:
    """All surnames of one side."""
    names = (start + end for start in lexicon.SURNAME_STARTS for end in lexicon.SURNAME_ENDS)
    return [name for name in names if side_of(name) == side]


def related_questions(side: Side, people: int, seed: int) -> list[Question]:
    """Four questions about each of ``people`` persons, in random order.

    A question has four passages: the one that states the answer, the person's other one, and two about other people.
    """
    rng = random.Random(f"genpoe-relations-{side}-{seed}")
    known = surnames(side)
    written: list[tuple[Passage, Passage]] = []
    items: list[tuple[str, str, int, int]] = []
    for person in range(people):
        own, *others = rng.sample(known, 1 + 2 * len(RELATIONS))
        name = f"{rng.choice(lexicon.FIRST_NAMES)} {own}"
        passages = []
        for number, (statement, *templates) in enumerate(RELATIONS.values()):
            answers = others[2 * number : 2 * number + 2]
            sentences = [
                statement.format(subject=own, object=answers[0]),
                statement.format(subject=answers[1], object=own),
            ]
            rng.shuffle(sentences)
            passages.append(Passage(f"{person}-{number}", name, " ".join(sentences)))
            items += [
                (template.format(name=name), answer, person, number)
                for template, answer in zip(templates, answers, strict=True)
            ]
        written.append((passages[0], passages[1]))
    questions = []
    for question, answer, person, number in items:
        chosen = [written[person][number], written[person][1 - number]]
        while len(chosen) < 4:
            other = rng.choice(rng.choice(written))
            if other not in chosen and answer not in other.text:
                chosen.append(other)
        ranked = (RetrievedPassage(passage, 0.0, rank, has_answer=rank == 1) for rank, passage in enumerate(chosen, 1))
        questions.append(Question(question, (answer,), tuple(ranked)))
    rng.shuffle(questions)
    return questions
