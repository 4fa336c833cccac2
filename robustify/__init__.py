"""Harden, measure and publish image classifiers."""
