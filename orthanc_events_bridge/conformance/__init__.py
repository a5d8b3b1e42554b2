"""Plays events to a consumer in whatever language, and says which rules of docs/any-language.md it meets.

`orthanc_events_bridge.conformance.playing` is the way through it: events at the broker, the program started, ended,
killed and started again. What it does is seen from outside: in the lines that it prints, and in its dead letters.
"""
