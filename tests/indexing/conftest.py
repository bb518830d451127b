"""Encoders and passages as of the tests of retrieval."""

from __future__ import annotations

from tests.retrieval.conftest import *  # noqa: F403
