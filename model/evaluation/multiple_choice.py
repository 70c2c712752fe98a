"""Multiple-choice questions in the layout of MMLU, answered in two ways: by likelihood, and in the model's own words.

Files: ``SUBJECT_test.csv`` and, for examples, ``SUBJECT_dev.csv``. Without a header their columns are the question, the
choices, and the letter of the right choice. Parquet files, and CSV files with a header, have columns ``question``,
``choices`` (or one column for each letter), ``answer`` (number from 0, or letter) and optionally ``subject``. Source of
layout and wording: D. Hendrycks et al., Measuring massive multitask language understanding, arXiv 2009.03300.

The likeliest of four letters is right by chance in about 25% of the questions, also in a broken model; a generated
answer can be right less often. So both accuracies are reported.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cna_kernels.errors import InputError
from cna_kernels.files import read_text, sha256

from ..language_model import LanguageModel
from ..prompts.files import PromptSet
from ..prompts.formats import parquet_rows
from .interventions import Interventions
from .likelihood import each_logits
from .metrics import after_thought

LETTERS = "ABCDEFGHIJ"
SPLITS = ("test", "val", "validation", "dev", "train", "auxiliary_train")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        answer: the number of the right choice.
        place: file and line, for messages.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    subject: str
    place: str


@dataclass(frozen=True)
class MultipleChoice:
    """Questions with the examples that stand in front of them.

    Attributes:
        examples: subject -> the examples that stand in front of its questions.
        drawn: how the questions were chosen from the files.
    """

    questions: tuple[Question, ...]
    examples: dict[str, tuple[Question, ...]]
    drawn: dict = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The hash of all questions and examples. The places of the files do not change it."""
        every = [*self.questions, *(example for found in self.examples.values() for example in found)]
        return sha256(*(repr((q.subject, q.text, q.choices, q.answer)) for q in every))

    def head(self, question: Question, shots: int) -> str:
        subject = question.subject.replace("_", " ")
        about = f" about {subject}" if subject else ""
        parts = [f"The following are multiple choice questions (with answers){about}."]
        parts += [f"{_asked(e)} {LETTERS[e.answer]}" for e in self.examples.get(question.subject, ())[:shots]]
        return "\n\n".join(parts)

    def prompt(self, question: Question, shots: int) -> str:
        """The text before the answer: at most ``shots`` examples and the question."""
        return f"{self.head(question, shots)}\n\n{_asked(question)}"


def _asked(question: Question) -> str:
    choices = "".join(f"\n{LETTERS[n]}. {choice}" for n, choice in enumerate(question.choices))
    return f"{question.text}{choices}\nAnswer:"


def read_multiple_choice(
    path, *, subjects: Sequence[str] | None = None, limit: int | None = None, seed: int = 0, shots: int = 5
) -> MultipleChoice:
    """Read a file, or a directory of files, of questions.

    Args:
        subjects: keep these only.
        limit: draw this number of questions at random, with ``seed``.
        shots: examples to put in front of each question; none where there is no file of examples.

    Raises:
        InputError: a question cannot be used (names its file and line), or a subject does not exist.
    """
    files = _files(Path(path), path)
    questions: list[Question] = []
    examples: dict[str, list[Question]] = {}
    seen: dict[tuple, Path] = {}  # the file of each question
    for file in files["test"]:
        found = _read(file)
        for question in found:
            other = seen.setdefault((question.subject, question.text, question.choices), file)
            if other != file:
                raise InputError(question.place, f"{other} asks this, too; give one of the two")
        questions += found
    for file in files["dev"]:
        for question in _read(file):
            examples.setdefault(question.subject, []).append(question)
    known = {question.subject for question in questions}
    for subject in subjects or ():
        if subject not in known:
            names = ", ".join(sorted(known)[:60])
            raise InputError(path, f"has no subject {subject!r}; it has {names}")
    if subjects:
        questions = [question for question in questions if question.subject in set(subjects)]
    if not questions:
        raise InputError(path, "holds no question")
    if limit is not None and limit < len(questions):
        chosen = sorted(random.Random(seed).sample(range(len(questions)), limit))
        questions = [questions[number] for number in chosen]
    drawn = {"subjects": sorted(subjects or ()), "limit": limit, "seed": seed}
    return MultipleChoice(
        tuple(questions), {subject: tuple(found[:shots]) for subject, found in examples.items()}, drawn
    )


def _files(path: Path, where) -> dict[str, list[Path]]:
    """The files with questions, under "test", and the files with examples, under "dev"."""
    if path.is_file():
        stem, split = _split(path)
        name = f"{stem}_dev{path.suffix}"
        beside = [path.with_name(name), path.parent.parent / "dev" / name] if split == "test" else []
        return {"test": [path], "dev": [dev for dev in beside if dev.is_file()][:1]}
    if not path.is_dir():
        raise InputError(where, "is neither a file nor a directory")
    every = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".csv", ".parquet") and p.is_file())
    found = {split: [p for p in every if split in (_split(p)[1], p.parent.name)] for split in ("test", "dev")}
    if not found["test"]:
        raise InputError(where, "has no *_test.csv and no test*.parquet in it")
    return found


def _split(path: Path) -> tuple[str, str]:
    """Subject and split by a file's name: ("astronomy", "test") for astronomy_test.csv, ("", "test") for
    test-00000-of-00001.parquet."""
    stem, _, split = path.stem.rpartition("_")
    if split in SPLITS:
        return stem, split
    first = path.stem.split("-")[0]
    return ("", first) if first in SPLITS else (path.stem, "")


def _read(path: Path) -> list[Question]:
    subject = _split(path)[0]
    records = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    questions = [_question(record, place, subject) for record, place in records]
    if not questions:
        raise InputError(path, "holds no question")
    return questions


def _csv(path: Path) -> Iterator[tuple[dict, str]]:
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header, first = None, True
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            names = [cell.strip().lower() for cell in row]
            if first and "question" in names and "answer" in names:
                if len(set(names)) < len(names):
                    raise InputError(place, "names a column twice")
                header = names
            elif header is None:
                if not 4 <= len(row) <= len(LETTERS) + 2:
                    raise InputError(place, f"expected question, choices and answer, got {len(row)} columns")
                yield {"question": row[0], "choices": row[1:-1], "answer": row[-1]}, place
            elif len(row) != len(header):
                raise InputError(place, f"expected {len(header)} columns, got {len(row)}")
            else:
                yield dict(zip(header, row, strict=True)), place
            first = False
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}", f"is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[dict, str]]:
    for row, place in parquet_rows(path):
        record = {str(name).lower(): value for name, value in row.items()}
        if len(record) < len(row):
            raise InputError(place, "names a column twice")
        yield record, place


def _question(record: dict, place: str, subject: str) -> Question:
    for name in ("question", "answer"):
        if record.get(name) is None or not str(record[name]).strip():
            what = f"has no {name}" if name in record else f"has no column {name!r}, it has {', '.join(record)}"
            raise InputError(place, what)
    choices = record.get("choices")
    if choices is None:
        choices = [record.get(letter.lower()) for letter in LETTERS]
    if not isinstance(choices, list):
        raise InputError(f"{place}: choices", f"expected a list, got {str(choices)[:60]!r}")
    choices = ["" if choice is None else str(choice).strip() for choice in choices]
    while choices and not choices[-1]:
        choices.pop()
    if "" in choices:
        raise InputError(f"{place}: choices", f"choice {LETTERS[choices.index('')]} is empty")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(place, f"expected 2 to {len(LETTERS)} choices, got {len(choices)}")
    answer = str(record["answer"]).strip()
    number = LETTERS.find(answer.upper()) if len(answer) == 1 and answer.isalpha() else -1
    if answer.isdecimal():
        number = int(answer)
    if not 0 <= number < len(choices):
        raise InputError(f"{place}: answer", f"expected one of {LETTERS[: len(choices)]}, got {answer[:60]!r}")
    return Question(
        str(record["question"]).strip(), tuple(choices), number, str(record.get("subject") or subject), place
    )


@dataclass(frozen=True)
class Asked:
    """A question as tokens.

    Attributes:
        question: what is asked.
        rows: token ids. One row, the prompt, for an answer in the model's own words; or for each choice the prompt and
            its letter.
        shots: the number of examples in front.
    """

    question: Question
    rows: list[list[int]]
    shots: int


def likelihood_prompts(model: LanguageModel, questions: MultipleChoice, *, shots: int) -> list[Asked]:
    """The questions as plain text, as published: for each choice a row with its letter after "Answer:"."""

    def encode(question: Question, n: int) -> list[list[int]]:
        text = questions.prompt(question, n)
        return [model.tokenizer.encode(f"{text} {letter}") for letter in LETTERS[: len(question.choices)]]

    return [_fit(encode, question, shots, model.config.context_length, questions) for question in questions.questions]


def generation_prompts(
    model: LanguageModel, questions: MultipleChoice, *, shots: int, room: int, chat: bool | None
) -> list[Asked]:
    """The questions as a user's messages, for answers of ``room`` tokens in the model's own words."""

    def encode(question: Question, n: int) -> list[list[int]]:
        letters = LETTERS[: len(question.choices)]
        text = questions.prompt(question, n)
        if model.encoder.uses_chat(chat):
            wish = f"Answer with one letter: {', '.join(letters[:-1])} or {letters[-1]}."
            text = text.removesuffix("Answer:") + wish
        prompts = PromptSet((text,), (question.place,))
        return [prompt.ids for prompt in model.encoder.encode(prompts, chat=chat, keep_long=True)]

    return [
        _fit(encode, question, shots, model.config.context_length - room, questions) for question in questions.questions
    ]


def by_likelihood(
    model: LanguageModel, interventions: Interventions, variants: Sequence[int], asked: Sequence[Asked]
) -> dict[int, list[int]]:
    """Return, for each variant and question, the choice whose letter is likeliest.

    Where a letter is several tokens, their log probabilities are added.

    Args:
        asked: see :func:`likelihood_prompts`.
    """
    rows, owners = [], []  # what to run; and (variant, question, choice), where choice None stands for all choices
    endings: list[list[list[int]]] = []
    for number, one in enumerate(asked):
        shared = _common(one.rows)
        endings.append([ids[shared:] for ids in one.rows])
        alone = all(len(ids) == shared + 1 for ids in one.rows)
        for variant in variants:
            for choice, ids in [(None, one.rows[0][:shared])] if alone else enumerate(ids[:-1] for ids in one.rows):
                rows.append((variant, ids))
                owners.append((variant, number, choice))
    scores = {variant: [[0.0] * len(one.rows) for one in asked] for variant in variants}
    for last in (True, False):
        chosen = [place for place, (*_, choice) in enumerate(owners) if (choice is None) == last]
        found = each_logits(model, interventions, [rows[place] for place in chosen], last=last)
        for place, logits in zip(chosen, found, strict=True):
            variant, number, choice = owners[place]
            log_p = logits.log_softmax(-1)
            if choice is None:
                scores[variant][number] = [log_p[0, ending[0]].item() for ending in endings[number]]
                continue
            tokens = endings[number][choice]
            rest = log_p[len(log_p) - len(tokens) :]
            scores[variant][number][choice] = sum(rest[step, token].item() for step, token in enumerate(tokens))
    return {variant: [_most_likely(row) for row in found] for variant, found in scores.items()}


def by_subject(questions: Sequence[Question]) -> dict[str, list[int]]:
    """Subject -> the places of its questions in ``questions``."""
    places: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question.subject, []).append(place)
    return places


def _most_likely(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=lambda choice: (scores[choice], -choice))


def parse_letter(answer: str, n_choices: int) -> int | None:
    """Return the number of the choice that an answer names after its thought, None where it names none.

    A letter at the beginning counts. Where there is none, a letter after "answer", "answer is" or "answer:" counts;
    where there is none of these, the first capital letter that stands alone. An A or I that begins a clause
    ("A cat ...", "I'm ...") names no choice.
    """
    letters, visible = LETTERS[:n_choices], after_thought(answer) or ""
    after = rf"\(?\b([{letters}])\b"
    alone = rf"\(?\b(?![AI](?:['\u2019]| (?!is\b|because\b|and\b|or\b)[a-z]))([{letters}])\b(?!['\u2019])"
    for pattern in (rf"^\W*{alone}", rf"(?i:answer)\W*(?i:is|would be|must be)?\W*{after}", alone):
        found = re.search(pattern, visible)
        if found:
            return letters.index(found.group(1))
    return None


def _fit(encode: Callable, question: Question, shots: int, room: int, questions: MultipleChoice) -> Asked:
    """``encode(question, n)`` with the largest n up to ``shots`` for which every row has at most ``room`` tokens."""
    for n in range(min(shots, len(questions.examples.get(question.subject, ()))), -1, -1):
        rows = encode(question, n)
        if max(map(len, rows)) <= room:
            return Asked(question, rows, n)
    raise InputError(question.place, f"has {max(map(len, rows))} tokens without examples, there is room for {room}")


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their beginning, leaving at least one token of each row."""
    shortest = min(map(len, rows)) - 1
    return next((n for n in range(shortest) if len({row[n] for row in rows}) > 1), shortest)


Exam, read_exam = MultipleChoice, read_multiple_choice  # the names before 0.2
