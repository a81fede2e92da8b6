"""An upcycled model under torch.compile computes what it computes without."""

import pytest
import torch

import moefold
from moefold import MoEConfig, UpcycleConfig, routers
from moefold.surgery import Copies

pytestmark = [
    pytest.mark.compile,
    # torch's own, while it traces an autograd function.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning"),
]


@pytest.mark.parametrize("name", ["token-choice", "expert-choice", "soft"])
def test_outputs_and_gradients(tiny, batch, name):
    model = tiny(num_hidden_layers=2).train()
    moe = MoEConfig(num_experts=4, router=routers.config(name))
    moefold.upcycle(model, UpcycleConfig(moe=moe, birth=Copies(router_std=1.0, copy_noise_std=0.1)))
    real = batch["attention_mask"].bool()

    def run(called: torch.nn.Module) -> tuple[torch.Tensor, dict]:
        model.zero_grad()
        output = called(**batch).last_hidden_state[real]
        output.square().sum().backward()
        return output.detach(), {
            n: p.grad for n, p in model.named_parameters() if p.grad is not None
        }

    expected, slopes = run(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, others = run(compiled)  # pyright: ignore[reportArgumentType]
    # float32, the same products in another order.
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    for parameter, slope in slopes.items():
        assert torch.allclose(slope, others[parameter], rtol=1e-3, atol=1e-4), parameter
    # What is not used (the pooler) has no gradient, or one of zeros, which compiled code makes.
    assert not any(others[parameter].any() for parameter in others.keys() - slopes.keys())
    with moefold.record_routing(model) as record:
        compiled(**batch)
    (routing,) = record["encoder.layer.1.moe"]
    assert routing.mask is not None
    assert torch.equal(routing.mask, real)


def test_padding_further_when_compiled(tiny, batch):
    model = tiny(num_hidden_layers=1).double()
    router = routers.config("expert-choice", capacity_factor=1.5)
    moe = MoEConfig(num_experts=4, router=router)
    birth = Copies(router_std=1.0, copy_noise_std=0.1)
    moefold.upcycle(model, UpcycleConfig(moe=moe, sites="all", birth=birth))
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch)[0][real]
        compiled = torch.compile(model, backend="aot_eager")
        more = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in batch.items()}
        # float64: the order of summation.
        assert (compiled(**batch)[0][real] - expected).abs().max() < 1e-11
        assert (compiled(**more)[0][:, :7][real] - expected).abs().max() < 1e-11
