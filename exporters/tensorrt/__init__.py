"""Engines: built in a process of their own, from any graph of a bundle."""
