"""What an operator does with a cluster on Kubernetes: look before installing and after, roll out, drain, ask for help.

Only `client` imports the Kubernetes client, and nothing that serves imports this package. Decisions (`checks`,
`rollout`) are pure; what reads and writes stands around them. Every command asks for no more than its rules in
`permissions`; a test holds each against a server that grants exactly these.
"""
