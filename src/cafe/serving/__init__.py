"""HTTP over one copy of the weights: embeddings, chat, and a page to search and ask a collection.

config       what is allowed, and how much of it
jobs         one unit of work for the model, with its future
engine       one thread that runs the model: packs waiting jobs, then decodes a token for all chats
encoding     a request's content -> jobs
metrics      what Prometheus reads
"""
