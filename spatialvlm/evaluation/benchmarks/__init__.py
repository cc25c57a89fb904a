"""Benchmark families: schema, prompts and aggregation of each."""
