"""What the demo's LLM reads while it is trained: endless documents about train-side entities, with loss weights.

A document is a list of pieces, each with the weight that its tokens have in the loss: names and values in a passage
cannot be foreseen, answers can.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from genpoe_plugin.demo.world import (
    Entity,
    Fact,
    ask,
    draw_entity,
    entities_of,
    namesake,
    state,
    title_of,
    write_article,
    write_report,
)
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block

Document = list[tuple[str, float]]
PASSAGE, QUESTION, ANSWER = 0.1, 0.1, 1.0
NAMESAKES, REPORTS = 0.2, 0.15
"""Shares of the entities that are named like another of their document, and of the passages that answer nothing."""


class Documents:
    """A seeded stream of documents of five kinds, from the barest to whole prompts of the mode ``rag``."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"genpoe-documents-{seed}")
        self.entities: Iterator[Entity] = entities_of(self.rng, "train", namesakes=0.0)

    def _alike(self, count: int) -> list[Entity]:
        """Entities of one kind with different names."""
        entities = [next(self.entities)]
        while len(entities) < count:
            if self.rng.random() < NAMESAKES:
                entity = namesake(self.rng, self.rng.choice(entities))
            else:
                entity = draw_entity(self.rng, entities[0].kind)
            if entity.side == "train" and entity.name not in {other.name for other in entities}:
                entities.append(entity)
        return entities

    def _answered(self, entity: Entity, fact: Fact, wordings: int | None = None) -> Document:
        question = ask(self.rng, entity, fact, "0", wordings).question
        return [(closed_book_prompt(question), QUESTION), (f" {fact.value}\n", ANSWER)]

    def _questions(self, asked: Sequence[tuple[Entity, Fact]], wordings: int | None = None) -> Document:
        return [piece for entity, fact in asked for piece in self._answered(entity, fact, wordings)]

    def closed_book(self, questions: int) -> Document:
        """Questions about entities that no passage tells of: what kind of answer each expects."""
        entities = [next(self.entities) for _ in range(questions)]
        return self._questions([(entity, self.rng.choice(entity.facts)) for entity in entities])

    def values(self, count: int) -> Document:
        """One value of each entity after its name and nothing else, then each asked for by the name alone."""
        attribute = self.rng.randrange(4)
        entities = self._alike(count)
        lines = [f"{title_of(entity)}: {entity.facts[attribute].value}." for entity in entities]
        self.rng.shuffle(entities)
        document = [(knowledge_block(lines), PASSAGE)]
        for entity in entities:
            document += [
                (f"Question: What of {entity.name}?\nAnswer:", QUESTION),
                (f" {entity.facts[attribute].value}\n", ANSWER),
            ]
        return document

    def statements(self, count: int) -> Document:
        """One sentence about each entity, mostly all about the same attribute, then a question about each."""
        attribute = self.rng.randrange(4) if self.rng.random() < 0.7 else None
        asked = [
            (entity, self.rng.choice(entity.facts) if attribute is None else entity.facts[attribute])
            for entity in self._alike(count)
        ]
        lines = [f"{title_of(entity)}: {state(self.rng, entity, fact)}" for entity, fact in asked]
        self.rng.shuffle(asked)
        return [(knowledge_block(lines), PASSAGE), *self._questions(asked)]

    def brief(self, count: int) -> Document:
        """The facts of each entity in the first wording of each, then all the questions in theirs."""
        entities = self._alike(count)
        lines = []
        for entity in entities:
            facts = self.rng.sample(entity.facts, len(entity.facts))
            lines.append(f"{title_of(entity)}: {' '.join(state(self.rng, entity, fact, 1) for fact in facts)}")
        asked = [(entity, fact) for entity in entities for fact in entity.facts]
        self.rng.shuffle(asked)
        return [(knowledge_block(lines), PASSAGE), *self._questions(asked, 1)]

    def rag(self, passages: int) -> Document:
        """Whole passages, best first as a prompt has them: all questions about the first, at times one more."""
        entities = self._alike(passages)
        strings = [write_article(self.rng, entities[0], "0").string]
        others = []
        for entity in entities[1:]:
            if self.rng.random() < REPORTS:
                strings.append(write_report(self.rng, entity, "0").string)
            else:
                strings.append(write_article(self.rng, entity, "0").string)
                others.append(entity)
        asked = [(entities[0], fact) for fact in entities[0].facts]
        if others and self.rng.random() < 0.5:
            other = self.rng.choice(others)
            asked.append((other, self.rng.choice(other.facts)))
        self.rng.shuffle(asked)
        return [(knowledge_block(strings), PASSAGE), *self._questions(asked)]
