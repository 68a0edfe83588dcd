"""What runs the processes: Ray (the only module that touches its internals), HAProxy, Kubernetes."""
