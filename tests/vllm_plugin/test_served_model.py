"""The hash of the served model: that of ``load``, so that a circuit of another model is refused."""

from types import SimpleNamespace

import pytest
import torch

from cna_kernels import Circuit, InputError
from cna_kernels.errors import InputWarning
from cna_kernels.model import load
from cna_kernels.vllm.identity import check_model, identity_of
from tiny import write_language_model


def config(directory):
    return SimpleNamespace(model=str(directory), revision=None)


def circuit(**model):
    return Circuit(((0, 1, 1.0),), 3, 48, model=model or None)


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "qwen2"])
def test_the_hash_is_that_of_load(tmp_path, variant, shards):
    write_language_model(tmp_path, variant, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shards == "20KB"
    expected = load(tmp_path).identity()
    found = identity_of(config(tmp_path))
    assert found == {"name": tmp_path.name, "decoder_sha256": expected["decoder_sha256"]}
    check_model(circuit(**expected), "circuit", config(tmp_path))
    check_model(circuit(), "circuit", config(tmp_path))
    with pytest.raises(InputError, match=r"circuit: model\.decoder_sha256: made for another model"):
        check_model(circuit(**{**expected, "decoder_sha256": "0" * 64}), "circuit", config(tmp_path))


def test_where_there_is_no_hash_a_warning_says_so(tmp_path):
    known = {"name": "m", "decoder_sha256": "0" * 64}
    with pytest.warns(InputWarning, match="whether they are the same is not known"):
        check_model(circuit(**known), "circuit", config(tmp_path / "absent"))
    write_language_model(tmp_path, dtype=torch.float16)
    assert "decoder_sha256" not in identity_of(config(tmp_path)), "fp16 cannot hold every bf16 number"
    with pytest.warns(InputWarning, match="is not known"):
        check_model(circuit(name="m"), "circuit", config(tmp_path))
