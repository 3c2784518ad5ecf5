"""Samples to train on: conversations from files, generators that draw them, and the collator that batches them."""
