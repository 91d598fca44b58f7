"""Benchmarks beside other queues and servers; docs/benchmarks/README.md describes them."""
