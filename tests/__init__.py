"""The tests, a folder for each thing; support/ is what they share."""

import pytest

pytest.register_assert_rewrite("tests.support")
