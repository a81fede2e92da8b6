"""Where timm cannot be imported, a stand-in for its block can be, under the same name."""

import sys

import pytest

from tests.surgery.hosts.cases import stand_in_for_timm


@pytest.fixture(autouse=True)
def _timm_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in stand_in_for_timm().items():
        monkeypatch.setitem(sys.modules, name, module)
