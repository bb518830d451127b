"""What the demo's LLM reads while it is trained: endless documents about train-side entities, with loss weights.

A document is a list of pieces, each with the weight that its tokens have in the loss: names and values in a passage
cannot be foreseen, answers can.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from genpoe_plugin.demo.world import (
    Entity,
    ask,
    draw_entity,
    entities_of,
    namesake,
    write_article,
    write_report,
)
from genpoe_plugin.passages import Passage
from genpoe_plugin.prompts import closed_book_prompt, knowledge_block

Document = list[tuple[str, float]]
PASSAGE, QUESTION, ANSWER = 0.1, 0.1, 1.0


class Documents:
    """A seeded stream of documents of four kinds; no two entities of a stream have the same name."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"genpoe-documents-{seed}")
        self.entities: Iterator[Entity] = entities_of(self.rng, "train", namesakes=0.0)

    def _alike(self, count: int) -> list[Entity]:
        """Entities of one kind, mostly: telling them apart takes their names."""
        entities = [next(self.entities)]
        while len(entities) < count:
            draw = self.rng.random()
            if draw < 0.05:
                entity = namesake(self.rng, self.rng.choice(entities))
            else:
                entity = draw_entity(self.rng, entities[0].kind) if draw < 0.93 else next(self.entities)
            if entity.side == "train" and entity.name not in {other.name for other in entities}:
                entities.append(entity)
        return entities

    def _other_than(self, entity: Entity) -> Entity:
        """Another train-side entity of the same kind, often a namesake."""
        while True:
            other = namesake(self.rng, entity) if self.rng.random() < 0.3 else draw_entity(self.rng, entity.kind)
            if other.side == "train" and other.name != entity.name:
                return other

    def _articles(self, count: int) -> list[tuple[Entity, Passage]]:
        return [(entity, write_article(self.rng, entity, "0")) for entity in self._alike(count)]

    def _answered(self, entity: Entity, attribute: int) -> Document:
        fact = entity.facts[attribute]
        prompt = closed_book_prompt(ask(self.rng, entity, fact, "0").question)
        return [(prompt, QUESTION), (f" {fact.value}\n", ANSWER)]

    def closed_book(self, questions: int) -> Document:
        """Questions about entities that no passage tells of: what kind of answer each expects."""
        answered = [self._answered(next(self.entities), self.rng.randrange(4)) for _ in range(questions)]
        return [piece for document in answered for piece in document]

    def rag(self, passages: int) -> Document:
        """Passages, some of which answer nothing, and every question about the others."""
        articles = self._articles(passages)
        strings = [
            write_report(self.rng, entity, "0").string if number and self.rng.random() < 0.15 else passage.string
            for number, (entity, passage) in enumerate(articles)
        ]
        asked = [
            (entity, attribute)
            for (entity, passage), string in zip(articles, strings, strict=True)
            if string == passage.string
            for attribute in range(len(entity.facts))
        ]
        self.rng.shuffle(strings)
        self.rng.shuffle(asked)
        answered = [piece for entity, attribute in asked for piece in self._answered(entity, attribute)]
        return [(knowledge_block(strings), PASSAGE), *answered]

    def restatement(self, passages: int, sentences: int) -> Document:
        """Passages and some of their sentences again, word for word: a value depends on whose sentence it is in."""
        articles = self._articles(passages)
        stated = [
            (sentence.rstrip(".") + ".", fact.value)
            for entity, passage in articles
            for fact in entity.facts
            for sentence in passage.text.split(". ")
            if sentence.find(f" {fact.value}") > sentence.find(entity.short) >= 0
        ]
        self.rng.shuffle(stated)
        document = [(knowledge_block([passage.string for _, passage in articles]), PASSAGE)]
        for sentence, value in stated[:sentences]:
            before, _, after = sentence.partition(f" {value}")
            document += [(before, QUESTION), (f" {value}", ANSWER), (f"{after}\n", QUESTION)]
        return document

    def relevance(self, pairs: int) -> Document:
        """Queries with passages, and whether the one answers the other."""
        document: Document = []
        for _ in range(pairs):
            entity = next(self.entities)
            query = ask(self.rng, entity, self.rng.choice(entity.facts), "0").question
            relevant = self.rng.random() < 0.5
            passage = write_article(self.rng, entity if relevant else self._other_than(entity), "0").string
            parts = [f"Query: {query}\n", f"Passage: {passage}\n"]
            self.rng.shuffle(parts)
            document += [("".join(parts) + "Relevant:", QUESTION), (" yes\n" if relevant else " no\n", ANSWER)]
        return document
