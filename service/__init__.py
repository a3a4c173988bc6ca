"""The Latch service: one hidden state per session, thousands of sessions advanced together."""
