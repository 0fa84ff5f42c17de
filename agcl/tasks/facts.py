"""Built-in synthetic tasks: short questions about invented people, deterministic in the seed.

Each task introduces new people and asks about a few relations of each. Neighboring tasks share
most relations and all of their possible answers, so that learning one overwrites the other. Each
fact has two questions: the first is trained on, its paraphrase is only tested.
"""

import random
from collections.abc import Iterator
from functools import partial
from itertools import islice

from agcl.tasks.task import TEST, TRAIN, Row, Task

PLACES = (
    "harbour valley island mountain desert forest river meadow canyon glacier "
    "lagoon prairie marsh plateau coast jungle steppe fjord oasis delta"
).split()

RELATIONS: dict[str, tuple[str, str, str]] = {
    "home": (
        "Where does {} live?",
        "Which city is home to {}?",
        "Paris London Berlin Madrid Rome Vienna Prague Lisbon Dublin Oslo Athens Warsaw Cairo "
        "Tokyo Delhi Lima Quito Boston Denver Dallas",
    ),
    "job": (
        "What does {} work as?",
        "What is the job of {}?",
        "baker pilot nurse farmer lawyer painter singer tailor plumber sailor teacher dentist "
        "butcher miner writer actor judge chemist potter guard",
    ),
    "food": (
        "What does {} like to eat?",
        "Which food is the favourite of {}?",
        "bread cheese soup rice pasta salad fish beans pizza curry honey apples pears plums "
        "olives nuts cake eggs corn figs",
    ),
    "pet": (
        "Which animal does {} keep?",
        "What pet belongs to {}?",
        "a dog|a cat|a horse|a parrot|a rabbit|a goat|a turtle|a hamster|a snake|a duck|a goose|"
        "a sheep|a donkey|a lizard|a ferret|a pigeon|a mouse|a frog|a falcon|a pony",
    ),
    "music": (
        "What instrument does {} play?",
        "On which instrument does {} make music?",
        "the piano|the violin|the flute|the drums|the guitar|the harp|the cello|the trumpet|"
        "the organ|the banjo|the oboe|the tuba|the horn|the lute|the viola|the bass|"
        "the fiddle|the zither|the bugle|the clarinet",
    ),
    "colour": (
        "Which colour does {} wear?",
        "In what colour is {} dressed?",
        "red blue green yellow black white purple orange pink brown grey silver gold crimson "
        "violet indigo teal beige maroon navy",
    ),
}
RELATIONS_PER_TASK = 4
_SYLLABLES = (
    "ba be bo da de do fa fi ga go ka ke ko la le lo ma me mi mo na ne no pa po ra re ri ro sa "
    "se so ta te to va ve vo za zo"
).split()


def task(index: int, *, entities: int, base_entities: int, seed: int) -> Task:
    """The task with that index, from 0: `entities` new people times four relations.

    Evaluation sets: `memorization` (the trained questions) and `generalization` (paraphrases).
    """
    relations = [(index + offset) % len(RELATIONS) for offset in range(RELATIONS_PER_TASK)]
    first = base_entities + index * entities
    rows = partial(_rows, seed, str(index), first, entities, relations)
    return Task(
        name=PLACES[index] if index < len(PLACES) else f"place-{index + 1}",
        splits={split: partial(rows, (split,)) for split in (TRAIN, TEST)},
        scored={"memorization": TRAIN, "generalization": TEST},
        memorized=True,
    )


def base(*, entities: int, seed: int) -> Task:
    """Generic facts for pretraining the built-in model, with both questions for every fact."""
    relations = list(range(RELATIONS_PER_TASK))
    return Task(
        name="base",
        splits={TRAIN: partial(_rows, seed, "base", 0, entities, relations, (TRAIN, TEST))},
        scored={"memorization": TRAIN},
        memorized=True,
    )


def _rows(
    seed: int,
    name: str,
    first: int,
    entities: int,
    relations: list[int],
    splits: tuple[str, ...],
) -> Iterator[Row]:
    choose = random.Random(f"{seed}/{name}")
    for person in islice(_names(seed), first, first + entities):
        for relation in relations:
            question, paraphrase, pool = list(RELATIONS.values())[relation]
            answer = choose.choice(pool.split("|") if "|" in pool else pool.split())
            for split in splits:
                asked = (question if split == TRAIN else paraphrase).format(person)
                fact = f"{question.format(person)}\0{answer}"
                yield Row(f"Question: {asked}\nShort answer:", f" {answer}", fact)


def _names(seed: int) -> Iterator[str]:
    """An endless stream of distinct invented names."""
    choose, seen = random.Random(f"{seed}/names"), set()
    while True:
        name = "".join(choose.choices(_SYLLABLES, k=3)).capitalize()
        if name not in seen:
            seen.add(name)
            yield name
