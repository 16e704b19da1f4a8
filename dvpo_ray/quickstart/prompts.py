"""The quickstart's prompts: openings of everyday sentences, made from word lists.

`python -m dvpo_ray.quickstart.prompts FOLDER` writes `prompts.train.jsonl` and `prompts.heldout.jsonl`, as it wrote the shipped
files. No opening says how the sentence goes on, so the model's own continuations are of every mood.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

HELDOUT_PROMPTS = 256
SEED = 0

TEMPLATES = {
    "The {thing} at the {place} was": {
        "thing": ["food", "service", "music", "coffee", "staff", "view", "waiting room", "breakfast"],
        "place": ["restaurant", "hotel", "airport", "museum", "theater", "beach", "market", "hospital", "train station", "bakery"],
    },
    "My {person}'s {event} was": {
        "person": ["brother", "sister", "neighbor", "boss", "friend", "cousin", "teacher"],
        "event": ["birthday party", "wedding", "new job", "speech", "cooking", "garden", "garage sale", "first concert"],
    },
    "After the {event}, {who} felt": {
        "event": ["long flight", "exam", "meeting", "hike", "game", "interview", "storm", "phone call", "class", "visit"],
        "who": ["I", "we", "my mother", "the children", "the whole team", "everyone"],
    },
    "When I {action}, I": {
        "action": [
            "opened the door",
            "read the letter",
            "came home",
            "looked outside",
            "met my new neighbor",
            "tasted the soup",
            "saw the bill",
            "heard the news",
            "finished the book",
            "checked my phone",
            "walked into the office",
            "woke up on the train",
        ],
    },
    "My {person} {verb} that": {
        "person": ["doctor", "landlord", "coach", "grandmother", "roommate", "manager", "uncle", "colleague"],
        "verb": ["told me", "wrote", "thinks", "called to say", "always said"],
    },
    "Our {trip} to the {place} was": {
        "trip": ["trip", "drive", "visit", "school trip", "weekend trip", "walk"],
        "place": ["mountains", "lake", "city", "zoo", "castle", "coast", "farm", "island"],
    },
    "The {work} {who} last {time} was": {
        "work": ["movie we watched", "song I heard", "game we played", "report I wrote", "cake we baked", "book I read", "show we saw"],
        "who": ["at home", "with friends", "in class"],
        "time": ["night", "week", "summer", "year"],
    },
    "{time} the {subject} in our {place}": {
        "time": ["This morning", "Yesterday", "Last winter", "Every evening", "On Sunday"],
        "subject": ["people", "dogs", "new teacher", "young couple", "old man"],
        "place": ["street", "village", "building", "school"],
    },
    "{weekday} {thing} with my {person} left me": {
        "weekday": ["Monday's", "Today's", "Last week's", "The first", "The last"],
        "thing": ["conversation", "lesson", "dinner", "trip"],
        "person": ["father", "daughter", "students", "boss", "old friend"],
    },
}


def all_prompts() -> list[str]:
    """All prompts of the word lists, without repetition, shuffled in the same order each time."""
    prompts = []
    for template, words in TEMPLATES.items():
        prompts += [template.format(**dict(zip(words, choice, strict=True))) for choice in itertools.product(*words.values())]
    random.Random(SEED).shuffle(prompts)
    return prompts


def write_prompts(folder: Path) -> tuple[Path, Path]:
    """Write the training and the held-out prompts, no prompt in both. Returns the two files."""
    prompts = all_prompts()
    files = (folder / "prompts.train.jsonl", folder / "prompts.heldout.jsonl")
    for file, part in zip(files, (prompts[HELDOUT_PROMPTS:], prompts[:HELDOUT_PROMPTS]), strict=True):
        file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in part), encoding="utf-8")
    return files


if __name__ == "__main__":
    for written in write_prompts(Path(sys.argv[1])):
        print(written)
