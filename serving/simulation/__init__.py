"""Replays recorded traces against the live policies in virtual time; everything it prints is labelled simulated."""
