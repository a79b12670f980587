"""Data sets as shards: making, storing, reading and streaming them.

The way of a video into shards: layouts.py finds it, inputs.py opens it, decode.py takes its frames,
and format.py packs them. workers.py runs this in processes, storage.py reads and writes the files,
inspect.py checks the result, and demo.py draws the raw files of the demonstration.
The way into training: stream.py orders the samples of an epoch, and views.py draws their views.
"""
