"""Tests of the parts, and of the contracts between them."""
