"""What computes: the vLLM replica, where its weights come from, and the fake engine."""
