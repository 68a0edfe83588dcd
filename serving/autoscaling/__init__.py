"""How many replicas a model needs: signals, a pure policy, and the replay of both on recorded traces."""
