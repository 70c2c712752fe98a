"""Multiple choice: files in MMLU's layout, prompts, likelihoods against one forward pass a choice, parsed letters."""

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.circuit import Circuit
from cna_kernels.model import load
from cna_kernels.model.discovery.packing import TokenPrompt
from cna_kernels.model.evaluation import multiple_choice
from cna_kernels.model.evaluation.answers import answer_all
from cna_kernels.model.evaluation.interventions import UNSTEERED, Interventions, Method, Variant
from cna_kernels.model.evaluation.multiple_choice import (
    by_likelihood,
    generation_prompts,
    parse_letter,
    read_multiple_choice,
)
from cna_kernels.model.evaluation.store import Store
from tiny import write_language_model, write_mmlu

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(write_language_model(tmp_path_factory.mktemp("m"), max_position_embeddings=512))


def test_a_directory_in_the_usual_layout(tmp_path):
    mmlu = read_multiple_choice(write_mmlu(tmp_path), shots=1)
    assert len(mmlu.questions) == 12 and {q.subject for q in mmlu.questions} == {"abstract_algebra", "virology"}
    first = mmlu.questions[0]
    assert first.text == "abs test 0?" and first.choices == ("0, yes", "1, yes", "2, yes", "3, yes")
    assert first.answer == 0 and first.place.endswith("abstract_algebra_test.csv:1")
    assert mmlu.prompt(first, 1) == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "abs dev 0?\nA. 0, yes\nB. 1, yes\nC. 2, yes\nD. 3, yes\nAnswer: A\n\n"
        "abs test 0?\nA. 0, yes\nB. 1, yes\nC. 2, yes\nD. 3, yes\nAnswer:"
    )
    assert "dev" not in mmlu.prompt(first, 0)


def test_limit_and_subjects(tmp_path):
    write_mmlu(tmp_path)
    drawn = read_multiple_choice(tmp_path, limit=5, seed=3)
    assert [q.place for q in drawn.questions] == [
        q.place for q in read_multiple_choice(tmp_path, limit=5, seed=3).questions
    ]
    assert drawn.questions != read_multiple_choice(tmp_path, limit=5, seed=4).questions
    assert {q.subject for q in read_multiple_choice(tmp_path, subjects=["virology"]).questions} == {"virology"}
    with pytest.raises(InputError, match="has no subject 'astrology'; it has abstract_algebra, virology"):
        read_multiple_choice(tmp_path, subjects=["astrology"])


def test_parquet_and_csv_with_a_header(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = [
        {"question": "q1", "subject": "virology", "choices": ["a", "b", "c", "d"], "answer": 2},
        {"question": "q2", "subject": "law", "choices": ["a", "b"], "answer": 1},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "test-00000-of-00001.parquet")
    mmlu = read_multiple_choice(tmp_path)
    assert [(q.text, q.subject, q.answer, len(q.choices)) for q in mmlu.questions] == [
        ("q1", "virology", 2, 4),
        ("q2", "law", 1, 2),
    ]
    headed = tmp_path / "own.csv"
    headed.write_text("question,A,B,C,answer\nwhy?,x,y,z,C\n")
    (question,) = read_multiple_choice(headed).questions
    assert question.choices == ("x", "y", "z") and question.answer == 2 and question.subject == "own"
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.parquet: is not parquet"):
        read_multiple_choice(tmp_path / "bad.parquet")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a,b,c,d,E\n", r"x_test\.csv:1: answer: expected one of ABCD, got 'E'"),
        ("q,a,b,c,d,A\nq,a,b,c,d,\n", r"x_test\.csv:2: has no answer"),
        (",a,b,c,d,A\n", r"x_test\.csv:1: has no question"),
        ("q,A\n", r"x_test\.csv:1: expected question, choices and answer, got 2 columns"),
        ("question,A,B,answer\nq,a,b\n", r"x_test\.csv:2: expected 4 columns, got 3"),
        ("question,text,answer\nq,a,b\n", r"x_test\.csv:2: expected 2 to 10 choices, got 0"),
        ("question,A,A,answer\nq,a,b,A\n", r"x_test\.csv:1: names a column twice"),
        ("q,a,,c,d,A\n", r"x_test\.csv:1: choices: choice B is empty"),
        ("\n\n", r"x_test\.csv: holds no question"),
        ('q,"a,b,c,d,A\n', r"x_test\.csv:\d: is not CSV"),
    ],
)
def test_questions_that_cannot_be_used(tmp_path, content, message):
    path = tmp_path / "x_test.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_multiple_choice(path)


def test_trailing_empty_choices_are_none_and_a_question_may_say_question(tmp_path):
    path = tmp_path / "x_test.csv"
    path.write_text("q,a,b,c,,A\nWhat is asked?,question,answer,b,c,A\n")
    first, second = read_multiple_choice(path).questions
    assert first.choices == ("a", "b", "c") and second.choices == ("question", "answer", "b", "c")


def test_the_same_question_in_two_files_is_refused(tmp_path):
    for name in ("all", "law"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "law_test.csv").write_text("q,a,b,c,d,A\n")
    with pytest.raises(InputError, match=r"asks this, too; give one of the two"):
        read_multiple_choice(tmp_path)
    assert len(read_multiple_choice(tmp_path / "all").questions) == 1


def test_the_hash_of_an_exam_does_not_depend_on_its_place(tmp_path):
    hashes = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "law_test.csv").write_text("q,a,b,c,d,A\n")
        hashes.add(read_multiple_choice(tmp_path / name).sha256)
    assert len(hashes) == 1


def test_other_encodings_and_missing_files(tmp_path):
    path = tmp_path / "x_test.csv"
    path.write_bytes("q\xe4,a,b,c,d,A\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8 text"):
        read_multiple_choice(path)
    with pytest.raises(InputError, match="neither a file nor a directory"):
        read_multiple_choice(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no"):
        read_multiple_choice(tmp_path / "empty")


@pytest.mark.parametrize("long_letters", [False, True], ids=["a letter is a token", "several tokens"])
def test_likelihoods_equal_one_forward_pass_for_each_choice(tmp_path, model, monkeypatch, long_letters):
    if long_letters:
        monkeypatch.setattr(multiple_choice, "LETTERS", ["AA", "BX", "BY", "CA"])
    mmlu = read_multiple_choice(write_mmlu(tmp_path, n=4), shots=1) if not long_letters else None
    if long_letters:
        mmlu = multiple_choice.MultipleChoice(
            tuple(
                multiple_choice.Question(f"q {n}", ("one", "two", "three", "four"), n, "law", f"q{n}") for n in range(4)
            ),
            {},
        )
    circuit = Circuit(((0, 3, 1.0), (1, 40, 1.0), (2, 7, 1.0)), 3, 48)
    interventions = Interventions(model, [UNSTEERED, Variant(Method("c", "", circuit), 6.0)])
    asked = multiple_choice.likelihood_prompts(model, mmlu, shots=1)
    found = by_likelihood(model, interventions, [0, 1], asked)
    for variant, choices in found.items():
        for question, chosen in zip(mmlu.questions, choices, strict=True):
            scores = []
            for letter in list(multiple_choice.LETTERS)[:4]:
                start = model.tokenizer.encode(mmlu.prompt(question, 1))
                ids = model.tokenizer.encode(f"{mmlu.prompt(question, 1)} {letter}")
                with torch.no_grad():
                    steer = interventions.steer([variant])
                    log_p = model.transformer(torch.tensor([ids]), steer=steer)[0].log_softmax(-1)
                scores.append(sum(log_p[place - 1, ids[place]].item() for place in range(len(start), len(ids))))
            assert scores[chosen] >= max(scores) - 1e-4
    assert long_letters or found[0] != found[1], "steering without effect would hide everything"


def test_pronouns_are_no_choice():
    assert parse_letter("I'm sorry, but I can't help", 10) is None and parse_letter("I think so", 10) is None
    assert parse_letter("I", 10) == 8


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", 1), ("b", None), (" C.", 2), ("(D) because", 3), ("The answer is (A).", 0), ("Answer: C", 2),
        ("answer is: **B**", 1), ("I think A is wrong. The answer is D", 3), ("A cat sat there", None),
        ("The answer is B because it stores energy", 1), ("B is correct.", 1), ("Answer: D is right", 3),
        (" B\n\nWhat is it?\nAnswer: C", 1), ("A is correct", 0), ("The answer is A because", 0),
        ("It must be B, of course", 1), ("E", None), ("", None), ("BAD", None), ("A", 0), ("A: first", 0),
        ("A) first", 0), ("<think>\nOkay. A is wrong. B is right.\n</think>\n\nC", 2), ("<think>Answer: A", None),
        ("Answer: A? No.</think>B", 1),
    ],
)  # fmt: skip
def test_letters_are_parsed(answer, letter):
    assert parse_letter(answer, 4) == letter


def test_a_model_that_repeats_one_letter_scores_that_letters_share(tmp_path, model, monkeypatch):
    mmlu = read_multiple_choice(write_mmlu(tmp_path, n=7), shots=0)
    tokens = model.tokenizer.encode_answer("C")
    monkeypatch.setattr(
        "cna_kernels.model.evaluation.answers.generate", lambda _, members, **__: [tokens for _ in members]
    )
    prompts = [
        TokenPrompt(asked.rows[0], "question") for asked in generation_prompts(model, mmlu, shots=0, room=4, chat=None)
    ]
    with Store(None, {}) as store:
        (answers,) = answer_all(
            model, Interventions(model, [UNSTEERED]), [0], prompts, max_new_tokens=4, batch=5, store=store, name="x"
        ).values()
    said = [parse_letter(answer.text, 4) for answer in answers]
    right = [question.answer for question in mmlu.questions]
    accuracy = sum(a == b for a, b in zip(said, right, strict=True)) / len(right)
    assert accuracy == right.count(2) / len(right) and 0 < accuracy < 0.5


def test_examples_are_dropped_where_the_context_is_short(tmp_path_factory, tmp_path):
    small = load(write_language_model(tmp_path_factory.mktemp("m"), max_position_embeddings=200))
    mmlu = read_multiple_choice(write_mmlu(tmp_path, n=1), shots=2)
    asked = generation_prompts(small, mmlu, shots=2, room=20, chat=False)
    assert all(len(one.rows[0]) <= 180 for one in asked) and {one.shots for one in asked} < {0, 1, 2}
    with pytest.raises(InputError, match="tokens without examples, there is room for"):
        generation_prompts(small, mmlu, shots=2, room=195, chat=False)
