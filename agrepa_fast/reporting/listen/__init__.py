"""Blind listening tests: a page that listeners rate clips on, and what their ratings say."""
