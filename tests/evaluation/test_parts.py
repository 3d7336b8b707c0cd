import numpy as np
import pytest

from llmdistill.evaluation.parts import Parts


def test_arrays_are_measured_once(tmp_path):
    measured = {"kl": np.arange(3.0), "a/b": np.ones((2, 2))}
    found = Parts(tmp_path).arrays("fidelity", lambda: measured)
    again = Parts(tmp_path).arrays("fidelity", lambda: pytest.fail("it is there"))
    for name, values in measured.items():
        assert np.array_equal(found[name], values)
        assert np.array_equal(again[name], values)


def test_nothing_is_left_of_arrays_that_could_not_be_written(tmp_path):
    class Broken:
        def __array__(self, *how, **more):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        Parts(tmp_path).arrays("fidelity", lambda: {"kl": np.array([0.1]), "top1": Broken()})
    assert not list(tmp_path.iterdir())
