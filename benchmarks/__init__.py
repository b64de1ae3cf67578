"""Load tools: a load generator for any OpenAI-compatible server, its workloads, and a baseline server."""
