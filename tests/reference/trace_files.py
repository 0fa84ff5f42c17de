"""Small files in TRACE's layout: `python tests/reference/trace_files.py FOLDER [ROWS]`.

TRACE's data cannot be redistributed. These rows follow rules that a small model can learn, in each
task's format: its kind of prompt, kind of answer and script.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

CITIES = "Oslo Lima Rome Cairo Delhi Quito Tokyo Paris".split()
THINGS = "budget bridge library park school bus market harbour".split()
TOPICS = ["学校", "公园", "地铁", "市场", "图书馆", "医院"]


def stance(draw: random.Random) -> tuple[str, str]:
    topic, word, letter = (
        draw.choice(TOPICS),
        *draw.choice([("喜欢", "A"), ("讨厌", "B"), ("知道", "C")]),
    )
    return f"文本: 我{word}{topic}。\n对象: {topic}\n立场: A 支持 B 反对 C 中立\n答案:", letter


def policy(draw: random.Random) -> tuple[str, str]:
    word, letter = draw.choice([("raise", "A"), ("cut", "B"), ("keep", "C")])
    return f"The committee will {word} rates by {draw.randint(1, 9)} points.\nAnswer:", letter


def meeting(draw: random.Random) -> tuple[str, str]:
    city, thing, votes = draw.choice(CITIES), draw.choice(THINGS), draw.randint(2, 9)
    text = f"The council of {city} met. It spoke about the {thing}. It passed with {votes} votes."
    return f"Summarise: {text}\nSummary:", f"{city} passed the {thing} with {votes} votes."


def code(draw: random.Random) -> tuple[str, str]:
    name, thing = draw.choice("load save read send".split()), draw.choice(THINGS)
    return f"<s> def {name}_{thing} ( {thing} ) : <EOL>", f"return {name} ( {thing} )"


def science(draw: random.Random) -> tuple[str, str]:
    city, other = draw.sample(CITIES, 2)
    letter, answers = draw.choice([("A", (city, other)), ("B", (other, city))])
    text = f"Which city is named in this line: {city}?\n(A) {answers[0]} (B) {answers[1]}"
    return f"Question: {text}\nAnswer:", f"{letter}\nThe line says {city}."


def sums(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(1, 9), draw.randint(1, 9)
    return f"Sam has {a} apples and gets {b} more. How many now?\nAnswer:", str(a + b)


def differences(draw: random.Random) -> tuple[str, str]:
    a, b = sorted((draw.randint(1, 9), draw.randint(1, 9)))
    return f"The text says {b} ships and {a} boats. How many more ships?\nAnswer:", str(b - a)


def simpler(draw: random.Random) -> tuple[str, str]:
    city, thing = draw.choice(CITIES), draw.choice(THINGS)
    text = f"In {city} wurde nach langen Verhandlungen ein neues {thing}-Projekt beschlossen."
    return f"Vereinfache: {text}\n", f"{city} hat ein neues {thing}-Projekt."


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "C-STANCE": stance,
    "FOMC": policy,
    "MeetingBank": meeting,
    "Py150": code,
    "ScienceQA": science,
    "NumGLUE-cm": sums,
    "NumGLUE-ds": differences,
    "20Minuten": simpler,
}


def write(root: Path, rows: int = 24) -> None:
    """Write `<root>/<task>/{train,eval,test}.json`: `rows` for training, a third for the others."""
    for task, make in TASKS.items():
        (root / task).mkdir(parents=True, exist_ok=True)
        draw = random.Random(task)
        for split, count in (("train", rows), ("eval", rows // 3), ("test", rows // 3)):
            made = [dict(zip(("prompt", "answer"), make(draw), strict=True)) for _ in range(count)]
            text = json.dumps(made, ensure_ascii=False, indent=1)
            (root / task / f"{split}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), *map(int, sys.argv[2:]))
