"""What a request must pass before it may cost anything: the bounds on its body."""
