"""Suites of recovery: what distillation costs and wins."""
