"""The Auto classes of transformers know saved mixtures, whatever was imported first and how."""

import subprocess
import sys
import threading
import types

import pytest
from transformers import BertConfig, BertModel, BioGptConfig

import moefold
from moefold import auto_classes
from moefold.surgery.hosts import auto

ORDERS = {
    "transformers first": "import transformers; transformers.AutoModel; import moefold",
    # The module of this class, in the middle of being loaded, loads the Auto classes.
    "a config second": "import moefold; from transformers import BertConfig",
    "looked for before it is loaded": (
        "import moefold, importlib.util; "
        f"importlib.util.find_spec({auto_classes._MODULE!r}); import transformers"
    ),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_order_of_imports(order, tmp_path):
    model = BertModel(
        BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
        )
    )
    moefold.upcycle(model, inputs=False)
    moefold.save(model, tmp_path / "moe")
    code = (
        f"{order}\n"
        "import sys, transformers\n"
        f"model = transformers.AutoModel.from_pretrained({str(tmp_path / 'moe')!r})\n"
        "print(type(model).__name__)\n"
        "print([f for f in sys.meta_path if type(f).__module__ == 'moefold.auto_classes'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["MoefoldBertModel", "[]"], done.stderr


def test_a_transformers_of_other_insides_is_imported_all_the_same():
    strange = types.SimpleNamespace(CONFIG_MAPPING={})
    with pytest.warns(UserWarning, match=r"cannot be told of saved mixtures .*moefold\.load opens"):
        auto_classes._register(strange)


def test_many_threads_get_one_class():
    def ask(barrier: threading.Barrier, found: list[type]) -> None:
        barrier.wait()
        found.append(auto.config_class(BioGptConfig))

    found: list[type] = []
    barrier = threading.Barrier(8)
    threads = [threading.Thread(target=ask, args=(barrier, found)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
