"""HTTP server: a T5 with an adapter per request, in the OpenAI API, and a page to try it.

One thread owns JAX (`scheduler`): rows of all requests share running batches (`lane`), one for each
shape of adapters. `store` keeps the adapters by name, `api` speaks HTTP, `server` starts all of it.
"""
