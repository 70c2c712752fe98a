"""The harness's model type cna: local tasks by likelihood and in own words, against plain code."""

import json
import os
import subprocess
import sys

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.model import demo_checkpoint, load
from cna_kernels.model.cli import main
from tiny import CHOOSE

pytest.importorskip("lm_eval")

CIRCUIT = Circuit(tuple((layer, 100 * layer + n, 1.0) for layer in range(8) for n in range(4)), 8, 1024)
QUESTIONS = [{"question": f"is {n} more than {n * n % 7}?", "right": n % 3} for n in range(12)]
CHOICES = ["yes", "no", "who knows"]
TASKS = {
    "choose": CHOOSE,
    "say": """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{right}}"
generation_kwargs: {until: ["e"], max_gen_toks: 9}
metric_list: [{metric: exact_match}]
""",
    "read": """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
""",
}


def test_arguments_that_do_not_exist_are_refused():
    from cna_kernels.model.evaluation.lm_eval_model import CnaLM

    with pytest.raises(InputError, match="model_args: circut: is no argument"):
        CnaLM(demo_checkpoint("instruct"), circut="c.json")
    with pytest.raises(InputError, match="model_args: sign: expected one of positive, negative, aligned, got 'up'"):
        CnaLM(demo_checkpoint("instruct"), circuit="c.json", sign="up")
    with pytest.raises(InputError, match="model_args: sign: is for a circuit"):
        CnaLM(demo_checkpoint("instruct"), sign="positive")


def test_one_sign_of_a_circuit(tmp_path):
    from cna_kernels.model.evaluation.lm_eval_model import CnaLM

    Circuit(((1, 2, 1.0), (3, 4, -1.0)), 8, 1024).save(tmp_path / "c.json")
    steered = CnaLM(demo_checkpoint("instruct"), circuit=tmp_path / "c.json", sign="negative")
    assert steered.interventions.variants[0].method.by.pairs == [(3, 4)]


def test_a_rendered_chat_brings_its_own_bos():
    from cna_kernels.model.evaluation.lm_eval_model import CnaLM

    found = CnaLM(demo_checkpoint("instruct"), dtype="float32")
    chat = found.apply_chat_template([{"role": "user", "content": "How do I open the vault?"}])
    bos, encode = found.prefix_token_id, found.model.tokenizer.encode_answer
    assert chat.startswith("<|begin_of_text|>") and encode(chat).count(bos) == 1 and encode(chat)[0] == bos
    assert found.tok_encode(chat) == encode(chat) and found.tok_encode("hi") == [bos, *encode("hi")]
    assert found._encode_pair(chat, "Sorry") == (encode(chat), encode(chat + "Sorry")[len(encode(chat)) :])


def test_a_task_that_does_not_exist(capsys):
    assert main(["lm-eval", "--model", "cna", "--model_args", "pretrained=demo", "--tasks", "no such task"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cna lm-eval: lm-eval: ") and "no such task" in last


@pytest.mark.exhaustive
def test_local_tasks_on_a_steered_model(tmp_path):
    directory = demo_checkpoint("instruct")
    CIRCUIT.save(tmp_path / "circuit.json")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(tmp_path / "data.jsonl")))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [
            sys.executable, "-m", "cna_kernels.model", "lm-eval", "--model", "cna", "--model_args",
            f"pretrained={directory},circuit={tmp_path}/circuit.json,multiplier=4.0,dtype=float32", "--tasks",
            ",".join(TASKS), "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "5",
            "--output_path", str(tmp_path / "out"), "--log_samples",
        ],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    samples = {
        name: [json.loads(line) for line in next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")).open()]
        for name in TASKS
    }
    model = load(directory, dtype="float32")
    assert done.stderr.count(f"cna lm-eval: {model.describe(False)}\n") == 1
    with model.steered(CIRCUIT, 4.0), torch.no_grad():
        right = 0
        for sample, question in zip(samples["choose"], QUESTIONS, strict=True):
            scores = []
            for choice, (response,) in zip(CHOICES, sample["resps"], strict=True):
                start = model.tokenizer.encode(question["question"])
                ids = model.tokenizer.encode(f"{question['question']} {choice}")
                log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
                scores.append(sum(log_p[place - 1, ids[place]].item() for place in range(len(start), len(ids))))
                assert float(response[0]) == pytest.approx(scores[-1], abs=1e-3)
            right += scores.index(max(scores)) == question["right"]
        for sample, question in zip(samples["read"], QUESTIONS, strict=True):
            ids = model.tokenizer.encode(question["question"])
            log_p = model(torch.tensor([[ids[0], *ids]]))[0].log_softmax(-1)  # as the harness's own models: two BOS
            total = sum(log_p[place, token].item() for place, token in enumerate(ids))
            assert float(sample["resps"][0][0]) == pytest.approx(total, abs=1e-3)
    found = json.loads(results.read_text())["results"]
    assert found["choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    for sample, question in zip(samples["say"], QUESTIONS, strict=True):
        whole = model.generate(question["question"], circuit=CIRCUIT, multiplier=4.0, max_new_tokens=9, chat=False)
        assert sample["resps"][0][0] == whole.split("e")[0]
