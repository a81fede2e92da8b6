"""`moefold doctor --leakage` finds a leak in a saved model, and none where there is none."""

import pytest

import moefold
from moefold import routers
from moefold.cli import main
from tests.rerouting.models import build


@pytest.mark.parametrize(("rule", "status"), [("group", 1), ("prefix", 0)])
def test_a_saved_model_is_measured_by_its_own_router(tmp_path, capsys, rule, status):
    model = build("olmoe")
    moefold.reroute(model, routers.config("unified", budget=1.5, inference=rule))
    moefold.save(model, tmp_path / "model")
    assert main(["doctor", "--leakage", str(tmp_path / "model")]) == status
    said = capsys.readouterr().out
    assert ("later tokens           LEAKS" in said) == bool(status)
    assert ("token by token         LEAKS" in said) == bool(status)


def test_the_model_itself_does_not_leak(tmp_path, capsys):
    build("olmoe").save_pretrained(tmp_path)
    assert main(["doctor", "--leakage", str(tmp_path)]) == 0
    assert "later tokens           clean" in capsys.readouterr().out


def test_a_folder_without_a_model_is_refused(tmp_path, capsys):
    assert main(["doctor", "--leakage", str(tmp_path)]) != 0
    assert str(tmp_path) in capsys.readouterr().err
