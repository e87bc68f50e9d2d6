"""Figures between two log rows: exact means, exact step of a NaN."""

import pytest
import torch

from clustermim.errors import NonFiniteLossError
from clustermim.training.launch import make_fabric
from clustermim.training.ledger import Ledger, check_weights


def test_means_and_state():
    one, two = Ledger(make_fabric("cpu"), ""), Ledger(make_fabric("cpu"), "")
    assert one.close() == {}
    for step in range(1, 5):
        one.add(step, {"loss": torch.tensor(float(step)), "accuracy": torch.tensor(0.5)})
        if step == 2:
            one.settle()
            two.restore(one.state())
        if step > 2:
            two.add(step, {"loss": torch.tensor(float(step)), "accuracy": torch.tensor(0.5)})
    assert one.close() == two.close() == {"loss": 2.5, "accuracy": 0.5}
    assert one.state() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_step_is_named(bad):
    ledger = Ledger(make_fabric("cpu"), "Lower the rate.")
    for step, loss in ((7, 1.0), (8, bad), (9, float("nan"))):
        ledger.add(step, {"loss": torch.tensor(loss)})
    with pytest.raises(NonFiniteLossError, match=r"step 8 .*Lower the rate"):
        ledger.settle()


def test_spoilt_weights():
    check_weights([torch.ones(3), torch.zeros(2, 2)], 3, "")
    with pytest.raises(NonFiniteLossError, match="step 3"):
        check_weights([torch.ones(3), torch.tensor([1.0, float("nan")])], 3, "")
