"""The load-test client: what a capacity owner runs against an engine and against the gateway in front of it.

It is a client: it imports nothing of `serving`, speaks HTTP to any OpenAI endpoint, and reports its own
CPU use, so that a figure it prints is the target's and not its own.
"""
