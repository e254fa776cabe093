"""Blind listening tests: a page that listeners rate clips on, and the evaluation of their ratings."""
