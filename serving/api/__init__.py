"""The gateway's HTTP side: what a client sees, and the way of its bytes to an engine and back."""
