"""Directions on a model that transformers runs: equal to our own forward where both serve it, refused where inexact."""

import pytest
import torch

from cna_kernels import InputError
from cna_kernels.model import load
from cna_kernels.model.evaluation import directions
from cna_kernels.model.evaluation.directions import Direction, DirectionTable
from cna_kernels.model.steering import Steering
from families import write_family

pytest.importorskip("transformers")


def random_directions(n_layers, n_hidden):
    draw = torch.Generator().manual_seed(0)
    residual = torch.randn(n_layers, n_hidden, generator=draw)
    unit = torch.nn.functional.normalize(torch.randn(1, n_hidden, generator=draw))
    return Direction("residual", residual), Direction("mlp", residual.flip(0)), Direction("writes", unit)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def both(request, tmp_path_factory):
    path, _ = write_family(request.param, tmp_path_factory.mktemp(request.param))
    return [load(path, engine=engine, device="cpu") for engine in ("own", "transformers")]


@pytest.mark.parametrize("chosen", [(0, -1, 1), (2, 2, -1), (0, 1, 2)], ids=str)
def test_directions_are_those_of_our_own_forward(both, chosen):
    ids = torch.randint(6, 200, (3, 11), generator=torch.Generator().manual_seed(1))
    found, plain = [], []
    for model in both:
        config = model.config
        given = random_directions(config.num_hidden_layers, config.hidden_size)
        table = DirectionTable(given, [0.5, -0.5, 1.0], config.num_hidden_layers, config.hidden_size)
        steer = Steering(None, None, table.row_direction(chosen))
        with torch.inference_mode():
            found.append(model.transformer.logits(model.transformer.hidden(ids, steer=steer)))
            plain.append(model(ids))  # no hook is left behind
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain[1], plain[0], rtol=1e-4, atol=1e-4)
    changed = (found[0] - plain[0]).abs().amax((1, 2)) > 1e-2
    assert changed.tolist() == [number >= 0 for number in chosen]


def test_mean_states_are_those_of_our_own_forward(both):
    from cna_kernels.model.prompts.files import PromptSet

    prompts = PromptSet.of(["open it please", "why", "a somewhat longer prompt than those"], "p")
    own, theirs = (directions.mean_states(model.transformer, model.encode(prompts)) for model in both)
    for site in ("residual", "mlp"):
        torch.testing.assert_close(theirs[site], own[site], rtol=1e-4, atol=1e-4)


def last_stream(model, ids, steer):
    """The residual stream behind the last layer."""
    seen = []
    handle = model.transformer.decoder.layers[-1].register_forward_hook(lambda _, __, y: seen.append(y))
    model.transformer.hidden(ids, steer=steer)
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("name", ["gemma3", "phi3", "mixtral"])
def test_what_a_layer_adds_is_looked_at(name, tmp_path):
    """Gemma norms what attention and MLP return: taking a direction out of these would be another thing."""
    model = load(write_family(name, tmp_path)[0], device="cpu")
    n_layers, n_hidden = model.config.num_hidden_layers, model.config.hidden_size
    given = random_directions(n_layers, n_hidden)
    ids = torch.randint(6, 200, (2, 7), generator=torch.Generator().manual_seed(1))
    for number in range(3):
        table = DirectionTable(given, [0.5, -0.5, 1.0], n_layers, n_hidden)
        steer = Steering(None, None, table.row_direction([number, -1]))
        with torch.inference_mode():
            plain = model.transformer.hidden(ids)
            if name == "gemma3" and number == 2:
                with pytest.raises(InputError, match=r"model: layers\[0\] adds to the stream what its attention and"):
                    model.transformer.hidden(ids, steer=steer)
                assert torch.equal(model.transformer.hidden(ids), plain), "the hooks are gone"
                continue
            hidden = model.transformer.hidden(ids, steer=steer)
            assert (hidden - plain)[0].abs().max() > 1e-2 and (hidden - plain)[1].abs().max() < 1e-4
            if number == 2 and name == "phi3":  # the stream holds nothing of the direction: only the last norm follows
                last = last_stream(model, ids, steer)
                assert (last[0] @ given[2].vectors[0]).abs().max() < 1e-4 * last[0].abs().max()
