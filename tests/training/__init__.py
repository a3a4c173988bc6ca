"""Tests of the offline half."""
