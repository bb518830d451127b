"""Tiny data sets in the very forms of the hub and of the authors' files, with what has to be read from them.

A question stands for each data set; `HUB_ROWS` has it as a row of the hub, `write_hub` as a folder that the library
``datasets`` loads as it loads the hub's, `write_original` as the authors publish it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

Asked = tuple[str, list[str], list[tuple[str, str, bool]]]  # question, answers, passages (title, text, gold)

PARAGRAPH = "Super Bowl 50 was won by the Denver Broncos, who beat the Carolina Panthers 24 to 10."
SQUAD_QUESTIONS = [
    ("Which NFL team won Super Bowl 50?", ["Denver Broncos", "Denver Broncos", "the Denver Broncos"]),
    ("Whom did they beat?", ["Carolina Panthers"]),
]
STORY = [f"word{number}" for number in range(230)]  # a summary of three passages
HOTPOT_PARAGRAPHS = [
    ("Ed Wood (film)", ["Ed Wood is a 1994 film.", " It is about Ed Wood."]),
    ("Scott Derrickson", ["Scott Derrickson is an American director.", " He lives in Los Angeles."]),
    ("Nothing", [""]),
    ("Ed Wood", ["Ed Wood was an American filmmaker.", " He was an actor as well."]),
]
TWO_WIKI_PARAGRAPHS = [
    ("Xawery Żuławski", ["Xawery Żuławski is a film director.", "He is the son of Małgorzata Braunek."]),
    ("Maheen Khan", ["Maheen Khan is a designer."]),
]
EDITS = [
    ("{} is associated with the sport of", "Dudley Town F.C.", "cricket", "association football"),
    ("{} was created in the country of", "cricket", "the U.S.", "England"),
]
WORDINGS = ["What is the capital of the country of Dudley Town's sport?", "Which city is the capital of its country?"]
POPQA = {
    **{"id": 4222362, "subj": "George Rankin", "prop": "occupation", "obj": "politician", "subj_id": 1850297},
    **{"prop_id": 22, "obj_id": 2834605, "s_aliases": '["George James Rankin"]', "o_aliases": '["polit.", "pol"]'},
    **{"s_uri": "http://www.wikidata.org/entity/Q5543720", "o_uri": "http://www.wikidata.org/entity/Q82955"},
    **{"s_wiki_title": "George Rankin", "o_wiki_title": "Politician", "s_pop": 142, "o_pop": 25692},
    **{"question": "What is George Rankin's occupation?", "possible_answers": '["politician", "polit.", "pol"]'},
}

EXPECTED: dict[str, list[Asked]] = {
    "squad": [
        (SQUAD_QUESTIONS[0][0], ["Denver Broncos", "the Denver Broncos"], [("Super Bowl 50", PARAGRAPH, True)]),
        (SQUAD_QUESTIONS[1][0], ["Carolina Panthers"], [("Super Bowl 50", PARAGRAPH, True)]),
    ],
    "narrativeqa": [
        (
            "Who is Mark Hunter?",
            ["A student in Phoenix.", "He is a student"],
            [("Pump Up the Volume", " ".join(STORY[at:to]), True) for at, to in ((0, 100), (100, 200), (200, 230))],
        )
    ],
    "hotpotqa": [
        (
            "Were Scott Derrickson and Ed Wood of the same nationality?",
            ["yes"],
            [
                ("Ed Wood (film)", "Ed Wood is a 1994 film. It is about Ed Wood.", False),
                ("Scott Derrickson", "Scott Derrickson is an American director. He lives in Los Angeles.", True),
                ("Ed Wood", "Ed Wood was an American filmmaker. He was an actor as well.", True),
            ],
        )
    ],
    "2wiki": [
        (
            "Who is the mother of the director of Polish-Russian War?",
            ["Małgorzata Braunek"],
            [
                (
                    "Xawery Żuławski",
                    "Xawery Żuławski is a film director. He is the son of Małgorzata Braunek.",
                    True,
                ),
                ("Maheen Khan", "Maheen Khan is a designer.", False),
            ],
        )
    ],
    "mquake": [
        (
            wording,
            ["Washington, D.C.", "Washington"],
            [
                ("", "Dudley Town F.C. is associated with the sport of cricket.", True),
                ("", "cricket was created in the country of the U.S.", True),
            ],
        )
        for wording in WORDINGS
    ],
    "popqa": [("What is George Rankin's occupation?", ["politician", "polit.", "pol"], [])],
    "nq": [("who wrote the hobbit", ["Tolkien"], [])],
    "tqa": [("Who wrote The Hobbit?", ["Tolkien", "J. R. R. Tolkien"], [])],
}
# Tasks with metrics of their own, outside the group genpoe_all.
EXPECTED_OF_OTHERS: dict[str, list[Asked]] = {
    "conflict": [
        (
            "who won super bowl 50",
            ["Rome"],
            [("", "Super Bowl 50 was won by Rome, who beat the Carolina Panthers.", True)],
        )
    ],
    "unanswerable": [("Which NFL team lost Super Bowl 49?", [], [("Super Bowl 50", PARAGRAPH, False)])],
}


def _multi_hop(name: str, paragraphs: Sequence[tuple[str, list[str]]], supporting: Sequence[tuple[str, int]]) -> Any:
    question, (answer,), _ = EXPECTED[name][0]
    titles, facts = zip(*paragraphs, strict=True), zip(*supporting, strict=True)
    return {
        **{"id": "5a8b57f2", "question": question, "answer": answer, "type": "comparison"},
        "supporting_facts": dict(zip(("title", "sent_id"), map(list, facts), strict=True)),
        "context": dict(zip(("title", "sentences"), map(list, titles), strict=True)),
    }


def _hop(edit: Sequence[str]) -> dict[str, Any]:
    prompt, subject, answer, _ = edit
    return {"question": "Which?", "cloze": prompt.format(subject), "answer": answer, "answer_alias": ["x"]}


_CASE = {
    **{"case_id": 1561, "questions": WORDINGS, "answer": "London", "answer_alias": ["London UK"]},
    **{"new_answer": "Washington, D.C.", "new_answer_alias": ["Washington"]},
    **{"single_hops": [_hop(edit) for edit in EDITS], "new_single_hops": [_hop(edit) for edit in EDITS]},
}
_DOCUMENT = "0025577043f5090cd603c6aea60f26e236195594"
_TITLE = "Pump Up the Volume"

HUB_ROWS: dict[str, list[dict[str, Any]]] = {
    "squad": [
        {
            **{"id": f"56be4db{number}", "title": "Super_Bowl_50", "context": PARAGRAPH, "question": question},
            "answers": {"text": answers, "answer_start": [PARAGRAPH.index("Denver")] * len(answers)},
        }
        for number, (question, answers) in enumerate(SQUAD_QUESTIONS)
    ],
    "narrativeqa": [
        {
            "document": {
                **{"id": _DOCUMENT, "kind": "movie", "url": "http://x", "file_size": 54078, "word_count": 11499},
                **{"start": "Happy Harry", "end": "by Martin", "text": "The whole story. " * 50},
                "summary": {"text": " ".join(STORY), "tokens": STORY, "url": "http://y", "title": _TITLE},
            },
            "question": {"text": "Who is Mark Hunter?", "tokens": ["Who", "is", "Mark", "Hunter", "?"]},
            "answers": [{"text": answer, "tokens": answer.split()} for answer in EXPECTED["narrativeqa"][0][1]],
        }
    ],
    "hotpotqa": [
        _multi_hop("hotpotqa", HOTPOT_PARAGRAPHS, [("Scott Derrickson", 0), ("Ed Wood", 0), ("Ed Wood", 1)])
        | {"level": "hard"}
    ],
    "2wiki": [
        _multi_hop("2wiki", TWO_WIKI_PARAGRAPHS, [("Xawery Żuławski", 1)])
        | {"evidences": [["Polish-Russian War", "director", "Xawery Żuławski"]]}
    ],
    "mquake": [
        {
            **_CASE,
            "requested_rewrite": [
                {
                    **{"prompt": prompt, "relation_id": "P641", "subject": subject, "question": "Which?"},
                    **{"target_new_id": "Q1", "target_new_str": new, "target_true_id": "Q2", "target_true_str": true},
                }
                for prompt, subject, new, true in EDITS
            ],
            "orig_triples_labeled": [["Dudley Town F.C.", "sport", "association football"]],
            "split": {"1": ["test_edited"], "3000": ["test_edited"]},
        }
    ],
    "conflict": [
        {
            "question": "who won super bowl 50",
            **{"org_context": "Super Bowl 50 was won by the Denver Broncos, who beat the Carolina Panthers."},
            **{"org_answer": ["Denver Broncos", "Broncos"], "sub_answer": ["Rome"]},
            **{"sub_context": "Super Bowl 50 was won by Rome, who beat the Carolina Panthers."},
        }
    ],
    "unanswerable": [
        {
            **{"id": "5ad3", "title": "Super_Bowl_50", "context": PARAGRAPH},
            **{"question": "Which NFL team lost Super Bowl 49?", "answers": {"text": [], "answer_start": []}},
        }
    ],
    "popqa": [POPQA],
    "nq": [{"question": "who wrote the hobbit", "answer": ["Tolkien", "Tolkien"]}],
    "tqa": [
        {
            **{"question": "Who wrote The Hobbit?", "question_id": "tc_1", "question_source": "http://x"},
            "answer": {
                **{"aliases": ["J. R. R. Tolkien", "Tolkien"], "normalized_aliases": ["j r r tolkien", "tolkien"]},
                **{"value": "Tolkien", "normalized_value": "tolkien", "type": "WikipediaEntity"},
            },
        }
    ],
}

# Name on the hub, configuration, and the files of its splits.
HUB_FILES: dict[str, tuple[str, str, dict[str, str]]] = {
    "squad": ("rajpurkar/squad", "plain_text", {split: f"plain_text/{split}" for split in ("train", "validation")}),
    "narrativeqa": ("deepmind/narrativeqa", "default", {s: f"data/{s}" for s in ("train", "validation", "test")}),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor", {s: f"distractor/{s}" for s in ("train", "validation")}),
    "2wiki": ("framolfese/2WikiMultihopQA", "default", {s: f"data/{s}" for s in ("train", "validation", "test")}),
    "mquake": ("henryzhongsc/MQuAKE-Remastered", "default", {s: f"data/{s}" for s in ("CF3k", "CF9k", "CF6334", "T")}),
    "conflict": ("pminervini/NQ-Swap", "default", {"dev": "data/dev"}),
    "unanswerable": ("rajpurkar/squad_v2", "squad_v2", {s: f"squad_v2/{s}" for s in ("train", "validation")}),
    "popqa": ("akariasai/PopQA", "default", {"test": "test.tsv"}),
    "nq": ("google-research-datasets/nq_open", "nq_open", {s: f"nq_open/{s}" for s in ("train", "validation")}),
    "tqa": ("mandarjoshi/trivia_qa", "unfiltered.nocontext", {s: f"unfiltered/{s}" for s in ("train", "validation")}),
}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_popqa(path: Path) -> Path:
    """As pandas writes the authors' table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*POPQA], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerow(POPQA)
    return path


def write_hub(root: Path) -> None:
    """All data sets, in folders laid out as the hub's repositories; HotpotQA with its other configuration as well.

    Only the split that is asked for has the questions; in the others the question is "no".
    """
    for name, (repository, config, files) in HUB_FILES.items():
        folder = root / repository
        if name == "popqa":
            write_popqa(folder / "test.tsv")
            continue
        asked = {"narrativeqa": "test", "mquake": "CF3k", "conflict": "dev"}.get(name, "validation")
        for split, file in files.items():
            rows = HUB_ROWS[name] if split == asked else [_renamed(row) for row in HUB_ROWS[name]]
            write_parquet(folder / f"{file}-00000-of-00001.parquet", rows)
        configs = [{"config_name": config, "data_files": _listed(files)}]
        if name == "hotpotqa":
            configs.append({"config_name": "fullwiki", "data_files": _listed(files)})
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def _listed(files: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"split": split, "path": f"{file}-*"} for split, file in files.items()]


def _renamed(row: Mapping[str, Any]) -> dict[str, Any]:
    other = {"question": {"text": "no", "tokens": ["no"]} if isinstance(row.get("question"), dict) else "no"}
    return {**row, **({"questions": ["no"]} if "questions" in row else other)}


def write_original(name: str, folder: Path) -> Path:
    """The data set as its authors publish it: a file, or for NarrativeQA a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "popqa":
        return write_popqa(folder / "popQA.tsv")
    if name == "narrativeqa":
        return _write_narrativeqa(folder / "narrativeqa")
    if name == "squad":
        qas = [
            {"answers": [{"answer_start": 25, "text": text} for text in answers], "question": question, "id": "56be"}
            for question, answers in SQUAD_QUESTIONS
        ]
        content: Any = {
            "data": [{"title": "Super_Bowl_50", "paragraphs": [{"context": PARAGRAPH, "qas": qas}]}],
            "version": "1.1",
        }
    elif name == "mquake":
        edits = [
            {
                **{"prompt": prompt, "relation_id": "P641", "target_new": {"str": new, "id": "Q1"}},
                **{"target_true": {"str": true, "id": "Q2"}, "subject": subject, "question": "Which?"},
            }
            for prompt, subject, new, true in EDITS
        ]
        content = [{**_CASE, "requested_rewrite": edits, "orig": {"triples": [["Q5311995", "P641", "Q2736"]]}}]
    else:
        (row,) = HUB_ROWS[name]
        pairs = {field: list(zip(*row[field].values(), strict=True)) for field in ("supporting_facts", "context")}
        content = [{**{key: value for key, value in row.items() if key != "id"}, "_id": row["id"], **pairs}]
    names = {"squad": "dev-v1.1", "hotpotqa": "hotpot_dev_distractor_v1", "2wiki": "dev", "mquake": "MQuAKE-CF-3k"}
    path = folder / f"{names[name]}.json"
    path.write_text(json.dumps(content))
    return path


def _write_narrativeqa(folder: Path) -> Path:
    question, answers, _ = EXPECTED["narrativeqa"][0]
    summary = "\n\n " + " ".join(STORY[:150]) + "\n\n" + " ".join(STORY[150:])
    tables = {
        "documents.csv": [
            "document_id,set,kind,story_url,story_file_size,wiki_url,wiki_title,story_word_count,story_start,story_end",
            [_DOCUMENT, "test", "movie", "http://x", 54078, "http://y", _TITLE, 11499, "Happy", "by Martin"],
        ],
        "third_party/wikipedia/summaries.csv": [
            "document_id,set,summary,summary_tokenized",
            ["1", "train", "Other.", "Other ."],
            [_DOCUMENT, "test", summary, " ".join(STORY)],
        ],
        "qaps.csv": [
            "document_id,set,question,answer1,answer2,question_tokenized,answer1_tokenized,answer2_tokenized",
            ["1", "train", "no", "a", "b", "no", "a", "b"],
            [_DOCUMENT, "test", question, *answers, question, *answers],
        ],
    }
    for name, (header, *rows) in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([str(header).split(","), *rows])
    return folder
