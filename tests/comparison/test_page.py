"""The page in a real browser, on a desk and on a phone."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from benchmarks.synthetic_results import documents, genpoe_facts, write_run
from genpoe_plugin.comparison.leaderboard import Comparison, compare
from genpoe_plugin.comparison.page import page
from genpoe_plugin.comparison.plots import COLOURS, MARKERS, plots
from genpoe_plugin.prompts import PROMPT_MODES
from tests.comparison.browser import CHROMIUM, look

N = 90
WIDTHS = (1440, 768, 390, 360)
SCRIPT = """() => {
  const inside = [], small = [];
  for (const svg of document.querySelectorAll("svg")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    for (const text of svg.querySelectorAll("text")) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 1 || box.right > frame.right + 1) inside.push(text.textContent);
      if (box.height < 8) small.push(text.textContent);
    }
  }
  const explorer = document.querySelector(".explorer");
  const [first, second, kind] = explorer.querySelectorAll("select");
  const shown = {};
  for (const value of ["0", "1", "2"]) {
    kind.value = value;
    kind.dispatchEvent(new Event("change"));
    shown[value] = [...explorer.querySelectorAll("summary")].map(entry => entry.textContent);
  }
  const entry = explorer.querySelector("details");
  entry.open = true;
  entry.dispatchEvent(new Event("toggle"));
  for (const prompt of entry.querySelectorAll(".prompt")) prompt.open = true;
  const marks = [...entry.querySelectorAll("mark")].map(mark => mark.textContent);
  const filters = document.querySelectorAll("#filters select"), rows = {};
  const visible = () => [...document.querySelectorAll("table.board tbody tr")].filter(row => row.offsetParent !== null);
  for (const [name, value] of [["", ""], ["mode", "rag"], ["task", "u"], ["model", "llm"]]) {
    for (const select of filters) select.value = select.dataset.filter === name ? value : "";
    document.getElementById("filters").dispatchEvent(new Event("change"));
    rows[name] = visible().map(row => row.querySelector("th").textContent);
  }
  for (const select of filters) select.value = "";
  document.getElementById("filters").dispatchEvent(new Event("change"));
  const named = box => box.labels?.length || box.getAttribute("aria-label") || box.getAttribute("aria-labelledby");
  const boxes_with_roles = document.querySelectorAll("select, [role=region], [role=group], section");
  const nameless = [...boxes_with_roles].filter(box => !named(box));
  const boxes = [...document.querySelectorAll("main *")].filter(element =>
    !element.closest(".scroll, svg") && element.clientWidth && getComputedStyle(element).display !== "inline");
  const wide = boxes.filter(box => box.scrollWidth > box.clientWidth + 1).map(box => box.outerHTML.slice(0, 90));
  return {
    scroll: document.documentElement.scrollWidth, client: document.documentElement.clientWidth, wide, inside, small,
    marks, rows, nameless: nameless.map(element => element.outerHTML.slice(0, 90)),
    shown, opened: entry.innerText, asked: performance.getEntriesByType("resource").map(entry => entry.name),
    svgs: [...document.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width).length,
    red: [...document.querySelectorAll("tr.wrong td")].map(cell => getComputedStyle(cell).color)[0],
  };
}"""


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Four modes with controls and seeds, one of them flagged; hostile texts; two tasks."""
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    docs = documents(N, passages=3)
    docs[0]["question"] = "</script><b>" + "long" * 80
    shares = {"retrieved": 0.6, "gold": 0.9, "shuffled": 0.1, "none": 0.1}
    at = 0
    for mode in ("closed_book", "rag", "genpoe", "genpoe_rag"):
        for passages, share in shares.items():
            if mode == "closed_book" and passages != "none":
                continue
            share = 0.6 if (mode, passages) == ("genpoe_rag", "shuffled") else share
            em = (rng.permutation(N) < share * N).astype(float)
            scores = {"em": em.tolist(), "f1": np.where(em == 1, 1, rng.random(N).round(2)).tolist()}
            write_run(folder / f"{at}", scores, docs=docs, genpoe=genpoe_facts(mode, passages), trace=True)
            at += 1
    name = "a-model-with-a-name-that-is-longer-than-any-column-of-a-telephone"
    write_run(folder / "hf", scores, docs=docs, model_args={"pretrained": name})
    write_run(folder / "u", scores, docs=documents(N, task="u"), task="u")
    (write_run(folder / "broken", scores, docs=docs)).write_text("{")
    return compare([folder], draws=200)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_in_a_browser_at_all_widths(comparison: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "index.html"
    path.write_text(page(comparison), encoding="utf-8")
    seen = look(path, WIDTHS, SCRIPT)
    assert sorted(seen) == sorted(WIDTHS)
    board = comparison.boards[0]
    columns = [system.scores["em"] for system in board.systems]
    for width, told in seen.items():
        assert told["errors"] == []
        assert told["asked"] == []
        assert told["scroll"] <= told["client"], (width, told["wide"])
        assert told["wide"] == [] and told["inside"] == [] and told["small"] == [], width
        assert told["svgs"] == sum(len(plots(each, "x")) for each in comparison.boards)
        assert told["red"] == "rgb(164, 22, 26)"
        numbers = {comparison.book.texts[n]: place for place, n in enumerate(board.group.runs[0].questions)}
        won = [columns[0][numbers[question]] - columns[1][numbers[question]] for question in told["shown"]["0"]]
        lost = [columns[0][numbers[question]] - columns[1][numbers[question]] for question in told["shown"]["1"]]
        assert won and min(won) > 0 and lost and max(lost) < 0
        assert len(told["shown"]["2"]) >= len(won) + len(lost)
        everyone = [system.label for each in comparison.boards for system in each.systems]
        modes = [system.settings.get("mode") for each in comparison.boards for system in each.systems]
        assert told["rows"][""] == everyone and told["nameless"] == []
        assert told["rows"]["mode"] == [name for name, mode in zip(everyone, modes, strict=True) if mode == "rag"]
        assert told["rows"]["task"] == [system.label for system in comparison.boards[1].systems]
        assert 0 < len(told["rows"]["model"]) < len(everyone)
        assert told["marks"] == []  # both systems answered the same, from the same passages
        assert "gate 0.25" in told["opened"] and "Passage 0 about number" in told["opened"]
        read = ["Knowledge:\nPassage 0" in told["opened"], "Question: " in told["opened"]]
        assert read == [any(system.settings["mode"] in PROMPT_MODES for system in board.systems[:2]), True]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_words_that_differ_are_marked(tmp_path: Path) -> None:
    """Of answers, against the other answer; of passages, against all of the other system's passages."""
    docs = documents(20, passages=2)
    for mode, right, kept in (("rag", 20, 2), ("genpoe", 10, 1)):
        em = {"em": [float(n < right) for n in range(20)]}
        file = write_run(tmp_path / mode, em, docs=docs, genpoe=genpoe_facts(mode, "retrieved", kept), trace=True)
        samples = file.with_name(file.name.replace("results_", "samples_t_").replace(".json", ".jsonl"))
        samples.write_text(samples.read_text().replace('[" response', f'[" The {mode} response'))
    path = tmp_path / "index.html"
    path.write_text(page(compare([tmp_path], draws=20)), encoding="utf-8")
    script = """() => {
      const entry = document.querySelector(".explorer details");
      entry.open = true;
      entry.dispatchEvent(new Event("toggle"));
      const sides = [...entry.querySelectorAll(".two > div")];
      return {sides: sides.map(side => [...side.querySelectorAll("mark")].map(mark => mark.textContent))};
    }"""
    (told,) = look(path, [1000], script).values()
    assert told["errors"] == []
    assert told["sides"] == [["rag", "1"], ["genpoe"]]  # "Passage 1 about number 10." is read by RAG alone


def test_the_prompts_are_those_that_the_llms_read(comparison: Comparison) -> None:
    """From the trace; without one, from lm-eval's log, if nothing is put into what that has."""
    board = comparison.boards[0]
    found = re.search(r'id="board1-questions">(.*?)</script>', page(comparison), re.DOTALL)
    assert found
    told = json.loads(found[1])
    prompts = ["\n".join(told["lines"][line] for line in prompt) for prompt in told["prompts"]]
    assert len(told["questions"]) > 20 and len(set(told["lines"])) == len(told["lines"])
    for entry in told["questions"]:
        number = re.search(r"\d+$", entry["question"])
        for system, (_, _, _, prompt) in zip(board.systems, entry["by"], strict=True):
            asked = f"Question: {entry['question']}?\nAnswer:"
            if number and system.settings.get("mode") in PROMPT_MODES:
                asked = "\n".join(["Knowledge:", *(f"Passage {n} about number {number[0]}." for n in range(3)), asked])
            assert prompts[prompt] == asked or not number


def test_a_prompt_that_nobody_wrote_down_is_not_made_up(tmp_path: Path) -> None:
    docs = documents(20, passages=3)
    for mode, right in (("closed_book", 4), ("rag", 15), ("genpoe", 10)):
        write_run(tmp_path / mode, {"em": [float(n < right) for n in range(20)]}, docs=docs, genpoe=genpoe_facts(mode))
    comparison = compare([tmp_path], draws=20)
    found = re.search(r'id="board1-questions">(.*?)</script>', page(comparison), re.DOTALL)
    assert found
    for entry in json.loads(found[1])["questions"]:
        known = {
            system.settings["mode"]: by[3] is not None
            for system, by in zip(comparison.boards[0].systems, entry["by"], strict=True)
        }
        assert known == {"closed_book": True, "rag": False, "genpoe": True}


def test_passages_without_ids_have_their_texts(tmp_path: Path) -> None:
    """The trace has the ids that their content gives them."""
    docs = documents(20, passages=1)
    for doc in docs:
        del doc["ctxs"][0]["id"]
    for mode, right in (("rag", 15), ("genpoe", 10)):
        em = {"em": [float(n < right) for n in range(20)]}
        write_run(tmp_path / mode, em, docs=docs, genpoe=genpoe_facts(mode), trace=True)
    found = re.search(r'id="board1-questions">(.*?)</script>', page(compare([tmp_path], draws=20)), re.DOTALL)
    assert found
    passages = json.loads(found[1])["passages"]
    assert passages and all(re.fullmatch(r"Passage 0 about number \d+\.", entry["text"]) for entry in passages)


def test_nothing_is_loaded_from_elsewhere(comparison: Comparison) -> None:
    text = page(comparison)
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["']?(?:https?:)?//""", text)
    assert not re.findall(r"url\((?!#)|@import|<link|<iframe|<img", text)
    assert "</script><b>" not in text


def test_every_plot_has_axes_units_and_n(comparison: Comparison) -> None:
    board = comparison.boards[0]
    found = plots(board, "x")
    assert [plot.title for plot in found] == [
        "EM with 95 % intervals",
        "F1 with 95 % intervals",
        "By whether the answer was retrieved",
        "By whether closed-book answering is right",
        "By the rank of the passage with the answer",
        "EM against latency",
        "EM against memory",
    ]
    for plot in found:
        for svg in (plot.wide, plot.narrow):
            words = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
            assert re.search(r"(EM|F1) \(%\)", words), plot.title
            assert re.search(r"n ?= ?[\d,]+", words), plot.title
            assert re.search(r"\b(0|20|50|100)\b", words), plot.title
            assert len(set(re.findall(r'\bid="([^"]+)"', svg))) == len(re.findall(r'\bid="', svg))
    assert "time per question (ms" in found[5].wide and "peak memory of the process (GiB)" in found[6].wide
    wide = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", found[4].wide))
    counts = {name: part.n for name, part in board.systems[0].by_rank.items()}
    assert counts == {"1": 18, "2": 18, "3": 18, "not found": 36}
    assert all(f"n={n}" in wide for n in counts.values())


def test_curves_over_the_number_and_the_length_of_passages(tmp_path: Path) -> None:
    docs = documents(N, passages=4)
    for n, doc in enumerate(docs):
        doc["ctxs"][0]["text"] = "word " * (n % 9 + 1)
    for mode in ("genpoe", "rag"):
        for number in (1, 2, 4):
            em = [float(n < 10 * number) for n in range(N)]
            own = genpoe_facts(mode, "retrieved", number)
            write_run(tmp_path / f"{mode}{number}", {"em": em}, docs=docs, genpoe=own, trace=True)
    write_run(tmp_path / "closed_book", {"em": em}, docs=docs, genpoe=genpoe_facts("closed_book"))
    (board,) = compare([tmp_path], draws=20).boards
    found = {plot.title: plot for plot in plots(board, "x")}
    words = re.findall(r"<text[^>]*>([^<]*)</text>", found["EM by the number of passages"].wide)
    assert {"1", "2", "4", "number of passages (K); n = 90 questions"} <= set(words)
    for mode in ("genpoe", "rag"):
        numbers = [system.number for system in board.systems if system.settings["mode"] == mode]
        assert f"{', '.join(map(str, numbers))}  {mode}" in words
    words = re.findall(r"<text[^>]*>([^<]*)</text>", found["By the length of the passage"].wide)
    assert {"1\u20133", "4\u20136", "7\u20139", "n=30"} <= set(words)


# Machado, Oliveira and Fernandes (2009), at full severity, on linear RGB.
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear.clip(0, 1)
    x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_are_told_apart_by_everyone(deficiency: str) -> None:
    """Ten times what can just be seen; and where colours fail altogether, markers are still different."""
    linear = {name: np.array(to_rgb(colour)) ** 2.2 for name, colour in COLOURS.items()}
    seen = {name: lab(np.array(DEFICIENCIES[deficiency]) @ colour) for name, colour in linear.items()}
    for one, two in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[two]) > 20, (one, two)
    assert len(set(MARKERS.values())) == len(MARKERS) == len(COLOURS)
    # Against the white of the page: WCAG's 3:1 for graphics.
    for name, colour in linear.items():
        assert 1.05 / (colour @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3, name


def test_the_data_of_the_questions_is_whole_json(comparison: Comparison) -> None:
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page(comparison), re.DOTALL)
    assert len(blocks) == 2
    data = json.loads(blocks[0])
    assert "</script><b>" in json.dumps(data)
