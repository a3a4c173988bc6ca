"""Latch's offline half: recurrent units, their training, and the model folders that the service loads.

Its one rule: it hands over files only (`models/manifest.schema.json`), and imports neither FastAPI nor `service`.
"""
