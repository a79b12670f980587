"""Data sets as shards: made by data_prep.py, streamed into training; see docs/code.md."""
