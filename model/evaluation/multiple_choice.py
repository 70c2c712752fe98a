"""Multiple-choice questions in the layout of MMLU, answered both ways: by likelihood, and in the model's own words.

Files: ``SUBJECT_test.csv`` and, for examples, ``SUBJECT_dev.csv`` without a header: question, the choices, the letter
of the right one; or parquet (or CSV with a header) with columns ``question``, ``choices`` (or one column for each
letter), ``answer`` (number from 0, or letter) and, if there, ``subject``. Source of layout and wording: D. Hendrycks
et al., Measuring massive multitask language understanding, arXiv 2009.03300.

Likelihood of four letters cannot fall below chance, about 25%; a generated answer can. So both are reported.
"""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cna_kernels.checks import InputError
from cna_kernels.files import read_text

from ..language_model import LanguageModel
from ..packing import TokenPrompt
from ..prompts import PromptSet
from .interventions import Interventions
from .likelihood import each_logits

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
class Exam:
    """Questions with the examples that stand in front of them.

    Attributes:
        examples: of each subject.
    """

    questions: tuple[Question, ...]
    examples: dict[str, tuple[Question, ...]]

    def only(self, questions: Sequence[Question]) -> Exam:
        """The same examples, some of the questions."""
        return Exam(tuple(questions), self.examples)

    def head(self, question: Question, shots: int) -> str:
        subject = question.subject.replace("_", " ")
        about = f" about {subject}" if subject else ""
        parts = [f"The following are multiple choice questions (with answers){about}."]
        parts += [f"{_asked(e)} {LETTERS[e.answer]}" for e in self.examples.get(question.subject, ())[:shots]]
        return "\n\n".join(parts)

    def prompt(self, question: Question, shots: int) -> str:
        """The text before the answer, with so many examples."""
        return f"{self.head(question, shots)}\n\n{_asked(question)}"


def _asked(question: Question) -> str:
    choices = "".join(f"\n{LETTERS[n]}. {choice}" for n, choice in enumerate(question.choices))
    return f"{question.text}{choices}\nAnswer:"


def read_exam(
    path, *, subjects: Sequence[str] | None = None, limit: int | None = None, seed: int = 0, shots: int = 5
) -> Exam:
    """Read a file, or a directory of files, of questions.

    Args:
        subjects: keep these only.
        limit: draw so many questions, with ``seed``.
        shots: examples to put in front of each question; where there is no file of them, none.

    Raises:
        InputError: names the file and line of a question that cannot be used, a subject that does not exist.
    """
    files = _files(Path(path), path)
    questions, examples = [], {}
    for file in files["test"]:
        questions += _read(file)
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
    return Exam(tuple(questions), {subject: tuple(found[:shots]) for subject, found in examples.items()})


def _files(path: Path, where) -> dict[str, list[Path]]:
    """The files to ask from, and those with examples."""
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
    """("astronomy", "test") of astronomy_test.csv; ("", "test") of test-00000-of-00001.parquet."""
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
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header = None
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if not any(cell.strip() for cell in row):
                continue
            if header is None and "question" in (names := [cell.strip().lower() for cell in row]) and "answer" in names:
                header = names
                continue
            if header is not None:
                if len(row) != len(header):
                    raise InputError(place, f"expected {len(header)} columns, got {len(row)}")
                yield dict(zip(header, row, strict=True)), place
                continue
            header = None
            if not 4 <= len(row) <= len(LETTERS) + 2:
                raise InputError(place, f"expected question, choices and answer, got {len(row)} columns")
            yield {"question": row[0], "choices": row[1:-1], "answer": row[-1]}, place
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}", f"is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[dict, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(path, "parquet needs pyarrow: pip install 'cna-kernels[eval]'") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(path, f"is not parquet: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows):
        yield {str(name).lower(): value for name, value in row.items()}, f"{path}: row {number}"


def _question(record: dict, place: str, subject: str) -> Question:
    for name in ("question", "answer"):
        if record.get(name) is None or not str(record[name]).strip():
            what = f"has no {name}" if name in record else f"has no column {name!r}, it has {', '.join(record)}"
            raise InputError(place, what)
    choices = record.get("choices")
    if isinstance(choices, str):
        raise InputError(f"{place}: choices", f"expected a list, got {choices[:60]!r}")
    if choices is None:
        choices = [record[letter.lower()] for letter in LETTERS if record.get(letter.lower()) is not None]
    choices = tuple(str(choice).strip() for choice in choices)
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(place, f"expected 2 to {len(LETTERS)} choices, got {len(choices)}")
    answer = str(record["answer"]).strip()
    number = LETTERS.find(answer.upper()) if len(answer) == 1 and answer.isalpha() else -1
    if answer.isdecimal():
        number = int(answer)
    if not 0 <= number < len(choices):
        raise InputError(f"{place}: answer", f"expected one of {LETTERS[: len(choices)]}, got {answer[:60]!r}")
    return Question(str(record["question"]).strip(), choices, number, str(record.get("subject") or subject), place)


def by_likelihood(
    model: LanguageModel,
    interventions: Interventions,
    settings: Sequence[int],
    exam: Exam,
    *,
    shots: int,
) -> dict[int, list[int]]:
    """Return the letter that each setting finds likeliest after "Answer:", plain text as published.

    Letters of several tokens count with the sum of their log probabilities.
    """
    room = model.config.context_length
    rows, owners = [], []  # what to run, and (setting, question, choice or None for all) of each
    endings: list[list[list[int]]] = []
    for number, question in enumerate(exam.questions):
        whole = _fit(
            lambda n, q=question: [
                model.tokenizer.encode(f"{exam.prompt(q, n)} {LETTERS[choice]}") for choice in range(len(q.choices))
            ],
            shots,
            room,
            question,
        )
        shared = _common(whole)
        endings.append([ids[shared:] for ids in whole])
        alone = all(len(ids) == shared + 1 for ids in whole)
        for setting in settings:
            for choice, ids in [(None, whole[0][:shared])] if alone else enumerate(ids[:-1] for ids in whole):
                rows.append((setting, ids))
                owners.append((setting, number, choice))
    scores = {setting: [[0.0] * len(question.choices) for question in exam.questions] for setting in settings}
    single = [choice is None for _, _, choice in owners]
    for kind in (True, False):
        chosen = [place for place, is_single in enumerate(single) if is_single == kind]
        found = each_logits(model, interventions, [rows[place] for place in chosen], last=kind)
        for place, logits in zip(chosen, found, strict=True):
            setting, number, choice = owners[place]
            log_p = logits.log_softmax(-1)
            if choice is None:
                scores[setting][number] = [log_p[0, ending[0]].item() for ending in endings[number]]
            else:
                tokens = endings[number][choice]
                scores[setting][number][choice] = sum(
                    log_p[len(log_p) - len(tokens) + place, token].item() for place, token in enumerate(tokens)
                )
    return {
        setting: [max(range(len(row)), key=lambda choice, row=row: (row[choice], -choice)) for row in found]
        for setting, found in scores.items()
    }


def generation_prompts(model: LanguageModel, exam: Exam, *, shots: int, room: int, chat: bool | None) -> list:
    """The questions as a user's messages, for answers in the model's own words: TokenPrompts."""

    def encode(question: Question, n: int) -> TokenPrompt:
        letters = ", ".join(LETTERS[: len(question.choices) - 1]) + f" or {LETTERS[len(question.choices) - 1]}"
        text = exam.prompt(question, n)
        if model.uses_chat(chat):
            text = text.removesuffix("Answer:") + f"Answer with one letter: {letters}."
        return model.encode(PromptSet((text,), (question.place,)), chat=chat)[0]

    limit = model.config.context_length - room
    return [
        TokenPrompt(_fit(lambda n, q=question: [encode(q, n).ids], shots, limit, question)[0], question.place)
        for question in exam.questions
    ]


def parse_letter(answer: str, n_choices: int) -> int | None:
    """Return the number of the choice that an answer names, None where it names none.

    "Answer: B", "The answer is (B).", "B. Because ..." and "B" name B: first what follows the word "answer", then a
    letter at the beginning, then the first capital letter that stands alone. "A" as an article at the beginning of a
    sentence, followed by a lower-case word, is none.
    """
    letters = LETTERS[:n_choices]
    alone = rf"\(?\b([{letters}])\b(?! [a-z'])\)?"
    for pattern in (rf"(?i:answer)\s*(?i:is|:)?\s*:?\s*\**{alone}", rf"^\W*{alone}", alone):
        found = re.search(pattern, answer)
        if found:
            return letters.index(found.group(1))
    return None


def _fit(encode: Callable[[int], list[list[int]]], shots: int, room: int, question: Question) -> list[list[int]]:
    """``encode(n)`` with the most examples, at most ``shots``, that leave it short enough for the model."""
    for n in range(shots, -1, -1):
        ids = encode(n)
        if max(map(len, ids)) <= room:
            return ids
    raise InputError(question.place, f"has {max(map(len, ids))} tokens without examples, there is room for {room}")


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with; at least one of each row is left over."""
    shortest = min(map(len, rows)) - 1
    return next((n for n in range(shortest) if len({row[n] for row in rows}) > 1), shortest)
