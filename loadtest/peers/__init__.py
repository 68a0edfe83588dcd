"""What people would pick instead: other routers and gateways, each in an environment of its own, made on demand."""
