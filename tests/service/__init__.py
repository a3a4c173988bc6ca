"""Tests of the service, a file a module."""
