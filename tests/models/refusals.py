"""What must not load: one line that names the culprit and the cure."""

import pytest

from minillm_jax.models import hf
from minillm_jax.types import InputError


def refused(folder, *said):
    """Loading `folder` fails with one line that has all these words."""
    with pytest.raises(InputError) as caught:
        hf.load(folder)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message
