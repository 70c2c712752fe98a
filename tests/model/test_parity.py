"""Layouts of checkpoints, tokenizers and templates, each a line, against what transformers makes of them.

A layout is a change of a small checkpoint. Compared are the ids of texts, decoded text, the chat's ids, and the logits.
Where the package refuses a layout, the line says with which words.
"""

import json
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from cna_kernels import InputError
from cna_kernels.model import load
from tiny import SPECIAL, TEXT_VOCABULARY, set_field, write_language_model

transformers = pytest.importorskip("transformers")

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TEXTS = [
    *("hello hello 123", "<s>hello", "a  <user> b <end>\nc", "héllo <new> x", "  hello ", "日本 hello"),
    "it 's . no , n't ! is ' a ?",
]
CHAT = [{"role": "user", "content": "héllo <b> 'x'"}]
IDS = torch.arange(40).reshape(2, 20) + 6


class Layout(NamedTuple):
    name: str
    change: Callable[[Any], Any]  # of the directory
    variant: str = "llama"
    refused: str = ""  # what the package says, where it refuses
    logits: bool = False  # whether the change may change logits: these are compared
    args: dict = {}  # noqa: RUF012  # variables of the template
    chat: list = CHAT
    after: tuple[int, ...] = ()  # transformers up to this version answers otherwise


def config(*drop, **changes):
    def change(directory):
        path = directory / "config.json"
        record = {name: value for name, value in json.loads(path.read_text()).items() if name not in drop}
        path.write_text(json.dumps(record | changes))

    return change


def rope(**parameters):
    """The newer spelling."""
    return config("rope_scaling", "rope_theta", rope_parameters={"rope_theta": 500.0} | parameters)


def old_rope(**parameters):
    return config("rope_parameters", rope_theta=500.0, rope_scaling=parameters)


def settings(**changes):
    return lambda directory: set_field(directory, **changes)


def file(name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda directory: (directory / name).write_text(text)


def tensors(edit):
    def change(directory):
        path = directory / "model.safetensors"
        found = load_file(path)
        edit(found)
        save_file(found, path, metadata={"format": "pt"})

    return change


def put(name, value):
    return tensors(lambda found: found.update({name: value}))


def sharded(edit=lambda directory, index: None):
    """The checkpoint in several files with an index, which ``edit`` changes."""

    def change(directory):
        (directory / "model.safetensors").rename(directory / "whole.safetensors")
        found = load_file(directory / "whole.safetensors")
        (directory / "whole.safetensors").unlink()
        names = sorted(found)
        index = {}
        for number, part in enumerate((names[::2], names[1::2])):
            shard = f"model-{number + 1:05d}-of-00002.safetensors"
            save_file({name: found[name] for name in part}, directory / shard, metadata={"format": "pt"})
            index |= dict.fromkeys(part, shard)
        edit(directory, index)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return change


def into_shard(name, value):
    def edit(directory, index):
        path = directory / "model-00001-of-00002.safetensors"
        save_file(load_file(path) | {name: value}, path, metadata={"format": "pt"})

    return sharded(edit)


def single_beside(stale):
    """An index with shards, and a single file beside it: another model's, or the only one that is left."""

    def change(directory):
        single = load_file(directory / "model.safetensors")
        sharded()(directory)
        if stale:
            for path in directory.glob("model-0*"):
                path.unlink()
        else:
            single["model.norm.weight"] = single["model.norm.weight"] * 2
        save_file(single, directory / "model.safetensors", metadata={"format": "pt"})

    return change


def tokenizer_json(edit):
    def change(directory):
        path = directory / "tokenizer.json"
        record = json.loads(path.read_text())
        edit(record)
        path.write_text(json.dumps(record))

    return change


def all_of(*changes):
    def change(directory):
        for one in changes:
            one(directory)

    return change


def moved(*names):
    """Fields of tokenizer_config.json in special_tokens_map.json instead."""

    def change(directory):
        path = directory / "tokenizer_config.json"
        record = json.loads(path.read_text())
        file("special_tokens_map.json", {name: record.pop(name) for name in names})(directory)
        path.write_text(json.dumps(record))

    return change


def token(content, special=True, **flags):
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return {"content": content, "special": special} | plain | flags


NEW = TEXT_VOCABULARY  # the id of a new token: the embedding has a few rows more
OWN = {str(number): token(text) for number, text in enumerate(SPECIAL)}
MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
LONG = dict(rope_type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0])
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}"
)
THOUGHTS = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}{% endfor %}"
NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "<user>{{ messages[0].content }}"}]

LAYOUTS = [
    # tokens
    Layout("as written", lambda directory: None, logits=True),
    Layout("bos and eos in special_tokens_map.json alone", moved("bos_token", "eos_token")),
    Layout("special_tokens_map.json says otherwise", file(MAP, {"eos_token": "<end>", "pad_token": token("<pad>")})),
    Layout("a token in added_tokens.json", file(ADDED, {"<new>": NEW})),
    Layout("two tokens in added_tokens.json, out of order", file(ADDED, {"[B]": NEW + 1, "<new>": NEW})),
    Layout("a token in added_tokens_decoder", settings(added_tokens_decoder={**OWN, str(NEW): token("<new>")})),
    Layout("a plain token in added_tokens_decoder",
           settings(added_tokens_decoder={**OWN, str(NEW): token("<new>", special=False, normalized=True)})),
    Layout("lstrip and rstrip", settings(added_tokens_decoder={**OWN, "3": token("<user>", lstrip=True, rstrip=True)})),
    Layout("added_tokens_decoder, and a map that is then not read",
           all_of(settings(added_tokens_decoder=OWN), file(MAP, {"eos_token": "<end>"}))),
    Layout("additional_special_tokens", settings(additional_special_tokens=["<new>", "<end>"])),
    Layout("extra_special_tokens, a list", settings(extra_special_tokens=["<new>"])),
    Layout("extra_special_tokens, names", settings(extra_special_tokens={"image_token": "<new>"})),
    Layout("a name of the model's own", settings(image_token="<new>", chat_template="{{ image_token }}x")),
    Layout("an EOS that is no token yet", settings(eos_token="<new>")),
    Layout("an EOS with flags", settings(eos_token={"__type": "AddedToken", **token("<new>", rstrip=True)})),
    Layout("no BOS", settings(bos_token=None)),
    Layout("special tokens split like text", settings(split_special_tokens=True)),
    Layout("add_bos_token beside tokenizer.json", settings(add_bos_token=False, add_eos_token=True)),
    Layout("no post-processor", tokenizer_json(lambda t: t.update(post_processor=None))),
    Layout("truncation and padding in the file", tokenizer_json(lambda t: t.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}))),
    Layout("clean_up_tokenization_spaces", settings(clean_up_tokenization_spaces=True)),
    Layout("clean_up_tokenization_spaces, forced", settings(clean_up_tokenization_spaces=True, **{FORCED: True})),
    Layout("model_specific_special_tokens", settings(model_specific_special_tokens={"image_token": "<new>"})),
    Layout("model_specific_special_tokens beside a name of the model's own", settings(
        model_specific_special_tokens={"image_token": "<new>"}, audio_token="[B]")),
    Layout("a prefix space in the file", tokenizer_json(lambda t: t["pre_tokenizer"].update(add_prefix_space=True))),
    Layout("no tokenizer_config.json", lambda directory: (directory / "tokenizer_config.json").unlink()),
    Layout("a token beyond the embedding that nobody uses", settings(pad_token="[PAD]")),
    # classes
    Layout("LlamaTokenizer with byte-level rules", settings(tokenizer_class="LlamaTokenizerFast"), after=(5, 17)),
    Layout("PreTrainedTokenizerFast", settings(tokenizer_class="PreTrainedTokenizerFast")),
    Layout("GPT2Tokenizer", settings(tokenizer_class="GPT2Tokenizer")),
    Layout("GPT2Tokenizer with a prefix space", settings(tokenizer_class="GPT2Tokenizer", add_prefix_space=True)),
    Layout("Qwen2Tokenizer", settings(tokenizer_class="Qwen2Tokenizer"), "qwen2"),
    Layout("no class, Qwen3", lambda directory: None, "qwen3"),
    Layout("another class, Qwen2", settings(tokenizer_class="PreTrainedTokenizerFast"), "qwen2"),
    Layout("LlamaTokenizer, Mistral", settings(tokenizer_class="LlamaTokenizer"), "mistral"),
    # templates
    Layout("{% generation %}", settings(chat_template=GENERATION)),
    Layout("tojson", settings(chat_template="{{ messages[0] | tojson }}")),
    Layout("tojson(ensure_ascii)", settings(chat_template="{{ messages[0] | tojson(ensure_ascii=True) }}")),
    Layout("tojson(indent, sort_keys, separators)", settings(
        chat_template="{{ messages[0] | tojson(indent=1, sort_keys=True, separators=(',', ':')) }}")),
    Layout("a list of templates", settings(chat_template=NAMED)),
    Layout("an object of templates", settings(chat_template={entry["name"]: entry["template"] for entry in NAMED})),
    Layout("no template named default", settings(chat_template=NAMED[:1]), refused="no chat template named 'default'"),
    Layout("chat_template.jinja before the field", file("chat_template.jinja", "<end>{{ messages[0].content }}")),
    Layout("a variable", settings(chat_template="{{ enable_thinking }}{{ x }}"), args={"enable_thinking": False}),
    Layout("the day", settings(chat_template="{{ strftime_now('%d %b %Y') }}")),
    Layout("two BOS in the template", settings(chat_template="<s><s>{{ messages[0].content }}")),
    Layout("loop controls", settings(chat_template="{% for m in messages %}{{ m.role }}{% break %}{% endfor %}")),
    *(Layout(f"a message's thought as {name!r}", settings(chat_template=THOUGHTS), chat=[{**CHAT[0], **given}],
             after=(5, 17)) for name, given in (
        ("reasoning", {"reasoning": "why"}), ("thinking", {"thinking": "why"}),
        ("reasoning_content", {"reasoning_content": "why"}), ("two of them", {"reasoning": "a", "thinking": "b"}),
        ("null and another", {"reasoning_content": None, "reasoning": "a"}))),
    # weights
    Layout("in shards", sharded(), logits=True),
    Layout("a single file beside an index", single_beside(stale=False), logits=True),
    Layout("a single file beside an index without shards", single_beside(stale=True), logits=True),
    Layout("inv_freq in a shard alone", into_shard("model.rotary_emb.inv_freq", torch.ones(4)), logits=True),
    Layout("a tensor in another shard than the index says", sharded(
        lambda _, index: index.update({"model.norm.weight": "model-00001-of-00002.safetensors"})), logits=True),
    Layout("a tensor that the index names and no shard has", sharded(
        lambda _, index: index.update({"model.extra": "model-00001-of-00002.safetensors"})), logits=True),
    Layout("a tied head in a shard", into_shard(HEAD, torch.ones(3)), "llama-tied", refused=f"'{HEAD}': differs from"),
    Layout("a tied head, equal", tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()})), "llama-tied", logits=True),
    Layout("a tied head under its own name alone", tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})), "llama-tied",
           logits=True),
    Layout("a tied head, listed in the index alone", sharded(
        lambda _, index: index.update({HEAD: "model-00001-of-00002.safetensors"})), "llama-tied", logits=True),
    Layout("an untied head that is missing", tensors(lambda t: t.pop(HEAD)), refused=f"'{HEAD}': is missing"),
    Layout("the decoder's own names", tensors(
        lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t)]), "llama-tied",
           logits=True),
    Layout("scales of a KV cache", put("model.layers.0.self_attn.k_proj.k_scale", torch.ones(1)), logits=True),
    Layout("a value head", put("v_head.summary.weight", torch.ones(1, 32)), logits=True),
    Layout("position ids", put("model.position_ids", torch.arange(4)), logits=True),
    Layout("a rotary table in fp64", put("model.rotary_emb.inv_freq", torch.ones(4, dtype=torch.float64)), logits=True),
    Layout("a bias of zeros", put("model.layers.0.self_attn.o_proj.bias", torch.zeros(32)), logits=True),
    Layout("a bias of ones", put("model.layers.0.self_attn.o_proj.bias", torch.ones(32)), refused="may change what"),
    Layout("a layer too many", tensors(lambda t: t.update(
        {name.replace(".2.", ".3."): t[name].clone() for name in list(t) if ".2." in name})), logits=True),
    Layout("weights in fp64", tensors(lambda t: t.update({EMBEDDING: t[EMBEDDING].double()})), logits=True),
    # config.json
    Layout("biases of the MLP", lambda directory: None, "llama-mlp-bias", logits=True),
    Layout("rope in both spellings: linear", config(rope_scaling=dict(rope_type="linear", factor=4.0)), logits=True),
    Layout("rope in both spellings: type", config(rope_scaling=dict(type="dynamic", factor=4.0),
           max_position_embeddings=16), logits=True),
    Layout("rope in both spellings: theta of the old one", all_of(rope(rope_type="default"), config(
        rope_scaling=dict(rope_type="linear", factor=4.0))), logits=True),
    Layout("an empty rope_scaling", all_of(rope(rope_type="default"), config(rope_scaling={})), logits=True),
    Layout("llama3, old", old_rope(**LLAMA3), logits=True),
    Layout("llama3, original length outside", all_of(rope(**LLAMA3), config(original_max_position_embeddings=8)),
           logits=True),
    Layout("yarn", rope(**YARN), "qwen2", logits=True),
    Layout("yarn, old", old_rope(**YARN), "qwen3", logits=True),
    Layout("yarn by type", config("rope_parameters", rope_scaling={"type": "yarn", "factor": 2.0}), logits=True),
    Layout("yarn with everything", rope(**YARN, beta_fast=16.0, beta_slow=2.0, truncate=False, mscale=1.0,
           mscale_all_dim=0.7), logits=True),
    Layout("yarn with its own temperature", rope(**YARN, attention_factor=1.3), logits=True),
    Layout("yarn without a factor", rope(**(YARN | {"factor": None})), logits=True),
    Layout("longrope, a long text", rope(**LONG, original_max_position_embeddings=16), logits=True),
    Layout("longrope, a short text", rope(**LONG, original_max_position_embeddings=32), logits=True),
    Layout("longrope with a factor", rope(**LONG, factor=4.0, original_max_position_embeddings=8), logits=True),
    Layout("an unknown rope", rope(rope_type="su", factor=2.0), refused="rope_type: expected default or"),
    Layout("no dtype", config("dtype", "torch_dtype"), logits=True),
    Layout("architectures of the decoder alone", config(architectures=["LlamaModel"]), logits=True),
    Layout("another architecture", config(architectures=["LlamaForSequenceClassification"]), refused="architectures:"),
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """variant -> a checkpoint of it with text files, written once."""
    written = {}

    def of(variant):
        if variant not in written:
            directory = tmp_path_factory.mktemp(variant)
            written[variant] = write_language_model(directory, variant, vocab_size=TEXT_VOCABULARY + 8)
        return written[variant]

    return of


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.name for layout in LAYOUTS])
def test_a_layout(checkpoints, tmp_path, layout):
    if layout.after >= VERSION:
        pytest.skip(f"transformers {transformers.__version__} answers otherwise")
    directory = tmp_path / "model"
    shutil.copytree(checkpoints(layout.variant), directory)
    layout.change(directory)
    if layout.refused:
        with pytest.raises(InputError, match=re.escape(layout.refused)) as caught:
            load(directory)
        assert str(directory) in str(caught.value)
        return
    model, theirs = load(directory, dtype="float32"), transformers.AutoTokenizer.from_pretrained(str(directory))
    ours = model.tokenizer
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode_answer(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    if theirs.chat_template is not None:
        how = dict(add_generation_prompt=True, return_dict=False, **layout.args)
        text = theirs.apply_chat_template(layout.chat, tokenize=False, **how)
        assert ours.template.render([layout.chat], layout.args) == [text]
        ids = theirs.apply_chat_template(layout.chat, **how)
        assert ours.encode_messages([layout.chat], template_args=layout.args) == [ids]
    else:
        assert ours.template is None
    if layout.logits:
        reference = transformers.AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
        with torch.no_grad():
            expected = reference(IDS).logits
        assert (model(IDS) - expected).abs().max() < 1e-4 and expected.std() > 0.1
        config_dtype = transformers.AutoModelForCausalLM.from_pretrained(str(directory)).dtype
        assert load(directory).transformer.dtype == config_dtype


def test_there_are_layouts_enough():
    assert len(LAYOUTS) >= 80 and len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
